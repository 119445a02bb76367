//! Settings of the kernel (sysctls): files below `/proc/sys`.

use std::{fs, io, path::Path};

/// Where a container has what it may change below its own `/proc/sys`, which is read-only unless it is privileged. A setting below
/// `net` is that of the writer's network namespace, by whichever path it is reached (`net_ctl_header_lookup`).
const WRITABLE: &str = "/host";

/// Sets one, by its path below `/proc/sys`.
///
/// # Errors
/// The kernel's.
pub fn write(path: &str, value: impl AsRef<[u8]>) -> io::Result<()> {
    match fs::write(path, value.as_ref()) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            let elsewhere = format!("{WRITABLE}{path}");
            if Path::new(&elsewhere).exists() { fs::write(elsewhere, value) } else { Err(error) }
        }
        result => result,
    }
}
