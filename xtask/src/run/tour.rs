//! The tour: what the lab is and does, on the terminal.

use std::path::Path;

use anyhow::{Context as _, Result};

use crate::{
    lab::{Backend, Host, Lab, LeaseStore, Netns, capture::Capture},
    process::output,
    progress::heading,
    transfer::tcp_transfer,
};

/// The number of a host that is only looked at.
const IMITATION: u8 = 200;

/// Shows what the lab is and does.
pub(super) fn tour(
    hosts: &[Host],
    store: &dyn LeaseStore,
    agent: &Path,
    how: &str,
    backend: Backend,
    directory: &Path,
) -> Result<()> {
    let [first, second, ..] = hosts else { anyhow::bail!("a tour needs two hosts") };
    let (from, to) = (&first.pods[0], &second.pods[0]);

    heading("what was built");
    picture(hosts, store, how, backend)?;

    heading(&format!("ping from each host's first pod to the next host's ({} -> {} first)", from.address, to.address));
    for (index, host) in hosts.iter().enumerate() {
        let destination = hosts[(index + 1) % hosts.len()].pods[0].address;
        let text = host.pods[0].netns.exec(&format!("ping -c 3 -i 0.2 -W 2 {destination}"))?;
        let summary = text.lines().filter(|line| line.contains("packets transmitted") || line.contains("rtt"));
        println!("{:>8}-pod1 -> {destination}: {}", host.name, summary.collect::<Vec<_>>().join(", "));
        anyhow::ensure!(text.contains(" 0% packet loss"), "not every ping was answered");
    }

    heading("TCP for two seconds");
    let transfer = tcp_transfer(&from.netns, &to.netns, to.address, 2, directory)?;
    println!("{:.2} Gb/s from {} to {}", transfer.gbits, from.address, to.address);

    heading("one packet on the underlay, decoded by tshark");
    let provoke = || from.netns.exec(&format!("ping -c 1 -W 2 {}", to.address)).map(drop);
    println!(
        "{}",
        layers(&decoded_packet(
            &first.netns,
            if backend.encapsulates() { "udp port 8472" } else { "icmp" },
            directory,
            provoke
        )?)
    );

    heading(&format!("what became of the packets on {}", first.name));
    let counters = output(first.agent_command(agent).arg("counters"))?;
    for line in counters.lines().filter(|line| line.split_whitespace().nth(1) != Some("0")) {
        println!("{line}");
    }
    Ok(())
}

/// What the kernel of the first host has for the overlay, beside what it had if flannel served that host.
pub(super) fn tables(lab: &Lab, hosts: &[Host], store: &dyn LeaseStore, backend: Backend) -> Result<()> {
    let host = hosts.first().context("a tour needs hosts")?;
    if !backend.has_device() {
        heading(&format!("the kernel's routes on {}", host.name));
        print!("{}", host.netns.exec("ip route")?);
        return Ok(());
    }
    let imitation = lab.host(&format!("{}-flannel", host.name), IMITATION)?;
    imitation.imitate_by_flannel(host, store)?;
    heading(&format!("the kernel's tables on {}, and beside them flannel's for the same leases", host.name));
    for ((command, ours), (_, flannels)) in host.overlay_tables()?.into_iter().zip(imitation.overlay_tables()?) {
        println!("$ {command}");
        for index in 0..ours.len().max(flannels.len()) {
            let [ours, flannels] = [&ours, &flannels].map(|lines| lines.get(index).map_or("", String::as_str));
            println!("{ours:<52} │ {flannels}");
        }
    }
    Ok(())
}

fn picture(hosts: &[Host], store: &dyn LeaseStore, how: &str, backend: Backend) -> Result<()> {
    println!("  underlay 192.168.64.0/24: br0, {}", store.place());
    for host in hosts {
        let subnet = host.subnet()?;
        println!("   ├─ {} eth0 {}", host.name, host.address);
        let device = if backend.has_device() { "flannel.1, " } else { "" };
        println!("   │    {device}cni0 {}/{}, MTU {}, pods made {how}", subnet.gateway, subnet.len, subnet.mtu);
        for (index, pod) in host.pods.iter().enumerate() {
            println!("   │      └─ {}-pod{} eth0 {}", host.name, index + 1, pod.address);
        }
    }
    for lease in store.leases()? {
        println!("  {}\n    {}", lease.name, lease.text);
    }
    Ok(())
}

/// The first packet that `provoke` sends through `eth0` of a namespace and the filter takes, decoded by tshark.
///
/// # Errors
/// Where none comes.
pub fn decoded_packet(
    netns: &Netns,
    filter: &str,
    directory: &Path,
    provoke: impl FnOnce() -> Result<()>,
) -> Result<String> {
    let mut capture = Capture::start(netns, "eth0", filter, directory)?;
    provoke()?;
    capture.end_after(1)?;
    capture.decoded(&["-V", "-c", "1"])
}

/// The names of a decoded packet's layers, and its VNI.
fn layers(decoded: &str) -> String {
    let layers = decoded.lines().filter(|line| {
        // Names of layers begin the line; fields are indented, and bytes begin with their offset.
        let is_layer = line.starts_with(|c: char| c.is_ascii_uppercase()) && !line.starts_with("Frame");
        is_layer || line.contains("VXLAN Network Identifier")
    });
    layers.collect::<Vec<_>>().join("\n")
}
