//! What is checked of two machines.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context as _, Result};

use super::{
    DISK, Pair,
    protocol::{Place, Request},
    steps::{BULK, DATAGRAMS, WAYS},
};
use crate::vm::Options;

/// Something that is checked.
pub(super) struct Check {
    name: &'static str,
    /// Whether it is part of the short form.
    is_short: bool,
    /// Returns what it saw.
    pub(super) run: fn(&mut Pair<'_>) -> Result<String>,
}

impl Check {
    const fn new(name: &'static str, run: fn(&mut Pair<'_>) -> Result<String>) -> Self {
        Self { name, is_short: true, run }
    }

    /// One that the short form leaves out.
    const fn long(name: &'static str, run: fn(&mut Pair<'_>) -> Result<String>) -> Self {
        Self { name, is_short: false, run }
    }

    pub(super) fn name(&self) -> &str {
        self.name
    }

    /// Whether somebody asked for it.
    pub(super) fn is_wanted(&self, options: &Options) -> bool {
        match options.tests.as_slice() {
            [] => self.is_short || !options.short,
            names => names.iter().any(|name| self.name.contains(name.as_str())),
        }
    }
}

/// In this order. Native XDP stays, on the first machine at least: another start of the agents takes as long as all that is
/// checked of it. The last takes the second machine down.
pub(super) const CHECKS: [Check; 10] = [
    Check::new("the NIC has its offloads", has_offloads),
    Check::new("ping", ping),
    Check::new("UDP of every kind of size", udp),
    Check::new("bulk TCP with the NIC's offloads", tcp),
    Check::long("bulk TCP without offloads", tcp_without_offloads),
    Check::new("a service", service),
    Check::long("without a tunnel, with the NIC's offloads", direct),
    Check::long("without a tunnel, without offloads", direct_without_offloads),
    Check::new("native XDP", native_xdp),
    Check::new("a reset while etcd is away", reset),
];

/// The MTU of pods behind frames of 1500 bytes.
const MTU: usize = 1450;
/// IPv4 and UDP headers.
const UDP_HEADERS: usize = 28;
const SERVICE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 96, 0, 10), 80);

/// The driver's. Without, checks would pass that say nothing of it.
fn has_offloads(pair: &mut Pair<'_>) -> Result<String> {
    let driver = pair.nic.driver();
    let mut seen = String::new();
    for machine in &mut pair.machines {
        let shown = machine.exec(Place::Host, "ethtool -i eth0")?;
        anyhow::ensure!(shown.contains(&format!("driver: {driver}\n")), "eth0 is not {driver}'s: {shown}");
        let features = machine.exec(Place::Host, "ethtool -k eth0")?;
        for wanted in ["tx-checksumming", "tcp-segmentation-offload"] {
            anyhow::ensure!(features.contains(&format!("\n{wanted}: on\n")), "{wanted} is off: {features}");
        }
        let is_of_interest = |line: &&str| {
            ["rx-checksumming", "tx-checksum", "tx-tcp-seg", "tx-udp_tnl", "tx-udp-seg", "large-receive", "rx-gro-hw"]
                .iter()
                .any(|name| line.trim().starts_with(name) && line.contains(": on"))
        };
        let names: Vec<_> =
            features.lines().filter(is_of_interest).map(|line| line.trim().replace(": on", "")).collect();
        seen = names.join(", ");
    }
    Ok(seen)
}

fn ping(pair: &mut Pair<'_>) -> Result<String> {
    for [from, to] in WAYS {
        let line = format!("ping -c 5 -i 0.2 -W 5 {}", pair.pods[to].ip());
        let answered = pair.machines[from].exec(Place::Pod, &line)?;
        anyhow::ensure!(answered.contains(" 5 received"), "from {}: {answered}", from + 1);
        // Of more than a frame, so that it is in fragments.
        pair.machines[from].exec(Place::Pod, &format!("ping -c 3 -i 0.2 -W 5 -s 4000 {}", pair.pods[to].ip()))?;
    }
    Ok(String::new())
}

fn udp(pair: &mut Pair<'_>) -> Result<String> {
    let counters = [(0, "pod_encapsulated"), (1, "pod_encapsulated"), (0, "delivered"), (1, "delivered")];
    // There and back, either way.
    let sent = 4 * DATAGRAMS * 1400;
    pair.counted(counters, sent / 2, |pair| pair.datagrams(&[1, 100, 1400, MTU - UDP_HEADERS]))?;
    // In fragments, which are the stack's.
    pair.datagrams(&[8000]).map(|()| String::new())
}

fn tcp(pair: &mut Pair<'_>) -> Result<String> {
    pair.bulk("pod_encapsulated", "delivered")
}

fn tcp_without_offloads(pair: &mut Pair<'_>) -> Result<String> {
    pair.with_offloads_off(tcp)
}

fn service(pair: &mut Pair<'_>) -> Result<String> {
    pair.machines[0].ask(&Request::Service(SERVICE, pair.pods[1]))?;
    let counters = [(0, "pod_translated"), (0, "delivered_translated"), (1, "pod_encapsulated"), (1, "delivered")];
    pair.counted(counters, BULK / 2, |pair| {
        let rate = pair.machines[0].ask(&Request::Tcp(SERVICE, BULK))?;
        for size in [1, 100, 1400, MTU - UDP_HEADERS, 8000] {
            let asked = pair.machines[0].ask(&Request::Udp(SERVICE, size, DATAGRAMS));
            asked.with_context(|| format!("{size} bytes"))?;
        }
        Ok(rate)
    })
}

fn direct(pair: &mut Pair<'_>) -> Result<String> {
    pair.without_tunnel(bulk_and_datagrams)
}

fn direct_without_offloads(pair: &mut Pair<'_>) -> Result<String> {
    pair.without_tunnel(|pair| pair.with_offloads_off(bulk_and_datagrams))
}

fn bulk_and_datagrams(pair: &mut Pair<'_>) -> Result<String> {
    pair.datagrams(&[1, 100, 1400, MTU - UDP_HEADERS, 8000])?;
    pair.bulk("pod_direct", "direct_delivered")
}

fn native_xdp(pair: &mut Pair<'_>) -> Result<String> {
    if pair.nic.native_xdp_since().is_none_or(|since| pair.kernel < since) {
        return Ok(format!("{} has none", pair.nic.driver()));
    }
    (0..2).try_for_each(|number| pair.start_agent(number, "--xdp=native"))?;
    (0..2).try_for_each(|number| {
        pair.wait(number, "native XDP", |status| status["status"]["xdp"]["mode"] == "native")?;
        pair.wait_held(number)
    })?;
    for machine in &mut pair.machines {
        let shown = machine.exec(Place::Host, "ip link show eth0")?;
        anyhow::ensure!(shown.contains(" xdp "), "no program of the driver's: {shown}");
    }
    ping(pair)?;
    udp(pair)?;
    if pair.nic.has_xdp_metadata() {
        return pair.bulk("pod_encapsulated", "xdp_decapsulated");
    }
    let rates = pair.bulk("pod_encapsulated", "delivered")?;
    Ok(format!("{rates}; in their tunnel, as {} has no XDP metadata", pair.nic.driver()))
}

fn reset(pair: &mut Pair<'_>) -> Result<String> {
    let leases = format!("cat {DISK}/node2/run/flannel.1.leases");
    pair.wait_until(1, "what is last known", |machine| {
        Ok(machine.exec(Place::Host, &leases)?.contains(&format!("{}", crate::lab::address(1))))
    })?;
    let pod = pair.pods[1];
    pair.machines[0].ask(&Request::StopStore)?;
    pair.reset(1)?;
    // A bpf file system is memory.
    for (what, left) in [("ls -A /sys/fs/bpf", ""), ("ip -br link show type vxlan", "")] {
        let shown = pair.machines[1].exec(Place::Host, what)?;
        anyhow::ensure!(shown.trim() == left, "{what}: {shown}");
    }
    pair.start_agent(1, "")?;
    pair.wait(1, "the last known lease and peer", |status| {
        status["status"]["lease"]["state"] == "last_known" && status["status"]["peers"] == 1
    })?;
    pair.add_pod(1)?;
    anyhow::ensure!(pair.pods[1] == pod, "the pod had {pod}, and now {}", pair.pods[1]);
    ping(pair)?;
    udp(pair)?;
    let rates = tcp(pair)?;
    pair.machines[0].ask(&Request::StartStore)?;
    (0..2).try_for_each(|number| pair.wait_held(number))?;
    ping(pair)?;
    Ok(rates)
}
