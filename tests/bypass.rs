//! Flows that bypass the host's stack, with netfilter's consent.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddrV4},
    time::{Duration, Instant},
};

use etherparse::{EtherType, IpFragOffset, IpNumber, Ipv4Options, PacketBuilder};
use flannel_agent::dataplane::Hook;
use flannel_common::event::Event;
use xtask::{
    lab::{Netns, Pod},
    progress::wait_for,
    transfer::tcp_transfer,
};

use crate::{
    frames::*,
    loaded::with_programs,
    sockets::socket_in,
    stream::Stream,
    world::{SOON, World, is_answered},
};

/// As kube-proxy has it: what conntrack holds for invalid never passes.
pub const DROP_INVALID: &str = "iptables -I FORWARD -m conntrack --ctstate INVALID -j DROP";

fn with_conntrack() -> World {
    let world = World::with_agents(2);
    for host in &world.hosts {
        host.netns.exec(DROP_INVALID).unwrap();
    }
    world.wait_connected(0, 1);
    world
}

#[test]
fn bulk_tcp_passes_the_stack_by_on_both_hosts() {
    assert_bulk_tcp_passes_by(&with_conntrack());
}

/// That bulk TCP between the first pods of two hosts passes the stack of both by.
pub fn assert_bulk_tcp_passes_by(world: &World) {
    let (client, server) = (&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    let counters = |host| {
        let labels = ["pod_encapsulated", "delivered", "encapsulated", "admitted", "handed_in"];
        labels.map(|label| world.counter(host, label))
    };
    let before = [counters(0), counters(1)];
    let transfer = tcp_transfer(&client.netns, &server.netns, server.address, 3, world.lab.directory()).unwrap();
    assert!(transfer.is_flowing(), "{} Gb/s", transfer.gbits);
    for (host, before) in before.into_iter().enumerate() {
        let after = counters(host);
        let [fast_out, fast_in, slow_out, admitted, handed_in] =
            [0, 1, 2, 3, 4].map(|index| after[index] - before[index]);
        let slow_in = admitted + handed_in;
        // Both directions, and some through the stack: handshakes, ends, and one a second for each flow.
        // (How many pass by depends on how much the kernel aggregates, and on what else runs.)
        assert!(fast_out > 100 && fast_in > 100, "host {host}: {fast_out} {fast_in}");
        assert!(slow_out < fast_out / 4 && slow_in < fast_in / 4, "host {host}: {slow_out} {slow_in}");
        assert!(slow_out > 4 && slow_in > 4, "host {host}: {slow_out} {slow_in}");
    }
}

#[test]
fn a_pod_whose_port_the_bridge_does_not_know_gets_what_is_its_own() {
    let mut world = World::with_agents(2);
    for _ in 0..2 {
        world.hosts[1].add_pod().unwrap();
    }
    world.wait_connected(0, 1);
    // From now on the bridge floods what is for the first of the three.
    let host = &world.hosts[1].netns;
    host.exec("bridge link set dev pod1 learning off").unwrap();
    host.ip("link set pod1 type bridge_slave fdb_flush").unwrap();
    let stream = Stream::start(&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    wait_for("some of the stream", SOON, || stream.count() > 2000).unwrap();
    let (sent, received) = stream.end();
    assert_eq!(received.len(), sent as usize);
    // Copies for the others do not hide which veth is its own.
    assert!(world.counter(1, "delivered") > 1000);
}

/// A bridge floods what is for a pod that went, until the host notices. With one pod left, that pod gets the only copy.
#[test]
fn what_was_for_a_pod_that_went_is_put_into_no_other() {
    let mut world = World::with_agents(2);
    world.hosts[1].add_pod().unwrap();
    world.wait_connected(0, 1);
    let other = &world.hosts[1].pods[1];
    // It takes whatever its link gives it, as a router would.
    for line in ["rule add iif eth0 pref 0 lookup 100", "route add local 0.0.0.0/0 dev lo table 100"] {
        other.netns.ip(line).unwrap();
    }
    let heard = socket_in(&other.netns, SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, Stream::PORT));
    heard.set_nonblocking(true).unwrap();
    let stream = Stream::start(&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    wait_for("the bypass", SOON, || world.counter(1, "delivered") > 500).unwrap();
    world.hosts[1].netns.ip("link delete pod1").unwrap();
    let flooded = world.counter(1, "pod_received");
    let is_heard = || heard.recv(&mut [0; 4]).is_ok();
    wait_for("the flood", SOON, || is_heard() || world.counter(1, "pod_received") > flooded + 500).unwrap();
    assert!(!is_heard(), "the other pod got a packet that was not for it");
    drop(stream.end());
}

#[test]
fn nothing_is_lost_or_reordered_between_the_two_ways() {
    let mut world = World::new(2);
    for host in 0..2 {
        // Less than a tick of the kernel's clock, which is how exact flows are dated: thousands of moves, back and forth at
        // each tick.
        world.start(host, &["--bypass-revalidate=1"]);
    }
    for host in &mut world.hosts {
        host.wait_ready().unwrap();
        host.add_pod().unwrap();
        host.netns.exec(DROP_INVALID).unwrap();
    }
    world.wait_connected(0, 1);
    let stream = Stream::start(&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    wait_for("thousands of datagrams", SOON, || stream.count() >= 5000).unwrap();
    let (sent, mut received) = stream.end();
    let late = received.windows(2).filter(|pair| pair[0] > pair[1]).count();
    received.sort_unstable();
    received.dedup();
    assert_eq!(received, (0..sent).collect::<Vec<_>>());
    assert!(late <= 5, "{late} of {sent} overtaken");
    // On both ways; with a tick of 4 ms or less, the stack was taken more than a thousand times.
    let (fast, slow) = (world.counter(0, "pod_encapsulated"), world.counter(0, "encapsulated"));
    assert!(fast > 1000 && slow > 1000, "{fast} fast, {slow} slow");
    assert!(world.counter(1, "delivered") > 1000);
}

#[test]
fn a_rule_takes_hold_on_a_live_flow_and_lets_go_of_it() {
    let world = with_conntrack();
    let stream = Stream::start(&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    for host in [0, 1] {
        check_rule(&world.hosts[host].netns, &stream, &format!("-p udp --dport {} -j DROP", Stream::PORT));
    }
    stream.end();
}

/// Has a rule of a host's stop a stream, and its removal let it go on.
pub fn check_rule(host: &Netns, stream: &Stream, rule: &str) {
    let wait_stream = || wait_for("the stream", SOON, || stream.silence() < Duration::from_millis(50)).unwrap();
    wait_stream();
    let ruled = Instant::now();
    host.exec(&format!("iptables -I FORWARD {rule}")).unwrap();
    wait_for("silence", SOON, || stream.silence() > Duration::from_millis(500)).unwrap();
    let stopped = ruled.elapsed().saturating_sub(Duration::from_millis(500));
    assert!(stopped < Duration::from_secs(2), "{stopped:?} after the rule");
    host.exec(&format!("iptables -D FORWARD {rule}")).unwrap();
    wait_stream();
}

#[test]
fn what_netfilter_refuses_never_passes() {
    let world = with_conntrack();
    let (client, server) = (&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    let port = Stream::PORT;
    world.hosts[1].netns.exec(&format!("iptables -I FORWARD -p udp --dport {port} -j REJECT")).unwrap();
    let stream = Stream::start(client, server);
    // Long enough for a note to be made and used, were there any.
    wait_for("many to be sent", SOON, || world.counter(0, "pod_encapsulated") > 1000).unwrap();
    let (sent, received) = stream.end();
    assert!(sent > 1000 && received.is_empty(), "{} of {sent}", received.len());
    assert_eq!(world.counter(1, "delivered"), 0);
}

/// Datagrams from one socket to two addresses in turns, two thousand to each, which all come to the same server: it must see
/// two flows, one for each address that was asked.
fn assert_two_flows(client: &Pod, asked: [Ipv4Addr; 2], server: &Pod) {
    const COUNT: usize = 2000;
    let listening = socket_in(&server.netns, SocketAddrV4::new(server.address, Stream::PORT));
    listening.set_read_timeout(Some(SOON)).unwrap();
    let socket = socket_in(&client.netns, SocketAddrV4::new(client.address, Stream::PORT));
    let mut flows = BTreeMap::<_, usize>::new();
    for _ in 0..COUNT {
        for address in asked {
            socket.send_to(&address.octets(), (address, Stream::PORT)).unwrap();
            let mut content = [0; 4];
            let (_, from) = listening.recv_from(&mut content).unwrap();
            *flows.entry((content, from)).or_default() += 1;
        }
    }
    assert_eq!(flows.values().collect::<Vec<_>>(), [&COUNT; 2], "{flows:?}");
    let ports: BTreeSet<_> = flows.keys().map(|(_, from)| from.port()).collect();
    assert_eq!(ports.len(), 2, "{flows:?}");
}

/// The direct flow and the translated one have the same ports and addresses once they are translated, so conntrack gives
/// the second another port. A note of the one must not be taken for the other.
#[test]
fn a_translated_flow_is_not_taken_for_a_direct_one_that_leaves() {
    let world = with_conntrack();
    let (client, server) = (&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    let service = Ipv4Addr::new(10, 96, 0, 10);
    let rule = format!("iptables -t nat -A PREROUTING -d {service} -p udp -j DNAT --to-destination {}", server.address);
    world.hosts[0].netns.exec(&rule).unwrap();
    assert_two_flows(client, [service, server.address], server);
    // The one has another address by then, the other another port.
    assert!(world.counter(0, "pod_translated") > 3000);
    assert_eq!(world.counter(0, "pod_encapsulated"), 0);
}

#[test]
fn a_translated_flow_is_not_taken_for_a_direct_one_that_arrives() {
    let mut world = with_conntrack();
    world.hosts[1].add_pod().unwrap();
    world.wait_pods(1);
    let (client, [first, second]) = (&world.hosts[0].pods[0], &world.hosts[1].pods[..]) else { panic!("two pods") };
    let rule = format!(
        "iptables -t nat -A PREROUTING -d {} -p udp -j DNAT --to-destination {}",
        first.address, second.address
    );
    world.hosts[1].netns.exec(&rule).unwrap();
    assert_two_flows(client, [first.address, second.address], second);
    assert!(world.counter(1, "delivered_translated") > 3000);
    assert_eq!(world.counter(1, "delivered"), 0);
}

#[test]
fn conntrack_keeps_a_bypassed_flow_past_its_timeout() {
    let world = with_conntrack();
    for host in &world.hosts {
        host.netns.exec("sysctl -qw net.netfilter.nf_conntrack_udp_timeout=3").unwrap();
        host.netns.exec("sysctl -qw net.netfilter.nf_conntrack_udp_timeout_stream=3").unwrap();
    }
    let stream = Stream::start(&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    wait_for("the stream to outlive the timeout", SOON, || stream.count() > 5000).unwrap();
    for host in &world.hosts {
        let listed = host.netns.exec(&format!("conntrack -L -p udp --dport {}", Stream::PORT)).unwrap();
        assert!(listed.contains(&world.hosts[1].pods[0].address.to_string()), "{listed}");
    }
    let (sent, received) = stream.end();
    assert_eq!(received.len(), sent as usize);
}

#[test]
fn conntrack_is_liberal_while_there_is_a_bypass() {
    const SETTINGS: [&str; 2] = ["nf_conntrack_tcp_be_liberal", "nf_conntrack_tcp_ignore_invalid_rst"];
    let mut world = with_conntrack();
    let values = |netns: &Netns| SETTINGS.map(|name| netns.exec(&format!("sysctl -n net.netfilter.{name}")).unwrap());
    wait_for("the settings", SOON, || values(&world.hosts[0].netns) == ["1\n"; 2]).unwrap();
    world.wait_status(0, "it to be shown", |status| status["bypass"]["conntrackLiberal"] == true);
    for name in SETTINGS {
        world.hosts[0].netns.exec(&format!("sysctl -qw net.netfilter.{name}=0")).unwrap();
        wait_for("the setting again", SOON, || values(&world.hosts[0].netns) == ["1\n"; 2]).unwrap();
    }
    world.hosts[0].agent = None;
    xtask::process::output(world.agent_on(0).arg("cleanup")).unwrap();
    assert_eq!(values(&world.hosts[0].netns), ["0\n"; 2]);
}

#[test]
fn without_the_bypass_everything_takes_the_stack() {
    let mut world = World::new(2);
    for host in 0..2 {
        world.start(host, &["--bypass=off"]);
    }
    for host in &mut world.hosts {
        host.wait_ready().unwrap();
        host.add_pod().unwrap();
    }
    world.wait_connected(0, 1);
    let (client, server) = (&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    tcp_transfer(&client.netns, &server.netns, server.address, 1, world.lab.directory()).unwrap();
    for host in 0..2 {
        assert_eq!((world.counter(host, "pod_encapsulated"), world.counter(host, "delivered")), (0, 0));
        // Every packet that from_pod left to the stack came out of it at to_overlay. How many these are depends on how much
        // the kernel aggregates.
        let encapsulated = world.counter(host, "encapsulated");
        let slow = world.counter(host, "pod_via_stack");
        assert!(slow > 10 && encapsulated >= slow, "host {host}: {slow} from pods, {encapsulated} encapsulated");
    }
}

#[test]
fn a_pod_that_takes_anothers_address_gets_its_packets() {
    let mut world = with_conntrack();
    world.hosts[1].add_pod().unwrap();
    world.wait_pods(1);
    let stream = Stream::start(&world.hosts[0].pods[0], &world.hosts[1].pods[1]);
    wait_for("the bypass", SOON, || world.counter(1, "delivered") > 500).unwrap();
    let before = world.hosts[1].pods[1].address;
    // The same address, another veth and namespace, another MAC.
    world.hosts[1].netns.ip("link delete pod2").unwrap();
    world.hosts[1].pods.pop();
    world.hosts[1].add_pod().unwrap();
    let successor = &world.hosts[1].pods[1];
    assert_eq!(successor.address, before);
    // The host has the old MAC for that address; a runtime announces the new one.
    let gateway = world.hosts[1].subnet().unwrap().gateway.to_string();
    wait_for("the gateway", SOON, || is_answered(&successor.netns, &gateway)).unwrap();
    let heard = socket_in(&successor.netns, SocketAddrV4::new(before, Stream::PORT));
    heard.set_read_timeout(Some(SOON)).unwrap();
    let begun = Instant::now();
    heard.recv(&mut [0; 4]).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    let delivered = world.counter(1, "delivered");
    wait_for("the bypass again", SOON, || world.counter(1, "delivered") > delivered + 500).unwrap();
    stream.end();
}

#[test]
fn pods_do_not_emit_tunnel_packets() {
    let world = with_conntrack();
    let pod = &world.hosts[0].pods[0];
    let socket = socket_in(&pod.netns, SocketAddrV4::new(pod.address, 0));
    for host in &world.hosts {
        socket.send_to(&[8, 0, 0, 0, 0, 0, 1, 0], (host.address, 8472)).unwrap();
    }
    wait_for("both to be counted", SOON, || world.counter(0, "pod_tunnel") == 2).unwrap();
    // Neither came to where tunnel packets are looked at.
    assert_eq!(world.counter(1, "unknown_vtep") + world.counter(1, "tunnel_truncated"), 0);
}

#[test]
fn packets_of_pods_that_take_the_stack() {
    let options: Ipv4Options = [7, 7, 4, 0, 0, 0, 0, 0].into();
    let from_pod = |packet: Vec<u8>| [ethernet(NODE_TWO_MAC, NODE_ONE_MAC, EtherType::IPV4), packet].concat();
    let to_port = |destination: [u8; 4], port: u16| {
        let mut packet = Vec::new();
        let builder = PacketBuilder::ipv4(POD_ONE, destination, 64).udp(40000, port);
        builder.write(&mut packet, PAYLOAD).unwrap();
        from_pod(packet)
    };
    let tunnel_with_options = {
        let packet = ipv4_with(POD_ONE, NODE_TWO, IpNumber::UDP, &[0x9c, 0x40, 0x21, 0x18, 0, 16, 0, 0], |ip| {
            ip.options = options.clone();
        });
        from_pod(packet)
    };
    let fragment = |offset: u16, more| {
        from_pod(udp_with(POD_ONE, POD_TWO, |ip| {
            ip.fragment_offset = IpFragOffset::try_new(offset).unwrap();
            ip.more_fragments = more;
        }))
    };
    with_programs(|programs| {
        for (what, frame, event) in [
            ("UDP to a peer's pod, the first", from_pod(udp(POD_ONE, POD_TWO)), Event::PodViaStack),
            ("TCP to a peer's pod, the first", from_pod(tcp(POD_ONE, POD_TWO)), Event::PodViaStack),
            ("ICMP", from_pod(icmp(POD_ONE, POD_TWO)), Event::PodOther),
            ("to a pod of this host", from_pod(udp(POD_ONE, [10, 5, 1, 3])), Event::PodOther),
            ("from an address that is none of this host's", from_pod(udp(POD_THREE, POD_TWO)), Event::PodOther),
            ("a first fragment", fragment(0, true), Event::PodOther),
            ("a later fragment", fragment(10, false), Event::PodOther),
            ("options", from_pod(udp_with(POD_ONE, POD_TWO, |ip| ip.options = options.clone())), Event::PodOther),
            ("ARP", [ethernet(NODE_TWO_MAC, [0xff; 6], EtherType::ARP), vec![0; 46]].concat(), Event::PodOther),
            ("the tunnel port of a peer", to_port(NODE_TWO, 8472), Event::PodTunnel),
            ("the tunnel port of this host", to_port(NODE_ONE, 8472), Event::PodTunnel),
            ("the tunnel port behind options", tunnel_with_options, Event::PodTunnel),
            ("another port of a peer", to_port(NODE_TWO, 8473), Event::PodViaStack),
            ("the tunnel port of no VTEP", to_port(STRANGER, 8472), Event::PodViaStack),
        ] {
            programs.expect_unchanged(Hook::FromPod, what, &frame, event);
        }
    });
}

/// Both directions, as CNI's plugin `bandwidth` limits them: a queue at the host's side of the veth, and one of an `ifb` that
/// all that the pod sends is led through.
#[test]
fn a_pod_whose_bandwidth_is_limited_stays_limited() {
    const QUEUE: &str = "root tbf rate 20mbit burst 64kb latency 100ms";
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    let host = &world.hosts[1].netns;
    let [one, two] = [0, 1].map(|host| &world.hosts[host].pods[0]);
    let assert_limited = |from: &Pod, to: &Pod| {
        let gbits =
            |seconds| tcp_transfer(&from.netns, &to.netns, to.address, seconds, world.lab.directory()).unwrap().gbits;
        // The agent is told of the queue.
        wait_for("the limit", SOON, || gbits(1) < 0.1).unwrap();
        let limited = gbits(3);
        assert!(limited > 0.005 && limited < 0.04, "{limited} Gb/s to {}", to.address);
    };
    host.exec(&format!("tc qdisc add dev pod1 {QUEUE}")).unwrap();
    assert_limited(one, two);
    host.exec("tc qdisc del dev pod1 root").unwrap();
    for line in [
        "ip link add ifb1 type ifb",
        "ip link set ifb1 up",
        &format!("tc qdisc add dev ifb1 {QUEUE}"),
        "tc qdisc add dev pod1 handle ffff: ingress",
        "tc filter add dev pod1 parent ffff: protocol all u32 match u32 0 0 action mirred egress redirect dev ifb1",
    ] {
        host.exec(line).unwrap();
    }
    assert_limited(two, one);
    // Others send no tunnel packets either.
    let socket = socket_in(&two.netns, SocketAddrV4::new(two.address, Stream::PORT));
    socket.send_to(b"x", (world.hosts[0].address, 8472)).unwrap();
    wait_for("the drop", SOON, || world.counter(1, "pod_tunnel") == 1).unwrap();
    host.exec("tc qdisc del dev pod1 ingress").unwrap();
    wait_for("the bypass", SOON, || {
        let before = world.counter(1, "pod_encapsulated");
        tcp_transfer(&two.netns, &one.netns, one.address, 1, world.lab.directory()).unwrap();
        world.counter(1, "pod_encapsulated") > before + 100
    })
    .unwrap();
}
