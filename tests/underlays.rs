//! Underlays with more than one link between hosts: tunnel packets come in by any of them, and go out by any, as with the kernel's
//! vxlan device.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddrV4, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use xtask::{lab::PREFIX, progress::wait_for, transfer::tcp_transfer};

use crate::{
    overlays::Overlay,
    sockets::{Pattern, connection, listener_in, socket_in},
    world::{SOON, World},
};

/// Of flows, each with a port of its own: as many as it takes for their share of a link to be within a few percent.
const FLOWS: u16 = 1024;

/// Gives each host an `eth1` on a link of its own, with the address `192.168.65.<number>`.
pub fn add_second_link(world: &World) {
    let underlay = &world.lab.underlay;
    underlay.ip("link add br1 type bridge").unwrap();
    underlay.ip("link set br1 up").unwrap();
    for (host, number) in world.hosts.iter().zip(1..) {
        let port = format!("second{number}");
        let end = format!("type veth peer name eth1 netns {}", host.netns.name());
        underlay.ip(&format!("link add {port} {end}")).unwrap();
        underlay.ip(&format!("link set {port} master br1 up")).unwrap();
        host.netns.ip(&format!("address add 192.168.65.{number}/24 dev eth1")).unwrap();
        host.netns.ip("link set eth1 up").unwrap();
        // As distributions have it: what comes in must have a way back, by whichever interface.
        host.netns.exec("sysctl -qw net.ipv4.conf.all.rp_filter=2").unwrap();
    }
}

/// What the hosts of a data centre have: two links, VTEP addresses on `lo`, and routes to these by both links, as routing daemons
/// set them.
struct Spread {
    world: World,
    next_hops: [[String; 2]; 2],
}

impl Spread {
    fn new(arguments: &[&str], has_ipv6_next_hops: bool) -> Self {
        let world = World::without_config(2);
        // That of loopback is no link's.
        let config = r#"{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "MTU": 1500}}"#;
        world.store.put(&format!("{PREFIX}/config"), config).unwrap();
        add_second_link(&world);
        let next_hop = |peer: usize, device: &str| {
            let netns = &world.hosts[peer].netns;
            if has_ipv6_next_hops {
                let of_link = || netns.ip_json(&format!("-6 address show dev {device} scope link -tentative")).unwrap();
                let address = || of_link()[0]["addr_info"][0]["local"].as_str().map(str::to_owned);
                wait_for("a link-local address", SOON, || address().is_some()).unwrap();
                format!("nexthop via inet6 {} dev {device}", address().unwrap())
            } else {
                let addresses = netns.ip_json(&format!("-4 address show dev {device}")).unwrap();
                format!("nexthop via {} dev {device}", addresses[0]["addr_info"][0]["local"].as_str().unwrap())
            }
        };
        let next_hops = [1, 0].map(|peer| ["eth0", "eth1"].map(|device| next_hop(peer, device)));
        let mut spread = Self { world, next_hops };
        for host in [0, 1] {
            let netns = &spread.world.hosts[host].netns;
            netns.ip(&format!("address add 10.255.0.{}/32 dev lo", host + 1)).unwrap();
            netns.exec("sysctl -qw net.ipv4.fib_multipath_hash_policy=1 net.ipv4.fib_multipath_use_neigh=1").unwrap();
            spread.route(host, ["1", "1"]);
        }
        for host in [0, 1] {
            let iface = format!("--iface=10.255.0.{}", host + 1);
            spread.world.start(host, &[&[iface.as_str()], arguments].concat());
        }
        for host in &mut spread.world.hosts {
            host.wait_ready().unwrap();
            host.add_pod().unwrap();
        }
        (0..2).for_each(|host| spread.world.wait_pods(host));
        spread.world.wait_connected(0, 1);
        spread
    }

    /// Routes to the other host by both links, with these weights.
    fn route(&self, host: usize, weights: [&str; 2]) {
        let [first, second] = &self.next_hops[host];
        let next_hops = format!("{first} weight {} {second} weight {}", weights[0], weights[1]);
        let route = format!("route replace 10.255.0.{}/32 src 10.255.0.{} {next_hops}", 2 - host, host + 1);
        self.world.hosts[host].netns.ip(&route).unwrap();
    }

    /// Sends a datagram on each flow from the first host. How many arrived, and how much of what was sent went by the second link,
    /// in percent.
    fn share(&self, flows: &Flows) -> (usize, u64) {
        let before = sent_by_links(&self.world, 0);
        let arrived = flows.send();
        let after = sent_by_links(&self.world, 0);
        let [first, second] = [0, 1].map(|link| after[link] - before[link]);
        (arrived, second * 100 / (first + second).max(1))
    }

    /// Waits until all arrive, and the share of the second link is within these.
    fn wait_share(&self, flows: &Flows, what: &str, share: std::ops::RangeInclusive<u64>) {
        let mut last = (0, 0);
        let waited = wait_for(what, SOON, || {
            last = self.share(flows);
            last.0 == flows.senders.len() && share.contains(&last.1)
        });
        assert!(waited.is_ok(), "{what}: {last:?}");
    }
}

/// Packets that a host has sent by `eth0` and `eth1`.
fn sent_by_links(world: &World, host: usize) -> [u64; 2] {
    let netns = &world.hosts[host].netns;
    ["eth0", "eth1"].map(|device| {
        let links = netns.ip_json(&format!("-s link show {device}")).unwrap();
        links[0]["stats64"]["tx"]["packets"].as_u64().unwrap()
    })
}

/// Whether a host sends by a link what its pod sends to another's.
fn wait_sent_by(world: &World, host: usize, link: usize) {
    let peer = world.hosts[1 - host].pods[0].address.to_string();
    let mut last = None;
    let waited = wait_for("packets by the link", SOON, || {
        let before = sent_by_links(world, host);
        let pings = world.hosts[host].pods[0].netns.exec(&format!("ping -c 10 -i 0.01 -W 1 {peer}"));
        let after = sent_by_links(world, host);
        let is_sent = pings.is_ok() && after[link] - before[link] >= 10;
        last = Some((before, after, pings));
        is_sent
    });
    let route = world.hosts[host].netns.exec(&format!("ip route get {}", world.hosts[1 - host].address));
    assert!(waited.is_ok(), "host {host} by link {link}: {last:?}, {route:?}");
}

fn assert_bulk(world: &World, from: usize, to: usize, what: &str) {
    let (from, to) = (&world.hosts[from].pods[0], &world.hosts[to].pods[0]);
    let transfer = tcp_transfer(&from.netns, &to.netns, to.address, 1, world.lab.directory()).unwrap();
    assert!(transfer.is_flowing(), "{what}: {} Gb/s", transfer.gbits);
}

#[test]
fn packets_come_in_by_another_link_than_they_go_out() {
    for overlay in [Overlay::Kernel, Overlay::Slow, Overlay::Fast] {
        let world = overlay.world();
        add_second_link(&world);
        let what = format!("{overlay:?}");
        if overlay != Overlay::Kernel {
            world.wait_status(1, "the second link", |status| {
                status["underlayInterfaces"] == serde_json::json!(["eth0", "eth1"])
            });
        }
        // Only the first host sends by it; what is answered comes by the first link.
        world.hosts[0].netns.ip("route add 192.168.64.2/32 via 192.168.65.2 dev eth1").unwrap();
        wait_sent_by(&world, 0, 1);
        wait_sent_by(&world, 1, 0);
        assert_bulk(&world, 0, 1, &what);
        assert_bulk(&world, 1, 0, &what);
        if overlay == Overlay::Kernel {
            continue;
        }
        world.wait_status(1, "the second link", |status| {
            status["underlayInterfaces"] == serde_json::json!(["eth0", "eth1"])
        });
        assert_eq!(world.status(1)["troubles"], serde_json::json!([]));
        assert_eq!([0, 1].map(|host| world.counter(host, "not_admitted")), [0, 0], "{what}");
        if overlay == Overlay::Fast {
            for (host, counter) in
                [(0, "pod_encapsulated"), (1, "delivered"), (1, "pod_encapsulated"), (0, "delivered")]
            {
                assert!(world.counter(host, counter) > 1000, "{counter} of {host}: {}", world.counter(host, counter));
            }
        }
        // As links come and go, and come under another name.
        world.lab.underlay.ip("link delete second2").unwrap();
        world.hosts[0].netns.ip("route delete 192.168.64.2/32").unwrap();
        world.wait_status(1, "no second link", |status| status["underlayInterfaces"] == serde_json::json!(["eth0"]));
        wait_sent_by(&world, 0, 0);
        let end = format!("type veth peer name uplink7 netns {}", world.hosts[1].netns.name());
        world.lab.underlay.ip(&format!("link add second2 {end}")).unwrap();
        world.lab.underlay.ip("link set second2 master br1 up").unwrap();
        world.hosts[1].netns.ip("address add 192.168.65.2/24 dev uplink7").unwrap();
        world.hosts[1].netns.ip("link set uplink7 up").unwrap();
        // Of the one before the kernel would think for half a minute that it is there.
        world.hosts[0].netns.ip("neigh flush dev eth1").unwrap();
        world.hosts[0].netns.ip("route add 192.168.64.2/32 via 192.168.65.2 dev eth1").unwrap();
        wait_sent_by(&world, 0, 1);
    }
}

#[test]
fn what_a_tenant_sends_is_refused_whatever_it_says() {
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    let host = &world.hosts[1];
    // A bridge of containers, as a runtime makes it, and one of them.
    let container = xtask::lab::Netns::create(&format!("{}-tenant", host.netns.name())).unwrap();
    host.netns.ip("link add docker0 type bridge").unwrap();
    host.netns.ip(&format!("link add tenant type veth peer name eth0 netns {}", container.name())).unwrap();
    host.netns.ip("link set tenant master docker0 up").unwrap();
    host.netns.ip("address add 172.17.0.1/16 dev docker0").unwrap();
    host.netns.ip("link set docker0 up").unwrap();
    container.ip("link set lo up").unwrap();
    container.ip("address add 172.17.0.2/16 dev eth0").unwrap();
    // It poses as the first host, with a device as flannel makes it.
    container.ip("address add 192.168.64.1/32 dev lo").unwrap();
    container.ip("link set eth0 up").unwrap();
    container.ip("route add default via 172.17.0.1").unwrap();
    let mac = |host: usize| {
        let links = world.hosts[host].netns.ip_json("link show flannel.1").unwrap();
        links[0]["address"].as_str().unwrap().to_owned()
    };
    container.ip("link add flannel.1 type vxlan id 1 local 192.168.64.1 dstport 8472 nolearning").unwrap();
    container.ip(&format!("link set flannel.1 address {} mtu 1400 up", mac(0))).unwrap();
    let (forged, pod) = (world.hosts[0].pods[0].address, world.hosts[1].pods[0].address);
    container.ip(&format!("address add {forged}/32 dev flannel.1")).unwrap();
    container.ip(&format!("route add {pod}/32 dev flannel.1 src {forged}")).unwrap();
    container.ip(&format!("neigh add {pod} lladdr {} dev flannel.1", mac(1))).unwrap();
    container.exec(&format!("bridge fdb add {} dev flannel.1 dst 192.168.64.2", mac(1))).unwrap();
    let counter = "table ip t { counter forged { }; chain i { type filter hook prerouting priority -300;
        iifname \"docker0\" udp dport 8472 counter name forged; }; }";
    host.netns.feed("nft -f -", counter).unwrap();
    let arrived = |count: u64| {
        let text = host.netns.exec("nft -j list counter ip t forged").unwrap();
        let listing: serde_json::Value = serde_json::from_str(&text).unwrap();
        listing["nftables"][1]["counter"]["packets"].as_u64().unwrap() >= count
    };
    let socket = socket_in(&world.hosts[1].pods[0].netns, SocketAddrV4::new(pod, 7777));
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let forger = socket_in(&container, SocketAddrV4::new(forged, 7777));
    let refused = world.counter(1, "not_admitted");
    wait_for("forged packets", SOON, || {
        forger.send_to(b"forged", SocketAddrV4::new(pod, 7777)).unwrap();
        arrived(5)
    })
    .unwrap();
    assert!(socket.recv(&mut [0; 16]).is_err(), "a forged packet arrived");
    assert!(world.counter(1, "not_admitted") >= refused + 5);
    world.wait_status(1, "the underlay", |status| status["underlayInterfaces"] == serde_json::json!(["eth0"]));
}

/// One socket for each of many flows from the first host's pod to the other's.
struct Flows {
    senders: Vec<UdpSocket>,
    receiver: UdpSocket,
    to: SocketAddrV4,
}

impl Flows {
    fn new(world: &World, count: u16) -> Self {
        let [from, to] = [0, 1].map(|host| &world.hosts[host].pods[0]);
        let address = SocketAddrV4::new(to.address, 7777);
        let receiver = socket_in(&to.netns, address);
        receiver.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let sender = |number| socket_in(&from.netns, SocketAddrV4::new(from.address, 10_000 + number));
        Self { senders: (0..count).map(sender).collect(), receiver, to: address }
    }

    /// Sends a datagram on each flow. How many arrived.
    fn send(&self) -> usize {
        let mut arrived = 0;
        for chunk in self.senders.chunks(64) {
            for sender in chunk {
                let _refused = sender.send_to(&[7; 64], self.to);
            }
            arrived += chunk.iter().take_while(|_| self.receiver.recv(&mut [0; 64]).is_ok()).count();
        }
        arrived
    }
}

#[test]
fn flows_are_spread_over_both_links() {
    for (what, arguments, has_ipv6_next_hops) in
        [("slow", &["--bypass=off"][..], false), ("fast", &[], false), ("fast, by IPv6", &[], true)]
    {
        let spread = Spread::new(arguments, has_ipv6_next_hops);
        let world = &spread.world;
        let flows = Flows::new(world, FLOWS);
        spread.wait_share(&flows, what, 40..=60);
        spread.route(0, ["3", "1"]);
        spread.wait_share(&flows, &format!("{what}, by weights"), 20..=30);
        if arguments.is_empty() {
            let before = world.counter(0, "pod_encapsulated");
            spread.wait_share(&flows, what, 20..=30);
            let bypassed = world.counter(0, "pod_encapsulated") - before;
            assert!(bypassed > u64::from(FLOWS) / 2, "{what}: {bypassed}");
        }
        assert_bulk(world, 0, 1, what);
        assert_bulk(world, 1, 0, what);
        assert_eq!(world.status(0)["troubles"], serde_json::json!([]), "{what}");
    }
}

/// Something that happens to a next hop.
type Step<'a> = &'a dyn Fn();

#[test]
fn a_next_hop_that_is_dead_is_left_and_one_that_is_back_is_used() {
    let spread = Spread::new(&[], false);
    let netns = &spread.world.hosts[0].netns;
    let flows = Flows::new(&spread.world, 64);
    spread.wait_share(&flows, "both links", 10..=90);
    let withdrawn =
        format!("route replace 10.255.0.2/32 src 10.255.0.1 {}", &spread.next_hops[0][0]["nexthop ".len()..]);
    let deaths: [(&str, Step<'_>, Step<'_>); 3] = [
        ("link down", &|| drop(netns.ip("link set eth1 down").unwrap()), &|| {
            netns.ip("link set eth1 up").unwrap();
            spread.route(0, ["1", "1"]);
        }),
        // As the kernel has it when nobody answers its questions.
        ("neighbour failed", &|| drop(netns.ip("neigh replace 192.168.65.2 dev eth1 nud failed").unwrap()), &|| {
            netns.ip("neigh flush dev eth1").unwrap();
            netns.exec("ping -c 1 -W 2 192.168.65.2").unwrap();
        }),
        ("withdrawn", &|| drop(netns.ip(&withdrawn).unwrap()), &|| spread.route(0, ["1", "1"])),
    ];
    for (what, dies, comes_back) in deaths {
        dies();
        // Nothing is lost, and nobody is waited for: the kernel is asked for each packet.
        let (died, sent) = (Instant::now(), spread.share(&flows));
        assert_eq!(sent, (64, 0), "{what}, after {:?}", died.elapsed());
        comes_back();
        spread.wait_share(&flows, &format!("back: {what}"), 10..=90);
    }
}

#[test]
fn a_peer_behind_a_smaller_mtu_loses_nothing() {
    /// A UDP payload for which the tunnel packet is too large by far.
    const LARGE: usize = 1400;
    for overlay in [Overlay::Kernel, Overlay::Slow, Overlay::Fast] {
        let world = overlay.world();
        add_second_link(&world);
        let host = &world.hosts[0].netns;
        let [from, to] = [0, 1].map(|host| &world.hosts[host].pods[0]);
        // A connection that was there before goes on.
        let listener = listener_in(&to.netns, to.address, 8080);
        let (mut sending, receiving) = connection(&from.netns, SocketAddrV4::new(to.address, 8080), &listener);
        let pattern = Pattern::new();
        exchange(&mut sending, &receiving, &pattern, 8 << 20);
        let of_route = "route replace 192.168.64.2/32 dev eth0 mtu 1300";
        let of_link =
            "route replace 192.168.64.2/32 nexthop via 192.168.64.2 dev eth0 onlink nexthop via 192.168.65.2 dev eth1";
        host.ip("link set eth1 mtu 1300").unwrap();
        for (what, route) in [("the route's", of_route), ("a link's", of_link)] {
            let what = format!("{overlay:?}, {what}");
            host.ip(route).unwrap();
            if overlay != Overlay::Kernel {
                let waited = wait_for("the smaller MTU", SOON, || {
                    let status = world.status(0);
                    let peers = status["dataplane"]["peers"].as_array().unwrap().clone();
                    peers.iter().any(|peer| peer["address"] == "192.168.64.2" && peer["smallerMtu"] == 1250)
                        && host.exec("ip route show dev flannel.1").unwrap().contains("mtu 1250")
                });
                assert!(waited.is_ok(), "{what}: {:#}", world.status(0)["dataplane"]["peers"]);
            }
            exchange(&mut sending, &receiving, &pattern, 8 << 20);
            assert_bulk(&world, 0, 1, &what);
            // May be fragmented, of several flows, so that some take each link.
            let receiver = socket_in(&to.netns, SocketAddrV4::new(to.address, 7777));
            receiver.set_read_timeout(Some(SOON)).unwrap();
            from.netns.exec("sysctl -qw net.ipv4.ip_no_pmtu_disc=1").unwrap();
            for number in 0..32 {
                let sender = socket_in(&from.netns, SocketAddrV4::new(from.address, 30_000 + number));
                for _ in 0..3 {
                    sender.send_to(&[7; LARGE], SocketAddrV4::new(to.address, 7777)).unwrap();
                    assert_eq!(receiver.recv(&mut [0; 2000]).unwrap(), LARGE, "{what}");
                }
            }
            from.netns.exec("sysctl -qw net.ipv4.ip_no_pmtu_disc=0").unwrap();
            // May not: it arrives, or its sender is told.
            let ping = from
                .netns
                .command("ping")
                .args(["-c", "3", "-i", "0.1", "-W", "2", "-M", "do", "-s", "1400"])
                .arg(to.address.to_string())
                .output();
            let ping = String::from_utf8(ping.unwrap().stdout).unwrap();
            let is_told = ping.contains("+3 errors");
            assert!(ping.contains("3 received") || overlay != Overlay::Kernel && is_told, "{what}: {ping}");
            from.netns.ip("route flush cache").unwrap();
        }
        host.ip("route delete 192.168.64.2/32").unwrap();
        if overlay != Overlay::Kernel {
            wait_for("the overlay's MTU", SOON, || !host.exec("ip route show dev flannel.1").unwrap().contains("mtu"))
                .unwrap();
            let large = || from.netns.exec(&format!("ping -c 1 -W 1 -M do -s 1400 {}", to.address)).is_ok();
            wait_for("a large packet", SOON, large).unwrap();
        }
    }
}

#[test]
fn a_host_with_jumbo_frames_and_one_without_talk_by_a_router() {
    let mut world = World::new(2);
    add_second_link(&world);
    let router = &world.lab.underlay;
    router.exec("sysctl -qw net.ipv4.ip_forward=1").unwrap();
    // Where the kernel has it: what the bridge forwards would meet the router's rules as well.
    let _absent = router.exec("sysctl -qw net.bridge.bridge-nf-call-iptables=0");
    router.ip("address add 192.168.65.254/24 dev br1").unwrap();
    for device in ["second1", "second2", "br1"] {
        router.ip(&format!("link set {device} mtu 9000")).unwrap();
    }
    world.hosts[0].netns.ip("link set eth1 mtu 9000").unwrap();
    world.hosts[0].netns.ip("route add 192.168.64.2/32 via 192.168.65.254 dev eth1").unwrap();
    world.hosts[1].netns.ip("link delete eth1").unwrap();
    world.hosts[1].netns.ip("route add 192.168.65.1/32 via 192.168.64.254 dev eth0").unwrap();
    world.start(0, &["--iface=eth1"]);
    world.start(1, &["--iface=eth0"]);
    for host in &mut world.hosts {
        host.wait_ready().unwrap();
        host.add_pod().unwrap();
    }
    (0..2).for_each(|host| world.wait_pods(host));
    world.wait_connected(0, 1);
    assert_eq!([0, 1].map(|host| world.hosts[host].subnet().unwrap().mtu), [8950, 1450]);
    assert_bulk(&world, 0, 1, "from the large");
    assert_bulk(&world, 1, 0, "from the small");
    let [large, small] = [0, 1].map(|host| &world.hosts[host].pods[0]);
    // May be fragmented: by the router in its tunnel, and by the other host in front of its pod.
    let ping = large.netns.exec(&format!("ping -c 3 -i 0.1 -W 2 -M dont -s 8000 {}", small.address)).unwrap();
    assert!(ping.contains("3 received"), "{ping}");
    // May not: its sender is told.
    let mut ping = large.netns.command("ping");
    let said = ping.args(["-c", "3", "-i", "0.1", "-W", "2", "-M", "do", "-s", "8000"]).arg(small.address.to_string());
    let said = String::from_utf8(said.output().unwrap().stdout).unwrap();
    assert!(said.contains("+3 errors"), "{said}");
}

/// Sends so much over a connection, and sees that it arrives.
fn exchange(sending: &mut TcpStream, mut receiving: &TcpStream, pattern: &Pattern, bytes: usize) {
    thread::scope(|scope| {
        scope.spawn(|| {
            for place in (0..bytes).step_by(Pattern::LARGEST) {
                sending.write_all(pattern.at(place, Pattern::LARGEST)).unwrap();
            }
        });
        let mut buffer = vec![0; Pattern::LARGEST];
        for place in (0..bytes).step_by(Pattern::LARGEST) {
            receiving.read_exact(&mut buffer).unwrap();
            pattern.assert(place, &buffer, || format!("at {place}"));
        }
    });
}
