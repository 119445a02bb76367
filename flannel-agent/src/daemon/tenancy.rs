//! Keeping this host's own lease: renewing it while it is its own, and taking another where it is lost. Never taking
//! back what another host has by then.

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use tokio::{
    sync::{Notify, mpsc, watch},
    time::sleep,
};
use tracing::{debug, info, warn};

use crate::{
    config::NetworkConfig,
    health::Heartbeat,
    registry::{
        LeaseRequest, OwnLease, Standing,
        etcd::{Registry, RegistryError},
    },
    retry,
};

/// What becomes of the own lease.
#[derive(Debug)]
pub(super) enum TenancyEvent {
    /// It is kept for another term.
    Renewed,
    /// It ended; another one is being taken.
    Lost(Standing),
    /// This one is held from now on. It may be the one before.
    Taken(OwnLease),
    /// Somebody took it away by deleting it.
    Revoked,
    /// It ended, and the network config in the store is another one by now.
    OtherConfig,
}

/// Who keeps the lease.
pub(super) struct Tenant {
    pub(super) registry: Registry,
    pub(super) request: LeaseRequest,
    /// This host's VTEP address, which may become another one.
    pub(super) public_ip: watch::Receiver<Ipv4Addr>,
    /// The config that the datapath is made for.
    pub(super) network: NetworkConfig,
    pub(super) renew_interval: Duration,
    /// Somebody saw in the table what does not go with holding the lease.
    pub(super) doubt: Arc<Notify>,
    pub(super) events: mpsc::Sender<TenancyEvent>,
    pub(super) heartbeat: Heartbeat,
}

impl Tenant {
    /// Keeps the lease, or takes one where there is none. Returns when there is nothing more to keep, or nobody to tell.
    pub(super) async fn keep(mut self, mut lease: Option<OwnLease>) {
        loop {
            let held = match lease.take() {
                Some(lease) => lease,
                None => match self.take().await {
                    Some(lease) => lease,
                    None => return self.tell(TenancyEvent::OtherConfig).await,
                },
            };
            match self.hold(&held).await {
                Standing::Held => return,
                Standing::Revoked => return self.tell(TenancyEvent::Revoked).await,
                standing @ (Standing::Expired | Standing::Taken(_)) => {
                    // What it was is what is wished for.
                    self.request.previous = Some(held.key.subnet);
                    self.request.vtep_mac = Some(held.vtep_mac);
                    self.tell(TenancyEvent::Lost(standing)).await;
                }
            }
        }
    }

    /// Takes a lease, however long it takes. [`None`] where the network config is another one.
    async fn take(&mut self) -> Option<OwnLease> {
        let mut back_off = retry::BackOff::default();
        loop {
            self.heartbeat.beat();
            match self.try_take().await {
                Ok(Some(lease)) => {
                    self.tell(TenancyEvent::Taken(lease.clone())).await;
                    return Some(lease);
                }
                Ok(None) => return None,
                // Nothing is final: what worked at the start may work again, a certificate that is being replaced for one.
                Err(error) => back_off.wait(&error).await,
            }
        }
    }

    async fn try_take(&mut self) -> Result<Option<OwnLease>, RegistryError> {
        self.request.public_ip = *self.public_ip.borrow_and_update();
        let (now, _) = self.registry.network_config().await?;
        if now != self.network {
            return Ok(None);
        }
        self.registry.acquire(&self.network, &self.request).await.map(Some)
    }

    /// Renews the lease until it is lost. [`Standing::Held`] where nobody listens any more.
    async fn hold(&mut self, lease: &OwnLease) -> Standing {
        let mut back_off = retry::BackOff::default();
        let mut delay = self.renew_interval;
        loop {
            tokio::select! {
                () = self.heartbeat.during(sleep(delay)) => {}
                () = self.doubt.notified() => {}
                Ok(()) = self.public_ip.changed() => {}
                () = self.events.closed() => return Standing::Held,
            }
            self.heartbeat.beat();
            // First: a lease that names the address before looks like another host's.
            if let Err(error) = self.announce(lease).await {
                delay = back_off.delay();
                warn!("{error}; announcing this host's other address again in {delay:?}");
                continue;
            }
            match self.registry.standing(lease, &self.request).await {
                Ok(Standing::Held) => {
                    debug!("lease {} renewed", lease.key);
                    self.tell(TenancyEvent::Renewed).await;
                    back_off.reset();
                    delay = self.renew_interval;
                }
                Ok(standing) => return standing,
                Err(error) => {
                    delay = back_off.delay();
                    warn!("{error}; renewing the lease again in {delay:?}");
                }
            }
        }
    }

    /// Has the lease name this host's address, where that has become another one.
    async fn announce(&mut self, lease: &OwnLease) -> Result<(), RegistryError> {
        let public_ip = *self.public_ip.borrow_and_update();
        if public_ip == self.request.public_ip {
            return Ok(());
        }
        self.registry.disconnect();
        if self.registry.announce(lease, &self.request, public_ip).await? {
            info!("the lease {} names {public_ip} from now on", lease.key);
        }
        // Where it was not as it should be, how it stands with it is looked at next.
        self.request.public_ip = public_ip;
        Ok(())
    }

    async fn tell(&self, event: TenancyEvent) {
        // Where nobody listens, the process ends.
        let _ended = self.events.send(event).await;
    }
}
