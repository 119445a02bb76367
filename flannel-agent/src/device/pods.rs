//! Where pods are: the host's sides of their veths, whoever made them.

use std::collections::HashSet;

use futures_util::TryStreamExt as _;
use ipnet::Ipv4Net;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::{
        link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
        route::{RouteAddress, RouteAttribute, RouteMessage},
    },
};

use super::{DeviceError, Netlink};

impl Netlink {
    /// The veths whose other side is in another namespace, and which are ports of a bridge that has an address in the
    /// subnet, or which part of the subnet is routed to. Names and numbers.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn pods(&self, subnet: Ipv4Net) -> Result<Vec<(String, u32)>, DeviceError> {
        let links: Vec<LinkMessage> =
            self.handle.link().get().execute().try_collect().await.map_err(DeviceError::call("list", "links"))?;
        let veths: Vec<_> = links.iter().filter_map(Veth::of).collect();
        if veths.is_empty() {
            return Ok(Vec::new());
        }
        let addresses = self.addresses().await?;
        let gateways: HashSet<u32> =
            addresses.into_iter().filter(|(_, address)| subnet.contains(address)).map(|(ifindex, _)| ifindex).collect();
        let routes = self.handle.route().get(RouteMessageBuilder::<std::net::Ipv4Addr>::new().build()).execute();
        let routes: Vec<RouteMessage> = routes.try_collect().await.map_err(DeviceError::call("list", "routes"))?;
        let routed: HashSet<u32> = routes.iter().filter_map(|route| target_within(route, subnet)).collect();
        let is_pods =
            |veth: &Veth| veth.bridge.is_some_and(|bridge| gateways.contains(&bridge)) || routed.contains(&veth.index);
        Ok(veths.into_iter().filter(is_pods).map(|veth| (veth.name, veth.index)).collect())
    }
}

/// A veth with its other side elsewhere.
struct Veth {
    name: String,
    index: u32,
    bridge: Option<u32>,
}

impl Veth {
    fn of(message: &LinkMessage) -> Option<Self> {
        let mut veth = Self { name: String::new(), index: message.header.index, bridge: None };
        let (mut is_veth, mut is_elsewhere) = (false, false);
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => veth.name.clone_from(name),
                LinkAttribute::Controller(bridge) => veth.bridge = Some(*bridge),
                LinkAttribute::LinkNetNsId(_) => is_elsewhere = true,
                LinkAttribute::LinkInfo(infos) => is_veth = infos.contains(&LinkInfo::Kind(InfoKind::Veth)),
                _ => {}
            }
        }
        (is_veth && is_elsewhere).then_some(veth)
    }
}

/// The device of a route to part of the subnet.
fn target_within(route: &RouteMessage, subnet: Ipv4Net) -> Option<u32> {
    let mut device = None;
    let mut is_within = false;
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(ifindex) => device = Some(*ifindex),
            RouteAttribute::Destination(RouteAddress::Inet(address)) => is_within = subnet.contains(address),
            _ => {}
        }
    }
    device.filter(|_| is_within && route.header.destination_prefix_length >= subnet.prefix_len())
}
