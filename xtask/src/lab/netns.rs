//! Network namespaces, by the names that `ip netns` knows.

use std::{fs::File, panic::resume_unwind, path::Path, process::Command, thread, time::Duration};

use anyhow::{Context as _, Result};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    process::{output, output_with_input},
    progress::wait_for,
};

/// A network namespace, removed when dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes one, with TCP's plainest congestion control, whatever the machine's default is: a namespace begins with that.
    /// Where it is bbr, a socket that is switched to another before it connects still sends by bbr's pacing timer
    /// (`sk_pacing_status`, net/ipv4/tcp_bbr.c), of which each packet costs a virtual machine an exit.
    ///
    /// # Errors
    /// Where there is one of that name.
    pub fn create(name: &str) -> Result<Self> {
        output(Command::new("ip").args(["netns", "add", name]))?;
        let netns = Self { name: name.to_owned() };
        netns.exec("sysctl -qw net.ipv4.tcp_congestion_control=reno")?;
        Ok(netns)
    }

    /// Names one that there is, by a file that stands for it, such as `/proc/<pid>/ns/net`. When dropped, it loses the name.
    ///
    /// # Errors
    /// Where the name is taken, or the file stands for none.
    pub fn attach(name: &str, file: &Path) -> Result<Self> {
        let path = Path::new("/run/netns").join(name);
        File::create_new(&path).with_context(|| format!("create {path:?}"))?;
        let netns = Self { name: name.to_owned() };
        mount(Some(file), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .with_context(|| format!("mount {file:?} on {path:?}"))?;
        Ok(netns)
    }

    /// All whose names begin with `prefix`. They are removed when dropped.
    ///
    /// # Errors
    /// Where `ip` fails.
    pub fn list(prefix: &str) -> Result<Vec<Self>> {
        let names = output(Command::new("ip").args(["netns", "list"]))?;
        let names = names.lines().filter_map(|line| line.split_whitespace().next());
        Ok(names.filter(|name| name.starts_with(prefix)).map(|name| Self { name: name.to_owned() }).collect())
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that it is known by.
    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    /// A command to run in it. Unlike `ip netns exec`, this leaves the mounts alone, so that a bpf file system stays
    /// visible.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path())).arg("--").arg(program);
        command
    }

    /// Runs a command line, words divided by spaces, and returns what it printed.
    ///
    /// # Errors
    /// Where it fails.
    pub fn exec(&self, line: &str) -> Result<String> {
        let mut words = line.split_whitespace();
        output(self.command(words.next().unwrap_or("true")).args(words))
    }

    /// The same with a text on its standard input.
    ///
    /// # Errors
    /// Where it fails.
    pub fn feed(&self, line: &str, input: &str) -> Result<String> {
        let mut words = line.split_whitespace();
        output_with_input(self.command(words.next().unwrap_or("true")).args(words), input)
    }

    /// Makes something in it. A socket stays in the namespace that it was made in.
    ///
    /// # Errors
    /// Where it can't be entered.
    pub fn within<T: Send>(&self, make: impl FnOnce() -> T + Send) -> Result<T> {
        let made = thread::scope(|scope| scope.spawn(|| self.enter().map(|()| make())).join());
        made.unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Moves the calling thread, and no other, into it.
    ///
    /// # Errors
    /// Where the namespace is gone, or the kernel refuses.
    pub fn enter(&self) -> Result<()> {
        let path = self.path();
        let file = File::open(&path).with_context(|| format!("open {path}"))?;
        setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("enter {path}"))
    }

    /// Runs `ip` with the words of `line`.
    ///
    /// # Errors
    /// Where it fails.
    pub fn ip(&self, line: &str) -> Result<String> {
        output(Command::new("ip").args(["-n", &self.name]).args(line.split_whitespace()))
    }

    /// What `ip -j` says, as JSON.
    ///
    /// # Errors
    /// Where it fails, or prints none.
    pub fn ip_json(&self, line: &str) -> Result<serde_json::Value> {
        let text = self.ip(&format!("-j {line}"))?;
        let text = if text.trim().is_empty() { "[]" } else { &text };
        serde_json::from_str(text).with_context(|| format!("ip {line} in {}", self.name))
    }

    /// Ends all processes in it.
    ///
    /// # Errors
    /// Where they do not end.
    pub fn end_processes(&self) -> Result<()> {
        let pids = || output(Command::new("ip").args(["netns", "pids", &self.name])).unwrap_or_default();
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            for pid in pids().split_whitespace().filter_map(|pid| pid.parse().ok()) {
                let _gone = kill(Pid::from_raw(pid), signal);
            }
            if wait_for("the namespace's processes", Duration::from_secs(3), || pids().trim().is_empty()).is_ok() {
                return Ok(());
            }
        }
        anyhow::bail!("processes in {} do not end: {}", self.name, pids())
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Err(error) = output(Command::new("ip").args(["netns", "delete", &self.name])) {
            eprintln!("{error:#}");
        }
    }
}
