//! The maps, asked as the lease table.

use aya_ebpf::maps::lpm_trie::Key;
use flannel_common::{
    admission,
    admission::Owner,
    maps::{Config, Vtep, heard_time},
};

use crate::maps::{ACCEPTED, CONFIG, HEARD, PREFIXES, SUBNETS, UNSET, VTEP_ADDRESSES, VTEPS};

/// A peer, and its number.
#[derive(Clone, Copy)]
pub(crate) struct Peer {
    pub(crate) id: u32,
    pub(crate) vtep: &'static Vtep,
}

impl Peer {
    /// Whether packets to it are sent without encapsulation.
    #[inline(always)]
    pub(crate) fn is_direct(self, config: &Config) -> bool {
        // The flag is a constant to the verifier.
        if !config.has(Config::DIRECT) || self.vtep.flags & Vtep::ON_LINK == 0 {
            return false;
        }
        if config.has(Config::NO_TUNNEL) {
            return true;
        }
        // SAFETY: a map value lives as long as the program; a mixture of two of its states is one of them or leads to the tunnel.
        HEARD.get_ptr(self.id).is_some_and(|heard| unsafe { heard.read_volatile() }.is_direct())
    }
}

pub(crate) struct Leases<'a> {
    pub(crate) config: &'a Config,
}

impl Leases<'_> {
    /// The peer that leases the subnet of `address` (host order).
    #[inline(always)]
    pub(crate) fn peer_of(&self, address: u32) -> Option<Peer> {
        let id = self.id_of(address)?;
        Some(Peer { id, vtep: VTEPS.get(id)? })
    }

    #[inline(always)]
    fn id_of(&self, address: u32) -> Option<u32> {
        id_at(self.config.slot(address), address)
    }
}

#[inline(always)]
fn id_at(slot: Option<u32>, address: u32) -> Option<u32> {
    slot.and_then(|slot| SUBNETS.get(slot))
        .copied()
        .filter(|id| *id != 0)
        .or_else(|| PREFIXES.get(Key::new(32, address.to_be_bytes())).copied())
}

/// The VTEP with a number.
#[inline(always)]
pub(crate) fn vtep(id: u32) -> Option<&'static Vtep> {
    VTEPS.get(id)
}

#[inline(always)]
fn owner(id: u32) -> Option<Owner> {
    let vtep = VTEPS.get(id)?;
    Some(Owner { id, address: vtep.address, vtep_mac: vtep.header.peer_vtep_mac() })
}

/// Who leases the subnet of an address (host order), where the stack has no room for all constants.
#[inline(always)]
pub(crate) fn owner_of(address: u32) -> Option<Owner> {
    owner(id_of_address(address)?)
}

/// The same as a peer.
#[inline(always)]
pub(crate) fn peer_of_address(address: u32) -> Option<Peer> {
    let id = id_of_address(address)?;
    Some(Peer { id, vtep: VTEPS.get(id)? })
}

#[inline(always)]
fn id_of_address(address: u32) -> Option<u32> {
    let config = (&raw const CONFIG).cast::<Config>();
    // SAFETY: the constants are a `Config`. Volatile, as in `Global::load`: they are patched at load.
    let (network, slot_shift, slots) = unsafe {
        (
            (&raw const (*config).network).read_volatile(),
            (&raw const (*config).slot_shift).read_volatile(),
            (&raw const (*config).slots).read_volatile(),
        )
    };
    let grid = Config { network, slot_shift, slots, ..UNSET };
    id_at(grid.slot(address), address)
}

/// The number of `flannel.<VNI>`.
#[inline(always)]
pub(crate) fn overlay_device() -> u32 {
    VTEPS.get(Vtep::OVERLAY_DEVICE).map_or(0, |device| device.ifindex)
}

/// Notes that a VTEP is alive. One store in a second: between these, all CPUs share a clean cache line.
#[inline(always)]
pub(crate) fn note_heard(id: u32, now: u64) {
    if let Some(heard) = HEARD.get_ptr_mut(id) {
        // SAFETY: a map value lives as long as the program.
        note(unsafe { &raw mut (*heard).last }, heard_time(now));
    }
}

/// The same of a packet that was not encapsulated.
#[inline(always)]
pub(crate) fn note_heard_directly(id: u32, now: u64) {
    if let Some(heard) = HEARD.get_ptr_mut(id) {
        // SAFETY: as above.
        let (last, direct) = unsafe { (&raw mut (*heard).last, &raw mut (*heard).direct) };
        note(direct, heard_time(now));
        note(last, heard_time(now));
    }
}

#[inline(always)]
fn note(time: *mut u32, now: u32) {
    // SAFETY: part of a map value. Other CPUs may store at the same time; each stores a whole, aligned word.
    unsafe {
        if time.read_volatile() != now {
            time.write_volatile(now);
        }
    }
}

impl admission::Leases for Leases<'_> {
    #[inline(always)]
    fn owner_of(&self, address: u32) -> Option<Owner> {
        owner(self.id_of(address)?)
    }

    #[inline(always)]
    fn vtep(&self, address: u32) -> Option<u32> {
        // SAFETY: a map value lives as long as the program. If another's comes in its place meanwhile, that one is noted as
        // heard.
        unsafe { VTEP_ADDRESSES.get(address.to_be_bytes()) }.copied()
    }

    #[inline(always)]
    fn is_accepted(&self, address: u32) -> bool {
        ACCEPTED.get(Key::new(32, address.to_be_bytes())).is_some()
    }
}
