//! What is kept in step where no programs are, whatever carries the packets: lease, external interface and `subnet.env`.

use tokio::sync::mpsc;
use tracing::{info, warn};

use super::{
    Beginning, Event, LOOK_PERIOD,
    status::DatapathStatus,
    subnet_file::SubnetFile,
    uplink::{EXTERNAL, Uplink, describe},
};
use crate::{
    backend::Backend,
    cli::Cli,
    config::NetworkConfig,
    daemon::DaemonError,
    device::{DeviceEvent, Netlink, external::External},
    registry::OwnLease,
    repair::Repair,
    status::Status,
    subnet_env::SubnetEnv,
};

/// A host without programs.
pub(in crate::daemon) struct Host<'a> {
    pub(super) cli: &'a Cli,
    pub(super) netlink: Netlink,
    pub(super) device_events: mpsc::Receiver<DeviceEvent>,
    pub(super) network: NetworkConfig,
    pub(super) lease: OwnLease,
    pub(super) backend: Backend,
    pub(super) uplink: Uplink,
    /// Whether the agent masquerades what leaves the Network.
    ip_masq: bool,
    subnet_file: SubnetFile,
    /// The file is still to be brought in step.
    is_write_due: bool,
    pub(super) status: DatapathStatus,
    events: Vec<Event>,
}

/// What is different about the external interface.
pub(super) struct ExternalChange {
    /// Whether this host sends from another address than before.
    pub(super) is_other_source: bool,
}

impl<'a> Host<'a> {
    /// Makes nothing yet.
    pub(super) fn new(cli: &'a Cli, beginning: Beginning<'_>, ip_masq: bool) -> Self {
        let Beginning { netlink, device_events, features, network, lease, selection, external, backend, registry: _ } =
            beginning;
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
            ip_masq,
            is_write_due: false,
            events: Vec::new(),
        }
    }

    /// Takes note of a lease. Whether it is of another subnet than the one before: then all is to be made for that, and
    /// [told](Self::tell_move).
    pub(super) fn take_lease(&mut self, lease: OwnLease) -> bool {
        let before = std::mem::replace(&mut self.lease, lease).key;
        let now = self.lease.key;
        if before == now {
            info!("the lease of {} is held again", now.subnet);
            return false;
        }
        warn!(
            "this host moves from {} to {}: subnet.env is rewritten, and its pods need new addresses",
            before.subnet, now.subnet
        );
        true
    }

    /// Everything is made for another lease.
    pub(super) fn tell_move(&mut self) {
        self.write_or_say();
        // What overlapped the subnet that it had was skipped.
        self.events.push(Event::Moved);
    }

    /// Finds the external interface again. What is different about it: then all is to be made for that, and
    /// [told](Self::tell_external).
    pub(super) async fn find_external(&mut self) -> Option<ExternalChange> {
        let found = match self.uplink.find_again(&self.netlink).await {
            Ok(found) => found?,
            Err(error) => {
                self.status.waiting(EXTERNAL, Some(self.uplink.missing(&error)));
                return None;
            }
        };
        self.status.waiting(EXTERNAL, None);
        if found == self.uplink.external {
            return None;
        }
        match Backend::new(&self.network.backend, &found) {
            Ok(backend) => self.backend = backend,
            Err(error) => {
                warn!("{error}; trying again in {LOOK_PERIOD:?}");
                return None;
            }
        }
        info!("the external interface is {}, before {}", describe(&found), describe(&self.uplink.external));
        let address_before = std::mem::replace(&mut self.uplink.external, found).address;
        self.status.external(&self.uplink.external, &self.backend);
        let External { address, public_ip, .. } = self.uplink.external;
        let is_other_source = address != address_before;
        self.events.push(Event::External { public_ip, is_other_source });
        Some(ExternalChange { is_other_source })
    }

    /// Everything is made for another external interface.
    pub(super) fn tell_external(&mut self) {
        self.write_or_say();
        self.status.repaired(Repair::ExternalInterface, &describe(&self.uplink.external));
    }

    /// Writes `subnet.env` where that has failed.
    pub(super) fn write_where_due(&mut self) {
        if self.is_write_due {
            self.write_or_say();
        }
    }

    fn write_or_say(&mut self) {
        let written = self.write_subnet_env();
        self.is_write_due = written.is_err();
        if let Err(error) = written {
            warn!("{error}; trying again in {LOOK_PERIOD:?}");
        }
    }

    fn subnet_env(&self) -> SubnetEnv {
        let (network, subnet, mtu) = (self.network.network, self.lease.key.subnet, self.backend.mtu());
        SubnetEnv { network, subnet, mtu, ip_masq: self.ip_masq }
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
