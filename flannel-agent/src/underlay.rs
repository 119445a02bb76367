//! Which way each peer is reached: from the lease table and the kernel's routes and neighbours to the values of the
//! maps.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::Ipv4Addr,
};

use flannel_common::{
    flow::SourcePorts,
    maps::Vtep,
    packet::{Mac, OuterHeader, Tunnel},
    vxlan::Vni,
};
use ipnet::Ipv4Net;
use tracing::warn;

use crate::{
    dataplane::DesiredPeers,
    device::{
        Changed, DeviceError, Netlink,
        external::External,
        next_hop::{NextHop, WayKey},
        routing_rules::TunnelPackets,
    },
    lease::{LeaseTable, MacAddress, Peer},
};

/// This end of all tunnels.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Where the tunnels leave the host.
    pub external: External,
    /// UDP port.
    pub port: u16,
    /// UDP source ports.
    pub source_ports: SourcePorts,
    /// The overlay's identifier.
    pub vni: Vni,
    /// MAC of this host's vxlan device.
    pub vtep_mac: MacAddress,
    /// Number of this host's vxlan device; 0 before it is made.
    pub overlay: u32,
}

impl Endpoint {
    /// What the kernel is asked for the ways to the peers by: a tunnel packet without a mark.
    const fn way_key(&self) -> WayKey {
        let Self { external, port, source_ports, .. } = self;
        WayKey { source: external.address, port: *port, source_port: source_ports.min, mark: 0 }
    }
}

/// What the kernel says of the ways to the peers.
pub struct Underlay {
    endpoint: Endpoint,
    /// MAC of each link; [`None`] for one without link-layer header.
    links: HashMap<u32, Option<Mac>>,
    /// [`None`] for a peer that the underlay has no way to.
    next_hops: HashMap<Ipv4Addr, Option<NextHop>>,
    neighbours: HashMap<NextHop, Mac>,
    /// The MAC that each next hop in use had last, which its entry of the neighbour cache may forget meanwhile.
    last_macs: HashMap<NextHop, Mac>,
    /// What was said of peers without a way, so that it is said once.
    complaints: HashMap<Ipv4Addr, String>,
}

impl Underlay {
    /// Knows nothing yet.
    pub fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            links: HashMap::new(),
            next_hops: HashMap::new(),
            neighbours: HashMap::new(),
            last_macs: HashMap::new(),
            complaints: HashMap::new(),
        }
    }

    /// Takes note of the number of this host's vxlan device.
    pub const fn set_overlay(&mut self, ifindex: u32) {
        self.endpoint.overlay = ifindex;
    }

    /// Takes note of another external interface, or of what is different about it.
    pub fn set_external(&mut self, external: External) {
        self.endpoint.external = external;
    }

    /// Takes note of another MAC of this host's vxlan device.
    pub const fn set_vtep_mac(&mut self, mac: MacAddress) {
        self.endpoint.vtep_mac = mac;
    }

    /// Whether a link is this host's vxlan device.
    pub const fn is_overlay(&self, ifindex: u32) -> bool {
        ifindex == self.endpoint.overlay
    }

    /// The number of this host's vxlan device; 0 before it is made.
    pub const fn overlay(&self) -> u32 {
        self.endpoint.overlay
    }

    /// The tunnel packets, of which some may have these bits in their marks.
    pub const fn tunnel_packets(&self, marks: u32) -> TunnelPackets {
        TunnelPackets { key: self.endpoint.way_key(), source_ports: self.endpoint.source_ports, marks }
    }

    /// A route has changed: what it leads to may be reached in another way.
    pub fn forget(&mut self, prefix: Ipv4Net) {
        self.next_hops.retain(|address, _| !prefix.contains(address));
    }

    /// Whether something that happens on a link can matter for the ways to the peers.
    pub fn depends_on(&self, ifindex: u32) -> bool {
        let Endpoint { external, overlay, .. } = &self.endpoint;
        ifindex == external.link.index
            || ifindex == *overlay
            || self.next_hops.values().flatten().any(|next_hop| next_hop.ifindex == ifindex)
    }

    /// Asks the kernel for the way to a peer, where it is not known. One that it has no way to costs only itself.
    pub async fn look_up(&mut self, netlink: &Netlink, address: Ipv4Addr) {
        if self.next_hops.contains_key(&address) {
            return;
        }
        let next_hop = match netlink.next_hop(address, self.endpoint.way_key()).await {
            Ok(next_hop) if next_hop.ifindex != self.endpoint.overlay => {
                self.complaints.remove(&address);
                Some(next_hop)
            }
            Ok(_) => self.complain(address, "its route leads into the overlay itself".to_owned()),
            Err(error) => self.complain(address, error.to_string()),
        };
        self.next_hops.insert(address, next_hop);
    }

    fn complain(&mut self, address: Ipv4Addr, reason: String) -> Option<NextHop> {
        if self.complaints.get(&address) != Some(&reason) {
            warn!("nothing can be sent to the peer {address}: {reason}");
            self.complaints.insert(address, reason);
        }
        None
    }

    /// Asks anew for what may have changed. The next hops that turned out to have another MAC.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn refresh(
        &mut self,
        netlink: &Netlink,
        table: &LeaseTable,
        event: Changed,
    ) -> Result<Vec<NextHop>, DeviceError> {
        self.neighbours = netlink.neighbours().await?;
        if event == Changed::Topology {
            self.links = netlink.links().await?.into_iter().map(|link| (link.index, link.mac)).collect();
            self.next_hops.clear();
        }
        let wanted: BTreeSet<Ipv4Addr> = table.iter().map(|(_, peer)| peer.public_ip).collect();
        self.next_hops.retain(|address, _| wanted.contains(address));
        self.complaints.retain(|address, _| wanted.contains(address));
        for address in wanted {
            self.look_up(netlink, address).await;
        }
        Ok(self.changed_macs())
    }

    fn changed_macs(&mut self) -> Vec<NextHop> {
        let in_use: HashSet<NextHop> = self.next_hops.values().flatten().copied().collect();
        self.last_macs.retain(|next_hop, _| in_use.contains(next_hop));
        let neighbours = self.neighbours.iter().filter(|(next_hop, _)| in_use.contains(next_hop));
        let is_other = |(next_hop, mac): &(&NextHop, &Mac)| {
            self.last_macs.insert(**next_hop, **mac).is_some_and(|before| before != **mac)
        };
        neighbours.filter(is_other).map(|(next_hop, _)| *next_hop).collect()
    }

    /// Whether a peer is its own next hop on the external interface; [`None`] where that is to be asked for.
    pub fn is_on_link(&self, address: Ipv4Addr) -> Option<bool> {
        let ifindex = self.endpoint.external.link.index;
        Some(*self.next_hops.get(&address)? == Some(NextHop { ifindex, address }))
    }

    /// What the maps should say. A peer without a way stays in them: what comes from it is still its own.
    pub fn desired(&self, table: &LeaseTable) -> DesiredPeers {
        table.iter().map(|(subnet, peer)| (*subnet, self.vtep(peer))).collect()
    }

    /// What the maps should say of one.
    pub fn vtep(&self, peer: &Peer) -> Vtep {
        let Endpoint { external, port, vni, vtep_mac, source_ports: _, overlay: _ } = &self.endpoint;
        let next_hop = self.next_hops.get(&peer.public_ip).copied().flatten();
        let device_mac = next_hop.and_then(|next_hop| self.links.get(&next_hop.ifindex).copied()).flatten();
        let next_hop_mac = match (next_hop, device_mac) {
            (Some(next_hop), Some(_)) => self.neighbours.get(&next_hop).copied(),
            // A device without a link-layer header needs no MAC: the header's is stripped on the way to it.
            (Some(_), None) => Some(Mac::default()),
            (None, _) => None,
        };
        // Who sends from there is known by it also while the kernel holds it for stale.
        let last_mac = next_hop_mac.or_else(|| self.last_macs.get(&next_hop?).copied());
        let flag = |is_set: bool, flag: u32| if is_set { flag } else { 0 };
        // Programs see what comes from there.
        let is_on_link =
            device_mac.is_some() && next_hop == Some(NextHop { ifindex: external.link.index, address: peer.public_ip });
        let header = OuterHeader::template(&Tunnel {
            next_hop_mac: last_mac.unwrap_or_default(),
            device_mac: device_mac.unwrap_or_default(),
            source: external.address.octets(),
            destination: peer.public_ip.octets(),
            port: *port,
            vni: *vni,
            peer_vtep_mac: peer.vtep_mac.0,
            vtep_mac: vtep_mac.0,
        });
        Vtep {
            header,
            address: peer.public_ip.to_bits(),
            next_hop: next_hop.map_or([0; 4], |next_hop| next_hop.address.octets()),
            ifindex: next_hop.map_or(0, |next_hop| next_hop.ifindex),
            flags: flag(next_hop_mac.is_some(), Vtep::RESOLVED)
                | flag(is_on_link, Vtep::ON_LINK)
                | flag(last_mac.is_some(), Vtep::HAS_MAC),
        }
    }
}
