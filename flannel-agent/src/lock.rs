//! One agent for each overlay of a host.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use flannel_common::vxlan::Vni;
use nix::fcntl::{Flock, FlockArg};

/// One agent for each overlay of a host.
pub struct Lock {
    _file: Flock<fs::File>,
}

/// The lock could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another agent has it.
    #[error("another agent serves flannel.{0} with the same --run-dir; stop it first, or name another directory")]
    Held(Vni),
    /// The file can't be made.
    #[error("lock {path}: {source}; check --run-dir")]
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
        fs::create_dir_all(run_dir).map_err(failed)?;
        let file = fs::File::options().create(true).append(true).open(&path).map_err(failed)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => Ok(Self { _file: file }),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(LockError::Held(vni)),
            Err((_, errno)) => Err(failed(errno.into())),
        }
    }

    /// Whether an agent has it.
    pub fn is_held(run_dir: &Path, vni: Vni) -> bool {
        // Not made where it is missing: asking leaves nothing behind.
        let Ok(file) = fs::File::open(Self::path(run_dir, vni)) else { return false };
        matches!(Flock::lock(file, FlockArg::LockSharedNonblock), Err((_, nix::errno::Errno::EWOULDBLOCK)))
    }

    /// The file behind it.
    pub fn path(run_dir: &Path, vni: Vni) -> PathBuf {
        run_dir.join(format!("flannel.{vni}.lock"))
    }
}
