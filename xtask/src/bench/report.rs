//! What came out: medians, spread, ratios, and whether the floors are met; as text and as JSON.

use std::fmt;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tabled::{builder::Builder, settings::Style};

use super::{
    floors::Floor,
    measure::Metric,
    topology::{Mode, Rival, Subject},
};
use crate::{lab::services::ServiceRules, process::output};

/// More that others use, in percent of a core, is said. An idle machine's own work and a tick's rounding are below.
const OTHERS_LIMIT: f64 = 20.0;

/// What a bench measures, in the order in which it is shown.
pub(super) struct Comparison {
    pub(super) ours: Subject,
    /// What ours is compared with.
    pub(super) others: [Subject; 3],
    pub(super) floors: &'static [Floor],
}

impl Comparison {
    pub(super) fn subjects(&self) -> impl Iterator<Item = Subject> {
        std::iter::once(self.ours).chain(self.others)
    }
}

/// What was measured, and on what.
pub(super) struct Report {
    pub(super) conditions: Conditions,
    pub(super) results: Vec<Results>,
}

/// What the numbers depend on besides the code.
pub(super) struct Conditions {
    pub(super) rounds: u32,
    /// Length of each measurement.
    pub(super) seconds: u32,
    pub(super) kernel: String,
    pub(super) cpus: usize,
    /// How many flows conntrack knows on a rival's hosts.
    pub(super) conntrack: Vec<(Rival, u64)>,
    /// The form of a service's rules.
    pub(super) proxy: Option<ServiceRules>,
}

impl Conditions {
    pub(super) fn of(
        rounds: u32,
        seconds: u32,
        conntrack: Vec<(Rival, u64)>,
        proxy: Option<ServiceRules>,
    ) -> Result<Self> {
        let kernel = output(std::process::Command::new("uname").arg("-r"))?.trim().to_owned();
        let cpus = std::thread::available_parallelism().context("count the CPUs")?.get();
        Ok(Self { rounds, seconds, kernel, cpus, conntrack, proxy })
    }
}

/// All of a mode.
pub(super) struct Results {
    pub(super) comparison: &'static Comparison,
    pub(super) mode: Mode,
    pub(super) samples: Vec<Sample>,
}

/// One number.
pub(super) struct Sample {
    pub(super) round: u32,
    pub(super) subject: Subject,
    pub(super) metric: Metric,
    pub(super) value: f64,
}

impl Results {
    /// Of a subject's rounds; none where it was not measured.
    pub(super) fn summary(&self, subject: Subject, metric: Metric) -> Option<Summary> {
        let samples = self.samples.iter().filter(|sample| sample.subject == subject && sample.metric == metric);
        Summary::of(samples.map(|sample| sample.value).collect())
    }

    /// The median of ours over that of another.
    pub(super) fn ratio(&self, metric: Metric, other: Subject) -> Option<f64> {
        let [ours, other] = [self.comparison.ours, other].map(|subject| self.summary(subject, metric));
        Some(ours?.median / other?.median)
    }

    fn subjects(&self) -> Vec<Subject> {
        let subjects = self.comparison.subjects();
        subjects.filter(|subject| self.samples.iter().any(|sample| sample.subject == *subject)).collect()
    }

    /// What a ratio is called.
    fn over(&self, other: Subject) -> String {
        format!("{} / {}", self.comparison.ours.name, other.name)
    }

    /// The floors of this mode, each with what was measured for it.
    fn floors(&self) -> impl Iterator<Item = (&'static Floor, f64)> {
        let floors = self.comparison.floors.iter().filter(|floor| floor.mode == self.mode);
        floors.filter_map(|floor| Some((floor, self.ratio(floor.metric, floor.against)?)))
    }

    fn to_json(&self) -> Value {
        let metrics = Metric::ALL.map(|metric| {
            let rivals = self.subjects().into_iter().filter_map(|subject| {
                let Summary { median, min, max } = self.summary(subject, metric)?;
                let samples = self.samples.iter().filter(|sample| sample.subject == subject && sample.metric == metric);
                let rounds: Vec<_> = samples.clone().map(|sample| sample.round + 1).collect();
                let samples: Vec<_> = samples.map(|sample| sample.value).collect();
                let value = json!({
                    "median": median, "min": min, "max": max, "samples": samples, "rounds": rounds
                });
                Some((subject.name.to_owned(), value))
            });
            let others = self.comparison.others.into_iter();
            let ratios = others.filter_map(|other| Some((self.over(other), json!(self.ratio(metric, other)?))));
            json!({
                "metric": metric.name(),
                "less_is_better": metric.less_is_better(),
                "rivals": rivals.collect::<serde_json::Map<_, _>>(),
                "ratios": ratios.collect::<serde_json::Map<_, _>>(),
            })
        });
        let floors = self
            .floors()
            .map(|(floor, ratio)| json!({ "floor": floor.to_string(), "ratio": ratio, "met": floor.is_met(ratio) }));
        json!({ "mode": self.mode.name(), "metrics": metrics, "floors": floors.collect::<Vec<_>>() })
    }
}

impl Report {
    pub(super) fn to_json(&self) -> Value {
        let Conditions { rounds, seconds, kernel, cpus, conntrack, proxy } = &self.conditions;
        let conntrack = conntrack.iter().map(|(rival, entries)| (rival.name().to_owned(), json!(entries)));
        let mut report = json!({
            "kernel": kernel,
            "cpus": cpus,
            "rounds": rounds,
            "seconds": seconds,
            "conntrack_entries": conntrack.collect::<serde_json::Map<_, _>>(),
            "modes": self.results.iter().map(Results::to_json).collect::<Vec<_>>(),
        });
        if let Some(proxy) = proxy {
            report["proxy"] = json!(proxy.name());
        }
        report
    }
}

impl Report {
    fn samples(&self) -> impl Iterator<Item = &Sample> {
        self.results.iter().flat_map(|results| &results.samples)
    }

    /// What is to be said where others kept the machine busy: then the numbers are theirs as well.
    pub(super) fn warning(&self) -> Option<String> {
        let others = self.samples().filter(|sample| sample.metric == Metric::Others).map(|sample| sample.value);
        let most = others.fold(0.0, f64::max);
        (most > OTHERS_LIMIT).then(|| format!("the machine was not idle: others used up to {most:.0} % of a core"))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.conditions)?;
        if !self.samples().any(|sample| sample.metric == Metric::RoundTripMedian) {
            writeln!(f, "idle cores can't be kept from halting here: cpuidle has no state POLL")?;
        }
        if let Some(warning) = self.warning() {
            writeln!(f, "{warning}")?;
        }
        for results in &self.results {
            writeln!(f, "\n{results}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Conditions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rounds, seconds, kernel, cpus, conntrack, proxy } = self;
        write!(f, "Linux {kernel}, {cpus} CPUs; medians of {rounds} rounds of {seconds} s each")?;
        if let Some(proxy) = proxy {
            write!(f, "\na service with kube-proxy's rules in {}", proxy.name())?;
        }
        for (rival, entries) in conntrack.iter().filter(|(_, entries)| *entries > 0) {
            write!(f, "\nconntrack looks at the packets of {}: {entries} entries", rival.name())?;
        }
        Ok(())
    }
}

impl fmt::Display for Results {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (subjects, others) = (self.subjects(), self.comparison.others);
        let mut medians = Builder::new();
        let title = format!("{}: median (min..max)", self.mode.name());
        medians.push_record(std::iter::once(title.as_str()).chain(subjects.iter().map(|subject| subject.name)));
        let mut ratios = Builder::new();
        ratios.push_record(
            std::iter::once(format!("{}: ratios of medians", self.mode.name()))
                .chain(others.map(|other| self.over(other))),
        );
        for metric in Metric::ALL {
            let cells = subjects
                .iter()
                .map(|subject| self.summary(*subject, metric).map_or_else(String::new, |s| s.to_string()));
            medians.push_record(std::iter::once(metric.name().to_owned()).chain(cells));
            if metric.is_result() {
                let cells =
                    others.map(|other| self.ratio(metric, other).map_or_else(String::new, |r| format!("{r:.2}x")));
                let sense = if metric.less_is_better() { "less" } else { "more" };
                ratios.push_record(std::iter::once(format!("{} ({sense} is better)", metric.name())).chain(cells));
            }
        }
        writeln!(f, "{}", medians.build().with(Style::psql()))?;
        if subjects.contains(&self.comparison.ours) && subjects.len() > 1 {
            writeln!(f, "\n{}", ratios.build().with(Style::psql()))?;
        }
        self.floors().try_for_each(|(floor, ratio)| {
            let verdict = if floor.is_met(ratio) { "met   " } else { "missed" };
            write!(f, "\n{verdict} {ratio:.3}x, {floor}")
        })
    }
}

/// Of some numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Summary {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Summary {
    /// None where there are no numbers.
    pub(super) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let upper = *values.get(middle)?;
        let median = if values.len().is_multiple_of(2) { f64::midpoint(values[middle - 1], upper) } else { upper };
        Some(Self { median, min: *values.first()?, max: *values.last()? })
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [median, min, max] = [self.median, self.min, self.max].map(number);
        write!(f, "{median} ({min}..{max})")
    }
}

/// With three digits, or all those before the point.
pub(super) fn number(value: f64) -> String {
    let digits = match value {
        0.0 => 0,
        value if value < 1.0 => 3,
        value if value < 10.0 => 2,
        value if value < 100.0 => 1,
        _ => 0,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::{super::TRAFFIC, *};

    const OURS: Subject = TRAFFIC.ours;
    const VXLAN: Subject = TRAFFIC.others[0];
    const HOST_GW: Subject = TRAFFIC.others[1];

    fn results(values: &[(Subject, f64)]) -> Results {
        let sample = |&(subject, value)| Sample { round: 0, subject, metric: Metric::TcpOne, value };
        Results { comparison: &TRAFFIC, mode: Mode::Whole, samples: values.iter().map(sample).collect() }
    }

    fn conditions() -> Conditions {
        Conditions { rounds: 1, seconds: 1, kernel: "6.18".into(), cpus: 2, conntrack: Vec::new(), proxy: None }
    }

    #[test]
    fn medians_of_odd_and_even_numbers() {
        let summary = |values: &[f64]| Summary::of(values.to_vec());
        assert_eq!(summary(&[3.0, 1.0, 2.0]), Some(Summary { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(summary(&[4.0, 1.0, 2.0, 3.0]), Some(Summary { median: 2.5, min: 1.0, max: 4.0 }));
        assert_eq!(summary(&[]), None);
        assert_eq!(Summary { median: 12.34, min: 0.5, max: 1234.5 }.to_string(), "12.3 (0.500..1234)");
    }

    #[test]
    fn ratios_are_those_of_medians_and_absent_without_a_rival() {
        let ours = [10.0, 20.0, 60.0].map(|value| (OURS, value));
        let results = results(&[ours.as_slice(), &[(VXLAN, 8.0), (VXLAN, 12.0)]].concat());
        assert_eq!(results.ratio(Metric::TcpOne, VXLAN), Some(2.0));
        assert_eq!(results.ratio(Metric::TcpOne, HOST_GW), None);
        assert_eq!(results.subjects(), [OURS, VXLAN]);
    }

    #[test]
    fn a_busy_machine_is_said() {
        let report = |value| {
            let sample = Sample { metric: Metric::Others, ..results(&[(OURS, value)]).samples.remove(0) };
            Report { conditions: conditions(), results: vec![Results { samples: vec![sample], ..results(&[]) }] }
        };
        assert_eq!(report(4.0).warning(), None);
        assert!(report(150.0).to_string().contains("others used up to 150 % of a core"));
    }

    #[test]
    fn cores_that_halt_always_are_said() {
        let text = |metric| {
            let samples = vec![Sample { metric, ..results(&[(OURS, 60.0)]).samples.remove(0) }];
            Report { conditions: conditions(), results: vec![Results { samples, ..results(&[]) }] }.to_string()
        };
        assert!(text(Metric::RoundTripHalting).contains("can't be kept from halting"));
        assert!(!text(Metric::RoundTripMedian).contains("can't be kept from halting"));
    }

    #[test]
    fn each_floor_that_was_measured_is_judged() {
        let text = results(&[(OURS, 13.0), (VXLAN, 10.0), (HOST_GW, 12.0)]).to_string();
        assert!(text.contains("missed 1.300x, at least 1.35x of kernel vxlan: TCP, 1 flow"), "{text}");
        assert!(text.contains("met    1.083x, at least 1.00x of host-gw: TCP, 1 flow"), "{text}");
        assert!(!text.contains("UDP, 64 bytes, 1000 delivered/s, GSO passes"), "{text}");
        let json = results(&[(OURS, 13.0), (VXLAN, 10.0)]).to_json();
        assert_eq!(json["floors"][0]["met"], false);
        assert_eq!(json["metrics"][0]["rivals"]["ours"]["samples"], json!([13.0]));
        assert_eq!(json["metrics"][0]["ratios"], json!({ "ours / kernel vxlan": 1.3 }));
    }
}
