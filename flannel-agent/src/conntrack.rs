//! conntrack's windows. It sees few packets of a flow that passes the stack by, and would take the next that it sees for
//! INVALID by its sequence number, which kube-proxy drops. So it is told to be liberal, as long as there is a bypass.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use tracing::{info, warn};

const SETTING: &str = "/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal";

/// The setting, and where its former value is kept until cleanup.
pub struct Liberal {
    kept: PathBuf,
    complained: bool,
}

impl Liberal {
    /// Changes nothing yet.
    pub fn new(run_dir: &Path) -> Self {
        Self { kept: kept(run_dir), complained: false }
    }

    /// Makes conntrack liberal, where the host has it and it is not; the former value is kept first. Whether it did.
    pub fn ensure(&mut self) -> bool {
        match self.try_ensure() {
            Ok(changed) => {
                self.complained = false;
                return changed;
            }
            Err(error) if self.complained => drop(error),
            Err(error) => {
                warn!(
                    "set {SETTING} to 1: {error}; where packets that conntrack calls INVALID are dropped, set it, or use --bypass=off"
                );
                self.complained = true;
            }
        }
        false
    }

    fn try_ensure(&self) -> io::Result<bool> {
        let before = match fs::read_to_string(SETTING) {
            Ok(value) => value,
            // conntrack is not loaded: nobody calls anything INVALID.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        if before.trim() != "0" {
            return Ok(false);
        }
        if !self.kept.exists() {
            crate::atomic_file::write(&self.kept, before.as_bytes(), 0o600).map_err(io::Error::other)?;
        }
        fs::write(SETTING, "1")?;
        info!(
            "conntrack takes TCP packets outside their window for valid ({SETTING} = 1): it sees few of a bypassed flow"
        );
        Ok(true)
    }
}

/// Whether conntrack is liberal now; [`None`] where it is not loaded.
pub fn is_liberal() -> Option<bool> {
    fs::read_to_string(SETTING).ok().map(|value| value.trim() != "0")
}

/// Puts back what was there before.
///
/// # Errors
/// Where a file can't be written or removed.
pub fn restore(run_dir: &Path) -> io::Result<()> {
    let kept = kept(run_dir);
    match crate::atomic_file::read(&kept) {
        Ok(before) => {
            if Path::new(SETTING).exists() {
                fs::write(SETTING, before)?;
            }
            fs::remove_file(&kept)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn kept(run_dir: &Path) -> PathBuf {
    run_dir.join("conntrack-liberal.before")
}
