//! One agent for each overlay of a host: by a file in the run directory, and by a name in the network namespace, where agents with
//! other directories are.

use std::{
    fs, io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            fs::{OpenOptionsExt as _, PermissionsExt as _},
            net::{SocketAddr, UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    time::Duration,
};

use flannel_common::vxlan::Vni;
use nix::{
    fcntl::{Flock, FlockArg},
    sys::socket::{UnixCredentials, getsockopt, sockopt::PeerCredentials},
    unistd::geteuid,
};
use tracing::warn;

use crate::{atomic_file, privileges::permission_hint};

/// How often the lock is tried, and the time in between.
const LOOKS: u32 = 10;
const LOOK_TIME: Duration = Duration::from_millis(10);
/// Whoever can open the file, be it for reading, can hold the lock, and so keep an agent from starting (flock(2)).
const MODE: u32 = 0o600;
/// What an overlay's name in the network namespace begins with.
const NAME: &str = "flannel-agent/";

/// One agent for each overlay of a host.
pub struct Lock {
    _file: Flock<fs::File>,
}

/// The lock could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another agent has it.
    #[error(
        "another agent serves flannel.{0} with the same --run-dir; stop it first, or give this one's network another VNI"
    )]
    Held(Vni),
    /// An agent with another run directory serves an overlay of this number.
    #[error(
        "the process {pid} serves flannel.{vni} on this host, with another --run-dir; stop it first, or give this one's network \
         another VNI"
    )]
    Elsewhere {
        /// Of both.
        vni: Vni,
        /// Its process.
        pid: i32,
    },
    /// The file can't be made.
    #[error("lock {path}: {source}; check --run-dir{}", permission_hint(.source))]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl Lock {
    /// Takes the lock of an overlay; it is given up when the process ends.
    ///
    /// # Errors
    /// [`LockError`].
    pub fn take(run_dir: &Path, vni: Vni) -> Result<Self, LockError> {
        let path = Self::path(run_dir, vni);
        let failed = |source| LockError::File { path: path.clone(), source };
        atomic_file::create_directory(run_dir).map_err(failed)?;
        let options = &mut fs::File::options();
        let mut file = atomic_file::open(&path, options.create(true).append(true).mode(MODE)).map_err(failed)?;
        // It may have been there with another.
        file.set_permissions(fs::Permissions::from_mode(MODE)).map_err(failed)?;
        // Who asks whether it is held (`is_held`) holds it for a moment, since flock can't be asked otherwise.
        for _ in 0..LOOKS {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => return Ok(Self { _file: file }),
                Err((held, nix::errno::Errno::EWOULDBLOCK)) => file = held,
                Err((_, errno)) => return Err(failed(errno.into())),
            }
            std::thread::sleep(LOOK_TIME);
        }
        Err(LockError::Held(vni))
    }

    /// Whether an agent has it.
    ///
    /// # Errors
    /// [`LockError::File`] where it can't be told: the file is for its user only.
    pub fn is_held(run_dir: &Path, vni: Vni) -> Result<bool, LockError> {
        let path = Self::path(run_dir, vni);
        // Not made where it is missing: asking leaves nothing behind.
        match atomic_file::open(&path, fs::File::options().read(true)) {
            Ok(file) => {
                let held = Flock::lock(file, FlockArg::LockSharedNonblock);
                Ok(matches!(held, Err((_, nix::errno::Errno::EWOULDBLOCK))))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(LockError::File { path, source }),
        }
    }

    /// The file behind it.
    pub fn path(run_dir: &Path, vni: Vni) -> PathBuf {
        run_dir.join(format!("flannel.{vni}.lock"))
    }
}

/// One agent for each overlay of a network namespace: it owns devices, routes and rules there that go by the overlay's number. Its
/// name is that of an abstract socket (unix(7)), which a namespace has for itself, and which goes with the process.
pub struct NamespaceLock {
    /// [`None`] where a process that is no agent has the name: anybody on the host can take one.
    _listener: Option<UnixListener>,
}

impl NamespaceLock {
    /// Takes that of an overlay.
    ///
    /// # Errors
    /// [`LockError::Elsewhere`].
    pub fn take(vni: Vni) -> Result<Self, LockError> {
        for look in 1..=LOOKS {
            let error = match address(vni).and_then(|address| UnixListener::bind_addr(&address)) {
                Ok(listener) => return Ok(Self { _listener: Some(listener) }),
                Err(error) => error,
            };
            if let Some(pid) = Self::holder(vni) {
                return Err(LockError::Elsewhere { vni, pid });
            }
            // The one that had it may just be gone.
            if look == LOOKS {
                warn!(
                    "another agent for the VNI {vni} would not be noticed: its name in this network namespace: {error}"
                );
            }
            std::thread::sleep(LOOK_TIME);
        }
        Ok(Self { _listener: None })
    }

    /// Whether another process is there that is the agent of any overlay.
    pub fn is_held_by_others() -> bool {
        let sockets = fs::read_to_string("/proc/net/unix").unwrap_or_default();
        let mut names = sockets.lines().filter_map(|line| line.split_once('@')?.1.strip_prefix(NAME)?.parse().ok());
        let holder = |number| Self::holder(Vni::new_checked(number).ok()?);
        let own = i32::try_from(std::process::id()).ok();
        names.any(|number| holder(number).is_some_and(|pid| Some(pid) != own))
    }

    /// The agent that has it: root's, or this user's. What others hold is not believed.
    pub fn holder(vni: Vni) -> Option<i32> {
        let stream = UnixStream::connect_addr(&address(vni).ok()?).ok()?;
        let peer: UnixCredentials = getsockopt(&stream, PeerCredentials).ok()?;
        [0, geteuid().as_raw()].contains(&peer.uid()).then(|| peer.pid())
    }
}

fn address(vni: Vni) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("{NAME}{vni}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_taken_once_in_a_network_namespace() {
        // Of no overlay here.
        let vni = Vni::new_checked(9_999_998).expect("valid");
        assert_eq!(NamespaceLock::holder(vni), None);
        let lock = NamespaceLock::take(vni).expect("free");
        assert_eq!(NamespaceLock::holder(vni), i32::try_from(std::process::id()).ok());
        assert!(!NamespaceLock::is_held_by_others());
        assert!(matches!(NamespaceLock::take(vni), Err(LockError::Elsewhere { .. })));
        drop(lock);
        assert!(NamespaceLock::take(vni).is_ok());
    }
}
