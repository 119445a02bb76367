//! What a trace needs to know of this host: the overlay's constants and tables, links, neighbours and pods.

use std::{
    collections::{BTreeMap, HashMap},
    net::Ipv4Addr,
};

use flannel_common::{
    maps::Config,
    packet::Mac,
    vxlan::{NEXT_HOP_MAC, NEXT_HOPS, Vni},
};
use ipnet::Ipv4Net;
use nix::{ifaddrs::getifaddrs, net::if_::if_nametoindex};

use super::{Options, TraceError};
use crate::{
    backend::has_datapath,
    cli::Cli,
    dataplane::{
        Hook, PinDirectory, pinned_vnis,
        replica::{Attached, Concerned, Program, Ran, Replica, pinned_places},
        tables::Tables,
    },
    device::{Link, Netlink, PodLink, next_hop::NextHop, vxlan::VxlanDevice},
    operator::named,
    status::Status,
};

/// This host, as one of its overlays has it.
pub(super) struct Host {
    pub(super) vni: Vni,
    pub(super) tables: Tables,
    /// Of the program that the stack's packets to the overlay meet.
    pub(super) config: Config,
    /// Where that program is.
    pub(super) overlay: Link,
    pub(super) netlink: Netlink,
    pins: PinDirectory,
    links: HashMap<u32, Link>,
    neighbours: HashMap<NextHop, Mac>,
    /// The host's own, with the interfaces that have them.
    addresses: BTreeMap<Ipv4Addr, String>,
    pods: Vec<PodLink>,
    /// By ports of bridges.
    macs_behind: HashMap<u32, Mac>,
    /// Where tunnel packets come in, should no link be pinned.
    external: Option<String>,
}

/// A pod of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pod {
    /// The host's side of its veth.
    pub(super) veth: Link,
    pub(super) mac: Mac,
    /// The MAC that its packets are for, and come from.
    pub(super) gateway_mac: Mac,
    /// The device that its packets enter the stack by.
    pub(super) input: u32,
}

impl Host {
    /// The host in the overlay that these ends are in, or in the only one.
    pub(super) async fn read(cli: &Cli, options: &Options) -> Result<Self, TraceError> {
        let statuses = Status::read_all(&cli.run_dir).unwrap_or_default();
        let pinned = pinned_vnis(&cli.bpf_pin_dir);
        let is_asked_for = |vni: &Vni| options.vni.is_none_or(|asked| asked == vni.get());
        let vnis: Vec<_> = pinned.into_iter().filter(is_asked_for).collect();
        if vnis.is_empty() {
            let without =
                statuses.into_iter().find(|(vni, status)| is_asked_for(vni) && !has_datapath(status.backend_type()));
            return Err(match without {
                Some((vni, status)) => TraceError::NoPrograms { vni, backend: status.backend_type().label() },
                None => TraceError::NoDataplane { directory: cli.bpf_pin_dir.clone(), vni: options.vni },
            });
        }
        let netlink = Netlink::open()?.0;
        let mut found = Vec::new();
        for vni in vnis {
            let external = statuses.iter().find(|(of, _)| *of == vni).map(|(_, status)| &status.external_interface);
            found.push(Self::of(cli, vni, external.cloned(), netlink.clone()).await?);
        }
        let ends = [&options.source, &options.destination].map(|end| end.parse::<Ipv4Addr>().ok());
        let is_within = |host: &Self| {
            let within = |address: Ipv4Addr| host.config.slot(address.to_bits()).is_some();
            ends.iter().flatten().any(|address| within(*address))
        };
        let place = found.iter().position(is_within).unwrap_or(0);
        let mut host = found.swap_remove(place);
        host.read_pods().await?;
        Ok(host)
    }

    async fn of(cli: &Cli, vni: Vni, external: Option<String>, netlink: Netlink) -> Result<Self, TraceError> {
        let pins = PinDirectory::new(&cli.bpf_pin_dir, vni);
        let tables = Tables::open(&pins)?;
        let links: HashMap<_, _> = netlink.links().await?.into_iter().map(|link| (link.index, link)).collect();
        let to_underlay = pinned_places(&pins, Program::Tc(Hook::ToUnderlay))?;
        let device = VxlanDevice::name_of(vni);
        let (hook, overlay) = match (if_nametoindex(device.as_str()), to_underlay.first()) {
            (Ok(index), None) => (Hook::ToOverlay, links.get(&index)),
            (_, Some(index)) => (Hook::ToUnderlay, links.get(index)),
            (Err(_), None) => {
                (Hook::ToUnderlay, external.as_ref().and_then(|name| links.values().find(|link| link.name == *name)))
            }
        };
        let overlay = overlay.cloned().ok_or(TraceError::NoDevice(device))?;
        let attached =
            Attached::find(&pins, &tables, Program::Tc(hook), &overlay.name, overlay.index, &netlink).await?;
        let neighbours = netlink.neighbour_macs().await?;
        let addresses = getifaddrs()
            .map_err(TraceError::Addresses)?
            .filter_map(|interface| Some((interface.address?.as_sockaddr_in()?.ip(), interface.interface_name)));
        Ok(Self {
            vni,
            tables,
            config: attached.config,
            overlay,
            addresses: addresses.collect(),
            netlink,
            pins,
            links,
            neighbours,
            pods: Vec::new(),
            macs_behind: HashMap::new(),
            external,
        })
    }

    async fn read_pods(&mut self) -> Result<(), TraceError> {
        let subnet = self.subnet();
        let within = self.netlink.devices_within(subnet).await?;
        self.pods = self.netlink.pod_network(subnet, subnet, &within).await?.pods;
        self.macs_behind = self.netlink.macs_behind().await?;
        Ok(())
    }

    /// This host's lease.
    pub(super) fn subnet(&self) -> Ipv4Net {
        let len = self.config.subnet_mask.leading_ones() as u8;
        Ipv4Net::new(Ipv4Addr::from_bits(self.config.subnet), len).unwrap_or_default()
    }

    /// The interface that has an address of the host's.
    pub(super) fn interface_of(&self, address: Ipv4Addr) -> Option<&str> {
        self.addresses.get(&address).map(String::as_str)
    }

    /// An end of the packet's way: an address, or that of an interface, or of the pod at a veth.
    pub(super) fn resolve(&self, end: &str) -> Result<Ipv4Addr, TraceError> {
        if let Ok(address) = end.parse() {
            return Ok(address);
        }
        if let Some(pod) = self.pods.iter().find(|pod| pod.name == end) {
            let of_pod = self.neighbours.iter().filter(|(neighbour, mac)| {
                let is_behind = neighbour.ifindex == pod.index || pod.bridge == Some(neighbour.ifindex);
                is_behind && self.subnet().contains(&neighbour.address) && self.is_of_pod(pod, **mac)
            });
            let first = of_pod.map(|(neighbour, _)| neighbour.address).min();
            return first.ok_or_else(|| TraceError::UnknownVeth(end.to_owned()));
        }
        let own = self.addresses.iter().find(|(_, interface)| *interface == end);
        own.map(|(address, _)| *address).ok_or_else(|| TraceError::NoSuchEnd(end.to_owned()))
    }

    /// The pod with an address.
    pub(super) fn pod(&self, address: Ipv4Addr) -> Result<Pod, TraceError> {
        let entries = self.neighbours.iter().filter(|(neighbour, _)| neighbour.address == address);
        for (neighbour, mac) in entries {
            let is_its = |pod: &&PodLink| {
                pod.index == neighbour.ifindex || pod.bridge == Some(neighbour.ifindex) && self.is_of_pod(pod, *mac)
            };
            let Some(pod) = self.pods.iter().find(is_its) else { continue };
            let veth = self.links.get(&pod.index).cloned().ok_or_else(|| TraceError::Gone(pod.name.clone()))?;
            let input = pod.bridge.unwrap_or(pod.index);
            let gateway_mac = self.links.get(&input).and_then(|link| link.mac).unwrap_or_default();
            return Ok(Pod { veth, mac: *mac, gateway_mac, input });
        }
        let veths: Vec<_> = self.pods.iter().map(|pod| pod.name.as_str()).collect();
        let veths = if veths.is_empty() { "there are none".to_owned() } else { format!("they are {}", named(&veths)) };
        Err(TraceError::UnknownPod { address, subnet: self.subnet(), veths })
    }

    /// Whether the pod at a veth sends from a MAC.
    fn is_of_pod(&self, pod: &PodLink, mac: Mac) -> bool {
        let noted = self.tables.pod(pod.index).ok().flatten();
        noted == Some(mac) || self.macs_behind.get(&pod.index) == Some(&mac)
    }

    /// A link by its number.
    pub(super) fn link(&self, ifindex: u32) -> Result<&Link, TraceError> {
        self.links.get(&ifindex).ok_or_else(|| TraceError::Gone(format!("no. {ifindex}")))
    }

    /// The MAC that the stack sends to for a next hop; zero where it does not know it.
    pub(super) fn mac_of(&self, next_hop: Option<NextHop>) -> Mac {
        let Some(next_hop) = next_hop else { return Mac::default() };
        if NEXT_HOPS.contains(&next_hop.address.to_bits()) {
            return NEXT_HOP_MAC;
        }
        self.neighbours.get(&next_hop).copied().unwrap_or_default()
    }

    /// Where packets of a peer come in that is reached by a device, or of anybody.
    pub(super) fn input_from(&self, device: u32) -> Result<&Link, TraceError> {
        let pinned = pinned_places(&self.pins, Program::Tc(Hook::FromUnderlay))?;
        let there: Vec<_> = pinned.iter().filter_map(|place| self.links.get(place)).collect();
        let of_peer = there.iter().find(|link| link.index == device);
        let external = || {
            let name = self.external.as_ref()?;
            self.links.values().find(|link| link.name == *name)
        };
        let link = of_peer.or(there.first()).copied().or_else(external);
        link.ok_or_else(|| TraceError::NoDevice("the external interface".to_owned()))
    }

    /// Whether a program's link is pinned there.
    pub(super) fn is_pinned(&self, program: Program, ifindex: u32) -> Result<bool, TraceError> {
        Ok(pinned_places(&self.pins, program)?.contains(&ifindex))
    }

    /// Runs a program's replica on a packet.
    pub(super) async fn run(
        &self,
        program: Program,
        link: &Link,
        frame: &[u8],
        note: u16,
        concerned: &Concerned,
    ) -> Result<(Attached, Ran), TraceError> {
        let Self { pins, tables, netlink, .. } = self;
        let attached = Attached::find(pins, tables, program, &link.name, link.index, netlink).await?;
        let mut replica = Replica::load(pins, tables, attached.clone())?;
        Ok((attached, replica.run(tables, frame, note, concerned)?))
    }
}
