//! What keeps a host in step whose network has no datapath (`alloc`): `subnet.env` says what lease and external interface come to.
//! Of the kernel nothing is touched, but for what an agent made here while the network had another backend.

use tracing::{info, warn};

use super::{Beginning, host::Host};
use crate::{
    cleanup,
    cli::Cli,
    device::{Changed, DeviceEvent, Link},
    registry::OwnLease,
};

/// Keeps `subnet.env` in step.
pub(in crate::daemon) struct Allocation<'a> {
    pub(in crate::daemon) host: Host<'a>,
}

impl<'a> Allocation<'a> {
    /// Makes nothing yet.
    pub(in crate::daemon) fn new(cli: &'a Cli, beginning: Beginning<'_>) -> Self {
        if cli.packet_rules.ip_masq {
            warn!(
                "--ip-masq: with the backend {} the agent sets no packet rules; subnet.env says so, for who masquerades then",
                beginning.backend.kind()
            );
        }
        Self { host: Host::new(cli, beginning, false) }
    }

    /// Takes away what an agent made while the network had another backend. What can't be is said and left. The link that other
    /// hosts are behind.
    pub(in crate::daemon) async fn make(&self) -> Link {
        let Host { cli, netlink, backend, uplink, .. } = &self.host;
        if let Err(error) = cleanup::leave_datapath(cli, netlink, backend.vni(), backend.kind()).await {
            warn!("something of another backend stays: {error}");
        }
        uplink.external.link.clone()
    }

    pub(in crate::daemon) fn say_carried(&self) {
        let Host { lease, backend, .. } = &self.host;
        info!("{} is leased; with the backend {} nothing is carried", lease.key.subnet, backend.kind());
    }

    /// The next change of links, addresses or routes.
    pub(in crate::daemon) async fn next(&mut self) -> DeviceEvent {
        match self.host.device_events.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }

    pub(in crate::daemon) async fn see_to(&mut self, event: DeviceEvent) {
        if event.kind == Changed::Topology {
            self.review().await;
        }
    }

    /// Looks at everything, whether or not something was told of.
    pub(in crate::daemon) async fn review(&mut self) {
        if self.host.find_external().await.is_some() {
            self.host.tell_external();
        }
    }

    /// Looks at what is still to be done.
    pub(in crate::daemon) async fn look(&mut self) {
        if !self.host.uplink.is_present {
            self.review().await;
        }
        self.host.write_where_due();
    }

    /// Goes on with a lease.
    pub(in crate::daemon) fn move_to(&mut self, lease: OwnLease) {
        if self.host.take_lease(lease) {
            self.host.tell_move();
        }
    }
}
