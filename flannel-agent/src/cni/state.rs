//! What is kept of each attachment: the delegate's configuration, in a file of `dataDir` with the container's and the
//! interface's name. flannel's plugin keeps the same by the container's name only.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use super::{error::Error, request::Attachment};
use crate::atomic_file;

/// Between the two names; neither may have it.
const SEPARATOR: char = ':';
/// The interface of an attachment that flannel's plugin kept, which does not say: what runtimes call the first.
pub(super) const FIRST_INTERFACE: &str = "eth0";

/// The directory.
#[derive(Clone, Copy, Debug)]
pub struct States<'a>(pub &'a Path);

/// One of its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Where.
    pub path: PathBuf,
    /// What is in it.
    pub content: Vec<u8>,
}

impl States<'_> {
    /// Keeps a delegate's configuration.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Keep`].
    pub fn save(self, attachment: &Attachment, content: &[u8]) -> Result<(), Error> {
        let failed = |source| Error::Io { call: "create the directory", subject: self.0.display().to_string(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(self.0).map_err(failed)?;
        Ok(atomic_file::write(&self.path(attachment), content, 0o600)?)
    }

    /// What is kept of an attachment, by this plugin or by flannel's.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn load(self, attachment: &Attachment) -> Result<Option<Kept>, Error> {
        for path in [self.path(attachment), self.0.join(&attachment.container_id)] {
            match fs::read(&path) {
                Ok(content) => return Ok(Some(Kept { path, content })),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(failed("read", &path, source)),
            }
        }
        Ok(None)
    }

    /// All that is kept, in the order of the names.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn all(self) -> Result<Vec<(Attachment, Kept)>, Error> {
        let entries = match fs::read_dir(self.0) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(failed("list", self.0, source)),
        };
        let mut all = Vec::new();
        for entry in entries {
            let path = entry.map_err(|source| failed("list", self.0, source))?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            let (container_id, ifname) = name.split_once(SEPARATOR).unwrap_or((name, FIRST_INTERFACE));
            let attachment = Attachment { container_id: container_id.to_owned(), ifname: ifname.to_owned() };
            // Others' files, and those that a killed plugin did not get to rename.
            if attachment.validate().is_err() {
                continue;
            }
            match fs::read(&path) {
                Ok(content) => all.push((attachment, Kept { path, content })),
                // Gone since, or a directory.
                Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::IsADirectory) => {}
                Err(source) => return Err(failed("read", &path, source)),
            }
        }
        all.sort_by(|(_, one), (_, two)| one.path.cmp(&two.path));
        Ok(all)
    }

    fn path(self, Attachment { container_id, ifname }: &Attachment) -> PathBuf {
        self.0.join(format!("{container_id}{SEPARATOR}{ifname}"))
    }
}

impl Kept {
    /// Forgets it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove(&self) -> Result<(), Error> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", &self.path, error)),
            _ => Ok(()),
        }
    }

    /// Whether flannel's plugin kept it, which does not say for which interface.
    pub fn is_flannels(&self) -> bool {
        self.path.file_name().and_then(|name| name.to_str()).is_some_and(|name| !name.contains(SEPARATOR))
    }
}

fn failed(call: &'static str, path: &Path, source: io::Error) -> Error {
    Error::Io { call, subject: path.display().to_string(), source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn attachment(container_id: &str, ifname: &str) -> Attachment {
        Attachment { container_id: container_id.to_owned(), ifname: ifname.to_owned() }
    }

    #[test]
    fn kept_by_both_names_and_for_root_only() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("lib/cni/flannel");
        let states = States(&path);
        assert_eq!(states.all().expect("listed"), []);
        assert_eq!(states.load(&attachment("a", "eth0")).expect("read"), None);
        states.save(&attachment("a", "eth0"), b"1").expect("saved");
        states.save(&attachment("a", "net1"), b"2").expect("saved");
        let content = |ifname| states.load(&attachment("a", ifname)).expect("read").map(|kept| kept.content);
        assert_eq!((content("eth0"), content("net1")), (Some(b"1".to_vec()), Some(b"2".to_vec())));
        let mode = |path: &Path| fs::metadata(path).expect("metadata").permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(&path.join("a:eth0"))), (0o700, 0o600));
        states.load(&attachment("a", "eth0")).expect("read").expect("kept").remove().expect("removed");
        assert_eq!(content("eth0"), None);
    }

    #[test]
    fn flannels_own_are_found() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let states = States(directory.path());
        for name in ["b", "a:eth0", ".tmpX", "not a name"] {
            fs::write(directory.path().join(name), name).expect("written");
        }
        fs::create_dir(directory.path().join("c")).expect("made");
        let kept = states.load(&attachment("b", "net1")).expect("read").expect("kept");
        assert!(kept.is_flannels());
        let all = states.all().expect("listed");
        let names: Vec<_> = all.iter().map(|(attachment, kept)| (attachment.clone(), kept.is_flannels())).collect();
        assert_eq!(names, [(attachment("a", "eth0"), false), (attachment("b", "eth0"), true)]);
    }
}
