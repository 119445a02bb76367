//! `flannel-agent audit`: what the kernel has for the overlay, whatever the number of peers.

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use xtask::{lab::PREFIX, progress::wait_for};

use crate::world::{SOON, World, lease_value};

/// More than hosts have.
const MORE: usize = 50;

fn audit(world: &World) -> (Option<i32>, Value) {
    let result = world.agent_on(0).args(["audit", "-o", "json"]).output().unwrap();
    let mut document: Value = serde_json::from_slice(&result.stdout).unwrap();
    (result.status.code(), document["overlays"][0].take())
}

/// How many there are of each kind, what there may be, and what flannel would have.
fn counts(audit: &Value) -> Vec<(String, u64, Option<u64>, Option<u64>)> {
    let objects = audit["objects"].as_array().unwrap().iter();
    let row = |object: &Value| {
        let name = object["object"].as_str().unwrap().to_owned();
        (name, object["count"].as_u64().unwrap(), object["budget"].as_u64(), object["flannel"].as_u64())
    };
    objects.map(row).collect()
}

#[test]
fn fifty_more_peers_cost_no_object_and_what_is_more_is_named() {
    let mut world = World::with_any_subnet(2).ready(&[]);
    world.wait_connected(0, 1);
    let (code, before) = audit(&world);
    assert_eq!((code, &before["peers"]), (Some(0), &1.into()), "{before:#}");
    world.assert_shown(0, "flannel.1: 1 peer", &[]);
    let leased = [0, 1].map(|host| world.lease_of(host).0);
    let free: Vec<_> = (9..=254).filter(|third| !leased.contains(&format!("10.5.{third}.0-24"))).take(MORE).collect();
    for number in &free {
        let value = lease_value(&format!("192.168.65.{number}"), &format!("0a:00:00:00:01:{number:02x}"));
        world.store.put(&format!("{PREFIX}/subnets/10.5.{number}.0-24"), &value).unwrap();
    }
    wait_for("the peers", SOON, || audit(&world).1["peers"] == MORE + 1).unwrap();
    let (code, after) = audit(&world);
    assert_eq!(code, Some(0), "{after:#}");
    let counted = |audit: &Value| counts(audit).into_iter().map(|(name, count, ..)| (name, count)).collect::<Vec<_>>();
    assert_eq!(counted(&before), counted(&after));
    let row = |name: &str, count, budget, flannel| (name.to_owned(), count, Some(budget), Some(flannel));
    let expected = [
        row("devices", 1, 1, 1),
        row("routes", 1, 1, 51),
        row("neighbours", 1, 1, 51),
        row("forwarding entries", 1, 1, 51),
    ];
    assert_eq!(counts(&after)[..4], expected);
    let (packet_rules, count, budget, _) = counts(&after)[4].clone();
    assert!(packet_rules == "packet rules" && count > 0 && budget.is_none(), "{after:#}");
    for (kind, most) in [("maps", 20), ("programs", 20)] {
        let objects = after["bpf"][kind].as_array().unwrap();
        assert!((1..=most).contains(&objects.len()), "{after:#}");
        // An empty trie has nothing.
        assert!(objects.iter().all(|object| object["bytes"].is_u64()), "{after:#}");
        assert!(objects.iter().any(|object| object["bytes"].as_u64().unwrap() > 4096), "{after:#}");
    }
    assert_eq!(before["bpf"], after["bpf"]);
    let table = world.agent_on(0).arg("audit").output().unwrap().stdout;
    let table = String::from_utf8_lossy(&table).into_owned();
    assert!(
        table.starts_with("flannel.1: 51 peers\nobject ")
            && table.contains("\nneighbours          1      1       51\n"),
        "{table}"
    );

    // As flannel's daemon makes them, where no agent takes them away.
    let agent = world.hosts[0].agent.as_mut().unwrap();
    agent.signal(Signal::SIGKILL).unwrap();
    agent.wait(SOON).unwrap();
    let [one, two] = [free[0], free[1]];
    for command in [
        format!("ip neigh add 10.5.{one}.0 lladdr 0a:00:00:00:00:09 dev flannel.1 nud permanent"),
        format!("bridge fdb add 0a:00:00:00:00:09 dst 192.168.65.{one} dev flannel.1"),
        format!("ip route add 10.5.{one}.0/24 via 10.5.{one}.0 dev flannel.1 onlink"),
        format!("ip route add 10.5.{two}.0/24 via 10.5.{two}.0 dev flannel.1 onlink"),
    ] {
        world.hosts[0].netns.exec(&command).unwrap();
    }
    let (code, over) = audit(&world);
    assert_eq!(code, Some(3), "{over:#}");
    let named = |index: usize| over["objects"][index]["over"].clone();
    assert_eq!(named(1), json!([format!("10.5.{one}.0/24"), format!("10.5.{two}.0/24")]));
    assert_eq!(named(2), json!([format!("10.5.{one}.0 0a:00:00:00:00:09")]));
    assert_eq!(over["objects"][3]["over"].as_array().unwrap().len(), 1, "{over:#}");
}
