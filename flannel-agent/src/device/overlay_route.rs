//! What leads into `flannel.<VNI>`: routes, the neighbours of their next hops, and where the kernel's vxlan device sends what
//! is addressed to these.
//!
//! Each is read before it is written, so that what is as it should be stays, and nobody is told of a change. What is missing is
//! added before what is too much is removed, so that no packet finds neither. A route of somebody else's is never replaced.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::{IpAddr, Ipv4Addr},
};

use flannel_common::{
    packet::Mac,
    vxlan::{self, NEXT_HOP_MAC},
};
use futures_util::{StreamExt as _, TryStreamExt as _};
use ipnet::Ipv4Net;
use rtnetlink::{
    RouteMessageBuilder,
    packet_core::{
        NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
    },
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
        route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteProtocol, RouteType},
    },
};

use super::{DeviceError, Link, Netlink, next_hop::mtu_of};
use crate::repair::Repair;

/// What our routes say of who made them (`rtm_protocol`), so that we know them again: a number that nobody has, neither
/// linux/rtnetlink.h nor rt_protos of iproute2 and FRR.
pub const PROTOCOL: u8 = 72;
/// Of the routes that leases share: any route of somebody else's with such a prefix can be added beside, and comes first.
const SHARED_METRIC: u32 = 8472;
/// Next hops that those routes can have: the first that is no address of this host, where the kernel would refuse it
/// (`fib_check_nh_nongw`), nor in the prefix of somebody else's address on `flannel.<VNI>`, which would be the source of what is
/// masqueraded there (`nf_nat_masquerade_ipv4` asks `inet_select_addr` for the address nearest to the next hop). They are
/// nobody's; the programs replace their MAC.
pub const NEXT_HOPS: [Ipv4Addr; 5] = {
    let [a, b, c, d, e] = vxlan::NEXT_HOPS;
    [
        Ipv4Addr::from_bits(a),
        Ipv4Addr::from_bits(b),
        Ipv4Addr::from_bits(c),
        Ipv4Addr::from_bits(d),
        Ipv4Addr::from_bits(e),
    ]
};

/// What is to lead into the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OverlayRoutes {
    /// This host's address on the overlay, which it sends from.
    pub source: Ipv4Addr,
    /// Prefixes of routes that leases share.
    pub shared: Vec<Ipv4Net>,
    /// Leases that have a route of their own, and its MTU in bytes where that is less than the device's: the stack fragments or
    /// refuses what is larger (`ip_forward`).
    pub leases: BTreeMap<Ipv4Net, Option<u16>>,
}

/// How the kernel's vxlan device reaches a host: the MAC of its device, and its VTEP address.
pub type KernelPeer = (Mac, Ipv4Addr);

/// What was made for routes of others, by the overlay address that these lead to.
pub type ForeignNextHops = BTreeMap<Ipv4Addr, KernelPeer>;

/// What came of it.
#[derive(Debug, Default)]
pub struct Ensured {
    /// What there was to do.
    pub repairs: Vec<Repair>,
    /// Leases whose prefix has a route of somebody else's.
    pub taken: Vec<Ipv4Net>,
    /// Next hops of others' routes.
    pub foreign_gateways: BTreeSet<Ipv4Addr>,
}

/// A route of ours as it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Wanted {
    prefix: Ipv4Net,
    gateway: Ipv4Addr,
    source: Ipv4Addr,
    metric: Option<u32>,
    mtu: Option<u16>,
}

impl Wanted {
    /// To one lease, as flannel's hosts have it.
    fn of_lease(lease: Ipv4Net, source: Ipv4Addr) -> Self {
        Self { prefix: lease, gateway: lease.network(), source, metric: None, mtu: None }
    }

    /// To one lease, by its host on the link.
    pub(super) const fn by_host(lease: Ipv4Net, host: Ipv4Addr) -> Self {
        Self { prefix: lease, gateway: host, source: Ipv4Addr::UNSPECIFIED, metric: None, mtu: None }
    }

    pub(super) const fn prefix(self) -> Ipv4Net {
        self.prefix
    }

    pub(super) const fn gateway(self) -> Ipv4Addr {
        self.gateway
    }

    /// As [`place`].
    pub(super) const fn place(self) -> (Ipv4Net, Option<u32>) {
        (self.prefix, self.metric)
    }

    pub(super) const fn shared(prefix: Ipv4Net, gateway: Ipv4Addr, source: Ipv4Addr) -> Self {
        Self { prefix, gateway, source, metric: Some(SHARED_METRIC), mtu: None }
    }

    /// [`None`] where it is not ours.
    pub(super) fn of(route: &RouteMessage) -> Option<Self> {
        let (prefix, metric) = place(route);
        let source = route.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::PrefSource(RouteAddress::Inet(address)) => Some(*address),
            _ => None,
        });
        let (gateway, unspecified) = (gateways(route).next(), Ipv4Addr::UNSPECIFIED);
        let (gateway, source) = (gateway.unwrap_or(unspecified), source.unwrap_or(unspecified));
        let mtu = mtu_of(route).and_then(|mtu| u16::try_from(mtu).ok());
        is_ours(route).then_some(Self { prefix, gateway, source, metric, mtu })
    }

    fn message(self, link: &Link) -> RouteMessage {
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(self.prefix.network(), self.prefix.prefix_len())
            .gateway(self.gateway)
            .output_interface(link.index)
            .protocol(RouteProtocol::Other(PROTOCOL))
            .onlink();
        // The kernel's choice without.
        let route = if self.source.is_unspecified() { route } else { route.pref_source(self.source) };
        let mut route = match self.metric {
            Some(metric) => route.priority(metric).build(),
            None => route.build(),
        };
        let mtu = self.mtu.map(|mtu| RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu.into())]));
        route.attributes.extend(mtu);
        route
    }
}

/// How the kernel would reach an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Match {
    /// The prefix of the route.
    pub prefix: Ipv4Net,
    /// Whether the route is one of ours.
    pub is_ours: bool,
}

impl Netlink {
    /// Has these routes lead into the device, and no others of ours, with the neighbours of their next hops; what is addressed
    /// to these, and not encapsulated by the programs, the kernel sends back to this host's own device. For routes of others
    /// through the device there is what flannel's hosts have for each peer: the neighbour, and the forwarding entry.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn ensure_routes(
        &self,
        link: &Link,
        local: Ipv4Addr,
        routes: &OverlayRoutes,
        peer: impl Fn(Ipv4Addr) -> Option<KernelPeer>,
        foreign: &mut ForeignNextHops,
    ) -> Result<Ensured, DeviceError> {
        let mut ensured = Ensured::default();
        let there = self.routes_into(link.index).await?;
        ensured.foreign_gateways = there.iter().filter(|route| is_foreign(route)).flat_map(gateways).collect();
        let foreign_peers = ensured.foreign_gateways.iter().filter_map(|at| Some((*at, peer(*at)?)));
        let next_hops: ForeignNextHops = foreign_peers.collect();
        let gateway = self.free_next_hop(link, routes.source).await?;

        // Of a forwarding entry the family says nothing about the destination's.
        let vtep = NeighbourAttribute::Destination(NeighbourAddress::Other(local.octets().to_vec()));
        let mac = NeighbourAttribute::LinkLayerAddress(NEXT_HOP_MAC.to_vec());
        if !self.has_forwarding_entry(link, mac, &vtep).await? {
            self.set_forwarding_entry(link, NEXT_HOP_MAC, local).await?;
            ensured.repairs.push(Repair::ForwardingEntry);
        }
        let neighbours = self.permanent_neighbours(link).await?;
        // A next hop with a host's own MAC is that of others' routes alone: what goes to a lease, and what may come from there, is
        // the programs' matter (`flannel_common::admission::is_routed`).
        let via = |lease: &Ipv4Net| if next_hops.contains_key(&lease.network()) { gateway } else { lease.network() };
        let own: HashSet<Ipv4Addr> =
            routes.leases.keys().map(via).chain((!routes.shared.is_empty()).then_some(gateway)).collect();
        for address in own.iter().filter(|address| neighbours.get(address) != Some(&NEXT_HOP_MAC)) {
            self.set_neighbour(link, *address, NEXT_HOP_MAC).await?;
            // Unless it is now that nobody else's route needs it.
            if !foreign.contains_key(address) {
                ensured.repairs.push(Repair::Neighbour);
            }
        }
        for (address, (mac, vtep)) in &next_hops {
            if neighbours.get(address) != Some(mac) || foreign.get(address) != Some(&(*mac, *vtep)) {
                self.set_forwarding_entry(link, *mac, *vtep).await?;
                self.set_neighbour(link, *address, *mac).await?;
            }
        }

        let shared = routes.shared.iter().map(|prefix| Wanted::shared(*prefix, gateway, routes.source));
        let leases = routes.leases.iter().map(|(lease, mtu)| Wanted {
            gateway: via(lease),
            mtu: *mtu,
            ..Wanted::of_lease(*lease, routes.source)
        });
        let wanted: HashSet<Wanted> = shared.chain(leases).collect();
        // Beside which another is added, where only one could be.
        let former: HashSet<_> = there.iter().filter(|route| is_ours(route) || is_flannels(route)).map(place).collect();
        let ours: HashMap<Wanted, RouteMessage> =
            there.into_iter().filter_map(|route| Some((Wanted::of(&route)?, route))).collect();
        for route in wanted.iter().filter(|route| !ours.contains_key(route)) {
            match self.add_route(link, *route, former.contains(&(route.prefix, route.metric))).await? {
                true => ensured.repairs.push(Repair::Route),
                false => ensured.taken.push(route.prefix),
            }
        }
        for (_, route) in ours.into_iter().filter(|(route, _)| !wanted.contains(route)) {
            self.remove_route_of_ours(link, route).await?;
        }

        for (address, mac) in &neighbours {
            let is_made = *mac == NEXT_HOP_MAC || foreign.contains_key(address);
            if is_made && !own.contains(address) && !next_hops.contains_key(address) {
                self.remove_neighbour(link, *address).await?;
            }
        }
        let macs: HashSet<Mac> = next_hops.values().map(|(mac, _)| *mac).collect();
        for (mac, _) in foreign.values().filter(|(mac, _)| !macs.contains(mac)) {
            self.remove_forwarding_entry(link, *mac).await?;
        }
        *foreign = next_hops;
        ensured.repairs.dedup();
        Ok(ensured)
    }

    /// Adds the route to one lease, with its neighbour. `false` where somebody else has one.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn add_lease_route(
        &self,
        link: &Link,
        lease: Ipv4Net,
        source: Ipv4Addr,
        mtu: Option<u16>,
    ) -> Result<bool, DeviceError> {
        self.set_neighbour(link, lease.network(), NEXT_HOP_MAC).await?;
        self.add_route(link, Wanted { mtu, ..Wanted::of_lease(lease, source) }, false).await
    }

    /// Removes the route to one lease, with its neighbour.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn remove_lease_route(
        &self,
        link: &Link,
        lease: Ipv4Net,
        source: Ipv4Addr,
        mtu: Option<u16>,
    ) -> Result<(), DeviceError> {
        let route = Wanted { mtu, ..Wanted::of_lease(lease, source) };
        self.remove_route_of_ours(link, route.message(link)).await?;
        self.remove_neighbour(link, lease.network()).await
    }

    /// The route of the host's that a packet to an address would take; [`None`] where there is none.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn route_match(&self, address: Ipv4Addr) -> Result<Option<Match>, DeviceError> {
        let mut request = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(address, 32).build();
        request.header.flags = RouteFlags::FibMatch | RouteFlags::LookupTable;
        match self.handle.route().get(request).execute().try_next().await {
            Ok(route) => Ok(route.map(|route| {
                let len = route.header.destination_prefix_length;
                // Its own addresses are in the local table.
                let len = if route.header.kind == RouteType::Local { 32 } else { len };
                let prefix = Ipv4Net::new(address, len).unwrap_or_default().trunc();
                Match { prefix, is_ours: is_ours(&route) }
            })),
            Err(rtnetlink::Error::NetlinkError(_)) => Ok(None),
            Err(error) => Err(DeviceError::call("look up the route to", address)(error)),
        }
    }

    /// The routes of the main table that lead into a device. The kernel leaves out all others.
    pub(super) async fn routes_into(&self, ifindex: u32) -> Result<Vec<RouteMessage>, DeviceError> {
        let all = RouteMessageBuilder::<Ipv4Addr>::new()
            .protocol(RouteProtocol::Unspec)
            .kind(RouteType::Unspec)
            .output_interface(ifindex);
        self.dump("routes", || self.strict.route().get(all.build()).execute()).await
    }

    /// Adds a route, beside a former one of ours where there is such a one. `false` where somebody else has it.
    pub(super) async fn add_route(&self, link: &Link, route: Wanted, has_former: bool) -> Result<bool, DeviceError> {
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewRoute(route.message(link)));
        let how = if has_former { NLM_F_APPEND } else { NLM_F_EXCL };
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | how;
        let failed = |error| DeviceError::call("add the route to", route.prefix)(error);
        let mut answers = self.handle.clone().request(request).map_err(failed)?;
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::Error(error) if error.raw_code() == -nix::libc::EEXIST => return Ok(false),
                NetlinkPayload::Error(error) if error.raw_code() != 0 => {
                    return Err(failed(rtnetlink::Error::NetlinkError(error)));
                }
                _ => {}
            }
        }
        Ok(true)
    }

    /// One that is gone already is no failure.
    pub(super) async fn remove_route_of_ours(&self, link: &Link, route: RouteMessage) -> Result<(), DeviceError> {
        match self.handle.route().del(route).execute().await {
            Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -nix::libc::ESRCH => Ok(()),
            result => result.map_err(DeviceError::call("remove a route into", &link.name)),
        }
    }

    /// The first next hop that can be one.
    pub(super) async fn free_next_hop(&self, link: &Link, source: Ipv4Addr) -> Result<Ipv4Addr, DeviceError> {
        let addresses = self.dump("addresses", || self.handle.address().get().execute()).await?;
        let is_taken = |next_hop: &Ipv4Addr| {
            addresses.iter().any(|message| {
                let is_foreign = message.header.index == link.index && local(message) != Some(source);
                let prefix_len = message.header.prefix_len;
                local(message) == Some(*next_hop)
                    || is_foreign && prefix(message, prefix_len).is_some_and(|prefix| prefix.contains(next_hop))
            })
        };
        Ok(NEXT_HOPS.into_iter().find(|next_hop| !is_taken(next_hop)).unwrap_or(NEXT_HOPS[0]))
    }

    /// The permanent neighbours of a device.
    pub(super) async fn permanent_neighbours(&self, link: &Link) -> Result<HashMap<Ipv4Addr, Mac>, DeviceError> {
        let mut all = NeighbourMessage::default();
        all.header.family = AddressFamily::Inet;
        all.attributes.push(NeighbourAttribute::IfIndex(link.index));
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetNeighbour(all));
        request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        let failed = || DeviceError::call("list the neighbours of", &link.name);
        let mut answers = self.strict.clone().request(request).map_err(failed())?;
        let mut neighbours = HashMap::new();
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(entry))
                    if entry.header.state == NeighbourState::Permanent =>
                {
                    neighbours.extend(address_and_mac(&entry));
                }
                NetlinkPayload::Error(error) => return Err(failed()(rtnetlink::Error::NetlinkError(error))),
                _ => {}
            }
        }
        Ok(neighbours)
    }

    pub(super) async fn set_neighbour(&self, link: &Link, address: Ipv4Addr, mac: Mac) -> Result<(), DeviceError> {
        let neighbour = self.handle.neighbours().add(link.index, address.into()).link_layer_address(&mac).replace();
        neighbour.execute().await.map_err(DeviceError::call("set the neighbour of", &link.name))
    }

    pub(super) async fn remove_neighbour(&self, link: &Link, address: Ipv4Addr) -> Result<(), DeviceError> {
        let mut entry = NeighbourMessage::default();
        (entry.header.family, entry.header.ifindex) = (AddressFamily::Inet, link.index);
        entry.attributes.push(NeighbourAttribute::Destination(address.into()));
        self.remove_entry(link, entry).await
    }

    async fn set_forwarding_entry(&self, link: &Link, mac: Mac, vtep: Ipv4Addr) -> Result<(), DeviceError> {
        let forwarding = self.handle.neighbours().add_bridge(link.index, &mac);
        let forwarding = forwarding.destination(vtep.into()).flags(NeighbourFlags::Own).replace();
        forwarding.execute().await.map_err(DeviceError::call("set the forwarding entry of", &link.name))
    }

    pub(super) async fn remove_forwarding_entry(&self, link: &Link, mac: Mac) -> Result<(), DeviceError> {
        let mut entry = NeighbourMessage::default();
        (entry.header.family, entry.header.ifindex) = (AddressFamily::Bridge, link.index);
        entry.header.flags = NeighbourFlags::Own;
        entry.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        self.remove_entry(link, entry).await
    }

    /// One that is gone already is no failure.
    async fn remove_entry(&self, link: &Link, entry: NeighbourMessage) -> Result<(), DeviceError> {
        match self.handle.neighbours().del(entry).execute().await {
            Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -nix::libc::ENOENT => Ok(()),
            result => result.map_err(DeviceError::call("remove a neighbour of", &link.name)),
        }
    }

    /// Whether a device has a permanent forwarding entry with this key and value.
    async fn has_forwarding_entry(
        &self,
        link: &Link,
        key: NeighbourAttribute,
        value: &NeighbourAttribute,
    ) -> Result<bool, DeviceError> {
        let mut wanted = NeighbourMessage::default();
        (wanted.header.family, wanted.header.ifindex) = (AddressFamily::Bridge, link.index);
        // The device's own, not those of a bridge that it is a port of.
        wanted.header.flags = NeighbourFlags::Own;
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
}

/// Whether we made it.
pub(super) fn is_ours(route: &RouteMessage) -> bool {
    route.header.protocol == RouteProtocol::Other(PROTOCOL)
}

/// Whether this agent's former versions made it, which had no number of their own.
pub(super) fn is_former(route: &RouteMessage) -> bool {
    route.header.protocol == RouteProtocol::Static && gateways(route).eq([NEXT_HOPS[0]])
}

/// Whether it is what flannel makes for a lease.
pub(super) fn is_flannels(route: &RouteMessage) -> bool {
    let (prefix, metric) = place(route);
    !is_ours(route) && metric.is_none() && gateways(route).eq([prefix.network()])
}

/// Where it stands in the table: no two are added at one place, unless asked for.
pub(super) fn place(route: &RouteMessage) -> (Ipv4Net, Option<u32>) {
    let (mut destination, mut metric) = (Ipv4Addr::UNSPECIFIED, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => destination = *address,
            RouteAttribute::Priority(priority) => metric = Some(*priority),
            _ => {}
        }
    }
    (Ipv4Net::new(destination, route.header.destination_prefix_length).unwrap_or_default(), metric)
}

/// Whether it is neither ours nor like flannel's.
fn is_foreign(route: &RouteMessage) -> bool {
    !is_ours(route) && !is_former(route) && !is_flannels(route)
}

/// The next hops of a route.
pub(super) fn gateways(route: &RouteMessage) -> impl Iterator<Item = Ipv4Addr> {
    route
        .attributes
        .iter()
        .flat_map(|attribute| match attribute {
            RouteAttribute::MultiPath(next_hops) => next_hops.iter().flat_map(|hop| &hop.attributes).collect(),
            attribute => vec![attribute],
        })
        .filter_map(|attribute| match attribute {
            RouteAttribute::Gateway(RouteAddress::Inet(address)) => Some(*address),
            _ => None,
        })
}

fn address_and_mac(entry: &NeighbourMessage) -> Option<(Ipv4Addr, Mac)> {
    let (mut address, mut mac) = (None, None);
    for attribute in &entry.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(destination)) => address = Some(*destination),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = Mac::try_from(bytes.as_slice()).ok(),
            _ => {}
        }
    }
    address.zip(mac)
}

/// Whether it is a permanent neighbour or forwarding entry as the agent makes them.
pub(super) fn is_next_hop(entry: &NeighbourMessage) -> bool {
    entry.header.state == NeighbourState::Permanent
        && entry.attributes.contains(&NeighbourAttribute::LinkLayerAddress(NEXT_HOP_MAC.to_vec()))
}

/// Whether an entry is of an address that a next hop has.
pub(super) fn is_of_next_hop(entry: &NeighbourMessage) -> bool {
    entry.attributes.iter().any(|attribute| {
        matches!(attribute, NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) if NEXT_HOPS.contains(address))
    })
}

/// Whether an address is one that a next hop has.
pub(super) fn is_next_hop_address(message: &AddressMessage) -> bool {
    local(message).is_some_and(|address| NEXT_HOPS.contains(&address))
}

fn local(message: &AddressMessage) -> Option<Ipv4Addr> {
    message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(IpAddr::V4(address)) => Some(*address),
        _ => None,
    })
}

/// What its device is in (`ifa_address`: of a point-to-point address, the other end).
fn prefix(message: &AddressMessage, len: u8) -> Option<Ipv4Net> {
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(IpAddr::V4(address)) => Some(*address),
        _ => None,
    });
    Ipv4Net::new(address.or_else(|| local(message))?, len).ok()
}
