//! Frames of the world: two hosts, a pod on each.

use etherparse::{EtherType, Ethernet2Header, IpNumber, Ipv4Header, PacketBuilder, TcpHeader, UdpHeader};

pub type Mac = [u8; 6];

/// This host.
pub const NODE_ONE: [u8; 4] = [192, 168, 64, 1];
pub const NODE_ONE_MAC: Mac = [0x02, 0, 0, 0, 1, 1];
pub const VTEP_ONE_MAC: Mac = [0x0a, 0, 0, 0, 0, 1];
pub const POD_ONE: [u8; 4] = [10, 5, 1, 2];
/// A peer whose next hop is resolved.
pub const NODE_TWO: [u8; 4] = [192, 168, 64, 2];
pub const NODE_TWO_MAC: Mac = [0x02, 0, 0, 0, 1, 2];
pub const VTEP_TWO_MAC: Mac = [0x0a, 0, 0, 0, 0, 2];
pub const POD_TWO: [u8; 4] = [10, 5, 2, 2];
/// A peer whose next hop is not resolved.
pub const NODE_THREE: [u8; 4] = [192, 168, 64, 3];
pub const VTEP_THREE_MAC: Mac = [0x0a, 0, 0, 0, 0, 3];
pub const POD_THREE: [u8; 4] = [10, 5, 3, 2];
/// A peer whose address is in a prefix that the operator names.
pub const NODE_FIVE: [u8; 4] = [10, 20, 0, 5];
pub const VTEP_FIVE_MAC: Mac = [0x0a, 0, 0, 0, 0, 5];
/// A peer whose address is in node three's lease.
pub const NODE_SIX: [u8; 4] = [10, 5, 3, 77];
pub const VTEP_SIX_MAC: Mac = [0x0a, 0, 0, 0, 0, 6];
/// A host without a lease.
pub const STRANGER: [u8; 4] = [192, 168, 64, 99];
/// What the stack puts into frames for the overlay.
pub const NEXT_HOP_MAC: Mac = [0x02, 0, 0, 0, 0, 1];

pub const PAYLOAD: &[u8] = b"thirty-two octets of a payload..";

/// Ethernet header.
pub fn ethernet(source: Mac, destination: Mac, ether_type: EtherType) -> Vec<u8> {
    Ethernet2Header { source, destination, ether_type }.to_bytes().to_vec()
}

/// An IPv4 packet around a payload, with its checksum.
pub fn ipv4(source: [u8; 4], destination: [u8; 4], protocol: IpNumber, payload: &[u8]) -> Vec<u8> {
    ipv4_with(source, destination, protocol, payload, |_| {})
}

/// The same with a header of one's own.
pub fn ipv4_with(
    source: [u8; 4],
    destination: [u8; 4],
    protocol: IpNumber,
    payload: &[u8],
    change: impl FnOnce(&mut Ipv4Header),
) -> Vec<u8> {
    let mut header = Ipv4Header::new(payload.len() as u16, 63, protocol, source, destination).unwrap();
    change(&mut header);
    header.total_len = (header.header_len() + payload.len()) as u16;
    header.header_checksum = header.calc_header_checksum();
    let mut packet = Vec::new();
    header.write_raw(&mut packet).unwrap();
    packet.extend(payload);
    packet
}

/// A UDP datagram from pod to pod.
pub fn udp(source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
    udp_with(source, destination, |_| {})
}

pub fn udp_with(source: [u8; 4], destination: [u8; 4], change: impl FnOnce(&mut Ipv4Header)) -> Vec<u8> {
    let header = UdpHeader::with_ipv4_checksum(
        40000,
        53,
        &Ipv4Header::new(40, 63, IpNumber::UDP, source, destination).unwrap(),
        PAYLOAD,
    );
    let mut datagram = header.unwrap().to_bytes().to_vec();
    datagram.extend(PAYLOAD);
    ipv4_with(source, destination, IpNumber::UDP, &datagram, change)
}

/// A TCP segment from pod to pod.
pub fn tcp(source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
    let mut header = TcpHeader::new(40000, 80, 1, 65535);
    header.ack = true;
    let ip = Ipv4Header::new(52, 63, IpNumber::TCP, source, destination).unwrap();
    header.checksum = header.calc_checksum_ipv4(&ip, PAYLOAD).unwrap();
    let mut segment = header.to_bytes().to_vec();
    segment.extend(PAYLOAD);
    ipv4(source, destination, IpNumber::TCP, &segment)
}

/// An echo request.
pub fn icmp(source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
    let builder = PacketBuilder::ipv4(source, destination, 63).icmpv4_echo_request(7, 1);
    let mut packet = Vec::new();
    builder.write(&mut packet, PAYLOAD).unwrap();
    packet
}

/// A frame as the stack hands it to `flannel.1`.
pub fn on_overlay(packet: &[u8]) -> Vec<u8> {
    [&ethernet(VTEP_ONE_MAC, NEXT_HOP_MAC, EtherType::IPV4), packet].concat()
}

/// A frame that a tunnel carries from a VTEP to this host's.
pub fn inner(packet: &[u8]) -> Vec<u8> {
    [&ethernet(VTEP_TWO_MAC, VTEP_ONE_MAC, EtherType::IPV4), packet].concat()
}

/// A VXLAN header: flags, VNI.
pub fn vxlan(flags: u8, vni: u32) -> Vec<u8> {
    let [_, a, b, c] = vni.to_be_bytes();
    vec![flags, 0, 0, 0, a, b, c, 0]
}

/// What is on the underlay around an inner frame.
#[derive(Clone, Copy)]
pub struct Tunnel {
    pub source_mac: Mac,
    pub destination_mac: Mac,
    pub source: [u8; 4],
    pub destination: [u8; 4],
    pub source_port: u16,
    pub port: u16,
    pub id: u16,
    pub ttl: u8,
    pub ecn: u8,
    pub more_fragments: bool,
    pub fragment_offset: u16,
}

/// A tunnel packet from node two.
pub const FROM_TWO: Tunnel = Tunnel {
    source_mac: NODE_TWO_MAC,
    destination_mac: NODE_ONE_MAC,
    source: NODE_TWO,
    destination: NODE_ONE,
    source_port: 50000,
    port: 8472,
    id: 1,
    ttl: 64,
    ecn: 0,
    more_fragments: false,
    fragment_offset: 0,
};

impl Tunnel {
    /// The whole frame: outer headers, VXLAN header and inner frame.
    pub fn around(&self, vxlan: &[u8], inner: &[u8]) -> Vec<u8> {
        let payload = [vxlan, inner].concat();
        let udp = UdpHeader {
            source_port: self.source_port,
            destination_port: self.port,
            length: (8 + payload.len()) as u16,
            checksum: 0,
        };
        let datagram = [&udp.to_bytes()[..], &payload].concat();
        let packet = ipv4_with(self.source, self.destination, IpNumber::UDP, &datagram, |ip| {
            ip.time_to_live = self.ttl;
            ip.identification = self.id;
            ip.ecn = self.ecn.try_into().unwrap();
            ip.dont_fragment = false;
            ip.more_fragments = self.more_fragments;
            ip.fragment_offset = self.fragment_offset.try_into().unwrap();
        });
        [ethernet(self.source_mac, self.destination_mac, EtherType::IPV4), packet].concat()
    }
}
