//! Packet tables of flows that the programs know: `from_pod` and `from_underlay` past the host's stack.

use std::time::Duration;

use etherparse::{EtherType, Ipv4Header};
use flannel_agent::dataplane::Hook;
use flannel_common::{
    event::Event,
    flow::{Egress, Flow, FlowKey, Ingress, dscp},
};
use nix::time::{ClockId, clock_gettime};

use crate::{
    frames::*,
    loaded::{Loaded, MTU, Run, counted, verdict, with_programs},
};

/// Of the pods of this host, as their frames have them.
pub const POD_MAC: Mac = [0x0a, 0x58, 0, 0, 0, 2];
pub const GATEWAY_MAC: Mac = [0x0a, 0x58, 0, 0, 0, 1];

/// The flow of a packet from or to a pod of this host, released in both directions so long ago.
pub fn flow_of(packet: &[u8], veth: u32, ago: Duration) -> Flow {
    let (ip, transport) = Ipv4Header::from_slice(packet).unwrap();
    let (source, destination) = (ports(transport, 0), ports(transport, 2));
    let protocol = u32::from(ip.protocol.0);
    let is_local = ip.source[..3] == POD_ONE[..3];
    let (local, remote, local_port, remote_port) = match is_local {
        true => (ip.source, ip.destination, source, destination),
        false => (ip.destination, ip.source, destination, source),
    };
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap());
    let released = (now - ago).as_nanos() as u64;
    let key = FlowKey { local, remote, local_port, remote_port, protocol };
    Flow {
        egress: Egress { released, sent_as: key, dscp: dscp(packet[1]), ..Egress::default() },
        ingress: Ingress { released, received_as: key, veth, pod_mac: POD_MAC, gateway_mac: GATEWAY_MAC },
        ..Flow::new(key)
    }
}

fn ports(transport: &[u8], offset: usize) -> [u8; 2] {
    [transport[offset], transport[offset + 1]]
}

/// A packet after one more router.
pub fn one_hop_on(packet: &[u8]) -> Vec<u8> {
    let (mut header, rest) = Ipv4Header::from_slice(packet).unwrap();
    header.time_to_live -= 1;
    header.header_checksum = header.calc_header_checksum();
    let mut packet = Vec::new();
    header.write_raw(&mut packet).unwrap();
    [&packet, rest].concat()
}

fn from_pod(packet: &[u8]) -> Vec<u8> {
    [&ethernet(POD_MAC, GATEWAY_MAC, EtherType::IPV4), packet].concat()
}

/// Long enough ago for the coarse clock that the programs read, and too long ago for them, also where ticks come late.
const A_MOMENT: Duration = Duration::from_millis(100);
const TOO_LONG: Duration = Duration::from_secs(2);

fn know(programs: &mut Loaded<'_>, packet: &[u8], ago: Duration) {
    let flow = flow_of(packet, programs.ifindex, ago);
    programs.dataplane.insert_flow(&flow).unwrap();
}

/// A packet of TCP with flags of one's own.
fn tcp_with(source: [u8; 4], destination: [u8; 4], set: impl FnOnce(&mut etherparse::TcpHeader)) -> Vec<u8> {
    let mut header = etherparse::TcpHeader::new(40000, 80, 1, 65535);
    header.ack = true;
    set(&mut header);
    let ip = Ipv4Header::new(52, 63, etherparse::IpNumber::TCP, source, destination).unwrap();
    header.checksum = header.calc_checksum_ipv4(&ip, PAYLOAD).unwrap();
    ipv4(source, destination, etherparse::IpNumber::TCP, &[&header.to_bytes()[..], PAYLOAD].concat())
}

#[test]
fn a_known_flow_leaves_in_the_tunnel() {
    let (udp, tcp) = (udp(POD_ONE, POD_TWO), tcp(POD_ONE, POD_TWO));
    let largest = ipv4(
        POD_ONE,
        POD_TWO,
        etherparse::IpNumber::UDP,
        &[&[0x9c, 0x40, 0, 53][..], &vec![0; MTU as usize - 24]].concat(),
    );
    let ecn = udp_with(POD_ONE, POD_TWO, |ip| ip.ecn = 3u8.try_into().unwrap());
    with_programs(|programs| {
        for (what, packet, ecn) in
            [("UDP", &udp, 0), ("TCP", &tcp, 0), ("as large as the MTU", &largest, 0), ("ECN", &ecn, 2)]
        {
            know(programs, packet, A_MOMENT);
            let frame = from_pod(packet);
            let run = programs.run(Hook::FromPod, &frame);
            let field = |offset: usize| u16::from_be_bytes([run.frame[offset], run.frame[offset + 1]]);
            let tunnel = Tunnel {
                source_mac: NODE_ONE_MAC,
                destination_mac: NODE_TWO_MAC,
                source: NODE_ONE,
                destination: NODE_TWO,
                source_port: field(34),
                id: field(18),
                ecn,
                ..FROM_TWO
            };
            let inner = [&ethernet(VTEP_ONE_MAC, VTEP_TWO_MAC, EtherType::IPV4)[..], &one_hop_on(packet)].concat();
            let event = Event::PodEncapsulated;
            let expected = Run {
                verdict: verdict(event),
                frame: tunnel.around(&vxlan(8, 1), &inner),
                counted: counted(event, &frame),
            };
            assert_eq!(run, expected, "{what}");
        }
    });
}

#[test]
fn what_a_known_flow_leaves_to_the_stack() {
    let too_big = ipv4(
        POD_ONE,
        POD_TWO,
        etherparse::IpNumber::UDP,
        &[&[0x9c, 0x40, 0, 53][..], &vec![0; MTU as usize - 23]].concat(),
    );
    let old = udp_with(POD_ONE, POD_TWO, |ip| ip.time_to_live = 1);
    let fragment = udp_with(POD_ONE, POD_TWO, |ip| ip.more_fragments = true);
    let to_nobody = udp(POD_ONE, [10, 5, 9, 9]);
    let whole = udp(POD_ONE, POD_TWO);
    with_programs(|programs| {
        for (what, packet, ago, event) in [
            ("larger than the MTU", &too_big, A_MOMENT, Event::PodViaStack),
            ("TTL 1", &old, A_MOMENT, Event::PodViaStack),
            ("a fragment", &fragment, A_MOMENT, Event::PodOther),
            ("to a subnet that nobody leases any more", &to_nobody, A_MOMENT, Event::PodViaStack),
            ("released too long ago", &whole, TOO_LONG, Event::PodViaStack),
        ] {
            know(programs, packet, ago);
            programs.expect_unchanged(Hook::FromPod, what, &from_pod(packet), event);
        }
    });
}

#[test]
fn what_begins_or_ends_a_connection_ends_the_bypass() {
    let data = tcp(POD_ONE, POD_TWO);
    with_programs(|programs| {
        type Change = fn(&mut etherparse::TcpHeader);
        let set: [(&str, Change); 3] =
            [("SYN", |tcp| tcp.syn = true), ("FIN", |tcp| tcp.fin = true), ("RST", |tcp| tcp.rst = true)];
        for (what, set) in set {
            know(programs, &data, A_MOMENT);
            let turn = from_pod(&tcp_with(POD_ONE, POD_TWO, set));
            programs.expect_unchanged(Hook::FromPod, what, &turn, Event::PodViaStack);
            programs.expect_unchanged(
                Hook::FromPod,
                &format!("data after {what}"),
                &from_pod(&data),
                Event::PodViaStack,
            );

            know(programs, &data, A_MOMENT);
            let inwards = tcp_with(POD_TWO, POD_ONE, |tcp| {
                set(tcp);
                (tcp.source_port, tcp.destination_port) = (80, 40000);
            });
            let turn = FROM_TWO.around(&vxlan(8, 1), &inner(&inwards));
            programs.expect_at_underlay(what, &turn, Event::HandedIn);
            programs.expect_unchanged(
                Hook::FromPod,
                &format!("data after {what} from there"),
                &from_pod(&data),
                Event::PodViaStack,
            );
        }
    });
}

#[test]
fn a_known_flow_is_put_into_the_pod() {
    with_programs(|programs| {
        for (what, packet) in [("UDP", udp(POD_TWO, POD_ONE)), ("TCP", tcp(POD_TWO, POD_ONE))] {
            know(programs, &packet, A_MOMENT);
            let frame = FROM_TWO.around(&vxlan(8, 1), &inner(&packet));
            let delivered = [&ethernet(GATEWAY_MAC, POD_MAC, EtherType::IPV4)[..], &one_hop_on(&packet)].concat();
            let event = Event::Delivered;
            let expected = Run { verdict: verdict(event), frame: delivered, counted: counted(event, &frame) };
            assert_eq!(programs.run(Hook::FromUnderlay, &frame), expected, "{what}");
        }
    });
}

#[test]
fn what_of_a_known_flow_takes_the_stack() {
    let packet = udp(POD_TWO, POD_ONE);
    let old = udp_with(POD_TWO, POD_ONE, |ip| ip.time_to_live = 1);
    let fragment = udp_with(POD_TWO, POD_ONE, |ip| ip.more_fragments = true);
    let in_tunnel = |tunnel: Tunnel, packet: &[u8]| tunnel.around(&vxlan(8, 1), &inner(packet));
    let marked = in_tunnel(Tunnel { ecn: 3, ..FROM_TWO }, &packet);
    let first = in_tunnel(Tunnel { more_fragments: true, ..FROM_TWO }, &packet);
    let forged = in_tunnel(Tunnel { source: STRANGER, ..FROM_TWO }, &packet);
    with_programs(|programs| {
        for (what, frame, ago, event) in [
            ("congestion on the way", marked, A_MOMENT, Event::Admitted),
            ("a fragment of a tunnel packet", first, A_MOMENT, Event::Admitted),
            ("TTL 1", in_tunnel(FROM_TWO, &old), A_MOMENT, Event::HandedIn),
            ("a fragment in the tunnel", in_tunnel(FROM_TWO, &fragment), A_MOMENT, Event::HandedIn),
            ("released too long ago", in_tunnel(FROM_TWO, &packet), TOO_LONG, Event::HandedIn),
            ("from a host that does not lease it", forged, A_MOMENT, Event::UnknownVtep),
        ] {
            know(programs, &packet, ago);
            programs.expect_at_underlay(what, &frame, event);
        }
    });
}
