//! Two hosts on a cable, a pod on each, and frames for the second from the first's end of it: as XDP frames, so that the
//! second gets them as from a NIC's driver, and no sender's stack is measured.

#[path = "../frames.rs"]
#[expect(dead_code, reason = "the tests use the rest")]
pub mod frames;

use std::time::Duration;

use etherparse::{EtherType, PacketBuilder};
use flannel_agent::dataplane::generator::Generator;
use flannel_common::generator::Generated;
use frames::{Mac, Tunnel, ethernet, vxlan};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use xtask::{
    lab::{Host, Lab, Netns, Store},
    progress::wait_for,
};

pub const CONFIG: &str = r#"{"Network": "10.5.0.0/16", "SubnetMax": "10.5.199.0", "Backend": {"Type": "vxlan"}}"#;
/// Of the datagrams in the tunnel.
pub const PORT: u16 = 9999;
const PAYLOAD: [u8; 64] = [0x5a; 64];

/// Hosts with the agent, the first with this number.
pub fn ours(lab: &Lab, store: &Store, mode: &str, number: u8, rules: bool) -> [Host; 2] {
    let agent = xtask::process::workspace().join("target/release/flannel-agent");
    let numbers = [number, number + 1];
    let names = numbers.map(|number| format!("ours{number}"));
    let mut hosts = lab.cable(names.each_ref().map(String::as_str), numbers).unwrap();
    for host in &mut hosts {
        host.start_agent(&agent, store, &["--iface=eth0", mode]).unwrap();
        host.wait_ready().unwrap();
        host.add_pod().unwrap();
    }
    prepare(hosts, rules)
}

/// Hosts with the kernel's vxlan device as flannel sets it up.
pub fn kernel(lab: &Lab, store: &Store, rules: bool) -> [Host; 2] {
    let mut hosts = lab.cable(["vxlan1", "vxlan2"], [11, 12]).unwrap();
    for (host, octet) in hosts.iter_mut().zip([251, 252]) {
        let vxlan = host.become_kernel_vxlan(store, octet).unwrap();
        host.add_pod_in(&vxlan.subnet).unwrap();
    }
    hosts[0].add_kernel_peer_from(store, 252).unwrap();
    hosts[1].add_kernel_peer_from(store, 251).unwrap();
    prepare(hosts, rules)
}

/// veth takes XDP frames only where the other end has GRO or XDP on.
fn prepare(hosts: [Host; 2], rules: bool) -> [Host; 2] {
    for host in &hosts {
        host.netns.exec("ethtool -K eth0 gro on").unwrap();
    }
    if rules {
        hosts.iter().try_for_each(Host::set_cluster_rules).unwrap();
    }
    let ping = format!("ping -c 1 -W 1 {}", hosts[1].pods[0].address);
    wait_for("an answer", Duration::from_secs(10), || hosts[0].pods[0].netns.exec(&ping).is_ok()).unwrap();
    hosts
}

/// Has the calling thread run on one core.
pub fn pin(core: usize) {
    let mut cores = CpuSet::new();
    cores.set(core).unwrap();
    sched_setaffinity(Pid::from_raw(0), &cores).unwrap();
}

/// A datagram.
pub fn datagram(source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv4(source, destination, 63).udp(PORT, PORT).write(&mut packet, &PAYLOAD).unwrap();
    packet
}

/// A datagram from the first host's pod to the second's.
pub fn between_pods(hosts: &[Host; 2]) -> Vec<u8> {
    let [source, destination] = hosts.each_ref().map(|host| host.pods[0].address.octets());
    datagram(source, destination)
}

/// What goes around tunnel packets from the first host to the second.
pub fn tunnel([sender, receiver]: &[Host; 2]) -> Tunnel {
    Tunnel {
        source_mac: mac(&sender.netns, "eth0"),
        destination_mac: mac(&receiver.netns, "eth0"),
        source: sender.address.octets(),
        destination: receiver.address.octets(),
        ..frames::FROM_TWO
    }
}

/// A packet in a tunnel from the first host's VTEP to the second's.
pub fn in_tunnel(hosts: &[Host; 2], tunnel: &Tunnel, packet: &[u8]) -> Vec<u8> {
    let [source, destination] = hosts.each_ref().map(|host| mac(&host.netns, "flannel.1"));
    tunnel.around(&vxlan(8, 1), &[&ethernet(source, destination, EtherType::IPV4), packet].concat())
}

/// Sends a frame from the first host's end of the cable.
pub fn generator(hosts: &[Host; 2], frame: Vec<u8>) -> Generator {
    let links = hosts[0].netns.ip_json("link show eth0").unwrap();
    let ifindex = links[0]["ifindex"].as_u64().unwrap() as u32;
    Generator::load(&Generated { ifindex, frame: frame.try_into().unwrap() }).unwrap()
}

/// Median, least and greatest.
pub fn median(values: &[f64]) -> (f64, f64, f64) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    (sorted[sorted.len() / 2], sorted[0], sorted[sorted.len() - 1])
}

fn mac(netns: &Netns, device: &str) -> Mac {
    let links = netns.ip_json(&format!("link show {device}")).unwrap();
    let octets = links[0]["address"].as_str().unwrap().split(':').map(|octet| u8::from_str_radix(octet, 16).unwrap());
    octets.collect::<Vec<_>>().try_into().unwrap()
}
