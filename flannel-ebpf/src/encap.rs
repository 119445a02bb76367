//! Encapsulation: `to_overlay`, of what the host's stack routed to `flannel.<VNI>`, and `from_pod`, of what may pass the
//! stack by.
//!
//! In `to_overlay` fragments, IP options and any TTL are no matter: the stack has dealt with them, and a tunnel carries
//! them as they are.
//!
//! What it can't encapsulate it hands on to the kernel's vxlan device, which sends it back: the one forwarding entry of
//! that device leads to this host itself (`encap_bypass_if_local`, drivers/net/vxlan/vxlan_core.c). On the way the kernel
//! segments what has to be, and forgets that a pod put it into a tunnel already. `from_overlay` then tries again, and drops
//! what still can't be, by its cause.

use flannel_common::{
    event::{Event, Outcome},
    flow::FlowKey,
    maps::{Config, Vtep},
    packet::{Inner, OuterHeader},
    vxlan::NEXT_HOP_MAC,
};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::Ipv4Hdr,
};

use crate::{
    count::count_sent,
    flows::{self, Direction, Kind, Place, place},
    leases::{Leases, Peer, overlay_device},
    maps::CONFIG,
    next_hop::{Framed, NextHop, Translation},
    originals,
    packet::{Header, Headers as _, NoRoom, Note, Packet, copy_header, random_id},
    routes,
};

#[inline(always)]
pub(crate) fn to_overlay(packet: &Packet<'_>) -> Event {
    let config = CONFIG.load();
    if config.has(Config::SHOWN) && packet.has_note(Note::HandedOn(config.vni)) {
        packet.forget_note();
        return Event::EncapShown;
    }
    let mut is_changed = false;
    let released = flows::released(packet, &config, &mut is_changed);
    let event = try_encapsulate(packet, &config, Shown::of(&config));
    if is_tried_again(event) {
        packet.write_note(Note::HandedOn(config.vni));
        return Event::EncapHandedOn;
    }
    match event.outcome() {
        Outcome::Forward if is_changed => return Event::EncapsulatedChanged,
        Outcome::Forward => {
            if let Some(released) = released {
                released.note(packet);
            }
        }
        Outcome::Pass if event == Event::EncapQueued => packet.write_note(Note::HandedOn(config.vni)),
        // The kernel's own, or what it sends to another's next hop.
        Outcome::Pass => packet.forget_note(),
        Outcome::Drop => {}
    }
    event
}

#[inline(always)]
pub(crate) fn from_overlay(packet: &Packet<'_>) -> Event {
    let config = CONFIG.load();
    if packet.has_note(Note::HandedOn(config.vni)) {
        packet.forget_note();
        let event = try_encapsulate(packet, &config, Shown::Never);
        return match event.outcome() {
            // It was for a peer, and is by now for nobody.
            Outcome::Pass => Event::NotAdmitted,
            Outcome::Forward | Outcome::Drop => event,
        };
    }
    let Some(ip) = packet.header::<Ipv4Hdr>(EthHdr::LEN).filter(|_| packet.is_ipv4()) else {
        return Event::NotAdmitted;
    };
    let place = place(packet, &ip, EthHdr::LEN, Direction::Ingress);
    let tag = place.key.tag(config.vni);
    if !packet.has_note(Note::Admitted(tag)) {
        return Event::NotAdmitted;
    }
    packet.write_note(Note::Received(tag));
    if config.bypass_time != 0 {
        originals::leave(packet, &ip, &place, tag, Direction::Ingress);
    }
    if config.is_pod(u32::from_be_bytes(ip.dst_addr)) { Event::Received } else { Event::ReceivedByHost }
}

/// Whether a packet may be encapsulated once it has been through the kernel's vxlan device, or be dropped there: the host's stack would
/// send it to the overlay again and again.
#[inline(always)]
const fn is_tried_again(event: Event) -> bool {
    matches!(
        event,
        Event::EncapNoPeer | Event::EncapNoRoute | Event::EncapTooBig | Event::EncapNested | Event::EncapNoRoom
    )
}

/// Whether a packet at egress of `flannel.<VNI>` was led there by a route of the agent's.
#[inline(always)]
fn is_for_overlay(packet: &Packet<'_>) -> bool {
    packet.header::<EthHdr>(0).is_none_or(|ethernet| ethernet.dst_addr == NEXT_HOP_MAC)
}

/// What happens at `flannel.<VNI>` to a packet on its way into the tunnel. Constants to the verifier.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shown {
    /// Nothing.
    Never,
    /// A copy is sent by the device.
    Copy,
    /// It goes by the device itself.
    Itself,
}

impl Shown {
    #[inline(always)]
    fn of(config: &Config) -> Self {
        match (config.has(Config::QUEUED), config.has(Config::SHOWN)) {
            (true, _) => Self::Itself,
            (false, true) => Self::Copy,
            (false, false) => Self::Never,
        }
    }
}

#[inline(always)]
fn try_encapsulate(packet: &Packet<'_>, config: &Config, shown: Shown) -> Event {
    if !packet.is_ipv4() {
        return Event::EncapNotIpv4;
    }
    if !is_for_overlay(packet) {
        return Event::EncapOtherNextHop;
    }
    let Some(ip) = packet.header::<Ipv4Hdr>(EthHdr::LEN) else {
        return Event::EncapTruncated;
    };
    let Some(peer) = (Leases { config }).peer_of(u32::from_be_bytes(ip.dst_addr)) else {
        return Event::EncapNoPeer;
    };
    let vtep = peer.vtep;
    if vtep.ifindex == 0 {
        return Event::EncapNoRoute;
    }
    if peer.is_direct(config) {
        let (next_hop, device) = vtep.header.underlay_macs();
        let ethernet = EthHdr { dst_addr: next_hop, src_addr: device, ether_type: EtherType::Ipv4 as u16 };
        if packet.write(&ethernet).is_err() {
            return Event::EncapFailed;
        }
        send(packet, peer, EthHdr::LEN);
        return Event::Direct;
    }
    if shown == Shown::Itself {
        return Event::EncapQueued;
    }
    let len = packet.len() - EthHdr::LEN as u32;
    if len > config.mtu && !packet.is_gso() {
        return Event::EncapTooBig;
    }
    let Some(chosen) = choose(packet, config, vtep) else {
        return Event::EncapNoRoute;
    };
    if shown == Shown::Copy && show(packet, config, vtep).is_err() {
        return Event::EncapFailed;
    }
    let inner = match make_room(packet, config, len, ip.tos) {
        Ok(inner) => inner,
        // As it was.
        Err(_) if shown == Shown::Copy && packet.write(&NEXT_HOP_MAC).is_err() => return Event::EncapFailed,
        Err(NoRoom::Nested) => return Event::EncapNested,
        Err(NoRoom::Refused) => return Event::EncapNoRoom,
    };
    let mut header = copy_header(&vtep.header);
    header.complete(&inner);
    if packet.write(&header).is_err() {
        return Event::EncapFailed;
    }
    match send_chosen(packet, peer, chosen) {
        Sent::Resolved => Event::Encapsulated,
        Sent::ToNeighbour => Event::EncapsulatedNeighbour,
    }
}

/// Shows a packet as flannel's daemon would have it sent: from this host's VTEP to the peer's. The copy comes to
/// [`to_overlay`] once more, and then to the kernel's vxlan device, which drops it for want of a forwarding entry. The packet
/// itself keeps that destination.
#[inline(always)]
fn show(packet: &Packet<'_>, config: &Config, vtep: &Vtep) -> Result<(), ()> {
    packet.write(&vtep.header.peer_vtep_mac())?;
    packet.write_note(Note::HandedOn(config.vni));
    packet.send_copy(overlay_device());
    Ok(())
}

/// Egress of the external interface, where there is no tunnel: of what the stack routed to a peer, sees to the MAC where one of the
/// agent's shared routes led it there, and notes what it let out.
#[inline(always)]
pub(crate) fn to_underlay(packet: &Packet<'_>) -> Event {
    let config = CONFIG.load();
    if !packet.is_ipv4() {
        return Event::RoutedOther;
    }
    let (Some(ethernet), Some(ip)) = (packet.header::<EthHdr>(0), packet.header::<Ipv4Hdr>(EthHdr::LEN)) else {
        return Event::RoutedOther;
    };
    let is_by_shared_route = ethernet.dst_addr == NEXT_HOP_MAC;
    if !is_by_shared_route && !packet.is_from_pod() {
        return Event::RoutedOther;
    }
    let peer = (Leases { config: &config }).peer_of(u32::from_be_bytes(ip.dst_addr));
    let on_link = peer.filter(|peer| peer.vtep.flags & Vtep::ON_LINK != 0 && peer.vtep.ifindex == packet.device());
    // Another's route may have led it elsewhere: that is no way to repeat.
    let is_to_peer = on_link.is_some_and(|Peer { vtep, .. }| {
        is_by_shared_route || vtep.flags & Vtep::RESOLVED != 0 && ethernet.dst_addr == vtep.header.underlay_macs().0
    });
    let mut is_changed = false;
    // At once: what is kept of it is loaded before it is looked whether it is there, see `released`.
    if let Some(released) = flows::released(packet, &config, &mut is_changed)
        && is_to_peer
    {
        released.note(packet);
    }
    let Some(Peer { id, vtep }) = on_link else {
        // Another network's programs may be here, too.
        let is_of_network = config.slot(u32::from_be_bytes(ip.dst_addr)).is_some();
        return match (is_by_shared_route, peer.is_some()) {
            (true, true) => Event::RoutedNotOnLink,
            (true, false) if is_of_network => Event::RoutedNoPeer,
            _ => Event::RoutedOther,
        };
    };
    // It is for programs of this host only.
    packet.forget_note();
    if !is_to_peer {
        return Event::RoutedOther;
    }
    count_sent(id, packet.len() - EthHdr::LEN as u32);
    if is_by_shared_route {
        if vtep.flags & Vtep::RESOLVED == 0 {
            packet.redirect_to_neighbour(vtep.ifindex, vtep.next_hop);
            return Event::RoutedNeighbour;
        }
        let (next_hop, device) = vtep.header.underlay_macs();
        let ethernet = EthHdr { dst_addr: next_hop, src_addr: device, ether_type: EtherType::Ipv4 as u16 };
        if packet.write(&ethernet).is_err() {
            return Event::EncapFailed;
        }
    }
    if is_changed { Event::RoutedChanged } else { Event::Routed }
}

/// Ingress of the host's side of a pod's veth.
#[inline(always)]
pub(crate) fn from_pod(packet: &Packet<'_>) -> Event {
    let config = CONFIG.load();
    let event = bypass_or_leave(packet, &config);
    // A constant to the verifier.
    if config.bypass_time != 0 && event.outcome() == Outcome::Pass {
        flows::note_pod(packet);
    }
    event
}

#[inline(always)]
fn bypass_or_leave(packet: &Packet<'_>, config: &Config) -> Event {
    // Whatever it says, the pod wrote it.
    packet.forget_note();
    if !packet.is_ipv4() {
        return Event::PodOther;
    }
    let Some(ip) = packet.header::<Ipv4Hdr>(EthHdr::LEN) else {
        return Event::PodOther;
    };
    if !config.has(Config::NO_TUNNEL) && flows::is_tunnel(packet, config, &ip) {
        return Event::PodTunnel;
    }
    let destination = u32::from_be_bytes(ip.dst_addr);
    if !config.is_local(u32::from_be_bytes(ip.src_addr)) || config.is_local(destination) {
        return Event::PodOther;
    }
    let place = place(packet, &ip, EthHdr::LEN, Direction::Egress);
    // No mark and no priority passes a veth: another program gave it that, for a reason that is not known here.
    let is_marked = config.bypass_time != 0 && place.kind == Kind::Data && packet.mark_and_priority() != (0, 0);
    if place.kind == Kind::Other || is_marked {
        return Event::PodOther;
    }
    match bypass(packet, config, &ip, &place) {
        Some(event) => event,
        None => {
            let tag = place.key.tag(config.vni);
            packet.write_note(Note::FromPod(tag));
            if config.bypass_time != 0 {
                originals::leave(packet, &ip, &place, tag, Direction::Egress);
            }
            Event::PodViaStack
        }
    }
}

/// Sends a packet past the stack, where it may go. [`None`] where it may not, and is as it was.
#[inline(always)]
fn bypass(packet: &Packet<'_>, config: &Config, ip: &Ipv4Hdr, place: &Place) -> Option<Event> {
    let event = place
        .fresh_egress(packet, config, flows::now(), ip.tos)
        .and_then(|sent_as| bypass_as(packet, config, ip, place, sent_as));
    // Others keep what they came with.
    if event.is_none() && config.bypass_time != 0 && place.kind == Kind::Data {
        packet.set_mark_and_priority((0, 0));
    }
    event
}

#[inline(always)]
fn bypass_as(packet: &Packet<'_>, config: &Config, ip: &Ipv4Hdr, place: &Place, sent_as: FlowKey) -> Option<Event> {
    let peer = (Leases { config }).peer_of(u32::from_be_bytes(sent_as.remote))?;
    let vtep = peer.vtep;
    if vtep.ifindex == 0 {
        return None;
    }
    // The stack tells the sender what is too big, or too old.
    let len = packet.len() - EthHdr::LEN as u32;
    let largest = match packet.segment_size() {
        0 => len,
        size => Ipv4Hdr::LEN as u32 + place.header_len + size,
    };
    if largest > vtep.path_mtu(config.mtu) || ip.ttl <= 1 {
        return None;
    }
    let translation = Translation::between(&place.key, &sent_as);
    if peer.is_direct(config) {
        return Some(bypass_directly(packet, ip, place, &sent_as, peer));
    }
    if config.has(Config::NO_TUNNEL) {
        return None;
    }
    let chosen = choose(packet, config, vtep)?;
    let inner = make_room(packet, config, len, ip.tos).ok()?;
    let mut header = Encapsulation {
        outer: copy_header(&vtep.header),
        inner: NextHop::new(ip, &sent_as, Direction::Egress, &translation),
    };
    header.outer.complete(&inner);
    if packet.write(&header).is_err() {
        return Some(Event::PodEncapFailed);
    }
    if let Some(translation) = translation {
        if translation.adjust(packet, ip.proto, OuterHeader::LEN + Ipv4Hdr::LEN).is_err() {
            return Some(Event::PodEncapFailed);
        }
        send_chosen(packet, peer, chosen);
        return Some(Event::PodTranslated);
    }
    Some(match send_chosen(packet, peer, chosen) {
        Sent::Resolved => Event::PodEncapsulated,
        Sent::ToNeighbour => Event::PodEncapsulatedNeighbour,
    })
}

#[inline(always)]
fn bypass_directly(packet: &Packet<'_>, ip: &Ipv4Hdr, place: &Place, sent_as: &FlowKey, peer: Peer) -> Event {
    let translation = Translation::between(&place.key, sent_as);
    let (next_hop, device) = peer.vtep.header.underlay_macs();
    let header = Framed::new(next_hop, device, NextHop::new(ip, sent_as, Direction::Egress, &translation));
    if packet.write(&header).is_err() {
        return Event::PodEncapFailed;
    }
    if let Some(translation) = translation
        && translation.adjust(packet, ip.proto, EthHdr::LEN + Ipv4Hdr::LEN).is_err()
    {
        return Event::PodEncapFailed;
    }
    send(packet, peer, EthHdr::LEN);
    Event::PodDirect
}

/// What goes in front of a packet that bypasses the stack, and the beginning of the packet itself.
#[repr(C)]
#[derive(Clone, Copy)]
struct Encapsulation {
    outer: OuterHeader,
    inner: NextHop,
}

// SAFETY: #[repr(C)] of bytes.
unsafe impl Header for Encapsulation {}

/// Makes room for the outer header of a packet with `len` bytes of IPv4; what that header depends on.
#[inline(always)]
fn make_room(packet: &Packet<'_>, config: &Config, len: u32, tos: u8) -> Result<Inner, NoRoom> {
    // The hash is that of the inner flow, so it is taken while the inner headers are the only ones.
    let source_port = config.source_ports.of(packet.flow_hash());
    packet.make_room()?;
    Ok(Inner { len, tos, id: random_id(), source_port })
}

/// Has the kernel choose where the way is the flow's own: the device, or 0 where there is nothing to choose. [`None`] where
/// there is no way. Before the tunnel's headers are there: the hash is that of the packet inside.
#[inline(always)]
fn choose(packet: &Packet<'_>, config: &Config, vtep: &Vtep) -> Option<u32> {
    if vtep.flags & Vtep::BY_FLOW == 0 {
        return Some(0);
    }
    let source_port = config.source_ports.of(packet.flow_hash());
    let device = routes::choose(packet.context(), vtep.address, source_port, packet.mark_and_priority().0);
    (device != 0).then_some(device)
}

#[inline(always)]
fn send_chosen(packet: &Packet<'_>, peer: Peer, chosen: u32) -> Sent {
    if chosen == 0 {
        return send(packet, peer, OuterHeader::LEN);
    }
    count_sent(peer.id, packet.len() - OuterHeader::LEN as u32);
    packet.forget_note();
    packet.redirect_to_chosen(chosen);
    Sent::ToNeighbour
}

/// How a packet is sent.
enum Sent {
    Resolved,
    ToNeighbour,
}

#[inline(always)]
fn send(packet: &Packet<'_>, Peer { id, vtep }: Peer, headers_len: usize) -> Sent {
    count_sent(id, packet.len() - headers_len as u32);
    // It is for programs of this host only.
    packet.forget_note();
    if vtep.flags & Vtep::RESOLVED != 0 {
        packet.redirect(vtep.ifindex);
        Sent::Resolved
    } else {
        packet.redirect_to_neighbour(vtep.ifindex, vtep.next_hop);
        Sent::ToNeighbour
    }
}
