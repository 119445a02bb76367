//! Routing rules that tunnel packets meet: followed as the kernel's vxlan device follows them, or named.

use std::{net::SocketAddrV4, time::Duration};

use xtask::progress::{patience, wait_for};

use crate::{
    overlays::Overlay,
    sockets::socket_in,
    world::{SOON, World},
};

/// What the first host has for a table of its own: the way over the underlay's router.
const TABLE: &str = "route add default via 192.168.64.254 dev eth0 table 100";
const DATAGRAMS: u64 = 300;

/// Two hosts, and a router that counts the tunnel packets it forwards.
fn with_router(overlay: Overlay) -> World {
    let world = overlay.world();
    let router = &world.lab.underlay;
    for setting in ["ip_forward=1", "conf.all.send_redirects=0", "conf.br0.send_redirects=0"] {
        router.exec(&format!("sysctl -qw net.ipv4.{setting}")).unwrap();
    }
    // Where the kernel has it: what the bridge forwards would meet the router's rules as well.
    let _absent = router.exec("sysctl -qw net.bridge.bridge-nf-call-iptables=0");
    let counter = "table ip t { counter tunnel { }; chain f { type filter hook forward priority 0;
        udp dport 8472 counter name tunnel; }; }";
    router.feed("nft -f -", counter).unwrap();
    world.hosts[0].netns.ip(TABLE).unwrap();
    world
}

fn routed(world: &World) -> u64 {
    let text = world.lab.underlay.exec("nft -j list counter ip t tunnel").unwrap();
    let listing: serde_json::Value = serde_json::from_str(&text).unwrap();
    listing["nftables"][1]["counter"]["packets"].as_u64().unwrap()
}

/// Sends so many datagrams from the first host's pod to the other's. How many arrived, and by the router.
fn send(world: &World, count: u64) -> (u64, u64) {
    let addresses = [0, 1].map(|host| SocketAddrV4::new(world.hosts[host].pods[0].address, 7777));
    let [from, to] = [0, 1].map(|host| socket_in(&world.hosts[host].pods[0].netns, addresses[host]));
    to.set_read_timeout(Some(Duration::from_millis(200) * patience())).unwrap();
    let before = routed(world);
    let mut arrived = 0;
    for _ in 0..count {
        // Refused where the way is.
        let _refused = from.send_to(&[7; 8], addresses[1]);
        // One that is lost is enough.
        if to.recv(&mut [0; 8]).is_err() {
            break;
        }
        arrived += 1;
    }
    (arrived, routed(world) - before)
}

/// Waits until all arrive by the router, or none does.
fn wait_routed(world: &World, overlay: Overlay, rule: &str, is_routed: bool) {
    // By the event, not by the comparison of each minute.
    let limit = Duration::from_secs(2) * patience();
    let (expected, mut last) = ((5, if is_routed { 5 } else { 0 }), (0, 0));
    let waited = wait_for(rule, limit, || {
        last = send(world, 5);
        last == expected
    });
    assert!(waited.is_ok(), "{overlay:?}, {rule}: {last:?} of {expected:?} arrived, and by the router");
    let bypassed = || if overlay == Overlay::Fast { world.counter(0, "pod_encapsulated") } else { 0 };
    let before = bypassed();
    let expected = if is_routed { DATAGRAMS } else { 0 };
    assert_eq!(send(world, DATAGRAMS), (DATAGRAMS, expected), "{overlay:?}, {rule}");
    assert!(overlay != Overlay::Fast || bypassed() > before + DATAGRAMS / 2, "{rule}: {}", bypassed() - before);
}

#[test]
fn tunnel_packets_follow_rules_as_with_the_kernels_device() {
    for overlay in [Overlay::Kernel, Overlay::Slow, Overlay::Fast] {
        let world = with_router(overlay);
        let host = &world.hosts[0].netns;
        wait_routed(&world, overlay, "no rule", false);
        for rule in [
            "ipproto udp dport 8472 lookup 100",
            "from 192.168.64.1 to 192.168.64.2 dport 8472 lookup 100",
            "iif lo uidrange 0-0 lookup 100",
            "sport 32768-60999 lookup 100",
            "not dport 1-8471 ipproto udp lookup 100",
        ] {
            host.ip(&format!("rule add {rule}")).unwrap();
            wait_routed(&world, overlay, rule, true);
            host.ip(&format!("rule delete {rule}")).unwrap();
            wait_routed(&world, overlay, &format!("without {rule}"), false);
        }
        for rule in
            ["ipproto tcp dport 8472 lookup 100", "dport 8473 lookup 100", "oif eth0 lookup 100", "tos 0x10 lookup 100"]
        {
            host.ip(&format!("rule add {rule}")).unwrap();
            wait_routed(&world, overlay, rule, false);
            host.ip(&format!("rule delete {rule}")).unwrap();
        }
        let refused = "ipproto udp dport 8472 prohibit";
        host.ip(&format!("rule add {refused}")).unwrap();
        wait_for(refused, SOON, || send(&world, 1).0 == 0).unwrap();
        assert_eq!(send(&world, 1), (0, 0), "{overlay:?}");
        if overlay != Overlay::Kernel {
            world.wait_log(0, "nothing can be sent to the peer 192.168.64.2");
        }
        host.ip(&format!("rule delete {refused}")).unwrap();
        wait_routed(&world, overlay, "nothing refused", false);
    }
}

#[test]
fn rules_by_what_packets_of_one_peer_differ_in_are_followed() {
    for overlay in [Overlay::Kernel, Overlay::Slow, Overlay::Fast] {
        let world = with_router(overlay);
        let host = &world.hosts[0].netns;
        // The usual rules of VPNs, which no packet of a pod can meet; of those that follow, some can.
        for rule in [
            "priority 5210 fwmark 0x80000/0xff0000 lookup main",
            "priority 5250 fwmark 0x80000/0xff0000 unreachable",
            "priority 32764 lookup main suppress_prefixlength 0",
            "priority 32765 not fwmark 51820 lookup 51820",
        ] {
            host.ip(&format!("rule add {rule}")).unwrap();
        }
        host.ip("rule add priority 100 fwmark 0x5 lookup 100").unwrap();
        wait_routed(&world, overlay, "no mark", false);
        host.exec("iptables -t mangle -A FORWARD -p udp --dport 7777 -j MARK --set-mark 5").unwrap();
        wait_routed(&world, overlay, "a mark", true);
        // The same way is no other.
        host.ip("route replace default dev eth0 table 100").unwrap();
        wait_routed(&world, overlay, "the same way", false);
        host.ip("route replace default via 192.168.64.254 dev eth0 table 100").unwrap();
        wait_routed(&world, overlay, "another way again", true);
        host.exec("iptables -t mangle -F FORWARD").unwrap();
        wait_routed(&world, overlay, "no mark any more", false);
        host.ip("rule delete priority 100").unwrap();
        // By the half of the ports that the flow is sent from: a rule for each half.
        for (half, is_other) in [("32768-46883", "46884-60999"), ("46884-60999", "32768-46883")] {
            host.ip(&format!("rule add priority 101 sport {half} lookup 100")).unwrap();
            let before = send_many(&world);
            host.ip(&format!("rule add priority 102 sport {is_other} lookup 100")).unwrap();
            wait_routed(&world, overlay, "both halves", true);
            host.ip("rule delete priority 101").unwrap();
            host.ip("rule delete priority 102").unwrap();
            wait_routed(&world, overlay, "neither", false);
            // The kernel's device keeps the way of the flow before, on each CPU.
            if overlay != Overlay::Kernel {
                assert!((25..=75).contains(&before), "{overlay:?}, {half}: {before} of 100 by the router");
            }
        }
    }
}

/// Sends a datagram on each of a hundred flows, once the rule is known. How many went by the router.
fn send_many(world: &World) -> u64 {
    let [from, to] = [0, 1].map(|host| &world.hosts[host].pods[0]);
    let address = SocketAddrV4::new(to.address, 7778);
    let receiver = socket_in(&to.netns, address);
    receiver.set_read_timeout(Some(Duration::from_millis(200) * patience())).unwrap();
    let senders: Vec<_> =
        (0..100).map(|number| socket_in(&from.netns, SocketAddrV4::new(from.address, 20_000 + number))).collect();
    let mut by_router = 0;
    // Where there is nothing to part by, all go one way.
    let _parted = wait_for("a part of the flows by the router", Duration::from_secs(3) * patience(), || {
        let before = routed(world);
        for sender in &senders {
            sender.send_to(&[7; 8], address).unwrap();
            receiver.recv(&mut [0; 8]).unwrap();
        }
        by_router = routed(world) - before;
        by_router != 0 && by_router != 100
    });
    by_router
}
