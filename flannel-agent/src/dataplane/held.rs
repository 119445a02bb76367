//! What this process has attached. It holds the links beside their pins, so that programs stay where they are when the
//! pins go: when the bpf file system is unmounted.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use aya::programs::links::FdLink;
use nix::net::if_::if_indextoname;

use super::{Dataplane, DataplaneError, Hook, XdpMode, attach::pin_link, pins::failed, restrict::Variant};

/// An attachment by the name of its pin.
pub(super) type Held = BTreeMap<PathBuf, Attachment>;

/// One program on one hook of one device.
pub(super) struct Attachment {
    pub(super) place: Place,
    /// Of the program.
    pub(super) variant: Variant,
    pub(super) ifindex: u32,
    /// [`None`] for a filter, which has neither link nor pin.
    pub(super) link: Option<FdLink>,
}

/// Where a program is.
#[derive(Clone, Copy)]
pub(super) enum Place {
    Tc(Hook),
    Xdp(XdpMode),
}

impl Dataplane {
    /// Attaches again what somebody has detached from a device that is still there, and pins again what is no longer
    /// pinned. How much of each; the attachments count also those that [`attach`](Self::attach) found.
    ///
    /// # Errors
    /// [`DataplaneError`] of the first that failed; the others are as they should be.
    pub fn repair(&mut self) -> Result<Repaired, DataplaneError> {
        let attached = self.repair_attachments();
        let pins = self.repair_pins();
        attached?;
        Ok(Repaired { programs: std::mem::take(&mut self.repaired), pins: pins? })
    }

    /// Takes over from the dataplane before this one the plan, the links of the underlay, what it has attached without a pin, by
    /// which it would be found,
    /// and who hears of flows that end.
    pub fn succeed(&mut self, before: Self) {
        (self.plan, self.underlay) = (before.plan, before.underlay);
        self.held.extend(before.held.into_iter().filter(|(_, attachment)| attachment.link.is_none()));
        self.forgetter.succeed(&before.forgetter);
    }

    fn repair_attachments(&mut self) -> Result<(), DataplaneError> {
        let all: Vec<_> = self.held.values().map(|attachment| (attachment.place, attachment.ifindex)).collect();
        let mut result = Ok(());
        for (place, ifindex) in all {
            result = result.and(self.attach_again(place, ifindex));
        }
        result
    }

    /// Puts what the plan wants into a place where this process has put something.
    pub(super) fn attach_again(&mut self, place: Place, ifindex: u32) -> Result<(), DataplaneError> {
        // A device that is gone took its programs with it.
        let Ok(name) = if_indextoname(ifindex) else { return Ok(()) };
        match place {
            Place::Tc(hook) => self.attach(hook, &name.to_string_lossy(), ifindex),
            Place::Xdp(mode) => self.set_xdp(Some(mode), ifindex),
        }
    }

    /// Pins what is no longer pinned: somebody removed it, or the file system that it was on.
    pub(super) fn repair_pins(&mut self) -> Result<u32, DataplaneError> {
        let Self { pins, maps, held, .. } = self;
        let maps: Vec<_> = maps.iter().filter(|(name, _)| !pins.map(name).exists()).collect();
        let is_unpinned = |pin: &Path, attachment: &Attachment| attachment.link.is_some() && !pin.exists();
        let links: Vec<_> =
            held.iter().filter(|(pin, held)| is_unpinned(pin, held)).map(|(pin, _)| pin.clone()).collect();
        if maps.is_empty() && links.is_empty() {
            return Ok(0);
        }
        pins.create()?;
        let mut count = 0;
        // Maps first: pinning a link that can't be pinned costs the link, so the directory is tried with what stays.
        for (name, map) in maps {
            let path = pins.map(name);
            map.pin(&path).map_err(|error| failed("pin", &path)(std::io::Error::other(error)))?;
            count += 1;
        }
        for pin in links {
            if let Some(Attachment { place, variant, ifindex, link: Some(link) }) = held.remove(&pin) {
                let link = Some(pin_link(link, &pin)?);
                held.insert(pin, Attachment { place, variant, ifindex, link });
                count += 1;
            }
        }
        Ok(count)
    }
}

/// How much was repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repaired {
    /// Programs that were attached again.
    pub programs: u32,
    /// Maps and links that were pinned again.
    pub pins: u32,
}
