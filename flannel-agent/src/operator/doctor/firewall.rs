//! Packet rules that the overlay's packets can meet.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    Check,
    facts::{Host, Overlay},
};
use crate::{
    config::BackendType,
    dataplane::{PeerWay, PinDirectory},
    inspection::{Pod, RuleSets, Stop, Stopped, Surroundings, stops},
    netfilter::Lister,
    operator::{named, pinned_peers},
};

const NAME: &str = "firewall";

pub(super) async fn checks(host: &Host<'_>) -> Vec<Check> {
    let sets = match Lister::default().read().await {
        Ok(listing) => RuleSets::parse(&listing),
        Err(error) => {
            return vec![Check::warning(
                NAME,
                format!("the packet rules can't be read: {error}"),
                "run doctor as root",
            )];
        }
    };
    let managers = sets.managers();
    let mut checks = Vec::new();
    for overlay in host.overlays.iter().filter(|overlay| overlay.backend != BackendType::Alloc) {
        let around = around(host, overlay).await;
        let found = stops(&sets, &around);
        // What this host sends in the tunnel passes OUTPUT with flannel, and not here.
        let found = found.iter().filter(|stop| stop.stopped != Stopped::TunnelOut);
        let (mut relieved, mut stopping) = (Vec::new(), Vec::new());
        for stop in found.filter(|stop| stop.stopped != Stopped::TunnelIn || overlay.port.is_some()) {
            let is_relieved = host.before_install && stop.is_iptables && stop.stopped == Stopped::Forwarded;
            if is_relieved && host.cli.packet_rules.accepts_forwarded() {
                relieved.push(stop)
            } else {
                stopping.push(stop)
            }
        }
        checks.extend(stopping.iter().map(|stop| problem(stop, overlay)));
        if stopping.is_empty() {
            checks.push(well(&managers, &relieved));
        }
    }
    checks
}

fn well(managers: &[&str], relieved: &[&Stop]) -> Check {
    let who = match managers {
        [] => "nothing stops".to_owned(),
        managers => format!("{} set rules here, and nothing stops", managers.join(" and ")),
    };
    let relieved: Vec<_> = relieved.iter().map(|stop| stop.subject.clone()).collect();
    let relieved = match relieved.is_empty() {
        true => String::new(),
        false => format!("; before {} the agent accepts what is forwarded to and from the Network", named(&relieved)),
    };
    Check::ok(NAME, format!("{who} the overlay's packets{relieved}"))
}

fn problem(stop: &Stop, overlay: &Overlay) -> Check {
    let verb = if stop.is_sure { "drops" } else { "drops what no rule before it accepts of the" };
    let found = format!("{} {verb} {}", stop.subject, stop.stopped.label());
    let advice = advice(stop, overlay);
    if stop.is_sure { Check::problem(NAME, found, advice) } else { Check::warning(NAME, found, advice) }
}

fn advice(stop: &Stop, overlay: &Overlay) -> String {
    let (port, network, device) = (overlay.port.unwrap_or_default(), overlay.network, &overlay.device);
    let is_firewalld = stop.subject.starts_with("nft inet firewalld");
    match (stop.stopped, stop.is_iptables) {
        (Stopped::TunnelIn, _) if is_firewalld => {
            format!("`firewall-cmd --permanent --add-port={port}/udp`, and reload it")
        }
        (Stopped::Forwarded, _) if is_firewalld => {
            format!(
                "`firewall-cmd --permanent --zone=trusted --add-source={network} --add-interface={device}`, and reload it"
            )
        }
        (Stopped::TunnelIn, true) => format!(
            "accept UDP port {port} from the other hosts in front of it (`iptables -I INPUT -p udp --dport {port} -j ACCEPT`; with \
             ufw `ufw allow {port}/udp`)"
        ),
        (Stopped::TunnelIn, false) => {
            format!("accept UDP port {port} from the other hosts in that chain, in front of it")
        }
        (Stopped::Forwarded, true) => {
            format!("accept {network} in front of it, as the agent does by itself (--iptables-forward-rules)")
        }
        (Stopped::Forwarded | Stopped::TunnelOut, _) => {
            format!("accept {network} in that chain, in front of it: what another chain accepts does not count")
        }
    }
}

/// What tells the overlay's packets from others.
async fn around(host: &Host<'_>, overlay: &Overlay) -> Surroundings {
    let within = host.netlink.devices_within(overlay.subnet).await.unwrap_or_default();
    let pods = host.netlink.pod_network(overlay.network, overlay.subnet, &within).await.unwrap_or_default().pods;
    let mut bridges: std::collections::BTreeSet<_> = host.bridges(overlay).await.into_iter().collect();
    if bridges.is_empty() {
        // As flannel's plugin calls it.
        bridges.insert("cni0".to_owned());
    }
    let underlay = overlay.status.iter().flat_map(|status| status.underlay_interfaces.clone());
    let peers = ways(host, overlay).into_iter().map(|way| way.address);
    Surroundings {
        network: overlay.network,
        subnet: overlay.subnet,
        overlay: overlay.device.clone(),
        underlay: underlay.chain(overlay.external.iter().map(|link| link.name.clone())).collect(),
        address: overlay.address,
        port: overlay.port.unwrap_or_default(),
        bridges,
        pods: pods
            .into_iter()
            .map(|pod| (pod.name, Pod { index: pod.index, is_bridged: pod.bridge.is_some() }))
            .collect::<BTreeMap<_, _>>(),
        peers: Arc::new(peers.collect()),
    }
}

/// The peers of an overlay; none where they can't be read, or there is none.
pub(super) fn ways(host: &Host<'_>, overlay: &Overlay) -> Vec<PeerWay> {
    let Some(status) = &overlay.status else { return Vec::new() };
    let pins = PinDirectory::new(&host.cli.bpf_pin_dir, overlay.vni);
    pinned_peers(&pins, status).read().unwrap_or_default()
}
