//! `flannel-agent metrics`: Prometheus' text format (OpenMetrics), for node_exporter's textfile collector or a curious
//! eye.

use std::sync::atomic::{AtomicI64, AtomicU64};

use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::{OperatorError, is_running};
use crate::{
    bypass::Kind,
    cli::Cli,
    dataplane::{self, PinDirectory},
    lease::HoldReason,
    registry::ResyncCause,
    repair::Repair,
    status::{LeaseState, Status},
};

type Labels = Vec<(&'static str, String)>;
type Counters = Family<Labels, Counter<u64, AtomicU64>>;
type Gauges = Family<Labels, Gauge<i64, AtomicI64>>;

/// Prints the metrics of every overlay of this host.
///
/// # Errors
/// [`OperatorError`].
pub fn print(cli: &Cli) -> Result<(), OperatorError> {
    let mut registry = Registry::with_prefix("flannel");
    let packets = counters(&mut registry, "packets", "Packets by what became of them");
    let bytes = counters(&mut registry, "bytes", "Bytes of these packets, from the Ethernet header on");
    for vni in dataplane::pinned_vnis(&cli.bpf_pin_dir) {
        for (event, counter) in dataplane::pinned_counters(&PinDirectory::new(&cli.bpf_pin_dir, vni))? {
            let labels = || vec![("vni", vni.to_string()), ("event", event.label().to_owned())];
            packets.get_or_create(&labels()).inc_by(counter.packets);
            bytes.get_or_create(&labels()).inc_by(counter.bytes);
        }
    }

    let up = gauges(&mut registry, "agent_up", "Whether an agent is running");
    let written = gauges(&mut registry, "status_timestamp_seconds", "When the agent wrote its state");
    let lease = gauges(&mut registry, "lease_state", "1 for the state that the own lease is in");
    let renewals = counters(&mut registry, "lease_renewals", "Renewals of the own lease");
    let losses = counters(&mut registry, "lease_losses", "How often the own lease ended and another was taken");
    let store_up = gauges(&mut registry, "store_up", "Whether the lease table in the store is being followed");
    let revision = gauges(&mut registry, "store_revision", "Revision of the store at the last snapshot");
    let events = counters(&mut registry, "store_events", "Changes that the store reported");
    let resyncs = counters(&mut registry, "store_resyncs", "Snapshots of the lease table, by cause");
    let passed_over =
        gauges(&mut registry, "store_entries_passed_over", "Entries in the store that are no usable leases");
    let passed_over_total = counters(&mut registry, "store_passed_over", "How often such an entry was seen");
    let config =
        gauges(&mut registry, "config_differs", "Whether the network config in the store is not the one in use");
    let peers = gauges(&mut registry, "peers", "Subnets that have a peer in the maps");
    let held =
        gauges(&mut registry, "peers_held", "Peers that the store no longer names and the guard keeps, by reason");
    let held_total = counters(&mut registry, "peers_held_ever", "How often the guard kept a peer, by reason");

    let restrictions = gauges(
        &mut registry,
        "bypass_restrictions",
        "What has to see each packet and keeps packets off the bypass, by kind",
    );
    let rules = gauges(&mut registry, "packet_rules_set", "Whether the packet rules are as they should be");
    let rules_repairs = counters(&mut registry, "packet_rules_repairs", "How often another program had changed them");
    let repairs =
        counters(&mut registry, "repairs", "What somebody else changed and was made right again, by what it was");

    let statuses = match Status::read_all(&cli.run_dir) {
        Ok(statuses) => statuses,
        Err(crate::status::ReadError::None(_)) => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    for (vni, status) in statuses {
        let of = || vec![("vni", vni.to_string())];
        let with = |name: &'static str, value: &str| vec![("vni", vni.to_string()), (name, value.to_owned())];
        if let Some(is_running) = is_running(cli, vni) {
            up.get_or_create(&of()).set(is_running.into());
        }
        written.get_or_create(&of()).set(status.written.try_into().unwrap_or(i64::MAX));
        for state in LeaseState::ALL {
            lease.get_or_create(&with("state", state.label())).set((status.lease.state == state).into());
        }
        renewals.get_or_create(&of()).inc_by(status.lease.renewals);
        losses.get_or_create(&of()).inc_by(status.lease.losses);
        store_up.get_or_create(&of()).set(status.store.following.into());
        revision.get_or_create(&of()).set(status.store.revision);
        events.get_or_create(&of()).inc_by(status.store.events);
        for cause in ResyncCause::ALL.map(ResyncCause::label) {
            let count = status.store.resyncs.get(cause).copied().unwrap_or(0);
            resyncs.get_or_create(&with("cause", cause)).inc_by(count);
        }
        passed_over.get_or_create(&of()).set(count(status.store.passed_over.len()));
        passed_over_total.get_or_create(&of()).inc_by(status.store.passed_over_total);
        for kind in Kind::ALL {
            let number = status.bypass.restrictions.iter().filter(|restriction| restriction.kind == kind).count();
            restrictions.get_or_create(&with("kind", kind.label())).set(count(number));
        }
        config.get_or_create(&of()).set(status.config_differs.is_some().into());
        rules.get_or_create(&of()).set(status.rules.problem.is_none().into());
        rules_repairs.get_or_create(&of()).inc_by(status.rules.repairs);
        for repair in Repair::ALL.map(Repair::label) {
            let count = status.drift.repaired.get(repair).map_or(0, |repaired| repaired.count);
            repairs.get_or_create(&with("repair", repair)).inc_by(count);
        }
        for (event, number) in status.tunnel.iter().flat_map(|tunnel| &tunnel.packets) {
            packets.get_or_create(&with("event", event)).inc_by(*number);
        }
        peers.get_or_create(&of()).set(count(status.peers));
        for reason in HoldReason::ALL {
            let number = status.held.iter().filter(|peer| peer.reason == reason).count();
            held.get_or_create(&with("reason", reason.label())).set(count(number));
            let ever = status.held_total.get(reason.label()).copied().unwrap_or(0);
            held_total.get_or_create(&with("reason", reason.label())).inc_by(ever);
        }
    }
    let mut text = String::new();
    // Writing into a string does not fail.
    if encode(&mut text, &registry).is_ok() {
        print!("{text}");
    }
    Ok(())
}

fn count(number: usize) -> i64 {
    number.try_into().unwrap_or(i64::MAX)
}

fn counters(registry: &mut Registry, name: &'static str, help: &'static str) -> Counters {
    let family = Counters::default();
    registry.register(name, help, family.clone());
    family
}

fn gauges(registry: &mut Registry, name: &'static str, help: &'static str) -> Gauges {
    let family = Gauges::default();
    registry.register(name, help, family.clone());
    family
}
