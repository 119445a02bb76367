//! What packets that do not arrive are said to meet: planted faults, real traffic, and what `status` says of it in time.

use std::{
    net::SocketAddrV4,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use xtask::{lab::PREFIX, progress::wait_for};

use crate::{
    sockets::socket_in,
    stream::Stream,
    world::{SOON, World, is_answered, lease_value},
};

/// Within this time of traffic meeting a fault it is said.
const NAMED: Duration = Duration::from_secs(15);

impl World {
    fn troubles(&self, host: usize) -> Vec<String> {
        let status = self.status(host);
        let troubles = status["troubles"].as_array().unwrap();
        troubles.iter().map(|trouble| trouble.as_str().unwrap().to_owned()).collect()
    }

    /// How long all agents have waited for a CPU.
    fn waited_for_cpu(&self) -> Duration {
        self.hosts.iter().filter_map(|host| host.agent.as_ref()?.run_delay().ok()).sum()
    }

    /// Plants a fault under datagrams, and waits until on each of these hosts a trouble has all these words in it.
    fn assert_named(&self, plant: impl FnOnce(), named: &[(usize, &[&str])]) {
        let stream = Stream::start(&self.hosts[0].pods[0], &self.hosts[1].pods[0]);
        let (planted, delayed) = (SystemTime::now(), self.waited_for_cpu());
        plant();
        let mut last = planted;
        for (host, words) in named {
            let is_named =
                || self.troubles(*host).iter().any(|trouble| words.iter().all(|word| trouble.contains(word)));
            let waited = wait_for("the trouble", 2 * SOON, is_named);
            assert!(waited.is_ok(), "{words:?}: {:#?}", self.troubles(*host));
            // How long a busy machine takes to show it is not the agent's.
            let written = self.status(*host)["status"]["written"].as_u64().unwrap();
            last = last.max(UNIX_EPOCH + Duration::from_secs(written));
        }
        let took = last.duration_since(planted).unwrap_or_default();
        let limit = NAMED + self.waited_for_cpu().saturating_sub(delayed);
        assert!(took <= limit, "{named:?} was said after {took:?}");
        drop(stream.end());
    }

    /// Waits until pods reach each other, and nothing is said.
    fn wait_well(&self) {
        self.wait_connected(0, 1);
        for host in 0..self.hosts.len() {
            let waited = wait_for("nothing to be looked at", SOON, || self.troubles(host).is_empty());
            assert!(waited.is_ok(), "{:#?}", self.troubles(host));
        }
    }
}

#[test]
fn a_peer_that_is_cut_off_is_named_by_those_that_send_to_it() {
    let world = World::new(2).ready(&[]);
    world.wait_well();
    let subnet = world.lease_of(1).0.replace('-', "/");
    let cut = || world.lab.underlay.ip("link set node2 nomaster").map(drop).unwrap();
    world.assert_named(cut, &[(0, &[subnet.as_str(), "by 192.168.64.2 does not answer", "last heard"])]);
    world.assert_shown(0, "packets sent to it in ... its next hop 192.168.64.2", &[("10.5.2.0/24", &subnet)]);
    world.lab.underlay.ip("link set node2 master br0").unwrap();
    world.wait_well();
}

#[test]
fn a_filter_for_the_tunnels_port_is_named_by_both_sides() {
    let world = World::new(2).ready(&[]);
    world.wait_well();
    let netns = &world.hosts[1].netns;
    let filter = || netns.exec("iptables -I INPUT -p udp --dport 8472 -j DROP").map(drop).unwrap();
    let subnet = world.lease_of(1).0.replace('-', "/");
    let here: &[&str] = &["none of them came out of flannel.1", "INPUT rule 1"];
    world.assert_named(filter, &[(1, here), (0, &[subnet.as_str(), "does not answer"])]);
    world.assert_shown(1, "INPUT rule 1", &[]);
    world.assert_shown(0, "tunnel's UDP port let through?", &[("10.5.2.0/24", &subnet)]);
    world.assert_shown(0, "silent", &[("10.5.2.0/24", &subnet)]);
    netns.exec("iptables -D INPUT 1").unwrap();
    world.wait_well();
}

/// Tunnel packets that stay in their tunnel pass the host's own check of where they are from.
#[test]
fn a_strict_reverse_path_is_named() {
    let world = World::new(2).ready(&["--bypass=off"]);
    world.wait_well();
    let netns = &world.hosts[1].netns;
    let plant = || {
        netns.ip("link add other type bridge").unwrap();
        netns.ip("link set other up").unwrap();
        netns.ip("address add 10.99.0.2/24 dev other").unwrap();
        netns.exec("sysctl -q -w net.ipv4.conf.eth0.rp_filter=1").unwrap();
        netns.ip("route add 192.168.64.1 via 10.99.0.1 dev other").unwrap();
    };
    let words: &[&str] = &["net.ipv4.conf.eth0.rp_filter is 1", "1 peer is reached by another interface"];
    world.assert_named(plant, &[(1, &["none of them came out of flannel.1"]), (1, words)]);
    world.assert_shown(1, "net.ipv4.conf.eth0.rp_filter is 1", &[]);
    netns.exec("sysctl -q -w net.ipv4.conf.eth0.rp_filter=2").unwrap();
    netns.ip("route del 192.168.64.1").unwrap();
    world.wait_well();
}

#[test]
fn a_policy_that_forwards_nothing_is_named() {
    let world = World::new(2).ready(&[]);
    world.wait_well();
    let netns = &world.hosts[1].netns;
    let policy = "table inet corporate { chain forward { type filter hook forward priority 10; policy drop; }; }";
    let words: &[&str] = &["none reached a pod", "nft inet corporate forward: its policy is drop"];
    world.assert_named(|| netns.feed("nft -f -", policy).map(drop).unwrap(), &[(1, words)]);
    world.assert_shown(1, "forward: its policy is drop", &[]);
    netns.exec("nft delete table inet corporate").unwrap();
    world.wait_well();
    let reject = || netns.exec("iptables -I FORWARD -i flannel.1 -j REJECT").map(drop).unwrap();
    world.assert_named(reject, &[(1, &["none reached a pod", "FORWARD rule 1"])]);
    world.assert_shown(1, "FORWARD rule 1", &[]);
    netns.exec("iptables -D FORWARD 1").unwrap();
    world.wait_well();
}

#[test]
fn a_peer_that_large_packets_do_not_reach_is_named() {
    let world = World::new(2).ready(&[]);
    world.wait_well();
    // Where a bridge's packets pass iptables, it fragments what is too large for a port (`br_nf_dev_queue_xmit`).
    world.lab.underlay.exec("sysctl -e -q -w net.bridge.bridge-nf-call-iptables=0").unwrap();
    world.lab.underlay.ip("link set node2 mtu 1400").unwrap();
    let subnet = world.lease_of(1).0.replace('-', "/");
    let [from, to] = [0, 1].map(|host| &world.hosts[host].pods[0]);
    let socket = socket_in(&from.netns, SocketAddrV4::new(from.address, 0));
    let began = Instant::now();
    let named = format!("packets of 1450 bytes do not reach {subnet} by 192.168.64.2, and small ones do");
    let waited = wait_for("the trouble", 2 * SOON, || {
        socket.send_to(&[7; 1400], SocketAddrV4::new(to.address, 7001)).unwrap();
        world.troubles(0).iter().any(|trouble| trouble.starts_with(&named))
    });
    assert!(waited.is_ok(), "{:#?}", world.troubles(0));
    assert!(began.elapsed() < NAMED + world.waited_for_cpu(), "after {:?}", began.elapsed());
    assert_eq!(world.troubles(0).len(), 1, "it is not silent: {:#?}", world.troubles(0));
    world.assert_shown(0, "packets of 1450 bytes do not reach", &[("10.5.2.0/24", &subnet)]);
    world.lab.underlay.ip("link set node2 mtu 1500").unwrap();
    world.wait_well();
}

/// What goes one way only is no fault of a peer that lives, whether an agent serves it or flannel.
#[test]
fn datagrams_that_nobody_answers_are_no_trouble() {
    let world = World::beside_flannels();
    let pod = |host: usize| &world.hosts[host].pods[0];
    let streams = [(1, 7001), (2, 7002)].map(|(to, port)| Stream::start_on(pod(0), pod(to), port));
    let since = Instant::now();
    while since.elapsed() < NAMED + Duration::from_secs(5) {
        for host in 0..2 {
            assert_eq!(world.troubles(host), Vec::<String>::new(), "after {:?}", since.elapsed());
        }
    }
    for stream in streams {
        drop(stream.end());
    }
}

#[test]
fn packets_for_a_peer_without_a_route_are_told_of_and_its_lease_alone_is_not() {
    let world = World::new(1).ready(&[]);
    let key = format!("{PREFIX}/subnets/10.5.200.0-24");
    world.store.put(&key, &lease_value("203.0.113.9", "0a:00:00:00:00:99")).unwrap();
    world.hosts[0].netns.ip("route add unreachable 203.0.113.9").unwrap();
    wait_for("the peer", SOON, || world.status(0)["status"]["peers"] == 1).unwrap();
    assert_eq!(world.troubles(0), Vec::<String>::new());
    let words = ["were for peers that the underlay does not reach", "nothing is sent to 10.5.200.0/24 by 203.0.113.9"];
    let waited = wait_for("the trouble", SOON, || {
        is_answered(&world.hosts[0].pods[0].netns, "10.5.200.7");
        let troubles = world.troubles(0);
        words.iter().all(|word| troubles.iter().any(|trouble| trouble.contains(word)))
    });
    assert!(waited.is_ok(), "{:#?}", world.troubles(0));
    world.assert_shown(0, "were for peers that the underlay does not reach", &[]);
}
