//! Numbered packets between all pods of different hosts, all the time.
//!
//! A pod takes every packet that reaches its link for its own, whatever the destination, so that one that is for another
//! pod is seen and not dropped in silence. (A rule for what comes in by `eth0`; what the pod sends is routed as ever, and
//! who has an address is answered for the pod's own only.)
//!
//! Half of the packets go to a service's address, which the host translates and conntrack remembers, as with kube-proxy, or are
//! answers to these. Each pod is a service by itself, at the same place of another network, so that a rule of each host's
//! does for all pods that come and go.

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
    ledger::{BATCH, Delivery, Ledger, PodId, Stamp, Way},
    timeline::HostId,
};
use crate::lab::Pod;

const PORT: u16 = 7000;
/// Where pods ask from by a service's address.
const ASKING_PORT: u16 = 7001;
/// What hosts translate services by. As kube-proxy does, they drop what conntrack finds invalid.
pub(super) const SERVICES: &str = "table ip services {
    chain prerouting {
        type nat hook prerouting priority dstnat
        dnat ip prefix to ip daddr map { 10.105.0.0/16 : 10.5.0.0/16 }
    }
    chain forward {
        type filter hook forward priority filter
        ct state invalid drop
    }
}
";
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

/// A pod's sockets.
#[derive(Clone)]
struct Sockets {
    /// It sends to others from here, and is asked.
    usual: Arc<UdpSocket>,
    /// It asks by a service's address from here, and gets the answers.
    asking: Arc<UdpSocket>,
}

struct Shared {
    start: Instant,
    run: u32,
    over: AtomicBool,
    ledger: Mutex<Ledger>,
    sockets: Mutex<BTreeMap<PodId, Sockets>>,
    misdeliveries: Mutex<Vec<Misdelivery>>,
}

/// All traffic of a run; ends when dropped.
pub(super) struct Traffic {
    shared: Arc<Shared>,
    sender: Option<JoinHandle<()>>,
    receivers: BTreeMap<PodId, (Arc<AtomicBool>, [JoinHandle<()>; 2])>,
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
    /// Where its sockets can't be opened.
    pub(super) fn add(&mut self, id: PodId, host: HostId, pod: &Pod) -> Result<()> {
        pod.netns.exec("sysctl -qw net.ipv4.conf.eth0.arp_ignore=1")?;
        for line in ["rule add iif eth0 pref 0 lookup 100", "route add local 0.0.0.0/0 dev lo table 100"] {
            pod.netns.ip(line)?;
        }
        let open = |port| -> Result<Arc<UdpSocket>> {
            let socket = UdpSocket::bind(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port))?;
            setsockopt(&socket, RcvBufForce, &RECEIVE_BUFFER)?;
            socket.set_read_timeout(Some(LOOK))?;
            Ok(Arc::new(socket))
        };
        let (usual, asking) = pod.netns.within(|| (open(PORT), open(ASKING_PORT)))?;
        let sockets = Sockets { usual: usual?, asking: asking? };
        self.ledger().add(id, host, pod.address);
        lock(&self.shared.sockets).insert(id, sockets.clone());
        let gone = Arc::new(AtomicBool::new(false));
        let receivers = [sockets.usual, sockets.asking].map(|socket| {
            let (shared, gone) = (Arc::clone(&self.shared), Arc::clone(&gone));
            thread::spawn(move || shared.receive(id, &socket, &gone))
        });
        self.receivers.insert(id, (gone, receivers));
        Ok(())
    }

    /// A pod is about to go: nothing more is sent to it or by it. Its sockets are closed on return.
    pub(super) fn remove(&mut self, id: PodId) {
        let now = self.shared.start.elapsed();
        self.ledger().remove(id, now);
        lock(&self.shared.sockets).remove(&id);
        if let Some((gone, receivers)) = self.receivers.remove(&id) {
            gone.store(true, Ordering::Relaxed);
            let _ended = receivers.map(JoinHandle::join);
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
        for (_, receivers) in std::mem::take(&mut self.receivers).into_values() {
            let _ended = receivers.map(JoinHandle::join);
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
            for (stamp, way, address) in due {
                let sockets = lock(&self.sockets).get(&stamp.from).cloned();
                let sent = sockets.context("gone").and_then(|Sockets { usual, asking }| {
                    let (socket, address, port) = match way {
                        Way::Direct => (usual, address, PORT),
                        Way::Service => (asking, service(address), PORT),
                        Way::Answer => (usual, address, ASKING_PORT),
                    };
                    Ok(socket.send_to(&stamp.to_bytes(), SocketAddrV4::new(address, port))?)
                });
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

/// The address of the service that a pod is, by [`SERVICES`].
fn service(pod: Ipv4Addr) -> Ipv4Addr {
    let [ten, _, subnet, host] = pod.octets();
    Ipv4Addr::new(ten, 105, subnet, host)
}
