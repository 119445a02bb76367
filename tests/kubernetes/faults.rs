//! An API server in trouble. In each of these the pods of two untouched hosts talk all the time, and no packet is lost; each
//! ends in the nodes as they are, counted by its cause, without anybody's doing.

use std::{
    fs,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use xtask::{
    lab::{ApiServer, User},
    progress::{patience, wait_for},
};

use super::{Cluster, on_double};
use crate::world::SOON;

/// The longest back-off, with its jitter, and what a list takes.
const BACK_OFF: Duration = Duration::from_secs(8);

/// Makes a node, and waits until a host has its peer.
fn assert_follows(cluster: &Cluster, host: usize, octet: u8) {
    let before = cluster.status(host)["status"]["peers"].as_u64().unwrap();
    cluster.add_peer(octet);
    cluster.wait_peers(host, usize::try_from(before).unwrap() + 1);
}

fn resyncs(cluster: &Cluster, host: usize, cause: &str) -> u64 {
    cluster.status(host)["status"]["store"]["resyncs"][cause].as_u64().unwrap_or(0)
}

/// Has the watches end that there are, once they were open for longer than one that ends at once.
fn close_watches(cluster: &Cluster) {
    (0..2).for_each(|host| cluster.wait_followed(host));
    std::thread::sleep(Duration::from_millis(1500));
    cluster.order("close-watches", &Value::Null);
}

/// Waits until agents did something so often.
fn wait_count(cluster: &Cluster, what: &str, count: i64) {
    let waited = wait_for(what, SOON, || cluster.count(what) >= count);
    assert!(waited.is_ok(), "{what}: {}", cluster.count(what));
}

#[test]
fn the_api_server_is_killed_and_comes_back() {
    Cluster::with_traffic(|cluster| {
        for round in 0..3 {
            if round == 2 {
                cluster.store.server.stop();
            } else {
                cluster.store.server.kill().unwrap();
            }
            cluster.wait_status(0, "to be away", |status| status["store"]["following"] == false);
            let troubles = cluster.status(0)["troubles"].to_string();
            assert!(troubles.contains("Kubernetes is not being followed since"), "{troubles}");
            cluster.store.server.resume().unwrap();
            let back = Instant::now();
            cluster.wait_resync(0, "connection");
            assert!(back.elapsed() < BACK_OFF * patience(), "{:?}", back.elapsed());
            assert_follows(cluster, 0, 200 + round);
        }
    });
}

#[test]
fn the_api_server_stops_answering_with_its_connections_open() {
    Cluster::with_traffic(|cluster| {
        cluster.store.server.pause().unwrap();
        // Noticed by the pings on the connection, after ten and five seconds.
        cluster.wait_log(0, "the watch on the nodes ended");
        cluster.store.server.unpause().unwrap();
        cluster.wait_resync(0, "connection");
        assert_follows(cluster, 0, 200);
    });
}

#[test]
fn the_network_to_the_api_server_is_cut() {
    Cluster::with_traffic(|cluster| {
        // One way only: requests leave, answers are dropped.
        cluster.hosts[0].netns.exec("iptables -A INPUT -p tcp --sport 6443 -j DROP").unwrap();
        cluster.wait_log(0, "the watch on the nodes ended");
        cluster.add_peer(200);
        cluster.wait_peers(1, 2);
        assert_eq!(cluster.status(0)["status"]["peers"], 1);
        cluster.hosts[0].netns.exec("iptables -F INPUT").unwrap();
        cluster.wait_resync(0, "connection");
        cluster.wait_peers(0, 2);
    });
}

#[test]
fn a_watch_that_ends_goes_on_without_a_list() {
    if !on_double("watches that end when they are told") {
        return;
    }
    Cluster::with_traffic(|cluster| {
        let lists = cluster.count("list nodes");
        let watches = cluster.count("watch nodes");
        close_watches(cluster);
        wait_count(cluster, "watch nodes", watches + 2);
        assert_follows(cluster, 0, 201);
        cluster.wait_peers(1, 2);
        assert_eq!(cluster.count("list nodes"), lists);
        assert_eq!(cluster.count("list nodes continued"), 0);
        for host in 0..2 {
            assert_eq!(cluster.status(host)["status"]["store"]["resyncs"], json!({"start": 1}));
        }
    });
}

#[test]
fn changes_that_are_gone_are_read_from_a_list() {
    if !on_double("410 when it is told") {
        return;
    }
    Cluster::with_traffic(|cluster| {
        // Within the watch: what came while nobody watched is gone.
        cluster.fault(json!({"verb": "watch", "delayMs": 5000, "times": 2}));
        let watches = cluster.count("watch nodes");
        close_watches(cluster);
        wait_count(cluster, "watch nodes", watches + 2);
        cluster.add_peer(201);
        cluster.order("forget", &Value::Null);
        for host in 0..2 {
            cluster.wait_resync(host, "compacted");
            cluster.wait_peers(host, 2);
        }
        cluster.wait_log(0, "the API server no longer has the changes since then (410, too old resource version");
        // As its first answer, and of the lists after it.
        cluster.fault(json!({"verb": "watch", "status": 410, "times": 2}));
        cluster.fault(json!({"verb": "list", "status": 410, "times": 3}));
        let before = [0, 1].map(|host| resyncs(cluster, host, "compacted"));
        close_watches(cluster);
        for (host, before) in before.into_iter().enumerate() {
            cluster.wait_status(host, "another snapshot", |status| {
                status["store"]["resyncs"]["compacted"].as_u64().unwrap() == before + 1
            });
        }
        assert_follows(cluster, 0, 202);
    });
}

/// The token of agents.
fn publish_token(cluster: &Cluster, token: &str) {
    let path = cluster.store.server.token_file(User::AGENT);
    let new = path.with_extension("new");
    fs::write(&new, token).unwrap();
    fs::rename(new, path).unwrap();
}

fn take_only(cluster: &mut Cluster, token: &str) {
    let admin = (User::ADMIN, "admin-token".to_owned());
    cluster.store.server.replace_tokens(&[admin, (User::AGENT, token.to_owned())]).unwrap();
}

#[test]
fn a_token_is_exchanged() {
    Cluster::with_traffic(|cluster| {
        // As the kubelet does it: the new one is there before the old one ends.
        publish_token(cluster, "second");
        take_only(cluster, "second");
        if on_double("a watch that goes on with a token that is over") {
            close_watches(cluster);
            cluster.wait_resync(0, "unauthenticated");
        }
        (0..2).for_each(|host| cluster.wait_followed(host));
        assert_follows(cluster, 0, 200);
        // One that ends before the new one is there.
        take_only(cluster, "third");
        if ApiServer::is_double() {
            close_watches(cluster);
        }
        for host in 0..2 {
            cluster.wait_log(host, "the API server does not know who asks (401, Unauthorized): the token has expired");
            cluster.wait_status(host, "to be away", |status| status["store"]["following"] == false);
        }
        publish_token(cluster, "third");
        for host in 0..2 {
            cluster.wait_resync(host, if ApiServer::is_double() { "unauthenticated" } else { "connection" });
        }
        assert_follows(cluster, 0, 201);
    });
}

#[test]
fn rights_are_taken_away_and_given_back() {
    Cluster::with_traffic(|cluster| {
        let allow = |cluster: &Cluster, rules: &Value| {
            let path = "/apis/rbac.authorization.k8s.io/v1/clusterroles/flannel";
            let role = json!({"metadata": {"name": "flannel"}, "rules": rules}).to_string();
            assert_eq!(cluster.store.server.request(User::ADMIN, "PUT", path, &[], &role).unwrap().0, 200);
        };
        allow(cluster, &json!([]));
        // Whoever watches may go on.
        cluster.store.server.kill().unwrap();
        cluster.store.server.resume().unwrap();
        for host in 0..2 {
            cluster.wait_log(host, "list nodes: forbidden (403, nodes is forbidden: User \"system:serviceaccount:");
        }
        allow(cluster, &ApiServer::flannels_rules());
        let back = Instant::now();
        for host in 0..2 {
            cluster.wait_resync(host, "connection");
        }
        assert!(back.elapsed() < BACK_OFF * patience(), "{:?}", back.elapsed());
        assert_follows(cluster, 0, 200);
    });
}

#[test]
fn patience_is_had_where_the_api_server_asks_for_it() {
    if !on_double("429") {
        return;
    }
    Cluster::with_traffic(|cluster| {
        cluster.fault(json!({"verb": "watch", "status": 410, "times": 2}));
        cluster.fault(json!({"verb": "list", "status": 429, "retryAfter": 3, "times": 4}));
        let lists = cluster.count("list nodes");
        close_watches(cluster);
        let asked = Instant::now();
        for host in 0..2 {
            cluster
                .wait_log(host, "the API server asks for patience (429, Too many requests, please try again later.)");
        }
        for host in 0..2 {
            cluster.wait_resync(host, "compacted");
        }
        // Each of two agents was asked for it twice, and listed at its third attempt.
        assert!(asked.elapsed() >= Duration::from_secs(6), "{:?}", asked.elapsed());
        assert_eq!(cluster.count("list nodes") - lists, 6);
        assert_follows(cluster, 0, 200);
    });
}

#[test]
fn an_api_server_that_fails_is_asked_again() {
    if !on_double("errors when it is told") {
        return;
    }
    Cluster::with_traffic(|cluster| {
        cluster.fault(json!({"verb": "watch", "status": 500, "times": 2}));
        cluster.fault(json!({"verb": "list", "status": 503, "retryAfter": 1, "times": 2}));
        // A list that breaks off, and one that takes its time.
        cluster.fault(json!({"verb": "list", "cut": true, "times": 2}));
        cluster.fault(json!({"verb": "list", "pauseMs": 3000, "times": 2}));
        close_watches(cluster);
        for host in 0..2 {
            cluster.wait_log(host, "watch nodes: it failed (500, ");
            cluster.wait_log(host, "list nodes: it failed (503, ");
            // By its headers or in its body.
            cluster.wait_log(host, "stream error received: unexpected internal error");
            cluster.wait_resync(host, "cancelled");
        }
        assert_follows(cluster, 0, 200);
        // One node at which it fails is no news, and is asked for again with all others.
        cluster.fault(json!({"verb": "get", "resource": "nodes", "status": 500, "times": 2}));
        assert_follows(cluster, 0, 201);
        cluster.wait_peers(1, 3);
        // What somebody damaged meanwhile is mended a little later. (The peer is still heard.)
        cluster.fault(json!({"verb": "patch", "status": 500, "times": 3}));
        cluster.annotate("node1", &[("kube-subnet-manager", None)]);
        cluster.wait_annotation("node1", "kube-subnet-manager", "true");
        assert_eq!(cluster.status(0)["status"]["lease"]["losses"], 0);
    });
}

#[test]
fn a_watch_that_says_nothing_more_is_not_believed_for_ever() {
    if !on_double("a server that hangs at a request") {
        return;
    }
    Cluster::with_traffic(|cluster| {
        cluster.fault(json!({"verb": "watch", "hang": true, "times": 2}));
        close_watches(cluster);
        for host in 0..2 {
            cluster.wait_log(host, "watch nodes: no answer within 10s");
            cluster.wait_resync(host, "connection");
        }
        assert_follows(cluster, 0, 200);
    });
}

#[test]
fn an_api_server_that_is_away_at_the_start_costs_nothing() {
    let mut cluster = Cluster::with_pods(2);
    cluster.wait_connected(0, 1);
    let subnet = cluster.hosts[0].subnet().unwrap();
    for host in 0..2 {
        cluster.wait_peers(host, 1);
        cluster.wait_last_known(host);
    }
    let traffic = cluster.traffic(1, 0);
    cluster.store.server.stop();
    cluster.hosts[0].agent.as_ref().unwrap().signal(Signal::SIGKILL).unwrap();
    cluster.hosts[0].agent = None;
    cluster.start(0, &[]);
    cluster.wait_log(0, "going on with what was last known of this host's addresses");
    cluster.wait_log(0, "going on with the lease 10.5.1.0-24 and 1 peers that were last known");
    cluster.wait_status(0, "the last known lease", |status| status["lease"]["state"] == "last_known");
    traffic.assert_nothing_was_lost();

    // Also where all that the dead agent left is gone, as after a cleanup that spared the run directory.
    cluster.hosts[0].agent = None;
    cluster.hosts[0].netns.ip("link delete flannel.1").unwrap();
    fs::remove_dir_all(cluster.hosts[0].pin_dir()).unwrap();
    cluster.start(0, &[]);
    cluster.wait_log(0, "carries");
    cluster.wait_connected(0, 1);
    assert_eq!(cluster.hosts[0].subnet().unwrap(), subnet);
    let troubles = cluster.status(0)["troubles"].to_string();
    assert!(troubles.contains("is the last known, and not confirmed by Kubernetes"), "{troubles}");

    cluster.store.server.resume().unwrap();
    cluster.wait_status(0, "the lease to be confirmed", |status| {
        status["lease"]["state"] == "held" && status["store"]["following"] == true
    });
    assert_follows(&cluster, 0, 200);
    assert_eq!(cluster.hosts[0].subnet().unwrap(), subnet);
}

#[test]
fn another_cluster_s_nodes_are_none_of_ours() {
    Cluster::with_traffic(|cluster| {
        // Without any data: the nodes, roles and all are to be made again.
        cluster.store.server.wipe().unwrap();
        cluster.store.server.allow(User::AGENT, &ApiServer::flannels_rules()).unwrap();
        cluster.wait_status(0, "the loss", |status| status["lease"]["state"] == "lost");
        assert_eq!(cluster.status(0)["status"]["peers"], 1);
        for (name, pod_cidr) in [("node2", "10.5.2.0/24"), ("node1", "10.5.1.0/24")] {
            cluster.add_node(name, &[pod_cidr]);
        }
        for host in 0..2 {
            cluster.wait_log(host, "is held again");
        }
        assert_follows(cluster, 0, 200);
    });
}

/// A server that answers and ends each watch at once is not asked for all nodes at the shortest back-off.
#[test]
fn watches_that_end_at_once_cost_few_lists() {
    if !on_double("watches that end at once") {
        return;
    }
    Cluster::with_traffic(|cluster| {
        let (before, begun) = (cluster.count("list nodes"), Instant::now());
        let while_ended = wait_for("three seconds", SOON, || {
            cluster.order("close-watches", &Value::Null);
            begun.elapsed() > Duration::from_secs(3)
        });
        while_ended.unwrap();
        // Two agents: after 0.1, 0.3, 0.7, 1.5 and 3.1 s at the soonest.
        let lists = cluster.count("list nodes") - before;
        assert!((2..=12).contains(&lists), "{lists} in {:?}", begun.elapsed());
    });
}

/// Who may not set the condition has all else work, and tries again as with any other failure.
#[test]
fn a_condition_that_is_refused_is_tried_again_with_patience() {
    if !on_double("a condition that is refused") {
        return;
    }
    let mut cluster = Cluster::with_nodes(1);
    cluster.start(0, &["--set-node-network-unavailable=false"]);
    cluster.hosts[0].wait_ready().unwrap();
    cluster.wait_annotation("node1", "public-ip", "192.168.64.1");
    cluster.hosts[0].agent = None;
    cluster.fault(json!({"verb": "patch", "status": 403}));
    let before = cluster.count("patch nodes/status");
    cluster.start(0, &[]);
    wait_count(&cluster, "patch nodes/status", before + 1);
    let begun = Instant::now();
    wait_count(&cluster, "patch nodes/status", before + 7);
    // 0.1, 0.2, 0.4, 0.8, 1.6 and 3 s at the least.
    assert!(begun.elapsed() > Duration::from_secs(4), "{:?}", begun.elapsed());
    cluster.order("clear", &Value::Null);
    let healed = wait_for("the condition", SOON, || {
        let node = cluster.node("node1");
        let conditions = node["status"]["conditions"].as_array().unwrap();
        conditions.iter().any(|one| one["type"] == "NetworkUnavailable" && one["reason"] == "FlannelIsUp")
    });
    healed.unwrap();
}

/// Up to where a bookmark is, no node changed: the watch goes on from there, though older changes are gone.
#[test]
fn a_watch_goes_on_from_its_bookmark() {
    if !on_double("bookmarks on demand") {
        return;
    }
    Cluster::with_traffic(|cluster| {
        (0..2).for_each(|host| cluster.wait_followed(host));
        // Changes that no watch of nodes tells of.
        for number in 0..3 {
            let pod = json!({"metadata": {"name": format!("other{number}")}, "spec": {"containers": []}});
            cluster.store.server.post("/api/v1/namespaces/default/pods", &pod).unwrap();
        }
        cluster.order("bookmark", &Value::Null);
        cluster.order("forget", &Value::Null);
        let (lists, watches) = (cluster.count("list nodes"), cluster.count("watch nodes"));
        close_watches(cluster);
        wait_count(cluster, "watch nodes", watches + 2);
        assert_follows(cluster, 0, 201);
        cluster.wait_peers(1, 2);
        assert_eq!(cluster.count("list nodes"), lists);
    });
}

/// One API server after the other is replaced: connections end, and the one that answers next may not know the latest version
/// yet.
#[test]
fn api_servers_are_replaced_one_after_the_other() {
    Cluster::with_traffic(|cluster| {
        for octet in 201..204 {
            cluster.store.server.stop();
            cluster.store.server.resume().unwrap();
            if on_double("a server that does not know the latest version yet") {
                cluster.fault(json!({"verb": "watch", "status": 504, "times": 2}));
            }
            assert_follows(cluster, 0, octet);
            cluster.wait_peers(1, usize::from(octet) - 199);
        }
    });
}
