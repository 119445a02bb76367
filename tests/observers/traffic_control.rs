//! Queueing disciplines and filters, set by hand.

use xtask::{lab::Netns, progress::wait_for, transfer::tcp_transfer};

use super::{Exchange, Served, check};
use crate::world::{SOON, World};

/// What `tc -s` says first of packets: `Sent 84 bytes 1 pkt (dropped 0, ...`.
fn sent(listed: &str) -> u64 {
    let words: Vec<_> = listed.split_whitespace().collect();
    let place = words.iter().position(|word| *word == "Sent").unwrap_or_else(|| panic!("{listed}"));
    words[place + 3].parse().unwrap()
}

/// Where a mirror's copies go: a device with nobody behind it.
fn add_sink(netns: &Netns) {
    netns.ip("link add sink type ifb").unwrap();
    netns.ip("link set sink up").unwrap();
}

fn copies(netns: &Netns) -> u64 {
    netns.ip_json("-s link show sink").unwrap()[0]["stats64"]["rx"]["packets"].as_u64().unwrap()
}

/// A queue at the host's side of the pod's veth, on the bridge: what goes to the pod.
#[test]
fn a_queue_on_a_veth_and_on_the_bridge_takes_each_packet() {
    for served in Served::ALL {
        let world = served.world(1);
        let host = &world.hosts[0].netns;
        for device in ["pod1", "cni0"] {
            let set = |on: bool| {
                let line = if on { "add" } else { "del" };
                host.exec(&format!("tc qdisc {line} dev {device} root handle 7: pfifo limit 1000")).unwrap();
            };
            let seen = || {
                let listed = host.exec(&format!("tc -s qdisc show dev {device} root")).unwrap();
                if listed.contains("pfifo 7:") { sent(&listed) } else { 0 }
            };
            check(served, &format!("queue on {device}"), &world, 1, set, seen);
        }
    }
}

/// Queues that some kernels have and others don't, netem among them: what this one lacks is said.
#[test]
fn a_queue_of_any_kind_on_a_veth_takes_each_packet() {
    for served in [Served::ByUs, Served::ByKernel] {
        let world = served.world(1);
        let host = &world.hosts[0].netns;
        for kind in
            ["netem limit 1000", "prio", "fq_codel", "sfq", "htb default 1", "tbf rate 1gbit burst 1mb latency 1s"]
        {
            let name = kind.split(' ').next().unwrap();
            let line = format!("dev pod1 root handle 7: {kind}");
            if host.exec(&format!("tc qdisc add {line}")).is_err() {
                eprintln!("not run: this kernel has no {name}");
                continue;
            }
            host.exec("tc qdisc del dev pod1 root").unwrap();
            let set = |on: bool| {
                let line = if on { format!("add {line}") } else { "del dev pod1 root".to_owned() };
                host.exec(&format!("tc qdisc {line}")).unwrap();
            };
            let seen = || {
                let listed = host.exec("tc -s qdisc show dev pod1 root").unwrap();
                if listed.contains(&format!("{name} 7:")) { sent(&listed) } else { 0 }
            };
            check(served, &format!("{name} on a veth"), &world, 1, set, seen);
        }
    }
}

/// What limits a pod by a filter; this kernel may lack the action, which is said.
#[test]
fn a_police_filter_on_a_veth_sees_each_packet() {
    for served in [Served::ByUs, Served::ByKernel] {
        let world = served.world(1);
        let host = &world.hosts[0].netns;
        let filter = format!(
            "protocol ip pref 77 u32 match ip dport {} 0xffff action police rate 1gbit burst 1mb conform-exceed drop/pass",
            Exchange::PORT
        );
        let _there = host.exec("tc qdisc add dev pod1 clsact");
        if host.exec(&format!("tc filter add dev pod1 ingress {filter}")).is_err() {
            eprintln!("not run: this kernel has no police");
            continue;
        }
        host.exec("tc filter del dev pod1 ingress pref 77").unwrap();
        let set = |on: bool| {
            for side in ["ingress", "egress"] {
                let line =
                    if on { format!("add dev pod1 {side} {filter}") } else { format!("del dev pod1 {side} pref 77") };
                host.exec(&format!("tc filter {line}")).unwrap();
            }
        };
        let seen = || {
            let of_side = |side| host.exec(&format!("tc -s filter show dev pod1 {side} pref 77")).unwrap();
            ["ingress", "egress"]
                .map(of_side)
                .iter()
                .filter(|listed| listed.contains("Sent "))
                .map(|listed| sent(listed))
                .sum()
        };
        check(served, "police on a veth", &world, 2, set, seen);
    }
}

/// A mirror for an intrusion detection system, on both directions of each device that packets of pods cross.
#[test]
fn a_mirror_on_veth_and_bridge_sees_each_packet() {
    check_mirrors(&["pod1", "cni0"]);
}

#[test]
fn a_mirror_on_the_overlays_device_sees_each_packet() {
    check_mirrors(&["flannel.1"]);
}

/// Mbit/s are what the queue lets through, of a connection that bypassed the stack until then.
#[test]
fn a_queue_on_the_overlays_device_limits_what_goes_out() {
    for served in Served::ALL {
        let world = served.world(1);
        let host = &world.hosts[0].netns;
        let [one, two] = [0, 1].map(|host| &world.hosts[host].pods[0]);
        let gbits = || tcp_transfer(&one.netns, &two.netns, two.address, 1, world.lab.directory()).unwrap().gbits;
        let open = gbits();
        assert!(open > 0.1, "{served:?}: {open} Gb/s");
        host.exec("tc qdisc add dev flannel.1 root tbf rate 10mbit burst 64kb latency 100ms").unwrap();
        wait_for("the limit", SOON, || gbits() < 0.05).unwrap();
        let limited = gbits();
        assert!(limited > 0.002 && limited < 0.02, "{served:?}: {limited} Gb/s");
        host.exec("tc qdisc del dev flannel.1 root").unwrap();
        wait_for("the end of the limit", SOON, || gbits() > 0.1).unwrap();
    }
}

fn check_mirrors(devices: &[&str]) {
    for served in Served::ALL {
        let world = served.world(1);
        let host = &world.hosts[0].netns;
        add_sink(host);
        for device in devices {
            let set = |on: bool| {
                if !on {
                    for side in ["ingress", "egress"] {
                        host.exec(&format!("tc filter del dev {device} {side} pref 77")).unwrap();
                    }
                    return;
                }
                // Where the kernel has no TCX, it is there already.
                let _there = host.exec(&format!("tc qdisc add dev {device} clsact"));
                let filter = format!(
                    "protocol ip pref 77 u32 match ip dport {} 0xffff action mirred egress mirror dev sink",
                    Exchange::PORT
                );
                for side in ["ingress", "egress"] {
                    host.exec(&format!("tc filter add dev {device} {side} {filter}")).unwrap();
                }
            };
            check(served, &format!("mirror on {device}"), &world, 2, set, || copies(host));
        }
    }
}

/// One pod is restricted, and the other goes on past the stack.
#[test]
fn a_queue_of_one_pod_is_none_of_anothers() {
    let world = Served::ByUs.world(2);
    let host = &world.hosts[0].netns;
    host.exec("tc qdisc add dev pod1 root handle 7: pfifo limit 1000").unwrap();
    world.wait_status(0, "the queue", |status| {
        let all = status["bypass"]["restrictions"].as_array().unwrap();
        all.iter().any(|restriction| restriction["subject"] == "pfifo on pod1" && restriction["kind"] == "queue")
    });
    let exchange = |pod: usize| Exchange::new(&world.hosts[0].pods[pod], &world.hosts[1].pods[pod]);
    exchange(1).wait_bypassed(&world, 0);
    let counts = |world: &World| ["pod_encapsulated", "delivered"].map(|label| world.counter(0, label));
    let restricted = exchange(0);
    restricted.times(50);
    let before = counts(&world);
    restricted.times(200);
    assert_eq!(counts(&world), before);
    // What it costs is said, and is no trouble.
    let status = world.agent_on(0).arg("status").output().unwrap();
    let text = String::from_utf8(status.stdout).unwrap();
    assert!(text.contains("pfifo on pod1: the pod's packets take the stack"), "{text}");
    assert_eq!(status.status.code(), Some(0), "{text}");
    let metrics = xtask::process::output(world.agent_on(0).arg("metrics")).unwrap();
    assert!(metrics.contains("flannel_bypass_restrictions{vni=\"1\",kind=\"queue\"} 1"), "{metrics}");
}
