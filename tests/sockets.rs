//! Sockets within a lab's namespaces, and bytes that tell where they belong.

use std::{
    io::ErrorKind,
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
};

use nix::sys::{
    socket::{
        AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, setsockopt, socket,
        sockopt::{ReuseAddr, SendTimeout},
    },
    time::TimeVal,
};
use xtask::{lab::Netns, progress::wait_for};

use crate::world::SOON;

/// Makes something in a namespace. A socket stays in the one that it was made in.
pub fn within<T: Send>(netns: &Netns, make: impl FnOnce() -> T + Send) -> T {
    netns.within(make).unwrap()
}

/// A UDP socket of a namespace. A program that another test has just started may hold the one before on that port, until
/// it has begun (close-on-exec).
pub fn socket_in(netns: &Netns, address: SocketAddrV4) -> UdpSocket {
    let mut socket = None;
    let bound = wait_for("the port", SOON, || {
        socket = within(netns, move || match UdpSocket::bind(address) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => None,
            result => Some(result.unwrap()),
        });
        socket.is_some()
    });
    bound.unwrap();
    socket.unwrap()
}

/// A TCP socket of a namespace that listens.
pub fn listener_in(netns: &Netns, address: Ipv4Addr, port: u16) -> TcpListener {
    within(netns, move || TcpListener::bind((address, port)).unwrap())
}

/// A connection from a namespace to an address that leads to the listener, whatever the address: the client's end, and
/// the server's. What is written leaves at once, and nothing waits for ever.
pub fn connection(client: &Netns, address: SocketAddrV4, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let one = within(client, move || TcpStream::connect_timeout(&address.into(), SOON).unwrap());
    let (two, _) = listener.accept().unwrap();
    for stream in [&one, &two] {
        set_prompt(stream);
    }
    (one, two)
}

/// Has what is written leave at once, and nothing wait for ever.
pub fn set_prompt(stream: &TcpStream) {
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.set_write_timeout(Some(SOON)).unwrap();
}

/// A connection from a port of a namespace, 0 for any. Others may have the same one, if they lead elsewhere.
pub fn connection_from(client: &Netns, port: u16, address: SocketAddrV4) -> TcpStream {
    let stream = within(client, move || {
        let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        setsockopt(&socket, ReuseAddr, &true).unwrap();
        // For how long it tries, too.
        setsockopt(&socket, SendTimeout, &TimeVal::new(SOON.as_secs() as i64, 0)).unwrap();
        let from = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port);
        bind(socket.as_raw_fd(), &SockaddrIn::from(from)).unwrap();
        connect(socket.as_raw_fd(), &SockaddrIn::from(address)).unwrap();
        TcpStream::from(socket)
    });
    set_prompt(&stream);
    stream
}

/// An endless row of bytes in which each place looks different from all that a lost, doubled or misplaced segment could
/// put there.
pub struct Pattern(Vec<u8>);

impl Pattern {
    /// A prime: no number of segments, pages or buffers makes one period.
    const PERIOD: usize = 65_521;
    /// What can be asked for at once.
    pub const LARGEST: usize = 65_536;

    pub fn new() -> Self {
        // Numerical Recipes' generator; its upper bits are good enough, and the same in each run.
        let mut state = 1u32;
        let mut period: Vec<u8> = (0..Self::PERIOD)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .collect();
        period.extend_from_within(..);
        period.extend_from_within(..Self::LARGEST - Self::PERIOD);
        Self(period)
    }

    /// The bytes from a place on.
    pub fn at(&self, place: usize, len: usize) -> &[u8] {
        &self.0[place % Self::PERIOD..][..len]
    }

    /// That these are the bytes from that place on.
    pub fn assert(&self, place: usize, bytes: &[u8], what: impl FnOnce() -> String) {
        let expected = self.at(place, bytes.len());
        if bytes != expected {
            let wrong = bytes.iter().zip(expected).position(|(byte, expected)| byte != expected);
            panic!("{}: wrong from byte {wrong:?} of {} on", what(), bytes.len());
        }
    }
}
