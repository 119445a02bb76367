//! The protocol: who gets which subnet, and who is a peer, with flannel's hosts in the same table.

use std::{collections::HashSet, fs, time::Instant};

use xtask::{lab::PREFIX, progress::wait_for};

use crate::world::{CONFIG, SOON, World, is_answered, lease_value};

fn lease_key(subnet: &str) -> String {
    format!("{PREFIX}/subnets/{subnet}")
}

/// Starts a host whose `subnet.env` says that it had a subnet, and waits for the one that it gets.
fn start_after(world: &mut World, host: usize, previous: &str) -> String {
    let directory = world.hosts[host].run_dir();
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("subnet.env"), format!("FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET={previous}\n"))
        .unwrap();
    world.start(host, &[]);
    world.wait_log(host, "carries");
    world.lease_of(host).0
}

#[test]
fn twenty_agents_at_once_get_twenty_of_twenty_four_subnets() {
    let mut world = World::without_config(20);
    let config = r#"{"Network": "10.5.0.0/16", "SubnetMin": "10.5.1.0", "SubnetMax": "10.5.24.0", "Backend": {"Type": "vxlan"}}"#;
    world.store.put(&format!("{PREFIX}/config"), config).unwrap();
    for host in 0..20 {
        world.start(host, &[]);
    }
    let subnets: HashSet<_> = world.hosts.iter_mut().map(|host| host.wait_ready().unwrap().gateway).collect();
    assert_eq!(subnets.len(), 20);
    assert!(subnets.iter().all(|gateway| (1..=24).contains(&gateway.octets()[2])), "{subnets:?}");
    assert_eq!(world.store.list(&format!("{PREFIX}/subnets/")).unwrap().len(), 20);
}

#[test]
fn a_full_network_is_named_and_waited_out() {
    let mut world = World::without_config(2);
    let config =
        r#"{"Network": "10.5.0.0/16", "SubnetMin": "10.5.7.0", "SubnetMax": "10.5.7.0", "Backend": {"Type": "vxlan"}}"#;
    world.store.put(&format!("{PREFIX}/config"), config).unwrap();
    world.start(0, &[]);
    world.hosts[0].wait_ready().unwrap();
    world.start(1, &[]);
    world.wait_log(1, "out of subnets: 10.5.0.0/16 has none free");
    world.assert_untouched(1);
    let key = format!("{PREFIX}/subnets/10.5.7.0-24");
    world.store.etcdctl(&["del", &key]).unwrap();
    assert_eq!(world.hosts[1].wait_ready().unwrap().gateway.octets(), [10, 5, 7, 1]);
}

#[test]
fn a_reservation_is_adopted_and_stays_one() {
    let mut world = World::with_any_subnet(1);
    // A key without an etcd lease, for this host's address (flannel: Documentation/reservations.md).
    let key = format!("{PREFIX}/subnets/10.5.77.0-24");
    let value = r#"{"PublicIP":"192.168.64.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0a:00:00:00:00:77"}}"#;
    world.store.put(&key, value).unwrap();
    world.start(0, &[]);
    assert_eq!(world.hosts[0].wait_ready().unwrap().gateway.octets(), [10, 5, 77, 1]);
    let kept = world.store.etcdctl(&["get", "-w", "json", &key]).unwrap();
    let kept: serde_json::Value = serde_json::from_str(&kept).unwrap();
    assert!(kept["kvs"][0]["lease"].is_null(), "{kept}");
    assert_eq!(world.store.get(&key).unwrap(), value, "its MAC is the device's");
}

#[test]
fn a_start_with_the_lease_in_place_writes_nothing() {
    let mut world = World::with_agents(1);
    let revision = |world: &World| {
        let text = world.store.etcdctl(&["get", "-w", "json", &format!("{PREFIX}/config")]).unwrap();
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["header"]["revision"].as_u64().unwrap()
    };
    let before = revision(&world);
    world.start(0, &[]);
    world.wait_log(0, "carries");
    assert_eq!(revision(&world), before);
}

#[test]
fn a_host_keeps_its_subnet_by_its_address() {
    let mut world = World::with_agents(1);
    let first = world.lease_of(0);
    // Not even `subnet.env` is needed for it.
    fs::remove_file(world.hosts[0].run_dir().join("subnet.env")).unwrap();
    world.start(0, &[]);
    world.hosts[0].wait_ready().unwrap();
    assert_eq!(world.lease_of(0), first);
}

#[test]
fn the_subnet_of_subnet_env_is_taken_where_it_is_free_and_fits() {
    let mut world = World::with_any_subnet(4);
    assert_eq!(start_after(&mut world, 0, "10.5.222.1/24"), "10.5.222.0-24");
    // Another host has that by now.
    assert_ne!(start_after(&mut world, 1, "10.5.222.1/24"), "10.5.222.0-24");
    // Outside the Network, of another length, in the part that is not leased.
    assert!(start_after(&mut world, 2, "10.9.1.1/24").starts_with("10.5."));
    assert!(start_after(&mut world, 3, "10.5.0.1/24").ends_with("-24"));
    assert_ne!(world.lease_of(3).0, "10.5.0.0-24");
}

#[test]
fn a_lease_that_no_longer_fits_is_given_up_for_one_that_does() {
    let mut world = World::with_agents(1);
    let (before, _) = world.lease_of(0);
    world.hosts[0].agent = None;
    world
        .store
        .put(
            &format!("{PREFIX}/config"),
            r#"{"Network": "10.7.0.0/16", "SubnetLen": 26, "Backend": {"Type": "vxlan"}}"#,
        )
        .unwrap();
    world.start(0, &[]);
    world.wait_log(0, "does not fit the network config any more and is given up");
    world.wait_log(0, "carries");
    let (after, _) = world.lease_of(0);
    assert!(after.starts_with("10.7.") && after.ends_with("-26"), "{after}");
    assert_eq!(world.store.get(&lease_key(&before)).unwrap(), "");
    assert_eq!(world.hosts[0].subnet().unwrap().len, 26);
    let routes = world.hosts[0].netns.exec("ip route show dev flannel.1").unwrap();
    assert!(routes.contains("10.7.0.0/16") && !routes.contains("10.5.0.0/16"), "{routes}");
}

#[test]
fn leases_of_other_lengths_and_outside_the_network_are_peers() {
    let mut world = World::with_agents(1);
    let far = world.lab.host("node2", 2).unwrap();
    world.hosts.push(far);
    // A host of flannel's that is reached at each of these.
    let kernel = world.hosts[1].become_kernel_vxlan(&world.store, 200).unwrap();
    let own: u8 = world.lease_of(0).0.split('.').nth(2).unwrap().parse().unwrap();
    world.hosts[1].add_kernel_peer_from(&world.store, own).unwrap();
    for (lease, address) in [
        ("10.5.201.64-26", "10.5.201.70"),
        ("10.5.208.0-20", "10.5.210.1"),
        ("172.30.0.0-16", "172.30.7.7"),
        ("172.31.0.0-20&fd00:1::-64", "172.31.1.1"),
    ] {
        world.hosts[1].netns.ip(&format!("address add {address}/32 dev lo")).unwrap();
        assert!(!is_answered(&world.hosts[0].pods[0].netns, address), "{lease} is nobody's yet");
        world.store.put(&lease_key(lease), &lease_value("192.168.64.2", &kernel.mac)).unwrap();
        let answered = wait_for(lease, SOON, || is_answered(&world.hosts[0].pods[0].netns, address));
        assert!(answered.is_ok(), "{lease}: {:#}", world.status(0));
        world.store.etcdctl(&["del", &lease_key(lease)]).unwrap();
        world.wait_status(0, "the peer to go", |status| status["peers"] == 1);
    }
}

#[test]
fn peers_come_with_their_lease_and_go_with_it_and_we_are_none() {
    let world = World::with_agents(1);
    world.wait_status(0, "the table", |status| status["store"]["following"] == true);
    assert_eq!(world.status(0)["status"]["peers"], 0);
    let granted = world.store.etcdctl(&["lease", "grant", "3"]).unwrap();
    let lease = format!("--lease={}", granted.split_whitespace().nth(1).unwrap());
    let value = lease_value("192.168.64.50", "0a:00:00:00:00:50");
    world.store.etcdctl(&["put", &lease, "--", &lease_key("10.5.200.0-24"), &value]).unwrap();
    // A key without a lease is a static entry, and stays.
    world.store.put(&lease_key("10.5.201.0-24"), &lease_value("192.168.64.51", "0a:00:00:00:00:51")).unwrap();
    world.wait_status(0, "both", |status| status["peers"] == 2);
    world.wait_status(0, "one to end", |status| status["peers"] == 1);
    // Another lease of our own address is none either.
    world.store.put(&lease_key("10.5.202.0-24"), &lease_value("192.168.64.1", "0a:00:00:00:00:52")).unwrap();
    world.wait_status(0, "the event", |status| status["store"]["events"].as_u64() >= Some(4));
    assert_eq!(world.status(0)["status"]["peers"], 1);
}

#[test]
fn a_start_renews_for_the_whole_term_and_writes_nothing() {
    let mut world = World::with_agents(1);
    let key = lease_key(&world.lease_of(0).0);
    let kv = |world: &World| world.store.etcdctl(&["get", "-w", "json", &key]).unwrap();
    let before: serde_json::Value = serde_json::from_str(&kv(&world)).unwrap();
    let lease = format!("{:x}", before["kvs"][0]["lease"].as_i64().unwrap());
    let left = |world: &World| {
        let text = world.store.etcdctl(&["lease", "timetolive", &lease, "-w", "json"]).unwrap();
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["ttl"].as_u64().unwrap()
    };
    wait_for("some of the term to pass", SOON, || left(&world) < 86396).unwrap();
    let begun = Instant::now();
    world.start(0, &[]);
    world.wait_log(0, "carries");
    let left = left(&world);
    assert!(left + begun.elapsed().as_secs() >= 86398, "{left} after {:?}", begun.elapsed());
    assert_eq!(serde_json::from_str::<serde_json::Value>(&kv(&world)).unwrap()["kvs"], before["kvs"]);
}

#[test]
fn a_lease_that_overlaps_our_own_is_nobodys() {
    let world = World::with_agents(1);
    world.store.put(&lease_key("10.5.0.0-16"), &lease_value("192.168.64.66", "0a:00:00:00:00:66")).unwrap();
    world.wait_log(0, r#"the entry "10.5.0.0-16" is passed over: it overlaps this host's own lease"#);
    assert_eq!(world.status(0)["status"]["peers"], 0);
}

#[test]
fn two_overlays_live_on_one_pair_of_hosts() {
    let world = World::with_agents(2);
    world
        .store
        .put("/other/network/config", r#"{"Network": "10.6.0.0/16", "Backend": {"Type": "vxlan", "VNI": 2}}"#)
        .unwrap();
    let mut others = Vec::new();
    for host in 0..2 {
        let file = world.hosts[host].run_dir().join("other.env");
        let mut command = world.agent_on(host);
        command.arg(format!("--etcd-endpoints={}", world.store.endpoint()));
        command.arg("--etcd-prefix=/other/network").arg(format!("--subnet-file={}", file.display()));
        let log = world.lab.directory().join(format!("other{host}.log"));
        others.push(xtask::process::Process::start(&mut command, &log).unwrap());
        let ready = wait_for("the other subnet.env", SOON, || file.exists());
        assert!(ready.is_ok(), "{}", others[host].log());
    }
    let other_address = |host: usize| {
        let addresses = world.hosts[host].netns.ip_json("-4 address show dev flannel.2").unwrap();
        addresses[0]["addr_info"][0]["local"].as_str().unwrap().to_owned()
    };
    let addresses = [other_address(0), other_address(1)];
    for (from, to) in [(0, 1), (1, 0)] {
        let waited = wait_for("the other overlay", SOON, || is_answered(&world.hosts[from].netns, &addresses[to]));
        assert!(waited.is_ok(), "{}", others[from].log());
    }
    world.wait_connected(0, 1);
    world.traffic(0, 1).assert_nothing_was_lost();
    let status = || xtask::process::output(world.agent_on(0).args(["status"]));
    // It is written now and then.
    wait_for("all to be well with both", SOON, || status().is_ok()).unwrap();
    let all = status().unwrap();
    for overlay in [["flannel.1", "10.5.0.0/16"], ["flannel.2", "10.6.0.0/16"]] {
        let is_listed = all.lines().any(|line| line.split_whitespace().take(2).eq(overlay));
        assert!(is_listed, "{overlay:?}: {all}");
    }
    assert_eq!(world.hosts[0].subnet().unwrap().gateway.octets()[1], 5);
    others.iter_mut().for_each(|agent| {
        agent.signal(nix::sys::signal::Signal::SIGTERM).unwrap();
        assert!(agent.wait(SOON).unwrap().success());
    });
}

#[test]
fn the_config_is_read_as_flannel_reads_it() {
    let mut world = World::without_config(1);
    // Keys without case, the last of two counts, unknown ones are passed over.
    let config = r#"{"network": "10.1.0.0/16", "NETWORK": "10.5.7.9/16", "subnetlen": 26, "Whatever": [], "BACKEND": {"type": "VXLAN", "vni": 1}}"#;
    world.store.put(&format!("{PREFIX}/config"), config).unwrap();
    world.start(0, &[]);
    let subnet = world.hosts[0].wait_ready().unwrap();
    assert_eq!((subnet.len, &subnet.gateway.octets()[..2]), (26, &[10, 5][..]));
    let text = fs::read_to_string(world.hosts[0].run_dir().join("subnet.env")).unwrap();
    let gateway = subnet.gateway;
    assert_eq!(
        text,
        format!("FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET={gateway}/26\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n")
    );
    world.store.put(&format!("{PREFIX}/config"), CONFIG).unwrap();
    world.wait_log(0, "start the agent again to take it in");
}
