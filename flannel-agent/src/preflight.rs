//! What the host must have before anything is tried.

use crate::dataplane::{DataplaneError, Features};

use crate::privileges;

/// The host lacks what no waiting brings.
#[derive(Debug, thiserror::Error)]
pub enum PreflightError {
    /// A capability is missing.
    #[error(
        "the capability {0} is missing; run as root, or as any user with CAP_BPF and CAP_NET_ADMIN (systemd: AmbientCapabilities=)"
    )]
    Capability(caps::Capability),
    /// The process' own capabilities can't be read.
    #[error("read the capabilities of this process: {0}")]
    Capabilities(#[from] caps::errors::CapsError),
    /// The kernel lacks what the programs can't do without.
    #[error("this kernel lacks {lacking} ({features}); Linux 5.13 and later have it")]
    Kernel {
        /// What.
        lacking: &'static str,
        /// All that was tried.
        features: Features,
    },
    /// The kernel does not let itself be asked.
    #[error("find out what this kernel has: {0}")]
    Probe(#[from] DataplaneError),
}

/// Looks at capabilities and kernel. Returns what the kernel has.
///
/// # Errors
/// [`PreflightError`].
pub fn check() -> Result<Features, PreflightError> {
    let effective = caps::read(None, caps::CapSet::Effective)?;
    for needed in privileges::NEEDED {
        if !effective.contains(&needed) {
            return Err(PreflightError::Capability(needed));
        }
    }
    let features = Features::probe()?;
    match features.lacking() {
        Some(lacking) => Err(PreflightError::Kernel { lacking, features }),
        None => Ok(features),
    }
}
