//! Files that others read: whole or not at all, and never by way of a symbolic link in their place. (One on the way to
//! their folder is the operator's, as `/var/run` is on most hosts, and is followed.)

use std::{
    fs, io,
    io::{Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
};

use nix::libc::O_NOFOLLOW;

use crate::privileges::permission_hint;

/// The file could not be written. It is then as it was.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {call}: {source}{}", permission_hint(.source))]
pub struct WriteError {
    path: String,
    call: &'static str,
    source: io::Error,
}

/// Writes a file of that mode, in a directory of mode 0755 that is made where it is missing, and puts it in the place
/// of the one before in one step.
///
/// # Errors
/// [`WriteError`] with the call that failed.
pub fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), WriteError> {
    let failed = |call| move |source| WriteError { path: path.display().to_string(), call, source };
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    create_directory(directory).map_err(failed("create the directory"))?;
    if path.is_symlink() {
        // It would be replaced, not followed; but somebody put it there, and reads what is behind it.
        return Err(failed("replace")(io::Error::other("it is a symbolic link; remove it")));
    }
    let mut file = tempfile::Builder::new()
        .permissions(fs::Permissions::from_mode(mode))
        .tempfile_in(directory)
        .map_err(failed("create a file beside it"))?;
    // The mode given at creation is subject to the umask.
    file.as_file().set_permissions(fs::Permissions::from_mode(mode)).map_err(failed("chmod"))?;
    file.write_all(content).map_err(failed("write"))?;
    file.as_file().sync_all().map_err(failed("fsync"))?;
    file.persist(path).map_err(|error| failed("rename")(error.error))?;
    Ok(())
}

/// Makes a directory of mode 0755, and those above it.
///
/// # Errors
/// Where that fails, or something else is there.
pub fn create_directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o755).create(path)
}

/// Opens a file with these options; a symbolic link in its place is refused (`ELOOP`).
///
/// # Errors
/// Where it can't be opened.
pub fn open(path: &Path, options: &mut fs::OpenOptions) -> io::Result<fs::File> {
    options.custom_flags(O_NOFOLLOW).open(path)
}

/// Reads a file that is no symbolic link.
///
/// # Errors
/// Where it can't be read.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    open(path, fs::OpenOptions::new().read(true))?.read_to_end(&mut content)?;
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_with_its_mode_in_the_place_of_the_one_before() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("run/flannel/file");
        for content in ["one", "two"] {
            write(&path, content.as_bytes(), 0o644).expect("written");
            assert_eq!(fs::read_to_string(&path).expect("read"), content);
        }
        assert_eq!(fs::metadata(&path).expect("metadata").permissions().mode() & 0o777, 0o644);
        assert_eq!(fs::read_dir(path.parent().expect("parent")).expect("listing").count(), 1);
    }

    #[test]
    fn a_symbolic_link_is_neither_followed_nor_replaced() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let (path, victim) = (directory.path().join("file"), directory.path().join("victim"));
        fs::write(&victim, "as it was").expect("written");
        std::os::unix::fs::symlink(&victim, &path).expect("linked");
        let refused = write(&path, b"new", 0o644).expect_err("refused").to_string();
        assert!(refused.contains("symbolic link"), "{refused}");
        assert!(read(&path).is_err());
        assert_eq!(fs::read_to_string(&victim).expect("read"), "as it was");
        assert!(path.is_symlink());
    }
}
