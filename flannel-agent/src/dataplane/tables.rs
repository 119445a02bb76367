//! The pinned maps, asked for single entries as the programs ask them: for who explains what a program answers. Nothing is
//! written. (The programs' own lookups are in `flannel-ebpf/src/leases.rs`, `flows.rs` and `excluded.rs`.)

use std::net::Ipv4Addr;

use aya::{
    Pod,
    maps::{Array, HashMap as BpfHashMap, Map, MapData, MapError, lpm_trie::Key, lpm_trie::LpmTrie},
};
use flannel_common::{
    flow::{Flow, FlowKey},
    maps::{
        ACCEPTED, COUNTERS, Config, EXCLUDED, EXCLUDED_PORTS, FLOWS, HEARD, Heard, PODS, PREFIXES, SUBNETS,
        VTEP_ADDRESSES, VTEPS, Vtep, excluded_port,
    },
    packet::Mac,
};
use nix::libc::IPPROTO_UDP;

use super::{Capacity, DataplaneError, PinDirectory};

/// Where the VTEP of an address was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// In this slot of `SUBNETS`.
    Slot(u32),
    /// In `PREFIXES`.
    Prefix,
}

/// Who leases the subnet of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leased {
    /// Where that is noted.
    pub entry: Entry,
    /// The VTEP's number.
    pub id: u32,
}

/// The maps of a dataplane whose agent may be gone.
pub struct Tables {
    subnets: Array<MapData, u32>,
    prefixes: LpmTrie<MapData, [u8; 4], u32>,
    vteps: Array<MapData, Vtep>,
    addresses: BpfHashMap<MapData, [u8; 4], u32>,
    accepted: LpmTrie<MapData, [u8; 4], u32>,
    heard: Array<MapData, Heard>,
    flows: BpfHashMap<MapData, FlowKey, Flow>,
    pods: BpfHashMap<MapData, u32, Mac>,
    excluded: LpmTrie<MapData, [u8; 4], u32>,
    excluded_ports: Array<MapData, u64>,
    /// As large as they are.
    pub(super) capacity: Capacity,
    /// The kernel's number of `COUNTERS`, which every program has: by it one that uses these maps is known.
    pub(super) counters_id: u32,
}

impl Tables {
    /// Opens the pinned maps.
    ///
    /// # Errors
    /// [`DataplaneError::Map`] where there are none of this layout.
    pub fn open(pins: &PinDirectory) -> Result<Self, DataplaneError> {
        let map = |name| pins.open(name);
        let info = |name| map(name)?.info().map_err(DataplaneError::map("read", name));
        let (subnets, vteps) = (info(SUBNETS)?, info(VTEPS)?);
        let typed = DataplaneError::map;
        Ok(Self {
            subnets: Map::Array(map(SUBNETS)?).try_into().map_err(typed("open", SUBNETS))?,
            prefixes: Map::LpmTrie(map(PREFIXES)?).try_into().map_err(typed("open", PREFIXES))?,
            vteps: Map::Array(map(VTEPS)?).try_into().map_err(typed("open", VTEPS))?,
            addresses: Map::HashMap(map(VTEP_ADDRESSES)?).try_into().map_err(typed("open", VTEP_ADDRESSES))?,
            accepted: Map::LpmTrie(map(ACCEPTED)?).try_into().map_err(typed("open", ACCEPTED))?,
            heard: Map::Array(map(HEARD)?).try_into().map_err(typed("open", HEARD))?,
            flows: super::flows::open(pins)?,
            pods: Map::LruHashMap(map(PODS)?).try_into().map_err(typed("open", PODS))?,
            excluded: Map::LpmTrie(map(EXCLUDED)?).try_into().map_err(typed("open", EXCLUDED))?,
            excluded_ports: Map::Array(map(EXCLUDED_PORTS)?).try_into().map_err(typed("open", EXCLUDED_PORTS))?,
            capacity: Capacity { slots: subnets.max_entries(), vteps: vteps.max_entries() },
            counters_id: info(COUNTERS)?.id(),
        })
    }

    /// Who leases the subnet of an address; [`None`] for nobody.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn leaseholder(&self, config: &Config, address: Ipv4Addr) -> Result<Option<Leased>, DataplaneError> {
        if let Some(slot) = config.slot(address.to_bits())
            && let Some(id) = found(self.subnets.get(&slot, 0), SUBNETS)?.filter(|id| *id != 0)
        {
            return Ok(Some(Leased { entry: Entry::Slot(slot), id }));
        }
        let id = found(self.prefixes.get(&Key::new(32, address.octets()), 0), PREFIXES)?;
        Ok(id.map(|id| Leased { entry: Entry::Prefix, id }))
    }

    /// A peer by its number.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn vtep(&self, id: u32) -> Result<Option<Vtep>, DataplaneError> {
        found(self.vteps.get(&id, 0), VTEPS)
    }

    /// The number of a VTEP with this address.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn vtep_of(&self, address: Ipv4Addr) -> Result<Option<u32>, DataplaneError> {
        found(self.addresses.get(&address.octets(), 0), VTEP_ADDRESSES)
    }

    /// Whether an address is in a prefix of `--accept-source`.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn is_accepted(&self, address: Ipv4Addr) -> Result<bool, DataplaneError> {
        Ok(found(self.accepted.get(&Key::new(32, address.octets()), 0), ACCEPTED)?.is_some())
    }

    /// When packets of a VTEP were admitted.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn heard(&self, id: u32) -> Result<Option<Heard>, DataplaneError> {
        found(self.heard.get(&id, 0), HEARD)
    }

    /// What is noted of a flow.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn flow(&self, key: &FlowKey) -> Result<Option<Flow>, DataplaneError> {
        found(self.flows.get(key, 0), FLOWS)
    }

    /// The MAC that the pod at a veth sends from.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn pod(&self, veth: u32) -> Result<Option<Mac>, DataplaneError> {
        found(self.pods.get(&veth, 0), PODS)
    }

    /// Whether the flow takes the stack because of an address or a port of it.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn is_excluded(&self, key: &FlowKey) -> Result<bool, DataplaneError> {
        for address in [key.local, key.remote] {
            if found(self.excluded.get(&Key::new(32, address), 0), EXCLUDED)?.is_some() {
                return Ok(true);
            }
        }
        for port in [key.local_port, key.remote_port] {
            let (word, bit) = excluded_port(key.protocol == IPPROTO_UDP as u32, u16::from_be_bytes(port));
            let bits = found(self.excluded_ports.get(&word, 0), EXCLUDED_PORTS)?;
            if bits.is_some_and(|bits| bits & bit != 0) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn found<V: Pod>(looked_up: Result<V, MapError>, map: &'static str) -> Result<Option<V>, DataplaneError> {
    match looked_up {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound | MapError::OutOfBounds { .. }) => Ok(None),
        Err(error) => Err(DataplaneError::map("read", map)(error)),
    }
}
