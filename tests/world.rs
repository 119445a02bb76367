//! A lab for a test: hosts on an underlay, a store (a real etcd where nothing else is said), the agent that
//! `cargo xtask test` built.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use nix::sys::signal::Signal;
use tempfile::TempDir;
use xtask::{
    lab::{Host, Lab, Netns, PREFIX, Store},
    process::Process,
    progress::wait_for,
};

/// The subnets that agents take by themselves are none that a test names: for these there is [`ANY_SUBNET`].
pub const CONFIG: &str = r#"{"Network": "10.5.0.0/16", "SubnetMin": "10.5.128.0", "SubnetMax": "10.5.191.0",
    "Backend": {"Type": "vxlan"}}"#;
/// With all subnets of the network: a test that names one asks [`World::free_octets`].
const ANY_SUBNET: &str = r#"{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}"#;
/// For what is to happen soon.
pub const SOON: Duration = Duration::from_secs(20);

/// A store of leases, as an agent is told of it.
pub trait LeaseStore {
    /// Starts the agent on a host, with leases from here; it is not ready yet.
    fn start_agent(&self, host: &mut Host, arguments: &[&str]);
}

impl LeaseStore for Store {
    fn start_agent(&self, host: &mut Host, arguments: &[&str]) {
        host.start_agent(&agent(), self, arguments).unwrap();
    }
}

/// Everything of one test. The fields go in this order.
pub struct World<S = Store> {
    pub hosts: Vec<Host>,
    pub store: S,
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

    /// As [`World::new`], with all subnets of the network to be had.
    pub fn with_any_subnet(hosts: u8) -> Self {
        let world = Self::without_config(hosts);
        world.store.put(&format!("{PREFIX}/config"), ANY_SUBNET).unwrap();
        world
    }

    pub fn without_config(hosts: u8) -> Self {
        Self::in_store(hosts, |lab| lab.store().unwrap())
    }

    /// Hosts with a ready agent and a pod each.
    pub fn with_agents(hosts: u8) -> Self {
        Self::new(hosts).ready(&[])
    }

    /// Two hosts of ours, and one of flannel's that the first knows.
    pub fn beside_flannels() -> Self {
        let mut world = Self::new(2).ready(&[]);
        let flannels = world.lab.host("node3", 3).unwrap();
        world.hosts.push(flannels);
        let kernel = world.hosts[2].become_kernel_vxlan(&world.store, 200).unwrap();
        world.hosts[2].add_pod_in(&kernel.subnet).unwrap();
        let [_, _, own, _] = world.hosts[0].subnet().unwrap().gateway.octets();
        world.hosts[2].add_kernel_peer_from(&world.store, own).unwrap();
        world.wait_connected(0, 1);
        world.wait_connected(0, 2);
        world
    }

    /// The third octets of two subnets of 10.5.0.0/16 that none has leased.
    pub fn free_octets(&self) -> [u8; 2] {
        let leases = self.store.list(&format!("{PREFIX}/subnets/")).unwrap();
        let is_free = |octet: &u8| leases.iter().all(|(key, _)| !key.ends_with(&format!("/10.5.{octet}.0-24")));
        let mut free = (1..=u8::MAX).filter(is_free);
        [free.next().unwrap(), free.next().unwrap()]
    }

    /// The lease of a host: the last part of its key, and the value.
    pub fn lease_of(&self, host: usize) -> (String, String) {
        let address = format!("\"{}\"", self.hosts[host].address);
        let leases = self.store.list(&format!("{PREFIX}/subnets/")).unwrap();
        let (key, value) = leases.into_iter().find(|(_, value)| value.contains(&address)).unwrap();
        (key.rsplit('/').next().unwrap().to_owned(), value)
    }
}

impl<S: LeaseStore> World<S> {
    /// An underlay with a store that is made on it, and hosts without an agent.
    pub fn in_store(hosts: u8, store: impl FnOnce(&Lab) -> S) -> Self {
        let (name, directory) = names();
        let lab = Lab::new(&name, directory.path()).unwrap();
        let store = store(&lab);
        let hosts = (1..=hosts).map(|number| lab.host(&format!("node{number}"), number).unwrap()).collect();
        Self { hosts, store, lab, _directory: directory }
    }

    /// Starts the agent on all hosts, gives each a pod once it is ready, and waits for that one's programs.
    pub fn ready(self, arguments: &[&str]) -> Self {
        let mut world = self.with_ready_agents(arguments);
        for host in &mut world.hosts {
            host.add_pod().unwrap();
        }
        (0..world.hosts.len()).for_each(|host| world.wait_pods(host));
        world
    }

    /// Waits until each pod of a host has its programs: until then all its packets take the stack.
    pub fn wait_pods(&self, host: usize) {
        let host_of = &self.hosts[host];
        let has = |pod: usize, direction: &str, program: &str| {
            let status = self.status(host);
            if status["status"]["features"]["tcx"] == false {
                let show = format!("tc filter show dev pod{pod} {direction}");
                return host_of.netns.exec(&show).unwrap().contains(program);
            }
            let mut hooks = status["dataplane"]["hooks"].as_array().unwrap().iter();
            let interface = format!("pod{pod}");
            hooks
                .any(|hook| [&hook["interface"], &hook["program"], &hook["state"]] == [&interface, program, "attached"])
        };
        let waited = wait_for("the programs of pods", SOON, || {
            (1..=host_of.pods.len()).all(|pod| has(pod, "ingress", "from_pod") && has(pod, "egress", "to_pod"))
        });
        let log = || host_of.agent.as_ref().map(xtask::process::Process::log);
        assert!(waited.is_ok(), "{waited:?}: {:#}\n{:?}", self.status(host), log());
    }

    /// Starts the agent on all hosts, and waits until each is ready.
    pub fn with_ready_agents(mut self, arguments: &[&str]) -> Self {
        for host in 0..self.hosts.len() {
            self.start(host, arguments);
        }
        for host in &mut self.hosts {
            host.wait_ready().unwrap();
        }
        self
    }

    /// Starts the agent on a host; it is not ready yet.
    pub fn start(&mut self, host: usize, arguments: &[&str]) {
        self.store.start_agent(&mut self.hosts[host], arguments);
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

    /// A counter of a host: packets and bytes. What was sent to a next hop that the kernel resolves is in it; how long that
    /// takes is the kernel's business.
    pub fn counter_row(&self, host: usize, label: &str) -> (u64, u64) {
        let text = xtask::process::output(self.agent_on(host).arg("counters")).unwrap();
        let row = |label: &str| {
            let row = text.lines().find(|line| line.split_whitespace().next() == Some(label))?;
            let mut numbers = row.split_whitespace().skip(1).map(|number| number.parse::<u64>().unwrap());
            Some((numbers.next()?, numbers.next()?))
        };
        let (packets, bytes) = row(label).unwrap();
        let (left_packets, left_bytes) = row(&format!("{label}_neighbour")).unwrap_or_default();
        (packets + left_packets, bytes + left_bytes)
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
        assert!(!host.netns.exec("ip route").unwrap().contains("proto 72"), "a route exists");
        assert!(!host.pin_dir().exists(), "{:?} exists", host.pin_dir());
        assert!(!host.run_dir().join("subnet.env").exists(), "subnet.env exists");
    }

    /// What `status -o json` says of the agent's overlay on a host, once the agent has written it.
    pub fn status(&self, host: usize) -> serde_json::Value {
        let mut status = serde_json::Value::Null;
        let read = wait_for("a status", SOON, || {
            let result = self.agent_on(host).args(["status", "-o", "json"]).output().unwrap();
            status = serde_json::from_slice(&result.stdout).unwrap_or_default();
            !status["overlays"][0].is_null()
        });
        read.unwrap();
        status["overlays"][0].take()
    }

    /// Waits until the status of a host fulfils a condition.
    pub fn wait_status(&self, host: usize, what: &str, condition: impl Fn(&serde_json::Value) -> bool) {
        let waited = wait_for(what, SOON, || condition(&self.status(host)["status"]));
        let log = || self.hosts[host].agent.as_ref().map(|agent| agent.log()).unwrap_or_default();
        assert!(waited.is_ok(), "{what}: {:#}\n{}", self.status(host), log());
    }

    /// Waits until what an agent knows is kept for its next start.
    pub fn wait_last_known(&self, host: usize) {
        let path = self.hosts[host].run_dir().join("flannel.1.leases");
        wait_for("the last known leases", SOON, || {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            let known = text.get(9..).and_then(|json| serde_json::from_str::<serde_json::Value>(json).ok());
            let peers = self.status(host)["status"]["peers"].clone();
            known.is_some_and(|known| known["peers"].as_object().unwrap().len() as u64 == peers)
        })
        .unwrap();
    }

    /// Waits until a host has read the whole table again for this reason.
    pub fn wait_resync(&self, host: usize, cause: &str) {
        self.wait_status(host, &format!("a snapshot for {cause}"), |status| {
            status["store"]["following"] == true && !status["store"]["resyncs"][cause].is_null()
        });
    }

    /// Starts traffic between the first pods of two hosts.
    pub fn traffic(&self, from: usize, to: usize) -> Traffic {
        let [from, to] = [from, to].map(|host| &self.hosts[host].pods[0]);
        let mut command = from.netns.command("ping");
        command.args(["-i", "0.02", "-W", "2", &to.address.to_string()]);
        let log = self.lab.directory().join(format!("traffic-{}-{}.log", from.netns.name(), to.netns.name()));
        let process = Process::start(&mut command, &log).unwrap();
        wait_for("the first answer", SOON, || process.log().contains("icmp_seq=1 ")).unwrap();
        Traffic { process }
    }
}

/// Numbered packets that each want an answer, fifty in a second.
pub struct Traffic {
    process: Process,
}

impl Traffic {
    /// Ends it. Every packet but one that was just on its way must have been answered.
    pub fn assert_nothing_was_lost(mut self) {
        self.process.signal(Signal::SIGINT).unwrap();
        self.process.wait(SOON).unwrap();
        let log = self.process.log();
        let answered: Vec<u32> = log
            .lines()
            .filter(|line| line.contains(" bytes from "))
            .filter_map(|line| line.split("icmp_seq=").nth(1)?.split(' ').next()?.parse().ok())
            .collect();
        let sent: u32 = log.lines().find_map(|line| line.split_once(" packets transmitted")?.0.parse().ok()).unwrap();
        let missing: Vec<_> = (1..sent).filter(|number| !answered.contains(number)).collect();
        assert!(missing.is_empty(), "of {sent} packets these were lost: {missing:?}");
    }
}

/// A lease as a host of flannel's writes it.
pub fn lease_value(address: &str, mac: &str) -> String {
    format!(
        r#"{{"PublicIP":"{address}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
    )
}

/// Whether one ping is answered within a second.
pub fn is_answered(from: &Netns, address: &str) -> bool {
    from.exec(&format!("ping -c 1 -W 1 {address}")).is_ok()
}

/// Whether one ping is answered, however long it takes on a busy machine.
pub fn is_delivered(from: &Netns, address: &str) -> bool {
    from.exec(&format!("ping -c 1 -W 10 {address}")).is_ok()
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
