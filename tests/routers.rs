//! A pod that routes on: what it receives is passed to something behind it, by a device that may have to segment it.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpStream},
    thread,
};

use nix::sys::socket::{setsockopt, sockopt::UdpGsoSegment};
use xtask::{
    lab::{Netns, Subnet},
    progress::wait_for,
};

use crate::{
    large_packets::{receive_datagrams, udp_pair},
    sockets::{Pattern, connection, listener_in},
    world::{SOON, World, is_answered},
};

/// What is sent each way over a connection: enough for many packets of the largest size.
const BULK: usize = 64 << 20;
/// Without checksums as well: the kernel has to find where they are, and the receiver verifies them.
const OFFLOADS: &str = "tx off tso off gso off tx-udp-segmentation off tx-udp_tnl-segmentation off";

/// How a pod reaches what is behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    /// By a device that takes large packets.
    Whole,
    /// By one that takes nothing but frames.
    Segmented,
    /// By a tunnel of the pod's own, over such a one.
    Tunnel,
}

impl Link {
    const ALL: [Self; 3] = [Self::Whole, Self::Segmented, Self::Tunnel];
}

/// A namespace behind the first pod of a host, with an address of the host's subnet.
struct Behind {
    netns: Netns,
    address: Ipv4Addr,
}

impl Behind {
    fn new(world: &World, host: usize, link: Link) -> Self {
        let host = &world.hosts[host];
        let router = &host.pods[0];
        let Subnet { gateway, mtu, .. } = host.subnet().unwrap();
        let number = 200 + link as u32;
        let address = Ipv4Addr::from_bits(gateway.to_bits() - 1 + number);
        let netns = Netns::create(&format!("{}-behind{number}", router.netns.name())).unwrap();
        // Room for the tunnel's headers.
        let wire = format!("mtu {}", mtu + 50);
        let device = format!("behind{number}");
        let peer = format!("type veth peer name eth0 {wire} netns {}", netns.name());
        router.netns.exec("sysctl -qw net.ipv4.ip_forward=1").unwrap();
        router.netns.ip(&format!("link add {device} {wire} {peer}")).unwrap();
        let ends = [(&router.netns, device.as_str(), 1, 2), (&netns, "eth0", 2, 1)];
        for (netns, device, own, _) in ends {
            netns.ip(&format!("address add 172.16.{number}.{own}/24 dev {device}")).unwrap();
            netns.ip(&format!("link set {device} up")).unwrap();
            if link != Link::Whole {
                netns.exec(&format!("ethtool -K {device} {OFFLOADS}")).unwrap();
            }
        }
        let network = if link == Link::Tunnel { "172.17" } else { "172.16" };
        if link == Link::Tunnel {
            for (netns, _, own, peer) in ends {
                let addresses = format!("local 172.16.{number}.{own} remote 172.16.{number}.{peer}");
                let kind = format!("type vxlan id 42 {addresses} dstport 4789 udpcsum");
                netns.ip(&format!("link add tunnel mtu {mtu} {kind}")).unwrap();
                netns.ip(&format!("address add {network}.{number}.{own}/24 dev tunnel")).unwrap();
                netns.ip("link set tunnel up").unwrap();
            }
        }
        netns.ip("link set lo up").unwrap();
        netns.ip(&format!("address add {address}/32 dev lo")).unwrap();
        netns.ip(&format!("route add default via {network}.{number}.1 src {address}")).unwrap();
        router.netns.ip(&format!("route add {address}/32 via {network}.{number}.2")).unwrap();
        host.netns.ip(&format!("route add {address}/32 via {}", router.address)).unwrap();
        Self { netns, address }
    }
}

/// Does something with each kind of link, where large packets cross the underlay whole, and where the host aggregates what
/// comes as frames.
fn behind_each_link(check: impl Fn(&World, &Behind, &str)) {
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    for link in Link::ALL {
        let behind = Behind::new(&world, 1, link);
        let client = &world.hosts[0].pods[0].netns;
        wait_for("what is behind the pod", SOON, || is_answered(client, &behind.address.to_string())).unwrap();
        for gso in [true, false] {
            for host in &world.hosts {
                host.set_underlay_gso(gso).unwrap();
            }
            check(&world, &behind, &format!("{link:?}, GSO {gso}"));
        }
    }
}

fn send(stream: &mut TcpStream, pattern: &Pattern) {
    for place in (0..BULK).step_by(Pattern::LARGEST) {
        stream.write_all(pattern.at(place, Pattern::LARGEST)).unwrap();
    }
}

fn receive(stream: &mut TcpStream, pattern: &Pattern, what: &str) {
    let mut buffer = vec![0; Pattern::LARGEST];
    for place in (0..BULK).step_by(Pattern::LARGEST) {
        stream.read_exact(&mut buffer).unwrap_or_else(|error| panic!("{what}: {error} after {place} bytes"));
        pattern.assert(place, &buffer, || format!("{what}: at {place}"));
    }
}

#[test]
fn bulk_tcp_passes_through_a_pod_both_ways() {
    let pattern = &Pattern::new();
    behind_each_link(|world, behind, what| {
        let delivered = || [0, 1].map(|host| world.counter_row(host, "delivered").1);
        let before = delivered();
        let listener = listener_in(&behind.netns, behind.address, 7777);
        let client = &world.hosts[0].pods[0].netns;
        let (mut one, mut two) = connection(client, SocketAddrV4::new(behind.address, 7777), &listener);
        thread::scope(|scope| {
            scope.spawn(move || {
                receive(&mut two, pattern, &format!("there, {what}"));
                send(&mut two, pattern);
            });
            send(&mut one, pattern);
            receive(&mut one, pattern, &format!("back, {what}"));
        });
        // All but what has to take the stack, there and back.
        for (host, (before, after)) in before.into_iter().zip(delivered()).enumerate() {
            let bytes = after - before;
            assert!(bytes > BULK as u64 / 10 * 9, "{what}: {bytes} bytes past the stack of host {host}");
        }
    });
}

#[test]
fn large_udp_sends_pass_through_a_pod_both_ways() {
    const DATAGRAM: usize = 1400;
    let pattern = Pattern::new();
    behind_each_link(|world, behind, what| {
        let client = &world.hosts[0].pods[0];
        let ends = [(&client.netns, client.address), (&behind.netns, behind.address)];
        let sockets = udp_pair(ends, 7777);
        for socket in &sockets {
            setsockopt(socket, UdpGsoSegment, &(DATAGRAM as i32)).unwrap();
        }
        // The first goes through the stack, the others may pass by.
        for count in 1..=40 {
            let bytes = pattern.at(count, count * DATAGRAM);
            for (from, to) in [(0, 1), (1, 0)] {
                sockets[from].send_to(bytes, (ends[to].1, 7777)).unwrap();
                let what = || format!("{count} datagrams from {from}, {what}");
                receive_datagrams(&sockets[to], SocketAddrV4::new(ends[from].1, 7777), bytes, DATAGRAM, what);
            }
        }
    });
}
