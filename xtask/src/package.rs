//! Debian packages that are unpacked, and not installed: what they would start or replace on this machine stays as it is.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::process::{output, workspace};

/// Where those for the tests are.
pub fn directory() -> PathBuf {
    workspace().join("target/packages")
}

/// The folder that a package is unpacked in, below another. It is downloaded once.
///
/// # Errors
/// Where it can't be had.
pub fn unpacked(package: &str, directory: &Path) -> Result<PathBuf> {
    let unpacked = directory.join(package);
    if !unpacked.exists() {
        // Under another name until it is whole.
        let partial = directory.join(format!("{package}.partial"));
        let _rest = fs::remove_dir_all(&partial);
        fs::create_dir_all(&partial).with_context(|| format!("create {partial:?}"))?;
        download(package, &partial)?;
        fs::rename(&partial, &unpacked).with_context(|| format!("rename {partial:?}"))?;
    }
    Ok(unpacked)
}

fn download(package: &str, directory: &Path) -> Result<()> {
    let get = || output(Command::new("apt-get").args(["download", "-q", package]).current_dir(directory));
    // Lists may be older than what the archive has.
    if get().is_err() {
        println!("+ apt-get update");
        output(Command::new("apt-get").args(["update", "-q"]))?;
        get()?;
    }
    let files = fs::read_dir(directory)?.flatten().map(|entry| entry.path());
    let archive = files.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "deb"));
    let archive = archive.with_context(|| format!("apt-get downloaded no {package}"))?;
    output(Command::new("dpkg-deb").arg("--extract").arg(&archive).arg(directory))?;
    fs::remove_file(&archive).with_context(|| format!("remove {archive:?}"))
}
