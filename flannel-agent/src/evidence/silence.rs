//! Peers that are sent packets and do not answer.

use std::{collections::HashMap, net::Ipv4Addr, time::Duration};

use ipnet::Ipv4Net;
use tokio::time::Instant;

use super::{FORGOTTEN, LASTING, SilentPeer};
use crate::dataplane::{PeerWay, Way};

/// How long a peer owes an answer before it is asked: by the look after the one that found the packet, which may have been
/// between it and its answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// So many peers are asked at once, at the most.
const MOST_ASKED: usize = 256;

/// What is known of each peer.
#[derive(Default)]
pub(super) struct Silence {
    peers: HashMap<(Ipv4Net, Ipv4Addr), Known>,
}

struct Known {
    /// How many packets had come from it.
    received: u64,
    /// How many packets had been sent to it by the time of the look at which it had been heard, and those of the agent's own since.
    sent: u64,
    /// Since when it owes an answer, by both clocks.
    owes: Option<(Instant, u64)>,
    /// How many packets were sent in vain when that was looked at last, and when it became so many.
    vain: (u64, Instant),
}

impl Silence {
    /// Takes what the maps say at some time: the peers that do not answer, and those to be asked.
    pub(super) fn take(&mut self, ways: &[PeerWay], at: Instant, clock: u64) -> (Vec<SilentPeer>, Vec<Ipv4Net>) {
        let (mut silent, mut to_ask) = (Vec::new(), Vec::new());
        let mut seen = HashMap::with_capacity(ways.len());
        for way in ways {
            let Some(traffic) = way.traffic.filter(|_| matches!(way.way, Way::Encapsulated | Way::Direct)) else {
                continue;
            };
            let key = (way.subnet, way.address);
            let (received, sent) = (traffic.received.packets, traffic.sent.packets);
            let fresh = || Known { received, sent, owes: None, vain: (0, at) };
            let mut known = self.peers.remove(&key).unwrap_or_else(fresh);
            // It is heard; or fewer were sent, where the maps are others.
            if received != known.received || sent < known.sent {
                known = fresh();
            }
            let vain = sent - known.sent;
            if vain > known.vain.0 {
                known.owes.get_or_insert((at, clock));
                known.vain = (vain, at);
            }
            if at.duration_since(known.vain.1) > FORGOTTEN {
                known = fresh();
            }
            if let Some((owes, since)) = known.owes {
                if at.duration_since(owes) >= PATIENCE {
                    to_ask.push(way.subnet);
                }
                if at.duration_since(owes) >= LASTING {
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
        to_ask.truncate(MOST_ASKED);
        (silent, to_ask)
    }

    /// These were sent so many packets by the agent.
    pub(super) fn asked(&mut self, subnets: impl IntoIterator<Item = (Ipv4Net, u64)>) {
        for (subnet, packets) in subnets {
            // Two hosts with one subnet are one entry of the maps.
            for (_, known) in self.peers.iter_mut().filter(|((of, _), _)| *of == subnet) {
                known.sent += packets;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use flannel_common::maps::{Counter, Traffic};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn peer(sent: u64, received: u64) -> PeerWay {
        let counter = |packets| Counter { packets, bytes: 0 };
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
            let (silent, to_ask) = silence.take(&ways, begun + second as u32 * SECOND, 100 + second);
            silence.asked(to_ask.iter().map(|subnet| (*subnet, 3)));
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
            |second: u64, sent| silence.take(&[peer(sent, 0)], begun + second as u32 * SECOND, second).0.len();
        assert_eq!([take(0, 0), take(2, 5), take(10, 5), take(62, 5), take(63, 5), take(80, 5)], [0, 0, 1, 1, 0, 0]);
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
