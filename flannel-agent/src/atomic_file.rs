//! Files that others read: whole or not at all.

use std::{fs, io, io::Write as _, os::unix::fs::PermissionsExt as _, path::Path};

/// The file could not be written. It is then as it was.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {call}: {source}")]
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
    fs::create_dir_all(directory).map_err(failed("create the directory"))?;
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
}
