//! flannel's daemon, played with plain commands, takes a host over that nobody has cleaned up: programs and maps are as the
//! agent left them, and nobody keeps the maps.

use nix::sys::signal::Signal;
use xtask::{
    lab::{PREFIX, Subnet},
    progress::wait_for,
};

use crate::{
    frames::{FROM_TWO, Mac, STRANGER, Tunnel, ethernet, udp, vxlan},
    short_frames::send,
    world::{SOON, World, is_delivered, lease_value},
};

/// The third octet of the host's subnet, and that of the peer that stays.
fn octets(world: &World) -> [u8; 2] {
    [0, 1].map(|host| world.hosts[host].subnet().unwrap().gateway.octets()[2])
}

/// The agent of the first host ends as it is asked to, and nothing is cleaned up.
fn stop(world: &mut World) {
    let agent = world.hosts[0].agent.as_mut().unwrap();
    agent.signal(Signal::SIGTERM).unwrap();
    agent.wait(SOON).unwrap();
    world.hosts[0].agent = None;
}

/// Three hosts, of which the third has no agent.
fn world() -> World {
    let mut world = World::with_any_subnet(3);
    for host in 0..2 {
        world.start(host, &[]);
    }
    for host in 0..2 {
        world.hosts[host].wait_ready().unwrap();
        world.hosts[host].add_pod().unwrap();
        world.wait_pods(host);
    }
    world.wait_connected(0, 1);
    world
}

/// The third host becomes one of flannel's, with a lease and a pod, and both know each other.
fn join(world: &mut World) {
    let [third_octet, _] = world.free_octets();
    let kernel = world.hosts[2].become_kernel_vxlan(&world.store, third_octet).unwrap();
    world.hosts[2].add_pod_in(&kernel.subnet).unwrap();
    world.hosts[0].add_kernel_peer_from(&world.store, third_octet).unwrap();
    for octet in octets(world) {
        world.hosts[2].add_kernel_peer_from(&world.store, octet).unwrap();
    }
}

fn mac_of(world: &World, host: usize, device: &str) -> Mac {
    let links = world.hosts[host].netns.ip_json(&format!("link show {device}")).unwrap();
    let octets: Vec<_> =
        links[0]["address"].as_str().unwrap().split(':').map(|octet| u8::from_str_radix(octet, 16).unwrap()).collect();
    octets.try_into().unwrap()
}

/// A packet from a host that nobody knows, with an inner source that nobody routes.
fn forge(world: &World) {
    let pod = world.hosts[0].pods[0].address.octets();
    let inner = [
        &ethernet([0x0a, 0, 0, 0, 0, 9], mac_of(world, 0, "flannel.1"), etherparse::EtherType::IPV4)[..],
        &udp([10, 5, world.free_octets()[0], 5], pod),
    ]
    .concat();
    let tunnel = Tunnel { source: STRANGER, destination_mac: mac_of(world, 0, "eth0"), ..FROM_TWO };
    send(&world.lab.underlay, "node1", &[&tunnel.around(&vxlan(8, 1), &inner)]);
}

#[test]
fn peers_that_join_flannel_are_reached_and_nothing_is_lost() {
    let mut world = world();
    let [_, stays] = octets(&world);
    let traffic = world.traffic(0, 1);
    stop(&mut world);
    world.hosts[0].add_kernel_peer_from(&world.store, stays).unwrap();
    join(&mut world);
    for other in [1, 2] {
        world.wait_connected(0, other);
    }
    traffic.assert_nothing_was_lost();
    assert!(world.counter(0, "admitted_by_route") > 0);

    let before = world.counter(0, "unknown_vtep");
    forge(&world);
    wait_for("the refusal", SOON, || world.counter(0, "unknown_vtep") > before).unwrap();
    assert!(
        world.status(0)["troubles"]
            .as_array()
            .unwrap()
            .iter()
            .all(|trouble| !trouble.as_str().unwrap().contains("refused"))
    );
}

#[test]
fn a_peer_that_comes_back_to_flannel_as_another_is_reached() {
    let mut world = world();
    let [_, stays] = octets(&world);
    stop(&mut world);
    world.hosts[0].add_kernel_peer_from(&world.store, stays).unwrap();
    // The peer's subnet moves to the third host: another MAC and another address. Its pod is as it was.
    let subnet = world.hosts[1].subnet().unwrap();
    world.hosts[1].agent = None;
    world.hosts[2].become_kernel_vxlan(&world.store, stays).unwrap();
    world.hosts[2].add_pod_in(&Subnet { mtu: 1450, ..subnet }).unwrap();
    let [host, _] = octets(&world);
    world.hosts[2].add_kernel_peer_from(&world.store, host).unwrap();
    world.hosts[0].add_kernel_peer_from(&world.store, stays).unwrap();
    world.wait_connected(0, 2);
    assert!(world.counter(0, "admitted_by_route") > 0);
}

/// A peer of ours keeps its MAC and its subnet where its host gets another address.
#[test]
fn a_peer_that_gets_another_address_is_reached() {
    let mut world = world();
    let [_, stays] = octets(&world);
    stop(&mut world);
    world.hosts[0].add_kernel_peer_from(&world.store, stays).unwrap();
    world.wait_connected(0, 1);
    let netns = &world.hosts[1].netns;
    netns.ip("address flush dev eth0").unwrap();
    netns.ip("address add 192.168.64.22/24 dev eth0").unwrap();
    netns.ip("route add default via 192.168.64.254").unwrap();
    let key = format!("{PREFIX}/subnets/10.5.{stays}.0-24");
    wait_for("the new address", SOON, || world.store.get(&key).unwrap().contains("192.168.64.22")).unwrap();
    world.hosts[0].add_kernel_peer_from(&world.store, stays).unwrap();
    world.wait_connected(0, 1);
}

#[test]
fn a_device_that_flannel_makes_anew_gets_its_packets() {
    let mut world = world();
    let [own, stays] = octets(&world);
    stop(&mut world);
    world.hosts[0].netns.ip("link delete flannel.1").unwrap();
    let mac = world.hosts[0].add_kernel_vxlan([10, 5, own, 0].into()).unwrap();
    world.hosts[0].add_kernel_peer_from(&world.store, stays).unwrap();
    // Everybody learns of its MAC.
    let lease = lease_value("192.168.64.1", &mac);
    world.store.put(&format!("{PREFIX}/subnets/10.5.{own}.0-24"), &lease).unwrap();
    join(&mut world);
    for other in [1, 2] {
        world.wait_connected(0, other);
    }
    for other in [1, 2] {
        assert!(is_delivered(&world.hosts[0].netns, &world.hosts[other].pods[0].address.to_string()), "host {other}");
    }
}
