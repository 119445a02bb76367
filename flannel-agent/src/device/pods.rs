//! Where pods are: the host's sides of their veths, whoever made them.

use std::collections::{HashMap, HashSet};

use flannel_common::packet::Mac;
use ipnet::Ipv4Net;
use rtnetlink::packet_route::{
    AddressFamily,
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
    neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState},
};

use super::{DeviceError, Netlink, addresses::HostAddresses};

/// The host's side of a pod's veth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodLink {
    /// Its name.
    pub name: String,
    /// Its number.
    pub index: u32,
    /// The bridge that it is a port of.
    pub bridge: Option<u32>,
}

impl Netlink {
    /// The veths whose other side is in another namespace, and which are ports of a bridge that has an address in the
    /// subnet, or which are among the devices that part of the subnet is routed to.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn pods(&self, subnet: Ipv4Net, routed: &HashSet<u32>) -> Result<Vec<PodLink>, DeviceError> {
        let links = self.dump("links", || self.handle.link().get().execute()).await?;
        Ok(pods_among(&links, &self.addresses().await?, subnet, routed))
    }

    /// The MAC that is known to be behind each device: by the bridge that it is a port of, or as a neighbour there.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn macs_behind(&self) -> Result<HashMap<u32, Mac>, DeviceError> {
        let mut macs = HashMap::new();
        for family in [AddressFamily::Inet, AddressFamily::Bridge] {
            let ask = || self.handle.neighbours().get().set_address_family(family).execute();
            let entries = self.dump("neighbours", ask).await?;
            macs.extend(entries.iter().filter_map(mac_behind));
        }
        Ok(macs)
    }
}

pub(super) fn pods_among(
    links: &[LinkMessage],
    addresses: &HostAddresses,
    subnet: Ipv4Net,
    routed: &HashSet<u32>,
) -> Vec<PodLink> {
    let gateways: HashSet<u32> =
        addresses.iter().filter(|(_, address)| subnet.contains(address)).map(|(ifindex, _)| ifindex).collect();
    let is_pods =
        |veth: &Veth| veth.bridge.is_some_and(|bridge| gateways.contains(&bridge)) || routed.contains(&veth.index);
    let pod = |Veth { name, index, bridge }| PodLink { name, index, bridge };
    links.iter().filter_map(Veth::of).filter(is_pods).map(pod).collect()
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

/// The device and the MAC of an entry. Permanent ones are the port's own.
fn mac_behind(entry: &NeighbourMessage) -> Option<(u32, Mac)> {
    let mac = entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(mac) => Mac::try_from(mac.as_slice()).ok(),
        _ => None,
    })?;
    (entry.header.state != NeighbourState::Permanent).then_some((entry.header.ifindex, mac))
}
