//! Idle cores that do not halt.
//!
//! A core that has nothing to do halts, and whoever wakes it waits for that; on a virtual machine both are exits to the
//! hypervisor, which take longer than a packet's whole way. Where round trips matter, machines are set up so that idle cores
//! poll instead (tuned's `latency-performance`, the kernel's `idle=poll`).

use std::{
    fs::{File, OpenOptions},
    io::Write as _,
    path::Path,
};

use anyhow::{Context as _, Result};

/// Takes the longest time in µs, an `i32`, that waking may take, and forgets it when it is closed
/// (Documentation/power/pm_qos_interface.rst).
const LATENCY: &str = "/dev/cpu_dma_latency";
/// The least demanding of the second core's idle states; it is `POLL` where cores can poll.
const STATE: &str = "/sys/devices/system/cpu/cpu1/cpuidle/state0/name";

/// Keeps idle cores from halting as long as it lives.
pub(super) struct Awake {
    _latency: File,
}

impl Awake {
    /// [`None`] where the kernel has no choice but to halt: without a driver of cpuidle.
    ///
    /// # Errors
    /// Where the kernel has one and can't be asked.
    pub(super) fn keep() -> Result<Option<Self>> {
        if !is_possible(Path::new(STATE)) {
            return Ok(None);
        }
        let mut latency = OpenOptions::new().write(true).open(LATENCY).with_context(|| format!("open {LATENCY}"))?;
        latency.write_all(&0_i32.to_ne_bytes()).with_context(|| format!("write 0 to {LATENCY}"))?;
        Ok(Some(Self { _latency: latency }))
    }
}

fn is_possible(state: &Path) -> bool {
    std::fs::read_to_string(state).is_ok_and(|name| name.trim() == "POLL")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_can_poll_where_a_state_says_so() {
        let state = tempfile::NamedTempFile::new().unwrap();
        assert!(!is_possible(state.path()) && !is_possible(Path::new("/nonexistent/name")));
        std::fs::write(state.path(), "haltpoll idle\n").unwrap();
        assert!(!is_possible(state.path()));
        std::fs::write(state.path(), "POLL\n").unwrap();
        assert!(is_possible(state.path()));
    }
}
