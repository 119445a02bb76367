//! The pairs of hosts that are measured, each with a cable of its own between the two.
//!
//! ```text
//!  node A: pod ─ veth ─ cni0 ─ … ─ eth0 ═══ cable, MTU 1500 ═══ eth0 ─ … ─ cni0 ─ veth ─ pod :node B
//! ```
//!
//! A cable and no bridge, as a bridge costs each frame the same again whoever carries it, and so hides what differs. All
//! pairs have the same devices, sysctls as a new namespace has them, `ip_forward` on, and all with pods the same netfilter
//! rules: those that every host of a Kubernetes cluster has, so that conntrack looks at each packet which takes the stack,
//! and those of a service where one is measured. From host to host without an overlay there are none: that is what the
//! machine can do.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

use super::measure::PORTS;
use crate::{
    lab::{
        Host, Lab, Netns, Store, Subnet,
        services::{Service, ServiceRules},
    },
    process::workspace,
    progress::{step, wait_for},
};

/// The address of a service, which no device has.
const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);

/// Whose hosts are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Rival {
    /// This project's agent and programs
    Ours,
    /// The kernel's vxlan device, set up as flannel's vxlan backend does
    Vxlan,
    /// Routes between the hosts, as flannel's host-gw backend sets them; pods have the MTU of the cable
    HostGw,
    /// No overlay and no pods: from host to host
    Direct,
}

impl Rival {
    /// In the order in which they are shown.
    pub(super) const ALL: [Self; 4] = [Self::Ours, Self::Vxlan, Self::HostGw, Self::Direct];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Vxlan => "kernel vxlan",
            Self::HostGw => "host-gw",
            Self::Direct => "no overlay",
        }
    }
}

/// By which address the client reaches the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Its own
    Server,
    /// A service's, which the client's host translates
    Service,
}

/// What is measured, one against the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Subject {
    pub(super) rival: Rival,
    pub(super) target: Target,
    pub(super) name: &'static str,
}

impl Subject {
    pub(super) const fn by_address(rival: Rival) -> Self {
        Self { rival, target: Target::Server, name: rival.name() }
    }
}

/// The netfilter rules of hosts with pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Rules {
    /// What flannel and kube-proxy set: forwarding, masquerade, nothing that conntrack holds for invalid
    Cluster,
    /// None
    None,
}

/// How large the frames on the cable are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Large packets cross it whole; it is a veth as it is made.
    Whole,
    /// Every frame is as large as the MTU, as on a wire; the receiving host aggregates them.
    Segmented,
}

impl Mode {
    pub(super) const ALL: [Self; 2] = [Self::Whole, Self::Segmented];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Whole => "GSO passes",
            Self::Segmented => "segmented",
        }
    }
}

/// From where to where is measured.
pub struct Path<'a> {
    /// The client's namespace.
    pub client: &'a Netns,
    /// The server's.
    pub server: &'a Netns,
    /// Whom the client asks: the server, which listens at all addresses, or what is translated to it.
    pub address: Ipv4Addr,
}

impl Path<'_> {
    /// Puts the calling thread where a client is: in its namespace, and on the first core.
    pub(super) fn enter_as_client(&self) -> Result<()> {
        self.client.enter().and_then(|()| pin(0))
    }

    /// The same for a server, on the second core.
    pub(super) fn enter_as_server(&self) -> Result<()> {
        self.server.enter().and_then(|()| pin(1))
    }
}

fn pin(core: usize) -> Result<()> {
    let mut cores = CpuSet::new();
    cores.set(core)?;
    sched_setaffinity(Pid::from_raw(0), &cores).with_context(|| format!("run on core {core}"))
}

/// A rival's two hosts.
pub(super) struct Pair {
    pub(super) rival: Rival,
    hosts: [Host; 2],
    has_service: bool,
}

impl Pair {
    /// Builds it and waits until it carries packets.
    pub(super) fn new(
        rival: Rival,
        rules: Rules,
        proxy: Option<ServiceRules>,
        lab: &Lab,
        store: &Store,
    ) -> Result<Self> {
        step(&format!("two hosts: {}", rival.name()), || {
            let hosts = match rival {
                Rival::Ours => agents(lab, store),
                Rival::Vxlan => kernel_vxlan(lab, store),
                Rival::HostGw => host_gw(lab),
                Rival::Direct => forwarding(lab.cable(["direct1", "direct2"], [31, 32])?),
            }?;
            if rules == Rules::Cluster && rival != Rival::Direct {
                hosts.iter().try_for_each(Host::set_cluster_rules)?;
            }
            let mut pair = Self { rival, hosts, has_service: false };
            if let Some(proxy) = proxy {
                pair.add_service(proxy)?;
            }
            wait_for("an answer through the pair", Duration::from_secs(10), || pair.ping(1).is_ok())?;
            Ok(pair)
        })
    }

    /// Sets a service's rules on both hosts, for all ports that servers listen to. Ours is asked both ways, so another pod
    /// asks by service: a connection that the server has in TIME_WAIT is taken over only by a later timestamp, and a
    /// client has other timestamps for each address that it asks (`secure_tcp_ts_off`). From one pod, connections of one
    /// way would meet those of the other, and be tried again after a second.
    fn add_service(&mut self, proxy: ServiceRules) -> Result<()> {
        if self.rival == Rival::Ours {
            self.hosts[0].add_pod()?;
        }
        let server = self.path(Target::Server)?.address;
        let services = PORTS.map(|(name, protocol, port)| Service {
            name,
            protocol,
            address: SocketAddrV4::new(SERVICE, port),
            node_port: None,
            endpoints: vec![SocketAddrV4::new(server, port)],
        });
        self.has_service = true;
        self.hosts.iter().try_for_each(|host| proxy.set(host, &services))
    }

    pub(super) fn path(&self, target: Target) -> Result<Path<'_>> {
        let [client, server] = &self.hosts;
        if self.rival == Rival::Direct {
            return Ok(Path { client: &client.netns, server: &server.netns, address: server.address });
        }
        let pods = match target {
            Target::Server => client.pods.first(),
            Target::Service => client.pods.last(),
        };
        let (from, to) = pods.zip(server.pods.first()).context("a host has no pod")?;
        let address = if target == Target::Service { SERVICE } else { to.address };
        Ok(Path { client: &from.netns, server: &to.netns, address })
    }

    pub(super) fn set_mode(&self, mode: Mode) -> Result<()> {
        self.hosts.iter().try_for_each(|host| host.set_underlay_gso(mode == Mode::Whole))
    }

    /// Fails where one of so many pings is not answered, or an agent has ended.
    pub(super) fn check(&mut self, pings: u32) -> Result<()> {
        for host in &mut self.hosts {
            if let Some(agent) = &mut host.agent {
                anyhow::ensure!(agent.status()?.is_none(), "the agent of {} has ended:\n{}", host.name, agent.log());
            }
        }
        self.ping(pings)
    }

    fn ping(&self, count: u32) -> Result<()> {
        let Path { client, address, .. } = self.path(Target::Server)?;
        let text = client.exec(&format!("ping -q -i 0.01 -W 1 -c {count} {address}"))?;
        anyhow::ensure!(text.contains(" 0% packet loss"), "lost pings: {text}");
        Ok(())
    }

    /// Has conntrack of hosts with a service begin anew, so that no measurement finds another's flows.
    pub(super) fn forget_flows(&self) -> Result<()> {
        if !self.has_service {
            return Ok(());
        }
        self.hosts.iter().try_for_each(|host| host.netns.exec("conntrack --flush").map(drop))
    }

    /// Fails where the host of the client of a service has translated nothing to the server since [`Pair::forget_flows`].
    pub(super) fn check_translated(&self, target: Target) -> Result<()> {
        if target == Target::Server {
            return Ok(());
        }
        let server = self.path(Target::Server)?.address;
        let flows = format!("conntrack --dump --dst-nat {server} --orig-dst {SERVICE}");
        let flows = self.hosts[0].netns.exec(&flows)?;
        anyhow::ensure!(!flows.is_empty(), "conntrack knows no flow to {SERVICE} that is translated to {server}");
        Ok(())
    }

    /// How many flows conntrack knows on the hosts; none where nothing makes it look. One that looks costs each packet.
    pub(super) fn conntrack_entries(&self) -> Result<u64> {
        let file = "/proc/sys/net/netfilter/nf_conntrack_count";
        let mut entries = 0;
        for host in &self.hosts {
            if std::path::Path::new(file).exists() {
                entries += host.netns.exec(&format!("cat {file}"))?.trim().parse::<u64>()?;
            }
        }
        Ok(entries)
    }
}

fn agents(lab: &Lab, store: &Store) -> Result<[Host; 2]> {
    let agent = workspace().join("target/release/flannel-agent");
    let mut hosts = forwarding(lab.cable(["ours1", "ours2"], [1, 2])?)?;
    for host in &mut hosts {
        host.start_agent(&agent, store, &["--iface=eth0"])?;
        host.wait_ready()?;
        host.add_pod()?;
    }
    Ok(hosts)
}

fn kernel_vxlan(lab: &Lab, store: &Store) -> Result<[Host; 2]> {
    let mut hosts = forwarding(lab.cable(["vxlan1", "vxlan2"], [11, 12])?)?;
    // Beyond the first hundred subnets, among which the agents choose.
    for (host, octet) in hosts.iter_mut().zip([251, 252]) {
        let vxlan = host.become_kernel_vxlan(store, octet)?;
        host.add_pod_in(&vxlan.subnet)?;
    }
    hosts[0].add_kernel_peer_from(store, 252)?;
    hosts[1].add_kernel_peer_from(store, 251)?;
    Ok(hosts)
}

fn host_gw(lab: &Lab) -> Result<[Host; 2]> {
    let mut hosts = forwarding(lab.cable(["hostgw1", "hostgw2"], [21, 22])?)?;
    let subnets = [1, 2].map(|octet| Ipv4Addr::new(10, 6, octet, 0));
    let addresses = hosts.each_ref().map(|host| host.address);
    for (index, host) in hosts.iter_mut().enumerate() {
        let gateway = Ipv4Addr::from_bits(subnets[index].to_bits() + 1);
        host.add_pod_in(&Subnet { gateway, len: 24, mtu: 1500 })?;
        // As flannel's (pkg/backend/hostgw/hostgw.go): the subnet, by the host that leases it.
        let peer = 1 - index;
        host.netns.ip(&format!("route add {}/24 via {} dev eth0", subnets[peer], addresses[peer]))?;
    }
    Ok(hosts)
}

fn forwarding(hosts: [Host; 2]) -> Result<[Host; 2]> {
    for host in &hosts {
        host.netns.exec("sysctl -qw net.ipv4.ip_forward=1")?;
    }
    Ok(hosts)
}
