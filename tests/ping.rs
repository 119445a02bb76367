//! `flannel-agent ping`: beside hosts of ours and of flannel's, with faults planted on the way.

use serde_json::Value;

use xtask::progress::wait_for;

use crate::world::{SOON, World};

/// What is said of an address, and whether all is well with it.
fn ping(world: &World, target: &str, arguments: &[&str]) -> (Value, bool) {
    let result =
        world.agent_on(0).args(["ping", target, "-o", "json", "--count", "2"]).args(arguments).output().unwrap();
    assert!([Some(0), Some(3)].contains(&result.status.code()), "{}", String::from_utf8_lossy(&result.stderr));
    (serde_json::from_slice(&result.stdout).unwrap(), result.status.success())
}

/// Kind, bytes, and how many of two were answered.
fn answered(report: &Value) -> Vec<(String, u64, u64)> {
    let asked = report["asked"].as_array().unwrap().iter();
    asked
        .map(|asked| {
            let number = |what: &str| asked[what].as_u64().unwrap();
            assert_eq!(asked["roundTripUs"].is_null(), number("answered") == 0, "{asked}");
            (asked["by"].as_str().unwrap().to_owned(), number("size"), number("answered"))
        })
        .collect()
}

fn rows(expected: &[(&str, u64, u64)]) -> Vec<(String, u64, u64)> {
    expected.iter().map(|(by, size, answered)| ((*by).to_owned(), *size, *answered)).collect()
}

#[test]
fn peers_of_both_kinds_answer_past_the_tunnel_and_through_it() {
    let world = World::beside_flannels();
    let all = rows(&[("underlay", 84, 2), ("overlay", 84, 2), ("overlay", 1450, 2)]);
    let subnet = world.lease_of(1).0.replace('-', "/");
    for target in ["192.168.64.2", &subnet, "192.168.64.3", "10.5.200.0/24"] {
        let (report, is_well) = ping(&world, target, &[]);
        assert!(is_well && report["problem"].is_null(), "{report:#}");
        assert_eq!(answered(&report), all, "{report:#}");
    }
    let pod = world.hosts[1].pods[0].address.to_string();
    let (report, is_well) = ping(&world, &pod, &["--size", "500"]);
    assert!(is_well, "{report:#}");
    assert_eq!(answered(&report), rows(&[("underlay", 84, 2), ("overlay", 500, 2), ("pod", 500, 2)]));
    // What does not fit is sent by nobody.
    let (report, is_well) = ping(&world, "192.168.64.2", &["--size", "1451"]);
    assert!(!is_well, "{report:#}");
    assert!(report["asked"][1]["problem"].as_str().unwrap().starts_with("this host did not send it"), "{report:#}");
    // Nobody's.
    let nobodys = world.agent_on(0).args(["ping", "203.0.113.1"]).output().unwrap();
    assert_eq!(nobodys.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nobodys.stderr).contains("no peer of this host's overlays has 203.0.113.1"));
    // For people.
    let table = world.agent_on(0).args(["ping", &subnet, "-c", "1"]).output().unwrap();
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(
        table.starts_with(&format!("flannel.1: {subnet} by 192.168.64.2, encapsulated by 192.168.64.2 eth0")),
        "{table}"
    );
    world.assert_shown(0, "3 of 3", &[]);
    assert!(table.contains("1 of 1") && table.contains(" ms") && !table.contains("look at"), "{table}");
}

#[test]
fn what_is_between_is_told_from_who_answers() {
    let world = World::beside_flannels();
    // That a rule is about tunnel packets is found within a second.
    let assert_said = |target: &str, words: &str| {
        let mut said = Value::Null;
        let waited = wait_for(words, 2 * SOON, || {
            said = ping(&world, target, &[]).0["problem"].take();
            said.as_str().is_some_and(|said| said.starts_with(words))
        });
        assert!(waited.is_ok(), "{said}, not {words}");
    };
    let netns = &world.hosts[1].netns;
    netns.exec("iptables -I INPUT -p udp --dport 8472 -j DROP").unwrap();
    assert_said("192.168.64.2", "192.168.64.2 answers, and its overlay does not");
    netns.exec("iptables -D INPUT 1").unwrap();

    // Of tunnel packets, only those of up to 1,400 bytes arrive.
    world.lab.underlay.ip("link set node2 mtu 1400").unwrap();
    let (report, is_well) = ping(&world, "192.168.64.2", &[]);
    // A bridge leaves room for a VLAN tag (`is_skb_forwardable`).
    assert_eq!((report["pathMtu"].as_u64(), is_well), (Some(1354), false), "{report:#}");
    assert!(report["problem"].as_str().unwrap().starts_with("packets of up to 1354 bytes pass"), "{report:#}");
    world.assert_shown(0, "packets of up to 1354 bytes pass", &[]);
    world.lab.underlay.ip("link set node2 mtu 1500").unwrap();

    netns.exec("iptables -I FORWARD -p icmp -j DROP").unwrap();
    let pod = world.hosts[1].pods[0].address.to_string();
    assert_said(&pod, "the host answers through the overlay, and the pod does not");
    world.assert_shown(0, "the host answers through the overlay, and the pod does not", &[("10.5.2.7", &pod)]);
    netns.exec("iptables -D FORWARD 1").unwrap();

    world.lab.underlay.ip("link set node2 nomaster").unwrap();
    assert_said("192.168.64.2", "192.168.64.2 does not answer at all (encapsulated by 192.168.64.2 eth0");
}
