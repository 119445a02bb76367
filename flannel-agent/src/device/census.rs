//! What the kernel has of an overlay: counted, for who asks what it costs.

use flannel_common::packet::Mac;
use ipnet::Ipv4Net;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage},
        route::{RouteMessage, RouteProtocol, RouteType},
    },
};

use super::{
    DeviceError, Netlink,
    overlay_route::{PROTOCOL, is_flannels, is_ours, place},
};
use crate::lease::MacAddress;

/// An overlay's objects, each in words, those that all peers share first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Its devices.
    pub devices: Vec<String>,
    /// Routes of ours, and those into its device that are like flannel's: with whether they are ours.
    pub routes: Vec<(Ipv4Net, bool)>,
    /// Routes of others into its device: for the next hop of each, the agent keeps a neighbour and a forwarding entry.
    pub foreign_routes: usize,
    /// Neighbours on its device.
    pub neighbours: Vec<String>,
    /// Forwarding entries of its device.
    pub forwarding: Vec<String>,
}

impl Netlink {
    /// Counts those of an overlay with this Network and, where it has one, this device.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn census(&self, network: Ipv4Net, device: Option<&str>) -> Result<Census, DeviceError> {
        let link = match device {
            Some(name) => self.link_by_name(name).await?.map(|message| (name, message.header.index)),
            None => None,
        };
        let mut census = Census::default();
        let own = RouteMessageBuilder::<std::net::Ipv4Addr>::new()
            .protocol(RouteProtocol::Other(PROTOCOL))
            .kind(RouteType::Unspec)
            .build();
        let mut routes = self.dump("routes", || self.strict.route().get(own).execute()).await?;
        routes.retain(|route| {
            let (prefix, _) = place(route);
            is_ours(route) && (network.contains(&prefix) || prefix.contains(&network))
        });
        if let Some((name, index)) = link {
            census.devices.push(name.to_owned());
            let into = self.routes_into(index).await?;
            let is_kernels = |route: &RouteMessage| route.header.protocol == RouteProtocol::Kernel;
            let others = into.into_iter().filter(|route| !is_ours(route) && !is_kernels(route));
            let (flannels, foreign): (Vec<_>, Vec<_>) = others.partition(is_flannels);
            census.foreign_routes = foreign.len();
            routes.extend(flannels);
            let entries = async |family| {
                let ask = || self.handle.neighbours().get().set_address_family(family).execute();
                let entries = self.dump("neighbours", ask).await?;
                Ok::<_, DeviceError>(entries.into_iter().filter(move |entry| entry.header.ifindex == index))
            };
            census.neighbours = entries(AddressFamily::Inet).await?.map(|entry| words(&entry)).collect();
            census.forwarding = entries(AddressFamily::Bridge).await?.map(|entry| words(&entry)).collect();
        }
        routes.sort_by_key(|route| (!is_ours(route), place(route)));
        census.routes = routes.iter().map(|route| (place(route).0, is_ours(route))).collect();
        census.neighbours.sort_by_key(|neighbour| !is_next_hop(neighbour));
        Ok(census)
    }
}

/// What all peers share is of a link-local address.
fn is_next_hop(neighbour: &str) -> bool {
    neighbour.starts_with("169.254.")
}

fn words(entry: &NeighbourMessage) -> String {
    let (mut address, mut mac) = (None, None);
    for attribute in &entry.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(to)) => address = Some(to.to_string()),
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = Mac::try_from(bytes.as_slice()).ok().map(|mac| MacAddress(mac).to_string());
            }
            _ => {}
        }
    }
    [address, mac].into_iter().flatten().collect::<Vec<_>>().join(" ")
}
