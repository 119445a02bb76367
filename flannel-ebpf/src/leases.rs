//! The maps, asked as the lease table.

use aya_ebpf::maps::lpm_trie::Key;
use flannel_common::{
    admission,
    admission::Owner,
    maps::{Config, Vtep, heard_time},
};

use crate::maps::{HEARD, PREFIXES, SUBNETS, VTEP_ADDRESSES, VTEPS};

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
        self.config
            .slot(address)
            .and_then(|slot| SUBNETS.get(slot))
            .copied()
            .filter(|id| *id != 0)
            .or_else(|| PREFIXES.get(Key::new(32, address.to_be_bytes())).copied())
    }
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
        let id = self.id_of(address)?;
        Some(Owner { id, address: VTEPS.get(id)?.address })
    }

    #[inline(always)]
    fn is_vtep(&self, address: u32) -> bool {
        // SAFETY: the value is only tested for presence.
        unsafe { VTEP_ADDRESSES.get(address.to_be_bytes()) }.is_some()
    }
}
