//! Taking everything away again, in an order by which no packet meets half of it.

use std::{
    fs, io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use flannel_common::vxlan::Vni;
use nix::libc;
use tracing::debug;

use super::{
    DataplaneError, Hook,
    attach::detach_filter,
    pins::{links, remove_pin, versions},
    xdp,
};
use crate::device::vxlan::VxlanDevice;

// include/uapi/linux/bpf.h: `enum bpf_cmd`.
const OBJ_GET: i32 = 7;
const LINK_DETACH: i32 = 34;

/// As [`Hook::ALL`], in the order in which they may go while packets pass: what takes another's word for a packet goes before
/// that one. `from_overlay` drops what `from_underlay` did not let in.
const ORDER: [Hook; 6] =
    [Hook::ToOverlay, Hook::ToUnderlay, Hook::FromOverlay, Hook::FromUnderlay, Hook::FromPod, Hook::ToPod];

/// Detaches the programs of an overlay, from these interfaces also where they are filters, and unpins everything that
/// agents pinned for it, of every layout. What others keep below `root` stays.
///
/// # Errors
/// [`DataplaneError::Pin`].
pub fn remove(root: &Path, vni: Vni, interfaces: &[String]) -> Result<(), DataplaneError> {
    let (overlay, device) = (root.join(vni.to_string()), VxlanDevice::name_of(vni));
    // What XDP takes out of the tunnel needs the program at the hook behind it.
    detach_links(&overlay, xdp::PIN)?;
    for hook in ORDER {
        detach_links(&overlay, hook.program())?;
        // By its side alone a filter does not say which hook's it is. The external interface of the agent that attached them
        // is not known here.
        let is_at_overlay = matches!(hook, Hook::ToOverlay | Hook::FromOverlay);
        let places = interfaces.iter().filter(|interface| (**interface == device) == is_at_overlay);
        places.for_each(|interface| detach_filter(hook, interface, vni));
    }
    versions(&overlay).iter().try_for_each(|version| remove_pin(version))?;
    for directory in [overlay.as_path(), root] {
        // Only where they are empty. The root may be the operator's own, or the mount point.
        let _kept = fs::remove_dir(directory);
    }
    Ok(())
}

/// The numbers of the devices that an overlay's programs were pinned for as `flannel.<VNI>`. None on kernels without TCX,
/// where nothing is pinned.
pub fn overlay_devices(root: &Path, vni: Vni) -> Vec<u32> {
    let links = links(&root.join(vni.to_string()), Hook::FromOverlay.program()).unwrap_or_default();
    links.iter().filter_map(|pin| pin.file_name()?.to_str()?.rsplit('-').next()?.parse().ok()).collect()
}

fn detach_links(overlay: &Path, program: &str) -> Result<(), DataplaneError> {
    for pin in links(overlay, program)? {
        // Without its pin it would go as well, but when a worker of the kernel comes to it (`bpf_link_put`).
        if let Err(error) = detach(&pin) {
            debug!("{} is only unpinned: {error}", pin.display());
        }
        remove_pin(&pin)?;
    }
    Ok(())
}

/// `BPF_OBJ_GET`, as far as it is used.
#[repr(C)]
struct Get {
    path: u64,
    descriptor: u32,
    flags: u32,
}

/// Takes a pinned link's program off its hook, at once.
fn detach(pin: &Path) -> io::Result<()> {
    let path = std::ffi::CString::new(pin.as_os_str().as_bytes())?;
    let get = Get { path: path.as_ptr() as u64, descriptor: 0, flags: 0 };
    // SAFETY: the kernel reads a structure of this size, and from it the path, which ends with a zero; both outlive the call.
    let link = unsafe { libc::syscall(libc::SYS_bpf, OBJ_GET, &raw const get, size_of::<Get>()) };
    let link = i32::try_from(link).ok().filter(|link| *link >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just opened it for this call, and nothing else owns it.
    let link = unsafe { OwnedFd::from_raw_fd(link) };
    let detached = link.as_raw_fd();
    // SAFETY: the kernel reads a descriptor of this size.
    let result = unsafe { libc::syscall(libc::SYS_bpf, LINK_DETACH, &raw const detached, size_of_val(&detached)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_hook_goes_once_and_who_trusts_goes_before_who_is_trusted() {
        let place = |hook| ORDER.iter().position(|other| *other == hook);
        assert!(Hook::ALL.into_iter().all(|hook| ORDER.iter().filter(|other| **other == hook).count() == 1));
        assert!(place(Hook::FromOverlay) < place(Hook::FromUnderlay));
    }
}
