//! What the checks have in common.

use std::{collections::HashSet, net::Ipv4Addr};

use flannel_common::{
    packet::Mac,
    vxlan::{self, Vni},
};
use ipnet::Ipv4Net;

use super::Check;
use crate::{
    cli::Cli,
    config::{BackendConfig, BackendType, NetworkConfig, UDP_PORT, VxlanConfig},
    device::{
        DeviceError, Link, Netlink,
        external::{External, Selection},
        vxlan::VxlanDevice,
    },
    operator::{asked::Asked, is_running},
    status::Status,
};

/// The network of whoever has no config yet, for what depends on one.
const EXAMPLE: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 5, 0, 0), 16);

/// This host, as all checks see it.
pub(super) struct Host<'a> {
    pub(super) cli: &'a Cli,
    /// Whether it is asked what an agent would find.
    pub(super) before_install: bool,
    pub(super) netlink: Netlink,
    /// Those that agents have here; else the one that is to be.
    pub(super) overlays: Vec<Overlay>,
    /// What became of asking the store.
    pub(super) store: Asked,
    /// The interface to other hosts, as the flags choose it, where there is no status that says which.
    pub(super) external: Result<External, String>,
    /// Keeps the connection to the kernel.
    _connection: tokio::task::JoinHandle<()>,
}

/// An overlay that is there, or is to be.
pub(super) struct Overlay {
    pub(super) vni: Vni,
    /// The name of the device that it has.
    pub(super) device: String,
    pub(super) network: Ipv4Net,
    /// This host's subnet; one of the network's where it has none yet.
    pub(super) subnet: Ipv4Net,
    pub(super) backend: BackendType,
    /// UDP port of the tunnel; [`None`] without one.
    pub(super) port: Option<u16>,
    /// MTU of pods, in bytes.
    pub(super) mtu: u32,
    /// The interface to other hosts; [`None`] where it is gone, or none was found.
    pub(super) external: Option<Link>,
    /// This host's address there.
    pub(super) address: Ipv4Addr,
    /// What its agent said last; [`None`] for one that is to be.
    pub(super) status: Option<Status>,
    /// Whether its agent runs; [`None`] where that can't be told.
    pub(super) is_running: Option<bool>,
}

impl Overlay {
    /// The device that it has with vxlan, as the agent would make it.
    pub(super) fn vxlan_device(&self) -> Option<VxlanDevice> {
        let port = self.port.filter(|_| self.backend == BackendType::Vxlan)?;
        Some(VxlanDevice {
            name: self.device.clone(),
            vni: self.vni,
            port,
            learning: false,
            link: self.external.as_ref().map_or(0, |link| link.index),
            local: self.address,
            mtu: self.mtu,
        })
    }
}

impl<'a> Host<'a> {
    pub(super) async fn look(cli: &'a Cli, before_install: bool) -> Result<Self, DeviceError> {
        let (netlink, _events, connection) = Netlink::open()?;
        let store = Asked::ask(cli).await;
        let statuses = match before_install {
            true => Vec::new(),
            false => Status::read_all(&cli.run_dir).unwrap_or_default(),
        };
        let selection = Selection { published: store.published, ..cli.selection() };
        let external = netlink.external_interface(&selection).await.map_err(|error| error.to_string());
        let ports = netlink.vxlan_ports().await?;
        let links = netlink.links().await?;
        let config = store.config.as_ref().ok();
        let mut overlays: Vec<_> =
            statuses.into_iter().map(|(vni, status)| there(cli, vni, status, config, &ports, &links)).collect();
        if overlays.is_empty() {
            overlays.push(planned(config, external.as_ref().ok()));
        }
        Ok(Self { cli, before_install, netlink, overlays, store, external, _connection: connection })
    }

    /// The names of the devices that packets of an overlay's pods come by, without pods' own.
    pub(super) async fn bridges(&self, overlay: &Overlay) -> Vec<String> {
        let within = self.netlink.devices_within(overlay.subnet).await.unwrap_or_else(|_| HashSet::new());
        let names = within.into_iter().filter_map(crate::operator::interface_name);
        names.filter(|name| *name != overlay.device && *name != "lo").collect()
    }
}

fn there(
    cli: &Cli,
    vni: Vni,
    status: Status,
    config: Option<&NetworkConfig>,
    ports: &[(String, u16)],
    links: &[Link],
) -> Overlay {
    let backend = status.backend_type();
    let device = VxlanDevice::name_of(vni);
    let configured = config.filter(|config| config.backend.vni() == vni).and_then(port_of);
    let port = match backend {
        BackendType::Vxlan => {
            let own = ports.iter().find(|(name, _)| *name == device).map(|(_, port)| *port);
            own.or(configured).or(Some(vxlan::DEFAULT_PORT))
        }
        BackendType::Udp => status.tunnel.as_ref().map(|tunnel| tunnel.port).or(configured).or(Some(UDP_PORT)),
        BackendType::HostGw | BackendType::Alloc => None,
    };
    Overlay {
        vni,
        device: status.tunnel.as_ref().map_or(device, |tunnel| tunnel.device.clone()),
        network: status.network,
        subnet: status.lease.subnet,
        backend,
        port,
        mtu: status.mtu,
        external: links.iter().find(|link| link.name == status.external_interface).cloned(),
        address: status.public_ip,
        is_running: is_running(cli, vni),
        status: Some(status),
    }
}

/// What an agent would make with this config, or with one that says nothing but vxlan.
fn planned(config: Option<&NetworkConfig>, external: Option<&External>) -> Overlay {
    let default = BackendConfig::Vxlan(VxlanConfig {
        vni: Vni::DEFAULT,
        port: vxlan::DEFAULT_PORT,
        mtu: None,
        learning: false,
        direct_routing: false,
    });
    let backend = config.map_or(&default, |config| &config.backend);
    let network = config.map_or(EXAMPLE, |config| config.network);
    let subnet_len = config.map_or(24, |config| config.subnet_len).clamp(network.prefix_len(), 32);
    let nowhere = External { link: no_link(), address: Ipv4Addr::UNSPECIFIED, public_ip: Ipv4Addr::UNSPECIFIED };
    let made = crate::backend::Backend::new(backend, external.unwrap_or(&nowhere));
    Overlay {
        vni: backend.vni(),
        device: VxlanDevice::name_of(backend.vni()),
        network,
        subnet: Ipv4Net::new(network.network(), subnet_len).unwrap_or(network),
        backend: backend.kind(),
        port: config.map_or(Some(vxlan::DEFAULT_PORT), port_of),
        mtu: made.map_or(0, |backend| backend.mtu()),
        external: external.map(|external| external.link.clone()),
        address: external.map_or(Ipv4Addr::UNSPECIFIED, |external| external.address),
        status: None,
        is_running: None,
    }
}

const fn no_link() -> Link {
    const MAC: Option<Mac> = None;
    Link { name: String::new(), index: 0, mtu: 0, mac: MAC }
}

const fn port_of(config: &NetworkConfig) -> Option<u16> {
    match &config.backend {
        BackendConfig::Vxlan(vxlan) => Some(vxlan.port),
        BackendConfig::Udp(udp) => Some(udp.port),
        BackendConfig::HostGw(_) | BackendConfig::Alloc(_) => None,
    }
}

/// What an agent with these flags needs of others.
pub(super) fn needs(cli: &Cli, host: &Host<'_>) -> Check {
    let mut needs = Vec::new();
    for Overlay { port, backend, .. } in &host.overlays {
        match (port, backend) {
            (Some(port), _) => needs.push(format!("UDP port {port} open between all hosts")),
            (None, BackendType::HostGw) => needs.push("all hosts on one link".to_owned()),
            (None, _) => {}
        }
        if crate::backend::has_datapath(*backend) {
            needs.push("CAP_BPF and CAP_NET_ADMIN".to_owned());
            needs.push(format!("a bpf file system at {}", cli.bpf_pin_dir.display()));
        }
    }
    needs.push(format!("{} at {}", host.store.kind, host.store.endpoints.join(", ")));
    needs.push(format!("a writable {}", cli.run_dir.display()));
    Check::ok("needs", needs.join("; "))
}
