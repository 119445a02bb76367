//! `cargo xtask bench pods`: pods that come and go by the CNI plugin on a host whose other pods talk, beside the same by
//! `bridge` alone, in turns.

use std::{
    fmt, fs,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::{NAME, in_lab, order};
use crate::{
    lab::{Host, Lab, Netns, cni::Runtime},
    process::{Process, workspace},
    progress::{step, wait_for},
};

/// How many a runtime starts at once.
const AT_ONCE: [usize; 2] = [1, 4];
/// What the other pods send, beside a hundred pings a second.
const TRAFFIC: &str = "500M";
const LIMIT: Duration = Duration::from_secs(10);

/// Options of `cargo xtask bench pods`.
#[derive(clap::Args)]
pub(super) struct Options {
    /// How many pods there are at last; a /24 has room for 250
    #[arg(long, default_value_t = 250, value_parser = clap::value_parser!(u16).range(4..=250))]
    pods: u16,
    /// How often they are made and removed
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

/// Who makes the pods.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Maker {
    Ours,
    Bridge,
}

/// Sorted times.
#[derive(Default)]
struct Times(Vec<Duration>);

impl fmt::Display for Times {
    /// Median, 99th percentile and worst, in milliseconds.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let last = self.0.len().saturating_sub(1);
        let at =
            |share: f64| self.0.get((last as f64 * share) as usize).map_or(f64::NAN, |time| time.as_secs_f64() * 1e3);
        write!(f, "{:>7.1} {:>7.1} {:>7.1}", at(0.5), at(0.99), at(1.0))
    }
}

/// What was measured of a maker with so many at once.
struct Sample {
    maker: Maker,
    at_once: usize,
    added: Times,
    removed: Times,
    /// What the agent was busy with.
    agent: Duration,
}

/// Measures and prints.
///
/// # Errors
/// Where the lab does not come up, a plugin fails, or a ping is lost meanwhile.
pub(super) fn run(options: &Options) -> Result<()> {
    let mut samples = in_lab(NAME, |directory, stopped| measure(options, directory, stopped))?;
    println!(
        "\nms{:>29} {:>23}\n{:<14}{:>8} {:>7} {:>7} {:>7} {:>7} {:>7}  agent's CPU per pod",
        "ADD", "DEL", "", "p50", "p99", "worst", "p50", "p99", "worst"
    );
    for at_once in AT_ONCE {
        for maker in [Maker::Ours, Maker::Bridge] {
            let (mut added, mut removed, mut agent) = (Times::default(), Times::default(), Duration::ZERO);
            for sample in samples.iter_mut().filter(|sample| sample.maker == maker && sample.at_once == at_once) {
                added.0.append(&mut sample.added.0);
                removed.0.append(&mut sample.removed.0);
                agent += sample.agent;
            }
            added.0.sort();
            removed.0.sort();
            let name = if maker == Maker::Ours { "flannel" } else { "bridge alone" };
            let each = agent.as_secs_f64() * 1e3 / added.0.len().max(1) as f64;
            println!("{at_once} x {name:<12}{added} {removed} {each:>7.1}");
        }
    }
    Ok(())
}

fn measure(options: &Options, directory: &Path, stopped: &AtomicBool) -> Result<Vec<Sample>> {
    let lab = Lab::new(NAME, directory)?;
    let store = lab.store()?;
    store.put("/coreos.com/network/config", r#"{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}"#)?;
    let target = workspace().join("target/release");
    let mut hosts = [lab.host("node1", 1)?, lab.host("node2", 2)?];
    let mut runtimes = Vec::new();
    for host in &mut hosts {
        host.start_agent(&target.join("flannel-agent"), &store, &[])?;
        host.wait_ready()?;
        let runtime = Runtime::new(host, &target)?.alone();
        host.attach_pod(&runtime)?;
        runtimes.push(runtime);
    }
    let [host, other] = &hosts;
    let (pod, peer) = (&host.pods[0], &other.pods[0]);
    let ping = format!("ping -c 1 -W 1 {}", peer.address);
    wait_for("pods", LIMIT, || pod.netns.exec(&ping).is_ok())?;
    let ours = runtimes.remove(0);
    let mut bridge = ours.clone();
    // To the letter what ours gives it.
    let given: Value = serde_json::from_slice(&fs::read(ours.directory.join("state/pod1"))?)?;
    bridge.plugins = vec![given];

    let mut server = peer.netns.command("iperf3");
    server.args(["-s", "--forceflush", "-B", &peer.address.to_string()]);
    let server = Process::start(&mut server, &directory.join("iperf3.log"))?;
    wait_for("iperf3 to listen", LIMIT, || server.log().contains("listening"))?;
    let mut samples = Vec::new();
    for round in 0..options.rounds {
        for at_once in AT_ONCE {
            for index in order(2, round as usize) {
                let maker = [Maker::Ours, Maker::Bridge][index];
                let runtime = if maker == Maker::Ours { &ours } else { &bridge };
                let traffic = Traffic::start(&pod.netns, &peer.address.to_string(), directory)?;
                let what = if maker == Maker::Ours { "flannel" } else { "bridge alone" };
                let step_name = format!("round {} of {}: {what}, {at_once} at once", round + 1, options.rounds);
                samples.push(step(&step_name, || {
                    come_and_go(host, runtime, maker, at_once, options.pods.into(), stopped)
                })?);
                traffic.end()?;
            }
        }
    }
    Ok(samples)
}

/// Makes so many pods, and removes them.
fn come_and_go(
    host: &Host,
    runtime: &Runtime,
    maker: Maker,
    at_once: usize,
    pods: usize,
    stopped: &AtomicBool,
) -> Result<Sample> {
    let name = |number| format!("{}-m{number}", host.netns.name());
    let netns = (0..pods).map(|number| Netns::create(&name(number))).collect::<Result<Vec<_>>>()?;
    let before = cpu_time(host)?;
    let added = timed(&netns, at_once, stopped, |id, netns| runtime.add(id, netns).map(drop))?;
    let removed = timed(&netns, at_once, stopped, |id, netns| runtime.del(id, &netns.path(), None).map(drop))?;
    Ok(Sample { maker, at_once, added, removed, agent: cpu_time(host)? - before })
}

fn timed(
    netns: &[Netns],
    at_once: usize,
    stopped: &AtomicBool,
    call: impl Fn(&str, &Netns) -> Result<()> + Sync,
) -> Result<Times> {
    let worker = |worker: usize| {
        let mut times = Vec::new();
        for number in (worker..netns.len()).step_by(at_once) {
            anyhow::ensure!(!stopped.load(Ordering::Relaxed), "stopped");
            let begun = Instant::now();
            call(&format!("m{number}"), &netns[number])?;
            times.push(begun.elapsed());
        }
        Ok::<_, anyhow::Error>(times)
    };
    let times: Result<Vec<_>> = thread::scope(|scope| {
        let workers: Vec<_> = (0..at_once).map(|number| scope.spawn(move || worker(number))).collect();
        workers.into_iter().map(|worker| worker.join().map_err(|_| anyhow::anyhow!("a worker panicked"))?).collect()
    });
    Ok(Times(times?.concat()))
}

/// What a host's agent was busy with since its start.
fn cpu_time(host: &Host) -> Result<Duration> {
    let agent = host.agent.as_ref().context("the host has an agent")?;
    let stat = fs::read_to_string(format!("/proc/{}/stat", agent.id()))?;
    // proc(5): utime and stime are the 14th and the 15th field, and the second one ends with a parenthesis. In hundredths.
    let fields: Vec<_> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<u64>().ok()).context("no CPU time");
    Ok(Duration::from_millis((ticks(11)? + ticks(12)?) * 10))
}

/// A flow and pings.
struct Traffic {
    _flow: Process,
    pings: Process,
}

impl Traffic {
    fn start(netns: &Netns, address: &str, directory: &Path) -> Result<Self> {
        let mut flow = netns.command("iperf3");
        flow.args(["-c", address, "-t", "3600", "-b", TRAFFIC, "--forceflush"]);
        let flow = Process::start(&mut flow, &directory.join("flow.log"))?;
        wait_for("the flow", LIMIT, || flow.log().contains("sec"))?;
        let mut pings = netns.command("ping");
        let pings = Process::start(pings.args(["-i", "0.01", "-q", address]), &directory.join("ping.log"))?;
        Ok(Self { _flow: flow, pings })
    }

    fn end(mut self) -> Result<()> {
        self.pings.signal(Signal::SIGINT)?;
        self.pings.wait(LIMIT)?;
        let log = self.pings.log();
        let counts = log.lines().find(|line| line.contains("packets transmitted")).context("ping says nothing")?;
        let numbers: Vec<u64> = counts.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect();
        // One may be on its way.
        anyhow::ensure!(numbers.len() > 1 && numbers[0] - numbers[1] <= 1, "pings were lost: {counts}");
        Ok(())
    }
}
