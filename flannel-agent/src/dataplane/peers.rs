//! The peers in the maps, brought to what is wanted by differences.
//!
//! A VTEP that packets may be on their way to is never rewritten: its value goes into a free entry, the slots are
//! turned to it one by one with 4-byte stores, and the old entry is free again after a while.

mod verify;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use aya::{
    Ebpf,
    maps::{
        Array, HashMap as BpfHashMap, IterableMap as _, Map, MapData, MapError, PerCpuArray, PerCpuValues,
        lpm_trie::{Key, LpmTrie},
    },
    util::nr_cpus,
};
use flannel_common::maps::{
    Config, HEARD, HEARD_UNIT_SHIFT, Heard, PREFIXES, SUBNETS, TRAFFIC, Traffic, VTEP_ADDRESSES, VTEPS, Vtep,
    heard_time,
};
use ipnet::Ipv4Net;
use nix::time::{ClockId, clock_gettime};

use super::{DataplaneError, PinDirectory, batch, pins::Predecessor, take_map};

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
    heard: Array<MapData, Heard>,
    traffic: PerCpuArray<MapData, Traffic>,
    /// The id that each subnet has in `SUBNETS` or `PREFIXES`.
    published: BTreeMap<Ipv4Net, u32>,
    /// The VTEPs in use.
    entries: HashMap<u32, Entry>,
    /// Their ids.
    id_of: HashMap<Vtep, u32>,
    /// How many subnets each address in `VTEP_ADDRESSES` has.
    address_users: HashMap<u32, usize>,
    ids: FreeIds,
    /// The entry that names `flannel.<VNI>`.
    overlay_device: Vtep,
    /// The first slot that is looked at next.
    window: u32,
    /// When the maps were made in the place of others that can't be read: who was heard before is not known.
    blind_since: Option<Instant>,
}

/// A peer on the same link that is not known to send without encapsulation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unheard {
    /// What it leases.
    pub subnet: Ipv4Net,
    /// How it is reached.
    pub vtep: Vtep,
    /// When it was heard.
    pub heard: Heard,
}

/// A VTEP in use.
struct Entry {
    vtep: Vtep,
    /// How many subnets refer to it.
    users: usize,
}

impl PeerMaps {
    /// Takes the maps over with what an earlier agent left in them.
    pub(super) fn open(ebpf: &mut Ebpf, config: &Config, predecessor: Predecessor) -> Result<Self, DataplaneError> {
        let subnets: Array<_, u32> =
            take_map(ebpf, SUBNETS)?.try_into().map_err(DataplaneError::map("open", SUBNETS))?;
        let prefixes: LpmTrie<_, [u8; 4], u32> =
            take_map(ebpf, PREFIXES)?.try_into().map_err(DataplaneError::map("open", PREFIXES))?;
        let vteps: Array<_, Vtep> = take_map(ebpf, VTEPS)?.try_into().map_err(DataplaneError::map("open", VTEPS))?;
        let addresses =
            take_map(ebpf, VTEP_ADDRESSES)?.try_into().map_err(DataplaneError::map("open", VTEP_ADDRESSES))?;
        let heard = take_map(ebpf, HEARD)?.try_into().map_err(DataplaneError::map("open", HEARD))?;

        let traffic = take_map(ebpf, TRAFFIC)?.try_into().map_err(DataplaneError::map("open", TRAFFIC))?;

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
        let mut entries: HashMap<u32, Entry> = HashMap::new();
        let mut address_users = HashMap::new();
        for id in published.values() {
            let vtep = match entries.get_mut(id) {
                Some(entry) => {
                    entry.users += 1;
                    entry.vtep
                }
                None => {
                    let vtep = vteps.get(id, 0).map_err(DataplaneError::map("read", VTEPS))?;
                    entries.insert(*id, Entry { vtep, users: 1 });
                    vtep
                }
            };
            *address_users.entry(vtep.address).or_insert(0) += 1;
        }
        let id_of = entries.iter().map(|(id, entry)| (entry.vtep, *id)).collect();
        let ids = FreeIds::new(vteps.len(), |id| entries.contains_key(&id));
        let mut maps = Self {
            config: *config,
            subnets,
            prefixes,
            vteps,
            addresses,
            heard,
            traffic,
            published,
            entries,
            id_of,
            address_users,
            ids,
            overlay_device: Vtep::UNUSED,
            window: 0,
            blind_since: (predecessor == Predecessor::Lost).then(Instant::now),
        };
        maps.overlay_device = maps.vteps.get(&Vtep::OVERLAY_DEVICE, 0).map_err(DataplaneError::map("read", VTEPS))?;
        maps.correct_addresses()?;
        Ok(maps)
    }

    /// Takes note of the number of `flannel.<VNI>`.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn set_overlay_device(&mut self, ifindex: u32) -> Result<(), DataplaneError> {
        let device = Vtep { ifindex, ..Vtep::UNUSED };
        if self.overlay_device == device {
            // What somebody else writes there is found, and told, by `verify`.
            return Ok(());
        }
        self.overlay_device = device;
        self.vteps.set(Vtep::OVERLAY_DEVICE, device, 0).map_err(DataplaneError::map("write", VTEPS))
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
        for (subnet, vtep) in desired {
            self.set(*subnet, vtep)?;
        }
        let gone: Vec<_> = self.published.keys().filter(|subnet| !desired.contains_key(subnet)).copied().collect();
        gone.into_iter().try_for_each(|subnet| self.withdraw(subnet))
    }

    /// A subnet is leased by this VTEP from now on.
    ///
    /// # Errors
    /// [`DataplaneError::Map`] or [`DataplaneError::Full`]; the subnet is then as it was.
    pub fn set(&mut self, subnet: Ipv4Net, vtep: &Vtep) -> Result<(), DataplaneError> {
        let before = self.published.get(&subnet).copied();
        let id = self.id_for(vtep, before)?;
        if before == Some(id) {
            return Ok(());
        }
        let address = vtep.address.to_be_bytes();
        self.addresses.insert(address, id, 0).map_err(DataplaneError::map("write", VTEP_ADDRESSES))?;
        match grid_slot(&self.config, subnet) {
            Some(slot) => self.subnets.set(slot, id, 0).map_err(DataplaneError::map("write", SUBNETS))?,
            None => self.prefixes.insert(&key(subnet), id, 0).map_err(DataplaneError::map("write", PREFIXES))?,
        }
        self.published.insert(subnet, id);
        *self.address_users.entry(vtep.address).or_insert(0) += 1;
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.users += 1;
        }
        before.map_or(Ok(()), |before| self.give_up(before))
    }

    /// A subnet is leased by nobody from now on.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn withdraw(&mut self, subnet: Ipv4Net) -> Result<(), DataplaneError> {
        let Some(id) = self.published.get(&subnet).copied() else { return Ok(()) };
        match grid_slot(&self.config, subnet) {
            Some(slot) => self.subnets.set(slot, 0, 0).map_err(DataplaneError::map("write", SUBNETS))?,
            None => {
                absent_is_fine(self.prefixes.remove(&key(subnet))).map_err(DataplaneError::map("write", PREFIXES))?
            }
        }
        self.published.remove(&subnet);
        self.give_up(id)
    }

    /// How long ago a packet from the VTEP of a subnet was admitted; [`None`] where never, or where nobody leases it. Where
    /// an agent before this one knew and this one can't read it, every VTEP was heard when this one began. As exact as the unit of the map, about a second.
    ///
    /// # Errors
    /// [`DataplaneError::Map`] and [`DataplaneError::Clock`].
    pub fn silence_of(&self, subnet: Ipv4Net) -> Result<Option<Duration>, DataplaneError> {
        let unknown = self.blind_since.map(|since| since.elapsed());
        let Some(id) = self.published.get(&subnet) else { return Ok(unknown) };
        let heard = self.heard.get(id, 0).map_err(DataplaneError::map("read", HEARD))?.last;
        if heard == 0 {
            return Ok(unknown);
        }
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_err(DataplaneError::Clock)?;
        let units = heard_time(Duration::from(now).as_nanos() as u64).saturating_sub(heard);
        Ok(Some(Duration::from_nanos(u64::from(units) << HEARD_UNIT_SHIFT)))
    }

    /// The peers on the same link that are not known to send without encapsulation.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn unheard_on_link(&self) -> Result<Vec<Unheard>, DataplaneError> {
        let Some(most) = self.entries.keys().max() else { return Ok(Vec::new()) };
        let heard: Vec<Heard> = batch::read(self.heard.map(), 0, most + 1)
            .map_err(|source| DataplaneError::map("read", HEARD)(source.into()))?;
        let unheard = self.published.iter().filter_map(|(subnet, id)| {
            let Entry { vtep, .. } = self.entries.get(id)?;
            let heard = *heard.get(*id as usize)?;
            let is_known = heard.last != 0 && heard.is_direct();
            let is_unheard = vtep.flags & Vtep::ON_LINK != 0 && !is_known;
            is_unheard.then_some(Unheard { subnet: *subnet, vtep: *vtep, heard })
        });
        Ok(unheard.collect())
    }

    /// The id of a VTEP, a new one where it has none. That inherits when the host of `before` was last heard, where it
    /// is the same host.
    fn id_for(&mut self, vtep: &Vtep, before: Option<u32>) -> Result<u32, DataplaneError> {
        if let Some(id) = self.id_of.get(vtep) {
            return Ok(*id);
        }
        let full = DataplaneError::Full { used: self.entries.len(), capacity: self.vteps.len() };
        let id = self.ids.take(Instant::now()).ok_or(full)?;
        let same_host = before.filter(|id| self.entries.get(id).is_some_and(|old| old.vtep.address == vtep.address));
        let heard = same_host.map_or(Ok(Heard::default()), |before| self.heard.get(&before, 0));
        let written = heard
            .and_then(|heard| self.heard.set(id, heard, 0))
            .map_err(DataplaneError::map("write", HEARD))
            .and_then(|()| self.inherit_traffic(id, same_host))
            .and_then(|()| self.vteps.set(id, vtep, 0).map_err(DataplaneError::map("write", VTEPS)));
        if let Err(error) = written {
            self.ids.release(id, Instant::now());
            return Err(error);
        }
        self.entries.insert(id, Entry { vtep: *vtep, users: 0 });
        self.id_of.insert(*vtep, id);
        Ok(id)
    }

    /// A new id goes on counting where the one before was; what is counted under that one from now on is lost.
    fn inherit_traffic(&mut self, id: u32, before: Option<u32>) -> Result<(), DataplaneError> {
        if id >= self.traffic.len() {
            return Ok(());
        }
        let counted = match before.filter(|before| *before < self.traffic.len()) {
            Some(before) => self.traffic.get(&before, 0).map_err(DataplaneError::map("read", TRAFFIC))?,
            None => {
                let cpus = nr_cpus().map_err(|(_, source)| DataplaneError::map("write", TRAFFIC)(source.into()))?;
                let nothing = PerCpuValues::try_from(vec![Traffic::default(); cpus]);
                nothing.map_err(|source| DataplaneError::map("write", TRAFFIC)(source.into()))?
            }
        };
        self.traffic.set(id, counted, 0).map_err(DataplaneError::map("write", TRAFFIC))
    }

    /// One subnet less refers to an id.
    fn give_up(&mut self, id: u32) -> Result<(), DataplaneError> {
        let Some(entry) = self.entries.get_mut(&id) else { return Ok(()) };
        entry.users = entry.users.saturating_sub(1);
        let (vtep, users) = (entry.vtep, entry.users);
        if users == 0 {
            self.entries.remove(&id);
            self.id_of.remove(&vtep);
            self.ids.release(id, Instant::now());
        }
        match self.address_users.get_mut(&vtep.address) {
            Some(left) if *left > 1 => {
                *left -= 1;
                // The address may be another's of the same host, with a new MAC or beside it.
                if users == 0 {
                    self.correct_address(vtep.address)?;
                }
            }
            _ => {
                self.address_users.remove(&vtep.address);
                absent_is_fine(self.addresses.remove(&vtep.address.to_be_bytes()))
                    .map_err(DataplaneError::map("write", VTEP_ADDRESSES))?;
            }
        }
        Ok(())
    }

    /// Has an address in `VTEP_ADDRESSES` lead to a VTEP that has it, after one that had it is given up.
    fn correct_address(&mut self, address: u32) -> Result<(), DataplaneError> {
        let has_it = |entry: &Entry| entry.vtep.address == address;
        let id = self.addresses.get(&address.to_be_bytes(), 0).ok();
        if id.and_then(|id| self.entries.get(&id)).is_some_and(has_it) {
            return Ok(());
        }
        let Some((id, _)) = self.entries.iter().find(|(_, entry)| has_it(entry)) else { return Ok(()) };
        self.addresses.insert(address.to_be_bytes(), id, 0).map_err(DataplaneError::map("write", VTEP_ADDRESSES))
    }

    /// Brings `VTEP_ADDRESSES` to the published VTEPs, where an earlier agent ended between the two. How many it wrote.
    fn correct_addresses(&mut self) -> Result<usize, DataplaneError> {
        let mut wrong = 0;
        let present: HashMap<[u8; 4], u32> =
            self.addresses.iter().collect::<Result<_, _>>().map_err(DataplaneError::map("read", VTEP_ADDRESSES))?;
        let ids: HashMap<u32, u32> = self.entries.iter().map(|(id, entry)| (entry.vtep.address, *id)).collect();
        for (address, id) in ids {
            let found = present.get(&address.to_be_bytes()).and_then(|id| self.entries.get(id));
            if found.is_none_or(|found| found.vtep.address != address) {
                let written = self.addresses.insert(address.to_be_bytes(), id, 0);
                written.map_err(DataplaneError::map("write", VTEP_ADDRESSES))?;
                wrong += 1;
            }
        }
        for address in present.into_keys() {
            if !self.address_users.contains_key(&u32::from_be_bytes(address)) {
                absent_is_fine(self.addresses.remove(&address))
                    .map_err(DataplaneError::map("write", VTEP_ADDRESSES))?;
                wrong += 1;
            }
        }
        Ok(wrong)
    }
}

/// The grid of a dataplane whose agent may be gone.
pub struct PinnedSubnets(Array<MapData, u32>);

impl PinnedSubnets {
    /// Opens the pinned map.
    ///
    /// # Errors
    /// [`DataplaneError::Map`] where there is none.
    pub fn open(pins: &PinDirectory) -> Result<Self, DataplaneError> {
        let map = pins.open(SUBNETS)?;
        Ok(Self(Map::Array(map).try_into().map_err(DataplaneError::map("open", SUBNETS))?))
    }

    /// Whether a slot has a peer.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn has(&self, slot: u32) -> Result<bool, DataplaneError> {
        self.0.get(&slot, 0).map(|id| id != 0).map_err(DataplaneError::map("read", SUBNETS))
    }

    /// How many slots have one.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn count(&self) -> Result<usize, DataplaneError> {
        (0..self.0.len()).try_fold(0, |count, slot| Ok(count + usize::from(self.has(slot)?)))
    }
}

pub(super) fn absent_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
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

/// The ids that no slot refers to. The lowest comes first, since only so many are counted, and none within the quarantine.
struct FreeIds {
    free: BTreeSet<u32>,
    /// The longest unused first.
    quarantined: VecDeque<(u32, Instant)>,
}

impl FreeIds {
    /// All ids below `capacity` that have no value; 0 means nobody and is never handed out.
    fn new(capacity: u32, is_used: impl Fn(u32) -> bool) -> Self {
        Self { free: (1..capacity).filter(|id| !is_used(*id)).collect(), quarantined: VecDeque::new() }
    }

    fn take(&mut self, now: Instant) -> Option<u32> {
        let is_over = |(_, released): &mut (u32, Instant)| now.duration_since(*released) >= QUARANTINE;
        while let Some((id, _)) = self.quarantined.pop_front_if(is_over) {
            self.free.insert(id);
        }
        self.free.pop_first()
    }

    fn release(&mut self, id: u32, now: Instant) {
        self.quarantined.push_back((id, now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_not_reused_within_the_quarantine() {
        let start = Instant::now();
        let mut ids = FreeIds::new(3, |_| false);
        assert_eq!((ids.take(start), ids.take(start), ids.take(start)), (Some(1), Some(2), None));
        ids.release(2, start);
        assert_eq!(ids.take(start + QUARANTINE / 2), None);
        ids.release(1, start + QUARANTINE / 2);
        assert_eq!(ids.take(start + QUARANTINE), Some(2));
        ids.release(2, start + QUARANTINE);
        assert_eq!(ids.take(start + 3 * QUARANTINE), Some(1), "the lowest");
    }
}
