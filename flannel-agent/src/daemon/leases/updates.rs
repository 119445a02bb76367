//! What the agent makes of what the store says: of the table, of the network config, and of its own lease.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::ControlFlow,
    time::Instant,
};

use ipnet::Ipv4Net;
use tracing::{debug, info, warn};

use super::{Leases, peers::NoPeer, renewal::RenewalEvent};
use crate::{
    lease::{Credibility, HoldReason, PeerChange},
    registry::{Entry, OwnLease, OwnLeaseState, PassedOver, ResyncCause, Seen, Snapshot, Update},
    status::LeaseState,
};

/// Of the subnets that are held at once, no more are named in one line than this.
const MOST_NAMED: usize = 10;

impl Leases {
    /// Takes in an update and all that wait behind it.
    pub(super) fn take_updates(&mut self, first: Seen) -> Vec<PeerChange> {
        let mut changes = Vec::new();
        let mut next = Some(first);
        while let Some(Seen { update, at }) = next {
            let before = changes.len();
            match update {
                Update::Snapshot(snapshot, cause) => changes.extend(self.take_snapshot(snapshot, cause)),
                Update::Set(entry) => {
                    self.status.event();
                    self.status.usable(&entry.name);
                    changes.extend(self.take_entry(&entry));
                }
                Update::Removed { key, name, revision } => {
                    self.status.event();
                    self.status.usable(&name);
                    self.announced.forget(key.subnet);
                    self.others.remove(key);
                    let now = Instant::now();
                    if key == self.own.key {
                        self.table.own_is_gone(Some(revision), now);
                        self.doubt_lease();
                    } else {
                        changes.extend(self.table.remove(key, Some(revision), now));
                    }
                }
                Update::PassedOver(passed_over) => {
                    self.status.event();
                    changes.extend(self.pass_over(passed_over));
                }
                Update::PassedOverRemoved(name) => {
                    self.status.event();
                    self.status.usable(&name);
                }
                Update::Config(config) => self.take_config(config.as_deref()),
                Update::Away(reason) => self.status.away(reason),
            }
            if changes.len() > before {
                self.seen.push(at);
            }
            next = self.updates.try_recv().ok();
        }
        self.refresh();
        changes
    }

    /// Judges the deletions after which it was quiet, and tells whom that concerns.
    pub(super) fn settle(&mut self, is_heard: impl Fn(Ipv4Net) -> bool) -> Vec<PeerChange> {
        let before: BTreeSet<_> = self.table.held().map(|(subnet, _)| *subnet).collect();
        let changes = self.table.settle(is_heard, Instant::now());
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
                self.grace
            );
        }
        self.answer();
        self.refresh();
        changes
    }

    /// Tells the lease's holder how the own lease was deleted, once that is known.
    fn answer(&mut self) {
        if let Some(deletion) = self.table.own_deletion()
            && let Some(asked) = self.holder.asked.take()
        {
            // It may have stopped waiting.
            let _unheard = asked.send(deletion);
        }
    }

    fn take_snapshot(&mut self, snapshot: Snapshot, cause: ResyncCause) -> Vec<PeerChange> {
        let (store, leases, revision) = (self.registry.kind(), snapshot.entries.len(), snapshot.revision);
        info!("{leases} leases in {store} at revision {revision} ({})", cause.label());
        self.status.snapshot(&snapshot, cause);
        if !snapshot.entries.iter().any(|entry| self.is_held(entry)) {
            self.doubt_lease();
        }
        self.take_config(snapshot.config.as_deref());
        let is_older = cause == ResyncCause::RolledBack && !self.registry.is_written_by_hosts();
        self.take_peers(&snapshot, is_older)
    }

    /// Believes a snapshot as far as it can be believed. One that is older than what was known lacks what came since, and
    /// nobody may put that back.
    pub(in crate::daemon) fn take_peers(&mut self, snapshot: &Snapshot, is_older: bool) -> Vec<PeerChange> {
        let mut peers = BTreeMap::new();
        let mut renounced = Vec::new();
        self.others.clear();
        let mut unusable = snapshot.passed_over.clone();
        for entry in &snapshot.entries {
            match self.peer_of(entry) {
                Ok(Some(peer)) => {
                    self.take_note(entry, peer);
                    peers.insert(entry.key, peer);
                }
                Ok(None) => {}
                Err(NoPeer::OtherBackend(backend)) => renounced.extend(self.renounce(entry, &backend)),
                Err(NoPeer::PassedOver(passed_over)) => unusable.push(passed_over),
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
            self.holder.asked = None;
        }
        renounced.extend(self.table.replace(peers, credibility, Instant::now()));
        renounced
    }

    fn take_entry(&mut self, entry: &Entry) -> Option<PeerChange> {
        if entry.key == self.own.key {
            self.table.own_is_there();
            self.holder.asked = None;
            if !self.is_held(entry) {
                self.doubt_lease();
            }
        }
        let change = match self.peer_of(entry) {
            Ok(Some(peer)) => {
                self.take_note(entry, peer);
                self.table.set(entry.key, peer)
            }
            Ok(None) => {
                self.others.remove(entry.key);
                self.table.remove(entry.key, None, Instant::now())
            }
            Err(NoPeer::OtherBackend(backend)) => self.renounce(entry, &backend),
            Err(NoPeer::PassedOver(passed_over)) => self.pass_over(passed_over),
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

    /// Compares the config in the store with the one that the datapath is made for.
    fn take_config(&mut self, config: Option<&[u8]>) {
        if let Some(config) = config {
            self.status.review_config(config);
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
        self.status.config_differs(difference);
    }

    /// What became of the own lease: the one that is held from now on, where one was taken.
    pub(super) fn take_renewal(&mut self, event: RenewalEvent) -> ControlFlow<(), Option<OwnLease>> {
        let store = self.registry.kind();
        match event {
            RenewalEvent::Renewed => self.status.renewed(&self.own),
            RenewalEvent::Claimed => {
                self.status.renewed(&self.own);
                self.status.claimed(self.public_ip());
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
                        self.public_ip()
                    ),
                    OwnLeaseState::Deleted => warn!(
                        "the lease of {subnet} was deleted together with those of others; taking it again if it is free"
                    ),
                    _ => warn!("{store} no longer has the lease of {subnet}; taking it again if it is free"),
                }
                self.status.lease(&self.own, LeaseState::Lost);
                self.to_keep.is_due = true;
            }
            RenewalEvent::Contested(error) => self.status.contested(&error),
            RenewalEvent::Taken(lease) => {
                self.table.own_is_there();
                // Nobody else can be the peer of it.
                self.table.exclude(lease.key.subnet);
                self.own = lease.clone();
                self.status.lease(&lease, LeaseState::Held);
                self.to_keep.is_due = true;
                return ControlFlow::Continue(Some(lease));
            }
            RenewalEvent::Deleted(asked) => {
                self.holder.asked = Some(asked);
                self.answer();
            }
            RenewalEvent::Revoked => {
                warn!("Lease has been revoked. Shutting down daemon.");
                return ControlFlow::Break(());
            }
            RenewalEvent::OtherConfig(differences) => {
                warn!(
                    "{store} no longer has the lease of {}, and the network config is another one by now ({}); shutting down: \
                     start the agent again to take both in",
                    self.own.key.subnet,
                    differences.join(", ")
                );
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(None)
    }
}
