//! `from_underlay`: which packets of the tunnel's port are let through, to the kernel's vxlan device or past the stack
//! into the pod.

use flannel_common::{admission, event::Event, flow::Flow};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::{IpProto, Ipv4Hdr},
    udp::UdpHdr,
    vxlan::VxlanHdr,
};

use crate::{
    encap::{HOP_LEN, next_hop_header},
    flows::{self, Direction, place},
    leases::{Leases, note_heard},
    maps::CONFIG,
    packet::{Note, Packet},
};

/// The fragment offset within `Ipv4Hdr::frags` (RFC 791).
const FRAGMENT_OFFSET_MASK: u16 = 0x1fff;
/// Explicit congestion notification within the TOS byte, and its mark (RFC 3168).
const ECN_MASK: u8 = 0b11;
const ECN_CE: u8 = 0b11;

#[inline(always)]
pub(crate) fn from_underlay(packet: &Packet<'_>) -> Event {
    let config = CONFIG.load();
    if !packet.is_ipv4() || !packet.is_for_device() {
        return Event::NotTunnel;
    }
    // The header is absent or Ethernet's: two constants rather than one number for the verifier to bound.
    let ip_offset = if config.underlay_header_len == 0 { 0 } else { EthHdr::LEN };

    let Some(ip) = packet.header::<Ipv4Hdr>(ip_offset) else {
        return Event::NotTunnel;
    };
    if ip.proto != IpProto::Udp as u8 {
        return Event::NotTunnel;
    }
    if u32::from_be_bytes(ip.dst_addr) != config.vtep_address {
        return Event::NotTunnel;
    }
    if u16::from_be_bytes(ip.frags) & FRAGMENT_OFFSET_MASK != 0 {
        return Event::UnderlayFragment;
    }
    let port = config.port.to_be_bytes();
    if ip.vihl != 0x45 {
        let udp = packet.header_at::<UdpHdr>(ip_offset + usize::from(ip.ihl()));
        return match udp {
            Some(udp) if udp.dst == port => Event::OuterOptions,
            _ => Event::NotTunnel,
        };
    }
    let udp_offset = ip_offset + Ipv4Hdr::LEN;
    let Some(udp) = packet.header::<UdpHdr>(udp_offset) else {
        return Event::NotTunnel;
    };
    if udp.dst != port {
        return Event::NotTunnel;
    }

    let vxlan_offset = udp_offset + UdpHdr::LEN;
    let Some(vxlan) = packet.header::<VxlanHdr>(vxlan_offset) else {
        return Event::TunnelTruncated;
    };
    if !vxlan.vni_present() || vxlan.vni() != config.vni {
        return Event::ForeignVni;
    }
    let inner_offset = vxlan_offset + VxlanHdr::LEN;
    let Some(inner_ethernet) = packet.header::<EthHdr>(inner_offset) else {
        return Event::TunnelTruncated;
    };
    if inner_ethernet.ether_type != EtherType::Ipv4 as u16 {
        return Event::InnerNotIpv4;
    }
    let Some(inner) = packet.header::<Ipv4Hdr>(inner_offset + EthHdr::LEN) else {
        return Event::TunnelTruncated;
    };
    let outer_source = u32::from_be_bytes(ip.src_addr);
    let sender = match admission::admit(&config, &Leases { config: &config }, outer_source, &inner_ethernet, &inner) {
        Ok(sender) => sender,
        Err(reason) => return reason,
    };
    let now = flows::now();
    note_heard(sender, now);
    let place = place(packet, &inner, inner_offset + EthHdr::LEN, Direction::Ingress);
    // A mark of congestion outside has to be carried inside (RFC 6040): the kernel does.
    let is_marked = ip.tos & ECN_MASK == ECN_CE;
    if let Some(flow) = place.fresh(&config, Direction::Ingress, now)
        && !is_marked
        && inner.ttl > 1
        && ip_offset != 0
        && packet.remove_tunnel().is_ok()
    {
        return deliver(packet, &inner, &flow);
    }
    packet.write_note(Note::Admitted(place.key.tag(config.vni)));
    Event::Admitted
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
