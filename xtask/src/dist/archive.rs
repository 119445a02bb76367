//! The archive, and files in gzip's format, without times and owners of the machine. By `tar` and `gzip`, which are on every
//! Debian machine, and not by crates, which take minutes for this where nobody optimized them.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::SystemTime,
};

use anyhow::{Context as _, Result};

use super::{Effort, files::Files, seconds};
use crate::process::output;

/// Writes the archive: below one folder, sorted, all of one time and root's. `scratch` is a folder that is not there yet.
///
/// # Errors
/// Where a file can't be read or the archive not be written.
pub fn write(
    files: &Files,
    scratch: &Path,
    folder: &str,
    epoch: SystemTime,
    effort: Effort,
    path: &Path,
) -> Result<()> {
    files.place(&scratch.join(folder), |file| file.archived.as_deref())?;
    let gzip = match effort {
        Effort::Small => "gzip -n9",
        Effort::Quick => "gzip -n1",
    };
    let mut tar = Command::new("tar");
    tar.args(["--format=gnu", "--sort=name", "--owner=0", "--group=0", "--numeric-owner"]);
    tar.arg(format!("--mtime=@{}", seconds(epoch)?)).args(["--use-compress-program", gzip, "--create", "--file"]);
    output(tar.arg(path).arg("-C").arg(scratch).arg(folder)).map(drop)
}

/// Puts a compressed file beside another, and returns its path.
///
/// # Errors
/// Where `gzip` fails.
pub fn compressed(path: &Path) -> Result<PathBuf> {
    output(Command::new("gzip").args(["-9", "--no-name", "--keep", "--force"]).arg(path))?;
    let name = path.file_name().context("a file's path")?.to_string_lossy();
    Ok(path.with_file_name(format!("{name}.gz")))
}
