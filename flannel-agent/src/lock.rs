//! One agent for each overlay of a host.

use std::{
    fs, io,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use flannel_common::vxlan::Vni;
use nix::fcntl::{Flock, FlockArg};

use crate::{atomic_file, privileges::permission_hint};

/// How often the lock is tried, and the time in between.
const LOOKS: u32 = 10;
const LOOK_TIME: Duration = Duration::from_millis(10);
/// Whoever can open the file, be it for reading, can hold the lock, and so keep an agent from starting (flock(2)).
const MODE: u32 = 0o600;

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
