//! Bringing back in step what somebody else changed on this host: what the kernel tells of, as it does, and what it tells
//! nobody of, by looking every second.

use std::time::Duration;

use tracing::warn;

use super::{COMPARE_PERIOD, Reconciler};
use crate::{
    bypass::BypassFlag,
    conntrack,
    dataplane::Repaired,
    device::{self, Changed},
    lease::LeaseTable,
    repair::Repair,
    subnet_env::State,
};

/// How often what changes without an event is looked at.
pub(in crate::daemon) const LOOK_PERIOD: Duration = Duration::from_secs(1);

/// What only others can repair, by what it is about.
const PINS: &str = "pin directory";
const FORWARDING: &str = "forwarding";
const SUBNET_ENV: &str = "subnet.env";

impl Reconciler<'_> {
    /// Repairs and compares. What fails is said, and tried again at the next event or period.
    pub(super) async fn compare_or_say(&mut self, event: Changed, table: &LeaseTable) {
        if event == Changed::Topology {
            self.follow_external(table).await;
        }
        match event {
            Changed::TrafficControl | Changed::Neighbour => {}
            Changed::Way => self.choose_routes_again(table).await,
            Changed::Route | Changed::Topology => self.ensure_or_say(table).await,
        }
        if let Err(error) = self.compare(event, table).await {
            warn!("{error}; comparing again in {COMPARE_PERIOD:?}");
        }
    }

    pub(super) async fn ensure_or_say(&mut self, table: &LeaseTable) {
        // Without it there is nothing to make the device on.
        if !self.uplink.is_present {
            return;
        }
        match self.ensure_datapath(table).await {
            Ok((link, repairs)) => {
                for repair in repairs {
                    self.status.repaired(repair, &link.name);
                }
            }
            Err(error) => warn!("{error}; trying again in {COMPARE_PERIOD:?}"),
        }
    }

    /// Looks at what changes without an event.
    pub(in crate::daemon) async fn look(&mut self, table: &LeaseTable) {
        match self.dataplane.repair() {
            Ok(Repaired { programs, pins }) => {
                for _ in 0..programs {
                    self.status.repaired(Repair::Program, "a program was detached");
                }
                if pins > 0 {
                    self.status.repaired(Repair::Pin, &format!("{pins} pins were gone"));
                }
                self.status.waiting(PINS, None);
            }
            Err(error) => self.status.waiting(PINS, Some(format!("{error}; the programs run on meanwhile"))),
        }
        match self.dataplane.peers.verify() {
            Ok(0) => {}
            Ok(entries) => self.status.repaired(Repair::MapEntry, &format!("{entries} entries had other values")),
            Err(error) => warn!("{error}; looking again in {LOOK_PERIOD:?}"),
        }
        match device::enable_forwarding() {
            Ok(changed) => {
                if changed {
                    self.status.repaired(Repair::IpForward, "net.ipv4.ip_forward was off");
                }
                self.status.waiting(FORWARDING, None);
            }
            Err(error) => self.status.waiting(FORWARDING, Some(error.to_string())),
        }
        self.ask_peers().await;
        if self.ensure_conntrack() {
            self.status.repaired(Repair::Conntrack, "conntrack was strict about windows");
        }
        if !self.uplink.is_present || self.uplink.is_rebuild_due {
            self.compare_or_say(Changed::Topology, table).await;
        }
    }

    /// What is wrong with `subnet.env` that is to be made right by [writing it again](Self::restore_subnet_env).
    pub(in crate::daemon) fn subnet_env_damage(&mut self) -> Option<&'static str> {
        let path = self.cli.subnet_file();
        let state = self.target.subnet_env(self.cli.packet_rules.ip_masq).state(&path);
        let was_incomplete = std::mem::replace(&mut self.is_subnet_env_incomplete, state == State::Incomplete);
        match state {
            State::Gone => Some("was gone"),
            // Not at once: somebody may be writing it.
            State::Incomplete => was_incomplete.then_some("lacked what a runtime needs"),
            State::AsItShould => {
                self.status.waiting(SUBNET_ENV, None);
                None
            }
            // Another daemon serves this host's pods now, or an administrator means it. Two that correct each other would
            // never end.
            State::OfAnother(subnet) => {
                let own = self.target.lease.key.subnet;
                let text = format!(
                    "{} names {subnet}, which somebody else wrote, and not this host's {own}; remove it to have it written again",
                    path.display()
                );
                self.status.waiting(SUBNET_ENV, Some(text));
                None
            }
        }
    }

    /// Writes `subnet.env` again. A status has to be beside it already: the CNI plugin takes one without for another daemon's.
    pub(in crate::daemon) fn restore_subnet_env(&mut self, damage: &str) {
        match self.write_subnet_env() {
            Ok(()) => {
                self.is_subnet_env_incomplete = false;
                self.status.waiting(SUBNET_ENV, None);
                self.status.repaired(Repair::SubnetEnv, &format!("{} {damage}", self.cli.subnet_file().display()));
            }
            Err(error) => self.status.waiting(SUBNET_ENV, Some(error.to_string())),
        }
    }

    /// Where the bypass needs it. Whether there was something to do.
    pub(super) fn ensure_conntrack(&mut self) -> bool {
        let has_bypass = self.cli.bypass != BypassFlag::Off;
        let changed = has_bypass && self.bypass.conntrack.ensure();
        if has_bypass {
            let ends = self.bypass.endings.ensure(&self.dataplane.forgetter());
            self.status.ends(ends);
        }
        self.status.bypass(self.cli.bypass, self.cli.bypass_time(), conntrack::is_liberal());
        changed
    }
}
