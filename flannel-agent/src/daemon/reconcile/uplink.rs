//! Following the external interface.

use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::{Event, LOOK_PERIOD, Reconciler};
use crate::{
    backend::Backend,
    cli::Cli,
    daemon::DaemonError,
    device::{
        Link,
        external::{External, SelectError, Selection},
        offload::Offloads,
    },
    lease::LeaseTable,
    repair::Repair,
    xdp,
};

/// For how long another interface has to be the right one before the tunnel moves to it.
const SETTLED: Duration = Duration::from_millis(900);
/// What only others can repair.
const EXTERNAL: &str = "external interface";

/// The external interface, and what hangs on it.
pub(super) struct Uplink {
    /// The rule that it is chosen by.
    pub(super) selection: Selection,
    pub(super) external: External,
    /// Whether it was there when it was last looked for.
    pub(super) is_present: bool,
    /// What depends on it is still to be brought in step.
    pub(super) is_rebuild_due: bool,
    /// Since when another interface is the right one.
    pub(super) other_since: Option<Instant>,
    pub(super) xdp: xdp::Choice,
}

impl Reconciler<'_> {
    /// Finds the external interface again, by the rule that it was chosen by. Where anything about it is different, all
    /// that depends on it is brought in step.
    pub(super) async fn follow_external(&mut self, table: &LeaseTable) {
        let found = self.netlink.external_interface_again(&self.uplink.selection, &self.uplink.external).await;
        let found = match found {
            Ok(found) => found,
            Err(error) => return self.miss_external(&error),
        };
        if found.link.name == self.uplink.external.link.name {
            self.uplink.other_since = None;
        } else if self.uplink.other_since.get_or_insert_with(Instant::now).elapsed() < SETTLED {
            // The one before may just be coming back.
            self.uplink.is_present = false;
            return;
        }
        let is_same = found == self.uplink.external;
        if is_same && !self.uplink.is_rebuild_due {
            self.uplink.is_present = true;
            self.status.waiting(EXTERNAL, None);
            return;
        }
        if !is_same {
            info!("the external interface is {}, before {}", describe(&found), describe(&self.uplink.external));
        }
        let result = self.move_to_external(found, table).await;
        match result {
            Ok(()) => {
                self.status.waiting(EXTERNAL, None);
                self.status.repaired(Repair::ExternalInterface, &describe(&self.uplink.external));
            }
            Err(error) => warn!("{error}; trying again in {LOOK_PERIOD:?}"),
        }
    }

    async fn move_to_external(&mut self, external: External, table: &LeaseTable) -> Result<(), DaemonError> {
        self.uplink.is_rebuild_due = true;
        self.uplink.is_present = true;
        let backend = Backend::new(&self.target.network.backend, &external)?;
        let address_before = std::mem::replace(&mut self.uplink.external, external).address;
        self.target.backend = backend;
        self.underlay.set_external(self.uplink.external.clone());
        self.uplink.xdp = choose_xdp(self.cli, &self.target.backend, &self.uplink.external.link).await;
        self.status.external(&self.uplink.external, &self.target.backend);
        let External { address, public_ip, .. } = self.uplink.external;
        self.events.push(Event::External { public_ip, is_other_source: address != address_before });
        self.rebuild(table).await?;
        self.uplink.is_rebuild_due = false;
        Ok(())
    }

    fn miss_external(&mut self, error: &SelectError) {
        self.uplink.is_present = false;
        let name = &self.uplink.external.link.name;
        self.status.waiting(EXTERNAL, Some(format!("the external interface {name} is away, waiting for it: {error}")));
    }
}

/// Whether XDP takes packets out of the tunnel.
pub(super) async fn choose_xdp(cli: &Cli, backend: &Backend, link: &Link) -> xdp::Choice {
    if backend.own_device_name().is_none() {
        return xdp::Choice { mode: None, reason: format!("{} has no tunnel", backend.kind()) };
    }
    xdp::choose(cli.xdp, link, &Offloads::of(link).await)
}

fn describe(external: &External) -> String {
    let External { link, address, public_ip } = external;
    format!("{} ({}) with address {address}, published as {public_ip}, MTU {}", link.name, link.index, link.mtu)
}
