//! What an agent waits for before it has an overlay, for `flannel-agent status`: a file of its own in the run directory.
//!
//! It is no [status](crate::status): there is no VNI yet, and who asks for the status of an overlay must not find one. It counts while
//! its agent holds the lock on it, so that one that was killed is not taken for one that waits. Numbers of processes would not do: each
//! container has its own.

use std::{
    fs::{self, File, Permissions},
    io::{self, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tempfile::TempPath;
use tracing::warn;

use crate::{atomic_file, escape, status::now};

const PREFIX: &str = "waiting.";
const SUFFIX: &str = ".json";
/// For everybody to read, as a status.
const MODE: u32 = 0o644;

/// An agent that waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// Its process.
    pub pid: u32,
    /// Since when, in seconds since 1970.
    pub since: u64,
    /// What for, and what to do.
    pub reason: String,
}

impl Waiting {
    /// All that wait with that run directory, who waits longest first.
    pub fn read_all(run_dir: &Path) -> Vec<Self> {
        let mut all: Vec<_> = files(run_dir).filter_map(|path| Self::read(&path)).collect();
        all.sort_by_key(|waiting| (waiting.since, waiting.pid));
        all
    }

    /// [`None`] also for one that is just being written.
    fn read(path: &Path) -> Option<Self> {
        let file = open(path)?;
        let is_held = matches!(file.try_lock_shared(), Err(fs::TryLockError::WouldBlock));
        is_held.then(|| serde_json::from_reader(file).ok()).flatten()
    }
}

/// Takes away what agents left that were killed. One that can't be taken away says nothing to anybody.
pub fn remove_stale(run_dir: &Path) {
    for path in files(run_dir) {
        if open(&path).is_some_and(|file| file.try_lock_shared().is_ok()) {
            let _kept = fs::remove_file(path);
        }
    }
}

fn files(run_dir: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let entries = fs::read_dir(run_dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with(PREFIX) && name.ends_with(SUFFIX))
    })
}

fn open(path: &Path) -> Option<File> {
    atomic_file::open(path, File::options().read(true)).ok()
}

/// What this agent waits for. It goes when this is dropped.
pub struct Note {
    run_dir: PathBuf,
    written: Option<Written>,
    /// A run directory that can't be written to is told of once.
    has_failed: bool,
}

struct Written {
    path: TempPath,
    waiting: Waiting,
    /// Locked. With the one that it replaced, which somebody may just have opened.
    _files: (File, Option<File>),
}

impl Note {
    /// Nothing yet.
    pub const fn new(run_dir: PathBuf) -> Self {
        Self { run_dir, written: None, has_failed: false }
    }

    /// Says what is waited for, unless it was said already.
    pub fn say(&mut self, reason: &str) {
        let reason = escape::control_characters(reason);
        if self.written.as_ref().is_some_and(|written| written.waiting.reason == reason && written.path.exists()) {
            return;
        }
        if let Err(error) = self.write(reason.into_owned()) {
            if !self.has_failed {
                let run_dir = self.run_dir.display();
                warn!("flannel-agent status can't tell what this agent waits for: write to {run_dir}: {error}");
            }
            self.has_failed = true;
        }
    }

    /// It is there.
    pub fn withdraw(&mut self) {
        self.written = None;
    }

    fn write(&mut self, reason: String) -> io::Result<()> {
        atomic_file::create_directory(&self.run_dir)?;
        if self.written.is_none() {
            remove_stale(&self.run_dir);
        }
        let before = self.written.take();
        let since = before.as_ref().map_or_else(now, |before| before.waiting.since);
        let waiting = Waiting { pid: std::process::id(), since, reason };
        let mut builder = tempfile::Builder::new();
        if before.is_none() {
            builder.prefix(PREFIX).suffix(SUFFIX);
        }
        let mut file = builder.tempfile_in(&self.run_dir)?;
        // First, so that it is never taken for one that was left.
        file.as_file().try_lock()?;
        file.write_all(&serde_json::to_vec(&waiting)?)?;
        file.as_file().set_permissions(Permissions::from_mode(MODE))?;
        let (file, path, replaced) = match before {
            Some(Written { path, _files: (replaced, _), .. }) => (file.persist(&path)?, path, Some(replaced)),
            None => {
                let (file, path) = file.into_parts();
                (file, path, None)
            }
        };
        self.written = Some(Written { path, waiting, _files: (file, replaced) });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_waited_for_is_told_until_it_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let run_dir = directory.path().join("flannel");
        let reasons = || Waiting::read_all(&run_dir).into_iter().map(|waiting| waiting.reason).collect::<Vec<_>>();
        let mut note = Note::new(run_dir.clone());
        assert!(!run_dir.exists());
        for (said, told) in
            [("no config", "no config"), ("no config", "no config"), ("away\u{1b}[2J", "away\\u{1b}[2J")]
        {
            note.say(said);
            assert_eq!(reasons(), [told]);
            assert_eq!(fs::read_dir(&run_dir).unwrap().count(), 1);
        }
        let mut other = Note::new(run_dir.clone());
        other.say("out of subnets");
        assert_eq!(reasons().len(), 2);
        assert_eq!(Waiting::read_all(&run_dir)[0].pid, std::process::id());
        // It is there again where somebody took it away.
        fs::remove_dir_all(&run_dir).unwrap();
        note.say("away\u{1b}[2J");
        assert_eq!(reasons(), ["away\\u{1b}[2J"]);
        note.withdraw();
        assert!(reasons().is_empty());
        note.say("away");
        drop((note, other));
        assert_eq!(fs::read_dir(&run_dir).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_agent_left_is_not_told_and_goes() {
        let directory = tempfile::tempdir().unwrap();
        let run_dir = directory.path();
        let left = run_dir.join("waiting.left.json");
        fs::write(&left, r#"{"pid": 1, "since": 1, "reason": "no config"}"#).unwrap();
        assert!(Waiting::read_all(run_dir).is_empty() && left.exists());
        let mut note = Note::new(run_dir.to_owned());
        note.say("away");
        assert!(!left.exists());
        remove_stale(run_dir);
        assert_eq!(Waiting::read_all(run_dir).len(), 1);
    }
}
