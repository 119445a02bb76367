//! Whose `subnet.env` it is. flannel's daemon that takes over writes the same content; but it puts a file of its own in the
//! place of the one before (flannel: pkg/subnet/writefile_other.go). So the file itself is remembered, not what is in it,
//! and lines that somebody adds to it change nothing.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use flannel_common::vxlan::Vni;
use serde::{Deserialize, Serialize};

use crate::atomic_file::{self, WriteError};

const SUFFIX: &str = ".subnet-env";

/// The `subnet.env` that an agent wrote last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Where.
    pub path: PathBuf,
    /// Which file.
    #[serde(flatten)]
    file: File,
}

/// A file, whatever it is called. Its number may be another's once it is gone; when it was made, in nanoseconds, then
/// differs. 0 where the file system does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct File {
    inode: u64,
    made: u64,
}

impl File {
    fn at(path: &Path) -> io::Result<Self> {
        let found = fs::symlink_metadata(path)?;
        let made = found.created().ok().and_then(|made| made.duration_since(UNIX_EPOCH).ok());
        Ok(Self { inode: found.ino(), made: made.map_or(0, |made| made.as_nanos() as u64) })
    }
}

impl Written {
    /// Remembers the file that is there now.
    ///
    /// # Errors
    /// [`WriteError`], and where there is none.
    pub fn remember(run_dir: &Path, vni: Vni, path: &Path) -> Result<(), WriteError> {
        // What is gone again was replaced by nobody.
        let Ok(file) = File::at(path) else { return Ok(()) };
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let content = serde_json::to_string(&Self { path, file }).unwrap_or_default() + "\n";
        atomic_file::write(&Self::record(run_dir, vni), content.as_bytes(), 0o600)
    }

    /// What an overlay's agent wrote last. [`None`] where it did not say, as earlier versions do not.
    pub fn recall(run_dir: &Path, vni: Vni) -> Option<Self> {
        serde_json::from_slice(&atomic_file::read(&Self::record(run_dir, vni)).ok()?).ok()
    }

    /// Whether another file is in its place.
    pub fn is_replaced(&self) -> bool {
        File::at(&self.path).is_ok_and(|file| file != self.file)
    }

    /// Where an overlay's is remembered.
    pub fn record(run_dir: &Path, vni: Vni) -> PathBuf {
        run_dir.join(format!("flannel.{vni}{SUFFIX}"))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_file_that_was_replaced_by_the_same_is_another() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("subnet.env");
        let recall = || Written::recall(directory.path(), Vni::DEFAULT);
        Written::remember(directory.path(), Vni::DEFAULT, &path).expect("nothing to remember");
        assert_eq!(recall(), None);
        atomic_file::write(&path, b"1\n", 0o644).expect("written");
        Written::remember(directory.path(), Vni::DEFAULT, &path).expect("remembered");
        let written = recall().expect("recalled");
        assert!(written.path == path && !written.is_replaced());
        // Somebody adds a line.
        let mut file = fs::File::options().append(true).open(&path).expect("opened");
        file.write_all(b"2\n").expect("written");
        assert!(!written.is_replaced());
        // As flannel does; twice, so that the file's number may be the first one's again.
        for _ in 0..2 {
            atomic_file::write(&path, b"1\n", 0o644).expect("written");
            assert!(written.is_replaced());
        }
        fs::remove_file(&path).expect("removed");
        assert!(!written.is_replaced());
    }
}
