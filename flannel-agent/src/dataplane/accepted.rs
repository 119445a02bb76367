//! The prefixes that the operator has the programs accept beside the leases.

use std::collections::BTreeSet;

use aya::maps::{
    Map, MapData,
    lpm_trie::{Key, LpmTrie},
};
use flannel_common::maps::ACCEPTED;
use ipnet::Ipv4Net;

use super::{Dataplane, DataplaneError, PinDirectory, peers::absent_is_fine};

/// A map of prefixes.
pub(super) type Prefixes = LpmTrie<MapData, [u8; 4], u32>;

/// The prefixes that a dataplane accepts whose agent may be gone.
///
/// # Errors
/// [`DataplaneError::Map`] where there is none.
pub fn pinned_accepted(pins: &PinDirectory) -> Result<Vec<Ipv4Net>, DataplaneError> {
    let map = pins.open(ACCEPTED)?;
    let map: Prefixes = Map::LpmTrie(map).try_into().map_err(DataplaneError::map("open", ACCEPTED))?;
    let mut prefixes = Vec::new();
    for key in map.keys() {
        let key = key.map_err(DataplaneError::map("read", ACCEPTED))?;
        prefixes.extend(Ipv4Net::new(key.data().into(), key.prefix_len() as u8));
    }
    Ok(prefixes)
}

impl Dataplane {
    /// Brings the map of accepted prefixes to these. How many entries it wrote or removed.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn accept(&mut self, prefixes: &[Ipv4Net]) -> Result<usize, DataplaneError> {
        bring_to(&mut self.accepted, ACCEPTED, prefixes)
    }
}

/// Brings a map of prefixes to these. How many entries it wrote or removed.
pub(super) fn bring_to<'a>(
    map: &mut Prefixes,
    name: &'static str,
    prefixes: impl IntoIterator<Item = &'a Ipv4Net>,
) -> Result<usize, DataplaneError> {
    let mut missing: BTreeSet<Ipv4Net> = prefixes.into_iter().map(Ipv4Net::trunc).collect();
    let mut foreign = Vec::new();
    for key in map.keys() {
        let key = key.map_err(DataplaneError::map("read", name))?;
        let prefix = Ipv4Net::new(key.data().into(), key.prefix_len() as u8);
        if !prefix.is_ok_and(|prefix| missing.remove(&prefix)) {
            foreign.push(key);
        }
    }
    for prefix in &missing {
        let key = Key::new(u32::from(prefix.prefix_len()), prefix.addr().octets());
        map.insert(&key, 1, 0).map_err(DataplaneError::map("write", name))?;
    }
    for key in &foreign {
        absent_is_fine(map.remove(key)).map_err(DataplaneError::map("write", name))?;
    }
    Ok(missing.len() + foreign.len())
}
