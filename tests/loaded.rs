//! The programs, loaded in a namespace of their own and run on single frames (BPF_PROG_TEST_RUN).

use std::{collections::BTreeMap, fs::File, path::Path, thread};

use flannel_agent::{
    config::NetworkConfig,
    dataplane::{BpfLogLevel, Capacity, Dataplane, DesiredPeers, Hook, PinDirectory, test_run::TestRuns},
};
use flannel_common::{
    event::{Event, Outcome},
    flow::SourcePorts,
    maps::{Config, Vtep},
    packet::{OuterHeader, Tunnel},
    vxlan::{self, Vni},
};
use nix::sched::{CloneFlags, setns};
use xtask::lab::{Lab, Netns};

use crate::{
    frames::{
        Mac, NODE_FIVE, NODE_ONE, NODE_ONE_MAC, NODE_SIX, NODE_THREE, NODE_TWO, NODE_TWO_MAC, VTEP_FIVE_MAC,
        VTEP_ONE_MAC, VTEP_SIX_MAC, VTEP_THREE_MAC, VTEP_TWO_MAC,
    },
    world,
};

pub const SOURCE_PORTS: SourcePorts = SourcePorts { min: 32768, max: 60999 };
pub const MTU: u32 = 1450;

/// The loaded dataplane, and the device that frames seem to come from.
pub struct Loaded<'a> {
    pub dataplane: Dataplane,
    pub ifindex: u32,
    /// The namespace that the thread is in; its `eth0` is that device.
    pub host: &'a Netns,
    /// Where the other end of that is, as `node1`.
    pub underlay: &'a Netns,
}

/// What a program made of a frame.
#[derive(Debug, PartialEq, Eq)]
pub struct Run {
    pub verdict: i32,
    pub frame: Vec<u8>,
    /// The counters that moved: packets and bytes.
    pub counted: BTreeMap<&'static str, (u64, u64)>,
}

/// Runs a test with the dataplane loaded in a namespace that has `eth0` with node one's MAC.
pub fn with_programs(test: impl FnOnce(&mut Loaded<'_>) + Send) {
    with_dataplane(|dataplane, ifindex, host, underlay| test(&mut Loaded { dataplane, ifindex, host, underlay }));
}

/// The same, with what passes between programs, and what they know of flows, to be set and seen.
pub fn with_notes(test: impl FnOnce(&mut TestRuns, u32) + Send) {
    with_dataplane(|dataplane, ifindex, _, _| test(&mut TestRuns::new(dataplane).unwrap(), ifindex));
}

/// With the number of that `eth0`, its namespace and the underlay's.
fn with_dataplane(test: impl FnOnce(Dataplane, u32, &Netns, &Netns) + Send) {
    let (name, directory) = world::names();
    let lab = Lab::new(&name, directory.path()).unwrap();
    let host = lab.host("node1", 1).unwrap();
    let [a, b, c, d, e, f] = NODE_ONE_MAC;
    host.netns.ip(&format!("link set eth0 address {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")).unwrap();
    let ifindex = host.netns.ip_json("link show eth0").unwrap()[0]["ifindex"].as_u64().unwrap() as u32;
    let netns = format!("/run/netns/{}", host.netns.name());
    let pins = lab.bpf("programs");
    // The namespace is the thread's, so it goes with it.
    thread::scope(|scope| {
        let run = scope.spawn(|| {
            enter(Path::new(&netns));
            test(load(&pins), ifindex, &host.netns, &lab.underlay);
        });
        if let Err(panic) = run.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Moves the thread into a network namespace.
pub fn enter(netns: &Path) {
    setns(File::open(netns).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
}

fn load(pins: &Path) -> Dataplane {
    let network = NetworkConfig::parse(r#"{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}"#).unwrap();
    let capacity = Capacity::of(network.network, network.subnet_len);
    let config = Config {
        bypass_time: 1_000_000_000,
        network: 0x0a05_0000,
        slot_shift: 8,
        slots: capacity.slots,
        subnet: 0x0a05_0100,
        subnet_mask: 0xffff_ff00,
        vtep_address: u32::from_be_bytes(NODE_ONE),
        vni: 1,
        mtu: MTU,
        underlay_header_len: 14,
        underlay_mac: NODE_ONE_MAC,
        port: 8472,
        vtep_mac: VTEP_ONE_MAC,
        source_ports: SOURCE_PORTS,
        flags: 0,
    };
    let pins = PinDirectory::new(pins, Vni::DEFAULT);
    let mut dataplane = Dataplane::load(pins, &config, capacity, BpfLogLevel::Off).unwrap();
    dataplane.peers.sync(&peers()).unwrap();
    dataplane.accept(&ACCEPTED.map(|prefix| prefix.parse().unwrap())).unwrap();
    dataplane
}

/// What the operator has named: a site behind hosts, and what leases and addresses of hosts' own go before.
const ACCEPTED: [&str; 5] = ["10.20.0.0/16", "240.0.0.0/5", "10.5.0.0/22", "192.168.64.1/32", "192.168.64.96/30"];

/// Node two in the grid, with a lease that is longer than the grid's and one outside the Network; node three; and two
/// whose addresses are in a prefix of [`ACCEPTED`] and in node three's lease.
fn peers() -> DesiredPeers {
    let two = vtep(NODE_TWO, NODE_TWO_MAC, VTEP_TWO_MAC, Vtep::RESOLVED);
    let three = vtep(NODE_THREE, Mac::default(), VTEP_THREE_MAC, 0);
    let lease = |subnet: &str, vtep| (subnet.parse().unwrap(), vtep);
    DesiredPeers::from([
        lease("10.5.2.0/24", two),
        lease("10.5.3.0/24", three),
        lease("10.5.4.128/25", two),
        // A claim to part of our own subnet, which the agent would pass over.
        lease("10.5.1.128/25", two),
        lease("172.30.0.0/16", two),
        lease("10.5.8.0/24", vtep(NODE_FIVE, NODE_TWO_MAC, VTEP_FIVE_MAC, Vtep::RESOLVED)),
        lease("10.5.6.0/24", vtep(NODE_SIX, NODE_TWO_MAC, VTEP_SIX_MAC, Vtep::RESOLVED)),
    ])
}

fn vtep(address: [u8; 4], next_hop_mac: Mac, peer_vtep_mac: Mac, flags: u16) -> Vtep {
    let header = OuterHeader::template(&Tunnel {
        next_hop_mac,
        device_mac: NODE_ONE_MAC,
        source: NODE_ONE,
        destination: address,
        port: 8472,
        vni: Vni::DEFAULT,
        peer_vtep_mac,
        vtep_mac: VTEP_ONE_MAC,
    });
    Vtep { header, address: u32::from_be_bytes(address), next_hop: address, ifindex: 2, flags, mtu: 0 }
}

impl Loaded<'_> {
    /// Runs a program on a frame.
    pub fn run(&mut self, hook: Hook, frame: &[u8]) -> Run {
        self.run_gso(hook, frame, 0)
    }

    /// The same on a frame that is to be segmented.
    pub fn run_gso(&mut self, hook: Hook, frame: &[u8], gso_size: u32) -> Run {
        use flannel_agent::dataplane::{TestRun as _, TestRunOptions};
        let before = self.dataplane.counters().unwrap();
        let mut out = vec![0; frame.len() + 256];
        let context = context(self.ifindex, gso_size);
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..TestRunOptions::new()
        };
        let result = self.dataplane.program(hook).unwrap().test_run(options).unwrap();
        out.truncate(result.data_size_out as usize);
        let after = self.dataplane.counters().unwrap();
        let counted = before.iter().zip(&after).filter(|(before, after)| before != after);
        let counted = counted.map(|((event, before), (_, after))| {
            (event.label(), (after.packets - before.packets, after.bytes - before.bytes))
        });
        Run { verdict: result.return_value as i32, frame: out, counted: counted.collect() }
    }

    /// Runs a program on a frame that it must not change, and compares everything.
    pub fn expect_unchanged(&mut self, hook: Hook, what: &str, frame: &[u8], event: Event) {
        let expected = Run { verdict: verdict(event), frame: frame.to_vec(), counted: counted(event, frame) };
        assert_eq!(self.run(hook, frame), expected, "{what}");
    }

    /// The same of `from_underlay`, which leaves frames as they are or takes them out of the tunnel.
    pub fn expect_at_underlay(&mut self, what: &str, frame: &[u8], event: Event) {
        if event != Event::HandedIn {
            return self.expect_unchanged(Hook::FromUnderlay, what, frame, event);
        }
        let inner = &frame[usize::from(vxlan::OVERHEAD)..];
        let expected = Run { verdict: verdict(event), frame: inner.to_vec(), counted: counted(event, frame) };
        assert_eq!(self.run(Hook::FromUnderlay, frame), expected, "{what}");
    }
}

/// The verdict that the kernel takes for an outcome (include/uapi/linux/pkt_cls.h).
pub fn verdict(event: Event) -> i32 {
    match event.outcome() {
        Outcome::Forward => 7,
        Outcome::Pass => -1,
        Outcome::Drop => 2,
    }
}

/// One packet under one event, and nothing else.
pub fn counted(event: Event, frame: &[u8]) -> BTreeMap<&'static str, (u64, u64)> {
    BTreeMap::from([(event.label(), (1, frame.len() as u64))])
}

/// A `struct __sk_buff` with the two fields that the tests set.
fn context(ifindex: u32, gso_size: u32) -> Vec<u8> {
    const SIZE: usize = 192;
    const IFINDEX: usize = 40;
    const GSO_SIZE: usize = 176;
    let mut context = vec![0; SIZE];
    context[IFINDEX..IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
    context[GSO_SIZE..GSO_SIZE + 4].copy_from_slice(&gso_size.to_ne_bytes());
    context
}
