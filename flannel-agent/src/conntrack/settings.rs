//! What conntrack takes for invalid. It sees few packets of a flow that bypasses the stack, so that its windows are long past
//! when it sees the next: it would call that INVALID, which kube-proxy drops. So it is told to let such packets be, as long as
//! there is a bypass.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use tracing::{info, warn};

use crate::sysctl;

/// A setting of the kernel's, 0 or 1.
struct Setting {
    path: &'static str,
    /// The file in the run folder that keeps its former value until cleanup.
    kept: &'static str,
    /// What it has conntrack do.
    effect: &'static str,
}

const LIBERAL: Setting = Setting {
    path: "/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal",
    kept: "conntrack-liberal.before",
    effect: "conntrack takes TCP packets outside their window for valid",
};

/// A RST counts as invalid all the same where its sequence number lies before what conntrack last took note of, as it does for
/// two gigabytes out of four after a packet outside the window (`before`, include/net/tcp.h; nf_conntrack_tcp_packet). With
/// Linux 5.14.
const RESETS: Setting = Setting {
    path: "/proc/sys/net/netfilter/nf_conntrack_tcp_ignore_invalid_rst",
    kept: "conntrack-resets.before",
    effect: "conntrack takes RSTs outside their window for valid",
};

const SETTINGS: [Setting; 2] = [LIBERAL, RESETS];

/// The settings, and where their former values are kept.
pub struct Liberal {
    run_dir: PathBuf,
    complained: bool,
}

impl Liberal {
    /// Changes nothing yet.
    pub fn new(run_dir: &Path) -> Self {
        Self { run_dir: run_dir.to_owned(), complained: false }
    }

    /// Makes conntrack liberal, where the host has it and it is not; the former values are kept first. Whether it did.
    pub fn ensure(&mut self) -> bool {
        let mut changed = false;
        let mut failed = false;
        for setting in SETTINGS {
            match setting.ensure(&self.run_dir) {
                Ok(did) => changed |= did,
                Err(error) => {
                    failed = true;
                    if !self.complained {
                        warn!(
                            "set {} to 1: {error}; where packets that conntrack calls INVALID are dropped, set it, or use --bypass=off",
                            setting.path
                        );
                    }
                }
            }
        }
        self.complained = failed;
        changed
    }
}

impl Setting {
    fn ensure(&self, run_dir: &Path) -> io::Result<bool> {
        let before = match fs::read_to_string(self.path) {
            Ok(value) => value,
            // conntrack is not loaded, and nobody calls anything INVALID; or the kernel is older than the setting.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        if before.trim() != "0" {
            return Ok(false);
        }
        let kept = run_dir.join(self.kept);
        if !kept.exists() {
            crate::atomic_file::write(&kept, before.as_bytes(), 0o600).map_err(io::Error::other)?;
        }
        sysctl::write(self.path, "1")?;
        info!("{} ({} = 1): it sees few of a bypassed flow", self.effect, self.path);
        Ok(true)
    }

    fn restore(&self, run_dir: &Path) -> io::Result<()> {
        let kept = run_dir.join(self.kept);
        match crate::atomic_file::read(&kept) {
            Ok(before) => {
                if Path::new(self.path).exists() {
                    sysctl::write(self.path, before)?;
                }
                fs::remove_file(&kept)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Whether conntrack is liberal now; [`None`] where it is not loaded.
pub fn is_liberal() -> Option<bool> {
    let is_set = |setting: &Setting| fs::read_to_string(setting.path).ok().map(|value| value.trim() != "0");
    is_set(&LIBERAL).map(|liberal| liberal && is_set(&RESETS) != Some(false))
}

/// The settings that an agent has changed and that [`restore`] would put back, by the kernel's names.
pub fn changed(run_dir: &Path) -> Vec<&'static str> {
    let changed = SETTINGS.iter().filter(|setting| run_dir.join(setting.kept).exists());
    changed.map(|setting| setting.path).collect()
}

/// Puts back what was there before.
///
/// # Errors
/// Where a file can't be written or removed.
pub fn restore(run_dir: &Path) -> io::Result<()> {
    SETTINGS.iter().try_for_each(|setting| setting.restore(run_dir))
}
