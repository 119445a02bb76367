//! What a store that forgets can do, and what it can't.

use xtask::{lab::PREFIX, progress::wait_for};

use crate::world::{SOON, World, is_answered, lease_value};

/// Hosts with agents, and twelve leases of hosts that never send.
fn with_quiet_peers(hosts: u8, arguments: &[&str]) -> World {
    let mut world = World::new(hosts);
    for octet in 200..212 {
        put_quiet_peer(&world, octet);
    }
    for host in 0..hosts.into() {
        world.start(host, arguments);
    }
    for host in &mut world.hosts {
        host.wait_ready().unwrap();
        host.add_pod().unwrap();
    }
    world
}

fn put_quiet_peer(world: &World, octet: u8) {
    let value = lease_value(&format!("192.168.64.{octet}"), &format!("0a:00:00:00:00:{octet:x}"));
    world.store.put(&key(octet), &value).unwrap();
}

fn key(octet: u8) -> String {
    format!("{PREFIX}/subnets/10.5.{octet}.0-24")
}

/// Whether packets to a subnet are encapsulated.
fn is_peer(world: &World, host: usize, octet: u8) -> bool {
    let before = world.counter(host, "encap_no_peer");
    is_answered(&world.hosts[host].netns, &format!("10.5.{octet}.1"));
    world.counter(host, "encap_no_peer") == before
}

fn held(world: &World, host: usize) -> usize {
    world.status(host)["status"]["held"].as_array().unwrap().len()
}

#[test]
fn a_few_deletions_are_believed_and_many_are_held_until_released() {
    let world = with_quiet_peers(2, &[]);
    let traffic = world.traffic(0, 1);
    world.store.etcdctl(&["del", &key(200)]).unwrap();
    wait_for("the peer to go", SOON, || !is_peer(&world, 0, 200)).unwrap();

    // All that are left, our own leases aside.
    world.store.etcdctl(&["del", &key(201), &key(212)]).unwrap();
    world.wait_log(0, "etcd no longer names the peer of 10.5.211.0/24; it is held (mass_removal)");
    // Three within a minute were believed, the one above among them.
    world.wait_status(0, "nine to be held", |status| status["held"].as_array().unwrap().len() == 9);
    assert!(is_peer(&world, 0, 211));
    let metrics = xtask::process::output(world.agent_on(0).arg("metrics")).unwrap();
    assert!(metrics.contains(r#"flannel_peers_held{vni="1",reason="mass_removal"} 9"#), "{metrics}");
    let troubles = world.status(0)["troubles"].to_string();
    assert!(troubles.contains("etcd no longer names 9 of the 10 peers; they are held"), "{troubles}");
    assert_eq!(world.agent_on(0).arg("status").output().unwrap().status.code(), Some(3));

    let released = xtask::process::output(world.agent_on(0).args(["lease", "release-guard"]));
    let log = || world.hosts[0].agent.as_ref().unwrap().log();
    let released = released.unwrap_or_else(|error| panic!("{error:#}\n{}", log()));
    assert_eq!(released, "flannel.1: 9 peers let go\n");
    assert!(!is_peer(&world, 0, 211));
    assert_eq!(held(&world, 0), 0);
    // The other agent holds them still: each has its own operator.
    assert_eq!(held(&world, 1), 9);
    traffic.assert_nothing_was_lost();
}

#[test]
fn what_is_held_goes_after_the_grace_time() {
    let world = with_quiet_peers(1, &["--lease-guard-grace=2"]);
    world.store.etcdctl(&["del", &key(200), &key(212)]).unwrap();
    world.wait_log(0, "it is held (mass_removal)");
    world.wait_status(0, "the grace to end", |status| {
        status["peers"] == 0 && status["held"].as_array().unwrap().is_empty()
    });
    assert!(!is_peer(&world, 0, 211));
}

#[test]
fn what_comes_back_is_held_no_more() {
    let world = with_quiet_peers(1, &[]);
    world.store.etcdctl(&["del", &key(200), &key(212)]).unwrap();
    world.wait_status(0, "nine to be held", |status| status["held"].as_array().unwrap().len() == 9);
    for octet in 200..212 {
        put_quiet_peer(&world, octet);
    }
    world.wait_status(0, "all to be back", |status| {
        status["peers"] == 12 && status["held"].as_array().unwrap().is_empty()
    });
}

#[test]
fn an_empty_answer_removes_nobody_and_everybody_comes_back() {
    let mut world = with_quiet_peers(2, &[]);
    let subnets = [0, 1].map(|host| world.hosts[host].subnet().unwrap());
    let traffic = world.traffic(0, 1);
    world.store.wipe().unwrap();
    for host in 0..2 {
        world.wait_status(host, "all to be held", |status| {
            status["store"]["following"] == true && status["held"].as_array().unwrap().len() == 13
        });
        let differs = world.status(host)["status"]["configDiffers"].to_string();
        assert!(differs.contains("the network config is gone from etcd; going on with the one before"), "{differs}");
    }
    world.store.put(&format!("{PREFIX}/config"), crate::world::CONFIG).unwrap();
    for (host, subnet) in subnets.into_iter().enumerate() {
        world.wait_log(host, "is held again");
        world.wait_status(host, "the other agent's lease", |status| {
            status["lease"]["state"] == "held" && status["held"].as_array().unwrap().len() == 12
        });
        assert_eq!(world.hosts[host].subnet().unwrap(), subnet, "each has its subnet again");
    }
    traffic.assert_nothing_was_lost();
}

#[test]
fn an_agent_that_starts_does_not_believe_an_empty_table_either() {
    let mut world = with_quiet_peers(1, &[]);
    world.wait_status(0, "the peers", |status| status["peers"] == 12);
    world.wait_last_known(0);
    world.hosts[0].agent = None;
    world.store.etcdctl(&["del", &key(200), &key(212)]).unwrap();
    world.start(0, &[]);
    world.wait_status(0, "all to be held", |status| status["held"].as_array().unwrap().len() == 12);
    assert!(is_peer(&world, 0, 211));
}

#[test]
fn a_peer_that_still_sends_is_kept_until_its_subnet_is_anothers() {
    let mut world = World::with_agents(1);
    let second = world.lab.host("node2", 2).unwrap();
    world.hosts.push(second);
    // A host of flannel's, so that nobody puts its lease back.
    let kernel = world.hosts[1].become_kernel_vxlan(&world.store, 200).unwrap();
    world.hosts[1].add_pod_in(&kernel.subnet).unwrap();
    let own: u8 = world.lease_of(0).0.split('.').nth(2).unwrap().parse().unwrap();
    world.hosts[1].add_kernel_peer_from(&world.store, own).unwrap();
    world.wait_connected(0, 1);

    let traffic = world.traffic(1, 0);
    world.store.etcdctl(&["del", &key(200)]).unwrap();
    world.wait_log(0, "etcd no longer names the peer of 10.5.200.0/24; it is held (still_sends)");
    // Held peers are looked at again at each comparison, every ten seconds, which also writes the status.
    let before = world.status(0)["status"]["written"].as_u64().unwrap();
    world.wait_status(0, "a comparison", |status| status["written"].as_u64().unwrap() > before + 10);
    assert_eq!(held(&world, 0), 1);
    traffic.assert_nothing_was_lost();
    put_lease_of_another(&world);
    wait_for("the new owner", SOON, || held(&world, 0) == 0).unwrap();
    assert!(!is_answered(&world.hosts[0].pods[0].netns, &world.hosts[1].pods[0].address.to_string()));
}

fn put_lease_of_another(world: &World) {
    world.store.put(&key(200), &lease_value("192.168.64.77", "0a:00:00:00:00:77")).unwrap();
}
