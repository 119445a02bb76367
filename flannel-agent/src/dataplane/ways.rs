//! How each peer is reached, as the maps have it: for who asks while no agent may run.

use std::net::Ipv4Addr;

use aya::maps::{Array, Map, MapData, lpm_trie::LpmTrie};
use flannel_common::maps::{HEARD, Heard, PREFIXES, SUBNETS, VTEPS, Vtep};
use ipnet::Ipv4Net;
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
    let vteps: Array<_, Vtep> = Map::Array(open(VTEPS)?).try_into().map_err(DataplaneError::map("open", VTEPS))?;
    let heard: Array<_, Heard> = Map::Array(open(HEARD)?).try_into().map_err(DataplaneError::map("open", HEARD))?;
    let mut ids = Vec::new();
    let mut first = 0;
    while first < slots {
        let values: Vec<u32> = batch::read(&subnets, first, CHUNK.min(slots - first))
            .map_err(|source| DataplaneError::map("read", SUBNETS)(source.into()))?;
        let address = |slot: u32| network.network().to_bits().wrapping_add(slot << (32 - u32::from(subnet_len)));
        let leased = (first..).zip(&values).filter(|(_, id)| **id != 0);
        ids.extend(leased.filter_map(|(slot, id)| Some((Ipv4Net::new(address(slot).into(), subnet_len).ok()?, *id))));
        if values.is_empty() {
            break;
        }
        first += values.len() as u32;
    }
    let prefixes: LpmTrie<_, [u8; 4], u32> =
        Map::LpmTrie(open(PREFIXES)?).try_into().map_err(DataplaneError::map("open", PREFIXES))?;
    for entry in prefixes.iter() {
        let (key, id) = entry.map_err(DataplaneError::map("read", PREFIXES))?;
        ids.extend(Ipv4Net::new(key.data().into(), key.prefix_len() as u8).ok().map(|subnet| (subnet, id)));
    }
    ids.sort_unstable();
    let way = |(subnet, id): (Ipv4Net, u32)| {
        let Vtep { address, next_hop, ifindex, flags, mtu, .. } =
            vteps.get(&id, 0).map_err(DataplaneError::map("read", VTEPS))?;
        let heard = heard.get(&id, 0).map_err(DataplaneError::map("read", HEARD))?;
        let is_on_link = flags & Vtep::ON_LINK != 0;
        let way = match (ifindex, is_direct && is_on_link && (heard.is_direct() || !has_tunnel)) {
            (0, _) => Way::NoRoute,
            (_, true) => Way::Direct,
            (_, false) if has_tunnel => Way::Encapsulated,
            (_, false) => Way::NotOnLink,
        };
        Ok(PeerWay {
            subnet,
            address: address.into(),
            way,
            next_hop: next_hop.into(),
            smaller_mtu: (mtu > 0).then_some(mtu),
        })
    };
    ids.into_iter().map(way).collect()
}
