//! The host-gw backend (flannel: pkg/backend/hostgw/hostgw.go): packets as they are, to hosts on the same link.
//!
//! The slow path is the external interface itself, as with flannel: what the stack routes to peers leaves by it, and what they
//! send comes in by it. One route leads there for all leases, to a next hop that is nobody's; `to_underlay` puts the peer's MAC in
//! its place. With `"KernelRoutes": true` there is a route for each lease instead.

use flannel_common::vxlan::Vni;

use super::BackendError;
use crate::{config::HostGwConfig, device::external::External, lease::BackendAttributes};

/// Packets to hosts on the link of the external interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostGw {
    vni: Vni,
    external: String,
    mtu: u32,
    kernel_routes: bool,
}

impl HostGw {
    /// For a configuration, on an external interface.
    ///
    /// # Errors
    /// [`BackendError`] where its address is not the one that peers would send to.
    pub(super) fn new(config: HostGwConfig, external: &External) -> Result<Self, BackendError> {
        let External { link, address, public_ip } = external;
        if address != public_ip {
            return Err(BackendError::Nat { public_ip: *public_ip, address: *address });
        }
        if link.mac.is_none() {
            return Err(BackendError::NoLinkLayer(link.name.clone()));
        }
        Ok(Self { vni: config.vni, external: link.name.clone(), mtu: link.mtu, kernel_routes: config.kernel_routes })
    }

    pub(super) const fn vni(&self) -> Vni {
        self.vni
    }

    pub(super) const fn mtu(&self) -> u32 {
        self.mtu
    }

    pub(super) const fn has_kernel_routes(&self) -> bool {
        self.kernel_routes
    }

    pub(super) fn device_name(&self) -> &str {
        &self.external
    }

    pub(super) const fn attributes() -> BackendAttributes {
        BackendAttributes::HostGw
    }
}
