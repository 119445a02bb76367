//! `cargo xtask bench programs`: what each program costs for a packet, with 10 and with 65,000 peers in the maps.
//!
//! Each program is run on single frames (`BPF_PROG_TEST_RUN`), a fresh one each time, to or from ten peers in turns that
//! are spread over the table. The kernel's own measure of a run is taken: two readings of its clock are in it.

#[path = "../frames.rs"]
#[expect(dead_code, reason = "the tests use the rest")]
mod frames;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Parser;
use etherparse::EtherType;
use flannel_agent::{
    config::NetworkConfig,
    dataplane::{
        BpfLogLevel, Capacity, Dataplane, DesiredPeers, Hook, PinDirectory, TestRun as _, TestRunOptions, XdpMode,
    },
};
use flannel_common::{
    event::Event,
    flow::{Egress, Flow, FlowKey, Ingress, SourcePorts},
    maps::{Config, Vtep},
    packet::{OuterHeader, Tunnel as Header},
    vxlan::Vni,
};
use frames::*;
use nix::time::{ClockId, clock_gettime};
use xtask::lab::{Lab, remove_leftovers};

const NAME: &str = "flannel-programs";
/// Peers whose packets are run.
const VISITED: u32 = 10;
/// The slot of this host's subnet, 10.0.1.0/24.
const OWN_SLOT: u32 = 1;
const LOCAL_POD: [u8; 4] = [10, 0, 1, 2];
const TCP: u32 = 6;

#[derive(Parser)]
struct Options {
    /// How often each is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Runs of a program in a round
    #[arg(long, default_value_t = 20_000)]
    runs: u32,
    /// Numbers of peers
    #[arg(long, value_delimiter = ',', default_value = "10,65000")]
    peers: Vec<u32>,
    /// Where the results are written as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// What cargo adds
    #[arg(long, hide = true)]
    bench: bool,
}

/// A program, a frame for each visited peer, and what becomes of it.
struct Case {
    program: Program,
    event: Event,
    frames: Vec<Vec<u8>>,
    /// Whether the flows are known.
    is_known: bool,
}

#[derive(Clone, Copy)]
enum Program {
    Tc(Hook),
    Xdp,
}

impl Program {
    const fn name(self) -> &'static str {
        match self {
            Self::Tc(hook) => hook.program(),
            Self::Xdp => "xdp_decap",
        }
    }
}

fn main() {
    let options = Options::parse();
    let directory = std::env::temp_dir().join(NAME);
    remove_leftovers(NAME, &directory).unwrap();
    let result = measure(&options, &directory);
    remove_leftovers(NAME, &directory).unwrap();
    print(&options, &result);
    if let Some(path) = &options.json {
        std::fs::write(path, serde_json::to_string_pretty(&result).unwrap()).unwrap();
    }
}

/// Medians of the rounds in nanoseconds by number of peers, by program and event.
type Results = BTreeMap<String, BTreeMap<u32, Vec<u64>>>;

fn measure(options: &Options, directory: &Path) -> Results {
    let lab = Lab::new(NAME, directory).unwrap();
    let host = lab.host("node1", 1).unwrap();
    host.netns.enter().unwrap();
    let mac = NODE_ONE_MAC.map(|octet| format!("{octet:02x}")).join(":");
    host.netns.ip(&format!("link set eth0 address {mac}")).unwrap();
    let ifindex = host.netns.ip_json("link show eth0").unwrap()[0]["ifindex"].as_u64().unwrap() as u32;
    let mut tables: Vec<_> =
        options.peers.iter().map(|count| (*count, load(&lab.bpf(&count.to_string()), *count, ifindex))).collect();
    let mut results = Results::new();
    for _ in 0..options.rounds {
        for number in 0..cases(1).len() {
            for (count, dataplane) in &mut tables {
                let case = cases(*count).swap_remove(number);
                let name = format!("{:<14} {}", case.program.name(), case.event.label());
                let median = run(dataplane, &case, *count, options.runs, &context(ifindex));
                results.entry(name).or_default().entry(*count).or_default().push(median);
            }
        }
    }
    for (_, dataplane) in tables.iter_mut().take(1) {
        println!("{:<16} {:>12} {:>12}", "program", "instructions", "verified");
        for hook in Hook::ALL {
            let info = dataplane.program(hook).unwrap().info().unwrap();
            print_size(hook.program(), info.size_translated(), info.verified_instruction_count());
        }
        let info = dataplane.xdp_program(XdpMode::Native).unwrap().info().unwrap();
        print_size("xdp_decap", info.size_translated(), info.verified_instruction_count());
    }
    results
}

fn print_size(name: &str, bytes: Option<u32>, verified: Option<u32>) {
    const INSTRUCTION: u32 = 8;
    let [size, verified] = [bytes.map(|bytes| bytes / INSTRUCTION), verified]
        .map(|count| count.map_or("-".to_owned(), |count| count.to_string()));
    println!("{name:<16} {size:>12} {verified:>12}");
}

fn print(options: &Options, results: &Results) {
    println!("\nns per packet, medians of {} rounds (min..max)", options.rounds);
    print!("{:<42}", "program and outcome");
    options.peers.iter().for_each(|count| print!("{:>22}", format!("{count} peers")));
    println!();
    for (name, by_count) in results {
        print!("{name:<42}");
        for medians in options.peers.iter().map(|count| &by_count[count]) {
            let mut sorted = medians.clone();
            sorted.sort_unstable();
            let (median, min, max) = (sorted[sorted.len() / 2], sorted[0], sorted[sorted.len() - 1]);
            print!("{:>22}", format!("{median} ({min}..{max})"));
        }
        println!();
    }
}

/// The median time of a run.
fn run(dataplane: &mut Dataplane, case: &Case, peers: u32, runs: u32, context: &[u8]) -> u64 {
    let event_count = |dataplane: &Dataplane| {
        let counters = dataplane.counters().unwrap();
        counters.iter().find(|(event, _)| *event == case.event).unwrap().1.packets
    };
    let before = event_count(dataplane);
    let mut out = vec![0; 512];
    let mut times = Vec::new();
    for number in 0..runs {
        // Well within the second for which flows are known.
        if number % 1000 == 0 && case.is_known {
            know(dataplane, peers);
        }
        let frame = &case.frames[number as usize % case.frames.len()];
        let options = TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), ..TestRunOptions::new() };
        let result = match case.program {
            Program::Tc(hook) => {
                let options = TestRunOptions { ctx_in: Some(context), ..options };
                dataplane.program(hook).unwrap().test_run(options)
            }
            Program::Xdp => dataplane.xdp_program(XdpMode::Native).unwrap().test_run(options),
        };
        times.push(result.unwrap().duration.as_nanos() as u64);
    }
    assert_eq!(event_count(dataplane) - before, u64::from(runs), "{} of {}", case.event.label(), case.program.name());
    times.sort_unstable();
    times[times.len() / 2]
}

/// A `struct __sk_buff` of a packet that is at a device.
fn context(ifindex: u32) -> Vec<u8> {
    const SIZE: usize = 192;
    const IFINDEX: usize = 40;
    let mut context = vec![0; SIZE];
    context[IFINDEX..IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
    context
}

/// The peers that are visited: spread over all of them.
fn visited(peers: u32) -> Vec<u32> {
    (0..VISITED.min(peers)).map(|number| slot_of(number * (peers / VISITED).max(1))).collect()
}

/// The slot of a peer by its number.
const fn slot_of(number: u32) -> u32 {
    number + OWN_SLOT + 1
}

fn pod(slot: u32) -> [u8; 4] {
    [10, (slot >> 8) as u8, slot as u8, 2]
}

fn node(slot: u32) -> [u8; 4] {
    [172, 16, (slot >> 8) as u8, slot as u8]
}

fn vtep_mac(slot: u32) -> Mac {
    [0x0a, 1, 0, 0, (slot >> 8) as u8, slot as u8]
}

fn cases(peers: u32) -> Vec<Case> {
    let slots = visited(peers);
    let frames = |build: &dyn Fn(u32) -> Vec<u8>| slots.iter().map(|slot| build(*slot)).collect::<Vec<_>>();
    let in_tunnel = |slot: u32, source: [u8; 4]| {
        let inner = [&ethernet(vtep_mac(slot), VTEP_ONE_MAC, EtherType::IPV4), &tcp(source, LOCAL_POD)[..]].concat();
        Tunnel { source: node(slot), ..FROM_TWO }.around(&vxlan(8, 1), &inner)
    };
    let outwards = |slot: u32| on_overlay(&tcp(LOCAL_POD, pod(slot)));
    let inwards = |slot: u32| in_tunnel(slot, pod(slot));
    let forged = |slot: u32| in_tunnel(slot, [10, 0, 1, 3]);
    let case = |program, event, frames, is_known| Case { program, event, frames, is_known };
    vec![
        case(Program::Tc(Hook::FromPod), Event::PodEncapsulated, frames(&outwards), true),
        case(Program::Tc(Hook::FromUnderlay), Event::Delivered, frames(&inwards), true),
        case(Program::Xdp, Event::XdpDecapsulated, frames(&inwards), true),
        case(Program::Tc(Hook::FromUnderlay), Event::SpoofedInnerSource, frames(&forged), false),
        case(Program::Xdp, Event::SpoofedInnerSource, frames(&forged), false),
        case(Program::Tc(Hook::ToOverlay), Event::Encapsulated, frames(&outwards), false),
        case(Program::Tc(Hook::FromOverlay), Event::NotAdmitted, frames(&outwards), false),
        case(Program::Tc(Hook::ToPod), Event::PodNotFromOverlay, frames(&outwards), false),
    ]
}

/// Has the flows of all visited peers known.
fn know(dataplane: &mut Dataplane, peers: u32) {
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap());
    let released = (now - Duration::from_millis(20)).as_nanos() as u64;
    for slot in visited(peers) {
        for (local_port, remote_port) in [(40000u16, 80u16), (80, 40000)] {
            let key = FlowKey {
                local: LOCAL_POD,
                remote: pod(slot),
                local_port: local_port.to_be_bytes(),
                remote_port: remote_port.to_be_bytes(),
                protocol: TCP,
            };
            let flow = Flow {
                egress: Egress { released, sent_as: key, ..Egress::default() },
                ingress: Ingress { released, received_as: key, veth: 1, ..Ingress::default() },
                ..Flow::new(key)
            };
            dataplane.insert_flow(&flow).unwrap();
        }
    }
}

fn load(pins: &Path, count: u32, ifindex: u32) -> Dataplane {
    let network = NetworkConfig::parse(r#"{"Network": "10.0.0.0/8", "Backend": {"Type": "vxlan"}}"#).unwrap();
    let capacity = Capacity::of(network.network, network.subnet_len);
    let config = Config {
        bypass_time: 1_000_000_000,
        network: 0x0a00_0000,
        slot_shift: 8,
        slots: capacity.slots,
        subnet: 0x0a00_0100,
        subnet_mask: 0xffff_ff00,
        vtep_address: u32::from_be_bytes(NODE_ONE),
        vni: 1,
        mtu: 1450,
        underlay_header_len: 14,
        underlay_mac: NODE_ONE_MAC,
        port: 8472,
        vtep_mac: VTEP_ONE_MAC,
        source_ports: SourcePorts { min: 32768, max: 60999 },
        flags: 0,
    };
    let pins = PinDirectory::new(pins, Vni::DEFAULT);
    let mut dataplane = Dataplane::load(pins, &config, capacity, BpfLogLevel::Off).unwrap();
    let peers: DesiredPeers = (0..count)
        .map(slot_of)
        .map(|slot| (format!("10.{}.{}.0/24", slot >> 8, slot & 0xff).parse().unwrap(), peer(slot, ifindex)))
        .collect();
    dataplane.peers.sync(&peers).unwrap();
    assert_eq!(dataplane.peers.len(), count as usize);
    dataplane
}

fn peer(slot: u32, ifindex: u32) -> Vtep {
    let header = OuterHeader::template(&Header {
        next_hop_mac: NODE_TWO_MAC,
        device_mac: NODE_ONE_MAC,
        source: NODE_ONE,
        destination: node(slot),
        port: 8472,
        vni: Vni::DEFAULT,
        peer_vtep_mac: vtep_mac(slot),
        vtep_mac: VTEP_ONE_MAC,
    });
    let address = u32::from_be_bytes(node(slot));
    Vtep { header, address, next_hop: node(slot), ifindex, flags: Vtep::RESOLVED, mtu: 0 }
}
