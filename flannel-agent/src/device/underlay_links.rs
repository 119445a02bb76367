//! Which of the host's links tunnel packets can come in by: whichever the network sends them to, not only the one that has the
//! VTEP's address or that packets to a peer leave by.
//!
//! | link | is one |
//! |---|---|
//! | the external interface; one by which a peer is reached, or was | yes |
//! | a NIC, bond or team, a device stacked on one (VLAN, macvlan, MACsec) | yes |
//! | veth, tun, WireGuard, other tunnels, an internal port of Open vSwitch, a virtual function's representor | with an address of a prefix that has room for others |
//! | bridge | with such an address, and a port of the second row |
//! | port of a bridge or bond; device of another VRF than the VTEP's | no: their packets come in by that one, or not to the VTEP |
//! | a pod's veth, `flannel.<VNI>`, loopback and what receives nothing | no |
//!
//! So bridges of containers and virtual machines, and veths that a container is routed to by an address of its own, are none:
//! what comes from there is a tenant's, and no VTEP is behind it.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::Ipv4Addr,
};

use ipnet::Ipv4Net;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage};

use super::{Link, PodLink, addresses::HostAddresses};

/// What tells these links from others.
#[derive(Clone, Copy, Debug)]
pub struct UnderlayCriteria<'a> {
    /// The link that has the VTEP's address.
    pub external: u32,
    /// `flannel.<VNI>`; 0 before it is made.
    pub overlay: u32,
    /// The overlay's.
    pub network: Ipv4Net,
    /// Links by which peers are reached, or were.
    pub used: &'a BTreeSet<u32>,
}

/// What a link of a kind has to have besides.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Needs {
    Nothing,
    /// An address of a prefix with room for others.
    Address,
    /// The same, and a port that leads out of the host.
    AddressAndPort,
    /// It receives nothing.
    Never,
}

struct Candidate<'a> {
    index: u32,
    /// The bridge, bond or VRF that it belongs to.
    controller: Option<u32>,
    kind: Option<&'a InfoKind>,
    needs: Needs,
}

impl<'a> Candidate<'a> {
    fn of(message: &'a LinkMessage) -> Self {
        let (mut controller, mut kind, mut is_representor) = (None, None, false);
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::Controller(index) => controller = Some(*index),
                // `pf0vf1`: the switch's port to a virtual machine.
                LinkAttribute::PhysPortName(name) => is_representor = name.contains("vf"),
                LinkAttribute::LinkInfo(infos) => {
                    kind = infos.iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        let needs = match message.header.link_layer_type {
            LinkLayerType::Loopback => Needs::Never,
            _ if is_representor => Needs::Address,
            _ => needs(kind),
        };
        Self { index: message.header.index, controller, kind, needs }
    }

    fn is_vrf(&self) -> bool {
        self.kind == Some(&InfoKind::Vrf)
    }
}

fn needs(kind: Option<&InfoKind>) -> Needs {
    use InfoKind as Kind;
    match kind {
        Some(Kind::Dummy | Kind::Ifb | Kind::Nlmon | Kind::Vrf | Kind::Can | Kind::Vcan | Kind::Vxcan) => Needs::Never,
        Some(Kind::Bridge) => Needs::AddressAndPort,
        Some(
            Kind::Tun
            | Kind::Veth
            | Kind::Netkit
            | Kind::Vxlan
            | Kind::Geneve
            | Kind::BareUdp
            | Kind::Amt
            | Kind::Gtp
            | Kind::Pfcp
            | Kind::GreTap
            | Kind::GreTap6
            | Kind::ErSpan
            | Kind::Ip6ErSpan
            | Kind::IpIp
            | Kind::Ip6Tnl
            | Kind::SitTun
            | Kind::GreTun
            | Kind::GreTun6
            | Kind::Vti
            | Kind::Vti6
            | Kind::Xfrm
            | Kind::Wireguard,
        ) => Needs::Address,
        // Ports of Open vSwitch by which the host takes part in it.
        Some(Kind::Other(kind)) if kind == "openvswitch" => Needs::Address,
        // Drivers' devices have no kind; whatever comes later is the host's own.
        _ => Needs::Nothing,
    }
}

/// The links that tunnel packets can come in by.
pub(super) fn underlay_links(
    links: &[LinkMessage],
    addresses: &HostAddresses,
    pods: &[PodLink],
    underlay: UnderlayCriteria<'_>,
) -> Vec<Link> {
    let candidates: HashMap<u32, Candidate<'_>> =
        links.iter().map(|link| (link.header.index, Candidate::of(link))).collect();
    let excluded: HashSet<u32> = pods.iter().map(|pod| pod.index).chain([underlay.overlay]).collect();
    let is_outside = |address: Ipv4Addr| !address.is_link_local() && !underlay.network.contains(&address);
    let addressed = addresses.links_with_neighbours(is_outside);
    let leads_out: HashSet<u32> = candidates
        .values()
        .filter(|port| port.needs == Needs::Nothing && !excluded.contains(&port.index))
        .filter_map(|port| port.controller)
        .collect();
    let vrf_of = |candidate: &Candidate<'_>| match candidate.controller {
        _ if candidate.is_vrf() => Some(candidate.index),
        Some(controller) => candidates.get(&controller).filter(|of| of.is_vrf()).map(|of| of.index),
        None => None,
    };
    let vteps_vrf = candidates.get(&underlay.external).and_then(vrf_of);
    let is_one = |link: &&LinkMessage| {
        let Some(candidate) = candidates.get(&link.header.index) else { return false };
        let index = candidate.index;
        if index == underlay.external {
            return true;
        }
        if excluded.contains(&index) || candidate.needs == Needs::Never {
            return false;
        }
        let vrf = vrf_of(candidate);
        if candidate.controller.is_some() && vrf.is_none() {
            return false;
        }
        if underlay.used.contains(&index) {
            return true;
        }
        let is_enough = match candidate.needs {
            Needs::Nothing => true,
            Needs::Address => addressed.contains(&index),
            Needs::AddressAndPort => addressed.contains(&index) && leads_out.contains(&index),
            Needs::Never => false,
        };
        is_enough && vrf == vteps_vrf
    };
    links.iter().filter(is_one).map(Link::from_message).collect()
}

#[cfg(test)]
mod tests {
    use super::{super::addresses::tests::host, *};

    const NIC: Option<InfoKind> = None;

    fn link(index: u32, kind: Option<InfoKind>, controller: Option<u32>) -> LinkMessage {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.link_layer_type = LinkLayerType::Ether;
        link.attributes.extend(controller.map(LinkAttribute::Controller));
        link.attributes.extend(kind.map(|kind| LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)])));
        link
    }

    fn found(links: &[LinkMessage], addresses: &[(u32, &str)], external: u32, used: &[u32]) -> Vec<u32> {
        let pods = [PodLink { name: "veth0".to_owned(), index: 90, bridge: None }];
        let network = "10.5.0.0/16".parse().expect("a network");
        let used = used.iter().copied().collect();
        let underlay = UnderlayCriteria { external, overlay: 99, network, used: &used };
        underlay_links(links, &host(addresses, &[]), &pods, underlay).into_iter().map(|link| link.index).collect()
    }

    #[test]
    fn tenants_devices_and_pods_are_none() {
        use InfoKind::{Bridge, Tun, Veth, Vxlan};
        let links = [
            link(2, NIC, None),
            link(90, Some(Veth), None),
            link(99, Some(Vxlan), None),
            // Docker's.
            link(10, Some(Bridge), None),
            link(11, Some(Veth), Some(10)),
            // libvirt's.
            link(12, Some(Bridge), None),
            link(13, Some(Tun), Some(12)),
            // A container's that is routed to, and one of the CNI plugin ptp.
            link(14, Some(Veth), None),
            link(15, Some(Veth), None),
            // One with an address of the overlay.
            link(16, Some(Veth), None),
        ];
        let addresses = [
            (2, "192.168.64.1/24"),
            (10, "172.17.0.1/16"),
            (12, "192.168.122.1/24"),
            (14, "169.254.1.1/16"),
            (15, "10.22.0.1/32"),
            (16, "10.5.7.1/24"),
        ];
        assert_eq!(found(&links, &addresses, 2, &[]), [2]);
        // A route of the operator's leads to a peer behind one of them, but never behind a pod.
        assert_eq!(found(&links, &addresses, 2, &[10, 15, 90, 99]), [2, 10, 15]);
    }

    #[test]
    fn what_leads_out_of_the_host_is_one() {
        use InfoKind::{Bond, Bridge, MacVlan, Tun, Veth, Vlan, Wireguard};
        let mut loopback = link(1, None, None);
        loopback.header.link_layer_type = LinkLayerType::Loopback;
        let links = [
            loopback,
            link(2, NIC, None),
            link(3, NIC, None),
            link(4, NIC, Some(5)),
            link(5, Some(Bond), None),
            link(6, Some(Vlan), None),
            link(7, Some(MacVlan), None),
            link(8, NIC, Some(9)),
            link(9, Some(Bridge), None),
            link(10, Some(Wireguard), None),
            link(11, Some(Tun), None),
            link(12, Some(Veth), None),
            link(13, Some(InfoKind::Dummy), None),
        ];
        let addresses = [(9, "192.168.64.1/24"), (10, "10.99.0.1/24"), (12, "192.168.65.1/24")];
        assert_eq!(found(&links, &addresses, 2, &[]), [2, 3, 5, 6, 7, 9, 10, 12]);
        // The VTEP's address on loopback or a dummy device: those are told by what they are, all others are found the same.
        assert_eq!(found(&links, &addresses, 1, &[11, 13]), [1, 2, 3, 5, 6, 7, 9, 10, 11, 12]);
    }

    #[test]
    fn a_vrf_is_a_world_of_its_own() {
        let vrf = |index| link(index, Some(InfoKind::Vrf), None);
        let links = [
            vrf(20),
            link(2, NIC, Some(20)),
            link(3, NIC, Some(20)),
            vrf(21),
            link(4, NIC, Some(21)),
            link(5, NIC, None),
        ];
        assert_eq!(found(&links, &[], 2, &[]), [2, 3]);
        assert_eq!(found(&links, &[], 20, &[]), [20, 2, 3]);
        assert_eq!(found(&links, &[], 5, &[]), [5]);
        // A route leaks into it.
        assert_eq!(found(&links, &[], 5, &[4]), [4, 5]);
    }
}
