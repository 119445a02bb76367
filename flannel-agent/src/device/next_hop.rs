//! The underlay's next hop towards each VTEP, and the MAC it has there.
//!
//! Resolving next hops is left to the kernel's neighbour cache and driven by traffic: a packet to a peer whose MAC is
//! not known goes through `bpf_redirect_neigh`, which asks for it, and the answer is heard here. An entry that the
//! kernel holds for stale is unknown again, since packets with a ready MAC would not make the kernel confirm it. So
//! an agent adds nothing to the neighbour table, which an underlay with thousands of hosts on one link could overflow.
//!
//! Where a route has several next hops, the flow decides among them, and the programs ask the kernel for each packet.

use std::{
    collections::{BTreeSet, HashMap},
    net::Ipv4Addr,
};

use flannel_common::packet::Mac;
use futures_util::TryStreamExt as _;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
        route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteType},
    },
};

use super::{DeviceError, Netlink, external::output_interface};

const CALL: &str = "look up the route to";

/// Where packets to an address leave the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NextHop {
    /// The device.
    pub ifindex: u32,
    /// The gateway, or the address itself on the link.
    pub address: Ipv4Addr,
}

/// The way to a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathTo {
    /// How packets leave the host.
    pub route: PeerRoute,
    /// The MTU that the route has, or that was learned of the path, in bytes.
    pub mtu: Option<u32>,
}

/// How packets to a peer leave the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerRoute {
    /// All by one next hop.
    One(NextHop),
    /// Each as the kernel says of its flow.
    ByFlow {
        /// By one of these devices.
        devices: BTreeSet<u32>,
        /// By which those go that nothing tells from others; [`None`] for one with an IPv6 address.
        usual: Option<NextHop>,
    },
}

impl PeerRoute {
    /// The next hop that packets go by which nothing tells from others.
    pub const fn next_hop(&self) -> Option<NextHop> {
        match self {
            Self::One(next_hop) => Some(*next_hop),
            Self::ByFlow { usual, .. } => *usual,
        }
    }

    /// With other ways beside it, each of these devices, that some packets take.
    pub fn or_by(self, others: &[&BTreeSet<u32>]) -> Self {
        if others.is_empty() {
            return self;
        }
        let devices = self.devices().chain(others.iter().copied().flatten().copied()).collect();
        Self::ByFlow { devices, usual: self.next_hop() }
    }

    /// The devices that packets leave by.
    pub fn devices(&self) -> impl Iterator<Item = u32> {
        let (one, several) = match self {
            Self::One(next_hop) => (Some(next_hop.ifindex), None),
            Self::ByFlow { devices, .. } => (None, Some(devices)),
        };
        one.into_iter().chain(several.into_iter().flatten().copied())
    }
}

/// What the kernel chooses the way of a tunnel packet by, besides its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WayKey {
    /// This VTEP's address.
    pub source: Ipv4Addr,
    /// The tunnel's UDP port.
    pub port: u16,
    /// UDP source port.
    pub source_port: u16,
    /// The mark, which is that of the packet inside.
    pub mark: u32,
}

impl Netlink {
    /// The way to `destination`, as the kernel's vxlan device would choose it for a forwarding entry of flannel's, which names
    /// no interface: by the routing rules for addresses, protocol and ports (`udp_tunnel_dst_lookup`,
    /// net/ipv4/udp_tunnel_core.c). Where the host has routes with several next hops, it may be one of these.
    ///
    /// # Errors
    /// [`DeviceError::Call`] where the kernel has no way, [`DeviceError::Unexpected`] for one that is not followed here.
    pub async fn peer_route(
        &self,
        destination: Ipv4Addr,
        key: WayKey,
        may_be_several: bool,
    ) -> Result<PathTo, DeviceError> {
        let route = self.way(destination, key, RouteFlags::empty()).await?;
        if may_be_several {
            let whole = self.way(destination, key, RouteFlags::FibMatch).await?;
            if let Some(devices) = several(&whole) {
                let usual = peer_route(&route, destination)?;
                return Ok(PathTo { route: usual.or_by(&[&devices]), mtu: mtu_of(&whole) });
            }
        }
        Ok(PathTo { route: peer_route(&route, destination)?, mtu: mtu_of(&route) })
    }

    /// The kernel's answer: the next hop that it chooses, or with [`RouteFlags::FibMatch`] the route that it found, whole.
    pub(super) async fn way(
        &self,
        destination: Ipv4Addr,
        key: WayKey,
        flags: RouteFlags,
    ) -> Result<RouteMessage, DeviceError> {
        let WayKey { source, port, source_port, mark } = key;
        let mut request = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(destination, 32)
            .source_prefix(source, 32)
            .build();
        request.header.flags = flags;
        request.attributes.extend([
            RouteAttribute::IpProto(nix::libc::IPPROTO_UDP as u8),
            RouteAttribute::Sport(source_port),
            RouteAttribute::Dport(port),
            RouteAttribute::Mark(mark),
            // No socket sends it.
            RouteAttribute::Uid(0),
        ]);
        let route = self.handle.route().get(request).execute().try_next().await;
        let route = route.map_err(DeviceError::call(CALL, destination))?;
        route.ok_or_else(|| DeviceError::Unexpected(format!("{CALL} {destination}: no answer")))
    }

    /// Has the kernel find out a next hop's MAC, as a packet to it would.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn resolve(&self, ifindex: u32, next_hop: Ipv4Addr) -> Result<(), DeviceError> {
        let entry = self.handle.neighbours().add(ifindex, next_hop.into()).state(NeighbourState::None);
        let entry = entry.flags(NeighbourFlags::Use).replace();
        entry.execute().await.map_err(DeviceError::call("resolve the next hop", next_hop))
    }

    /// The MACs of next hops that the kernel holds for valid and confirmed, or is confirming.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn neighbours(&self) -> Result<HashMap<NextHop, Mac>, DeviceError> {
        let ask = || self.handle.neighbours().get().set_address_family(AddressFamily::Inet).execute();
        let entries = self.dump("neighbours", ask).await?;
        Ok(entries.iter().filter_map(confirmed).collect())
    }

    /// What the kernel knows of next hops, as `ip neighbour` shows it, in lower case.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn neighbour_states(&self) -> Result<HashMap<NextHop, &'static str>, DeviceError> {
        let ask = || self.handle.neighbours().get().set_address_family(AddressFamily::Inet).execute();
        let entries = self.dump("neighbours", ask).await?;
        Ok(entries.iter().filter_map(|entry| Some((next_hop_of(entry)?, label(entry.header.state)))).collect())
    }
}

/// As `ip neighbour` has it, in lower case.
const fn label(state: NeighbourState) -> &'static str {
    match state {
        NeighbourState::Incomplete => "incomplete",
        NeighbourState::Reachable => "reachable",
        NeighbourState::Stale => "stale",
        NeighbourState::Delay => "delay",
        NeighbourState::Probe => "probe",
        NeighbourState::Failed => "failed",
        NeighbourState::Noarp => "noarp",
        NeighbourState::Permanent => "permanent",
        _ => "none",
    }
}

/// Where a route leads a packet to `destination`. Next hops with an IPv6 address (RFC 5549) are left to the kernel.
pub(super) fn peer_route(route: &RouteMessage, destination: Ipv4Addr) -> Result<PeerRoute, DeviceError> {
    if route.header.kind != RouteType::Unicast {
        return Err(DeviceError::Unexpected(format!("{destination} is no other host's address")));
    }
    let gateway = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(RouteAddress::Inet(address)) => Some(*address),
        _ => None,
    });
    let ifindex = output_interface(route);
    let ifindex = ifindex.ok_or_else(|| DeviceError::Unexpected(format!("{CALL} {destination}: no interface")))?;
    if route.attributes.iter().any(|attribute| matches!(attribute, RouteAttribute::Via(_))) {
        return Ok(PeerRoute::ByFlow { devices: [ifindex].into(), usual: None });
    }
    Ok(PeerRoute::One(NextHop { ifindex, address: gateway.unwrap_or(destination) }))
}

/// The MTU of a route, in bytes, where it has one.
pub(super) fn mtu_of(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Metrics(metrics) => metrics.iter().find_map(|metric| match metric {
            RouteMetric::Mtu(mtu) => Some(*mtu),
            _ => None,
        }),
        _ => None,
    })
}

/// The devices of a route with more than one next hop; none of a nexthop group whose members the kernel does not name
/// (`nexthop_compat_mode` 0).
fn several(route: &RouteMessage) -> Option<BTreeSet<u32>> {
    let is_object = route.attributes.iter().any(|attribute| matches!(attribute, RouteAttribute::NhId(_)));
    let is_named =
        |attribute: &RouteAttribute| matches!(attribute, RouteAttribute::Oif(_) | RouteAttribute::MultiPath(_));
    if is_object && !route.attributes.iter().any(is_named) {
        return Some(BTreeSet::new());
    }
    let next_hops = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::MultiPath(next_hops) if next_hops.len() > 1 => Some(next_hops),
        _ => None,
    })?;
    Some(next_hops.iter().map(|next_hop| next_hop.interface_index).collect())
}

/// Whom an entry is about.
pub(super) fn next_hop_of(entry: &NeighbourMessage) -> Option<NextHop> {
    let address = entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(*address),
        _ => None,
    });
    Some(NextHop { ifindex: entry.header.ifindex, address: address? })
}

fn confirmed(entry: &NeighbourMessage) -> Option<(NextHop, Mac)> {
    let is_confirmed = matches!(
        entry.header.state,
        NeighbourState::Reachable | NeighbourState::Delay | NeighbourState::Probe | NeighbourState::Permanent
    );
    let mac = entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => Mac::try_from(bytes.as_slice()).ok(),
        _ => None,
    });
    Some((next_hop_of(entry).filter(|_| is_confirmed)?, mac?))
}
