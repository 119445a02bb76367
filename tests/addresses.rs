//! Addresses and interfaces that move: which of its addresses a host goes by, and that pods notice nothing while others come, go
//! and fail over. A bond is a bridge here, and a VLAN a macvlan: to the agent both are links with an address like any other.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Instant,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;
use xtask::{
    lab::{Lab, Netns},
    progress::wait_for,
};

use crate::{
    drift::Talk,
    drift_external::{RULES, public_ip},
    udp::forwarder,
    world::{SOON, World},
};

/// An address that moves from host to host, as keepalived and kube-vip make it: by itself, or in the prefix of the host's own.
const FLOATING: [&str; 2] = ["192.168.64.100/32", "192.168.64.100/24"];
/// Of an address that a DHCP server gave.
const LEASED: &str = "valid_lft 3600 preferred_lft 3600";

/// Runs command lines on a host.
fn on_host(world: &World, host: usize, lines: &[&str]) {
    for line in lines {
        world.hosts[host].netns.exec(line).unwrap_or_else(|error| panic!("{line}: {error:#}"));
    }
}

/// The same on the underlay.
fn on_underlay(lab: &Lab, lines: &[&str]) {
    for line in lines {
        lab.underlay.exec(line).unwrap_or_else(|error| panic!("{line}: {error:#}"));
    }
}

fn restart(world: &mut World, host: usize, arguments: &[&str]) {
    world.start(host, arguments);
    world.wait_log(host, "carries");
}

/// Has the underlay's gateway forward between hosts, also back by where it came from, without telling them of a shorter way.
fn forward(lab: &Lab) {
    let redirects = ["all", "br0"].map(|device| format!("sysctl -qw net.ipv4.conf.{device}.send_redirects=0"));
    on_underlay(lab, &["sysctl -qw net.ipv4.ip_forward=1", &redirects[0], &redirects[1]]);
}

/// Two hosts, of which the first has its address from a DHCP server.
fn with_leased_address() -> World {
    let world = World::new(2);
    on_host(&world, 0, &[&format!("ip address change 192.168.64.1/24 dev eth0 {LEASED}")]);
    world
}

/// Waits until a host goes by an address, as its lease, its device and its status say it, and nothing is wrong.
fn wait_goes_by(world: &World, host: usize, key: &str, address: &str) {
    let state = || {
        let link = world.hosts[host].netns.ip_json("-d link show flannel.1").unwrap()[0].take();
        let mut status = world.status(host);
        let (ip, losses) = (status["status"]["publicIp"].take(), status["status"]["lease"]["losses"].take());
        let local = link["linkinfo"]["info_data"]["local"].clone();
        json!([public_ip(world, key), local, ip, losses, status["running"], status["troubles"]])
    };
    let waited = wait_for("the address", SOON, || state() == json!([address, address, address, 0, true, []]));
    assert!(waited.is_ok(), "not {address}: {:#}\n{}", state(), world.hosts[host].agent.as_ref().unwrap().log());
}

/// Asserts that a host's agent never saw another external interface than its first.
fn assert_never_moved(world: &World, host: usize) {
    let log = world.hosts[host].agent.as_ref().unwrap().log();
    assert!(!log.contains("repaired (external_interface)"), "{log}");
}

#[test]
fn a_floating_address_is_no_hosts_own() {
    let mut world = with_leased_address().ready(&[]);
    world.wait_connected(0, 1);
    let (key, lease) = world.lease_of(0);
    let of_address: &[&str] = &["--iface-regex=^192\\.168\\.64\\."];
    for floating in FLOATING {
        let (come, go) =
            (format!("ip address add {floating} dev eth0"), format!("ip address delete {floating} dev eth0"));
        for rule in RULES.iter().chain([&of_address]) {
            let traffic = [world.traffic(0, 1), world.traffic(1, 0)];
            on_host(&world, 0, &[&come]);
            restart(&mut world, 0, rule);
            wait_goes_by(&world, 0, &key, "192.168.64.1");
            // It fails over, and back.
            for _ in 0..2 {
                on_host(&world, 0, &[&go]);
                on_host(&world, 1, &[&come]);
                on_host(&world, 1, &[&go]);
                on_host(&world, 0, &[&come]);
            }
            on_host(&world, 0, &[&go]);
            restart(&mut world, 1, rule);
            traffic.into_iter().for_each(|traffic| traffic.assert_nothing_was_lost());
            (0..2).for_each(|host| assert_never_moved(&world, host));
        }
    }
    assert_eq!(world.lease_of(0).1, lease);
}

#[test]
fn a_floating_address_that_was_there_first_is_no_hosts_own() {
    let world = World::new(2);
    // Its own address is added anew, behind the other.
    on_host(
        &world,
        0,
        &[
            "ip address flush dev eth0",
            "ip address add 192.168.64.100/32 dev eth0",
            "ip address add 192.168.64.1/24 dev eth0",
            "ip route replace default via 192.168.64.254",
        ],
    );
    let world = world.ready(&[]);
    world.wait_connected(0, 1);
    wait_goes_by(&world, 0, &world.lease_of(0).0, "192.168.64.1");
}

#[test]
fn the_own_address_is_waited_for_where_only_a_floating_one_is_left() {
    for floating in FLOATING {
        let talk = Talk::between(with_leased_address().ready(&[]));
        let (world, key) = (&talk.world, talk.world.lease_of(0).0);
        let lost = "192.168.64.1, and 192.168.64.100 of eth0 may be one that moves from host to host";
        // Else an address in the same prefix goes with the first.
        on_host(world, 0, &["sysctl -qw net.ipv4.conf.all.promote_secondaries=1"]);
        on_host(
            world,
            0,
            &[&format!("ip address add {floating} dev eth0"), "ip address delete 192.168.64.1/24 dev eth0"],
        );
        world.wait_log(0, lost);
        wait_for("the trouble", SOON, || world.status(0)["troubles"].to_string().contains(lost)).unwrap();
        assert_eq!(public_ip(world, &key), "192.168.64.1");
        let back = format!("ip address add 192.168.64.1/24 dev eth0 {LEASED}");
        let is_waiting = || !world.status(0)["status"]["drift"]["waiting"].as_object().unwrap().is_empty();
        talk.flows_again(floating, |world| on_host(world, 0, &[&back]), || !is_waiting());
        assert_never_moved(world, 0);
        wait_goes_by(world, 0, &key, "192.168.64.1");

        // It stays away for long: better this one than none, until it is back.
        on_host(world, 0, &["ip address delete 192.168.64.1/24 dev eth0"]);
        wait_for("the other", SOON, || public_ip(world, &key) == "192.168.64.100").unwrap();
        world.wait_status(0, "the other", |status| status["publicIp"] == "192.168.64.100");
        let is_followed = || public_ip(world, &key) == "192.168.64.1";
        talk.flows_again(floating, |world| on_host(world, 0, &[&back]), is_followed);
        wait_goes_by(world, 0, &key, "192.168.64.1");
    }
}

#[test]
fn a_leased_address_that_is_replaced_is_followed() {
    let talk = Talk::between(with_leased_address().ready(&[]));
    let key = talk.world.lease_of(0).0;
    on_host(&talk.world, 0, &[&format!("ip address add {} dev eth0", FLOATING[0])]);
    let renewed = format!("ip address change 192.168.64.1/24 dev eth0 {LEASED}");
    on_host(&talk.world, 0, &[&renewed]);
    talk.heals("another lease", "external_interface", &[], |world| {
        let lines = [
            "ip address delete 192.168.64.1/24 dev eth0",
            &format!("ip address add 192.168.64.11/24 dev eth0 {LEASED}"),
            "ip route replace default via 192.168.64.254",
        ];
        on_host(world, 0, &lines);
    });
    wait_goes_by(&talk.world, 0, &key, "192.168.64.11");
}

/// A cloud's hosts: each has no more than its own address, and everything, the other hosts too, is behind the gateway.
#[test]
fn addresses_without_a_prefix_and_a_gateway_on_the_link() {
    let world = World::new(2);
    forward(&world.lab);
    for host in 0..2 {
        let address = format!("ip address add {}/32 dev eth0 {LEASED}", world.hosts[host].address);
        let routes = ["ip route add 192.168.64.254 dev eth0 scope link", "ip route add default via 192.168.64.254"];
        on_host(&world, host, &["ip address flush dev eth0", &address]);
        on_host(&world, host, &routes);
    }
    let mut talk = Talk::between(world.ready(&[]));
    let key = talk.world.lease_of(0).0;
    on_host(&talk.world, 0, &[&format!("ip address add {} dev eth0", FLOATING[0])]);
    restart(&mut talk.world, 0, &[]);
    wait_goes_by(&talk.world, 0, &key, "192.168.64.1");
    talk.heals("another lease", "external_interface", &["next_hop"], |world| {
        let address = format!("ip address add 192.168.64.11/32 dev eth0 {LEASED}");
        on_host(world, 0, &[&address, "ip address delete 192.168.64.1/32 dev eth0"]);
    });
    wait_goes_by(&talk.world, 0, &key, "192.168.64.11");
}

#[test]
fn of_several_addresses_it_is_flannels() {
    let world = World::new(2);
    on_host(
        &world,
        0,
        &[
            "ip address flush dev eth0",
            "ip address add 169.254.7.7/16 dev eth0",
            "ip address add 192.168.60.1/24 dev eth0 preferred_lft 0",
            &format!("ip address add 192.168.61.1/24 dev eth0 {LEASED}"),
            "ip address add 192.168.64.1/24 dev eth0",
            "ip address add 192.168.64.12/24 dev eth0",
            "ip address add 192.168.63.1/24 dev eth0",
            "ip route replace default via 192.168.64.254",
        ],
    );
    let world = world.ready(&[]);
    world.wait_connected(0, 1);
    let key = world.lease_of(0).0;
    wait_goes_by(&world, 0, &key, "192.168.64.1");
    let traffic = [world.traffic(0, 1), world.traffic(1, 0)];
    for others in ["169.254.7.7/16", "192.168.60.1/24", "192.168.61.1/24", "192.168.64.12/24", "192.168.63.1/24"] {
        on_host(&world, 0, &[&format!("ip address delete {others} dev eth0")]);
        on_host(&world, 0, &[&format!("ip address add {others} dev eth0")]);
    }
    traffic.into_iter().for_each(|traffic| traffic.assert_nothing_was_lost());
    assert_never_moved(&world, 0);
    wait_goes_by(&world, 0, &key, "192.168.64.1");
}

#[test]
fn of_two_default_routes_it_is_the_one_that_the_kernel_takes() {
    let mut world = World::new(2);
    forward(&world.lab);
    on_underlay(&world.lab, &["ip address add 192.168.65.254/24 dev br0"]);
    let peer = format!("peer name eth1 netns {}", world.hosts[0].netns.name());
    on_underlay(&world.lab, &[&format!("ip link add second type veth {peer}"), "ip link set second master br0 up"]);
    on_host(&world, 0, &["ip address add 192.168.65.1/24 dev eth1", "ip link set eth1 up", "ip route delete default"]);
    let by_first = |metric| format!("ip route add default via 192.168.64.254 dev eth0 metric {metric}");
    let by_second = "ip route add default via 192.168.65.254 dev eth1 metric 100";
    on_host(&world, 0, &[&by_first(200), by_second]);
    world.hosts[0].address = [192, 168, 65, 1].into();
    let mut world = world.ready(&[]);
    world.wait_connected(0, 1);
    let key = world.lease_of(0).0;
    wait_goes_by(&world, 0, &key, "192.168.65.1");
    // The interface is there, so it is no reason to leave.
    let traffic = [world.traffic(0, 1), world.traffic(1, 0)];
    on_host(&world, 0, &["ip route delete default metric 100", by_second, &by_first(50)]);
    traffic.into_iter().for_each(|traffic| traffic.assert_nothing_was_lost());
    assert_never_moved(&world, 0);
    world.hosts[0].address = [192, 168, 64, 1].into();
    restart(&mut world, 0, &[]);
    world.wait_status(0, "the other", |status| {
        (&status["externalInterface"], &status["publicIp"]) == (&"eth0".into(), &"192.168.64.1".into())
    });
}

#[test]
fn a_renamed_interface_is_the_same() {
    for rule in RULES {
        let talk = Talk::start(rule);
        let key = talk.world.lease_of(0).0;
        talk.heals("another name", "external_interface", &["next_hop"], |world| {
            let lines = ["ip link set eth0 down", "ip link set eth0 name lan0", "ip link set lan0 up"];
            on_host(world, 0, &lines);
            on_host(world, 0, &["ip route replace default via 192.168.64.254"]);
        });
        wait_goes_by(&talk.world, 0, &key, "192.168.64.1");
        assert_eq!(talk.world.status(0)["status"]["externalInterface"], "lan0");
    }
}

#[test]
fn a_vlan_is_made_again() {
    let add = ["ip link add link eth0 name vlan5 type macvlan mode bridge", "ip address add 192.168.64.1/24 dev vlan5"];
    let up = ["ip link set vlan5 up", "ip route replace default via 192.168.64.254"];
    for rule in [&[][..], &["--iface-can-reach=192.168.64.254"]] {
        let world = World::new(2);
        on_host(&world, 0, &["ip address flush dev eth0"]);
        on_host(&world, 0, &add);
        on_host(&world, 0, &up);
        let talk = Talk::between(world.ready(rule));
        let key = talk.world.lease_of(0).0;
        for _ in 0..2 {
            on_host(&talk.world, 0, &["ip link delete vlan5"]);
            talk.world.wait_log(0, "the external interface vlan5 is away, waiting for it");
            talk.heals("vlan5 again", "external_interface", &["next_hop"], |world| {
                on_host(world, 0, &add);
                on_host(world, 0, &up);
            });
            wait_goes_by(&talk.world, 0, &key, "192.168.64.1");
        }
    }
}

#[test]
fn a_bond_fails_over_and_back() {
    let world = World::new(2);
    let peer = format!("peer name eth1 netns {}", world.hosts[0].netns.name());
    on_underlay(&world.lab, &[&format!("ip link add standby type veth {peer}"), "ip link set standby master br0 up"]);
    on_host(
        &world,
        0,
        &[
            "ip address flush dev eth0",
            "ip link add bond0 address 0a:00:00:00:00:b0 type bridge",
            "ip link set eth0 master bond0",
            "ip link set bond0 up",
            "ip address add 192.168.64.1/24 dev bond0",
            "ip route add default via 192.168.64.254",
        ],
    );
    let talk = Talk::between(world.ready(&[]));
    let key = talk.world.lease_of(0).0;
    assert_eq!(talk.world.status(0)["status"]["externalInterface"], "bond0");
    let before = talk.repaired();
    for [from, to] in [["eth0", "eth1"], ["eth1", "eth0"]] {
        let since = Instant::now();
        let fail_over = |world: &World| {
            // Never both: they are on one bridge.
            let lines = [format!("ip link set {from} down"), format!("ip link set {from} nomaster")];
            on_host(world, 0, &[&lines[0], &lines[1]]);
            on_host(world, 0, &[&format!("ip link set {to} master bond0 up")]);
        };
        talk.flows_again(to, fail_over, || talk.has_flowed(since));
    }
    assert_eq!(talk.repaired(), before);
    // `fail_over_mac`.
    talk.heals("another MAC", "external_interface", &["next_hop"], |world| {
        on_host(world, 0, &["ip link set bond0 address 0a:00:00:00:00:b1"]);
    });
    wait_goes_by(&talk.world, 0, &key, "192.168.64.1");
}

/// A VPN of two hosts: `tun0` on each, 10.99.0.1 and 10.99.0.2, and a thread that carries packets between them. It takes its devices
/// along when it ends.
struct Vpn {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Vpn {
    fn start(world: &World) -> Self {
        let end = |host: usize| {
            let netns: &Netns = &world.hosts[host].netns;
            let (tun, _) = netns.within(|| forwarder::open("tun0")).unwrap();
            let address = format!("ip address add 10.99.0.{}/24 dev tun0", host + 1);
            on_host(world, host, &[&address, "ip link set tun0 mtu 1400 up"]);
            tun
        };
        let (ends, stop) = ([end(0), end(1)], Arc::new(AtomicBool::new(false)));
        let stopped = Arc::clone(&stop);
        Self { stop, thread: Some(thread::spawn(move || carry(&ends, &stopped))) }
    }
}

fn carry(ends: &[File; 2], stopped: &AtomicBool) {
    let mut packet = [0; 2048];
    while !stopped.load(Ordering::Relaxed) {
        // The time for who stops it.
        poll(&mut ends.each_ref().map(|end| PollFd::new(end.as_fd(), PollFlags::POLLIN)), PollTimeout::from(50u8))
            .unwrap();
        for (mut from, mut to) in [(&ends[0], &ends[1]), (&ends[1], &ends[0])] {
            while let Ok(len) = from.read(&mut packet) {
                let _lost = to.write(&packet[..len]);
            }
        }
    }
}

impl Drop for Vpn {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

#[test]
fn a_tun_device_goes_and_comes_back() {
    for rule in ["--iface=tun0", "--iface-regex=^10\\.99\\."] {
        let mut world = World::new(2);
        let mut vpn = Some(Vpn::start(&world));
        for (host, number) in world.hosts.iter_mut().zip(1..) {
            host.address = [10, 99, 0, number].into();
        }
        let talk = Talk::between(world.ready(&[rule]));
        let key = talk.world.lease_of(0).0;
        for _ in 0..2 {
            vpn = None;
            (0..2).for_each(|host| talk.world.wait_log(host, "the external interface tun0 is away, waiting for it"));
            talk.heals(rule, "external_interface", &[], |world| vpn = Some(Vpn::start(world)));
            wait_goes_by(&talk.world, 0, &key, "10.99.0.1");
        }
        drop(talk);
        drop(vpn);
    }
}

/// What such a service, as it starts, takes away from all that it did not make, and what it sets up.
#[test]
fn a_network_service_flushes_and_sets_up_again() {
    let along = ["device_address", "neighbour", "forwarding_entry", "next_hop", "device_settings", "program"];
    let talk = Talk::start(&[]);
    let key = talk.world.lease_of(0).0;
    for flush in ["route flush proto 72", "address flush dev flannel.1", "link set flannel.1 down"] {
        talk.heals(flush, "route", &along, |world| {
            let flush = format!("ip {flush}");
            on_host(world, 0, &[&flush, "ip rule flush", "ip route flush dev eth0", "ip address flush dev eth0"]);
            on_host(
                world,
                0,
                &[
                    "ip rule add from all lookup main priority 32766",
                    "ip rule add from all lookup default priority 32767",
                    "ip address add 192.168.64.1/24 dev eth0",
                    "ip route add default via 192.168.64.254",
                ],
            );
        });
        wait_goes_by(&talk.world, 0, &key, "192.168.64.1");
    }
}

/// DHCP clients that manage every interface give those without an answer an address of their own, and some a default route by it.
#[test]
fn link_local_addresses_on_the_overlays_device_and_on_lo_change_nothing() {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    let key = world.lease_of(0).0;
    on_host(&world, 0, &["ip route delete default", "ip route add default via 192.168.64.254 metric 2000"]);
    let traffic = [world.traffic(0, 1), world.traffic(1, 0)];
    on_host(
        &world,
        0,
        &[
            "ip address add 169.254.77.7/16 broadcast 169.254.255.255 dev flannel.1 scope link",
            "ip address add 169.254.78.8/16 dev lo",
            "ip route add default dev flannel.1 scope link src 169.254.77.7 metric 1000",
        ],
    );
    for rule in [&[][..], &["--iface-regex=^(169|192)\\."]] {
        restart(&mut world, 0, rule);
        wait_goes_by(&world, 0, &key, "192.168.64.1");
    }
    traffic.into_iter().for_each(|traffic| traffic.assert_nothing_was_lost());
}
