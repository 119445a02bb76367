//! How packets get to the other hosts: a backend says which device carries the slow path, which MTU pods get, what this
//! host's lease announces, and how a peer is reached.
//!
//! * `vxlan` — in UDP, as the kernel's vxlan device sends them
//! * `host_gw` — as they are, to hosts on the same link
//! * `udp` — in UDP, by threads of this process
//! * `alloc` — not by this agent
//!
//! A backend that is added has a module here, and a variant in [`BackendConfig`] (its settings) and in
//! [`BackendAttributes`] (what leases say of it). The daemon drives any of them by what [`Backend`] offers.
//!
//! What is a lease of another backend than this host's is known to [`BackendAttributes::peer`] alone.

mod alloc;
mod host_gw;
mod udp;
mod vxlan;

use std::net::Ipv4Addr;

use flannel_common::{
    maps::Config,
    vxlan::{NEXT_HOP_MAC, Vni},
};

pub use self::{alloc::Alloc, host_gw::HostGw, udp::Udp, vxlan::Vxlan};
use crate::{
    config::{BackendConfig, BackendType},
    dataplane::Hook,
    device::{self, DeviceError, Link, Netlink, external::External},
    lease::{BackendAttributes, MacAddress},
    repair::Repair,
    underlay::Endpoint,
};

/// A backend that this host can't have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackendError {
    /// Peers would send to another address than this host's own. The first part is flannel's message.
    #[error(
        "your PublicIP differs from interface IP, meaning that probably you're on a NAT, which is not supported by host-gw \
         backend: {public_ip} is published, and the interface has {address}; use vxlan, or another --iface or --public-ip"
    )]
    Nat {
        /// What peers are told.
        public_ip: Ipv4Addr,
        /// What the interface has.
        address: Ipv4Addr,
    },
    /// Nothing on that interface has a MAC.
    #[error("{0} has no Ethernet headers, and host-gw sends to the MACs of other hosts: use vxlan, or another --iface")]
    NoLinkLayer(String),
}

/// The backend that this host has, on its external interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// In UDP, as the kernel's vxlan device sends them.
    Vxlan(Vxlan),
    /// As they are, to hosts on the same link.
    HostGw(HostGw),
    /// In UDP, by threads of this process.
    Udp(Udp),
    /// Not by this agent.
    Alloc(Alloc),
}

/// Where a program is attached, besides pods' veths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// The external interface.
    External,
    /// That, and all others that tunnel packets can come in by.
    Underlay,
    /// The device that the backend makes.
    Device,
}

/// The programs of a backend, and where they are attached.
pub const fn hooks(backend: BackendType) -> &'static [(Hook, At)] {
    match backend {
        BackendType::Vxlan => {
            &[(Hook::FromUnderlay, At::Underlay), (Hook::FromOverlay, At::Device), (Hook::ToOverlay, At::Device)]
        }
        BackendType::HostGw => &[(Hook::FromUnderlay, At::External), (Hook::ToUnderlay, At::External)],
        BackendType::Udp | BackendType::Alloc => &[],
    }
}

/// Whether a backend carries packets, by programs and what hangs on them. One that does not touches nothing of the kernel's, but
/// for one [in user space](is_in_user_space).
pub const fn has_datapath(backend: BackendType) -> bool {
    !hooks(backend).is_empty()
}

/// Whether a backend carries packets by threads of this process.
pub const fn is_in_user_space(backend: BackendType) -> bool {
    matches!(backend, BackendType::Udp)
}

impl Backend {
    /// The backend that a configuration asks for, on an external interface.
    ///
    /// # Errors
    /// [`BackendError`].
    pub fn new(config: &BackendConfig, external: &External) -> Result<Self, BackendError> {
        Ok(match config {
            BackendConfig::Vxlan(config) => Self::Vxlan(Vxlan::new(config, external)),
            BackendConfig::HostGw(config) => Self::HostGw(HostGw::new(*config, external)?),
            BackendConfig::Udp(config) => Self::Udp(Udp::new(*config, external)),
            BackendConfig::Alloc(config) => Self::Alloc(Alloc::new(*config, external)),
        })
    }

    /// Which it is.
    pub const fn kind(&self) -> BackendType {
        match self {
            Self::Vxlan(_) => BackendType::Vxlan,
            Self::HostGw(_) => BackendType::HostGw,
            Self::Udp(_) => BackendType::Udp,
            Self::Alloc(_) => BackendType::Alloc,
        }
    }

    /// Constants of the programs, as [`Config::flags`].
    pub const fn flags(&self) -> u32 {
        match self {
            Self::Vxlan(vxlan) if vxlan.is_direct() => Config::DIRECT,
            Self::Vxlan(_) | Self::Udp(_) | Self::Alloc(_) => 0,
            Self::HostGw(_) => Config::DIRECT | Config::NO_TUNNEL,
        }
    }

    /// Whether packets to some peers are encapsulated, and to some not.
    pub const fn has_both_ways(&self) -> bool {
        match self {
            Self::Vxlan(vxlan) => vxlan.is_direct(),
            Self::HostGw(_) | Self::Udp(_) | Self::Alloc(_) => false,
        }
    }

    /// Whether each lease has a route of the kernel's own.
    pub const fn has_kernel_routes(&self) -> bool {
        match self {
            Self::Vxlan(_) | Self::Udp(_) | Self::Alloc(_) => false,
            Self::HostGw(host_gw) => host_gw.has_kernel_routes(),
        }
    }

    /// The number that this host knows the overlay by.
    pub const fn vni(&self) -> Vni {
        match self {
            Self::Vxlan(vxlan) => vxlan.vni(),
            Self::HostGw(host_gw) => host_gw.vni(),
            Self::Udp(udp) => udp.vni(),
            Self::Alloc(alloc) => alloc.vni(),
        }
    }

    /// MTU of pods, in bytes.
    pub const fn mtu(&self) -> u32 {
        match self {
            Self::Vxlan(vxlan) => vxlan.mtu(),
            Self::HostGw(host_gw) => host_gw.mtu(),
            Self::Udp(udp) => udp.mtu(),
            Self::Alloc(alloc) => alloc.mtu(),
        }
    }

    /// UDP port of the tunnel; 0 without one.
    pub const fn port(&self) -> u16 {
        match self {
            Self::Vxlan(vxlan) => vxlan.port(),
            Self::Udp(udp) => udp.port(),
            Self::HostGw(_) | Self::Alloc(_) => 0,
        }
    }

    /// What the leases of its hosts have in common.
    pub const fn attributes(&self) -> BackendAttributes {
        match self {
            Self::Vxlan(vxlan) => vxlan.attributes(),
            Self::HostGw(_) => HostGw::attributes(),
            Self::Udp(_) => Udp::attributes(),
            Self::Alloc(_) => Alloc::attributes(),
        }
    }

    /// The name of the device that carries the slow path; that it leaves by, where that one's is known only once it is made.
    pub fn device_name(&self) -> &str {
        match self {
            Self::Vxlan(vxlan) => vxlan.device_name(),
            Self::HostGw(host_gw) => host_gw.device_name(),
            Self::Udp(udp) => udp.device_name(),
            Self::Alloc(alloc) => alloc.device_name(),
        }
    }

    /// The name of the device that it makes, where it makes one of a name that is known before.
    pub fn own_device_name(&self) -> Option<&str> {
        match self {
            Self::Vxlan(vxlan) => Some(vxlan.device_name()),
            Self::HostGw(_) | Self::Udp(_) | Self::Alloc(_) => None,
        }
    }

    /// The MAC that this host's lease is to announce, where the device is there already and can be kept.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn device_mac(&self, netlink: &Netlink) -> Result<Option<MacAddress>, DeviceError> {
        match self {
            Self::Vxlan(vxlan) => vxlan.device_mac(netlink).await,
            Self::HostGw(_) | Self::Udp(_) | Self::Alloc(_) => Ok(self.attributes().fixed_mac()),
        }
    }

    /// Makes the device that carries the slow path, or what it differs in; [`None`] where it makes none. The device, and what
    /// was done.
    ///
    /// # Errors
    /// [`DeviceError`] with the request that failed.
    pub async fn ensure_device(
        &self,
        netlink: &Netlink,
        mac: MacAddress,
    ) -> Result<Option<(Link, Option<Repair>)>, DeviceError> {
        match self {
            Self::Vxlan(vxlan) => vxlan.ensure_device(netlink, mac).await.map(Some),
            Self::HostGw(_) | Self::Udp(_) | Self::Alloc(_) => Ok(None),
        }
    }

    /// By what each peer is reached from this host.
    pub fn endpoint(&self, external: &External, mac: MacAddress) -> Endpoint {
        match self {
            Self::Vxlan(vxlan) => vxlan.endpoint(external, mac),
            Self::HostGw(_) | Self::Udp(_) | Self::Alloc(_) => Endpoint {
                external: external.clone(),
                port: 0,
                source_ports: device::local_ports(),
                vni: self.vni(),
                // No device: what stands for the MAC of one.
                vtep_mac: MacAddress(NEXT_HOP_MAC),
                overlay: 0,
                mtu: self.mtu(),
                overhead: 0,
            },
        }
    }
}
