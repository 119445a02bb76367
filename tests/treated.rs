//! What rules change in each packet, and the marks and priorities that they give it: all packets have it, as with the kernel's
//! vxlan device.

use std::time::Duration;

use xtask::{lab::Netns, progress::wait_for};

use crate::{
    stream::Stream,
    world::{SOON, World},
};

/// Two hosts of ours, and two of flannel's.
fn worlds() -> [(&'static str, World); 2] {
    let ours = World::with_agents(2);
    ours.wait_connected(0, 1);
    [("ours", ours), ("kernel vxlan", kernel())]
}

/// Two hosts that the kernel's vxlan device serves, with a pod each.
pub fn kernel() -> World {
    let mut world = World::new(2);
    let octets = [200, 201];
    for (host, octet) in octets.into_iter().enumerate() {
        let World { hosts, store, .. } = &mut world;
        let kernel = hosts[host].become_kernel_vxlan(store, octet).unwrap();
        hosts[host].add_pod_in(&kernel.subnet).unwrap();
    }
    for (host, peer) in [(0, 201), (1, 200)] {
        world.hosts[host].add_kernel_peer_from(&world.store, peer).unwrap();
    }
    world.wait_connected(0, 1);
    world
}

/// Waits until nothing is known of flows before: what is may bypass the stack for a second.
fn wait_forgotten(world: &World) {
    for host in 0..2 {
        wait_for("the flows to be forgotten", SOON, || {
            let flows = &world.status(host)["dataplane"]["flows"]["plain"];
            [&flows["egress"], &flows["ingress"]].iter().all(|count| **count == 0)
        })
        .unwrap();
    }
}

/// How many packets a rule has counted.
fn counted(netns: &Netns, rule: &str) -> u64 {
    let listed = netns.exec("nft list table inet seen").unwrap();
    let line = listed.lines().find(|line| line.contains(rule)).unwrap_or_else(|| panic!("{rule}: {listed}"));
    line.split("packets ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
}

const RULES: [(&str, usize, &str, &str, &str); 4] = [
    ("DSCP where it leaves", 0, "ip dscp set ef", "ip dscp ef", "encapsulated_changed"),
    ("DSCP where it arrives", 1, "ip dscp set ef", "ip dscp ef", "pod_changed"),
    ("TTL where it leaves", 0, "ip ttl set 33", "ip ttl 32", "encapsulated_changed"),
    ("TTL where it arrives", 1, "ip ttl set 33", "ip ttl 33", "pod_changed"),
];

#[test]
fn a_rule_that_changes_packets_changes_each() {
    for (whose, world) in worlds() {
        let [from, to] = [0, 1].map(|host| &world.hosts[host].pods[0]);
        let seen = "add table inet seen\nadd chain inet seen input { type filter hook input priority 0; }\n";
        let rules =
            ["ip dscp ef", "ip ttl 32", "ip ttl 33"].map(|rule| format!("add rule inet seen input {rule} counter\n"));
        to.netns.feed("nft -f -", &format!("{seen}{}", rules.concat())).unwrap();
        for (what, host, rule, seen, event) in RULES {
            let netns = &world.hosts[host].netns;
            if whose == "ours" {
                wait_forgotten(&world);
            }
            let before = counted(&to.netns, seen);
            let noted = || if whose == "ours" { world.counter(host, event) } else { 0 };
            let noted_before = noted();
            netns.exec("nft add table ip change").unwrap();
            netns.feed("nft -f -", "add chain ip change forward { type filter hook forward priority -150; }").unwrap();
            netns.exec(&format!("nft add rule ip change forward udp dport {} {rule}", Stream::PORT)).unwrap();
            let stream = Stream::start(from, to);
            wait_for("many", SOON, || stream.count() > 1500).unwrap();
            let (sent, received) = stream.end();
            assert_eq!(received.len(), sent as usize, "{whose}, {what}");
            assert_eq!(counted(&to.netns, seen) - before, u64::from(sent), "{whose}, {what}: of {sent}");
            if whose == "ours" {
                assert!(noted() - noted_before > u64::from(sent) / 2, "{what}: {} of {sent}", noted() - noted_before);
            }
            netns.exec("nft delete table ip change").unwrap();
        }
    }
}

#[test]
fn a_flow_leaves_the_bypass_when_its_packets_are_changed() {
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    let [from, to] = [0, 1].map(|host| &world.hosts[host].pods[0]);
    let netns = &world.hosts[0].netns;
    let stream = Stream::start(from, to);
    let bypassed = || {
        let before = world.counter(0, "pod_encapsulated");
        wait_for("the bypass", SOON, || world.counter(0, "pod_encapsulated") > before + 500).unwrap();
    };
    bypassed();
    netns
        .exec(&format!("iptables -t mangle -A FORWARD -p udp --dport {} -j DSCP --set-dscp 46", Stream::PORT))
        .unwrap();
    wait_for("the change", Duration::from_secs(3), || world.counter(0, "encapsulated_changed") > 0).unwrap();
    let (fast, changed) = (world.counter(0, "pod_encapsulated"), world.counter(0, "encapsulated_changed"));
    wait_for("more", SOON, || world.counter(0, "encapsulated_changed") > changed + 1000).unwrap();
    // A tick of the coarse clock may have been on its way.
    assert!(world.counter(0, "pod_encapsulated") <= fast + 10, "{fast}, {}", world.counter(0, "pod_encapsulated"));
    netns.exec("iptables -t mangle -F FORWARD").unwrap();
    bypassed();
    let (sent, received) = stream.end();
    assert_eq!(received.len(), sent as usize);
}

/// Packets of the classes of `htb` on the external interface: those with a mark of 0x42, and those of priority 1:20.
fn of_classes(netns: &Netns) -> [u64; 2] {
    let shown = netns.exec("tc -s class show dev eth0").unwrap();
    ["class htb 1:30 ", "class htb 1:20 "].map(|class| {
        let rest = shown.split(class).nth(1).unwrap_or_else(|| panic!("{class}: {shown}"));
        rest.split(" bytes ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
    })
}

#[test]
fn marks_and_priorities_are_on_each_packet_that_leaves() {
    const CLASSES: [&str; 5] = [
        "qdisc add dev eth0 root handle 1: htb default 10",
        "class add dev eth0 parent 1: classid 1:10 htb rate 10gbit",
        "class add dev eth0 parent 1: classid 1:20 htb rate 10gbit",
        "class add dev eth0 parent 1: classid 1:30 htb rate 10gbit",
        // Loads the mark (SKF_AD_MARK), and compares it.
        "filter add dev eth0 parent 1: bpf bytecode MARKED flowid 1:30",
    ];
    const MARKED: &str = "4,32 0 0 4294963220,21 0 1 66,6 0 0 4294967295,6 0 0 0";
    for (whose, world) in worlds() {
        let [from, to] = [0, 1].map(|host| &world.hosts[host].pods[0]);
        let netns = &world.hosts[0].netns;
        for line in CLASSES {
            let arguments: Vec<_> = line.split(' ').map(|word| if word == "MARKED" { MARKED } else { word }).collect();
            xtask::process::output(netns.command("tc").args(arguments)).unwrap();
        }
        for (rules, expected) in [
            (vec!["mangle -A FORWARD -p udp -j MARK --set-mark 0x42"], [1, 0]),
            (vec!["mangle -A POSTROUTING -p udp -j CLASSIFY --set-class 1:20"], [0, 1]),
            // As Calico and others do: on the connection once, from it on each packet.
            (
                vec![
                    "mangle -A PREROUTING -p udp -j CONNMARK --restore-mark",
                    "mangle -A FORWARD -p udp -m mark --mark 0 -j MARK --set-mark 0x42",
                    "mangle -A POSTROUTING -p udp -j CONNMARK --save-mark",
                ],
                [1, 0],
            ),
        ] {
            if whose == "ours" {
                wait_forgotten(&world);
            }
            let fast = || if whose == "ours" { world.counter(0, "pod_encapsulated") } else { 0 };
            // The agent asks a peer by UDP that is sent to and not heard.
            let stream_only = format!("-p udp --dport {}", Stream::PORT);
            let set = |rule: &str| netns.exec(&format!("iptables -t {}", rule.replace("-p udp", &stream_only)));
            rules.iter().for_each(|rule| drop(set(rule).unwrap()));
            let (before, fast_before) = (of_classes(netns), fast());
            let stream = Stream::start(from, to);
            wait_for("many", SOON, || stream.count() > 1500).unwrap();
            let (sent, received) = stream.end();
            let after = of_classes(netns);
            let counted = [0, 1].map(|class| after[class] - before[class]);
            let expected = expected.map(|times| times * u64::from(sent));
            assert_eq!((counted, received.len()), (expected, sent as usize), "{whose}: {rules:?}");
            if whose == "ours" {
                let fast = fast() - fast_before;
                assert!(fast > u64::from(sent) / 2, "{fast} of {sent} past the stack: {rules:?}");
            }
            ["PREROUTING", "FORWARD", "POSTROUTING"]
                .iter()
                .for_each(|chain| drop(netns.exec(&format!("iptables -t mangle -F {chain}")).unwrap()));
        }
    }
}
