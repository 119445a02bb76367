//! UDP datagrams delivered per second.
//!
//! By hand, so that the path is the limit and not a tool. `sockperf` and `iperf3` make a system call for each datagram and
//! have the receiver sleep until the next one comes; waking it costs the sender, who shares its core with the whole path, as
//! much as the path does, and on the faster paths their receivers lost a fifth. Here the sender hands over many datagrams
//! in one call (`sendmmsg`). The receiver looks by the clock and takes what has come, so that nobody wakes it; it does not
//! spin either, since that would starve ksoftirqd, where the kernel runs the path on the receiver's core.
//!
//! Counted is what the receiving socket was given (`UdpInDatagrams` of its namespace), while the sender is sending.

use std::{
    io::{ErrorKind, IoSlice},
    net::{Ipv4Addr, UdpSocket},
    os::fd::AsRawFd as _,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrIn, sendmmsg, setsockopt, sockopt::RcvBufForce};

use super::topology::Path;

pub(super) const PORT: u16 = 5203;
const PAYLOAD: [u8; 64] = [0; 64];
/// In one system call.
const BATCH: usize = 32;
/// How often the receiver looks.
const LOOK: Duration = Duration::from_micros(500);
/// For far more than comes between two looks.
const RECEIVE_BUFFER: usize = 16 << 20;
/// Until the caches are warm and the flow is known.
const START: Duration = Duration::from_millis(200);

/// How many datagrams of 64 bytes come out at the other end.
///
/// # Errors
/// Where a socket fails, or nothing comes.
pub fn per_second(path: &Path<'_>, seconds: u32) -> Result<f64> {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let received = path.enter_as_server().and_then(|()| receive(seconds, &over));
            over.store(true, Ordering::Relaxed);
            received
        });
        let sender = scope.spawn(|| {
            let sent = path.enter_as_client().and_then(|()| send(path, &over));
            over.store(true, Ordering::Relaxed);
            sent
        });
        let sent = sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))?;
        let received = receiver.join().map_err(|_| anyhow::anyhow!("the receiver panicked"))?;
        sent.context("sender").and(received.context("receiver"))
    })
}

fn send(path: &Path<'_>, over: &AtomicBool) -> Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect((path.address, PORT))?;
    let mut headers = MultiHeaders::<SockaddrIn>::preallocate(BATCH, None);
    let batch = [[IoSlice::new(&PAYLOAD)]; BATCH];
    while !over.load(Ordering::Relaxed) {
        match sendmmsg(socket.as_raw_fd(), &mut headers, &batch, [None; BATCH], [], MsgFlags::empty()) {
            // Refused: the receiver is not there yet.
            Ok(_) | Err(nix::Error::ECONNREFUSED) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Counts from shortly after the first datagram.
fn receive(seconds: u32, over: &AtomicBool) -> Result<f64> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
    socket.set_nonblocking(true)?;
    setsockopt(&socket, RcvBufForce, &RECEIVE_BUFFER)?;
    let take_for = |length: Duration| -> Result<Duration> {
        let (start, mut payload) = (Instant::now(), PAYLOAD);
        while start.elapsed() < length && !over.load(Ordering::Relaxed) {
            match socket.recv(&mut payload) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(LOOK),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(start.elapsed())
    };
    take_for(START)?;
    let before = datagrams()?;
    let elapsed = take_for(Duration::from_secs(seconds.into()))?;
    let delivered = datagrams()? - before;
    anyhow::ensure!(delivered > 0.0, "nothing arrived");
    Ok(delivered / elapsed.as_secs_f64())
}

/// How many the sockets of this thread's namespace have been given.
fn datagrams() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/thread-self/net/snmp").context("read the counters of UDP")?;
    in_datagrams(&text)
}

/// `UdpInDatagrams` of `/proc/net/snmp`, where a line of names comes before one of numbers.
fn in_datagrams(snmp: &str) -> Result<f64> {
    let mut lines = snmp.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let (names, numbers) = lines.next().zip(lines.next()).context("no counters of UDP")?;
    let mut pairs = names.split_whitespace().zip(numbers.split_whitespace());
    let (_, number) = pairs.find(|(name, _)| *name == "InDatagrams").context("no InDatagrams")?;
    Ok(number.parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_are_found_by_name() {
        let snmp =
            "Ip: Forwarding InReceives\nIp: 1 77\nUdp: NoPorts InDatagrams InErrors\nUdp: 1 4321 9\nUdpLite: 0\n";
        assert!((in_datagrams(snmp).unwrap() - 4321.0).abs() < f64::EPSILON);
        assert!(in_datagrams("Udp: NoPorts\nUdp: 1\n").is_err());
    }
}
