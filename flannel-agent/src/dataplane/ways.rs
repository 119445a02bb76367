//! How each peer is reached, as the maps have it: for who asks while no agent may run.

use std::{io, net::Ipv4Addr, time::Duration};

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

/// All peers of a dataplane whose agent may be gone, by their subnets. `network` is the overlay's, `subnet_len` the length of its
/// leases; `is_direct` says whether peers on the link are sent packets without encapsulation, `has_tunnel` whether others get it.
///
/// # Errors
/// [`DataplaneError::Map`] where there is none.
pub fn pinned_ways(
    pins: &PinDirectory,
    network: Ipv4Net,
    subnet_len: u8,
    is_direct: bool,
    has_tunnel: bool,
) -> Result<Vec<PeerWay>, DataplaneError> {
    let open = |name| MapData::from_pin(pins.map(name)).map_err(DataplaneError::map("open", name));
    let subnets = open(SUBNETS)?;
    let slots = subnets.info().map_err(DataplaneError::map("read", SUBNETS))?.max_entries();
    let address = |slot: u32| network.network().to_bits().wrapping_add(slot << (32 - u32::from(subnet_len)));
    let leased = (0..).zip(read_up_to::<u32>(&subnets, SUBNETS, slots)?).filter(|(_, id)| *id != 0);
    let mut ids: Vec<_> =
        leased.filter_map(|(slot, id)| Some((Ipv4Net::new(address(slot).into(), subnet_len).ok()?, id))).collect();
    let prefixes: LpmTrie<_, [u8; 4], u32> =
        Map::LpmTrie(open(PREFIXES)?).try_into().map_err(DataplaneError::map("open", PREFIXES))?;
    for entry in prefixes.iter() {
        let (key, id) = entry.map_err(DataplaneError::map("read", PREFIXES))?;
        ids.extend(Ipv4Net::new(key.data().into(), key.prefix_len() as u8).ok().map(|subnet| (subnet, id)));
    }
    ids.sort_unstable();
    let most = ids.iter().map(|(_, id)| id.saturating_add(1)).max().unwrap_or_default();
    let vteps: Vec<Vtep> = read_up_to(&open(VTEPS)?, VTEPS, most)?;
    let heard: Vec<Heard> = read_up_to(&open(HEARD)?, HEARD, most)?;
    let traffic: Vec<Traffic> = {
        let map = open(TRAFFIC)?;
        read_with(TRAFFIC, most, |first, len| batch::read_sums(&map, first, len))?
    };
    let now: Duration = clock_gettime(ClockId::CLOCK_MONOTONIC).map_err(DataplaneError::Clock)?.into();
    let now = heard_time(now.as_nanos() as u64);
    let way = |(subnet, id): (Ipv4Net, u32)| {
        let Vtep { header, address, next_hop, ifindex, flags, mtu } = *vteps.get(id as usize)?;
        let heard = *heard.get(id as usize)?;
        let is_on_link = flags & Vtep::ON_LINK != 0;
        let way = match (ifindex, is_direct && is_on_link && (heard.is_direct() || !has_tunnel)) {
            (0, _) => Way::NoRoute,
            (_, true) => Way::Direct,
            (_, false) if has_tunnel => Way::Encapsulated,
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
    Ok(ids.into_iter().filter_map(way).collect())
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
