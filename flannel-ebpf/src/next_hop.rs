//! What a packet that bypasses the stack begins with, as if the stack had sent it on: one hop older, and translated as
//! netfilter translated the last one of its flow.

use core::mem::offset_of;

use flannel_common::{checksum, flow::FlowKey, packet::Mac};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::{IpProto, Ipv4Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use crate::{
    flows::Direction,
    packet::{Header, Packet},
};

/// The IPv4 header, and the ports behind it.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct NextHop {
    ip: Ipv4Hdr,
    source_port: [u8; 2],
    destination_port: [u8; 2],
}

// SAFETY: #[repr(C)] of bytes.
unsafe impl Header for NextHop {}

impl NextHop {
    /// Of a packet with at least these headers that becomes one of the flow `key`. The TTL is one less, and the checksum fits
    /// (RFC 1624).
    #[inline(always)]
    pub(crate) fn new(ip: &Ipv4Hdr, key: &FlowKey, direction: Direction, translation: &Option<Translation>) -> Self {
        let check = checksum::decrement_ttl(ip.check);
        let check = match translation {
            Some(translation) => checksum::adjust(check, translation.addresses),
            None => check,
        };
        let (local, remote) = ((key.local, key.local_port), (key.remote, key.remote_port));
        let (source, destination) = match direction {
            Direction::Egress => (local, remote),
            Direction::Ingress => (remote, local),
        };
        Self {
            ip: Ipv4Hdr { ttl: ip.ttl - 1, check, src_addr: source.0, dst_addr: destination.0, ..*ip },
            source_port: source.1,
            destination_port: destination.1,
        }
    }
}

/// What a packet that bypasses the stack begins with where it is not encapsulated.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Framed {
    ethernet: EthHdr,
    next: NextHop,
}

// SAFETY: #[repr(C)] of two headers, without padding between them.
unsafe impl Header for Framed {}

impl Framed {
    /// Between these MACs.
    #[inline(always)]
    pub(crate) fn new(dst_addr: Mac, src_addr: Mac, next: NextHop) -> Self {
        Self { ethernet: EthHdr { dst_addr, src_addr, ether_type: EtherType::Ipv4 as u16 }, next }
    }
}

/// What a translation changes in a packet.
pub(crate) struct Translation {
    /// Of the addresses, as [`checksum::difference`] has it.
    pub(crate) addresses: u32,
    /// Of the ports.
    pub(crate) ports: u32,
}

impl Translation {
    /// [`None`] where nothing is translated.
    #[inline(always)]
    pub(crate) fn between(from: &FlowKey, to: &FlowKey) -> Option<Self> {
        if from == to {
            return None;
        }
        let word = u32::from_ne_bytes;
        let ports = |key: &FlowKey| [key.local_port, key.remote_port].map(|port| u32::from(u16::from_ne_bytes(port)));
        Some(Self {
            addresses: checksum::difference([from.local, from.remote].map(word), [to.local, to.remote].map(word)),
            ports: checksum::difference(ports(from), ports(to)),
        })
    }

    /// Has the checksum of a packet's TCP or UDP header at `offset` fit.
    #[inline(always)]
    pub(crate) fn adjust(&self, packet: &Packet<'_>, protocol: u8, offset: usize) -> Result<(), ()> {
        let is_udp = protocol == IpProto::Udp as u8;
        let check = if is_udp { offset_of!(UdpHdr, check) } else { offset_of!(TcpHdr, check) };
        packet.adjust_checksum((offset + check) as u32, self.addresses, self.ports, is_udp)
    }
}
