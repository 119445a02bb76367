//! Keeping this host's own lease: renewing it while it is its own, and taking another where it is lost. Never taking
//! back what another host has by then.
//!
//! Whether a lease that was deleted was taken away from this host, or went with all others, only the lease table can tell.
//! It is asked, and decides for peers and own lease alike.

use std::{collections::BTreeSet, net::Ipv4Addr, sync::Arc, time::Duration};

use ipnet::Ipv4Net;
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    time::{sleep, timeout},
};
use tracing::{debug, info, warn};

use crate::{
    config::NetworkConfig,
    health::Heartbeat,
    lease::OwnDeletion,
    registry::{LeaseRequest, OwnLease, OwnLeaseState, Registry, RegistryError},
    retry,
};

/// How long a host waits that found another living one with its address, before it looks whether that is gone.
pub(in crate::daemon) const CLAIM_PERIOD: Duration = Duration::from_secs(10);
/// For how long the lease table is waited for, before the store is asked again.
const JUDGEMENT_TIME: Duration = Duration::from_secs(15);

/// What becomes of the own lease.
#[derive(Debug)]
pub(in crate::daemon) enum RenewalEvent {
    /// It is kept for another term.
    Renewed,
    /// Another host claims it, and was answered.
    Claimed,
    /// It ended; another one is being taken.
    Lost(OwnLeaseState),
    /// Another living host has this one's address, and with it the lease.
    Contested(RegistryError),
    /// This one is held from now on. It may be the one before.
    Taken(OwnLease),
    /// It was deleted. How, is to be answered once it is known.
    Deleted(oneshot::Sender<OwnDeletion>),
    /// Somebody took it away by deleting it.
    Revoked,
    /// It is gone, and the network config in the store is another one by now: this differs.
    OtherConfig(Vec<String>),
}

/// How keeping a lease ended.
enum End {
    /// Nobody listens any more.
    Unheard,
    /// Somebody deleted it, and nothing else.
    Revoked,
    /// It is to be taken again, or another.
    Lost(OwnLeaseState),
}

/// Why no lease can be taken.
enum Refusal {
    Registry(RegistryError),
    /// The network config is another one, which differs in this.
    OtherConfig(Vec<String>),
}

impl From<RegistryError> for Refusal {
    fn from(error: RegistryError) -> Self {
        Self::Registry(error)
    }
}

/// Who keeps the lease.
pub(super) struct LeaseHolder {
    pub(super) registry: Registry,
    pub(super) request: LeaseRequest,
    /// The lease that this host has, or had last.
    pub(super) lease: OwnLease,
    /// This host's VTEP address, which may become another one.
    pub(super) public_ip: watch::Receiver<Ipv4Addr>,
    /// The subnets whose hosts may be well, though the store does not name them.
    pub(super) unnamed: watch::Receiver<BTreeSet<Ipv4Net>>,
    /// The config that the datapath is made for.
    pub(super) network: NetworkConfig,
    /// [`None`] where it has no term.
    pub(super) renew_interval: Option<Duration>,
    /// Somebody saw in the table what does not go with holding the lease.
    pub(super) doubt: Arc<Notify>,
    pub(super) events: mpsc::Sender<RenewalEvent>,
    pub(super) heartbeat: Heartbeat,
}

impl LeaseHolder {
    /// Keeps the lease, which the store has or is to be asked for. Returns when there is nothing more to keep, or nobody
    /// to tell.
    pub(super) async fn keep(mut self, mut is_held: bool) {
        loop {
            if !is_held && let Err(differences) = self.take().await {
                return self.tell(RenewalEvent::OtherConfig(differences)).await;
            }
            match self.hold().await {
                End::Unheard => return,
                End::Revoked => return self.tell(RenewalEvent::Revoked).await,
                End::Lost(state) => {
                    self.request.is_contested = matches!(state, OwnLeaseState::Contested(_));
                    self.tell(RenewalEvent::Lost(state)).await;
                }
            }
            is_held = false;
        }
    }

    /// Takes a lease, however long it takes; what it was is what is wished for.
    ///
    /// # Errors
    /// Where the network config is another one: what differs.
    async fn take(&mut self) -> Result<(), Vec<String>> {
        let mut back_off = retry::BackOff::default();
        loop {
            self.heartbeat.beat();
            match self.try_take().await {
                Ok(lease) => {
                    self.request.is_contested = false;
                    self.lease = lease.clone();
                    self.tell(RenewalEvent::Taken(lease)).await;
                    return Ok(());
                }
                Err(Refusal::OtherConfig(differences)) => return Err(differences),
                Err(Refusal::Registry(error @ RegistryError::Contested(_))) => {
                    self.tell(RenewalEvent::Contested(error)).await;
                    self.heartbeat.during(sleep(CLAIM_PERIOD)).await;
                }
                // Nothing is final: what worked at the start may work again, a certificate that is being replaced for one.
                Err(Refusal::Registry(error)) => back_off.wait(&error).await,
            }
        }
    }

    async fn try_take(&mut self) -> Result<OwnLease, Refusal> {
        self.request.public_ip = *self.public_ip.borrow_and_update();
        self.request.previous = Some(self.lease.key.subnet);
        self.request.vtep_mac = Some(self.lease.vtep_mac);
        self.request.avoid.clone_from(&self.unnamed.borrow_and_update());
        let (now, _) = self.registry.network_config().await?;
        if now == self.network {
            return Ok(self.heartbeat.during(self.registry.acquire(&self.network, &self.request)).await?);
        }
        // None can be taken for the datapath that there is. But one that the store has still is this host's still.
        let mut lease = self.lease.clone();
        match self.heartbeat.during(self.registry.renew(&mut lease, &self.request)).await? {
            OwnLeaseState::Held | OwnLeaseState::Claimed => Ok(lease),
            _ => Err(Refusal::OtherConfig(self.network.differences(&now))),
        }
    }

    /// Renews the lease until it is lost.
    async fn hold(&mut self) -> End {
        let mut back_off = retry::BackOff::default();
        let mut delay = self.renew_interval;
        let mut deletion = None;
        // One of its own: what says that this host is ready may be refused where all else works.
        let mut unready = retry::BackOff::default();
        let mut is_complete = false;
        loop {
            if !is_complete {
                match self.heartbeat.during(self.registry.complete()).await {
                    Ok(()) => is_complete = true,
                    Err(error) => {
                        let sooner = unready.delay();
                        warn!("{error}; saying again in {sooner:?} that this host is ready");
                        delay = Some(delay.map_or(sooner, |delay| delay.min(sooner)));
                    }
                }
            }
            let due = async {
                match delay {
                    Some(delay) => sleep(delay).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.heartbeat.during(due) => {}
                () = self.doubt.notified() => {}
                Ok(()) = self.public_ip.changed() => {}
                () = self.events.closed() => return End::Unheard,
            }
            self.heartbeat.beat();
            // First: a lease that names the address before looks like another host's.
            if let Err(error) = self.announce().await {
                let again = back_off.delay();
                warn!("{error}; announcing this host's other address again in {again:?}");
                delay = Some(again);
                continue;
            }
            let before = self.lease.clone();
            match self.heartbeat.during(self.registry.renew(&mut self.lease, &self.request)).await {
                Ok(state @ (OwnLeaseState::Held | OwnLeaseState::Claimed)) => {
                    debug!("lease {} renewed", self.lease.key);
                    if !self.lease.has_grant_of(&before) {
                        self.tell(RenewalEvent::Taken(self.lease.clone())).await;
                    }
                    let is_claimed = state == OwnLeaseState::Claimed;
                    self.tell(if is_claimed { RenewalEvent::Claimed } else { RenewalEvent::Renewed }).await;
                    back_off.reset();
                    delay = self.renew_interval;
                    deletion = None;
                }
                // Still gone after all that went with it was looked at.
                Ok(OwnLeaseState::Deleted) if deletion == Some(OwnDeletion::Alone) => return End::Revoked,
                Ok(OwnLeaseState::Deleted) => {
                    deletion = self.judged().await;
                    if deletion == Some(OwnDeletion::WithOthers) {
                        return End::Lost(OwnLeaseState::Deleted);
                    }
                    delay = Some(Duration::ZERO);
                }
                Ok(state) => return End::Lost(state),
                Err(error) => {
                    let again = back_off.delay();
                    warn!("{error}; renewing the lease again in {again:?}");
                    delay = Some(again);
                }
            }
        }
    }

    /// What the lease table makes of the deletion of the own lease. [`None`] where it has not heard of it, or sees the
    /// lease again.
    async fn judged(&self) -> Option<OwnDeletion> {
        let (sender, answer) = oneshot::channel();
        self.tell(RenewalEvent::Deleted(sender)).await;
        self.heartbeat.during(timeout(JUDGEMENT_TIME, answer)).await.ok()?.ok()
    }

    /// Has the lease name this host's address, where that has become another one.
    async fn announce(&mut self) -> Result<(), RegistryError> {
        let public_ip = *self.public_ip.borrow_and_update();
        if public_ip == self.request.public_ip {
            return Ok(());
        }
        self.registry.disconnect();
        if self.heartbeat.during(self.registry.announce(&mut self.lease, &self.request, public_ip)).await? {
            info!("the lease {} names {public_ip} from now on", self.lease.key);
        }
        // Where it was not as it should be, how it stands with it is looked at next.
        self.request.public_ip = public_ip;
        Ok(())
    }

    async fn tell(&self, event: RenewalEvent) {
        // Where nobody listens, the process ends.
        let _ended = self.events.send(event).await;
    }
}
