//! `DirectRouting`: between hosts on one link nothing is encapsulated, beside hosts of flannel's that do so or do not.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, UdpSocket},
};

use flannel_agent::device::raw_frame::FrameSender;
use nix::net::if_::if_nametoindex;
use xtask::{
    lab::{LeaseStore as _, PREFIX, capture::Capture},
    progress::wait_for,
    transfer::tcp_transfer,
};

use crate::{
    frames::{ethernet, udp},
    sockets::within,
    stream::Stream,
    world::{SOON, World, is_answered},
};

const CONFIG: &str = r#"{"Network": "10.5.0.0/16", "SubnetMin": "10.5.128.0", "SubnetMax": "10.5.191.0",
    "Backend": {"Type": "vxlan", "DirectRouting": true}}"#;
/// Hosts of flannel's, and the third octets of their subnets.
const DIRECT: (usize, u8) = (2, 200);
const TUNNELLED: (usize, u8) = (3, 201);

impl World {
    fn with_direct_routing(hosts: u8) -> Self {
        let world = Self::without_config(hosts);
        world.store.put(&format!("{PREFIX}/config"), CONFIG).unwrap();
        world
    }

    /// Takes only packets by the device that the way back leads out of, wherever they come in.
    fn be_strict(&self, host: usize) {
        let netns = &self.hosts[host].netns;
        netns.exec("sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.default.rp_filter=1").unwrap();
    }

    /// How a host reaches another.
    fn way(&self, host: usize, peer: usize) -> String {
        let address = self.hosts[peer].address.to_string();
        let status = self.status(host);
        let peers = status["dataplane"]["peers"].as_array().unwrap();
        let peer = peers.iter().find(|peer| peer["address"] == *address);
        peer.map(|peer| peer["way"].as_str().unwrap().to_owned()).unwrap_or_default()
    }

    fn wait_way(&self, host: usize, peer: usize, way: &str) {
        let waited = wait_for(way, SOON, || self.way(host, peer) == way);
        assert!(waited.is_ok(), "host {host} reaches {peer}: {}, expected {way}", self.way(host, peer));
    }
}

/// Two hosts of ours, one of flannel's with DirectRouting, one without, all as strict as they can be.
fn mixed() -> World {
    let mut world = World::with_direct_routing(4);
    (0..4).for_each(|host| world.be_strict(host));
    for (host, octet) in [DIRECT, TUNNELLED] {
        let kernel = world.hosts[host].become_kernel_vxlan(&world.store, octet).unwrap();
        world.hosts[host].add_pod_in(&kernel.subnet).unwrap();
    }
    (0..2).for_each(|host| world.start(host, &[]));
    for host in &mut world.hosts[..2] {
        host.wait_ready().unwrap();
        host.add_pod().unwrap();
    }
    for lease in world.store.leases().unwrap() {
        let [_, _, octet, _] = lease.subnet.octets();
        if octet != TUNNELLED.1 {
            world.hosts[TUNNELLED.0].add_kernel_peer_from(&world.store, octet).unwrap();
        }
        if octet != DIRECT.1 {
            // As flannel does (pkg/backend/vxlan/vxlan_network.go).
            let route = format!("route replace {}/24 via {} dev eth0", lease.subnet, lease.public_ip);
            world.hosts[DIRECT.0].netns.ip(&route).unwrap();
        }
    }
    world
}

#[test]
fn every_pair_talks_though_each_host_is_strict() {
    let world = mixed();
    // These two are flannel's: what one sends, the other refuses.
    let is_flannels = |pair: [usize; 2]| pair.iter().all(|host| [DIRECT.0, TUNNELLED.0].contains(host));
    let pairs = (0..4).flat_map(|from| (0..4).map(move |to| [from, to]));
    for [from, to] in pairs.filter(|pair| pair[0] != pair[1] && !is_flannels(*pair)) {
        let address = world.hosts[to].pods[0].address.to_string();
        for (what, netns) in [("pod", &world.hosts[from].pods[0].netns), ("host", &world.hosts[from].netns)] {
            let waited = wait_for("an answer", SOON, || is_answered(netns, &address));
            assert!(waited.is_ok(), "{what} of {from} to {to}: {:#}", world.status(from % 2)["dataplane"]["peers"]);
            let ping = netns.exec(&format!("ping -c 5 -i 0.05 -W 2 {address}")).unwrap();
            assert!(ping.contains("5 received"), "{what} of {from} to {to}: {ping}");
        }
    }
    for host in [0, 1] {
        world.wait_way(host, 1 - host, "direct");
        world.wait_way(host, DIRECT.0, "direct");
        world.wait_way(host, TUNNELLED.0, "encapsulated");
    }
    // Bulk, both ways, of each kind.
    for [from, to] in [[0, 1], [0, DIRECT.0], [DIRECT.0, 0], [0, TUNNELLED.0], [TUNNELLED.0, 0]] {
        let (from, to) = (&world.hosts[from].pods[0], &world.hosts[to].pods[0]);
        let transfer = tcp_transfer(&from.netns, &to.netns, to.address, 1, world.lab.directory()).unwrap();
        assert!(transfer.is_flowing(), "{} Gb/s from {} to {}", transfer.gbits, from.address, to.address);
    }
    for label in ["pod_direct", "direct_delivered", "pod_encapsulated", "delivered", "direct"] {
        assert!(world.counter(0, label) > 0, "{label}");
    }
    assert_eq!(world.counter(0, "direct_foreign_mac"), 0);
    let routes = world.hosts[0].netns.exec("ip route show dev eth0").unwrap();
    assert!(!routes.contains("10.5."), "{routes}");
}

#[test]
fn nothing_is_encapsulated_between_hosts_on_one_link() {
    let world = World::with_direct_routing(2).ready(&[]);
    world.wait_connected(0, 1);
    let [one, two] = [0, 1].map(|host| &world.hosts[host]);
    let mut capture = Capture::start(&one.netns, "eth0", "udp port 8472", world.lab.directory()).unwrap();
    let before = [0, 1].map(|host| world.counter(host, "pod_direct"));
    for gso in [true, false] {
        [one, two].iter().for_each(|host| host.set_underlay_gso(gso).unwrap());
        for (from, to) in [(one, two), (two, one)] {
            let (from, to) = (&from.pods[0], &to.pods[0]);
            let transfer = tcp_transfer(&from.netns, &to.netns, to.address, 1, world.lab.directory()).unwrap();
            assert!(transfer.is_flowing(), "{} Gb/s with GSO {gso}", transfer.gbits);
        }
    }
    for host in [0, 1] {
        assert!(world.counter(host, "pod_direct") > before[host] + 1000);
        assert_eq!(world.counter(host, "pod_encapsulated") + world.counter(host, "encapsulated"), 0, "host {host}");
    }
    let last = within(&one.netns, || UdpSocket::bind("0.0.0.0:0").unwrap());
    last.send_to(b"the last one", (two.address, 8472)).unwrap();
    capture.end_with("the last one").unwrap();
    let seen = capture.decoded(&[]).unwrap();
    assert_eq!(seen.lines().count(), 1, "tunnel packets: {seen}");
    // A hop less, by the stack and past it.
    let ping = one.pods[0].netns.exec(&format!("ping -c 2 {}", two.pods[0].address)).unwrap();
    assert!(ping.contains("ttl=62"), "{ping}");
}

#[test]
fn the_way_follows_routes_in_both_directions_without_loss() {
    let world = World::with_direct_routing(2).ready(&[]);
    world.lab.underlay.exec("sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.send_redirects=0").unwrap();
    world.lab.underlay.exec("sysctl -qw net.ipv4.conf.br0.send_redirects=0").unwrap();
    world.wait_connected(0, 1);
    (0..2).for_each(|host| world.wait_way(host, 1 - host, "direct"));
    let streams = [[0, 1], [1, 0]].map(|[from, to]| {
        let [from, to] = [from, to].map(|host| &world.hosts[host].pods[0]);
        Stream::start_on(from, to, if from.address < to.address { 7001 } else { 7002 })
    });
    let router = |host: usize, verb: &str| {
        let peer = world.hosts[1 - host].address;
        world.hosts[host].netns.ip(&format!("route {verb} {peer}/32 via 192.168.64.254")).unwrap();
    };
    for hosts in [&[0][..], &[1], &[0, 1]] {
        hosts.iter().for_each(|host| router(*host, "add"));
        for host in hosts {
            world.wait_way(*host, 1 - host, "encapsulated");
        }
        // The other sends as it is sent to.
        (0..2).for_each(|host| world.wait_way(host, 1 - host, "encapsulated"));
        hosts.iter().for_each(|host| router(*host, "delete"));
        (0..2).for_each(|host| world.wait_way(host, 1 - host, "direct"));
    }
    for stream in streams {
        let (sent, arrived) = stream.end();
        let arrived: BTreeSet<_> = arrived.into_iter().collect();
        let lost: Vec<_> = (0..sent).filter(|number| !arrived.contains(number)).take(20).collect();
        assert!(lost.is_empty(), "of {sent} datagrams {} arrived; lost are {lost:?}, ...", arrived.len());
    }
}

#[test]
fn a_packet_with_another_hosts_address_does_not_get_in() {
    let mut world = World::with_direct_routing(3);
    (0..2).for_each(|host| world.start(host, &[]));
    for host in &mut world.hosts[..2] {
        host.wait_ready().unwrap();
        host.add_pod().unwrap();
    }
    world.wait_connected(0, 1);
    (0..2).for_each(|host| world.wait_way(host, 1 - host, "direct"));
    let [one, two] = [0, 1].map(|host| &world.hosts[host]);
    let mac = |host: usize| {
        let links = world.hosts[host].netns.ip_json("link show eth0").unwrap();
        let octets: Vec<_> =
            links[0]["address"].as_str().unwrap().split(':').map(|octet| u8::from_str_radix(octet, 16)).collect();
        <[u8; 6]>::try_from(octets.into_iter().map(Result::unwrap).collect::<Vec<_>>()).unwrap()
    };
    let send = |from: usize, source: Ipv4Addr| {
        let packet = udp(source.octets(), one.pods[0].address.octets());
        let frame = [ethernet(mac(2), mac(0), etherparse::EtherType::IPV4), packet].concat();
        within(&world.hosts[from].netns, || {
            let ifindex = if_nametoindex("eth0").unwrap();
            FrameSender::open().unwrap().send(ifindex, &frame).unwrap();
        });
    };
    let before = world.counter(0, "direct_handed_in") + world.counter(0, "direct_delivered");
    let mut arrived = Capture::start(&one.pods[0].netns, "eth0", "udp", world.lab.directory()).unwrap();
    for _ in 0..10 {
        send(2, two.pods[0].address);
    }
    wait_for("the drops", SOON, || world.counter(0, "direct_foreign_mac") == 10).unwrap();
    assert_eq!(world.counter(0, "direct_handed_in") + world.counter(0, "direct_delivered"), before);
    let troubles = world.status(0)["troubles"].to_string();
    assert!(troubles.contains("which is not that of the host that leases it"), "{troubles}");
    // Others' plain packets are the kernel's matter, as with flannel: of these, one arrives.
    send(2, Ipv4Addr::new(192, 168, 64, 3));
    arrived.end_with("payload").unwrap();
    let seen = arrived.decoded(&[]).unwrap();
    assert_eq!(seen.lines().count(), 1, "{seen}");
}
