//! A lab for a test: hosts on an underlay, a real etcd, the agent that `cargo xtask test` built.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use tempfile::TempDir;
use xtask::{
    lab::{Host, Lab, Netns, PREFIX, Store},
    progress::wait_for,
};

pub const CONFIG: &str = r#"{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}"#;
/// For what is to happen soon.
pub const SOON: Duration = Duration::from_secs(20);

/// Everything of one test. The fields go in this order.
pub struct World {
    pub hosts: Vec<Host>,
    pub store: Store,
    pub lab: Lab,
    _directory: TempDir,
}

impl World {
    /// An underlay with a store that holds a network config, and hosts without an agent.
    pub fn new(hosts: u8) -> Self {
        let world = Self::without_config(hosts);
        world.store.put(&format!("{PREFIX}/config"), CONFIG).unwrap();
        world
    }

    pub fn without_config(hosts: u8) -> Self {
        let (name, directory) = names();
        let lab = Lab::new(&name, directory.path()).unwrap();
        let store = lab.store().unwrap();
        let hosts = (1..=hosts).map(|number| lab.host(&format!("node{number}"), number).unwrap()).collect();
        Self { hosts, store, lab, _directory: directory }
    }

    /// Hosts with a ready agent and a pod each.
    pub fn with_agents(hosts: u8) -> Self {
        let mut world = Self::new(hosts);
        for host in 0..hosts.into() {
            world.start(host, &[]);
        }
        for host in &mut world.hosts {
            host.wait_ready().unwrap();
            host.add_pod().unwrap();
        }
        world
    }

    /// Starts the agent on a host; it is not ready yet.
    pub fn start(&mut self, host: usize, arguments: &[&str]) {
        self.hosts[host].start_agent(&agent(), &self.store, arguments).unwrap();
    }

    /// A command of the agent on a host.
    pub fn agent_on(&self, host: usize) -> std::process::Command {
        self.hosts[host].agent_command(&agent())
    }

    /// Waits until the first pods of two hosts reach each other.
    pub fn wait_connected(&self, one: usize, two: usize) {
        for (from, to) in [(one, two), (two, one)] {
            let (from, to) = (&self.hosts[from].pods[0], &self.hosts[to].pods[0]);
            let waited = wait_for("pods", SOON, || is_answered(&from.netns, &to.address.to_string()));
            let logs = [one, two].map(|host| self.hosts[host].agent.as_ref().map(|agent| agent.log()));
            assert!(waited.is_ok(), "pods do not reach each other; the agents said: {logs:#?}");
        }
    }

    /// A counter of a host, in packets.
    pub fn counter(&self, host: usize, label: &str) -> u64 {
        self.counter_row(host, label).0
    }

    /// A counter of a host: packets and bytes.
    pub fn counter_row(&self, host: usize, label: &str) -> (u64, u64) {
        let text = xtask::process::output(self.agent_on(host).arg("counters")).unwrap();
        let row = text.lines().find(|line| line.split_whitespace().next() == Some(label)).unwrap();
        let mut numbers = row.split_whitespace().skip(1).map(|number| number.parse().unwrap());
        (numbers.next().unwrap(), numbers.next().unwrap())
    }

    /// The lease of a host: the last part of its key, and the value.
    pub fn lease_of(&self, host: usize) -> (String, String) {
        let address = format!("\"{}\"", self.hosts[host].address);
        let leases = self.store.list(&format!("{PREFIX}/subnets/")).unwrap();
        let (key, value) = leases.into_iter().find(|(_, value)| value.contains(&address)).unwrap();
        (key.rsplit('/').next().unwrap().to_owned(), value)
    }

    /// Waits until the agent of a host has said something.
    pub fn wait_log(&self, host: usize, text: &str) {
        let agent = self.hosts[host].agent.as_ref().unwrap();
        let waited = wait_for(text, SOON, || agent.log().contains(text));
        assert!(waited.is_ok(), "the agent did not say {text:?}:\n{}", agent.log());
    }

    /// That a host has nothing of the agent's: no device, no pins, no `subnet.env`.
    pub fn assert_untouched(&self, host: usize) {
        let host = &self.hosts[host];
        assert!(host.netns.ip("link show flannel.1").is_err(), "flannel.1 exists");
        assert!(!host.netns.exec("ip route").unwrap().contains("10.5.0.0/16"), "the route exists");
        assert!(!host.pin_dir().exists(), "{:?} exists", host.pin_dir());
        assert!(!host.run_dir().join("subnet.env").exists(), "subnet.env exists");
    }
}

/// Whether one ping is answered.
pub fn is_answered(from: &Netns, address: &str) -> bool {
    from.exec(&format!("ping -c 1 -W 1 {address}")).is_ok()
}

/// The agent's binary, beside the folder of this test's.
pub fn agent() -> PathBuf {
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    let agent = path.join("flannel-agent");
    assert!(agent.exists(), "{agent:?} is not built; `cargo xtask test` builds it");
    agent
}

/// A name and a folder of this test's own.
pub fn names() -> (String, TempDir) {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let name = format!("ft{}x{number}", std::process::id());
    let directory = tempfile::Builder::new().prefix(&name).tempdir().unwrap();
    (name, directory)
}
