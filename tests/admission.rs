//! Packet tables of `from_underlay`.

use etherparse::{EtherType, IpNumber, Ipv4Options};
use flannel_agent::dataplane::{Hook, TestRun as _, TestRunOptions, XdpMode};
use flannel_common::event::{Event, Outcome};

use crate::{
    frames::*,
    loaded::{Loaded, with_programs},
};

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
            programs.expect_at_underlay(what, frame, *event);
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
        ("UDP", from_two(&udp(POD_TWO, POD_ONE)), Event::HandedIn),
        ("TCP", from_two(&tcp(POD_TWO, POD_ONE)), Event::HandedIn),
        ("ICMP", from_two(&icmp(POD_TWO, POD_ONE)), Event::HandedIn),
        ("from its overlay address to ours", from_two(&icmp([10, 5, 2, 0], [10, 5, 1, 0])), Event::HandedIn),
        ("from its lease outside the Network", from_two(&udp([172, 30, 1, 1], POD_ONE)), Event::HandedIn),
        ("from its lease longer than the grid's", from_two(&udp([10, 5, 4, 200], POD_ONE)), Event::HandedIn),
        ("from its own address", from_two(&udp(NODE_TWO, POD_ONE)), Event::HandedIn),
        ("from its own address to our overlay address", from_two(&icmp(NODE_TWO, [10, 5, 1, 0])), Event::HandedIn),
        ("from a prefix that the operator names", from_two(&udp([10, 20, 3, 4], POD_ONE)), Event::HandedIn),
        ("from such a prefix of class E", from_two(&udp([247, 255, 255, 254], POD_ONE)), Event::HandedIn),
        ("to a prefix that the operator names", from_two(&udp(POD_TWO, [10, 20, 3, 4])), Event::HandedIn),
        ("from one to another", from_two(&udp([10, 20, 3, 4], [240, 0, 0, 1])), Event::HandedIn),
        (
            "from an address of the Network that is named, and that nobody leases",
            from_two(&udp([10, 5, 0, 9], POD_ONE)),
            Event::HandedIn,
        ),
        (
            "with IP options inside",
            from_two(&udp_with(POD_TWO, POD_ONE, |ip| ip.options = options.clone())),
            Event::HandedIn,
        ),
        ("an inner fragment", from_two(&udp_with(POD_TWO, POD_ONE, |ip| ip.more_fragments = true)), Event::HandedIn),
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
    let from = |tunnel: Tunnel, packet: &[u8]| tunnel.around(&vxlan(I_FLAG, 1), &inner(packet));
    let from_six = |source| from(Tunnel { source: NODE_SIX, ..FROM_TWO }, &udp(source, POD_ONE));
    let from_stranger = |source| from(Tunnel { source: STRANGER, ..FROM_TWO }, &udp(source, POD_ONE));
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
        ("inner source of another host", spoofed(NODE_THREE), Event::SpoofedInnerSource),
        // All of these are in prefixes that the operator names, too.
        ("inner source of another host, as a prefix has it", spoofed(NODE_FIVE), Event::SpoofedInnerSource),
        (
            "inner destination of another host, as a prefix has it",
            misdirected(NODE_FIVE),
            Event::ForeignInnerDestination,
        ),
        ("inner source of our own host", spoofed(NODE_ONE), Event::SpoofedInnerSource),
        ("inner source of another host, that is in a third one's lease", spoofed(NODE_SIX), Event::SpoofedInnerSource),
        ("inner source of itself, where it is in another's lease", from_six(NODE_SIX), Event::SpoofedInnerSource),
        ("inner source of class E that nobody names", spoofed([248, 0, 0, 1]), Event::SpoofedInnerSource),
        ("inner source that is named, from a host without a lease", from_stranger([10, 20, 3, 4]), Event::UnknownVtep),
        ("inner source of itself, without a lease", from_stranger(STRANGER), Event::UnknownVtep),
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

/// MAC of a vxlan device that the leases do not know.
const NEW_MAC: Mac = [0x0a, 0, 0, 0, 0, 0x99];

/// What is said of a packet at TC; XDP must not drop what is let through there.
fn expect_at_both(programs: &mut Loaded<'_>, table: &Table) {
    for (what, frame, event) in table {
        programs.expect_at_underlay(what, frame, *event);
        for mode in [XdpMode::Native, XdpMode::Generic] {
            let mut out = vec![0; frame.len() + 256];
            let options = TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), ..TestRunOptions::new() };
            let run = programs.dataplane.xdp_program(mode).unwrap().test_run(options).unwrap();
            let verdict = if event.outcome() == Outcome::Drop { 1 } else { 2 };
            assert_eq!(run.return_value, verdict, "{what}, XDP {}", mode.label());
            if *event == Event::AdmittedByRoute {
                assert_eq!(out[..run.data_size_out as usize], *frame, "{what}, XDP {}", mode.label());
            }
        }
    }
}

#[test]
fn where_leases_refuse_routes_of_others_are_asked() {
    with_programs(|programs| {
        let host = programs.host;
        let mac = |mac: Mac| mac.map(|octet| format!("{octet:02x}")).join(":");
        host.exec("sysctl -qw net.ipv4.ip_forward=1").unwrap();
        host.ip(&format!("link add flannel.1 address {} type vxlan id 1 dstport 8472 nolearning", mac(NEW_MAC)))
            .unwrap();
        host.ip("link set flannel.1 up").unwrap();
        let links = host.ip_json("link show flannel.1").unwrap();
        programs.dataplane.peers.set_overlay_device(links[0]["ifindex"].as_u64().unwrap() as u32).unwrap();
        let neighbour = |address: &str, of: Mac| {
            host.ip(&format!("neigh replace {address} lladdr {} dev flannel.1 nud permanent", mac(of))).unwrap();
        };
        let route = |prefix: &str, next_hop: &str| {
            host.ip(&format!("route add {prefix} via {next_hop} dev flannel.1 onlink")).unwrap();
        };
        // An agent's own route, which says nothing of who is behind it; also where somebody changes its neighbour.
        neighbour("169.254.1.1", NEXT_HOP_MAC);
        route("10.5.0.0/16", "169.254.1.1");
        let from = |outer: [u8; 4], source, destination| {
            Tunnel { source: outer, ..FROM_TWO }.around(&vxlan(I_FLAG, 1), &inner(&udp(source, destination)))
        };
        let to_new_mac = |outer: [u8; 4], source, destination| {
            let frame = [ethernet(VTEP_TWO_MAC, NEW_MAC, EtherType::IPV4), udp(source, destination)].concat();
            Tunnel { source: outer, ..FROM_TWO }.around(&vxlan(I_FLAG, 1), &frame)
        };
        let pod_nine = [10, 5, 9, 2];
        let refused = vec![
            ("a peer that nobody knows", from(STRANGER, pod_nine, POD_ONE), Event::UnknownVtep),
            ("an address that nobody leases", from(NODE_TWO, pod_nine, POD_ONE), Event::SpoofedInnerSource),
            ("an address with no route but the default", from(STRANGER, [8, 8, 8, 8], POD_ONE), Event::UnknownVtep),
            ("an address of the underlay", from(STRANGER, STRANGER, POD_ONE), Event::UnknownVtep),
            ("our own address", from(STRANGER, NODE_ONE, POD_ONE), Event::UnknownVtep),
            ("to the MAC that the device has now", to_new_mac(NODE_TWO, POD_TWO, POD_ONE), Event::InnerForeignMac),
        ];
        expect_at_both(programs, &refused);
        neighbour("169.254.1.1", NEW_MAC);
        expect_at_both(programs, &refused);

        // A site behind node two, by the operator's route.
        neighbour("10.5.2.0", VTEP_TWO_MAC);
        route("10.40.0.0/16", "10.5.2.0");
        let site = [10, 40, 3, 4];
        // Behind a next hop of the agent's, behind one that is not resolved, and by another device.
        neighbour("10.5.77.0", NEXT_HOP_MAC);
        for (prefix, next_hop) in [("10.41.0.0/16", "10.5.77.0"), ("10.42.0.0/16", "10.5.78.0")] {
            route(prefix, next_hop);
        }
        host.ip("route add 10.43.0.0/16 via 192.168.64.2 dev eth0").unwrap();
        expect_at_both(
            programs,
            &vec![
                ("a site behind its host", from(NODE_TWO, site, POD_ONE), Event::AdmittedByRoute),
                ("a site from another host", from(NODE_THREE, site, POD_ONE), Event::SpoofedInnerSource),
                ("a site from a stranger", from(STRANGER, site, POD_ONE), Event::UnknownVtep),
                ("a site, to somebody else", from(NODE_TWO, site, POD_THREE), Event::SpoofedInnerSource),
                ("a site, to another MAC", to_new_mac(NODE_TWO, site, POD_ONE), Event::SpoofedInnerSource),
                ("a next hop of the agent's", from(NODE_TWO, [10, 41, 0, 1], POD_ONE), Event::SpoofedInnerSource),
                ("a next hop that is not resolved", from(NODE_TWO, [10, 42, 0, 1], POD_ONE), Event::SpoofedInnerSource),
                ("another device", from(NODE_TWO, [10, 43, 0, 1], POD_ONE), Event::SpoofedInnerSource),
            ],
        );

        // flannel's daemon: a peer that joined, one that came back with another MAC, one that is as it was.
        neighbour("10.5.9.0", [0x0a, 0, 0, 0, 0, 9]);
        neighbour("10.5.3.0", [0x0a, 0, 0, 0, 0, 0x33]);
        for subnet in ["10.5.9", "10.5.3", "10.5.2"] {
            route(&format!("{subnet}.0/24"), &format!("{subnet}.0"));
        }
        route("10.5.1.192/26", "10.5.9.0");
        let own = Event::SpoofedInnerSource;
        expect_at_both(
            programs,
            &vec![
                ("a peer that joined", to_new_mac(STRANGER, pod_nine, POD_ONE), Event::AdmittedByRoute),
                ("its overlay address", to_new_mac(STRANGER, [10, 5, 9, 0], POD_ONE), Event::AdmittedByRoute),
                (
                    "a peer with another MAC and address",
                    to_new_mac(STRANGER, POD_THREE, POD_ONE),
                    Event::AdmittedByRoute,
                ),
                (
                    "a peer as it was, to the device's new MAC",
                    to_new_mac(NODE_TWO, POD_TWO, POD_ONE),
                    Event::AdmittedByRoute,
                ),
                (
                    "the same, to another subnet of this host",
                    to_new_mac(NODE_TWO, POD_TWO, [10, 5, 50, 2]),
                    Event::AdmittedByRoute,
                ),
                (
                    "a peer as it was, at another address",
                    to_new_mac(STRANGER, POD_TWO, POD_ONE),
                    Event::AdmittedByRoute,
                ),
                ("to an old MAC", from(STRANGER, pod_nine, POD_ONE), Event::UnknownVtep),
                ("what flannel has no route for", to_new_mac(STRANGER, [10, 5, 10, 2], POD_ONE), Event::UnknownVtep),
                ("our own subnet, whoever routes it", to_new_mac(NODE_TWO, [10, 5, 1, 200], POD_ONE), own),
                ("loopback, whoever routes it", to_new_mac(STRANGER, [127, 0, 0, 1], POD_ONE), Event::InnerNotUnicast),
            ],
        );

        // Somebody else's device: nobody keeps the maps.
        host.ip("link delete flannel.1").unwrap();
        expect_at_both(
            programs,
            &vec![
                ("anybody", from(STRANGER, [8, 8, 8, 8], [1, 1, 1, 1]), Event::AdmittedByRoute),
                ("our own subnet", from(STRANGER, [10, 5, 1, 9], POD_ONE), Event::UnknownVtep),
                ("loopback", from(STRANGER, [127, 0, 0, 1], POD_ONE), Event::InnerNotUnicast),
            ],
        );
    });
}
