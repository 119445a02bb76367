//! A real etcd.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;

use super::Netns;
use crate::{
    process::{Process, output, output_with_input},
    progress::wait_for,
};

const START_LIMIT: Duration = Duration::from_secs(20);

/// An etcd with one member.
#[derive(Debug)]
pub struct Store {
    process: Option<Process>,
    netns: String,
    endpoint: String,
    directory: PathBuf,
    arguments: Vec<String>,
}

impl Store {
    pub(super) fn start(netns: &Netns, address: Ipv4Addr, directory: &Path) -> Result<Self> {
        Self::start_with(netns, &format!("http://{address}:2379"), directory, &[])
    }

    /// Starts an etcd at a URL, with further arguments.
    ///
    /// # Errors
    /// Where it does not come up.
    pub fn start_with(netns: &Netns, endpoint: &str, directory: &Path, arguments: &[&str]) -> Result<Self> {
        let mut store = Self {
            process: None,
            netns: netns.name().to_owned(),
            endpoint: endpoint.to_owned(),
            directory: directory.to_owned(),
            arguments: arguments.iter().map(|argument| (*argument).to_owned()).collect(),
        };
        store.resume()?;
        Ok(store)
    }

    /// Starts it again after [`Store::stop`].
    ///
    /// # Errors
    /// Where it does not come up.
    pub fn resume(&mut self) -> Result<()> {
        let url = &self.endpoint;
        let mut command = self.command("etcd");
        command
            .arg("--data-dir")
            .arg(self.data_dir())
            .args(["--listen-client-urls", url, "--advertise-client-urls", url])
            // One member: its peer port is never used, but has to be bound.
            .args(["--listen-peer-urls", "http://127.0.0.1:0", "--log-level", "warn"])
            .args(&self.arguments);
        let mut process = Process::start(&mut command, &self.directory.join("etcd.log"))?;
        let listening = wait_for("etcd", START_LIMIT, || !matches!(process.status(), Ok(None)) || self.is_listening());
        anyhow::ensure!(
            listening.is_ok() && matches!(process.status(), Ok(None)),
            "etcd did not start:\n{}",
            process.log()
        );
        self.process = Some(process);
        Ok(())
    }

    /// Ends it and keeps its data.
    pub fn stop(&mut self) {
        self.process = None;
    }

    /// Ends it as a power failure would, and keeps what it has written.
    ///
    /// # Errors
    /// Where it is gone already.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.process = None;
        Ok(())
    }

    /// Stops it from answering, with its connections left open.
    ///
    /// # Errors
    /// Where it is gone.
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Has it answer again.
    ///
    /// # Errors
    /// Where it is gone.
    pub fn unpause(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// Begins anew without any data.
    ///
    /// # Errors
    /// Where it does not come up.
    pub fn wipe(&mut self) -> Result<()> {
        self.stop();
        fs::remove_dir_all(self.data_dir()).with_context(|| format!("remove {:?}", self.data_dir()))?;
        self.resume()
    }

    /// Where its data is.
    pub fn data_dir(&self) -> PathBuf {
        self.directory.join("etcd")
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        self.process.as_ref().context("etcd is not running")?.signal(signal)
    }

    /// Its URL.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Runs `etcdctl` and returns what it printed.
    ///
    /// # Errors
    /// Where it fails.
    pub fn etcdctl(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.command("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &self.endpoint]).args(arguments);
        output(&mut command)
    }

    /// The same with something to read on its standard input.
    ///
    /// # Errors
    /// Where it fails.
    pub fn etcdctl_with_input(&self, arguments: &[&str], input: &str) -> Result<String> {
        let mut command = self.command("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &self.endpoint]).args(arguments);
        output_with_input(&mut command, input)
    }

    /// The store's revision.
    ///
    /// # Errors
    /// Where etcd does not answer.
    pub fn revision(&self) -> Result<i64> {
        let status = self.status()?;
        status[0]["Status"]["header"]["revision"].as_i64().context("etcdctl says no revision")
    }

    /// Whether this member leads its cluster.
    ///
    /// # Errors
    /// Where etcd does not answer.
    pub fn is_leader(&self) -> Result<bool> {
        let status = &self.status()?[0]["Status"];
        Ok(status["leader"] == status["header"]["member_id"])
    }

    fn status(&self) -> Result<serde_json::Value> {
        Ok(serde_json::from_str(&self.etcdctl(&["endpoint", "status", "-w", "json"])?)?)
    }

    /// Goes back to a backup.
    ///
    /// # Errors
    /// Where it can't be read, or etcd does not come up with it.
    pub fn restore(&mut self, backup: &Path) -> Result<()> {
        self.stop();
        fs::remove_dir_all(self.data_dir()).with_context(|| format!("remove {:?}", self.data_dir()))?;
        let mut command = self.command("etcdctl");
        command
            .env("ETCDCTL_API", "3")
            .args(["snapshot", "restore"])
            .arg(backup)
            .arg("--data-dir")
            .arg(self.data_dir());
        output(&mut command)?;
        self.resume()
    }

    /// Writes a key with a value that is too long for a command line.
    ///
    /// # Errors
    /// Where etcd refuses.
    pub fn put_file(&self, key: &str, value: &str) -> Result<()> {
        self.etcdctl_with_input(&["put", "--", key], value).map(drop)
    }

    /// Writes a key.
    ///
    /// # Errors
    /// Where etcd refuses.
    pub fn put(&self, key: &str, value: &str) -> Result<()> {
        self.etcdctl(&["put", "--", key, value]).map(drop)
    }

    /// The value of a key, without one the empty string.
    ///
    /// # Errors
    /// Where etcd does not answer.
    pub fn get(&self, key: &str) -> Result<String> {
        Ok(self.etcdctl(&["get", "--print-value-only", "--", key])?.trim_end_matches('\n').to_owned())
    }

    /// Keys and values under a prefix, ordered by key.
    ///
    /// # Errors
    /// Where etcd does not answer.
    pub fn list(&self, prefix: &str) -> Result<Vec<(String, String)>> {
        let text = self.etcdctl(&["get", "--prefix", "--", prefix])?;
        let mut lines = text.lines();
        let mut pairs = Vec::new();
        while let (Some(key), Some(value)) = (lines.next(), lines.next()) {
            pairs.push((key.to_owned(), value.to_owned()));
        }
        Ok(pairs)
    }

    fn is_listening(&self) -> bool {
        let port = self.endpoint.rsplit(':').next().unwrap_or_default();
        output(self.command("ss").args(["-Hltn", "sport", "=", port])).is_ok_and(|sockets| !sockets.trim().is_empty())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.netns)).arg("--").arg(program);
        command
    }
}
