//! Devices stacked on a host's links that tunnel packets come in by and leave by. The kernel at hand may lack some: those tests are
//! for `cargo xtask vm`.

use xtask::{lab::Netns, progress::wait_for, transfer::tcp_transfer};

use crate::{
    underlays::add_second_link,
    world::{SOON, World},
};

/// A network by a device, `192.168.66.<number>`, which both hosts make on their `eth1`. `make` has the host's number; what it says
/// is the device's name. What is expected past the stack of both, and how the agents are told of it.
fn talk_by(what: &str, arguments: &[&str], is_bypassed: bool, make: impl Fn(&Netns, usize) -> String) -> World {
    let mut world = World::new(2);
    add_second_link(&world);
    let mut devices = Vec::new();
    for (number, host) in (1..).zip(&world.hosts) {
        host.netns.ip("address flush dev eth1").unwrap();
        devices.push(make(&host.netns, number));
    }
    for (host, device) in devices.iter().enumerate() {
        let iface = format!("--iface={device}");
        let arguments = if arguments.is_empty() { vec![iface.as_str()] } else { arguments.to_vec() };
        world.start(host, &arguments);
    }
    for host in &mut world.hosts {
        host.wait_ready().unwrap();
        host.add_pod().unwrap();
    }
    (0..2).for_each(|host| world.wait_pods(host));
    world.wait_connected(0, 1);
    assert_flows(&world, what, is_bypassed);
    for (host, device) in devices.iter().enumerate() {
        let status = world.status(host);
        assert!(
            status["status"]["underlayInterfaces"].as_array().unwrap().contains(&device.as_str().into()),
            "{what}: {status:#}"
        );
        assert_eq!(status["troubles"], serde_json::json!([]), "{what}");
    }
    world
}

/// Bulk, both ways; past the stacks where that is expected.
fn assert_flows(world: &World, what: &str, is_bypassed: bool) {
    let counters = || [(0, "pod_encapsulated"), (0, "delivered"), (1, "pod_encapsulated"), (1, "delivered")];
    let before = counters().map(|(host, label)| world.counter(host, label));
    for (from, to) in [(0, 1), (1, 0)] {
        let (from, to) = (&world.hosts[from].pods[0], &world.hosts[to].pods[0]);
        let transfer = tcp_transfer(&from.netns, &to.netns, to.address, 1, world.lab.directory()).unwrap();
        assert!(transfer.is_flowing(), "{what}: {} Gb/s", transfer.gbits);
    }
    for ((host, label), before) in counters().into_iter().zip(before) {
        let passed = world.counter(host, label) - before;
        // What comes in without an Ethernet header takes the stack.
        assert!(passed > 100 || !is_bypassed && label == "delivered", "{what}: {label} of {host}: {passed}");
    }
}

fn add_address(netns: &Netns, device: &str, number: usize) -> String {
    netns.ip(&format!("address add 192.168.66.{number}/24 dev {device}")).unwrap();
    netns.ip(&format!("link set {device} up")).unwrap();
    device.to_owned()
}

fn run(netns: &Netns, commands: &[&str]) {
    commands.iter().for_each(|command| drop(netns.ip(command).unwrap()));
}

#[test]
fn a_bridge_with_the_address_and_a_link_as_its_port() {
    talk_by("bridge", &[], true, |netns, number| {
        run(netns, &["link add br-ex type bridge", "link set eth1 master br-ex", "link set br-ex up"]);
        add_address(netns, "br-ex", number)
    });
}

#[test]
fn a_macvlan_on_a_link() {
    talk_by("macvlan", &[], true, |netns, number| {
        run(netns, &["link add macvlan1 link eth1 type macvlan mode bridge"]);
        add_address(netns, "macvlan1", number)
    });
}

#[test]
fn the_interface_by_which_an_address_is_reached() {
    talk_by("--iface-can-reach", &["--iface-can-reach=192.168.66.9"], true, |netns, number| {
        add_address(netns, "eth1", number)
    });
}

#[test]
#[ignore = "needs the kernel's VLANs: cargo xtask vm 6.12"]
fn a_vlan_on_a_link() {
    talk_by("VLAN", &[], true, |netns, number| {
        run(netns, &["link add eth1.100 link eth1 type vlan id 100"]);
        add_address(netns, "eth1.100", number)
    });
}

#[test]
#[ignore = "needs the kernel's bonds and VLANs: cargo xtask vm 6.12"]
fn a_vlan_on_a_bond_that_loses_a_link() {
    let world = talk_by("VLAN on a bond", &[], true, |netns, number| {
        // A second port that leads nowhere, and is the one in use at first.
        run(
            netns,
            &[
                "link add bond0 type bond mode active-backup miimon 20",
                "link add spare0 type veth peer name spare1",
                "link set spare1 up",
                "link set eth1 down",
                "link set eth1 master bond0",
                "link set spare0 master bond0",
                "link set bond0 up",
                "link add bond0.100 link bond0 type vlan id 100",
            ],
        );
        add_address(netns, "bond0.100", number)
    });
    for host in &world.hosts {
        // It fails over, and back.
        run(&host.netns, &["link set bond0 type bond active_slave spare0"]);
        run(&host.netns, &["link set spare1 down"]);
    }
    world.wait_connected(0, 1);
    assert_flows(&world, "after the failover", true);
}

#[test]
#[ignore = "needs the kernel's VRFs: cargo xtask vm 6.12"]
fn a_link_in_a_vrf() {
    talk_by("VRF", &[], true, |netns, number| {
        run(
            netns,
            &[
                "link add blue type vrf table 10",
                "link set blue up",
                "link set eth1 master blue",
                // flannel's device asks for a way without naming a device.
                "rule add to 192.168.66.0/24 lookup 10",
            ],
        );
        add_address(netns, "eth1", number)
    });
}

#[test]
#[ignore = "needs the kernel's dummy devices: cargo xtask vm 6.12"]
fn an_address_on_a_dummy_device() {
    talk_by("dummy", &[], true, |netns, number| {
        let peer = 3 - number;
        run(
            netns,
            &[
                "link add dummy0 type dummy",
                "link set dummy0 mtu 1500 up",
                &format!("address add 10.255.0.{number}/32 dev dummy0"),
                &format!("address add 192.168.66.{number}/24 dev eth1"),
                &format!("route add 10.255.0.{peer}/32 via 192.168.66.{peer} src 10.255.0.{number}"),
            ],
        );
        "dummy0".to_owned()
    });
}

#[test]
#[ignore = "needs the kernel's ipip tunnels: cargo xtask vm 6.12"]
fn a_tunnel_without_ethernet_headers_that_goes_and_comes_back() {
    let make = |netns: &Netns, number: usize| {
        let peer = 3 - number;
        run(netns, &[&format!("link add tun1 type ipip local 192.168.67.{number} remote 192.168.67.{peer}")]);
        add_address(netns, "tun1", number)
    };
    let world = talk_by("ipip", &[], false, |netns, number| {
        run(netns, &[&format!("address add 192.168.67.{number}/24 dev eth1")]);
        make(netns, number)
    });
    let host = &world.hosts[1].netns;
    host.ip("link delete tun1").unwrap();
    world.wait_status(1, "no tunnel", |status| !status["drift"]["waiting"]["external interface"].is_null());
    make(host, 2);
    wait_for("the tunnel again", SOON, || {
        let status = world.status(1);
        status["status"]["drift"]["waiting"]["external interface"].is_null()
    })
    .unwrap();
    world.wait_connected(0, 1);
    assert_flows(&world, "ipip again", false);
}
