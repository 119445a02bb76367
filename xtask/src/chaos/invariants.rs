//! What must hold throughout, as functions of what was seen.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::Ipv4Addr,
};

use super::{
    datapath::Peers,
    history::{Subnet, Table, Vtep},
};

/// What must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Invariant {
    /// No subnet has two owners.
    OneOwner,
    /// The maps name no VTEP that the store never named.
    OnlyNamed,
    /// At rest, maps and store are equal.
    MapsEqualStore,
    /// No peer is removed that still sends, or that the store has named all the time.
    NobodyRemoved,
    /// No packet reaches a pod that it is not for.
    RightPod,
    /// No packet is lost that a fault of the network does not explain.
    NoLoss,
    /// No agent ends by itself.
    AgentsLive,
    /// Agents need no more memory and file descriptors as they grow older.
    Flat,
    /// At rest, each program is pinned once for each link that it belongs to, and for no other.
    NothingLeftOver,
}

impl Invariant {
    /// Each of them.
    pub const ALL: [Self; 9] = [
        Self::OneOwner,
        Self::OnlyNamed,
        Self::MapsEqualStore,
        Self::NobodyRemoved,
        Self::RightPod,
        Self::NoLoss,
        Self::AgentsLive,
        Self::Flat,
        Self::NothingLeftOver,
    ];

    /// As the report names it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::OneOwner => "no subnet has two owners",
            Self::OnlyNamed => "maps name only VTEPs that the store named",
            Self::MapsEqualStore => "at rest, maps and store are equal",
            Self::NobodyRemoved => "no peer is removed that still sends",
            Self::RightPod => "no packet reaches the wrong pod",
            Self::NoLoss => "no packet is lost without a fault of the network",
            Self::AgentsLive => "no agent ends by itself",
            Self::Flat => "memory and file descriptors stay flat",
            Self::NothingLeftOver => "at rest, nothing that is pinned is missing or left over",
        }
    }
}

/// Something in a host's maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Named {
    /// A VTEP for a subnet.
    Peer(Subnet, Vtep),
    /// An address that tunnel packets are taken from.
    Address(Ipv4Addr),
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Peer((subnet, len), vtep) => write!(f, "{subnet}/{len} at {} {:02x?}", vtep.address, vtep.mac),
            Self::Address(address) => write!(f, "the sender {address}"),
        }
    }
}

/// What a host's maps name and the store never did.
pub(super) fn never_named(peers: &Peers, table: &Table) -> Vec<Named> {
    let by_subnet = peers.by_subnet.iter().map(|(subnet, vtep)| Named::Peer(*subnet, *vtep));
    let named = by_subnet.chain(peers.addresses.iter().map(|address| Named::Address(*address)));
    named.filter(|named| !was_named(*named, table)).collect()
}

/// Whether the store ever did.
pub(super) fn was_named(named: Named, table: &Table) -> bool {
    match named {
        Named::Peer(subnet, vtep) => table.has_named(subnet, vtep),
        Named::Address(address) => table.has_named_address(address),
    }
}

/// In what a host's maps differ from the store. `held` are the peers that the guard keeps: they may be in the maps.
pub(super) fn differences(
    peers: &Peers,
    store: &BTreeMap<Subnet, Vtep>,
    own: Ipv4Addr,
    held: &BTreeSet<Subnet>,
) -> Vec<String> {
    let wanted: BTreeMap<_, _> = store.iter().filter(|(_, vtep)| vtep.address != own).collect();
    let mut differences = Vec::new();
    for (subnet, vtep) in &wanted {
        match peers.by_subnet.get(subnet) {
            Some(found) if found == *vtep => {}
            Some(found) => differences.push(format!("{} instead of {vtep:?}", Named::Peer(**subnet, *found))),
            None => differences.push(format!("no {}", Named::Peer(**subnet, **vtep))),
        }
    }
    let mut addresses: BTreeSet<Ipv4Addr> = wanted.values().map(|vtep| vtep.address).collect();
    for (subnet, vtep) in peers.by_subnet.iter().filter(|(subnet, _)| !wanted.contains_key(subnet)) {
        if held.contains(subnet) {
            addresses.insert(vtep.address);
        } else {
            differences.push(format!("{} too many", Named::Peer(*subnet, *vtep)));
        }
    }
    if peers.addresses != addresses {
        differences.push(format!("senders {:?} instead of {addresses:?}", peers.addresses));
    }
    differences
}

/// The peers that are gone between two looks at a host's maps.
pub(super) fn removed(before: &Peers, after: &Peers) -> Vec<(Subnet, Vtep)> {
    let gone = before.by_subnet.iter().filter(|(subnet, _)| !after.by_subnet.contains_key(subnet));
    gone.map(|(subnet, vtep)| (*subnet, *vtep)).collect()
}

/// Two that claim a subnet for their own.
pub(super) fn two_owners(claims: &[(String, Subnet)]) -> Option<(&str, &str, Subnet)> {
    let range = |(address, len): Subnet| {
        let size = 1u64 << (32 - len);
        let first = u64::from(address.to_bits());
        (first, first + size)
    };
    claims.iter().enumerate().find_map(|(index, (one, subnet))| {
        let (first, end) = range(*subnet);
        let overlaps = |(_, other): &&(String, Subnet)| range(*other).0 < end && first < range(*other).1;
        let (other, _) = claims[index + 1..].iter().find(overlaps)?;
        Some((one.as_str(), other.as_str(), *subnet))
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{super::history::Change, *};

    fn subnet(third: u8) -> Subnet {
        ([10, 5, third, 0].into(), 24)
    }

    fn vtep(last: u8) -> Vtep {
        Vtep { address: [192, 168, 64, last].into(), mac: [2, 0, 0, 0, 0, last] }
    }

    /// Maps with a peer for each of these, which has the same number.
    fn maps(numbers: &[u8]) -> Peers {
        Peers {
            by_subnet: numbers.iter().map(|number| (subnet(*number), vtep(*number))).collect(),
            addresses: numbers.iter().map(|number| vtep(*number).address).collect(),
        }
    }

    fn store(numbers: &[u8]) -> BTreeMap<Subnet, Vtep> {
        maps(numbers).by_subnet
    }

    #[test]
    fn a_vtep_that_nobody_named_is_noticed() {
        let mut table = Table::default();
        for number in [1, 2] {
            table.take(Change::Put(subnet(number), vtep(number)), Duration::ZERO);
        }
        assert_eq!(never_named(&maps(&[1, 2]), &table), []);
        let mut forged = maps(&[1]);
        forged.by_subnet.insert(subnet(2), vtep(1));
        assert_eq!(never_named(&forged, &table), [Named::Peer(subnet(2), vtep(1))], "known, for another subnet");
        let mut forged = maps(&[1]);
        forged.addresses.insert(vtep(9).address);
        assert_eq!(never_named(&forged, &table), [Named::Address(vtep(9).address)]);
    }

    #[test]
    fn maps_that_differ_from_the_store_are_noticed() {
        let nobody = BTreeSet::new();
        let differ = |maps: &Peers, store| differences(maps, &store, vtep(1).address, &nobody).len();
        assert_eq!(differ(&maps(&[2, 3]), store(&[1, 2, 3])), 0, "the own lease is none of the peers");
        assert_eq!(differ(&maps(&[2]), store(&[1, 2, 3])), 2, "one is missing, and its address");
        assert_eq!(differ(&maps(&[2, 3]), store(&[1, 2])), 2, "one too many, and its address");
        let mut changed = maps(&[2]);
        changed.by_subnet.insert(subnet(2), Vtep { mac: [9; 6], ..vtep(2) });
        assert_eq!(differ(&changed, store(&[2])), 1, "another MAC");
        assert!(differences(&maps(&[2, 3]), &store(&[2]), vtep(1).address, &[subnet(3)].into()).is_empty(), "held");
    }

    #[test]
    fn a_removal_is_noticed() {
        assert_eq!(removed(&maps(&[1, 2]), &maps(&[2, 3])), [(subnet(1), vtep(1))]);
        assert_eq!(removed(&maps(&[1]), &maps(&[1, 2])), []);
    }

    #[test]
    fn two_that_claim_a_subnet_are_noticed() {
        let claim = |name: &str, subnet| (name.to_owned(), subnet);
        let one = [claim("a", subnet(1)), claim("b", subnet(2))];
        assert_eq!(two_owners(&one), None);
        let within = [claim("a", subnet(1)), claim("b", ([10, 5, 1, 64].into(), 26))];
        assert_eq!(two_owners(&within), Some(("a", "b", subnet(1))));
    }
}
