//! What the process may do: what the dataplane needs, and nothing else.

use std::{collections::HashSet, io};

use caps::{CapSet, Capability, errors::CapsError};
use nix::{
    sys::{prctl, stat},
    unistd::geteuid,
};

/// Without these nothing works.
pub const NEEDED: [Capability; 2] = [Capability::CAP_BPF, Capability::CAP_NET_ADMIN];
/// Kept where they are given, and lacking in nothing but what is said here. Without the first the verifier guards the programs against speculation, which costs each
/// packet some nanoseconds (`bypass_spec_v1`, `bypass_spec_v4`). iptables-legacy opens a raw socket, for which it needs the
/// second.
pub const USEFUL: [Capability; 2] = [Capability::CAP_PERFMON, Capability::CAP_NET_RAW];
/// Nobody but the owner writes what is made without a mode of its own.
const UMASK: u32 = 0o022;

/// The process could not give up what it does not need.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegesError {
    /// Capabilities.
    #[error("give up capabilities: {0}")]
    Capabilities(#[from] CapsError),
    /// `PR_SET_NO_NEW_PRIVS`.
    #[error("give up new privileges: {0}")]
    NoNewPrivileges(nix::errno::Errno),
}

/// Gives up all capabilities but those that the dataplane needs, in every set, and whatever a program that is executed
/// could gain. For the calling thread and those that it starts: call this while there are no others.
///
/// # Errors
/// [`PrivilegesError`].
pub fn give_up() -> Result<(), PrivilegesError> {
    stat::umask(stat::Mode::from_bits_truncate(UMASK));
    let kept: HashSet<_> = NEEDED.into_iter().chain(USEFUL).collect();
    let held = caps::read(None, CapSet::Permitted)?;
    let kept: HashSet<_> = held.intersection(&kept).copied().collect();
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for capability in caps::read(None, CapSet::Bounding)?.difference(&kept) {
            caps::drop(None, CapSet::Bounding, *capability)?;
        }
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)?;
    prctl::set_no_new_privs().map_err(PrivilegesError::NoNewPrivileges)
}

/// What to do about a refusal, to be put behind its message. Root is told too: it has no capability that overrides the
/// permissions of files.
pub fn permission_hint(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied => format!(
            "; the agent has only the rights of the user that it runs as, {}: give that user the file or its folder \
             (chown)",
            geteuid()
        ),
        _ => String::new(),
    }
}
