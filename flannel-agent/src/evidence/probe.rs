//! Asking a peer that is silent, so that one to which packets go one way only is told from one that is gone.

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};

use flannel_common::maps::Counter;
use ipnet::Ipv4Net;
use tracing::warn;

/// A port that nobody listens at, as traceroute takes: the host answers that by ICMP (RFC 1122 section 4.1.3.1), whether this agent
/// or flannel serves it, and the answer comes by the overlay as any pod's packet.
pub(super) const NOBODYS_PORT: u16 = 33_434;
/// So many datagrams make a question, as with traceroute, since one may be lost.
const DATAGRAMS: u64 = 3;
/// Bytes of the headers of IPv4 and UDP.
pub(super) const HEADERS: u32 = 28;

/// Sends the questions. The answers are not read: that the peer is heard is noted where they are admitted.
pub(super) struct Prober(Option<UdpSocket>);

impl Prober {
    pub(super) fn open() -> Self {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).and_then(|socket| {
            socket.set_nonblocking(true)?;
            Ok(socket)
        });
        let failed = |error| warn!("peers that are silent can't be asked: open a UDP socket: {error}");
        Self(socket.map_err(failed).ok())
    }

    /// Asks the host behind a subnet, at its own address in the overlay. What was sent.
    pub(super) fn ask(&self, subnet: Ipv4Net) -> Counter {
        let Some(socket) = &self.0 else { return Counter { packets: 0, bytes: 0 } };
        // An answer before this one's that came by ICMP is an error of the first call.
        let to = SocketAddrV4::new(subnet.network(), NOBODYS_PORT);
        let send = || socket.send_to(&[], to).or_else(|_| socket.send_to(&[], to));
        let packets = (0..DATAGRAMS).filter(|_| send().is_ok()).count() as u64;
        Counter { packets, bytes: packets * u64::from(HEADERS) }
    }
}
