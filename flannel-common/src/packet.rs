//! The headers around an encapsulated packet, and the addresses inside it.
//!
//! ```text
//! offset  0        14      34     42      50              64
//!         Ethernet | IPv4  | UDP  | VXLAN | inner Ethernet | inner IPv4 ...
//! ```

use network_types::{
    eth::{EthHdr, EtherType},
    ip::{IpProto, Ipv4Hdr},
    udp::UdpHdr,
    vxlan::{VXLAN_I_FLAG_MASK, VxlanHdr},
};

use crate::{checksum, vxlan::Vni};

/// A MAC address in wire order.
pub type Mac = [u8; 6];

const IPV4: usize = EthHdr::LEN;
const UDP: usize = IPV4 + Ipv4Hdr::LEN;
const VXLAN: usize = UDP + UdpHdr::LEN;
const INNER_ETHERNET: usize = VXLAN + VxlanHdr::LEN;

/// Explicit congestion notification: the two low bits of the IPv4 TOS byte (RFC 3168).
const ECN_MASK: u8 = 0b11;
const ECN_CE: u8 = 0b11;
const ECN_ECT_0: u8 = 0b10;

/// Everything in front of the inner IPv4 header, in wire order: one cache line.
///
/// What is the same for all packets to one VTEP is prepared by the agent ([`OuterHeader::template`]); the programs
/// complete a copy for each packet.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OuterHeader(pub [u8; OuterHeader::LEN]);

/// What all packets to one VTEP have in common. IPv4 addresses and MACs in wire order, the port in host order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// MAC of the underlay's next hop; zero where it is not known yet.
    pub next_hop_mac: Mac,
    /// MAC of the underlay device.
    pub device_mac: Mac,
    /// This host's VTEP address.
    pub source: [u8; 4],
    /// The peer's VTEP address.
    pub destination: [u8; 4],
    /// UDP destination port.
    pub port: u16,
    /// The overlay's identifier.
    pub vni: Vni,
    /// MAC of the peer's vxlan device: the inner destination.
    pub peer_vtep_mac: Mac,
    /// MAC of this host's vxlan device: the inner source.
    pub vtep_mac: Mac,
}

/// What differs from packet to packet. All in host order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inner {
    /// Bytes from the inner IPv4 header to the end of the packet.
    pub len: u32,
    /// TOS byte of the inner IPv4 header.
    pub tos: u8,
    /// Identification for the outer IPv4 header.
    pub id: u16,
    /// UDP source port ([`SourcePorts::of`](crate::flow::SourcePorts::of)).
    pub source_port: u16,
}

impl OuterHeader {
    /// Bytes from the outer Ethernet to the end of the inner Ethernet header.
    pub const LEN: usize = INNER_ETHERNET + EthHdr::LEN;

    /// The header with all constant fields set, as the kernel's vxlan device would send it (`vxlan_xmit_one`,
    /// drivers/net/vxlan/vxlan_core.c, of a device without `df`, `ttl` or `tos`): DF clear, TTL 64, DSCP 0. The UDP
    /// checksum is zero, which every receiver must accept on IPv4 (RFC 7348 section 5): a checksum over a packet that
    /// is segmented later can't be made here. The IPv4 checksum field holds the sum over the constant fields.
    pub const fn template(tunnel: &Tunnel) -> Self {
        let mut header = [0; Self::LEN];
        put(&mut header, 0, &tunnel.next_hop_mac);
        put(&mut header, 6, &tunnel.device_mac);
        put(&mut header, 12, &ETHERTYPE_IPV4);

        header[IPV4] = 0x45;
        header[IPV4 + 8] = 64;
        header[IPV4 + 9] = IpProto::Udp as u8;
        put(&mut header, IPV4 + 12, &tunnel.source);
        put(&mut header, IPV4 + 16, &tunnel.destination);

        put(&mut header, UDP + 2, &tunnel.port.to_be_bytes());

        header[VXLAN] = VXLAN_I_FLAG_MASK;
        let vni = tunnel.vni.get().to_be_bytes();
        put(&mut header, VXLAN + 4, &[vni[1], vni[2], vni[3]]);

        put(&mut header, INNER_ETHERNET, &tunnel.peer_vtep_mac);
        put(&mut header, INNER_ETHERNET + 6, &tunnel.vtep_mac);
        put(&mut header, INNER_ETHERNET + 12, &ETHERTYPE_IPV4);

        let [s0, s1, s2, s3] = tunnel.source;
        let [d0, d1, d2, d3] = tunnel.destination;
        let mut sum = 0x4500 + ((64 << 8) | IpProto::Udp as u32);
        sum += u16::from_be_bytes([s0, s1]) as u32 + u16::from_be_bytes([s2, s3]) as u32;
        sum += u16::from_be_bytes([d0, d1]) as u32 + u16::from_be_bytes([d2, d3]) as u32;
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        put(&mut header, IPV4 + 10, &(sum as u16).to_be_bytes());
        Self(header)
    }

    /// MAC of the underlay's next hop, and of the underlay device.
    #[inline(always)]
    pub const fn underlay_macs(&self) -> (Mac, Mac) {
        let Self([a, b, c, d, e, f, g, h, i, j, k, l, ..]) = *self;
        ([a, b, c, d, e, f], [g, h, i, j, k, l])
    }

    /// MAC of the peer's vxlan device: the inner destination.
    #[inline(always)]
    pub const fn peer_vtep_mac(&self) -> Mac {
        let Self(header) = self;
        let mut mac = [0; 6];
        let mut index = 0;
        while index < mac.len() {
            mac[index] = header[INNER_ETHERNET + index];
            index += 1;
        }
        mac
    }

    /// Fills in what differs from packet to packet.
    ///
    /// Lengths beyond 65535 (a segmentable packet that the outer header takes over the limit) are written as the
    /// kernel writes them: zero for IPv4 (`iph_set_totlen`), the low 16 bits for UDP.
    #[inline(always)]
    pub fn complete(&mut self, inner: &Inner) {
        let Self(header) = self;
        let udp_len = inner.len + (OuterHeader::LEN - UDP) as u32;
        let total_len = udp_len + Ipv4Hdr::LEN as u32;
        let total_len = if total_len > u32::from(u16::MAX) { 0 } else { total_len as u16 };
        let tos = outer_ecn(inner.tos);

        let constant = u16::from_be_bytes([header[IPV4 + 10], header[IPV4 + 11]]);
        let sum = checksum::sum([constant, u16::from(tos), total_len, inner.id]);

        header[IPV4 + 1] = tos;
        put(header, IPV4 + 2, &total_len.to_be_bytes());
        put(header, IPV4 + 4, &inner.id.to_be_bytes());
        put(header, IPV4 + 10, &checksum::complete(sum).to_be_bytes());
        put(header, UDP, &inner.source_port.to_be_bytes());
        put(header, UDP + 4, &(udp_len as u16).to_be_bytes());
    }
}

const ETHERTYPE_IPV4: [u8; 2] = (EtherType::Ipv4 as u16).to_ne_bytes();

#[inline(always)]
const fn put<const N: usize>(header: &mut [u8; OuterHeader::LEN], at: usize, bytes: &[u8; N]) {
    let mut index = 0;
    while index < N {
        header[at + index] = bytes[index];
        index += 1;
    }
}

/// The outer ECN field of a packet with this inner TOS byte: normal mode of RFC 6040, as `INET_ECN_encapsulate`
/// (include/net/inet_ecn.h) has it: a mark already made is not repeated outside.
#[inline(always)]
const fn outer_ecn(inner_tos: u8) -> u8 {
    match inner_tos & ECN_MASK {
        ECN_CE => ECN_ECT_0,
        ecn => ecn,
    }
}

/// Whether a host could have this IPv4 address (host order): not zero, loopback, link-local, multicast or limited broadcast.
/// What else is reserved, 0.0.0.0/8 and 240.0.0.0/4, the kernel routes as any other (`ip_route_input_slow`).
#[inline(always)]
pub const fn is_unicast(address: u32) -> bool {
    let first = address >> 24;
    address != 0 && first != 127 && (first < 224 || first >= 240) && address != u32::MAX && (address >> 16) != 0xa9fe
}

#[cfg(test)]
mod tests {
    use etherparse::{Ipv4HeaderSlice, SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    use super::*;

    const TUNNEL: Tunnel = Tunnel {
        next_hop_mac: [0x02, 0, 0, 0, 0, 0xfe],
        device_mac: [0x02, 0, 0, 0, 0, 0x01],
        source: [192, 168, 64, 1],
        destination: [192, 168, 64, 2],
        port: 8472,
        vni: Vni::DEFAULT,
        peer_vtep_mac: [0x0a, 0, 0, 0, 0, 0x02],
        vtep_mac: [0x0a, 0, 0, 0, 0, 0x01],
    };

    fn header(inner: Inner) -> [u8; OuterHeader::LEN] {
        let mut header = OuterHeader::template(&TUNNEL);
        header.complete(&inner);
        header.0
    }

    #[test]
    fn a_parser_of_others_reads_every_field() {
        let inner = Inner { len: 84, tos: 0, id: 0x1234, source_port: 40000 };
        let mut frame = header(inner).to_vec();
        frame.resize(OuterHeader::LEN + 84, 0);
        let packet = SlicedPacket::from_ethernet(&frame).expect("the outer headers parse");

        let ethernet = packet.link.expect("Ethernet").to_header().expect("header").ethernet2().expect("Ethernet II");
        assert_eq!(ethernet.destination, TUNNEL.next_hop_mac);
        assert_eq!(ethernet.source, TUNNEL.device_mac);

        let ip = packet.net.expect("IPv4");
        let ip = ip.ipv4_ref().expect("IPv4").header().to_header();
        assert_eq!((ip.source, ip.destination), (TUNNEL.source, TUNNEL.destination));
        assert_eq!((ip.total_len, ip.identification, ip.time_to_live), (84 + 50, 0x1234, 64));
        assert!(!ip.dont_fragment);

        let Some(TransportSlice::Udp(udp)) = packet.transport else { panic!("not UDP") };
        assert_eq!((udp.source_port(), udp.destination_port()), (40000, 8472));
        assert_eq!((udp.length(), udp.checksum()), (84 + 30, 0));
        assert_eq!(udp.payload()[..8], [0x08, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(udp.payload()[8..22], [0x0a, 0, 0, 0, 0, 2, 0x0a, 0, 0, 0, 0, 1, 0x08, 0]);
    }

    #[test]
    fn a_packet_over_the_limit_is_written_as_the_kernel_writes_it() {
        let header = header(Inner { len: 65500, tos: 0, id: 0, source_port: 40000 });
        assert_eq!(header[IPV4 + 2..IPV4 + 4], [0, 0]);
        assert_eq!(header[UDP + 4..UDP + 6], (65530u16).to_be_bytes());
    }

    #[test]
    fn congestion_marks_follow_rfc_6040() {
        assert_eq!([0u8, 1, 2, 3, 0xb8 | 1].map(outer_ecn), [0, 1, 2, 2, 1]);
    }

    #[test]
    fn unicast_is_what_a_host_can_have() {
        let unicast = |a, b, c, d| is_unicast(u32::from_be_bytes([a, b, c, d]));
        for (a, b, c, d) in [
            (0, 0, 0, 1),
            (10, 5, 1, 2),
            (126, 0, 0, 1),
            (128, 0, 0, 1),
            (169, 253, 0, 1),
            (223, 1, 1, 1),
            (240, 0, 0, 0),
            (255, 255, 255, 254),
        ] {
            assert!(unicast(a, b, c, d), "{a}.{b}.{c}.{d}");
        }
        for (a, b, c, d) in
            [(0, 0, 0, 0), (127, 0, 0, 1), (169, 254, 1, 1), (224, 0, 0, 1), (239, 255, 255, 255), (255, 255, 255, 255)]
        {
            assert!(!unicast(a, b, c, d), "{a}.{b}.{c}.{d}");
        }
    }

    proptest! {
        #[test]
        fn the_ipv4_checksum_is_right(len in 20u32..65485, tos: u8, id: u16, source_port: u16) {
            let header = header(Inner { len, tos, id, source_port });
            let ip = Ipv4HeaderSlice::from_slice(&header[IPV4..UDP]).expect("IPv4").to_header();
            prop_assert_eq!(ip.header_checksum, ip.calc_header_checksum());
        }
    }
}
