//! Running other people's programs, with fixed arguments, without a shell.
#![expect(clippy::disallowed_types, reason = "the one place of the agent that runs other programs: nft and iptables")]

use std::{io, path::PathBuf, process::Stdio, time::Duration};

use caps::{CapSet, Capability};
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

    /// What it prints.
    pub(super) async fn run(&self, arguments: &[&str], input: &str) -> Result<String, NetfilterError> {
        match self.attempt(arguments, input).await? {
            Ended { code: Some(0), output, .. } => Ok(output),
            Ended { words, .. } => Err(self.refused(words)),
        }
    }

    /// What it prints; [`None`] where it says by its exit code 1 that there is no such thing.
    pub(super) async fn list(&self, arguments: &[&str]) -> Result<Option<String>, NetfilterError> {
        match self.attempt(arguments, "").await? {
            Ended { code: Some(0), output, .. } => Ok(Some(output)),
            // Of nft also the code for what is not permitted.
            Ended { code: Some(1), words, .. } if !words.contains("not permitted") => Ok(None),
            Ended { words, .. } => Err(self.refused(words)),
        }
    }

    const fn refused(&self, reason: String) -> NetfilterError {
        NetfilterError::Refused { program: self.name, reason }
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
            .spawn()
            .map_err(failed)?;
        let stdin = child.stdin.take();
        let ended = timeout(LIMIT, async move {
            if let Some(mut stdin) = stdin {
                // One that ends before it has read all says why on its own.
                let _unread = stdin.write_all(input.as_bytes()).await;
            }
            child.wait_with_output().await
        });
        let ended = ended.await.map_err(|_| NetfilterError::Late { program: self.name })?.map_err(failed)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let words =
            text(&ended.stderr).lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
        Ok(Ended { code: ended.status.code(), output: text(&ended.stdout), words })
    }
}

struct Ended {
    code: Option<i32>,
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

    #[test]
    fn advice_is_for_what_can_be_helped() {
        let refused = |reason: &str| NetfilterError::Refused { program: "nft", reason: reason.to_owned() }.to_string();
        assert!(refused("Error: Operation not permitted").ends_with("; the agent needs CAP_NET_ADMIN"));
        assert!(refused("Fatal: can't open lock file /run/xtables.lock: Permission denied").contains("needs root"));
        assert_eq!(refused("Error: syntax error"), "nft: Error: syntax error");
    }
}
