//! Leases among many agents.

use std::collections::HashSet;

use xtask::lab::PREFIX;

use crate::world::World;

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
    let mut world = World::new(1);
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
