//! The udp backend (flannel: pkg/backend/udp): packets in UDP, by a TUN device and threads of this process
//! ([`udp`](crate::udp)). It needs no programs, and is the slow road.
//!
//! Leases say nothing of it, as flannel's. flannel's proxy sends to whoever leases a subnet, whatever backend that has; here, a host
//! whose lease names another is no peer: it takes none of these datagrams, and who sends to its pods is told at once.

use flannel_common::vxlan::Vni;

use crate::{config::UdpConfig, device::external::External, lease::BackendAttributes, udp::OVERHEAD};

/// Packets in UDP, by this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Udp {
    vni: Vni,
    port: u16,
    external: String,
    mtu: u32,
}

impl Udp {
    /// For a configuration, on an external interface.
    pub(super) fn new(config: UdpConfig, external: &External) -> Self {
        let mtu = external.link.mtu.saturating_sub(OVERHEAD);
        Self { vni: config.vni, port: config.port, external: external.link.name.clone(), mtu }
    }

    pub(super) const fn vni(&self) -> Vni {
        self.vni
    }

    pub(super) const fn port(&self) -> u16 {
        self.port
    }

    pub(super) const fn mtu(&self) -> u32 {
        self.mtu
    }

    pub(super) fn device_name(&self) -> &str {
        &self.external
    }

    pub(super) const fn attributes() -> BackendAttributes {
        BackendAttributes::Udp
    }
}
