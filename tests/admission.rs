//! Packet tables of `from_underlay`.

use etherparse::{EtherType, IpNumber, Ipv4Options};
use flannel_agent::dataplane::Hook;
use flannel_common::event::Event;

use crate::{frames::*, loaded::with_programs};

const I_FLAG: u8 = 0x08;

fn from_two(packet: &[u8]) -> Vec<u8> {
    FROM_TWO.around(&vxlan(I_FLAG, 1), &inner(packet))
}

fn with_tunnel(change: impl FnOnce(&mut Tunnel)) -> Vec<u8> {
    let mut tunnel = FROM_TWO;
    change(&mut tunnel);
    tunnel.around(&vxlan(I_FLAG, 1), &inner(&udp(POD_TWO, POD_ONE)))
}

/// What a frame is, the frame, and what becomes of it.
pub type Table = Vec<(&'static str, Vec<u8>, Event)>;

fn expect(table: Table) {
    with_programs(|programs| {
        for (what, frame, event) in &table {
            programs.expect_unchanged(Hook::FromUnderlay, what, frame, *event);
        }
    });
}

#[test]
fn peers_are_admitted_with_what_they_lease() {
    expect(admitted());
}

pub fn admitted() -> Table {
    let options: Ipv4Options = [7, 7, 4, 0, 0, 0, 0, 0].into();
    vec![
        ("UDP", from_two(&udp(POD_TWO, POD_ONE)), Event::Admitted),
        ("TCP", from_two(&tcp(POD_TWO, POD_ONE)), Event::Admitted),
        ("ICMP", from_two(&icmp(POD_TWO, POD_ONE)), Event::Admitted),
        ("from its overlay address to ours", from_two(&icmp([10, 5, 2, 0], [10, 5, 1, 0])), Event::Admitted),
        ("from its lease outside the Network", from_two(&udp([172, 30, 1, 1], POD_ONE)), Event::Admitted),
        ("from its lease longer than the grid's", from_two(&udp([10, 5, 4, 200], POD_ONE)), Event::Admitted),
        (
            "with IP options inside",
            from_two(&udp_with(POD_TWO, POD_ONE, |ip| ip.options = options.clone())),
            Event::Admitted,
        ),
        ("an inner fragment", from_two(&udp_with(POD_TWO, POD_ONE, |ip| ip.more_fragments = true)), Event::Admitted),
        (
            "reserved bits set, which RFC 7348 says to ignore",
            FROM_TWO.around(&[0xff, 1, 2, 3, 0, 0, 1, 9], &inner(&udp(POD_TWO, POD_ONE))),
            Event::Admitted,
        ),
        ("the first fragment of a tunnel packet", with_tunnel(|tunnel| tunnel.more_fragments = true), Event::Admitted),
    ]
}

#[test]
fn what_is_not_ours_passes() {
    expect(not_ours());
}

pub fn not_ours() -> Table {
    let dns = [ethernet(NODE_TWO_MAC, NODE_ONE_MAC, EtherType::IPV4), udp(NODE_TWO, NODE_ONE)].concat();
    let ssh = [ethernet(NODE_TWO_MAC, NODE_ONE_MAC, EtherType::IPV4), tcp(NODE_TWO, NODE_ONE)].concat();
    let packet = inner(&udp(POD_TWO, POD_ONE));
    vec![
        ("UDP to another port", dns, Event::NotTunnel),
        ("TCP", ssh, Event::NotTunnel),
        ("ARP", [ethernet(NODE_TWO_MAC, [0xff; 6], EtherType::ARP), vec![0; 46]].concat(), Event::NotTunnel),
        ("IPv6", [ethernet(NODE_TWO_MAC, NODE_ONE_MAC, EtherType::IPV6), vec![0x60; 60]].concat(), Event::NotTunnel),
        ("to another host's address", with_tunnel(|tunnel| tunnel.destination = NODE_THREE), Event::NotTunnel),
        ("to another host's MAC", with_tunnel(|tunnel| tunnel.destination_mac = NODE_TWO_MAC), Event::NotTunnel),
        ("IANA's port", with_tunnel(|tunnel| tunnel.port = 4789), Event::NotTunnel),
        ("a later fragment", with_tunnel(|tunnel| tunnel.fragment_offset = 185), Event::UnderlayFragment),
        ("another VNI", FROM_TWO.around(&vxlan(I_FLAG, 2), &packet), Event::ForeignVni),
        ("another VNI in the high byte", FROM_TWO.around(&vxlan(I_FLAG, 0x01_0001), &packet), Event::ForeignVni),
        ("no valid VNI", FROM_TWO.around(&vxlan(0, 1), &packet), Event::ForeignVni),
        (
            "another VNI from a stranger",
            Tunnel { source: STRANGER, ..FROM_TWO }.around(&vxlan(I_FLAG, 2), &packet),
            Event::ForeignVni,
        ),
    ]
}

#[test]
fn forged_packets_are_dropped_with_the_reason() {
    expect(forged());
}

pub fn forged() -> Table {
    let spoofed = |source| from_two(&udp(source, POD_ONE));
    let misdirected = |destination| from_two(&udp(POD_TWO, destination));
    let to_mac = |destination| {
        let frame = [ethernet(VTEP_TWO_MAC, destination, EtherType::IPV4), udp(POD_TWO, POD_ONE)].concat();
        FROM_TWO.around(&vxlan(I_FLAG, 1), &frame)
    };
    let of_type = |ether_type, packet: &[u8]| {
        FROM_TWO.around(&vxlan(I_FLAG, 1), &[&ethernet(VTEP_TWO_MAC, VTEP_ONE_MAC, ether_type), packet].concat())
    };
    let with_options = {
        let datagram = [&[0xc3, 0x50, 0x21, 0x18, 0, 0, 0, 0][..], &vxlan(I_FLAG, 1), &inner(&udp(POD_TWO, POD_ONE))];
        let options: Ipv4Options = [7, 7, 4, 0, 0, 0, 0, 0].into();
        let packet = ipv4_with(NODE_TWO, NODE_ONE, IpNumber::UDP, &datagram.concat(), |ip| ip.options = options);
        [ethernet(NODE_TWO_MAC, NODE_ONE_MAC, EtherType::IPV4), packet].concat()
    };
    let mut not_version_4 = udp(POD_TWO, POD_ONE);
    not_version_4[0] = 0x65;
    vec![
        ("a host without a lease", with_tunnel(|tunnel| tunnel.source = STRANGER), Event::UnknownVtep),
        ("ourselves", with_tunnel(|tunnel| tunnel.source = NODE_ONE), Event::UnknownVtep),
        ("inner source of another VTEP", spoofed(POD_THREE), Event::SpoofedInnerSource),
        ("inner source of our own pod", spoofed([10, 5, 1, 9]), Event::SpoofedInnerSource),
        ("inner source of our own pod, as its lease claims", spoofed([10, 5, 1, 200]), Event::SpoofedInnerSource),
        ("inner source that nobody leases", spoofed([10, 5, 9, 9]), Event::SpoofedInnerSource),
        ("inner source outside the Network", spoofed([8, 8, 8, 8]), Event::SpoofedInnerSource),
        ("inner source beside its longer lease", spoofed([10, 5, 4, 1]), Event::SpoofedInnerSource),
        ("inner source of the host", spoofed(NODE_TWO), Event::SpoofedInnerSource),
        ("inner destination of this host", misdirected(NODE_ONE), Event::ForeignInnerDestination),
        ("inner destination of another host's pod", misdirected(POD_THREE), Event::ForeignInnerDestination),
        ("inner destination outside", misdirected([8, 8, 8, 8]), Event::ForeignInnerDestination),
        ("inner destination loopback", misdirected([127, 0, 0, 1]), Event::InnerNotUnicast),
        ("inner destination link-local", misdirected([169, 254, 169, 254]), Event::InnerNotUnicast),
        ("inner destination multicast", misdirected([224, 0, 0, 1]), Event::InnerNotUnicast),
        ("inner destination broadcast", misdirected([255; 4]), Event::InnerNotUnicast),
        ("inner destination zero", misdirected([0; 4]), Event::InnerNotUnicast),
        ("inner destination broadcast of our subnet", misdirected([10, 5, 1, 255]), Event::InnerNotUnicast),
        ("inner source loopback", spoofed([127, 0, 0, 1]), Event::InnerNotUnicast),
        ("inner source multicast", spoofed([224, 0, 0, 1]), Event::InnerNotUnicast),
        ("inner MAC broadcast", to_mac([0xff; 6]), Event::InnerNotUnicast),
        ("inner MAC of another VTEP", to_mac(VTEP_THREE_MAC), Event::InnerForeignMac),
        ("ARP inside", of_type(EtherType::ARP, &[0; 46]), Event::InnerNotIpv4),
        ("IPv6 inside", of_type(EtherType::IPV6, &[0x60; 60]), Event::InnerNotIpv4),
        ("a VLAN tag inside", of_type(EtherType(0x8100), &[0; 60]), Event::InnerNotIpv4),
        ("not IPv4 inside, though said to be", from_two(&not_version_4), Event::InnerNotIpv4),
        ("options outside", with_options, Event::OuterOptions),
    ]
}

#[test]
fn a_packet_cut_off_anywhere_in_its_headers_does_not_get_in() {
    let whole = from_two(&udp(POD_TWO, POD_ONE));
    with_programs(|programs| {
        // The kernel runs programs on no shorter frame; shorter ones are sent in `short_frames`.
        for len in 34..whole.len() {
            let event = match len {
                // Without a UDP header it is nobody's.
                34..42 => Event::NotTunnel,
                _ => Event::TunnelTruncated,
            };
            programs.expect_unchanged(Hook::FromUnderlay, &format!("{len} bytes"), &whole[..len], event);
        }
    });
}
