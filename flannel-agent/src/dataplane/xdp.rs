//! `xdp_decap` on the external interface: a link of its own kind, in one of two modes.

use std::{thread, time::Duration};

use aya::{
    Ebpf,
    programs::{ProgramError, Xdp, XdpMode as Flags, links::FdLink, xdp::XdpLink},
};
use nix::libc::{EBUSY, EEXIST};
use tracing::debug;

use super::{
    Dataplane, DataplaneError,
    attach::{errno, pin_link, pinned_link},
    held::{Attachment, Place},
    pins::remove_pin,
};

/// How often a device that is just becoming free is tried, and the time in between.
const LOOKS: u32 = 50;
const LOOK_TIME: Duration = Duration::from_millis(10);

/// What the names of pinned links begin with.
pub(super) const PIN: &str = "xdp_decap";

/// Who runs the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XdpMode {
    /// The driver, before the kernel has made a packet of the frame.
    Native,
    /// The kernel's stack, after it has aggregated. For devices whose driver can't, and for tests.
    Generic,
}

impl XdpMode {
    /// Its name in flags, status and pins.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }

    pub(super) const fn program(self) -> &'static str {
        match self {
            Self::Native => "xdp_decap",
            Self::Generic => "xdp_decap_generic",
        }
    }

    const fn flags(self) -> Flags {
        match self {
            Self::Native => Flags::Driver,
            Self::Generic => Flags::Skb,
        }
    }
}

impl Dataplane {
    /// The program of a mode, loaded.
    ///
    /// # Errors
    /// [`DataplaneError`].
    pub fn xdp_program(&mut self, mode: XdpMode) -> Result<&mut Xdp, DataplaneError> {
        loaded(&mut self.ebpf, mode)
    }

    /// Attaches `xdp_decap` to a link in this mode, or swaps the one that an earlier agent left there, and detaches it from
    /// wherever else it is; [`None`] detaches it from all. A driver may take its link down for a moment at each attachment and
    /// each end of one, so an attachment that is as wanted is kept.
    ///
    /// The program leaves what it takes out of the tunnel to `from_underlay`, which must be attached as long as it is.
    ///
    /// # Errors
    /// [`DataplaneError`].
    pub fn set_xdp(&mut self, mode: Option<XdpMode>, ifindex: u32) -> Result<(), DataplaneError> {
        let wanted = mode.map(|mode| self.pins.link(&pin_name(mode), ifindex));
        let mut has_detached = false;
        for pin in self.pins.links(PIN)?.iter().filter(|pin| Some(*pin) != wanted.as_ref()) {
            self.held.remove(pin);
            remove_pin(pin)?;
            has_detached = true;
        }
        let (Some(mode), Some(pin)) = (mode, wanted) else { return Ok(()) };
        let variant = self.wanted(Place::Xdp(mode), ifindex);
        self.load_variant(variant)?;
        let attachment = |link| Attachment { place: Place::Xdp(mode), variant, ifindex, link: Some(link) };
        let before = self.held.remove(&pin);
        let was_held = before.is_some();
        let program = loaded(self.variants.get_mut(&variant).unwrap_or(&mut self.ebpf), mode)?;
        let refused = |call| move |source| DataplaneError::Program { call, program: mode.program(), source };
        let link = before.and_then(|before| before.link).or_else(|| pinned_link::<XdpLink>(&pin));
        if let Some(link) = link.and_then(|link| swap(program, link, &pin)) {
            self.held.insert(pin, attachment(link));
            return Ok(());
        }
        remove_pin(&pin)?;
        let mut result = program.attach_to_if_index(ifindex, mode.flags());
        // The kernel takes a link whose last pin is gone off its device a moment later (`bpf_link_put`).
        for _ in 0..LOOKS {
            if !has_detached || !result.as_ref().is_err_and(is_taken) {
                break;
            }
            thread::sleep(LOOK_TIME);
            result = program.attach_to_if_index(ifindex, mode.flags());
        }
        let id = result.map_err(refused("attach"))?;
        let link = program.take_link(id).map_err(refused("attach"))?;
        let link = link.try_into().map_err(|_| DataplaneError::Missing("link of an attached program"))?;
        let link = if self.pins.exists() { pin_link(link, &pin)? } else { link };
        self.held.insert(pin, attachment(link));
        self.repaired += u32::from(was_held);
        Ok(())
    }
}

/// The program of a mode, known to the kernel.
pub(super) fn loaded(ebpf: &mut Ebpf, mode: XdpMode) -> Result<&mut Xdp, DataplaneError> {
    let name = mode.program();
    let program = ebpf.program_mut(name).ok_or(DataplaneError::Missing(name))?;
    let refused = |call| move |source| DataplaneError::Program { call, program: name, source };
    let program: &mut Xdp = program.try_into().map_err(refused("use"))?;
    match program.load() {
        Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(program),
        Err(error) => Err(refused("load")(error)),
    }
}

/// Whether another program is attached, in this mode or the other.
fn is_taken(error: &ProgramError) -> bool {
    matches!(errno(error), Some(EBUSY | EEXIST))
}

/// The mode is in the name, since a link can't be asked for it.
pub(super) fn pin_name(mode: XdpMode) -> String {
    format!("{PIN}-{}", mode.label())
}

/// Puts the program into a link. [`None`] where the link is detached, or none of XDP.
fn swap(program: &mut Xdp, link: FdLink, pin: &std::path::Path) -> Option<FdLink> {
    let link = XdpLink::try_from(link).ok()?;
    match program.attach_to_link(link) {
        Ok(id) => program.take_link(id).ok()?.try_into().ok(),
        Err(error) => {
            debug!("the link {} can't be used any more: {error}", pin.display());
            None
        }
    }
}
