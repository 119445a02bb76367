//! What the kernel tells of changes, read message by message as it lies in a datagram: of routes there may be hundreds of
//! thousands, and the crate's types know no queueing disciplines of others.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
};

use nix::sys::socket::{AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, socket};
use rtnetlink::sys::{AsyncSocket as _, AsyncSocketExt as _, TokioSocket, protocols::NETLINK_ROUTE};
use tokio::sync::mpsc;
use tracing::warn;

use super::{
    DeviceEvent,
    raw::{DATAGRAM_LEN, messages},
};

/// For bursts of changes; more are said to have been too many.
const BUFFER_LEN: usize = 1 << 20;

/// A socket for the changes of links in the network namespace that it was opened in, which nobody reads: a filter of the
/// dataplane's sees what comes to it.
pub struct LinkSocket(OwnedFd);

impl LinkSocket {
    /// Opens it; nothing comes yet.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        Ok(Self(socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?))
    }

    /// Has all changes come from now on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn join(&self) -> io::Result<()> {
        /// As a bit: `1 << (RTNLGRP_LINK - 1)`.
        const LINK: u32 = 1;
        Ok(bind(self.0.as_raw_fd(), &NetlinkAddr::new(0, LINK))?)
    }
}

impl AsFd for LinkSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A socket that hears of one kind of changes. Each kind has its own: a burst of one takes no room from another.
pub(super) struct RawEvents {
    socket: TokioSocket,
    what: &'static str,
}

impl RawEvents {
    /// Joins a group (`RTNLGRP_`, linux/rtnetlink.h).
    pub(super) fn listen(what: &'static str, group: u32) -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
        socket.socket_mut().bind_auto()?;
        socket.socket_ref().set_rx_buf_sz(BUFFER_LEN as nix::libc::c_int)?;
        socket.socket_mut().add_membership(group)?;
        Ok(Self { socket, what })
    }

    /// Tells what `event` makes of each message, of its type and payload; `lost` where the kernel had more to say than the socket
    /// holds.
    pub(super) async fn tell(
        self,
        events: mpsc::Sender<DeviceEvent>,
        lost: DeviceEvent,
        event: impl Fn(u16, &[u8]) -> Option<DeviceEvent> + Send,
    ) {
        let mut datagram = Vec::with_capacity(DATAGRAM_LEN);
        loop {
            datagram.clear();
            let told = match self.socket.recv(&mut datagram).await {
                Ok(_) => None,
                Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => Some(lost),
                Err(error) => {
                    warn!("changes of {} are no longer heard of, only looked for: {error}", self.what);
                    return;
                }
            };
            let of_messages = messages(&datagram).filter_map(|(kind, _, payload)| event(kind, payload));
            for event in told.into_iter().chain(of_messages) {
                // Where the queue is full, the periodic comparison makes up for it.
                let _full = events.try_send(event);
            }
        }
    }
}
