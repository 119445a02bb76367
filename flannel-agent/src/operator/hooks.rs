//! Where an overlay's programs should be, and whether they are.

use flannel_common::vxlan::Vni;
use nix::net::if_::if_nametoindex;

use super::OperatorError;
use crate::{
    backend::{At, hooks},
    dataplane::{Attachment, Hook, PinDirectory, attachments},
    device::{Netlink, vxlan::VxlanDevice},
    status::Status,
};

/// The places besides pods' veths.
pub(super) fn places(vni: Vni, status: &Status) -> impl Iterator<Item = (Hook, String)> {
    let external = || status.external_interface.clone();
    // One that is gone, or of which nobody has heard yet, is no trouble.
    let is_there = move |name: &String| *name == status.external_interface || if_nametoindex(name.as_str()).is_ok();
    hooks(status.backend_type()).iter().flat_map(move |(hook, at)| {
        let names = match at {
            At::External => vec![external()],
            At::Underlay if status.underlay_interfaces.is_empty() => vec![external()],
            At::Underlay => status.underlay_interfaces.iter().filter(|name| is_there(name)).cloned().collect(),
            At::Device => vec![VxlanDevice::name_of(vni)],
        };
        names.into_iter().map(|name| (*hook, name))
    })
}

/// All of them.
///
/// # Errors
/// [`OperatorError::Device`] or [`OperatorError::Dataplane`].
pub(super) async fn of(
    pins: &PinDirectory,
    vni: Vni,
    status: &Status,
    netlink: &Netlink,
) -> Result<Vec<Attachment>, OperatorError> {
    let within = netlink.devices_within(status.lease.subnet).await?;
    let pods = netlink.pod_network(status.network, status.lease.subnet, &within).await?;
    Ok(attachments(pins, places(vni, status), &pods.pods, netlink).await?)
}
