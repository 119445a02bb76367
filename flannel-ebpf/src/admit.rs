//! What a packet on the underlay is, and whether its sender may send it: the same for TC and XDP.

use flannel_common::{
    admission::{self, is_refused_by_leases},
    event::Event,
    maps::{Config, Vtep},
    packet::Mac,
    vxlan,
};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::{IpProto, Ipv4Hdr},
    udp::UdpHdr,
    vxlan::{VXLAN_I_FLAG_MASK, VxlanHdr},
};

use crate::{
    leases::{Leases, Peer, note_heard, note_heard_directly, peer_of_address},
    packet::{Headers, Packet},
    routes::is_routed,
};

/// The fragment offset, and whether there are more, within `Ipv4Hdr::frags` (RFC 791).
const FRAGMENT_OFFSET_MASK: u16 = 0x1fff;
const MORE_FRAGMENTS: u16 = 0x2000;
/// Explicit congestion notification within the TOS byte, and its mark (RFC 3168).
const ECN_MASK: u8 = 0b11;
const ECN_CE: u8 = 0b11;

/// A tunnel packet that was let through.
pub(crate) struct Admitted {
    /// The number of the VTEP that sent it, or 0 where the leases refuse it.
    pub(crate) sender: u32,
    /// The packet in it.
    pub(crate) inner: Ipv4Hdr,
    /// Where that begins, from the first byte on.
    pub(crate) inner_offset: usize,
    /// All bytes from the outer IPv4 header on.
    pub(crate) outer_len: u16,
    /// By the kernel's routes, where the leases refuse it.
    pub(crate) is_by_route: bool,
    /// The kernel has to see it: it knows more than the leases; a fragment, to be reassembled; one that met congestion on its
    /// way, for that to be carried
    /// inside (RFC 6040); one with a VXLAN header of a later day.
    pub(crate) needs_kernel: bool,
}

/// Looks at the IPv4 packet at `ip_offset`, and takes note of its sender where it is admitted.
#[inline(always)]
pub(crate) fn admit(packet: &impl Headers, config: &Config, ip_offset: usize, now: u64) -> Result<Admitted, Event> {
    let ip = packet.header::<Ipv4Hdr>(ip_offset).ok_or(Event::NotTunnel)?;
    if ip.proto != IpProto::Udp as u8 {
        return Err(Event::NotTunnel);
    }
    if u32::from_be_bytes(ip.dst_addr) != config.vtep_address {
        return Err(Event::NotTunnel);
    }
    let frags = u16::from_be_bytes(ip.frags);
    if frags & FRAGMENT_OFFSET_MASK != 0 {
        return Err(Event::UnderlayFragment);
    }
    let port = config.port.to_be_bytes();
    if ip.vihl != 0x45 {
        let udp = packet.header_at::<UdpHdr>(ip_offset + usize::from(ip.ihl()));
        return Err(match udp {
            Some(udp) if udp.dst == port => Event::OuterOptions,
            _ => Event::NotTunnel,
        });
    }
    let udp_offset = ip_offset + Ipv4Hdr::LEN;
    let udp = packet.header::<UdpHdr>(udp_offset).ok_or(Event::NotTunnel)?;
    if udp.dst != port {
        return Err(Event::NotTunnel);
    }

    let vxlan_offset = udp_offset + UdpHdr::LEN;
    let header = packet.header::<VxlanHdr>(vxlan_offset).ok_or(Event::TunnelTruncated)?;
    if !header.vni_present() || header.vni() != config.vni {
        return Err(Event::ForeignVni);
    }
    // The kernel's device refuses what has any other bit set.
    let is_plain = header.flags == VXLAN_I_FLAG_MASK && header._reserved1 == [0; 3] && header._reserved2 == 0;
    let ethernet_offset = vxlan_offset + VxlanHdr::LEN;
    let inner_ethernet = packet.header::<EthHdr>(ethernet_offset).ok_or(Event::TunnelTruncated)?;
    if inner_ethernet.ether_type != EtherType::Ipv4 as u16 {
        return Err(Event::InnerNotIpv4);
    }
    let inner_offset = ethernet_offset + EthHdr::LEN;
    let inner = packet.header::<Ipv4Hdr>(inner_offset).ok_or(Event::TunnelTruncated)?;
    let outer_len = u16::from_be_bytes(ip.tot_len);
    let is_fragment = frags & MORE_FRAGMENTS != 0;
    let is_cut = ip_offset as u32 + u32::from(outer_len) > packet.len()
        || !is_fragment && inner.tot_len() > outer_len.saturating_sub(vxlan::OVERHEAD);
    if is_cut && !packet.is_aggregate() {
        return Err(Event::TunnelTruncated);
    }
    let outer_source = u32::from_be_bytes(ip.src_addr);
    let verdict = || admission::admit(config, &Leases { config }, outer_source, &inner_ethernet, &inner);
    let (sender, is_by_route) = match verdict() {
        Ok(sender) => {
            note_heard(sender, now);
            (sender, false)
        }
        Err(event) if is_refused_by_leases(event) => {
            let source = u32::from_be_bytes(inner.src_addr);
            let destination = u32::from_be_bytes(inner.dst_addr);
            let [a, b, c, d, e, f] = inner_ethernet.dst_addr;
            let is_to_vtep = u8::from(inner_ethernet.dst_addr == config.vtep_mac);
            let is_to_pod = u8::from(config.is_local(destination));
            let frame = u64::from_ne_bytes([a, b, c, d, e, f, is_to_vtep, is_to_pod]);
            if config.is_local(source) || !is_routed(packet.context(), outer_source, source, destination, frame) {
                // Asked once more: the verifier would follow each reason that is kept through the whole call.
                note_heard(verdict()?, now);
            }
            (0, true)
        }
        Err(event) => return Err(event),
    };
    Ok(Admitted {
        sender,
        inner,
        inner_offset,
        outer_len,
        is_by_route,
        needs_kernel: is_by_route || is_fragment || ip.tos & ECN_MASK == ECN_CE || !is_plain,
    })
}

/// Stands for somebody with an address of a peer's lease and another MAC than that peer's. No VTEP has this number.
pub(crate) const FOREIGN: u32 = u32::MAX;

/// The number of the peer on the same link that sent a packet for this host's pods without encapsulation, which is noted; 0 for
/// what is nobody's, or no such packet: the kernel decides; or [`FOREIGN`]. The peer's MAC is known as its neighbour's; where it is
/// not known yet, nothing speaks against the sender.
#[inline(always)]
pub(crate) fn admit_directly(packet: &Packet<'_>, config: &Config, now: u64) -> u32 {
    let Some(ip) = packet.header::<Ipv4Hdr>(EthHdr::LEN) else { return 0 };
    let (source, destination) = (u32::from_be_bytes(ip.src_addr), u32::from_be_bytes(ip.dst_addr));
    let is_for_pod = config.is_local(destination) && !config.is_local_broadcast(destination);
    if !is_for_pod || config.is_local(source) {
        return 0;
    }
    let Some(ethernet) = packet.header::<EthHdr>(0) else { return 0 };
    if ethernet.dst_addr[0] & 1 != 0 {
        return 0;
    }
    direct_sender(source, mac_as_number(ethernet.src_addr), packet.device(), now)
}

/// The number of the peer on the link of a device that an address (host order) and a MAC belong to, 0 for nobody, or [`FOREIGN`].
/// Not inlined: of all ways through it the verifier goes on with the answer only. Where the agent lacks CAP_PERFMON it would go on
/// with each, to more than a million instructions.
#[inline(never)]
fn direct_sender(source: u32, mac: u64, device: u32, now: u64) -> u32 {
    let Some(Peer { id, vtep }) = peer_of_address(source) else { return 0 };
    if vtep.flags & Vtep::ON_LINK == 0 || vtep.ifindex != device {
        return 0;
    }
    if vtep.flags & Vtep::HAS_MAC != 0 && mac_as_number(vtep.header.underlay_macs().0) != mac {
        return FOREIGN;
    }
    note_heard_directly(id, now);
    id
}

#[inline(always)]
const fn mac_as_number([a, b, c, d, e, f]: Mac) -> u64 {
    u64::from_ne_bytes([a, b, c, d, e, f, 0, 0])
}
