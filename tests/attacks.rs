//! What attackers send, each with who refuses it: one table, through the programs at TC and XDP, and over real wires.
//!
//! `from_underlay` and `xdp_decap` decide by addresses and lengths (see [`admission`](crate::admission) for all addresses).
//! What is wrong in another way, and would be so without an overlay, is left to the kernel behind them: to the host's stack
//! for what is outside, and to the pod's for what is inside. The table says which, and by which of their counters.

use std::collections::BTreeMap;

use etherparse::{EtherType, IpNumber, Ipv4Options, UdpHeader};
use flannel_agent::dataplane::{Hook, TestRun as _, TestRunOptions, XdpMode};
use flannel_common::{
    event::{Event, Outcome},
    flow::FlowKey,
};
use xtask::{lab::Netns, progress::wait_for};

use crate::{
    frames::*,
    loaded::with_programs,
    short_frames::send,
    world::{SOON, World},
    xdp::Capture,
};

/// Who is attacked, and as whom.
struct Scene {
    host: [u8; 4],
    host_mac: Mac,
    vtep_mac: Mac,
    /// In the /24 that the host leases.
    pod: [u8; 4],
    /// A host that may send to it.
    peer: [u8; 4],
    peer_vtep_mac: Mac,
    peer_pod: [u8; 4],
    /// A pod of a third host.
    third_pod: [u8; 4],
    /// A host without a lease.
    stranger: [u8; 4],
}

const SCENE: Scene = Scene {
    host: NODE_ONE,
    host_mac: NODE_ONE_MAC,
    vtep_mac: VTEP_ONE_MAC,
    pod: POD_ONE,
    peer: NODE_TWO,
    peer_vtep_mac: VTEP_TWO_MAC,
    peer_pod: POD_TWO,
    third_pod: POD_THREE,
    stranger: STRANGER,
};

/// Who refuses an attack.
#[derive(Clone, Copy, Debug)]
enum By {
    /// `from_underlay`, or `xdp_decap` before it.
    Admission,
    /// `from_overlay`, which finds no note of `from_underlay`'s on it.
    FromOverlay,
    /// The kernel's vxlan device.
    Device,
    /// The host's stack, with this counter of `nstat`'s.
    Host(&'static str),
    /// The same, where XDP has not taken the packet out of the tunnel. Outer checksums and the outer UDP length are not looked
    /// at then, nor for flows past the stack; what is inside has lengths and checksums of its own.
    HostWithoutXdp(&'static str),
    /// The pod's stack, with this counter.
    Pod(&'static str),
    /// The host's stack waits for the rest of it, for a time.
    Reassembly,
}

struct Attack {
    name: String,
    /// What the programs at the underlay say to each.
    frames: Vec<(Vec<u8>, Event)>,
    by: By,
}

/// All that is sent to a host's external interface.
fn attacks(scene: &Scene) -> Vec<Attack> {
    let Scene { host, pod, peer, peer_pod, third_pod, stranger, .. } = *scene;
    let overlay = |address: [u8; 4]| [address[0], address[1], address[2], 0];
    let broadcast = [pod[0], pod[1], pod[2], 255];
    let good = || udp(peer_pod, pod);
    let mut attacks = Vec::new();
    let mut add = |name: &str, by: By, frames: Vec<(Vec<u8>, Event)>| {
        attacks.push(Attack { name: name.to_owned(), frames, by });
    };
    let one = |frame: Vec<u8>, event| vec![(frame, event)];

    for (name, source) in [("a stranger", stranger), ("the host itself", host), ("an address of the overlay", peer_pod)]
    {
        let frame = scene.tunnel_from(source, &scene.inner(&good()));
        add(&format!("outer source: {name}"), By::Admission, one(frame, Event::UnknownVtep));
    }
    for (name, source, event) in [
        ("another VTEP's pod", third_pod, Event::SpoofedInnerSource),
        ("another VTEP", overlay(third_pod), Event::SpoofedInnerSource),
        ("the host's own overlay address", overlay(pod), Event::SpoofedInnerSource),
        ("a local pod", pod, Event::SpoofedInnerSource),
        ("the host's underlay address", host, Event::SpoofedInnerSource),
        ("loopback", [127, 0, 0, 1], Event::InnerNotUnicast),
    ] {
        add(&format!("inner source: {name}"), By::Admission, one(scene.tunnel(&udp(source, pod)), event));
    }
    for (name, destination, event) in [
        ("the host's underlay address", host, Event::ForeignInnerDestination),
        ("another host's", peer, Event::ForeignInnerDestination),
        ("loopback", [127, 0, 0, 1], Event::InnerNotUnicast),
        ("link-local", [169, 254, 169, 254], Event::InnerNotUnicast),
        ("multicast", [224, 0, 0, 1], Event::InnerNotUnicast),
        ("broadcast", [255; 4], Event::InnerNotUnicast),
        ("the subnet's broadcast", broadcast, Event::InnerNotUnicast),
        ("this network", [0; 4], Event::InnerNotUnicast),
    ] {
        add(
            &format!("inner destination: {name}"),
            By::Admission,
            one(scene.tunnel(&udp(peer_pod, destination)), event),
        );
    }

    let forged = scene.inner(&udp(third_pod, pod));
    let nested = |to: [u8; 4], port: u16| datagram(peer_pod, to, port, 8472, &[vxlan(8, 1), forged.clone()].concat());
    add(
        "a tunnel within: to the host",
        By::Admission,
        one(scene.tunnel(&nested(host, 9)), Event::ForeignInnerDestination),
    );
    add(
        "a tunnel within: to the overlay address",
        By::FromOverlay,
        one(scene.tunnel(&nested(overlay(pod), 9)), Event::HandedIn),
    );
    let (source, port) = scene.collision(overlay(pod), third_pod);
    let collides = datagram(source, overlay(pod), port, 8472, &[vxlan(8, 1), forged.clone()].concat());
    add(
        "a tunnel within: to the overlay address, and with the tag of what is in it",
        By::FromOverlay,
        one(scene.tunnel(&collides), Event::HandedIn),
    );

    for (name, header) in [
        ("a flag", [0x88, 0, 0, 0, 0, 0, 1, 0]),
        ("behind the flags", [8, 0, 0x40, 0, 0, 0, 1, 0]),
        ("behind the VNI", [8, 0, 0, 0, 0, 0, 1, 0x80]),
    ] {
        let frame = scene.outer(peer).around(&header, &scene.inner(&good()));
        add(&format!("reserved bits: {name}"), By::Device, one(frame, Event::Admitted));
    }

    // Offsets: 16 outer total length, 38 UDP length, 40 UDP checksum, 24 outer IPv4 checksum, 66 inner total length.
    let whole = scene.tunnel(&good());
    let with = |changes: &[(usize, u16)]| {
        let mut frame = whole.clone();
        for (at, value) in changes {
            frame[*at..*at + 2].copy_from_slice(&value.to_be_bytes());
        }
        frame
    };
    let outer_len = |len| {
        let mut frame = with(&[(16, len)]);
        flannel_common::model::put_sum(&mut frame, 14);
        frame
    };
    let inner_len = |len| {
        let mut frame = with(&[(66, len)]);
        flannel_common::model::put_sum(&mut frame, 64);
        frame
    };
    let len = (whole.len() - 14) as u16;
    for (name, frame) in [
        ("outer, more than there is", outer_len(len + 1)),
        ("outer, less than is inside", outer_len(len - 1)),
        ("outer, less than the headers", outer_len(40)),
        ("outer, zero", outer_len(0)),
        ("inner, more than there is", inner_len(len - 50 + 1)),
        ("inner, all that can be", inner_len(0xffff)),
        ("all, cut off in the inner header", whole[..70].to_vec()),
        ("all, cut off behind the VXLAN header", whole[..50].to_vec()),
    ] {
        add(&format!("length: {name}"), By::Admission, one(frame, Event::TunnelTruncated));
    }
    for (name, frame, by, event) in [
        ("UDP, more than there is", with(&[(38, len)]), By::HostWithoutXdp("UdpInErrors"), Event::Admitted),
        ("UDP, less than its header", with(&[(38, 7)]), By::HostWithoutXdp("UdpInErrors"), Event::Admitted),
        ("inner, less than its header", inner_len(19), By::Host("IpInHdrErrors"), Event::HandedIn),
    ] {
        add(&format!("length: {name}"), by, one(frame, event));
    }

    for (name, frame, by, event) in [
        ("outer IPv4", with(&[(24, 0xdead)]), By::HostWithoutXdp("IpExtInCsumErrors"), Event::Admitted),
        ("outer IPv4, zero", with(&[(24, 0)]), By::HostWithoutXdp("IpExtInCsumErrors"), Event::Admitted),
        ("outer UDP", with(&[(40, 0xdead)]), By::HostWithoutXdp("UdpInCsumErrors"), Event::Admitted),
        ("inner IPv4", with(&[(74, 0xdead)]), By::Host("IpExtInCsumErrors"), Event::HandedIn),
    ] {
        add(&format!("checksum: {name}"), by, one(frame, event));
    }

    let fragments = |cuts: &[std::ops::Range<usize>]| -> Vec<Vec<u8>> {
        // Of what is behind the outer IPv4 header, in units of eight bytes.
        let payload = &whole[34..];
        let units = payload.len().div_ceil(8);
        let cut = |range: &std::ops::Range<usize>| {
            let bytes = &payload[range.start * 8..(range.end * 8).min(payload.len())];
            let packet = ipv4_with(peer, host, IpNumber::UDP, bytes, |ip| {
                ip.identification = 0x6666;
                ip.dont_fragment = false;
                ip.more_fragments = range.end < units;
                ip.fragment_offset = (range.start as u16).try_into().unwrap();
            });
            [ethernet(NODE_TWO_MAC, scene.host_mac, EtherType::IPV4), packet].concat()
        };
        cuts.iter().map(cut).collect()
    };
    let events = |frames: Vec<Vec<u8>>, events: &[Event]| frames.into_iter().zip(events.iter().copied()).collect();
    let units = (whole.len() - 34).div_ceil(8);
    add(
        "fragments: a tiny first",
        By::Admission,
        events(fragments(&[0..1, 1..units]), &[Event::TunnelTruncated, Event::UnderlayFragment]),
    );
    add(
        "fragments: one that ends in the inner header",
        By::Admission,
        events(fragments(&[0..5, 5..units]), &[Event::TunnelTruncated, Event::UnderlayFragment]),
    );
    add(
        "fragments: a later one alone",
        By::Reassembly,
        events(fragments(std::slice::from_ref(&(2..units))), &[Event::UnderlayFragment]),
    );
    add(
        "fragments: overlapping",
        By::Host("IpReasmFails"),
        events(fragments(&[0..8, 5..units]), &[Event::Admitted, Event::UnderlayFragment]),
    );

    let neighbour_solicitation =
        [&[0x60, 0, 0, 0, 0, 24, 58, 255][..], &[0xfe; 32], &[135, 0, 0, 0], &[0; 20]].concat();
    for (name, kind, packet) in [
        ("ARP", EtherType::ARP, vec![0; 46]),
        ("neighbour discovery", EtherType::IPV6, neighbour_solicitation),
        ("a VLAN", EtherType(0x8100), [&[0, 1, 8, 0][..], &good()].concat()),
    ] {
        let inner = [ethernet(scene.peer_vtep_mac, scene.vtep_mac, kind), packet].concat();
        add(&format!("inside: {name}"), By::Admission, one(scene.tunnel_from(peer, &inner), Event::InnerNotIpv4));
    }
    let datagram = whole[34..].to_vec();
    let options: Ipv4Options = [7, 7, 4, 0, 0, 0, 0, 0].into();
    let packet = ipv4_with(peer, host, IpNumber::UDP, &datagram, |ip| ip.options = options);
    let frame = [ethernet(NODE_TWO_MAC, scene.host_mac, EtherType::IPV4), packet].concat();
    let inner_udp = with(&[(90, 0xdead)]);
    add("outside: IP options", By::Admission, one(frame, Event::OuterOptions));
    add("checksum: inner UDP", By::Pod("UdpInCsumErrors"), one(inner_udp, Event::HandedIn));
    attacks
}

/// All that a pod sends which only hosts may send.
fn from_pods(scene: &Scene) -> Vec<(&'static str, Vec<u8>, Event)> {
    let Scene { host, pod, peer, .. } = *scene;
    let content = [vxlan(8, 1), scene.inner(&udp([8, 8, 8, 8], [1, 1, 1, 1]))].concat();
    let to = |destination, change: &dyn Fn(&mut etherparse::Ipv4Header)| {
        let udp = UdpHeader { source_port: 9, destination_port: 8472, length: 8 + content.len() as u16, checksum: 0 };
        let datagram = [&udp.to_bytes()[..], &content].concat();
        [&[0; 12][..], &[8, 0], &ipv4_with(pod, destination, IpNumber::UDP, &datagram, change)].concat()
    };
    let options: Ipv4Options = [7, 7, 4, 0, 0, 0, 0, 0].into();
    vec![
        ("to a peer", to(peer, &|_| {}), Event::PodTunnel),
        ("to its host", to(host, &|_| {}), Event::PodTunnel),
        ("with options", to(peer, &|ip| ip.options = options.clone()), Event::PodTunnel),
        ("its first fragment", to(peer, &|ip| ip.more_fragments = true), Event::PodTunnel),
        ("what may be payload", to(peer, &|ip| ip.fragment_offset = 3u16.try_into().unwrap()), Event::PodOther),
    ]
}

fn datagram(source: [u8; 4], destination: [u8; 4], from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    etherparse::PacketBuilder::ipv4(source, destination, 63).udp(from, to).write(&mut packet, payload).unwrap();
    packet
}

impl Scene {
    fn inner(&self, packet: &[u8]) -> Vec<u8> {
        [&ethernet(self.peer_vtep_mac, self.vtep_mac, EtherType::IPV4), packet].concat()
    }

    fn outer(&self, source: [u8; 4]) -> Tunnel {
        Tunnel { source, destination: self.host, destination_mac: self.host_mac, ..FROM_TWO }
    }

    fn tunnel_from(&self, source: [u8; 4], inner: &[u8]) -> Vec<u8> {
        self.outer(source).around(&vxlan(8, 1), inner)
    }

    fn tunnel(&self, packet: &[u8]) -> Vec<u8> {
        self.tunnel_from(self.peer, &self.inner(packet))
    }

    /// A pod of the peer's and a source port with which the tunnel packet within has the same tag as what is in it. Not every
    /// pod has such a port.
    fn collision(&self, local: [u8; 4], forged: [u8; 4]) -> ([u8; 4], u16) {
        let key = |local, remote, local_port: u16, remote_port: u16| {
            let (local_port, remote_port) = (local_port.to_be_bytes(), remote_port.to_be_bytes());
            FlowKey { local, remote, local_port, remote_port, protocol: 17 }.tag(1)
        };
        let tag = key(self.pod, forged, 53, 40000);
        let [a, b, c, _] = self.peer_pod;
        let sources = (2..255).map(|host| [a, b, c, host]);
        let mut all = sources.flat_map(|source| (1..u16::MAX).map(move |port| (source, port)));
        all.find(|(source, port)| key(local, *source, 8472, *port) == tag).unwrap()
    }
}

#[test]
fn are_refused_by_each_program_with_the_reason() {
    with_programs(|programs| {
        for Attack { name, frames, .. } in &attacks(&SCENE) {
            for (frame, event) in frames {
                programs.expect_at_underlay(name, frame, *event);
                for mode in [XdpMode::Native, XdpMode::Generic] {
                    let options = TestRunOptions { data_in: Some(frame), ..TestRunOptions::new() };
                    let program = programs.dataplane.xdp_program(mode).unwrap();
                    let verdict = program.test_run(options).unwrap().return_value;
                    let is_dropped = event.outcome() == Outcome::Drop;
                    assert_eq!(verdict, if is_dropped { 1 } else { 2 }, "{name}, XDP {}", mode.label());
                }
            }
        }
        for (name, frame, event) in from_pods(&SCENE) {
            programs.expect_unchanged(Hook::FromPod, name, &frame, event);
        }
    });
}

#[test]
fn get_nowhere_over_the_wire() {
    for mode in ["--xdp=off", "--xdp=native"] {
        let is_xdp = mode != "--xdp=off";
        let world = World::new(3).ready(&[mode]);
        world.wait_connected(0, 1);
        let scene = scene_of(&world);
        let victim = &world.hosts[0];
        let in_pod = Capture::on(&victim.pods[0].netns, "eth0");
        // What the tests before it sent.
        marked(&world, &scene, &in_pod, "nothing", &[]);
        let (mut may_arrive, mut have_arrived) = (0, 0);
        for Attack { name, frames, by } in &attacks(&scene) {
            let what = format!("{name}, {mode}");
            let nstat = match by {
                // With XDP some of these come to the pod, whose stack refuses what is wrong inside.
                By::Host(counter) | By::HostWithoutXdp(counter) if !is_xdp => Some((&victim.netns, *counter)),
                By::Pod(counter) => Some((&victim.pods[0].netns, *counter)),
                _ => None,
            };
            let before = (counters(&world), nstat.map(|(netns, counter)| count(netns, counter)));
            let sent: Vec<_> = frames.iter().map(|(frame, _)| frame.clone()).collect();
            // Twice, since GRO may hold a packet back behind the first mark.
            let rounds = [&sent[..], &[]].map(|frames| marked(&world, &scene, &in_pod, &what, frames));
            let arrived = rounds.concat();
            // Some are late, when the machine is busy; but never do more come than are the pod's to refuse.
            let is_for_pod = matches!(by, By::Pod(_)) || is_xdp && matches!(by, By::Host(_) | By::HostWithoutXdp(_));
            may_arrive += if is_for_pod { frames.len() } else { 0 };
            have_arrived += arrived.len();
            assert!(have_arrived <= may_arrive, "{what}: {arrived:x?}");

            let labels = frames
                .iter()
                .map(|(_, event)| event.label())
                .filter(|label| !["admitted", "handed_in"].contains(label));
            let of_overlay = matches!(by, By::FromOverlay).then_some("not_admitted");
            for label in labels.chain(of_overlay) {
                // What came by another CPU than the marks may be behind them.
                let counted = || counters(&world)[label] - before.0[label];
                wait_for(&format!("{what}: {label}"), SOON, || counted() > 0).unwrap();
                assert_eq!(counted(), 1, "{what}: {label}");
            }
            if let (Some((netns, counter)), Some(before)) = (nstat, before.1) {
                wait_for(&format!("{what}: {counter}"), SOON, || count(netns, counter) > before).unwrap();
            }
        }
        let pod = &world.hosts[0].pods[0].netns;
        let before = world.counter(0, "pod_tunnel");
        let refused: Vec<_> = from_pods(&scene)
            .into_iter()
            .filter(|(.., event)| *event == Event::PodTunnel)
            .map(|(_, frame, _)| frame)
            .collect();
        send_all(pod, "eth0", &refused);
        wait_for("the pod's tunnel packets", SOON, || world.counter(0, "pod_tunnel") == before + refused.len() as u64)
            .unwrap();
        world.wait_connected(0, 1);
    }
}

/// The first host and its pod are attacked, in the second's name.
fn scene_of(world: &World) -> Scene {
    let [victim, peer, third] = &world.hosts[..] else { panic!("three hosts") };
    Scene {
        host: victim.address.octets(),
        host_mac: mac_of(&victim.netns, "eth0"),
        vtep_mac: mac_of(&victim.netns, "flannel.1"),
        pod: victim.pods[0].address.octets(),
        peer: peer.address.octets(),
        peer_vtep_mac: mac_of(&peer.netns, "flannel.1"),
        peer_pod: peer.pods[0].address.octets(),
        third_pod: third.pods[0].address.octets(),
        stranger: STRANGER,
    }
}

fn mac_of(netns: &Netns, device: &str) -> Mac {
    let links = netns.ip_json(&format!("link show {device}")).unwrap();
    let octets: Vec<_> =
        links[0]["address"].as_str().unwrap().split(':').map(|octet| u8::from_str_radix(octet, 16).unwrap()).collect();
    octets.try_into().unwrap()
}

/// Sends frames over the first host's cable, and a good one after them; what came to the pod before that. (Not from another
/// host: the bridge between them drops some of these itself, where its netfilter is on.)
fn marked(world: &World, scene: &Scene, in_pod: &Capture, what: &str, frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
    const MARK: &[u8] = b"the last one of them";
    // Of a protocol that never bypasses the stack, so that it does not overtake those before it.
    let mark = scene.tunnel(&ipv4(scene.peer_pod, scene.pod, IpNumber(253), MARK));
    send_all(&world.lab.underlay, "node1", &[frames, &[mark]].concat());
    // The host's bridge asks for multicast groups now and then.
    let is_unicast = |frame: &Vec<u8>| frame[0] & 1 == 0;
    in_pod.until(what, MARK).into_iter().filter(is_unicast).collect()
}

fn send_all(netns: &Netns, device: &str, frames: &[Vec<u8>]) {
    send(netns, device, &frames.iter().map(Vec::as_slice).collect::<Vec<_>>());
}

fn counters(world: &World) -> BTreeMap<String, u64> {
    let text = xtask::process::output(world.agent_on(0).arg("counters")).unwrap();
    let row = |line: &str| {
        let mut words = line.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
    };
    text.lines().filter_map(row).collect()
}

/// A counter of the kernel's.
pub fn count(netns: &Netns, counter: &str) -> u64 {
    let text = netns.exec(&format!("nstat -asz {counter}")).unwrap();
    let line = text.lines().find(|line| line.starts_with(counter)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
