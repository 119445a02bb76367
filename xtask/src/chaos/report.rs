//! What was done and what was seen.

use std::{collections::BTreeMap, fmt, path::PathBuf, time::Duration};

use serde_json::{Value, json};

use super::{
    invariants::Invariant,
    ledger::Totals,
    resources::{DESCRIPTOR_BOUND, Life, MEMORY_BOUND, MEMORY_FRACTION},
    schedule::Kind,
};

/// Of each invariant, no more violations are kept than this; the rest is counted.
const MOST_KEPT: usize = 12;
/// So many lives of agents are shown in the text, the longest.
const LIVES_SHOWN: usize = 10;

/// Something that must not be.
#[derive(Clone, Debug)]
pub struct Violation {
    /// When it was seen, from the run's beginning.
    pub at: Duration,
    /// What it is against.
    pub invariant: Invariant,
    /// Where.
    pub host: String,
    /// What was seen.
    pub evidence: String,
}

/// A run.
#[derive(Debug, Default)]
pub struct Report {
    /// What the schedule was drawn from.
    pub seed: u64,
    /// How many hosts.
    pub hosts: usize,
    /// How long it took.
    pub lasted: Duration,
    /// How many rounds of how many.
    pub rounds: (usize, usize),
    /// Whether somebody ended it.
    pub interrupted: bool,
    /// Faults done and left out, by kind; those left out needed what another fault had just taken.
    pub faults: BTreeMap<Kind, (usize, usize)>,
    /// Packets.
    pub totals: Totals,
    /// Lost packets by what explains them.
    pub lost: BTreeMap<&'static str, u64>,
    /// The longest pause of a pair that a fault explains, and of one that none does.
    pub longest_pause: [Duration; 2],
    /// How long the hosts needed to come to rest, the longest of all rounds.
    pub longest_settle: Duration,
    /// The most peers that a guard held at rest.
    pub most_held: usize,
    /// Hosts that found their subnet taken when they came back, and moved.
    pub moved: usize,
    /// How often each invariant was checked.
    pub checks: BTreeMap<Invariant, u64>,
    /// The agents' processes.
    pub lives: Vec<Life>,
    /// What must not be.
    pub violations: Vec<Violation>,
    /// How many of each, also those that are not kept.
    pub violated: BTreeMap<Invariant, u64>,
    /// Where logs are kept, if they are.
    pub logs: Option<PathBuf>,
}

impl Report {
    /// An invariant was checked so often.
    pub fn checked(&mut self, invariant: Invariant, times: u64) {
        *self.checks.entry(invariant).or_default() += times;
    }

    /// Something was seen that must not be.
    pub fn violation(&mut self, at: Duration, invariant: Invariant, host: &str, evidence: String) {
        let count = self.violated.entry(invariant).or_default();
        *count += 1;
        if *count <= MOST_KEPT as u64 {
            let violation = Violation { at, invariant, host: host.to_owned(), evidence };
            eprintln!("{violation}");
            self.violations.push(violation);
        }
    }

    /// The same for programs.
    pub fn to_json(&self) -> Value {
        let seconds = |duration: Duration| duration.as_secs_f64();
        let Totals { sent, received, by_service, to_successor, refused, again_or_late, to_gone } = self.totals;
        let faults = self
            .faults
            .iter()
            .map(|(kind, (done, left_out))| json!({ "kind": kind.name(), "done": done, "leftOut": left_out }));
        let violations = self.violations.iter().map(|violation| {
            let Violation { at, invariant, host, evidence } = violation;
            json!({ "at": seconds(*at), "invariant": invariant.name(), "host": host, "evidence": evidence })
        });
        json!({
            "seed": self.seed, "hosts": self.hosts, "seconds": seconds(self.lasted), "rounds": self.rounds.0,
            "roundsPlanned": self.rounds.1, "interrupted": self.interrupted,
            "faults": faults.collect::<Vec<_>>(),
            "packets": { "sent": sent, "received": received, "byService": by_service, "toSuccessor": to_successor,
                         "refused": refused, "againOrLate": again_or_late, "toGone": to_gone, "lostByFault": self.lost },
            "longestPause": { "explained": seconds(self.longest_pause[0]), "other": seconds(self.longest_pause[1]) },
            "longestSettle": seconds(self.longest_settle), "mostHeld": self.most_held, "moved": self.moved,
            "checks": Invariant::ALL.map(|invariant| json!({
                "invariant": invariant.name(), "checks": self.checks.get(&invariant).unwrap_or(&0),
                "violations": self.violated.get(&invariant).unwrap_or(&0) })),
            "bounds": { "memoryKiB": MEMORY_BOUND, "memoryFraction": MEMORY_FRACTION, "descriptors": DESCRIPTOR_BOUND },
            "agents": self.lives.iter().map(Life::to_json).collect::<Vec<_>>(),
            "violations": violations.collect::<Vec<_>>(), "logs": self.logs,
        })
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at, invariant, host, evidence } = self;
        write!(f, "{:.3} s, {host}: violated: {}: {evidence}", at.as_secs_f64(), invariant.name())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rounds, planned) = self.rounds;
        let ended = if self.interrupted { ", interrupted" } else { "" };
        writeln!(
            f,
            "seed {}, {} hosts, {rounds} of {planned} rounds in {:.0} s{ended}",
            self.seed,
            self.hosts,
            self.lasted.as_secs_f64()
        )?;
        writeln!(f, "\ndone:")?;
        for (kind, (done, left_out)) in &self.faults {
            let left_out = if *left_out > 0 { format!(" ({left_out} left out)") } else { String::new() };
            writeln!(f, "{done:>9}  {}{left_out}", kind.name())?;
        }
        let Totals { sent, received, by_service, to_successor, refused, again_or_late, to_gone } = self.totals;
        writeln!(f, "\npackets between pods:\n{sent:>9}  sent\n{received:>9}  received")?;
        for (count, what) in [
            (by_service, "of these to a service's address, or answers to such"),
            (to_gone, "on their way when the pod of either end went"),
            (to_successor, "came to the next pod with the address of one that had just gone"),
            (refused, "refused by the pod's own kernel"),
            (again_or_late, "came twice, or after they were given up"),
        ] {
            writeln!(f, "{count:>9}  {what}")?;
        }
        for (what, count) in &self.lost {
            writeln!(f, "{count:>9}  lost: {what}")?;
        }
        let [explained, other] = self.longest_pause;
        writeln!(f, "longest pause of a pair: {explained:.1?} with a fault of the network, {other:.1?} without")?;
        writeln!(
            f,
            "longest time to come to rest: {:.1?}; most peers held at rest: {}; hosts that moved: {}",
            self.longest_settle, self.most_held, self.moved
        )?;
        writeln!(f, "\n   checks  violations")?;
        for invariant in Invariant::ALL {
            let [checks, violations] =
                [&self.checks, &self.violated].map(|counts| counts.get(&invariant).copied().unwrap_or_default());
            writeln!(f, "{checks:>9}  {violations:>10}  {}", invariant.name())?;
        }
        writeln!(
            f,
            "\nagents (first and last quarter of a life may differ by {MEMORY_BOUND} KiB or {:.0} %, and \
             {DESCRIPTOR_BOUND} descriptors), the oldest of {}:",
            MEMORY_FRACTION * 100.0,
            self.lives.len()
        )?;
        let mut lives: Vec<_> = self.lives.iter().collect();
        lives.sort_by_key(|life| std::cmp::Reverse(life.lasted()));
        lives.iter().take(LIVES_SHOWN).try_for_each(|life| writeln!(f, "  {life}"))?;
        for violation in &self.violations {
            writeln!(f, "\n{violation}")?;
        }
        if let Some(logs) = &self.logs {
            writeln!(f, "\nlogs are kept in {}", logs.display())?;
        }
        Ok(())
    }
}
