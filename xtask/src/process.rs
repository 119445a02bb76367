//! Other people's programs.

use std::{
    fs::File,
    io::{Seek as _, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::progress::patience;

/// Runs a command to its end and returns what it printed.
///
/// # Errors
/// Where it can't be started, or fails, with its own words.
pub fn output(command: &mut Command) -> Result<String> {
    output_from(command, Stdio::null())
}

/// The same with a text on its standard input.
///
/// # Errors
/// As [`output`].
pub fn output_with_input(command: &mut Command, input: &str) -> Result<String> {
    // Not a pipe: who does not read it to its end must not stop us.
    let mut file = tempfile::tempfile()?;
    file.write_all(input.as_bytes())?;
    file.rewind()?;
    output_from(command, file.into())
}

fn output_from(command: &mut Command, input: Stdio) -> Result<String> {
    let output = command.stdin(input).output().with_context(|| format!("start {command:?}"))?;
    if !output.status.success() {
        let words = [output.stderr, output.stdout].concat();
        bail!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&words).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command to its end with its output on ours.
///
/// # Errors
/// Where it can't be started, or fails.
pub fn inherit(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("start {command:?}"))?;
    anyhow::ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

/// A `cargo` that is not told to be as quiet as the build script's.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.env_remove("CARGO_TERM_QUIET").current_dir(workspace());
    // What cargo says of this package to the program that it runs would make some build scripts run again.
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")) {
            command.env_remove(name);
        }
    }
    command
}

/// The workspace's folder.
pub fn workspace() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask).to_owned()
}

/// A program in the background, ended when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts it with its output in a file.
    ///
    /// # Errors
    /// Where it can't be started.
    pub fn start(command: &mut Command, log: &Path) -> Result<Self> {
        let file = File::create(log).with_context(|| format!("open {log:?}"))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        Ok(Self { child, log: log.to_owned() })
    }

    /// Its id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How long its threads have waited for a CPU while they could have run: `run_delay` of the kernel's `schedstat`.
    ///
    /// # Errors
    /// Where it is gone.
    pub fn run_delay(&self) -> Result<Duration> {
        let mut sum = 0;
        for thread in std::fs::read_dir(format!("/proc/{}/task", self.id()))? {
            // One that has just ended has none.
            let counts = std::fs::read_to_string(thread?.path().join("schedstat")).unwrap_or_default();
            sum += counts.split_whitespace().nth(1).and_then(|delay| delay.parse::<u64>().ok()).unwrap_or(0);
        }
        Ok(Duration::from_nanos(sum))
    }

    /// What it printed so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// Where it is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?)
    }

    /// Its exit status, if it has ended.
    ///
    /// # Errors
    /// Where the kernel does not know it.
    pub fn status(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for its end, however long that takes.
    ///
    /// # Errors
    /// Where the kernel does not know it.
    pub fn wait_without_limit(&mut self) -> Result<ExitStatus> {
        Ok(self.child.wait()?)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// After `limit` (times [`patience`]).
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let (start, limit) = (Instant::now(), limit * patience());
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            anyhow::ensure!(start.elapsed() < limit, "process {} still runs after {limit:?}", self.id());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        let asked = self.signal(Signal::SIGTERM).and_then(|()| self.wait(Duration::from_secs(3)));
        if asked.is_err() {
            let _gone = self.child.kill();
            let _reaped = self.child.wait();
        }
    }
}
