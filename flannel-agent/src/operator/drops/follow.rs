//! `flannel-agent drops --follow`: each packet that is sampled as it is dropped, with what explains it, and how many were dropped
//! besides.

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

use flannel_common::{
    event::{Event, Outcome},
    vxlan::Vni,
};
use serde_json::json;
use tokio::time::{MissedTickBehavior, interval};

use super::Sample;
use crate::{
    cli::{Cli, Output},
    dataplane::{Dropped, PinDirectory, pinned_counters, pinned_drops, pinned_vnis},
    operator::{OperatorError, explain::Known},
    status::{API_VERSION, Status},
};

/// How often the maps are read.
const LOOK: Duration = Duration::from_millis(250);
/// After so many looks it is said how many were not shown.
const LOOKS_OF_SUMMARY: u32 = 4;

/// What is known of a reason since this began.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Count {
    /// When it began, in packets.
    before: u64,
    /// At the last look.
    counted: u64,
    /// Each with a line.
    shown: u64,
    /// Those without one that were told of in a summary.
    told: u64,
    /// The samples that were there at the last look.
    samples: HashSet<u64>,
}

impl Count {
    /// Takes note of the samples that are there; the numbers of those that were not.
    fn new_samples(&mut self, there: impl IntoIterator<Item = u64>) -> HashSet<u64> {
        let there: HashSet<_> = there.into_iter().collect();
        let new: HashSet<_> = there.difference(&self.samples).copied().collect();
        self.samples = there;
        self.shown += new.len() as u64;
        new
    }

    /// How many were dropped before the last look that got no line, and are not told of yet.
    fn untold(&mut self) -> u64 {
        let untold = (self.counted - self.before).saturating_sub(self.shown + self.told);
        self.told += untold;
        untold
    }
}

/// An overlay that is followed.
struct Followed {
    vni: Vni,
    pins: PinDirectory,
    counts: BTreeMap<u32, (Event, Count)>,
}

/// Prints what the programs of each pinned overlay drop from now on, until Ctrl-C.
///
/// # Errors
/// [`OperatorError::NoDataplane`] or [`OperatorError::Dataplane`].
pub async fn print(cli: &Cli, output: Output) -> Result<(), OperatorError> {
    let vnis = pinned_vnis(&cli.bpf_pin_dir);
    if vnis.is_empty() {
        return Err(OperatorError::NoDataplane(cli.bpf_pin_dir.clone()));
    }
    let mut overlays = Vec::new();
    for vni in vnis {
        overlays.push(Followed::begin(PinDirectory::new(&cli.bpf_pin_dir, vni), vni)?);
    }
    // Before anything is said, so that who reads that it follows may end it.
    let mut ends = std::pin::pin!(tokio::signal::ctrl_c());
    let mut looks = interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    eprintln!("following what is dropped; Ctrl-C ends it");
    for number in 1u32.. {
        tokio::select! {
            _ = &mut ends => break,
            _ = looks.tick() => {}
        }
        for overlay in &mut overlays {
            // What was counted by the last look has its sample by now, if it gets one.
            let is_due = number.is_multiple_of(LOOKS_OF_SUMMARY);
            overlay.look(cli, output)?;
            if is_due {
                overlay.summarize(output);
            }
            overlay.count()?;
        }
    }
    for overlay in &mut overlays {
        overlay.look(cli, output)?;
        overlay.count()?;
        overlay.summarize(output);
        overlay.conclude(output);
    }
    Ok(())
}

impl Followed {
    fn begin(pins: PinDirectory, vni: Vni) -> Result<Self, OperatorError> {
        let reasons = Event::ALL.iter().filter(|event| event.outcome() == Outcome::Drop);
        let counts = reasons.map(|event| (*event as u32, (*event, Count::default()))).collect();
        let mut followed = Self { vni, pins, counts };
        // In this order: what is dropped in between has no line, and is told of.
        followed.count()?;
        let samples = pinned_drops(&followed.pins)?;
        for (event, dropped) in samples {
            if let Some((_, count)) = followed.counts.get_mut(&(event as u32)) {
                count.samples = dropped.iter().map(|dropped| dropped.number).collect();
                count.before = count.counted;
            }
        }
        Ok(followed)
    }

    fn count(&mut self) -> Result<(), OperatorError> {
        for (event, counter) in pinned_counters(&self.pins)? {
            if let Some((_, count)) = self.counts.get_mut(&(event as u32)) {
                // It begins anew where the maps are made anew.
                (count.counted, count.before) = (counter.packets, count.before.min(counter.packets));
            }
        }
        Ok(())
    }

    /// Prints the samples that are new, the oldest first.
    fn look(&mut self, cli: &Cli, output: Output) -> Result<(), OperatorError> {
        let mut new: Vec<(Event, Dropped)> = Vec::new();
        for (event, dropped) in pinned_drops(&self.pins)? {
            let Some((_, count)) = self.counts.get_mut(&(event as u32)) else { continue };
            let numbers = count.new_samples(dropped.iter().map(|dropped| dropped.number));
            new.extend(dropped.into_iter().filter(|dropped| numbers.contains(&dropped.number)).map(|of| (event, of)));
        }
        if new.is_empty() {
            return Ok(());
        }
        new.sort_by_key(|(_, dropped)| std::cmp::Reverse(dropped.ago));
        let statuses = Status::read_all(&cli.run_dir).unwrap_or_default();
        let status = statuses.into_iter().find(|(vni, _)| *vni == self.vni).map(|(_, status)| status);
        let known = Known::read(&self.pins, status)?;
        for (event, dropped) in &new {
            let sample = Sample::new(*event, dropped);
            let because = known.explain(*event, dropped);
            match output {
                Output::Table => println!(
                    "flannel.{} {} no. {} at {}: {}: {because}",
                    self.vni,
                    event.label(),
                    sample.number,
                    sample.interface(),
                    sample.summary
                ),
                Output::Json => print_line(&json!({
                    "apiVersion": API_VERSION,
                    "kind": "drop",
                    "vni": self.vni.get(),
                    "reason": event.label(),
                    "because": because,
                    "sample": sample,
                })),
            }
        }
        Ok(())
    }

    /// Prints how many were dropped that have no line.
    fn summarize(&mut self, output: Output) {
        for (event, count) in self.counts.values_mut() {
            let untold = count.untold();
            if untold == 0 {
                continue;
            }
            let label = event.label();
            match output {
                Output::Table => println!("flannel.{} {label}: {untold} more were dropped and not sampled", self.vni),
                Output::Json => print_line(&json!({
                    "apiVersion": API_VERSION,
                    "kind": "notSampled",
                    "vni": self.vni.get(),
                    "reason": label,
                    "packets": untold,
                })),
            }
        }
    }

    /// Prints what was dropped in all.
    fn conclude(&self, output: Output) {
        let sum = |of: fn(&Count) -> u64| self.counts.values().map(|(_, count)| of(count)).sum::<u64>();
        let (dropped, shown) = (sum(|count| count.counted - count.before), sum(|count| count.shown));
        match output {
            Output::Table => println!("flannel.{}: {dropped} dropped meanwhile, {shown} shown", self.vni),
            Output::Json => print_line(&json!({
                "apiVersion": API_VERSION,
                "kind": "end",
                "vni": self.vni.get(),
                "packets": dropped,
                "shown": shown,
            })),
        }
    }
}

fn print_line(document: &serde_json::Value) {
    println!("{document}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_packet_has_a_line_or_is_told_of_once() {
        let mut count = Count { before: 10, counted: 10, samples: [1, 2].into(), ..Count::default() };
        assert_eq!(count.new_samples([1, 2]), HashSet::new());
        assert_eq!(count.untold(), 0);
        // Three samples, one of which took the place of an old one.
        assert_eq!(count.new_samples([2, 3, 4, 5]), HashSet::from([3, 4, 5]));
        // The counters are read behind them, and have more.
        count.counted = 20;
        assert_eq!(count.untold(), 7);
        assert_eq!(count.untold(), 0);
        count.counted = 22;
        assert_eq!(count.new_samples([6]), HashSet::from([6]));
        assert_eq!(count.untold(), 1);
        // A sample whose packet is counted by the next look only.
        assert_eq!(count.new_samples([6, 7]), HashSet::from([7]));
        assert_eq!(count.untold(), 0);
    }
}
