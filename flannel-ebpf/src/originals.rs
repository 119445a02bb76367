//! Which flow a packet had before the stack.
//!
//! What netfilter translates has other addresses and ports when it comes out. So the flow is left in a place (`ORIGINALS`)
//! whose number the packet carries through the stack. That place may have got another packet's flow meanwhile; it is believed
//! only where it fits the packet that came out: by what no translation changes in a packet, and by the kernel's hash, which
//! stays with it and which no sender of packets knows.

use flannel_common::flow::{Constants, FlowKey, Original, Treatment};
use network_types::{
    eth::EthHdr,
    ip::{IpProto, Ipv4Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use crate::{
    flows::{Direction, Kind, Place},
    maps::ORIGINALS,
    packet::{Headers as _, Packet},
};

/// What is known of a packet that comes out of the stack.
pub(crate) enum Found {
    /// It had this flow before, and nothing but that and its TTL was changed.
    Same(FlowKey),
    /// It had this flow before, and more was changed.
    Changed(FlowKey),
    /// Nothing is certain: there is another one's by now, or it is no longer the packet that it was.
    Nothing,
}

/// Leaves the flow of a packet that the stack gets for whoever sees it come out, who has the tag from the packet.
#[inline(always)]
pub(crate) fn leave(packet: &Packet<'_>, ip: &Ipv4Hdr, place: &Place, tag: u32, direction: Direction) {
    if place.kind != Kind::Data {
        return;
    }
    let hash = packet.flow_hash();
    let treatment = treatment(packet, ip, ip.ttl.wrapping_sub(1));
    let Some(entry) = ORIGINALS.get_ptr_mut(Original::index(tag, direction == Direction::Egress)) else { return };
    // SAFETY: a map value lives as long as the program. Another CPU may write it at the same time; whoever reads a mixture
    // finds that its digest does not fit.
    unsafe {
        (&raw mut (*entry).key).write(place.key);
        (&raw mut (*entry).digest).write(Original::digest(&place.key, constants(packet, ip)));
        (&raw mut (*entry).hash).write(hash);
        (&raw mut (*entry).treatment).write(treatment);
    }
}

/// The flow that a packet which comes out of the stack had before.
#[inline(always)]
pub(crate) fn find(packet: &Packet<'_>, ip: &Ipv4Hdr, place: &Place, tag: u32, direction: Direction) -> Found {
    let after = treatment(packet, ip, ip.ttl);
    let Some(entry) = ORIGINALS.get_ptr(Original::index(tag, direction == Direction::Egress)) else {
        return Found::Nothing;
    };
    // SAFETY: as above.
    let (key, digest, hash, treatment) = unsafe {
        (
            (&raw const (*entry).key).read_volatile(),
            (&raw const (*entry).digest).read_volatile(),
            (&raw const (*entry).hash).read_volatile(),
            (&raw const (*entry).treatment).read_volatile(),
        )
    };
    let is_its = hash == packet.hash_so_far() && digest == Original::digest(&key, constants(packet, ip));
    if !is_its || key.protocol != place.key.protocol {
        return Found::Nothing;
    }
    if treatment == after { Found::Same(key) } else { Found::Changed(key) }
}

/// Offsets within a frame.
const TRANSPORT: usize = EthHdr::LEN + Ipv4Hdr::LEN;
const TCP_SEQUENCE: usize = TRANSPORT + 4;
const TCP_CONTROL: usize = TRANSPORT + 12;

#[inline(always)]
fn constants(packet: &Packet<'_>, ip: &Ipv4Hdr) -> Constants {
    let [l0, l1] = ip.tot_len;
    let [i0, i1] = ip.id;
    let mut constants = Constants { id_and_len: u32::from_ne_bytes([l0, l1, i0, i1]), ..Constants::default() };
    if ip.proto == IpProto::Tcp as u8
        && let Some([s0, s1, s2, s3, a0, a1, a2, a3]) = packet.header::<[u8; 8]>(TCP_SEQUENCE)
    {
        constants.sequence = u32::from_ne_bytes([s0, s1, s2, s3]);
        constants.acknowledgement = u32::from_ne_bytes([a0, a1, a2, a3]);
    }
    constants
}

/// The digest of a packet of TCP or UDP that has this TTL after the stack.
#[inline(always)]
fn treatment(packet: &Packet<'_>, ip: &Ipv4Hdr, ttl: u8) -> u32 {
    let mut treatment = Treatment { tos: ip.tos, ttl, frags: ip.frags, ..Treatment::default() };
    // As long as the packet says, since the stack cuts off what a frame has beyond that.
    let len = usize::from(u16::from_be_bytes(ip.tot_len));
    if ip.proto == IpProto::Tcp as u8 {
        if let Some(octets) = packet.header::<[u8; 8]>(TCP_CONTROL) {
            treatment.control = Treatment::control(octets);
        }
        treatment.begin = begin::<{ TcpHdr::LEN }>(packet, len);
    } else {
        treatment.begin = begin::<{ UdpHdr::LEN }>(packet, len);
    }
    treatment.digest()
}

/// What is behind a transport header of that size.
#[inline(always)]
fn begin<const HEADER: usize>(packet: &Packet<'_>, len: usize) -> u64 {
    if len < Ipv4Hdr::LEN + HEADER + 8 {
        return 0;
    }
    packet.header(TRANSPORT + HEADER).map_or(0, u64::from_ne_bytes)
}
