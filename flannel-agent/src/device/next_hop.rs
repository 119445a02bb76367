//! The underlay's next hop towards each VTEP, and the MAC it has there.
//!
//! Resolving next hops is left to the kernel's neighbour cache and driven by traffic: a packet to a peer whose MAC is
//! not known goes through `bpf_redirect_neigh`, which asks for it, and the answer is heard here. An entry that the
//! kernel holds for stale is unknown again, since packets with a ready MAC would not make the kernel confirm it. So
//! an agent adds nothing to the neighbour table, which an underlay with thousands of hosts on one link could overflow.

use std::{collections::HashMap, net::Ipv4Addr};

use flannel_common::packet::Mac;
use futures_util::TryStreamExt as _;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
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
    /// The next hop towards `destination`, as the kernel's vxlan device would choose it for a forwarding entry of flannel's,
    /// which names no interface: by the routing rules for addresses, protocol and ports (`udp_tunnel_dst_lookup`,
    /// net/ipv4/udp_tunnel_core.c).
    ///
    /// # Errors
    /// [`DeviceError::Call`] where the kernel has no way, [`DeviceError::Unexpected`] for one that is not followed here.
    pub async fn next_hop(&self, destination: Ipv4Addr, key: WayKey) -> Result<NextHop, DeviceError> {
        next_hop(&self.way(destination, key).await?, destination)
    }

    /// The kernel's answer.
    pub(super) async fn way(&self, destination: Ipv4Addr, key: WayKey) -> Result<RouteMessage, DeviceError> {
        let WayKey { source, port, source_port, mark } = key;
        let mut request = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(destination, 32)
            .source_prefix(source, 32)
            .build();
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
}

/// Where a route leads a packet to `destination`.
pub(super) fn next_hop(route: &RouteMessage, destination: Ipv4Addr) -> Result<NextHop, DeviceError> {
    if route.attributes.iter().any(|attribute| matches!(attribute, RouteAttribute::Via(_))) {
        return Err(DeviceError::Unexpected(format!("{destination} is behind an IPv6 next hop: not supported")));
    }
    if route.header.kind != RouteType::Unicast {
        return Err(DeviceError::Unexpected(format!("{destination} is no other host's address")));
    }
    let gateway = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(RouteAddress::Inet(address)) => Some(*address),
        _ => None,
    });
    let ifindex = output_interface(route);
    let ifindex = ifindex.ok_or_else(|| DeviceError::Unexpected(format!("{CALL} {destination}: no interface")))?;
    Ok(NextHop { ifindex, address: gateway.unwrap_or(destination) })
}

fn confirmed(entry: &NeighbourMessage) -> Option<(NextHop, Mac)> {
    let is_confirmed = matches!(
        entry.header.state,
        NeighbourState::Reachable | NeighbourState::Delay | NeighbourState::Probe | NeighbourState::Permanent
    );
    let mut address = None;
    let mut mac = None;
    for attribute in &entry.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(destination)) => address = Some(*destination),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = Mac::try_from(bytes.as_slice()).ok(),
            _ => {}
        }
    }
    Some((NextHop { ifindex: entry.header.ifindex, address: address.filter(|_| is_confirmed)? }, mac?))
}
