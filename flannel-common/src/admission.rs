//! Which tunnel packets a host takes from the underlay.
//!
//! VXLAN has no authentication (RFC 7348 section 7), so what is admitted is decided by the leases: a VTEP may send
//! only what comes from the subnet that it leases, and only to the subnet that the receiver leases.

use network_types::{
    eth::{EthHdr, EtherType},
    ip::Ipv4Hdr,
};

use crate::{event::Event, maps::Config, packet::is_unicast};

/// The lease table as the admission needs it: BPF maps in the programs, collections in a model on the host.
pub trait Leases {
    /// The address (host order) of the VTEP that leases the subnet of `address`.
    fn vtep_of(&self, address: u32) -> Option<u32>;
    /// Whether any lease names this VTEP address (host order).
    fn is_vtep(&self, address: u32) -> bool;
}

/// The verdict on a tunnel packet of our VNI to our VTEP: [`Event::Admitted`] or the reason against it.
///
/// `outer_source` is the sender's VTEP address in host order.
#[inline(always)]
pub fn admit(
    config: &Config,
    leases: &impl Leases,
    outer_source: u32,
    inner_ethernet: &EthHdr,
    inner: &Ipv4Hdr,
) -> Event {
    if inner_ethernet.ether_type != EtherType::Ipv4 as u16 || inner.version() != 4 {
        return Event::InnerNotIpv4;
    }
    let source = u32::from_be_bytes(inner.src_addr);
    let destination = u32::from_be_bytes(inner.dst_addr);
    let is_group_mac = inner_ethernet.dst_addr[0] & 1 != 0;
    if is_group_mac || !is_unicast(source) || !is_unicast(destination) || config.is_local_broadcast(destination) {
        return Event::InnerNotUnicast;
    }
    match leases.vtep_of(source) {
        Some(vtep) if vtep == outer_source => {}
        _ if leases.is_vtep(outer_source) => return Event::SpoofedInnerSource,
        _ => return Event::UnknownVtep,
    }
    if inner_ethernet.dst_addr != config.vtep_mac {
        return Event::InnerForeignMac;
    }
    if !config.is_local(destination) {
        return Event::ForeignInnerDestination;
    }
    Event::Admitted
}
