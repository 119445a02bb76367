//! A packet socket on a link (packet(7)).

use std::{
    io::IoSliceMut,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{
        AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockType, recvmsg, setsockopt, socket,
        sockopt::{RcvBuf, RcvBufForce, ReceiveTimestampns},
    },
    time::{ClockId, clock_gettime},
};

use super::{CaptureError, frame::Part, socket_filter::Wanted};
use crate::device::Link;

/// For what comes while the file is written, with what the kernel takes for each packet (its `truesize`).
const SOCKET_BUFFER: usize = 32 << 20;
/// Of `cmsg` headers and a `timespec`.
const CONTROL_LEN: usize = 64;

/// Which way a frame went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Received,
    Sent,
}

/// A frame as the kernel copied it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame<'a> {
    pub(super) part: Part<'a>,
    /// Since 1970.
    pub(super) time: Duration,
    pub(super) direction: Direction,
}

/// What a tap was given and what it missed, in packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Statistics {
    /// Those that the filter accepted.
    pub(super) accepted: u64,
    /// Those of them that the socket had no room for.
    pub(super) dropped: u64,
}

/// A packet socket that is given what the filter accepts of one link, as it is on the wire.
pub(super) struct Tap {
    pub(super) link: Link,
    socket: OwnedFd,
    /// When it was counted last.
    counted: Statistics,
    received: u64,
}

impl Tap {
    /// Opens it; from now on frames are kept for it. It is not in promiscuous mode.
    pub(super) fn open(link: &Link, wanted: &Wanted) -> Result<Self, CaptureError> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        // For no protocol, until it is bound: else it would be given frames of all links, past the filter.
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None).map_err(|error| match error {
            Errno::EPERM | Errno::EACCES => CaptureError::Privilege,
            error => CaptureError::call("open a packet socket for", link)(error),
        })?;
        let tap = Self { link: link.clone(), socket, counted: Statistics::default(), received: 0 };
        let mut program = wanted.program();
        let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        tap.set(libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
            .map_err(CaptureError::call("filter the packets of", link))?;
        setsockopt(&tap.socket, ReceiveTimestampns, &true)
            .map_err(CaptureError::call("ask for the times of packets of", link))?;
        // Past the limit of net.core.rmem_max only CAP_NET_ADMIN may.
        setsockopt(&tap.socket, RcvBufForce, &SOCKET_BUFFER)
            .or_else(|_| setsockopt(&tap.socket, RcvBuf, &SOCKET_BUFFER))
            .map_err(CaptureError::call("make room for packets of", link))?;
        tap.bind().map_err(CaptureError::call("capture on", link))?;
        Ok(tap)
    }

    fn set<T>(&self, level: i32, option: i32, value: &T) -> Result<(), Errno> {
        let (pointer, len) = ((&raw const *value).cast(), size_of::<T>() as libc::socklen_t);
        // SAFETY: the pointer is to a value of the size given, which the kernel reads, and so is what that points to: of the only
        // such type, `sock_fprog`, instructions that outlive the call.
        let result = unsafe { libc::setsockopt(self.socket.as_raw_fd(), level, option, pointer, len) };
        Errno::result(result).map(drop)
    }

    fn bind(&self) -> Result<(), Errno> {
        // SAFETY: of integers and byte arrays, for which zeros are valid.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        // Sockets for one protocol are given no frames that this host sends (`dev_queue_xmit_nit`, net/core/dev.c).
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = i32::try_from(self.link.index).map_err(|_| Errno::ENODEV)?;
        let len = size_of_val(&address) as libc::socklen_t;
        // SAFETY: the kernel reads an address of this size, which outlives the call.
        let result = unsafe { libc::bind(self.socket.as_raw_fd(), (&raw const address).cast(), len) };
        Errno::result(result).map(drop)
    }

    /// The next frame that waits, cut off where the buffer ends. [`None`] where none does.
    pub(super) fn receive<'a>(&mut self, buffer: &'a mut [u8]) -> Result<Option<Frame<'a>>, CaptureError> {
        let mut control = [0; CONTROL_LEN];
        let (len, sent, time) = loop {
            let mut parts = [IoSliceMut::new(buffer)];
            // MSG_TRUNC: how long the frame is, and not only how much of it was copied.
            let flags = MsgFlags::MSG_TRUNC;
            let message = match recvmsg::<LinkAddr>(self.socket.as_raw_fd(), &mut parts, Some(&mut control), flags) {
                Ok(message) => message,
                Err(Errno::EAGAIN) => return Ok(None),
                // The link went down, once; it may come up again.
                Err(Errno::ENETDOWN | Errno::EINTR) => continue,
                Err(error) => return Err(CaptureError::call("receive packets of", &self.link)(error)),
            };
            let sent = message.address.is_some_and(|address| address.pkttype() == libc::PACKET_OUTGOING);
            let time = message.cmsgs().into_iter().flatten().find_map(|message| match message {
                ControlMessageOwned::ScmTimestampns(time) => Some(Duration::from(time)),
                _ => None,
            });
            break (message.bytes, sent, time);
        };
        self.received += 1;
        let direction = if sent { Direction::Sent } else { Direction::Received };
        let bytes = &buffer[..len.min(buffer.len())];
        Ok(Some(Frame { part: Part { bytes, len }, time: time.unwrap_or_else(now), direction }))
    }

    /// What it was given so far.
    pub(super) fn statistics(&mut self) -> Result<Statistics, CaptureError> {
        // SAFETY: of integers, for which zeros are valid.
        let mut counted: libc::tpacket_stats = unsafe { std::mem::zeroed() };
        let mut len = size_of_val(&counted) as libc::socklen_t;
        // SAFETY: the kernel writes at most as many octets as are told it.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut counted).cast(),
                &raw mut len,
            )
        };
        Errno::result(result).map_err(CaptureError::call("count the packets of", &self.link))?;
        // The kernel's counters begin anew with each look (`packet_getsockopt`, net/packet/af_packet.c).
        self.counted.accepted += u64::from(counted.tp_packets);
        self.counted.dropped += u64::from(counted.tp_drops);
        Ok(self.counted)
    }

    /// How many frames wait.
    pub(super) fn waiting(&mut self) -> Result<u64, CaptureError> {
        let Statistics { accepted, dropped } = self.statistics()?;
        Ok(accepted.saturating_sub(dropped + self.received))
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Of the clock that packets are stamped by.
pub(super) fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_REALTIME).map(Duration::from).unwrap_or_default()
}
