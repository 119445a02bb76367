//! The external interface: whether there is one, what fits through it, and what it does by itself.

use std::collections::BTreeMap;

use flannel_common::vxlan::OVERHEAD;

use super::{
    Check,
    facts::{Host, Overlay},
};
use crate::{
    config::BackendType,
    device::{
        Link,
        offload::{Feature, Offloads, features},
    },
    xdp,
};

/// What every host of the Internet takes in one piece (RFC 1122).
const SMALL: u32 = 576;
/// Segmenting what is in a tunnel, as ethtool names it.
const TUNNEL_SEGMENTATION: &str = "tx-udp_tnl-segmentation";
/// Of these it is said how they are set.
const SHOWN: [&str; 4] = [TUNNEL_SEGMENTATION, "rx-gro", "rx-lro", "rx-gro-hw"];

pub(super) async fn checks(host: &Host<'_>) -> Vec<Check> {
    let mut checks = Vec::new();
    for overlay in &host.overlays {
        let Some(link) = &overlay.external else {
            checks.push(no_interface(host, overlay));
            continue;
        };
        let (name, address) = (&link.name, overlay.address);
        checks.push(Check::ok("interface", format!("{name} with {address} leads to the other hosts")));
        let device = host.netlink.links().await.unwrap_or_default();
        let device = device.iter().find(|device| device.name == overlay.device);
        checks.push(mtu(overlay, link, device.filter(|_| !host.before_install)));
        let known = Offloads::of(link).await;
        checks.push(offloads(overlay, link, &known, &features(name).await.unwrap_or_default()));
        if overlay.backend == BackendType::Vxlan {
            let choice = xdp::choose(host.cli.xdp, link, &known);
            checks.push(Check::ok("xdp", format!("{}: {}", choice.label(), choice.reason)));
        }
    }
    checks
}

fn no_interface(host: &Host<'_>, overlay: &Overlay) -> Check {
    const ADVICE: &str = "name the interface to the other hosts with --iface";
    match (&overlay.status, &host.external) {
        (Some(status), _) => {
            let name = &status.external_interface;
            Check::problem("interface", format!("{name}, which led to the other hosts, is gone"), ADVICE)
        }
        (None, Err(error)) => Check::problem("interface", error.clone(), ADVICE),
        (None, Ok(_)) => Check::problem("interface", "none leads to the other hosts", ADVICE),
    }
}

/// `device` is the overlay's, where it is there.
fn mtu(overlay: &Overlay, link: &Link, device: Option<&Link>) -> Check {
    let overhead = match overlay.backend {
        BackendType::Vxlan => u32::from(OVERHEAD),
        // IPv4 and UDP.
        BackendType::Udp => 28,
        BackendType::HostGw | BackendType::Alloc => 0,
    };
    let (name, fits) = (&link.name, link.mtu.saturating_sub(overhead));
    let found = format!("{name} carries {} bytes, and so the overlay {fits}", link.mtu);
    if let Some(device) = device.filter(|device| device.mtu > fits) {
        return Check::problem(
            "MTU",
            format!("{found}, but {} has {}: larger packets are lost", device.name, device.mtu),
            format!(
                "raise the MTU of {name}, or let a running agent follow it, and restart pods that were made before"
            ),
        );
    }
    if overlay.mtu > fits {
        return Check::problem(
            "MTU",
            format!("{found}, but pods were told {}", overlay.mtu),
            format!("raise the MTU of {name}, or restart the pods after the agent has written subnet.env anew"),
        );
    }
    if fits < SMALL {
        return Check::warning("MTU", found, format!("raise the MTU of {name}"));
    }
    Check::ok("MTU", format!("{found}; pods get {}", overlay.mtu))
}

fn offloads(overlay: &Overlay, link: &Link, known: &Offloads, features: &BTreeMap<String, Feature>) -> Check {
    let name = &link.name;
    let driver = known.driver.as_deref().map_or("no NIC's driver".to_owned(), |driver| format!("driver {driver}"));
    let states: Vec<_> = SHOWN
        .iter()
        .filter_map(|shown| Some(format!("{shown} {}", if features.get(*shown)?.is_on { "on" } else { "off" })))
        .collect();
    let found =
        format!("{name}: {driver}, {}", if states.is_empty() { "no offloads".to_owned() } else { states.join(", ") });
    let is_off = |feature: &str| features.get(feature).is_some_and(|state| state.can_be_set && !state.is_on);
    // A virtual device's packets were aggregated by whoever sent them.
    let wanted = [
        (TUNNEL_SEGMENTATION, overlay.backend == BackendType::Vxlan, "large packets of pods are cut by the CPU"),
        ("rx-gro", known.driver.is_some(), "what comes in is handled packet by packet"),
    ];
    match wanted.into_iter().find(|(feature, matters, _)| *matters && is_off(feature)) {
        Some((feature, _, cost)) => Check::warning(
            "offloads",
            format!("{found}: {cost}"),
            format!("turn it on with `ethtool -K {name} {feature} on`"),
        ),
        None => Check::ok("offloads", found),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Verdict, *};

    #[test]
    fn aggregation_matters_on_a_nic_and_segmentation_in_a_tunnel() {
        let link = Link { name: "eth0".to_owned(), index: 2, mtu: 1500, mac: None };
        let overlay = |backend| Overlay {
            vni: flannel_common::vxlan::Vni::DEFAULT,
            device: "flannel.1".to_owned(),
            network: "10.5.0.0/16".parse().unwrap(),
            subnet: "10.5.1.0/24".parse().unwrap(),
            backend,
            port: None,
            mtu: 1450,
            external: None,
            address: [192, 0, 2, 1].into(),
            status: None,
            is_running: None,
        };
        let features = |gro: Feature, segmentation: Feature| {
            BTreeMap::from([("rx-gro".to_owned(), gro), (TUNNEL_SEGMENTATION.to_owned(), segmentation)])
        };
        let (on, off) = (Feature { is_on: true, can_be_set: true }, Feature { is_on: false, can_be_set: true });
        let fixed = Feature { is_on: false, can_be_set: false };
        let nic = Offloads { driver: Some("ice".to_owned()), large_receive: Vec::new() };
        for (backend, known, features, verdict) in [
            (BackendType::Vxlan, &nic, features(on, on), Verdict::Ok),
            (BackendType::Vxlan, &nic, features(off, on), Verdict::Warning),
            (BackendType::Vxlan, &Offloads::default(), features(off, on), Verdict::Ok),
            (BackendType::Vxlan, &nic, features(on, off), Verdict::Warning),
            (BackendType::Vxlan, &nic, features(on, fixed), Verdict::Ok),
            (BackendType::HostGw, &nic, features(on, off), Verdict::Ok),
        ] {
            let check = offloads(&overlay(backend), &link, known, &features);
            assert_eq!(check.verdict, verdict, "{check:?}");
        }
    }
}
