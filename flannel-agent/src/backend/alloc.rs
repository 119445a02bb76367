//! The alloc backend (flannel: pkg/backend/alloc/alloc.go): a lease, and `subnet.env` with the MTU of the external interface.
//! How packets get to the other hosts is somebody else's matter.

use flannel_common::vxlan::Vni;

use crate::{config::AllocConfig, device::external::External, lease::BackendAttributes};

/// No datapath.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alloc {
    vni: Vni,
    external: String,
    mtu: u32,
}

impl Alloc {
    /// For a configuration, on an external interface.
    pub(super) fn new(config: AllocConfig, external: &External) -> Self {
        Self { vni: config.vni, external: external.link.name.clone(), mtu: external.link.mtu }
    }

    pub(super) const fn vni(&self) -> Vni {
        self.vni
    }

    pub(super) const fn mtu(&self) -> u32 {
        self.mtu
    }

    pub(super) fn device_name(&self) -> &str {
        &self.external
    }

    pub(super) const fn attributes() -> BackendAttributes {
        BackendAttributes::Alloc
    }
}
