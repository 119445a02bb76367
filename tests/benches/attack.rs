//! `cargo xtask bench attack`: what traffic between pods gets while forged tunnel packets come from the cable as fast as
//! they can be sent, and beside it while as many datagrams come for a closed port of the host: what any flood costs.
//!
//! The attacker sends from the cable's other end, with addresses of his choice, and has the core that the receiving pod is
//! on: the attacked host's softirq runs there behind each batch, and shares the queue of the host's interface with the
//! pods' packets. The sending pod is on the other core. Frames are as large as the MTU, as on a wire.

mod cable;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use cable::{CONFIG, PORT, between_pods, datagram, frames, generator, in_tunnel, kernel, median, ours, pin, tunnel};
use clap::Parser;
use etherparse::{EtherType, PacketBuilder};
use flannel_agent::dataplane::{PinDirectory, generator::Generator, pinned_counters};
use flannel_common::{
    event::{Event, Outcome},
    generator::Generated,
    vxlan::Vni,
};
use xtask::{
    bench::{TrafficPath, datagrams, round_trip},
    lab::{Host, Lab, PREFIX, remove_leftovers},
    progress::{step, wait_for},
    transfer::tcp_transfer,
};

const NAME: &str = "flannel-attack";
/// Where attacker and receiving pod are.
const CORE: usize = 1;
/// Frames of one call. The kernel sleeps for some 25 ms at the end of each.
const BURST: u32 = 1 << 18;
/// Calls in a second where a rate is asked for.
const PACE: u32 = 20;
/// Of the underlay, and no host's.
const STRANGER: u8 = 99;
/// In a subnet of the Network that neither host leases.
const FOREIGN_POD: [u8; 4] = [10, 5, 199, 2];
/// Nobody listens there: discard.
const CLOSED_PORT: u16 = 9;

#[derive(Parser)]
struct Options {
    /// How often each is measured
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Length of a measurement
    #[arg(long, default_value_t = 1)]
    seconds: u32,
    /// Frames a second; without, as many as can be sent
    #[arg(long)]
    rate: Option<u32>,
    /// Only these floods
    #[arg(long, value_delimiter = ',')]
    floods: Vec<String>,
    /// Where the results are written as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// What cargo adds
    #[arg(long, hide = true)]
    bench: bool,
}

/// Two hosts of which the second is attacked.
struct Rival {
    name: &'static str,
    hosts: [Host; 2],
    floods: Vec<(&'static str, Option<Generator>)>,
}

/// What the pods got, and what became of the flood. Rates are in 1000 a second.
#[derive(Clone, Debug, Default)]
struct Sample {
    gbits: f64,
    datagrams: f64,
    p50: f64,
    p99: f64,
    sent: f64,
    /// Forged packets that came out of the tunnel.
    got_in: f64,
    /// What the programs dropped, by reason.
    dropped: BTreeMap<&'static str, f64>,
}

type Results = BTreeMap<(usize, usize), Vec<Sample>>;

fn main() {
    let options = Options::parse();
    let directory = std::env::temp_dir().join(NAME);
    remove_leftovers(NAME, &directory).unwrap();
    let (names, results) = measure(&options, &directory);
    remove_leftovers(NAME, &directory).unwrap();
    print(&options, &names, &results);
    if let Some(path) = &options.json {
        let samples = results.iter().map(|((rival, flood), samples)| {
            let (name, floods) = &names[*rival];
            let samples: Vec<_> = samples.iter().map(Sample::json).collect();
            serde_json::json!({ "rival": name, "flood": floods[*flood], "samples": samples })
        });
        std::fs::write(path, format!("{:#}\n", serde_json::Value::from_iter(samples))).unwrap();
    }
}

/// A rival and its floods.
type Names = Vec<(&'static str, Vec<&'static str>)>;

fn measure(options: &Options, directory: &Path) -> (Names, Results) {
    let lab = Lab::new(NAME, directory).unwrap();
    let store = lab.store().unwrap();
    store.put(&format!("{PREFIX}/config"), CONFIG).unwrap();
    let mut rivals = [
        Rival::new("kernel vxlan", kernel(&lab, &store, true), &options.floods),
        Rival::new("ours, TC", ours(&lab, &store, "--xdp=off", 1, true), &options.floods),
        Rival::new("ours, native XDP", ours(&lab, &store, "--xdp=native", 3, true), &options.floods),
    ];
    let mut results = Results::new();
    for round in 0..options.rounds {
        for turn in 0..rivals.len() {
            let rival = (turn + round) % rivals.len();
            let name = rivals[rival].name;
            step(&format!("round {} of {}: {name}", round + 1, options.rounds), || {
                for turn in 0..rivals[rival].floods.len() {
                    let flood = (turn + round) % rivals[rival].floods.len();
                    let sample = rivals[rival].sample(flood, options, directory);
                    results.entry((rival, flood)).or_default().push(sample);
                }
                Ok(())
            })
            .unwrap();
        }
    }
    let names = rivals.iter().map(|rival| (rival.name, rival.floods.iter().map(|(name, _)| *name).collect()));
    (names.collect(), results)
}

impl Rival {
    fn new(name: &'static str, hosts: [Host; 2], only: &[String]) -> Self {
        hosts.iter().try_for_each(|host| host.set_underlay_gso(false)).unwrap();
        // Without a target: it counts.
        let rule = format!("iptables -t raw -A PREROUTING -i flannel.1 -p udp --dport {PORT}");
        hosts[1].netns.exec(&rule).unwrap();
        let frames = floods(&hosts).into_iter().filter(|(name, _)| only.is_empty() || only.iter().any(|of| of == name));
        let mut floods = vec![("no flood", None)];
        floods.extend(frames.map(|(name, frame)| (name, Some(generator(&hosts, frame)))));
        Self { name, hosts, floods }
    }

    fn sample(&mut self, flood: usize, options: &Options, directory: &Path) -> Sample {
        let Self { hosts, floods, .. } = self;
        let [client, server] = hosts.each_ref().map(|host| &host.pods[0]);
        let path = TrafficPath { client: &client.netns, server: &server.netns, address: server.address };
        let seconds = options.seconds;
        let pods = || {
            let tcp = tcp_transfer(path.client, path.server, path.address, seconds, directory).unwrap();
            let datagrams = datagrams::per_second(&path, seconds).unwrap() / 1e3;
            let [p50, p99] = round_trip(&path, seconds, directory).unwrap();
            Sample { gbits: tcp.gbits, datagrams, p50, p99, ..Sample::default() }
        };
        let Some(generator) = &mut floods[flood].1 else { return pods() };
        let (before, came_before, start) = (dropped(&hosts[1]), came_in(&hosts[1]), Instant::now());
        let (sample, sent) = beside(generator, &hosts[0], options.rate, pods);
        let per_second = |count: u64| count as f64 / start.elapsed().as_secs_f64() / 1e3;
        let dropped = dropped(&hosts[1]).into_iter().map(|(reason, count)| (reason, count - before[reason]));
        let dropped = dropped.filter(|(_, count)| *count > 0).map(|(reason, count)| (reason, per_second(count)));
        let got_in = per_second(came_in(&hosts[1]) - came_before);
        Sample { sent: per_second(sent), got_in, dropped: dropped.collect(), ..sample }
    }
}

/// Does something while the flood lasts. How many frames were sent meanwhile.
fn beside<T>(generator: &mut Generator, from: &Host, rate: Option<u32>, action: impl FnOnce() -> T) -> (T, u64) {
    let (over, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    let burst = rate.map_or(BURST, |rate| rate / PACE);
    thread::scope(|scope| {
        scope.spawn(|| {
            from.netns.enter().unwrap();
            pin(CORE);
            let start = Instant::now();
            while !over.load(Ordering::Relaxed) {
                generator.send(burst).unwrap();
                let sent = sent.fetch_add(burst.into(), Ordering::Relaxed) + u64::from(burst);
                if let Some(rate) = rate {
                    let due = Duration::from_secs_f64(sent as f64 / f64::from(rate));
                    thread::sleep(due.saturating_sub(start.elapsed()));
                }
            }
        });
        wait_for("the flood", Duration::from_secs(10), || sent.load(Ordering::Relaxed) > 0).unwrap();
        let before = sent.load(Ordering::Relaxed);
        let result = action();
        let sent = sent.load(Ordering::Relaxed) - before;
        over.store(true, Ordering::Relaxed);
        (result, sent)
    })
}

/// What is sent, by what it is.
fn floods(hosts: &[Host; 2]) -> Vec<(&'static str, Vec<u8>)> {
    let outer = tunnel(hosts);
    let [a, b, c, _] = outer.source;
    let stranger = frames::Tunnel { source: [a, b, c, STRANGER], ..outer };
    let [sender, receiver] = hosts.each_ref().map(|host| host.pods[0].address.octets());
    let mut longer = between_pods(hosts);
    // Its header says so, and has the checksum of that.
    let (header, _) = etherparse::Ipv4Header::from_slice(&longer).unwrap();
    let mut header = etherparse::Ipv4Header { total_len: header.total_len + 8, ..header };
    header.header_checksum = header.calc_header_checksum();
    longer.splice(..header.header_len(), header.to_bytes().iter().copied());
    vec![
        ("UDP to a closed port", plain(&outer)),
        (Event::UnknownVtep.label(), in_tunnel(hosts, &stranger, &between_pods(hosts))),
        (Event::SpoofedInnerSource.label(), in_tunnel(hosts, &outer, &datagram(FOREIGN_POD, receiver))),
        (Event::ForeignInnerDestination.label(), in_tunnel(hosts, &outer, &datagram(sender, outer.destination))),
        (Event::TunnelTruncated.label(), in_tunnel(hosts, &outer, &longer)),
    ]
}

/// A datagram without a tunnel, as long as the others.
fn plain(outer: &frames::Tunnel) -> Vec<u8> {
    let builder = PacketBuilder::ipv4(outer.source, outer.destination, outer.ttl).udp(outer.source_port, CLOSED_PORT);
    let ethernet = frames::ethernet(outer.source_mac, outer.destination_mac, EtherType::IPV4);
    let mut packet = Vec::new();
    let payload = vec![0; Generated::LEN - ethernet.len() - builder.size(0)];
    builder.write(&mut packet, &payload).unwrap();
    [ethernet, packet].concat()
}

/// What a host's programs dropped so far, by reason. Nothing where there are none.
fn dropped(host: &Host) -> BTreeMap<&'static str, u64> {
    let counters = pinned_counters(&PinDirectory::new(host.pin_dir(), Vni::DEFAULT)).unwrap_or_default();
    let drops = counters.into_iter().filter(|(event, _)| event.outcome() == Outcome::Drop);
    drops.map(|(event, counter)| (event.label(), counter.packets)).collect()
}

/// Packets of the flood that came out of a host's tunnel so far.
fn came_in(host: &Host) -> u64 {
    let rules = host.netns.exec("iptables -t raw -vnxL PREROUTING").unwrap();
    let rule = rules.lines().find(|line| line.contains("flannel.1")).unwrap();
    rule.split_whitespace().next().unwrap().parse().unwrap()
}

impl Sample {
    /// Name and value of what the pods got.
    fn traffic(&self) -> [(&'static str, f64); 4] {
        [("TCP Gb/s", self.gbits), ("UDP 1000/s", self.datagrams), ("p50 µs", self.p50), ("p99 µs", self.p99)]
    }

    fn json(&self) -> serde_json::Value {
        let Self { gbits, datagrams, p50, p99, sent, got_in, dropped } = self;
        serde_json::json!({
            "gbits": gbits, "kiloDatagrams": datagrams, "p50Us": p50, "p99Us": p99,
            "kiloSent": sent, "kiloGotIn": got_in, "kiloDropped": dropped,
        })
    }
}

fn print(options: &Options, names: &Names, results: &Results) {
    let of =
        |samples: &[Sample], value: &dyn Fn(&Sample) -> f64| median(&samples.iter().map(value).collect::<Vec<_>>()).0;
    println!("\nmedians of {} rounds; in brackets, as a multiple of what plain UDP leaves", options.rounds);
    for (rival, (name, floods)) in names.iter().enumerate() {
        let headings = Sample::default().traffic().map(|(heading, _)| format!("{heading:>10}        "));
        println!("\n{name:<26}{}  sent 1000/s  got in 1000/s  dropped 1000/s", headings.concat());
        for (flood, what) in floods.iter().enumerate() {
            let (samples, plain) = (&results[&(rival, flood)], results.get(&(rival, 1)));
            print!("{what:<26}");
            for column in 0..4 {
                let value = |sample: &Sample| sample.traffic()[column].1;
                let here = of(samples, &value);
                let ratio = plain.map_or(f64::NAN, |plain| here / of(plain, &value));
                print!("{here:10.2} [{ratio:4.2}] ");
            }
            let dropped = samples[0].dropped.keys().map(|reason| {
                let value = |sample: &Sample| sample.dropped.get(reason).copied().unwrap_or_default();
                format!("{reason} {:.0}", of(samples, &value))
            });
            let dropped: Vec<_> = dropped.collect();
            let [sent, got_in] = [of(samples, &|sample| sample.sent), of(samples, &|sample| sample.got_in)];
            println!("  {sent:11.0}  {got_in:13.0}  {}", dropped.join(", "));
        }
    }
}
