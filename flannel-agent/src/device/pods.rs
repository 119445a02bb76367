//! Where pods are: the host's sides of their veths, whoever made them.

use std::collections::{BTreeMap, HashMap, HashSet};

use flannel_common::packet::Mac;
use ipnet::Ipv4Net;
use rtnetlink::packet_route::{
    AddressFamily,
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
    neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState},
};

use super::{DeviceError, Link, Netlink, addresses::HostAddresses};

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

/// What the kernel has of pods and of what is around them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodNetwork {
    /// The veths whose other side is in another namespace, and which are ports of a bridge that has an address in the subnet, or
    /// which part of the subnet is routed to.
    pub pods: Vec<PodLink>,
    /// Their names and MTUs, in bytes.
    pub mtus: Vec<(String, u32)>,
    /// Bridges of veths whose other side is in another namespace, which have addresses in the overlay's Network and none in the
    /// subnet: with the first of these.
    pub bridges_elsewhere: Vec<(String, Ipv4Net)>,
}

impl Netlink {
    /// The pods of a subnet with what is around them. `routed` are the devices that part of the subnet is routed to.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn pod_network(
        &self,
        network: Ipv4Net,
        subnet: Ipv4Net,
        routed: &HashSet<u32>,
    ) -> Result<PodNetwork, DeviceError> {
        let links = self.dump("links", || self.handle.link().get().execute()).await?;
        let addresses = self.addresses().await?;
        let pods = pods_among(&links, &addresses, subnet, routed);
        let named: HashMap<_, _> =
            links.iter().map(|message| (message.header.index, Link::from_message(message))).collect();
        let mtus = pods.iter().filter_map(|pod| Some((pod.name.clone(), named.get(&pod.index)?.mtu))).collect();
        let bridges_elsewhere = bridges_elsewhere(&links, &addresses, network, subnet);
        let bridges_elsewhere =
            bridges_elsewhere.into_iter().filter_map(|(bridge, has)| Some((named.get(&bridge)?.name.clone(), has)));
        Ok(PodNetwork { pods, mtus, bridges_elsewhere: bridges_elsewhere.collect() })
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

fn bridges_elsewhere(
    links: &[LinkMessage],
    addresses: &HostAddresses,
    network: Ipv4Net,
    subnet: Ipv4Net,
) -> BTreeMap<u32, Ipv4Net> {
    let bridges: HashSet<u32> = links.iter().filter_map(|link| Veth::of(link)?.bridge).collect();
    let mut elsewhere = BTreeMap::new();
    for (bridge, address) in addresses.iter_with_len().filter(|(link, _)| bridges.contains(link)) {
        if network.contains(&address.addr()) {
            elsewhere.entry(bridge).or_insert(address);
        }
    }
    // One that has the subnet's too is the pods', whatever else it has.
    for (bridge, _) in addresses.iter().filter(|(_, address)| subnet.contains(address)) {
        elsewhere.remove(&bridge);
    }
    elsewhere
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

#[cfg(test)]
mod tests {
    use rtnetlink::LinkVeth;

    use super::{super::addresses::tests::host, *};

    fn veth(index: u32, bridge: u32) -> LinkMessage {
        let mut message = LinkVeth::new(&format!("veth{index}"), "eth0").build();
        message.header.index = index;
        message.attributes.extend([LinkAttribute::Controller(bridge), LinkAttribute::LinkNetNsId(0)]);
        message
    }

    #[test]
    fn a_bridge_of_the_network_without_an_address_of_the_lease_is_elsewhere() {
        let (network, subnet) = ("10.5.0.0/16".parse().unwrap(), "10.5.1.0/24".parse().unwrap());
        // Pods at all bridges but the last.
        let links: Vec<_> = (2..7).map(|bridge| veth(bridge + 10, bridge)).collect();
        let addresses = host(
            &[
                (2, "10.5.1.1/24"),
                (3, "10.5.9.1/24"),
                (4, "172.17.0.1/16"),
                (5, "10.5.9.1/24"),
                (5, "10.5.1.1/24"),
                (7, "10.5.8.1/24"),
            ],
            &[],
        );
        let found = bridges_elsewhere(&links, &addresses, network, subnet);
        assert_eq!(found, BTreeMap::from([(3, "10.5.9.1/24".parse().unwrap())]));
    }
}
