//! One lab of a name at a time.

use std::{fs::File, io::Write as _, path::PathBuf};

use anyhow::{Context as _, Result};
use nix::{
    fcntl::{Flock, FlockArg},
    unistd::Pid,
};

/// Held while a lab is up. Its file holds the process that has it.
#[derive(Debug)]
pub struct Lock {
    _file: Flock<File>,
}

impl Lock {
    /// Takes the lock of a lab.
    ///
    /// # Errors
    /// Where somebody has it.
    pub fn take(name: &str) -> Result<Self> {
        let path = path(name);
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.with_context(|| format!("open {path:?}"))?;
        let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|_| anyhow::anyhow!("{name} is up already; only one at a time ({path:?})"))?;
        file.set_len(0)?;
        write!(file, "{}", std::process::id())?;
        Ok(Self { _file: file })
    }

    /// The process that has it.
    ///
    /// # Errors
    /// Where the file names none.
    pub fn holder(name: &str) -> Result<Pid> {
        let text = std::fs::read_to_string(path(name)).with_context(|| format!("read {:?}", path(name)))?;
        Ok(Pid::from_raw(text.trim().parse().context("the lock names no process")?))
    }
}

fn path(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("{name}.lock"))
}
