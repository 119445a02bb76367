//! Two hosts with one address: a machine that was cloned, a `--public-ip` that is given twice, an address behind NAT.

use std::{fs, io::ErrorKind};

use nix::sys::signal::Signal;
use xtask::{lab::PREFIX, progress::wait_for};

use crate::{
    kubernetes::Cluster,
    world::{LeaseStore, SOON, World, lease_value},
};

const ADDRESS: &str = "--public-ip=192.168.64.1";
const ASKED: &str = "asking whether that host lives";

fn key_of(world: &World, host: usize) -> String {
    format!("{PREFIX}/subnets/{}", world.lease_of(host).0)
}

/// Two hosts that talk, and a third that is to have the address of the first.
fn with_newcomer() -> World {
    let mut world = World::with_agents(2);
    let newcomer = world.lab.host("node3", 3).unwrap();
    world.hosts.push(newcomer);
    world.wait_connected(0, 1);
    world
}

fn troubles<S: LeaseStore>(world: &World<S>, host: usize) -> String {
    world.status(host)["troubles"].to_string()
}

/// Vagrant's machines: the first interface, which has the default route, is behind a NAT of each machine's own, and all have the
/// same address there.
fn behind_nat<S>(world: &World<S>) {
    for host in &world.hosts {
        for line in [
            "link add nat0 type veth peer name nat1",
            "address add 10.0.2.15/24 dev nat0 valid_lft 86400 preferred_lft 86400",
            "link set nat1 up",
            "link set nat0 up",
            "route replace default via 10.0.2.2 dev nat0",
        ] {
            host.netns.ip(line).unwrap();
        }
    }
}

/// Waits until a host says a line with all these words, in its log and among its status's troubles.
fn wait_said<S: LeaseStore>(world: &World<S>, host: usize, words: &[&str]) {
    let has_all = |line: &str| words.iter().all(|word| line.contains(word));
    let log = || world.hosts[host].agent.as_ref().unwrap().log();
    let is_told =
        || world.status(host)["troubles"].as_array().unwrap().iter().any(|trouble| has_all(trouble.as_str().unwrap()));
    let waited = wait_for("it to be said", SOON, || is_told() && log().lines().any(has_all));
    assert!(waited.is_ok(), "{words:?}: {}\n{}", troubles(world, host), log());
}

/// Waits until two hosts that go by their other interface reach each other, and have no troubles.
fn wait_way_out<S: LeaseStore>(mut world: World<S>) {
    // Their leases are others now: what is read must not be the subnets of before.
    for host in &mut world.hosts {
        host.agent = None;
        let removed = fs::remove_file(host.run_dir().join("subnet.env"));
        removed.or_else(|error| if error.kind() == ErrorKind::NotFound { Ok(()) } else { Err(error) }).unwrap();
    }
    let world = world.ready(&["--iface=eth0"]);
    world.wait_connected(0, 1);
    for host in 0..2 {
        let waited = wait_for("no troubles", SOON, || troubles(&world, host) == "[]");
        assert!(waited.is_ok(), "{}", troubles(&world, host));
    }
}

#[test]
fn the_second_waits_until_the_first_is_gone_and_both_say_so() {
    let mut world = with_newcomer();
    let (key, before) = (key_of(&world, 0), world.lease_of(0));
    let traffic = [world.traffic(0, 1), world.traffic(1, 0)];
    world.start(2, &[ADDRESS]);
    let text = "another living host, with the MAC";
    world.wait_log(2, text);
    world.wait_status(2, "to wait", |status| status["lease"]["state"] == "contested");
    assert_eq!(world.status(2)["running"], true);
    let said = troubles(&world, 2);
    assert!(said.contains(text) && said.contains("has this host's address 192.168.64.1 and the lease"), "{said}");
    assert!(!said.contains("no agent is running"), "{said}");
    world.assert_untouched(2);
    world.wait_log(0, "another host claims this host's address 192.168.64.1");
    world.wait_status(0, "the claim", |status| status["lease"]["claims"].as_u64() >= Some(1));
    assert!(troubles(&world, 0).contains("another host claims this host's address 192.168.64.1"));
    world.assert_shown(0, "another host claims this host's address 192.168.64.1", &[]);
    let lease = &world.status(0)["status"]["lease"];
    assert_eq!((lease["state"].as_str(), lease["losses"].as_u64()), (Some("held"), Some(0)));
    assert_eq!(world.lease_of(0), before);
    traffic.into_iter().for_each(|traffic| traffic.assert_nothing_was_lost());

    // Nobody answers any more.
    world.hosts[0].agent = None;
    world.wait_log(2, "nobody answered");
    world.hosts[2].wait_ready().unwrap();
    assert_eq!(world.store.get(&key).unwrap(), before.1, "subnet and MAC are those of the host that was");
    world.wait_status(2, "the lease", |status| status["lease"]["state"] == "held");
    assert_eq!(world.status(2)["status"]["lease"]["contested"], serde_json::Value::Null);
}

#[test]
fn a_host_is_not_its_own_rival() {
    let mut world = World::with_agents(1);
    let before = world.lease_of(0);
    // A restart has its device.
    world.start(0, &[]);
    world.wait_log(0, "carries");
    let log = world.hosts[0].agent.as_ref().unwrap().log();
    assert!(!log.contains(ASKED), "{log}");
    // A reboot has nothing.
    world.hosts[0].agent = None;
    world.hosts[0].netns.ip("link delete flannel.1").unwrap();
    fs::remove_dir_all(world.hosts[0].pin_dir()).unwrap();
    fs::remove_dir_all(world.hosts[0].run_dir()).unwrap();
    world.start(0, &[]);
    world.wait_log(0, "nobody answered");
    world.hosts[0].wait_ready().unwrap();
    assert_eq!(world.lease_of(0), before);
    let lease = world.status(0)["status"]["lease"].clone();
    assert_eq!((lease["state"].as_str(), lease["claims"].as_u64()), (Some("held"), Some(0)));
}

#[test]
fn one_that_could_not_answer_finds_out_and_they_do_not_alternate() {
    let mut world = with_newcomer();
    let key = key_of(&world, 0);
    world.hosts[0].agent.as_ref().unwrap().signal(Signal::SIGSTOP).unwrap();
    world.start(2, &[ADDRESS]);
    world.hosts[2].wait_ready().unwrap();
    world.hosts[0].agent.as_ref().unwrap().signal(Signal::SIGCONT).unwrap();
    let state = |world: &World, host: usize| world.status(host)["status"]["lease"]["state"].clone();
    let one_waits = || {
        let states = [state(&world, 0), state(&world, 2)];
        states.contains(&"held".into()) && states.contains(&"contested".into())
    };
    let waited = wait_for("one to hold the lease, and one to wait", SOON, one_waits);
    let logs = || [0, 2].map(|host| world.hosts[host].agent.as_ref().unwrap().log());
    assert!(waited.is_ok(), "{:#?}", logs());
    let held = if state(&world, 0) == "held" { 0 } else { 2 };
    assert!(troubles(&world, held).contains("another host claims this host's address"));
    assert!(troubles(&world, 2 - held).contains("another living host"));
    // A claim now and then, each of one write and answered with two.
    let version = || {
        let text = world.store.etcdctl(&["get", "-w", "json", &key]).unwrap();
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["kvs"][0]["version"].as_u64().unwrap()
    };
    assert!(version() < 30, "{}: {:#?}", version(), logs());
}

#[test]
fn a_lease_that_another_wrote_over_is_taken_back_from_one_that_does_not_answer() {
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    let (key, (_, value)) = (key_of(&world, 0), world.lease_of(0));
    // As flannel's daemon does it on a host with the same address.
    world.store.put(&key, &lease_value("192.168.64.1", "0a:00:00:00:00:77")).unwrap();
    world.wait_log(0, "another host wrote its MAC 0a:00:00:00:00:77 into the lease");
    wait_for("the lease to be as it was", SOON, || world.store.get(&key).unwrap() == value).unwrap();
    world.wait_log(0, "is held again");
    world.wait_connected(0, 1);
}

#[test]
fn a_second_lease_with_this_hosts_address_is_said() {
    let world = World::with_agents(1);
    let key = format!("{PREFIX}/subnets/10.5.202.0-24");
    world.store.put(&key, &lease_value("192.168.64.1", "0a:00:00:00:00:52")).unwrap();
    world.wait_log(0, "it names this host's own address 192.168.64.1 with the MAC 0a:00:00:00:00:52 of another");
    assert_eq!(world.status(0)["status"]["peers"], 0);
    world.store.etcdctl(&["del", &key]).unwrap();
    world.wait_status(0, "it to be forgotten", |status| status["store"]["passedOver"].as_object().unwrap().is_empty());
}

#[test]
fn two_hosts_behind_nat_both_say_so_and_the_way_out() {
    let mut world = World::new(2);
    behind_nat(&world);
    world.start(0, &[]);
    let gateway = world.hosts[0].wait_ready().unwrap().gateway;
    world.start(1, &[]);
    let subnet = format!("{}/24", std::net::Ipv4Addr::from_bits(gateway.to_bits() - 1));
    wait_said(&world, 0, &["another host claims this host's address 10.0.2.15", &subnet, "--iface"]);
    wait_said(&world, 1, &["has this host's address 10.0.2.15", &subnet, "--iface"]);
    wait_way_out(world);
}

#[test]
fn two_nodes_behind_nat_both_say_so_and_the_way_out() {
    for backend in [r#"{"Type": "vxlan"}"#, r#"{"Type": "host-gw"}"#] {
        let cluster = Cluster::with_nodes(2);
        let config = format!(r#"{{"Network": "10.5.0.0/16", "Backend": {backend}}}"#);
        fs::write(&cluster.store.net_conf, config).unwrap();
        behind_nat(&cluster);
        let cluster = cluster.with_ready_agents(&[]);
        for (host, other) in [(0, "node2"), (1, "node1")] {
            let said = ["it names this host's own address 10.0.2.15", "10.5.1.0/24", "10.5.2.0/24", other, "--iface"];
            wait_said(&cluster, host, &said);
        }
        wait_way_out(cluster);
    }
}
