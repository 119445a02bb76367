//! `cargo xtask bench`: traffic through our dataplane, beside the kernel's vxlan device set up as flannel does, flannel's
//! host-gw and no overlay, in turns.
//!
//! * `topology` — the pairs of hosts
//! * `measure` — what is measured of a pair; `connections` and `datagrams` by hand; `awake` keeps cores from halting
//! * `report` — medians, spread and ratios; `floors` — what these must reach; `picture` draws them
//!
//! `cargo xtask bench control`: the control plane with many leases; see `tests/benches/control`. `cargo xtask bench
//! programs`: each program on single frames; see `tests/benches/programs.rs`. `cargo xtask bench receive`: the way from the
//! cable into the pod; see `tests/benches/receive.rs`. `cargo xtask bench attack`: traffic beside a flood of forged tunnel
//! packets; see `tests/benches/attack.rs`. `cargo xtask bench udp`: the tunnel of the backend udp; see `tests/benches/udp.rs`.
//! `cargo xtask bench pods`: pods that come and go; see `pods`. `cargo xtask bench
//! services`: traffic through a service address, measured as that of `cargo xtask bench`; see `services`.

mod awake;
mod connections;
pub mod datagrams;
mod floors;
mod measure;
mod picture;
mod pods;
mod report;
mod services;
mod topology;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context as _, Result};
use clap::ValueEnum as _;
use signal_hook::consts::{SIGINT, SIGTERM};

pub use self::{measure::round_trip, topology::Path as TrafficPath};
use self::{
    report::{Comparison, Conditions, Report, Results, Sample},
    topology::{Mode, Pair, Rival, Rules, Subject},
};
use crate::{
    lab::{Backend, Lab, Lock, StoreKind, remove_leftovers, services::ServiceRules},
    process::{cargo, inherit},
    progress::{heading, step},
    setup,
};

const NAME: &str = "flannel-bench";

/// Options of `cargo xtask bench`.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Options {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    turns: Turns,
    /// Only some of them
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = Rival::ALL)]
    only: Vec<Rival>,
    /// The netfilter rules of hosts with pods
    #[arg(long, value_enum, default_value_t = Rules::Cluster)]
    rules: Rules,
    /// How ours reaches the other host
    #[arg(long, value_enum, default_value_t)]
    backend: Backend,
    /// Where a picture of the results is written
    #[arg(long)]
    svg: Option<PathBuf>,
}

#[derive(clap::Args)]
struct Turns {
    /// How often each is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Length of a measurement
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Where the results are written as JSON
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(clap::Subcommand)]
enum What {
    /// The agent with 10, 1,000 and 5,000 leases, beside flannel's scheme for the same
    Control {
        /// What the leases are in
        #[arg(long, value_enum, default_value_t)]
        store: StoreKind,
        /// Further options; `-- --help` lists them
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Small datagrams from the cable into the pod, as fast as they can be taken
    Receive {
        /// Further options; `-- --help` lists them
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Traffic to a pod through a service address, beside pod to pod and beside the kernel's own paths
    Services(services::Options),
    /// Pods that are made and removed by the CNI plugin, beside `bridge` alone
    Pods(pods::Options),
    /// Traffic between pods, and beside it forged tunnel packets as fast as they can be sent
    Attack {
        /// Further options; `-- --help` lists them
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Bulk TCP by the backend udp, and by a proxy of one packet with each system call
    Udp {
        /// Further options; `-- --help` lists them
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Each program on single frames, with few and with many peers in the maps
    Programs {
        /// Further options; `-- --help` lists them
        #[arg(last = true)]
        arguments: Vec<String>,
    },
}

/// Measures and prints medians and ratios.
///
/// # Errors
/// Where the lab does not come up or a measurement fails.
pub fn run(options: &Options) -> Result<()> {
    setup::ensure()?;
    step("build the agent", || inherit(cargo().args(["build", "--release", "--package", "flannel-agent"])))?;
    match &options.what {
        None => traffic(options),
        Some(What::Control { store, arguments }) => control(*store, arguments),
        Some(What::Programs { arguments }) => of_tests("programs", arguments),
        Some(What::Services(options)) => services::run(options),
        Some(What::Pods(options)) => pods::run(options),
        Some(What::Attack { arguments }) => of_tests("attack", arguments),
        Some(What::Receive { arguments }) => of_tests("receive", arguments),
        Some(What::Udp { arguments }) => of_tests("udp", arguments),
    }
}

fn control(store: StoreKind, arguments: &[String]) -> Result<()> {
    // What is measured waits for the double, too.
    if store == StoreKind::Kubernetes {
        step("build the API server's double", || inherit(cargo().args(["build", "--release", "--package", "xtask"])))?;
    }
    let store = store.to_possible_value().context("each store has a name")?;
    of_tests("control", &[&[format!("--store={}", store.get_name())][..], arguments].concat())
}

fn of_tests(name: &str, arguments: &[String]) -> Result<()> {
    inherit(cargo().args(["bench", "--package", "tests", "--bench", name, "--"]).args(arguments))
}

/// Measures in a folder and under a name of which nothing is left afterwards.
fn in_lab<T>(name: &str, measure: impl FnOnce(&Path, &AtomicBool) -> Result<T>) -> Result<T> {
    let directory = std::env::temp_dir().join(name);
    let _lock = Lock::take(name)?;
    remove_leftovers(name, &directory)?;
    // From here on a signal ends the measurement, but not the taking down.
    let stopped = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stopped))?;
    }
    let result = measure(&directory, &stopped);
    remove_leftovers(name, &directory)?;
    result
}

const TRAFFIC: Comparison = Comparison {
    ours: Subject::by_address(Rival::Ours),
    others: [Subject::by_address(Rival::Vxlan), Subject::by_address(Rival::HostGw), Subject::by_address(Rival::Direct)],
    floors: &floors::TRAFFIC,
};

/// Without a tunnel.
const ON_LINK: Comparison = Comparison { floors: &floors::ON_LINK, ..TRAFFIC };

fn traffic(options: &Options) -> Result<()> {
    let comparison = if options.backend.encapsulates() { &TRAFFIC } else { &ON_LINK };
    let subjects = comparison.subjects().filter(|subject| options.only.contains(&subject.rival)).collect();
    let Options { backend, rules, turns, .. } = options;
    let bench = Bench { comparison, subjects, backend: *backend, rules: *rules, proxy: None, turns };
    let report = bench.run()?;
    if let Some(path) = &options.svg {
        svg::save(path, &picture::draw(&report)).with_context(|| format!("write {path:?}"))?;
    }
    Ok(())
}

/// Measurements of several subjects in turns.
struct Bench<'a> {
    comparison: &'static Comparison,
    /// Those of the comparison's that are measured.
    subjects: Vec<Subject>,
    backend: Backend,
    rules: Rules,
    /// By which rules hosts translate a service; there is none without.
    proxy: Option<ServiceRules>,
    turns: &'a Turns,
}

impl Bench<'_> {
    /// Measures, prints, and writes JSON where asked.
    fn run(&self) -> Result<Report> {
        let report = in_lab(NAME, |directory, stopped| self.measure(directory, stopped))?;
        println!("\n{report}");
        if let Some(path) = &self.turns.json {
            let text = serde_json::to_string_pretty(&report.to_json())?;
            fs::write(path, text + "\n").with_context(|| format!("write {path:?}"))?;
        }
        Ok(report)
    }

    fn measure(&self, directory: &Path, stopped: &AtomicBool) -> Result<Report> {
        let lab = Lab::new(NAME, directory)?;
        let store = lab.store()?;
        let config = format!(r#"{{"Network": "10.5.0.0/16", "Backend": {}}}"#, self.backend.json());
        store.put("/coreos.com/network/config", &config)?;
        let rivals = Rival::ALL.into_iter().filter(|rival| self.subjects.iter().any(|subject| subject.rival == *rival));
        let pairs = rivals.map(|rival| Pair::new(rival, self.rules, self.proxy, &lab, &store));
        let mut pairs = pairs.collect::<Result<Vec<_>>>()?;
        let mut results = Vec::new();
        for mode in Mode::ALL {
            heading(mode.name());
            results.push(self.measure_mode(mode, &mut pairs, directory, stopped)?);
        }
        let conntrack = pairs.iter().map(|pair| Ok((pair.rival, pair.conntrack_entries()?))).collect::<Result<_>>()?;
        let Turns { rounds, seconds, .. } = *self.turns;
        Ok(Report { conditions: Conditions::of(rounds, seconds, conntrack, self.proxy)?, results })
    }

    /// The first packets of a path find no neighbours, no flow noted, and cold caches.
    fn warm_up(&self, pair: &mut Pair, directory: &Path) -> Result<()> {
        pair.check(100)?;
        for subject in self.subjects.iter().filter(|subject| subject.rival == pair.rival) {
            pair.forget_flows()?;
            measure::warm_up(&pair.path(subject.target)?, directory)?;
            pair.check_translated(subject.target)?;
        }
        Ok(())
    }

    fn measure_mode(&self, mode: Mode, pairs: &mut [Pair], directory: &Path, stopped: &AtomicBool) -> Result<Results> {
        for pair in &mut *pairs {
            pair.set_mode(mode)?;
            self.warm_up(pair, directory)
                .with_context(|| format!("{}, {}, warming up", pair.rival.name(), mode.name()))?;
        }
        let Turns { rounds, seconds, .. } = *self.turns;
        let mut samples = Vec::new();
        for round in 0..rounds {
            for index in order(self.subjects.len(), round as usize) {
                anyhow::ensure!(!stopped.load(Ordering::Relaxed), "stopped");
                let subject = self.subjects[index];
                let pair = pairs.iter().find(|pair| pair.rival == subject.rival).context("a pair for each rival")?;
                pair.forget_flows()?;
                let measured = step(&format!("round {} of {rounds}: {}", round + 1, subject.name), || {
                    measure::measure(&pair.path(subject.target)?, seconds, directory)
                });
                let measured = measured.with_context(|| format!("{}, {}", subject.name, mode.name()))?;
                samples.extend(measured.into_iter().map(|(metric, value)| Sample { round, subject, metric, value }));
            }
        }
        for pair in pairs {
            pair.check(100)
                .with_context(|| format!("{}, {}, after its measurements", pair.rival.name(), mode.name()))?;
        }
        Ok(Results { comparison: self.comparison, mode, samples })
    }
}

/// Whose turn it is within a round: another first each time, and not always after the same one.
fn order(count: usize, round: usize) -> Vec<usize> {
    let mut order: Vec<_> = (0..count).collect();
    if count > 0 {
        order.rotate_left(round / 2 % count);
    }
    if round % 2 == 1 {
        order.reverse();
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_round_has_each_once_and_nobody_follows_the_same_one_always() {
        assert_eq!(order(4, 0), [0, 1, 2, 3]);
        assert_eq!(order(4, 1), [3, 2, 1, 0]);
        assert_eq!(order(4, 2), [1, 2, 3, 0]);
        assert_eq!(order(4, 3), [0, 3, 2, 1]);
        assert_eq!(order(1, 7), [0]);
        assert!(order(0, 3).is_empty());
        for rounds in [0..2, 0..5] {
            let firsts: Vec<_> = rounds.map(|round| order(2, round)[0]).collect();
            assert!(firsts.contains(&0) && firsts.contains(&1), "{firsts:?}");
        }
    }
}
