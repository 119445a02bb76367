//! Settings of the host's stack (sysctls).

use super::{
    Check,
    facts::{Host, Overlay},
    firewall::ways,
};
use crate::{backend::has_datapath, operator::host_settings};

pub(super) async fn checks(host: &Host<'_>) -> Vec<Check> {
    let mut checks = vec![forwarding(host).await];
    checks.extend(host.overlays.iter().filter_map(|overlay| reverse_path(host, overlay)));
    checks.push(conntrack());
    checks.push(bridges(host_settings::setting("net/bridge/bridge-nf-call-iptables"), host.store.is_kubernetes()));
    checks
}

/// [`None`] for one that is not there.
async fn forwarding(host: &Host<'_>) -> Check {
    let is_on = host_settings::setting("net/ipv4/ip_forward") == Some(1);
    // An agent that has not been here yet sets it.
    if host.overlays.iter().all(|overlay| overlay.status.is_none()) {
        let found = if is_on { "net.ipv4.ip_forward is 1" } else { "net.ipv4.ip_forward is 0; the agent sets it to 1" };
        return Check::ok("forwarding", found);
    }
    let mut interfaces = Vec::new();
    for overlay in &host.overlays {
        interfaces.extend(host.bridges(overlay).await);
        interfaces.push(overlay.device.clone());
    }
    if !is_on {
        let advice = "turn it on with `sysctl -w net.ipv4.ip_forward=1`; the agent does when it starts";
        return Check::problem("forwarding", "net.ipv4.ip_forward is 0: no packets of pods are forwarded", advice);
    }
    match host_settings::not_forwarding_among(&interfaces) {
        Some((found, advice)) => Check::problem("forwarding", found, advice),
        None => Check::ok("forwarding", "net.ipv4.ip_forward is 1, and no interface of the overlay has it off"),
    }
}

/// Where peers are reached by one interface, and may send to another.
fn reverse_path(host: &Host<'_>, overlay: &Overlay) -> Option<Check> {
    if !has_datapath(overlay.backend) {
        return None;
    }
    let external = overlay.external.as_ref()?;
    let name = &external.name;
    let value = host_settings::reverse_path_filter(name);
    let elsewhere = ways(host, overlay).into_iter().filter(|way| way.ifindex != 0 && way.ifindex != external.index);
    Some(match host_settings::strict(name, value, elsewhere.count()) {
        Some((found, advice)) => Check::warning("rp_filter", found, advice),
        None => Check::ok("rp_filter", format!("{value} on {name}")),
    })
}

fn conntrack() -> Check {
    match ["count", "max"].map(|name| host_settings::setting(&format!("net/netfilter/nf_conntrack_{name}"))) {
        [Some(count), Some(max)] => match host_settings::full(count, max) {
            Some((found, advice)) => Check::problem("conntrack", found, advice),
            None => Check::ok("conntrack", format!("{count} of at most {max} connections")),
        },
        _ => Check::ok("conntrack", "not loaded"),
    }
}

/// Packets between pods of one bridge pass iptables only where this is on: kube-proxy's services of pods on the client's own host.
fn bridges(value: Option<u64>, is_kubernetes: bool) -> Check {
    const NAME: &str = "br_netfilter";
    let advice = "`modprobe br_netfilter && sysctl -w net.bridge.bridge-nf-call-iptables=1`";
    match value {
        Some(1) => Check::ok(NAME, "net.bridge.bridge-nf-call-iptables is 1"),
        Some(value) if is_kubernetes => {
            let found = "services do not work from a pod to one on the same bridge";
            Check::warning(NAME, format!("net.bridge.bridge-nf-call-iptables is {value}: {found}"), advice)
        }
        None if is_kubernetes => {
            Check::warning(NAME, "not loaded: services do not work from a pod to one on the same bridge", advice)
        }
        Some(value) => {
            Check::ok(NAME, format!("net.bridge.bridge-nf-call-iptables is {value}; the overlay does not need it"))
        }
        None => Check::ok(NAME, "not loaded; the overlay does not need it"),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Verdict, *};

    #[test]
    fn bridges_matter_to_kubernetes() {
        for (value, is_kubernetes, verdict) in [
            (None, false, Verdict::Ok),
            (Some(0), false, Verdict::Ok),
            (Some(1), true, Verdict::Ok),
            (Some(0), true, Verdict::Warning),
            (None, true, Verdict::Warning),
        ] {
            assert_eq!(bridges(value, is_kubernetes).verdict, verdict, "{value:?} {is_kubernetes}");
        }
    }
}
