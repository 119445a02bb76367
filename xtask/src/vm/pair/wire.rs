//! What connects the two: a bridge with a tap for each, in a network namespace.
//!
//! A tap hands over what a NIC's driver left to the NIC (a checksum that is still to be computed, a segment of 64 KiB) and
//! takes the same from the other side, as between virtual machines of one host. By qemu's sockets no such thing passes, and a
//! virtio NIC would offer neither.

use std::process::Command;

use anyhow::{Context as _, Result};

use crate::lab::Netns;

/// What the names of its namespaces begin with, before the command's process id.
const NAME: &str = "vm-wire-";

pub(super) struct Wire(Netns);

impl Wire {
    pub(super) fn new() -> Result<Self> {
        anyhow::ensure!(nix::unistd::geteuid().is_root(), "taps between machines need root: run this as root");
        let netns = Netns::create(&format!("{NAME}{}", std::process::id()))?;
        let wire = Self(netns);
        wire.0.ip("link add br0 type bridge").context("make the bridge between the machines")?;
        wire.0.ip("link set br0 up")?;
        for port in [1, 2].map(Self::port) {
            wire.0.ip(&format!("tuntap add dev {port} mode tap vnet_hdr"))?;
            // As long as TCP's largest window: an emulated receiver is slow, and what is lost is to be somebody's fault.
            wire.0.ip(&format!("link set {port} txqueuelen 10000"))?;
            wire.0.ip(&format!("link set {port} master br0 up"))?;
        }
        Ok(wire)
    }

    /// What its taps count.
    pub(super) fn statistics(&self) -> Result<String> {
        self.0.ip("-s link show master br0")
    }

    /// The tap of a machine.
    pub(super) fn port(number: u8) -> String {
        format!("tap{number}")
    }

    /// The same command in its namespace.
    pub(super) fn within(&self, command: &Command) -> Command {
        let mut within = self.0.command(&command.get_program().to_string_lossy());
        within.args(command.get_args());
        within
    }
}

/// Removes those whose command is gone.
pub(super) fn remove_leftovers() -> Result<()> {
    for netns in Netns::list(NAME)? {
        let is_in_use =
            netns.name().strip_prefix(NAME).is_some_and(|pid| std::path::Path::new("/proc").join(pid).exists());
        // A namespace that is dropped is removed.
        if is_in_use {
            std::mem::forget(netns);
        }
    }
    Ok(())
}
