//! Packet tables of `to_overlay`.

use std::collections::HashSet;

use etherparse::{EtherType, IpFragOffset, IpNumber, Ipv4Options};
use flannel_agent::dataplane::Hook;
use flannel_common::event::Event;

use crate::{
    frames::*,
    loaded::{Loaded, MTU, Run, SOURCE_PORTS, counted, verdict, with_programs},
};

/// Runs an IPv4 packet through `to_overlay` and compares the whole frame that comes out with one built here, in which
/// only identification and source port are taken from it.
fn expect_encapsulated(programs: &mut Loaded, what: &str, packet: &[u8], expected: Expected) -> Run {
    let frame = on_overlay(packet);
    let run = programs.run(Hook::ToOverlay, &frame);
    let field = |offset: usize| u16::from_be_bytes([run.frame[offset], run.frame[offset + 1]]);
    let (id, source_port) = (field(18), field(34));
    let Expected { next_hop_mac, vtep, vtep_mac, ecn, event } = expected;
    let tunnel = Tunnel {
        source_mac: NODE_ONE_MAC,
        destination_mac: next_hop_mac,
        source: NODE_ONE,
        destination: vtep,
        source_port,
        id,
        ecn,
        ..FROM_TWO
    };
    let inner = [&ethernet(VTEP_ONE_MAC, vtep_mac, EtherType::IPV4), packet].concat();
    let expected =
        Run { verdict: verdict(event), frame: tunnel.around(&vxlan(8, 1), &inner), counted: counted(event, &frame) };
    assert_eq!(run, expected, "{what}");
    assert!((SOURCE_PORTS.min..SOURCE_PORTS.max).contains(&source_port), "{what}: source port {source_port}");
    run
}

struct Expected {
    next_hop_mac: Mac,
    vtep: [u8; 4],
    vtep_mac: Mac,
    ecn: u8,
    event: Event,
}

const TO_TWO: Expected =
    Expected { next_hop_mac: NODE_TWO_MAC, vtep: NODE_TWO, vtep_mac: VTEP_TWO_MAC, ecn: 0, event: Event::Encapsulated };

#[test]
fn every_kind_of_ipv4_packet_is_encapsulated_whole() {
    let options: Ipv4Options = [7, 7, 4, 0, 0, 0, 0, 0].into();
    let table = [
        ("UDP", udp(POD_ONE, POD_TWO)),
        ("TCP", tcp(POD_ONE, POD_TWO)),
        ("ICMP", icmp(POD_ONE, POD_TWO)),
        ("no payload", ipv4(POD_ONE, POD_TWO, IpNumber::UDP, &[])),
        ("TTL 1", udp_with(POD_ONE, POD_TWO, |ip| ip.time_to_live = 1)),
        ("DSCP, which stays inside", udp_with(POD_ONE, POD_TWO, |ip| ip.dscp = 46.try_into().unwrap())),
        ("don't fragment", udp_with(POD_ONE, POD_TWO, |ip| ip.dont_fragment = true)),
        ("IP options", udp_with(POD_ONE, POD_TWO, |ip| ip.options = options.clone())),
        ("first fragment", udp_with(POD_ONE, POD_TWO, |ip| ip.more_fragments = true)),
        ("later fragment", udp_with(POD_ONE, POD_TWO, |ip| ip.fragment_offset = IpFragOffset::try_new(185).unwrap())),
        ("as large as the MTU", ipv4(POD_ONE, POD_TWO, IpNumber::UDP, &vec![7; MTU as usize - 20])),
        ("from this host's overlay address", udp([10, 5, 1, 0], POD_TWO)),
        ("to a lease longer than the grid's", udp(POD_ONE, [10, 5, 4, 129])),
        ("to a lease outside the Network", udp(POD_ONE, [172, 30, 9, 9])),
    ];
    with_programs(|programs| {
        for (what, packet) in &table {
            expect_encapsulated(programs, what, packet, TO_TWO);
        }
    });
}

#[test]
fn congestion_marks_are_copied_as_rfc_6040_says() {
    with_programs(|programs| {
        for (inner, outer) in [(0, 0), (1, 1), (2, 2), (3, 2)] {
            let packet = udp_with(POD_ONE, POD_TWO, |ip| ip.ecn = u8::try_into(inner).unwrap());
            expect_encapsulated(programs, &format!("ECN {inner}"), &packet, Expected { ecn: outer, ..TO_TWO });
        }
    });
}

#[test]
fn a_peer_without_a_known_mac_is_left_to_the_kernels_neighbours() {
    with_programs(|programs| {
        let expected = Expected {
            next_hop_mac: Mac::default(),
            vtep: NODE_THREE,
            vtep_mac: VTEP_THREE_MAC,
            ecn: 0,
            event: Event::EncapsulatedNeighbour,
        };
        expect_encapsulated(programs, "unresolved", &udp(POD_ONE, POD_THREE), expected);
    });
}

#[test]
fn a_flow_keeps_its_source_port_and_flows_differ() {
    with_programs(|programs| {
        let mut port = |source: [u8; 4]| {
            let run = expect_encapsulated(programs, "flow", &udp(source, POD_TWO), TO_TWO);
            [run.frame[34], run.frame[35]]
        };
        let ports: HashSet<_> = (2..34).map(|pod| port([10, 5, 1, pod])).collect();
        // 32 of 28,231 ports: two or more collisions are a 1-in-2,000 event.
        assert!(ports.len() >= 31, "{} ports for 32 flows", ports.len());
        assert_eq!(port(POD_ONE), port(POD_ONE));
    });
}

#[test]
fn what_is_not_handled_is_handed_on_unmodified() {
    let table = [
        ("a subnet that nobody leases", on_overlay(&udp(POD_ONE, [10, 5, 9, 1])), Event::EncapHandedOn),
        ("this host's own subnet", on_overlay(&udp(POD_ONE, [10, 5, 1, 9])), Event::EncapHandedOn),
        ("beside a lease longer than the grid's", on_overlay(&udp(POD_ONE, [10, 5, 4, 127])), Event::EncapHandedOn),
        ("outside the Network", on_overlay(&udp(POD_ONE, [10, 6, 2, 2])), Event::EncapHandedOn),
        ("below the Network", on_overlay(&udp(POD_ONE, [10, 4, 255, 255])), Event::EncapHandedOn),
        (
            "larger than the MTU",
            on_overlay(&ipv4(POD_ONE, POD_TWO, IpNumber::UDP, &vec![7; MTU as usize - 19])),
            Event::EncapHandedOn,
        ),
        (
            "to another next hop, as somebody else's route leads it",
            [ethernet(VTEP_ONE_MAC, VTEP_TWO_MAC, EtherType::IPV4), udp(POD_ONE, POD_TWO)].concat(),
            Event::EncapOtherNextHop,
        ),
        ("ARP", [ethernet(VTEP_ONE_MAC, [0xff; 6], EtherType::ARP), vec![0; 46]].concat(), Event::EncapNotIpv4),
        ("IPv6", [ethernet(VTEP_ONE_MAC, NEXT_HOP_MAC, EtherType::IPV6), vec![0x60; 60]].concat(), Event::EncapNotIpv4),
    ];
    with_programs(|programs| {
        for (what, frame, event) in &table {
            programs.expect_unchanged(Hook::ToOverlay, what, frame, *event);
        }
    });
}

#[test]
fn a_packet_that_the_kernel_makes_no_room_in_is_handed_on_unmodified() {
    with_programs(|programs| {
        // To be segmented, but neither TCP nor UDP to the kernel: only a test can make such a packet.
        let frame = on_overlay(&ipv4(POD_ONE, POD_TWO, IpNumber::UDP, &[7; 3000]));
        let run = programs.run_gso(Hook::ToOverlay, &frame, 1000);
        let event = Event::EncapHandedOn;
        assert_eq!(run, Run { verdict: verdict(event), frame: frame.clone(), counted: counted(event, &frame) });
    });
}
