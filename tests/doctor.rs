//! `flannel-agent doctor`: each fault that it knows is planted, named, and gone when it is taken away.

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    process::Command,
};

use nix::sys::signal::Signal;
use serde_json::Value;
use xtask::{
    lab::{Netns, PREFIX},
    process::Process,
    progress::wait_for,
};

use crate::{
    sockets::socket_in,
    world::{CONFIG, SOON, World, agent},
};

/// What a doctor said of each check: the verdict, and in words.
type Said = BTreeMap<String, (String, String)>;

fn said(mut command: Command) -> (Option<i32>, Said) {
    let result = command.args(["-o", "json"]).output().unwrap();
    let document: Value = serde_json::from_slice(&result.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&result.stderr)));
    assert_eq!(document["apiVersion"], "flannel-agent/v1");
    let text = |check: &Value, key: &str| check[key].as_str().unwrap_or_default().to_owned();
    let mut said = Said::new();
    for check in document["checks"].as_array().unwrap() {
        let words = format!("{}; {}", text(check, "found"), text(check, "advice"));
        let entry = (text(check, "verdict"), words);
        let kept = said.entry(text(check, "check")).or_insert_with(|| entry.clone());
        if kept.0 == "ok" {
            *kept = entry;
        }
    }
    (result.status.code(), said)
}

fn doctor(world: &World, arguments: &[&str]) -> (Option<i32>, Said) {
    let mut command = world.agent_on(0);
    command.arg("doctor").args(arguments);
    said(command)
}

/// Before an agent was here, with the store of the world.
fn before(world: &World, arguments: &[&str]) -> (Option<i32>, Said) {
    let endpoints = format!("--etcd-endpoints={}", world.store.endpoint());
    let standard = ["--before-install", &endpoints, "--cni-conf-dir=/nonexistent"];
    doctor(world, &[&standard[..], arguments].concat())
}

fn assert_says(said: &Said, check: &str, verdict: &str, words: &str) {
    let (found, text) = said.get(check).unwrap_or_else(|| panic!("no check {check}: {said:#?}"));
    assert!(found == verdict && text.contains(words), "{check} {verdict} {words:?}: {said:#?}");
}

/// Nothing but this check is to be looked at.
fn assert_only((code, said): &(Option<i32>, Said), check: &str, verdict: &str, words: &str) {
    assert_says(said, check, verdict, words);
    let others: Vec<_> = said.iter().filter(|(name, (verdict, _))| *name != check && verdict != "ok").collect();
    assert!(others.is_empty(), "{others:#?}");
    assert_eq!(*code, Some(3));
}

fn assert_well((code, said): &(Option<i32>, Said)) {
    let others: Vec<_> = said.iter().filter(|(_, (verdict, _))| verdict != "ok").collect();
    assert!(others.is_empty() && *code == Some(0), "{others:#?}");
}

#[test]
fn a_host_before_its_agent_and_with_each_fault_of_its_network() {
    let world = World::new(1);
    let netns = &world.hosts[0].netns;
    let well = before(&world, &[]);
    assert_well(&well);
    assert_says(
        &well.1,
        "needs",
        "ok",
        "UDP port 8472 open between all hosts; CAP_BPF and CAP_NET_ADMIN; a bpf file system at ",
    );
    assert_says(&well.1, "MTU", "ok", "eth0 carries 1500 bytes, and so the overlay 1450; pods get 1450");
    assert_says(&well.1, "network config", "ok", "10.5.0.0/16 with the backend vxlan");
    assert!(!well.1.contains_key("agent"), "{well:?}");

    let socket = socket_in(netns, SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 8472));
    let taken = before(&world, &[]);
    assert_only(&taken, "UDP port", "problem", "8472 is taken by ");
    assert!(taken.1["UDP port"].1.contains(&format!("(process {})", std::process::id())), "{taken:?}");
    drop(socket);
    for (plant, remove, check, verdict, words) in [
        (
            "ip link add vx0 type vxlan id 1 dstport 8472 dev eth0",
            "ip link del vx0",
            "UDP port",
            "problem",
            "the vxlan device vx0 has 8472",
        ),
        (
            "ip link set eth0 mtu 600",
            "ip link set eth0 mtu 1500",
            "MTU",
            "warning",
            "eth0 carries 600 bytes, and so the overlay 550",
        ),
        (
            "ethtool -K eth0 tx-udp_tnl-segmentation off",
            "ethtool -K eth0 tx-udp_tnl-segmentation on",
            "offloads",
            "warning",
            "`ethtool -K eth0 tx-udp_tnl-segmentation on`",
        ),
        ("ip link add weave type bridge", "ip link del weave", "other networks", "warning", "weave (Weave Net)"),
    ] {
        netns.exec(plant).unwrap();
        assert_only(&before(&world, &[]), check, verdict, words);
        if check == "offloads" {
            world.assert_shown(0, "ethtool -K eth0 tx-udp_tnl-segmentation on", &[]);
        }
        netns.exec(remove).unwrap();
    }
    // One of another VNI shares the port.
    netns.exec("ip link add vx0 type vxlan id 77 dstport 8472 dev eth0").unwrap();
    netns.exec("ip link set vx0 up").unwrap();
    let shared = before(&world, &[]);
    assert_well(&shared);
    assert_says(&shared.1, "UDP port", "ok", "8472 is that of vx0");
    netns.exec("ip link del vx0").unwrap();
    assert_only(&before(&world, &["--iface=eth9"]), "interface", "problem", "nothing matches --iface=eth9");
    assert_well(&before(&world, &[]));
}

#[test]
fn packet_rules_before_an_agent_and_those_that_it_makes_harmless() {
    let world = World::new(1);
    let netns = &world.hosts[0].netns;
    let set = |command: &str| netns.exec(command).unwrap_or_else(|error| panic!("{command}: {error}"));
    set("iptables -P FORWARD DROP");
    let harmless = before(&world, &[]);
    assert_well(&harmless);
    assert_says(
        &harmless.1,
        "firewall",
        "ok",
        "before iptables FORWARD policy DROP the agent accepts what is forwarded",
    );
    let kept = before(&world, &["--iptables-forward-rules=false"]);
    assert_only(
        &kept,
        "firewall",
        "problem",
        "iptables FORWARD policy DROP drops packets between pods and other hosts",
    );
    set("iptables -P FORWARD ACCEPT");
    set("iptables -A INPUT -p udp --dport 8472 -j REJECT");
    let dropped = before(&world, &[]);
    assert_only(
        &dropped,
        "firewall",
        "problem",
        "iptables INPUT rule 1 drops tunnel packets from peers; accept UDP port 8472",
    );
    set("iptables -F INPUT");
    set("nft add table inet firewalld");
    set("nft add chain inet firewalld filter_INPUT { type filter hook input priority 10; }");
    set("nft add rule inet firewalld filter_INPUT ct state established,related accept");
    let managed = before(&world, &[]);
    assert_well(&managed);
    assert_says(&managed.1, "firewall", "ok", "firewalld set rules here, and nothing stops the overlay's packets");
    set("nft add rule inet firewalld filter_INPUT reject");
    let advice = "`firewall-cmd --permanent --add-port=8472/udp`";
    assert_only(&before(&world, &[]), "firewall", "problem", advice);
    set("nft delete table inet firewalld");
    set("nft add table ip t");
    set("nft add chain ip t f { type filter hook forward priority 0; policy drop; }");
    let advice = "accept 10.5.0.0/16 in that chain, in front of it: what another chain accepts does not count";
    assert_only(&before(&world, &[]), "firewall", "problem", advice);
    set("nft delete table ip t");
    assert_well(&before(&world, &[]));
}

#[test]
fn rights_store_and_others_before_an_agent() {
    let world = World::new(1);
    let netns = &world.hosts[0].netns;
    let endpoints = format!("--etcd-endpoints={}", world.store.endpoint());

    let mut command = netns.command("setpriv");
    command.args(["--bounding-set=-bpf", "--inh-caps=-bpf"]).arg(agent()).args([
        "doctor",
        "--before-install",
        &endpoints,
    ]);
    command.arg("--bpf-pin-dir").arg(world.hosts[0].pin_dir());
    let (code, without) = said(command);
    assert_says(&without, "capabilities", "problem", "this process lacks CAP_BPF; run as root");
    assert_says(&without, "kernel", "warning", "run doctor as root");
    assert_eq!(code, Some(3));

    let elsewhere = before(&world, &["--bpf-pin-dir=/tmp/flannel-doctor"]);
    assert_only(&elsewhere, "bpf file system", "problem", "is not on one; mount one with `mount -t bpf bpf ");
    let away = before(&world, &["--etcd-endpoints=http://192.168.64.254:1"]);
    assert_only(&away, "store", "problem", "connection refused");
    world
        .store
        .put(&format!("{PREFIX}/config"), r#"{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "Prot": 1}}"#)
        .unwrap();
    let remark = "the key Backend.Prot is none of flannel's (did you mean Backend.Port?)";
    assert_only(&before(&world, &[]), "network config", "warning", remark);
    world.store.put(&format!("{PREFIX}/config"), r#"{"Network": "10.5.0.0/33"}"#).unwrap();
    assert_only(&before(&world, &[]), "network config", "problem", "invalid CIDR address: 10.5.0.0/33");
    world.store.put(&format!("{PREFIX}/config"), CONFIG).unwrap();

    // In Kubernetes, services on one bridge need it.
    netns.exec("sysctl -qw net.bridge.bridge-nf-call-iptables=0").unwrap();
    let (_, kubernetes) = before(&world, &["--kube-subnet-mgr", "--kube-api-url=http://192.168.64.254:1"]);
    assert_says(&kubernetes, "br_netfilter", "warning", "net.bridge.bridge-nf-call-iptables is 0");
    assert_well(&before(&world, &[]));

    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("05-cilium.conflist"), r#"{"plugins": [{"type": "cilium-cni"}]}"#).unwrap();
    let flag = format!("--cni-conf-dir={}", directory.path().display());
    let others = doctor(&world, &["--before-install", &endpoints, &flag]);
    assert_only(&others, "CNI", "warning", "05-cilium.conflist is Cilium's");

    let daemon = flanneld(&world, netns);
    assert_only(&before(&world, &[]), "flannel", "problem", "flanneld runs here (process ");
    drop(daemon);
    wait_for("its end", SOON, || before(&world, &[]).0 == Some(0)).unwrap();
    let device = "ip link add flannel.1 type vxlan id 1 dstport 8472 dev eth0 local 192.168.64.1";
    netns.exec(device).unwrap();
    let left = before(&world, &[]);
    assert_well(&left);
    assert_says(&left.1, "flannel", "ok", "the agent takes over what it left: flannel.1");
}

/// Something that goes by the name of flannel's daemon.
fn flanneld(world: &World, netns: &Netns) -> Process {
    let binary = world.lab.directory().join("flanneld");
    fs::copy("/bin/sleep", &binary).unwrap();
    let log = world.lab.directory().join("flanneld.log");
    let process = Process::start(netns.command(&binary.to_string_lossy()).arg("600"), &log).unwrap();
    let is_there = || before(world, &[]).1["flannel"].0 == "problem";
    wait_for("the process", SOON, is_there).unwrap();
    process
}

#[test]
fn beside_an_agent_and_where_it_ended() {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    let endpoints = format!("--etcd-endpoints={}", world.store.endpoint());
    let look = |world: &World| doctor(world, &["--cni-conf-dir=/nonexistent", &endpoints]);
    let without_flags = doctor(&world, &["--cni-conf-dir=/nonexistent"]);
    assert_well(&without_flags);
    assert_says(&without_flags.1, "store", "ok", "the agent follows etcd for ");
    let well = look(&world);
    assert_well(&well);
    assert_says(&well.1, "agent", "ok", "that of flannel.1 runs");
    assert_says(&well.1, "UDP port", "ok", "8472 is that of flannel.1");
    assert_says(&well.1, "forwarding", "ok", "net.ipv4.ip_forward is 1");
    let set = |world: &World, command: &str| {
        world.hosts[0].netns.exec(command).unwrap_or_else(|error| panic!("{command}: {error}"));
    };
    for (plant, remove, check, verdict, words) in [
        (
            "sysctl -qw net/ipv4/conf/cni0/forwarding=0",
            "sysctl -qw net/ipv4/conf/cni0/forwarding=1",
            "forwarding",
            "problem",
            "packets that come in by cni0 are not forwarded",
        ),
        (
            "iptables -A INPUT -s 192.168.64.2 -j DROP",
            "iptables -D INPUT -s 192.168.64.2 -j DROP",
            "firewall",
            "problem",
            "iptables INPUT rule 1 drops tunnel packets from peers",
        ),
    ] {
        set(&world, plant);
        assert_only(&look(&world), check, verdict, words);
        set(&world, remove);
    }
    // About nobody who sends here.
    set(&world, "iptables -A INPUT -s 203.0.113.7 -j DROP");
    assert_well(&look(&world));

    // Another way to the peer than it has here.
    set(&world, "ip link add eth9 type veth peer name eth8");
    set(&world, "ip link set eth9 up");
    set(&world, "ip link set eth8 up");
    set(&world, "ip route add 192.168.64.2/32 dev eth9");
    set(&world, "sysctl -qw net/ipv4/conf/eth0/rp_filter=1");
    let is_said = || look(&world).1["rp_filter"].0 == "warning";
    wait_for("the other way", SOON, is_said).unwrap();
    assert_says(
        &look(&world).1,
        "rp_filter",
        "warning",
        "it is strict on eth0, and 1 peer is reached by another interface",
    );
    world.assert_shown(0, "it is strict on eth0", &[]);
    set(&world, "ip link del eth9");
    wait_for("the way back", SOON, || look(&world).0 == Some(0)).unwrap();

    let agent = world.hosts[0].agent.as_mut().unwrap();
    agent.signal(Signal::SIGKILL).unwrap();
    agent.wait(SOON).unwrap();
    let ended = look(&world);
    assert_only(&ended, "agent", "problem", "that of flannel.1 does not run");
    world.assert_shown(0, "that of flannel.1 does not run", &[]);
    set(&world, "ip link set eth0 mtu 1400");
    let smaller = look(&world).1;
    assert_says(&smaller, "MTU", "problem", "but flannel.1 has 1450: larger packets are lost");
    set(&world, "ip link set eth0 mtu 1500");
    set(&world, "ip neigh add 10.5.9.0 lladdr 0a:00:00:00:00:09 dev flannel.1 nud permanent");
    set(&world, "ip route add 10.5.9.0/24 via 10.5.9.0 dev flannel.1 onlink");
    assert_says(&look(&world).1, "flannel", "problem", "flanneld has routes into flannel.1 for 10.5.9.0/24");
    world.assert_shown(0, "flanneld has routes into flannel.1 for 10.5.9.0/24", &[]);
    set(&world, "sysctl -qw net.ipv4.ip_forward=0");
    assert_says(&look(&world).1, "forwarding", "problem", "net.ipv4.ip_forward is 0");
    world.assert_shown(0, "net.ipv4.ip_forward is 0", &[]);
}
