//! `to_overlay`: encapsulation of what the host's stack routed to `flannel.<VNI>`.
//!
//! Fragments, IP options and any TTL are no matter here: the stack has dealt with them, and a tunnel carries them as
//! they are.
//!
//! What it can't encapsulate it hands on to the kernel's vxlan device, which sends it back: the one forwarding entry of
//! that device leads to this host itself (`encap_bypass_if_local`, drivers/net/vxlan/vxlan_core.c). On the way the kernel
//! segments what has to be, and forgets that a pod put it into a tunnel already. `from_overlay` then tries again.

use flannel_common::{
    event::{Event, Outcome},
    maps::{Config, Vtep},
    packet::Inner,
};
use network_types::{eth::EthHdr, ip::Ipv4Hdr};

use crate::{
    leases::Leases,
    maps::CONFIG,
    packet::{NoRoom, Note, Packet, random_id},
};

#[inline(always)]
pub(crate) fn to_overlay(packet: &Packet<'_>) -> Event {
    let event = try_encapsulate(packet);
    if event.outcome() == Outcome::Pass {
        packet.write_note(Note::HandedOn, CONFIG.load().vni);
    }
    event
}

#[inline(always)]
pub(crate) fn from_overlay(packet: &Packet<'_>) -> Event {
    let vni = CONFIG.load().vni;
    if packet.has_note(Note::Admitted, vni) {
        return Event::Received;
    }
    if !packet.has_note(Note::HandedOn, vni) {
        return Event::NotAdmitted;
    }
    packet.forget_notes(vni);
    let event = try_encapsulate(packet);
    match event.outcome() {
        // The host's stack would send it to the overlay again and again.
        Outcome::Pass => Event::EncapImpossible,
        Outcome::Forward | Outcome::Drop => event,
    }
}

#[inline(always)]
fn try_encapsulate(packet: &Packet<'_>) -> Event {
    let config = CONFIG.load();
    if !packet.is_ipv4() {
        return Event::EncapNotIpv4;
    }
    let Some(ip) = packet.header::<Ipv4Hdr>(EthHdr::LEN) else {
        return Event::EncapTruncated;
    };
    let Some(vtep) = (Leases { config: &config }).peer_of(u32::from_be_bytes(ip.dst_addr)) else {
        return Event::EncapNoPeer;
    };
    if vtep.ifindex == 0 {
        return Event::EncapNoRoute;
    }
    let len = packet.len() - EthHdr::LEN as u32;
    if len > config.mtu && !packet.is_gso() {
        return Event::EncapTooBig;
    }
    encapsulate(packet, &config, vtep, len, ip.tos)
}

/// Puts the outer header in front of a packet of `len` bytes of IPv4 and notes where it goes.
#[inline(always)]
fn encapsulate(packet: &Packet<'_>, config: &Config, vtep: &Vtep, len: u32, tos: u8) -> Event {
    // The hash is that of the inner flow, so it is taken while the inner headers are the only ones.
    let source_port = config.source_ports.of(packet.flow_hash());
    match packet.make_room() {
        Ok(()) => {}
        Err(NoRoom::Nested) => return Event::EncapNested,
        Err(NoRoom::Refused) => return Event::EncapNoRoom,
    }
    let mut header = vtep.header;
    header.complete(&Inner { len, tos, id: random_id(), source_port });
    if packet.write(&header).is_err() {
        return Event::EncapFailed;
    }
    if vtep.flags & Vtep::RESOLVED != 0 {
        packet.redirect(vtep.ifindex);
        Event::Encapsulated
    } else {
        packet.redirect_to_neighbour(vtep.ifindex, vtep.next_hop);
        Event::EncapsulatedNeighbour
    }
}
