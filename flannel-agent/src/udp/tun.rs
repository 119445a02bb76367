//! The TUN device's queues (Documentation/networking/tuntap.rst of the kernel).

use std::{
    ffi::{CStr, c_short},
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd as _, RawFd},
        unix::fs::OpenOptionsExt as _,
    },
};

use nix::libc;

use super::{MAX_QUEUES, UdpError};

const PATH: &str = "/dev/net/tun";
/// The kernel puts the first free number in.
const ANY_NAME: &str = "flannel%d";
const FLAGS: i32 = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
/// What the device may leave to us: checksums, and TCP segmentation, also with congestion marks.
const TCP_OFFLOADS: u32 = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO_ECN;
/// And that of UDP, since 6.2; the kernel takes both families or none (`set_offload`, drivers/net/tun.c).
const UDP_OFFLOADS: u32 = libc::TUN_F_USO4 | libc::TUN_F_USO6;

/// A TUN device of ours. Without [`Tun::keep`], it goes with its last queue.
#[derive(Debug)]
pub(super) struct Tun {
    pub(super) name: String,
    pub(super) queues: Vec<File>,
    /// Whether it takes and hands out UDP that is still to be segmented.
    pub(super) segments_udp: bool,
}

impl Tun {
    /// Makes a device with the first free name, or with this one, or opens the one with this name.
    ///
    /// # Errors
    /// [`UdpError`].
    pub(super) fn open(name: Option<&str>, queues: usize) -> Result<Self, UdpError> {
        let wanted = name.unwrap_or(ANY_NAME);
        let first = queue()?;
        let name = attach(&first, wanted).map_err(|error| UdpError::attach(wanted, error))?;
        let mut all = vec![first];
        for _ in 1..queues.clamp(1, MAX_QUEUES) {
            let next = queue()?;
            attach(&next, &name).map_err(|error| UdpError::attach(&name, error))?;
            all.push(next);
        }
        let segments_udp = offload(&all[0], TCP_OFFLOADS | UDP_OFFLOADS).is_ok();
        if !segments_udp {
            offload(&all[0], TCP_OFFLOADS).map_err(|source| UdpError::Call {
                call: "set the offloads of",
                name: name.clone(),
                source,
            })?;
        }
        Ok(Self { name, queues: all, segments_udp })
    }

    /// Has the device stay when its queues are closed.
    ///
    /// # Errors
    /// [`UdpError::Call`].
    pub(super) fn keep(&self) -> Result<(), UdpError> {
        let kept = control(self.queues[0].as_raw_fd(), libc::TUNSETPERSIST, 1);
        kept.map_err(|source| UdpError::Call { call: "keep", name: self.name.clone(), source })
    }
}

fn queue() -> Result<File, UdpError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
    options.open(PATH).map_err(UdpError::NoTun)
}

/// The name of the device that this is a queue of now.
fn attach(queue: &File, name: &str) -> io::Result<String> {
    // SAFETY: all zeros are a value of this C structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = FLAGS as c_short;
    // SAFETY: TUNSETIFF reads and writes a `struct ifreq`, which outlives the call.
    if unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel ends the name with a zero byte, as it was before the call.
    let name = unsafe { CStr::from_ptr(request.ifr_name.as_ptr()) };
    Ok(name.to_string_lossy().into_owned())
}

fn offload(queue: &File, offloads: u32) -> io::Result<()> {
    control(queue.as_raw_fd(), libc::TUNSETOFFLOAD, offloads.into())
}

fn control(queue: RawFd, call: libc::Ioctl, value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: these calls take a number, and touch no memory of ours.
    match unsafe { libc::ioctl(queue, call, value) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
