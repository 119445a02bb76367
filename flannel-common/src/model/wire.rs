//! Headers by their offsets.

use std::vec::Vec;

use crate::flow::{Constants, FlowKey, Treatment};

pub(super) const ETHERNET: usize = 14;
pub(super) const IPV4: usize = 20;
/// IPv4, UDP, VXLAN and Ethernet header: from the outer to the inner IPv4 header.
pub(super) const TUNNEL: usize = 50;

pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;

/// The bytes at `at`; [`None`] where the frame ends before.
pub(super) fn bytes<const N: usize>(frame: &[u8], at: usize) -> Option<[u8; N]> {
    frame.get(at..at + N)?.try_into().ok()
}

pub(super) fn word(frame: &[u8], at: usize) -> Option<u16> {
    bytes(frame, at).map(u16::from_be_bytes)
}

/// Whether an address lies in a subnet, bit by bit.
pub(super) fn is_within(address: [u8; 4], network: [u8; 4], len: u32) -> bool {
    (0..len as usize).all(|bit| {
        let of = |octets: [u8; 4]| octets[bit / 8] >> (7 - bit % 8) & 1;
        of(address) == of(network)
    })
}

pub(super) fn is_ipv4(frame: &[u8]) -> bool {
    word(frame, 12) == Some(0x0800)
}

/// An IPv4 header of at least 20 bytes (RFC 791).
#[derive(Clone, Copy)]
pub(super) struct Ipv4 {
    octets: [u8; IPV4],
}

impl Ipv4 {
    pub(super) fn at(frame: &[u8], at: usize) -> Option<Self> {
        bytes(frame, at).map(|octets| Self { octets })
    }

    pub(super) fn version(self) -> u8 {
        self.octets[0] >> 4
    }

    pub(super) fn header_len(self) -> usize {
        usize::from(self.octets[0] & 0xf) * 4
    }

    pub(super) fn is_plain(self) -> bool {
        self.version() == 4 && self.header_len() == IPV4
    }

    pub(super) fn dscp(self) -> u8 {
        self.octets[1] / 4 * 4
    }

    pub(super) fn ecn(self) -> u8 {
        self.octets[1] & 3
    }

    pub(super) fn total_len(self) -> usize {
        usize::from(u16::from_be_bytes([self.octets[2], self.octets[3]]))
    }

    pub(super) fn has_more_fragments(self) -> bool {
        self.octets[6] & 0x20 != 0
    }

    pub(super) fn is_later_fragment(self) -> bool {
        self.octets[6] & 0x1f != 0 || self.octets[7] != 0
    }

    pub(super) fn ttl(self) -> u8 {
        self.octets[8]
    }

    pub(super) fn protocol(self) -> u8 {
        self.octets[9]
    }

    pub(super) fn source(self) -> [u8; 4] {
        let [.., a, b, c, d, _, _, _, _] = self.octets;
        [a, b, c, d]
    }

    pub(super) fn destination(self) -> [u8; 4] {
        let [.., a, b, c, d] = self.octets;
        [a, b, c, d]
    }
}

/// Which end of a packet the local pod is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Source,
    Destination,
}

/// What a packet is to its flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Data,
    /// SYN, FIN or RST.
    Turn,
    /// Without ports that can be read.
    Other,
}

/// The flow of the packet with the IPv4 header `ip` at `at`.
pub(super) fn flow(frame: &[u8], ip: Ipv4, at: usize, local: End) -> (Kind, FlowKey) {
    let transport = at + IPV4;
    let is_whole = ip.is_plain() && !ip.is_later_fragment() && !ip.has_more_fragments();
    // Without their checksums, urgent pointers and payloads, they would not be headers.
    let header_len = match ip.protocol() {
        TCP => Some(20),
        UDP => Some(8),
        _ => None,
    };
    let has_ports = is_whole && header_len.is_some_and(|len| frame.len() >= transport + len);
    let port = |at| if has_ports { bytes(frame, at).unwrap_or_default() } else { [0; 2] };
    let kind = match frame.get(transport + 13) {
        _ if !has_ports => Kind::Other,
        Some(flags) if ip.protocol() == TCP && flags & 0b111 != 0 => Kind::Turn,
        _ => Kind::Data,
    };
    let mut ends = [(ip.source(), port(transport)), (ip.destination(), port(transport + 2))];
    if local == End::Destination {
        ends.reverse();
    }
    let [(local, local_port), (remote, remote_port)] = ends;
    (kind, FlowKey { local, remote, local_port, remote_port, protocol: ip.protocol().into() })
}

/// What no translation changes in the packet with its IPv4 header at `at`: nothing where that is cut off.
pub fn constants(frame: &[u8], at: usize) -> Constants {
    let Some(ip) = Ipv4::at(frame, at) else { return Constants::default() };
    let number = |at| bytes(frame, at).map_or(0, u32::from_ne_bytes);
    let is_tcp = ip.protocol() == TCP && flow(frame, ip, at, End::Source).0 != Kind::Other;
    let of_tcp = |at| if is_tcp { number(at) } else { 0 };
    Constants {
        // Total length and identification.
        id_and_len: number(at + 2),
        sequence: of_tcp(at + IPV4 + 4),
        acknowledgement: of_tcp(at + IPV4 + 8),
    }
}

/// What neither a router nor a translation changes in the packet with its IPv4 header at `at`, with its TTL as it is so many
/// routers on.
pub fn treatment(frame: &[u8], at: usize, routers: u8) -> Treatment {
    let Some(ip) = Ipv4::at(frame, at) else { return Treatment::default() };
    let transport = at + IPV4;
    let header_len = if ip.protocol() == TCP { 20 } else { 8 };
    // What is behind the packet in its frame is not the packet's.
    let is_long = ip.total_len() >= IPV4 + header_len + 8;
    let [v0, v1, v2, v3, _, _, u0, u1] = bytes(frame, transport + 12).unwrap_or_default();
    Treatment {
        tos: ip.octets[1],
        ttl: ip.ttl().wrapping_sub(routers),
        frags: [ip.octets[6], ip.octets[7]],
        control: if ip.protocol() == TCP { u64::from_ne_bytes([v0, v1, v2, v3, 0, 0, u0, u1]) } else { 0 },
        begin: if is_long { bytes(frame, transport + header_len).map_or(0, u64::from_ne_bytes) } else { 0 },
    }
}

/// The packet from its IPv4 header on, as one of another flow that its source or its destination is the local end of. The
/// checksums change by as much (RFC 1624, equation 3); one of UDP that is absent stays so, and none becomes absent (RFC 768).
pub(super) fn translated(mut packet: Vec<u8>, from: FlowKey, to: FlowKey, local: End) -> Vec<u8> {
    if from == to {
        return packet;
    }
    let mut ends = [(to.local, to.local_port), (to.remote, to.remote_port)];
    if local == End::Destination {
        ends.reverse();
    }
    let [(source, source_port), (destination, destination_port)] = ends;
    let addresses = [source, destination].concat();
    let ports = [source_port, destination_port].concat();
    let (old_addresses, old_ports) = (packet[12..20].to_vec(), packet[20..24].to_vec());
    packet[12..20].copy_from_slice(&addresses);
    packet[20..24].copy_from_slice(&ports);
    let adjusted = |check: [u8; 2], old: &[u8], new: &[u8]| {
        let inverted: Vec<u8> = check.iter().chain(old).map(|octet| !octet).collect();
        (!sum(&[&inverted, new].concat())).to_be_bytes()
    };
    let ip_check = adjusted([packet[10], packet[11]], &old_addresses, &addresses);
    packet[10..12].copy_from_slice(&ip_check);
    let is_udp = packet[9] == UDP;
    let at = IPV4 + if is_udp { 6 } else { 16 };
    let check = [packet[at], packet[at + 1]];
    if is_udp && check == [0, 0] {
        return packet;
    }
    let check = match adjusted(check, &[old_addresses, old_ports].concat(), &[addresses, ports].concat()) {
        [0, 0] if is_udp => [0xff, 0xff],
        check => check,
    };
    packet[at..at + 2].copy_from_slice(&check);
    packet
}

/// The flow of a frame with IPv4 at `at`, as a pod that sends it (or else receives it) sees it.
pub fn flow_of(frame: &[u8], at: usize, sends: bool) -> Option<FlowKey> {
    let end = if sends { End::Source } else { End::Destination };
    Some(flow(frame, Ipv4::at(frame, at)?, at, end).1)
}

/// The ones' complement sum of all words (RFC 1071), folded.
pub(super) fn sum(octets: &[u8]) -> u16 {
    let mut total: u64 =
        octets.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0))).sum();
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

/// A packet from its IPv4 header on, after one more router: the TTL is one less, and the checksum changes by as much
/// (RFC 1624, equation 3), so that a wrong one stays wrong.
pub(super) fn one_hop_on(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let before = [packet[8], packet[9]];
    packet[8] -= 1;
    let parts = [!packet[10], !packet[11], !before[0], !before[1], packet[8], packet[9]];
    let [high, low] = (!sum(&parts)).to_be_bytes();
    (packet[10], packet[11]) = (high, low);
    packet
}

/// Whether the checksum of the IPv4 header of 20 bytes at `at` is right.
pub fn is_sum_right(frame: &[u8], at: usize) -> bool {
    frame.get(at..at + IPV4).is_some_and(|header| sum(header) == 0xffff)
}

/// Makes it right.
pub fn put_sum(frame: &mut [u8], at: usize) {
    if let Some(header) = frame.get_mut(at..at + IPV4) {
        (header[10], header[11]) = (0, 0);
        let [high, low] = (!sum(header)).to_be_bytes();
        (header[10], header[11]) = (high, low);
    }
}
