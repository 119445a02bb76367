//! Decapsulation: `from_underlay`, which puts what is in tunnel packets past the stack into the pod, hands it to `flannel.<VNI>` as
//! received, or lets them through to the kernel's vxlan device; and before it `xdp_decap`, where that pays.
//!
//! The kernel takes out of the tunnel what it has still to segment; what is not as a VTEP sends it outside, or has a checksum there
//! that is still to be added up; and all of it where nothing bypasses the stack, or packet rules are about tunnel packets.
//!
//! What `xdp_decap` takes out of the tunnel is aggregated by the kernel as the pods' own packets are, comes to
//! `from_underlay` with a mark, and is then put into the pod, or handed to `flannel.<VNI>` as received.

use core::array;

use flannel_common::{
    checksum,
    event::{Event, Outcome},
    flow::Ingress,
    maps::{Config, Decapsulated},
    vxlan,
};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::{IpProto, Ipv4Hdr},
    udp::UdpHdr,
};

use crate::{
    admit::{Admitted, FOREIGN, admit, admit_directly},
    count::count_received,
    flows::{self, Direction, Place, place},
    frame::Frame,
    leases::{overlay_device, vtep},
    maps::CONFIG,
    next_hop::{Framed, NextHop, Translation},
    originals,
    packet::{Headers, Note, Packet, Unframed},
};

/// Where a tunnel packet of an Ethernet link has its inner Ethernet header.
const INNER_ETHERNET: usize = vxlan::OVERHEAD as usize;

#[inline(always)]
pub(crate) fn from_underlay(packet: &Packet<'_>) -> Event {
    let config = CONFIG.load();
    let is_decapsulated = packet.has_mark(Decapsulated::of(config.vni));
    if is_decapsulated && packet.is_of_vlan() {
        return Event::DecapForeignVlan;
    }
    if !is_decapsulated && (!packet.is_ipv4() || !packet.is_for_device()) {
        return Event::NotTunnel;
    }
    let now = flows::now();
    let is_framed = config.underlay_header_len != 0;
    let may_be_direct = config.has(Config::DIRECT) && is_framed && !is_decapsulated;
    let direct_from = if may_be_direct { admit_directly(packet, &config, now) } else { 0 };
    if direct_from == FOREIGN {
        return Event::DirectForeignMac;
    }
    if direct_from != 0 {
        count_received(direct_from, packet.len() - EthHdr::LEN as u32);
    }
    if is_decapsulated || direct_from != 0 {
        return without_tunnel(packet, &config, direct_from, now);
    }
    if config.has(Config::NO_TUNNEL) {
        return Event::NotTunnel;
    }
    // One offset in two values would be a number in a register, which may not be added to a pointer into a packet where the
    // agent lacks CAP_PERFMON (`sanitize_ptr_alu`). The verifier leaves one of the two out.
    let looked =
        if is_framed { look(packet, &config, EthHdr::LEN, now) } else { look(&Unframed(packet), &config, 0, now) };
    let (admitted, place) = match looked {
        Ok(looked) => looked,
        Err(event) => return event,
    };
    if admitted.is_by_route {
        place.forget_turn(&config);
        packet.write_note(Note::Admitted(place.key.tag(config.vni)));
        return Event::AdmittedByRoute;
    }
    let inner = admitted.inner;
    // The kernel would go on segmenting it as a tunnel packet (`udp4_ufo_fragment`): what adjusts the room leaves the type.
    let is_stale = packet.is_gso() && inner.proto == IpProto::Udp as u8;
    if let Some(known) = place.fresh_ingress(&config, now)
        && !admitted.needs_kernel
        && !is_stale
        && inner.ttl > 1
        && is_framed
        && packet.remove_tunnel().is_ok()
    {
        return deliver(packet, &place, &known);
    }
    packet.write_note(Note::Admitted(place.key.tag(config.vni)));
    let is_left = config.bypass_time == 0 || config.has(Config::LEFT_IN_TUNNEL);
    // What is to be segmented goes on as a tunnel packet unless the kernel itself takes it out (`udp_gro_complete`).
    if is_left || admitted.needs_kernel || packet.is_gso() || !is_framed || !is_sound(packet) {
        return Event::Admitted;
    }
    hand_in(packet, &config)
}

/// Whether the kernel would find nothing wrong with the outer headers, nor have to add up the whole packet for that.
#[inline(always)]
fn is_sound(packet: &Packet<'_>) -> bool {
    let Some(ip) = packet.header::<[u8; Ipv4Hdr::LEN]>(EthHdr::LEN) else { return false };
    let Some(udp) = packet.header::<UdpHdr>(EthHdr::LEN + Ipv4Hdr::LEN) else { return false };
    let words: [u16; Ipv4Hdr::LEN / 2] = array::from_fn(|at| u16::from_ne_bytes([ip[2 * at], ip[2 * at + 1]]));
    let payload_len = u16::from_be(words[1]).wrapping_sub(Ipv4Hdr::LEN as u16);
    // In either byte order.
    checksum::complete(checksum::sum(words)) == 0 && u16::from_be_bytes(udp.len) == payload_len && udp.check == [0; 2]
}

/// Takes a packet out of the tunnel and hands it to `flannel.<VNI>` as received, as that device itself would: past the UDP socket
/// and what the stack does with the tunnel packet before that.
#[inline(always)]
fn hand_in(packet: &Packet<'_>, config: &Config) -> Event {
    let Some(inner) = packet.header::<EthHdr>(INNER_ETHERNET) else { return Event::Admitted };
    let header = EthHdr { dst_addr: config.vtep_mac, src_addr: inner.src_addr, ether_type: EtherType::Ipv4 as u16 };
    if packet.remove_tunnel().is_err() {
        return Event::Admitted;
    }
    if packet.write(&header).is_err() {
        return Event::DecapFailed;
    }
    packet.redirect_to_ingress(overlay_device());
    Event::HandedIn
}

/// Whether the packet at `ip_offset` is admitted, and its flow.
#[inline(always)]
fn look(packet: &impl Headers, config: &Config, ip_offset: usize, now: u64) -> Result<(Admitted, Place), Event> {
    let admitted = admit(packet, config, ip_offset, now)?;
    count_received(admitted.sender, packet.len() - admitted.inner_offset as u32);
    let place = place(packet, &admitted.inner, admitted.inner_offset, Direction::Ingress);
    Ok((admitted, place))
}

/// What `xdp_decap` took out of the tunnel, or a peer on the same link sent without one (`DirectRouting`): put into the pod, or
/// handed in as if it had come out of the tunnel here, since the way back to where it is from leads out of `flannel.<VNI>`
/// (`rp_filter`). `direct_from` is that peer's number, or 0. One piece for both: the verifier goes through it for each.
#[inline(always)]
fn without_tunnel(packet: &Packet<'_>, config: &Config, direct_from: u32, now: u64) -> Event {
    let Some(inner) = packet.header::<Ipv4Hdr>(EthHdr::LEN) else {
        return Event::DecapFailed;
    };
    let place = place(packet, &inner, EthHdr::LEN, Direction::Ingress);
    if let Some(known) = place.fresh_ingress(config, now)
        && inner.ttl > 1
    {
        return match deliver(packet, &place, &known) {
            Event::Delivered | Event::DeliveredTranslated if direct_from != 0 => Event::DirectDelivered,
            event => event,
        };
    }
    let tag = place.key.tag(config.vni);
    if config.has(Config::NO_TUNNEL) {
        packet.write_note(Note::Received(tag));
        if config.bypass_time != 0 {
            originals::leave(packet, &inner, &place, tag, Direction::Ingress);
        }
        return Event::DirectReceived;
    }
    packet.write_note(Note::Admitted(tag));
    if direct_from == 0 {
        packet.redirect_to_ingress(overlay_device());
        return Event::HandedIn;
    }
    let Some(peer) = vtep(direct_from) else {
        return Event::DecapFailed;
    };
    // As it would come out of the tunnel: the device takes what is for its MAC.
    let (dst_addr, src_addr) = (config.vtep_mac, peer.header.peer_vtep_mac());
    if packet.write(&EthHdr { dst_addr, src_addr, ether_type: EtherType::Ipv4 as u16 }).is_err() {
        return Event::DecapFailed;
    }
    packet.redirect_to_ingress(overlay_device());
    Event::DirectHandedIn
}

/// [`None`] for what is left to [`from_underlay`] as it is: that is no tunnel packet, or needs what only the kernel's packets
/// have.
#[inline(always)]
pub(crate) fn xdp_decap(frame: &Frame<'_>) -> Option<Event> {
    let config = CONFIG.load();
    if config.has(Config::LEFT_IN_TUNNEL) {
        return None;
    }
    let ethernet = frame.header::<EthHdr>(0)?;
    if ethernet.ether_type != EtherType::Ipv4 as u16 || ethernet.dst_addr != config.underlay_mac {
        return None;
    }
    let admitted = match admit(frame, &config, EthHdr::LEN, flows::now()) {
        Ok(admitted) => admitted,
        Err(event) => return (event.outcome() == Outcome::Drop).then_some(event),
    };
    // Generic XDP sees what the kernel has aggregated, and can't tell it how to segment that.
    let is_aggregate = u32::from(admitted.outer_len) > config.mtu + u32::from(vxlan::OVERHEAD);
    if admitted.needs_kernel || is_aggregate {
        return None;
    }
    frame.remove_tunnel(Decapsulated::of(config.vni)).ok()?;
    count_received(admitted.sender, frame.len() - EthHdr::LEN as u32);
    Some(Event::XdpDecapsulated)
}

/// Puts what was in the tunnel into the pod, as the stack did with the last one of its flow. Its header is read once more: octets
/// that are kept from before the tunnel was taken away take eight octets of the stack each, of which there are 512.
#[inline(always)]
fn deliver(packet: &Packet<'_>, place: &Place, known: &Ingress) -> Event {
    let Some(inner) = &packet.header::<Ipv4Hdr>(EthHdr::LEN) else {
        return Event::DecapFailed;
    };
    let translation = Translation::between(&place.key, &known.received_as);
    let next = NextHop::new(inner, &known.received_as, Direction::Ingress, &translation);
    let header = Framed::new(known.pod_mac, known.gateway_mac, next);
    if packet.write(&header).is_err() {
        return Event::DecapFailed;
    }
    let event = match translation {
        None => Event::Delivered,
        Some(translation) => match translation.adjust(packet, inner.proto, EthHdr::LEN + Ipv4Hdr::LEN) {
            Ok(()) => Event::DeliveredTranslated,
            Err(()) => return Event::DecapFailed,
        },
    };
    packet.redirect_to_peer(known.veth);
    event
}
