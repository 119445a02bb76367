//! The end of connections, as ctnetlink tells of it to who listens (`NFNLGRP_CONNTRACK_DESTROY`).
//!
//! The socket here has a filter of the dataplane's, which forgets the connection's flows in the moment in which the kernel
//! tells of it. Who reads the socket learns no more than that something has ended.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket},
};
use tokio::io::unix::AsyncFd;

/// `nf_conntrack_events` (Documentation/networking/nf_conntrack-sysctl.rst): 0 for no events; 1 for those of all connections;
/// 2, the default, for those of connections that began while somebody listened.
const EVENTS: &str = "/proc/sys/net/netfilter/nf_conntrack_events";
/// Is there wherever conntrack is.
const CONNTRACK: &str = "/proc/sys/net/netfilter/nf_conntrack_max";

/// As a bit: `1 << (NFNLGRP_CONNTRACK_DESTROY - 1)` (include/uapi/linux/netfilter/nfnetlink.h).
const DESTROY: u32 = 1 << 2;

/// No events can be had.
#[derive(Debug, thiserror::Error)]
#[error("{call} for conntrack's events: {source}")]
pub struct EventsError {
    /// What was tried.
    call: &'static str,
    /// Why not.
    source: io::Error,
}

/// What the kernel had to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// That connections have ended.
    Ended,
    /// More than there was memory for: any connection may have ended.
    Lost,
}

/// A socket for the ends of connections in the network namespace that it was opened in.
pub struct Events {
    socket: AsyncFd<OwnedFd>,
}

impl Events {
    /// Opens it; it hears nothing yet.
    ///
    /// # Errors
    /// [`EventsError`].
    pub fn open() -> Result<Self, EventsError> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let family = AddressFamily::Netlink;
        let socket = socket(family, SockType::Raw, flags, SockProtocol::NetlinkNetFilter);
        let socket = socket.map_err(failed("open a netlink socket"))?;
        // SAFETY: the descriptor is the socket's own, which stays open as long as what it is registered with.
        let socket = unsafe { AsyncFd::register(socket) };
        let failed = |source| EventsError { call: "watch a netlink socket", source };
        Ok(Self { socket: socket.map_err(|error| failed(error.into()))? })
    }

    /// Hears of ends from now on. (Here the kernel loads ctnetlink where it is a module, and conntrack with it: the events
    /// are there when conntrack is.)
    ///
    /// # Errors
    /// [`EventsError`].
    pub fn join(&self) -> Result<(), EventsError> {
        bind(self.socket.as_raw_fd(), &NetlinkAddr::new(0, DESTROY)).map_err(failed("join the group"))
    }

    /// Waits until connections have ended, and takes all that there is to read.
    pub async fn told(&self) -> Told {
        /// Enough to see that there was one; the rest of it is let go.
        const SOME: usize = 16;
        loop {
            // Fails where the runtime ends.
            let Ok(mut ready) = self.socket.readable().await else { return Told::Lost };
            let mut told = None;
            loop {
                match recv(self.socket.as_raw_fd(), &mut [0; SOME], MsgFlags::empty()) {
                    Ok(_) => told = told.or(Some(Told::Ended)),
                    Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN) => {
                        ready.clear_ready();
                        break;
                    }
                    // The kernel had no memory for a message, or this socket no room (ENOBUFS).
                    Err(_) => told = Some(Told::Lost),
                }
            }
            if let Some(told) = told {
                return told;
            }
        }
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.get_ref().as_fd()
    }
}

/// Why conntrack tells of no ends, where it is loaded; or of some only.
pub fn problem() -> Option<String> {
    if !Path::new(CONNTRACK).exists() {
        return None;
    }
    const SO: &str = "the bypass sees a connection's end only within the time of --bypass-revalidate";
    match fs::read_to_string(EVENTS).as_deref().map(str::trim) {
        Ok("0") => Some(format!("nf_conntrack_events is 0: {SO}; set it to 2 (or 1)")),
        Ok(_) if !has_ctnetlink() => Some(format!("this kernel has no ctnetlink (nf_conntrack_netlink): {SO}")),
        Ok(_) => None,
        Err(_) => Some(format!("this kernel has conntrack without events (CONFIG_NF_CONNTRACK_EVENTS): {SO}")),
    }
}

/// Whether the kernel answers a request of ctnetlink's, the cheapest (`IPCTNL_MSG_CT_GET_STATS`). Where that is a module, and
/// can be had, it is loaded for it.
fn has_ctnetlink() -> bool {
    /// `struct nlmsghdr` (`NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET_STATS`, `NLM_F_REQUEST`) and `struct nfgenmsg`.
    const LEN: u32 = 20;
    const TYPE: u16 = 1 << 8 | 5;
    const REQUEST: u16 = 1;
    const ERROR: u16 = 2;
    let [l0, l1, l2, l3] = LEN.to_ne_bytes();
    let ([t0, t1], [f0, f1]) = (TYPE.to_ne_bytes(), REQUEST.to_ne_bytes());
    let request = [l0, l1, l2, l3, t0, t1, f0, f1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut answer = [0; 20];
    let mut ask = || {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter)?;
        send(socket.as_raw_fd(), &request, MsgFlags::empty())?;
        // The kernel answers before `send` returns.
        recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())
    };
    // Who can't ask does not know.
    if !matches!(ask(), Ok(20..)) {
        return true;
    }
    let [.., e0, e1, e2, e3] = answer;
    let is_error = answer[4..6] == ERROR.to_ne_bytes();
    // `nfnetlink_rcv_msg`, of a subsystem that is not there.
    !(is_error && i32::from_ne_bytes([e0, e1, e2, e3]) == -(Errno::EINVAL as i32))
}

fn failed(call: &'static str) -> impl FnOnce(Errno) -> EventsError {
    move |errno| EventsError { call, source: errno.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_that_the_kernel_takes() {
        assert!(has_ctnetlink());
    }
}
