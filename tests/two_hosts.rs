//! Pods on two hosts, on real traffic.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt::UdpGsoSegment};
use xtask::{lab::PREFIX, progress::wait_for, run::decoded_packet, transfer::tcp_transfer};

use crate::{
    sockets::socket_in,
    world::{SOON, World, is_answered, is_delivered, lease_value},
};

#[test]
fn pods_and_hosts_reach_each_other_from_the_first_packet() {
    let world = World::with_agents(2);
    let [one, two] = &world.hosts[..] else { panic!("two hosts") };
    // Nothing was sent yet, so that each next hop has to be resolved for the first of these.
    for (from, to) in [(one, two), (two, one)] {
        let ping = from.pods[0].netns.exec(&format!("ping -c 5 -i 0.2 -W 2 {}", to.pods[0].address)).unwrap();
        assert!(ping.contains("5 received"), "{ping}");
    }
    // Until the agent has put the answer into the header, which on a slow machine takes more than a packet.
    let left = || world.counter(0, "encapsulated_neighbour");
    wait_for("the header", SOON, || {
        let before = (left(), world.counter(0, "encapsulated"));
        is_answered(&one.pods[0].netns, &two.pods[0].address.to_string());
        left() == before.0 && world.counter(0, "encapsulated") > before.1
    })
    .unwrap();
    let before = left();
    assert!(before >= 1, "the first packet is left to the kernel");
    one.pods[0].netns.exec(&format!("ping -c 5 -i 0.2 -W 2 {}", two.pods[0].address)).unwrap();
    assert_eq!(left(), before, "no packet to a known next hop is");
    let gateway = two.subnet().unwrap().gateway;
    let overlay_address = Ipv4Addr::from_bits(gateway.to_bits() - 1);
    for address in [two.pods[0].address, gateway, overlay_address] {
        assert!(is_delivered(&one.netns, &address.to_string()), "host to {address}");
        assert!(is_delivered(&one.pods[0].netns, &address.to_string()), "pod to {address}");
    }
    for label in ["unknown_vtep", "spoofed_inner_source", "inner_foreign_mac", "foreign_inner_destination"] {
        assert_eq!((world.counter(0, label), world.counter(1, label)), (0, 0), "{label}");
    }
}

#[test]
fn fragments_and_large_pings_pass() {
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    let ping =
        world.hosts[0].pods[0].netns.exec(&format!("ping -c 3 -i 0.2 -s 4000 {}", world.hosts[1].pods[0].address));
    assert!(ping.unwrap().contains("3 received"));
    // Too big for the overlay, and not to be fragmented: the pod is told.
    let refused =
        world.hosts[0].pods[0].netns.exec(&format!("ping -c 1 -W 1 -M do -s 1423 {}", world.hosts[1].pods[0].address));
    assert!(refused.unwrap_err().to_string().contains("too long"));
}

#[test]
fn bulk_tcp_is_not_segmented_before_the_underlay() {
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    let (from, to) = (&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    let sent_by_programs = || {
        let [slow, fast] = ["encapsulated", "pod_encapsulated"].map(|label| world.counter_row(0, label));
        (slow.0 + fast.0, slow.1 + fast.1)
    };
    let (packets, bytes) = sent_by_programs();
    let transfer = tcp_transfer(&from.netns, &to.netns, to.address, 1, world.lab.directory()).unwrap();
    assert!(transfer.is_flowing(), "{} Gb/s", transfer.gbits);
    let (packets_after, bytes_after) = sent_by_programs();
    let mean = (bytes_after - bytes) / (packets_after - packets);
    // Segmented, none would be larger than the MTU.
    assert!(mean > 5000, "{mean} bytes a packet: {packets_after} packets");
    // The device that the tunnel leaves by saw them whole as well.
    let links = world.hosts[0].netns.ip_json("-s link show eth0").unwrap();
    let sent = links[0]["stats64"]["tx"]["packets"].as_u64().unwrap();
    assert!(sent < packets_after + 1000, "{sent} on eth0 for {packets_after} packets");
}

#[test]
fn bulk_tcp_passes_when_the_underlay_segments() {
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    for host in &world.hosts {
        host.set_underlay_gso(false).unwrap();
    }
    let (from, to) = (&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    let transfer = tcp_transfer(&from.netns, &to.netns, to.address, 1, world.lab.directory()).unwrap();
    assert!(transfer.is_flowing(), "{} Gb/s", transfer.gbits);
}

#[test]
fn a_large_udp_send_crosses_whole_and_arrives_as_datagrams() {
    const DATAGRAM: usize = 1400;
    const COUNT: usize = 40;
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    let (from, to) = (&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    let receiver = socket_in(&to.netns, SocketAddrV4::new(to.address, 7777));
    receiver.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let sender = socket_in(&from.netns, SocketAddrV4::new(from.address, 0));
    setsockopt(&sender, UdpGsoSegment, &(DATAGRAM as i32)).unwrap();

    let before = world.counter(0, "encapsulated");
    let sent: Vec<u8> = (0..COUNT * DATAGRAM).map(|index| (index / DATAGRAM) as u8).collect();
    sender.send_to(&sent, (to.address, 7777)).unwrap();
    let mut buffer = [0; 2 * DATAGRAM];
    for number in 0..COUNT {
        let (len, _) = receiver.recv_from(&mut buffer).unwrap();
        assert_eq!(buffer[..len], [number as u8; DATAGRAM], "datagram {number}");
    }
    assert_eq!(world.counter(0, "encapsulated") - before, 1, "packets for one send");
}

#[test]
fn tunnels_of_pods_pass() {
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    let pods = [&world.hosts[0].pods[0], &world.hosts[1].pods[0]];
    for (index, pod) in pods.iter().enumerate() {
        let peer = pods[1 - index].address;
        pod.netns.ip(&format!("link add tunnel type vxlan id 42 dev eth0 remote {peer} dstport 4789")).unwrap();
        pod.netns.ip(&format!("address add 10.99.0.{}/24 dev tunnel", index + 1)).unwrap();
        pod.netns.ip("link set tunnel up").unwrap();
    }
    let ping = pods[0].netns.exec("ping -c 3 -i 0.2 -W 2 -s 1300 10.99.0.2").unwrap();
    assert!(ping.contains("3 received"), "{ping}");
    let transfer = tcp_transfer(&pods[0].netns, &pods[1].netns, [10, 99, 0, 2].into(), 1, world.lab.directory());
    assert!(transfer.unwrap().is_flowing());
    // To be segmented with two tunnels around it is what the kernel has no note for.
    assert!(world.counter(0, "encap_handed_on") > 0);
    assert_eq!(world.counter(0, "encap_nested"), 0);
}

#[test]
fn no_kernel_object_belongs_to_a_peer() {
    let world = World::with_any_subnet(2).ready(&[]);
    let own = [0, 1].map(|host| world.hosts[host].subnet().unwrap().gateway.octets()[2]);
    let octets: Vec<u8> = (100..=255).filter(|octet| !own.contains(octet)).take(50).collect();
    for octet in &octets {
        let value = lease_value(&format!("192.168.64.{octet}"), &format!("0a:00:00:00:00:{octet:x}"));
        world.store.put(&format!("{PREFIX}/subnets/10.5.{octet}.0-24"), &value).unwrap();
    }
    let last = format!("10.5.{}.1", octets[49]);
    // The last is in the map: a packet to it is encapsulated.
    let pod = &world.hosts[0].pods[0].netns;
    wait_for("the last peer", SOON, || {
        let before = world.counter(0, "encapsulated_neighbour");
        is_answered(pod, &last);
        world.counter(0, "encapsulated_neighbour") > before
    })
    .unwrap();
    let netns = &world.hosts[0].netns;
    let count = |what: &str| netns.ip_json(what).unwrap().as_array().unwrap().len();
    assert_eq!(count("route show dev flannel.1"), 1);
    assert_eq!(count("neigh show dev flannel.1"), 1);
    let forwarding = netns.exec("bridge fdb show dev flannel.1").unwrap();
    assert_eq!(forwarding, "02:00:00:00:00:01 dst 192.168.64.1 self permanent\n");
}

#[test]
fn peers_come_change_and_go() {
    // Of the Network as a whole, which has one route, whoever leases what.
    let world = World::with_any_subnet(1).ready(&[]);
    let own = world.hosts[0].subnet().unwrap().gateway.octets()[2];
    let subnet = if own == 200 { "10.5.201" } else { "10.5.200" };
    let (key, pod) = (format!("{PREFIX}/subnets/{subnet}.0-24"), format!("{subnet}.1"));
    world.store.put(&key, &lease_value("192.168.64.50", "0a:00:00:00:00:50")).unwrap();
    // Nobody is there to answer ARP; the packet's way is all that counts.
    let goes_to = |world: &World, address: &str, mac: &str| {
        let netns = &world.hosts[0].netns;
        netns.ip(&format!("neigh replace {address} lladdr 02:00:00:00:00:99 dev eth0 nud permanent")).unwrap();
        let packet =
            decoded_packet(netns, &format!("udp port 8472 and dst host {address}"), world.lab.directory(), || {
                is_answered(netns, &pod);
                Ok(())
            });
        packet.is_ok_and(|packet| packet.contains(&format!("Dst: {mac}")))
    };
    wait_for("the new peer", SOON, || goes_to(&world, "192.168.64.50", "0a:00:00:00:00:50")).unwrap();
    // The same subnet at another host with another MAC.
    world.store.put(&key, &lease_value("192.168.64.51", "0a:00:00:00:00:51")).unwrap();
    wait_for("the changed peer", SOON, || goes_to(&world, "192.168.64.51", "0a:00:00:00:00:51")).unwrap();

    world.store.etcdctl(&["del", &key]).unwrap();
    wait_for("the peer to go", SOON, || {
        let before = world.counter(0, "encap_no_peer");
        is_answered(&world.hosts[0].netns, &pod);
        world.counter(0, "encap_no_peer") > before
    })
    .unwrap();
    // Once each way, and no further.
    assert_eq!(world.counter(0, "encap_handed_on"), world.counter(0, "encap_no_peer"));
}

#[test]
fn a_peer_behind_a_gateway_is_reached() {
    let mut world = World::new(2);
    let underlay = &world.lab.underlay;
    underlay.ip("address add 192.168.65.254/24 dev br0").unwrap();
    underlay.exec("sysctl -qw net.ipv4.ip_forward=1").unwrap();
    let two = &world.hosts[1].netns;
    two.ip("address flush dev eth0").unwrap();
    two.ip("address add 192.168.65.2/24 dev eth0").unwrap();
    two.ip("route add default via 192.168.65.254").unwrap();
    for host in 0..2 {
        world.start(host, &[]);
    }
    for host in &mut world.hosts {
        host.wait_ready().unwrap();
        host.add_pod().unwrap();
    }
    world.wait_connected(0, 1);
    let peers = world.store.list(&format!("{PREFIX}/subnets/")).unwrap();
    assert!(peers.iter().any(|(_, value)| value.contains("192.168.65.2")), "{peers:?}");
}

#[test]
fn a_peer_without_a_route_is_named_and_costs_only_itself() {
    let world = World::with_agents(2);
    world.hosts[0].netns.ip("route delete default").unwrap();
    world
        .store
        .put(&format!("{PREFIX}/subnets/10.5.99.0-24"), &lease_value("203.0.113.9", "0a:00:00:00:00:99"))
        .unwrap();
    world.wait_log(0, "nothing can be sent to the peer 203.0.113.9");
    is_answered(&world.hosts[0].netns, "10.5.99.1");
    wait_for("the counter", SOON, || world.counter(0, "encap_no_route") > 0).unwrap();
    world.wait_connected(0, 1);
    // A route that comes is noticed.
    world.hosts[0].netns.ip("route add default via 192.168.64.254").unwrap();
    wait_for("the route", SOON, || {
        let before = world.counter(0, "encap_no_route");
        is_answered(&world.hosts[0].netns, "10.5.99.1");
        world.counter(0, "encap_no_route") == before
    })
    .unwrap();
}

#[test]
fn tunnel_packets_past_the_admission_do_not_get_in() {
    let mut world = World::with_agents(1);
    let intruder = world.lab.host("intruder", 66).unwrap();
    world.hosts.push(intruder);
    // All that admission looks at is right but the address that it is sent to: a second one of the host.
    let host = &world.hosts[0].netns;
    host.ip("address add 192.168.64.101/24 dev eth0").unwrap();
    let mac = host.ip_json("link show flannel.1").unwrap()[0]["address"].as_str().unwrap().to_owned();
    let kernel = world.hosts[1].become_kernel_vxlan(&world.store, 200).unwrap();
    world.hosts[1].add_pod_in(&kernel.subnet).unwrap();
    let subnet = Ipv4Addr::from_bits(world.hosts[0].subnet().unwrap().gateway.to_bits() - 1);
    let pod = world.hosts[0].pods[0].address.to_string();
    world.hosts[1].add_kernel_peer(subnet, &mac, [192, 168, 64, 101].into()).unwrap();
    assert!(!is_answered(&world.hosts[1].pods[0].netns, &pod));
    assert!(world.counter(0, "not_admitted") > 0);
    // To the right address it is a peer like any other.
    world.hosts[1].add_kernel_peer(subnet, &mac, [192, 168, 64, 1].into()).unwrap();
    wait_for("an answer", SOON, || is_answered(&world.hosts[1].pods[0].netns, &pod)).unwrap();
}

#[test]
fn a_bad_entry_costs_only_itself() {
    let world = World::with_agents(2);
    for (key, value) in [
        ("10.5.100.0-24", "not json"),
        ("10.5.101.0-24x", "{}"),
        ("10.5.102.0-32", "{}"),
        ("10.5.103.0-24", &lease_value("0.0.0.1", "0a:00:00:00:00:99")),
        ("10.5.104.0-24", r#"{"PublicIP":"1.2.3.4","BackendType":"vxlan"}"#),
    ] {
        world.store.put(&format!("{PREFIX}/subnets/{key}"), value).unwrap();
    }
    world.wait_log(0, r#"the entry "10.5.104.0-24" is passed over"#);
    world.wait_connected(0, 1);
}
