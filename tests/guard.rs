//! What a store that forgets can do, and what it can't.

use std::{fs, thread::sleep, time::Duration};

use xtask::{
    lab::{PREFIX, Store, address},
    progress::wait_for,
};

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

/// Whether packets to a subnet are encapsulated: they are routed to the overlay, and it knows where to.
fn is_peer(world: &World, host: usize, octet: u8) -> bool {
    let (netns, address) = (&world.hosts[host].netns, format!("10.5.{octet}.1"));
    if !netns.ip(&format!("route get {address}")).is_ok_and(|route| route.contains("dev flannel.1")) {
        return false;
    }
    let before = world.counter(host, "encap_no_peer");
    is_answered(netns, &address);
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
    world.wait_log(0, "etcd no longer names 11 of 12 peers (10.5.201.0/24, 10.5.202.0/24, ");
    world.wait_status(0, "all to be held", |status| status["held"].as_array().unwrap().len() == 11);
    assert!(is_peer(&world, 0, 211));
    let metrics = xtask::process::output(world.agent_on(0).arg("metrics")).unwrap();
    assert!(metrics.contains(r#"flannel_peers_held{vni="1",reason="mass_removal"} 11"#), "{metrics}");
    let troubles = world.status(0)["troubles"].to_string();
    assert!(troubles.contains("etcd no longer names 11 of the 12 peers; they are held"), "{troubles}");
    world.assert_shown(0, "etcd no longer names 11 of the 12 peers; they are held", &[]);
    assert_eq!(world.agent_on(0).arg("status").output().unwrap().status.code(), Some(3));

    let released = xtask::process::output(world.agent_on(0).args(["lease", "release-guard"]));
    let log = || world.hosts[0].agent.as_ref().unwrap().log();
    let released = released.unwrap_or_else(|error| panic!("{error:#}\n{}", log()));
    assert_eq!(released, "flannel.1: 11 peers released\n");
    assert!(!is_peer(&world, 0, 211));
    assert_eq!(held(&world, 0), 0);
    // The other agent holds them still: each has its own operator.
    assert_eq!(held(&world, 1), 11);
    traffic.assert_nothing_was_lost();
}

#[test]
fn what_is_held_goes_after_the_grace_time() {
    let world = with_quiet_peers(1, &["--lease-guard-grace=2"]);
    world.store.etcdctl(&["del", &key(200), &key(212)]).unwrap();
    world.wait_log(0, "they are held (mass_removal)");
    world.wait_status(0, "the grace to end", |status| {
        status["peers"] == 0 && status["held"].as_array().unwrap().is_empty()
    });
    assert!(!is_peer(&world, 0, 211));
}

#[test]
fn what_comes_back_is_held_no_more() {
    let world = with_quiet_peers(1, &[]);
    world.store.etcdctl(&["del", &key(200), &key(212)]).unwrap();
    world.wait_status(0, "all to be held", |status| status["held"].as_array().unwrap().len() == 12);
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

/// Hosts that know each other, and have never sent each other anything.
fn silent(hosts: u8) -> World {
    let world = World::with_agents(hosts);
    for host in 0..hosts.into() {
        world.wait_status(host, "all peers", |status| {
            status["store"]["following"] == true && status["peers"] == u64::from(hosts) - 1
        });
    }
    world
}

fn subnets(world: &World) -> Vec<xtask::lab::Subnet> {
    world.hosts.iter().map(|host| host.subnet().unwrap()).collect()
}

fn own_key(world: &World, host: usize) -> String {
    format!("{PREFIX}/subnets/{}", world.lease_of(host).0)
}

/// Waits until all have their leases again, as they were, and no agent has ended.
fn assert_all_are_back(world: &mut World, leases: &[(String, String)]) {
    for (host, lease) in leases.iter().enumerate() {
        world.wait_log(host, "is held again");
        world.wait_status(host, "all to be back", |status| {
            status["lease"]["state"] == "held"
                && status["peers"] == leases.len() as u64 - 1
                && status["held"].as_array().unwrap().is_empty()
        });
        assert_eq!(world.lease_of(host), *lease, "subnet and MAC");
        let agent = world.hosts[host].agent.as_mut().unwrap();
        assert!(agent.status().unwrap().is_none(), "{}", agent.log());
    }
}

#[test]
fn a_range_that_is_deleted_costs_nobody_anything() {
    let mut world = silent(5);
    let (before, leases) = (subnets(&world), (0..5).map(|host| world.lease_of(host)).collect::<Vec<_>>());
    world.store.etcdctl(&["del", "--prefix", &format!("{PREFIX}/subnets/")]).unwrap();
    // From now on, in the middle of it.
    let traffic = [world.traffic(0, 1), world.traffic(2, 3)];
    assert_all_are_back(&mut world, &leases);
    assert_eq!(subnets(&world), before);
    traffic.into_iter().for_each(|traffic| traffic.assert_nothing_was_lost());
    for (one, two) in [(0, 4), (1, 3), (2, 4)] {
        world.wait_connected(one, two);
    }
    assert_eq!(world.agent_on(0).arg("status").output().unwrap().status.code(), Some(0));
}

#[test]
fn the_own_lease_and_one_other_in_one_transaction_are_no_revocation() {
    let mut world = silent(3);
    let leases: Vec<_> = (0..3).map(|host| world.lease_of(host)).collect();
    let (one, two) = (own_key(&world, 0), own_key(&world, 1));
    world.store.etcdctl_with_input(&["txn"], &format!("\ndel {one}\ndel {two}\n\n\n")).unwrap();
    let traffic = world.traffic(2, 0);
    for host in 0..2 {
        world.wait_log(host, "was deleted together with those of others; taking it again");
        world.wait_log(host, "is held again");
    }
    world.wait_status(2, "both to be back", |status| {
        status["peers"] == 2 && status["held"].as_array().unwrap().is_empty()
    });
    for (host, lease) in leases.iter().enumerate() {
        assert_eq!(world.lease_of(host), *lease);
        assert!(world.hosts[host].agent.as_mut().unwrap().status().unwrap().is_none());
    }
    traffic.assert_nothing_was_lost();
}

#[test]
fn leases_that_are_deleted_one_after_the_other_within_seconds_are_no_revocations() {
    let mut world = silent(4);
    let leases: Vec<_> = (0..4).map(|host| world.lease_of(host)).collect();
    for host in 0..4 {
        world.store.etcdctl(&["del", &own_key(&world, host)]).unwrap();
        // What is tried: two seconds from the first to the last.
        sleep(Duration::from_millis(600));
    }
    let traffic = world.traffic(0, 3);
    assert_all_are_back(&mut world, &leases);
    traffic.assert_nothing_was_lost();
}

/// What is deleted while no agent reaches etcd: keys are gone when they do again, and nothing else is.
fn deleted_unseen(world: &mut World, arguments: &[&str]) {
    world.store.stop();
    for host in 0..world.hosts.len() {
        world.wait_status(host, "to be away", |status| status["store"]["following"] == false);
    }
    let elsewhere = format!("http://{}:2390", address(254));
    let store = Store::start_with(&world.lab.underlay, &elsewhere, world.lab.directory(), &[]).unwrap();
    store.etcdctl(arguments).unwrap();
    drop(store);
    world.store.resume().unwrap();
}

#[test]
fn a_range_that_was_deleted_unseen_costs_nobody_anything() {
    let mut world = silent(3);
    let leases: Vec<_> = (0..3).map(|host| world.lease_of(host)).collect();
    deleted_unseen(&mut world, &["del", "--prefix", &format!("{PREFIX}/subnets/")]);
    let traffic = world.traffic(0, 1);
    assert_all_are_back(&mut world, &leases);
    traffic.assert_nothing_was_lost();
}

#[test]
fn the_own_lease_alone_is_revoked_unseen_too() {
    let mut world = silent(2);
    let key = own_key(&world, 0);
    deleted_unseen(&mut world, &["del", &key]);
    let agent = world.hosts[0].agent.as_mut().unwrap();
    assert!(agent.wait(SOON).unwrap().success());
    assert!(agent.log().contains("Lease has been revoked. Shutting down daemon."), "{}", agent.log());
    // The other lets it go, since it never sent.
    world.wait_status(1, "the peer to go", |status| status["peers"] == 0 && status["lease"]["state"] == "held");
}

#[test]
fn all_that_is_below_the_prefix_is_deleted_and_put_back() {
    let mut world = silent(2);
    let leases: Vec<_> = (0..2).map(|host| world.lease_of(host)).collect();
    world.store.etcdctl(&["del", "--prefix", PREFIX]).unwrap();
    let traffic = world.traffic(0, 1);
    for host in 0..2 {
        world.wait_log(host, "taking it again if it is free");
        world.wait_status(host, "the peer to be held", |status| status["held"].as_array().unwrap().len() == 1);
    }
    world.store.put(&format!("{PREFIX}/config"), crate::world::CONFIG).unwrap();
    assert_all_are_back(&mut world, &leases);
    traffic.assert_nothing_was_lost();
}

#[test]
fn nobody_is_given_a_subnet_that_a_host_may_still_have() {
    let world = World::without_config(1);
    // Eight subnets, of which seven are those of others.
    let config = r#"{"Network": "10.5.0.0/16", "SubnetMin": "10.5.200.0", "SubnetMax": "10.5.207.0", "Backend": {"Type": "vxlan"}}"#;
    world.store.put(&format!("{PREFIX}/config"), config).unwrap();
    (200..207).for_each(|octet| put_quiet_peer(&world, octet));
    let mut world = world.ready(&[]);
    world.wait_status(0, "the peers", |status| status["peers"] == 7);
    world.wait_last_known(0);
    world.hosts[0].agent = None;
    world.store.etcdctl(&["del", "--prefix", &format!("{PREFIX}/subnets/")]).unwrap();
    // It does not know what it had itself any more: but what the others had.
    fs::remove_file(world.hosts[0].run_dir().join("subnet.env")).unwrap();
    world.start(0, &[]);
    world.wait_log(0, "carries");
    assert_eq!(world.lease_of(0).0, "10.5.207.0-24");
}
