//! The host's own routes, as far as they matter here: read in one pass, of which nothing else is kept, however many there are;
//! and heard of when they change.
//!
//! The kernel has no filter by prefix, so a pass reads all (300,000 in 60 ms). It is made at the start, when a change is heard
//! of that may matter, and once a minute; what can't matter is left out right where it is heard.

use std::{
    collections::HashSet,
    io,
    net::Ipv4Addr,
    sync::{PoisonError, RwLock},
};

use ipnet::Ipv4Net;
use rtnetlink::{
    RouteMessageBuilder,
    packet_core::Emitable as _,
    packet_route::route::{RouteProtocol, RouteScope, RouteType},
    sys::{Socket, protocols::NETLINK_ROUTE},
};
use tokio::task::spawn_blocking;

use super::{
    Changed, DeviceError, DeviceEvent, Link, Netlink,
    overlay_route::{NEXT_HOPS, PROTOCOL},
    raw::dump,
    raw_route::{DELETED_ROUTE, GET_ROUTE, NEW_ROUTE, RawRoute},
    tun,
    vxlan::VxlanDevice,
};

/// Of routes that somebody else has within the shared ones, no more are looked at: that is a mistake, and a few show it.
const MOST_WITHIN: usize = 64;

/// What the agent has to do with routes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interest {
    /// Number of the device that the agent's routes lead to; 0 before it is made.
    pub overlay: u32,
    /// Whether others' routes lead there as well.
    pub is_shared: bool,
    /// The prefixes of the routes that all leases share.
    pub prefixes: Vec<Ipv4Net>,
    /// This host's subnet.
    pub subnet: Ipv4Net,
    /// Addresses that this host sends to, in order.
    pub addresses: Vec<Ipv4Addr>,
}

impl Interest {
    /// What a change of a route can mean.
    fn event(&self, is_new: bool, route: &RawRoute<'_>) -> Option<DeviceEvent> {
        let prefix = route.prefix()?;
        let is_into_overlay = self.overlay != 0
            && route.outputs().any(|index| index == self.overlay)
            && (!self.is_shared || self.prefixes.iter().any(|shared| shared.contains(&prefix)));
        // What the agent itself has just added is as it should be.
        if is_into_overlay && is_new && route.protocol() == PROTOCOL {
            return None;
        }
        // Another table's, as VPNs have, can only be the way to an address.
        let is_default = prefix.prefix_len() == 0 && route.is_of_main_table();
        let is_beside = self.prefixes.contains(&prefix) && route.is_of_main_table();
        let is_looked_at = is_default || is_beside || self.subnet.contains(&prefix);
        let is_way = self.has_address_in(prefix);
        let is_scan_due = is_looked_at || is_way && route.has_several();
        let kind = match (is_into_overlay || is_looked_at, is_way) {
            // The external interface may be another.
            _ if is_default => Changed::Topology,
            (true, _) => Changed::Route,
            (false, true) => Changed::Way,
            (false, false) => return None,
        };
        Some(DeviceEvent { kind, ifindex: None, prefix: Some(prefix), is_scan_due })
    }

    fn has_address_in(&self, prefix: Ipv4Net) -> bool {
        let next = self.addresses.partition_point(|address| *address < prefix.network());
        self.addresses.get(next).is_some_and(|address| *address <= prefix.broadcast())
    }
}

/// A default route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DefaultRoute {
    /// Its link; of several, the first.
    pub(super) link: u32,
    pub(super) gateway: Option<Ipv4Addr>,
    /// What the host sends from by it, where it says so (`src`).
    pub(super) source: Option<Ipv4Addr>,
}

/// What there is of these.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostRoutes {
    /// Somebody else's route with a prefix of the shared ones, and where it leads, in words.
    pub foreign: Option<(Ipv4Net, String)>,
    /// Routes of somebody else's within the shared ones, this host's own subnet aside. The first of them, where there are many.
    pub within: Vec<Ipv4Net>,
    /// Gateways of default routes.
    pub gateways: Vec<Ipv4Addr>,
    /// Devices that part of this host's subnet is routed to.
    pub pods: HashSet<u32>,
    /// Whether some route, of any table, has several next hops.
    pub has_several: bool,
}

impl Netlink {
    /// Says what changes of routes are to be told of, from now on. Before, none is.
    pub fn set_interest(&self, interest: Interest) {
        *self.interest.write().unwrap_or_else(PoisonError::into_inner) = Some(interest);
    }

    /// Reads all routes.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn host_routes(&self, interest: Interest) -> Result<HostRoutes, DeviceError> {
        let links = self.links().await?;
        let name = |index: u32| links.iter().find(|link| link.index == index).map_or("?", |link| &link.name);
        let (mut found, foreign) = self
            .read_routes(move |found: &mut (HostRoutes, Option<_>), route| {
                let Some(prefix) = route.prefix() else { return };
                found.0.has_several |= route.has_several();
                if interest.subnet.contains(&prefix) {
                    found.0.pods.extend(route.outputs());
                }
                if !route.is_of_main_table() {
                    return;
                }
                if prefix.prefix_len() == 0 {
                    found.0.gateways.extend(route.gateway());
                }
                let is_overlay = route.outputs().any(|index| index == interest.overlay);
                // Over another device: those of the backend that the network had before.
                let is_ours =
                    route.protocol() == PROTOCOL || is_overlay && (is_former(&route) || is_of_one_lease(&route));
                // The pods' own comes first in any case.
                let is_shared = interest.prefixes.contains(&prefix) && prefix != interest.subnet;
                if is_shared && !is_ours {
                    found.1.get_or_insert((prefix, route.gateway(), route.output()));
                }
                let is_within = !is_shared && interest.prefixes.iter().any(|shared| shared.contains(&prefix));
                let is_elsewhere = (!is_overlay || interest.is_shared) && !is_ours;
                if is_within && is_elsewhere && !interest.subnet.contains(&prefix) && found.0.within.len() < MOST_WITHIN
                {
                    found.0.within.push(prefix);
                }
            })
            .await?;
        found.foreign = foreign.map(|(prefix, gateway, output)| {
            let to = match (gateway, output) {
                (Some(gateway), Some(index)) => format!("via {gateway} dev {}", name(index)),
                (None, Some(index)) => format!("dev {}", name(index)),
                _ => "which leads nowhere".to_owned(),
            };
            (prefix, to)
        });
        Ok(found)
    }

    /// The default routes of the main table, the first to be taken first: the kernel lists those of one prefix by their metric. One
    /// into an overlay, as a DHCP client makes it that gives the device a link-local address, leads to pods only.
    pub(super) async fn default_routes(&self) -> Result<Vec<DefaultRoute>, DeviceError> {
        let keep = |found: &mut Vec<DefaultRoute>, route: RawRoute<'_>| {
            if route.prefix_len() == 0
                && route.is_of_main_table()
                && let Some(link) = route.output()
            {
                found.push(DefaultRoute { link, gateway: route.gateway(), source: route.source() });
            }
        };
        let mut routes = self.read_routes(keep).await?;
        let links = self.links().await?;
        let is_overlay = |link: &Link| VxlanDevice::vni_of(&link.name).is_some() || tun::is_name(&link.name);
        routes.retain(|route| !links.iter().any(|link| link.index == route.link && is_overlay(link)));
        Ok(routes)
    }

    /// Devices that part of the subnet is routed to.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn devices_within(&self, subnet: Ipv4Net) -> Result<HashSet<u32>, DeviceError> {
        let keep = move |found: &mut HashSet<u32>, route: RawRoute<'_>| {
            if route.prefix().is_some_and(|prefix| subnet.contains(&prefix)) {
                found.extend(route.outputs());
            }
        };
        self.read_routes(keep).await
    }

    /// Has all routes pass by, and keeps what is made of them.
    async fn read_routes<T: Default + Send + 'static>(
        &self,
        keep: impl Fn(&mut T, RawRoute<'_>) + Send + 'static,
    ) -> Result<T, DeviceError> {
        let read = spawn_blocking(move || {
            let mut kept = T::default();
            read_all(|route| keep(&mut kept, route)).map(|()| kept)
        });
        let failed = |cause: String| DeviceError::Call { call: "list", subject: "routes".to_owned(), cause };
        match read.await {
            Ok(Ok(kept)) => Ok(kept),
            Ok(Err(error)) => Err(failed(error.to_string())),
            Err(error) => Err(failed(error.to_string())),
        }
    }
}

/// Whether it has the next hop of this agent's former versions.
fn is_former(route: &RawRoute<'_>) -> bool {
    route.gateway() == Some(NEXT_HOPS[0])
}

/// Whether it leads where flannel's route to a lease does.
fn is_of_one_lease(route: &RawRoute<'_>) -> bool {
    route.gateway() == Some(route.destination())
}

/// A dump of all IPv4 routes, a datagram at a time.
fn read_all(mut take: impl FnMut(RawRoute<'_>)) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.set_netlink_get_strict_chk(true)?;
    let all = RouteMessageBuilder::<Ipv4Addr>::new()
        .table_id(0)
        .protocol(RouteProtocol::Unspec)
        .scope(RouteScope::Universe)
        .kind(RouteType::Unspec);
    let request = all.build();
    let mut payload = vec![0; request.buffer_len()];
    request.emit(&mut payload);
    dump(&mut socket, GET_ROUTE, &payload, |payload| {
        if let Some(route) = RawRoute::of(payload) {
            take(route);
        }
    })
}

/// What a message tells of, where that may matter.
pub(super) fn event(interest: &RwLock<Option<Interest>>, kind: u16, payload: &[u8]) -> Option<DeviceEvent> {
    if !matches!(kind, NEW_ROUTE | DELETED_ROUTE) {
        return None;
    }
    let interest = interest.read().unwrap_or_else(PoisonError::into_inner);
    interest.as_ref()?.event(kind == NEW_ROUTE, &RawRoute::of(payload)?)
}

#[cfg(test)]
mod tests {
    use rtnetlink::{packet_core::Emitable as _, packet_route::route::RouteMessage};

    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().expect("a prefix")
    }

    fn route(prefix: &str, output: u32, protocol: RouteProtocol) -> RouteMessage {
        let prefix = net(prefix);
        RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(prefix.network(), prefix.prefix_len())
            .output_interface(output)
            .protocol(protocol)
            .build()
    }

    #[test]
    fn only_what_can_matter_is_told() {
        let interest = Interest {
            overlay: 9,
            is_shared: false,
            prefixes: vec![net("10.5.0.0/16")],
            subnet: net("10.5.43.0/24"),
            addresses: vec![[192, 168, 64, 2].into(), [192, 168, 65, 7].into()],
        };
        let event = |is_new: bool, route: RouteMessage| {
            let mut bytes = vec![0; route.buffer_len()];
            route.emit(&mut bytes);
            let event = interest.event(is_new, &RawRoute::of(&bytes).expect("a route"));
            event.map(|event| (event.kind, event.is_scan_due))
        };
        let (ours, other) = (RouteProtocol::Other(PROTOCOL), RouteProtocol::Boot);
        for elsewhere in ["11.0.0.0/8", "10.0.0.0/8", "10.5.7.0/24", "192.168.66.0/24", "192.168.64.3/32"] {
            assert_eq!(event(true, route(elsewhere, 2, other)), None, "{elsewhere}");
        }
        for peer in ["192.168.64.2/32", "192.168.65.0/24", "192.168.0.0/16"] {
            assert_eq!(event(false, route(peer, 2, other)), Some((Changed::Way, false)), "{peer}");
        }
        let elsewhere = |prefix: &str| {
            let mut route = route(prefix, 2, other);
            route.header.table = 100;
            route
        };
        assert_eq!(event(true, elsewhere("0.0.0.0/0")), Some((Changed::Way, false)));
        assert_eq!(event(true, elsewhere("10.5.0.0/16")), None);
        assert_eq!(event(true, elsewhere("10.5.43.7/32")), Some((Changed::Route, true)));
        assert_eq!(event(true, route("0.0.0.0/0", 2, other)), Some((Changed::Topology, true)));
        assert_eq!(event(true, route("10.5.0.0/16", 2, other)), Some((Changed::Route, true)));
        assert_eq!(event(true, route("10.5.43.7/32", 5, other)), Some((Changed::Route, true)));
        assert_eq!(event(true, route("172.30.0.0/16", 9, other)), Some((Changed::Route, false)));
        assert_eq!(event(true, route("10.5.0.0/16", 9, ours)), None);
        assert_eq!(event(false, route("10.5.0.0/16", 9, ours)), Some((Changed::Route, true)));
    }
}
