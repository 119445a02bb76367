//! Running other people's programs, with fixed arguments, without a shell.
#![expect(clippy::disallowed_types, reason = "the one place of the agent that runs other programs: nft and iptables")]

use std::{
    fs, io,
    os::unix::{fs::MetadataExt as _, process::ExitStatusExt as _},
    path::PathBuf,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use caps::{CapSet, Capability};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use tokio::{io::AsyncWriteExt as _, process::Command, time::timeout};

/// None of them takes longer, but where another program holds a lock.
const LIMIT: Duration = Duration::from_secs(10);
/// Where they are, also for users whose `PATH` lacks the system's programs.
const SYSTEM_PATH: &str = "/usr/sbin:/sbin:/usr/bin:/bin";

/// The packet rules could not be read or set. What was set before stays.
#[derive(Debug, thiserror::Error)]
pub enum NetfilterError {
    /// A program is not installed.
    #[error("{wanted}, and {program} is not installed: install {package}, or {otherwise}")]
    Missing {
        /// What it is needed for.
        wanted: &'static str,
        /// Its name.
        program: &'static str,
        /// The package that has it.
        package: &'static str,
        /// What to do without.
        otherwise: &'static str,
    },
    /// It can't be started, or spoken to.
    #[error("run {program}: {source}")]
    Run {
        /// Which.
        program: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// It did not end.
    #[error("{program} did not end within {LIMIT:?}; another program may hold the lock of the packet rules")]
    Late {
        /// Which.
        program: &'static str,
    },
    /// It refused.
    #[error("{program}: {reason}{advice}", advice = advice(.reason))]
    Refused {
        /// Which.
        program: &'static str,
        /// In its own words.
        reason: String,
    },
    /// It crashed.
    #[error("{program} was ended by {signal}; the program is broken: install another version")]
    Crashed {
        /// Which.
        program: &'static str,
        /// By which signal.
        signal: String,
    },
    /// It was content, and nothing happened.
    #[error("{program} reports success, and the rules that it was given are not there; install another version")]
    WithoutEffect {
        /// Which.
        program: &'static str,
    },
    /// Two ways were tried.
    #[error("{0}; and {1}")]
    Both(Box<NetfilterError>, Box<NetfilterError>),
}

impl NetfilterError {
    /// Whether a program understood that it was spoken to, and said no.
    pub(super) const fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}

/// What to do about what a program says.
fn advice(reason: &str) -> &'static str {
    let says = |words: &str| reason.contains(words);
    if says("lock file") || says("(legacy)") && says("Permission denied") {
        "; iptables-legacy needs root: run the agent as root, or install nftables"
    } else if says("ermission denied") || says("not permitted") {
        "; the agent needs CAP_NET_ADMIN"
    } else {
        ""
    }
}

/// A program that is installed.
#[derive(Clone, Debug)]
pub(super) struct Tool {
    name: &'static str,
    path: PathBuf,
}

impl Tool {
    pub(super) fn find(name: &'static str) -> Option<Self> {
        let path = format!("{}:{SYSTEM_PATH}", std::env::var("PATH").unwrap_or_default());
        which::which_in(name, Some(path), "/").ok().map(|path| Self { name, path })
    }

    /// Which file it is: another one after an upgrade.
    pub(super) fn identity(&self) -> Identity {
        let file = fs::metadata(&self.path);
        file.map_or((0, 0, 0), |file| (file.dev(), file.ino(), file.mtime()))
    }

    /// What it prints.
    pub(super) async fn run(&self, arguments: &[&str], input: &str) -> Result<String, NetfilterError> {
        match self.attempt(arguments, input).await? {
            Ended { status, output, .. } if status.success() => Ok(output),
            ended => Err(self.refused(ended)),
        }
    }

    /// What it prints; [`None`] where it says by its exit code 1 that there is no such thing.
    pub(super) async fn list(&self, arguments: &[&str]) -> Result<Option<String>, NetfilterError> {
        match self.attempt(arguments, "").await? {
            Ended { status, output, .. } if status.success() => Ok(Some(output)),
            // Of nft also the code for what is not permitted.
            Ended { status, words, .. } if status.code() == Some(1) && !words.contains("not permitted") => Ok(None),
            ended => Err(self.refused(ended)),
        }
    }

    fn refused(&self, ended: Ended) -> NetfilterError {
        let program = self.name;
        if let Some(number) = ended.status.signal() {
            let signal = Signal::try_from(number).map_or_else(|_| format!("signal {number}"), |it| it.to_string());
            return NetfilterError::Crashed { program, signal };
        }
        let reason = if ended.words.is_empty() { format!("{}, without a word", ended.status) } else { ended.words };
        NetfilterError::Refused { program, reason }
    }

    async fn attempt(&self, arguments: &[&str], input: &str) -> Result<Ended, NetfilterError> {
        let failed = |source| NetfilterError::Run { program: self.name, source };
        lend_capability();
        let mut child = Command::new(&self.path)
            .args(arguments)
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let mut group = Group(child.id());
        let stdin = child.stdin.take();
        let ended = timeout(LIMIT, async move {
            if let Some(mut stdin) = stdin {
                // One that ends before it has read all says why on its own.
                let _unread = stdin.write_all(input.as_bytes()).await;
            }
            child.wait_with_output().await
        });
        let ended = ended.await.map_err(|_| NetfilterError::Late { program: self.name })?.map_err(failed)?;
        group.0 = None;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        // Without what underlines a place in the line above.
        let says = |line: &&str| !line.trim_matches(['^', '~', ' ']).is_empty();
        let words = text(&ended.stderr).lines().map(str::trim).filter(says).collect::<Vec<_>>().join(" ");
        Ok(Ended { status: ended.status, output: text(&ended.stdout), words })
    }
}

/// Device, inode, and time of change.
pub(super) type Identity = (u64, u64, i64);

/// The process group of a program that was started: killed when dropped, with whatever the program started, as a script
/// in its place does. A group of its own also keeps a terminal's ^C from a half-done change.
struct Group(Option<u32>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(id) = self.0.and_then(|id| i32::try_from(id).ok()) {
            // It may just have ended.
            let _gone = killpg(Pid::from_raw(id), Signal::SIGKILL);
        }
    }
}

struct Ended {
    status: ExitStatus,
    output: String,
    /// What it complained of, in one line.
    words: String,
}

/// A process that is not root passes no capability on to the programs that it starts but its ambient ones
/// (capabilities(7)), which are each thread's own. Where this fails, the program will say what it lacks.
fn lend_capability() {
    for set in [CapSet::Inheritable, CapSet::Ambient] {
        let _refused = caps::raise(None, set, Capability::CAP_NET_ADMIN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_program_says_is_told_from_its_refusal() {
        let cat = Tool { name: "cat", path: "/bin/cat".into() };
        assert_eq!(cat.run(&[], "rules").await.expect("runs"), "rules");
        assert!(cat.list(&["/no/such/file"]).await.expect("a listing").is_none());
        let error = cat.run(&["/no/such/file"], "").await.expect_err("fails").to_string();
        assert_eq!(error, "cat: /bin/cat: /no/such/file: No such file or directory");
        assert!(Tool::find("no-such-program").is_none());
    }

    #[tokio::test]
    async fn a_crash_and_a_silent_refusal_are_told_apart() {
        let sh = Tool { name: "nft", path: "/bin/sh".into() };
        let error = async |script: &str| sh.run(&["-c", script], "").await.expect_err("fails");
        let crash = error("kill -SEGV $$").await;
        assert!(crash.to_string().starts_with("nft was ended by SIGSEGV") && !crash.is_refusal(), "{crash}");
        let silent = error("exit 42").await;
        assert_eq!(silent.to_string(), "nft: exit status: 42, without a word");
        assert!(silent.is_refusal());
    }

    #[tokio::test]
    async fn one_that_is_given_up_is_killed_with_its_children() {
        let sh = Tool { name: "nft", path: "/bin/sh".into() };
        let directory = tempfile::tempdir().expect("a folder");
        let file = directory.path().join("pid");
        let script = format!("sleep 1000 & echo $! > {}; wait", file.display());
        let begun = async {
            while fs::read_to_string(&file).unwrap_or_default().trim().is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let arguments = ["-c", &script];
        tokio::select! {
            ended = sh.run(&arguments, "") => panic!("{ended:?}"),
            () = begun => {}
        }
        let child = fs::read_to_string(&file).expect("its number");
        let path = format!("/proc/{}/stat", child.trim());
        // Nobody may have asked for its end yet.
        let is_gone = || fs::read_to_string(&path).map_or(true, |stat| stat.contains(") Z "));
        while !is_gone() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[test]
    fn advice_is_for_what_can_be_helped() {
        let refused = |reason: &str| NetfilterError::Refused { program: "nft", reason: reason.to_owned() }.to_string();
        assert!(refused("Error: Operation not permitted").ends_with("; the agent needs CAP_NET_ADMIN"));
        assert!(refused("Fatal: can't open lock file /run/xtables.lock: Permission denied").contains("needs root"));
        assert_eq!(refused("Error: syntax error"), "nft: Error: syntax error");
    }
}
