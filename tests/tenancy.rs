//! Keeping the own lease: renewal that nobody notices, sleeping past its end, and losing it.

use std::{fs, time::Duration};

use nix::sys::signal::Signal;
use xtask::{lab::PREFIX, progress::wait_for};

use crate::world::{SOON, World, is_delivered, lease_value};

fn key_of(world: &World, host: usize) -> String {
    format!("{PREFIX}/subnets/{}", world.lease_of(host).0)
}

fn kv(world: &World, key: &str) -> serde_json::Value {
    let text = world.store.etcdctl(&["get", "-w", "json", key]).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Stops the agent of a host until its lease has ended.
fn sleep_past_the_end(world: &World, host: usize) -> String {
    let key = key_of(world, host);
    world.hosts[host].agent.as_ref().unwrap().signal(Signal::SIGSTOP).unwrap();
    wait_for("the lease to end", SOON, || world.store.get(&key).unwrap().is_empty()).unwrap();
    key
}

fn wake(world: &World, host: usize) {
    world.hosts[host].agent.as_ref().unwrap().signal(Signal::SIGCONT).unwrap();
}

fn with_short_leases(hosts: u8) -> World {
    let mut world = World::new(hosts);
    for host in 0..hosts.into() {
        world.start(host, &["--subnet-lease-ttl=5"]);
    }
    for host in &mut world.hosts {
        host.wait_ready().unwrap();
        host.add_pod().unwrap();
    }
    world
}

#[test]
fn a_renewal_is_no_event_to_anybody() {
    let world = with_short_leases(2);
    world.wait_connected(0, 1);
    let key = key_of(&world, 0);
    let events = |host: usize| world.status(host)["status"]["store"]["events"].clone();
    world.wait_status(0, "a first renewal", |status| status["lease"]["renewals"].as_u64() > Some(0));
    let (before, events_before) = (kv(&world, &key), [events(0), events(1)]);
    world.wait_status(0, "renewals", |status| status["lease"]["renewals"].as_u64() > Some(4));
    // Longer than the term, which is five seconds: without renewals it would be gone.
    assert_eq!(kv(&world, &key)["header"]["revision"], before["header"]["revision"]);
    assert_eq!(kv(&world, &key)["kvs"], before["kvs"]);
    assert_eq!([events(0), events(1)], events_before);
}

#[test]
fn the_term_is_flannels_and_is_renewed_in_place() {
    let world = World::with_agents(1);
    let lease = kv(&world, &key_of(&world, 0))["kvs"][0]["lease"].as_i64().unwrap();
    let left = world.store.etcdctl(&["lease", "timetolive", &format!("{lease:x}")]).unwrap();
    assert!(left.contains("granted with TTL(86400s)"), "{left}");
}

#[test]
fn another_term_is_taken_in_at_the_next_start() {
    let mut world = World::with_agents(1);
    let key = key_of(&world, 0);
    let value = world.store.get(&key).unwrap();
    world.start(0, &["--subnet-lease-ttl=7200"]);
    world.wait_log(0, "carries");
    let lease = kv(&world, &key)["kvs"][0]["lease"].as_i64().unwrap();
    let left = world.store.etcdctl(&["lease", "timetolive", &format!("{lease:x}")]).unwrap();
    assert!(left.contains("granted with TTL(7200s)"), "{left}");
    assert_eq!(world.store.get(&key).unwrap(), value);
}

#[test]
fn a_sleeper_whose_subnet_is_still_free_gets_it_again_and_no_packet_is_lost() {
    let world = with_short_leases(2);
    world.wait_connected(0, 1);
    let subnet = world.hosts[0].subnet().unwrap();
    let traffic = [world.traffic(0, 1), world.traffic(1, 0)];
    let key = sleep_past_the_end(&world, 0);
    world.wait_log(1, "it is held (still_sends)");
    wake(&world, 0);
    world.wait_log(0, "is held again");
    assert!(world.store.get(&key).unwrap().contains(r#""PublicIP":"192.168.64.1""#));
    assert_eq!(world.hosts[0].subnet().unwrap(), subnet);
    world.wait_status(1, "the peer to be held no more", |status| status["held"].as_array().unwrap().is_empty());
    traffic.into_iter().for_each(|traffic| traffic.assert_nothing_was_lost());
}

#[test]
fn a_sleeper_whose_subnet_is_taken_does_not_steal_it() {
    let mut world = with_short_leases(3);
    world.wait_connected(1, 2);
    world.wait_connected(0, 1);
    let before = world.hosts[0].subnet().unwrap();
    let octet = before.gateway.octets()[2];
    let traffic = world.traffic(1, 2);
    let key = sleep_past_the_end(&world, 0);
    let fourth = world.lab.host("node4", 4).unwrap();
    world.hosts.push(fourth);
    let kernel = world.hosts[3].become_kernel_vxlan(&world.store, octet).unwrap();
    let revision = kv(&world, &key)["kvs"][0]["mod_revision"].clone();

    wake(&world, 0);
    world.wait_log(0, "ended while this host was silent, and 192.168.64.4 has it now; taking another");
    world.wait_log(0, "this host moves from");
    wait_for("subnet.env to be rewritten", SOON, || world.hosts[0].subnet().unwrap() != before).unwrap();
    // The other's lease was not touched.
    assert_eq!(kv(&world, &key)["kvs"][0]["mod_revision"], revision);
    assert!(world.store.get(&key).unwrap().contains(&kernel.mac));
    let (name, _) = world.lease_of(0);
    assert_eq!(name, format!("10.5.{}.0-24", world.hosts[0].subnet().unwrap().gateway.octets()[2]));
    world.wait_status(0, "the loss", |status| status["lease"]["losses"] == 1 && status["lease"]["state"] == "held");

    // Pods of the new subnet talk; what the others send to the old one goes to its new owner.
    world.hosts[0].netns.ip("link delete cni0").unwrap();
    // Its namespace takes the veth along later than it goes itself.
    world.hosts[0].netns.ip("link delete pod1").unwrap();
    world.hosts[0].pods.clear();
    world.hosts[0].add_pod().unwrap();
    world.wait_connected(0, 1);
    world.hosts[3].add_pod_in(&kernel.subnet).unwrap();
    for host in [0, 1] {
        let peer = world.hosts[host].subnet().unwrap().gateway.octets()[2];
        world.hosts[3].add_kernel_peer_from(&world.store, peer).unwrap();
        world.wait_connected(host, 3);
    }
    traffic.assert_nothing_was_lost();
}

#[test]
fn a_lease_that_is_overwritten_by_another_host_is_not_fought_over() {
    let world = World::with_agents(1);
    let before = world.hosts[0].subnet().unwrap();
    let key = key_of(&world, 0);
    let theirs = lease_value("192.168.64.99", "0a:00:00:00:00:99");
    world.store.put(&key, &theirs).unwrap();
    world.wait_log(0, "192.168.64.99 has it now; taking another");
    wait_for("subnet.env to be rewritten", SOON, || world.hosts[0].subnet().unwrap() != before).unwrap();
    assert_eq!(world.store.get(&key).unwrap(), theirs);
}

#[test]
fn a_move_that_fails_half_way_is_finished_later() {
    let world = World::with_agents(1);
    let key = key_of(&world, 0);
    // A directory where the file has to go, with something in it.
    let file = world.hosts[0].run_dir().join("subnet.env");
    fs::remove_file(&file).unwrap();
    fs::create_dir_all(file.join("in the way")).unwrap();
    world.store.put(&key, &lease_value("192.168.64.99", "0a:00:00:00:00:99")).unwrap();
    world.wait_log(0, "subnet.env: rename: ");
    fs::remove_dir_all(&file).unwrap();
    wait_for("subnet.env to be written", SOON, || file.is_file()).unwrap();
    assert_eq!(world.lease_of(0).0, format!("10.5.{}.0-24", world.hosts[0].subnet().unwrap().gateway.octets()[2]));
}

#[test]
fn a_lease_that_is_overwritten_with_garbage_is_mended() {
    let world = World::with_agents(1);
    let key = key_of(&world, 0);
    let value = world.store.get(&key).unwrap();
    world.store.etcdctl(&["put", "--ignore-lease", &key, "garbage"]).unwrap();
    wait_for("the lease to be mended", SOON, || world.store.get(&key).unwrap() == value).unwrap();
    world.wait_log(0, "somebody overwrote our lease");
}

#[test]
fn a_deleted_lease_ends_the_agent_as_flannels() {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    let traffic = world.traffic(0, 1);
    world.store.etcdctl(&["del", &key_of(&world, 0)]).unwrap();
    let agent = world.hosts[0].agent.as_mut().unwrap();
    assert!(agent.wait(SOON).unwrap().success());
    assert!(agent.log().contains("Lease has been revoked. Shutting down daemon."), "{}", agent.log());
    traffic.assert_nothing_was_lost();
    // Started again, it has the subnet it had.
    let before = world.hosts[0].subnet().unwrap();
    world.start(0, &[]);
    world.wait_log(0, "carries");
    assert_eq!(world.hosts[0].subnet().unwrap(), before);
}

#[test]
fn a_siblings_deletion_is_not_ours() {
    let world = World::with_agents(1);
    // Keys that begin as ours does; flannel's own watch takes their deletion for its lease's.
    let key = key_of(&world, 0);
    let sibling = format!("{key}&fd00:1::-64");
    world.store.put(&sibling, &lease_value("192.168.64.99", "0a:00:00:00:00:99")).unwrap();
    world.store.etcdctl(&["del", &sibling]).unwrap();
    world.wait_status(0, "both changes", |status| status["store"]["events"].as_u64() >= Some(2));
    assert!(world.hosts[0].agent.is_some());
    assert_eq!(world.status(0)["running"], true);
    assert_eq!(world.status(0)["status"]["lease"]["state"], "held");
}

#[test]
fn a_store_that_hangs_does_not_delay_the_end() {
    let mut world = World::with_agents(1);
    let agent = world.hosts[0].agent.as_mut().unwrap();
    world.store.pause().unwrap();
    agent.signal(Signal::SIGTERM).unwrap();
    assert!(agent.wait(Duration::from_secs(3)).unwrap().success());
    world.store.unpause().unwrap();
    assert!(is_delivered(&world.hosts[0].netns, &world.hosts[0].pods[0].address.to_string()));
}
