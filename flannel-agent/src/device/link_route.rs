//! Routes to peers over a link that others have routes over, too: one for all leases to a next hop that is nobody's, whose MAC the
//! programs replace, or one for each lease to its host, as flannel's host-gw makes them.
//!
//! As in [`overlay_route`](super::overlay_route): each is read before it is written, what is missing is added before what is too
//! much is removed, and a route of somebody else's is never replaced.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::Ipv4Addr,
};

use flannel_common::vxlan::NEXT_HOP_MAC;
use ipnet::Ipv4Net;
use rtnetlink::packet_route::route::RouteMessage;
use tracing::warn;

use super::{
    DeviceError, Link, Netlink,
    overlay_route::{Ensured, NEXT_HOPS, Wanted, gateways, is_ours, place},
    tun,
    vxlan::VxlanDevice,
};
use crate::repair::Repair;

/// What is to lead to the peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkRoutes {
    /// The address of this host that it sends from by the shared routes: that of flannel's, which lead to addresses beside it.
    pub source: Ipv4Addr,
    /// Prefixes of routes that leases share.
    pub shared: Vec<Ipv4Net>,
    /// Leases that have a route of their own, and their hosts.
    pub leases: BTreeMap<Ipv4Net, Ipv4Addr>,
}

impl Netlink {
    /// Has these routes lead over the link, and no others of ours to this Network, with the neighbour of the shared ones' next hop.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn ensure_link_routes(
        &self,
        link: &Link,
        network: Ipv4Net,
        routes: &LinkRoutes,
    ) -> Result<Ensured, DeviceError> {
        let mut ensured = Ensured::default();
        let there = self.routes_into(link.index).await?;
        let neighbours = self.permanent_neighbours(link).await?;
        let gateway = self.free_next_hop(link, Ipv4Addr::UNSPECIFIED).await?;
        let needs_neighbour = !routes.shared.is_empty();
        if needs_neighbour && neighbours.get(&gateway) != Some(&NEXT_HOP_MAC) {
            self.set_neighbour(link, gateway, NEXT_HOP_MAC).await?;
            ensured.repairs.push(Repair::Neighbour);
        }
        let shared = routes.shared.iter().map(|prefix| Wanted::shared(*prefix, gateway, routes.source));
        let leases = routes.leases.iter().map(|(lease, host)| Wanted::by_host(*lease, *host));
        let wanted: HashSet<Wanted> = shared.chain(leases).collect();
        let former: HashSet<_> = there.iter().filter(|route| is_ours(route)).map(place).collect();
        let all = there.into_iter().filter_map(|route| Some((Wanted::of(&route)?, route)));
        // Another network of this host has its routes here, too.
        let (ours, others): (HashMap<Wanted, RouteMessage>, HashMap<_, _>) =
            all.partition(|(route, _)| network.contains(&route.prefix()));
        for route in wanted.iter().filter(|route| !ours.contains_key(route)) {
            match self.add_route(link, *route, former.contains(&route.place())).await? {
                true => ensured.repairs.push(Repair::Route),
                false => ensured.taken.push(route.prefix()),
            }
        }
        for (_, route) in ours.into_iter().filter(|(route, _)| !wanted.contains(route)) {
            self.remove_route_of_ours(link, route).await?;
        }
        for (address, mac) in neighbours {
            let is_in_use =
                needs_neighbour && address == gateway || others.keys().any(|other| other.gateway() == address);
            if mac == NEXT_HOP_MAC && NEXT_HOPS.contains(&address) && !is_in_use {
                self.remove_neighbour(link, address).await?;
            }
        }
        ensured.repairs.dedup();
        Ok(ensured)
    }

    /// Removes our routes to a Network over links that are no overlay's own device, and the neighbours of their next hops, but over
    /// the link `kept`. What can't be removed is said and left.
    ///
    /// # Errors
    /// [`DeviceError::Call`] where the kernel does not list links or routes.
    pub async fn remove_link_routes(&self, network: Ipv4Net, kept: Option<u32>) -> Result<(), DeviceError> {
        for link in self.links().await? {
            if Some(link.index) == kept || VxlanDevice::vni_of(&link.name).is_some() || tun::is_name(&link.name) {
                continue;
            }
            let has_some = self
                .routes_into(link.index)
                .await?
                .iter()
                .any(|route| Wanted::of(route).is_some_and(|route| network.contains(&route.prefix())));
            if has_some {
                let none = LinkRoutes { source: Ipv4Addr::UNSPECIFIED, shared: Vec::new(), leases: BTreeMap::new() };
                self.ensure_link_routes(&link, network, &none).await?;
            }
        }
        Ok(())
    }

    /// Removes the routes that flannel's host-gw made for leases: to just these hosts, over this link. What can't be removed is
    /// said and left.
    ///
    /// # Errors
    /// [`DeviceError::Call`] where the kernel does not list them.
    pub async fn sweep_link_routes(&self, link: &Link, hosts: &HashMap<Ipv4Net, Ipv4Addr>) -> Result<(), DeviceError> {
        let is_flannels = |route: &&RouteMessage| {
            let (prefix, metric) = place(route);
            let host = hosts.get(&prefix);
            !is_ours(route) && metric.is_none() && host.is_some_and(|host| gateways(route).eq([*host]))
        };
        for route in self.routes_into(link.index).await?.iter().filter(is_flannels) {
            if let Err(error) = self.remove_route_of_ours(link, route.clone()).await {
                warn!("{error}");
            }
        }
        Ok(())
    }
}
