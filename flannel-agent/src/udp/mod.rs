//! The udp backend's tunnel: what the stack routes into a TUN device goes as UDP to the host that leases the destination, and
//! back (flannel: pkg/backend/udp).
//!
//! A datagram is an IPv4 packet, and nothing else. Either side takes one off the packet's TTL.
//!
//! flannel's proxy moves one packet with each system call. Here:
//!
//! * the kernel hands over TCP and UDP as they are before segmentation (`vnet`); they are cut here (`segment`) and go
//!   into the socket as one message, which the kernel (or the device) cuts at the same places (`batch`, `socket`)
//! * what arrives is put together again (`merge`), and handed in as one packet
//! * `outbound` and `inbound` are a thread each, for each queue of the device: the agent's own runtime has one thread, which
//!   the traffic must not hold up, nor be held up by
//!
//! `peers` says who leases what, and what is let in; `answer` tells senders what can't be delivered; `counters` count all
//! of it. Who leases what is given from outside, at any time, and as a whole.

mod answer;
mod batch;
mod checksum;
mod counters;
mod error;
mod inbound;
mod ipv4;
mod merge;
mod outbound;
mod peers;
mod queue;
mod segment;
mod socket;
mod tun;
mod vnet;

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    num::NonZeroUsize,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use flannel_common::vxlan::Vni;
use ipnet::Ipv4Net;
use tokio::sync::watch;
use tracing::error;

use self::{
    answer::Answers,
    counters::Counters,
    inbound::Inbound,
    outbound::Outbound,
    queue::{Queue, Stop},
    tun::Tun,
};
pub use self::{counters::Event, error::UdpError, peers::Peers};
pub use crate::config::UDP_PORT as PORT;
use crate::device::{Netlink, tun::TunDevice};

/// Bytes that the tunnel adds: the IPv4 and UDP headers.
pub const OVERHEAD: u32 = 28;
/// Queues of a device that are of use: packets of a flow take one, and more than this many flows seldom go at once.
const MAX_QUEUES: usize = 8;

/// What a tunnel is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Name of a device that is this agent's already, or is to be; [`None`] for the first `flannel<number>` that is free.
    pub device: Option<String>,
    /// The number that this host knows the overlay by.
    pub vni: Vni,
    /// This host's address on the underlay, and the port of all hosts.
    pub local: SocketAddrV4,
    /// This host's address on the overlay.
    pub overlay: Ipv4Addr,
    /// What is routed into the device.
    pub network: Ipv4Net,
    /// MTU of the device, in bytes.
    pub mtu: u32,
}

impl Settings {
    /// The device, by its name.
    pub fn tun_device(&self, name: &str) -> TunDevice {
        let Self { vni, overlay, network, mtu, .. } = *self;
        TunDevice { name: name.to_owned(), vni, address: overlay, network, mtu }
    }
}

/// A tunnel that carries packets. Stops when dropped; the device stays, with its address and routes, so that packets for the
/// overlay take no other way meanwhile.
#[derive(Debug)]
pub struct Tunnel {
    device: String,
    peers: watch::Sender<Arc<Peers>>,
    failure: watch::Receiver<Option<String>>,
    counters: Vec<Arc<Counters>>,
    stop: Arc<Stop>,
    threads: Vec<JoinHandle<()>>,
}

impl Tunnel {
    /// Opens the port, makes the device or takes the one that there is, and begins to carry packets. Where it fails, nothing
    /// that it made stays.
    ///
    /// # Errors
    /// [`UdpError`].
    pub async fn start(netlink: &Netlink, settings: &Settings, peers: Peers) -> Result<Self, UdpError> {
        let queues = thread::available_parallelism().map_or(1, NonZeroUsize::get).min(MAX_QUEUES);
        let sockets = socket::bind_all(settings.local, queues)?;
        if let Some(name) = &settings.device {
            match netlink.tun_queues(name).await? {
                None | Some(Some(0)) => {}
                Some(Some(_)) => return Err(UdpError::InUse { name: name.clone() }),
                Some(None) => return Err(UdpError::NameTaken { name: name.clone() }),
            }
        }
        let tun = Tun::open(settings.device.as_deref(), queues)?;
        netlink.ensure_tun(&settings.tun_device(&tun.name)).await?;
        let tunnel = Self::carry(settings, &tun, &sockets, peers)?;
        tun.keep()?;
        Ok(tunnel)
    }

    fn carry(settings: &Settings, tun: &Tun, sockets: &[UdpSocket], peers: Peers) -> Result<Self, UdpError> {
        let stop = Arc::new(Stop::new().map_err(UdpError::Thread)?);
        let (failed, failure) = watch::channel(None);
        let (peers, changes) = watch::channel(Arc::new(peers));
        let mut tunnel =
            Self { device: tun.name.clone(), peers, failure, counters: Vec::new(), stop, threads: Vec::new() };
        let all_answers = Answers::new(settings.overlay);
        for (number, (tun_queue, socket)) in tun.queues.iter().zip(sockets).enumerate() {
            let clones = || Ok((tun_queue.try_clone()?, socket.try_clone()?));
            let (tun_queue, socket) = clones().map_err(UdpError::Thread)?;
            let (queue, answers) = (tunnel.queue(&changes), all_answers.clone());
            let outbound = Outbound { queue, tun: tun_queue, socket, port: settings.local.port(), answers };
            tunnel.spawn(format!("udp-out-{number}"), &failed, move || outbound.run())?;
            let (tun_queue, socket) = clones().map_err(UdpError::Thread)?;
            let (queue, answers) = (tunnel.queue(&changes), all_answers.clone());
            let inbound = Inbound { queue, tun: tun_queue, socket, segments_udp: tun.segments_udp, answers };
            tunnel.spawn(format!("udp-in-{number}"), &failed, move || inbound.run())?;
        }
        Ok(tunnel)
    }

    fn queue(&mut self, changes: &watch::Receiver<Arc<Peers>>) -> Queue {
        let counters = Arc::default();
        self.counters.push(Arc::clone(&counters));
        Queue::new(Arc::clone(&self.stop), changes.clone(), counters)
    }

    fn spawn(
        &mut self,
        name: String,
        failed: &watch::Sender<Option<String>>,
        run: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> Result<(), UdpError> {
        let (device, failed) = (self.device.clone(), failed.clone());
        let body = move || {
            if let Err(cause) = run() {
                error!("the tunnel of {device} carries no packets any more: {cause}");
                failed.send_replace(Some(cause.to_string()));
            }
        };
        self.threads.push(thread::Builder::new().name(name).spawn(body).map_err(UdpError::Thread)?);
        Ok(())
    }

    /// The device's name.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Takes other peers from the next packet on.
    pub fn set_peers(&self, peers: Peers) {
        let peers = peers.after(&self.peers.borrow());
        self.peers.send_replace(Arc::new(peers));
    }

    /// For how long no packet has been let in from the host that leases a subnet; [`None`] where none ever was since the start, or
    /// nobody does.
    pub fn silence_of(&self, subnet: Ipv4Net) -> Option<Duration> {
        self.peers.borrow().silence_of(subnet)
    }

    /// How many packets this happened to since the start.
    pub fn count(&self, event: Event) -> u64 {
        self.counters.iter().map(|counters| counters.get(event)).sum()
    }

    /// Why it carries no packets any more, once it doesn't: the device was deleted, above all. It has to be started again.
    pub fn failure(&self) -> watch::Receiver<Option<String>> {
        self.failure.clone()
    }

    /// Waits until there is such a reason.
    pub async fn failed(&self) -> String {
        let mut failure = self.failure();
        match failure.wait_for(Option::is_some).await {
            Ok(cause) => cause.clone().unwrap_or_default(),
            // All threads have ended without one.
            Err(_) => std::future::pending().await,
        }
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.stop.set();
        for thread in self.threads.drain(..) {
            // One that has panicked has said so.
            let _ended = thread.join();
        }
    }
}
