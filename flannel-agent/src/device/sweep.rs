//! What a flannel that ran here before made for each of its peers, and what former versions of this agent made: taken away at
//! the start, and nothing else.

use std::{collections::HashSet, net::Ipv4Addr};

use flannel_common::{packet::Mac, vxlan::NEXT_HOP_MAC};
use rtnetlink::packet_route::{
    AddressFamily,
    neighbour::{NeighbourAttribute, NeighbourMessage},
    route::RouteMessage,
};
use tracing::warn;

use super::{
    DeviceError, Link, Netlink,
    overlay_route::{ForeignNextHops, is_flannels, is_former, is_next_hop, is_ours, place},
};

impl Netlink {
    /// Removes routes, neighbours and forwarding entries that flannel made for leases, and routes of former versions of ours.
    /// `is_lease` says whether an address is the first of a lease, and `macs` are those of leases' devices. What is kept for
    /// routes of others stays. What can't be removed is said and left.
    ///
    /// # Errors
    /// [`DeviceError::Call`] where the kernel does not list them.
    pub async fn sweep(
        &self,
        link: &Link,
        is_lease: impl Fn(Ipv4Addr) -> bool,
        macs: &HashSet<Mac>,
        kept: &ForeignNextHops,
    ) -> Result<(), DeviceError> {
        let is_unwanted =
            |route: &RouteMessage| is_former(route) || is_flannels(route) && is_lease(place(route).0.network());
        self.remove_routes(link, is_unwanted).await?;
        let neighbours = self.permanent_neighbours(link).await?;
        let unwanted: Vec<_> = neighbours
            .into_iter()
            .filter(|(address, mac)| *mac != NEXT_HOP_MAC && is_lease(*address) && !kept.contains_key(address))
            .collect();
        for (address, _) in &unwanted {
            if let Err(error) = self.remove_neighbour(link, *address).await {
                warn!("{error}");
            }
        }
        let in_use: HashSet<Mac> = kept.values().map(|(mac, _)| *mac).collect();
        let unwanted: HashSet<Mac> = unwanted.into_iter().map(|(_, mac)| mac).chain(macs.iter().copied()).collect();
        for mac in self.forwarding_macs(link).await? {
            if unwanted.contains(&mac)
                && !in_use.contains(&mac)
                && let Err(error) = self.remove_forwarding_entry(link, mac).await
            {
                warn!("{error}");
            }
        }
        Ok(())
    }

    /// Removes our routes, and the neighbours of their next hops, from a device that stays.
    ///
    /// # Errors
    /// [`DeviceError::Call`] where the kernel does not list them.
    pub async fn remove_route(&self, name: &str, ifindex: u32) -> Result<(), DeviceError> {
        let link = Link { name: name.to_owned(), index: ifindex, mtu: 0, mac: None };
        self.remove_routes(&link, |route| is_ours(route) || is_former(route)).await?;
        for family in [AddressFamily::Inet, AddressFamily::Bridge] {
            for entry in self.entries(&link, family).await?.into_iter().filter(is_next_hop) {
                if let Err(error) = self.handle.neighbours().del(entry).execute().await {
                    warn!("a neighbour of {name} stays: {error}");
                }
            }
        }
        Ok(())
    }

    async fn remove_routes(&self, link: &Link, is_unwanted: impl Fn(&RouteMessage) -> bool) -> Result<(), DeviceError> {
        for route in self.routes_into(link.index).await?.into_iter().filter(is_unwanted) {
            if let Err(error) = self.handle.route().del(route).execute().await {
                warn!("a route into {} stays: {error}", link.name);
            }
        }
        Ok(())
    }

    async fn entries(&self, link: &Link, family: AddressFamily) -> Result<Vec<NeighbourMessage>, DeviceError> {
        let ask = || self.handle.neighbours().get().set_address_family(family).execute();
        let entries = self.dump(format!("the neighbours of {}", link.name), ask).await?;
        Ok(entries.into_iter().filter(|entry| entry.header.ifindex == link.index).collect())
    }

    /// The MACs of a device's forwarding entries that name a VTEP, whoever made them (`bridge` has them permanent and NOARP).
    async fn forwarding_macs(&self, link: &Link) -> Result<Vec<Mac>, DeviceError> {
        let entries = self.entries(link, AddressFamily::Bridge).await?;
        let mac = |entry: &NeighbourMessage| {
            let has_vtep =
                entry.attributes.iter().any(|attribute| matches!(attribute, NeighbourAttribute::Destination(_)));
            let mac = entry.attributes.iter().find_map(|attribute| match attribute {
                NeighbourAttribute::LinkLayerAddress(mac) => Mac::try_from(mac.as_slice()).ok(),
                _ => None,
            });
            mac.filter(|_| has_vtep)
        };
        Ok(entries.iter().filter_map(mac).collect())
    }
}
