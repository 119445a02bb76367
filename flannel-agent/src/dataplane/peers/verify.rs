//! Comparing the maps with what was written into them, since no event tells of what somebody else writes there.

use std::ops::Range;

use aya::{
    Pod,
    maps::{IterableMap as _, MapData},
};
use flannel_common::maps::{PREFIXES, SUBNETS, VTEPS, Vtep};

use super::{PeerMaps, absent_is_fine, grid_slot, key};
use crate::dataplane::{DataplaneError, batch};

/// Entries that nobody asked for are read along where they are fewer than this between two that somebody did.
const GAP: u32 = 32;
/// How many slots that nobody leases are looked at each time.
const WINDOW: u32 = 4096;

impl PeerMaps {
    /// Writes the entries anew that are no longer what this process wrote, and clears some slots in turn that nobody
    /// leases. How many it wrote.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn verify(&mut self) -> Result<usize, DataplaneError> {
        // Entries before the slots that refer to them.
        Ok(self.verify_vteps()? + self.verify_slots()? + self.verify_prefixes()?)
    }

    fn verify_vteps(&mut self) -> Result<usize, DataplaneError> {
        let mut wanted: Vec<(u32, Vtep)> = self.entries.iter().map(|(id, entry)| (*id, entry.vtep)).collect();
        wanted.push((Vtep::OVERLAY_DEVICE, self.overlay_device));
        wanted.sort_unstable_by_key(|(id, _)| *id);
        let wrong = differences(self.vteps.map(), VTEPS, &wanted)?;
        for (id, vtep) in &wrong {
            self.vteps.set(*id, vtep, 0).map_err(DataplaneError::map("write", VTEPS))?;
        }
        Ok(wrong.len())
    }

    fn verify_slots(&mut self) -> Result<usize, DataplaneError> {
        let published = |(subnet, id): (&ipnet::Ipv4Net, &u32)| Some((grid_slot(&self.config, *subnet)?, *id));
        // Subnets and slots have the same order.
        let mut wanted: Vec<(u32, u32)> = self.published.iter().filter_map(published).collect();
        let window = self.window..(self.window + WINDOW).min(self.config.slots);
        self.window = if window.end >= self.config.slots { 0 } else { window.end };
        wanted.extend(window.map(|slot| (slot, 0)));
        // Where a slot is there twice, the first is that of a lease.
        wanted.sort_by_key(|(slot, _)| *slot);
        wanted.dedup_by_key(|(slot, _)| *slot);
        let wrong = differences(self.subnets.map(), SUBNETS, &wanted)?;
        for (slot, id) in &wrong {
            self.subnets.set(*slot, id, 0).map_err(DataplaneError::map("write", SUBNETS))?;
        }
        Ok(wrong.len())
    }

    fn verify_prefixes(&mut self) -> Result<usize, DataplaneError> {
        let mut wrong = 0;
        for (subnet, id) in self.published.iter().filter(|(subnet, _)| grid_slot(&self.config, **subnet).is_none()) {
            // A shorter prefix may answer in place of one that is gone. Where it has the same id, it is as good.
            if self.prefixes.get(&key(*subnet), 0).ok() != Some(*id) {
                let written = self.prefixes.insert(&key(*subnet), id, 0);
                written.map_err(DataplaneError::map("write", PREFIXES))?;
                wrong += 1;
            }
        }
        Ok(wrong)
    }

    /// The same for keys that should not be there, and for `VTEP_ADDRESSES`, which only names reasons.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn verify_keys(&mut self) -> Result<usize, DataplaneError> {
        let mut foreign = Vec::new();
        for found in self.prefixes.keys() {
            let found = found.map_err(DataplaneError::map("read", PREFIXES))?;
            let subnet = ipnet::Ipv4Net::new(found.data().into(), found.prefix_len() as u8).ok();
            if subnet.is_none_or(|subnet| !self.published.contains_key(&subnet)) {
                foreign.push(found);
            }
        }
        for found in &foreign {
            absent_is_fine(self.prefixes.remove(found)).map_err(DataplaneError::map("write", PREFIXES))?;
        }
        Ok(foreign.len() + self.correct_addresses()?)
    }
}

/// What of the wanted entries (ascending keys) the map has otherwise.
fn differences<V: Pod + PartialEq>(
    map: &MapData,
    name: &'static str,
    wanted: &[(u32, V)],
) -> Result<Vec<(u32, V)>, DataplaneError> {
    let mut wrong = Vec::new();
    for run in runs(wanted.iter().map(|(key, _)| *key)) {
        let entries = &wanted[run];
        let (Some((first, _)), Some((last, _))) = (entries.first(), entries.last()) else { continue };
        let found: Vec<V> = batch::read(map, *first, last - first + 1)
            .map_err(|error| DataplaneError::map("read", name)(aya::maps::MapError::IoError(error)))?;
        let is_wrong = |(key, value): &&(u32, V)| found.get((key - first) as usize) != Some(value);
        wrong.extend(entries.iter().filter(is_wrong).copied());
    }
    Ok(wrong)
}

/// Divides ascending keys where more than [`GAP`] are missing; as positions.
fn runs(keys: impl Iterator<Item = u32>) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut last = None;
    for (position, key) in keys.enumerate() {
        match (runs.last_mut(), last) {
            (Some(run), Some(last)) if key - last <= GAP => run.end = position + 1,
            _ => runs.push(position..position + 1),
        }
        last = Some(key);
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_together_where_few_are_missing() {
        assert!(runs([].into_iter()).is_empty());
        assert!(runs([0, 1, 2].into_iter()).into_iter().eq(std::iter::once(0..3)));
        assert_eq!(runs([5, 5 + GAP, 6 + 2 * GAP].into_iter()), [0..2, 2..3]);
    }
}
