//! Attaching: TCX links where the kernel has them (6.6), else filters of the clsact qdisc.

use std::{collections::HashSet, fs, io, path::Path};

use aya::{
    programs::{
        Link as _, LinkOrder, ProgramError, SchedClassifier, TcAttachType,
        links::{FdLink, PinnedLink},
        tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_add_clsact},
    },
    sys::SyscallError,
};
use flannel_common::vxlan::Vni;
use nix::net::if_::{if_indextoname, if_nametoindex};
use tracing::{debug, warn};

use super::{
    DataplaneError, Hook,
    features::has_tcx,
    held::{Attachment, Held, Place},
    pins::{PinDirectory, failed, remove_pin},
    restrict::Variant,
};

/// Where a filter of ours sits among those of a clsact qdisc.
const FILTER_PRIORITY: u16 = 1;

/// The same handle for an overlay every time, so that a new program replaces the old one in one step, and no other
/// overlay's.
pub(super) const fn filter_handle(vni: Vni) -> u32 {
    const OURS: u32 = 0xf100_0000;
    OURS | vni.get()
}

impl Hook {
    pub(super) const fn attach_type(self) -> TcAttachType {
        match self {
            Self::ToOverlay | Self::ToPod | Self::ToUnderlay => TcAttachType::Egress,
            Self::FromOverlay | Self::FromUnderlay | Self::FromPod => TcAttachType::Ingress,
        }
    }

    /// Admission comes before others' programs, as does what gives a packet the MAC that it is sent to, and what ends a packet's way
    /// here after them.
    const fn order(self) -> LinkOrder {
        match self {
            Self::ToOverlay | Self::FromPod | Self::ToPod => LinkOrder::last(),
            Self::FromOverlay | Self::FromUnderlay | Self::ToUnderlay => LinkOrder::first(),
        }
    }
}

/// Whether it had been detached since this process attached it.
pub(super) fn attach(
    program: &mut SchedClassifier,
    hook: Hook,
    variant: Variant,
    pins: &PinDirectory,
    held: &mut Held,
    interface: &str,
    ifindex: u32,
) -> Result<bool, DataplaneError> {
    let pin = pins.link(hook.program(), ifindex);
    let refused = |call| move |source| DataplaneError::Program { call, program: hook.program(), source };
    let attachment = |link| Attachment { place: Place::Tc(hook), variant, ifindex, link };
    // aya attaches by name, which may be another interface's by now.
    let named = || match if_nametoindex(interface) {
        Ok(index) if index == ifindex => Ok(()),
        _ => Err(refused("attach")(ProgramError::UnknownInterface { name: interface.to_owned() })),
    };

    let before = held.remove(&pin);
    let was_held = before.is_some();
    let is_filter = before.as_ref().is_some_and(|before| before.link.is_none());
    if !is_filter {
        let link = before.and_then(|before| before.link).or_else(|| pinned_link::<SchedClassifierLink>(&pin));
        if let Some(link) = link.and_then(|link| swap(program, link, &pin)) {
            held.insert(pin, attachment(Some(link)));
            return Ok(false);
        }
        if hook.has_one_place() {
            // What an agent pinned for another interface, or one that is gone.
            release_all_but(hook, pins, held, &HashSet::new())?;
        }
        remove_pin(&pin)?;
        named()?;
        let options = TcAttachOptions::TcxOrder(hook.order());
        match program.attach_with_options(interface, hook.attach_type(), options) {
            Ok(id) => {
                let link = program.take_link(id).map_err(refused("attach"))?;
                named()?;
                let link = link.try_into().map_err(|_| DataplaneError::Missing("link of an attached program"))?;
                // Where the file system of the pins is gone, the program is held until that is back.
                let link = if pins.exists() { pin_link(link, &pin)? } else { link };
                held.insert(pin, attachment(Some(link)));
                return Ok(was_held);
            }
            Err(error) if !has_tcx(interface) => debug!("no TCX here ({error}); attaching to clsact"),
            Err(error) => return Err(refused("attach")(error)),
        }
    }
    named()?;
    let was_there = attach_filter(program, hook, interface, pins.vni()).map_err(refused("attach"))?;
    held.insert(pin, attachment(None));
    Ok(was_held && !was_there)
}

/// Detaches a hook's program from all interfaces but these.
pub(super) fn release_all_but(
    hook: Hook,
    pins: &PinDirectory,
    held: &mut Held,
    ifindexes: &HashSet<u32>,
) -> Result<(), DataplaneError> {
    let is_hook = |place| matches!(place, Place::Tc(of) if of == hook);
    held.retain(|_, attachment| {
        let stays = !is_hook(attachment.place) || ifindexes.contains(&attachment.ifindex);
        // A device that is gone took its filters with it.
        if !stays
            && attachment.link.is_none()
            && let Ok(interface) = if_indextoname(attachment.ifindex)
        {
            detach_filter(hook, &interface.to_string_lossy(), pins.vni());
        }
        stays
    });
    let wanted: HashSet<_> = ifindexes.iter().map(|ifindex| pins.link(hook.program(), *ifindex)).collect();
    pins.links(hook.program())?.iter().filter(|pin| !wanted.contains(*pin)).try_for_each(|pin| remove_pin(pin))
}

/// Pins a link, so that the attachment stays when the agent goes. Where that fails, the link is gone.
pub(super) fn pin_link(link: FdLink, pin: &Path) -> Result<FdLink, DataplaneError> {
    let pinned = link.pin(pin).map_err(|error| failed("pin", pin)(io::Error::other(error)))?;
    Ok(pinned.into())
}

/// The link that is pinned there. [`None`] where there is nothing, or something else.
pub(super) fn pinned_link<L>(pin: &Path) -> Option<FdLink>
where
    L: TryFrom<FdLink> + TryInto<FdLink>,
{
    let is_there = fs::symlink_metadata(pin).ok()?.is_file();
    let link = PinnedLink::from_pin(pin).ok().filter(|_| is_there);
    let link = link.and_then(|link| L::try_from(FdLink::from(link)).ok()?.try_into().ok());
    if link.is_none() {
        warn!("{} is no link of such a program; the program is attached anew", pin.display());
    }
    link
}

/// The kernel's reason against a call of the program's.
pub(super) fn errno(error: &ProgramError) -> Option<i32> {
    match error {
        ProgramError::SyscallError(SyscallError { io_error, .. }) => io_error.raw_os_error(),
        _ => None,
    }
}

/// Puts the program into a link. [`None`] where the link is detached, or none of TCX.
fn swap(program: &mut SchedClassifier, link: FdLink, pin: &Path) -> Option<FdLink> {
    let link = SchedClassifierLink::try_from(link).ok()?;
    match program.attach_to_link(link) {
        Ok(id) => program.take_link(id).ok()?.try_into().ok(),
        Err(error) => {
            debug!("the link {} can't be used any more: {error}", pin.display());
            None
        }
    }
}

/// Whether there was a filter, which is replaced.
fn attach_filter(program: &mut SchedClassifier, hook: Hook, interface: &str, vni: Vni) -> Result<bool, ProgramError> {
    let handle = TcHandle::from(filter_handle(vni));
    // Fails where it is there already, and then attaching works.
    if let Err(error) = qdisc_add_clsact(interface) {
        debug!("clsact on {interface}: {error}");
    }
    let existing = SchedClassifierLink::attached(interface, hook.attach_type(), FILTER_PRIORITY, handle, None);
    let replaced = existing.map_err(aya::programs::tc::TcError::IoError)?;
    let (id, was_there) = match program.attach_to_link(replaced) {
        Ok(id) => (id, true),
        Err(error) => {
            debug!("no filter to replace on {interface}: {error}");
            let options = NlOptions { priority: FILTER_PRIORITY, handle, classid: None };
            (program.attach_with_options(interface, hook.attach_type(), TcAttachOptions::Netlink(options))?, false)
        }
    };
    // A filter has no pin: it stays as long as nobody removes it, so the handle must not detach it when dropped.
    std::mem::forget(program.take_link(id)?);
    Ok(was_there)
}

/// Removes an overlay's filter, as kernels without TCX have them, from an interface. Links go with their pins.
pub(super) fn detach_filter(hook: Hook, interface: &str, vni: Vni) {
    let handle = TcHandle::from(filter_handle(vni));
    let filter = SchedClassifierLink::attached(interface, hook.attach_type(), FILTER_PRIORITY, handle, None);
    // There is none on most interfaces, and nobody to ask but by removing it.
    if filter.is_ok_and(|filter| filter.detach().is_ok()) {
        debug!("removed the filter {} from {interface}", hook.program());
    }
}

/// Whether it is that the kernel does not know TCX links: it then takes the attach type for invalid. (What it may refuse
/// besides, looking at the programs there, needs more privileges.)
pub(super) fn lacks_tcx(error: &ProgramError) -> bool {
    errno(error) == Some(nix::libc::EINVAL)
}
