//! `flannel-agent bundle`: what support needs, in one archive.
//!
//! * `contents` — the list of what is in it: nothing else is
//! * `programs` — running this program's commands and the host's
//! * `anonymous` — addresses and names that stand for others
//!
//! Whatever is put in goes through the module `secrets` first.

mod anonymous;
mod contents;
mod programs;

use std::{
    fs::OpenOptions,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
};

use flate2::{Compression, write::GzEncoder};

use self::{anonymous::Anonymizer, contents::File};
use super::{
    OperatorError,
    secrets::{Secrets, without_payload},
};
use crate::{cli::Cli, status::now};

/// How it is asked for.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// The archive (.tar.gz), which must not be there yet; without: flannel-bundle-TIME.tar.gz in this folder
    file: Option<PathBuf>,
    /// Put others in the place of addresses, MACs and names of hosts, each the same everywhere; subnets stay subnets
    #[arg(long)]
    anonymize: bool,
}

/// The archive could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// It could not be written.
    #[error("write {path}: {source}")]
    Write {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Collects everything, and writes the archive. What can't be had is named in it.
///
/// # Errors
/// [`BundleError`].
pub async fn make(cli: &Cli, options: &Options) -> Result<(), OperatorError> {
    let name = format!("flannel-bundle-{}", now());
    let path = options.file.clone().unwrap_or_else(|| PathBuf::from(format!("{name}.tar.gz")));
    let failed = |source| BundleError::Write { path: path.clone(), source };
    // First: who may not write there need not wait.
    let archive = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(failed)?;
    let mut files = contents::collect(cli).await;
    let secrets = Secrets::of(cli, std::env::vars_os());
    for file in &mut files {
        file.text = secrets.hide(&without_payload(&file.text));
    }
    if options.anonymize {
        let anonymizer = Anonymizer::new(contents::names(cli, &files));
        for file in &mut files {
            file.text = anonymizer.apply(&file.text);
        }
    }
    write(archive, &name, &files).map_err(failed)?;
    println!("{}: {} files; look through them before you give them away", path.display(), files.len());
    Ok(())
}

fn write(archive: std::fs::File, folder: &str, files: &[File]) -> io::Result<()> {
    let mut tar = tar::Builder::new(GzEncoder::new(archive, Compression::default()));
    for File { name, text } in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(now());
        header.set_cksum();
        tar.append_data(&mut header, format!("{folder}/{name}"), text.as_bytes())?;
    }
    tar.into_inner()?.finish()?.flush()
}
