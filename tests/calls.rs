//! Calls of servers in pods, several at once, by TCP and by UDP: each caller must get its own bytes, from whom it asked.

use std::{
    collections::BTreeSet,
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::{
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{setsockopt, sockopt::Linger},
};
use xtask::{
    lab::{Netns, Pod},
    progress::wait_for,
};

use crate::{
    sockets::{Pattern, connection_from, listener_in, set_prompt, socket_in},
    world::SOON,
};

/// The port of servers in their pods.
pub const SERVER_PORT: u16 = 8080;
/// How far the bytes of one caller are from those of the next, so that none passes for another's.
const APART: usize = 4_099;

/// Who calls.
#[derive(Clone, Copy)]
pub struct Caller<'a> {
    pub netns: &'a Netns,
    /// The port that it calls from, 0 for any.
    pub port: u16,
    /// What it asks.
    pub asked: SocketAddrV4,
    /// As whom the server sees it.
    pub seen_as: Ipv4Addr,
}

/// Who answers a caller, and from which port it takes this one to call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Answered {
    /// Its place among the servers.
    pub server: usize,
    pub port: u16,
}

struct Connection {
    client: TcpStream,
    server: TcpStream,
    answered: Answered,
}

/// Connections, made in the order of their callers.
pub struct Connections<'a> {
    what: &'a str,
    connections: Vec<Connection>,
}

impl<'a> Connections<'a> {
    /// Of callers whose addresses lead to any of the servers.
    pub fn new(what: &'a str, servers: &[&Pod], callers: &[Caller<'_>]) -> Self {
        let listener = |server: &&Pod| listener_in(&server.netns, server.address, SERVER_PORT);
        let listeners: Vec<TcpListener> = servers.iter().map(listener).collect();
        let connections = callers.iter().map(|caller| {
            let client = connection_from(caller.netns, caller.port, caller.asked);
            let server = ready(&listeners, what);
            let (stream, from) = listeners[server].accept().unwrap();
            set_prompt(&stream);
            // Only what comes from there belongs to the connection.
            assert_eq!(client.peer_addr().unwrap(), SocketAddr::V4(caller.asked), "{what}");
            assert_eq!(from.ip(), caller.seen_as, "{what}");
            Connection { client, server: stream, answered: Answered { server, port: from.port() } }
        });
        Self { what, connections: connections.collect() }
    }

    /// Who answers each.
    pub fn answered(&self) -> Vec<Answered> {
        self.connections.iter().map(|connection| connection.answered).collect()
    }

    /// Bulk both ways on all at once: what a caller sends comes back to it, byte by byte. The fewest bytes of one.
    pub fn exchange(&self, duration: Duration, pattern: &Pattern) -> usize {
        let what = self.what;
        thread::scope(|scope| {
            let connections = self.connections.iter().enumerate();
            let exchanges: Vec<_> = connections
                .map(|(number, connection)| scope.spawn(move || connection.exchange(number, duration, pattern, what)))
                .collect();
            exchanges.into_iter().map(|exchange| exchange.join().unwrap()).min().unwrap()
        })
    }

    /// Ends them by RST, the callers'.
    pub fn reset(self) {
        for Connection { client, server, .. } in self.connections {
            setsockopt(&client, Linger, &libc::linger { l_onoff: 1, l_linger: 0 }).unwrap();
            drop(client);
            let error = (&server).read(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{}", self.what);
        }
    }

    /// Ends them by FIN, the servers' first, so that the callers may use their ports at once.
    pub fn end(self) {
        for Connection { client, server, .. } in self.connections {
            server.shutdown(Shutdown::Write).unwrap();
            assert_eq!((&client).read(&mut [0]).unwrap(), 0, "{}", self.what);
            client.shutdown(Shutdown::Write).unwrap();
            // Its FIN is acknowledged.
            wait_for("the end of a connection", SOON, || client.peer_addr().is_err()).unwrap();
        }
    }
}

impl Connection {
    fn exchange(&self, number: usize, duration: Duration, pattern: &Pattern, what: &str) -> usize {
        let Self { client, server, .. } = self;
        // Known before the last of it is sent.
        let total = &AtomicUsize::new(usize::MAX);
        thread::scope(|scope| {
            scope.spawn(move || send_for(duration, client, number * APART, total, pattern));
            scope.spawn(move || take(server, total, |_, bytes| (&mut &*server).write_all(bytes).unwrap()));
            take(client, total, |place, bytes| {
                pattern.assert(number * APART + place, bytes, || format!("{what}: caller {number} at {place}"));
            })
        })
    }
}

fn send_for(duration: Duration, mut stream: &TcpStream, from: usize, total: &AtomicUsize, pattern: &Pattern) {
    let begun = Instant::now();
    let mut sent = 0;
    let mut is_last = false;
    while !is_last {
        is_last = begun.elapsed() >= duration;
        if is_last {
            total.store(sent + Pattern::LARGEST, Ordering::Relaxed);
        }
        stream.write_all(pattern.at(from + sent, Pattern::LARGEST)).unwrap();
        sent += Pattern::LARGEST;
    }
}

/// Takes what comes until it is all.
fn take(mut stream: &TcpStream, total: &AtomicUsize, mut each: impl FnMut(usize, &[u8])) -> usize {
    let mut buffer = vec![0; Pattern::LARGEST];
    let mut received = 0;
    while received < total.load(Ordering::Relaxed) {
        let len = stream.read(&mut buffer).unwrap();
        assert!(len > 0, "{received} bytes and no more");
        each(received, &buffer[..len]);
        received += len;
    }
    received
}

/// Datagrams of callers. Their sockets are not connected, and take what comes from anybody.
pub struct Datagrams<'a> {
    what: &'a str,
    servers: Vec<UdpSocket>,
    callers: Vec<(UdpSocket, Caller<'a>)>,
    answered: Vec<Option<Answered>>,
    number: usize,
}

impl<'a> Datagrams<'a> {
    /// Of callers whose addresses lead to any of the servers. Those of one namespace and port share a socket.
    pub fn new(what: &'a str, servers: &[&Pod], callers: &[Caller<'a>]) -> Self {
        let limited = |socket: UdpSocket| {
            socket.set_read_timeout(Some(SOON)).unwrap();
            socket
        };
        let server = |server: &&Pod| limited(socket_in(&server.netns, SocketAddrV4::new(server.address, SERVER_PORT)));
        let mut sockets: Vec<(UdpSocket, Caller<'a>)> = Vec::new();
        for caller in callers {
            let key = |caller: &Caller<'_>| (caller.netns.name().to_owned(), caller.port);
            let shared = sockets.iter().find(|(_, other)| caller.port != 0 && key(other) == key(caller));
            let socket = match shared {
                Some((socket, _)) => socket.try_clone().unwrap(),
                None => limited(socket_in(caller.netns, SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, caller.port))),
            };
            sockets.push((socket, *caller));
        }
        let servers = servers.iter().map(server).collect();
        Self { what, servers, answered: vec![None; sockets.len()], callers: sockets, number: 0 }
    }

    /// Those of all.
    pub fn sockets(&self) -> impl Iterator<Item = &UdpSocket> {
        self.servers.iter().chain(self.callers.iter().map(|(socket, _)| socket))
    }

    /// Each caller sends one and is answered, by whom it asked. A server and a port that it once had stay the same.
    pub fn exchange(&mut self, pattern: &Pattern) {
        let Self { what, servers, callers, answered, number } = self;
        let mut buffer = [0; 2000];
        let len = 1 + *number % 1400;
        for (caller, ((socket, Caller { asked, seen_as, .. }), answered)) in callers.iter().zip(answered).enumerate() {
            let what = || format!("{what}: caller {caller}, {number}");
            let place = *number + caller * APART;
            socket.send_to(pattern.at(place, len), asked).unwrap();
            let server = ready(servers, &what());
            let (received, from) = servers[server].recv_from(&mut buffer).unwrap();
            assert_eq!((received, from.ip()), (len, (*seen_as).into()), "{}", what());
            servers[server].send_to(&buffer[..len], from).unwrap();
            buffer.fill(0);
            let (received, by) = socket.recv_from(&mut buffer).unwrap();
            assert_eq!((received, by), (len, SocketAddr::V4(*asked)), "{}", what());
            pattern.assert(place, &buffer[..len], what);
            let now = Answered { server, port: from.port() };
            assert_eq!(*answered.get_or_insert(now), now, "{}", what());
        }
        *number += 1;
    }

    /// The same again and again. How many times.
    pub fn exchange_for(&mut self, duration: Duration, pattern: &Pattern) -> usize {
        let (begun, first) = (Instant::now(), self.number);
        while begun.elapsed() < duration {
            self.exchange(pattern);
        }
        self.number - first
    }

    /// Who answers each.
    pub fn answered(&self) -> Vec<Answered> {
        self.answered.iter().flatten().copied().collect()
    }
}

/// The servers of those that were answered.
pub fn servers_of(answered: &[Answered]) -> BTreeSet<usize> {
    answered.iter().map(|answered| answered.server).collect()
}

/// Waits for one of them to have something, and says which.
fn ready(sockets: &[impl AsFd], what: &str) -> usize {
    let mut polled: Vec<_> = sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
    poll(&mut polled, PollTimeout::try_from(SOON).unwrap()).unwrap();
    let ready = polled.iter().position(|socket| socket.any().unwrap());
    ready.unwrap_or_else(|| panic!("{what}: nothing arrives"))
}
