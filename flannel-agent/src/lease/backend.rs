//! What leases say of the backend that their hosts have: `BackendType` and `BackendData`.

use std::net::Ipv4Addr;

use flannel_common::{packet::is_unicast, vxlan::Vni};

use super::{InvalidLease, LeaseAttributes, MacAddress, Peer};

/// What the leases of an overlay's hosts have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendAttributes {
    /// The vxlan backend's.
    Vxlan {
        /// The overlay's VXLAN network identifier.
        vni: Vni,
    },
}

impl BackendAttributes {
    /// The value of a host's lease.
    pub fn of_host(self, public_ip: Ipv4Addr, vtep_mac: MacAddress) -> LeaseAttributes {
        match self {
            Self::Vxlan { vni } => LeaseAttributes::vxlan(public_ip, vni.get(), vtep_mac),
        }
    }

    /// The host that a lease names, as one to encapsulate to.
    ///
    /// # Errors
    /// [`InvalidLease`] for a host without a VTEP in this overlay: [`InvalidLease::Backend`] where it has another backend.
    pub fn peer(self, attributes: &LeaseAttributes) -> Result<Peer, InvalidLease> {
        let Self::Vxlan { vni } = self;
        let data = attributes.vxlan_data()?;
        if data.vni != vni.get() {
            return Err(InvalidLease::Vni { theirs: data.vni, ours: vni });
        }
        if !is_unicast(attributes.public_ip.to_bits()) {
            return Err(InvalidLease::PublicIp(attributes.public_ip));
        }
        Ok(Peer { public_ip: attributes.public_ip, vtep_mac: data.vtep_mac })
    }
}
