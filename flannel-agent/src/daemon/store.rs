//! What the agent makes of what the store says: of the table, of the network config, and of its own lease.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use ipnet::Ipv4Net;
use tracing::{debug, info, warn};

use super::{agent::Agent, renewal::RenewalEvent};
use crate::{
    dataplane::PeerMaps,
    lease::{Credibility, HoldReason, LeaseKey, Peer, PeerChange},
    registry::{Entry, OwnLeaseState, PassedOver, ResyncCause, Snapshot, Update},
    status::LeaseState,
};

/// A host is alive that was heard within this time.
const SILENCE: Duration = Duration::from_secs(30);

/// Of the subnets that are held at once, no more are named in one line than this.
const MOST_NAMED: usize = 10;

/// Whether the agent goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Course {
    GoOn,
    End,
}

impl Agent<'_> {
    /// Takes in an update and all that wait behind it.
    pub(super) fn take_updates(&mut self, first: Update) -> Vec<PeerChange> {
        let mut changes = Vec::new();
        let mut next = Some(first);
        while let Some(update) = next {
            match update {
                Update::Snapshot(snapshot, cause) => changes.extend(self.take_snapshot(snapshot, cause)),
                Update::Set(entry) => {
                    self.record.event();
                    self.record.usable(&entry.name);
                    changes.extend(self.take_entry(&entry));
                }
                Update::Removed { key, name, revision } => {
                    self.record.event();
                    self.record.usable(&name);
                    self.announced.forget(key.subnet);
                    let now = Instant::now();
                    if key == self.own.key {
                        self.table.own_is_gone(Some(revision), now);
                        self.doubt_lease();
                    } else {
                        changes.extend(self.table.remove(key, Some(revision), now));
                    }
                }
                Update::PassedOver(passed_over) => {
                    self.record.event();
                    changes.extend(self.pass_over(passed_over));
                }
                Update::PassedOverRemoved(name) => {
                    self.record.event();
                    self.record.usable(&name);
                }
                Update::Config(config) => self.take_config(config.as_deref()),
                Update::Away(reason) => self.record.away(reason),
            }
            next = self.updates.try_recv().ok();
        }
        self.refresh();
        changes
    }

    /// Judges the deletions after which it was quiet, and tells whom that concerns.
    pub(super) fn settle(&mut self) -> Vec<PeerChange> {
        let before: BTreeSet<_> = self.table.held().map(|(subnet, _)| *subnet).collect();
        let changes = self.table.settle(is_heard(&self.dataplane.peers), Instant::now());
        let held = |reason| {
            let of_reason = self.table.held().filter(move |(_, hold)| hold.reason == reason);
            of_reason.filter(|(subnet, _)| !before.contains(subnet)).map(|(subnet, _)| *subnet).collect::<Vec<_>>()
        };
        let store = self.registry.kind();
        for subnet in held(HoldReason::StillSends) {
            warn!("{store} no longer names the peer of {subnet}; it is held ({})", HoldReason::StillSends.label());
        }
        let mass = held(HoldReason::MassRemoval);
        if !mass.is_empty() {
            let named: Vec<_> = mass.iter().take(MOST_NAMED).map(ToString::to_string).collect();
            let more = if mass.len() > MOST_NAMED { ", ..." } else { "" };
            warn!(
                "{store} no longer names {} of {} peers ({}{more}); they are held ({}) for {:?}, and longer while they send. \
                 If {store} is right: flannel-agent lease release-guard",
                mass.len(),
                self.table.len(),
                named.join(", "),
                HoldReason::MassRemoval.label(),
                self.cli.guard_grace()
            );
        }
        self.answer();
        self.refresh();
        changes
    }

    /// Shows the table as it is now.
    pub(super) fn refresh(&mut self) {
        self.record.refresh(&self.table);
        let unnamed = self.table.unnamed();
        self.unnamed.send_if_modified(|before| {
            let is_modified = *before != unnamed;
            *before = unnamed;
            is_modified
        });
    }

    /// Tells the lease's holder how the own lease was deleted, once that is known.
    fn answer(&mut self) {
        if let Some(deletion) = self.table.own_deletion()
            && let Some(asked) = self.asked.take()
        {
            // It may have stopped waiting.
            let _unheard = asked.send(deletion);
        }
    }

    fn take_snapshot(&mut self, snapshot: Snapshot, cause: ResyncCause) -> Vec<PeerChange> {
        let (store, leases, revision) = (self.registry.kind(), snapshot.entries.len(), snapshot.revision);
        info!("{leases} leases in {store} at revision {revision} ({})", cause.label());
        self.record.snapshot(&snapshot, cause);
        if !snapshot.entries.iter().any(|entry| self.is_held(entry)) {
            self.doubt_lease();
        }
        self.take_config(snapshot.config.as_deref());
        let is_older = cause == ResyncCause::RolledBack && !self.registry.is_written_by_hosts();
        self.take_peers(&snapshot, is_older)
    }

    /// Believes a snapshot as far as it can be believed. One that is older than what was known lacks what came since, and
    /// nobody may put that back.
    pub(super) fn take_peers(&mut self, snapshot: &Snapshot, is_older: bool) -> Vec<PeerChange> {
        let mut peers = BTreeMap::new();
        let mut unusable = snapshot.passed_over.clone();
        for entry in &snapshot.entries {
            match self.peer_of(entry) {
                Ok(Some(peer)) => {
                    self.take_note(entry, peer);
                    peers.insert(entry.key, peer);
                }
                Ok(None) => {}
                Err(passed_over) => unusable.push(passed_over),
            }
        }
        peers.extend(unusable.into_iter().filter_map(|passed_over| self.last_of(passed_over)));
        let has_own = snapshot.entries.iter().any(|entry| self.is_own(entry));
        let credibility = match (has_own, is_older) {
            (false, _) => Credibility::Doubtful,
            (true, true) => Credibility::Older,
            (true, false) => Credibility::Whole,
        };
        if has_own {
            // Whoever asked how it was deleted looks again.
            self.asked = None;
        }
        self.table.replace(peers, credibility, Instant::now())
    }

    fn take_entry(&mut self, entry: &Entry) -> Option<PeerChange> {
        if entry.key == self.own.key {
            self.table.own_is_there();
            self.asked = None;
            if !self.is_held(entry) {
                self.doubt_lease();
            }
        }
        let change = match self.peer_of(entry) {
            Ok(Some(peer)) => {
                self.take_note(entry, peer);
                self.table.set(entry.key, peer)
            }
            Ok(None) => self.table.remove(entry.key, None, Instant::now()),
            Err(passed_over) => self.pass_over(passed_over),
        };
        if let Some(change) = &change {
            debug!("{change:?}");
        }
        change
    }

    fn pass_over(&mut self, passed_over: PassedOver) -> Option<PeerChange> {
        let key = passed_over.key;
        if key == Some(self.own.key) {
            self.doubt_lease();
        }
        match self.last_of(passed_over) {
            Some((key, peer)) => self.table.set(key, peer),
            None => self.table.remove(key?, None, Instant::now()),
        }
    }

    /// An entry names a VTEP.
    fn take_note(&mut self, entry: &Entry, peer: Peer) {
        self.announced.note(entry, peer);
        let own_mac = || {
            format!(
                "it announces the MAC {} of this host's vxlan device; give each host a device of its own: `ip link delete \
                 {}` on one of them, and start its agent again",
                peer.vtep_mac, self.device.name
            )
        };
        let remark = entry.remark.clone().or_else(|| (peer.vtep_mac == self.own.vtep_mac).then(own_mac));
        if let Some(remark) = remark {
            self.record.remark(&entry.name, &remark);
        }
    }

    /// Takes note of what names no VTEP. What the same holder announced before counts in its place.
    fn last_of(&mut self, passed_over: PassedOver) -> Option<(LeaseKey, Peer)> {
        let own = self.own.key.subnet;
        let key = passed_over.key.filter(|key| !overlap(own, key.subnet));
        let last = key.and_then(|_| self.announced.in_place_of(&passed_over));
        if last.is_some() || !passed_over.is_silent {
            self.record.pass_over(passed_over, last);
        } else {
            self.record.usable(&passed_over.name);
        }
        key.zip(last)
    }

    /// The host to encapsulate to for an entry; [`None`] for this one.
    fn peer_of(&self, entry: &Entry) -> Result<Option<Peer>, PassedOver> {
        let before = self.announced.before(entry);
        if entry.attributes.public_ip == self.external.public_ip {
            return match entry.attributes.announced_mac() {
                _ if entry.key == self.own.key => Ok(None),
                Some(mac) if mac != self.own.vtep_mac => Err(entry.passed_over(format!(
                    "it names this host's own address {} with the MAC {mac} of another: two hosts must not have one \
                     --public-ip",
                    self.external.public_ip
                ))),
                // A lease that this host had before has never been another's.
                _ if before.is_some() => {
                    Err(entry.passed_over(format!("it names this host's own address {}", self.external.public_ip)))
                }
                _ => Ok(None),
            };
        }
        let (own, theirs) = (self.own.key.subnet, entry.key.subnet);
        if overlap(own, theirs) {
            return Err(entry.passed_over(format!("it overlaps this host's own lease {own}")));
        }
        let peer = entry.peer(self.device.vni).map_err(|error| entry.passed_over(error.to_string()))?;
        if peer.vtep_mac == self.own.vtep_mac && before.is_some_and(|before| before.vtep_mac != peer.vtep_mac) {
            return Err(entry.passed_over(format!("it names the MAC {} of this host's own VTEP", peer.vtep_mac)));
        }
        Ok(Some(peer))
    }

    fn is_own(&self, entry: &Entry) -> bool {
        entry.key == self.own.key && entry.attributes.public_ip == self.external.public_ip
    }

    /// Whether an entry is this host's lease as it was taken, and nobody wrote it since.
    fn is_held(&self, entry: &Entry) -> bool {
        self.is_own(entry) && self.own.is_as_written(entry) && entry.peer(self.device.vni).is_ok()
    }

    /// The table says something that does not go with holding the lease. Only where it is held: whoever is taking
    /// one looks anyway.
    fn doubt_lease(&self) {
        if self.record.lease_state() == LeaseState::Held {
            self.doubt.notify_one();
        }
    }

    /// Compares the config in the store with the one that the datapath is made for.
    fn take_config(&mut self, config: Option<&[u8]>) {
        if let Some(config) = config {
            self.record.review_config(config);
        }
        let place = self.registry.config_place();
        let difference = match config.map(|config| self.registry.parse_config(config)) {
            None => Some(format!("the network config is gone from {place}; going on with the one before")),
            Some(Err(error)) => Some(format!("{error}; going on with the one before")),
            Some(Ok(now)) => match self.network.differences(&now) {
                differences if differences.is_empty() => None,
                differences => Some(format!(
                    "the network config in {place} has changed ({}); start the agent again to take it in",
                    differences.join(", ")
                )),
            },
        };
        self.record.config_differs(difference);
    }

    /// What became of the own lease.
    pub(super) async fn take_renewal(&mut self, event: RenewalEvent) -> Course {
        let store = self.registry.kind();
        match event {
            RenewalEvent::Renewed => self.record.renewed(),
            RenewalEvent::Claimed => {
                self.record.renewed();
                self.record.claimed();
            }
            RenewalEvent::Lost(state) => {
                let subnet = self.own.key.subnet;
                match state {
                    OwnLeaseState::Taken(by) => warn!(
                        "the lease of {subnet} ended while this host was silent, and {by} has it now; taking another. \
                         Pods of this host need new addresses"
                    ),
                    OwnLeaseState::Contested(mac) => warn!(
                        "another host wrote its MAC {mac} into the lease of {subnet}, with this host's address {}",
                        self.external.public_ip
                    ),
                    OwnLeaseState::Deleted => warn!(
                        "the lease of {subnet} was deleted together with those of others; taking it again if it is free"
                    ),
                    _ => warn!("{store} no longer has the lease of {subnet}; taking it again if it is free"),
                }
                self.record.lease(&self.own, LeaseState::Lost);
            }
            RenewalEvent::Contested(error) => self.record.contested(&error),
            RenewalEvent::Taken(lease) => {
                self.table.own_is_there();
                self.move_to(lease).await;
            }
            RenewalEvent::Deleted(asked) => {
                self.asked = Some(asked);
                self.answer();
            }
            RenewalEvent::Revoked => {
                warn!("Lease has been revoked. Shutting down daemon.");
                return Course::End;
            }
            RenewalEvent::OtherConfig(differences) => {
                warn!(
                    "{store} no longer has the lease of {}, and the network config is another one by now ({}); shutting down: \
                     start the agent again to take both in",
                    self.own.key.subnet,
                    differences.join(", ")
                );
                return Course::End;
            }
        }
        Course::GoOn
    }
}

fn overlap(one: Ipv4Net, other: Ipv4Net) -> bool {
    one.contains(&other) || other.contains(&one)
}

/// Whether packets arrive from the host behind a subnet. Where that can't be told, they do: the peer is kept.
pub(super) fn is_heard(maps: &PeerMaps) -> impl Fn(Ipv4Net) -> bool {
    |subnet| maps.silence_of(subnet).map_or(true, |silence| silence.is_some_and(|silence| silence < SILENCE))
}
