//! The vxlan backend (flannel: pkg/backend/vxlan/vxlan.go).

use flannel_common::vxlan::{OVERHEAD, Vni};

use crate::{
    config::VxlanConfig,
    device::{self, DeviceError, Link, Netlink, external::External, vxlan::VxlanDevice},
    lease::{BackendAttributes, MacAddress},
    repair::Repair,
    underlay::Endpoint,
};

/// Packets in UDP, which the programs encapsulate, and the kernel's vxlan device where they can't.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vxlan {
    device: VxlanDevice,
    is_direct: bool,
}

impl Vxlan {
    /// For a configuration, on an external interface.
    pub fn new(config: &VxlanConfig, external: &External) -> Self {
        Self { device: VxlanDevice::new(config, external), is_direct: config.direct_routing }
    }

    pub(super) const fn is_direct(&self) -> bool {
        self.is_direct
    }

    pub(super) const fn vni(&self) -> Vni {
        self.device.vni
    }

    pub(super) const fn mtu(&self) -> u32 {
        self.device.mtu
    }

    pub(super) const fn port(&self) -> u16 {
        self.device.port
    }

    pub(super) const fn attributes(&self) -> BackendAttributes {
        BackendAttributes::Vxlan { vni: self.device.vni }
    }

    pub(super) fn device_name(&self) -> &str {
        &self.device.name
    }

    pub(super) async fn device_mac(&self, netlink: &Netlink) -> Result<Option<MacAddress>, DeviceError> {
        Ok(netlink.vxlan_mac(&self.device).await?.map(MacAddress))
    }

    pub(super) async fn ensure_device(
        &self,
        netlink: &Netlink,
        mac: MacAddress,
    ) -> Result<(Link, Option<Repair>), DeviceError> {
        netlink.ensure_vxlan(&self.device, mac.0).await
    }

    pub(super) fn endpoint(&self, external: &External, mac: MacAddress) -> Endpoint {
        Endpoint {
            external: external.clone(),
            port: self.device.port,
            source_ports: device::local_ports(),
            vni: self.device.vni,
            vtep_mac: mac,
            overlay: 0,
            mtu: self.device.mtu,
            overhead: OVERHEAD.into(),
        }
    }
}
