//! What is told of the store, of this host's lease, and of the peers.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use tracing::warn;

use crate::{
    config::unknown_keys,
    escape::control_characters,
    lease::{LeaseTable, Peer},
    registry::{OwnLease, PassedOver, RegistryError, ResyncCause, Snapshot, StoreKind},
    status::{HeldPeer, LeaseState, LeaseStatus, Status, StoreStatus, now},
};

/// No more entries are named than this, whatever the store holds; all are counted.
const MOST_NAMED: usize = 100;

/// Of what is wrong with an entry, no more is told than so many characters: it may cite what is in the store.
const MOST_TOLD: usize = 500;

/// The store's part of this host's status.
pub(super) struct LeasesStatus {
    lease: LeaseStatus,
    /// For how long the store keeps one that has a term.
    ttl: Duration,
    store: StoreStatus,
    config_differs: Option<String>,
    peers: usize,
    held: Vec<HeldPeer>,
    held_total: BTreeMap<String, u64>,
    other_backends: BTreeMap<String, usize>,
    /// Where the network config is.
    config_place: String,
    /// The one whose unknown keys were said last.
    reviewed: Vec<u8>,
    /// Whether it is another than it was when it was told last.
    pub(super) is_due: bool,
}

/// What is wrong with an entry, for logs and terminals.
fn readable(reason: &str) -> String {
    let mut text: String = reason.chars().take(MOST_TOLD).collect();
    if text.len() < reason.len() {
        text += "...";
    }
    control_characters(&text).into_owned()
}

impl LeasesStatus {
    pub(super) fn new(kind: StoreKind, config_place: String, lease: LeaseStatus) -> Self {
        Self {
            lease,
            ttl: Duration::ZERO,
            store: StoreStatus { kind, since: now(), ..StoreStatus::default() },
            config_differs: None,
            peers: 0,
            held: Vec::new(),
            held_total: BTreeMap::new(),
            other_backends: BTreeMap::new(),
            config_place,
            reviewed: Vec::new(),
            is_due: true,
        }
    }

    /// Puts it into this host's status.
    pub(super) fn tell(&mut self, status: &mut Status) {
        self.is_due = false;
        status.lease.clone_from(&self.lease);
        status.store.clone_from(&self.store);
        status.config_differs.clone_from(&self.config_differs);
        status.peers = self.peers;
        status.held.clone_from(&self.held);
        status.held_total.clone_from(&self.held_total);
        status.other_backends.clone_from(&self.other_backends);
    }

    /// Says which keys of a network config are unknown; of the same config once.
    pub(super) fn review_config(&mut self, config: &[u8]) {
        if self.reviewed == config {
            return;
        }
        self.reviewed = config.to_vec();
        for unknown in unknown_keys(&String::from_utf8_lossy(config)) {
            warn!("the network config in {}: {unknown}", self.config_place);
        }
    }

    pub(super) const fn lease_state(&self) -> LeaseState {
        self.lease.state
    }

    /// A snapshot was read: what was said of single entries is said anew.
    pub(super) fn snapshot(&mut self, snapshot: &Snapshot, cause: ResyncCause) {
        let store = &mut self.store;
        if !store.following {
            (store.following, store.since) = (true, now());
        }
        store.problem = None;
        store.revision = snapshot.revision;
        store.cluster_id.clone_from(&snapshot.store_id);
        *store.resyncs.entry(cause.label().to_owned()).or_insert(0) += 1;
        store.passed_over.clear();
        store.remarks.clear();
        self.is_due = true;
    }

    /// The store is about to be asked. Until then it was not away: what came before took its time.
    pub(super) fn asks(&mut self) {
        let store = &mut self.store;
        if store.resyncs.is_empty() && store.problem.is_none() {
            store.since = now();
            self.is_due = true;
        }
    }

    pub(super) fn away(&mut self, reason: String) {
        let store = &mut self.store;
        if store.following || store.problem.is_none() {
            (store.following, store.since) = (false, now());
        }
        store.problem = Some(control_characters(&reason).into_owned());
        self.is_due = true;
    }

    pub(super) fn event(&mut self) {
        self.store.events += 1;
        self.is_due = true;
    }

    /// Something is no lease. What its holder announced before may count in its place.
    pub(super) fn pass_over(&mut self, PassedOver { name, reason, .. }: PassedOver, before: Option<Peer>) {
        let mut reason = readable(&reason);
        if let Some(Peer { public_ip, vtep_mac }) = before {
            reason += &format!("; what it announced before counts: {public_ip} with the MAC {vtep_mac}");
        }
        let store = &mut self.store;
        store.passed_over_total += 1;
        // It was about what the entry said before.
        store.remarks.remove(&name);
        self.is_due = true;
        if store.passed_over.get(&name) == Some(&reason) {
            return;
        }
        warn!("the entry {name:?} is passed over: {reason}");
        if store.passed_over.len() < MOST_NAMED {
            store.passed_over.insert(name, reason);
        }
    }

    /// Something is to be known of an entry that is used.
    pub(super) fn remark(&mut self, name: &str, remark: &str) {
        let remarks = &mut self.store.remarks;
        let remark = readable(remark);
        warn!("the entry {name:?}: {remark}");
        if remarks.len() < MOST_NAMED {
            remarks.insert(name.to_owned(), remark);
        }
        self.is_due = true;
    }

    /// Nothing is said of an entry any more: it is used, or is gone.
    pub(super) fn usable(&mut self, name: &str) {
        self.store.passed_over.remove(name);
        self.store.remarks.remove(name);
    }

    pub(super) fn config_differs(&mut self, difference: Option<String>) {
        let difference = difference.map(|difference| control_characters(&difference).into_owned());
        if let Some(difference) = &difference
            && self.config_differs.as_ref() != Some(difference)
        {
            warn!("{difference}");
        }
        self.is_due |= self.config_differs != difference;
        self.config_differs = difference;
    }

    /// The lease is kept from now on, for so long after each renewal. Where this host has it, that has just been one.
    pub(super) fn keeps(&mut self, lease: &OwnLease, ttl: Duration) {
        self.ttl = ttl;
        self.expires(lease);
    }

    /// The lease lasts a term from now on, where it has one and is held.
    fn expires(&mut self, lease: &OwnLease) {
        let has_term = self.lease.state == LeaseState::Held && lease.has_term();
        self.lease.term = has_term.then_some(self.ttl.as_secs());
        self.lease.expiry = self.lease.term.map(|term| now() + term);
        self.is_due = true;
    }

    pub(super) fn renewed(&mut self, lease: &OwnLease) {
        self.lease.renewals += 1;
        self.expires(lease);
    }

    pub(super) fn lease(&mut self, lease: &OwnLease, state: LeaseState) {
        let status = &mut self.lease;
        if state == LeaseState::Lost {
            status.losses += 1;
        }
        (status.subnet, status.vtep_mac, status.state) = (lease.key.subnet, lease.vtep_mac, state);
        status.contested = None;
        self.expires(lease);
    }

    /// Another host claimed the lease, and was told that this one lives.
    pub(super) fn claimed(&mut self, public_ip: Ipv4Addr) {
        let status = &mut self.lease;
        (status.claims, status.last_claim) = (status.claims + 1, now());
        if status.claims == 1 {
            warn!(
                "another host claims this host's address {} and the lease of {}; it was told that this one lives. Give each \
                 host an address of its own with --public-ip or --iface",
                public_ip, status.subnet
            );
        }
        self.is_due = true;
    }

    /// Another living host has this one's address and lease.
    pub(super) fn contested(&mut self, error: &RegistryError) {
        let (status, problem) = (&mut self.lease, error.to_string());
        if status.contested.as_ref() != Some(&problem) {
            warn!("{problem}");
        }
        (status.state, status.contested) = (LeaseState::Contested, Some(problem));
        (status.expiry, status.term) = (None, None);
        self.is_due = true;
    }

    /// Takes in how many peers there are, who is held, and how many leases have another backend.
    pub(super) fn refresh(&mut self, table: &LeaseTable, other_backends: BTreeMap<String, usize>) {
        self.other_backends = other_backends;
        let (wall, clock) = (now(), Instant::now());
        let held: Vec<_> = table
            .held()
            .filter_map(|(subnet, hold)| {
                let peer = table.get(subnet)?;
                let since = wall.saturating_sub(clock.saturating_duration_since(hold.since).as_secs());
                Some(HeldPeer { subnet: *subnet, public_ip: peer.public_ip, reason: hold.reason, since })
            })
            .collect();
        let is_new = |peer: &HeldPeer| {
            let before = self.held.iter().find(|before| before.subnet == peer.subnet);
            before.is_none_or(|before| before.reason != peer.reason)
        };
        for peer in held.iter().filter(|peer| is_new(peer)) {
            *self.held_total.entry(peer.reason.label().to_owned()).or_insert(0) += 1;
        }
        self.held = held;
        self.peers = table.len();
        self.is_due = true;
    }
}
