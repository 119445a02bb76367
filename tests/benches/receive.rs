//! `cargo xtask bench receive`: how many small datagrams a second come from the cable into a pod, by the kernel's vxlan
//! device, by our programs at TC, and by those at XDP.
//!
//! Generator and receiver share one core: the receiving side runs as softirq behind each batch. What reaches a rule in the
//! pod is counted.

mod cable;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use cable::{CONFIG, PORT, between_pods, generator, in_tunnel, kernel, median, ours, pin, tunnel};
use clap::Parser;
use flannel_agent::dataplane::generator::Generator;
use xtask::{
    lab::{Host, Lab, PREFIX, remove_leftovers},
    progress::{step, wait_for},
};

const NAME: &str = "flannel-receive";
/// Frames of one call. The kernel sleeps for some 25 ms at the end of each.
const BURST: u32 = 1 << 20;

#[derive(Parser)]
struct Options {
    /// How often each is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Length of a measurement
    #[arg(long, default_value_t = 3)]
    seconds: u64,
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

/// Two hosts of which the second receives.
struct Rival {
    name: &'static str,
    hosts: [Host; 2],
    generator: Generator,
}

fn main() {
    let options = Options::parse();
    let directory = std::env::temp_dir().join(NAME);
    remove_leftovers(NAME, &directory).unwrap();
    let results = measure(&options, &directory);
    remove_leftovers(NAME, &directory).unwrap();
    print(&options, &results);
    if let Some(path) = &options.json {
        let results: serde_json::Map<_, _> =
            results.iter().map(|(name, rates)| ((*name).to_owned(), serde_json::json!(rates))).collect();
        std::fs::write(path, serde_json::to_string_pretty(&results).unwrap()).unwrap();
    }
}

/// Datagrams a second of all rounds.
type Rates = Vec<f64>;

fn measure(options: &Options, directory: &Path) -> Vec<(&'static str, Rates)> {
    let lab = Lab::new(NAME, directory).unwrap();
    let store = lab.store().unwrap();
    store.put(&format!("{PREFIX}/config"), CONFIG).unwrap();
    let mut rivals = [
        Rival::new("kernel vxlan", kernel(&lab, &store, options.rules)),
        Rival::new("ours, TC", ours(&lab, &store, "--xdp=off", 1, options.rules)),
        Rival::new("ours, native XDP", ours(&lab, &store, "--xdp=native", 3, options.rules)),
    ];
    pin(0);
    let mut results: Vec<(&str, Rates)> = rivals.iter().map(|rival| (rival.name, Rates::new())).collect();
    for round in 0..options.rounds {
        for turn in 0..rivals.len() {
            let index = (turn + round) % rivals.len();
            let rate = step(&format!("round {} of {}: {}", round + 1, options.rounds, rivals[index].name), || {
                Ok(rivals[index].rate(Duration::from_secs(options.seconds)))
            });
            results[index].1.push(rate.unwrap());
        }
    }
    results
}

impl Rival {
    fn new(name: &'static str, hosts: [Host; 2]) -> Self {
        let rule = format!("iptables -t raw -A PREROUTING -p udp --dport {PORT} -j DROP");
        hosts[1].pods[0].netns.exec(&rule).unwrap();
        let generator = generator(&hosts, in_tunnel(&hosts, &tunnel(&hosts), &between_pods(&hosts)));
        let mut rival = Self { name, hosts, generator };
        // A flow bypasses the stack from its second packet on.
        let arrived = wait_for("the first frames", Duration::from_secs(10), || {
            rival.hosts[0].netns.enter().unwrap();
            rival.generator.send(64).unwrap();
            rival.arrived() > 128
        });
        arrived.unwrap();
        rival
    }

    /// Datagrams at the rule in the pod, so far.
    fn arrived(&self) -> u64 {
        let rules = self.hosts[1].pods[0].netns.exec("iptables -t raw -vnxL PREROUTING").unwrap();
        let rule = rules.lines().find(|line| line.contains("DROP")).unwrap();
        rule.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// Datagrams a second.
    fn rate(&mut self, time: Duration) -> f64 {
        self.hosts[0].netns.enter().unwrap();
        let before = self.arrived();
        let start = Instant::now();
        while start.elapsed() < time {
            self.generator.send(BURST).unwrap();
        }
        let elapsed = start.elapsed();
        (self.arrived() - before) as f64 / elapsed.as_secs_f64()
    }
}

fn print(options: &Options, results: &[(&str, Rates)]) {
    let rules = if options.rules { "with" } else { "without" };
    println!(
        "\n1000 datagrams of 64 bytes a second at a rule in the pod, medians of {} rounds, {rules} a cluster's rules",
        options.rounds
    );
    let (kernel, ..) = median(&results[0].1);
    for (name, rates) in results {
        let (median, min, max) = median(rates);
        println!("{name:<18} {:8.0}  {:.0}..{:.0}  {:.2}x", median / 1e3, min / 1e3, max / 1e3, median / kernel);
    }
}
