//! What the host must have before anything is tried.

use std::fs;

/// The host lacks what no waiting brings.
#[derive(Debug, thiserror::Error)]
pub enum PreflightError {
    /// A capability is missing.
    #[error("the capability {0} is missing; run as root, or with CAP_BPF and CAP_NET_ADMIN")]
    Capability(caps::Capability),
    /// The process' own capabilities can't be read.
    #[error("read the capabilities of this process: {0}")]
    Capabilities(#[from] caps::errors::CapsError),
    /// The kernel is too old for the programs.
    #[error("this kernel is {0}; 5.13 is needed")]
    Kernel(String),
}

/// The first with `BPF_F_ADJ_ROOM_ENCAP_L2_ETH`, which older kernels refuse only when a packet comes.
const OLDEST_KERNEL: (u32, u32) = (5, 13);

/// Looks at capabilities and kernel.
///
/// # Errors
/// [`PreflightError`].
pub fn check() -> Result<(), PreflightError> {
    let effective = caps::read(None, caps::CapSet::Effective)?;
    for needed in [caps::Capability::CAP_BPF, caps::Capability::CAP_NET_ADMIN] {
        if !effective.contains(&needed) {
            return Err(PreflightError::Capability(needed));
        }
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
    // Where the version can't be told, loading the programs will tell.
    match version(&release) {
        Some(version) if version < OLDEST_KERNEL => Err(PreflightError::Kernel(release)),
        _ => Ok(()),
    }
}

/// Major and minor number of a kernel release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_are_compared_by_number() {
        assert_eq!(version("6.18.44-fc-v595"), Some((6, 18)));
        assert_eq!(version("5.10.0-8-amd64"), Some((5, 10)));
        assert_eq!(version(""), None);
        assert!(version("5.9.1") < Some((5, 13)));
    }
}
