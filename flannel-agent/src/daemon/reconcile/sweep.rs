//! Taking away what another backend, or a flannel that ran here before, left on the host.

use std::{collections::HashSet, net::Ipv4Addr};

use ipnet::Ipv4Net;
use tracing::{info, warn};

use super::{Reconciler, target::Target};
use crate::{
    backend::{At, hooks},
    daemon::DaemonError,
    device::{Link, vxlan::VxlanDevice},
    lease::LeaseTable,
};

impl Reconciler<'_> {
    /// Takes away what there is of the backend that the network had before: routes and devices of an agent's or of flannel's, and
    /// programs.
    async fn sweep_other_backends(&mut self) -> Result<(), DaemonError> {
        let Target { backend, network, .. } = &self.target;
        let hooks = hooks(backend.kind());
        let at_external: Vec<_> = hooks.iter().filter(|(_, at)| *at != At::Device).map(|(hook, _)| *hook).collect();
        let hooks: Vec<_> = hooks.iter().map(|(hook, _)| *hook).collect();
        let external = &self.uplink.external.link;
        let kept = backend.own_device_name().is_none().then_some(external.index);
        self.netlink.remove_link_routes(network.network, kept).await?;
        let device = VxlanDevice::name_of(backend.vni());
        if backend.own_device_name() != Some(&device)
            && let Some(link) = self.netlink.link_by_name(&device).await?
        {
            if self.netlink.is_device_of(link.header.index, network.network).await? {
                // Its addresses, routes, neighbours and forwarding entries go with it.
                self.netlink.delete_link(&device, link.header.index).await?;
                info!("removed {device}: the network's backend is {}", backend.kind());
            } else {
                info!("left {device}: it has no address within {}, and is another network's", network.network);
            }
        }
        self.netlink.remove_tun(backend.vni()).await?;
        Ok(self.dataplane.detach_all_but(&hooks, &external.name, &at_external)?)
    }

    /// Takes away what a flannel that ran here before made for its peers.
    pub(in crate::daemon) async fn sweep(&mut self, link: &Link, table: &LeaseTable) {
        let (network, subnet_len) = (self.target.network.network, self.target.lease.key.subnet.prefix_len());
        let leases: HashSet<Ipv4Addr> = table.iter().map(|(subnet, _)| subnet.network()).collect();
        // Also of leases that are over by now.
        let is_on_grid = |address: Ipv4Addr| {
            Ipv4Net::new(address, subnet_len).is_ok_and(|lease| lease.network() == address && network.contains(&lease))
        };
        let is_lease = |address| leases.contains(&address) || is_on_grid(address);
        if let Err(error) = self.sweep_other_backends().await {
            warn!("something of another backend stays: {error}");
        }
        // flannel's host-gw made these, and its vxlan with DirectRouting.
        let hosts = table.iter().map(|(subnet, peer)| (*subnet, peer.public_ip)).collect();
        if let Err(error) = self.netlink.sweep_link_routes(&self.uplink.external.link, &hosts).await {
            warn!("{error}");
        }
        if self.target.backend.own_device_name().is_none() {
            return;
        }
        let macs = table.iter().map(|(_, peer)| peer.vtep_mac.0).collect();
        if let Err(error) = self.netlink.sweep(link, is_lease, &macs, &self.routes.foreign).await {
            warn!("{error}");
        }
    }
}
