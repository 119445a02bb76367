//! What is really attached, as the kernel says; also when no agent runs.

use std::collections::BTreeSet;

use aya::programs::{
    TcAttachType,
    links::{FdLink, PinnedLink},
};
use nix::{
    libc::EINVAL,
    net::if_::{if_indextoname, if_nametoindex},
};

use super::{
    DataplaneError, Hook,
    attach::filter_handle,
    others,
    pins::PinDirectory,
    xdp::{self, XdpMode},
};
use crate::device::{DeviceError, Netlink, PodLink, filters::Side};

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

/// Where an overlay's programs should be, and whether they are: at these interfaces, and at the veths
/// of `pods` that an agent found. Those are the ones that it pinned links for or, without TCX, left a filter at.
///
/// # Errors
/// [`DataplaneError::Pin`].
pub async fn attachments(
    pins: &PinDirectory,
    places: impl IntoIterator<Item = (Hook, String)>,
    pods: &[PodLink],
    netlink: &Netlink,
) -> Result<Vec<Attachment>, DataplaneError> {
    let attachment = async |hook, interface: &str| Attachment {
        hook,
        interface: interface.to_owned(),
        state: state(pins, hook, interface, netlink).await,
    };
    let mut attachments = Vec::new();
    for (hook, interface) in places {
        attachments.push(attachment(hook, &interface).await);
    }
    let mut pinned = BTreeSet::new();
    for hook in Hook::OF_PODS {
        // The pin of a veth that is gone stays until an agent comes.
        pinned.extend(pins.links(hook.program())?.into_iter().filter_map(|pin| {
            let ifindex = pin.file_name()?.to_str()?.rsplit('-').next()?.parse::<u32>().ok()?;
            if_indextoname(ifindex).ok()?.into_string().ok()
        }));
    }
    let veths: BTreeSet<_> = pinned.iter().chain(pods.iter().map(|pod| &pod.name)).collect();
    for veth in veths {
        let [first, second] = Hook::OF_PODS;
        let of_pod = [attachment(first, veth).await, attachment(second, veth).await];
        // A pod that has just come has nothing yet, which is no trouble.
        if pinned.contains(veth) || of_pod.iter().any(|attachment| attachment.state != AttachmentState::Missing) {
            attachments.extend(of_pod);
        }
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
    let programs = match others::programs(ifindex, side(hook)) {
        Ok(programs) => programs,
        // No TCX here.
        Err(error) if error.raw_os_error() == Some(EINVAL) => Vec::new(),
        Err(error) => return AttachmentState::Unknown(error.to_string()),
    };
    if pinned.is_ok_and(|link| programs.contains(&link.program_id())) {
        return AttachmentState::Attached;
    }
    match has_filter(pins, hook, ifindex, netlink).await {
        Ok(true) => AttachmentState::Attached,
        Ok(false) => AttachmentState::Missing,
        Err(error) => AttachmentState::Unknown(error.to_string()),
    }
}

const fn side(hook: Hook) -> Side {
    match hook.attach_type() {
        TcAttachType::Egress => Side::Egress,
        TcAttachType::Ingress | TcAttachType::Custom(_) => Side::Ingress,
    }
}

async fn has_filter(pins: &PinDirectory, hook: Hook, ifindex: u32, netlink: &Netlink) -> Result<bool, DeviceError> {
    Ok(filter_of(pins, hook, ifindex, netlink).await?.is_some())
}

/// The number of the program that is a filter of an agent's, as without TCX.
pub(super) async fn filter_of(
    pins: &PinDirectory,
    hook: Hook,
    ifindex: u32,
    netlink: &Netlink,
) -> Result<Option<u32>, DeviceError> {
    let filters = netlink.program_filters(ifindex, side(hook)).await?;
    let handle = filter_handle(pins.vni());
    let ours = filters.iter().find(|filter| filter.handle == handle && filter.program == hook.program());
    Ok(ours.map(|filter| filter.id))
}
