//! One agent for each overlay of a host.

use std::{
    fs, io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use flannel_common::vxlan::Vni;
use nix::fcntl::{Flock, FlockArg};

use crate::{atomic_file, privileges::permission_hint};

/// How often the lock is tried, and the time in between.
const LOOKS: u32 = 10;
const LOOK_TIME: Duration = Duration::from_millis(10);

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
        let mut file = atomic_file::open(&path, options.create(true).append(true).mode(0o644)).map_err(failed)?;
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
    pub fn is_held(run_dir: &Path, vni: Vni) -> bool {
        // Not made where it is missing: asking leaves nothing behind.
        let Ok(file) = atomic_file::open(&Self::path(run_dir, vni), fs::File::options().read(true)) else {
            return false;
        };
        matches!(Flock::lock(file, FlockArg::LockSharedNonblock), Err((_, nix::errno::Errno::EWOULDBLOCK)))
    }

    /// The file behind it.
    pub fn path(run_dir: &Path, vni: Vni) -> PathBuf {
        run_dir.join(format!("flannel.{vni}.lock"))
    }
}
