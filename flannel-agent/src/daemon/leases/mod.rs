//! What follows the store: the table of leases with its guard, this host's own lease and its renewal, and what was last
//! known of both.
//!
//! * `updates` — what is made of what the store says
//! * `peers` — which entries are peers
//! * `others` — which have another backend
//! * `renewal` — keeping this host's own lease, and taking another where it is lost
//! * `status` — what is told of it

mod others;
mod peers;
mod renewal;
mod status;
mod updates;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    ops::ControlFlow,
    sync::Arc,
    time::{Duration, Instant as Clock},
};

use ipnet::Ipv4Net;
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    time::{Instant, sleep_until},
};

pub(super) use self::renewal::CLAIM_PERIOD;
use self::{
    others::OtherBackends,
    renewal::{LeaseHolder, RenewalEvent},
    status::LeasesStatus,
};
use crate::{
    config::NetworkConfig,
    health::Health,
    last_known::LastKnown,
    lease::{BackendAttributes, LeaseTable, OwnDeletion, Peer, PeerChange},
    registry::{Announced, HostAddresses, LeaseRequest, OwnLease, Registry, ResyncCause, Seen, Updates},
    status::{LeaseState, LeaseStatus, Status},
};

/// What is known before the store is followed.
pub(super) struct Beginning {
    pub(super) registry: Registry,
    /// What the store says of this host's addresses.
    pub(super) host: HostAddresses,
    pub(super) network: NetworkConfig,
    /// What leases of this host's backend have in common.
    pub(super) attributes: BackendAttributes,
    /// As the store has it.
    pub(super) config: Vec<u8>,
    /// This host's VTEP address.
    pub(super) public_ip: Ipv4Addr,
    pub(super) lease: OwnLease,
    pub(super) lease_state: LeaseState,
    /// The peers of the last run.
    pub(super) known: BTreeMap<Ipv4Net, Peer>,
    /// For how long the guard holds a peer that may be well.
    pub(super) grace: Duration,
}

/// Follows the store.
pub(super) struct Leases {
    registry: Registry,
    /// The network config that the datapath is made for.
    network: NetworkConfig,
    attributes: BackendAttributes,
    table: LeaseTable,
    grace: Duration,
    /// What counts where an entry comes to name no VTEP.
    announced: Announced,
    others: OtherBackends,
    /// The lease that this host has, or had last.
    own: OwnLease,
    holder: HolderLink,
    updates: mpsc::Receiver<Seen>,
    /// When the updates were seen that changed peers, since they were asked for last.
    seen: Vec<Clock>,
    to_keep: ToKeep,
    status: LeasesStatus,
    health: Health,
}

/// What is exchanged with the lease's holder.
struct HolderLink {
    /// Tells it of this host's VTEP address.
    public_ip: watch::Sender<Ipv4Addr>,
    /// Tells it whose subnets are not to be taken, though the store does not name them.
    unnamed: watch::Sender<BTreeSet<Ipv4Net>>,
    /// Has it look at how it stands with the lease.
    doubt: Arc<Notify>,
    /// It waits to be told how the own lease was deleted.
    asked: Option<oneshot::Sender<OwnDeletion>>,
    renewal: mpsc::Receiver<RenewalEvent>,
}

/// What this host's next agent is left, besides table and own lease.
struct ToKeep {
    host: HostAddresses,
    /// The network config that the datapath is made for, as the store had it.
    config: String,
    is_due: bool,
}

/// What comes from the store, or is due by the clock.
pub(super) enum Incoming {
    Renewal(RenewalEvent),
    Update(Seen),
    /// After some deletions it was quiet for long enough to judge them.
    Settled,
}

/// What follows for the datapath.
pub(super) enum Change {
    /// Of the peers; there may be none.
    Peers(Vec<PeerChange>),
    /// The own lease is this one from now on. It may be the one before.
    Lease(OwnLease),
}

impl Leases {
    pub(super) fn new(beginning: Beginning, health: Health) -> Self {
        let Beginning { registry, host, network, attributes, config, public_ip, lease, lease_state, known, grace } =
            beginning;
        let own = LeaseStatus::new(lease.key.subnet, lease.vtep_mac, lease_state);
        let mut status = LeasesStatus::new(registry.kind(), registry.config_place(), own);
        status.review_config(&config);
        Self {
            network,
            attributes,
            announced: Announced::new(&known),
            others: OtherBackends::default(),
            table: LeaseTable::new(known, grace),
            grace,
            own: lease,
            holder: HolderLink {
                public_ip: watch::channel(public_ip).0,
                unnamed: watch::channel(BTreeSet::new()).0,
                doubt: Arc::default(),
                asked: None,
                renewal: mpsc::channel(1).1,
            },
            updates: mpsc::channel(1).1,
            seen: Vec::new(),
            to_keep: ToKeep { host, config: String::from_utf8_lossy(&config).into_owned(), is_due: true },
            status,
            health,
            registry,
        }
    }

    /// Has this host's lease kept from now on.
    pub(super) fn keep_lease(&mut self, request: LeaseRequest, renew_interval: Duration) {
        let (events, renewal) = mpsc::channel(8);
        self.holder.renewal = renewal;
        self.status.keeps(&self.own, request.ttl);
        let holder = LeaseHolder {
            registry: self.registry.clone(),
            request,
            lease: self.own.clone(),
            public_ip: self.holder.public_ip.subscribe(),
            unnamed: self.holder.unnamed.subscribe(),
            network: self.network.clone(),
            renew_interval: self.registry.renew_interval(renew_interval),
            doubt: Arc::clone(&self.holder.doubt),
            events,
            heartbeat: self.health.heartbeat("lease"),
        };
        tokio::spawn(holder.keep(self.status.lease_state() == LeaseState::Held));
    }

    /// Follows the table from a fresh snapshot on.
    pub(super) fn watch(&mut self, cause: ResyncCause) {
        let (sender, updates) = Updates::channel(1024);
        // The watch before ends when nobody receives from it.
        self.updates = updates;
        self.status.asks();
        tokio::spawn(self.registry.clone().watch(cause, sender, self.health.heartbeat("watch")));
    }

    /// The next that there is to [take](Self::take).
    pub(super) async fn next(&mut self) -> Incoming {
        let settles_at = self.table.settles_at().map(Instant::from_std);
        let settled = async {
            match settles_at {
                Some(settles_at) => sleep_until(settles_at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Some(event) = self.holder.renewal.recv() => Incoming::Renewal(event),
            Some(seen) = self.updates.recv() => Incoming::Update(seen),
            () = settled => Incoming::Settled,
        }
    }

    /// Takes in what came. Breaks where the agent is to end.
    pub(super) fn take(&mut self, incoming: Incoming, is_heard: impl Fn(Ipv4Net) -> bool) -> ControlFlow<(), Change> {
        let changes = match incoming {
            Incoming::Renewal(event) => {
                let lease = self.take_renewal(event)?;
                return ControlFlow::Continue(lease.map_or_else(|| Change::Peers(Vec::new()), Change::Lease));
            }
            Incoming::Update(seen) => self.take_updates(seen),
            Incoming::Settled => self.settle(is_heard),
        };
        ControlFlow::Continue(Change::Peers(self.noted(changes)))
    }

    /// When each update was seen that changed peers, of those that were taken in since this was asked for last.
    pub(super) fn take_seen(&mut self) -> Vec<Clock> {
        std::mem::take(&mut self.seen)
    }

    /// Lets go of peers that need not be held any longer.
    pub(super) fn review(&mut self, is_heard: impl Fn(Ipv4Net) -> bool) -> Vec<PeerChange> {
        let changes = self.table.review(is_heard, Clock::now());
        self.noted(changes)
    }

    /// Lets go of all that are held.
    pub(super) fn release(&mut self) -> Vec<PeerChange> {
        let changes = self.table.release(Clock::now());
        self.noted(changes)
    }

    /// This host has another VTEP address, or another address that it asks the store from.
    pub(super) fn take_address(&mut self, public_ip: Ipv4Addr, is_other_source: bool) {
        self.to_keep.is_due = true;
        if is_other_source {
            self.registry.disconnect();
            self.watch(ResyncCause::Connection);
        }
        self.holder.public_ip.send_if_modified(|before| std::mem::replace(before, public_ip) != public_ip);
    }

    /// Shows the table as it is now.
    pub(super) fn refresh(&mut self) {
        self.status.refresh(&self.table, self.others.counts());
        let unnamed = self.table.unnamed();
        self.holder.unnamed.send_if_modified(|before| {
            let is_modified = *before != unnamed;
            *before = unnamed;
            is_modified
        });
    }

    pub(super) const fn table(&self) -> &LeaseTable {
        &self.table
    }

    /// Whether something is told otherwise than when it was asked for last.
    pub(super) const fn is_told_otherwise(&self) -> bool {
        self.status.is_due
    }

    /// Puts what is known of store and leases into this host's status.
    pub(super) fn tell(&mut self, status: &mut Status) {
        self.status.tell(status);
    }

    /// Whether the next agent is to be left something else than when it was asked for last.
    pub(super) const fn is_known_otherwise(&self) -> bool {
        self.to_keep.is_due
    }

    /// What this host's next agent is left.
    pub(super) fn last_known(&mut self) -> LastKnown {
        self.to_keep.is_due = false;
        LastKnown {
            prefix: self.registry.identity().to_owned(),
            public_ip: self.public_ip(),
            host: self.to_keep.host,
            config: self.to_keep.config.clone(),
            lease: self.own.clone(),
            peers: self.table.iter().map(|(subnet, peer)| (*subnet, *peer)).collect(),
        }
    }

    /// This host's VTEP address.
    fn public_ip(&self) -> Ipv4Addr {
        *self.holder.public_ip.borrow()
    }

    fn noted(&mut self, changes: Vec<PeerChange>) -> Vec<PeerChange> {
        self.to_keep.is_due |= !changes.is_empty();
        for change in &changes {
            if let PeerChange::Remove(subnet) = change {
                self.announced.forget(*subnet);
            }
        }
        changes
    }
}
