//! Flows that go on until they are dropped, and what has arrived of each.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use xtask::{lab::Pod, progress::wait_for};

use super::{PROMPT, SILENCE};
use crate::{
    sockets::{connection, listener_in, socket_in},
    world::SOON,
};

/// Between two packets of a flow.
const PAUSE: Duration = Duration::from_millis(1);
/// How long a thread waits for a packet before it looks whether to end.
const LOOK: Duration = Duration::from_millis(50);

/// Numbered packets, a thousand in a second or, where each is answered, one after the other.
pub struct Flow {
    what: &'static str,
    heard: Arc<Heard>,
    _threads: Threads,
}

/// What has arrived where the flow ends, which is where it begins if it is answered.
struct Heard {
    count: AtomicU64,
    begun: Instant,
    /// Microseconds from then on.
    last: AtomicU64,
}

impl Heard {
    fn hear(&self) {
        self.last.store(self.begun.elapsed().as_micros() as u64, Ordering::Relaxed);
        self.count.fetch_add(1, Ordering::Relaxed);
    }
}

/// Threads that end with this.
pub struct Threads {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    pub fn new() -> Self {
        Self { stop: Arc::default(), threads: Vec::new() }
    }

    /// One that does the same over and over.
    pub fn spawn(&mut self, mut step: impl FnMut() + Send + 'static) {
        let stop = Arc::clone(&self.stop);
        self.threads.push(thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                step();
            }
        }));
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _panicked = thread.join();
        }
    }
}

/// A flow that was stopped, with what had arrived of it by then.
pub struct Stopped<'a> {
    flow: &'a Flow,
    count: u64,
}

impl Stopped<'_> {
    /// That nothing has arrived since.
    pub fn assert(&self) {
        assert_eq!(self.flow.count(), self.count, "{} goes on", self.flow.what);
    }
}

impl Flow {
    fn new(what: &'static str, make: impl FnOnce(&Arc<Heard>, &mut Threads)) -> Self {
        let heard = Arc::new(Heard { count: 0.into(), begun: Instant::now(), last: 0.into() });
        let mut threads = Threads::new();
        make(&heard, &mut threads);
        Self { what, heard, _threads: threads }
    }

    /// Datagrams that nobody answers, which conntrack holds for new, each of them.
    pub fn one_way(what: &'static str, from: &Pod, to: &Pod, port: u16) -> Self {
        let asked = SocketAddrV4::new(to.address, port);
        let [sender, receiver] = [datagrams(from, 0), datagrams(to, port)];
        Self::new(what, |heard, threads| {
            let heard = Arc::clone(heard);
            threads.spawn(move || {
                if receiver.recv(&mut [0; 8]).is_ok() {
                    heard.hear();
                }
            });
            let mut number = 0u64;
            threads.spawn(move || {
                let _refused = sender.send_to(&number.to_be_bytes(), asked);
                number += 1;
                thread::sleep(PAUSE);
            });
        })
    }

    /// Datagrams to an address that answers each.
    pub fn udp(what: &'static str, client: &Pod, asked: SocketAddrV4) -> Self {
        let socket = datagrams(client, 0);
        Self::new(what, |heard, threads| {
            let heard = Arc::clone(heard);
            let mut number = 0u64;
            threads.spawn(move || {
                let mut answer = [0; 8];
                number += 1;
                let _refused = socket.send_to(&number.to_be_bytes(), asked);
                if socket.recv(&mut answer).is_ok() && answer == number.to_be_bytes() {
                    heard.hear();
                }
                thread::sleep(PAUSE);
            });
        })
    }

    /// A connection, each number of which comes back.
    pub fn tcp(client: &Pod, server: &Pod, port: u16) -> Self {
        let listener = listener_in(&server.netns, server.address, port);
        let (asking, answering) = connection(&client.netns, SocketAddrV4::new(server.address, port), &listener);
        for stream in [&asking, &answering] {
            stream.set_read_timeout(Some(LOOK)).unwrap();
        }
        Self::new("a connection", |heard, threads| {
            let heard = Arc::clone(heard);
            threads.spawn(move || {
                // Open, so that others can connect.
                let _listener = &listener;
                let mut bytes = [0; 8];
                if let Some(len) = read(&answering, &mut bytes) {
                    (&answering).write_all(&bytes[..len]).unwrap();
                }
            });
            let (mut number, mut is_answered) = (0u64, true);
            threads.spawn(move || {
                if is_answered {
                    number += 1;
                    thread::sleep(PAUSE);
                    (&asking).write_all(&number.to_be_bytes()).unwrap();
                }
                let mut answer = [0; 8];
                // Eight bytes are never parted.
                is_answered = read(&asking, &mut answer).is_some();
                if is_answered {
                    assert_eq!(answer, number.to_be_bytes());
                    heard.hear();
                }
            });
        })
    }

    /// How many have arrived.
    pub fn count(&self) -> u64 {
        self.heard.count.load(Ordering::Relaxed)
    }

    /// For how long none has arrived.
    fn silence(&self) -> Duration {
        let last = Duration::from_micros(self.heard.last.load(Ordering::Relaxed));
        self.heard.begun.elapsed().saturating_sub(last)
    }

    /// Waits until so many more have arrived.
    pub fn wait_for_more(&self, packets: u64) {
        let before = self.count();
        let waited = wait_for(self.what, SOON, || self.count() >= before + packets);
        assert!(waited.is_ok(), "{}: {} more", self.what, self.count() - before);
    }

    /// That it goes on.
    pub fn assert_passes(&self) {
        self.wait_for_more(20);
    }

    /// That it stops soon after a moment.
    pub fn assert_stops(&self, moment: Instant) -> Stopped<'_> {
        let waited = wait_for(self.what, SOON, || self.silence() > SILENCE);
        let stopped = moment.elapsed().saturating_sub(self.silence());
        assert!(waited.is_ok(), "{} goes on", self.what);
        assert!(stopped < PROMPT, "{} stops after {stopped:?}", self.what);
        println!("{} stopped after {stopped:?}", self.what);
        Stopped { flow: self, count: self.count() }
    }
}

/// Answers each datagram to a port of a pod.
pub fn echo_server(pod: &Pod, port: u16) -> Threads {
    let socket = datagrams(pod, port);
    let mut threads = Threads::new();
    threads.spawn(move || {
        let mut bytes = [0; 8];
        if let Ok((len, from)) = socket.recv_from(&mut bytes) {
            let _refused = socket.send_to(&bytes[..len], from);
        }
    });
    threads
}

/// A socket of a pod, at any port where it is 0.
fn datagrams(pod: &Pod, port: u16) -> UdpSocket {
    let address = if port == 0 { Ipv4Addr::UNSPECIFIED } else { pod.address };
    let socket = socket_in(&pod.netns, SocketAddrV4::new(address, port));
    socket.set_read_timeout(Some(LOOK)).unwrap();
    socket
}

/// What comes within a moment.
fn read(mut stream: &TcpStream, bytes: &mut [u8; 8]) -> Option<usize> {
    match stream.read(bytes) {
        // Its other thread has ended first; a flow that ends too early does not go on, which is what is looked at.
        Ok(0) => None,
        Ok(len) => Some(len),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => None,
        Err(error) => panic!("{error}"),
    }
}
