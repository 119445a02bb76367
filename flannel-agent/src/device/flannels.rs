//! What a daemon of flannel's makes on `flannel.<VNI>` for each of its peers, told from what the agent makes.

use std::net::Ipv4Addr;

use flannel_common::vxlan::NEXT_HOP_MAC;
use ipnet::Ipv4Net;
use rtnetlink::packet_route::{
    AddressFamily,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::RouteMessage,
};

use super::{
    DeviceError, Netlink,
    overlay_route::{is_flannels, place},
};

impl Netlink {
    /// Whether a device is of an overlay with this Network: it has an address within, as flannel's and ours have.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn is_device_of(&self, ifindex: u32, network: Ipv4Net) -> Result<bool, DeviceError> {
        Ok(self.addresses().await?.iter().any(|(index, address)| index == ifindex && network.contains(&address)))
    }

    /// The subnets that flannel's daemon routes into a device: each by way of its own first address, whose permanent
    /// neighbour has another MAC than the agent's made-up one (flannel: pkg/backend/vxlan/vxlan_network.go). The agent
    /// removes them when it starts, so that whoever made them came after it.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn flannels_peers(&self, ifindex: u32) -> Result<Vec<String>, DeviceError> {
        let ask = || self.handle.neighbours().get().set_address_family(AddressFamily::Inet).execute();
        let entries = self.dump("neighbours", ask).await?;
        let next_hops: Vec<Ipv4Addr> = entries.iter().filter_map(|entry| others_next_hop(entry, ifindex)).collect();
        if next_hops.is_empty() {
            return Ok(Vec::new());
        }
        let routes = self.routes_into(ifindex).await?;
        Ok(routes.iter().filter_map(|route| flannels_route(route, &next_hops)).collect())
    }

    /// Whether a device has the agent's made-up next hop, by which it is recognised where nothing else is left of the agent.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn has_our_next_hop(&self, ifindex: u32) -> Result<bool, DeviceError> {
        let ask = || self.handle.neighbours().get().set_address_family(AddressFamily::Inet).execute();
        let entries = self.dump("neighbours", ask).await?;
        Ok(entries.iter().any(|entry| entry.header.ifindex == ifindex && has_our_mac(entry)))
    }
}

fn has_our_mac(entry: &NeighbourMessage) -> bool {
    entry.attributes.contains(&NeighbourAttribute::LinkLayerAddress(NEXT_HOP_MAC.to_vec()))
}

fn others_next_hop(entry: &NeighbourMessage, ifindex: u32) -> Option<Ipv4Addr> {
    let is_others = entry.header.ifindex == ifindex
        && entry.header.state == NeighbourState::Permanent
        && entry.attributes.iter().any(|attribute| matches!(attribute, NeighbourAttribute::LinkLayerAddress(_)))
        && !has_our_mac(entry);
    entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) if is_others => Some(*address),
        _ => None,
    })
}

fn flannels_route(route: &RouteMessage, next_hops: &[Ipv4Addr]) -> Option<String> {
    let (prefix, _) = place(route);
    (is_flannels(route) && next_hops.contains(&prefix.network())).then(|| prefix.to_string())
}

#[cfg(test)]
mod tests {
    use rtnetlink::{RouteMessageBuilder, packet_route::route::RouteProtocol};

    use super::{super::overlay_route::PROTOCOL, *};

    fn neighbour(ifindex: u32, state: NeighbourState, mac: [u8; 6]) -> NeighbourMessage {
        let mut entry = NeighbourMessage::default();
        (entry.header.ifindex, entry.header.state) = (ifindex, state);
        let address = NeighbourAddress::Inet(Ipv4Addr::new(10, 5, 2, 0));
        entry
            .attributes
            .extend([NeighbourAttribute::Destination(address), NeighbourAttribute::LinkLayerAddress(mac.to_vec())]);
        entry
    }

    fn route(gateway: [u8; 4]) -> RouteMessage {
        RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(Ipv4Addr::new(10, 5, 2, 0), 24)
            .gateway(gateway.into())
            .output_interface(7)
            .onlink()
            .build()
    }

    #[test]
    fn a_peer_of_flannels_is_told_from_the_agents_own_and_from_others() {
        let others = [0xa, 0, 0, 0, 0, 9];
        let next_hop = Ipv4Addr::new(10, 5, 2, 0);
        assert_eq!(others_next_hop(&neighbour(7, NeighbourState::Permanent, others), 7), Some(next_hop));
        for (entry, what) in [
            (neighbour(8, NeighbourState::Permanent, others), "another device's"),
            (neighbour(7, NeighbourState::Reachable, others), "the kernel's"),
            (neighbour(7, NeighbourState::Permanent, NEXT_HOP_MAC), "the agent's"),
        ] {
            assert_eq!(others_next_hop(&entry, 7), None, "{what}");
        }
        assert_eq!(flannels_route(&route([10, 5, 2, 0]), &[next_hop]).as_deref(), Some("10.5.2.0/24"));
        assert_eq!(flannels_route(&route([10, 5, 2, 0]), &[]), None, "a next hop of the agent's");
        assert_eq!(flannels_route(&route([10, 5, 3, 0]), &[[10, 5, 3, 0].into()]), None, "a site behind another");
        let mut ours = route([10, 5, 2, 0]);
        ours.header.protocol = RouteProtocol::Other(PROTOCOL);
        assert_eq!(flannels_route(&ours, &[next_hop]), None, "the agent's own route to a lease");
    }
}
