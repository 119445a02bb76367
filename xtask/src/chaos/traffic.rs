//! Numbered packets between all pods of different hosts, all the time.
//!
//! A pod takes every packet that reaches its link for its own, whatever the destination, so that one that is for another
//! pod is seen and not dropped in silence. (A rule for what comes in by `eth0`; what the pod sends is routed as ever, and
//! who has an address is answered for the pod's own only.)

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};

use super::{
    ledger::{BATCH, Delivery, Ledger, PodId, Stamp},
    timeline::HostId,
};
use crate::lab::Pod;

const PORT: u16 = 7000;
/// All pairs together; more would be the machine's test.
const PACKETS_PER_SECOND: u32 = 4000;
/// A pair sends at most this often.
const SHORTEST_PERIOD: Duration = Duration::from_millis(20);
const TICK: Duration = Duration::from_millis(2);
/// For far more than comes while a receiver waits for a core.
const RECEIVE_BUFFER: usize = 8 << 20;
/// How soon a receiver sees that its pod went.
const LOOK: Duration = Duration::from_millis(100);

/// A packet that reached a pod that it was not for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Misdelivery {
    /// When.
    pub at: Duration,
    /// Who got it.
    pub by: PodId,
    /// What it says.
    pub stamp: Stamp,
}

struct Shared {
    start: Instant,
    run: u32,
    over: AtomicBool,
    ledger: Mutex<Ledger>,
    sockets: Mutex<BTreeMap<PodId, Arc<UdpSocket>>>,
    misdeliveries: Mutex<Vec<Misdelivery>>,
}

/// All traffic of a run; ends when dropped.
pub(super) struct Traffic {
    shared: Arc<Shared>,
    sender: Option<JoinHandle<()>>,
    receivers: BTreeMap<PodId, (Arc<AtomicBool>, JoinHandle<()>)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Traffic {
    /// Without pods yet.
    pub(super) fn start(start: Instant) -> Self {
        let shared = Arc::new(Shared {
            start,
            run: std::process::id(),
            over: AtomicBool::new(false),
            ledger: Mutex::default(),
            sockets: Mutex::default(),
            misdeliveries: Mutex::default(),
        });
        let sender = thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.send()
        });
        Self { shared, sender: Some(sender), receivers: BTreeMap::new() }
    }

    /// A pod takes part: it receives, and sends as soon as it is connected.
    ///
    /// # Errors
    /// Where its socket can't be opened.
    pub(super) fn add(&mut self, id: PodId, host: HostId, pod: &Pod) -> Result<()> {
        pod.netns.exec("sysctl -qw net.ipv4.conf.eth0.arp_ignore=1")?;
        for line in ["rule add iif eth0 pref 0 lookup 100", "route add local 0.0.0.0/0 dev lo table 100"] {
            pod.netns.ip(line)?;
        }
        let open = || -> Result<UdpSocket> {
            pod.netns.enter()?;
            let socket = UdpSocket::bind(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, PORT))?;
            setsockopt(&socket, RcvBufForce, &RECEIVE_BUFFER)?;
            socket.set_read_timeout(Some(LOOK))?;
            Ok(socket)
        };
        let socket = thread::scope(|scope| scope.spawn(open).join());
        let socket = Arc::new(socket.map_err(|_| anyhow::anyhow!("the thread that opens a socket ended"))??);
        self.ledger().add(id, host, pod.address);
        lock(&self.shared.sockets).insert(id, Arc::clone(&socket));
        let gone = Arc::new(AtomicBool::new(false));
        let receiver = thread::spawn({
            let (shared, gone) = (Arc::clone(&self.shared), Arc::clone(&gone));
            move || shared.receive(id, &socket, &gone)
        });
        self.receivers.insert(id, (gone, receiver));
        Ok(())
    }

    /// A pod is about to go: nothing more is sent to it or by it. Its socket is closed on return.
    pub(super) fn remove(&mut self, id: PodId) {
        let now = self.shared.start.elapsed();
        self.ledger().remove(id, now);
        lock(&self.shared.sockets).remove(&id);
        if let Some((gone, receiver)) = self.receivers.remove(&id) {
            gone.store(true, Ordering::Relaxed);
            let _ended = receiver.join();
        }
    }

    /// What was sent and what came.
    pub(super) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        lock(&self.shared.ledger)
    }

    /// Packets that reached the wrong pod, since the last time that this was asked.
    pub(super) fn take_misdeliveries(&self) -> Vec<Misdelivery> {
        std::mem::take(&mut *lock(&self.shared.misdeliveries))
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        let _ended = self.sender.take().map(JoinHandle::join);
        for (_, receiver) in std::mem::take(&mut self.receivers).into_values() {
            let _ended = receiver.join();
        }
    }
}

impl Shared {
    fn send(&self) {
        while !self.over.load(Ordering::Relaxed) {
            let due = {
                let mut ledger = lock(&self.ledger);
                let period = Duration::from_secs(1) * ledger.pairs() as u32 / PACKETS_PER_SECOND;
                ledger.due(self.start.elapsed(), period.max(SHORTEST_PERIOD), self.run)
            };
            // There may be more.
            let is_full = due.len() == BATCH;
            for (stamp, address) in due {
                let socket = lock(&self.sockets).get(&stamp.from).cloned();
                let sent = socket
                    .context("gone")
                    .and_then(|socket| Ok(socket.send_to(&stamp.to_bytes(), SocketAddrV4::new(address, PORT))?));
                if sent.is_err() {
                    lock(&self.ledger).refused(stamp);
                }
            }
            if !is_full {
                thread::sleep(TICK);
            }
        }
    }

    fn receive(&self, id: PodId, socket: &UdpSocket, gone: &AtomicBool) {
        let mut buffer = [0; 128];
        while !self.over.load(Ordering::Relaxed) && !gone.load(Ordering::Relaxed) {
            match socket.recv(&mut buffer) {
                Ok(len) => {
                    let Some(stamp) = Stamp::from_bytes(&buffer[..len]).filter(|stamp| stamp.run == self.run) else {
                        continue;
                    };
                    let now = self.start.elapsed();
                    if lock(&self.ledger).received(id, stamp, now) == Delivery::Wrong {
                        lock(&self.misdeliveries).push(Misdelivery { at: now, by: id, stamp });
                    }
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                // Its link is down, or an answer says that nobody listens any more.
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}
