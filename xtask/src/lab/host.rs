//! A host, its pods, and the agent that carries their packets.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};

use super::{
    LeaseStore, Netns,
    cni::{self, Runtime},
};
use crate::{
    process::{Process, output},
    progress::wait_for,
};

const START_LIMIT: Duration = Duration::from_secs(20);

/// As flannel (pkg/trafficmngr/iptables) and kube-proxy (pkg/proxy/iptables) set them, for the networks of labs.
const CLUSTER_RULES: [&str; 6] = [
    "-A FORWARD -m conntrack --ctstate INVALID -j DROP",
    "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    "-A FORWARD -s 10.4.0.0/14 -j ACCEPT",
    "-A FORWARD -d 10.4.0.0/14 -j ACCEPT",
    "-t nat -A POSTROUTING -s 10.4.0.0/14 -d 10.4.0.0/14 -j RETURN",
    "-t nat -A POSTROUTING -s 10.4.0.0/14 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully",
];

/// Commands that show what the kernel has for the overlay.
const OVERLAY_TABLES: [&str; 3] =
    ["ip route show dev flannel.1", "ip neigh show dev flannel.1", "bridge fdb show dev flannel.1"];

/// A host on the underlay. Ends its agent before its namespaces go.
#[derive(Debug)]
pub struct Host {
    /// The running agent.
    pub agent: Option<Process>,
    /// Its pods, in the order in which they were made.
    pub pods: Vec<Pod>,
    /// Its namespace.
    pub netns: Netns,
    /// Its name in the lab.
    pub name: String,
    /// Its address on the underlay.
    pub address: Ipv4Addr,
    /// The other end of its cable: a namespace, and a port there.
    port: (String, String),
    directory: PathBuf,
    bpf: PathBuf,
}

/// A pod on the bridge `cni0` of a host.
#[derive(Debug)]
pub struct Pod {
    /// Its namespace.
    pub netns: Netns,
    /// Its address.
    pub address: Ipv4Addr,
}

/// What a runtime reads from `subnet.env`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subnet {
    /// Address of `cni0`.
    pub gateway: Ipv4Addr,
    /// Prefix length.
    pub len: u8,
    /// MTU for the pods.
    pub mtu: u32,
}

impl Host {
    pub(crate) fn new(
        netns: Netns,
        name: &str,
        address: Ipv4Addr,
        port: (String, String),
        directory: &Path,
        bpf: PathBuf,
    ) -> Self {
        let directory = directory.join(name);
        Self { agent: None, pods: Vec::new(), netns, name: name.to_owned(), address, port, directory, bpf }
    }

    /// The folder of its files.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The agent's `--run-dir`.
    pub fn run_dir(&self) -> PathBuf {
        self.directory.join("run")
    }

    /// The agent's `--bpf-pin-dir`.
    pub fn pin_dir(&self) -> &Path {
        &self.bpf
    }

    /// A command of the agent on this host, with its folders.
    pub fn agent_command(&self, binary: &Path) -> Command {
        let mut command = self.netns.command(&binary.to_string_lossy());
        command.arg("--run-dir").arg(self.run_dir()).arg("--bpf-pin-dir").arg(&self.bpf);
        command
    }

    /// Starts the agent; it is not ready yet.
    ///
    /// # Errors
    /// Where it can't be started.
    pub fn start_agent(&mut self, binary: &Path, store: &dyn LeaseStore, arguments: &[&str]) -> Result<()> {
        self.agent = None;
        fs::create_dir_all(&self.directory).with_context(|| format!("create {:?}", self.directory))?;
        let mut command = self.agent_command(binary);
        store.configure(self, &mut command);
        command.args(arguments);
        self.agent = Some(Process::start(&mut command, &self.directory.join("agent.log"))?);
        Ok(())
    }

    /// Waits until the agent has written `subnet.env`.
    ///
    /// # Errors
    /// Where it ends or takes too long, with its log.
    pub fn wait_ready(&mut self) -> Result<Subnet> {
        let file = self.run_dir().join("subnet.env");
        let agent = self.agent.as_mut().context("no agent was started")?;
        let waited = wait_for("subnet.env", START_LIMIT, || file.exists() || !matches!(agent.status(), Ok(None)));
        anyhow::ensure!(waited.is_ok() && file.exists(), "the agent of {} is not ready:\n{}", self.name, agent.log());
        self.subnet()
    }

    /// What `subnet.env` says.
    ///
    /// # Errors
    /// Where it can't be read as flannel's.
    pub fn subnet(&self) -> Result<Subnet> {
        let path = self.run_dir().join("subnet.env");
        let text = fs::read_to_string(&path).with_context(|| format!("read {path:?}"))?;
        let value = |key: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(&format!("{key}=")));
            line.with_context(|| format!("{path:?} has no {key}"))
        };
        let (gateway, len) = value("FLANNEL_SUBNET")?.split_once('/').context("FLANNEL_SUBNET is no CIDR")?;
        Ok(Subnet { gateway: gateway.parse()?, len: len.parse()?, mtu: value("FLANNEL_MTU")?.parse()? })
    }

    /// Makes the next pod, as a bridge plugin would from `subnet.env`.
    ///
    /// # Errors
    /// Where a link can't be made.
    pub fn add_pod(&mut self) -> Result<&Pod> {
        let subnet = self.subnet()?;
        self.add_pod_in(&subnet)
    }

    /// Makes the next pod of a subnet.
    ///
    /// # Errors
    /// Where a link can't be made.
    pub fn add_pod_in(&mut self, subnet: &Subnet) -> Result<&Pod> {
        if self.pods.is_empty() {
            self.add_bridge(subnet)?;
        }
        let number = u32::try_from(self.pods.len())? + 1;
        let pod = self.make_pod(subnet, number, Ipv4Addr::from_bits(subnet.gateway.to_bits() + number))?;
        self.pods.push(pod);
        self.pods.last().context("a pod was just added")
    }

    /// Makes the next pod by the plugins of a runtime.
    ///
    /// # Errors
    /// Where a plugin fails.
    pub fn attach_pod(&mut self, runtime: &Runtime) -> Result<&Pod> {
        let id = format!("pod{}", self.pods.len() + 1);
        let netns = Netns::create(&format!("{}-{id}", self.netns.name()))?;
        netns.ip("link set lo up")?;
        let address = cni::address(&runtime.add(&id, &netns)?)?;
        self.pods.push(Pod { netns, address });
        self.pods.last().context("a pod was just added")
    }

    /// Makes the bridge of the host's pods, `cni0`.
    ///
    /// # Errors
    /// Where there is one.
    pub fn add_bridge(&self, subnet: &Subnet) -> Result<()> {
        let Subnet { gateway, len, mtu } = subnet;
        // A MAC made from the address, as the bridge plugin sets it, so that it stays when pods come.
        let [a, b, c, d] = gateway.octets();
        self.netns.ip(&format!("link add cni0 address 0a:58:{a:02x}:{b:02x}:{c:02x}:{d:02x} type bridge"))?;
        self.netns.ip(&format!("address add {gateway}/{len} dev cni0"))?;
        self.netns.ip(&format!("link set cni0 mtu {mtu} up")).map(drop)
    }

    /// Makes a pod that is none of [`Host::pods`], at `pod<number>` of the bridge.
    ///
    /// # Errors
    /// Where a link can't be made.
    pub fn make_pod(&self, subnet: &Subnet, number: u32, address: Ipv4Addr) -> Result<Pod> {
        let Subnet { gateway, len, mtu } = subnet;
        let netns = Netns::create(&format!("{}-pod{number}", self.netns.name()))?;
        self.netns.ip(&format!("link add pod{number} mtu {mtu} type veth peer name eth0 netns {}", netns.name()))?;
        self.netns.ip(&format!("link set pod{number} master cni0 up"))?;
        netns.ip("link set lo up")?;
        netns.ip(&format!("address add {address}/{len} dev eth0"))?;
        netns.ip(&format!("link set eth0 mtu {mtu} up"))?;
        netns.ip(&format!("route add default via {gateway}"))?;
        Ok(Pod { netns, address })
    }

    /// The bridge's end of its cable: a namespace, and a port there.
    pub const fn port(&self) -> &(String, String) {
        &self.port
    }

    /// Switches segmentation at the underlay on or off, at both ends of the host's cable. On: as a veth is made. Off: every
    /// frame is as large as the MTU, as on a wire, and the host aggregates what it receives. (A veth does so only where the
    /// other end does not offload segmentation itself: `veth_skb_is_eligible_for_gro`.)
    ///
    /// # Errors
    /// Where `ethtool` fails.
    pub fn set_underlay_gso(&self, on: bool) -> Result<()> {
        let [segmentation, aggregation] = if on { ["on", "off"] } else { ["off", "on"] };
        let options = format!("tso {segmentation} gso {segmentation} tx-udp_tnl-segmentation {segmentation}");
        let (netns, device) = &self.port;
        let at_port = format!("netns exec {netns} ethtool -K {device} {options}");
        output(Command::new("ip").args(at_port.split_whitespace()))?;
        self.netns.exec(&format!("ethtool -K eth0 {options} gro {aggregation}")).map(drop)
    }

    /// Sets the MTU of the cable to the underlay, both ends; 1500 without. The agent takes it from the interface when it
    /// starts. (The bridge forwards what its ports take, whatever its own MTU.)
    ///
    /// # Errors
    /// Where a link does not take it.
    pub fn set_underlay_mtu(&self, mtu: u32) -> Result<()> {
        let (underlay, port) = &self.port;
        let at_port = format!("-n {underlay} link set {port} mtu {mtu}");
        output(Command::new("ip").args(at_port.split_whitespace()))?;
        self.netns.ip(&format!("link set eth0 mtu {mtu}")).map(drop)
    }

    /// Sets the netfilter rules that every host of a Kubernetes cluster has, by which conntrack looks at each packet that
    /// takes the stack.
    ///
    /// # Errors
    /// Where `iptables` fails.
    pub fn set_cluster_rules(&self) -> Result<()> {
        CLUSTER_RULES.iter().try_for_each(|rule| self.netns.exec(&format!("iptables {rule}")).map(drop))
    }

    /// What the kernel has for the overlay: routes, neighbours and forwarding entries, each in a line.
    ///
    /// # Errors
    /// Where a command fails.
    pub fn overlay_tables(&self) -> Result<[(&'static str, Vec<String>); 3]> {
        let mut tables = OVERLAY_TABLES.map(|command| (command, Vec::new()));
        for (command, lines) in &mut tables {
            let text = self.netns.exec(command)?;
            *lines = text.lines().map(|line| line.trim().to_owned()).collect();
        }
        Ok(tables)
    }
}
