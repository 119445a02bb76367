//! The peers that the dataplane is to know, and the guard between them and the store.
//!
//! The store is believed at once in what it says, and slowly in what it no longer says: a wiped or rolled-back store, a
//! wrong prefix, a range that was deleted or a mass expiry would otherwise cut hosts off that are well. Keeping a peer
//! that is gone costs nothing. So a deletion is judged a moment later, with all that came within that time, whether
//! events or a snapshot told of them; the deletion of this host's own lease too.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet, VecDeque, btree_map},
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use super::{
    LeaseKey, Peer,
    burst::{Burst, Holder},
};

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
    /// Too many went at once, or this host's own lease with them.
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
                "Several went in one revision of the store, or this host's own lease with others, or within seconds most of the \
                 peers, or within a minute more than 3 and 5 % of them. Held for `--lease-guard-grace`.",
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
    /// The same, and it is from before what was known: what it lacks may have come since.
    Older,
    /// It lacks even that.
    Doubtful,
}

/// How this host's own lease was deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnDeletion {
    /// It and nothing else: it was taken away from this host.
    Alone,
    /// With those of others: nobody meant this host.
    WithOthers,
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
    /// Those of them whose deletion is still to be judged.
    leaving: BTreeSet<Ipv4Net>,
    /// The deletions that are.
    burst: Option<Burst>,
    /// Whether the store lacks this host's own lease.
    lacks_own: bool,
    /// Why, once that is judged.
    own_deletion: Option<OwnDeletion>,
    /// When the last ones were removed, within the window.
    removals: VecDeque<Instant>,
    grace: Duration,
}

impl LeaseTable {
    /// The peers as they were last known, of which a mass removal is held for `grace`.
    pub const fn new(peers: BTreeMap<Ipv4Net, Peer>, grace: Duration) -> Self {
        Self {
            named: BTreeMap::new(),
            peers,
            held: BTreeMap::new(),
            leaving: BTreeSet::new(),
            burst: None,
            lacks_own: false,
            own_deletion: None,
            removals: VecDeque::new(),
            grace,
        }
    }

    /// Takes in the whole table.
    pub fn replace(
        &mut self,
        snapshot: BTreeMap<LeaseKey, Peer>,
        credibility: Credibility,
        now: Instant,
    ) -> Vec<PeerChange> {
        let by_subnet: BTreeMap<_, _> = snapshot.iter().map(|(key, peer)| (key.subnet, *peer)).collect();
        let missing: Vec<_> = self.peers.keys().filter(|subnet| !by_subnet.contains_key(subnet)).copied().collect();
        self.named = snapshot;
        let mut changes: Vec<_> =
            by_subnet.into_iter().filter_map(|(subnet, peer)| self.believe(subnet, peer)).collect();
        let hosts = self.named_hosts();
        for subnet in missing {
            let Some(host) = self.peers.get(&subnet).map(|peer| peer.public_ip) else { continue };
            if hosts.contains(&host) {
                // The host behind it has another one by now: only its old lease ended.
                changes.extend(self.take_out(subnet, now));
            } else if !self.held.contains_key(&subnet) && self.leaving.insert(subnet) {
                self.gone(Holder::Host(host), None, now);
            }
        }
        match credibility {
            Credibility::Whole => self.own_is_there(),
            Credibility::Older => {
                self.own_is_there();
                if let Some(burst) = &mut self.burst {
                    burst.mark_unmeant();
                }
            }
            Credibility::Doubtful => self.own_is_gone(None, now),
        }
        changes
    }

    /// The store has this host's own lease.
    pub const fn own_is_there(&mut self) {
        (self.lacks_own, self.own_deletion) = (false, None);
    }

    /// The store lacks this host's own lease. `revision` is that of the deletion, where it is known.
    pub fn own_is_gone(&mut self, revision: Option<i64>, now: Instant) {
        if !self.lacks_own || revision.is_some() {
            self.lacks_own = true;
            self.own_deletion = None;
            self.gone(Holder::Own, revision, now);
        }
    }

    /// How this host's own lease was deleted. [`None`] where it was not, or that is still to be judged.
    pub const fn own_deletion(&self) -> Option<OwnDeletion> {
        self.own_deletion
    }

    fn gone(&mut self, holder: Holder, revision: Option<i64>, now: Instant) {
        self.burst.get_or_insert_with(|| Burst::new(now)).add(holder, revision, now);
    }

    fn named_hosts(&self) -> HashSet<Ipv4Addr> {
        self.named.values().map(|peer| peer.public_ip).collect()
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
        self.leaving.remove(&subnet);
        (self.peers.insert(subnet, peer) != Some(peer)).then_some(PeerChange::Set(subnet, peer))
    }

    /// A lease ended, in a revision where it was deleted. The peer goes once that is judged ([`Self::settle`]); at once
    /// where its host has another lease by now.
    pub fn remove(&mut self, key: LeaseKey, revision: Option<i64>, now: Instant) -> Option<PeerChange> {
        let subnet = key.subnet;
        self.named.remove(&key);
        if let Some(peer) = self.named_for(subnet) {
            return self.believe(subnet, peer);
        }
        let host = self.peers.get(&subnet)?.public_ip;
        if self.held.contains_key(&subnet) {
            return None;
        }
        if self.named.values().any(|peer| peer.public_ip == host) {
            return self.take_out(subnet, now);
        }
        self.leaving.insert(subnet);
        self.gone(Holder::Host(host), revision, now);
        None
    }

    /// When deletions are to be judged next.
    pub fn settles_at(&self) -> Option<Instant> {
        self.burst.as_ref().map(Burst::settles_at)
    }

    /// Judges the deletions after which it was quiet. `is_heard` says whether packets arrive from the host behind a
    /// subnet.
    pub fn settle(&mut self, is_heard: impl Fn(Ipv4Net) -> bool, now: Instant) -> Vec<PeerChange> {
        let Some(burst) = self.burst.take_if(|burst| burst.settles_at() <= now) else { return Vec::new() };
        let is_mass = burst.is_mass(self.peers.len() - self.held.len(), self.budget(now));
        if self.lacks_own && self.own_deletion.is_none() {
            let with_others = is_mass || self.recent_mass(now) > 0;
            self.own_deletion = Some(if with_others { OwnDeletion::WithOthers } else { OwnDeletion::Alone });
        }
        let hosts = self.named_hosts();
        let mut changes = Vec::new();
        for subnet in std::mem::take(&mut self.leaving) {
            let is_moved = self.peers.get(&subnet).is_none_or(|peer| hosts.contains(&peer.public_ip));
            if !is_moved && is_mass {
                self.held.insert(subnet, Hold { since: now, reason: HoldReason::MassRemoval });
            } else if !is_moved && is_heard(subnet) {
                self.held.insert(subnet, Hold { since: now, reason: HoldReason::StillSends });
            } else {
                changes.extend(self.take_out(subnet, now));
            }
        }
        changes
    }

    /// A subnet is this host's own: nobody else's, whatever was known.
    pub fn exclude(&mut self, subnet: Ipv4Net) -> Option<PeerChange> {
        self.named.retain(|key, _| key.subnet != subnet);
        self.drop_peer(subnet)
    }

    /// The holder of a lease says that it is no peer: that it has another backend. This is something that the store says, and
    /// believed at once; it counts as no removal.
    pub fn renounce(&mut self, key: LeaseKey) -> Option<PeerChange> {
        self.named.remove(&key);
        match self.named_for(key.subnet) {
            Some(peer) => self.believe(key.subnet, peer),
            None => self.drop_peer(key.subnet),
        }
    }

    fn drop_peer(&mut self, subnet: Ipv4Net) -> Option<PeerChange> {
        self.held.remove(&subnet);
        self.leaving.remove(&subnet);
        self.peers.remove(&subnet).map(|_| PeerChange::Remove(subnet))
    }

    /// Lets go of what need not be held any longer.
    pub fn review(&mut self, is_heard: impl Fn(Ipv4Net) -> bool, now: Instant) -> Vec<PeerChange> {
        if self.held.is_empty() {
            return Vec::new();
        }
        let hosts = self.named_hosts();
        let mut over = Vec::new();
        for (subnet, hold) in &mut self.held {
            if self.peers.get(subnet).is_some_and(|peer| hosts.contains(&peer.public_ip)) {
                // Its host is back, with another subnet.
                over.push(*subnet);
                continue;
            }
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

    /// Lets go of all that is held, or is still to be judged: the operator says that the store is right.
    pub fn release(&mut self, now: Instant) -> Vec<PeerChange> {
        let held: Vec<_> = self.held.keys().chain(&self.leaving).copied().collect();
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
        self.leaving.remove(&subnet);
        self.peers.remove(&subnet)?;
        self.removals.push_back(now);
        Some(PeerChange::Remove(subnet))
    }

    /// The subnets whose hosts may be well, though the store does not name them.
    pub fn unnamed(&self) -> BTreeSet<Ipv4Net> {
        self.held.keys().chain(&self.leaving).copied().collect()
    }

    /// How many are held since lately because too many went.
    fn recent_mass(&self, now: Instant) -> usize {
        let is_recent = |hold: &&Hold| {
            hold.reason == HoldReason::MassRemoval && now.saturating_duration_since(hold.since) <= WINDOW
        };
        self.held.values().filter(is_recent).count()
    }

    /// How many more peers may go now.
    fn budget(&mut self, now: Instant) -> usize {
        while self.removals.front().is_some_and(|removal| now.duration_since(*removal) > WINDOW) {
            self.removals.pop_front();
        }
        let before = self.peers.len() - self.held.len() + self.removals.len();
        FEW.max(before / FRACTION).saturating_sub(self.removals.len() + self.recent_mass(now))
    }
}

#[cfg(test)]
mod tests;
