//! The packet rules as `nft` and `iptables-save` list them, and what is left of them afterwards.

use std::fs;

use serde_json::{Value, json};
use xtask::{lab::PREFIX, process::output, progress::wait_for};

use crate::{
    netfilter::{BOTH, MASQUERADE, assert_nothing, config, ours, world},
    world::{SOON, World, is_delivered},
};

/// What a host asks for that had it before.
const SUBNET: &str = "10.5.28.0/24";

/// Without what differs from run to run.
fn without_handles(mut value: Value) -> Value {
    match &mut value {
        Value::Array(values) => values.iter_mut().for_each(|value| *value = without_handles(value.take())),
        Value::Object(map) => {
            map.shift_remove("handle");
            map.values_mut().for_each(|value| *value = without_handles(value.take()));
        }
        _ => {}
    }
    value
}

#[test]
fn the_table_of_nftables_is_this() {
    let world = World::without_config(1);
    world.store.put(&format!("{PREFIX}/config"), &config("").replace("191.0", "128.0")).unwrap();
    let world = world.ready(MASQUERADE);
    let listed = world.hosts[0].netns.exec("nft -j list table ip flannel-ipv4").unwrap();
    let listed = without_handles(serde_json::from_str(&listed).unwrap());
    let prefix = |text: &str| {
        let (address, len) = text.split_once('/').unwrap();
        json!({"prefix": {"addr": address, "len": len.parse::<u8>().unwrap()}})
    };
    let matched = |op: &str, field: &str, net: &str| json!({"match": {"op": op, "left": {"payload": {"protocol": "ip", "field": field}}, "right": prefix(net)}});
    let (network, subnet) = ("10.5.0.0/16", "10.5.128.0/24");
    let mark = json!({"match": {"op": "==", "left": {"&": [{"meta": {"key": "mark"}}, 0x4000]}, "right": 0x4000}});
    let (back, masquerade) = (json!({"return": null}), json!({"masquerade": {"flags": "fully-random"}}));
    let rules = [
        vec![mark, back.clone()],
        vec![matched("==", "saddr", subnet), matched("==", "daddr", network), back.clone()],
        vec![matched("==", "saddr", network), matched("==", "daddr", subnet), back.clone()],
        vec![matched("!=", "saddr", network), matched("==", "daddr", subnet), back],
        vec![matched("==", "saddr", network), matched("!=", "daddr", "224.0.0.0/4"), masquerade.clone()],
        vec![matched("!=", "saddr", network), matched("==", "daddr", network), masquerade],
    ];
    let mut expected = vec![
        json!({"table": {"family": "ip", "name": "flannel-ipv4"}}),
        json!({"chain": {"family": "ip", "table": "flannel-ipv4", "name": "postrtg-late", "type": "nat",
            "hook": "postrouting", "prio": 110, "policy": "accept"}}),
    ];
    let rule = |expr| json!({"rule": {"family": "ip", "table": "flannel-ipv4", "chain": "postrtg-late", "comment": "flanneld masq", "expr": expr}});
    expected.extend(rules.map(rule));
    assert_eq!(listed["nftables"].as_array().unwrap()[1..], expected, "{listed:#}");
    world.wait_status(0, "the rules", |status| {
        (&status["rules"]["masquerade"], &status["rules"]["forward"]) == (&json!("nftables"), &json!(true))
    });
    let file = fs::read_to_string(world.hosts[0].run_dir().join("subnet.env")).unwrap();
    assert!(file.ends_with("FLANNEL_IPMASQ=true\n"), "{file}");
}

/// flannel's, to the letter.
fn iptables_rules(subnet: &str) -> Vec<String> {
    const RULES: &str = r#":FLANNEL-FWD -
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
:FLANNEL-POSTRTG -
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s SUBNET -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 -d SUBNET -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d SUBNET -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully"#;
    let mut rules: Vec<_> = RULES.lines().map(|line| line.replace("SUBNET", subnet)).collect();
    rules.sort();
    rules
}

/// Those that accept, in what `iptables-save` lists.
fn forwarding(saved: &[String]) -> Vec<&String> {
    saved.iter().filter(|line| line.contains("FLANNEL-FWD")).collect()
}

#[test]
fn switching_leaves_nothing_of_the_other_nor_of_flannels() {
    let mut world = World::with_any_subnet(1);
    // Of a flannel that used nftables, of one that used iptables, and of one before it had chains of its own.
    let flannels = "table ip flannel-ipv4 { chain postrtg { type nat hook postrouting priority srcnat; policy accept;
        ip saddr != 10.5.28.0/24 ip daddr 10.5.0.0/16 return; }; chain forward { type filter hook forward priority filter;
        ip saddr 10.5.0.0/16 accept; }; }; table ip6 flannel-ipv6 { chain forward { }; }";
    world.hosts[0].netns.feed("nft -f -", flannels).unwrap();
    let old = r#"*nat
:FLANNEL-POSTRTG - [0:0]
-A FLANNEL-POSTRTG -s 10.5.7.0/24 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j RETURN
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A POSTROUTING -s 10.5.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE
COMMIT
*filter
:FLANNEL-FWD - [0:0]
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
COMMIT
"#;
    world.hosts[0].netns.feed("iptables-restore --noflush", old).unwrap();
    let run_dir = world.hosts[0].run_dir();
    fs::create_dir_all(&run_dir).unwrap();
    fs::write(run_dir.join("subnet.env"), format!("FLANNEL_SUBNET={SUBNET}\n")).unwrap();
    let any_subnet = |more: &str| format!(r#"{{"Network": "10.5.0.0/16", {more} "Backend": {{"Type": "vxlan"}}}}"#);
    world.start(0, MASQUERADE);
    world.wait_status(0, "rules", |status| status["rules"]["masquerade"] == "nftables");
    let (saved, tables) = ours(&world);
    assert_eq!((saved.len(), forwarding(&saved).len()), (4, 4), "{saved:#?}");
    assert!(tables.contains(&format!("ip saddr != 10.5.0.0/16 ip daddr {SUBNET} return")), "{tables}");
    assert!(!tables.contains("flannel-ipv6") && !tables.contains("chain forward"), "{tables}");

    let restart = |world: &mut World, config: &str, arguments: &[&str]| {
        world.hosts[0].agent = None;
        world.store.put(&format!("{PREFIX}/config"), config).unwrap();
        world.start(0, arguments);
        world.wait_log(0, "carries");
    };
    restart(&mut world, &any_subnet(r#""EnableNFTables": false,"#), MASQUERADE);
    let (mut saved, tables) = ours(&world);
    saved.sort();
    assert_eq!((saved, tables.as_str()), (iptables_rules(SUBNET), ""));

    // Another VNI's names are its own, and what the same Network had by flannel's is gone.
    let other = any_subnet(r#""EnableNFTables": false,"#).replace(r#""Type""#, r#""VNI": 7, "Type""#);
    restart(&mut world, &other, MASQUERADE);
    let (saved, _) = ours(&world);
    assert_eq!(saved.len(), iptables_rules(SUBNET).len(), "{saved:#?}");
    assert!(
        saved.iter().all(|line| line.contains("FLANNEL-POSTRTG-7") || line.contains("FLANNEL-FWD-7")),
        "{saved:#?}"
    );
    world.hosts[0].agent = None;
    output(world.agent_on(0).arg("cleanup")).unwrap();
    assert_nothing(&world);

    // Another Network, and back to nftables.
    restart(&mut world, &any_subnet(r#""EnableNFTables": false,"#), MASQUERADE);
    restart(&mut world, &any_subnet(r#""EnableNFTables": true,"#).replace("10.5", "10.6"), MASQUERADE);
    let (saved, tables) = ours(&world);
    assert_eq!((saved.len(), forwarding(&saved).len()), (4, 4), "{saved:#?}");
    assert!(!saved.iter().any(|line| line.contains("10.5.")), "{saved:#?}");
    assert!(tables.contains("10.6.0.0/16") && !tables.contains("10.5."), "{tables}");
    world.hosts[0].agent = None;
    output(world.agent_on(0).arg("cleanup")).unwrap();
    assert_nothing(&world);
}

#[test]
fn cleanup_takes_rules_and_blackhole_away() {
    for more in BOTH {
        let arguments = [MASQUERADE, &["--ip-blackhole-route", "--iptables-forward-rules"]].concat();
        let mut world = world(1, &config(more), &arguments);
        assert_ne!(ours(&world), (Vec::new(), String::new()));
        world.hosts[0].agent = None;
        // They outlive the agent, as the datapath does.
        assert_ne!(ours(&world), (Vec::new(), String::new()));
        output(world.agent_on(0).arg("cleanup")).unwrap();
        assert_nothing(&world);
        assert_eq!(world.hosts[0].netns.ip("route show type blackhole").unwrap(), "");
    }
}

#[test]
fn a_blackhole_is_what_remains_without_pods() {
    let mut world = World::new(1);
    let run_dir = world.hosts[0].run_dir();
    fs::create_dir_all(&run_dir).unwrap();
    fs::write(run_dir.join("subnet.env"), "FLANNEL_SUBNET=10.5.130.1/24\n").unwrap();
    // flannel's, which comes before the route to the pods.
    world.hosts[0].netns.ip("route add blackhole 10.5.130.0/24").unwrap();
    world.start(0, &["--ip-blackhole-route"]);
    world.wait_log(0, "carries 10.5.130.0/24");
    let blackholes = |world: &World| world.hosts[0].netns.ip("route show type blackhole").unwrap();
    let ours = "blackhole 10.5.130.0/24 proto static metric 4294967294";
    assert_eq!(blackholes(&world).trim(), ours);
    assert!(world.hosts[0].netns.ip("route get 10.5.130.7").is_err());
    world.hosts[0].add_pod().unwrap();
    let pod = world.hosts[0].pods[0].address.to_string();
    assert!(is_delivered(&world.hosts[0].netns, &pod));

    world.hosts[0].netns.ip("route delete blackhole 10.5.130.0/24 metric 4294967294").unwrap();
    wait_for("the blackhole", SOON, || blackholes(&world).trim() == ours).unwrap();
    world.hosts[0].agent = None;
    world.start(0, &[]);
    world.wait_log(0, "carries");
    assert_eq!(blackholes(&world), "");
}
