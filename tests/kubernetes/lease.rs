//! This host's own lease: the podCIDR that its node is given, and the annotations by which the node announces it.

use std::fs;

use serde_json::{Value, json};
use xtask::{lab::User, progress::wait_for};

use super::{Cluster, PREFIX, on_double, start};
use crate::{
    bad_input::end_of,
    world::{SOON, is_delivered},
};

/// The MAC of a host's `flannel.1`.
fn device_mac(cluster: &Cluster, host: usize) -> String {
    cluster.hosts[host].netns.ip_json("link show flannel.1").unwrap()[0]["address"].as_str().unwrap().to_owned()
}

/// The tunnel's own address on a host.
fn tunnel_address(cluster: &Cluster, host: usize) -> String {
    let links = cluster.hosts[host].netns.ip_json("-d link show flannel.1").unwrap();
    links[0]["linkinfo"]["info_data"]["local"].as_str().unwrap().to_owned()
}

/// Ends a host's agent, and leaves what a reboot leaves: nothing.
fn reboot(cluster: &mut Cluster, host: usize) {
    let host = &mut cluster.hosts[host];
    host.agent = None;
    host.netns.ip("link delete flannel.1").unwrap();
    fs::remove_dir_all(host.pin_dir()).unwrap();
    fs::remove_dir_all(host.run_dir()).unwrap();
}

fn wait_held(cluster: &Cluster, host: usize) {
    cluster.wait_status(host, "the lease", |status| {
        status["lease"]["state"] == "held" && status["store"]["following"] == true
    });
}

fn condition(node: &Value) -> Value {
    let mut conditions = node["status"]["conditions"].as_array().unwrap().iter();
    conditions.find(|condition| condition["type"] == "NetworkUnavailable").cloned().unwrap_or_default()
}

/// Waits until the scheduler is told that packets can flow.
fn wait_complete(cluster: &Cluster, name: &str) {
    wait_for("the condition", SOON, || condition(&cluster.node(name))["status"] == "False").unwrap();
}

#[test]
fn a_node_announces_its_lease_in_flannels_bytes_and_is_written_once() {
    let mut cluster = Cluster::with_nodes(1);
    let before = cluster.node("node1");
    assert_eq!(condition(&before)["status"], "True");
    cluster.start(0, &[]);
    assert_eq!(cluster.hosts[0].wait_ready().unwrap().gateway.to_string(), "10.5.1.1");
    wait_complete(&cluster, "node1");
    let node = cluster.node("node1");
    let mut expected = before["metadata"]["annotations"].clone();
    expected[format!("{PREFIX}kube-subnet-manager")] = json!("true");
    expected[format!("{PREFIX}backend-type")] = json!("vxlan");
    expected[format!("{PREFIX}backend-data")] =
        json!(format!(r#"{{"VNI":1,"VtepMAC":"{}"}}"#, device_mac(&cluster, 0)));
    expected[format!("{PREFIX}public-ip")] = json!("192.168.64.1");
    assert_eq!(node["metadata"]["annotations"], expected);
    let told = condition(&node);
    assert_eq!((&told["reason"], &told["message"]), (&json!("FlannelIsUp"), &json!("Flannel is running on this node")));
    // Nothing else is touched.
    let others = |node: &Value| {
        let mut node = node.clone();
        node["metadata"] = json!({"labels": node["metadata"]["labels"]});
        node["status"]["conditions"].as_array_mut().unwrap().retain(|one| one["type"] != "NetworkUnavailable");
        node
    };
    assert_eq!(others(&node), others(&before));

    // Neither a restart nor a reboot writes anything.
    let version = &node["metadata"]["resourceVersion"];
    for reboots in [false, true] {
        if reboots {
            reboot(&mut cluster, 0);
        }
        cluster.start(0, &[]);
        wait_held(&cluster, 0);
        cluster.wait_log(0, "carries 10.5.1.0/24");
        cluster.hosts[0].agent = None;
        assert_eq!(cluster.node("node1")["metadata"]["resourceVersion"], *version, "reboots: {reboots}");
    }
    if on_double("how often a restart asks for a change") {
        assert_eq!(cluster.count("patch nodes/status"), 2);
    }
}

#[test]
fn the_condition_is_left_alone_where_that_is_asked_for() {
    let mut cluster = Cluster::with_nodes(1);
    cluster.start(0, &["--set-node-network-unavailable=false"]);
    cluster.hosts[0].wait_ready().unwrap();
    wait_held(&cluster, 0);
    // What it says at the start is said by now: peers are followed after it.
    cluster.add_peer(200);
    cluster.wait_peers(0, 1);
    assert_eq!(condition(&cluster.node("node1"))["status"], "True");
}

#[test]
fn annotations_of_another_prefix_are_read_and_written() {
    let mut cluster = Cluster::with_nodes(1);
    let prefix = "--kube-annotation-prefix=example.org/net";
    cluster.start(0, &[prefix]);
    cluster.hosts[0].wait_ready().unwrap();
    wait_complete(&cluster, "node1");
    let annotations = cluster.node("node1")["metadata"]["annotations"].clone();
    let mac = device_mac(&cluster, 0);
    assert_eq!(annotations["example.org/net-backend-data"], format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#));
    assert_eq!(annotations["example.org/net-kube-subnet-manager"], "true");
    assert_eq!(annotations["example.org/net-public-ip"], "192.168.64.1");
    assert_eq!(annotations[format!("{PREFIX}public-ip")], Value::Null);
    // flannel loses it here.
    reboot(&mut cluster, 0);
    cluster.start(0, &[prefix]);
    cluster.hosts[0].wait_ready().unwrap();
    assert_eq!(device_mac(&cluster, 0), mac);
    assert_eq!(cluster.node("node1")["metadata"]["annotations"], annotations);
}

#[test]
fn an_address_that_is_overwritten_is_published_and_nothing_more() {
    let mut cluster = Cluster::with_nodes(1);
    let of_ipv6 = [
        ("public-ipv6", "fd00:50::1"),
        ("backend-v6-data", r#"{"VNI":1,"VtepMAC":"0a:00:00:00:00:06"}"#),
        ("public-ipv6-overwrite", "fd00:50::2"),
        ("node-public-ipv6", "fd00:50::3"),
    ];
    cluster.annotate("node1", &of_ipv6.map(|(suffix, value)| (suffix, Some(value))));
    cluster.annotate("node1", &[("public-ip-overwrite", Some("203.0.113.7"))]);
    cluster.start(0, &[]);
    cluster.hosts[0].wait_ready().unwrap();
    cluster.wait_annotation("node1", "public-ip", "203.0.113.7");
    assert_eq!(tunnel_address(&cluster, 0), "192.168.64.1");
    for (suffix, value) in of_ipv6 {
        assert_eq!(cluster.annotation("node1", suffix).as_deref(), Some(value));
    }
    // It stays, and is nobody else's, for as long as the agent runs.
    wait_held(&cluster, 0);
    assert_eq!(cluster.status(0)["status"]["publicIp"], "203.0.113.7");

    // What is no address is said, and not used.
    cluster.hosts[0].agent = None;
    cluster.annotate("node1", &[("public-ip-overwrite", Some("here")), ("node-public-ip", Some("there"))]);
    cluster.start(0, &[]);
    cluster.wait_annotation("node1", "public-ip", "192.168.64.1");
    for said in ["public-ip-overwrite of the node node1 is no IPv4 address and is not used: \"here\"", "node-public-ip"]
    {
        cluster.wait_log(0, said);
    }
}

#[test]
fn an_address_that_the_node_names_is_chosen_before_the_flags() {
    let mut cluster = Cluster::with_nodes(1);
    cluster.hosts[0].netns.ip("address add 192.168.64.101/24 dev eth0").unwrap();
    cluster.annotate("node1", &[("node-public-ip", Some("192.168.64.101"))]);
    cluster.start(0, &["--public-ip=192.168.64.1"]);
    cluster.hosts[0].wait_ready().unwrap();
    cluster.wait_annotation("node1", "public-ip", "192.168.64.101");
    assert_eq!(tunnel_address(&cluster, 0), "192.168.64.101");
}

#[test]
fn a_node_and_its_pod_cidr_are_waited_for() {
    let mut cluster = Cluster::without_nodes(1);
    cluster.start(0, &[]);
    cluster.wait_log(0, "has no node \"node1\"; check NODE_NAME, or wait until the kubelet has registered it");
    cluster.add_node("node1", &[]);
    cluster.wait_log(
        0,
        "node \"node1\" pod cidr not assigned: kube-controller-manager does it with --allocate-node-cidrs and --cluster-cidr",
    );
    cluster.assert_untouched(0);
    // No peer is told of a host that has no pods, and the scheduler of none that can't carry their packets.
    assert_eq!(cluster.annotation("node1", "kube-subnet-manager"), None);
    assert_eq!(condition(&cluster.node("node1"))["status"], "True");
    cluster.patch_node("node1", &json!({"spec": {"podCIDR": "10.5.1.0/24", "podCIDRs": ["10.5.1.0/24"]}}));
    wait_complete(&cluster, "node1");
    assert_eq!(cluster.hosts[0].subnet().unwrap().gateway.to_string(), "10.5.1.1");
}

#[test]
fn a_pod_cidr_that_is_no_lease_ends_the_start() {
    let mut cluster = Cluster::without_nodes(1);
    let mut cases = vec![
        (
            vec!["10.6.1.0/24"],
            "subnet \"10.5.0.0/16\" specified in the flannel net config doesn't contain \"10.6.1.0/24\" PodCIDR of the \
             \"node1\" node",
        ),
        (vec!["10.0.0.0/8"], "doesn't contain \"10.0.0.0/8\" PodCIDR"),
        (vec!["fd00:5::/64"], "node \"node1\": it has no IPv4 podCIDR: they are fd00:5::/64"),
    ];
    // API servers refuse these.
    if on_double("podCIDRs that no API server takes") {
        cases.push((vec!["abc"], "node \"node1\": its podCIDR \"abc\" is no prefix such as 10.244.1.0/24"));
        cases.push((vec!["10.5.1.0/24", "10.5.2.0/24"], "pod cidrs should be IPv4/IPv6 only or dualstack: they are"));
    }
    for (pod_cidrs, reason) in cases {
        let node = super::node("node1", &pod_cidrs);
        if pod_cidrs.contains(&"abc") || pod_cidrs.len() > 1 {
            cluster.store.server.double("PUT", "objects/api/v1/nodes/node1", &node).unwrap();
        } else {
            cluster.add_node("node1", &pod_cidrs);
        }
        cluster.start(0, &[]);
        let (code, line) = end_of(&mut cluster, 0);
        assert_eq!(code, Some(78), "{line}");
        assert!(line.contains(reason), "{line}");
        cluster.assert_untouched(0);
        assert_eq!(cluster.annotation("node1", "kube-subnet-manager"), None);
        cluster.delete_node("node1");
    }
    // One of each family is a lease.
    cluster.add_node("node1", &["fd00:5::/64", "10.5.1.0/24"]);
    cluster.start(0, &[]);
    assert_eq!(cluster.hosts[0].wait_ready().unwrap().gateway.to_string(), "10.5.1.1");
}

#[test]
fn pods_of_pod_cidrs_of_any_length_reach_each_other() {
    let cluster = Cluster::without_nodes(3);
    // SubnetLen and its like mean nothing here, as with flannel.
    let config = r#"{"Network": "10.5.0.0/16", "SubnetLen": 17, "SubnetMin": "10.5.7.0", "SubnetMax": "10.5.6.0",
        "Backend": {"Type": "vxlan"}}"#;
    fs::write(&cluster.store.net_conf, config).unwrap();
    for (name, pod_cidr) in [("node1", "10.5.16.0/20"), ("node2", "10.5.1.128/25"), ("node3", "10.5.2.0/24")] {
        cluster.add_node(name, &[pod_cidr]);
    }
    let cluster = cluster.ready(&[]);
    for (one, two) in [(0, 1), (1, 2), (0, 2)] {
        cluster.wait_connected(one, two);
    }
    // Where all are of one length, they are found by arithmetic: each host has a slot for each of its own.
    for (host, slots) in [(0, 16), (1, 512), (2, 256)] {
        let map = cluster.hosts[host].pin_dir().join(format!("1/v{}/SUBNETS", flannel_common::maps::ABI_VERSION));
        let shown =
            xtask::process::output(std::process::Command::new("bpftool").args(["map", "show", "pinned"]).arg(map));
        assert!(shown.as_ref().unwrap().contains(&format!("max_entries {slots} ")), "{shown:?}");
    }
    let subnet = cluster.hosts[1].subnet().unwrap();
    assert_eq!((subnet.gateway.to_string(), subnet.len), ("10.5.1.129".to_owned(), 25));
}

#[test]
fn a_node_that_is_made_again_is_announced_again() {
    Cluster::with_traffic(|cluster| {
        let before = cluster.annotation("node1", "backend-data").unwrap();
        cluster.delete_node("node1");
        cluster.wait_log(0, "has no node \"node1\"");
        cluster.wait_status(0, "the loss", |status| status["lease"]["state"] == "lost");
        assert!(cluster.status(0)["troubles"].to_string().contains("lost"), "{}", cluster.status(0)["troubles"]);
        cluster.add_node("node1", &["10.5.1.0/24"]);
        cluster.wait_log(0, "the lease of 10.5.1.0/24 is held again");
        wait_held(cluster, 0);
        assert_eq!(cluster.annotation("node1", "backend-data"), Some(before));
        wait_complete(cluster, "node1");
        cluster.wait_peers(1, 1);
    });
}

#[test]
fn a_node_that_is_made_again_with_another_pod_cidr_moves_its_host() {
    let mut cluster = Cluster::with_pods(2);
    cluster.wait_connected(0, 1);
    let mac = device_mac(&cluster, 0);
    cluster.delete_node("node1");
    // Longer than the others, too.
    cluster.add_node("node1", &["10.5.77.0/25"]);
    cluster.wait_log(0, "this host moves from 10.5.1.0/24 to 10.5.77.0/25: subnet.env is rewritten");
    wait_for("subnet.env", SOON, || {
        cluster.hosts[0].subnet().is_ok_and(|subnet| subnet.gateway.to_string() == "10.5.77.1" && subnet.len == 25)
    })
    .unwrap();
    wait_held(&cluster, 0);
    assert_eq!(device_mac(&cluster, 0), mac);
    assert_eq!(cluster.wait_announced(0), mac);
    // A new pod there, and the pod of before elsewhere.
    let subnet = cluster.hosts[0].subnet().unwrap();
    for link in ["pod1", "cni0"] {
        cluster.hosts[0].netns.ip(&format!("link delete {link}")).unwrap();
    }
    cluster.hosts[0].pods.clear();
    cluster.hosts[0].add_pod_in(&subnet).unwrap();
    cluster.wait_connected(0, 1);

    // What is none of this network is waited out, and nothing is taken away meanwhile.
    cluster.delete_node("node1");
    cluster.add_node("node1", &["10.6.1.0/24"]);
    cluster.wait_log(0, "doesn't contain \"10.6.1.0/24\" PodCIDR");
    cluster.wait_status(0, "the loss", |status| status["lease"]["state"] == "lost");
    assert!(is_delivered(&cluster.hosts[0].pods[0].netns, &cluster.hosts[1].pods[0].address.to_string()));
    cluster.delete_node("node1");
    cluster.add_node("node1", &["10.5.77.0/25"]);
    wait_held(&cluster, 0);
}

#[test]
fn announcements_that_somebody_damaged_are_written_again() {
    Cluster::with_traffic(|cluster| {
        let whole = cluster.annotation("node1", "backend-data").unwrap();
        let elsewhere = whole.replace("\"VNI\":1", "\"VNI\":7");
        let long = format!(r#"{{"VNI":1,"VtepMAC":"{}"}}"#, "0".repeat(200 << 10));
        for (suffix, nonsense) in [
            ("backend-data", Some(r#"{"VNI":1,"VtepMAC":"00:00:00:00:00:00"}"#)),
            ("backend-data", Some(&elsewhere)),
            ("backend-data", Some(&whole[..20])),
            ("backend-data", Some(&long)),
            ("kube-subnet-manager", None),
        ] {
            let before = cluster.annotation("node1", suffix).unwrap();
            cluster.annotate("node1", &[(suffix, nonsense)]);
            cluster.wait_annotation("node1", suffix, &before);
        }
        cluster.wait_log(0, "somebody changed the annotations of the node node1; they are written again");
        assert_eq!(cluster.status(0)["status"]["lease"]["losses"], 0);
        // Nobody repeats 200 KiB.
        assert!(cluster.hosts[0].agent.as_ref().unwrap().log().len() < 64 << 10);
    });
}

#[test]
fn two_agents_with_one_node_name_say_so() {
    let mut cluster = Cluster::with_nodes(2);
    cluster.start(0, &[]);
    cluster.hosts[0].wait_ready().unwrap();
    wait_held(&cluster, 0);
    let mut command = cluster.store.agent_command(&cluster.hosts[1]);
    command.arg("--kubeconfig-file").arg(cluster.store.server.kubeconfig(User::AGENT)).env("NODE_NAME", "node1");
    start(&mut cluster.hosts[1], &mut command);
    cluster.hosts[1].wait_ready().unwrap();
    // The second has taken over the MAC, as after a reboot.
    let mac = device_mac(&cluster, 0);
    for (host, other) in [(0, 2), (1, 1)] {
        let said = format!(
            "another host, with the address 192.168.64.{other} and the MAC {mac}, announces itself as the node node1: two \
             agents must not have one NODE_NAME"
        );
        cluster.wait_log(host, &said);
        cluster.wait_log(host, "the annotations are written again, at most once in 20s");
    }
}

#[test]
fn a_start_from_nonsense_makes_sense() {
    let mut cluster = Cluster::with_nodes(1);
    let mac = "0a:00:00:00:00:01";
    let data = |mac: &str| format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#);
    for (annotations, kept) in [
        // Of a host that was something else before, only the MAC is of use.
        (vec![("backend-data", data(mac)), ("public-ip", "nowhere".to_owned())], true),
        (vec![("backend-data", data("00:00:00:00:00:00"))], false),
        (vec![("backend-data", data("ff:ff:ff:ff:ff:ff")), ("backend-type", "host-gw".to_owned())], false),
        (vec![("backend-data", data(mac)[..30].to_owned()), ("kube-subnet-manager", "yes".to_owned())], false),
        (vec![("backend-data", format!("\"{}\"", "x".repeat(200 << 10)))], false),
    ] {
        cluster.annotate(
            "node1",
            &annotations.iter().map(|(key, value)| (*key, Some(value.as_str()))).collect::<Vec<_>>(),
        );
        cluster.start(0, &[]);
        cluster.hosts[0].wait_ready().unwrap();
        let device = device_mac(&cluster, 0);
        assert_eq!(device == mac, kept, "{device}");
        for (suffix, value) in [
            ("backend-data", data(&device)),
            ("public-ip", "192.168.64.1".to_owned()),
            ("kube-subnet-manager", "true".to_owned()),
            ("backend-type", "vxlan".to_owned()),
        ] {
            cluster.wait_annotation("node1", suffix, &value);
        }
        reboot(&mut cluster, 0);
    }
}
