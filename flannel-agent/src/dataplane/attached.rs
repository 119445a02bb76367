//! What is really attached, as the kernel says; also when no agent runs.

use aya::programs::{
    ProgramError, SchedClassifier,
    links::{FdLink, PinnedLink},
};
use flannel_common::vxlan::Vni;
use nix::net::if_::{if_indextoname, if_nametoindex};

use super::{
    DataplaneError, Hook,
    attach::lacks_tcx,
    pins::PinDirectory,
    xdp::{self, XdpMode},
};
use crate::device::vxlan::VxlanDevice;

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
    /// The one that the agent pinned.
    Attached,
    /// It is not, or is another.
    Missing,
    /// It can't be told.
    Unknown(String),
}

/// Where an overlay's programs should be, and whether they are: at the external interface, at `flannel.<VNI>`, and at the
/// pods' veths that an agent found.
///
/// # Errors
/// [`DataplaneError::Pin`].
pub fn attachments(pins: &PinDirectory, vni: Vni, external: &str) -> Result<Vec<Attachment>, DataplaneError> {
    let overlay = VxlanDevice::name_of(vni);
    let mut wanted = vec![
        (Hook::FromUnderlay, external.to_owned()),
        (Hook::ToOverlay, overlay.clone()),
        (Hook::FromOverlay, overlay),
    ];
    for hook in Hook::OF_PODS {
        // The pin of a veth that is gone stays until an agent comes.
        let veths = pins.links(hook.program())?.into_iter().filter_map(|pin| {
            let ifindex = pin.file_name()?.to_str()?.rsplit('-').next()?.parse::<u32>().ok()?;
            if_indextoname(ifindex).ok()?.into_string().ok()
        });
        wanted.extend(veths.map(|veth| (hook, veth)));
    }
    let attachment = |(hook, interface): (Hook, String)| {
        let state = state(pins, hook, &interface);
        Attachment { hook, interface, state }
    };
    Ok(wanted.into_iter().map(attachment).collect())
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

fn state(pins: &PinDirectory, hook: Hook, interface: &str) -> AttachmentState {
    let Ok(ifindex) = if_nametoindex(interface) else { return AttachmentState::Missing };
    let pinned = PinnedLink::from_pin(pins.link(hook.program(), ifindex)).and_then(|link| FdLink::from(link).info());
    let programs = match SchedClassifier::query_tcx(interface, hook.attach_type()) {
        Ok((_, programs)) => programs,
        Err(error) => return AttachmentState::Unknown(reason(&error, interface)),
    };
    let is_there = pinned.is_ok_and(|link| programs.iter().any(|program| program.id() == link.program_id()));
    if is_there { AttachmentState::Attached } else { AttachmentState::Missing }
}

fn reason(error: &ProgramError, interface: &str) -> String {
    match lacks_tcx(error) {
        true => format!("this kernel has no TCX; `tc filter show dev {interface}` shows filters"),
        false => super::chain(error),
    }
}
