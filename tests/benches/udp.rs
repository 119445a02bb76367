//! `cargo xtask bench udp`: bulk TCP between pods by the tunnel of the backend udp, and by a proxy of one packet with each
//! system call, as flannel's is built, in turns.

#[path = "../udp/engines.rs"]
#[expect(dead_code, reason = "the tests use the rest")]
mod engines;
#[path = "../udp/forwarder.rs"]
#[expect(dead_code, reason = "the tests use the rest")]
mod forwarder;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::Parser;
use engines::{Lease, MTU, PORT, add_pod, peers, settings, start};
use flannel_agent::udp::Tunnel;
use forwarder::Forwarder;
use xtask::{
    lab::{Host, Lab, remove_leftovers},
    progress::{step, wait_for},
    transfer::{Transfer, tcp_transfer},
};

const NAME: &str = "flannel-udp";
/// What ours must reach, in times of what the other does.
const FLOOR: f64 = 3.0;

#[derive(Parser)]
struct Options {
    /// How often each is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Length of a measurement
    #[arg(long, default_value_t = 2)]
    seconds: u32,
    /// Whether the hosts have the netfilter rules of a cluster's
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    rules: bool,
    /// Where the results are written as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// What cargo adds
    #[arg(long, hide = true)]
    bench: bool,
}

/// What carries the packets of two hosts.
enum Carrier {
    Forwarders { _running: [Forwarder; 2] },
    Tunnels { _running: [Tunnel; 2] },
}

struct Rival {
    name: &'static str,
    /// Ends before its hosts.
    _carrier: Carrier,
    hosts: [Host; 2],
}

/// Whether large packets pass between the hosts whole, or each frame is as large as a wire takes.
const MODES: [(&str, bool); 2] = [("GSO passes", true), ("segmented", false)];

fn main() -> ExitCode {
    let options = Options::parse();
    let directory = std::env::temp_dir().join(NAME);
    remove_leftovers(NAME, &directory).unwrap();
    let results = measure(&options, &directory);
    remove_leftovers(NAME, &directory).unwrap();
    let has_reached = print(&options, &results);
    if let Some(path) = &options.json {
        std::fs::write(path, json(&results)).unwrap();
    }
    if has_reached { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Of all rounds, of each rival, in each mode.
type Results = Vec<(&'static str, [(&'static str, Vec<Transfer>); 2])>;

fn measure(options: &Options, directory: &Path) -> Results {
    let lab = Lab::new(NAME, directory).unwrap();
    let rivals = [forwarders(&lab), tunnels(&lab)];
    for rival in &rivals {
        let [client, server] = rival.hosts.each_ref().map(|host| &host.pods[0]);
        if options.rules {
            rival.hosts.iter().try_for_each(Host::set_cluster_rules).unwrap();
        }
        let ping = format!("ping -c 1 -W 1 {}", server.address);
        wait_for("an answer", Duration::from_secs(10), || client.netns.exec(&ping).is_ok()).unwrap();
    }
    MODES.map(|(mode, is_whole)| (mode, measure_mode(options, directory, &rivals, (mode, is_whole)))).into()
}

fn measure_mode(
    options: &Options,
    directory: &Path,
    rivals: &[Rival; 2],
    (mode, is_whole): (&str, bool),
) -> [(&'static str, Vec<Transfer>); 2] {
    for host in rivals.iter().flat_map(|rival| &rival.hosts) {
        host.set_underlay_gso(is_whole).unwrap();
        let option = format!("ethtool -K eth0 tx-udp-segmentation {}", if is_whole { "on" } else { "off" });
        host.netns.exec(&option).unwrap();
    }
    let mut results = rivals.each_ref().map(|rival| (rival.name, Vec::new()));
    for round in 0..options.rounds {
        for turn in 0..rivals.len() {
            let index = (turn + round) % rivals.len();
            let what = format!("{mode}, round {} of {}: {}", round + 1, options.rounds, rivals[index].name);
            let [client, server] = rivals[index].hosts.each_ref().map(|host| &host.pods[0]);
            let transfer = || tcp_transfer(&client.netns, &server.netns, server.address, options.seconds, directory);
            results[index].1.push(step(&what, transfer).unwrap());
        }
    }
    results
}

/// Hosts on a cable of their own, the first with this number.
fn pair(lab: &Lab, name: &str, number: u8) -> ([Host; 2], [Vec<Lease>; 2]) {
    let numbers = [number, number + 1];
    let names = numbers.map(|number| format!("{name}{number}"));
    let mut hosts = lab.cable(names.each_ref().map(String::as_str), numbers).unwrap();
    for (host, number) in hosts.iter_mut().zip(numbers) {
        add_pod(host, number);
    }
    let leases = [vec![(numbers[1], hosts[1].address)], vec![(numbers[0], hosts[0].address)]];
    (hosts, leases)
}

fn forwarders(lab: &Lab) -> Rival {
    let (hosts, [first, second]) = pair(lab, "proxy", 11);
    let running =
        [Forwarder::start(&hosts[0], 11, MTU, PORT, first), Forwarder::start(&hosts[1], 12, MTU, PORT, second)];
    Rival { name: "a packet a call", _carrier: Carrier::Forwarders { _running: running }, hosts }
}

fn tunnels(lab: &Lab) -> Rival {
    let (hosts, leases) = pair(lab, "ours", 1);
    let start = |index: usize, number: u8| {
        let host = &hosts[index];
        start(&host.netns, &settings(host, number), peers(number, &leases[index])).unwrap()
    };
    let running = [start(0, 1), start(1, 2)];
    Rival { name: "ours", _carrier: Carrier::Tunnels { _running: running }, hosts }
}

fn median(transfers: &[Transfer], of: impl Fn(&Transfer) -> f64) -> f64 {
    let mut values: Vec<f64> = transfers.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Whether the floor was reached.
fn print(options: &Options, results: &Results) -> bool {
    let rules = if options.rules { "with" } else { "without" };
    println!("\nbulk TCP, one flow, medians of {} rounds, {rules} a cluster's rules", options.rounds);
    let mut has_reached = true;
    for (mode, rivals) in results {
        let [base, ours] = rivals.each_ref().map(|(_, transfers)| median(transfers, |transfer| transfer.gbits));
        for (name, transfers) in rivals {
            let [gbits, cpu] =
                [median(transfers, |transfer| transfer.gbits), median(transfers, Transfer::cpu_seconds_per_gb)];
            println!("{mode:<11} {name:<16} {gbits:6.2} Gb/s  {:5.2}x  {cpu:5.2} CPU-s/GB", gbits / base);
        }
        has_reached &= ours / base >= FLOOR;
    }
    println!("at least {FLOOR}x of {}: {}", results[0].1[0].0, if has_reached { "yes" } else { "no" });
    has_reached
}

fn json(results: &Results) -> String {
    let modes: serde_json::Map<_, _> = results
        .iter()
        .map(|(mode, rivals)| {
            let rates = rivals.iter().map(|(name, transfers)| {
                let gbits: Vec<_> = transfers.iter().map(|transfer| transfer.gbits).collect();
                ((*name).to_owned(), serde_json::json!(gbits))
            });
            ((*mode).to_owned(), rates.collect::<serde_json::Map<_, _>>().into())
        })
        .collect();
    serde_json::Value::Object(modes).to_string()
}
