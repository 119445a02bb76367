//! Packets that go in somewhere on this host and do not come out.

use flannel_common::{event::Event, maps::Counter};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{FORGOTTEN, LASTING, Loss};

/// So many packets have to be lost, and none to come through.
const FEWEST: u64 = 5;

/// Where they are lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum LossKind {
    /// Tunnel packets that were admitted and left to the kernel do not come out of `flannel.<VNI>`.
    Tunnel,
    /// What came out of the tunnel for pods reaches none.
    Forwarding,
    /// What is for peers that the underlay does not reach.
    Unreached,
}

impl LossKind {
    /// Each of them.
    pub const ALL: [Self; 3] = [Self::Tunnel, Self::Forwarding, Self::Unreached];

    /// Its name in metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Tunnel => "tunnel",
            Self::Forwarding => "forwarding",
            Self::Unreached => "unreached",
        }
    }
}

/// What each kind is known of.
pub(super) struct Losses {
    sees_pods: bool,
    stretches: [Option<Stretch>; LossKind::ALL.len()],
}

/// Since nothing came through.
struct Stretch {
    begun: Instant,
    clock: u64,
    /// What had gone in, and come out, by then.
    gone_in: u64,
    come_out: u64,
    /// What had gone in when that was looked at last, and when it became so much.
    latest: (u64, Instant),
}

impl Losses {
    pub(super) const fn new(sees_pods: bool) -> Self {
        Self { sees_pods, stretches: [const { None }; LossKind::ALL.len()] }
    }

    /// Takes the counters at some time, and whether there are peers then that the underlay does not reach.
    pub(super) fn take(
        &mut self,
        counters: &[(Event, Counter)],
        are_unreached: bool,
        at: Instant,
        clock: u64,
    ) -> Vec<Loss> {
        let count = |events: &[Event]| -> u64 {
            counters.iter().filter(|(event, _)| events.contains(event)).map(|(_, counter)| counter.packets).sum()
        };
        let received = count(&[Event::Received, Event::ReceivedByHost]);
        let handed_in = count(&[Event::HandedIn, Event::DirectHandedIn]);
        let mut lost = Vec::new();
        for (kind, stretch) in LossKind::ALL.into_iter().zip(&mut self.stretches) {
            let (gone_in, come_out) = match kind {
                // What is handed in past the kernel's tunnel comes out there, too.
                LossKind::Tunnel => {
                    (count(&[Event::Admitted, Event::AdmittedByRoute]), received.saturating_sub(handed_in))
                }
                LossKind::Forwarding if !self.sees_pods => continue,
                LossKind::Forwarding => {
                    let reached = count(&[Event::PodReleased, Event::PodChanged, Event::PodReceived]);
                    (count(&[Event::Received, Event::DirectReceived]), reached)
                }
                LossKind::Unreached => (count(&[Event::EncapNoRoute, Event::RoutedNotOnLink]), 0),
            };
            let fresh = || Stretch { begun: at, clock, gone_in, come_out, latest: (gone_in, at) };
            let known = stretch.get_or_insert_with(fresh);
            if gone_in > known.latest.0 {
                known.latest = (gone_in, at);
            }
            let packets = gone_in.saturating_sub(known.gone_in);
            let is_over = kind == LossKind::Unreached && !are_unreached
                || come_out > known.come_out
                || at.duration_since(known.latest.1) > FORGOTTEN;
            // The maps may be others.
            if is_over || gone_in < known.gone_in || packets == 0 {
                *known = fresh();
            } else if packets >= FEWEST && at.duration_since(known.begun) >= LASTING {
                lost.push(Loss { kind, since: known.clock, packets });
            }
        }
        lost
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn counters_of(admitted: u64, handed_in: u64, received: u64, reached: u64) -> Vec<(Event, Counter)> {
        let counter = |packets| Counter { packets, bytes: 0 };
        vec![
            (Event::Admitted, counter(admitted)),
            (Event::HandedIn, counter(handed_in)),
            (Event::Received, counter(received)),
            (Event::PodReceived, counter(reached)),
        ]
    }

    #[test]
    fn what_goes_in_and_never_comes_out_is_lost() {
        let begun = Instant::now();
        let mut losses = Losses::new(true);
        let mut take = |second, counters: [u64; 4]| {
            let [admitted, handed_in, received, reached] = counters;
            let counters = counters_of(admitted, handed_in, received, reached);
            let lost = losses.take(&counters, false, begun + Duration::from_secs(second), second);
            lost.into_iter().map(|loss| (loss.kind, loss.since, loss.packets)).collect::<Vec<_>>()
        };
        assert_eq!(take(0, [10, 10, 18, 18]), []);
        // What is handed in comes out; what is admitted does not.
        assert_eq!(take(2, [13, 20, 28, 28]), []);
        assert_eq!(take(4, [16, 30, 38, 38]), [(LossKind::Tunnel, 0, 6)]);
        // Nothing reaches a pod, either.
        assert_eq!(take(6, [16, 40, 48, 38]), [(LossKind::Tunnel, 0, 6)]);
        assert_eq!(take(8, [16, 50, 58, 38]), [(LossKind::Tunnel, 0, 6), (LossKind::Forwarding, 4, 20)]);
        assert_eq!(take(10, [17, 50, 59, 39]), [], "one comes through");
        assert_eq!(take(12, [18, 50, 60, 40]), []);
    }

    #[test]
    fn single_packets_and_what_was_long_ago_are_no_evidence() {
        let begun = Instant::now();
        let mut losses = Losses::new(true);
        let mut take = |second, received| {
            losses.take(&counters_of(0, received, received, 0), true, begun + Duration::from_secs(second), second).len()
        };
        assert_eq!([take(0, 0), take(2, 2), take(20, 4), take(22, 5), take(60, 5), take(83, 5)], [0, 0, 0, 1, 1, 0]);
        let mut unseen = Losses::new(false);
        for second in 0..20 {
            let counters = counters_of(0, second, second, 0);
            assert_eq!(unseen.take(&counters, true, begun + Duration::from_secs(second), second), []);
        }
    }

    #[test]
    fn what_was_for_peers_without_a_route_is_over_when_they_have_one() {
        let begun = Instant::now();
        let mut losses = Losses::new(true);
        let mut take = |second, packets, are_unreached| {
            let counters = [(Event::EncapNoRoute, Counter { packets, bytes: 0 })];
            losses.take(&counters, are_unreached, begun + Duration::from_secs(second), second).len()
        };
        assert_eq!([take(0, 0, true), take(2, 9, true), take(4, 20, true), take(6, 30, true)], [0, 0, 1, 1]);
        assert_eq!([take(8, 31, false), take(10, 31, false)], [0, 0]);
    }
}
