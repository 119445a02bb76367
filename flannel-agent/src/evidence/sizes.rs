//! Peers that small packets reach and large ones do not: a link on the way carries less than the underlay's MTU says, and drops what is
//! larger without a word.
//!
//! A peer that is sent large packets and from which nothing comes back is asked by two datagrams, one of the overlay's MTU and an empty
//! one, to a port that nobody listens at. Its host answers each by an ICMP message with no more than 576 bytes of it (RFC 1812 section
//! 4.3.2.3), which fits on any way back. Where traffic goes both ways nobody is asked.

use std::{
    collections::BTreeMap,
    io,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    time::Duration,
};

use flannel_common::maps::Counter;
use ipnet::Ipv4Net;
use nix::sys::socket::{getsockopt, sockopt::IpMtu};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{
    FORGOTTEN,
    probe::{HEADERS, NOBODYS_PORT},
    silence::Owing,
};

/// How often a peer is asked that answers both, or neither.
const PERIOD: Duration = Duration::from_secs(30);
/// How often one is asked again that is named. A host sends a peer one ICMP message a second in the long run (`icmp_ratelimit`).
const AGAIN: Duration = Duration::from_secs(6);
/// So many are asked at one look, at the most.
const MOST_ASKED: usize = 64;
/// So many times in a row a large datagram is not answered and a small one is.
const ENOUGH: u32 = 2;

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

    /// Whether it was answered by now, which is seen once.
    fn is_answered(&self, question: Self::Question) -> bool;
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

    fn is_answered(&self, (socket, _): Self::Question) -> bool {
        socket.take_error().is_ok_and(|error| error.is_some())
    }
}

/// What is known of peers that are sent large packets and do not answer.
pub(super) struct Sizes<A: Ask = Sockets> {
    ask: A,
    peers: BTreeMap<(Ipv4Net, Ipv4Addr), Known<A::Question>>,
}

struct Known<Q> {
    /// When it owed an answer to large packets last.
    owed: Instant,
    /// When it was asked last.
    asked: Option<Instant>,
    /// The large and the small datagram that nobody has looked for an answer to.
    questions: Option<[Q; 2]>,
    narrow: Option<Narrow>,
}

/// Only the small datagram was answered.
#[derive(Clone, Copy)]
struct Narrow {
    /// So many times in a row.
    times: u32,
    /// Since when, in seconds since 1970.
    since: u64,
    /// How large the other one was, in bytes of IPv4.
    size: u32,
}

impl Sizes {
    pub(super) fn new() -> Self {
        Self { ask: Sockets, peers: BTreeMap::new() }
    }
}

impl<A: Ask> Sizes<A> {
    /// Takes the peers that owe an answer at some time: those that large packets do not reach, and what was sent by this to whom.
    pub(super) fn take(
        &mut self,
        owing: &[Owing],
        at: Instant,
        clock: u64,
    ) -> (Vec<NarrowPeer>, Vec<(Ipv4Net, Ipv4Addr, Counter)>) {
        for peer in owing.iter().filter(|peer| peer.is_large) {
            let fresh = || Known { owed: at, asked: None, questions: None, narrow: None };
            self.peers.entry((peer.subnet, peer.public_ip)).or_insert_with(fresh).owed = at;
        }
        self.peers.retain(|_, known| at.duration_since(known.owed) <= FORGOTTEN);
        let (mut narrow, mut asked) = (Vec::new(), Vec::new());
        for (&(subnet, public_ip), known) in &mut self.peers {
            known.judge(&self.ask, clock);
            if known.is_due(at) && asked.len() < MOST_ASKED {
                known.asked = Some(at);
                let questions = [true, false].map(|is_large| self.ask.ask(subnet, is_large));
                let sizes = questions.iter().flatten().map(|question| u64::from(self.ask.size(question)));
                let own = Counter { packets: sizes.clone().count() as u64, bytes: sizes.sum() };
                asked.push((subnet, public_ip, own));
                if let [Some(large), Some(small)] = questions {
                    known.questions = Some([large, small]);
                }
            }
            if let Some(Narrow { since, size, .. }) = known.narrow.filter(|narrow| narrow.times >= ENOUGH) {
                narrow.push(NarrowPeer { subnet, public_ip, since, size });
            }
        }
        (narrow, asked)
    }
}

impl<Q> Known<Q> {
    /// Looks for answers to what was asked at the look before.
    fn judge<A: Ask<Question = Q>>(&mut self, ask: &A, clock: u64) {
        let Some([large, small]) = self.questions.take() else { return };
        let size = ask.size(&large);
        self.narrow = match (ask.is_answered(large), ask.is_answered(small)) {
            (false, true) => {
                let Narrow { times, since, .. } = self.narrow.unwrap_or(Narrow { times: 0, since: clock, size });
                Some(Narrow { times: times + 1, since, size })
            }
            _ => None,
        };
    }

    fn is_due(&self, at: Instant) -> bool {
        let Some(asked) = self.asked else { return true };
        let ago = at.duration_since(asked);
        match self.narrow {
            Some(narrow) => narrow.times < ENOUGH || ago >= AGAIN,
            None => self.owed == at && ago >= PERIOD,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

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

        fn is_answered(&self, question: u32) -> bool {
            question <= self.largest
        }
    }

    fn host(largest: u32) -> Host {
        Host { largest, asked: RefCell::default() }
    }

    /// What is found at each of some looks, two seconds apart, at which a peer owes an answer to large packets, or to small ones.
    fn found(host: &Host, looks: u32, is_large: bool) -> Vec<Vec<NarrowPeer>> {
        let mut sizes = Sizes { ask: host, peers: BTreeMap::new() };
        let begun = Instant::now() + Duration::from_secs(1000);
        let (subnet, public_ip) = ("10.5.2.0/24".parse().unwrap(), [192, 0, 2, 2].into());
        let owing = [Owing { subnet, public_ip, is_large, asked: 0 }];
        let look =
            |number: u32| sizes.take(&owing, begun + 2 * number * Duration::from_secs(1), 100 + u64::from(number)).0;
        (0..looks).map(look).collect()
    }

    #[test]
    fn a_peer_that_only_small_packets_reach_is_named_at_the_third_look() {
        let host = host(1400);
        let looks = found(&host, 20, true);
        assert!(looks[..2].iter().all(Vec::is_empty), "{looks:?}");
        let subnet = "10.5.2.0/24".parse().unwrap();
        let named = NarrowPeer { subnet, public_ip: [192, 0, 2, 2].into(), since: 101, size: MTU };
        assert!(looks[2..].iter().all(|found| *found == [named.clone()]), "{looks:?}");
        // At the first two looks, and every 6 s of the 36 that follow.
        assert_eq!(host.asked.borrow().len(), 2 * (2 + 6));
    }

    #[test]
    fn a_peer_that_answers_all_or_nothing_is_asked_seldom_and_not_named() {
        for largest in [1500, 0] {
            let host = host(largest);
            assert!(found(&host, 30, true).iter().all(Vec::is_empty));
            // At once, and every 30 s of the minute.
            assert_eq!(*host.asked.borrow(), [MTU, HEADERS, MTU, HEADERS]);
        }
    }

    #[test]
    fn nobody_is_asked_who_is_sent_small_packets() {
        let host = host(1400);
        assert!(found(&host, 10, false).iter().all(Vec::is_empty));
        assert!(host.asked.borrow().is_empty());
    }
}
