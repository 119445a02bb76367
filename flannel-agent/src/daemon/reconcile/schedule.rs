//! What is due, and when: what the kernel tells of, collected for a moment, and what others find.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tracing::warn;

use super::{
    COMPARE_PERIOD, Reconciler,
    routes::{ROUTES_PERIOD, Scan},
};
use crate::{
    device::{Changed, DeviceEvent},
    inspection::reader::Found,
    lease::LeaseTable,
    status::RulesStatus,
};

/// The least time between two looks at the kernel, so that a burst of events costs one.
pub(super) const SETTLE_TIME: Duration = Duration::from_millis(10);
/// How much longer it rests than a look for pods took.
const IDLE_FOR_EACH: u32 = 9;

/// For how long this process has used a CPU; zero where the kernel does not say.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// What is due.
pub(super) struct Schedule {
    device_events: mpsc::Receiver<DeviceEvent>,
    /// What is to be compared, ...
    pub(super) comparison: Option<Changed>,
    /// ... and when at the earliest.
    compare_at: Instant,
    pub(super) are_pods_due: bool,
    pods_at: Instant,
    /// When all routes were read last.
    routes_read: Instant,
}

impl Schedule {
    pub(super) fn new(device_events: mpsc::Receiver<DeviceEvent>) -> Self {
        let now = Instant::now();
        // What was there when the programs were attached may not be all that is there when it begins.
        Self { device_events, comparison: None, compare_at: now, are_pods_due: true, pods_at: now, routes_read: now }
    }
}

/// What there is to see to.
pub(in crate::daemon) enum Due {
    Device(DeviceEvent),
    /// How it stands with the packet rules.
    Rules(RulesStatus),
    /// What others' packet rules come to.
    Found(Found),
    /// The host's routes.
    Scan(Scan),
    Comparison,
    Pods,
}

impl Reconciler<'_> {
    /// The next that there is to [see to](Self::see_to).
    pub(in crate::daemon) async fn next(&mut self) -> Due {
        let Schedule { device_events, comparison, compare_at, are_pods_due, pods_at, .. } = &mut self.schedule;
        tokio::select! {
            Some(event) = device_events.recv() => Due::Device(event),
            rules = self.rules.changed() => Due::Rules(rules),
            found = self.bypass.inspected.reader.changed() => Due::Found(found),
            scan = self.routes.scanning.next() => Due::Scan(scan),
            () = sleep_until(*compare_at), if comparison.is_some() => Due::Comparison,
            () = sleep_until(*pods_at), if *are_pods_due => Due::Pods,
        }
    }

    pub(in crate::daemon) async fn see_to(&mut self, due: Due, table: &LeaseTable) {
        match due {
            Due::Device(event) => self.take_device_event(event, table),
            Due::Rules(rules) => self.status.rules(rules),
            Due::Found(found) => self.take_found(found, table).await,
            Due::Scan(scan) => {
                if self.take_scan(scan, table) {
                    self.schedule.are_pods_due = true;
                    self.schedule.comparison = self.schedule.comparison.max(Some(Changed::Route));
                }
            }
            Due::Comparison => {
                let event = self.schedule.comparison.take().unwrap_or(Changed::Topology);
                self.compare_or_say(event, table).await;
                self.schedule.compare_at = Instant::now() + SETTLE_TIME;
            }
            Due::Pods => self.see_to_pods(table).await,
        }
    }

    fn take_device_event(&mut self, event: DeviceEvent, table: &LeaseTable) {
        let DeviceEvent { kind, ifindex, prefix, is_scan_due } = event;
        if is_scan_due {
            self.scan_routes(table);
        }
        if let Some(prefix) = prefix {
            self.underlay.forget(prefix);
        }
        let Schedule { comparison, are_pods_due, .. } = &mut self.schedule;
        let event = match ifindex {
            _ if kind == Changed::TrafficControl => {
                let places = &self.bypass.restrictions.places;
                *are_pods_due |= ifindex.is_none_or(|index| places.contains(index));
                None
            }
            // Its neighbours are ours.
            Some(index) if self.underlay.is_overlay(index) => Some(kind.max(Changed::Route)),
            Some(index) if !self.underlay.depends_on(index) => {
                // It may be a pod's, or the bridge of pods.
                *are_pods_due |= kind == Changed::Topology;
                None
            }
            // With another address, or under another device, links beside it may be the underlay's.
            _ => {
                *are_pods_due |= kind == Changed::Topology;
                Some(kind)
            }
        };
        *comparison = (*comparison).max(event);
    }

    async fn see_to_pods(&mut self, table: &LeaseTable) {
        self.schedule.are_pods_due = false;
        let begun = cpu_time();
        if !self.uplink.is_present {
            // It may also be the external interface, recreated.
            self.follow_external(table).await;
        }
        self.attach_pods_or_say().await;
        // A look costs by the number of pods, and holds up who makes them. (How long it took by the clock says more
        // of what else the host does, and on a busy one would put off the next by seconds.)
        let used = cpu_time().saturating_sub(begun);
        self.schedule.pods_at = Instant::now() + SETTLE_TIME.max(used * IDLE_FOR_EACH);
    }

    /// Compares everything, whether or not something was told of.
    pub(in crate::daemon) async fn review(&mut self, table: &LeaseTable) {
        self.finish_move(table).await;
        self.restrict_or_say();
        self.inspect_for_peers(table);
        let verified = self.dataplane.peers.verify_keys();
        if let Err(error) = verified.and_then(|_| self.dataplane.accept(&self.cli.accept_source)) {
            warn!("{error}; comparing again in {COMPARE_PERIOD:?}");
        }
        if self.schedule.routes_read.elapsed() >= ROUTES_PERIOD {
            self.schedule.routes_read = Instant::now();
            self.scan_routes(table);
            self.compare_or_say(Changed::Topology, table).await;
        } else {
            self.follow_external(table).await;
            self.ensure_or_say(table).await;
            self.compare_or_say(Changed::Neighbour, table).await;
        }
    }
}
