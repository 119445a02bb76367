//! `cargo xtask bench control`: how fast and how large the agent is with many leases, and for etcd beside it what it takes to
//! program the same peers by flannel's scheme: an RPC and three netlink objects for each.

mod commands;
mod cost;
mod etcd;
mod kubernetes;

use std::{
    fs::{self, File},
    net::Ipv4Addr,
    ops::Range,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::Parser;
use flannel_agent::dataplane::{PinDirectory, PinnedSubnets};
use flannel_common::vxlan::Vni;
use nix::sched::{CloneFlags, setns};
use xtask::{
    lab::{Host, Lab, LeaseStore, StoreKind, remove_leftovers},
    progress::wait_for,
};

use self::cost::{cpu, memory};

const NAME: &str = "flannel-control";
/// How many hosts announce themselves, one by one.
const ANNOUNCEMENTS: u32 = 500;
/// What the kernel has for the overlay without any peer: a route, a neighbour and a forwarding entry.
const OWN_OBJECTS: usize = 3;
const QUIET: Duration = Duration::from_secs(20);
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Parser)]
struct Options {
    /// What the leases are in
    #[arg(long, value_enum, default_value_t)]
    store: StoreKind,
    /// How often each is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Numbers of leases
    #[arg(long, value_delimiter = ',', default_value = "10,1000,5000")]
    leases: Vec<u32>,
    /// Where the results are written as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// What cargo adds
    #[arg(long, hide = true)]
    bench: bool,
}

/// What was measured, and its value.
type Row = (&'static str, f64);

/// A store that has the leases of many hosts, and of one that is really there.
trait Leases {
    /// What the agent is told of.
    fn store(&self) -> &dyn LeaseStore;

    /// Where in the map the peers are that are there from the beginning.
    fn slots(&self) -> Range<u32>;

    /// Where those come that announce themselves later.
    fn new_slots(&self, count: u32) -> Range<u32>;

    /// How many calls agents have made.
    fn calls(&mut self) -> f64;

    /// Does what comes before hosts can announce themselves.
    fn prepare(&mut self, _slots: Range<u32>) {}

    /// Has a host announce itself. It returns when the store has answered.
    fn announce(&mut self, slot: u32);

    /// Removes those hosts.
    fn withdraw(&mut self, slots: Range<u32>);

    /// Makes the host whose agent was measured a new one.
    fn forget(&mut self, host: &Host);

    /// Lets time pass in which nothing happens but what the store is full of, and says what was seen.
    fn pass(&mut self, time: Duration) -> Vec<Row>;

    /// What it takes to program the same peers by flannel's scheme.
    fn by_flannel(&self) -> Vec<Row> {
        Vec::new()
    }
}

fn main() {
    let options = Options::parse();
    let directory = std::env::temp_dir().join(NAME);
    remove_leftovers(NAME, &directory).unwrap();
    let mut results = serde_json::Map::new();
    for count in &options.leases {
        let result = measure(options.store, *count, options.rounds, &directory);
        // The next one's store begins empty.
        remove_leftovers(NAME, &directory).unwrap();
        print_rows(*count, options.rounds, &result);
        let rows = result.iter().map(|(name, values)| ((*name).to_owned(), serde_json::json!(values)));
        results.insert(count.to_string(), rows.collect::<serde_json::Map<_, _>>().into());
    }
    if let Some(path) = options.json {
        fs::write(path, serde_json::to_string_pretty(&results).unwrap()).unwrap();
    }
}

/// Values of all rounds, by what was measured.
type Values = Vec<(&'static str, Vec<f64>)>;

fn print_rows(count: u32, rounds: usize, values: &[(&str, Vec<f64>)]) {
    println!("\n{:<48}{:>10}   min..max of {rounds} rounds", format!("{count} leases"), "median");
    for (name, values) in values {
        let mut sorted = values.clone();
        sorted.sort_by(f64::total_cmp);
        let (median, min, max) = (sorted[sorted.len() / 2], sorted[0], sorted[sorted.len() - 1]);
        println!("  {name:<46} {median:10.2}   {min:.2}..{max:.2}");
    }
}

fn measure(store: StoreKind, count: u32, rounds: usize, directory: &Path) -> Values {
    let lab = Lab::new(NAME, directory).unwrap();
    let mut host = lab.host("node1", 1).unwrap();
    reach_resolvers(&host);
    let mut leases: Box<dyn Leases> = match store {
        StoreKind::Etcd => {
            let started = etcd::Etcd::start(&lab);
            Box::new(etcd::Etcd::fill(started, enter(&host), count))
        }
        StoreKind::Kubernetes => {
            let started = kubernetes::Kubernetes::start(&lab, &host, count);
            Box::new(kubernetes::Kubernetes::reach(started, enter(&host)))
        }
    };
    let mut values = Values::new();
    for _ in 0..rounds {
        let ours = agent(&mut host, &mut *leases);
        for (name, value) in ours.into_iter().chain(leases.by_flannel()) {
            match values.iter_mut().find(|(known, _)| *known == name) {
                Some((_, values)) => values.push(value),
                None => values.push((name, vec![value])),
            }
        }
    }
    values
}

/// A start of the agent on a host where it never ran, and then one peer after the other.
fn agent(host: &mut Host, leases: &mut dyn Leases) -> Vec<Row> {
    let binary = agent_binary();
    let pins = PinDirectory::new(host.pin_dir(), Vni::DEFAULT);
    let calls = leases.calls();
    let start = Instant::now();
    host.start_agent(&binary, leases.store(), &commands::ARGUMENTS).unwrap();
    let mut map = None;
    let mut missing = leases.slots();
    let complete = wait_for("all peers in the map", LIMIT, || {
        map = map.take().or_else(|| PinnedSubnets::open(&pins).ok());
        // Each is looked for until it is there, and then no more: to count them all is what takes time.
        while let (Some(map), Some(slot)) = (&map, missing.clone().next())
            && map.has(slot).unwrap()
        {
            missing.next();
        }
        missing.is_empty()
    });
    assert!(complete.is_ok(), "{}", host.agent.as_ref().unwrap().log());
    let to_map = start.elapsed();
    host.wait_ready().unwrap();
    let (ready, map, pid) = (start.elapsed(), map.unwrap(), host.agent.as_ref().unwrap().id());
    assert_eq!(map.count().unwrap(), leases.slots().len());
    // What it calls after that is over when it has written what it knows.
    let known = host.run_dir().join("flannel.1.leases");
    wait_for("the start to be over", LIMIT, || known.exists()).unwrap();
    let cpu_at_start = cpu(pid);
    let calls = leases.calls() - calls;

    let slots = leases.new_slots(ANNOUNCEMENTS);
    leases.prepare(slots.clone());
    let cpu_before = cpu(pid);
    let (mut answered, mut latencies) = (Vec::new(), Vec::new());
    for slot in slots.clone() {
        let start = Instant::now();
        leases.announce(slot);
        answered.push(start.elapsed().as_secs_f64() * 1e3);
        while !map.has(slot).unwrap() {
            assert!(start.elapsed() < LIMIT, "the lease of slot {slot} does not come into the map");
            std::thread::sleep(Duration::from_micros(20));
        }
        latencies.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let cpu_of_puts = cpu(pid) - cpu_before;

    let before = cpu(pid);
    let seen = leases.pass(QUIET);
    let idle_share = (cpu(pid) - before) / QUIET.as_secs_f64() * 100.0;
    let objects: usize = host.overlay_tables().unwrap().iter().map(|(_, lines)| lines.len()).sum();
    let [resident, peak] = ["VmRSS:", "VmHWM:"].map(|field| memory(pid, field));

    let of_commands = commands::measure(host, &binary);

    // As it was before, for the next round.
    leases.withdraw(slots);
    host.agent = None;
    leases.forget(host);
    xtask::process::output(host.agent_command(&binary).arg("cleanup")).unwrap();
    let mut rows = vec![
        ("agent: start to all peers in the map, ms", to_map.as_secs_f64() * 1e3),
        ("agent: start to subnet.env, ms", ready.as_secs_f64() * 1e3),
        ("agent: RPCs of the start", calls),
        ("agent: CPU of the start, ms", cpu_at_start * 1e3),
        ("agent: resident memory, MiB", resident),
        ("agent: resident memory at most, MiB", peak),
        ("store: put to answer, p50, ms", percentile(&mut answered, 0.5)),
        ("agent: put to map, p50, ms", percentile(&mut latencies, 0.5)),
        ("agent: put to map, p99, ms", percentile(&mut latencies, 0.99)),
        ("agent: CPU per put, ms", cpu_of_puts * 1e3 / f64::from(ANNOUNCEMENTS)),
        ("agent: CPU when nothing happens, % of a core", idle_share),
        ("agent: kernel objects for the peers", (objects - OWN_OBJECTS) as f64),
    ];
    rows.extend(seen);
    rows.extend(of_commands);
    rows
}

fn percentile(values: &mut [f64], part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * part) as usize]
}

/// Has the host reach this machine's resolvers by routes of their own, so that one within the overlay's network is no reason
/// for a route per peer.
fn reach_resolvers(host: &Host) {
    let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let resolvers = text.lines().filter_map(|line| line.strip_prefix("nameserver ")?.trim().parse::<Ipv4Addr>().ok());
    for resolver in resolvers.filter(|resolver| !resolver.is_loopback()) {
        host.netns.ip(&format!("route replace {resolver}/32 via {}", xtask::lab::address(254))).unwrap();
    }
}

/// Goes to where a host is, and what calls from there.
fn enter(host: &Host) -> tokio::runtime::Runtime {
    setns(File::open(format!("/run/netns/{}", host.netns.name())).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// The release build, beside the folder of this bench's.
fn agent_binary() -> PathBuf {
    let path = xtask::process::workspace().join("target/release/flannel-agent");
    assert!(path.exists(), "{path:?} is not built; `cargo xtask bench control` builds it");
    path
}
