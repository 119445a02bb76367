//! Following the external interface.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use tracing::{info, warn};

use super::{Event, LOOK_PERIOD, Reconciler};
use crate::{
    backend::Backend,
    cli::Cli,
    daemon::DaemonError,
    device::{
        AddressKind, Link, Netlink,
        external::{External, SelectError, Selection},
        offload::Offloads,
    },
    lease::LeaseTable,
    repair::Repair,
    xdp,
};

/// For how long another interface has to be the right one before the tunnel moves to it.
const SETTLED: Duration = Duration::from_millis(900);
/// For how long a link has to be without its own address before one counts that may move from host to host: a DHCP client that is
/// restarted has its lease again by then.
const OWN_AWAY: Duration = Duration::from_secs(10);
/// What only others can repair.
pub(super) const EXTERNAL: &str = "external interface";

/// The external interface, and what hangs on it.
pub(super) struct Uplink {
    /// The rule that it is chosen by.
    pub(super) selection: Selection,
    pub(super) external: External,
    /// Whether it was there when it was last looked for.
    pub(super) is_present: bool,
    /// How the address stands on its link, once that was looked at.
    kind: Option<AddressKind>,
    /// The address before, where the one now may move from host to host. It counts as soon as it is there again.
    former: Option<Ipv4Addr>,
    /// Since when another interface, or such an address, is the right one.
    other_since: Option<Instant>,
}

impl Uplink {
    /// That of a host which has just begun.
    pub(super) const fn new(selection: Selection, external: External) -> Self {
        Self { selection, external, is_present: true, kind: None, former: None, other_since: None }
    }

    /// Finds it again, by the rule that it was chosen by. [`None`] where that has just become another link: the one before may
    /// just be coming back.
    ///
    /// # Errors
    /// [`SelectError`] where it is away.
    pub(super) async fn find_again(&mut self, netlink: &Netlink) -> Result<Option<External>, SelectError> {
        self.is_present = false;
        let before = &self.external;
        let (found, kind) = netlink.external_interface_again(&self.selection, before, self.former).await?;
        let is_other_link = found.link.index != before.link.index && found.link.name != before.link.name;
        let is_other_address = found.address != before.address;
        let kinds = self.kind.zip(kind).filter(|_| is_other_address && !is_other_link);
        let may_be_floating = kinds.is_some_and(|(before, now)| before.may_be_floating(now));
        if is_other_link || may_be_floating {
            let waited = self.other_since.get_or_insert_with(Instant::now).elapsed();
            if may_be_floating && waited < OWN_AWAY {
                return Err(SelectError::NoMatch(format!(
                    "it has lost its address {}, and {} of {} may be one that moves from host to host",
                    before.address, found.address, found.link.name
                )));
            }
            if waited < SETTLED {
                return Ok(None);
            }
        }
        if is_other_address {
            self.former = may_be_floating.then_some(before.address);
        }
        (self.kind, self.other_since, self.is_present) = (kind, None, true);
        Ok(Some(found))
    }

    /// That it is away, in words.
    pub(super) fn missing(&self, error: &SelectError) -> String {
        format!("the external interface {} is away, waiting for it: {error}", self.external.link.name)
    }
}

impl Reconciler<'_> {
    /// Finds the external interface again. Where anything about it is different, all that depends on it is brought in step.
    pub(super) async fn follow_external(&mut self, table: &LeaseTable) {
        let found = match self.uplink.find_again(&self.netlink).await {
            Ok(Some(found)) => found,
            Ok(None) => return,
            Err(error) => return self.status.waiting(EXTERNAL, Some(self.uplink.missing(&error))),
        };
        let is_same = found == self.uplink.external;
        if is_same && !self.is_rebuild_due {
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
        self.is_rebuild_due = true;
        let backend = Backend::new(&self.target.network.backend, &external)?;
        let address_before = std::mem::replace(&mut self.uplink.external, external).address;
        self.target.backend = backend;
        self.underlay.set_external(self.uplink.external.clone(), self.target.backend.mtu());
        self.xdp = choose_xdp(self.cli, &self.target.backend, &self.uplink.external.link).await;
        self.status.external(&self.uplink.external, &self.target.backend);
        let External { address, public_ip, .. } = self.uplink.external;
        self.events.push(Event::External { public_ip, is_other_source: address != address_before });
        if self.target.backend.own_device_name().is_none() {
            // Those over another interface would stand in the way.
            let (network, kept) = (self.target.network.network, Some(self.uplink.external.link.index));
            self.netlink.remove_link_routes(network, kept).await?;
        }
        self.rebuild(table).await?;
        self.is_rebuild_due = false;
        Ok(())
    }
}

/// Whether XDP takes packets out of the tunnel.
pub(super) async fn choose_xdp(cli: &Cli, backend: &Backend, link: &Link) -> xdp::Choice {
    if backend.own_device_name().is_none() {
        return xdp::Choice { mode: None, reason: format!("{} has no tunnel", backend.kind()) };
    }
    xdp::choose(cli.xdp, link, &Offloads::of(link).await)
}

pub(super) fn describe(external: &External) -> String {
    let External { link, address, public_ip } = external;
    format!("{} ({}) with address {address}, published as {public_ip}, MTU {}", link.name, link.index, link.mtu)
}
