//! Numbered datagrams, a thousand in a second, and when each arrived where.

use std::{
    net::{SocketAddrV4, UdpSocket},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};
use xtask::lab::Pod;

use crate::{calls::SERVER_PORT, sockets::socket_in};

/// For several seconds in which nobody reads, on a busy machine.
const RECEIVE_BUFFER: usize = 8 << 20;

type Arrived = Arc<Mutex<Vec<(u32, Instant)>>>;

/// Numbered datagrams from a pod, to one that may be any of several.
pub struct Stream {
    stop: Arc<AtomicBool>,
    sender: JoinHandle<u32>,
    /// How many were sent, once the sender has ended.
    sent: Arc<OnceLock<u32>>,
    receivers: Vec<(JoinHandle<()>, Arrived)>,
}

impl Stream {
    /// Of both ends.
    pub const PORT: u16 = SERVER_PORT;

    pub fn start(from: &Pod, to: &Pod) -> Self {
        Self::start_to(from, SocketAddrV4::new(to.address, Self::PORT), &[to])
    }

    /// Of both ends, on another port.
    pub fn start_on(from: &Pod, to: &Pod, port: u16) -> Self {
        Self::start_at(from, SocketAddrV4::new(to.address, port), &[to], port)
    }

    /// To an address that leads to one of these pods.
    pub fn start_to(from: &Pod, asked: SocketAddrV4, receivers: &[&Pod]) -> Self {
        Self::start_at(from, asked, receivers, Self::PORT)
    }

    fn start_at(from: &Pod, asked: SocketAddrV4, receivers: &[&Pod], port: u16) -> Self {
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::<OnceLock<u32>>::default());
        let receivers = receivers.iter().map(|to| {
            let listening = socket_in(&to.netns, SocketAddrV4::new(to.address, port));
            listening.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
            setsockopt(&listening, RcvBufForce, &RECEIVE_BUFFER).unwrap();
            let arrived = Arrived::default();
            let receiver = thread::spawn({
                let (sent, arrived) = (Arc::clone(&sent), Arc::clone(&arrived));
                move || receive(&listening, &sent, &arrived)
            });
            (receiver, arrived)
        });
        let receivers = receivers.collect();
        let sending = socket_in(&from.netns, SocketAddrV4::new(from.address, port));
        let sender = thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                let mut number = 0u32;
                while !stop.load(Ordering::Relaxed) {
                    // Refused where the rules say so; that is a number less that arrives.
                    let _refused = sending.send_to(&number.to_be_bytes(), asked);
                    number += 1;
                    thread::sleep(Duration::from_millis(1));
                }
                number
            }
        });
        Self { stop, sender, sent, receivers }
    }

    /// For how long none has arrived.
    pub fn silence(&self) -> Duration {
        let last = |(_, arrived): &(_, Arrived)| arrived.lock().unwrap().last().map(|(_, arrived)| *arrived);
        self.receivers.iter().filter_map(last).max().map_or(Duration::MAX, |arrived| arrived.elapsed())
    }

    /// How many have arrived.
    pub fn count(&self) -> usize {
        (0..self.receivers.len()).map(|receiver| self.count_at(receiver)).sum()
    }

    /// How many have arrived at one of the receivers.
    pub fn count_at(&self, receiver: usize) -> usize {
        self.receivers[receiver].1.lock().unwrap().len()
    }

    /// Ends it. How many were sent, and which arrived in which order.
    pub fn end(self) -> (u32, Vec<u32>) {
        let (sent, arrived) = self.end_each();
        (sent, arrived.into_iter().flatten().map(|(number, _)| number).collect())
    }

    /// The same by receivers, with the time of each arrival.
    pub fn end_each(self) -> (u32, Vec<Vec<(u32, Instant)>>) {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().unwrap();
        self.sent.set(sent).unwrap();
        let arrived = self.receivers.into_iter().map(|(receiver, arrived)| {
            receiver.join().unwrap();
            std::mem::take(&mut *arrived.lock().unwrap())
        });
        (sent, arrived.collect())
    }
}

/// Until nothing comes for a while after the last was sent; where some are missing, for longer.
fn receive(socket: &UdpSocket, sent: &OnceLock<u32>, arrived: &Mutex<Vec<(u32, Instant)>>) {
    let mut number = [0; 4];
    let mut late = 0;
    loop {
        match socket.recv(&mut number) {
            Ok(_) => arrived.lock().unwrap().push((u32::from_be_bytes(number), Instant::now())),
            Err(_) => match sent.get() {
                Some(sent) if late == 5 || arrived.lock().unwrap().len() >= *sent as usize => return,
                Some(_) => late += 1,
                None => {}
            },
        }
    }
}
