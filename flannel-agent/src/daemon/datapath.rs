//! What keeps this host in step with network config, lease and peers: programs and what hangs on them; a tunnel in user space; or
//! `subnet.env` alone where the network's backend has no datapath.

use ipnet::Ipv4Net;

use super::{
    DaemonError,
    reconcile::{Allocation, Beginning, Due, Event, Reconciler, TunnelDue, UserSpace},
};
use crate::{
    backend::{has_datapath, is_in_user_space},
    cli::Cli,
    device::{DeviceEvent, Link},
    lease::{LeaseTable, PeerChange},
    registry::OwnLease,
    status::Status,
};

/// Which of them.
pub(super) enum Datapath<'a> {
    Programs(Box<Reconciler<'a>>),
    UserSpace(Box<UserSpace<'a>>),
    None(Box<Allocation<'a>>),
}

/// What there is to see to.
pub(super) enum ToSee {
    Programs(Due),
    Tunnel(TunnelDue),
    Device(DeviceEvent),
}

impl<'a> Datapath<'a> {
    /// Nothing is made yet.
    pub(super) async fn new(cli: &'a Cli, beginning: Beginning<'_>) -> Result<Self, DaemonError> {
        Ok(if has_datapath(beginning.backend.kind()) {
            Self::Programs(Box::new(Reconciler::new(cli, beginning).await?))
        } else if is_in_user_space(beginning.backend.kind()) {
            Self::UserSpace(Box::new(UserSpace::new(cli, beginning)))
        } else {
            Self::None(Box::new(Allocation::new(cli, beginning)))
        })
    }

    /// Makes all of it, but `subnet.env`. The link that packets to the peers leave by.
    pub(super) async fn make(&mut self, table: &LeaseTable) -> Result<Link, DaemonError> {
        match self {
            Self::Programs(reconciler) => reconciler.make(table).await,
            Self::UserSpace(tunnel) => tunnel.make(table).await,
            Self::None(allocation) => Ok(allocation.make().await),
        }
    }

    pub(super) fn write_subnet_env(&self) -> Result<(), DaemonError> {
        match self {
            Self::Programs(reconciler) => reconciler.write_subnet_env(),
            Self::UserSpace(tunnel) => tunnel.host.write_subnet_env(),
            Self::None(allocation) => allocation.host.write_subnet_env(),
        }
    }

    /// Takes away what flannel's daemon, or an agent with another backend, made here.
    pub(super) async fn sweep(&mut self, link: &Link, table: &LeaseTable) {
        match self {
            Self::Programs(reconciler) => reconciler.sweep(link, table).await,
            Self::UserSpace(tunnel) => tunnel.sweep(table).await,
            // Before anything was written: what an agent wrote says what is its.
            Self::None(_) => {}
        }
    }

    pub(super) fn say_carried(&self, link: &Link) {
        match self {
            Self::Programs(reconciler) => reconciler.say_carried(link),
            Self::UserSpace(tunnel) => tunnel.say_carried(),
            Self::None(allocation) => allocation.say_carried(),
        }
    }

    /// Whether packets arrive from the host behind a subnet. Without a datapath that is seen of none.
    pub(super) fn is_heard(&self, subnet: Ipv4Net) -> bool {
        match self {
            Self::Programs(reconciler) => reconciler.is_heard(subnet),
            Self::UserSpace(tunnel) => tunnel.is_heard(subnet),
            Self::None(_) => false,
        }
    }

    /// The next that there is to [see to](Self::see_to).
    pub(super) async fn next(&mut self) -> ToSee {
        match self {
            Self::Programs(reconciler) => ToSee::Programs(reconciler.next().await),
            Self::UserSpace(tunnel) => ToSee::Tunnel(tunnel.next().await),
            Self::None(allocation) => ToSee::Device(allocation.next().await),
        }
    }

    pub(super) async fn see_to(&mut self, due: ToSee, table: &LeaseTable) {
        match (self, due) {
            (Self::Programs(reconciler), ToSee::Programs(due)) => reconciler.see_to(due, table).await,
            (Self::None(allocation), ToSee::Device(event)) => allocation.see_to(event).await,
            (Self::UserSpace(tunnel), ToSee::Tunnel(due)) => tunnel.see_to(due, table).await,
            // It came from another.
            (_, ToSee::Programs(_) | ToSee::Tunnel(_) | ToSee::Device(_)) => {}
        }
    }

    /// Brings everything up by changes of the peers, which the table has already.
    pub(super) async fn apply(&mut self, changes: Vec<PeerChange>, table: &LeaseTable) {
        match self {
            Self::Programs(reconciler) => reconciler.apply(changes, table).await,
            Self::UserSpace(tunnel) => tunnel.set_peers(table),
            Self::None(_) => {}
        }
    }

    /// Goes on with a lease, which may be the one before.
    pub(super) async fn move_to(&mut self, lease: OwnLease, table: &LeaseTable) {
        match self {
            Self::Programs(reconciler) => reconciler.move_to(lease, table).await,
            Self::UserSpace(tunnel) => tunnel.move_to(lease, table).await,
            Self::None(allocation) => allocation.move_to(lease),
        }
    }

    /// Compares everything, whether or not something was told of.
    pub(super) async fn review(&mut self, table: &LeaseTable) {
        match self {
            Self::Programs(reconciler) => reconciler.review(table).await,
            Self::UserSpace(tunnel) => tunnel.review(table).await,
            Self::None(allocation) => allocation.review().await,
        }
    }

    /// Looks at what changes without an event.
    pub(super) async fn look(&mut self, table: &LeaseTable) {
        match self {
            Self::Programs(reconciler) => reconciler.look(table).await,
            Self::UserSpace(tunnel) => tunnel.look(table).await,
            Self::None(allocation) => allocation.look().await,
        }
    }

    pub(super) async fn watch_observers(&mut self) {
        if let Self::Programs(reconciler) = self {
            reconciler.watch_observers().await;
        }
    }

    /// What is wrong with `subnet.env` that is to be made right by [writing it again](Self::restore_subnet_env).
    pub(super) fn subnet_env_damage(&mut self) -> Option<&'static str> {
        match self {
            Self::Programs(reconciler) => reconciler.subnet_env_damage(),
            Self::UserSpace(tunnel) => tunnel.host.subnet_env_damage(),
            Self::None(allocation) => allocation.host.subnet_env_damage(),
        }
    }

    /// Writes `subnet.env` again. A status has to be beside it already: the CNI plugin takes one without for another daemon's.
    pub(super) fn restore_subnet_env(&mut self, damage: &str) {
        match self {
            Self::Programs(reconciler) => reconciler.restore_subnet_env(damage),
            Self::UserSpace(tunnel) => tunnel.host.restore_subnet_env(damage),
            Self::None(allocation) => allocation.host.restore_subnet_env(damage),
        }
    }

    /// What has happened since it was asked for last.
    pub(super) fn take_events(&mut self) -> Vec<Event> {
        match self {
            Self::Programs(reconciler) => reconciler.take_events(),
            Self::UserSpace(tunnel) => tunnel.host.take_events(),
            Self::None(allocation) => allocation.host.take_events(),
        }
    }

    /// Whether something is told otherwise than when it was asked for last.
    pub(super) fn is_told_otherwise(&self) -> bool {
        match self {
            Self::Programs(reconciler) => reconciler.is_told_otherwise(),
            Self::UserSpace(tunnel) => tunnel.host.is_told_otherwise(),
            Self::None(allocation) => allocation.host.is_told_otherwise(),
        }
    }

    /// Puts what is known of it into this host's status.
    pub(super) fn tell(&mut self, status: &mut Status) {
        match self {
            Self::Programs(reconciler) => reconciler.tell(status),
            Self::UserSpace(tunnel) => tunnel.host.tell(status),
            Self::None(allocation) => allocation.host.tell(status),
        }
    }
}
