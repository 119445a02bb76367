//! Decapsulation: `from_underlay`, which lets tunnel packets through to the kernel's vxlan device, or past the stack into
//! the pod; and before it `xdp_decap`, where that pays.
//!
//! What `xdp_decap` takes out of the tunnel is aggregated by the kernel as the pods' own packets are, comes to
//! `from_underlay` with a mark, and is then put into the pod, or handed to `flannel.<VNI>` as received.

use flannel_common::{
    event::{Event, Outcome},
    flow::Flow,
    maps::{Config, Decapsulated},
    vxlan,
};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::{IpProto, Ipv4Hdr},
};

use crate::{
    admit::admit,
    encap::{HOP_LEN, next_hop_header},
    flows::{self, Direction, place},
    frame::Frame,
    leases::overlay_device,
    maps::CONFIG,
    packet::{Headers as _, Note, Packet},
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
    // The header is absent or Ethernet's: two constants rather than one number for the verifier to bound.
    let ip_offset = if config.underlay_header_len == 0 { 0 } else { EthHdr::LEN };
    let now = flows::now();
    let admitted = match admit(packet, &config, ip_offset, now) {
        Ok(admitted) => admitted,
        Err(event) => return event,
    };
    let inner = admitted.inner;
    let place = place(packet, &inner, admitted.inner_offset, Direction::Ingress);
    // The kernel would go on segmenting it as a tunnel packet (`udp4_ufo_fragment`): what adjusts the room leaves the type.
    let is_stale = packet.is_gso() && inner.proto == IpProto::Udp as u8;
    if let Some(flow) = place.fresh(&config, Direction::Ingress, now)
        && !admitted.needs_kernel
        && !is_stale
        && inner.ttl > 1
        && ip_offset != 0
        && packet.remove_tunnel().is_ok()
    {
        return deliver(packet, &inner, &flow);
    }
    packet.write_note(Note::Admitted(place.key.tag(config.vni)));
    Event::Admitted
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
    if let Some(flow) = place.fresh(config, Direction::Ingress, flows::now())
        && inner.ttl > 1
    {
        return deliver(packet, &inner, &flow);
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

/// Puts what was in the tunnel into the pod, as the stack did with the last one of its flow.
#[inline(always)]
fn deliver(packet: &Packet<'_>, inner: &Ipv4Hdr, flow: &Flow) -> Event {
    let Flow { veth, pod_mac, gateway_mac, .. } = *flow;
    let mut header = [0; EthHdr::LEN + HOP_LEN];
    header[..6].copy_from_slice(&pod_mac);
    header[6..12].copy_from_slice(&gateway_mac);
    header[12..EthHdr::LEN].copy_from_slice(&(EtherType::Ipv4 as u16).to_ne_bytes());
    header[EthHdr::LEN..].copy_from_slice(&next_hop_header(inner));
    if packet.write(&header).is_err() {
        return Event::DecapFailed;
    }
    packet.redirect_to_peer(veth);
    Event::Delivered
}
