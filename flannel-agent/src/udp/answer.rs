//! What the sender of a packet is told that can't be delivered (ICMP, RFC 792; RFC 1812, section 4.3).
//!
//! It is sent by a socket. flannel's proxy writes it into the TUN device with the device's own address as its source, which
//! the kernel takes for forged and drops (`fib_validate_source`, net/ipv4/fib_frontend.c).

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{AsRawFd as _, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use etherparse::{
    Icmpv4Type, PacketBuilder,
    icmpv4::{DestUnreachableHeader, TimeExceededCode},
};
use flannel_common::packet::is_unicast;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket};
use tracing::warn;

use super::ipv4::Ipv4;

const TTL: u8 = 64;
/// What is quoted behind the packet's header.
const QUOTED: usize = 8;
/// As the kernel's own limit was for long (`icmp_msgs_per_sec`, `icmp_msgs_burst`).
const INTERVAL: Duration = Duration::from_millis(1);
const BURST: u32 = 50;

const ICMP: u8 = 1;
/// ICMP's questions and answers: the rest are errors, of which no errors are told (RFC 1122, section 3.2.2).
const ICMP_NO_ERRORS: [u8; 8] = [0, 8, 9, 10, 13, 14, 17, 18];

/// Why a packet can't be delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// Nobody leases the destination.
    NetUnreachable,
    TimeExceeded,
}

/// Who tells. Each clone has a limit of its own.
#[derive(Clone)]
pub(super) struct Answers {
    /// [`None`] without CAP_NET_RAW.
    socket: Option<Arc<OwnedFd>>,
    /// This host's address on the overlay.
    address: Ipv4Addr,
    limit: Limit,
}

impl Answers {
    /// From this host's address on the overlay.
    pub(super) fn new(address: Ipv4Addr) -> Self {
        // One that only sends, and gets nothing (raw(7)).
        let socket = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw);
        let socket = socket.inspect_err(|error| {
            warn!("open a raw socket: {error}; senders to addresses that nobody leases are not told so (CAP_NET_RAW)");
        });
        Self { socket: socket.ok().map(Arc::new), address, limit: Limit { spent_until: Instant::now() } }
    }

    /// Tells the sender of a packet, within the limit, if it may be told.
    pub(super) fn tell(&mut self, packet: &[u8], ipv4: &Ipv4, why: Why) {
        let Some(socket) =
            self.socket.as_ref().filter(|_| may_be_told(packet, ipv4) && self.limit.takes(Instant::now()))
        else {
            return;
        };
        let Some(answer) = answer(self.address, packet, ipv4, why) else { return };
        let to = SockaddrIn::from(SocketAddrV4::new(ipv4.source, 0));
        // There may be no way to it, or a rule against it.
        let _untold = sendto(socket.as_raw_fd(), &answer, &to, MsgFlags::MSG_DONTWAIT);
    }
}

fn may_be_told(packet: &[u8], ipv4: &Ipv4) -> bool {
    let icmp_type = packet.get(ipv4.header_len);
    let is_error = ipv4.protocol == ICMP && icmp_type.is_none_or(|kind| !ICMP_NO_ERRORS.contains(kind));
    !is_error && !ipv4.is_later_fragment && is_unicast(ipv4.source.to_bits()) && is_unicast(ipv4.destination.to_bits())
}

fn answer(from: Ipv4Addr, packet: &[u8], ipv4: &Ipv4, why: Why) -> Option<Vec<u8>> {
    let kind = match why {
        Why::NetUnreachable => Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Network),
        Why::TimeExceeded => Icmpv4Type::TimeExceeded(TimeExceededCode::TtlExceededInTransit),
    };
    let quoted = packet.get(..ipv4.total_len.min(ipv4.header_len + QUOTED))?;
    let mut answer = Vec::new();
    let builder = PacketBuilder::ipv4(from.octets(), ipv4.source.octets(), TTL).icmpv4(kind);
    builder.write(&mut answer, quoted).ok()?;
    Some(answer)
}

/// So many at once, and then one each interval (the generic cell rate algorithm, ITU-T I.371).
#[derive(Clone)]
struct Limit {
    spent_until: Instant,
}

impl Limit {
    fn takes(&mut self, now: Instant) -> bool {
        let spent_until = self.spent_until.max(now);
        let is_within = spent_until - now < INTERVAL * BURST;
        if is_within {
            self.spent_until = spent_until + INTERVAL;
        }
        is_within
    }
}

#[cfg(test)]
mod tests {
    use etherparse::{SlicedPacket, TransportSlice};

    use super::*;

    const OVERLAY: Ipv4Addr = Ipv4Addr::new(10, 5, 1, 0);

    fn packet(source: [u8; 4], icmp: Option<Icmpv4Type>) -> (Vec<u8>, Ipv4) {
        let mut packet = Vec::new();
        let builder = PacketBuilder::ipv4(source, [10, 5, 77, 3], 9);
        match icmp {
            Some(kind) => builder.icmpv4(kind).write(&mut packet, &[7; 100]).unwrap(),
            None => builder.udp(1, 2).write(&mut packet, &[7; 100]).unwrap(),
        }
        let ipv4 = Ipv4::of(&packet).unwrap();
        (packet, ipv4)
    }

    #[test]
    fn the_header_and_eight_bytes_are_quoted() {
        let (packet, ipv4) = packet([10, 5, 1, 2], None);
        for (why, kind) in [
            (Why::NetUnreachable, Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Network)),
            (Why::TimeExceeded, Icmpv4Type::TimeExceeded(TimeExceededCode::TtlExceededInTransit)),
        ] {
            let answer = answer(OVERLAY, &packet, &ipv4, why).unwrap();
            let sliced = SlicedPacket::from_ip(&answer).unwrap();
            let etherparse::NetSlice::Ipv4(ip) = sliced.net.unwrap() else { panic!("no IPv4") };
            assert_eq!(ip.header().source(), OVERLAY.octets());
            assert_eq!(ip.header().destination(), [10, 5, 1, 2]);
            let Some(TransportSlice::Icmpv4(icmp)) = sliced.transport else { panic!("no ICMP") };
            assert_eq!((icmp.icmp_type(), icmp.payload()), (kind, &packet[..28]));
        }
    }

    #[test]
    fn of_errors_and_from_nobody_nothing_is_told() {
        let echo = Icmpv4Type::EchoRequest(etherparse::IcmpEchoHeader { id: 1, seq: 1 });
        let error = Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Port);
        for (source, icmp, expected) in [
            ([10, 5, 1, 2], None, true),
            ([10, 5, 1, 2], Some(echo), true),
            ([10, 5, 1, 2], Some(error), false),
            ([0, 0, 0, 0], None, false),
            ([224, 0, 0, 1], None, false),
        ] {
            let (packet, ipv4) = packet(source, icmp.clone());
            assert_eq!(may_be_told(&packet, &ipv4), expected, "{source:?} {icmp:?}");
        }
        let (packet, ipv4) = packet([10, 5, 1, 2], None);
        assert!(!may_be_told(&packet, &Ipv4 { is_later_fragment: true, ..ipv4 }));
    }

    #[test]
    fn a_flood_is_told_a_thousand_times_a_second() {
        let start = Instant::now();
        let mut limit = Limit { spent_until: start };
        let told = (0..1_000_000u32).filter(|micros| limit.takes(start + Duration::from_micros((*micros).into())));
        assert_eq!(told.count(), 1000 + BURST as usize);
    }
}
