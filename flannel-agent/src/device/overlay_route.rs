//! What leads into `flannel.<VNI>`: the one route of the Network, its next hop's neighbour, and where the kernel's vxlan
//! device sends what is addressed to that.
//!
//! Each is read before it is written, so that what is as it should be stays, and nobody is told of a change.

use std::net::Ipv4Addr;

use futures_util::{StreamExt as _, TryStreamExt as _};
use ipnet::Ipv4Net;
use rtnetlink::{
    RouteMessageBuilder,
    packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage},
    },
};

use super::{
    DeviceError, Link, Netlink,
    vxlan::{NEXT_HOP, NEXT_HOP_MAC, VxlanDevice},
};
use crate::repair::Repair;

impl Netlink {
    /// Routes the Network into the device through the one next hop with its one neighbour, and has the kernel send what
    /// is addressed to that neighbour's MAC, and not encapsulated by the programs, back to this host's own device. What of
    /// that there was to do.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn ensure_route(
        &self,
        link: &Link,
        device: &VxlanDevice,
        network: Ipv4Net,
    ) -> Result<Vec<Repair>, DeviceError> {
        let mut repairs = Vec::new();
        let mac = NeighbourAttribute::LinkLayerAddress(NEXT_HOP_MAC.0.to_vec());
        let next_hop = NeighbourAttribute::Destination(NEXT_HOP.into());
        // Of a forwarding entry the family says nothing about the destination's.
        let local = NeighbourAttribute::Destination(NeighbourAddress::Other(device.local.octets().to_vec()));

        if !self.has_neighbour(link, AddressFamily::Inet, next_hop, &mac).await? {
            let neighbour = self.handle.neighbours().add(link.index, NEXT_HOP.into());
            let neighbour = neighbour.link_layer_address(&NEXT_HOP_MAC.0).replace();
            neighbour.execute().await.map_err(DeviceError::call("set the neighbour of", &link.name))?;
            repairs.push(Repair::Neighbour);
        }
        if !self.has_neighbour(link, AddressFamily::Bridge, mac, &local).await? {
            let forwarding = self.handle.neighbours().add_bridge(link.index, &NEXT_HOP_MAC.0);
            let forwarding = forwarding.destination(device.local.into()).flags(NeighbourFlags::Own).replace();
            forwarding.execute().await.map_err(DeviceError::call("set the forwarding entry of", &link.name))?;
            repairs.push(Repair::ForwardingEntry);
        }
        if !self.has_overlay_route(link, network).await? {
            let route = self.handle.route().add(overlay_route(link, network)).replace();
            route.execute().await.map_err(DeviceError::call("route into", &link.name))?;
            repairs.push(Repair::Route);
        }
        Ok(repairs)
    }

    /// Whether a device has a permanent neighbour or forwarding entry with this key and value.
    async fn has_neighbour(
        &self,
        link: &Link,
        family: AddressFamily,
        key: NeighbourAttribute,
        value: &NeighbourAttribute,
    ) -> Result<bool, DeviceError> {
        let mut wanted = NeighbourMessage::default();
        (wanted.header.family, wanted.header.ifindex) = (family, link.index);
        if family == AddressFamily::Bridge {
            // The device's own, not those of a bridge that it is a port of.
            wanted.header.flags = NeighbourFlags::Own;
        }
        wanted.attributes.push(key);
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetNeighbour(wanted));
        request.header.flags = NLM_F_REQUEST;
        let failed = || DeviceError::call("look up a neighbour of", &link.name);
        let mut answers = self.handle.clone().request(request).map_err(failed())?;
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(entry)) => {
                    let is_permanent = entry.header.state == NeighbourState::Permanent;
                    return Ok(is_permanent && entry.attributes.contains(value));
                }
                NetlinkPayload::Error(error) if error.raw_code() == -nix::libc::ENOENT => return Ok(false),
                NetlinkPayload::Error(error) => return Err(failed()(rtnetlink::Error::NetlinkError(error))),
                _ => {}
            }
        }
        Ok(false)
    }

    /// Whether the Network's route is the one that leads into the device.
    async fn has_overlay_route(&self, link: &Link, network: Ipv4Net) -> Result<bool, DeviceError> {
        let dump = self.handle.route().get(RouteMessageBuilder::<Ipv4Addr>::new().build()).execute();
        let routes: Vec<RouteMessage> = dump.try_collect().await.map_err(DeviceError::call("list", "routes"))?;
        Ok(routes.iter().any(|route| {
            let has = |wanted: RouteAttribute| route.attributes.contains(&wanted);
            route.header.table == RouteHeader::RT_TABLE_MAIN
                && route.header.destination_prefix_length == network.prefix_len()
                && has(RouteAttribute::Destination(RouteAddress::Inet(network.network())))
                && has(RouteAttribute::Gateway(RouteAddress::Inet(NEXT_HOP)))
                && has(RouteAttribute::Oif(link.index))
                // One that is worse than another is none.
                && !route.attributes.iter().any(|attribute| matches!(attribute, RouteAttribute::Priority(_)))
        }))
    }
}

fn overlay_route(link: &Link, network: Ipv4Net) -> RouteMessage {
    RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(network.network(), network.prefix_len())
        .gateway(NEXT_HOP)
        .output_interface(link.index)
        .onlink()
        .build()
}
