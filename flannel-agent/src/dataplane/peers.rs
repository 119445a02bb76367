//! The peers in the maps, brought to what is wanted by differences.
//!
//! A VTEP that packets may be on their way to is never rewritten: its value goes into a free entry, the slots are
//! turned to it one by one with 4-byte stores, and the old entry is free again after a while.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use aya::{
    Ebpf,
    maps::{
        Array, HashMap as BpfHashMap, MapData, MapError,
        lpm_trie::{Key, LpmTrie},
    },
};
use flannel_common::maps::{Config, PREFIXES, SUBNETS, VTEP_ADDRESSES, VTEPS, Vtep};
use ipnet::Ipv4Net;

use super::{DataplaneError, take_map};

/// What the maps should say: who leases each subnet.
pub type DesiredPeers = BTreeMap<Ipv4Net, Vtep>;

/// For how long an entry that nothing refers to is not used again. A program run takes microseconds.
const QUARANTINE: Duration = Duration::from_secs(1);

/// The maps that hold the peers, with what is in them.
pub struct PeerMaps {
    config: Config,
    subnets: Array<MapData, u32>,
    prefixes: LpmTrie<MapData, [u8; 4], u32>,
    vteps: Array<MapData, Vtep>,
    addresses: BpfHashMap<MapData, [u8; 4], u32>,
    /// The id that each subnet has in `SUBNETS` or `PREFIXES`.
    published: BTreeMap<Ipv4Net, u32>,
    /// The value of each id in use.
    values: HashMap<u32, Vtep>,
    ids: FreeIds,
}

impl PeerMaps {
    /// Takes the maps over with what an earlier agent left in them.
    pub(super) fn open(ebpf: &mut Ebpf, config: &Config) -> Result<Self, DataplaneError> {
        let subnets: Array<_, u32> =
            take_map(ebpf, SUBNETS)?.try_into().map_err(DataplaneError::map("open", SUBNETS))?;
        let prefixes: LpmTrie<_, [u8; 4], u32> =
            take_map(ebpf, PREFIXES)?.try_into().map_err(DataplaneError::map("open", PREFIXES))?;
        let vteps: Array<_, Vtep> = take_map(ebpf, VTEPS)?.try_into().map_err(DataplaneError::map("open", VTEPS))?;
        let addresses =
            take_map(ebpf, VTEP_ADDRESSES)?.try_into().map_err(DataplaneError::map("open", VTEP_ADDRESSES))?;

        let mut published = BTreeMap::new();
        for slot in 0..config.slots {
            let id = subnets.get(&slot, 0).map_err(DataplaneError::map("read", SUBNETS))?;
            if id != 0 {
                published.insert(subnet_of(config, slot), id);
            }
        }
        for entry in prefixes.iter() {
            let (key, id) = entry.map_err(DataplaneError::map("read", PREFIXES))?;
            if let Ok(subnet) = Ipv4Net::new(key.data().into(), key.prefix_len() as u8) {
                published.insert(subnet, id);
            }
        }
        let mut values = HashMap::new();
        for id in published.values() {
            values.insert(*id, vteps.get(id, 0).map_err(DataplaneError::map("read", VTEPS))?);
        }
        let ids = FreeIds::new(vteps.len(), &values);
        Ok(Self { config: *config, subnets, prefixes, vteps, addresses, published, values, ids })
    }

    /// How many subnets have a peer.
    pub fn len(&self) -> usize {
        self.published.len()
    }

    /// Whether there are no peers.
    pub fn is_empty(&self) -> bool {
        self.published.is_empty()
    }

    /// Brings the maps to what is wanted. New and changed peers come first, then what is gone goes. On an error the
    /// maps are between the two, and the next call goes on from there.
    ///
    /// # Errors
    /// [`DataplaneError::Map`] or [`DataplaneError::Full`].
    pub fn sync(&mut self, desired: &DesiredPeers) -> Result<(), DataplaneError> {
        let mut id_of: HashMap<Vtep, u32> = self.values.iter().map(|(id, vtep)| (*vtep, *id)).collect();
        for (subnet, vtep) in desired {
            let id = match id_of.get(vtep) {
                Some(id) => *id,
                None => {
                    let full = DataplaneError::Full { wanted: desired.len(), capacity: self.vteps.len() };
                    let id = self.ids.take(Instant::now()).ok_or(full)?;
                    self.vteps.set(id, vtep, 0).map_err(DataplaneError::map("write", VTEPS))?;
                    self.values.insert(id, *vtep);
                    id_of.insert(*vtep, id);
                    id
                }
            };
            if self.published.get(subnet) != Some(&id) {
                self.publish(*subnet, id)?;
            }
        }
        let gone: Vec<_> = self.published.keys().filter(|subnet| !desired.contains_key(subnet)).copied().collect();
        for subnet in gone {
            self.withdraw(subnet)?;
        }
        self.sync_addresses()?;
        self.release_unused();
        Ok(())
    }

    fn publish(&mut self, subnet: Ipv4Net, id: u32) -> Result<(), DataplaneError> {
        match grid_slot(&self.config, subnet) {
            Some(slot) => self.subnets.set(slot, id, 0).map_err(DataplaneError::map("write", SUBNETS))?,
            None => self.prefixes.insert(&key(subnet), id, 0).map_err(DataplaneError::map("write", PREFIXES))?,
        }
        self.published.insert(subnet, id);
        Ok(())
    }

    fn withdraw(&mut self, subnet: Ipv4Net) -> Result<(), DataplaneError> {
        match grid_slot(&self.config, subnet) {
            Some(slot) => self.subnets.set(slot, 0, 0).map_err(DataplaneError::map("write", SUBNETS))?,
            None => {
                absent_is_fine(self.prefixes.remove(&key(subnet))).map_err(DataplaneError::map("write", PREFIXES))?
            }
        }
        self.published.remove(&subnet);
        Ok(())
    }

    /// The addresses of all published VTEPS, and no others.
    fn sync_addresses(&mut self) -> Result<(), DataplaneError> {
        let mut wanted: HashMap<[u8; 4], u32> = self
            .published
            .values()
            .filter_map(|id| self.values.get(id).map(|vtep| (vtep.address.to_be_bytes(), *id)))
            .collect();
        let present: Vec<_> =
            self.addresses.keys().collect::<Result<_, _>>().map_err(DataplaneError::map("read", VTEP_ADDRESSES))?;
        for address in present {
            if wanted.remove(&address).is_none() {
                absent_is_fine(self.addresses.remove(&address))
                    .map_err(DataplaneError::map("write", VTEP_ADDRESSES))?;
            }
        }
        for (address, id) in wanted {
            self.addresses.insert(address, id, 0).map_err(DataplaneError::map("write", VTEP_ADDRESSES))?;
        }
        Ok(())
    }

    fn release_unused(&mut self) {
        let used: BTreeSet<u32> = self.published.values().copied().collect();
        let Self { values, ids, .. } = self;
        values.retain(|id, _| {
            let is_used = used.contains(id);
            if !is_used {
                ids.release(*id, Instant::now());
            }
            is_used
        });
    }
}

fn absent_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The slot of a subnet that fits the grid.
fn grid_slot(config: &Config, subnet: Ipv4Net) -> Option<u32> {
    let fits = u32::from(subnet.prefix_len()) + config.slot_shift == 32;
    config.slot(subnet.network().to_bits()).filter(|_| fits)
}

fn subnet_of(config: &Config, slot: u32) -> Ipv4Net {
    let network = Ipv4Addr::from_bits(config.network + (slot << config.slot_shift));
    // The shift is 32 less a prefix length.
    Ipv4Net::new_assert(network, (32 - config.slot_shift) as u8)
}

fn key(subnet: Ipv4Net) -> Key<[u8; 4]> {
    Key::new(u32::from(subnet.prefix_len()), subnet.network().octets())
}

/// The ids that no slot refers to. The longest unused comes first, and none within the quarantine.
struct FreeIds {
    free: VecDeque<(u32, Option<Instant>)>,
}

impl FreeIds {
    /// All ids below `capacity` that have no value; 0 means nobody and is never handed out.
    fn new(capacity: u32, values: &HashMap<u32, Vtep>) -> Self {
        Self { free: (1..capacity).filter(|id| !values.contains_key(id)).map(|id| (id, None)).collect() }
    }

    fn take(&mut self, now: Instant) -> Option<u32> {
        let (_, released) = self.free.front()?;
        if released.is_some_and(|released| now.duration_since(released) < QUARANTINE) {
            return None;
        }
        self.free.pop_front().map(|(id, _)| id)
    }

    fn release(&mut self, id: u32, now: Instant) {
        self.free.push_back((id, Some(now)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_not_reused_within_the_quarantine() {
        let start = Instant::now();
        let mut ids = FreeIds::new(3, &HashMap::new());
        assert_eq!((ids.take(start), ids.take(start), ids.take(start)), (Some(1), Some(2), None));
        ids.release(2, start);
        assert_eq!(ids.take(start + QUARANTINE / 2), None);
        assert_eq!(ids.take(start + QUARANTINE), Some(2));
    }
}
