//! How each peer is reached, as the maps have it: for who asks while no agent may run.

use std::{
    io,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use aya::maps::{Map, MapData, lpm_trie::LpmTrie};
use flannel_common::{
    maps::{HEARD, HEARD_UNIT_SHIFT, Heard, PREFIXES, SUBNETS, TRAFFIC, Traffic, VTEPS, Vtep, heard_time},
    packet::Mac,
};
use ipnet::Ipv4Net;
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

use super::{DataplaneError, PinDirectory, batch};

/// So many slots are read in one call.
const CHUNK: u32 = 1 << 16;
/// So many entries beyond those in use are watched: a new peer takes the first that is free.
const AHEAD: u32 = 16;
/// What leases changed of a peer that has an entry already is seen by then.
const REREAD: Duration = Duration::from_secs(30);

/// How packets to a peer leave the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Way {
    /// In the tunnel.
    Encapsulated,
    /// As they are, to the peer's MAC.
    Direct,
    /// Not at all: the underlay has no route.
    NoRoute,
    /// Not at all: it is behind a router, and there is no tunnel.
    NotOnLink,
}

impl Way {
    /// In words.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Encapsulated => "encapsulated",
            Self::Direct => "direct",
            Self::NoRoute => "no route",
            Self::NotOnLink => "not on the link",
        }
    }
}

/// A peer, and how it is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerWay {
    /// What it leases.
    pub subnet: Ipv4Net,
    /// Its VTEP address.
    pub address: Ipv4Addr,
    /// How it is reached.
    pub way: Way,
    /// The underlay's next hop towards it; of several, one; 0.0.0.0 for one with an IPv6 address.
    pub next_hop: Ipv4Addr,
    /// The largest packet of the overlay that fits on the way, where that is less than its MTU, in bytes.
    pub smaller_mtu: Option<u16>,
    /// The MAC of its vxlan device.
    #[serde(skip)]
    pub vtep_mac: Mac,
    /// The number of the device towards it; 0 where there is no route.
    #[serde(skip)]
    pub ifindex: u32,
    /// How long ago a packet from it was admitted, to the second; [`None`] for never.
    #[serde(skip)]
    pub heard: Option<Duration>,
    /// What went between; [`None`] for peers beyond those that are counted.
    #[serde(skip)]
    pub traffic: Option<Traffic>,
}

/// Where the peers of a dataplane are.
#[derive(Clone)]
pub struct PinnedPeers {
    /// The maps, whose agent may be gone.
    pub pins: PinDirectory,
    /// The overlay's Network.
    pub network: Ipv4Net,
    /// The length of its leases.
    pub subnet_len: u8,
    /// Whether peers on the link are sent packets without encapsulation.
    pub is_direct: bool,
    /// Whether others get a tunnel.
    pub has_tunnel: bool,
}

impl PinnedPeers {
    /// All peers, by their subnets.
    ///
    /// # Errors
    /// [`DataplaneError::Map`] where there is no dataplane.
    pub fn read(&self) -> Result<Vec<PeerWay>, DataplaneError> {
        let ids = self.ids()?;
        self.ways(&ids, &self.vteps(count(&ids))?)
    }

    /// The number of each peer's entries, by what it leases.
    fn ids(&self) -> Result<Vec<(Ipv4Net, u32)>, DataplaneError> {
        let subnets = self.pins.open(SUBNETS)?;
        let slots = subnets.info().map_err(DataplaneError::map("read", SUBNETS))?.max_entries();
        let address =
            |slot: u32| self.network.network().to_bits().wrapping_add(slot << (32 - u32::from(self.subnet_len)));
        let leased = (0..).zip(read_up_to::<u32>(&subnets, SUBNETS, slots)?).filter(|(_, id)| *id != 0);
        let subnet = |slot| Ipv4Net::new(address(slot).into(), self.subnet_len).ok();
        let mut ids: Vec<_> = leased.filter_map(|(slot, id)| Some((subnet(slot)?, id))).collect();
        let prefixes: LpmTrie<_, [u8; 4], u32> =
            Map::LpmTrie(self.pins.open(PREFIXES)?).try_into().map_err(DataplaneError::map("open", PREFIXES))?;
        for entry in prefixes.iter() {
            let (key, id) = entry.map_err(DataplaneError::map("read", PREFIXES))?;
            ids.extend(Ipv4Net::new(key.data().into(), key.prefix_len() as u8).ok().map(|subnet| (subnet, id)));
        }
        ids.sort_unstable();
        Ok(ids)
    }

    /// The first entries.
    fn vteps(&self, count: u32) -> Result<Vec<Vtep>, DataplaneError> {
        read_up_to(&self.pins.open(VTEPS)?, VTEPS, count)
    }

    fn ways(&self, ids: &[(Ipv4Net, u32)], vteps: &[Vtep]) -> Result<Vec<PeerWay>, DataplaneError> {
        let count = count(ids);
        let heard: Vec<Heard> = read_up_to(&self.pins.open(HEARD)?, HEARD, count)?;
        let traffic: Vec<Traffic> = {
            let map = self.pins.open(TRAFFIC)?;
            read_with(TRAFFIC, count, |first, len| batch::read_sums(&map, first, len))?
        };
        let now: Duration = clock_gettime(ClockId::CLOCK_MONOTONIC).map_err(DataplaneError::Clock)?.into();
        let now = heard_time(now.as_nanos() as u64);
        let way = |&(subnet, id): &(Ipv4Net, u32)| {
            let Vtep { header, address, next_hop, ifindex, flags, mtu } = *vteps.get(id as usize)?;
            let heard = *heard.get(id as usize)?;
            let is_on_link = flags & Vtep::ON_LINK != 0;
            let way = match (ifindex, self.is_direct && is_on_link && (heard.is_direct() || !self.has_tunnel)) {
                (0, _) => Way::NoRoute,
                (_, true) => Way::Direct,
                (_, false) if self.has_tunnel => Way::Encapsulated,
                (_, false) => Way::NotOnLink,
            };
            Some(PeerWay {
                subnet,
                address: address.into(),
                way,
                next_hop: next_hop.into(),
                smaller_mtu: (mtu > 0).then_some(mtu),
                vtep_mac: header.peer_vtep_mac(),
                ifindex,
                heard: (heard.last > 0)
                    .then(|| Duration::from_nanos(u64::from(now.saturating_sub(heard.last)) << HEARD_UNIT_SHIFT)),
                traffic: traffic.get(id as usize).copied(),
            })
        };
        Ok(ids.iter().filter_map(way).collect())
    }
}

/// So many entries are in use at the most: the lowest are taken first.
fn count(ids: &[(Ipv4Net, u32)]) -> u32 {
    ids.iter().map(|(_, id)| id.saturating_add(1)).max().unwrap_or_default()
}

/// The same peers, looked at again and again. What each leases is in a map of as many slots as the Network has subnets, most of
/// them empty: that is read again where an entry of a peer has changed, and now and then.
pub struct PeerWatch {
    maps: PinnedPeers,
    ids: Vec<(Ipv4Net, u32)>,
    vteps: Vec<Vtep>,
    /// When that was read last.
    read: Option<Instant>,
}

impl PeerWatch {
    /// Nothing is read yet.
    pub const fn new(maps: PinnedPeers) -> Self {
        Self { maps, ids: Vec::new(), vteps: Vec::new(), read: None }
    }

    /// All peers, by their subnets, with what was heard and counted by now.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn look(&mut self) -> Result<Vec<PeerWay>, DataplaneError> {
        let vteps = self.maps.vteps(count(&self.ids) + AHEAD)?;
        if vteps != self.vteps || self.read.is_none_or(|read| read.elapsed() > REREAD) {
            self.ids = self.maps.ids()?;
            self.vteps = self.maps.vteps(count(&self.ids) + AHEAD)?;
            self.read = Some(Instant::now());
        }
        self.maps.ways(&self.ids, &self.vteps)
    }

    /// Where they are.
    pub const fn maps(&self) -> &PinnedPeers {
        &self.maps
    }
}

/// The first `len` values of an array.
fn read_up_to<V: aya::Pod>(map: &MapData, name: &'static str, len: u32) -> Result<Vec<V>, DataplaneError> {
    read_with(name, len, |first, len| batch::read(map, first, len))
}

/// The same, by a call that reads so many from a first one on.
fn read_with<V>(
    name: &'static str,
    len: u32,
    read: impl Fn(u32, u32) -> io::Result<Vec<V>>,
) -> Result<Vec<V>, DataplaneError> {
    let mut all = Vec::new();
    while (all.len() as u32) < len {
        let first = all.len() as u32;
        let some = read(first, CHUNK.min(len - first));
        let some = some.map_err(|source| DataplaneError::map("read", name)(source.into()))?;
        if some.is_empty() {
            break;
        }
        all.extend(some);
    }
    Ok(all)
}
