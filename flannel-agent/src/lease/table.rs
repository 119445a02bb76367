//! The peers that the dataplane is to know, and the guard between them and the store.
//!
//! The store is believed at once in what it says, and slowly in what it no longer says: a wiped or rolled-back store, a
//! wrong prefix or a mass expiry would otherwise cut hosts off that are well. Keeping a peer that is gone costs nothing.

use std::{
    collections::{BTreeMap, HashSet, VecDeque, btree_map},
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use super::{LeaseKey, Peer};

/// Removals are counted over this time.
const WINDOW: Duration = Duration::from_secs(60);
/// So many removals within the window are believed in any cluster, ...
const FEW: usize = 3;
/// ... and one in so many peers.
const FRACTION: usize = 20;

/// One change to the peers. It is a change of attributes, so that a host with a new address or MAC is a change also
/// when its subnet stayed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerChange {
    /// A subnet is leased by this host now.
    Set(Ipv4Net, Peer),
    /// A subnet is leased by nobody.
    Remove(Ipv4Net),
}

/// Why a peer is kept that the store no longer names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HoldReason {
    /// Too many went at once, or the answer lacked this host's own lease.
    MassRemoval,
    /// Packets still arrive from it.
    StillSends,
}

impl HoldReason {
    /// Each of them.
    pub const ALL: [Self; 2] = [Self::MassRemoval, Self::StillSends];

    /// Its name in status and metrics.
    pub const fn label(self) -> &'static str {
        self.row().0
    }

    /// What it means, and when it ends.
    pub const fn description(self) -> &'static str {
        self.row().1
    }

    const fn row(self) -> (&'static str, &'static str) {
        match self {
            Self::MassRemoval => (
                "mass_removal",
                "More went within a minute than 3 and 5 % of the peers, or the answer lacked even this host's own lease. \
                 Held for `--lease-guard-grace`.",
            ),
            Self::StillSends => ("still_sends", "Packets arrive from it. Held until it has been silent for 30 s."),
        }
    }
}

/// A peer that is held back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hold {
    /// When the store was first seen without it.
    pub since: Instant,
    /// Why it is kept.
    pub reason: HoldReason,
}

/// Whether a snapshot can be the whole table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Credibility {
    /// It has this host's own lease.
    Whole,
    /// It lacks even that.
    Doubtful,
}

/// The peers by the subnet that they lease; our own lease is not among them.
#[derive(Clone, Debug)]
pub struct LeaseTable {
    /// What the store says. A subnet can have two keys, a dual-stack cluster's beside a former one; the last counts.
    named: BTreeMap<LeaseKey, Peer>,
    /// What the dataplane is to know.
    peers: BTreeMap<Ipv4Net, Peer>,
    /// Those of them that the store does not name.
    held: BTreeMap<Ipv4Net, Hold>,
    /// When the last ones were removed, within the window.
    removals: VecDeque<Instant>,
    grace: Duration,
}

impl LeaseTable {
    /// The peers as they were last known, of which a mass removal is held for `grace`.
    pub const fn new(peers: BTreeMap<Ipv4Net, Peer>, grace: Duration) -> Self {
        Self { named: BTreeMap::new(), peers, held: BTreeMap::new(), removals: VecDeque::new(), grace }
    }

    /// Takes in the whole table. `is_heard` says whether packets arrive from the host behind a subnet.
    pub fn replace(
        &mut self,
        snapshot: BTreeMap<LeaseKey, Peer>,
        credibility: Credibility,
        is_heard: impl Fn(Ipv4Net) -> bool,
        now: Instant,
    ) -> Vec<PeerChange> {
        let by_subnet: BTreeMap<_, _> = snapshot.iter().map(|(key, peer)| (key.subnet, *peer)).collect();
        let missing: Vec<_> = self.peers.keys().filter(|subnet| !by_subnet.contains_key(subnet)).copied().collect();
        self.named = snapshot;
        let mut changes: Vec<_> =
            by_subnet.into_iter().filter_map(|(subnet, peer)| self.believe(subnet, peer)).collect();
        let hosts: HashSet<Ipv4Addr> = self.named.values().map(|peer| peer.public_ip).collect();
        // The host behind a subnet may have another one by now: then only its old lease ended.
        let is_moved = |subnet: &Ipv4Net| self.peers.get(subnet).is_some_and(|peer| hosts.contains(&peer.public_ip));
        let (moved, missing): (Vec<_>, Vec<_>) = missing.into_iter().partition(is_moved);
        let missing: Vec<_> = missing.into_iter().filter(|subnet| !self.held.contains_key(subnet)).collect();
        let is_mass = credibility == Credibility::Doubtful || missing.len() > self.budget(now);
        for subnet in missing {
            if is_mass {
                self.held.insert(subnet, Hold { since: now, reason: HoldReason::MassRemoval });
            } else if is_heard(subnet) {
                self.held.insert(subnet, Hold { since: now, reason: HoldReason::StillSends });
            } else {
                changes.extend(self.take_out(subnet, now));
            }
        }
        changes.extend(moved.into_iter().filter_map(|subnet| self.take_out(subnet, now)));
        changes
    }

    /// A lease was taken or changed. [`None`] where that changes nothing.
    pub fn set(&mut self, key: LeaseKey, peer: Peer) -> Option<PeerChange> {
        self.named.insert(key, peer);
        let (subnet, peer) = (key.subnet, self.named_for(key.subnet)?);
        self.believe(subnet, peer)
    }

    /// Who leases a subnet, as the store says.
    fn named_for(&self, subnet: Ipv4Net) -> Option<Peer> {
        let keys = self.named.range(LeaseKey::from(subnet)..).take_while(|(key, _)| key.subnet == subnet);
        keys.last().map(|(_, peer)| *peer)
    }

    fn believe(&mut self, subnet: Ipv4Net, peer: Peer) -> Option<PeerChange> {
        self.held.remove(&subnet);
        (self.peers.insert(subnet, peer) != Some(peer)).then_some(PeerChange::Set(subnet, peer))
    }

    /// A lease ended. [`None`] where the peer is held, or is none.
    pub fn remove(&mut self, key: LeaseKey, is_heard: impl Fn(Ipv4Net) -> bool, now: Instant) -> Option<PeerChange> {
        let subnet = key.subnet;
        self.named.remove(&key);
        if let Some(peer) = self.named_for(subnet) {
            return self.believe(subnet, peer);
        }
        let host = self.peers.get(&subnet)?.public_ip;
        if self.held.contains_key(&subnet) {
            return None;
        }
        let reason = if self.named.values().any(|peer| peer.public_ip == host) {
            // It has another subnet by now: only its old lease ended.
            None
        } else if is_heard(subnet) {
            Some(HoldReason::StillSends)
        } else {
            (self.budget(now) == 0).then_some(HoldReason::MassRemoval)
        };
        match reason {
            Some(reason) => {
                self.held.insert(subnet, Hold { since: now, reason });
                None
            }
            None => self.take_out(subnet, now),
        }
    }

    /// A subnet is this host's own: nobody else's, whatever was known.
    pub fn exclude(&mut self, subnet: Ipv4Net) -> Option<PeerChange> {
        self.named.retain(|key, _| key.subnet != subnet);
        self.held.remove(&subnet);
        self.peers.remove(&subnet).map(|_| PeerChange::Remove(subnet))
    }

    /// Lets go of what need not be held any longer.
    pub fn review(&mut self, is_heard: impl Fn(Ipv4Net) -> bool, now: Instant) -> Vec<PeerChange> {
        let mut over = Vec::new();
        for (subnet, hold) in &mut self.held {
            if hold.reason == HoldReason::MassRemoval && now.duration_since(hold.since) < self.grace {
                continue;
            }
            if is_heard(*subnet) {
                hold.reason = HoldReason::StillSends;
            } else {
                over.push(*subnet);
            }
        }
        over.into_iter().filter_map(|subnet| self.take_out(subnet, now)).collect()
    }

    /// Lets go of all that is held: the operator says that the store is right.
    pub fn release(&mut self, now: Instant) -> Vec<PeerChange> {
        let held: Vec<_> = self.held.keys().copied().collect();
        let changes = held.into_iter().filter_map(|subnet| self.take_out(subnet, now)).collect();
        // What was asked for takes nothing from what is believed unasked.
        self.removals.clear();
        changes
    }

    /// All peers, ordered by subnet.
    pub fn iter(&self) -> btree_map::Iter<'_, Ipv4Net, Peer> {
        self.peers.iter()
    }

    /// The host behind a subnet.
    pub fn get(&self, subnet: &Ipv4Net) -> Option<&Peer> {
        self.peers.get(subnet)
    }

    /// Those that the store no longer names.
    pub fn held(&self) -> btree_map::Iter<'_, Ipv4Net, Hold> {
        self.held.iter()
    }

    /// How many subnets are leased by others.
    pub fn len(&self) -> usize {
        self.peers.len()
    }

    /// Whether nobody else holds a lease.
    pub fn is_empty(&self) -> bool {
        self.peers.is_empty()
    }

    fn take_out(&mut self, subnet: Ipv4Net, now: Instant) -> Option<PeerChange> {
        self.held.remove(&subnet);
        self.peers.remove(&subnet)?;
        self.removals.push_back(now);
        Some(PeerChange::Remove(subnet))
    }

    /// How many more peers may go now.
    fn budget(&mut self, now: Instant) -> usize {
        while self.removals.front().is_some_and(|removal| now.duration_since(*removal) > WINDOW) {
            self.removals.pop_front();
        }
        let before = self.peers.len() - self.held.len() + self.removals.len();
        FEW.max(before / FRACTION).saturating_sub(self.removals.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::lease::MacAddress;

    const GRACE: Duration = Duration::from_secs(900);

    fn subnet(n: u8) -> Ipv4Net {
        Ipv4Net::new_assert([10, 5, n, 0].into(), 24)
    }

    fn peer(n: u8) -> Peer {
        Peer { public_ip: [192, 168, 0, n].into(), vtep_mac: MacAddress([2, 0, 0, 0, 0, n]) }
    }

    fn peers(numbers: impl IntoIterator<Item = u8>) -> BTreeMap<Ipv4Net, Peer> {
        numbers.into_iter().map(|n| (subnet(n), peer(n))).collect()
    }

    fn key(n: u8) -> LeaseKey {
        subnet(n).into()
    }

    fn snapshot(numbers: impl IntoIterator<Item = u8>) -> BTreeMap<LeaseKey, Peer> {
        numbers.into_iter().map(|n| (key(n), peer(n))).collect()
    }

    fn table(numbers: impl IntoIterator<Item = u8>) -> LeaseTable {
        LeaseTable::new(peers(numbers), GRACE)
    }

    fn nobody(_: Ipv4Net) -> bool {
        false
    }

    fn everybody(_: Ipv4Net) -> bool {
        true
    }

    fn reasons(table: &LeaseTable) -> Vec<(Ipv4Net, HoldReason)> {
        table.held().map(|(subnet, hold)| (*subnet, hold.reason)).collect()
    }

    #[test]
    fn the_readme_has_a_row_for_each_reason() {
        let readme = include_str!("../../../README.md");
        for reason in HoldReason::ALL {
            let row = format!("| `{}` | {} |", reason.label(), reason.description());
            assert!(readme.contains(&row), "README.md lacks: {row}");
        }
    }

    #[test]
    fn a_changed_host_is_a_change_though_its_subnet_stays() {
        let mut table = table(1..=3);
        let mut snapshot = snapshot(1..=3);
        snapshot.insert(key(2), peer(9));
        let changes = table.replace(snapshot.clone(), Credibility::Whole, nobody, Instant::now());
        assert_eq!(changes, [PeerChange::Set(subnet(2), peer(9))]);
        assert_eq!(table.replace(snapshot, Credibility::Whole, nobody, Instant::now()), []);
        assert_eq!(table.set(key(2), peer(9)), None);
    }

    #[test]
    fn a_few_removals_are_believed_and_many_are_not() {
        let now = Instant::now();
        let mut few = table(0..10);
        assert_eq!(few.replace(snapshot(3..10), Credibility::Whole, nobody, now).len(), 3);
        // The fourth within the window.
        assert_eq!(few.remove(key(9), nobody, now), None);
        assert_eq!(reasons(&few), [(subnet(9), HoldReason::MassRemoval)]);
        let later = now + WINDOW + Duration::from_secs(1);
        assert_eq!(few.remove(key(8), nobody, later), Some(PeerChange::Remove(subnet(8))));

        let mut many = table(0..10);
        assert_eq!(many.replace(snapshot(4..10), Credibility::Whole, nobody, now), []);
        assert_eq!((many.len(), many.held().len()), (10, 4));
        // One in twenty is believed in a large cluster.
        let mut large = table(0..200);
        assert_eq!(large.replace(snapshot(10..200), Credibility::Whole, nobody, now).len(), 10);
    }

    #[test]
    fn an_answer_without_our_own_lease_removes_nobody() {
        let mut table = table(1..=2);
        assert_eq!(table.replace(BTreeMap::new(), Credibility::Doubtful, nobody, Instant::now()), []);
        assert_eq!(table.held().len(), 2);
    }

    #[test]
    fn who_still_sends_stays_until_silent() {
        let now = Instant::now();
        let mut table = table(1..=2);
        assert_eq!(table.remove(key(1), everybody, now), None);
        assert_eq!(reasons(&table), [(subnet(1), HoldReason::StillSends)]);
        assert_eq!(table.review(everybody, now + 10 * GRACE), []);
        assert_eq!(table.review(nobody, now), [PeerChange::Remove(subnet(1))]);
    }

    #[test]
    fn the_grace_ends_for_the_silent_only() {
        let now = Instant::now();
        let mut table = table(0..10);
        table.replace(snapshot([]), Credibility::Whole, nobody, now);
        assert_eq!(table.review(nobody, now + GRACE / 2), []);
        let changes = table.review(|heard| heard == subnet(7), now + GRACE);
        assert_eq!(changes.len(), 9);
        assert_eq!(reasons(&table), [(subnet(7), HoldReason::StillSends)]);
        assert_eq!(table.release(now), [PeerChange::Remove(subnet(7))]);
        assert!(table.is_empty());
        table.set(key(1), peer(1));
        assert_eq!(table.remove(key(1), nobody, now), Some(PeerChange::Remove(subnet(1))));
    }

    #[test]
    fn what_comes_back_is_held_no_more() {
        let now = Instant::now();
        let mut table = table(0..10);
        table.replace(snapshot([]), Credibility::Doubtful, nobody, now);
        assert_eq!(table.set(key(1), peer(1)), None);
        assert_eq!(table.replace(snapshot(0..10), Credibility::Whole, nobody, now), []);
        assert_eq!(table.held().len(), 0);
    }

    #[test]
    fn a_host_that_took_another_subnet_leaves_its_old_one_at_once() {
        let now = Instant::now();
        let mut table = table(1..=2);
        let moved = BTreeMap::from([(key(1), peer(1)), (key(3), peer(2))]);
        let changes = table.replace(moved, Credibility::Whole, everybody, now);
        assert_eq!(changes, [PeerChange::Set(subnet(3), peer(2)), PeerChange::Remove(subnet(2))]);
        table.set(key(4), peer(1));
        assert_eq!(table.remove(key(1), everybody, now), Some(PeerChange::Remove(subnet(1))));
    }

    #[test]
    fn a_siblings_end_is_not_a_peers() {
        let now = Instant::now();
        let mut table = table([]);
        let dual = LeaseKey { ipv6_subnet: "fd00::/64".parse().ok(), ..key(1) };
        assert_eq!(table.set(key(1), peer(1)), Some(PeerChange::Set(subnet(1), peer(1))));
        assert_eq!(table.set(dual, peer(2)), Some(PeerChange::Set(subnet(1), peer(2))));
        assert_eq!(table.set(key(1), peer(3)), None);
        assert_eq!(table.remove(dual, nobody, now), Some(PeerChange::Set(subnet(1), peer(3))));
        table.set(dual, peer(2));
        assert_eq!(table.remove(key(1), nobody, now), None);
        assert_eq!(table.remove(dual, nobody, now), Some(PeerChange::Remove(subnet(1))));
    }

    prop_compose! {
        fn any_key()(n in 0u8..12, is_dual: bool) -> LeaseKey {
            LeaseKey { ipv6_subnet: is_dual.then(|| "fd00::/64".parse().expect("CIDR")), ..key(n) }
        }
    }

    fn apply(peers: &mut BTreeMap<Ipv4Net, Peer>, change: PeerChange) {
        match change {
            PeerChange::Set(subnet, peer) => drop(peers.insert(subnet, peer)),
            PeerChange::Remove(subnet) => drop(peers.remove(&subnet)),
        }
    }

    proptest! {
        /// Events and the last snapshot lead to the same set, once nothing is held any more; and the changes reported on
        /// the way say exactly that.
        #[test]
        fn events_end_where_the_snapshot_does(
            events in vec((any_key(), proptest::option::of(0u8..4), any::<bool>()), 0..60),
            start in vec((any_key(), 0u8..4), 0..12),
        ) {
            let now = Instant::now();
            let first: BTreeMap<_, _> = start.into_iter().map(|(key, p)| (key, peer(p))).collect();
            let mut last = first.clone();
            let mut by_event = table([]);
            let mut reported = BTreeMap::new();
            for change in by_event.replace(first.clone(), Credibility::Whole, nobody, now) {
                apply(&mut reported, change);
            }
            for (key, p, is_heard) in events {
                let change = match p {
                    Some(p) => { last.insert(key, peer(p)); by_event.set(key, peer(p)) }
                    None => { last.remove(&key); by_event.remove(key, |_| is_heard, now) }
                };
                change.into_iter().for_each(|change| apply(&mut reported, change));
                // Nothing that the store names is ever missing.
                prop_assert!(last.keys().all(|key| by_event.peers.contains_key(&key.subnet)));
                prop_assert_eq!(&reported, &by_event.peers);
            }
            by_event.release(now).into_iter().for_each(|change| apply(&mut reported, change));
            let wanted: BTreeMap<_, _> = last.iter().map(|(key, peer)| (key.subnet, *peer)).collect();
            prop_assert_eq!(&by_event.peers, &wanted);
            prop_assert_eq!(&reported, &wanted);

            let mut by_snapshot = table([]);
            let mut reported = BTreeMap::new();
            for snapshot in [first, last] {
                for change in by_snapshot.replace(snapshot, Credibility::Whole, everybody, now) {
                    apply(&mut reported, change);
                }
            }
            by_snapshot.release(now).into_iter().for_each(|change| apply(&mut reported, change));
            prop_assert_eq!(&by_snapshot.peers, &wanted);
            prop_assert_eq!(&reported, &wanted);
        }
    }
}
