//! Decapsulation: `from_underlay`, which lets tunnel packets through to the kernel's vxlan device, or past the stack into
//! the pod; and before it `xdp_decap`, where that pays.
//!
//! What `xdp_decap` takes out of the tunnel is aggregated by the kernel as the pods' own packets are, comes to
//! `from_underlay` with a mark, and is then put into the pod, or handed to `flannel.<VNI>` as received.

use flannel_common::{
    event::{Event, Outcome},
    flow::Ingress,
    maps::{Config, Decapsulated},
    vxlan,
};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::{IpProto, Ipv4Hdr},
};

use crate::{
    admit::{Admitted, admit, admit_directly},
    flows::{self, Direction, Place, place},
    frame::Frame,
    leases::overlay_device,
    maps::CONFIG,
    next_hop::{Framed, NextHop, Translation},
    originals,
    packet::{Headers, Note, Packet, Unframed},
};

#[inline(always)]
pub(crate) fn from_underlay(packet: &Packet<'_>) -> Event {
    let config = CONFIG.load();
    if packet.has_mark(Decapsulated::of(config.vni)) {
        return decapsulated(packet, &config);
    }
    if !packet.is_ipv4() || !packet.is_for_device() {
        return Event::NotTunnel;
    }
    let now = flows::now();
    let is_framed = config.underlay_header_len != 0;
    if is_framed && let Some(event) = directly(packet, &config, now) {
        return event;
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
    Event::Admitted
}

/// A packet for a pod of this host that a peer on the same link sent without encapsulation (`DirectRouting`): put into the pod,
/// or handed in as if it had come in a tunnel, since the way back to where it is from leads out of `flannel.<VNI>` (`rp_filter`).
/// [`None`] for any other, which is as it was.
#[inline(always)]
fn directly(packet: &Packet<'_>, config: &Config, now: u64) -> Option<Event> {
    let ip = packet.header::<Ipv4Hdr>(EthHdr::LEN)?;
    if !config.is_local(u32::from_be_bytes(ip.dst_addr)) {
        return None;
    }
    let peer = match admit_directly(packet, config, &ip, now)? {
        Ok(peer) => peer,
        Err(event) => return Some(event),
    };
    let place = place(packet, &ip, EthHdr::LEN, Direction::Ingress);
    if let Some(known) = place.fresh_ingress(config, now)
        && ip.ttl > 1
    {
        return Some(match deliver(packet, &place, &known) {
            Event::DecapFailed => Event::DecapFailed,
            _ => Event::DirectDelivered,
        });
    }
    if config.has(Config::NO_TUNNEL) {
        let tag = place.key.tag(config.vni);
        packet.write_note(Note::Received(tag));
        if config.bypass_time != 0 {
            originals::leave(packet, &ip, &place, tag, Direction::Ingress);
        }
        return Some(Event::DirectReceived);
    }
    // As it would come out of the tunnel: the device takes what is for its MAC.
    let (dst_addr, src_addr) = (config.vtep_mac, peer.header.peer_vtep_mac());
    if packet.write(&EthHdr { dst_addr, src_addr, ether_type: EtherType::Ipv4 as u16 }).is_err() {
        return Some(Event::DecapFailed);
    }
    packet.write_note(Note::Admitted(place.key.tag(config.vni)));
    packet.redirect_to_ingress(overlay_device());
    Some(Event::DirectHandedIn)
}

/// Whether the packet at `ip_offset` is admitted, and its flow.
#[inline(always)]
fn look(packet: &impl Headers, config: &Config, ip_offset: usize, now: u64) -> Result<(Admitted, Place), Event> {
    let admitted = admit(packet, config, ip_offset, now)?;
    let place = place(packet, &admitted.inner, admitted.inner_offset, Direction::Ingress);
    Ok((admitted, place))
}

/// What `xdp_decap` took out of the tunnel.
#[inline(always)]
fn decapsulated(packet: &Packet<'_>, config: &Config) -> Event {
    if packet.is_of_vlan() {
        return Event::DecapForeignVlan;
    }
    let Some(inner) = packet.header::<Ipv4Hdr>(EthHdr::LEN) else {
        return Event::DecapFailed;
    };
    let place = place(packet, &inner, EthHdr::LEN, Direction::Ingress);
    if let Some(known) = place.fresh_ingress(config, flows::now())
        && inner.ttl > 1
    {
        return deliver(packet, &place, &known);
    }
    packet.write_note(Note::Admitted(place.key.tag(config.vni)));
    packet.redirect_to_ingress(overlay_device());
    Event::HandedIn
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
