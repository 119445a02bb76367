//! `from_underlay`: which packets of the tunnel's port are let through to the kernel's vxlan device.

use flannel_common::{admission, event::Event};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::{IpProto, Ipv4Hdr},
    udp::UdpHdr,
    vxlan::VxlanHdr,
};

use crate::{
    leases::{Leases, note_heard},
    maps::CONFIG,
    packet::{Note, Packet},
};

/// The fragment offset within `Ipv4Hdr::frags` (RFC 791).
const FRAGMENT_OFFSET_MASK: u16 = 0x1fff;

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
    // Whatever it says was not written here.
    packet.forget_notes(config.vni);
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
    match admission::admit(&config, &Leases { config: &config }, outer_source, &inner_ethernet, &inner) {
        Ok(sender) => {
            note_heard(sender);
            packet.write_note(Note::Admitted, config.vni);
            Event::Admitted
        }
        Err(reason) => reason,
    }
}
