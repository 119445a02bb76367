//! `cargo xtask chaos`: agents, etcd and the network fail by a schedule that a seed replays, while all pods send numbered
//! packets to each other, and what must hold is checked all the time.
//!
//! * `schedule` — what goes wrong and when, drawn before anything starts
//! * `cluster`, `faults` — the hosts, and what befalls them
//! * `traffic`, `ledger` — packets between all pods, and which of them came
//! * `timeline` — which lost packets a fault of the network explains
//! * `history` — everything that etcd ever said
//! * `datapath` — what the kernel has of an agent, read from outside
//! * `invariants`, `resources` — what must hold, as functions of what was seen
//! * `watcher` — looking, and holding what is seen against that
//! * `report` — what was done and what was seen

mod cluster;
mod datapath;
mod faults;
mod history;
mod invariants;
mod ledger;
mod report;
mod resources;
mod schedule;
mod timeline;
mod traffic;
mod watcher;

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    flag,
};

use self::{
    cluster::{Cluster, Place},
    faults::Outcome,
    ledger::LOST_AFTER,
    watcher::Watcher,
};
pub use self::{
    invariants::Invariant,
    report::{Report, Violation},
    schedule::{Fault, Kind, Schedule, Shape},
};
use crate::{
    lab::{Backend, Lab, Lock, PREFIX, remove_leftovers},
    process::{cargo, inherit, workspace},
    progress::step,
    setup,
};

const NAME: &str = "flannel-chaos";
/// Agents take subnets below those of foreign leases.
const SUBNETS: &str = r#""Network": "10.5.0.0/16", "SubnetMin": "10.5.1.0", "SubnetMax": "10.5.191.0""#;

/// All hosts are up by then.
const START_LIMIT: Duration = Duration::from_secs(30);
/// A fault of something that is not there yet begins when it is; after so long it is left out.
const DELAY_LIMIT: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_millis(5);
/// How often the maps of one host are looked at; hosts take turns.
const LOOK_AT_MAPS: Duration = Duration::from_millis(100);
/// How often all else is.
const LOOK: Duration = Duration::from_millis(250);
/// How often that is which costs more.
const LOOK_SELDOM: Duration = Duration::from_secs(2);
/// How often it is seen whether hosts are at rest, and for how long they may leave it: a status is a moment behind.
const LOOK_AT_REST: Duration = Duration::from_millis(700);
const UNREST_LIMIT: Duration = Duration::from_secs(3);

/// Options of `cargo xtask chaos`.
#[derive(clap::Args)]
pub struct Options {
    /// What the schedule is drawn from; the same seed replays it
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many hosts
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(2..=32))]
    nodes: u8,
    /// For how long
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    minutes: u32,
    /// How the hosts reach each other
    #[arg(long, value_enum, default_value_t)]
    backend: Backend,
    /// The agent; built for release without
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// Print the schedule and do nothing
    #[arg(long)]
    print_schedule: bool,
    /// Write the report as JSON to this file, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where logs are kept if something is violated; its content is replaced
    #[arg(long, value_name = "DIR", default_value = "target/chaos")]
    logs: PathBuf,
}

/// Runs by a schedule and prints the report.
///
/// # Errors
/// Where something was violated, or can't be done.
pub fn run(options: &Options) -> Result<()> {
    let hosts = usize::from(options.nodes);
    let schedule = Schedule::draw(options.seed, hosts, Shape::of_minutes(options.minutes, hosts));
    if options.print_schedule {
        print!("{schedule}");
        return Ok(());
    }
    setup::ensure()?;
    // From here on a signal ends the run, but not the taking down.
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        flag::register(signal, Arc::clone(&interrupted))?;
    }
    let directory = std::env::temp_dir().join(NAME);
    let _lock = Lock::take(NAME)?;
    remove_leftovers(NAME, &directory)?;
    let result = run_in(options, schedule, &directory, &interrupted);
    remove_leftovers(NAME, &directory)?;
    let report = result?;
    print!("\n{report}");
    if let Some(file) = &options.json {
        let text = serde_json::to_string_pretty(&report.to_json())? + "\n";
        fs::write(file, text).with_context(|| format!("write {file:?}"))?;
    }
    let violations: u64 = report.violated.values().sum();
    anyhow::ensure!(violations == 0, "{violations} violations; seed {} replays the schedule", report.seed);
    Ok(())
}

fn run_in(options: &Options, schedule: Schedule, directory: &Path, interrupted: &AtomicBool) -> Result<Report> {
    let agent = match &options.agent {
        Some(agent) => std::path::absolute(agent)?,
        None => {
            let release = ["build", "--release", "--package", "flannel-agent"];
            step("build the agent", || inherit(cargo().args(release)))?;
            workspace().join("target/release/flannel-agent")
        }
    };
    let lab = Lab::new(NAME, directory)?;
    let logs = std::path::absolute(&options.logs)?;
    run_on(&lab, schedule, options.backend, &agent, &logs, interrupted)
}

/// Runs by a schedule in a lab that is empty. The logs stay where something was violated.
///
/// # Errors
/// Where something can't be done; what is violated is in the report.
pub fn run_on(
    lab: &Lab,
    schedule: Schedule,
    backend: Backend,
    agent: &Path,
    logs: &Path,
    interrupted: &AtomicBool,
) -> Result<Report> {
    if logs.exists() {
        fs::remove_dir_all(logs).with_context(|| format!("remove {logs:?}"))?;
    }
    let store = lab.store()?;
    store.put(&format!("{PREFIX}/config"), &format!(r#"{{{SUBNETS}, "Backend": {}}}"#, backend.json()))?;
    let start = Instant::now();
    let cluster = Cluster::new(lab, store, backend, schedule.hosts, agent.to_owned(), logs.to_owned(), start)?;
    let report = Report { seed: schedule.seed, hosts: schedule.hosts, ..Report::default() };
    let due = Due::default();
    let mut run =
        Run { cluster, report, watcher: Watcher::default(), interrupted, due, turn: 0, pending: BinaryHeap::new() };
    let result = run.go(&schedule);
    let Run { mut cluster, mut report, .. } = run;
    for place in 0..cluster.places.len() {
        cluster.save_log(place);
    }
    cluster.save_store_log();
    drop(cluster);
    // What can't be done is worth its logs, too.
    result.with_context(|| format!("logs are kept in {}", logs.display()))?;
    if report.violations.is_empty() {
        fs::remove_dir_all(logs).with_context(|| format!("remove {logs:?}"))?;
    } else {
        report.logs = Some(logs.to_owned());
    }
    Ok(report)
}

/// When everything is to be looked at next.
#[derive(Default)]
struct Due {
    maps: Duration,
    look: Duration,
    seldom: Duration,
}

/// A fault's end that is to come: when, and which.
type End = (Duration, usize);

struct Run<'a> {
    cluster: Cluster<'a>,
    report: Report,
    watcher: Watcher,
    interrupted: &'a AtomicBool,
    due: Due,
    /// Whose maps are looked at next.
    turn: usize,
    /// The ends of faults that are on; their numbers in the round.
    pending: BinaryHeap<Reverse<End>>,
}

impl Run<'_> {
    fn go(&mut self, schedule: &Schedule) -> Result<()> {
        let started = self.cluster.now();
        while !self.cluster.places.iter().all(Place::is_up) {
            anyhow::ensure!(self.cluster.now() < started + START_LIMIT, "hosts are not up: {}", self.not_up());
            self.tick()?;
        }
        let last = schedule.rounds.len().saturating_sub(1);
        for (number, faults) in schedule.rounds.iter().enumerate() {
            self.round(schedule, faults, number == last)?;
            if self.interrupted.load(Ordering::Relaxed) {
                self.report.interrupted = true;
                break;
            }
            self.report.rounds.0 += 1;
            println!(
                "round {} of {}: {} packets, {} violations so far",
                number + 1,
                schedule.rounds.len(),
                self.cluster.traffic.ledger().totals.received,
                self.report.violated.values().sum::<u64>()
            );
        }
        self.report.rounds.1 = schedule.rounds.len();
        let Self { cluster, report, watcher, .. } = self;
        report.totals = cluster.traffic.ledger().totals;
        report.checked(Invariant::NoLoss, report.totals.sent);
        report.checked(Invariant::RightPod, report.totals.received);
        report.lasted = cluster.now();
        watcher.judge_lives(report.lasted, report);
        Ok(())
    }

    fn not_up(&self) -> String {
        let missing = self.cluster.places.iter().filter(|place| !place.is_up());
        missing.map(|place| format!("{}:\n    {}", place.name(), place.last_words())).collect::<Vec<_>>().join("\n")
    }

    /// Faults, and then rest.
    fn round(&mut self, schedule: &Schedule, faults: &[Fault], is_last: bool) -> Result<()> {
        let begin = self.cluster.now();
        let mut to_come: Vec<usize> = (0..faults.len()).collect();
        while !to_come.is_empty() || !self.pending.is_empty() {
            let at = self.cluster.now() - begin;
            let on: Vec<&Fault> = self.pending.iter().map(|Reverse((_, number))| &faults[*number]).collect();
            let can_begin = |fault: &Fault| {
                fault.at <= at && self.cluster.is_there(fault) && !on.iter().any(|other| other.excludes(fault))
            };
            if let Some(Reverse((_, number))) = self.pending.peek().copied().filter(|end| end.0.0 <= at) {
                self.pending.pop();
                let fault = faults[number];
                if fault.kind == Kind::ForeignLease && !self.cluster.store_is_up {
                    self.pending.push(Reverse((at + LOOK, number)));
                } else {
                    self.cluster.end(fault).with_context(|| format!("end: {fault}"))?;
                }
            } else if let Some(index) = to_come.iter().position(|number| can_begin(&faults[*number])) {
                let number = to_come.remove(index);
                let fault = faults[number];
                let outcome = self.cluster.begin(fault).with_context(|| format!("begin: {fault}"))?;
                let (done, left_out) = self.report.faults.entry(fault.kind).or_default();
                match outcome {
                    Outcome::Done => {
                        *done += 1;
                        self.pending.push(Reverse((at + fault.lasts, number)));
                    }
                    Outcome::LeftOut => *left_out += 1,
                }
            } else if at > schedule.shape.faults + DELAY_LIMIT && self.pending.is_empty() {
                for number in to_come.drain(..) {
                    self.report.faults.entry(faults[number].kind).or_default().1 += 1;
                }
            } else {
                self.tick()?;
            }
            if self.interrupted.load(Ordering::Relaxed) {
                return Ok(());
            }
        }
        self.settle(schedule)?;
        let quiet = schedule.shape.rest.max((begin + schedule.shape.length).saturating_sub(self.cluster.now()));
        // What is lost is known only later.
        self.rest(if is_last { quiet.max(LOST_AFTER + LOOK * 2) } else { quiet })
    }

    /// Waits until all hosts are at rest. What is not by then is violated.
    fn settle(&mut self, schedule: &Schedule) -> Result<()> {
        let begin = self.cluster.now();
        loop {
            let unrest = self.watcher.unrest(&mut self.cluster, &mut self.report)?;
            let now = self.cluster.now();
            if unrest.is_empty() || self.interrupted.load(Ordering::Relaxed) {
                self.report.longest_settle = self.report.longest_settle.max(now - begin);
                return Ok(());
            }
            if now > begin + schedule.shape.settle {
                for (invariant, host, text) in unrest {
                    self.report.violation(now, invariant, &host, format!("not at rest: {text}"));
                }
                return Ok(());
            }
            self.tick_for(LOOK_AT_REST)?;
        }
    }

    /// Sees that all hosts stay at rest.
    fn rest(&mut self, time: Duration) -> Result<()> {
        let end = self.cluster.now() + time;
        let mut since = None;
        while self.cluster.now() < end && !self.interrupted.load(Ordering::Relaxed) {
            self.tick_for(LOOK_AT_REST)?;
            let unrest = self.watcher.unrest(&mut self.cluster, &mut self.report)?;
            let now = self.cluster.now();
            match unrest.is_empty() {
                true => since = None,
                false if now > *since.get_or_insert(now) + UNREST_LIMIT => {
                    for (invariant, host, text) in unrest {
                        self.report.violation(now, invariant, &host, format!("did not stay at rest: {text}"));
                    }
                    return Ok(());
                }
                false => {}
            }
        }
        self.cluster.places.iter_mut().for_each(|place| place.may_end = false);
        Ok(())
    }

    fn tick_for(&mut self, time: Duration) -> Result<()> {
        let end = self.cluster.now() + time;
        while self.cluster.now() < end {
            self.tick()?;
        }
        Ok(())
    }

    /// Looks at what is due, and sleeps a little.
    fn tick(&mut self) -> Result<()> {
        let Self { cluster, report, watcher, due, .. } = self;
        let now = cluster.now();
        if due.maps <= now {
            due.maps = now + LOOK_AT_MAPS;
            self.turn = (self.turn + 1) % cluster.places.len();
            watcher.look_at_maps(cluster, self.turn, report);
        }
        if due.look <= now {
            due.look = now + LOOK;
            watcher.look_at_history(cluster, report)?;
            for place in 0..cluster.places.len() {
                report.moved += usize::from(cluster.follow_subnet(place)?);
            }
            watcher.connect(cluster);
            watcher.look_at_traffic(cluster, report);
            watcher.look_again(cluster, report);
            // A signal to us has reached the agents as well.
            if !self.interrupted.load(Ordering::Relaxed) {
                watcher.look_at_agents(cluster, report)?;
            }
        }
        if due.seldom <= now {
            due.seldom = now + LOOK_SELDOM;
            watcher.measure(cluster);
            watcher.look_at_claims(cluster, false, report);
        }
        std::thread::sleep(TICK);
        Ok(())
    }
}
