//! Where the stack would send one packet, as `ip route get ... from ... iif ...` asks it.

use std::{collections::HashMap, net::Ipv4Addr};

use flannel_common::packet::Mac;
use futures_util::TryStreamExt as _;
use nix::errno::Errno;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        neighbour::NeighbourAttribute,
        route::{RouteAttribute, RouteType},
    },
};

use super::{
    DeviceError, Netlink,
    next_hop::{NextHop, mtu_of, next_hop_of, peer_route},
};

/// What the stack does with a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StackRoute {
    /// It keeps it: the address is the host's.
    Local,
    /// It sends it on.
    Forwarded {
        /// By whom; [`None`] for a next hop with an IPv6 address.
        next_hop: Option<NextHop>,
        /// By which device.
        ifindex: u32,
        /// The MTU that the route has, or that was learned of the path, in bytes.
        mtu: Option<u32>,
    },
    /// It drops it, in the kernel's words: there is no route, or one that refuses, or the sender is not believed (`rp_filter`).
    Refused(String),
}

impl Netlink {
    /// Where the stack would send a packet: one of the host's own, or one that came in by a device.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub async fn stack_route(
        &self,
        source: Ipv4Addr,
        destination: Ipv4Addr,
        input: Option<u32>,
    ) -> Result<StackRoute, DeviceError> {
        let mut request = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(destination, 32)
            .source_prefix(source, 32)
            .build();
        request.attributes.extend(input.map(RouteAttribute::Iif));
        let route = match self.handle.route().get(request).execute().try_next().await {
            Ok(Some(route)) => route,
            Ok(None) => return Err(DeviceError::Unexpected(format!("the route to {destination}: no answer"))),
            Err(rtnetlink::Error::NetlinkError(error)) => {
                return Ok(StackRoute::Refused(Errno::from_raw(-error.raw_code()).desc().to_lowercase()));
            }
            Err(error) => return Err(DeviceError::call("look up the route to", destination)(error)),
        };
        if route.header.kind == RouteType::Local {
            return Ok(StackRoute::Local);
        }
        let way = peer_route(&route, destination)?;
        let next_hop = way.next_hop();
        let Some(ifindex) = way.devices().next() else {
            return Err(DeviceError::Unexpected(format!("the route to {destination}: no interface")));
        };
        Ok(StackRoute::Forwarded { next_hop, ifindex, mtu: mtu_of(&route) })
    }

    /// The MACs that the kernel has of neighbours, also where it has to confirm them.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn neighbour_macs(&self) -> Result<HashMap<NextHop, Mac>, DeviceError> {
        let ask = || self.handle.neighbours().get().set_address_family(AddressFamily::Inet).execute();
        let entries = self.dump("neighbours", ask).await?;
        let mac = |attribute: &NeighbourAttribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => Mac::try_from(bytes.as_slice()).ok(),
            _ => None,
        };
        Ok(entries
            .iter()
            .filter_map(|entry| Some((next_hop_of(entry)?, entry.attributes.iter().find_map(mac)?)))
            .collect())
    }
}
