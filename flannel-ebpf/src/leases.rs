//! The maps, asked as the lease table.

use aya_ebpf::maps::lpm_trie::Key;
use flannel_common::{
    admission,
    admission::Owner,
    maps::{Config, Vtep, heard_time},
};

use crate::maps::{ACCEPTED, CONFIG, HEARD, PREFIXES, SUBNETS, UNSET, VTEP_ADDRESSES, VTEPS};

pub(crate) struct Leases<'a> {
    pub(crate) config: &'a Config,
}

impl Leases<'_> {
    /// The peer that leases the subnet of `address` (host order).
    #[inline(always)]
    pub(crate) fn peer_of(&self, address: u32) -> Option<&'static Vtep> {
        VTEPS.get(self.id_of(address)?)
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

#[inline(always)]
fn owner(id: u32) -> Option<Owner> {
    let vtep = VTEPS.get(id)?;
    Some(Owner { id, address: vtep.address, vtep_mac: vtep.header.peer_vtep_mac() })
}

/// Who leases the subnet of an address (host order), where the stack has no room for all constants.
#[inline(always)]
pub(crate) fn owner_of(address: u32) -> Option<Owner> {
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
    owner(id_at(grid.slot(address), address)?)
}

/// The number of `flannel.<VNI>`.
#[inline(always)]
pub(crate) fn overlay_device() -> u32 {
    VTEPS.get(Vtep::OVERLAY_DEVICE).map_or(0, |device| device.ifindex)
}

/// Notes that a VTEP is alive. One store in a second: between these, all CPUs share a clean cache line.
#[inline(always)]
pub(crate) fn note_heard(id: u32, now: u64) {
    let now = heard_time(now);
    if let Some(heard) = HEARD.get_ptr_mut(id) {
        // SAFETY: a map value lives as long as the program. Other CPUs may store at the same time; each stores a whole,
        // aligned word.
        unsafe {
            if heard.read_volatile() != now {
                heard.write_volatile(now);
            }
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
