//! What a dropped packet was, in one line: as far as its first bytes say, and however malformed it is.

use std::{fmt, net::IpAddr};

use etherparse::{EtherType, IpNumber, LaxNetSlice, LaxSlicedPacket, TransportSlice};
use flannel_common::event::Event;
use serde::Serialize;

/// Bytes of a VXLAN header (RFC 7348, section 5).
const VXLAN_LEN: usize = 8;

/// A packet, and the one in its tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Decoded {
    /// The outermost.
    pub(super) outer: Addresses,
    /// The VXLAN network identifier, where it is a tunnel packet.
    #[serde(skip_serializing_if = "Option::is_none")]
    vni: Option<u32>,
    /// What is in the tunnel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) inner: Option<Addresses>,
}

/// Who sends what to whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Addresses {
    /// `TCP`, `UDP`, `ARP`, ...; what can't be told is named.
    protocol: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) source: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) destination: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source_port: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    destination_port: Option<u16>,
}

/// Reads the first bytes of a packet, with so many of link-layer header, that was dropped for a reason.
pub(super) fn decode(reason: Event, frame: &[u8], link_header_len: usize) -> Decoded {
    let packet = match link_header_len {
        0 => LaxSlicedPacket::from_ip(frame).ok(),
        _ => LaxSlicedPacket::from_ethernet(frame).ok(),
    };
    let Some(packet) = packet else {
        return Decoded { outer: Addresses::nameless("shorter than its headers"), vni: None, inner: None };
    };
    let outer = Addresses::of(&packet);
    let tunnel = match &packet.transport {
        Some(TransportSlice::Udp(udp)) if is_of_tunnel(reason) => udp.payload().split_at_checked(VXLAN_LEN),
        _ => None,
    };
    let Some((&[_, _, _, _, a, b, c, _], inner)) = tunnel else { return Decoded { outer, vni: None, inner: None } };
    let inner = match LaxSlicedPacket::from_ethernet(inner) {
        Ok(inner) => Addresses::of(&inner),
        Err(_) => Addresses::nameless("cut off"),
    };
    Decoded { outer, vni: Some(u32::from_be_bytes([0, a, b, c])), inner: Some(inner) }
}

/// Whether what is dropped for a reason came to the tunnel's port, as the program found.
const fn is_of_tunnel(reason: Event) -> bool {
    matches!(
        reason,
        Event::PodTunnel
            | Event::TunnelTruncated
            | Event::OuterOptions
            | Event::InnerNotIpv4
            | Event::InnerForeignMac
            | Event::InnerNotUnicast
            | Event::ForeignInnerDestination
            | Event::UnknownVtep
            | Event::SpoofedInnerSource
    )
}

impl Addresses {
    fn nameless(what: impl Into<String>) -> Self {
        Self { protocol: what.into(), source: None, destination: None, source_port: None, destination_port: None }
    }

    fn of(packet: &LaxSlicedPacket<'_>) -> Self {
        let (source, destination, protocol): (IpAddr, IpAddr, _) = match &packet.net {
            Some(LaxNetSlice::Ipv4(ip)) => {
                (ip.header().source_addr().into(), ip.header().destination_addr().into(), ip.payload_ip_number())
            }
            Some(LaxNetSlice::Ipv6(ip)) => {
                (ip.header().source_addr().into(), ip.header().destination_addr().into(), ip.payload().ip_number)
            }
            Some(LaxNetSlice::Arp(_)) => return Self::nameless("ARP"),
            None => {
                return Self::nameless(match packet.ether_payload().map(|payload| payload.ether_type) {
                    Some(EtherType::IPV4) => "IPv4 that can't be read".to_owned(),
                    Some(EtherType::IPV6) => "IPv6 that can't be read".to_owned(),
                    Some(other) => format!("ether type {:#06x}", other.0),
                    None => "no headers that can be read".to_owned(),
                });
            }
        };
        let ports = match &packet.transport {
            Some(TransportSlice::Udp(udp)) => Some((udp.source_port(), udp.destination_port())),
            Some(TransportSlice::Tcp(tcp)) => Some((tcp.source_port(), tcp.destination_port())),
            _ => None,
        };
        Self {
            protocol: name(protocol),
            source: Some(source),
            destination: Some(destination),
            source_port: ports.map(|(source, _)| source),
            destination_port: ports.map(|(_, destination)| destination),
        }
    }
}

fn name(protocol: IpNumber) -> String {
    protocol.keyword_str().map_or_else(|| format!("IP protocol {}", protocol.0), str::to_owned)
}

impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.source, self.destination) {
            (Some(source), Some(destination)) => write!(f, "{source} > {destination} {}", self.protocol)?,
            _ => f.write_str(&self.protocol)?,
        }
        match (self.source_port, self.destination_port) {
            (Some(source), Some(destination)) => write!(f, " {source} > {destination}"),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Decoded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { outer, vni: Some(vni), inner: Some(inner) } = self else { return write!(f, "{}", self.outer) };
        match (outer.source, outer.destination) {
            (Some(source), Some(destination)) => write!(f, "{source} > {destination} VNI {vni}: {inner}"),
            _ => write!(f, "{outer} VNI {vni}: {inner}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

    fn in_tunnel(inner: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        let outer = PacketBuilder::ethernet2(MAC, MAC).ipv4([192, 168, 64, 99], [192, 168, 64, 1], 64).udp(50000, 8472);
        outer.write(&mut frame, &[&[8, 0, 0, 0, 0, 0, 1, 0], inner].concat()).expect("written");
        frame
    }

    fn tcp() -> Vec<u8> {
        let mut frame = Vec::new();
        let inner = PacketBuilder::ethernet2(MAC, MAC).ipv4([10, 5, 2, 2], [10, 5, 1, 2], 64).tcp(40000, 80, 1, 1);
        inner.write(&mut frame, &[0; 500]).expect("written");
        frame
    }

    fn text(reason: Event, frame: &[u8]) -> String {
        decode(reason, frame, 14).to_string()
    }

    #[test]
    fn a_tunnel_packet_with_what_is_in_it() {
        let frame = in_tunnel(&tcp());
        let line = "192.168.64.99 > 192.168.64.1 VNI 1: 10.5.2.2 > 10.5.1.2 TCP 40000 > 80";
        assert_eq!(text(Event::UnknownVtep, &frame[..128]), line);
        assert_eq!(decode(Event::UnknownVtep, &frame[14..128], 0).to_string(), line, "without a link-layer header");
        assert_eq!(
            text(Event::UnknownVtep, &frame[..86]),
            "192.168.64.99 > 192.168.64.1 VNI 1: 10.5.2.2 > 10.5.1.2 TCP",
            "cut off before the ports"
        );
        assert_eq!(
            text(Event::UnknownVtep, &frame[..80]),
            "192.168.64.99 > 192.168.64.1 VNI 1: IPv4 that can't be read",
            "cut off within the addresses"
        );
        assert_eq!(
            text(Event::UnknownVtep, &frame[..55]),
            "192.168.64.99 > 192.168.64.1 VNI 1: cut off",
            "cut off before the inner headers"
        );
    }

    #[test]
    fn others() {
        assert_eq!(text(Event::NotAdmitted, &tcp()), "10.5.2.2 > 10.5.1.2 TCP 40000 > 80");
        let arp = [&MAC[..], &MAC, &[0x08, 0x06], &[0, 1, 8, 0, 6, 4, 0, 1], &[0; 20]].concat();
        assert_eq!(text(Event::InnerNotIpv4, &in_tunnel(&arp)), "192.168.64.99 > 192.168.64.1 VNI 1: ARP");
        let lldp = [&MAC[..], &MAC, &[0x88, 0xcc], &[0; 20]].concat();
        assert_eq!(text(Event::InnerNotIpv4, &lldp), "ether type 0x88cc");
        assert_eq!(text(Event::TunnelTruncated, &[]), "shorter than its headers");
        let unassigned = PacketBuilder::ethernet2(MAC, MAC).ipv4([10, 5, 2, 2], [10, 5, 1, 2], 64);
        let mut frame = Vec::new();
        unassigned.write(&mut frame, IpNumber(200), &[1, 2, 3]).expect("written");
        assert_eq!(text(Event::NotAdmitted, &frame), "10.5.2.2 > 10.5.1.2 IP protocol 200");
    }

    proptest! {
        #[test]
        fn whatever_it_is_there_is_a_line(
            reason in 0..Event::ALL.len(),
            mut frame in prop::collection::vec(any::<u8>(), 0..=128),
            as_tunnel in any::<bool>(),
            link_header_len in prop::sample::select(vec![0usize, 14]),
        ) {
            if as_tunnel {
                frame = in_tunnel(&frame);
            }
            let line = decode(Event::ALL[reason], &frame, link_header_len).to_string();
            prop_assert!(!line.is_empty() && !line.contains('\n'));
        }
    }
}
