//! What is kept of each attachment: the delegate's configuration, in a file of `dataDir`, so that both this plugin and
//! flannel's find it, whichever of the two made the attachment.
//!
//! flannel's plugin keeps it in `<container>`, whatever the interface is called, and looks nowhere else (flannel:
//! cni-plugin/flannel.go, `saveScratchNetConf`); a container's second attachment overwrites that of its first. Here the
//! first has that file, and each further one `<container>:<interface>`, which neither name can be. Where the first is not
//! `eth0`, its file has that second name too, as a hard link: content that is byte for byte flannel's does not
//! say whose it is.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use super::{error::Error, request::Attachment};
use crate::atomic_file;

/// Between the two names; neither may have it.
const SEPARATOR: char = ':';
/// The interface of an attachment that is kept by the container's name only: what runtimes call the first.
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
    /// Its name for flannel's plugin, where it has two.
    pub second_name: Option<PathBuf>,
}

impl States<'_> {
    /// Keeps a delegate's configuration. What is kept of the container's other interfaces stays.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Keep`].
    pub fn save(self, attachment: &Attachment, content: &[u8]) -> Result<(), Error> {
        let failed = |source| Error::Io { call: "create the directory", subject: self.0.display().to_string(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(self.0).map_err(failed)?;
        let by_container = self.by_container(&attachment.container_id);
        let is_first = !by_container.exists();
        if is_first && attachment.ifname == FIRST_INTERFACE {
            return Ok(atomic_file::write(&by_container, content, 0o600)?);
        }
        let path = self.by_both(attachment);
        atomic_file::write(&path, content, 0o600)?;
        if is_first {
            // Where that fails, only flannel's plugin misses it: another was faster, or the file system has no hard links.
            let _is_linked = fs::hard_link(&path, &by_container);
        }
        Ok(())
    }

    /// What is kept of an attachment, by this plugin or by flannel's.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn load(self, attachment: &Attachment) -> Result<Option<Kept>, Error> {
        let by_container = self.by_container(&attachment.container_id);
        if let Some(mut kept) = read(&self.by_both(attachment))? {
            kept.second_name = is_same(&kept.path, &by_container).then_some(by_container);
            return Ok(Some(kept));
        }
        match read(&by_container)? {
            Some(kept) if !self.is_of_named(&kept, &attachment.container_id)? => Ok(Some(kept)),
            _ => Ok(None),
        }
    }

    /// All that is kept, in the order of the names.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn all(self) -> Result<Vec<(Attachment, Kept)>, Error> {
        let mut all = Vec::new();
        for name in self.names()? {
            let (container_id, ifname) = name.split_once(SEPARATOR).unwrap_or((&name, FIRST_INTERFACE));
            let attachment = Attachment { container_id: container_id.to_owned(), ifname: ifname.to_owned() };
            // Others' files, and those that a killed plugin did not get to rename.
            if attachment.validate().is_err() {
                continue;
            }
            // The file of the name itself: where the container's name is one of two, the other one stands for both.
            if let Some(kept) = self.load(&attachment)?.filter(|kept| kept.path == self.0.join(&name)) {
                all.push((attachment, kept));
            }
        }
        all.sort_by(|(_, one), (_, two)| one.path.cmp(&two.path));
        Ok(all)
    }

    /// Whether the container's file has another name that says of which interface it is.
    fn is_of_named(self, kept: &Kept, container_id: &str) -> Result<bool, Error> {
        let is_of_container = |name: &str| name.split_once(SEPARATOR).is_some_and(|(id, _)| id == container_id);
        let names = self.names()?;
        Ok(names.iter().any(|name| is_of_container(name) && is_same(&self.0.join(name), &kept.path)))
    }

    fn names(self) -> Result<Vec<String>, Error> {
        let entries = match fs::read_dir(self.0) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(failed("list", self.0, source)),
        };
        let names = entries.map(|entry| Ok(entry?.file_name().into_string().ok()));
        let names: io::Result<Vec<_>> = names.collect();
        Ok(names.map_err(|source| failed("list", self.0, source))?.into_iter().flatten().collect())
    }

    fn by_container(self, container_id: &str) -> PathBuf {
        self.0.join(container_id)
    }

    fn by_both(self, Attachment { container_id, ifname }: &Attachment) -> PathBuf {
        self.0.join(format!("{container_id}{SEPARATOR}{ifname}"))
    }
}

impl Kept {
    /// Forgets it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove(&self) -> Result<(), Error> {
        // The one that says of which interface it is goes last.
        for path in self.second_name.iter().chain([&self.path]) {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("remove", path, error)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether it is kept by the container's name only, and so of `eth0`, unless flannel's plugin kept it, which
    /// does not say.
    pub fn is_by_container(&self) -> bool {
        self.path.file_name().and_then(|name| name.to_str()).is_some_and(|name| !name.contains(SEPARATOR))
    }
}

/// [`None`] where there is no file.
fn read(path: &Path) -> Result<Option<Kept>, Error> {
    match fs::read(path) {
        Ok(content) => Ok(Some(Kept { path: path.to_owned(), content, second_name: None })),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::IsADirectory) => Ok(None),
        Err(source) => Err(failed("read", path, source)),
    }
}

/// Whether two names are of one file.
fn is_same(one: &Path, other: &Path) -> bool {
    let number = |path: &Path| fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()));
    number(one).is_some_and(|one| number(other) == Some(one))
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

    fn names(states: States<'_>) -> Vec<String> {
        let mut names = states.names().expect("listed");
        names.sort();
        names
    }

    fn content(states: States<'_>, ifname: &str) -> Option<Vec<u8>> {
        states.load(&attachment("a", ifname)).expect("read").map(|kept| kept.content)
    }

    fn remove(states: States<'_>, ifname: &str) {
        states.load(&attachment("a", ifname)).expect("read").expect("kept").remove().expect("removed");
    }

    #[test]
    fn the_first_is_where_flannels_plugin_looks_and_for_root_only() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("lib/cni/flannel");
        let states = States(&path);
        assert_eq!(states.all().expect("listed"), []);
        assert_eq!(states.load(&attachment("a", "eth0")).expect("read"), None);
        states.save(&attachment("a", "eth0"), b"1").expect("saved");
        states.save(&attachment("a", "net1"), b"2").expect("saved");
        assert_eq!(names(states), ["a", "a:net1"]);
        assert_eq!((content(states, "eth0"), content(states, "net1")), (Some(b"1".to_vec()), Some(b"2".to_vec())));
        let mode = |path: &Path| fs::metadata(path).expect("metadata").permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(&path.join("a"))), (0o700, 0o600));
        remove(states, "eth0");
        assert_eq!(names(states), ["a:net1"]);
    }

    #[test]
    fn a_first_that_is_called_otherwise_has_both_names() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let states = States(directory.path());
        states.save(&attachment("a", "net1"), b"1").expect("saved");
        assert_eq!(names(states), ["a", "a:net1"]);
        assert_eq!(fs::read(directory.path().join("a")).expect("read"), b"1");
        assert_eq!(content(states, "eth0"), None, "it is known to be another's");
        states.save(&attachment("a", "eth0"), b"2").expect("saved");
        states.save(&attachment("a", "net2"), b"3").expect("saved");
        assert_eq!(names(states), ["a", "a:eth0", "a:net1", "a:net2"]);
        assert_eq!(fs::read(directory.path().join("a")).expect("read"), b"1", "nobody overwrites it");
        assert_eq!(states.all().expect("listed").len(), 3);
        remove(states, "net1");
        assert_eq!(names(states), ["a:eth0", "a:net2"]);
        // Flannel's plugin removes the name that it knows.
        states.save(&attachment("a", "net1"), b"1").expect("saved");
        fs::remove_file(directory.path().join("a")).expect("removed");
        assert_eq!(content(states, "net1"), Some(b"1".to_vec()));
        remove(states, "net1");
        assert_eq!(names(states), ["a:eth0", "a:net2"]);
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
        assert!(kept.is_by_container());
        let all = states.all().expect("listed");
        let names: Vec<_> = all.iter().map(|(attachment, kept)| (attachment.clone(), kept.is_by_container())).collect();
        assert_eq!(names, [(attachment("a", "eth0"), false), (attachment("b", "eth0"), true)]);
    }
}
