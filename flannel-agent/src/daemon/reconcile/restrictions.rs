//! What has to see each packet of this host, as each observer found it last, and what follows from all of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use tracing::{debug, info, warn};

use super::{COMPARE_PERIOD, Reconciler};
use crate::{
    bypass::{BypassFlag, Kind, Plan, Restriction, Scope},
    daemon::DaemonError,
    device::{
        Changed, PodLink, UnderlayCriteria,
        observers::{Places, Tap},
        routing_rules::PolicyRule,
    },
    lease::LeaseTable,
};

/// How often it is looked who captures; programs at TCX hooks are looked at every second time.
pub(in crate::daemon) const WATCH_PERIOD: Duration = Duration::from_millis(250);
/// After so many looks, programs of others are looked at as if they were new.
const DOUBT_LOOKS: u32 = 40;

/// Who looks for restrictions. Each says all that it has found, and what it said before is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Observer {
    /// Queues and filters.
    TrafficControl,
    /// XDP programs.
    Xdp,
    /// Programs at TCX hooks.
    Tcx,
    /// Packet sockets.
    Captures,
    /// What pods' links are told.
    Settings,
    /// conntrack's helpers, at the ports where they are always.
    Helpers,
    /// Packet rules.
    Rules,
    /// Routing rules.
    Routing,
}

/// What is known.
pub(super) struct Restrictions {
    flag: BypassFlag,
    found: BTreeMap<Observer, BTreeSet<Restriction>>,
    plan: Plan,
    /// Where to look.
    pub(super) places: Places,
    has_tcx: bool,
    looks: u32,
}

impl Restrictions {
    pub(super) fn new(flag: BypassFlag, has_tcx: bool) -> Self {
        // Until packet rules were read, they may be about tunnel packets.
        let plan = Plan { left_in_tunnel: true, ..Plan::of(flag, []) };
        Self { flag, found: BTreeMap::new(), plan, places: Places::default(), has_tcx, looks: 0 }
    }

    /// Whether packet rules concern tunnel packets that come in. Whether that is different.
    pub(super) const fn leave_in_tunnel(&mut self, are_concerned: bool) -> bool {
        std::mem::replace(&mut self.plan.left_in_tunnel, are_concerned) != are_concerned
    }

    /// Takes what an observer has found. Whether anything is different.
    pub(super) fn replace(&mut self, observer: Observer, found: BTreeSet<Restriction>) -> bool {
        let before = self.found.entry(observer).or_default();
        if *before == found {
            return false;
        }
        // What is always there is no news.
        let is_news = |restriction: &&Restriction| restriction.kind != Kind::Helper;
        let flag = self.flag;
        for restriction in found.difference(before).filter(is_news) {
            let verb = if flag.obeys(restriction) { "restricts the bypass" } else { "is only named" };
            info!("{verb}: {} ({})", restriction.subject, restriction.kind.label());
        }
        for restriction in before.difference(&found).filter(is_news) {
            let verb = if flag.obeys(restriction) { "no longer restricts the bypass" } else { "is gone" };
            info!("{verb}: {} ({})", restriction.subject, restriction.kind.label());
        }
        *before = found;
        let left_in_tunnel = self.plan.left_in_tunnel;
        self.plan = Plan { left_in_tunnel, ..Plan::of(self.flag, self.all()) };
        true
    }

    /// What takes the stack.
    pub(super) const fn plan(&self) -> &Plan {
        &self.plan
    }

    /// All that was found.
    pub(super) fn all(&self) -> impl Iterator<Item = &Restriction> {
        self.found.values().flatten()
    }
}

impl Reconciler<'_> {
    /// Finds the pods, and what there is on the devices that their packets cross.
    pub(super) async fn look_at_links(&mut self) -> Result<Vec<PodLink>, DaemonError> {
        let (subnet, routed) = (self.target.lease.key.subnet, &self.routes.host.pods);
        let criteria = UnderlayCriteria {
            external: self.uplink.external.link.index,
            overlay: self.underlay.overlay(),
            network: self.target.network.network,
            used: self.underlay.used(),
        };
        let places = self.netlink.places(subnet, routed, criteria).await?;
        match self.netlink.traffic_control(&places).await {
            Ok(found) => self.observed(Observer::TrafficControl, found),
            Err(error) => warn!("{error}; who has to see each packet may not; trying again in {COMPARE_PERIOD:?}"),
        }
        self.bypass.restrictions.places = places;
        self.observed(Observer::Settings, self.bypass.restrictions.places.settings());
        self.look_at_programs();
        self.look_at_captures();
        self.observed(Observer::Xdp, self.bypass.restrictions.places.xdp_programs());
        Ok(self.bypass.restrictions.places.pods.clone())
    }

    /// Looks for what the kernel does not tell of.
    pub(in crate::daemon) async fn watch_observers(&mut self) {
        self.bypass.restrictions.looks = self.bypass.restrictions.looks.wrapping_add(1);
        self.look_at_captures();
        if self.bypass.restrictions.looks.is_multiple_of(2) {
            self.look_at_programs();
            match self.netlink.look_for_xdp(&mut self.bypass.restrictions.places).await {
                Ok(()) => self.observed(Observer::Xdp, self.bypass.restrictions.places.xdp_programs()),
                Err(error) => debug!("{error}; looking again in {WATCH_PERIOD:?}"),
            }
        }
        if self.bypass.restrictions.looks.is_multiple_of(DOUBT_LOOKS) {
            self.dataplane.doubt_foreign_programs();
        }
    }

    /// Looks for routing rules by which tunnel packets to one peer go different ways. Whether there are others than before, so that
    /// the ways are to be looked up again.
    pub(super) async fn look_at_routing_rules(&mut self, table: &LeaseTable) -> bool {
        if self.target.backend.own_device_name().is_none() {
            // Packets to peers are pods' own, and the stack routes them.
            return false;
        }
        // What a filter or a program writes into marks can't be told.
        let is_program = |restriction: &Restriction| matches!(restriction.kind, Kind::Filter | Kind::Program);
        let marks = if self.bypass.restrictions.all().any(is_program) { u32::MAX } else { self.bypass.inspected.marks };
        let peers = table.iter().map(|(_, peer)| peer.public_ip).collect();
        match self.netlink.rules_by_packet(self.underlay.tunnel_packets(marks), &peers).await {
            Ok(found) => {
                let has_marks = self.status.features().fib_lookup_mark;
                let (followed, named): (_, Vec<_>) = found.into_iter().partition(|rule| !rule.is_by_mark || has_marks);
                self.observed(Observer::Routing, named.iter().map(by_mark).collect());
                self.underlay.set_policy_rules(followed)
            }
            Err(error) => {
                warn!("{error}; routing rules for tunnel packets are looked for again later");
                false
            }
        }
    }

    fn look_at_programs(&mut self) {
        if !self.bypass.restrictions.has_tcx {
            return;
        }
        let places = &self.bypass.restrictions.places;
        let programs = self.dataplane.foreign_programs(places.indexes());
        let found = programs.into_iter().flat_map(|(index, side, id)| {
            places.restrictions(Kind::Program, &format!("TCX program {id}"), index, side)
        });
        let found = found.collect();
        self.observed(Observer::Tcx, found);
    }

    fn look_at_captures(&mut self) {
        let tap = self.xdp.mode.map_or(Tap::Tunnelled, |_| Tap::Decapsulated(self.target.backend.port()));
        match self.bypass.restrictions.places.captures(tap) {
            Ok(found) => self.observed(Observer::Captures, found),
            Err(error) => debug!("who captures can't be told: {error}"),
        }
    }

    /// Takes what an observer has found, and has the dataplane act on it.
    pub(super) fn observed(&mut self, observer: Observer, found: BTreeSet<Restriction>) {
        if self.bypass.restrictions.replace(observer, found) {
            if matches!(observer, Observer::TrafficControl | Observer::Tcx) {
                // It may mark packets.
                self.schedule.comparison = self.schedule.comparison.max(Some(Changed::Way));
            }
            self.status.restrictions(self.bypass.restrictions.all());
            self.restrict_or_say();
        }
    }

    /// Has the dataplane carry the plan out.
    pub(super) fn restrict_or_say(&mut self) {
        if let Err(error) = self.dataplane.restrict(self.bypass.restrictions.plan()) {
            warn!("{error}; what has to see each packet may not; trying again in {COMPARE_PERIOD:?}");
        }
    }
}

fn by_mark(PolicyRule { text, .. }: &PolicyRule) -> Restriction {
    let subject = format!(
        "{text}: all tunnel packets to a peer go one way, that of packets without a mark, since this kernel lets programs ask \
         for no other (6.10 does); route by address or port instead"
    );
    Restriction { kind: Kind::Rule, subject, scope: Scope::Nothing }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_observer_no_longer_names_is_over() {
        let mut restrictions = Restrictions::new(BypassFlag::Auto, true);
        let queue = Restriction { kind: Kind::Queue, subject: "tbf on veth1".to_owned(), scope: Scope::Pod(7) };
        assert!(!restrictions.replace(Observer::TrafficControl, BTreeSet::new()));
        assert!(restrictions.replace(Observer::TrafficControl, [queue.clone()].into()));
        assert!(!restrictions.replace(Observer::TrafficControl, [queue.clone()].into()));
        assert_eq!((restrictions.plan().pods.len(), restrictions.all().count()), (1, 1));
        assert!(restrictions.replace(Observer::TrafficControl, BTreeSet::new()));
        assert_eq!(*restrictions.plan(), Plan { left_in_tunnel: true, ..Plan::default() });
        assert!(restrictions.leave_in_tunnel(false) && !restrictions.leave_in_tunnel(false));
        assert_eq!(*restrictions.plan(), Plan::default());
    }
}
