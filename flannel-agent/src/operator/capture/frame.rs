//! What a captured frame is: a packet in its tunnel, one without, or one that XDP has taken out of it; and whether it is asked for.

use std::net::Ipv4Addr;

use etherparse::Ipv4HeaderSlice;
use flannel_common::packet::Mac;
use ipnet::Ipv4Net;
use nix::libc;

use super::overlay::Tunnel;

const ETHERNET_LEN: usize = 14;
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const UDP_LEN: usize = 8;
const VXLAN_LEN: usize = 8;

/// Part of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part<'a> {
    /// As much of it as was copied.
    pub(super) bytes: &'a [u8],
    /// How long it was.
    pub(super) len: usize,
}

impl<'a> Part<'a> {
    /// Without its first octets. [`None`] where these were not copied.
    fn without(self, first: usize) -> Option<Self> {
        Some(Self { bytes: self.bytes.get(first..)?, len: self.len.checked_sub(first)? })
    }

    /// The first octets.
    fn first(self, len: usize) -> Self {
        Self { bytes: &self.bytes[..len.min(self.bytes.len())], len: len.min(self.len) }
    }
}

/// What a frame is to the overlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Carried<'a> {
    /// In its tunnel. Several IPv4 packets where the kernel has several datagrams in one packet (UDP_SEGMENT, UDP_GRO).
    Tunnelled {
        /// By the outer header.
        vteps: [Ipv4Addr; 2],
        inner: Vec<Part<'a>>,
    },
    /// As it is.
    Direct,
    /// It was in a tunnel, which XDP has taken away.
    Decapsulated,
}

/// How a link's frames are told apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// Octets of link-layer header.
    pub(super) header_len: usize,
    pub(super) tunnel: Option<Tunnel>,
    /// The MAC of this host's vxlan device, if it has one.
    pub(super) vtep_mac: Option<Mac>,
}

impl Layout {
    /// What a frame is. What the kernel's filter accepts and is not in the tunnel is of the Network.
    pub(super) fn carried<'a>(&self, frame: Part<'a>) -> Carried<'a> {
        if self.header_len > 0 && self.vtep_mac.is_some_and(|mac| frame.bytes.starts_with(&mac)) {
            return Carried::Decapsulated;
        }
        self.tunnelled(frame).unwrap_or(Carried::Direct)
    }

    fn tunnelled<'a>(&self, frame: Part<'a>) -> Option<Carried<'a>> {
        let tunnel = self.tunnel?;
        let packet = frame.without(self.header_len)?;
        let header = Ipv4HeaderSlice::from_slice(packet.bytes).ok()?;
        let is_first = header.fragments_offset().value() == 0;
        if i32::from(header.protocol().0) != libc::IPPROTO_UDP || !is_first {
            return None;
        }
        let datagram = packet.without(header.slice().len())?;
        if datagram.bytes.get(2..4)? != tunnel.port().to_be_bytes() {
            return None;
        }
        let payload = datagram.without(UDP_LEN)?;
        let inner = match tunnel {
            Tunnel::Vxlan { .. } => vec![payload.without(VXLAN_LEN)?],
            Tunnel::Udp { .. } => packets(payload),
        };
        Some(Carried::Tunnelled { vteps: [header.source_addr(), header.destination_addr()], inner })
    }
}

/// IPv4 packets one behind the other, as far as they were copied.
fn packets(mut rest: Part<'_>) -> Vec<Part<'_>> {
    let mut packets = Vec::new();
    while let Ok(header) = Ipv4HeaderSlice::from_slice(rest.bytes) {
        let len = usize::from(header.total_len());
        packets.push(rest.first(len));
        match rest.without(len).filter(|_| len > 0) {
            Some(behind) => rest = behind,
            None => break,
        }
    }
    packets
}

/// Which packets are asked for; every condition must hold that is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Filter {
    /// One that either end is in; or two, one for each end.
    pub(super) hosts: Vec<Ipv4Net>,
    /// A peer: its VTEP addresses, and its subnets.
    pub(super) vteps: Vec<Ipv4Addr>,
    pub(super) subnets: Vec<Ipv4Net>,
    /// Of IPv4.
    pub(super) protocol: Option<u8>,
    /// Of either end.
    pub(super) port: Option<u16>,
}

impl Filter {
    /// Whether all is asked for.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether an IPv4 packet is, which was sent from VTEP to VTEP where that is known. Later fragments have no ports: of them those
    /// are that the rest is true of.
    pub(super) fn matches(&self, packet: &[u8], vteps: Option<[Ipv4Addr; 2]>) -> bool {
        if self.is_empty() {
            return true;
        }
        let header = Ipv4HeaderSlice::from_slice(packet).ok();
        let is_of_peer = self.vteps.is_empty() && self.subnets.is_empty()
            || vteps.into_iter().flatten().any(|vtep| self.vteps.contains(&vtep))
            || header.as_ref().is_some_and(|header| {
                let mut ends = [header.source_addr(), header.destination_addr()].into_iter();
                ends.any(|end| self.vteps.contains(&end) || self.subnets.iter().any(|subnet| subnet.contains(&end)))
            });
        if !is_of_peer {
            return false;
        }
        let Some(header) = header else {
            // ARP, IPv6: of a peer, but with nothing that the rest is about.
            return self.hosts.is_empty() && self.protocol.is_none() && self.port.is_none();
        };
        let (source, destination) = (header.source_addr(), header.destination_addr());
        let is_between = match self.hosts[..] {
            [] => true,
            [one] => one.contains(&source) || one.contains(&destination),
            [one, two, ..] => {
                one.contains(&source) && two.contains(&destination)
                    || two.contains(&source) && one.contains(&destination)
            }
        };
        let protocol = header.protocol().0;
        is_between
            && self.protocol.is_none_or(|wanted| wanted == protocol)
            && self.port.is_none_or(|port| has_port(&header, &packet[header.slice().len()..], port))
    }
}

/// Whether one of the ports behind the header is that; true where there can't be any.
fn has_port(header: &Ipv4HeaderSlice<'_>, payload: &[u8], port: u16) -> bool {
    if header.fragments_offset().value() != 0 {
        return true;
    }
    let has_ports = [libc::IPPROTO_TCP, libc::IPPROTO_UDP, libc::IPPROTO_SCTP].contains(&header.protocol().0.into());
    let wanted = port.to_be_bytes();
    has_ports && payload.first_chunk().is_some_and(|[a, b, c, d]| [*a, *b] == wanted || [*c, *d] == wanted)
}

/// The IPv4 packet in an Ethernet frame; nothing where there is none.
pub(super) fn ipv4_of(frame: &[u8]) -> &[u8] {
    match frame.get(ETHERNET_LEN - 2..ETHERNET_LEN) {
        Some(ethertype) if ethertype == ETHERTYPE_IPV4 => &frame[ETHERNET_LEN..],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use etherparse::{IpFragOffset, IpNumber, Ipv4Header, PacketBuilder};
    use flannel_common::vxlan::Vni;

    use super::*;

    const VTEPS: [[u8; 4]; 2] = [[192, 0, 2, 1], [192, 0, 2, 2]];
    const PODS: [[u8; 4]; 2] = [[10, 5, 1, 2], [10, 5, 2, 2]];
    const MAC: Mac = [0x0a, 0, 0, 0, 0, 1];

    fn udp(ends: [[u8; 4]; 2], ports: [u16; 2], payload: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        PacketBuilder::ipv4(ends[0], ends[1], 64).udp(ports[0], ports[1]).write(&mut packet, payload).unwrap();
        packet
    }

    fn frame(packet: &[u8]) -> Vec<u8> {
        [&[1; 6][..], &[2; 6], &ETHERTYPE_IPV4, packet].concat()
    }

    fn whole(bytes: &[u8]) -> Part<'_> {
        Part { bytes, len: bytes.len() }
    }

    fn layout(tunnel: Option<Tunnel>) -> Layout {
        Layout { header_len: ETHERNET_LEN, tunnel, vtep_mac: Some(MAC) }
    }

    #[test]
    fn what_is_in_a_tunnel_is_found_however_much_was_copied() {
        let tunnel = Tunnel::Vxlan { port: 8472, vni: Vni::new_checked(1).unwrap() };
        let inner = frame(&udp(PODS, [1, 2], &[7; 100]));
        let outer = frame(&udp(VTEPS, [5, 8472], &[&[8, 0, 0, 0, 0, 0, 1, 0], &inner[..]].concat()));
        let vteps = VTEPS.map(Ipv4Addr::from);
        let layout = layout(Some(tunnel));
        assert_eq!(layout.carried(whole(&outer)), Carried::Tunnelled { vteps, inner: vec![whole(&inner)] });
        // Of this many, 50 are the outer headers.
        let cut = Part { bytes: &outer[..80], len: outer.len() };
        let expected = Part { bytes: &inner[..30], len: inner.len() };
        assert_eq!(layout.carried(cut), Carried::Tunnelled { vteps, inner: vec![expected] });
        for len in 0..50 {
            assert_eq!(layout.carried(Part { bytes: &outer[..len], len: outer.len() }), Carried::Direct, "{len}");
        }
        let decapsulated = [&MAC[..], &inner[6..]].concat();
        assert_eq!(layout.carried(whole(&decapsulated)), Carried::Decapsulated);
        assert_eq!(layout.carried(whole(&inner)), Carried::Direct);
    }

    #[test]
    fn several_packets_in_one_of_the_kernels_are_told_apart() {
        let packets = [udp(PODS, [1, 2], &[7; 100]), udp(PODS, [3, 4], &[8; 50])];
        let outer = frame(&udp(VTEPS, [8285, 8285], &packets.concat()));
        let found = layout(Some(Tunnel::Udp { port: 8285 })).carried(whole(&outer));
        let inner = packets.iter().map(|packet| whole(packet)).collect();
        assert_eq!(found, Carried::Tunnelled { vteps: VTEPS.map(Ipv4Addr::from), inner });
        // One that says it has no length ends them.
        let mut endless = packets[0].clone();
        endless[2..4].fill(0);
        let outer = frame(&udp(VTEPS, [8285, 8285], &endless));
        let Carried::Tunnelled { inner, .. } = layout(Some(Tunnel::Udp { port: 8285 })).carried(whole(&outer)) else {
            panic!("in a tunnel")
        };
        assert_eq!(inner.len(), 1);
    }

    #[test]
    fn every_condition_must_hold() {
        let packet = udp(PODS, [4000, 53], &[0; 10]);
        let vteps = Some(VTEPS.map(Ipv4Addr::from));
        let net = |text: &str| text.parse::<Ipv4Net>().unwrap();
        let all = Filter {
            hosts: vec![net("10.5.2.0/24"), net("10.5.1.2/32")],
            vteps: vec![VTEPS[1].into()],
            subnets: Vec::new(),
            protocol: Some(17),
            port: Some(53),
        };
        assert!(all.matches(&packet, vteps));
        let one_host = Filter { hosts: vec![net("10.5.2.2/32")], ..all.clone() };
        assert!(one_host.matches(&packet, vteps));
        for other in [
            Filter { hosts: vec![net("10.5.3.0/24")], ..all.clone() },
            Filter { hosts: vec![net("10.5.2.0/24"), net("10.5.2.0/24")], ..all.clone() },
            Filter { vteps: vec![[192, 0, 2, 3].into()], ..all.clone() },
            Filter { protocol: Some(6), ..all.clone() },
            Filter { port: Some(54), ..all.clone() },
        ] {
            assert!(!other.matches(&packet, vteps), "{other:?}");
        }
        // Where the outer header is not known, a peer is told by its subnet.
        assert!(!all.matches(&packet, None));
        let by_subnet = Filter { subnets: vec![net("10.5.2.0/24")], ..all.clone() };
        assert!(by_subnet.matches(&packet, None));
        // No IPv4 has neither addresses nor ports, and is a peer's all the same.
        assert!(!all.matches(&[], vteps) && Filter::default().matches(&[], None));
        assert!(Filter { vteps: all.vteps.clone(), ..Filter::default() }.matches(&[], vteps));
    }

    #[test]
    fn a_later_fragment_is_taken_by_its_addresses() {
        let mut header = Ipv4Header::new(8, 64, IpNumber::UDP, PODS[0], PODS[1]).unwrap();
        header.fragment_offset = IpFragOffset::try_new(185).unwrap();
        let mut fragment = Vec::new();
        header.write(&mut fragment).unwrap();
        fragment.extend([0; 8]);
        let by_port = Filter { port: Some(53), ..Filter::default() };
        assert!(by_port.matches(&fragment, None));
        let icmp = Ipv4Header::new(8, 64, IpNumber::ICMP, PODS[0], PODS[1]).unwrap();
        let mut echo = Vec::new();
        icmp.write(&mut echo).unwrap();
        echo.extend([0, 53, 0, 53, 0, 0, 0, 0]);
        assert!(!by_port.matches(&echo, None));
    }
}
