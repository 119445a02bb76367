//! The host-gw backend, past the stack and by it, beside hosts of flannel's.

use std::{
    collections::BTreeSet,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use xtask::{
    lab::{Host, LeaseStore as _, PREFIX, Subnet, capture::Capture},
    progress::wait_for,
    transfer::tcp_transfer,
};

use crate::{
    stream::Stream,
    world::{SOON, World, is_answered},
};

/// The third octet of the subnet of flannel's host, which is the last.
const FLANNELS: u8 = 200;

fn config(backend: &str) -> String {
    let subnets = r#""SubnetMin": "10.5.128.0", "SubnetMax": "10.5.191.0""#;
    format!(r#"{{"Network": "10.5.0.0/16", {subnets}, "Backend": {backend}}}"#)
}

impl World {
    /// Hosts of a network with this backend.
    pub fn with_backend(hosts: u8, backend: &str) -> Self {
        let world = Self::without_config(hosts);
        world.store.put(&format!("{PREFIX}/config"), &config(backend)).unwrap();
        world
    }

    /// Starts the agent anew with another backend in the store.
    fn change_backend(&mut self, host: usize, backend: &str) {
        self.store.put(&format!("{PREFIX}/config"), &config(backend)).unwrap();
        self.stop(host);
        self.start(host, &[]);
        self.hosts[host].wait_ready().unwrap();
    }

    fn stop(&mut self, host: usize) {
        let mut agent = self.hosts[host].agent.take().unwrap();
        agent.signal(Signal::SIGTERM).unwrap();
        agent.wait(SOON).unwrap();
    }
}

/// Makes a host one of flannel's host-gw: a lease, and routes to others (pkg/backend/hostgw, pkg/backend/route_network.go).
fn become_host_gw(host: &mut Host, world_store: &xtask::lab::Store) {
    let subnet = Ipv4Addr::new(10, 5, FLANNELS, 0);
    let value = format!(r#"{{"PublicIP":"{}","PublicIPv6":null,"BackendType":"host-gw"}}"#, host.address);
    world_store.put(&format!("{PREFIX}/subnets/{subnet}-24"), &value).unwrap();
    host.netns.exec("sysctl -qw net.ipv4.ip_forward=1").unwrap();
    host.add_pod_in(&Subnet { gateway: Ipv4Addr::new(10, 5, FLANNELS, 1), len: 24, mtu: 1500 }).unwrap();
}

fn add_routes(host: &Host, store: &xtask::lab::Store) {
    for (key, value) in store.list(&format!("{PREFIX}/subnets/")).unwrap() {
        let subnet = key.rsplit('/').next().unwrap().replace("-24", "/24");
        let via = value.split('"').nth(3).unwrap();
        if via != host.address.to_string() {
            host.netns.ip(&format!("route replace {subnet} via {via} dev eth0")).unwrap();
        }
    }
}

/// Two hosts of ours, and one of flannel's.
fn mixed(backend: &str) -> World {
    let mut world = World::with_backend(3, backend);
    for host in &world.hosts {
        host.netns.exec("sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.default.rp_filter=1").unwrap();
    }
    become_host_gw(&mut world.hosts[2], &world.store);
    (0..2).for_each(|host| world.start(host, &[]));
    for host in &mut world.hosts[..2] {
        host.wait_ready().unwrap();
        host.add_pod().unwrap();
    }
    add_routes(&world.hosts[2], &world.store);
    world
}

fn talks(world: &World) {
    let pairs = (0..3).flat_map(|from| (0..3).map(move |to| [from, to]));
    for [from, to] in pairs.filter(|pair| pair[0] != pair[1]) {
        let address = world.hosts[to].pods[0].address.to_string();
        for (what, netns) in [("pod", &world.hosts[from].pods[0].netns), ("host", &world.hosts[from].netns)] {
            let waited = wait_for("an answer", SOON, || is_answered(netns, &address));
            assert!(waited.is_ok(), "{what} of {from} to {to}: {:#}", world.status(from % 2));
            let ping = netns.exec(&format!("ping -c 5 -i 0.05 -W 2 -M do -s 1472 {address}")).unwrap();
            assert!(ping.contains("5 received"), "{what} of {from} to {to}: {ping}");
        }
    }
    for [from, to] in [[0, 1], [1, 0], [0, 2], [2, 0]] {
        let (from, to) = (&world.hosts[from].pods[0], &world.hosts[to].pods[0]);
        let transfer = tcp_transfer(&from.netns, &to.netns, to.address, 1, world.lab.directory()).unwrap();
        assert!(transfer.is_flowing(), "{} Gb/s from {} to {}", transfer.gbits, from.address, to.address);
    }
    for label in ["pod_direct", "direct_delivered", "routed", "direct_received"] {
        assert!(world.counter(0, label) > 0, "{label}");
    }
}

#[test]
fn hosts_of_ours_and_flannels_talk_at_the_interfaces_mtu() {
    let world = mixed(r#"{"Type": "host-gw"}"#);
    assert_eq!(world.hosts[0].subnet().unwrap().mtu, 1500);
    talks(&world);
    let netns = &world.hosts[0].netns;
    assert!(netns.ip("link show flannel.1").is_err());
    let routes = netns.exec("ip route").unwrap();
    // That of flannel's host is outside the range that has one route.
    assert!(!routes.contains("via 192.168.64.2 ") && routes.contains("10.5.200.0/24 via 192.168.64.3"), "{routes}");
    let (key, value) = world.lease_of(0);
    assert_eq!(value, r#"{"PublicIP":"192.168.64.1","PublicIPv6":null,"BackendType":"host-gw"}"#, "{key}");
    // As flannel's: the stack sends from the interface's address, and out by it.
    let (to, from) = (world.hosts[1].pods[0].address, "192.168.64.1");
    let route = netns.exec(&format!("ip route get {to}")).unwrap();
    assert!(route.contains("dev eth0") && route.contains(&format!("src {from}")), "{route}");
    let status = xtask::process::output(world.agent_on(0).arg("status")).unwrap();
    assert!(status.contains("host-gw") && status.contains("2 direct") && status.contains("all is well"), "{status}");
}

#[test]
fn each_lease_has_a_route_of_the_kernels_where_that_is_asked_for() {
    let world = mixed(r#"{"Type": "host-gw", "KernelRoutes": true}"#);
    talks(&world);
    let netns = &world.hosts[0].netns;
    let octet = world.hosts[1].subnet().unwrap().gateway.octets()[2];
    let own = format!("10.5.{octet}.0/24 via 192.168.64.2");
    let routes = || netns.exec("ip route").unwrap();
    assert!(routes().contains(&own) && routes().contains("10.5.200.0/24 via 192.168.64.3"), "{}", routes());
    assert!(!routes().contains("169.254.1.1"), "{}", routes());
    // One that is gone comes back, one that is another's stays and is said.
    netns.ip(&format!("route delete 10.5.{octet}.0/24")).unwrap();
    wait_for("the route", SOON, || routes().contains(&own)).unwrap();
    netns.ip(&format!("route replace 10.5.{octet}.0/24 via 192.168.64.254 dev eth0")).unwrap();
    world.wait_status(0, "a route of another's", |status| status["drift"]["waiting"]["routes of leases"].is_string());
    netns.ip(&format!("route delete 10.5.{octet}.0/24 via 192.168.64.254")).unwrap();
    wait_for("the route", SOON, || routes().contains(&own)).unwrap();
    world.wait_status(0, "all is well", |status| status["drift"]["waiting"]["routes of leases"].is_null());
}

#[test]
fn the_shared_routes_neighbour_comes_back_at_once() {
    let world = World::with_backend(2, r#"{"Type": "host-gw"}"#).ready(&[]);
    world.wait_connected(0, 1);
    let netns = &world.hosts[0].netns;
    let shared = || netns.exec("ip neigh show 169.254.1.1 dev eth0").unwrap();
    let made = shared();
    assert!(made.contains("PERMANENT"), "{made}");
    let begun = Instant::now();
    for _ in 0..3 {
        for change in ["delete 169.254.1.1", "replace 169.254.1.1 lladdr 02:00:00:00:00:77 nud permanent"] {
            netns.ip(&format!("neigh {change} dev eth0")).unwrap();
            wait_for("the neighbour", SOON, || shared() == made).unwrap();
        }
    }
    // Without an event each takes until the next comparison of everything: six of them, 50 s and more.
    assert!(begun.elapsed() < Duration::from_secs(40), "{:?}", begun.elapsed());
}

#[test]
fn a_network_changes_its_backend_and_nothing_of_the_old_one_stays() {
    let mut world = World::with_backend(2, r#"{"Type": "vxlan"}"#).ready(&[]);
    world.wait_connected(0, 1);
    let state = |world: &World| {
        let netns = &world.hosts[0].netns;
        [
            netns.exec("ip -o link"),
            netns.exec("ip route"),
            netns.exec("ip neigh"),
            netns.exec("bridge fdb show dev eth0"),
        ]
        .map(Result::unwrap)
        .concat()
    };
    let settled = |world: &World, is_so: fn(&str) -> bool| {
        let waited = wait_for("the backend", SOON, || is_so(&state(world)));
        assert!(waited.is_ok(), "{}\n{}", state(world), world.hosts[0].agent.as_ref().unwrap().log());
        world.wait_connected(0, 1);
    };
    for _ in 0..2 {
        (0..2).for_each(|host| world.change_backend(host, r#"{"Type": "host-gw"}"#));
        settled(&world, |now| !now.contains("flannel.1") && now.contains("169.254.1.1 dev eth0"));
        (0..2).for_each(|host| world.change_backend(host, r#"{"Type": "host-gw", "KernelRoutes": true}"#));
        settled(&world, |now| !now.contains("flannel.1") && !now.contains("169.254.1.1"));
        (0..2).for_each(|host| world.change_backend(host, r#"{"Type": "vxlan"}"#));
        settled(&world, |now| {
            let has_left = now.contains("169.254.1.1 dev eth0") || now.contains("via 192.168.64.2 ");
            now.contains("flannel.1") && !has_left
        });
        let status = world.status(0);
        let hooks = status["dataplane"]["hooks"].as_array().unwrap();
        assert!(hooks.iter().all(|hook| hook["state"] == "attached"), "{status:#}");
    }
    // And flannel's: routes of its host-gw, then ours in their place.
    world.change_backend(1, r#"{"Type": "host-gw"}"#);
    world.stop(0);
    wait_for("its lease", SOON, || world.lease_of(1).1.contains("host-gw")).unwrap();
    add_routes(&world.hosts[0], &world.store);
    world.start(0, &[]);
    world.hosts[0].wait_ready().unwrap();
    settled(&world, |now| now.contains("169.254.1.1 dev eth0") && !now.contains("via 192.168.64.2 "));

    world.stop(0);
    xtask::process::output(world.agent_on(0).arg("cleanup")).unwrap();
    let now = state(&world);
    assert!(!now.contains("proto 72") && !now.contains("169.254.1.1"), "{now}");
    assert!(!world.hosts[0].pin_dir().exists());
}

#[test]
fn datagrams_are_not_lost_while_agents_restart() {
    let mut world = World::with_backend(2, r#"{"Type": "host-gw"}"#).ready(&[]);
    world.wait_connected(0, 1);
    let stream = Stream::start(&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    for host in [0, 1, 0] {
        world.stop(host);
        world.start(host, &[]);
        world.hosts[host].wait_ready().unwrap();
    }
    let (sent, arrived) = stream.end();
    let arrived: BTreeSet<_> = arrived.into_iter().collect();
    let lost: Vec<_> = (0..sent).filter(|number| !arrived.contains(number)).take(20).collect();
    assert!(lost.is_empty(), "of {sent} {} arrived; lost are {lost:?}, ...", arrived.len());
}

#[test]
fn what_somebody_captures_on_the_interface_is_as_with_flannel() {
    let world = World::with_backend(2, r#"{"Type": "host-gw"}"#).ready(&[]);
    world.wait_connected(0, 1);
    let (one, two) = (&world.hosts[0], &world.hosts[1]);
    let mut capture = Capture::start(&one.netns, "eth0", "icmp", world.lab.directory()).unwrap();
    one.pods[0].netns.exec(&format!("ping -c 5 -i 0.05 {}", two.pods[0].address)).unwrap();
    capture.end_after(10).unwrap();
    let macs = capture.decoded(&["-T", "fields", "-e", "eth.dst", "-e", "ip.ttl"]).unwrap();
    let mac = |host: &Host| {
        let links = host.netns.ip_json("link show eth0").unwrap();
        links[0]["address"].as_str().unwrap().to_owned()
    };
    let expected = format!("{}\t63\n{}\t63\n", mac(two), mac(one)).repeat(5);
    assert_eq!(macs, expected);
}

#[test]
fn a_host_behind_a_nat_is_refused_as_by_flannel() {
    let mut world = World::with_backend(1, r#"{"Type": "host-gw"}"#);
    world.start(0, &["--iface=eth0", "--public-ip=203.0.113.7"]);
    let agent = world.hosts[0].agent.as_mut().unwrap();
    assert_eq!(agent.wait(SOON).unwrap().code(), Some(78));
    assert!(agent.log().contains("your PublicIP differs from interface IP"), "{}", agent.log());
    assert!(!agent.log().contains("lease 10.5"), "{}", agent.log());
    world.assert_untouched(0);
    assert!(world.store.list(&format!("{PREFIX}/subnets/")).unwrap().is_empty());
}

#[test]
fn a_peer_behind_a_router_is_named_and_costs_only_itself() {
    let world = World::with_backend(2, r#"{"Type": "host-gw"}"#).ready(&[]);
    world.wait_connected(0, 1);
    let value = r#"{"PublicIP":"203.0.113.9","BackendType":"host-gw"}"#;
    // None that a host has taken, and among those that have one route.
    let taken = [0, 1].map(|host| world.hosts[host].subnet().unwrap().gateway.octets()[2]);
    let free = (150..153).find(|octet| !taken.contains(octet)).unwrap();
    world.store.put(&format!("{PREFIX}/subnets/10.5.{free}.0-24"), value).unwrap();
    world.wait_status(0, "the peer", |status| {
        let said = status["drift"]["waiting"]["peers on the link"].as_str().unwrap_or_default();
        said.contains("203.0.113.9") && said.contains("use vxlan")
    });
    is_answered(&world.hosts[0].pods[0].netns, &format!("10.5.{free}.2"));
    wait_for("the counter", SOON, || world.counter(0, "routed_not_on_link") > 0).unwrap();
    world.wait_connected(0, 1);
    assert!(world.store.leases().unwrap_or_default().len() < 4);
}
