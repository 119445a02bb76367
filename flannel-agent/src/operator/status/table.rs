//! What `status` prints for people.

use super::Overlay;
use crate::{
    backend::{has_datapath, is_in_user_space},
    operator::rows,
    plural::counted,
    status::{LeaseStatus, Status, TunnelStatus, time},
    udp::Event,
    waiting::Waiting,
};

/// An overlay in a line.
pub(super) fn brief(overlay: &Overlay) -> String {
    let Overlay { status, troubles, .. } = overlay;
    let state = match troubles.as_slice() {
        [] => "all is well".to_owned(),
        [trouble] => format!("look at: {trouble}"),
        [first, others @ ..] => format!("{} things to look at, first: {first}", others.len() + 1),
    };
    let Status { lease, peers, external_interface, .. } = status;
    let (name, peers) = (status.name(), counted(*peers, "peer"));
    format!("{name}: {} by {external_interface}, {peers}: {state}\n", lease.subnet)
}

pub(super) fn of_waiting(Waiting { pid, since, reason }: &Waiting) -> String {
    let waits = format!("the agent (process {pid}) has no lease yet, and has waited for {}", time(*since));
    rows([["waiting", waits.as_str()], ["look at", reason]].map(|row| row.map(str::to_owned)))
}

pub(super) fn of_overlay(overlay: &Overlay, has_pods: bool) -> String {
    let Overlay { status, dataplane, troubles, .. } = overlay;
    let Status { lease, store, held, .. } = status;
    let mut lines = vec![[
        status.name(),
        format!("{} by {} as {}, MTU {}", status.network, status.external_interface, status.public_ip, status.mtu),
    ]];
    lines.push(["lease".to_owned(), format!("{} {}", lease.subnet, lease_words(lease))]);
    if has_datapath(status.backend_type()) {
        lines.extend(datapath_rows(status));
    } else if is_in_user_space(status.backend_type()) {
        lines.extend(tunnel_rows(status));
    } else {
        lines.push(["datapath".to_owned(), format!("none: with the backend {} nothing is carried", status.backend)]);
    }
    let following = if store.following { "followed" } else { "away" };
    lines.push([
        store.kind.to_string(),
        format!(
            "{following} for {}, cluster {}, revision {}, {}",
            time(store.since),
            store.cluster_id,
            store.revision,
            counted(store.events, "event")
        ),
    ]);
    let resyncs: Vec<_> = store.resyncs.iter().map(|(cause, count)| format!("{cause} {count}")).collect();
    lines.push(["snapshots".to_owned(), resyncs.join(", ")]);
    lines.push(["peers".to_owned(), format!("{}, of which {} held", status.peers, held.len())]);
    if !status.other_backends.is_empty() {
        let others: Vec<_> =
            status.other_backends.iter().map(|(backend, count)| format!("{backend} {count}")).collect();
        let words = format!("{}: leases of hosts with another backend, not reached from here", others.join(", "));
        lines.push(["others".to_owned(), words]);
    }
    let repaired = &status.drift.repaired;
    if !repaired.is_empty() {
        let repaired: Vec<_> =
            repaired.iter().map(|(what, of)| format!("{what} {} (last {} ago)", of.count, time(of.last))).collect();
        lines.push(["repaired".to_owned(), repaired.join(", ")]);
    }
    for peer in held {
        let reason = format!("{} at {}, {} for {}", peer.subnet, peer.public_ip, peer.reason.label(), time(peer.since));
        lines.push(["held".to_owned(), reason]);
    }
    lines.extend(dataplane.iter().flat_map(|dataplane| dataplane.rows(has_pods)));
    if troubles.is_empty() {
        lines.push(["state".to_owned(), "all is well".to_owned()]);
    }
    for trouble in troubles {
        lines.push(["look at".to_owned(), trouble.clone()]);
    }
    lines.push(["roll back".to_owned(), "stop the agent, run flannel-agent cleanup, start flanneld".to_owned()]);
    rows(lines)
}

/// How a lease stands.
pub(in crate::operator) fn lease_words(lease: &LeaseStatus) -> String {
    let losses = match lease.losses {
        1 => "1 loss".to_owned(),
        losses => format!("{losses} losses"),
    };
    format!("{}, {}, {losses}", lease.state.label(), counted(lease.renewals, "renewal"))
}

/// What the agent says of the kernel's part.
fn datapath_rows(status: &Status) -> Vec<[String; 2]> {
    let mut lines = vec![["kernel".to_owned(), status.features.to_string()]];
    let conntrack = match status.bypass.conntrack_liberal {
        Some(true) => "conntrack liberal",
        Some(false) => "conntrack strict",
        None => "no conntrack",
    };
    let bypass = match status.bypass.revalidate_ms {
        0 => "off".to_owned(),
        time => format!("{}, through the stack every {time} ms, {conntrack}", status.bypass.flag.label()),
    };
    lines.push(["bypass".to_owned(), bypass]);
    lines.extend(status.bypass.rows().into_iter().map(|row| ["by the stack".to_owned(), row]));
    lines.push(["xdp".to_owned(), format!("{}: {}", status.xdp.mode, status.xdp.reason)]);
    lines.extend(stack_rows(status));
    lines
}

/// What the agent says of its tunnel in user space.
fn tunnel_rows(status: &Status) -> Vec<[String; 2]> {
    let words = "in user space: the slow road; vxlan is faster where it can be had";
    let mut lines = Vec::new();
    match &status.tunnel {
        Some(TunnelStatus { device, port, packets }) => {
            lines.push(["tunnel".to_owned(), format!("{device}, UDP port {port}, {words}")]);
            let count = |event: Event| packets.get(event.label()).copied().unwrap_or(0);
            let others = Event::ALL.iter().filter(|event| !matches!(event, Event::Sent | Event::Received));
            let others = others.filter(|event| count(**event) > 0);
            let others: Vec<_> = others.map(|event| format!("{} {}", event.label(), count(*event))).collect();
            let others = if others.is_empty() { "nothing".to_owned() } else { others.join(", ") };
            let (sent, received) = (count(Event::Sent), count(Event::Received));
            lines.push(["packets".to_owned(), format!("{sent} sent, {received} received, dropped: {others}")]);
        }
        None => lines.push(["tunnel".to_owned(), format!("none yet; {words}")]),
    }
    lines.extend(stack_rows(status));
    lines
}

/// What the agent says of the routes and packet rules of the host's stack.
fn stack_rows(status: &Status) -> Vec<[String; 2]> {
    let mut lines = vec![["routes".to_owned(), status.routes.reason.clone()]];
    let rules = match (status.rules.masquerade.as_str(), status.rules.forward) {
        ("", _) => "not set yet".to_owned(),
        (masquerade, true) => {
            let kinds = status.rules.forward_in.join(" and ");
            format!("masquerade {masquerade}, forwarding accepted in iptables ({kinds})")
        }
        (masquerade, false) => format!("masquerade {masquerade}"),
    };
    lines.push(["rules".to_owned(), format!("{rules}, {}", counted(status.rules.repairs, "repair"))]);
    lines.extend(status.rules.fallback.iter().map(|fallback| ["rules".to_owned(), fallback.clone()]));
    lines
}
