//! Two Docker Engines with the options that `docker-opts` writes, each in the network namespace of a host, and a container
//! on each.
//!
//! * [`engine`] — one of them

mod engine;

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddrV4},
};

use xtask::{
    lab::{Host, Netns, capture::Capture},
    process::output,
    transfer::tcp_transfer,
};

use self::engine::{Engine, assert_gone, options_file};
use crate::{
    bypass::assert_bulk_tcp_passes_by,
    netfilter::{OUTSIDE, overlay_address, seen_as},
    world::World,
};

const PORT: u16 = 7000;
const ANY: Ipv4Addr = Ipv4Addr::UNSPECIFIED;
const CONTAINER: &str = "container";

/// Hosts with agent, Docker, and a container that is their first pod.
fn world(arguments: &[&str]) -> (World, Vec<Engine>) {
    let mut world = World::new(2);
    for host in &world.hosts {
        // As its package starts it. Where the host did not forward before, it drops by policy from then on.
        drop(Engine::start(host));
        assert_eq!(policy(host), "-P FORWARD DROP");
    }
    for host in 0..2 {
        world.start(host, arguments);
        world.hosts[host].wait_ready().unwrap();
    }
    let mut engines = Vec::new();
    for host in 0..2 {
        let (env, options) = (world.hosts[host].run_dir().join("subnet.env"), options_file(&world.hosts[host]));
        output(world.agent_on(host).args(["docker-opts", "-f"]).arg(env).arg("-d").arg(options)).unwrap();
        let engine = Engine::start(&world.hosts[host]);
        engine.import_image();
        world.hosts[host].pods.push(engine.run(CONTAINER));
        engines.push(engine);
    }
    world.wait_connected(0, 1);
    (world, engines)
}

/// What becomes of what no rule of `FORWARD` decides on.
fn policy(host: &Host) -> String {
    host.netns.exec("iptables -S FORWARD").unwrap().lines().next().unwrap().to_owned()
}

#[test]
fn containers_reach_each_other_by_their_own_addresses() {
    let (world, engines) = world(&["--ip-masq"]);
    let [one, two] = [&world.hosts[0], &world.hosts[1]];
    let [first, second] = [&one.pods[0], &two.pods[0]];
    for (host, engine) in world.hosts.iter().zip(&engines) {
        let (subnet, pod) = (host.subnet().unwrap(), &host.pods[0]);
        assert_eq!(overlay_address(&pod.address), overlay_address(&subnet.gateway));
        let mtu = engine.docker(&format!("exec {CONTAINER} busybox cat /sys/class/net/eth0/mtu"));
        assert_eq!(mtu.trim(), subnet.mtu.to_string());
        // Still; and the agent has rules for it.
        assert_eq!(policy(host), "-P FORWARD DROP");
    }
    for (engine, address) in engines.iter().zip([second.address, first.address]) {
        engine.docker(&format!("exec {CONTAINER} busybox ping -c 1 -W 5 {address}"));
    }
    let picture = picture(&world, &engines);
    assert_eq!(picture, PICTURE, "{picture}");

    let [to_first, to_second] = [first, second].map(|pod| SocketAddrV4::new(pod.address, PORT));
    assert_eq!(seen_as(&first.netns, ANY, &second.netns, to_second), first.address);
    assert_eq!(seen_as(&second.netns, ANY, &first.netns, to_first), second.address);
    for host in &world.hosts {
        let outside = SocketAddrV4::new(OUTSIDE, PORT);
        assert_eq!(seen_as(&host.pods[0].netns, ANY, &world.lab.underlay, outside), host.address);
    }

    let totals = || {
        let bridged: u64 = world.hosts.iter().map(|host| received_by(&host.netns, "docker0")).sum();
        (bridged, world.counter(0, "pod_encapsulated") + world.counter(1, "pod_encapsulated"))
    };
    let before = totals();
    assert_bulk_tcp_passes_by(&world);
    let after = totals();
    let (bridged, fast) = (after.0 - before.0, after.1 - before.1);
    assert!(bridged < fast / 4, "{bridged} by docker0, {fast} past it");

    drop(engines);
    world.hosts.iter().for_each(assert_gone);
}

#[test]
fn without_ip_masq_docker_masquerades_as_with_flannel() {
    let (world, _engines) = world(&[]);
    let [first, second] = [&world.hosts[0].pods[0], &world.hosts[1].pods[0]];
    let seen = seen_as(&first.netns, ANY, &second.netns, SocketAddrV4::new(second.address, PORT));
    assert_eq!(seen, overlay_address(&first.address));
    let outside = SocketAddrV4::new(OUTSIDE, PORT);
    assert_eq!(seen_as(&first.netns, ANY, &world.lab.underlay, outside), world.hosts[0].address);
    // What is translated takes the stack of the host that translates it.
    tcp_transfer(&first.netns, &second.netns, second.address, 1, world.lab.directory()).unwrap();
    assert_eq!(world.counter(0, "pod_encapsulated"), 0);
}

fn received_by(netns: &Netns, device: &str) -> u64 {
    netns.ip_json(&format!("-s link show {device}")).unwrap()[0]["stats64"]["rx"]["packets"].as_u64().unwrap()
}

/// An echo on its way from one container to the other, then the answer, at each station: MAC addresses, IPv4 addresses, time
/// to live, tunnel port, VNI, type; of a tunnel packet first the outer ones. As flannel's shows it.
const PICTURE: &str = "\
container@1: container@1 docker0@1 c1 c2 64 8
veth@1: container@1 docker0@1 c1 c2 64 8
docker0@1: container@1 docker0@1 c1 c2 64 8
flannel@1: flannel@1 flannel@2 c1 c2 63 8
eth0@1: eth0@1,flannel@1 eth0@2,flannel@2 node1,c1 node2,c2 64,63 8472 1 8
eth0@2: eth0@1,flannel@1 eth0@2,flannel@2 node1,c1 node2,c2 64,63 8472 1 8
flannel@2: flannel@1 flannel@2 c1 c2 63 8
docker0@2: docker0@2 container@2 c1 c2 62 8
veth@2: docker0@2 container@2 c1 c2 62 8
container@2: docker0@2 container@2 c1 c2 62 8
container@2: container@2 docker0@2 c2 c1 64 0
veth@2: container@2 docker0@2 c2 c1 64 0
docker0@2: container@2 docker0@2 c2 c1 64 0
flannel@2: flannel@2 flannel@1 c2 c1 63 0
eth0@2: eth0@2,flannel@2 eth0@1,flannel@1 node2,c2 node1,c1 64,63 8472 1 0
eth0@1: eth0@2,flannel@2 eth0@1,flannel@1 node2,c2 node1,c1 64,63 8472 1 0
flannel@1: flannel@2 flannel@1 c2 c1 63 0
docker0@1: docker0@1 container@1 c2 c1 62 0
veth@1: docker0@1 container@1 c2 c1 62 0
container@1: docker0@1 container@1 c2 c1 62 0
";

/// The same of a ping from the first host's container to the second's.
fn picture(world: &World, engines: &[Engine]) -> String {
    let mut names = HashMap::new();
    let mut captures = Vec::new();
    for (host, number) in world.hosts.iter().zip(1..) {
        let pod = &host.pods[0];
        let ports = host.netns.ip_json("link show master docker0").unwrap();
        let mut stations = [
            (&pod.netns, "eth0", "container", 2),
            (&host.netns, ports[0]["ifname"].as_str().unwrap(), "veth", 2),
            (&host.netns, "docker0", "docker0", 2),
            (&host.netns, "flannel.1", "flannel", 2),
            (&host.netns, "eth0", "eth0", 2),
        ];
        if number == 2 {
            stations.reverse();
        }
        for (netns, device, name, packets) in stations {
            let name = format!("{name}@{number}");
            let link = netns.ip_json(&format!("link show {device}")).unwrap();
            names.insert(link[0]["address"].as_str().unwrap().to_owned(), name.clone());
            let filter = "icmp or udp port 8472";
            let capture = Capture::start(netns, device, filter, world.lab.directory()).unwrap();
            captures.push((name, packets, capture));
        }
        names.insert(pod.address.to_string(), format!("c{number}"));
        names.insert(host.address.to_string(), format!("node{number}"));
    }
    for host in 0..2 {
        world.wait_status(host, "the captures", |status| {
            let restrictions = status["bypass"]["restrictions"].as_array();
            restrictions.is_some_and(|all| all.iter().any(|restriction| restriction["scope"] == "overlay_capture"))
        });
    }
    engines[0].docker(&format!("exec {CONTAINER} busybox ping -c 1 {}", world.hosts[1].pods[0].address));

    let fields = ["eth.src", "eth.dst", "ip.src", "ip.dst", "ip.ttl", "udp.dstport", "vxlan.vni", "icmp.type"];
    let fields = fields.iter().flat_map(|field| ["-e", field]);
    let arguments: Vec<_> = ["-T", "fields", "-E", "aggregator=,"].into_iter().chain(fields).collect();
    let named = |value: &str| names.get(value).cloned().unwrap_or_else(|| value.to_owned());
    let (mut echoes, mut answers) = (Vec::new(), Vec::new());
    for (station, packets, mut capture) in captures {
        capture.end_after(packets).unwrap();
        for packet in capture.decoded(&arguments).unwrap().lines() {
            let fields = packet.split('\t').filter(|field| !field.is_empty());
            let fields = fields.map(|field| field.split(',').map(named).collect::<Vec<_>>().join(","));
            let line = format!("{station}: {}\n", fields.collect::<Vec<_>>().join(" "));
            if packet.ends_with('8') { echoes.push(line) } else { answers.insert(0, line) }
        }
    }
    [echoes, answers].concat().concat()
}
