//! Which way each peer is reached: from the lease table and the kernel's routes and neighbours to the values of the
//! maps.

use std::{
    collections::{BTreeSet, HashMap},
    net::Ipv4Addr,
};

use flannel_common::{
    maps::Vtep,
    packet::{Mac, OuterHeader, Tunnel},
    vxlan::Vni,
};
use tracing::warn;

use crate::{
    dataplane::DesiredPeers,
    device::{DeviceError, DeviceEvent, Netlink, external::External, next_hop::NextHop},
    lease::{MacAddress, Peer, Peers},
};

/// This end of all tunnels.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Where the tunnels leave the host.
    pub external: External,
    /// UDP port.
    pub port: u16,
    /// The overlay's identifier.
    pub vni: Vni,
    /// MAC of this host's vxlan device.
    pub vtep_mac: MacAddress,
}

/// What the kernel says of the ways to the peers.
pub struct Underlay {
    endpoint: Endpoint,
    next_hops: HashMap<Ipv4Addr, NextHop>,
    neighbours: HashMap<NextHop, Mac>,
    unreachable: BTreeSet<Ipv4Addr>,
}

impl Underlay {
    /// Knows nothing yet.
    pub fn new(endpoint: Endpoint) -> Self {
        Self { endpoint, next_hops: HashMap::new(), neighbours: HashMap::new(), unreachable: BTreeSet::new() }
    }

    /// Asks the kernel for what is not known of these peers.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn look_up(&mut self, netlink: &Netlink, peers: &Peers) -> Result<(), DeviceError> {
        let wanted: BTreeSet<Ipv4Addr> = peers.iter().map(|(_, peer)| peer.public_ip).collect();
        self.next_hops.retain(|address, _| wanted.contains(address));
        self.unreachable.retain(|address| wanted.contains(address));
        for address in wanted {
            if self.next_hops.contains_key(&address) {
                continue;
            }
            match netlink.next_hop(address, self.endpoint.external.link.index).await? {
                Some(next_hop) => {
                    self.unreachable.remove(&address);
                    self.next_hops.insert(address, next_hop);
                }
                None if self.unreachable.insert(address) => {
                    warn!("{} has no route to the peer {address}", self.endpoint.external.link.name);
                }
                None => {}
            }
        }
        Ok(())
    }

    /// Asks anew for what may have changed.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn refresh(&mut self, netlink: &Netlink, peers: &Peers, event: DeviceEvent) -> Result<(), DeviceError> {
        self.neighbours = netlink.neighbours().await?;
        if event == DeviceEvent::Topology {
            self.next_hops.clear();
        }
        self.look_up(netlink, peers).await
    }

    /// What the maps should say. Peers without a way are left out.
    pub fn desired(&self, peers: &Peers) -> DesiredPeers {
        peers.iter().filter_map(|(subnet, peer)| Some((*subnet, self.vtep(peer)?))).collect()
    }

    fn vtep(&self, peer: &Peer) -> Option<Vtep> {
        let Endpoint { external, port, vni, vtep_mac } = &self.endpoint;
        let next_hop = *self.next_hops.get(&peer.public_ip)?;
        // A device without a link-layer header needs no MAC: the header's is stripped on the way to it.
        let next_hop_mac = match external.link.mac {
            Some(_) => self.neighbours.get(&next_hop).copied(),
            None => Some(Mac::default()),
        };
        let header = OuterHeader::template(&Tunnel {
            next_hop_mac: next_hop_mac.unwrap_or_default(),
            device_mac: external.link.mac.unwrap_or_default(),
            source: external.address.octets(),
            destination: peer.public_ip.octets(),
            port: *port,
            vni: *vni,
            peer_vtep_mac: peer.vtep_mac.0,
            vtep_mac: vtep_mac.0,
        });
        Some(Vtep {
            header,
            address: peer.public_ip.to_bits(),
            next_hop: next_hop.address.octets(),
            ifindex: next_hop.ifindex,
            flags: if next_hop_mac.is_some() { Vtep::RESOLVED } else { 0 },
        })
    }
}
