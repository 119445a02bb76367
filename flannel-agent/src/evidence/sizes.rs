//! Peers that small packets reach and large ones do not: a link on the way carries less than the underlay's MTU says, and drops what is
//! larger without a word.
//!
//! A peer that is sent large packets and from which nothing comes back is asked by two datagrams, one of the overlay's MTU and an empty
//! one, to a port that nobody listens at. Its host answers each by an ICMP message with no more than 576 bytes of it (RFC 1812 section
//! 4.3.2.3), which fits on any way back. Where traffic goes both ways nobody is asked.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    time::Duration,
};

use flannel_common::maps::Counter;
use ipnet::Ipv4Net;
use nix::sys::socket::{getsockopt, sockopt::IpMtu};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{FORGOTTEN, probe::NOBODYS_PORT};
use crate::dataplane::{PeerWay, Way};

/// How often a peer is asked that answers both, or neither.
const PERIOD: Duration = Duration::from_secs(30);
/// Packets that fit on any way have no more bytes of IPv4 (RFC 791 section 3.1).
const SMALL: u64 = 576;
/// So many are asked at one look, at the most.
const MOST_ASKED: usize = 64;
/// So many times in a row a large datagram is not answered and a small one is.
const ENOUGH: u32 = 2;
/// Bytes of IPv4 and UDP header.
const HEADERS: u32 = 28;

/// A peer that large packets do not reach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NarrowPeer {
    /// Its subnet.
    pub subnet: Ipv4Net,
    /// Its VTEP address.
    pub public_ip: Ipv4Addr,
    /// Since when, in seconds since 1970.
    pub since: u64,
    /// The size of the packets that do not arrive, in bytes of IPv4.
    pub size: u32,
}

/// Asks, and says whether there was an answer.
pub(super) trait Ask {
    /// A question that was sent.
    type Question;

    /// Sends a datagram to the host behind a subnet: one as large as the overlay has, or an empty one.
    fn ask(&self, subnet: Ipv4Net, is_large: bool) -> Option<Self::Question>;

    /// The size of its packet, in bytes of IPv4.
    fn size(&self, question: &Self::Question) -> u32;

    /// Whether it was answered by now.
    fn is_answered(&self, question: &Self::Question) -> bool;
}

/// By sockets of their own, to which the kernel gives the ICMP messages as errors.
pub(super) struct Sockets;

impl Ask for Sockets {
    type Question = (UdpSocket, u32);

    fn ask(&self, subnet: Ipv4Net, is_large: bool) -> Option<Self::Question> {
        let ask = || -> io::Result<Self::Question> {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            socket.connect(SocketAddrV4::new(subnet.network(), NOBODYS_PORT))?;
            let size = match is_large {
                true => u32::try_from(getsockopt(&socket, IpMtu)?).unwrap_or_default(),
                false => HEADERS,
            };
            socket.send(&vec![0; size.saturating_sub(HEADERS) as usize])?;
            Ok((socket, size))
        };
        ask().ok()
    }

    fn size(&self, (_, size): &Self::Question) -> u32 {
        *size
    }

    fn is_answered(&self, (socket, _): &Self::Question) -> bool {
        socket.take_error().is_ok_and(|error| error.is_some())
    }
}

/// What is known of each peer that is sent to.
pub(super) struct Sizes<A: Ask = Sockets> {
    ask: A,
    peers: HashMap<(Ipv4Net, Ipv4Addr), Known<A::Question>>,
}

struct Known<Q> {
    /// What was sent to it, and when that had grown.
    sent: (Counter, Instant),
    asked: Option<(Instant, Questions<Q>)>,
    /// How many times in a row only the small datagram was answered, since when, and how large the other was.
    narrow: Option<(u32, u64, u32)>,
}

struct Questions<Q> {
    large: Q,
    small: Q,
}

impl Sizes {
    pub(super) fn new() -> Self {
        Self { ask: Sockets, peers: HashMap::new() }
    }
}

impl<A: Ask> Sizes<A> {
    /// Takes what the maps say at some time, and the subnets that were sent packets since the last look and from which nothing came: the
    /// peers that large packets do not reach, and how many packets were sent by this to which subnets.
    pub(super) fn take(
        &mut self,
        ways: &[PeerWay],
        unanswered: &HashSet<Ipv4Net>,
        at: Instant,
        clock: u64,
    ) -> (Vec<NarrowPeer>, Vec<(Ipv4Net, u64)>) {
        let (mut narrow, mut asked) = (Vec::new(), Vec::new());
        let mut seen = HashMap::with_capacity(ways.len());
        for way in ways {
            // What does not fit on a way that is known to be smaller is told to who sends it.
            let is_watched = way.way == Way::Encapsulated && way.smaller_mtu.is_none();
            let Some(traffic) = way.traffic.filter(|_| is_watched) else { continue };
            let key = (way.subnet, way.address);
            let sent = traffic.sent;
            let fresh = || Known { sent: (sent, at), asked: None, narrow: None };
            let mut known = self.peers.remove(&key).unwrap_or_else(fresh);
            let (before, grew) = known.sent;
            if sent.packets < before.packets || at.duration_since(grew) > FORGOTTEN {
                // The maps are others; or nobody sends to it any more.
                known = fresh();
            } else if sent.packets > before.packets {
                known.sent = (sent, at);
            }
            let packets = sent.packets.saturating_sub(before.packets);
            let is_large = packets > 0 && sent.bytes.saturating_sub(before.bytes) / packets > SMALL;
            let is_unanswered = is_large && unanswered.contains(&way.subnet);
            let is_due = match (known.judge(&self.ask, clock), &known.asked) {
                (true, _) => true,
                (false, None) => is_unanswered,
                (false, Some((before, _))) => is_unanswered && at.duration_since(*before) >= PERIOD,
            };
            if is_due && asked.len() < MOST_ASKED {
                let questions = [true, false].map(|is_large| self.ask.ask(way.subnet, is_large));
                let sizes = questions.iter().flatten().map(|question| u64::from(self.ask.size(question)));
                let (packets, bytes) = (sizes.clone().count() as u64, sizes.sum::<u64>());
                asked.push((way.subnet, packets));
                // Its own are no traffic.
                known.sent.0.packets += packets;
                known.sent.0.bytes += bytes;
                if let [Some(large), Some(small)] = questions {
                    known.asked = Some((at, Questions { large, small }));
                }
            }
            if let Some((times, since, size)) = known.narrow
                && times >= ENOUGH
            {
                narrow.push(NarrowPeer { subnet: way.subnet, public_ip: way.address, since, size });
            }
            seen.insert(key, known);
        }
        self.peers = seen;
        (narrow, asked)
    }
}

impl<Q> Known<Q> {
    /// Looks for answers. Whether only the small datagram was answered, so that both are to be asked again.
    fn judge<A: Ask<Question = Q>>(&mut self, ask: &A, clock: u64) -> bool {
        let Some((_, Questions { large, small })) = &self.asked else { return false };
        if ask.is_answered(large) {
            self.narrow = None;
            return false;
        }
        let is_narrow = ask.is_answered(small);
        if is_narrow {
            let (times, since, _) = self.narrow.unwrap_or((0, clock, 0));
            self.narrow = Some((times + 1, since, ask.size(large)));
        }
        is_narrow
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use flannel_common::maps::Traffic;

    use super::*;

    const MTU: u32 = 1450;

    /// A host that answers what is no larger than this.
    struct Host {
        largest: u32,
        asked: RefCell<Vec<u32>>,
    }

    impl Ask for &Host {
        type Question = u32;

        fn ask(&self, _: Ipv4Net, is_large: bool) -> Option<u32> {
            let size = if is_large { MTU } else { HEADERS };
            self.asked.borrow_mut().push(size);
            Some(size)
        }

        fn size(&self, question: &u32) -> u32 {
            *question
        }

        fn is_answered(&self, question: &u32) -> bool {
            *question <= self.largest
        }
    }

    fn host(largest: u32) -> Host {
        Host { largest, asked: RefCell::default() }
    }

    /// What is found at each of some looks, two seconds apart, with a packet of that size sent before each.
    fn found(host: &Host, looks: u32, size: u64, is_answered: bool) -> Vec<Vec<NarrowPeer>> {
        let mut sizes = Sizes { ask: host, peers: HashMap::new() };
        let begun = Instant::now() + Duration::from_secs(1000);
        let unanswered = (!is_answered).then(|| "10.5.2.0/24".parse().unwrap()).into_iter().collect();
        let mut own = Counter { packets: 0, bytes: 0 };
        let look = |number: u32| {
            let packets = u64::from(number) + own.packets;
            let sent = Counter { packets, bytes: u64::from(number) * size + own.bytes };
            let way = PeerWay {
                subnet: "10.5.2.0/24".parse().unwrap(),
                address: [192, 0, 2, 2].into(),
                way: Way::Encapsulated,
                next_hop: [192, 0, 2, 2].into(),
                smaller_mtu: None,
                vtep_mac: [2, 0, 0, 0, 0, 2],
                ifindex: 2,
                heard: None,
                traffic: Some(Traffic { sent, received: Counter { packets: 0, bytes: 0 } }),
            };
            let before = host.asked.borrow().len();
            let (narrow, _) =
                sizes.take(&[way], &unanswered, begun + 2 * number * Duration::from_secs(1), 100 + u64::from(number));
            for size in &host.asked.borrow()[before..] {
                own.packets += 1;
                own.bytes += u64::from(*size);
            }
            narrow
        };
        (0..looks).map(look).collect()
    }

    #[test]
    fn a_peer_that_only_small_packets_reach_is_named_at_the_fourth_look() {
        let host = host(1400);
        let looks = found(&host, 6, 1450, false);
        assert!(looks[..3].iter().all(Vec::is_empty), "{looks:?}");
        let subnet = "10.5.2.0/24".parse().unwrap();
        let named = NarrowPeer { subnet, public_ip: [192, 0, 2, 2].into(), since: 102, size: MTU };
        assert!(looks[3..].iter().all(|found| *found == [named.clone()]), "{looks:?}");
    }

    #[test]
    fn a_peer_that_answers_all_or_nothing_is_asked_seldom_and_not_named() {
        for largest in [1500, 0] {
            let host = host(largest);
            assert!(found(&host, 30, 1450, false).iter().all(Vec::is_empty));
            // At the second look, and every 30 s of the minute.
            assert_eq!(*host.asked.borrow(), [MTU, HEADERS, MTU, HEADERS]);
        }
    }

    #[test]
    fn nobody_is_asked_who_is_heard_or_sent_small_packets_or_nothing() {
        for (size, is_answered) in [(1450, true), (500, false)] {
            let host = host(1400);
            assert!(found(&host, 10, size, is_answered).iter().all(Vec::is_empty));
            assert!(host.asked.borrow().is_empty(), "{size} {is_answered}");
        }
    }
}
