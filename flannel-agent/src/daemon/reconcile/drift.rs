//! Bringing back in step what somebody else changed on this host: what the kernel tells of, as it does, and what it tells
//! nobody of, by looking every second.

use std::time::Duration;

use tracing::warn;

use super::{COMPARE_PERIOD, Reconciler, status::DatapathStatus};
use crate::{
    bypass::BypassFlag,
    conntrack,
    dataplane::Repaired,
    device::{self, Changed},
    lease::LeaseTable,
    repair::Repair,
};

/// How often what changes without an event is looked at.
pub(in crate::daemon) const LOOK_PERIOD: Duration = Duration::from_secs(1);

/// What only others can repair, by what it is about.
const PINS: &str = "pin directory";
const FORWARDING: &str = "forwarding";
const DATAPATH: &str = "datapath";

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
                self.status.waiting(DATAPATH, None);
            }
            Err(error) => {
                self.status.waiting(DATAPATH, Some(format!("{error}; trying again in {COMPARE_PERIOD:?}")));
            }
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
        ensure_forwarding(&mut self.status);
        self.ask_peers().await;
        if self.ensure_conntrack() {
            self.status.repaired(Repair::Conntrack, "conntrack was strict about windows");
        }
        if !self.uplink.is_present || self.is_rebuild_due {
            self.compare_or_say(Changed::Topology, table).await;
        }
    }

    /// What is wrong with `subnet.env` that is to be made right by [writing it again](Self::restore_subnet_env).
    pub(in crate::daemon) fn subnet_env_damage(&mut self) -> Option<&'static str> {
        let wanted = self.target.subnet_env(self.cli.packet_rules.ip_masq);
        self.subnet_file.damage(&wanted, &mut self.status)
    }

    /// Writes `subnet.env` again. A status has to be beside it already: the CNI plugin takes one without for another daemon's.
    pub(in crate::daemon) fn restore_subnet_env(&mut self, damage: &str) {
        let wanted = self.target.subnet_env(self.cli.packet_rules.ip_masq);
        self.subnet_file.restore(&wanted, damage, &mut self.status);
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

/// Has the host forward packets.
pub(super) fn ensure_forwarding(status: &mut DatapathStatus) {
    match device::enable_forwarding() {
        Ok(changed) => {
            if changed {
                status.repaired(Repair::IpForward, "net.ipv4.ip_forward was off");
            }
            status.waiting(FORWARDING, None);
        }
        Err(error) => status.waiting(FORWARDING, Some(error.to_string())),
    }
}
