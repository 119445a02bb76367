//! The device, what leads into it and what is attached to it; and the programs of pods.

use tracing::warn;

use super::{COMPARE_PERIOD, Reconciler, status::DatapathStatus, target::Target, uplink::Uplink};
use crate::{
    backend::{At, Backend, hooks},
    daemon::DaemonError,
    dataplane::Dataplane,
    device::{Link, external::External},
    lease::LeaseTable,
    repair::Repair,
    xdp::{self, XdpFlag},
};

impl Reconciler<'_> {
    /// Makes the device, what leads into it and what is attached to it, or what of that is not there. What there was to do.
    pub(super) async fn ensure_datapath(&mut self, table: &LeaseTable) -> Result<(Link, Vec<Repair>), DaemonError> {
        let Self { netlink, dataplane, underlay, uplink: Uplink { external, .. }, target, bypass, status, .. } = self;
        let Target { network, lease: own, backend, .. } = target;
        let made = backend.ensure_device(netlink, own.vtep_mac).await?;
        if let Some((device, _)) = &made {
            underlay.set_overlay(device.index);
            dataplane.peers.set_overlay_device(device.index)?;
        }
        let device = made.as_ref().map_or(&external.link, |(device, _)| device);
        // Before the device's: what came in by a link without the program is dropped there.
        attach_underlay(dataplane, &bypass.restrictions.places.underlay, external, backend, status);
        for (hook, at) in hooks(backend.kind()) {
            let link = match at {
                At::External | At::Underlay => &external.link,
                At::Device => device,
            };
            dataplane.attach(*hook, &link.name, link.index)?;
        }
        let address = match &made {
            Some((device, _)) => netlink.ensure_address(device, network.network, own.key.subnet.network()).await?,
            None => false,
        };
        let (link, device_repair) = made.unwrap_or_else(|| (external.link.clone(), None));
        let route = self.ensure_routes(&link, table).await?;
        let blackhole = self.cli.packet_rules.ip_blackhole_route.then_some(self.target.lease.key.subnet);
        self.netlink.set_blackhole(self.target.backend.vni(), blackhole).await?;
        self.attach_pods_or_say().await;
        self.ensure_xdp()?;
        let repairs = match device_repair {
            // What hangs on it went with it.
            Some(Repair::Device) => vec![Repair::Device],
            other => other.into_iter().chain(address.then_some(Repair::DeviceAddress)).chain(route).collect(),
        };
        Ok((link, repairs))
    }

    /// Last: it leaves its packets to the programs before it, and nothing else hangs on it.
    pub(super) fn ensure_xdp(&mut self) -> Result<(), DaemonError> {
        let Self { cli, dataplane, uplink: Uplink { external, .. }, xdp, status, .. } = self;
        match dataplane.set_xdp(xdp.mode, external.link.index) {
            Err(error) if cli.xdp == XdpFlag::Auto => {
                warn!("{error}; packets are taken out of the tunnel without XDP");
                *xdp = xdp::Choice { mode: None, reason: error.to_string() };
                dataplane.set_xdp(None, external.link.index)?;
            }
            result => result?,
        }
        status.xdp(xdp);
        Ok(())
    }

    /// A pod that gets no programs goes through the stack, as all packets once did.
    pub(super) async fn attach_pods_or_say(&mut self) {
        if let Err(error) = self.attach_pods().await {
            warn!("{error}; its pod goes through the stack; trying again in {COMPARE_PERIOD:?}");
        }
    }

    async fn attach_pods(&mut self) -> Result<(), DaemonError> {
        // First: a pod that has a queue has it from its first packet on.
        let pods = self.look_at_links().await?;
        self.inspect_for_pods(&pods);
        let Self { dataplane, bypass, uplink: Uplink { external, .. }, target, status, .. } = self;
        attach_underlay(dataplane, &bypass.restrictions.places.underlay, external, &target.backend, status);
        if !self.dataplane.knows_pods(&pods) {
            // Those that were there before have no need to send something again. Where that can't be told, they do.
            let noted = self.netlink.macs_behind().await.map_err(DaemonError::from);
            let noted = noted.and_then(|macs| Ok(self.dataplane.note_pods(&pods, &macs)?));
            if let Err(error) = noted {
                warn!("{error}; flows into new pods take the stack until these have sent something");
            }
        }
        Ok(self.dataplane.attach_pods(&pods)?)
    }
}

/// What comes in by a link without the program is dropped where it comes out of the tunnel.
fn attach_underlay(
    dataplane: &mut Dataplane,
    all: &[Link],
    external: &External,
    backend: &Backend,
    status: &mut DatapathStatus,
) {
    let has_tunnel = backend.own_device_name().is_some();
    let links = if has_tunnel && !all.is_empty() { all } else { std::slice::from_ref(&external.link) };
    if let Err(error) = dataplane.attach_underlay(links) {
        warn!("{error}; tunnel packets that come in there are dropped; trying again in {COMPARE_PERIOD:?}");
    }
    status.underlay(links);
}
