//! Which nodes are peers, and that none is lost that may live: whatever its annotations say, whatever a list lacks.

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use xtask::{lab::ApiServer, progress::wait_for};

use super::{Cluster, on_double};
use crate::world::SOON;

/// Those of [`with_quiet_peers`].
const QUIET: std::ops::Range<u8> = 200..212;

/// Two hosts that talk, and twelve that never send, whom both know.
fn with_quiet_peers() -> Cluster {
    let cluster = Cluster::with_pods(2);
    cluster.wait_connected(0, 1);
    QUIET.for_each(|octet| cluster.add_peer(octet));
    for host in 0..2 {
        cluster.wait_peers(host, 13);
        cluster.wait_last_known(host);
    }
    cluster
}

/// What a host knows of the peer with the podCIDR 10.5.x.0/24: address and MAC.
fn peer(cluster: &Cluster, host: usize, octet: u8) -> Option<(String, String)> {
    let path = cluster.hosts[host].run_dir().join("flannel.1.leases");
    let known = std::fs::read_to_string(path).ok()?;
    let known: Value = serde_json::from_str(known.get(9..)?).ok()?;
    let peer = &known["peers"][format!("10.5.{octet}.0/24")];
    Some((peer["publicIp"].as_str()?.to_owned(), peer["vtepMac"].as_str()?.to_owned()))
}

/// Waits until a host knows this, or nothing, of a peer.
fn wait_peer(cluster: &Cluster, host: usize, octet: u8, address_and_mac: Option<(&str, &str)>) {
    let wanted = address_and_mac.map(|(address, mac)| (address.to_owned(), mac.to_owned()));
    let waited = wait_for("a peer", SOON, || peer(cluster, host, octet) == wanted);
    let log = || cluster.hosts[host].agent.as_ref().map(|agent| agent.log()).unwrap_or_default();
    assert!(waited.is_ok(), "10.5.{octet}.0/24: {:?}, not {wanted:?}\n{}", peer(cluster, host, octet), log());
}

fn passed_over(cluster: &Cluster, host: usize, name: &str) -> String {
    cluster.status(host)["status"]["store"]["passedOver"][name].as_str().unwrap_or_default().to_owned()
}

/// Waits until a host says something of a node.
fn wait_said(cluster: &Cluster, host: usize, name: &str, text: &str) {
    let waited = wait_for(text, SOON, || passed_over(cluster, host, name).contains(text));
    assert!(waited.is_ok(), "{name}: {:?} lacks {text:?}", passed_over(cluster, host, name));
    // It is among what an operator should look at, as far as that is put into words.
    let all = cluster.status(host)["status"]["store"]["passedOver"].as_object().unwrap().len();
    let troubles = cluster.status(host)["troubles"].to_string();
    assert!(
        all > 10 || troubles.contains(&format!("the entry \\\"{name}\\\" in Kubernetes is passed over")),
        "{troubles}"
    );
}

/// Waits until a host has judged what went before: a peer that comes and goes is gone.
fn wait_judged(cluster: &Cluster, host: usize) {
    cluster.add_peer(250);
    wait_peer(cluster, host, 250, Some(("192.168.64.250", "0a:00:00:00:00:fa")));
    cluster.delete_node("peer250");
    wait_peer(cluster, host, 250, None);
}

fn resyncs(cluster: &Cluster, host: usize) -> Value {
    cluster.status(host)["status"]["store"]["resyncs"].clone()
}

#[test]
fn nonsense_in_annotations_costs_no_peer() {
    let mut cluster = Cluster::with_pods(1);
    let own_mac = cluster.wait_announced(0);
    let own_data = format!(r#"{{"VNI":1,"VtepMAC":"{own_mac}"}}"#);
    let long = format!(r#"{{"VNI":1,"VtepMAC":"{}"}}"#, "0a".repeat(100_000));
    let data = |data| vec![("backend-data", Some(data))];
    type Annotations<'a> = Vec<(&'a str, Option<&'a str>)>;
    let nonsense: [(Annotations<'_>, &str); 13] = [
        (data(r#"{"VNI":1,"VtepMAC":"00:00:00:00:00:00"}"#), "is not a unicast MAC address"),
        (data(r#"{"VNI":1,"VtepMAC":"03:00:00:00:00:01"}"#), "is not a unicast MAC address"),
        (data(r#"{"VNI":7,"VtepMAC":"0a:00:00:00:00:01"}"#), "its VNI is 7, not 1"),
        (data(r#"{"VNI":1,"Vtep"#), "its annotation backend-data is no JSON"),
        (data(&long), "is not a unicast MAC address"),
        (data(""), "it has no annotation backend-data"),
        (vec![("backend-data", None)], "it has no annotation backend-data"),
        (vec![("public-ip", Some("300.1.1.1"))], r#"its annotation public-ip "300.1.1.1" is no IPv4 address"#),
        (vec![("public-ip", Some("224.0.0.1"))], "its PublicIP 224.0.0.1 is no host's"),
        (vec![("kube-subnet-manager", None)], "flannel's annotations are gone from it"),
        (
            vec![("kube-subnet-manager", None), ("backend-data", None), ("backend-type", None), ("public-ip", None)],
            "flannel's annotations are gone from it",
        ),
        (vec![("backend-data", Some(&own_data))], "of this host's own VTEP"),
        (
            vec![("backend-data", Some(&own_data)), ("public-ip", Some("192.168.64.1"))],
            "it names this host's own address 192.168.64.1",
        ),
    ];
    let octets = || (100..).take(nonsense.len());
    let before = |octet| (format!("192.168.64.{octet}"), format!("0a:00:00:00:00:{octet:02x}"));
    octets().for_each(|octet| cluster.add_peer(octet));
    cluster.wait_peers(0, nonsense.len());
    for (octet, (annotations, _)) in octets().zip(&nonsense) {
        cluster.annotate(&format!("peer{octet}"), annotations);
    }
    let assert_all_are_kept = |cluster: &Cluster| {
        for (octet, (_, reason)) in octets().zip(&nonsense) {
            let (name, (address, mac)) = (format!("peer{octet}"), before(octet));
            wait_said(cluster, 0, &name, reason);
            wait_said(cluster, 0, &name, &format!("; what it announced before counts: {address} with the MAC {mac}"));
            assert!(passed_over(cluster, 0, &name).len() < 1000);
        }
        wait_judged(cluster, 0);
        cluster.wait_peers(0, nonsense.len());
        for octet in octets() {
            assert_eq!(peer(cluster, 0, octet), Some(before(octet)));
        }
        assert_eq!(cluster.status(0)["status"]["held"], json!([]));
    };
    assert_all_are_kept(&cluster);
    // All is listed again.
    cluster.store.server.stop();
    cluster.wait_status(0, "to be away", |status| status["store"]["following"] == false);
    cluster.store.server.resume().unwrap();
    cluster.wait_followed(0);
    assert_all_are_kept(&cluster);
    // Another agent, which has never heard them say anything else.
    cluster.wait_last_known(0);
    cluster.start(0, &[]);
    cluster.wait_log(0, "carries");
    cluster.wait_followed(0);
    assert_all_are_kept(&cluster);

    // What is sound counts at once, and nothing is said of it any more.
    for octet in octets() {
        cluster.announce(&format!("peer{octet}"), &format!("192.168.64.{octet}"), "0a:00:00:00:01:01");
    }
    for octet in octets() {
        let address = format!("192.168.64.{octet}");
        wait_peer(&cluster, 0, octet, Some((&address, "0a:00:00:00:01:01")));
    }
    cluster.wait_status(0, "nothing to be said", |status| status["store"]["passedOver"] == json!({}));
    // Nonsense is no reason to keep who is gone.
    cluster.annotate("peer100", &[("backend-data", Some("nonsense"))]);
    wait_said(&cluster, 0, "peer100", "no JSON");
    cluster.delete_node("peer100");
    wait_peer(&cluster, 0, 100, None);
    cluster.wait_status(0, "nothing to be said", |status| status["store"]["passedOver"] == json!({}));
}

#[test]
fn a_node_with_another_backend_is_no_peer_and_no_trouble() {
    let cluster = Cluster::with_pods(1);
    (100..102).for_each(|octet| cluster.add_peer(octet));
    cluster.wait_peers(0, 2);
    // As flannel's write it: alloc and udp say nothing of themselves.
    cluster.annotate("peer100", &[("backend-type", Some("host-gw")), ("backend-data", Some("null"))]);
    cluster.annotate("peer101", &[("backend-type", Some("")), ("backend-data", Some("null"))]);
    wait_peer(&cluster, 0, 100, None);
    wait_peer(&cluster, 0, 101, None);
    cluster.wait_status(0, "two of other backends", |status| {
        status["otherBackends"] == json!({ "host-gw": 1, "none": 1 }) && status["held"] == json!([])
    });
    let status = cluster.status(0);
    assert_eq!((&status["troubles"], &status["status"]["store"]["passedOver"]), (&json!([]), &json!({})), "{status:#}");
    cluster.announce("peer100", "192.168.64.100", "0a:00:00:00:01:01");
    wait_peer(&cluster, 0, 100, Some(("192.168.64.100", "0a:00:00:00:01:01")));
    cluster.delete_node("peer101");
    cluster.wait_status(0, "none of other backends", |status| status["otherBackends"] == json!({}));
}

#[test]
fn a_node_that_comes_back_is_another() {
    let cluster = Cluster::with_pods(1);
    // Of so many, one that goes is not most.
    (200..206).for_each(|octet| cluster.add_peer(octet));
    wait_peer(&cluster, 0, 200, Some(("192.168.64.200", "0a:00:00:00:00:c8")));
    // With the same podCIDR, and before anybody has missed it.
    cluster.delete_node("peer200");
    cluster.add_node("peer200", &["10.5.200.0/24"]);
    cluster.announce("peer200", "192.168.64.201", "0a:00:00:00:01:c8");
    wait_peer(&cluster, 0, 200, Some(("192.168.64.201", "0a:00:00:00:01:c8")));
    wait_judged(&cluster, 0);
    assert!(peer(&cluster, 0, 200).is_some());
    // It says nothing yet: what the one before announced is not its own.
    cluster.delete_node("peer200");
    cluster.add_node("peer200", &["10.5.200.0/24"]);
    wait_peer(&cluster, 0, 200, None);
    cluster.announce("peer200", "192.168.64.200", "0a:00:00:00:00:c8");
    wait_peer(&cluster, 0, 200, Some(("192.168.64.200", "0a:00:00:00:00:c8")));
    // With another one.
    cluster.delete_node("peer200");
    cluster.add_node("peer200", &["10.5.210.0/24"]);
    cluster.announce("peer200", "192.168.64.200", "0a:00:00:00:00:c8");
    wait_peer(&cluster, 0, 210, Some(("192.168.64.200", "0a:00:00:00:00:c8")));
    wait_peer(&cluster, 0, 200, None);
    assert_eq!(resyncs(&cluster, 0), json!({"start": 1}));
}

#[test]
fn a_pod_cidr_may_come_later_and_heartbeats_cost_no_reading() {
    let cluster = Cluster::with_pods(1);
    cluster.wait_followed(0);
    let assign = |name: &str, pod_cidr: &str| {
        cluster.patch_node(name, &json!({"spec": {"podCIDR": pod_cidr, "podCIDRs": [pod_cidr]}}));
    };
    // As it goes: the podCIDR, then flannel's annotations.
    cluster.add_node("slow", &[]);
    assign("slow", "10.5.200.0/24");
    cluster.announce("slow", "192.168.64.200", "0a:00:00:00:00:c8");
    wait_peer(&cluster, 0, 200, Some(("192.168.64.200", "0a:00:00:00:00:c8")));
    // The other way round.
    cluster.add_node("late", &[]);
    cluster.announce("late", "192.168.64.201", "0a:00:00:00:00:c9");
    wait_said(&cluster, 0, "late", "it has no podCIDR");
    let reads = || if ApiServer::is_double() { cluster.count("get nodes") } else { 0 };
    let heartbeat = |name: &str, number: u8| {
        cluster.patch_node(name, &json!({"metadata": {"annotations": {"heartbeat": number.to_string()}}}));
    };
    let (before, begun) = (reads(), std::time::Instant::now());
    for number in 0..50 {
        heartbeat("late", number);
        heartbeat("slow", number);
    }
    // What comes after them is known.
    wait_judged(&cluster, 0);
    // One in a second, of those only that have none; and that of `wait_judged`.
    let most = i64::try_from(begun.elapsed().as_secs()).unwrap() + 3;
    assert!(reads() - before <= most, "{} in {:?}", reads() - before, begun.elapsed());
    assign("late", "10.5.201.0/24");
    wait_peer(&cluster, 0, 201, Some(("192.168.64.201", "0a:00:00:00:00:c9")));
    assert_eq!(passed_over(&cluster, 0, "late"), "");
    assert_eq!(resyncs(&cluster, 0), json!({"start": 1}));
    if on_double("how often nodes are listed") {
        assert_eq!(cluster.count("list nodes"), 1, "the watch goes on from the list of the start");
    }
}

#[test]
fn a_node_that_cannot_be_read_whole_is_read_again_and_no_list_is() {
    if !on_double("a node that can't be read") {
        return;
    }
    let cluster = Cluster::with_pods(1);
    cluster.wait_followed(0);
    cluster.fault(json!({"verb": "get", "resource": "nodes", "status": 429, "retryAfter": 1, "times": 2}));
    cluster.add_peer(200);
    wait_said(&cluster, 0, "peer200", "its podCIDR can't be read: ");
    wait_peer(&cluster, 0, 200, Some(("192.168.64.200", "0a:00:00:00:00:c8")));
    // One that is never answered keeps nobody waiting.
    cluster.fault(json!({"verb": "get", "resource": "nodes", "hang": true, "times": 1}));
    cluster.add_peer(201);
    wait_for("the fault", SOON, || cluster.count("get nodes") >= 4).unwrap();
    cluster.announce("peer200", "192.168.64.200", "0a:00:00:00:01:c8");
    wait_peer(&cluster, 0, 200, Some(("192.168.64.200", "0a:00:00:00:01:c8")));
    assert_eq!(peer(&cluster, 0, 201), None);
    wait_peer(&cluster, 0, 201, Some(("192.168.64.201", "0a:00:00:00:00:c9")));
    assert_eq!(resyncs(&cluster, 0), json!({"start": 1}));
}

#[test]
fn a_second_node_with_a_pod_cidr_waits_for_the_first() {
    Cluster::with_traffic(|cluster| {
        cluster.add_peer(200);
        wait_peer(cluster, 0, 200, Some(("192.168.64.200", "0a:00:00:00:00:c8")));
        for (name, pod_cidr) in [("second", "10.5.200.0/24"), ("third", "10.5.2.0/24"), ("wide", "10.5.2.0/23")] {
            cluster.add_node(name, &[pod_cidr]);
            cluster.announce(name, "192.168.64.201", "0a:00:00:00:00:c9");
        }
        for host in 0..2 {
            wait_said(
                cluster,
                host,
                "second",
                "its podCIDR 10.5.200.0/24 is that of the node peer200 too, which has it",
            );
            wait_said(cluster, host, "third", "its podCIDR 10.5.2.0/24 is that of the node node2 too, which has it");
            assert_eq!(peer(cluster, host, 200), Some(("192.168.64.200".to_owned(), "0a:00:00:00:00:c8".to_owned())));
        }
        wait_said(cluster, 1, "wide", "it overlaps this host's own lease 10.5.2.0/24");
        wait_judged(cluster, 0);
        assert_eq!(peer(cluster, 0, 2), Some(("192.168.64.2".to_owned(), cluster.wait_announced(1))));
        cluster.delete_node("peer200");
        wait_peer(cluster, 0, 200, Some(("192.168.64.201", "0a:00:00:00:00:c9")));
        assert_eq!(passed_over(cluster, 0, "second"), "");
    });
}

#[test]
fn a_second_node_with_an_address_is_said_and_both_are_peers() {
    Cluster::with_traffic(|cluster| {
        let mac = cluster.wait_announced(1);
        // A host that was given another name, and whose node of before is still there; or one that was cloned.
        cluster.add_node("former", &["10.5.77.0/24"]);
        cluster.announce("former", "192.168.64.2", "0a:00:00:00:00:77");
        wait_peer(cluster, 0, 77, Some(("192.168.64.2", "0a:00:00:00:00:77")));
        let remark = |name: &str, other: &str| {
            let remark = cluster.status(0)["status"]["store"]["remarks"][name].as_str().unwrap_or_default().to_owned();
            remark.starts_with(&format!("its public-ip 192.168.64.2 is that of the node {other} too"))
        };
        wait_for("both to be told of", SOON, || remark("node2", "former") && remark("former", "node2")).unwrap();
        let troubles = cluster.status(0)["troubles"].to_string();
        assert!(troubles.contains(r#"the entry \"former\" in Kubernetes: its public-ip 192.168.64.2"#), "{troubles}");
        wait_said(cluster, 1, "former", "it names this host's own address 192.168.64.2 with the MAC 0a:00:00:00:00:77");
        wait_judged(cluster, 0);
        assert_eq!(peer(cluster, 0, 2), Some(("192.168.64.2".to_owned(), mac)));
        cluster.delete_node("former");
        wait_peer(cluster, 0, 77, None);
        for host in 0..2 {
            cluster.wait_status(host, "nothing to be said", |status| {
                status["store"]["remarks"] == json!({}) && status["store"]["passedOver"] == json!({})
            });
        }
        assert!(peer(cluster, 0, 2).is_some());
    });
}

/// Makes the nodes anew of which there are none any more: those of hosts by themselves, those of [`QUIET`] by their daemons.
fn restore_nodes(cluster: &Cluster) {
    for number in 1..=2 {
        cluster.add_node(&format!("node{number}"), &[&format!("10.5.{number}.0/24")]);
    }
    QUIET.for_each(|octet| cluster.add_peer(octet));
}

fn held(cluster: &Cluster, host: usize) -> usize {
    cluster.status(host)["status"]["held"].as_array().unwrap().len()
}

#[test]
fn a_server_without_nodes_removes_nobody() {
    let mut cluster = with_quiet_peers();
    let traffic = [cluster.traffic(0, 1), cluster.traffic(1, 0)];
    cluster.store.server.wipe().unwrap();
    cluster.store.server.allow(xtask::lab::User::AGENT, &ApiServer::flannels_rules()).unwrap();
    for host in 0..2 {
        cluster.wait_status(host, "all to be held", |status| status["held"].as_array().unwrap().len() == 13);
        assert!(cluster.status(host)["troubles"].to_string().contains("Kubernetes no longer names 13 of the 13 peers"));
    }
    restore_nodes(&cluster);
    for host in 0..2 {
        cluster.wait_log(host, "is held again");
        cluster.wait_status(host, "all to be back", |status| {
            status["peers"] == 13 && status["held"] == json!([]) && status["lease"]["state"] == "held"
        });
    }
    traffic.into_iter().for_each(|traffic| traffic.assert_nothing_was_lost());
}

#[test]
fn half_of_the_nodes_is_no_list_to_believe() {
    if !on_double("a list that lacks nodes") {
        return;
    }
    let cluster = with_quiet_peers();
    let traffic = [cluster.traffic(0, 1), cluster.traffic(1, 0)];
    // By name: node1, node2, and five of the quiet ones. Each watch ends in such a list.
    cluster.fault(json!({"verb": "list", "resource": "nodes", "keep": 7}));
    cluster.fault(json!({"verb": "watch", "resource": "nodes", "status": 410}));
    cluster.order("close-watches", &Value::Null);
    for host in 0..2 {
        cluster.wait_status(host, "seven to be held", |status| status["held"].as_array().unwrap().len() == 7);
        assert_eq!(cluster.status(host)["status"]["peers"], 13);
    }
    cluster.order("clear", &Value::Null);
    // Whoever has such a list, and a watch from there that was not refused, hears of nothing that was not in it.
    cluster.fault(json!({"verb": "watch", "resource": "nodes", "status": 410}));
    cluster.order("close-watches", &Value::Null);
    for host in 0..2 {
        cluster.wait_status(host, "nobody to be held", |status| status["held"] == json!([]) && status["peers"] == 13);
    }
    cluster.order("clear", &Value::Null);
    traffic.into_iter().for_each(|traffic| traffic.assert_nothing_was_lost());
}

#[test]
fn an_agent_that_starts_does_not_believe_a_server_without_nodes_either() {
    let mut cluster = with_quiet_peers();
    let traffic = [cluster.traffic(0, 1), cluster.traffic(1, 0)];
    cluster.hosts[0].agent = None;
    cluster.store.server.wipe().unwrap();
    cluster.store.server.allow(xtask::lab::User::AGENT, &ApiServer::flannels_rules()).unwrap();
    cluster.start(0, &[]);
    cluster.wait_log(0, "that were last known");
    cluster.wait_status(0, "all to be held", |status| status["held"].as_array().unwrap().len() == 13);
    restore_nodes(&cluster);
    for host in 0..2 {
        cluster.wait_status(host, "all to be back", |status| {
            status["peers"] == 13 && status["held"] == json!([]) && status["lease"]["state"] == "held"
        });
    }
    traffic.into_iter().for_each(|traffic| traffic.assert_nothing_was_lost());
}

#[test]
fn an_agent_starts_with_the_server_away_and_has_its_peers() {
    let mut cluster = with_quiet_peers();
    let traffic = [cluster.traffic(0, 1), cluster.traffic(1, 0)];
    cluster.store.server.stop();
    // As after a reboot, but for the pods.
    cluster.hosts[0].agent = None;
    cluster.start(0, &[]);
    cluster.wait_log(0, "going on with the lease 10.5.1.0-24 and 13 peers that were last known");
    cluster.wait_status(0, "the peers", |status| status["peers"] == 13 && status["lease"]["state"] == "last_known");
    cluster.wait_connected(0, 1);
    cluster.store.server.resume().unwrap();
    cluster.wait_status(0, "to be confirmed", |status| {
        status["lease"]["state"] == "held" && status["peers"] == 13 && status["held"] == json!([])
    });
    traffic.into_iter().for_each(|traffic| traffic.assert_nothing_was_lost());
}

#[test]
fn what_an_older_backup_lacks_is_held() {
    let mut cluster = with_quiet_peers();
    let traffic = [cluster.traffic(0, 1), cluster.traffic(1, 0)];
    let backup = cluster.lab.directory().join("backup");
    cluster.store.server.save(&backup).unwrap();
    (0..2).for_each(|host| cluster.wait_followed(host));
    cluster.announce("peer200", "192.168.64.200", "0a:00:00:00:01:c8");
    cluster.add_peer(220);
    cluster.delete_node("peer201");
    for host in 0..2 {
        wait_peer(&cluster, host, 200, Some(("192.168.64.200", "0a:00:00:00:01:c8")));
        wait_peer(&cluster, host, 201, None);
        wait_peer(&cluster, host, 220, Some(("192.168.64.220", "0a:00:00:00:00:dc")));
    }
    // A real server writes objects of its own when it starts.
    for number in 0..40 {
        cluster.patch_node("peer202", &json!({"metadata": {"annotations": {"heartbeat": number.to_string()}}}));
    }
    cluster.store.server.restore(&backup).unwrap();
    for host in 0..2 {
        cluster.wait_resync(host, "rolled_back");
        // What it says counts, and what it lacks is of a host that can't say so itself.
        wait_peer(&cluster, host, 200, Some(("192.168.64.200", "0a:00:00:00:00:c8")));
        wait_peer(&cluster, host, 201, Some(("192.168.64.201", "0a:00:00:00:00:c9")));
        cluster.wait_status(host, "one to be held", |status| status["held"].as_array().unwrap().len() == 1);
        assert_eq!(peer(&cluster, host, 220), Some(("192.168.64.220".to_owned(), "0a:00:00:00:00:dc".to_owned())));
        assert_eq!(cluster.status(host)["status"]["lease"]["losses"], 0);
    }
    cluster.add_peer(220);
    (0..2).for_each(|host| {
        wait_for("nobody to be held", SOON, || held(&cluster, host) == 0).unwrap();
    });
    traffic.into_iter().for_each(|traffic| traffic.assert_nothing_was_lost());
}

#[test]
fn changes_that_came_while_the_agent_was_stopped_are_all_taken_in() {
    let cluster = with_quiet_peers();
    let agent = cluster.hosts[0].agent.as_ref().unwrap();
    agent.signal(Signal::SIGSTOP).unwrap();
    for round in 1..=4 {
        for octet in QUIET {
            cluster.announce(
                &format!("peer{octet}"),
                &format!("192.168.64.{octet}"),
                &format!("0a:00:00:00:{round:02x}:{octet:02x}"),
            );
        }
    }
    cluster.add_peer(220);
    agent.signal(Signal::SIGCONT).unwrap();
    for octet in QUIET {
        let (address, mac) = (format!("192.168.64.{octet}"), format!("0a:00:00:00:04:{octet:02x}"));
        wait_peer(&cluster, 0, octet, Some((&address, &mac)));
    }
    cluster.wait_peers(0, 14);
    assert_eq!(resyncs(&cluster, 0), json!({"start": 1}));
}

/// A host of flannel's sends, and its node is deleted under it, as it happens where a cloud's API fails.
#[test]
fn a_host_that_sends_outlives_its_node() {
    let mut cluster = Cluster::with_pods(1);
    let second = cluster.lab.host("node2", 2).unwrap();
    cluster.hosts.push(second);
    super::mixed::make_flannels(&mut cluster, 1, 2);
    super::mixed::add_kernel_peer(&cluster, 1, "node1", 1);
    cluster.wait_connected(0, 1);
    let traffic = [cluster.traffic(0, 1), cluster.traffic(1, 0)];
    let mac = cluster.annotation("node2", "backend-data").unwrap();
    cluster.delete_node("node2");
    cluster.wait_log(0, "Kubernetes no longer names the peer of 10.5.2.0/24; it is held (still_sends)");
    // The kubelet makes it again; flannel's daemon, which is not started again, annotates it when it is.
    cluster.add_node("node2", &["10.5.2.0/24"]);
    wait_judged(&cluster, 0);
    assert_eq!(held(&cluster, 0), 1);
    let mac: Value = serde_json::from_str(&mac).unwrap();
    cluster.announce("node2", "192.168.64.2", mac["VtepMAC"].as_str().unwrap());
    wait_for("it to be held no more", SOON, || held(&cluster, 0) == 0).unwrap();
    assert!(peer(&cluster, 0, 2).is_some());
    traffic.into_iter().for_each(|traffic| traffic.assert_nothing_was_lost());
}
