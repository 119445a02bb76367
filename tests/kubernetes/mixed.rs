//! With nodes of flannel's: the kernel's vxlan device, set up as its daemon does, and annotations byte for byte as it writes
//! them. And from one to the other and back, host by host, while pods keep their addresses and connections.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpStream},
};

use nix::sys::signal::Signal;
use serde_json::Value;
use xtask::{lab::Subnet, progress::wait_for, transfer::tcp_transfer};

use super::Cluster;
use crate::{
    sockets::{connection, listener_in},
    world::{SOON, Traffic, is_answered, is_delivered},
};

/// The podCIDR 10.5.x.0/24 as flannel tells a runtime of it.
fn subnet(octet: u8) -> Subnet {
    Subnet { gateway: Ipv4Addr::new(10, 5, octet, 1), len: 24, mtu: 1450 }
}

/// Has a host be one of flannel's, with a node of that podCIDR, and a pod.
pub(super) fn make_flannels(cluster: &mut Cluster, host: usize, octet: u8) {
    let name = cluster.hosts[host].name.clone();
    cluster.add_node(&name, &[&format!("10.5.{octet}.0/24")]);
    let mac = cluster.hosts[host].add_kernel_vxlan([10, 5, octet, 0].into()).unwrap();
    write_subnet_env(cluster, host, octet);
    cluster.announce(&name, &cluster.hosts[host].address.to_string(), &mac);
    cluster.hosts[host].add_pod_in(&subnet(octet)).unwrap();
}

/// As flannel's daemon does, without `--ip-masq` (flannel: pkg/subnet/subnet.go).
fn write_subnet_env(cluster: &Cluster, host: usize, octet: u8) {
    let run_dir = cluster.hosts[host].run_dir();
    std::fs::create_dir_all(&run_dir).unwrap();
    let text = format!(
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.{octet}.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
    );
    let new = run_dir.join(".subnet.env.flannel");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(&new, run_dir.join("subnet.env")).unwrap();
}

/// Has a host of flannel's know a node's.
pub(super) fn add_kernel_peer(cluster: &Cluster, host: usize, name: &str, octet: u8) {
    let data: Value = serde_json::from_str(&cluster.annotation(name, "backend-data").unwrap()).unwrap();
    let address = cluster.annotation(name, "public-ip").unwrap().parse().unwrap();
    let mac = data["VtepMAC"].as_str().unwrap();
    cluster.hosts[host].add_kernel_peer([10, 5, octet, 0].into(), mac, address).unwrap();
}

/// Hosts 0 and 1 with flannel's daemon, that talk.
fn flannels() -> Cluster {
    let mut cluster = Cluster::without_nodes(2);
    make_flannels(&mut cluster, 0, 1);
    make_flannels(&mut cluster, 1, 2);
    add_kernel_peer(&cluster, 0, "node2", 2);
    add_kernel_peer(&cluster, 1, "node1", 1);
    cluster.wait_connected(0, 1);
    cluster
}

/// What flannel wrote of a node.
fn annotations(cluster: &Cluster, name: &str) -> Vec<(String, Value)> {
    let annotations = cluster.node(name)["metadata"]["annotations"].as_object().unwrap().clone();
    annotations.into_iter().filter(|(key, _)| key.starts_with(super::PREFIX)).collect()
}

fn device(cluster: &Cluster, host: usize) -> (Value, Value) {
    let links = cluster.hosts[host].netns.ip_json("link show flannel.1").unwrap();
    (links[0]["ifindex"].clone(), links[0]["address"].clone())
}

/// What is said on a connection, both ways.
fn say((one, other): &(TcpStream, TcpStream), text: &str) {
    for (mut from, mut to) in [(one, other), (other, one)] {
        from.write_all(text.as_bytes()).unwrap();
        let mut heard = vec![0; text.len()];
        to.read_exact(&mut heard).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(heard, text.as_bytes());
    }
}

#[test]
fn ours_and_flannels_talk_both_ways() {
    let mut cluster = Cluster::without_nodes(2);
    make_flannels(&mut cluster, 1, 2);
    cluster.add_node("node1", &["10.5.1.0/24"]);
    cluster.start(0, &[]);
    cluster.hosts[0].wait_ready().unwrap();
    cluster.hosts[0].add_pod().unwrap();
    cluster.wait_pods(0);
    cluster.wait_announced(0);
    add_kernel_peer(&cluster, 1, "node1", 1);
    cluster.wait_connected(0, 1);
    for (from, to) in [(0, 1), (1, 0)] {
        let address = cluster.hosts[to].pods[0].address;
        let ping = cluster.hosts[from].pods[0].netns.exec(&format!("ping -c 5 -i 0.2 -W 2 {address}")).unwrap();
        assert!(ping.contains("5 received"), "{from} to {to}: {ping}");
        assert!(is_delivered(&cluster.hosts[from].netns, &address.to_string()), "host {from} to pod {to}");
    }
    for gso in [true, false] {
        for host in &cluster.hosts {
            host.set_underlay_gso(gso).unwrap();
        }
        for (from, to) in [(0, 1), (1, 0)] {
            let (from, to) = (&cluster.hosts[from].pods[0], &cluster.hosts[to].pods[0]);
            let transfer = tcp_transfer(&from.netns, &to.netns, to.address, 1, cluster.lab.directory()).unwrap();
            assert!(transfer.is_flowing(), "{} Gb/s with GSO {gso}", transfer.gbits);
        }
    }
    assert_eq!(cluster.counter(0, "inner_foreign_mac"), 0);
    // Byte for byte what flannel's daemon writes, and what its restart reads its MAC from.
    let (_, mac) = device(&cluster, 0);
    let mac = mac.as_str().unwrap();
    let written: Vec<_> = annotations(&cluster, "node1");
    let written: Vec<_> =
        written.iter().map(|(key, value)| (key.rsplit('/').next().unwrap(), value.as_str().unwrap())).collect();
    let data = format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#);
    assert_eq!(
        written,
        [
            ("backend-data", &*data),
            ("backend-type", "vxlan"),
            ("kube-subnet-manager", "true"),
            ("public-ip", "192.168.64.1")
        ]
    );
}

#[test]
fn hosts_move_from_flannel_and_back_one_by_one() {
    let mut cluster = flannels();
    let before = [0, 1].map(|host| (device(&cluster, host), annotations(&cluster, &cluster.hosts[host].name)));
    let to = &cluster.hosts[1].pods[0];
    let listener = listener_in(&to.netns, to.address, 7000);
    let talk = connection(&cluster.hosts[0].pods[0].netns, SocketAddrV4::new(to.address, 7000), &listener);
    say(&talk, "flannel and flannel");
    let traffic: [Traffic; 2] = [cluster.traffic(0, 1), cluster.traffic(1, 0)];
    for host in 0..2 {
        cluster.start(host, &[]);
        cluster.wait_log(host, "carries");
        cluster.wait_peers(host, 1);
        cluster.wait_pods(host);
        say(&talk, &format!("host {host} is ours"));
        // What flannel made for its peer is gone.
        let tables = format!("{:?}", cluster.hosts[host].overlay_tables().unwrap());
        assert!(!tables.contains(&format!("10.5.{}.0 ", 2 - host)), "{tables}");
    }
    cluster.wait_connected(0, 1);
    let now = [0, 1].map(|host| (device(&cluster, host), annotations(&cluster, &cluster.hosts[host].name)));
    assert_eq!(now, before);
    for (host, peer, octet) in [(0, "node2", 2), (1, "node1", 1)] {
        let agent = cluster.hosts[host].agent.as_mut().unwrap();
        agent.signal(Signal::SIGTERM).unwrap();
        assert!(agent.wait(SOON).unwrap().success());
        cluster.hosts[host].agent = None;
        // flannel's daemon starts: the file, then the peers; and what is left of ours is cleaned up.
        write_subnet_env(&cluster, host, 3 - octet);
        add_kernel_peer(&cluster, host, peer, octet);
        say(&talk, &format!("host {host} is flannel's again"));
        let cleaned = cluster.agent_on(host).arg("cleanup").output().unwrap();
        assert!(cleaned.status.success(), "{}", String::from_utf8_lossy(&cleaned.stderr));
        say(&talk, &format!("host {host} is clean"));
    }
    cluster.wait_connected(0, 1);
    let now = [0, 1].map(|host| (device(&cluster, host), annotations(&cluster, &cluster.hosts[host].name)));
    assert_eq!(now, before);
    traffic.into_iter().for_each(|traffic| traffic.assert_nothing_was_lost());
}

#[test]
fn a_host_of_flannels_that_changes_is_followed() {
    let mut cluster = Cluster::with_pods(1);
    let second = cluster.lab.host("node2", 2).unwrap();
    cluster.hosts.push(second);
    make_flannels(&mut cluster, 1, 2);
    add_kernel_peer(&cluster, 1, "node1", 1);
    cluster.wait_connected(0, 1);
    // Its device was made anew, and its daemon announces the MAC of that.
    cluster.hosts[1].netns.ip("link delete flannel.1").unwrap();
    let mac = cluster.hosts[1].add_kernel_vxlan([10, 5, 2, 0].into()).unwrap();
    add_kernel_peer(&cluster, 1, "node1", 1);
    cluster.announce("node2", "192.168.64.2", &mac);
    cluster.wait_connected(0, 1);
    // A dual-stack node, of which one family only changes.
    cluster.annotate(
        "node2",
        &[("backend-v6-data", Some(r#"{"VNI":1,"VtepMAC":"0a:00:00:00:06:02"}"#)), ("public-ipv6", Some("fd00::2"))],
    );
    cluster.hosts[1].netns.ip("link set flannel.1 address 0a:00:00:00:00:22").unwrap();
    // The kernel forgets its neighbours with that.
    add_kernel_peer(&cluster, 1, "node1", 1);
    cluster.annotate("node2", &[("backend-data", Some(r#"{"VNI":1,"VtepMAC":"0a:00:00:00:00:22"}"#))]);
    let waited = wait_for("pods", SOON, || {
        is_answered(&cluster.hosts[0].pods[0].netns, &cluster.hosts[1].pods[0].address.to_string())
    });
    waited.unwrap();
    cluster.wait_connected(0, 1);
}
