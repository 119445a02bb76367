//! Numbered datagrams at a high rate, and which of them were lost.

use std::{
    io::{ErrorKind, IoSlice},
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    os::fd::AsRawFd as _,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    libc,
    sys::{
        signal::Signal,
        socket::{MsgFlags, MultiHeaders, SockaddrIn, sendmmsg, setsockopt, sockopt::RcvBufForce},
    },
};
use xtask::{lab::Pod, progress::wait_for};

use crate::{
    sockets::within,
    world::{SOON, World},
};

/// What each stream sends in a second.
pub const RATE: u64 = 25_000;
/// In one system call.
const BATCH: usize = 16;
/// For as much as comes in more than a second.
const RECEIVE_BUFFER: usize = 64 << 20;
/// After this time without a datagram none is on its way any more.
const SILENCE: Duration = Duration::from_millis(300);
/// The IPv4 option that says nothing (RFC 791), four times: as many bytes as a header grows by.
const NO_OPERATIONS: [u8; 4] = [1; 4];

/// Which way the datagrams take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Past the stacks of both hosts, as soon as these know the flow.
    Fast,
    /// Through them: packets with IP options always are.
    Slow,
}

impl Way {
    /// The way has its own port, at both ends.
    pub const fn port(self) -> u16 {
        match self {
            Self::Fast => 7801,
            Self::Slow => 7802,
        }
    }
}

/// Numbered datagrams from one pod to another.
pub struct Numbered {
    way: Way,
    stop: Arc<AtomicBool>,
    sender: JoinHandle<u64>,
    receiver: JoinHandle<Received>,
    received: Arc<AtomicU64>,
    started: Instant,
}

/// A stream on each way from the first pod of one host to that of another. No two at a time: the rate is what the machine
/// has to keep up with.
pub struct BothWays {
    streams: [Numbered; 2],
    _alone: MutexGuard<'static, ()>,
}

impl BothWays {
    pub fn start(world: &World) -> Self {
        Self::start_to(world, world.hosts[1].pods[0].address)
    }

    /// To an address that leads to that pod, whatever the port.
    pub fn start_to(world: &World, asked: Ipv4Addr) -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let [from, to] = [0, 1].map(|host| &world.hosts[host].pods[0]);
        Self { streams: [Way::Fast, Way::Slow].map(|way| Numbered::start(from, asked, to, way)), _alone: alone }
    }

    /// That each stream takes its way, on both hosts.
    pub fn assert_ways(&self, world: &World) {
        let labels = [(0, "pod_encapsulated"), (0, "encapsulated"), (1, "delivered"), (1, "received")];
        let counters = || labels.map(|(host, label)| world.counter(host, label));
        let before = counters();
        self.wait_for_more(5000);
        for ((label, before), after) in labels.iter().zip(before).zip(counters()) {
            assert!(after >= before + 4000, "{label:?} grew by {} only", after - before);
        }
    }

    /// Waits until so many more of each have come.
    pub fn wait_for_more(&self, datagrams: u64) {
        self.streams.iter().for_each(|stream| stream.wait_for_more(datagrams));
    }

    /// Ends them. The network must have lost nothing.
    pub fn end_whole(self, what: &str) {
        for outcome in self.streams.map(Numbered::end) {
            outcome.assert_whole(what);
        }
    }
}

/// Ends an agent as a crash does.
pub fn kill(world: &mut World, host: usize) {
    let agent = world.hosts[host].agent.as_mut().unwrap();
    agent.signal(Signal::SIGKILL).unwrap();
    agent.wait(Duration::from_secs(3)).unwrap();
}

struct Received {
    /// One bit for each number.
    seen: Vec<u64>,
    /// What came, each time it came.
    datagrams: u64,
    /// What the socket had no room for (`SO_MEMINFO`).
    dropped: u32,
}

/// What became of a stream.
#[derive(Debug)]
pub struct Outcome {
    pub way: Way,
    pub sent: u64,
    /// The numbers that never came.
    pub lost: Vec<u64>,
    pub doubled: u64,
    /// What the receiving socket had no room for: none of the network's.
    pub dropped_by_socket: u32,
    /// In datagrams.
    pub per_second: u64,
}

impl Numbered {
    fn start(from: &Pod, asked: Ipv4Addr, to: &Pod, way: Way) -> Self {
        let port = way.port();
        let [source, destination] = [from, to].map(|pod| SocketAddrV4::new(pod.address, port));
        let listening = within(&to.netns, move || UdpSocket::bind(destination).unwrap());
        setsockopt(&listening, RcvBufForce, &RECEIVE_BUFFER).unwrap();
        listening.set_read_timeout(Some(SILENCE)).unwrap();
        let sending = within(&from.netns, move || UdpSocket::bind(source).unwrap());
        sending.connect((asked, port)).unwrap();
        if way == Way::Slow {
            set_options(&sending);
        }
        let (stop, received) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let sender = thread::spawn({
            let stop = Arc::clone(&stop);
            move || send(&sending, &stop)
        });
        let receiver = thread::spawn({
            let (stop, received) = (Arc::clone(&stop), Arc::clone(&received));
            move || receive(&listening, &stop, &received)
        });
        let stream = Self { way, stop, sender, receiver, received, started: Instant::now() };
        stream.wait_for_more(RATE / 10);
        stream
    }

    /// How many have come.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Waits until so many more have come.
    pub fn wait_for_more(&self, datagrams: u64) {
        let before = self.received();
        wait_for("numbered datagrams", SOON, || self.received() >= before + datagrams).unwrap();
    }

    pub fn end(self) -> Outcome {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().unwrap();
        let lasted = self.started.elapsed();
        let Received { seen, datagrams, dropped } = self.receiver.join().unwrap();
        let is_seen = |number: &u64| seen.get(index(*number)).is_some_and(|word| word & bit(*number) != 0);
        let lost: Vec<u64> = (0..sent).filter(|number| !is_seen(number)).collect();
        let per_second = (sent as f64 / lasted.as_secs_f64()) as u64;
        let doubled = datagrams - (sent - lost.len() as u64);
        Outcome { way: self.way, sent, lost, doubled, dropped_by_socket: dropped, per_second }
    }
}

impl Outcome {
    /// That the network lost nothing.
    pub fn assert_whole(&self, what: &str) {
        let Self { way, sent, lost, doubled, dropped_by_socket, per_second } = self;
        println!("{what}: {way:?}: {sent} datagrams, {per_second}/s, {} lost, {doubled} doubled", lost.len());
        assert_eq!(*dropped_by_socket, 0, "{what}: the receiver was too slow, which proves nothing");
        let some = &lost[..lost.len().min(20)];
        assert!(lost.is_empty(), "{what}: {way:?}: of {sent} these and {} in all were lost: {some:?}", lost.len());
        assert_eq!(*doubled, 0, "{what}: {way:?}");
    }
}

/// Sends by the clock: after a time in which it could not run, it sends what should have been sent meanwhile.
fn send(socket: &UdpSocket, stop: &AtomicBool) -> u64 {
    let mut headers = MultiHeaders::<SockaddrIn>::preallocate(BATCH, None);
    let start = Instant::now();
    let mut next = 0u64;
    while !stop.load(Ordering::Relaxed) {
        let due = (start.elapsed().as_micros() as u64) * RATE / 1_000_000;
        if due < next + BATCH as u64 {
            thread::sleep(Duration::from_micros(BATCH as u64 * 1_000_000 / RATE));
            continue;
        }
        let numbers: [[u8; 8]; BATCH] = std::array::from_fn(|place| (next + place as u64).to_be_bytes());
        let batch = numbers.each_ref().map(|number| [IoSlice::new(number)]);
        let sent = sendmmsg(socket.as_raw_fd(), &mut headers, &batch, [None; BATCH], [], MsgFlags::empty());
        // What the socket did not take was not sent, and has its number still.
        next += sent.unwrap().count() as u64;
    }
    next
}

fn receive(socket: &UdpSocket, stop: &AtomicBool, received: &AtomicU64) -> Received {
    let (mut seen, mut datagrams) = (Vec::new(), 0);
    let mut number = [0; 8];
    loop {
        match socket.recv(&mut number) {
            Ok(_) => {
                let number = u64::from_be_bytes(number);
                if seen.len() <= index(number) {
                    seen.resize(index(number) + 1, 0);
                }
                seen[index(number)] |= bit(number);
                datagrams += 1;
                received.store(datagrams, Ordering::Relaxed);
            }
            // A receive with a time limit is interrupted by any signal (signal(7)).
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) =>
            {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
            Err(error) => panic!("receive: {error}"),
        }
    }
    Received { seen, datagrams, dropped: drops(socket) }
}

const fn index(number: u64) -> usize {
    (number / 64) as usize
}

const fn bit(number: u64) -> u64 {
    1 << (number % 64)
}

fn set_options(socket: &UdpSocket) {
    // SAFETY: the option's value is valid for the call, with the size given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_OPTIONS,
            NO_OPERATIONS.as_ptr().cast(),
            NO_OPERATIONS.len() as libc::socklen_t,
        )
    };
    nix::errno::Errno::result(result).unwrap();
}

/// What a socket had no room for.
fn drops(socket: &UdpSocket) -> u32 {
    // include/uapi/linux/sock_diag.h: SK_MEMINFO_DROPS of SK_MEMINFO_VARS.
    const DROPS: usize = 8;
    let mut info = [0u32; 9];
    let mut len = size_of_val(&info) as libc::socklen_t;
    // SAFETY: value and length are valid for the call, and the length is the value's.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_MEMINFO, info.as_mut_ptr().cast(), &raw mut len)
    };
    nix::errno::Errno::result(result).unwrap();
    info[DROPS]
}
