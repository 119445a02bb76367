//! `cargo xtask bench receive`: how many small datagrams a second come from the cable into a pod, by the kernel's vxlan
//! device, by our programs at TC, and by those at XDP.
//!
//! The other host's end of the cable is fed with XDP frames, so the receiver gets them as from a NIC's driver, and no
//! sender's stack is measured. (veth takes such frames only where the other end has GRO or XDP on.) Generator and receiver
//! share one core: the receiving side runs as softirq behind each batch. What reaches a rule in the pod is counted.

#[path = "../frames.rs"]
#[expect(dead_code, reason = "the tests use the rest")]
mod frames;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::Parser;
use etherparse::{EtherType, PacketBuilder};
use flannel_agent::dataplane::generator::Generator;
use flannel_common::generator::Generated;
use frames::{Mac, Tunnel, ethernet, vxlan};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use xtask::{
    lab::{Host, Lab, Netns, PREFIX, Store, remove_leftovers},
    progress::{step, wait_for},
};

const NAME: &str = "flannel-receive";
const CONFIG: &str = r#"{"Network": "10.5.0.0/16", "SubnetMax": "10.5.199.0", "Backend": {"Type": "vxlan"}}"#;
const PORT: u16 = 9999;
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
    let mut core = CpuSet::new();
    core.set(0).unwrap();
    let lab = Lab::new(NAME, directory).unwrap();
    let store = lab.store().unwrap();
    store.put(&format!("{PREFIX}/config"), CONFIG).unwrap();
    let mut rivals = [
        kernel(&lab, &store, options.rules),
        ours(&lab, &store, "ours, TC", "--xdp=off", 1, options.rules),
        ours(&lab, &store, "ours, native XDP", "--xdp=native", 3, options.rules),
    ];
    sched_setaffinity(Pid::from_raw(0), &core).unwrap();
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
    fn new(name: &'static str, hosts: [Host; 2], rules: bool) -> Self {
        let pod = &hosts[1].pods[0];
        pod.netns.exec(&format!("iptables -t raw -A PREROUTING -p udp --dport {PORT} -j DROP")).unwrap();
        for host in &hosts {
            host.netns.exec("ethtool -K eth0 gro on").unwrap();
        }
        if rules {
            hosts.iter().try_for_each(Host::set_cluster_rules).unwrap();
        }
        hosts[0].pods[0].netns.exec(&format!("ping -c 1 -W 5 {}", pod.address)).unwrap();
        let generator = Generator::load(&generated(&hosts)).unwrap();
        let mut rival = Self { name, hosts, generator };
        // A flow passes the stack by from its second packet on.
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

/// Two hosts with the agent, the first with this number.
fn ours(lab: &Lab, store: &Store, name: &'static str, mode: &str, number: u8, rules: bool) -> Rival {
    let agent = xtask::process::workspace().join("target/release/flannel-agent");
    let numbers = [number, number + 1];
    let names = numbers.map(|number| format!("ours{number}"));
    let mut hosts = lab.cable(names.each_ref().map(String::as_str), numbers).unwrap();
    for host in &mut hosts {
        host.start_agent(&agent, store, &["--iface=eth0", mode]).unwrap();
        host.wait_ready().unwrap();
        host.add_pod().unwrap();
    }
    Rival::new(name, hosts, rules)
}

fn kernel(lab: &Lab, store: &Store, rules: bool) -> Rival {
    let mut hosts = lab.cable(["vxlan1", "vxlan2"], [11, 12]).unwrap();
    for (host, octet) in hosts.iter_mut().zip([251, 252]) {
        let vxlan = host.become_kernel_vxlan(store, octet).unwrap();
        host.add_pod_in(&vxlan.subnet).unwrap();
    }
    hosts[0].add_kernel_peer_from(store, 252).unwrap();
    hosts[1].add_kernel_peer_from(store, 251).unwrap();
    Rival::new("kernel vxlan", hosts, rules)
}

/// A datagram from the first host's pod to the second's, in the tunnel.
fn generated(hosts: &[Host; 2]) -> Generated {
    let mac = |netns: &Netns, device: &str| -> Mac {
        let links = netns.ip_json(&format!("link show {device}")).unwrap();
        let octets =
            links[0]["address"].as_str().unwrap().split(':').map(|octet| u8::from_str_radix(octet, 16).unwrap());
        octets.collect::<Vec<_>>().try_into().unwrap()
    };
    let [sender, receiver] = hosts;
    let mut packet = Vec::new();
    PacketBuilder::ipv4(sender.pods[0].address.octets(), receiver.pods[0].address.octets(), 63)
        .udp(PORT, PORT)
        .write(&mut packet, &[0x5a; 64])
        .unwrap();
    let inner = ethernet(mac(&sender.netns, "flannel.1"), mac(&receiver.netns, "flannel.1"), EtherType::IPV4);
    let tunnel = Tunnel {
        source_mac: mac(&sender.netns, "eth0"),
        destination_mac: mac(&receiver.netns, "eth0"),
        source: sender.address.octets(),
        destination: receiver.address.octets(),
        ..frames::FROM_TWO
    };
    let frame = tunnel.around(&vxlan(8, 1), &[inner, packet].concat());
    let links = sender.netns.ip_json("link show eth0").unwrap();
    Generated { ifindex: links[0]["ifindex"].as_u64().unwrap() as u32, frame: frame.try_into().unwrap() }
}

fn print(options: &Options, results: &[(&str, Rates)]) {
    let rules = if options.rules { "with" } else { "without" };
    println!(
        "\n1000 datagrams of 64 bytes a second at a rule in the pod, medians of {} rounds, {rules} a cluster's rules",
        options.rounds
    );
    let median = |rates: &Rates| {
        let mut sorted = rates.clone();
        sorted.sort_by(f64::total_cmp);
        (sorted[sorted.len() / 2], sorted[0], sorted[sorted.len() - 1])
    };
    let (kernel, ..) = median(&results[0].1);
    for (name, rates) in results {
        let (median, min, max) = median(rates);
        println!("{name:<18} {:8.0}  {:.0}..{:.0}  {:.2}x", median / 1e3, min / 1e3, max / 1e3, median / kernel);
    }
}
