//! What an agent says of itself.

use flannel_common::vxlan::Vni;

use super::{catalogue::Metric, exposition::Exposition};
use crate::{
    bypass::Kind,
    evidence::LossKind,
    lease::HoldReason,
    registry::ResyncCause,
    repair::Repair,
    status::{LeaseState, Status},
    udp::Event,
};

/// What it says, by overlay; `is_running` is [`None`] where that can't be told.
pub(super) fn tell(exposition: &mut Exposition, vni: Vni, status: &Status, is_running: Option<bool>) {
    let vni = vni.to_string();
    let vni = vni.as_str();
    if let Some(is_running) = is_running {
        exposition.add(Metric::AgentUp, &[vni], is_running);
    }
    exposition.add(Metric::StatusTimestamp, &[vni], status.written);
    exposition.add(Metric::Troubles, &[vni], status.troubles().len());
    let (network, subnet) = (status.network.to_string(), status.lease.subnet.to_string());
    let (public_ip, xdp) = (status.public_ip.to_string(), status.xdp.mode.as_str());
    let overlay = [vni, &status.backend, &network, &subnet, &public_ip, &status.external_interface, xdp];
    exposition.add(Metric::OverlayInfo, &overlay, true);
    exposition.add(Metric::ConfigDiffers, &[vni], status.config_differs.is_some());
    lease(exposition, vni, status);
    store(exposition, vni, status);
    exposition.add(Metric::Peers, &[vni], status.peers);
    exposition.add(Metric::PeersUnanswering, &[vni], status.evidence.silent.len());
    for reason in HoldReason::ALL {
        let held = status.held.iter().filter(|peer| peer.reason == reason).count();
        exposition.add(Metric::PeersHeld, &[vni, reason.label()], held);
        let ever = status.held_total.get(reason.label()).copied().unwrap_or(0);
        exposition.add(Metric::PeersHeldEver, &[vni, reason.label()], ever);
    }
    packets(exposition, vni, status);
    for (program, runs) in &status.programs {
        exposition.add(Metric::ProgramRunSeconds, &[vni, program], runs.seconds);
        exposition.add(Metric::ProgramRuns, &[vni, program], runs.count);
    }
    exposition.add(Metric::PacketRulesSet, &[vni], status.rules.problem.is_none());
    exposition.add(Metric::PacketRulesRepairs, &[vni], status.rules.repairs);
    for repair in Repair::ALL.map(Repair::label) {
        let count = status.drift.repaired.get(repair).map_or(0, |repaired| repaired.count);
        exposition.add(Metric::Repairs, &[vni, repair], count);
    }
}

fn lease(exposition: &mut Exposition, vni: &str, Status { lease, .. }: &Status) {
    for state in LeaseState::ALL {
        exposition.add(Metric::LeaseState, &[vni, state.label()], lease.state == state);
    }
    if let Some(expiry) = lease.expiry {
        exposition.add(Metric::LeaseExpiry, &[vni], expiry);
    }
    if let Some(term) = lease.term {
        exposition.add(Metric::LeaseTerm, &[vni], term);
    }
    exposition.add(Metric::LeaseRenewals, &[vni], lease.renewals);
    exposition.add(Metric::LeaseLosses, &[vni], lease.losses);
    exposition.add(Metric::LeaseClaims, &[vni], lease.claims);
}

fn store(exposition: &mut Exposition, vni: &str, status: &Status) {
    let store = &status.store;
    exposition.add(Metric::StoreUp, &[vni], store.following);
    // Prometheus has no other numbers.
    exposition.add(Metric::StoreRevision, &[vni], store.revision as f64);
    exposition.add(Metric::StoreEvents, &[vni], store.events);
    for cause in ResyncCause::ALL.map(ResyncCause::label) {
        exposition.add(Metric::StoreResyncs, &[vni, cause], store.resyncs.get(cause).copied().unwrap_or(0));
    }
    exposition.add(Metric::StoreEntriesPassedOver, &[vni], store.passed_over.len());
    exposition.add(Metric::StorePassedOver, &[vni], store.passed_over_total);
    exposition.add(Metric::Convergence, &[vni], &status.convergence);
}

/// What the agent itself carries, and what it knows of the packets that the programs carry.
fn packets(exposition: &mut Exposition, vni: &str, status: &Status) {
    for event in status.tunnel.iter().flat_map(|_| Event::ALL) {
        let counted = status.tunnel.as_ref().and_then(|tunnel| tunnel.packets.get(event.label()));
        let outcome = match event {
            Event::Sent | Event::Received => "forward",
            _ => "drop",
        };
        exposition.add(Metric::Packets, &[vni, event.label(), outcome], counted.copied().unwrap_or(0));
    }
    for kind in Kind::ALL {
        let number = status.bypass.restrictions.iter().filter(|restriction| restriction.kind == kind).count();
        exposition.add(Metric::BypassRestrictions, &[vni, kind.label()], number);
    }
    for place in LossKind::ALL {
        let lost = status.evidence.lost.iter().filter(|loss| loss.kind == place).map(|loss| loss.packets).sum::<u64>();
        exposition.add(Metric::LostPackets, &[vni, place.label()], lost);
    }
}
