//! The maps, asked as the lease table.

use aya_ebpf::maps::lpm_trie::Key;
use flannel_common::{
    admission,
    maps::{Config, Vtep},
};

use crate::maps::{PREFIXES, SUBNETS, VTEP_ADDRESSES, VTEPS};

pub(crate) struct Leases<'a> {
    pub(crate) config: &'a Config,
}

impl Leases<'_> {
    /// The peer that leases the subnet of `address` (host order).
    #[inline(always)]
    pub(crate) fn peer_of(&self, address: u32) -> Option<&'static Vtep> {
        let id = self
            .config
            .slot(address)
            .and_then(|slot| SUBNETS.get(slot))
            .copied()
            .filter(|id| *id != 0)
            .or_else(|| PREFIXES.get(Key::new(32, address.to_be_bytes())).copied())?;
        VTEPS.get(id)
    }
}

impl admission::Leases for Leases<'_> {
    #[inline(always)]
    fn vtep_of(&self, address: u32) -> Option<u32> {
        self.peer_of(address).map(|vtep| vtep.address)
    }

    #[inline(always)]
    fn is_vtep(&self, address: u32) -> bool {
        // SAFETY: the value is only tested for presence.
        unsafe { VTEP_ADDRESSES.get(address.to_be_bytes()) }.is_some()
    }
}
