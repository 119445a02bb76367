//! The route that drops what is sent to addresses of this host's subnet that no pod has (`--ip-blackhole-route`), so that
//! it does not leave this host by the Network's route or a default one while there is no bridge.
//!
//! flannel's has no metric (pkg/ip/iface.go). Where it is made before the bridge gets its address, it comes before that
//! one's route and drops everything to the pods. Ours has the greatest metric, less the VNI so that the agents of several
//! overlays know their own, and so is what remains where nothing else leads there.

use std::net::Ipv4Addr;

use flannel_common::vxlan::Vni;
use ipnet::Ipv4Net;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteType},
};
use tracing::info;

use super::{DeviceError, Netlink};

const fn metric(vni: Vni) -> u32 {
    u32::MAX - vni.get()
}

impl Netlink {
    /// Has exactly these subnets' addresses dropped where nothing else leads to them, and no others for this overlay.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn set_blackhole(&self, vni: Vni, subnet: Option<Ipv4Net>) -> Result<(), DeviceError> {
        let mut is_there = false;
        for route in self.blackholes().await? {
            if !route.attributes.contains(&RouteAttribute::Priority(metric(vni))) {
                continue;
            }
            if subnet.is_some_and(|subnet| leads_to(&route, subnet)) {
                is_there = true;
            } else {
                let removal = self.handle.route().del(route).execute().await;
                removal.map_err(DeviceError::call("remove", "a blackhole route"))?;
            }
        }
        match subnet {
            Some(subnet) if !is_there => {
                let route = RouteMessageBuilder::<Ipv4Addr>::new()
                    .destination_prefix(subnet.network(), subnet.prefix_len())
                    .kind(RouteType::BlackHole)
                    .priority(metric(vni))
                    .build();
                let addition = self.handle.route().add(route).execute().await;
                addition.map_err(DeviceError::call("add the blackhole route to", subnet))
            }
            _ => Ok(()),
        }
    }

    /// Takes away the blackhole route that a flannel made for this host's subnet.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn remove_flannels_blackhole(&self, subnet: Ipv4Net) -> Result<(), DeviceError> {
        for route in self.blackholes().await? {
            let has_metric = route.attributes.iter().any(|attribute| matches!(attribute, RouteAttribute::Priority(_)));
            if !has_metric && leads_to(&route, subnet) {
                let removal = self.handle.route().del(route).execute().await;
                removal.map_err(DeviceError::call("remove", format!("the blackhole route to {subnet}")))?;
                info!("removed flannel's blackhole route to {subnet}, which comes before the pods' own");
            }
        }
        Ok(())
    }

    async fn blackholes(&self) -> Result<Vec<RouteMessage>, DeviceError> {
        // The kernel leaves out all others.
        let all = RouteMessageBuilder::<Ipv4Addr>::new().protocol(RouteProtocol::Unspec).kind(RouteType::BlackHole);
        self.dump("routes", || self.strict.route().get(all.build()).execute()).await
    }
}

fn leads_to(route: &RouteMessage, subnet: Ipv4Net) -> bool {
    route.header.destination_prefix_length == subnet.prefix_len()
        && route.attributes.contains(&RouteAttribute::Destination(RouteAddress::Inet(subnet.network())))
}
