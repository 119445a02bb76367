//! `flannel<number>`, the TUN device of the backend udp, its address, and the route into it (flannel:
//! pkg/backend/udp/udp_network_amd64.go).

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use rtnetlink::{
    LinkUnspec, RouteMessageBuilder,
    packet_core::Nla as _,
    packet_route::{
        link::{InfoData, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
        route::RouteProtocol,
    },
};
use tracing::warn;

use super::{DeviceError, Link, Netlink, overlay_route::PROTOCOL};

/// `IFLA_TUN_NUM_QUEUES` (linux/if_link.h).
const NUM_QUEUES: u16 = 8;

/// What the device is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunDevice {
    /// `flannel<number>`.
    pub name: String,
    /// This host's address on the overlay.
    pub address: Ipv4Addr,
    /// What is routed into it.
    pub network: Ipv4Net,
    /// In bytes.
    pub mtu: u32,
}

impl Netlink {
    /// How many queues of a TUN device are open; no number for a device of another kind, and [`None`] where there is none of
    /// that name.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn tun_queues(&self, name: &str) -> Result<Option<Option<u32>>, DeviceError> {
        Ok(self.link_by_name(name).await?.map(|message| queues(&message)))
    }

    /// Gives the device its address and MTU, has it up, and the network routed into it.
    ///
    /// # Errors
    /// [`DeviceError`] with the request that failed.
    pub async fn ensure_tun(&self, device: &TunDevice) -> Result<Link, DeviceError> {
        let TunDevice { name, address, network, mtu } = device;
        let message = self.link_by_name(name).await?;
        let message =
            message.ok_or_else(|| DeviceError::Unexpected(format!("{name} vanished right after it was made")))?;
        let mut link = Link::from_message(&message);
        self.ensure_address(&link, *network, *address).await?;
        if link.mtu != *mtu || !message.header.flags.contains(LinkFlags::Up) {
            let change = LinkUnspec::new_with_index(link.index).mtu(*mtu).up().build();
            self.handle.link().change(change).execute().await.map_err(DeviceError::call("set up", name))?;
            link.mtu = *mtu;
        }
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(network.network(), network.prefix_len())
            .output_interface(link.index)
            .protocol(RouteProtocol::Other(PROTOCOL))
            .build();
        match self.handle.route().add(route).execute().await {
            // As flannel: a route that somebody else has made stays.
            Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -nix::libc::EEXIST => {
                self.check_route(&link, *network).await?;
            }
            result => result.map_err(DeviceError::call("add the route into", name))?,
        }
        Ok(link)
    }

    /// Says so where the network is routed elsewhere.
    async fn check_route(&self, link: &Link, network: Ipv4Net) -> Result<(), DeviceError> {
        if !self.routes_into(link.index).await?.iter().any(|route| super::overlay_route::place(route).0 == network) {
            warn!(
                "there is another route to {network}, which does not lead into {}: it carries only what others route",
                link.name
            );
        }
        Ok(())
    }
}

fn queues(message: &LinkMessage) -> Option<u32> {
    let infos = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    })?;
    infos.contains(&LinkInfo::Kind(InfoKind::Tun)).then_some(())?;
    let attributes = infos.iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::Tun(attributes)) => Some(attributes),
        _ => None,
    })?;
    // There is no number for a device with one queue, which ours is not.
    let number = attributes.iter().find(|attribute| attribute.kind() == NUM_QUEUES)?;
    let mut value = [0; 4];
    (number.value_len() == value.len()).then(|| number.emit_value(&mut value))?;
    Some(u32::from_ne_bytes(value))
}
