//! The overlays whose packets are captured: by which links they pass, and how they are told from others.

use std::net::Ipv4Addr;

use flannel_common::vxlan::Vni;
use ipnet::Ipv4Net;

use super::{CaptureError, Options, frame::Filter};
use crate::{
    backend::has_datapath,
    cli::Cli,
    config::BackendType,
    dataplane::PinDirectory,
    device::{Link, Netlink, vxlan::VxlanDevice},
    operator::{OperatorError, peers::peers, ping::Target},
    status::Status,
};

/// How packets are encapsulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tunnel {
    /// An Ethernet frame in VXLAN (RFC 7348).
    Vxlan { port: u16, vni: Vni },
    /// An IPv4 packet in UDP, by flannel's backend udp.
    Udp { port: u16 },
}

impl Tunnel {
    pub(super) const fn port(self) -> u16 {
        match self {
            Self::Vxlan { port, .. } | Self::Udp { port } => port,
        }
    }
}

/// An overlay, and where its packets pass.
pub(super) struct Overlay {
    pub(super) status: Status,
    /// What inner packets are shown on.
    pub(super) device: String,
    /// [`None`] for host-gw.
    pub(super) tunnel: Option<Tunnel>,
    /// Whether packets of the Network pass without a tunnel.
    pub(super) is_direct: bool,
    pub(super) links: Vec<Link>,
    pub(super) filter: Filter,
}

/// The loopback device of each network namespace; no packet of an overlay passes it.
const LOOPBACK: &str = "lo";

impl Overlay {
    /// Those of this host that are asked for.
    pub(super) async fn read(cli: &Cli, options: &Options) -> Result<Vec<Self>, OperatorError> {
        let (netlink, _events, _connection) = Netlink::open()?;
        let links = netlink.links().await?;
        let ports = netlink.vxlan_ports().await?;
        let is_asked_for = |vni: Vni| options.vni.is_none_or(|asked| asked == vni.get());
        let mut overlays = Vec::new();
        for (vni, status) in Status::read_all(&cli.run_dir)?.into_iter().filter(|(vni, _)| is_asked_for(*vni)) {
            let (backend, mut device) = (status.backend_type(), VxlanDevice::name_of(vni));
            let tunnel = match backend {
                BackendType::Vxlan => {
                    let port = ports.iter().find(|(name, _)| *name == device).map(|(_, port)| *port);
                    let port = port.ok_or_else(|| CaptureError::NoDevice(device.clone()))?;
                    Some(Tunnel::Vxlan { port, vni })
                }
                BackendType::HostGw => None,
                BackendType::Udp => {
                    let tunnel = status.tunnel.as_ref().ok_or_else(|| CaptureError::NoDevice(status.name()))?;
                    device.clone_from(&tunnel.device);
                    Some(Tunnel::Udp { port: tunnel.port })
                }
                BackendType::Alloc => continue,
            };
            let of_overlay = |link: &&Link| {
                link.name != LOOPBACK
                    && (link.name == status.external_interface || status.underlay_interfaces.contains(&link.name))
            };
            let links: Vec<_> = links.iter().filter(of_overlay).cloned().collect();
            if links.is_empty() {
                return Err(CaptureError::NoLink { name: status.name(), link: status.external_interface }.into());
            }
            let filter = filter(cli, options, vni, &status, &netlink).await?;
            let is_direct = status.direct_routing || backend == BackendType::HostGw;
            overlays.push(Self { status, device, tunnel, is_direct, links, filter });
        }
        if overlays.is_empty() {
            return Err(CaptureError::NoOverlay(options.vni).into());
        }
        Ok(overlays)
    }

    /// Why a filter can't match on this host, as far as that can be told.
    pub(super) fn mismatch(&self) -> Option<String> {
        let (hosts, subnet) = (&self.filter.hosts, self.status.lease.subnet);
        let overlap = |one: &Ipv4Net, other: &Ipv4Net| one.contains(other) || other.contains(one);
        let outside = hosts.iter().find(|host| {
            !overlap(host, &self.status.network) && !host.contains(&self.status.public_ip) && self.tunnel.is_some()
        });
        match outside {
            Some(host) => Some(format!(
                "{host} is not in the Network {}: what is translated (a service's address) has a pod's address in the overlay",
                self.status.network
            )),
            None if hosts.len() == 2 && !hosts.iter().any(|host| overlap(host, &subnet)) => Some(format!(
                "packets between {} and {} do not pass this host, which leases {subnet}, but for its own pods' addresses",
                hosts[0], hosts[1]
            )),
            None => None,
        }
    }
}

/// What is asked for, with what is known of the peer that is.
async fn filter(
    cli: &Cli,
    options: &Options,
    vni: Vni,
    status: &Status,
    netlink: &Netlink,
) -> Result<Filter, OperatorError> {
    let mut filter = Filter {
        hosts: options.host.clone(),
        vteps: Vec::new(),
        subnets: Vec::new(),
        protocol: options.protocol(),
        port: options.port,
    };
    let Some(target) = options.peer else { return Ok(filter) };
    if has_datapath(status.backend_type()) {
        match peers(&PinDirectory::new(&cli.bpf_pin_dir, vni), status, &netlink.neighbour_states().await?) {
            Ok(peers) => {
                let is_meant = |subnet: Ipv4Net, vtep: Ipv4Addr| match target {
                    Target::Address(address) => address == vtep || subnet.contains(&address),
                    Target::Subnet(asked) => asked.contains(&subnet),
                };
                for peer in peers.iter().filter(|peer| is_meant(peer.subnet, peer.address)) {
                    filter.vteps.push(peer.address);
                    filter.subnets.push(peer.subnet);
                }
                if filter.vteps.is_empty() {
                    eprintln!("no peer of {} is {target} by now; `flannel-agent peers` lists them", status.name());
                }
            }
            // The maps are root's; what is in the packets is enough for most.
            Err(error) => {
                eprintln!("which peer is {target} can't be told ({error}): taken are packets with this address")
            }
        }
    }
    match target {
        Target::Address(address) => filter.vteps.push(address),
        Target::Subnet(subnet) => filter.subnets.push(subnet),
    }
    Ok(filter)
}
