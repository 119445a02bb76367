//! Which tunnel packets a host takes from the underlay.
//!
//! VXLAN has no authentication (RFC 7348 section 7), so what is admitted is decided by the leases: a VTEP may send what
//! comes from the subnet that it leases, or from its own address, to the subnet that the receiver leases. Beside that
//! there are prefixes that the operator names, for what is behind hosts. An address that a lease covers is the
//! leaseholder's alone, and a VTEP's is that VTEP's, whatever else they are.
//!
//! Where leases and prefixes refuse a packet, the kernel's routes may know better: see [`is_routed`].

use network_types::{
    eth::{EthHdr, EtherType},
    ip::Ipv4Hdr,
};

use crate::{
    event::Event,
    maps::Config,
    packet::{Mac, is_unicast},
    vxlan::{NEXT_HOP_MAC, NEXT_HOPS},
};

/// The lease table as the admission needs it: BPF maps in the programs, collections in a model on the host.
pub trait Leases {
    /// The VTEP that leases the subnet of `address` (host order).
    fn owner_of(&self, address: u32) -> Option<Owner>;
    /// The number of the VTEP that has this address (host order).
    fn vtep(&self, address: u32) -> Option<u32>;
    /// Whether `address` (host order) is in a prefix that the operator has named.
    fn is_accepted(&self, address: u32) -> bool;
}

/// Who leases a subnet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its number in [`VTEPS`](crate::maps::VTEPS).
    pub id: u32,
    /// Its VTEP address, host order.
    pub address: u32,
    /// MAC of its vxlan device.
    pub vtep_mac: Mac,
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
    let sender = match leases.owner_of(source) {
        // Whatever a lease claims: nobody else sends from our subnet.
        Some(owner) if owner.address == outer_source && !config.is_local(source) => owner.id,
        owner => match leases.vtep(outer_source) {
            Some(id) if owner.is_none() && may_speak_for(config, leases, outer_source, source) => id,
            Some(_) => return Err(Event::SpoofedInnerSource),
            None => return Err(Event::UnknownVtep),
        },
    };
    if inner_ethernet.dst_addr != config.vtep_mac {
        return Err(Event::InnerForeignMac);
    }
    if !is_for_host(config, leases, destination) {
        return Err(Event::ForeignInnerDestination);
    }
    Ok(sender)
}

/// Whether a known VTEP may send from an address that nobody leases.
#[inline(always)]
fn may_speak_for(config: &Config, leases: &impl Leases, outer_source: u32, source: u32) -> bool {
    if config.is_local(source) || source == config.vtep_address {
        return false;
    }
    source == outer_source || leases.is_accepted(source) && leases.vtep(source).is_none()
}

/// Whether a destination is one of this host's pods, or behind it.
#[inline(always)]
fn is_for_host(config: &Config, leases: &impl Leases, destination: u32) -> bool {
    if config.is_local(destination) {
        return true;
    }
    leases.is_accepted(destination)
        && destination != config.vtep_address
        && leases.owner_of(destination).is_none()
        && leases.vtep(destination).is_none()
}

/// Whether an event is a refusal by lease table or constants, which may be of the past.
#[inline(always)]
pub const fn is_refused_by_leases(event: Event) -> bool {
    matches!(
        event,
        Event::UnknownVtep | Event::SpoofedInnerSource | Event::InnerForeignMac | Event::ForeignInnerDestination
    )
}

/// What matters of a packet that is refused by leases. Addresses in host order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The sender's VTEP address.
    pub outer_source: u32,
    /// The inner source, which is not in our subnet: that would be forged, whatever routes there are.
    pub source: u32,
    /// The inner frame's destination.
    pub mac: Mac,
    /// Whether that is what this host has in its lease.
    pub is_to_vtep: bool,
    /// Whether the inner destination is in our subnet.
    pub is_to_pod: bool,
}

/// What the kernel's routes say of the way back to an inner source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// There is no `flannel.<VNI>` of the number that an agent has noted.
    NoDevice,
    /// It leads out of `flannel.<VNI>`.
    Overlay {
        /// The next hop, host order.
        next_hop: u32,
        /// Its neighbour's MAC.
        next_hop_mac: Mac,
        /// The MAC that `flannel.<VNI>` has now.
        device_mac: Mac,
    },
    /// There is none, or it leads elsewhere.
    Other,
}

/// Whether the kernel's routes speak for a packet that is refused by leases.
///
/// Programs and maps stay when the agent goes. Where flannel's daemon serves the host from then on, nobody keeps the maps,
/// but flannel makes a neighbour and a route for each peer; and all routes of an agent lead to [`NEXT_HOP_MAC`]. So a way
/// back by another MAC is somebody else's (but not by one of [`NEXT_HOPS`], whoever changed its neighbour):
/// * to a next hop as the leases know it, with the leaseholder's MAC: then only the leaseholder may send what comes from
///   there, and only to pods. That is what is behind another host, by a route of the operator's.
/// * to any other: the leases know less than the kernel does, and it decides alone.
///
/// Also where the leases still fit: a route of somebody else's to a leased subnet is of one who serves this host by now,
/// with another lease of its own perhaps. What is for that one is the kernel's matter, too; and so is from where a packet of the
/// leaseholder's comes: a host keeps its MAC when it gets another address.
///
/// What is known of the packet is read where it is needed: programs keep it in a map, and have no stack for a copy.
#[inline(always)]
pub fn is_routed(owner_of: impl Fn(u32) -> Option<Owner>, refused: &Refused, way: &Way) -> bool {
    let Way::Overlay { next_hop, next_hop_mac, device_mac } = *way else {
        return matches!(way, Way::NoDevice);
    };
    if next_hop_mac == NEXT_HOP_MAC || NEXT_HOPS.contains(&next_hop) {
        return false;
    }
    let leaseholder = match owner_of(next_hop) {
        Some(owner) if owner.vtep_mac == next_hop_mac => owner.address,
        _ => return refused.mac == device_mac,
    };
    let source_owner = owner_of(refused.source).map(|owner| owner.address);
    if leaseholder != refused.outer_source && source_owner != Some(leaseholder) {
        return false;
    }
    if source_owner.is_some() {
        return refused.mac == device_mac;
    }
    refused.is_to_vtep && refused.is_to_pod
}
