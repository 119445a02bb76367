//! Peers that are sent packets and do not answer.

use std::{collections::HashMap, net::Ipv4Addr, time::Duration};

use flannel_common::maps::Counter;
use ipnet::Ipv4Net;
use tokio::time::Instant;

use super::{FORGOTTEN, LASTING, SilentPeer};
use crate::dataplane::{PeerWay, Way};

/// How long a peer owes an answer before it is asked: by the look after the one that found the packet, which may have been
/// between it and its answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// So many peers are asked at once, at the most.
const MOST_ASKED: usize = 256;
/// Packets that fit on any way have no more bytes of IPv4 (RFC 791 section 3.1).
const SMALL: u64 = 576;

/// A peer that was sent packets, and from which nothing has come since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owing {
    pub(super) subnet: Ipv4Net,
    pub(super) public_ip: Ipv4Addr,
    /// Whether these were large, in a tunnel whose way is not known to carry less than it should: what does not fit on one that is,
    /// is told to who sends it.
    pub(super) is_large: bool,
    /// How often it was asked by now.
    pub(super) asked: u32,
}

/// What is known of each peer.
#[derive(Default)]
pub(super) struct Silence {
    peers: HashMap<(Ipv4Net, Ipv4Addr), Known>,
}

struct Known {
    /// How many packets had come from it.
    received: u64,
    /// What had been sent to it by the time of the look at which it had been heard, and the agent's own since.
    sent: Counter,
    /// Since when it owes an answer, by both clocks.
    owes: Option<(Instant, u64)>,
    /// How many packets were sent in vain when that was looked at last, and when it became so many.
    vain: (u64, Instant),
    /// How often it was asked since.
    asked: u32,
}

impl Silence {
    /// Takes what the maps say at some time: the peers that do not answer, and those to be asked.
    pub(super) fn take(&mut self, ways: &[PeerWay], at: Instant, clock: u64) -> (Vec<SilentPeer>, Vec<Owing>) {
        let (mut silent, mut owing) = (Vec::new(), Vec::new());
        let mut seen = HashMap::with_capacity(ways.len());
        for way in ways {
            let Some(traffic) = way.traffic.filter(|_| matches!(way.way, Way::Encapsulated | Way::Direct)) else {
                continue;
            };
            let key = (way.subnet, way.address);
            let (received, sent) = (traffic.received.packets, traffic.sent);
            let fresh = || Known { received, sent, owes: None, vain: (0, at), asked: 0 };
            let mut known = self.peers.remove(&key).unwrap_or_else(fresh);
            // It is heard; or fewer were sent, where the maps are others.
            if received != known.received || sent.packets < known.sent.packets {
                known = fresh();
            }
            let vain = sent.packets - known.sent.packets;
            if vain > known.vain.0 {
                known.owes.get_or_insert((at, clock));
                known.vain = (vain, at);
            }
            if at.duration_since(known.vain.1) > FORGOTTEN {
                known = fresh();
            }
            if let Some((owes, since)) = known.owes {
                if at.duration_since(owes) >= PATIENCE {
                    let is_open = way.way == Way::Encapsulated && way.smaller_mtu.is_none();
                    let mean = sent.bytes.saturating_sub(known.sent.bytes).checked_div(vain).unwrap_or_default();
                    owing.push(Owing {
                        subnet: way.subnet,
                        public_ip: way.address,
                        is_large: is_open && mean > SMALL,
                        asked: known.asked,
                    });
                }
                if at.duration_since(owes) >= LASTING && known.asked > 0 {
                    let last_heard = way.heard.map(|ago| clock.saturating_sub(ago.as_secs()));
                    silent.push(SilentPeer {
                        subnet: way.subnet,
                        public_ip: way.address,
                        since,
                        last_heard,
                        sent: known.vain.0,
                    });
                }
            }
            seen.insert(key, known);
        }
        self.peers = seen;
        (silent, owing)
    }

    /// Those of them that are asked now: who was not asked yet comes first.
    pub(super) fn to_ask(owing: &[Owing]) -> Vec<Owing> {
        let mut to_ask = owing.to_vec();
        to_ask.sort_by_key(|peer| peer.asked);
        to_ask.truncate(MOST_ASKED);
        to_ask
    }

    /// These were sent so much by the agent.
    pub(super) fn asked(&mut self, peers: impl IntoIterator<Item = (Ipv4Net, Ipv4Addr, Counter)>) {
        for (subnet, public_ip, Counter { packets, bytes }) in peers {
            if let Some(known) = self.peers.get_mut(&(subnet, public_ip)) {
                known.sent.packets += packets;
                known.sent.bytes += bytes;
                known.asked += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use flannel_common::maps::Traffic;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn peer(sent: u64, received: u64) -> PeerWay {
        let counter = |packets| Counter { packets, bytes: 1000 * packets };
        PeerWay {
            subnet: "10.5.2.0/24".parse().unwrap(),
            address: [192, 0, 2, 2].into(),
            way: Way::Encapsulated,
            next_hop: [192, 0, 2, 2].into(),
            smaller_mtu: None,
            vtep_mac: [2, 0, 0, 0, 0, 2],
            ifindex: 2,
            heard: (received > 0).then_some(Duration::ZERO),
            traffic: Some(Traffic { sent: counter(sent), received: counter(received) }),
        }
    }

    #[test]
    fn a_peer_that_is_sent_to_and_never_heard_is_asked_and_then_named() {
        let begun = Instant::now() + Duration::from_secs(1000);
        let mut silence = Silence::default();
        let mut take = |second: u64, sent, received| {
            let ways = [peer(sent, received)];
            let (silent, owing) = silence.take(&ways, begun + second as u32 * SECOND, 100 + second);
            let to_ask = Silence::to_ask(&owing);
            let own = Counter { packets: 3, bytes: 84 };
            silence.asked(to_ask.iter().map(|peer| (peer.subnet, peer.public_ip, own)));
            (silent.first().map(|peer| (peer.sent, peer.since)), to_ask.len())
        };
        assert_eq!(take(0, 7, 0), (None, 0), "what was sent before this was looked at");
        assert_eq!(take(2, 9, 0), (None, 0), "the answer may be on its way");
        assert_eq!(take(4, 10, 0), (None, 1));
        // The agent's own are among those that were sent.
        assert_eq!(take(6, 15, 0), (Some((5, 102)), 1));
        assert_eq!(take(8, 18, 0), (Some((5, 102)), 1));
        assert_eq!(take(10, 21, 1), (None, 0), "it answers");
        assert_eq!(take(12, 21, 1), (None, 0));
    }

    #[test]
    fn a_peer_that_answers_is_never_asked() {
        let begun = Instant::now() + Duration::from_secs(1000);
        let mut silence = Silence::default();
        // A request at each look, whose answer comes before the next one.
        for look in 0..20_u64 {
            let (silent, to_ask) = silence.take(&[peer(look + 1, look)], begun + 2 * look as u32 * SECOND, look);
            assert_eq!((silent.len(), to_ask.len()), (0, 0), "{look}");
        }
    }

    #[test]
    fn nothing_is_owed_that_nobody_asks_for_any_more() {
        let begun = Instant::now() + Duration::from_secs(1000);
        let mut silence = Silence::default();
        let mut take =
            |second: u64, sent| silence.take(&[peer(sent, 0)], begun + second as u32 * SECOND, second).1.len();
        assert_eq!([take(0, 0), take(2, 5), take(10, 5), take(62, 5), take(63, 5), take(80, 5)], [0, 0, 1, 1, 0, 0]);
    }

    #[test]
    fn of_many_each_is_asked_before_it_is_named() {
        let begun = Instant::now() + Duration::from_secs(1000);
        let mut silence = Silence::default();
        let peers = |sent| {
            let subnet =
                |number: u16| Ipv4Net::new(Ipv4Addr::from(0x0a05_0000 + (u32::from(number) << 8)), 24).unwrap();
            (0..600).map(|number| PeerWay { subnet: subnet(number), ..peer(sent, 0) }).collect::<Vec<_>>()
        };
        let mut asked = std::collections::HashSet::new();
        for look in 0..8_u32 {
            let (silent, owing) = silence.take(&peers(look.into()), begun + 2 * look * SECOND, 0);
            assert!(silent.iter().all(|peer| asked.contains(&peer.subnet)), "{look}");
            let to_ask = Silence::to_ask(&owing);
            asked.extend(to_ask.iter().map(|peer| peer.subnet));
            silence.asked(to_ask.iter().map(|peer| (peer.subnet, peer.public_ip, Counter { packets: 0, bytes: 0 })));
        }
        assert_eq!(asked.len(), 600);
    }

    #[test]
    fn a_peer_that_is_not_sent_to_is_none() {
        let begun = Instant::now() + Duration::from_secs(1000);
        let mut silence = Silence::default();
        let idle = peer(5, 3);
        let no_route = PeerWay { way: Way::NoRoute, ..peer(5, 0) };
        for second in 0..100 {
            for way in [&idle, &no_route] {
                let (silent, to_ask) = silence.take(std::slice::from_ref(way), begun + second * SECOND, 0);
                assert_eq!((silent.len(), to_ask.len()), (0, 0));
            }
        }
    }
}
