//! Programs of others beside ours, at TCX hooks. The kernel tells of none that comes or goes.

use std::{collections::HashSet, fs, io, path::PathBuf};

use aya::programs::links::{FdLink, PinnedLink};
use nix::libc;

use super::{Dataplane, pins::PinDirectory};
use crate::device::filters::Side;

// include/uapi/linux/bpf.h: `enum bpf_cmd`, `enum bpf_attach_type`.
const PROG_QUERY: i32 = 16;
const TCX_INGRESS: u32 = 46;
const TCX_EGRESS: u32 = 47;

/// More at one hook are some of others in any case.
const MOST: usize = 16;

/// `BPF_PROG_QUERY`.
#[repr(C)]
#[derive(Default)]
struct Query {
    ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    padding: u32,
    others: [u64; 4],
}

/// What was found out of programs by their numbers, which the kernel does not use again.
#[derive(Default)]
pub(super) struct Known {
    ours: HashSet<u32>,
    foreign: HashSet<u32>,
}

impl Dataplane {
    /// The programs at the TCX hooks of these devices that are no agent's: where, and their numbers. Another overlay's agent has
    /// its links pinned below the same folder. Devices that are gone have none.
    pub fn foreign_programs(&mut self, devices: impl IntoIterator<Item = u32>) -> Vec<(u32, Side, u32)> {
        let mut found = Vec::new();
        for ifindex in devices {
            for side in [Side::Ingress, Side::Egress] {
                let Ok(programs) = programs(ifindex, side) else { continue };
                let programs = programs.into_iter().filter(|id| self.is_foreign(*id, ifindex));
                found.extend(programs.map(|id| (ifindex, side, id)));
            }
        }
        found
    }

    /// Has what was found foreign be looked at once more: an agent pins a moment after it has attached.
    pub fn doubt_foreign_programs(&mut self) {
        self.known.foreign.clear();
    }

    fn is_foreign(&mut self, id: u32, ifindex: u32) -> bool {
        if !self.known.ours.contains(&id) && !self.known.foreign.contains(&id) {
            let held = self.held.values().filter_map(|attachment| program_id(attachment.link.as_ref()?));
            let pinned = self.pins.links_of_all(ifindex).into_iter().filter_map(|pin| pinned_program(&pin));
            if held.chain(pinned).any(|ours| ours == id) {
                self.known.ours.insert(id);
            } else {
                self.known.foreign.insert(id);
            }
        }
        self.known.foreign.contains(&id)
    }
}

impl PinDirectory {
    /// What may be pinned links of a device, of all overlays.
    fn links_of_all(&self, ifindex: u32) -> Vec<PathBuf> {
        let suffix = format!("-{ifindex}");
        let overlays = fs::read_dir(self.root()).into_iter().flatten().flatten();
        let entries = overlays.flat_map(|overlay| fs::read_dir(overlay.path()).into_iter().flatten().flatten());
        entries
            .filter(|entry| entry.file_name().to_string_lossy().ends_with(&suffix))
            .map(|entry| entry.path())
            .collect()
    }
}

/// Whether programs are at the TCX hooks of a device. `false` on kernels without TCX.
pub fn has_programs(ifindex: u32) -> bool {
    [Side::Ingress, Side::Egress].into_iter().any(|side| programs(ifindex, side).is_ok_and(|ids| !ids.is_empty()))
}

/// The numbers of the programs at a TCX hook of a device, no more than [`MOST`]. To be told more of them, a process needs
/// CAP_SYS_ADMIN (kernel/bpf/syscall.c, `bpf_prog_get_fd_by_id`).
///
/// # Errors
/// EINVAL on kernels without TCX.
pub(super) fn programs(ifindex: u32, side: Side) -> io::Result<Vec<u32>> {
    let attach_type = match side {
        Side::Ingress => TCX_INGRESS,
        Side::Egress => TCX_EGRESS,
    };
    let mut programs = [0; MOST];
    let count = query(ifindex, attach_type, &mut programs)?;
    Ok(programs[..count].to_vec())
}

fn pinned_program(pin: &PathBuf) -> Option<u32> {
    program_id(&FdLink::from(PinnedLink::from_pin(pin).ok()?))
}

fn program_id(link: &FdLink) -> Option<u32> {
    Some(link.info().ok()?.program_id())
}

/// The numbers of the programs there; how many.
fn query(ifindex: u32, attach_type: u32, programs: &mut [u32; MOST]) -> io::Result<usize> {
    let mut query =
        Query { ifindex, attach_type, programs: programs.as_mut_ptr() as u64, count: MOST as u32, ..Query::default() };
    // SAFETY: the kernel reads and writes a structure of this size, and writes at most as many numbers as it says that there is
    // room for.
    let result = unsafe { libc::syscall(libc::SYS_bpf, PROG_QUERY, &raw mut query, size_of::<Query>()) };
    if result < 0 {
        let error = io::Error::last_os_error();
        // What fits is there.
        return if error.raw_os_error() == Some(libc::ENOSPC) { Ok(MOST) } else { Err(error) };
    }
    Ok(usize::try_from(query.count).unwrap_or(MOST).min(MOST))
}
