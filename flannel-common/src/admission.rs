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
    /// The VTEP that leases the subnet of `address` (host order).
    fn owner_of(&self, address: u32) -> Option<Owner>;
    /// Whether any lease names this VTEP address (host order).
    fn is_vtep(&self, address: u32) -> bool;
}

/// Who leases a subnet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its number in [`VTEPS`](crate::maps::VTEPS).
    pub id: u32,
    /// Its VTEP address, host order.
    pub address: u32,
}

/// The verdict on a tunnel packet of our VNI to our VTEP: the number of the VTEP that may send it, or the reason
/// against it.
///
/// `outer_source` is the sender's VTEP address in host order.
///
/// # Errors
/// The event that the packet is dropped with.
#[inline(always)]
pub fn admit(
    config: &Config,
    leases: &impl Leases,
    outer_source: u32,
    inner_ethernet: &EthHdr,
    inner: &Ipv4Hdr,
) -> Result<u32, Event> {
    if inner_ethernet.ether_type != EtherType::Ipv4 as u16 || inner.version() != 4 {
        return Err(Event::InnerNotIpv4);
    }
    let source = u32::from_be_bytes(inner.src_addr);
    let destination = u32::from_be_bytes(inner.dst_addr);
    let is_group_mac = inner_ethernet.dst_addr[0] & 1 != 0;
    if is_group_mac || !is_unicast(source) || !is_unicast(destination) || config.is_local_broadcast(destination) {
        return Err(Event::InnerNotUnicast);
    }
    // Whatever a lease claims: nobody else sends from our subnet.
    let sender = match leases.owner_of(source).filter(|_| !config.is_local(source)) {
        Some(owner) if owner.address == outer_source => owner.id,
        _ if leases.is_vtep(outer_source) => return Err(Event::SpoofedInnerSource),
        _ => return Err(Event::UnknownVtep),
    };
    if inner_ethernet.dst_addr != config.vtep_mac {
        return Err(Event::InnerForeignMac);
    }
    if !config.is_local(destination) {
        return Err(Event::ForeignInnerDestination);
    }
    Ok(sender)
}
