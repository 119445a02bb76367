//! What is really attached, as the kernel says; also when no agent runs.

use std::collections::BTreeSet;

use aya::programs::{
    SchedClassifier, TcAttachType,
    links::{FdLink, PinnedLink},
};
use ipnet::Ipv4Net;
use nix::net::if_::{if_indextoname, if_nametoindex};

use super::{
    DataplaneError, Hook,
    attach::{filter_handle, lacks_tcx},
    pins::PinDirectory,
    xdp::{self, XdpMode},
};
use crate::device::{DeviceError, Netlink, filters::Side, vxlan::VxlanDevice};

/// A place where a program should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Which program, and at which side of the interface.
    pub hook: Hook,
    /// The interface.
    pub interface: String,
    /// Whether it is there.
    pub state: AttachmentState,
}

/// Whether a program is where it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AttachmentState {
    /// The one that the agent pinned, or its filter.
    Attached,
    /// It is not, or is another.
    Missing,
    /// It can't be told.
    Unknown(String),
}

/// Where an overlay's programs should be, and whether they are: at the external interface, at `flannel.<VNI>`, and at the
/// veths of this subnet's pods that an agent found: where it pinned links, or left a filter at either side.
///
/// # Errors
/// [`DataplaneError::Pin`].
pub async fn attachments(
    pins: &PinDirectory,
    external: &str,
    subnet: Ipv4Net,
    netlink: &Netlink,
) -> Result<Vec<Attachment>, DataplaneError> {
    let overlay = VxlanDevice::name_of(pins.vni());
    let mut wanted = vec![
        (Hook::FromUnderlay, external.to_owned()),
        (Hook::ToOverlay, overlay.clone()),
        (Hook::FromOverlay, overlay),
    ];
    let mut veths = BTreeSet::new();
    for hook in Hook::OF_PODS {
        // The pin of a veth that is gone stays until an agent comes.
        veths.extend(pins.links(hook.program())?.into_iter().filter_map(|pin| {
            let ifindex = pin.file_name()?.to_str()?.rsplit('-').next()?.parse::<u32>().ok()?;
            if_indextoname(ifindex).ok()?.into_string().ok()
        }));
    }
    if veths.is_empty() {
        // None are pinned without TCX. What the kernel does not tell is said of the hooks above.
        for pod in netlink.pods(subnet).await.unwrap_or_default() {
            for hook in Hook::OF_PODS {
                if has_filter(pins, hook, pod.index, netlink).await.unwrap_or_default() {
                    veths.insert(pod.name.clone());
                }
            }
        }
    }
    wanted.extend(Hook::OF_PODS.into_iter().flat_map(|hook| veths.iter().map(move |veth| (hook, veth.clone()))));
    let mut attachments = Vec::new();
    for (hook, interface) in wanted {
        let state = state(pins, hook, &interface, netlink).await;
        attachments.push(Attachment { hook, interface, state });
    }
    Ok(attachments)
}

/// The mode in which `xdp_decap` is attached; [`None`] where it is not.
///
/// # Errors
/// [`DataplaneError::Pin`].
pub fn attached_xdp(pins: &PinDirectory) -> Result<Option<XdpMode>, DataplaneError> {
    let is_pinned = |mode: &XdpMode| Ok::<_, DataplaneError>(!pins.links(&xdp::pin_name(*mode))?.is_empty());
    for mode in [XdpMode::Native, XdpMode::Generic] {
        if is_pinned(&mode)? {
            return Ok(Some(mode));
        }
    }
    Ok(None)
}

async fn state(pins: &PinDirectory, hook: Hook, interface: &str, netlink: &Netlink) -> AttachmentState {
    let Ok(ifindex) = if_nametoindex(interface) else { return AttachmentState::Missing };
    let pinned = PinnedLink::from_pin(pins.link(hook.program(), ifindex)).and_then(|link| FdLink::from(link).info());
    let programs = match SchedClassifier::query_tcx(interface, hook.attach_type()) {
        Ok((_, programs)) => programs,
        Err(error) if lacks_tcx(&error) => Vec::new(),
        Err(error) => return AttachmentState::Unknown(super::chain(&error)),
    };
    if pinned.is_ok_and(|link| programs.iter().any(|program| program.id() == link.program_id())) {
        return AttachmentState::Attached;
    }
    match has_filter(pins, hook, ifindex, netlink).await {
        Ok(true) => AttachmentState::Attached,
        Ok(false) => AttachmentState::Missing,
        Err(error) => AttachmentState::Unknown(error.to_string()),
    }
}

async fn has_filter(pins: &PinDirectory, hook: Hook, ifindex: u32, netlink: &Netlink) -> Result<bool, DeviceError> {
    let side = match hook.attach_type() {
        TcAttachType::Egress => Side::Egress,
        TcAttachType::Ingress | TcAttachType::Custom(_) => Side::Ingress,
    };
    let filters = netlink.program_filters(ifindex, side).await?;
    let handle = filter_handle(pins.vni());
    Ok(filters.iter().any(|filter| filter.handle == handle && filter.program == hook.program()))
}
