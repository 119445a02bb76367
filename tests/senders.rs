//! Senders that are no pods: hosts with their own addresses, what is behind them, and pod networks of class E.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4},
};

use xtask::{
    lab::{Netns, PREFIX, cni::Runtime},
    progress::wait_for,
};

use crate::{
    interoperation::mixed,
    sockets::{connection, listener_in},
    world::{SOON, World, agent, is_answered, is_delivered},
};

/// That a server at an address of a namespace is reached by TCP, and answers.
fn assert_served(client: &Netns, server: &Netns, address: Ipv4Addr, what: &str) {
    const PORT: u16 = 8080;
    let listener = listener_in(server, address, PORT);
    let (mut one, mut two) = connection(client, SocketAddrV4::new(address, PORT), &listener);
    let mut buffer = [0; 5];
    one.write_all(b"hello").unwrap();
    two.read_exact(&mut buffer).unwrap_or_else(|error| panic!("{what}: {error}"));
    two.write_all(&buffer).unwrap();
    one.read_exact(&mut buffer).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(&buffer, b"hello", "{what}");
}

/// Pods reach other hosts' own addresses, and programs with these reach pods.
fn assert_hosts_talk(world: &World) {
    for (from, to) in [(0, 1), (1, 0)] {
        let (pod, host) = (&world.hosts[from].pods[0], &world.hosts[to]);
        let what = format!("the pod on host {from} and host {to}");
        assert!(is_delivered(&pod.netns, &host.address.to_string()), "{what}: no answer to a ping");
        assert_served(&pod.netns, &host.netns, host.address, &what);
        let ping = host.netns.exec(&format!("ping -c 1 -W 1 -I {} {}", host.address, pod.address));
        assert!(ping.is_ok(), "{what}: no answer to the host's own address");
    }
}

#[test]
fn a_pod_and_another_hosts_own_address() {
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    assert_hosts_talk(&world);
    assert_eq!(world.status(0)["troubles"], serde_json::json!([]));
}

#[test]
fn a_pod_and_the_own_address_of_a_host_of_flannels() {
    let world = mixed();
    world.wait_connected(0, 1);
    assert_hosts_talk(&world);
}

/// A network behind the second host, with one host in it, 10.20.0.7.
fn site(world: &World) -> Netns {
    let host = &world.hosts[1].netns;
    let site = Netns::create(&format!("{}-site", host.name())).unwrap();
    host.ip(&format!("link add site type veth peer name eth0 netns {}", site.name())).unwrap();
    host.ip("address add 10.20.0.1/24 dev site").unwrap();
    host.ip("link set site up").unwrap();
    host.exec("sysctl -qw net.ipv4.ip_forward=1").unwrap();
    site.ip("address add 10.20.0.7/24 dev eth0").unwrap();
    for device in ["lo", "eth0"] {
        site.ip(&format!("link set {device} up")).unwrap();
    }
    site.ip("route add default via 10.20.0.1").unwrap();
    site
}

/// What `status` has to say, and with which exit code.
fn troubles(world: &World, host: usize) -> (Vec<String>, Option<i32>) {
    let code = world.agent_on(host).arg("status").output().unwrap().status.code();
    let troubles = world.status(host)["troubles"].as_array().unwrap().clone();
    (troubles.iter().map(|trouble| trouble.as_str().unwrap().to_owned()).collect(), code)
}

#[test]
fn a_network_behind_a_host_is_let_in_where_the_operator_names_it() {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    let site = site(&world);
    // The answers' way: by the underlay, as networks have it that are routed anyway.
    world.hosts[0].netns.ip("route add 10.20.0.0/24 via 192.168.64.2").unwrap();
    let pod = world.hosts[0].pods[0].address;
    assert!(!is_answered(&site, &pod.to_string()), "nobody has named it");
    let told = || {
        let (troubles, code) = troubles(&world, 0);
        let words = "packets from 192.168.64.2 with the inner source 10.20.0.7 are refused";
        let advice = "start the agent with --accept-source 10.20.0.7/32";
        code == Some(3) && troubles.iter().any(|trouble| trouble.contains(words) && trouble.contains(advice))
    };
    assert!(told(), "{:#?}", troubles(&world, 0));

    world.hosts[0].agent = None;
    world.start(0, &["--accept-source", "10.20.0.0/24"]);
    wait_for("the site", SOON, || is_answered(&site, &pod.to_string())).unwrap();
    assert_served(&site, &world.hosts[0].pods[0].netns, pod, "the site");
    wait_for("no trouble", SOON, || troubles(&world, 0) == (Vec::new(), Some(0))).unwrap();
}

#[test]
fn a_network_behind_this_host_gets_packets_where_the_operator_names_it() {
    let mut world = World::new(2);
    // The first is flannel's, and routes the network as an operator has it there.
    let kernel = world.hosts[0].become_kernel_vxlan(&world.store, 200).unwrap();
    world.hosts[0].add_pod_in(&kernel.subnet).unwrap();
    world.start(1, &[]);
    let subnet = world.hosts[1].wait_ready().unwrap();
    world.hosts[1].add_pod().unwrap();
    let third_octet = subnet.gateway.octets()[2];
    world.hosts[0].add_kernel_peer_from(&world.store, third_octet).unwrap();
    world.wait_connected(0, 1);
    let site = site(&world);
    let overlay = format!("10.5.{third_octet}.0");
    world.hosts[0].netns.ip(&format!("route add 10.20.0.0/24 via {overlay} dev flannel.1 onlink")).unwrap();
    let pod = &world.hosts[0].pods[0].netns;
    assert!(!is_answered(pod, "10.20.0.7"), "nobody has named it");
    let (told, code) = troubles(&world, 1);
    assert_eq!(code, Some(3));
    let words = "packets from 192.168.64.1 with the inner destination 10.20.0.7 are refused";
    assert!(told.iter().any(|trouble| trouble.contains(words)), "{told:#?}");

    world.hosts[1].agent = None;
    world.start(1, &["--accept-source=10.20.0.0/24"]);
    wait_for("the site", SOON, || is_answered(&world.hosts[0].pods[0].netns, "10.20.0.7")).unwrap();
    assert_served(&world.hosts[0].pods[0].netns, &site, Ipv4Addr::new(10, 20, 0, 7), "the site");
}

#[test]
fn a_prefix_that_is_none_is_said() {
    for (prefix, words) in [
        ("10.20.0.0", "expected an IPv4 prefix such as 10.20.0.0/16"),
        ("10.20.0.7/16", "the prefix is 10.20.0.0/16"),
        ("fd00::/64", "expected an IPv4 prefix"),
        ("127.0.0.0/8", "no host has these addresses"),
    ] {
        let result = std::process::Command::new(agent()).args(["--accept-source", prefix]).output().unwrap();
        let said = String::from_utf8(result.stderr).unwrap();
        assert_eq!(result.status.code(), Some(2), "{said}");
        assert!(said.contains("--accept-source") && said.contains(words), "{said}");
    }
}

#[test]
fn a_network_of_class_e_carries_packets_as_the_kernel_routes_them() {
    let world = World::without_config(2);
    let config = r#"{"Network": "240.5.0.0/16", "Backend": {"Type": "vxlan"}}"#;
    world.store.put(&format!("{PREFIX}/config"), config).unwrap();
    let mut world = world.with_ready_agents(&[]);
    world.hosts[0].add_pod().unwrap();
    // And by the plugins that ours delegates to.
    let runtime = Runtime::new(&world.hosts[1], agent().parent().unwrap()).unwrap().alone();
    world.hosts[1].attach_pod(&runtime).unwrap();
    world.wait_connected(0, 1);
    assert_hosts_talk(&world);
    let (client, server) = (&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    assert_served(&client.netns, &server.netns, server.address, "pods of class E");
}
