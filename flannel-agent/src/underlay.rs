//! Which way each peer is reached: from the lease table and the kernel's routes and neighbours to the values of the
//! maps.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
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
        Changed, DeviceError, Link, Netlink,
        external::External,
        next_hop::{NextHop, PathTo, PeerRoute, WayKey},
        routing_rules::{PolicyRule, TunnelPackets},
    },
    lease::{LeaseTable, MacAddress, Peer},
};

/// The least MTU of an IPv4 link, in bytes.
const LEAST_MTU: u32 = 68;

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
    /// The overlay's, in bytes.
    pub mtu: u32,
    /// What the tunnel adds to a packet, in bytes; 0 without one.
    pub overhead: u32,
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
    links: HashMap<u32, Link>,
    /// [`None`] for a peer that the underlay has no way to.
    routes: HashMap<Ipv4Addr, Option<PathTo>>,
    /// Whether some of the host's routes have several next hops.
    may_be_several: bool,
    /// Links by which peers are reached, or were: packets from there may come by another way than packets to there.
    used: BTreeSet<u32>,
    has_new_links: bool,
    /// Rules by which packets to one peer go different ways.
    policy_rules: Vec<PolicyRule>,
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
            routes: HashMap::new(),
            may_be_several: false,
            used: BTreeSet::new(),
            has_new_links: false,
            policy_rules: Vec::new(),
            neighbours: HashMap::new(),
            last_macs: HashMap::new(),
            complaints: HashMap::new(),
        }
    }

    /// Takes note of the number of this host's vxlan device.
    pub const fn set_overlay(&mut self, ifindex: u32) {
        self.endpoint.overlay = ifindex;
    }

    /// Takes note of another external interface, or of what is different about it, and of the MTU that the overlay has by it.
    pub fn set_external(&mut self, external: External, mtu: u32) {
        (self.endpoint.external, self.endpoint.mtu) = (external, mtu);
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
        self.routes.retain(|address, _| !prefix.contains(address));
    }

    /// Takes note of whether some of the host's routes have several next hops: then each peer's may.
    pub fn set_several(&mut self, may_be_several: bool) {
        if std::mem::replace(&mut self.may_be_several, may_be_several) != may_be_several {
            self.routes.clear();
        }
    }

    /// Takes note of rules by which packets to one peer go different ways. Whether there are others than before.
    pub fn set_policy_rules(&mut self, policy_rules: Vec<PolicyRule>) -> bool {
        let is_other = self.policy_rules != policy_rules;
        if is_other {
            self.policy_rules = policy_rules;
            self.routes.clear();
        }
        is_other
    }

    /// Links by which peers are reached, or were.
    pub const fn used(&self) -> &BTreeSet<u32> {
        &self.used
    }

    /// Whether there are more of these than when it was asked last.
    pub const fn take_new_links(&mut self) -> bool {
        std::mem::replace(&mut self.has_new_links, false)
    }

    /// Whether something that happens on a link can matter for the ways to the peers.
    pub fn depends_on(&self, ifindex: u32) -> bool {
        let Endpoint { external, overlay, .. } = &self.endpoint;
        ifindex == external.link.index
            || ifindex == *overlay
            // One that is back may be a way again.
            || self.used.contains(&ifindex)
    }

    /// Asks the kernel for the way to a peer, where it is not known. One that it has no way to costs only itself.
    pub async fn look_up(&mut self, netlink: &Netlink, address: Ipv4Addr) {
        if self.routes.contains_key(&address) {
            return;
        }
        let policy_rules = self.policy_rules.iter().filter(|rule| rule.to.is_none_or(|to| to.contains(&address)));
        let elsewhere: Vec<_> = policy_rules.map(|rule| &rule.devices).collect();
        let route = netlink.peer_route(address, self.endpoint.way_key(), self.may_be_several).await;
        let path = match route.map(|path| PathTo { route: path.route.or_by(&elsewhere), ..path }) {
            Ok(path) if path.route.devices().all(|device| device != self.endpoint.overlay) => {
                self.complaints.remove(&address);
                let before = self.used.len();
                self.used.extend(path.route.devices());
                self.has_new_links |= self.used.len() > before;
                Some(path)
            }
            Ok(_) => self.complain(address, "its route leads into the overlay itself".to_owned()),
            Err(error) => self.complain(address, error.to_string()),
        };
        self.routes.insert(address, path);
    }

    fn complain(&mut self, address: Ipv4Addr, reason: String) -> Option<PathTo> {
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
        if event >= Changed::Way {
            // Of one that no peer was reached by, nothing was heard.
            self.links = netlink.links().await?.into_iter().map(|link| (link.index, link)).collect();
        }
        if event == Changed::Topology {
            self.routes.clear();
        }
        let wanted: BTreeSet<Ipv4Addr> = table.iter().map(|(_, peer)| peer.public_ip).collect();
        self.routes.retain(|address, _| wanted.contains(address));
        self.complaints.retain(|address, _| wanted.contains(address));
        for address in wanted {
            self.look_up(netlink, address).await;
        }
        Ok(self.changed_macs())
    }

    fn changed_macs(&mut self) -> Vec<NextHop> {
        let in_use: HashSet<NextHop> =
            self.routes.values().flatten().filter_map(|path| path.route.next_hop()).collect();
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
        let next_hop = self.routes.get(&address)?.as_ref().and_then(|path| path.route.next_hop());
        Some(next_hop == Some(NextHop { ifindex, address }))
    }

    /// The largest packet that fits into the tunnel on the way to a peer, where that is less than the overlay's MTU, in bytes.
    pub fn smaller_mtu(&self, peer: Ipv4Addr) -> Option<u16> {
        let path = self.routes.get(&peer)?.as_ref()?;
        // Without a tunnel the stack routes to the peer itself, and knows.
        if self.endpoint.overhead == 0 {
            return None;
        }
        let of_links = path.route.devices().filter_map(|device| Some(self.links.get(&device)?.mtu));
        let mtu = of_links.chain(path.mtu).filter(|mtu| *mtu > 0).min()?.saturating_sub(self.endpoint.overhead);
        // Less than that no IPv4 link has (RFC 791).
        (mtu < self.endpoint.mtu).then(|| u16::try_from(mtu.max(LEAST_MTU)).unwrap_or(u16::MAX))
    }

    /// The leases to whose hosts not all packets of the overlay's MTU fit, and which do, in bytes.
    /// Of those whose way is to be asked for again, as it was `before`.
    pub fn smaller_paths(
        &self,
        table: &LeaseTable,
        before: impl Fn(&Ipv4Net) -> Option<u16>,
    ) -> BTreeMap<Ipv4Net, u16> {
        let mtu = |subnet: &Ipv4Net, peer: &Peer| match self.routes.contains_key(&peer.public_ip) {
            true => self.smaller_mtu(peer.public_ip),
            false => before(subnet),
        };
        table.iter().filter_map(|(subnet, peer)| Some((*subnet, mtu(subnet, peer)?))).collect()
    }

    /// What the maps should say. A peer without a way stays in them: what comes from it is still its own.
    pub fn desired(&self, table: &LeaseTable) -> DesiredPeers {
        table.iter().map(|(subnet, peer)| (*subnet, self.vtep(peer))).collect()
    }

    /// What the maps should say of one.
    pub fn vtep(&self, peer: &Peer) -> Vtep {
        let Endpoint { external, port, vni, vtep_mac, .. } = &self.endpoint;
        let path = self.routes.get(&peer.public_ip).and_then(Option::as_ref);
        let route = path.map(|path| &path.route);
        let next_hop = route.and_then(PeerRoute::next_hop);
        let is_by_flow = matches!(route, Some(PeerRoute::ByFlow { .. }));
        let device_mac = next_hop.and_then(|next_hop| self.links.get(&next_hop.ifindex)?.mac);
        let next_hop_mac = match (next_hop, device_mac) {
            (Some(next_hop), Some(_)) => self.neighbours.get(&next_hop).copied(),
            // A device without a link-layer header needs no MAC: the header's is stripped on the way to it.
            (Some(_), None) => Some(Mac::default()),
            (None, _) => None,
        };
        // Who sends from there is known by it also while the kernel holds it for stale.
        let last_mac = next_hop_mac.or_else(|| self.last_macs.get(&next_hop?).copied());
        let flag = |is_set: bool, flag: u16| if is_set { flag } else { 0 };
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
            // Of a next hop with an IPv6 address: that there is one.
            ifindex: next_hop.map(|next_hop| next_hop.ifindex).or_else(|| route?.devices().next()).unwrap_or_default(),
            flags: flag(next_hop_mac.is_some(), Vtep::RESOLVED)
                | flag(is_on_link, Vtep::ON_LINK)
                | flag(last_mac.is_some(), Vtep::HAS_MAC)
                | flag(is_by_flow, Vtep::BY_FLOW),
            mtu: self.smaller_mtu(peer.public_ip).unwrap_or_default(),
        }
    }
}
