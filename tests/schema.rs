//! The documents that commands print with `-o json`: what is in them, and of which type, as `docs/json.md` promises it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::SocketAddrV4,
};

use serde_json::Value;
use xtask::progress::wait_for;

use crate::{
    frames::{FROM_TWO, POD_ONE, POD_TWO, STRANGER, Tunnel, inner, udp, vxlan},
    short_frames::send,
    sockets::socket_in,
    world::{SOON, World},
};

const PAGE: &str = include_str!("../flannel-agent/docs/json.md");

/// Types by path. Below a key of an object the path goes on by a point, below each element of an array by `[]`, and by `.*` below objects
/// whose keys are data.
type Types = BTreeMap<String, BTreeSet<&'static str>>;

const TYPES: [&str; 6] = ["array", "boolean", "null", "number", "object", "string"];

const fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn collect(value: &Value, path: &str, promised: &Types, types: &mut Types) {
    if !path.is_empty() {
        types.entry(path.to_owned()).or_default().insert(type_of(value));
    }
    match value {
        Value::Array(elements) => {
            elements.iter().for_each(|element| collect(element, &format!("{path}[]"), promised, types));
        }
        Value::Object(members) => {
            let any = format!("{path}.*");
            for (key, member) in members {
                let own = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                let path = if promised.contains_key(&any) { &any } else { &own };
                collect(member, path, promised, types);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// What the page promises of a command, and which of it is there in every state.
fn promised(command: &str) -> (Types, BTreeSet<String>) {
    let heading = format!("\n## {command}\n");
    let section = PAGE.split_once(&heading).unwrap_or_else(|| panic!("no section {command}")).1;
    let section = section.split("\n## ").next().unwrap();
    let (mut types, mut always) = (Types::new(), BTreeSet::new());
    for row in section.lines().filter_map(|line| line.strip_prefix("| `")) {
        let (path, words) = row.split_once("` | ").unwrap();
        let words: Vec<_> = words.trim_end_matches(" |").split(&[' ', ','][..]).collect();
        types.insert(path.to_owned(), TYPES.iter().copied().filter(|name| words.contains(name)).collect());
        if !words.contains(&"sometimes") {
            always.insert(path.to_owned());
        }
    }
    (types, always)
}

#[test]
fn each_document_has_what_is_promised_and_nothing_else() {
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    world.wait_pods(0);
    let pods = [0, 1].map(|host| &world.hosts[host].pods[0]);
    let [from, to] = pods.map(|pod| socket_in(&pod.netns, SocketAddrV4::new(pod.address, 7001)));
    let links = world.hosts[0].netns.ip_json("link show eth0").unwrap();
    let mut frame = Tunnel { source: STRANGER, ..FROM_TWO }.around(&vxlan(8, 1), &inner(&udp(POD_TWO, POD_ONE)));
    for (byte, octet) in frame.iter_mut().zip(links[0]["address"].as_str().unwrap().split(':')) {
        *byte = u8::from_str_radix(octet, 16).unwrap();
    }
    send(&world.lab.underlay, "node1", &[&frame]);
    wait_for("a drop and a flow", SOON, || {
        from.send_to(&[7; 50], to.local_addr().unwrap()).unwrap();
        let status = world.status(0);
        status["dataplane"]["drops"] != serde_json::json!([]) && status["troubles"] == serde_json::json!([])
    })
    .unwrap();

    let endpoints = format!("--etcd-endpoints={}", world.store.endpoint());
    let addresses = pods.map(|pod| pod.address.to_string());
    let mut wrong = String::new();
    for (command, arguments) in [
        ("status", &["status"][..]),
        ("peers", &["peers"]),
        ("drops", &["drops"]),
        ("ping", &["ping", "192.168.64.2", "-c", "1"]),
        ("trace", &["trace", &addresses[0], &addresses[1], "--udp", "--dport", "7001"]),
        ("explain", &["explain", "not_admitted"]),
        ("doctor", &["doctor", &endpoints]),
        ("audit", &["audit"]),
        ("version", &["version"]),
        ("config show", &["config", "show", &endpoints]),
        ("lease show", &["lease", "show", &endpoints]),
    ] {
        let output = world.agent_on(0).args(arguments).args(["-o", "json"]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let document: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{command}: {error}: {text}"));
        assert_eq!(document["apiVersion"], "flannel-agent/v1", "{command}");
        let (promised, always) = promised(command);
        let mut found = Types::new();
        collect(&document, "", &promised, &mut found);
        for (path, types) in &found {
            match promised.get(path) {
                Some(promised) if types.is_subset(promised) => {}
                promised => writeln!(wrong, "{command}: {path} is {types:?}, promised {promised:?}").unwrap(),
            }
        }
        for path in always.iter().filter(|path| !found.contains_key(*path)) {
            writeln!(wrong, "{command}: {path} is not there").unwrap();
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}
