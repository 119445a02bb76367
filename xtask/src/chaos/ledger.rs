//! Which packets were sent and which came, and the rules by which that is judged. Pure: times are handed in, from the run's
//! beginning.

use std::{
    collections::{BTreeMap, VecDeque},
    net::Ipv4Addr,
    time::Duration,
};

use super::timeline::HostId;

/// A pod from its coming to its going; one that comes with the same address is another.
pub(super) type PodId = u32;

/// A packet that has not come by then is lost: longer than the kernel keeps one for a next hop that it resolves (three
/// requests, a second apart).
pub(super) const LOST_AFTER: Duration = Duration::from_secs(5);
/// So many packets are numbered at once, so that each leaves soon after.
pub(super) const BATCH: usize = 32;
/// A pause between two packets of a pair that is worth a look.
const PAUSE: Duration = Duration::from_millis(300);

/// What a packet says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    /// The run, so that nothing of another one counts.
    pub run: u32,
    /// Who sent it.
    pub from: PodId,
    /// Whom it is for.
    pub to: PodId,
    /// Its number among those of the two.
    pub number: u64,
}

impl Stamp {
    const MAGIC: [u8; 4] = *b"chao";
    /// Bytes in a packet.
    pub(super) const LEN: usize = 24;

    /// As bytes.
    pub(super) fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..4].copy_from_slice(&Self::MAGIC);
        bytes[4..8].copy_from_slice(&self.run.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.from.to_be_bytes());
        bytes[12..16].copy_from_slice(&self.to.to_be_bytes());
        bytes[16..].copy_from_slice(&self.number.to_be_bytes());
        bytes
    }

    /// From bytes; [`None`] where they are none.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::LEN] = bytes.first_chunk()?;
        let [magic, run, from, to, high, low] =
            [0, 4, 8, 12, 16, 20].map(|at| [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let word = u32::from_be_bytes;
        let number = u64::from(word(high)) << 32 | u64::from(word(low));
        (magic == Self::MAGIC).then(|| Self { run: word(run), from: word(from), to: word(to), number })
    }
}

/// Which addresses and ports packets from one pod to another have. Every pod asks some by a service's address, answers those that
/// ask it so, and sends to the others by their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// To the pod's own address.
    Direct,
    /// To the address of a service, which netfilter translates.
    Service,
    /// Back to who asks by a service's address, whose host has it come from there.
    Answer,
}

impl Way {
    fn between(from: PodId, to: PodId) -> Self {
        if from.abs_diff(to).is_multiple_of(2) {
            Self::Direct
        } else if from < to {
            Self::Service
        } else {
            Self::Answer
        }
    }
}

/// A pod, as traffic knows it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Member {
    /// Its host.
    pub host: HostId,
    /// Its address.
    pub address: Ipv4Addr,
    /// When it went.
    pub gone: Option<Duration>,
}

/// Packets from one pod to another.
#[derive(Debug, Default)]
struct Pair {
    sent: u64,
    due: Duration,
    /// Number and time of those that have not come; [`None`] for one that has.
    outstanding: VecDeque<(u64, Option<Duration>)>,
    last_received: Option<Duration>,
}

/// A packet that did not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lost {
    /// Who sent it, and on which host.
    pub from: (PodId, HostId),
    /// Whom it was for.
    pub to: (PodId, HostId),
    /// Its number.
    pub number: u64,
    /// When it was sent.
    pub sent: Duration,
}

/// Nothing came for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pause {
    /// Between these hosts.
    pub hosts: (HostId, HostId),
    /// From then on.
    pub from: Duration,
    /// For so long.
    pub lasted: Duration,
}

/// What the receiver of a packet finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    /// It is for this pod.
    Right,
    /// It is for a pod that had this pod's address and went while the packet was on its way: IP knows no better.
    Successor,
    /// It is for another pod.
    Wrong,
}

/// Sums.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Packets sent.
    pub sent: u64,
    /// Packets that came.
    pub received: u64,
    /// Of these, packets to the address of a service, and answers to such.
    pub by_service: u64,
    /// Packets that came to a pod with the address of one that had just gone.
    pub to_successor: u64,
    /// Packets that the pod's kernel did not take.
    pub refused: u64,
    /// Packets that came more than once, or after they were given up.
    pub again_or_late: u64,
    /// Packets that were on their way to or from a pod when it went.
    pub to_gone: u64,
}

/// All of it.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    members: BTreeMap<PodId, Member>,
    pairs: BTreeMap<(PodId, PodId), Pair>,
    pauses: Vec<Pause>,
    /// Sums so far.
    pub totals: Totals,
}

impl Ledger {
    /// A pod comes.
    pub(super) fn add(&mut self, pod: PodId, host: HostId, address: Ipv4Addr) {
        self.members.insert(pod, Member { host, address, gone: None });
    }

    /// From now on each packet from one to the other must arrive. Nobody answers before being asked: conntrack would take that for
    /// a connection of its own, and the question for another's.
    pub(super) fn connect(&mut self, from: PodId, to: PodId, now: Duration) {
        let is_asked = || self.pairs.get(&(to, from)).is_some_and(|asked| asked.last_received.is_some());
        if Way::between(from, to) == Way::Answer && !is_asked() {
            return;
        }
        self.pairs.entry((from, to)).or_insert_with(|| Pair { due: now, ..Pair::default() });
    }

    /// Whether that is so.
    pub(super) fn is_connected(&self, from: PodId, to: PodId) -> bool {
        self.pairs.contains_key(&(from, to))
    }

    /// How many pairs there are.
    pub(super) fn pairs(&self) -> usize {
        self.pairs.len()
    }

    /// A pod goes; what is on its way to it and from it need not arrive.
    pub(super) fn remove(&mut self, pod: PodId, now: Duration) {
        if let Some(member) = self.members.get_mut(&pod) {
            member.gone = Some(now);
        }
        let totals = &mut self.totals;
        self.pairs.retain(|(from, to), pair| {
            let stays = *from != pod && *to != pod;
            if !stays {
                totals.to_gone += pair.outstanding.iter().filter(|(_, sent)| sent.is_some()).count() as u64;
            }
            stays
        });
    }

    /// What is to be sent now, or some of it, with the way and the pod's address, when each pair sends once in a period.
    pub(super) fn due(&mut self, now: Duration, period: Duration, run: u32) -> Vec<(Stamp, Way, Ipv4Addr)> {
        let mut due = Vec::new();
        for ((from, to), pair) in &mut self.pairs {
            let Some(member) = self.members.get(to) else { continue };
            if pair.due > now {
                continue;
            }
            if due.len() == BATCH {
                break;
            }
            pair.due = (pair.due + period).max(now);
            pair.outstanding.push_back((pair.sent, Some(now)));
            let stamp = Stamp { run, from: *from, to: *to, number: pair.sent };
            due.push((stamp, Way::between(*from, *to), member.address));
            pair.sent += 1;
            self.totals.sent += 1;
        }
        due
    }

    /// The pod's kernel did not take it.
    pub(super) fn refused(&mut self, stamp: Stamp) {
        self.totals.refused += 1;
        self.totals.sent -= 1;
        self.settle(stamp);
    }

    /// A pod received a packet.
    pub(super) fn received(&mut self, by: PodId, stamp: Stamp, now: Duration) -> Delivery {
        let delivery = self.judge(by, stamp.to, now);
        match delivery {
            Delivery::Right => {
                let is_new = self.settle(stamp);
                let hosts = [stamp.from, stamp.to].map(|pod| self.members.get(&pod).map(|member| member.host));
                if let Some(pair) = self.pairs.get_mut(&(stamp.from, stamp.to)) {
                    let last = pair.last_received.replace(now);
                    let lasted = last.map_or(Duration::ZERO, |last| now.saturating_sub(last));
                    if lasted > PAUSE
                        && let [Some(one), Some(two)] = hosts
                    {
                        self.pauses.push(Pause { hosts: (one, two), from: now - lasted, lasted });
                    }
                    if is_new {
                        self.totals.received += 1;
                        let is_direct = Way::between(stamp.from, stamp.to) == Way::Direct;
                        self.totals.by_service += u64::from(!is_direct);
                    } else {
                        self.totals.again_or_late += 1;
                    }
                }
            }
            Delivery::Successor => self.totals.to_successor += 1,
            Delivery::Wrong => {}
        }
        delivery
    }

    fn judge(&self, by: PodId, intended: PodId, now: Duration) -> Delivery {
        if by == intended {
            return Delivery::Right;
        }
        match (self.members.get(&by), self.members.get(&intended)) {
            (Some(by), Some(Member { address, gone: Some(gone), .. }))
                if by.address == *address && now.saturating_sub(*gone) <= LOST_AFTER =>
            {
                Delivery::Successor
            }
            _ => Delivery::Wrong,
        }
    }

    /// Whether it was expected still.
    fn settle(&mut self, stamp: Stamp) -> bool {
        let Some(pair) = self.pairs.get_mut(&(stamp.from, stamp.to)) else { return false };
        let found = pair.outstanding.binary_search_by_key(&stamp.number, |(number, _)| *number);
        let was_expected = found.is_ok_and(|index| pair.outstanding[index].1.take().is_some());
        while pair.outstanding.front().is_some_and(|(_, sent)| sent.is_none()) {
            pair.outstanding.pop_front();
        }
        was_expected
    }

    /// The packets that are lost by now, each told once.
    pub(super) fn take_lost(&mut self, now: Duration) -> Vec<Lost> {
        let mut lost = Vec::new();
        for ((from, to), pair) in &mut self.pairs {
            let (Some(sender), Some(receiver)) = (self.members.get(from), self.members.get(to)) else { continue };
            while let Some((number, sent)) = pair.outstanding.front().copied() {
                match sent {
                    Some(sent) if now.saturating_sub(sent) < LOST_AFTER => break,
                    Some(sent) => {
                        lost.push(Lost { from: (*from, sender.host), to: (*to, receiver.host), number, sent });
                    }
                    None => {}
                }
                pair.outstanding.pop_front();
            }
        }
        lost
    }

    /// The pauses since the last time that this was asked.
    pub(super) fn take_pauses(&mut self) -> Vec<Pause> {
        std::mem::take(&mut self.pauses)
    }

    /// When something last came from one host to another.
    pub(super) fn last_heard(&self, from: HostId, by: HostId) -> Option<Duration> {
        let host = |pod| self.members.get(pod).map(|member| member.host);
        let between = self.pairs.iter().filter(|((a, b), _)| host(a) == Some(from) && host(b) == Some(by));
        between.filter_map(|(_, pair)| pair.last_received).max()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Pods 1 and 2 on hosts 10 and 20.
    fn connected() -> Ledger {
        let mut ledger = Ledger::default();
        ledger.add(1, 10, [10, 5, 1, 2].into());
        ledger.add(2, 20, [10, 5, 2, 2].into());
        ledger.connect(1, 2, at(0));
        ledger
    }

    fn send(ledger: &mut Ledger, now: Duration) -> Stamp {
        let due = ledger.due(now, at(1), 77);
        assert_eq!(due.len(), 1);
        due[0].0
    }

    #[test]
    fn stamps_survive_the_wire() {
        let stamp = Stamp { run: 1, from: 2, to: 3, number: u64::MAX - 5 };
        assert_eq!(Stamp::from_bytes(&stamp.to_bytes()), Some(stamp));
        assert_eq!(Stamp::from_bytes(&[0; 24]), None);
        assert_eq!(Stamp::from_bytes(b"chao"), None);
    }

    #[test]
    fn what_does_not_come_is_lost_and_told_once() {
        let mut ledger = connected();
        let stamps = [0, 1, 2].map(|second| send(&mut ledger, at(second)));
        ledger.received(2, stamps[0], at(0));
        ledger.received(2, stamps[2], at(2));
        assert_eq!(ledger.take_lost(at(5)), []);
        assert_eq!(ledger.take_lost(at(6)), [Lost { from: (1, 10), to: (2, 20), number: 1, sent: at(1) }]);
        assert_eq!(ledger.take_lost(at(60)), []);
        ledger.received(2, stamps[1], at(61));
        assert_eq!((ledger.totals.received, ledger.totals.again_or_late), (2, 1));
    }

    #[test]
    fn a_packet_for_another_pod_is_noticed() {
        let mut ledger = connected();
        ledger.add(3, 20, [10, 5, 2, 3].into());
        let stamp = send(&mut ledger, at(0));
        assert_eq!(ledger.received(3, stamp, at(0)), Delivery::Wrong, "a neighbour of the right one");
        assert_eq!(ledger.received(2, stamp, at(0)), Delivery::Right);
    }

    #[test]
    fn a_packet_for_a_pod_whose_address_is_anothers_is_forgiven_for_a_moment() {
        let mut ledger = connected();
        let stamp = send(&mut ledger, at(0));
        ledger.add(4, 20, [10, 5, 2, 2].into());
        assert_eq!(ledger.received(4, stamp, at(1)), Delivery::Wrong, "the right one is there still");
        ledger.remove(2, at(1));
        assert_eq!(ledger.received(4, stamp, at(2)), Delivery::Successor);
        assert_eq!(ledger.received(4, stamp, at(7)), Delivery::Wrong);
        assert_eq!(ledger.totals.to_gone, 1);
    }

    #[test]
    fn who_is_asked_by_a_service_answers_after_that() {
        let mut ledger = connected();
        ledger.connect(2, 1, at(0));
        assert!(!ledger.is_connected(2, 1));
        let (stamp, way, address) = ledger.due(at(0), at(1), 77)[0];
        assert_eq!((way, address), (Way::Service, [10, 5, 2, 2].into()));
        ledger.received(2, stamp, at(0));
        ledger.connect(2, 1, at(1));
        let ways: Vec<_> = ledger.due(at(1), at(1), 77).into_iter().map(|(_, way, address)| (way, address)).collect();
        assert_eq!(ways, [(Way::Service, [10, 5, 2, 2].into()), (Way::Answer, [10, 5, 1, 2].into())]);
        assert_eq!(ledger.totals.by_service, 1);
    }

    #[test]
    fn pauses_are_seen() {
        let mut ledger = connected();
        for second in [0, 1] {
            let stamp = send(&mut ledger, at(second));
            ledger.received(2, stamp, at(second));
        }
        assert_eq!(ledger.take_pauses(), [Pause { hosts: (10, 20), from: at(0), lasted: at(1) }]);
        assert_eq!((ledger.last_heard(10, 20), ledger.last_heard(20, 10)), (Some(at(1)), None));
    }
}
