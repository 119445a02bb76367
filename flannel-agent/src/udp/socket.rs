//! The tunnel's sockets: several messages with a call, several datagrams in a message.

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    os::fd::AsRawFd as _,
    ptr,
};

use nix::{
    libc,
    sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrIn, bind, setsockopt, socket,
        sockopt::{RcvBufForce, ReusePort, SndBufForce, UdpGroSegment},
    },
};

use super::{
    Event, UdpError,
    batch::{Batch, Message, Piece},
    counters::Counters,
    vnet,
};

/// Of each socket, in bytes: what arrives while its thread waits for a CPU.
const RECEIVE_BUFFER: usize = 8 << 20;
const SEND_BUFFER: usize = 4 << 20;
/// Messages that are received with one call.
const MESSAGES: usize = 8;
/// Bytes of a message at most, which may be several datagrams.
const MESSAGE_LEN: usize = 65_535;

/// A socket for each queue, on one port: the kernel gives each peer's datagrams to one of them (`SO_REUSEPORT`, socket(7)).
///
/// # Errors
/// [`UdpError`] where the port is taken, above all.
pub(super) fn bind_all(address: SocketAddrV4, count: usize) -> Result<Vec<UdpSocket>, UdpError> {
    let failed = |error: io::Error| UdpError::bind(address, error);
    // The first does not share the port: with another's sockets, whoever they are, it would only get some of the datagrams.
    let first = UdpSocket::bind(address).map_err(failed)?;
    let mut sockets = vec![first];
    for _ in 1..count {
        // Only now, that the port is ours; the kernel asks for this when another is bound (`udp_lib_lport_inuse`).
        setsockopt(&sockets[0], ReusePort, &true).map_err(|error| failed(error.into()))?;
        let next = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None);
        let next = next.map_err(|error| failed(error.into()))?;
        setsockopt(&next, ReusePort, &true).map_err(|error| failed(error.into()))?;
        bind(next.as_raw_fd(), &SockaddrIn::from(address)).map_err(|error| failed(error.into()))?;
        sockets.push(next.into());
    }
    for socket in &sockets {
        // Each only makes it faster. The first is since 5.0; the others need CAP_NET_ADMIN.
        let _plain = setsockopt(socket, UdpGroSegment, &true);
        let _smaller = setsockopt(socket, RcvBufForce, &RECEIVE_BUFFER);
        let _smaller = setsockopt(socket, SndBufForce, &SEND_BUFFER);
    }
    Ok(sockets)
}

/// A control message with one number, as `CMSG_LEN` and `CMSG_DATA` lay it out.
#[repr(C)]
#[derive(Clone, Copy)]
struct Control<T> {
    header: libc::cmsghdr,
    value: T,
}

impl<T> Control<T> {
    fn new(kind: libc::c_int, value: T) -> Self {
        // SAFETY: all zeros are a value of this C structure.
        let mut header: libc::cmsghdr = unsafe { std::mem::zeroed() };
        header.cmsg_len = (size_of::<libc::cmsghdr>() + size_of::<T>()) as _;
        header.cmsg_level = libc::SOL_UDP;
        header.cmsg_type = kind;
        Self { header, value }
    }
}

fn name(address: SocketAddrV4) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: address.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address.ip().octets()) },
        sin_zero: [0; 8],
    }
}

fn message(name: &mut libc::sockaddr_in, pieces: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all zeros are a value of this C structure.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_name = ptr::from_mut(name).cast();
    header.msg_namelen = size_of::<libc::sockaddr_in>() as libc::socklen_t;
    header.msg_iov = pieces.as_mut_ptr();
    header.msg_iovlen = pieces.len() as _;
    header
}

/// Has a control message go with a message, or come with it.
fn set_control<T>(message: &mut libc::msghdr, control: &mut Control<T>) {
    message.msg_control = ptr::from_mut(control).cast();
    message.msg_controllen = size_of::<Control<T>>() as _;
}

/// Sends batches to one port of the peers.
pub(super) struct Sender<'a> {
    pub(super) socket: &'a UdpSocket,
    pub(super) port: u16,
}

impl Sender<'_> {
    /// Sends all, of packets as they were read from the device, and counts them.
    pub(super) fn send(&self, batch: &Batch, packets: &[Box<[u8]>], counters: &Counters) {
        let mut pieces: Vec<libc::iovec> = batch
            .pieces
            .iter()
            .map(|piece| match piece {
                Piece::Header(range) => &batch.headers[range.clone()],
                // Behind the kernel's own header.
                Piece::Packet(number, range) => &packets[*number][vnet::LEN..][range.clone()],
            })
            .map(|bytes| libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() })
            .collect();
        let mut names: Vec<_> =
            batch.messages.iter().map(|message| name(SocketAddrV4::new(message.host, self.port))).collect();
        let lens = batch.messages.iter().map(|message| message.datagram_len as u16);
        let mut controls: Vec<_> = lens.map(|len| Control::new(libc::UDP_SEGMENT, len)).collect();
        let mut rest = &mut pieces[..];
        let mut headers: Vec<_> = Vec::with_capacity(batch.messages.len());
        for ((of, name), control) in batch.messages.iter().zip(&mut names).zip(&mut controls) {
            let own = rest.split_off_mut(..of.pieces.len()).unwrap_or_default();
            let mut header = message(name, own);
            if of.datagrams > 1 {
                set_control(&mut header, control);
            }
            headers.push(libc::mmsghdr { msg_hdr: header, msg_len: 0 });
        }
        let mut sent = 0;
        while sent < headers.len() {
            match self.send_messages(&mut headers[sent..]) {
                Ok(count) => {
                    let datagrams: usize =
                        batch.messages[sent..][..count].iter().map(|message| message.datagrams).sum();
                    counters.add(Event::Sent, datagrams as u64);
                    sent += count;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    // The first one's.
                    self.send_apart(&headers[sent].msg_hdr, &batch.messages[sent], counters);
                    sent += 1;
                }
            }
        }
    }

    fn send_messages(&self, headers: &mut [libc::mmsghdr]) -> io::Result<usize> {
        // SAFETY: each header points to a name, pieces and a control message with their true lengths, all of which live in
        // [`Sender::send`] until it returns; the kernel only reads them.
        let sent =
            unsafe { libc::sendmmsg(self.socket.as_raw_fd(), headers.as_mut_ptr(), headers.len() as libc::c_uint, 0) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    /// Sends the datagrams of a message one by one: not every device and path takes them together (too narrow a path, which
    /// the kernel makes fragments for; no checksums by the device).
    fn send_apart(&self, whole: &libc::msghdr, of: &Message, counters: &Counters) {
        if of.datagrams == 1 {
            return counters.add(Event::SendFailed, 1);
        }
        // SAFETY: the header's pieces are the message's own, of [`Sender::send`].
        let mut rest = unsafe { std::slice::from_raw_parts_mut(whole.msg_iov, of.pieces.len()) };
        while !rest.is_empty() {
            let mut len = 0;
            let count = rest.iter().take_while(|piece| {
                let is_this = len < of.datagram_len;
                len += piece.iov_len;
                is_this
            });
            let own = rest.split_off_mut(..count.count()).unwrap_or_default();
            let mut header = *whole;
            header.msg_iov = own.as_mut_ptr();
            header.msg_iovlen = own.len() as _;
            (header.msg_control, header.msg_controllen) = (ptr::null_mut(), 0);
            let mut message = [libc::mmsghdr { msg_hdr: header, msg_len: 0 }];
            let sent = loop {
                match self.send_messages(&mut message) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    sent => break sent,
                }
            };
            counters.add(if sent.is_ok() { Event::Sent } else { Event::SendFailed }, 1);
        }
    }
}

/// A message that has arrived: datagrams from one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Arrived {
    pub(super) host: Ipv4Addr,
    /// Bytes of all.
    pub(super) len: usize,
    /// Bytes of each but the last.
    pub(super) datagram_len: usize,
}

/// Where messages arrive.
pub(super) struct Receiver {
    pub(super) buffers: Vec<Box<[u8]>>,
}

impl Receiver {
    pub(super) fn new() -> Self {
        Self { buffers: (0..MESSAGES).map(|_| vec![0; MESSAGE_LEN].into_boxed_slice()).collect() }
    }

    /// What has arrived already, each in its buffer; nothing where nothing has.
    ///
    /// # Errors
    /// Where the socket has failed.
    pub(super) fn receive(&mut self, socket: &UdpSocket) -> io::Result<Vec<Arrived>> {
        let mut pieces: Vec<_> = self
            .buffers
            .iter_mut()
            .map(|buffer| libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() })
            .collect();
        let mut names = [name(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0)); MESSAGES];
        let mut controls = [Control::new(0, 0 as libc::c_int); MESSAGES];
        let mut headers: Vec<_> = Vec::with_capacity(MESSAGES);
        for ((piece, name), control) in pieces.chunks_mut(1).zip(&mut names).zip(&mut controls) {
            let mut header = message(name, piece);
            set_control(&mut header, control);
            headers.push(libc::mmsghdr { msg_hdr: header, msg_len: 0 });
        }
        // SAFETY: each header points to a name, a buffer and room for a control message with their true lengths, all of which
        // live until the call returns, and which nothing else refers to meanwhile.
        let received = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                headers.len() as libc::c_uint,
                libc::MSG_DONTWAIT,
                ptr::null_mut(),
            )
        };
        let Ok(received) = usize::try_from(received) else {
            return match io::Error::last_os_error() {
                error if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    Ok(Vec::new())
                }
                error => Err(error),
            };
        };
        let received = headers.iter().zip(&names).zip(&controls).take(received);
        Ok(received.map(|((header, name), control)| arrived(header, name, control)).collect())
    }
}

fn arrived(header: &libc::mmsghdr, name: &libc::sockaddr_in, control: &Control<libc::c_int>) -> Arrived {
    let len = header.msg_len as usize;
    // Of another type with musl.
    let control_len: usize = header.msg_hdr.msg_controllen as _;
    let has_len = control_len >= size_of::<libc::cmsghdr>() + size_of::<libc::c_int>()
        && (control.header.cmsg_level, control.header.cmsg_type) == (libc::SOL_UDP, libc::UDP_GRO);
    let datagram_len = usize::try_from(control.value).ok().filter(|len| has_len && *len > 0).unwrap_or(len);
    Arrived { host: Ipv4Addr::from(name.sin_addr.s_addr.to_ne_bytes()), len, datagram_len }
}
