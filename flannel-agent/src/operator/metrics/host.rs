//! What is the same for all overlays of a host, and the process itself.

use std::{fs, io};

use nix::sys::{
    resource::{Resource, UsageWho, getrlimit, getrusage},
    time::TimeVal,
};

use super::{Collected, Metric, Source};
use crate::operator::host_settings;

/// How full conntrack's table is, where there is one.
pub(super) fn conntrack(collected: &mut Collected) {
    if let Some((count, max)) = host_settings::conntrack() {
        collected.exposition.add(Metric::ConntrackEntries, &[], count);
        collected.exposition.add(Metric::ConntrackLimit, &[], max);
    }
}

/// This process, which began at that time, in seconds since 1970.
pub(super) fn process(collected: &mut Collected, started: u64) {
    collected.exposition.add(Metric::ProcessStart, &[], started);
    let usage = getrusage(UsageWho::RUSAGE_SELF).map(|usage| seconds(usage.user_time()) + seconds(usage.system_time()));
    if let Some(cpu) = collected.read(Source::Host, usage) {
        collected.exposition.add(Metric::ProcessCpu, &[], cpu);
    }
    if let Some(resident) = collected.read(Source::Host, resident()) {
        collected.exposition.add(Metric::ProcessResident, &[], resident);
    }
    // The folder itself is open while it is counted.
    let open = fs::read_dir("/proc/self/fd").map(|entries| entries.count().saturating_sub(1));
    if let Some(open) = collected.read(Source::Host, open) {
        collected.exposition.add(Metric::ProcessOpenFds, &[], open);
    }
    if let Some((soft, _)) = collected.read(Source::Host, getrlimit(Resource::RLIMIT_NOFILE)) {
        collected.exposition.add(Metric::ProcessMaxFds, &[], soft);
    }
}

fn seconds(time: TimeVal) -> f64 {
    time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6
}

/// In bytes (`VmRSS` of proc_pid_status(5)).
fn resident() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/self/status")?;
    let line =
        text.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    line.map(|kibibytes| kibibytes * 1024).ok_or_else(|| io::Error::other("/proc/self/status has no VmRSS"))
}
