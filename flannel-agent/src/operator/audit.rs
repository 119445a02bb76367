//! `flannel-agent audit`: the kernel's objects that are ours, against what they may be for any number of peers, and against what
//! flannel's daemon makes.

use bytesize::ByteSize;
use flannel_common::vxlan::Vni;
use ipnet::Ipv4Net;
use serde::Serialize;
use serde_json::json;

use super::{OperatorError, agent_note, is_running, named, pinned_peers, rows};
use crate::{
    backend::{has_datapath, is_in_user_space},
    cli::{Cli, Output},
    config::BackendType,
    dataplane::{BpfObjects, PinDirectory, pinned_objects},
    device::{Census, Netlink, vxlan::VxlanDevice},
    netfilter,
    plural::counted,
    routes::Routing,
    status::{API_VERSION, Status},
};

/// Objects of one kind.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Kind {
    object: &'static str,
    count: usize,
    /// What there may be; [`None`] for what is counted only.
    budget: Option<usize>,
    /// What flannel's daemon has of it for as many peers; [`None`] for what it has none of.
    flannel: Option<usize>,
    /// Those that are more than there may be.
    over: Vec<String>,
}

impl Kind {
    fn new(object: &'static str, found: &[String], budget: usize, flannel: usize) -> Self {
        let over = found.get(budget..).unwrap_or_default().to_vec();
        Self { object, count: found.len(), budget: Some(budget), flannel: Some(flannel), over }
    }
}

/// What an overlay has.
struct Overlay {
    vni: Vni,
    name: String,
    is_running: Option<bool>,
    peers: usize,
    kinds: Vec<Kind>,
    bpf: BpfObjects,
}

/// Prints them for each overlay of this host. `false` where there are more than there may be.
///
/// # Errors
/// [`OperatorError`].
pub async fn print(cli: &Cli, output: Output) -> Result<bool, OperatorError> {
    let (netlink, _events, _connection) = Netlink::open()?;
    let mut overlays = Vec::new();
    for (vni, status) in Status::read_all(&cli.run_dir)? {
        overlays.push(overlay(cli, &netlink, vni, &status).await?);
    }
    match output {
        Output::Table => overlays.iter().for_each(|overlay| print!("{}", table(overlay))),
        Output::Json => {
            let overlays: Vec<_> = overlays.iter().map(document).collect();
            println!("{:#}", json!({ "apiVersion": API_VERSION, "overlays": overlays }));
        }
    }
    Ok(overlays.iter().flat_map(|overlay| &overlay.kinds).all(|kind| kind.over.is_empty()))
}

async fn overlay(cli: &Cli, netlink: &Netlink, vni: Vni, status: &Status) -> Result<Overlay, OperatorError> {
    let (backend, pins) = (status.backend_type(), PinDirectory::new(&cli.bpf_pin_dir, vni));
    let device = match backend {
        BackendType::Vxlan => Some(VxlanDevice::name_of(vni)),
        BackendType::Udp => status.tunnel.as_ref().map(|tunnel| tunnel.device.clone()),
        BackendType::HostGw | BackendType::Alloc => None,
    };
    let census = netlink.census(status.network, device.as_deref()).await?;
    let peers = match has_datapath(backend) {
        true => pinned_peers(&pins, status).read()?.len(),
        false => status.peers,
    };
    let mut kinds = kinds(&census, status, peers);
    // Who may not ask is told so by other commands.
    if let Ok(count) = netfilter::count(vni).await {
        kinds.push(Kind { object: "packet rules", count, budget: None, flannel: None, over: Vec::new() });
    }
    let bpf = pinned_objects(&pins)?;
    Ok(Overlay { vni, name: status.name(), is_running: is_running(cli, vni), peers, kinds, bpf })
}

fn kinds(census: &Census, status: &Status, peers: usize) -> Vec<Kind> {
    let backend = status.backend_type();
    let (has_device, is_tunnel) = (!census.devices.is_empty(), backend == BackendType::Vxlan);
    let routes_of_flannel = if backend == BackendType::Alloc {
        0
    } else if is_in_user_space(backend) {
        1
    } else {
        peers
    };
    let of_tunnel = if is_tunnel { peers } else { 0 };
    // A neighbour and a forwarding entry for the next hop that all peers share, and for those of others' routes.
    let shared = if has_device && is_tunnel { 1 + census.foreign_routes } else { 0 };
    vec![
        Kind::new("devices", &census.devices, 1, usize::from(has_device)),
        routes(&census.routes, status.routes.mode != Routing::Shared.label(), routes_of_flannel),
        Kind::new("neighbours", &census.neighbours, shared, of_tunnel),
        Kind::new("forwarding entries", &census.forwarding, shared, of_tunnel),
    ]
}

/// What is no more than there may be: routes that leases share, those of leases that none of these covers, and where each lease has one,
/// all that are ours.
fn routes(found: &[(Ipv4Net, bool)], is_per_lease: bool, flannel: usize) -> Kind {
    let is_shared = |(prefix, is_ours): &(Ipv4Net, bool)| {
        let is_covered = |(other, is_ours): &(Ipv4Net, bool)| *is_ours && other != prefix && other.contains(prefix);
        *is_ours && (is_per_lease || !found.iter().any(is_covered))
    };
    let over: Vec<_> = found.iter().filter(|route| !is_shared(route)).map(|(prefix, _)| prefix.to_string()).collect();
    let budget = found.len() - over.len();
    Kind { object: "routes", count: found.len(), budget: Some(budget), flannel: Some(flannel), over }
}

fn document(overlay: &Overlay) -> serde_json::Value {
    let Overlay { vni, is_running, peers, kinds, bpf, .. } = overlay;
    json!({ "vni": vni.get(), "running": is_running, "peers": peers, "objects": kinds, "bpf": bpf })
}

fn table(overlay: &Overlay) -> String {
    let Overlay { name, is_running, peers, kinds, bpf, .. } = overlay;
    let number = |number: Option<usize>| number.map_or("-".to_owned(), |number| number.to_string());
    let heading = ["object", "count", "budget", "flannel's", "over"].map(str::to_owned);
    let lines = kinds.iter().map(|Kind { object, count, budget, flannel, over }| {
        [(*object).to_owned(), count.to_string(), number(*budget), number(*flannel), named(over)]
    });
    let bytes = |bytes: &mut dyn Iterator<Item = Option<u64>>| {
        let total: Option<u64> = bytes.sum();
        total.map_or("can't be told".to_owned(), |total| ByteSize(total).to_string())
    };
    let programs = bytes(&mut bpf.programs.iter().map(|program| program.bytes));
    let maps = bytes(&mut bpf.maps.iter().map(|map| map.bytes));
    let of_bpf = [
        ["BPF programs", &bpf.programs.len().to_string(), &programs],
        ["BPF maps", &bpf.maps.len().to_string(), &maps],
        ["BPF links", &bpf.links.len().to_string(), ""],
    ];
    format!(
        "{name}{}: {}\n{}{}",
        agent_note(*is_running),
        counted(*peers, "peer"),
        rows(std::iter::once(heading).chain(lines)),
        rows(of_bpf.map(|row| row.map(str::to_owned)))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_of_its_own_is_too_much_for_a_lease_that_shares_one() {
        let found: Vec<(Ipv4Net, bool)> =
            [("10.5.0.0/16", true), ("10.5.7.0/24", true), ("10.6.7.0/24", true), ("10.5.9.0/24", false)]
                .map(|(prefix, is_ours)| (prefix.parse().unwrap(), is_ours))
                .into();
        let shared = routes(&found, false, 4);
        assert_eq!((shared.budget, shared.over), (Some(2), vec!["10.5.7.0/24".to_owned(), "10.5.9.0/24".to_owned()]));
        assert_eq!(routes(&found, true, 4).over, ["10.5.9.0/24"]);
    }

    #[test]
    fn what_is_more_than_the_budget_is_named() {
        let found: Vec<_> = ["10.5.0.0/16", "10.5.7.0/24", "10.5.8.0/24"].map(str::to_owned).into();
        let routes = Kind::new("routes", &found, 1, 2);
        assert_eq!((routes.count, routes.over), (3, found[1..].to_vec()));
        assert!(Kind::new("routes", &found, 3, 2).over.is_empty());
        assert!(Kind::new("routes", &[], 1, 2).over.is_empty());
    }
}
