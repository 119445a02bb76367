//! `flannel-agent peers`: how each peer is reached, and what is wrong with it.

use nix::sys::signal::Signal;
use serde_json::Value;
use xtask::{
    lab::{
        PREFIX,
        servers::{WebServer, curl},
    },
    process::output,
    progress::wait_for,
};

use crate::world::{SOON, World, is_answered, lease_value};

fn peers(world: &World) -> Vec<Value> {
    let text = output(world.agent_on(0).args(["peers", "-o", "json"])).unwrap();
    let document: Value = serde_json::from_str(&text).unwrap();
    document["overlays"][0]["peers"].as_array().unwrap().clone()
}

/// Their VTEP addresses, states and reasons, in the order in which they are shown.
fn states(world: &World) -> Vec<(String, String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    peers(world).iter().map(|peer| (text(&peer["address"]), text(&peer["state"]), text(&peer["reason"]))).collect()
}

#[test]
fn each_peer_is_named_with_what_is_wrong_the_worst_first() {
    let mut world = World::with_agents(2);
    let netns = &world.hosts[0].netns;
    netns.ip("route add unreachable 192.0.2.9").unwrap();
    // Behind the others, by their subnets.
    let leased = [0, 1].map(|host| world.lease_of(host).0);
    let free: Vec<_> =
        (1..=254).rev().filter(|third| !leased.contains(&format!("10.5.{third}.0-24"))).take(2).collect();
    for (third, address) in free.iter().zip(["192.0.2.9", "192.168.64.77"]) {
        let key = format!("{PREFIX}/subnets/10.5.{third}.0-24");
        world.store.put(&key, &lease_value(address, "0a:00:00:00:00:02")).unwrap();
    }
    let other = world.lease_of(1).0.replace('-', "/");
    world.wait_connected(0, 1);
    // The next hop that nobody answers for is asked for by a packet.
    let unanswered = format!("10.5.{}.2", free[1]);
    let send = || is_answered(&world.hosts[0].pods[0].netns, &unanswered);
    let wanted = |states: &[(String, String, String)]| {
        let short: Vec<_> = states.iter().map(|(address, state, _)| (address.as_str(), state.as_str())).collect();
        short == [("192.0.2.9", "noRoute"), ("192.168.64.77", "unresolved"), ("192.168.64.2", "ok")]
    };
    let waited = wait_for("all three", SOON, || !send() && wanted(&states(&world)));
    assert!(waited.is_ok(), "{:#?}", peers(&world));
    let said = states(&world);
    assert_eq!(said[0].2, "the underlay has no route to it; see `ip route get 192.0.2.9`");
    assert_eq!(said[1].2, "192.168.64.77 does not answer ARP on eth0; nothing has come from it yet");
    assert_eq!(said[2].2, "");
    let all = peers(&world);
    let mac = serde_json::from_str::<Value>(&world.lease_of(1).1).unwrap()["BackendData"]["VtepMAC"].clone();
    assert_eq!((&all[2]["subnet"], &all[2]["vtepMac"]), (&Value::from(other.as_str()), &mac));
    assert_eq!((&all[2]["nextHop"], &all[2]["interface"]), (&"192.168.64.2".into(), &"eth0".into()));
    assert_eq!(all[2]["way"], "encapsulated");
    assert!(all[2]["lastHeardMs"].as_u64().unwrap() < 60_000, "{}", all[2]);
    assert_eq!(all[1]["lastHeardMs"], Value::Null);

    // The same, in columns, and without an agent.
    world.hosts[0].agent.as_ref().unwrap().signal(Signal::SIGKILL).unwrap();
    world.hosts[0].agent = None;
    let table = output(world.agent_on(0).arg("peers")).unwrap();
    let lines: Vec<_> = table.lines().collect();
    assert!(lines[0].starts_with("flannel.1 (no agent is running"), "{table}");
    assert!(lines[1].starts_with("state") && lines[1].contains("last heard"), "{table}");
    assert!(lines[2].starts_with("no route") && lines[3].starts_with("unresolved"), "{table}");
    assert!(lines[4].starts_with("ok") && lines[4].contains(&other), "{table}");
}

#[test]
fn a_host_without_peers_says_so() {
    let world = World::with_agents(1);
    assert_eq!(output(world.agent_on(0).arg("peers")).unwrap(), "flannel.1: no peers\n");
}

/// What was sent to the only peer of a host, and received from it: packets and bytes.
fn traffic(world: &World, host: usize) -> [u64; 4] {
    let text = output(world.agent_on(host).args(["peers", "-o", "json"])).unwrap();
    let document: Value = serde_json::from_str(&text).unwrap();
    let peer = &document["overlays"][0]["peers"][0];
    let number = |way: &str, what: &str| peer[way][what].as_u64().unwrap();
    [number("sent", "packets"), number("sent", "bytes"), number("received", "packets"), number("received", "bytes")]
}

/// Each packet is counted once for its peer, past the stack or not, however its next hop is known.
fn is_counted_once(arguments: &[&str]) {
    const PACKETS: u64 = 20;
    let world = World::new(2).ready(arguments);
    world.wait_connected(0, 1);
    let [pod, far] = [0, 1].map(|host| &world.hosts[host].pods[0]);
    for (payload, what) in [(100, "ping -q"), (1000, "ping -q -i 0.01")] {
        let before = [0, 1].map(|host| traffic(&world, host));
        let command = format!("{what} -c {PACKETS} -s {payload} {}", far.address);
        let said = pod.netns.exec(&command).unwrap();
        assert!(said.contains(" 0% packet loss"), "{said}");
        // Behind its IPv4 and ICMP headers.
        let bytes = PACKETS * (payload + 28);
        let after = [0, 1].map(|host| traffic(&world, host));
        for (before, after) in before.iter().zip(after) {
            let counted: Vec<_> = after.iter().zip(before).map(|(after, before)| after - before).collect();
            assert_eq!(counted, [PACKETS, bytes, PACKETS, bytes], "{payload}");
        }
    }
    // A flow that bypasses the stack.
    let [sent, ..] = traffic(&world, 0);
    let bypassed = || world.counter(0, "pod_encapsulated") + world.counter(0, "pod_direct");
    let before = bypassed();
    let server = WebServer::start(far, 8080, "far").unwrap();
    for _ in 0..20 {
        curl(&pod.netns, &format!("http://{}:8080/", far.address), None).unwrap();
    }
    drop(server);
    let [now, ..] = traffic(&world, 0);
    assert!(now - sent >= 20 * 5, "{}", now - sent);
    assert_eq!(bypassed() > before, !arguments.contains(&"--bypass=off"));
}

#[test]
fn what_goes_to_and_from_a_peer_is_counted_once() {
    is_counted_once(&[]);
}

#[test]
fn the_same_through_the_stack_and_by_xdp() {
    is_counted_once(&["--bypass=off", "--xdp=generic"]);
}
