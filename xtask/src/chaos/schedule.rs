//! What goes wrong and when: drawn from a seed before anything is started, so that the seed replays it.
//!
//! A run is a row of rounds. In the first part of each, faults begin and end; in the rest there are none, and everything has
//! to come to rest. Kinds are dealt like cards from a shuffled deck that has each of them, so that a deck's length of
//! faults has them all. Two faults that would be in each other's way (a killed agent that is stopped) do not overlap; all
//! others may.

use std::{collections::BTreeMap, fmt, time::Duration};

use rand::{Rng, RngExt as _, SeedableRng as _, seq::SliceRandom as _};
use rand_chacha::ChaCha8Rng;

/// Names and numbers of one kind of fault.
macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident: $name:literal, $shortest:literal ..= $longest:literal;)*) => {
        /// A kind of fault.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Kind {
            $($(#[$doc])* $kind,)*
        }

        impl Kind {
            /// Each of them.
            pub const ALL: &[Self] = &[$(Self::$kind),*];

            /// As the report names it.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$kind => $name,)*
                }
            }

            /// How long it lasts at least and at most, in milliseconds.
            const fn lasts(self) -> (u64, u64) {
                match self {
                    $(Self::$kind => ($shortest, $longest),)*
                }
            }
        }
    };
}

kinds! {
    /// SIGKILL to an agent; another is started at the end.
    AgentKilled: "agent killed", 50 ..= 4000;
    /// SIGSTOP to an agent, SIGCONT at the end.
    AgentStopped: "agent stopped", 300 ..= 4000;
    /// SIGSTOP for longer than its lease lasts.
    LeaseOutslept: "agent stopped past its lease", 8000 ..= 11000;
    /// SIGKILL to etcd, and a new start.
    EtcdKilled: "etcd killed", 0 ..= 2000;
    /// SIGTERM to etcd, and a new start.
    EtcdRestarted: "etcd restarted", 0 ..= 1000;
    /// SIGKILL to etcd, which stays away for longer than leases last.
    EtcdAway: "etcd away", 6000 ..= 8000;
    /// Nothing passes between a host and etcd.
    EtcdCut: "cut off from etcd", 1000 ..= 8000;
    /// The same in one direction.
    EtcdCutOneWay: "cut off from etcd one way", 1000 ..= 8000;
    /// Nothing passes between two hosts.
    HostsCut: "two hosts cut", 500 ..= 6000;
    /// The same in one direction.
    HostsCutOneWay: "two hosts cut one way", 500 ..= 6000;
    /// The external interface is set down, and up again.
    InterfaceDown: "interface down", 100 ..= 3000;
    /// The other end of its cable is.
    CarrierLost: "carrier lost", 100 ..= 3000;
    /// A pod is deleted, and another comes with its address.
    PodReplaced: "pod replaced, same address", 50 ..= 1500;
    /// A pod is deleted, and another comes with another address.
    PodMoved: "pod replaced, another address", 50 ..= 1500;
    /// A host leaves with its pods, without a word, and another comes.
    HostReplaced: "host replaced", 500 ..= 4000;
    /// A host of flannel's that is not there: a lease is put, changed, and deleted.
    ForeignLease: "foreign lease", 1000 ..= 8000;
    /// etcd forgets its history.
    Compaction: "compaction", 0 ..= 0;
    /// Somebody deletes a host's lease, which ends its agent by design; another is started.
    LeaseDeleted: "lease deleted", 2500 ..= 2500;
}

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Of which kind.
    pub kind: Kind,
    /// When it begins, from its round's beginning.
    pub at: Duration,
    /// For how long it lasts.
    pub lasts: Duration,
    /// Whom it meets: the place of a host, a number for a foreign lease; the first for all others.
    pub place: usize,
    /// The other host of a cut, the pod of a host, or which way is cut.
    pub other: usize,
}

/// How a run is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// How many rounds.
    pub rounds: usize,
    /// For how long there are faults in each.
    pub faults: Duration,
    /// By when everything has come to rest after it.
    pub settle: Duration,
    /// For how long it is watched at rest, ...
    pub rest: Duration,
    /// ... and longer where the round would else be shorter than this.
    pub length: Duration,
    /// How many faults in each round.
    pub count: usize,
}

impl Shape {
    /// A run of so many minutes.
    pub fn of_minutes(minutes: u32, hosts: usize) -> Self {
        const LENGTH: u64 = 45;
        let [faults, settle, rest, length] = [36, 25, 3, LENGTH].map(Duration::from_secs);
        let rounds = (u64::from(minutes) * 60).div_ceil(LENGTH).max(1) as usize;
        Self { rounds, faults, settle, rest, length, count: 8 + 2 * hosts }
    }

    /// One round with each kind once.
    pub const fn short() -> Self {
        const fn seconds(seconds: u64) -> Duration {
            Duration::from_secs(seconds)
        }
        Self {
            rounds: 1,
            faults: seconds(22),
            settle: seconds(25),
            rest: seconds(1),
            length: Duration::ZERO,
            count: Kind::ALL.len(),
        }
    }
}

/// What goes wrong in a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// What it was drawn from.
    pub seed: u64,
    /// How many hosts.
    pub hosts: usize,
    /// How it is divided.
    pub shape: Shape,
    /// Faults by round, ordered by their beginnings.
    pub rounds: Vec<Vec<Fault>>,
}

/// Pods on each host.
pub(super) const PODS: usize = 2;
/// How many foreign leases there can be at once.
pub(super) const FOREIGN: usize = 8;
/// A fault that finds no room in a round is dealt again in the next.
const TRIES: usize = 300;

/// What only one fault at a time may have to do with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Agent(usize),
    PathToEtcd(usize),
    Cable(usize),
    Pods(usize),
    Foreign(usize),
    Etcd,
}

impl Schedule {
    /// Draws one. Equal arguments give equal schedules, on every machine.
    pub fn draw(seed: u64, hosts: usize, shape: Shape) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut deck = Vec::new();
        let rounds = (0..shape.rounds).map(|_| round(&mut rng, &mut deck, hosts, &shape)).collect();
        Self { seed, hosts, shape, rounds }
    }

    /// How many faults of a kind.
    pub fn count(&self, kind: Kind) -> usize {
        self.rounds.iter().flatten().filter(|fault| fault.kind == kind).count()
    }
}

fn round(rng: &mut impl Rng, deck: &mut Vec<Kind>, hosts: usize, shape: &Shape) -> Vec<Fault> {
    let mut busy: BTreeMap<Part, Vec<(Duration, Duration)>> = BTreeMap::new();
    let mut faults = Vec::new();
    let mut dealt = Vec::new();
    for _ in 0..shape.count {
        if deck.is_empty() {
            deck.extend(Kind::ALL);
            deck.shuffle(rng);
        }
        dealt.extend(deck.pop());
    }
    // The long ones first: they fit where there is room still.
    dealt.sort_by_key(|kind| std::cmp::Reverse(kind.lasts()));
    for kind in dealt {
        let fitting = (0..TRIES).find_map(|_| {
            let fault = draw_fault(rng, kind, hosts, shape);
            let parts = parts(&fault);
            let is_free = |(part, from, to): &(Part, Duration, Duration)| {
                busy.get(part).into_iter().flatten().all(|(begin, end)| to < begin || end < from)
            };
            parts.iter().all(is_free).then_some((fault, parts))
        });
        match fitting {
            Some((fault, parts)) => {
                faults.push(fault);
                for (part, from, to) in parts {
                    busy.entry(part).or_default().push((from, to));
                }
            }
            None => deck.push(kind),
        }
    }
    faults.sort_by_key(|fault| (fault.at, fault.kind));
    faults
}

fn draw_fault(rng: &mut impl Rng, kind: Kind, hosts: usize, shape: &Shape) -> Fault {
    let (shortest, longest) = kind.lasts();
    let lasts = Duration::from_millis(rng.random_range(shortest..=longest));
    let room = shape.faults.saturating_sub(lasts).as_millis() as u64;
    let at = Duration::from_millis(rng.random_range(0..=room));
    // The first host's agent is never ended, so that there is one as old as the run.
    let spared = matches!(kind, Kind::AgentKilled | Kind::HostReplaced | Kind::LeaseDeleted);
    let place = match kind {
        Kind::ForeignLease => below(rng, FOREIGN),
        Kind::EtcdKilled | Kind::EtcdRestarted | Kind::EtcdAway | Kind::Compaction => 0,
        _ if spared => 1 + below(rng, hosts - 1),
        _ => below(rng, hosts),
    };
    let other = match kind {
        Kind::HostsCut | Kind::HostsCutOneWay => (place + 1 + below(rng, hosts - 1)) % hosts,
        Kind::PodReplaced | Kind::PodMoved => below(rng, PODS),
        Kind::EtcdCutOneWay => below(rng, 2),
        _ => 0,
    };
    Fault { kind, at, lasts, place, other }
}

impl Fault {
    /// Whether two faults would be in each other's way at the same time.
    pub(super) fn excludes(&self, other: &Self) -> bool {
        let others = parts(other);
        parts(self).iter().any(|(part, ..)| others.iter().any(|(other, ..)| other == part))
    }
}

/// As 64 bits, so that the word size is no part of what a seed means.
fn below(rng: &mut impl Rng, count: usize) -> usize {
    rng.random_range(0..count as u64) as usize
}

/// What a fault has to do with, from when to when.
fn parts(fault: &Fault) -> Vec<(Part, Duration, Duration)> {
    // Starting takes a moment.
    const START: Duration = Duration::from_secs(1);
    const JOIN: Duration = Duration::from_secs(4);
    let Fault { kind, at, lasts, place, other } = *fault;
    let until = |after: Duration| at + lasts + after;
    match kind {
        Kind::AgentKilled | Kind::AgentStopped | Kind::LeaseOutslept => vec![(Part::Agent(place), at, until(START))],
        // A host that is not told goes on, while another may have its subnet at once.
        Kind::LeaseDeleted => [Part::Agent(place), Part::PathToEtcd(place), Part::Cable(place)]
            .map(|part| (part, at, until(START)))
            .into_iter()
            .chain([(Part::Etcd, at, at + START)])
            .collect(),
        Kind::EtcdKilled | Kind::EtcdRestarted | Kind::EtcdAway => vec![(Part::Etcd, at, until(START))],
        Kind::Compaction => vec![(Part::Etcd, at, until(START / 4))],
        Kind::ForeignLease => {
            // Another use of the number later does not undo this one's end.
            vec![(Part::Foreign(place), at, until(JOIN)), (Part::Etcd, at, at + START / 4)]
        }
        Kind::EtcdCut | Kind::EtcdCutOneWay => vec![(Part::PathToEtcd(place), at, until(Duration::ZERO))],
        Kind::HostsCut | Kind::HostsCutOneWay => {
            [place, other].map(|host| (Part::Cable(host), at, until(START))).to_vec()
        }
        Kind::InterfaceDown | Kind::CarrierLost => vec![(Part::Cable(place), at, until(START))],
        Kind::PodReplaced | Kind::PodMoved => vec![(Part::Pods(place), at, until(START))],
        Kind::HostReplaced => [Part::Agent(place), Part::PathToEtcd(place), Part::Cable(place), Part::Pods(place)]
            .map(|part| (part, at, until(JOIN)))
            .to_vec(),
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, at, lasts, place, other } = self;
        write!(f, "{:>7.3} s  {:<30}", at.as_secs_f64(), kind.name())?;
        let place = place + 1;
        match kind {
            Kind::EtcdKilled | Kind::EtcdRestarted | Kind::EtcdAway | Kind::Compaction => {}
            Kind::ForeignLease => write!(f, " no. {place}")?,
            Kind::HostsCut => write!(f, " place {place}, place {}", other + 1)?,
            Kind::HostsCutOneWay => write!(f, " place {place} to place {}", other + 1)?,
            Kind::PodReplaced | Kind::PodMoved => write!(f, " place {place}, pod {}", other + 1)?,
            Kind::EtcdCutOneWay => write!(f, " place {place}, {}", ["requests", "answers"][*other % 2])?,
            _ => write!(f, " place {place}")?,
        }
        if lasts.is_zero() { Ok(()) } else { write!(f, " for {:.3} s", lasts.as_secs_f64()) }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, hosts, rounds, .. } = self;
        writeln!(f, "seed {seed}, {hosts} hosts, {} rounds", rounds.len())?;
        for (number, round) in rounds.iter().enumerate() {
            writeln!(f, "round {}:", number + 1)?;
            round.iter().try_for_each(|fault| writeln!(f, "  {fault}"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_schedule_and_another_seed_another() {
        let shape = Shape::of_minutes(5, 6);
        assert_eq!(Schedule::draw(7, 6, shape), Schedule::draw(7, 6, shape));
        assert_ne!(Schedule::draw(7, 6, shape).rounds, Schedule::draw(8, 6, shape).rounds);
        // The generator's output is part of what a seed means: this holds on every machine and for ever.
        let first = Schedule::draw(7, 6, shape).rounds[0][0];
        assert_eq!(first.to_string(), "  0.391 s  cut off from etcd one way      place 2, requests for 5.725 s");
    }

    #[test]
    fn a_short_run_has_every_kind() {
        for seed in 0..200 {
            let schedule = Schedule::draw(seed, 4, Shape::short());
            for kind in Kind::ALL {
                assert_eq!(schedule.count(*kind), 1, "{} with seed {seed}", kind.name());
            }
        }
    }

    #[test]
    fn faults_end_within_their_round_and_are_not_in_each_others_way() {
        let shape = Shape::of_minutes(30, 10);
        for round in &Schedule::draw(3, 10, shape).rounds {
            let mut busy: Vec<(Part, Duration, Duration)> = Vec::new();
            for fault in round {
                assert!(fault.at + fault.lasts <= shape.faults, "{fault}");
                assert!(fault.kind == Kind::ForeignLease || fault.place < 10 && fault.other < 10, "{fault}");
                for (part, from, to) in parts(fault) {
                    let overlap = busy.iter().any(|(other, begin, end)| *other == part && from <= *end && *begin <= to);
                    assert!(!overlap, "{fault}");
                    busy.push((part, from, to));
                }
            }
        }
    }

    #[test]
    fn the_first_hosts_agent_lives_as_long_as_the_run() {
        let schedule = Schedule::draw(5, 4, Shape::of_minutes(60, 4));
        let ends = |fault: &&Fault| {
            matches!(fault.kind, Kind::AgentKilled | Kind::HostReplaced | Kind::LeaseDeleted) && fault.place == 0
        };
        assert_eq!(schedule.rounds.iter().flatten().find(ends), None);
    }
}
