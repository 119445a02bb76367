//! `flannel<number>`, the TUN device of the backend udp, its address, and the route into it (flannel:
//! pkg/backend/udp/udp_network_amd64.go).

use std::net::Ipv4Addr;

use flannel_common::vxlan::Vni;
use ipnet::Ipv4Net;
use rtnetlink::{
    LinkUnspec, RouteMessageBuilder,
    packet_core::Nla as _,
    packet_route::{
        link::{InfoData, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
        route::RouteProtocol,
    },
};
use tracing::{info, warn};

use super::{
    DeviceError, Link, Netlink,
    overlay_route::{PROTOCOL, is_ours, place},
};
use crate::repair::Repair;

/// `IFLA_TUN_NUM_QUEUES` (linux/if_link.h).
const NUM_QUEUES: u16 = 8;
/// Of the alias (`ip link show`) by which the next agent knows the device again, before the VNI: its name is the first that was
/// free.
const ALIAS: &str = "flannel-agent ";

/// What the device is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunDevice {
    /// `flannel<number>`.
    pub name: String,
    /// The number that this host knows the overlay by.
    pub vni: Vni,
    /// This host's address on the overlay.
    pub address: Ipv4Addr,
    /// What is routed into it.
    pub network: Ipv4Net,
    /// In bytes.
    pub mtu: u32,
}

/// The device as it is then.
#[derive(Clone, Debug)]
pub struct EnsuredTun {
    /// The device.
    pub link: Link,
    /// What there was to do.
    pub repairs: Vec<Repair>,
    /// Whether the network is routed into it. Where it is not, a route of somebody else's leads it elsewhere.
    pub is_routed: bool,
}

/// Whether a link has such a name.
pub(super) fn is_name(name: &str) -> bool {
    let number = name.strip_prefix("flannel");
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
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

    /// The TUN devices of agents, with the numbers that this host knows their overlays by.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn tuns(&self) -> Result<Vec<(Vni, Link)>, DeviceError> {
        let links = self.dump("links", || self.handle.link().get().execute()).await?;
        let own = |message: &LinkMessage| Some((vni_of(message)?, Link::from_message(message)));
        Ok(links.iter().filter_map(own).collect())
    }

    /// The TUN device of an overlay, if there is one.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn tun_of(&self, vni: Vni) -> Result<Option<Link>, DeviceError> {
        Ok(self.tuns().await?.into_iter().find_map(|(of, link)| (of == vni).then_some(link)))
    }

    /// Removes the TUN device of an overlay, with its address and route. One that somebody carries the packets of stays, and is
    /// named.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn remove_tun(&self, vni: Vni) -> Result<(), DeviceError> {
        for (_, link) in self.tuns().await?.into_iter().filter(|(of, _)| *of == vni) {
            match self.tun_queues(&link.name).await? {
                Some(Some(0)) => {
                    self.delete_link(&link.name, link.index).await?;
                    info!("removed {}", link.name);
                }
                Some(_) => warn!("{} stays: another program carries its packets", link.name),
                None => {}
            }
        }
        Ok(())
    }

    /// Gives the device its address and MTU, has it up, and the network routed into it, and nothing else.
    ///
    /// # Errors
    /// [`DeviceError`] with the request that failed.
    pub async fn ensure_tun(&self, device: &TunDevice) -> Result<EnsuredTun, DeviceError> {
        let TunDevice { name, vni, address, network, mtu } = device;
        let message = self.link_by_name(name).await?;
        let message =
            message.ok_or_else(|| DeviceError::Unexpected(format!("{name} vanished right after it was made")))?;
        let mut link = Link::from_message(&message);
        let mut repairs = Vec::new();
        let is_up = message.header.flags.contains(LinkFlags::Up);
        if link.mtu != *mtu || !is_up || vni_of(&message) != Some(*vni) {
            let alias = LinkAttribute::IfAlias(format!("{ALIAS}{vni}"));
            let change = LinkUnspec::new_with_index(link.index).mtu(*mtu).append_extra_attribute(alias).up().build();
            self.handle.link().change(change).execute().await.map_err(DeviceError::call("set up", name))?;
            link.mtu = *mtu;
            repairs.push(Repair::DeviceSettings);
        }
        // After it is up: the kernel takes no routes into one that is down.
        if self.ensure_address(&link, *network, *address).await? {
            repairs.push(Repair::DeviceAddress);
        }
        let there = self.routes_into(link.index).await?;
        let mut is_routed = there.iter().any(|route| place(route) == (*network, None));
        if !is_routed {
            let route = RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(network.network(), network.prefix_len())
                .output_interface(link.index)
                .protocol(RouteProtocol::Other(PROTOCOL))
                .build();
            match self.handle.route().add(route).execute().await {
                // As flannel: a route that somebody else has made stays.
                Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -nix::libc::EEXIST => {}
                result => {
                    result.map_err(DeviceError::call("add the route into", name))?;
                    is_routed = true;
                    repairs.push(Repair::Route);
                }
            }
        }
        for route in there.into_iter().filter(|route| is_ours(route) && place(route).0 != *network) {
            self.remove_route_of_ours(&link, route).await?;
        }
        Ok(EnsuredTun { link, repairs, is_routed })
    }
}

/// Whose device it is; [`None`] where it is no agent's.
fn vni_of(message: &LinkMessage) -> Option<Vni> {
    let alias = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfAlias(alias) => alias.strip_prefix(ALIAS),
        _ => None,
    })?;
    queues(message)?;
    Vni::new_checked(alias.parse().ok()?).ok()
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
