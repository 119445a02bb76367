//! Which flow a packet had before the stack.
//!
//! What netfilter translates has other addresses and ports when it comes out. So the flow is left in a place (`ORIGINALS`)
//! whose number the packet carries through the stack. That place may have got another packet's flow meanwhile; it is believed
//! only where it fits the packet that came out: by what no translation changes in a packet, and by the kernel's hash, which
//! stays with it and which no sender of packets knows.

use flannel_common::flow::{Constants, FlowKey, Original};
use network_types::{
    eth::EthHdr,
    ip::{IpProto, Ipv4Hdr},
};

use crate::{
    flows::{Direction, Kind, Place},
    maps::ORIGINALS,
    packet::{Headers as _, Packet},
};

/// Leaves the flow of a packet that the stack gets for whoever sees it come out, who has the tag from the packet.
#[inline(always)]
pub(crate) fn leave(packet: &Packet<'_>, ip: &Ipv4Hdr, place: &Place, tag: u32, direction: Direction) {
    if place.kind != Kind::Data {
        return;
    }
    let hash = packet.flow_hash();
    let Some(entry) = ORIGINALS.get_ptr_mut(Original::index(tag, direction == Direction::Egress)) else { return };
    // SAFETY: a map value lives as long as the program. Another CPU may write it at the same time; whoever reads a mixture
    // finds that its digest does not fit.
    unsafe {
        (&raw mut (*entry).key).write(place.key);
        (&raw mut (*entry).digest).write(Original::digest(&place.key, constants(packet, ip)));
        (&raw mut (*entry).hash).write(hash);
    }
}

/// The flow that a packet which comes out of the stack had before. [`None`] where that is not certain: there is another one's
/// by now, or the stack changed more than addresses and ports.
#[inline(always)]
pub(crate) fn find(
    packet: &Packet<'_>,
    ip: &Ipv4Hdr,
    place: &Place,
    tag: u32,
    direction: Direction,
) -> Option<FlowKey> {
    let entry = ORIGINALS.get_ptr(Original::index(tag, direction == Direction::Egress))?;
    // SAFETY: as above.
    let (key, digest, hash) = unsafe {
        (
            (&raw const (*entry).key).read_volatile(),
            (&raw const (*entry).digest).read_volatile(),
            (&raw const (*entry).hash).read_volatile(),
        )
    };
    let is_its = hash == packet.hash_so_far() && digest == Original::digest(&key, constants(packet, ip));
    (is_its && key.protocol == place.key.protocol).then_some(key)
}

#[inline(always)]
fn constants(packet: &Packet<'_>, ip: &Ipv4Hdr) -> Constants {
    /// Of the sequence number, which the acknowledgement follows, from the IPv4 header on.
    const SEQUENCE: usize = Ipv4Hdr::LEN + 4;
    let [l0, l1] = ip.tot_len;
    let [i0, i1] = ip.id;
    let mut constants = Constants { id_and_len: u32::from_ne_bytes([l0, l1, i0, i1]), ..Constants::default() };
    if ip.proto == IpProto::Tcp as u8
        && let Some([s0, s1, s2, s3, a0, a1, a2, a3]) = packet.header::<[u8; 8]>(EthHdr::LEN + SEQUENCE)
    {
        constants.sequence = u32::from_ne_bytes([s0, s1, s2, s3]);
        constants.acknowledgement = u32::from_ne_bytes([a0, a1, a2, a3]);
    }
    constants
}
