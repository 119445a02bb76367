//! How packets get to the other hosts: a backend says which device carries the slow path, which MTU pods get, what this
//! host's lease announces, and how a peer is reached.
//!
//! * `vxlan` — in UDP, as the kernel's vxlan device sends them
//!
//! A backend that is added has a module here, and a variant in [`BackendConfig`] (its settings) and in
//! [`BackendAttributes`] (what leases say of it). The daemon drives any of them by what [`Backend`] offers.
//!
//! What is a lease of another backend than this host's is known to [`BackendAttributes::peer`] alone.

mod vxlan;

use flannel_common::vxlan::Vni;

pub use self::vxlan::Vxlan;
use crate::{
    config::BackendConfig,
    device::{DeviceError, Link, Netlink, external::External},
    lease::{BackendAttributes, MacAddress},
    repair::Repair,
    underlay::Endpoint,
};

/// The backend that this host has, on its external interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// In UDP, as the kernel's vxlan device sends them.
    Vxlan(Vxlan),
}

impl Backend {
    /// The backend that a configuration asks for, on an external interface.
    pub fn new(config: &BackendConfig, external: &External) -> Self {
        match config {
            BackendConfig::Vxlan(config) => Self::Vxlan(Vxlan::new(config, external)),
        }
    }

    /// Whether peers on the same link are sent packets without encapsulation.
    pub const fn is_direct(&self) -> bool {
        match self {
            Self::Vxlan(vxlan) => vxlan.is_direct(),
        }
    }

    /// The number that this host knows the overlay by.
    pub const fn vni(&self) -> Vni {
        match self {
            Self::Vxlan(vxlan) => vxlan.vni(),
        }
    }

    /// MTU of pods, in bytes.
    pub const fn mtu(&self) -> u32 {
        match self {
            Self::Vxlan(vxlan) => vxlan.mtu(),
        }
    }

    /// UDP port of the tunnel.
    pub const fn port(&self) -> u16 {
        match self {
            Self::Vxlan(vxlan) => vxlan.port(),
        }
    }

    /// What the leases of its hosts have in common.
    pub const fn attributes(&self) -> BackendAttributes {
        match self {
            Self::Vxlan(vxlan) => vxlan.attributes(),
        }
    }

    /// The name of the device that carries the slow path.
    pub fn device_name(&self) -> &str {
        match self {
            Self::Vxlan(vxlan) => vxlan.device_name(),
        }
    }

    /// The MAC that this host's lease is to announce, where the device is there already and can be kept.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn device_mac(&self, netlink: &Netlink) -> Result<Option<MacAddress>, DeviceError> {
        match self {
            Self::Vxlan(vxlan) => vxlan.device_mac(netlink).await,
        }
    }

    /// Makes the device that carries the slow path, or what it differs in. The device, and what was done.
    ///
    /// # Errors
    /// [`DeviceError`] with the request that failed.
    pub async fn ensure_device(
        &self,
        netlink: &Netlink,
        mac: MacAddress,
    ) -> Result<(Link, Option<Repair>), DeviceError> {
        match self {
            Self::Vxlan(vxlan) => vxlan.ensure_device(netlink, mac).await,
        }
    }

    /// By what each peer is reached from this host.
    pub fn endpoint(&self, external: &External, mac: MacAddress) -> Endpoint {
        match self {
            Self::Vxlan(vxlan) => vxlan.endpoint(external, mac),
        }
    }
}
