//! What keeps a host in step whose network has no datapath (`alloc`): `subnet.env` says what lease and external interface come to.
//! Of the kernel nothing is touched, but for what an agent made here while the network had another backend.

use tokio::sync::mpsc;
use tracing::{info, warn};

use super::{
    Beginning, Event,
    status::DatapathStatus,
    subnet_file::SubnetFile,
    uplink::{EXTERNAL, Uplink, describe},
};
use crate::{
    backend::Backend,
    cleanup,
    cli::Cli,
    config::NetworkConfig,
    daemon::DaemonError,
    device::{Changed, DeviceEvent, Link, Netlink, external::External},
    registry::OwnLease,
    repair::Repair,
    status::Status,
    subnet_env::SubnetEnv,
};

/// Keeps `subnet.env` in step.
pub(in crate::daemon) struct Allocation<'a> {
    cli: &'a Cli,
    netlink: Netlink,
    device_events: mpsc::Receiver<DeviceEvent>,
    network: NetworkConfig,
    lease: OwnLease,
    backend: Backend,
    uplink: Uplink,
    subnet_file: SubnetFile,
    /// The file is still to be brought in step.
    is_write_due: bool,
    status: DatapathStatus,
    events: Vec<Event>,
}

impl<'a> Allocation<'a> {
    /// Makes nothing yet.
    pub(in crate::daemon) fn new(cli: &'a Cli, beginning: Beginning<'_>) -> Self {
        let Beginning { netlink, device_events, features, network, lease, selection, external, backend, registry: _ } =
            beginning;
        if cli.packet_rules.ip_masq {
            warn!(
                "--ip-masq: with the backend {} the agent sets no packet rules; subnet.env says so, for who masquerades then",
                backend.kind()
            );
        }
        Self {
            cli,
            netlink,
            device_events,
            network,
            lease,
            status: DatapathStatus::new(features, &external, &backend),
            subnet_file: SubnetFile::new(cli, backend.vni()),
            backend,
            uplink: Uplink::new(selection, external),
            is_write_due: false,
            events: Vec::new(),
        }
    }

    /// Takes away what an agent made while the network had another backend. What can't be is said and left. The link that other
    /// hosts are behind.
    pub(in crate::daemon) async fn make(&self) -> Link {
        if let Err(error) =
            cleanup::leave_datapath(self.cli, &self.netlink, self.backend.vni(), self.backend.kind()).await
        {
            warn!("something of another backend stays: {error}");
        }
        self.uplink.external.link.clone()
    }

    pub(in crate::daemon) fn say_carried(&self) {
        info!("{} is leased; with the backend {} nothing is carried", self.lease.key.subnet, self.backend.kind());
    }

    /// The next change of links, addresses or routes.
    pub(in crate::daemon) async fn next(&mut self) -> DeviceEvent {
        match self.device_events.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }

    pub(in crate::daemon) async fn see_to(&mut self, event: DeviceEvent) {
        if event.kind == Changed::Topology {
            self.follow_external().await;
        }
    }

    /// Looks at everything, whether or not something was told of.
    pub(in crate::daemon) async fn review(&mut self) {
        self.follow_external().await;
    }

    /// Looks at what is still to be done.
    pub(in crate::daemon) async fn look(&mut self) {
        if !self.uplink.is_present {
            self.follow_external().await;
        }
        if self.is_write_due {
            self.write_or_say();
        }
    }

    /// Goes on with a lease.
    pub(in crate::daemon) fn move_to(&mut self, lease: OwnLease) {
        let before = std::mem::replace(&mut self.lease, lease).key;
        let now = self.lease.key;
        if before == now {
            info!("the lease of {} is held again", now.subnet);
            return;
        }
        warn!(
            "this host moves from {} to {}: subnet.env is rewritten, and its pods need new addresses",
            before.subnet, now.subnet
        );
        self.write_or_say();
        // What overlapped the subnet that it had was passed over.
        self.events.push(Event::Moved);
    }

    async fn follow_external(&mut self) {
        let found = match self.uplink.find_again(&self.netlink).await {
            Ok(Some(found)) => found,
            Ok(None) => return,
            Err(error) => return self.status.waiting(EXTERNAL, Some(self.uplink.missing(&error))),
        };
        self.status.waiting(EXTERNAL, None);
        if found == self.uplink.external {
            return;
        }
        match Backend::new(&self.network.backend, &found) {
            Ok(backend) => self.backend = backend,
            Err(error) => return warn!("{error}"),
        }
        info!("the external interface is {}, before {}", describe(&found), describe(&self.uplink.external));
        let address_before = std::mem::replace(&mut self.uplink.external, found).address;
        self.status.external(&self.uplink.external, &self.backend);
        let External { address, public_ip, .. } = self.uplink.external;
        self.events.push(Event::External { public_ip, is_other_source: address != address_before });
        self.write_or_say();
        self.status.repaired(Repair::ExternalInterface, &describe(&self.uplink.external));
    }

    fn write_or_say(&mut self) {
        let written = self.write_subnet_env();
        self.is_write_due = written.is_err();
        if let Err(error) = written {
            warn!("{error}; trying again");
        }
    }

    fn subnet_env(&self) -> SubnetEnv {
        SubnetEnv {
            network: self.network.network,
            subnet: self.lease.key.subnet,
            mtu: self.backend.mtu(),
            // Nobody does so far: who reads it may.
            ip_masq: false,
        }
    }

    pub(in crate::daemon) fn write_subnet_env(&self) -> Result<(), DaemonError> {
        self.subnet_file.write(&self.subnet_env())
    }

    /// As [`super::Reconciler::subnet_env_damage`].
    pub(in crate::daemon) fn subnet_env_damage(&mut self) -> Option<&'static str> {
        self.subnet_file.damage(&self.subnet_env(), &mut self.status)
    }

    /// As [`super::Reconciler::restore_subnet_env`].
    pub(in crate::daemon) fn restore_subnet_env(&mut self, damage: &str) {
        let wanted = self.subnet_env();
        self.subnet_file.restore(&wanted, damage, &mut self.status);
    }

    pub(in crate::daemon) fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    pub(in crate::daemon) const fn is_told_otherwise(&self) -> bool {
        self.status.is_due
    }

    pub(in crate::daemon) fn tell(&mut self, status: &mut Status) {
        self.status.tell(status);
    }
}
