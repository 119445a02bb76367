//! With hosts of flannel's: the kernel's vxlan device, set up with plain commands, and a lease written as flannel
//! writes it.

use xtask::{
    lab::{PREFIX, Subnet},
    progress::wait_for,
    transfer::tcp_transfer,
};

use crate::world::{SOON, World, is_delivered};

/// Host 0 is ours, host 1 flannel's, each knowing the other.
pub fn mixed() -> World {
    let mut world = World::new(2);
    let kernel = world.hosts[1].become_kernel_vxlan(&world.store, 200).unwrap();
    world.hosts[1].add_pod_in(&kernel.subnet).unwrap();
    world.start(0, &[]);
    world.hosts[0].wait_ready().unwrap();
    world.hosts[0].add_pod().unwrap();
    let third_octet = world.hosts[0].subnet().unwrap().gateway.octets()[2];
    world.hosts[1].add_kernel_peer_from(&world.store, third_octet).unwrap();
    world
}

#[test]
fn pings_pass_both_ways() {
    let world = mixed();
    for (from, to) in [(0, 1), (1, 0)] {
        let address = world.hosts[to].pods[0].address;
        let ping = world.hosts[from].pods[0].netns.exec(&format!("ping -c 5 -i 0.2 -W 2 {address}")).unwrap();
        assert!(ping.contains("5 received"), "{from} to {to}: {ping}");
        assert!(is_delivered(&world.hosts[from].netns, &address.to_string()), "host {from} to pod {to}");
    }
    assert_eq!(world.counter(0, "inner_foreign_mac"), 0);
}

#[test]
fn tcp_passes_both_ways_whole_and_segmented() {
    let world = mixed();
    for gso in [true, false] {
        for host in &world.hosts {
            host.set_underlay_gso(gso).unwrap();
        }
        for (from, to) in [(0, 1), (1, 0)] {
            let (from, to) = (&world.hosts[from].pods[0], &world.hosts[to].pods[0]);
            let transfer = tcp_transfer(&from.netns, &to.netns, to.address, 1, world.lab.directory()).unwrap();
            assert!(transfer.is_flowing(), "{} Gb/s with GSO {gso}", transfer.gbits);
        }
    }
}

#[test]
fn fragments_of_tunnel_packets_are_reassembled_and_delivered() {
    let mut world = World::new(2);
    world.start(0, &[]);
    world.hosts[0].wait_ready().unwrap();
    world.hosts[0].add_pod().unwrap();
    // A device that is bound to no underlay, with an MTU that its packets exceed the underlay's by: the kernel
    // fragments what is around them.
    let kernel = world.hosts[1].become_kernel_vxlan(&world.store, 200).unwrap();
    let peer = &mut world.hosts[1];
    peer.netns.ip("link delete flannel.1").unwrap();
    let device = format!("address {} mtu 1500 type vxlan id 1 local 192.168.64.2 dstport 8472", kernel.mac);
    peer.netns.ip(&format!("link add flannel.1 {device} nolearning")).unwrap();
    peer.netns.ip("address add 10.5.200.0/32 dev flannel.1").unwrap();
    peer.netns.ip("link set flannel.1 up").unwrap();
    peer.add_pod_in(&Subnet { mtu: 1500, ..kernel.subnet }).unwrap();
    let third_octet = world.hosts[0].subnet().unwrap().gateway.octets()[2];
    world.hosts[1].add_kernel_peer_from(&world.store, third_octet).unwrap();

    // To the host: its pods have a smaller MTU.
    let address = world.hosts[0].subnet().unwrap().gateway;
    let ping = world.hosts[1].pods[0].netns.exec(&format!("ping -c 3 -i 0.2 -W 2 -s 1460 {address}")).unwrap();
    assert!(ping.contains("3 received"), "{ping}");
    assert_eq!(world.counter(0, "underlay_fragment"), 3, "one later fragment each");
}

#[test]
fn a_host_of_flannels_is_taken_over_with_its_device_subnet_and_mac() {
    let mut world = World::with_any_subnet(2);
    for (host, third_octet) in [(0, 201), (1, 202)] {
        let kernel = world.hosts[host].become_kernel_vxlan(&world.store, third_octet).unwrap();
        world.hosts[host].add_pod_in(&kernel.subnet).unwrap();
    }
    world.hosts[0].add_kernel_peer_from(&world.store, 202).unwrap();
    world.hosts[1].add_kernel_peer_from(&world.store, 201).unwrap();
    world.wait_connected(0, 1);
    let device = |world: &World| {
        let links = world.hosts[0].netns.ip_json("link show flannel.1").unwrap();
        (links[0]["ifindex"].clone(), links[0]["address"].clone())
    };
    let before = (device(&world), world.lease_of(0));

    world.start(0, &[]);
    world.hosts[0].wait_ready().unwrap();
    world.wait_connected(0, 1);
    assert_eq!((device(&world), world.lease_of(0)), before);
    // What flannel made for its peer is gone.
    let netns = &world.hosts[0].netns;
    let state = || [netns.exec("ip route").unwrap(), netns.exec("ip neigh show dev flannel.1").unwrap()].concat();
    let forwarding = || netns.exec("bridge fdb show dev flannel.1").unwrap();
    let own = "02:00:00:00:00:01 dst 192.168.64.1 self permanent\n";
    // Its peers are taken over with the lease table, after subnet.env is written.
    let waited = wait_for("flannel's entries to go", SOON, || !state().contains("10.5.202.") && forwarding() == own);
    assert!(waited.is_ok(), "{} {}", state(), forwarding());
    assert_eq!(world.store.list(&format!("{PREFIX}/subnets/")).unwrap().len(), 2);
}
