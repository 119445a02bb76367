//! What leases say of the backend that their hosts have: `BackendType` and `BackendData`.

use std::net::Ipv4Addr;

use flannel_common::{
    packet::is_unicast,
    vxlan::{NEXT_HOP_MAC, Vni},
};

use super::{InvalidLease, LeaseAttributes, MacAddress, Peer, beginning};

/// What the leases of an overlay's hosts have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendAttributes {
    /// The vxlan backend's.
    Vxlan {
        /// The overlay's VXLAN network identifier.
        vni: Vni,
    },
    /// The host-gw backend's, which say nothing but that.
    HostGw,
    /// The udp backend's, which do not even say that.
    Udp,
    /// The alloc backend's, which are the same.
    Alloc,
}

/// Stands for the MAC of a host whose lease announces none.
const NO_MAC: MacAddress = MacAddress(NEXT_HOP_MAC);

impl BackendAttributes {
    /// The value of a host's lease.
    pub fn of_host(self, public_ip: Ipv4Addr, vtep_mac: MacAddress) -> LeaseAttributes {
        match self {
            Self::Vxlan { vni } => LeaseAttributes::vxlan(public_ip, vni.get(), vtep_mac),
            Self::HostGw | Self::Udp | Self::Alloc => LeaseAttributes::without_data(public_ip, self.label()),
        }
    }

    /// The lease's `BackendType`; empty where it has none.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Vxlan { .. } => "vxlan",
            Self::HostGw => "host-gw",
            Self::Udp | Self::Alloc => "",
        }
    }

    /// The MAC that each lease of this host's has, where leases announce none of a host's own.
    pub const fn fixed_mac(self) -> Option<MacAddress> {
        match self {
            Self::Vxlan { .. } => None,
            Self::HostGw | Self::Udp | Self::Alloc => Some(NO_MAC),
        }
    }

    /// The MAC that a lease announces, or what stands for it; [`None`] for one of another backend.
    pub fn announced_mac(self, attributes: &LeaseAttributes) -> Option<MacAddress> {
        match self {
            Self::Vxlan { .. } => attributes.announced_mac(),
            Self::HostGw | Self::Udp | Self::Alloc => self.peer(attributes).ok().map(|peer| peer.vtep_mac),
        }
    }

    /// The host that a lease names, as one to encapsulate to.
    ///
    /// # Errors
    /// [`InvalidLease`] for a host without a VTEP in this overlay: [`InvalidLease::Backend`] where it has another backend.
    pub fn peer(self, attributes: &LeaseAttributes) -> Result<Peer, InvalidLease> {
        if attributes.backend_type != self.label() {
            let theirs = beginning(&attributes.backend_type);
            return Err(InvalidLease::Backend { theirs, ours: self.label() });
        }
        let vtep_mac = match self {
            Self::HostGw | Self::Udp | Self::Alloc => NO_MAC,
            Self::Vxlan { vni } => {
                let data = attributes.vxlan_data()?;
                if data.vni != vni.get() {
                    return Err(InvalidLease::Vni { theirs: data.vni, ours: vni });
                }
                data.vtep_mac
            }
        };
        if !is_unicast(attributes.public_ip.to_bits()) {
            return Err(InvalidLease::PublicIp(attributes.public_ip));
        }
        Ok(Peer { public_ip: attributes.public_ip, vtep_mac })
    }
}
