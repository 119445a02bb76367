//! The loaded programs against the model of them in `flannel-common`: one input, both answers.
//!
//! Compared are verdict or note (a run shows one of them), every byte, all counters, what is known of flows, and which peers
//! were heard and counted. Not compared is what a program can't show here: the device that it redirects to, and what it does with a
//! packet that carries XDP metadata; those are tested on wires.

use std::{collections::BTreeSet, path::Path, process::Command, time::Duration};

use flannel_agent::{
    bypass::{Plan, Ports, Protocol},
    dataplane::{
        BpfLogLevel, Capacity, Dataplane, Hook, PinDirectory, XdpMode,
        test_run::{Packet, TestRuns},
    },
};
use flannel_common::{
    event::{Event, Outcome},
    flow::{Egress, Flow, FlowKey, Ingress, Original},
    maps::{Config, Counter, Heard, Traffic, Vtep},
    model::{self, Counted, Excluded, Fate, FlowChange, Frame, Known, LastHeard, Lease, Overlay, ToldBy, World},
    packet::{OuterHeader, Tunnel},
    vxlan::Vni,
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    time::{ClockId, clock_gettime},
};

use crate::{
    frames::{Mac, NODE_ONE_MAC},
    inputs::{Age, Input, Look},
    worlds::{DEVICE_MAC, WORLDS},
};

/// For how long a flow is fresh in these worlds: longer than this process is ever kept waiting.
pub const BYPASS_TIME: Duration = Duration::from_secs(60);
/// Longer ago than the coarse clock of the programs is behind, also where a busy machine is late with its ticks.
const A_MOMENT: Duration = Duration::from_secs(1);
const POD_MAC: Mac = [0x0a, 0x58, 0, 0, 0, 2];
const GATEWAY_MAC: Mac = [0x0a, 0x58, 0, 0, 0, 1];
/// No device of these namespaces has this number.
const NO_DEVICE: u32 = 1 << 20;
/// How often what is seldom wrong is looked at.
const LOOK_AROUND: u64 = 4096;

/// Every world, loaded.
pub struct Comparison {
    worlds: Vec<Loaded>,
    ifindex: u32,
    runs: u64,
    out: Vec<u8>,
}

struct Loaded {
    world: World,
    programs: TestRuns,
    /// What the counters must be.
    counters: Vec<Counter>,
    /// When each peer was heard.
    heard: Heard,
}

/// Two answers to one input.
pub struct Difference(pub String);

impl Comparison {
    /// Loads the programs for each world, in namespaces of the calling thread's own, so that nothing of it is left.
    pub fn new() -> Self {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("namespaces need root: run this as root");
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        let pins = Path::new("/sys/fs/bpf");
        mount(Some("bpf"), pins, Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
        let [a, b, c, d, e, f] = NODE_ONE_MAC;
        let mac = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
        ip(&format!("link add eth0 address {mac} type veth peer name eth1"));
        let links: serde_json::Value = serde_json::from_str(&ip("-j link show eth0")).unwrap();
        let ifindex = links[0]["ifindex"].as_u64().unwrap() as u32;
        let overlay = make_overlay(&WORLDS[0]());
        let worlds = WORLDS
            .iter()
            .enumerate()
            .map(|(number, world)| Loaded::new(world(), &pins.join(number.to_string()), ifindex, overlay));
        Self { worlds: worlds.collect(), ifindex, runs: 0, out: Vec::new() }
    }

    /// Runs an input through both; `false` where the kernel runs programs on no such frame.
    pub fn compare(&mut self, input: &Input<'_>) -> Result<bool, Difference> {
        let Some(program) = runnable(input) else { return Ok(false) };
        let loaded = &mut self.worlds[input.world()];
        self.runs += 1;
        let result = loaded.compare(input, program, self.ifindex, &mut self.out);
        let result = result.and_then(|()| match self.runs % LOOK_AROUND {
            0 => self.worlds.iter_mut().try_for_each(Loaded::look_around),
            _ => Ok(()),
        });
        result.map(|()| true).map_err(|what| Difference(format!("{what}\n{input:#?}")))
    }

    /// What is only looked at now and then.
    pub fn look_around(&mut self) -> Result<(), String> {
        self.worlds.iter_mut().try_for_each(Loaded::look_around)
    }
}

/// The kernel runs programs on frames with an Ethernet header, and TC programs on no IP packet shorter than its fixed header
/// (`bpf_prog_test_run_skb`).
fn runnable(input: &Input<'_>) -> Option<model::Program> {
    let frame = input.frame;
    let least = match (input.program(), frame.get(12..14)?) {
        (model::Program::XdpDecap, _) => 14,
        (_, [0x08, 0x00]) => 14 + 20,
        (_, [0x86, 0xdd]) => 14 + 40,
        _ => 14,
    };
    (frame.len() >= least).then_some(input.program())
}

fn egress(released: u64, sent_as: FlowKey, told_by: ToldBy, dscp: u8) -> Egress {
    let ToldBy { mark, priority } = told_by;
    Egress { released, sent_as, mark, priority, dscp: dscp.into(), reserved: 0 }
}

/// Whether a program is on the side of the stack where packets go in.
fn goes_in(world: &World, program: model::Program) -> bool {
    let has_no_tunnel = world.config.flags & Config::NO_TUNNEL != 0;
    matches!(program, model::Program::FromPod | model::Program::FromOverlay)
        || has_no_tunnel && program == model::Program::FromUnderlay
}

impl Loaded {
    fn new(world: World, pins: &Path, ifindex: u32, overlay: u32) -> Self {
        let config = &world.config;
        let capacity = Capacity { slots: config.slots, vteps: 64 };
        let vni = Vni::new_checked(config.vni).unwrap();
        let mut dataplane = Dataplane::load(PinDirectory::new(pins, vni), config, capacity, BpfLogLevel::Off).unwrap();
        for Lease { network: [a, b, c, d], len, peer } in &world.leases {
            let header = OuterHeader::template(&Tunnel {
                next_hop_mac: peer.next_hop_mac.unwrap_or_default(),
                device_mac: config.underlay_mac,
                source: config.vtep_address.to_be_bytes(),
                destination: peer.address,
                port: config.port,
                vni,
                peer_vtep_mac: peer.vtep_mac,
                vtep_mac: config.vtep_mac,
            });
            let vtep = Vtep {
                header,
                address: u32::from_be_bytes(peer.address),
                next_hop: peer.address,
                ifindex: if peer.has_route { ifindex } else { 0 },
                flags: if peer.next_hop_mac.is_some() { Vtep::RESOLVED | Vtep::HAS_MAC } else { 0 }
                    | if peer.is_on_link { Vtep::ON_LINK } else { 0 },
                mtu: peer.smaller_mtu.unwrap_or_default(),
            };
            dataplane.peers.set(format!("{a}.{b}.{c}.{d}/{len}").parse().unwrap(), &vtep).unwrap();
        }
        let named: Vec<_> = world
            .accepted
            .iter()
            .map(|([a, b, c, d], len)| format!("{a}.{b}.{c}.{d}/{len}").parse().unwrap())
            .collect();
        dataplane.accept(&named).unwrap();
        dataplane.restrict(&plan(&world)).unwrap();
        match world.overlay {
            Overlay::Unknown => {}
            Overlay::Gone => dataplane.peers.set_overlay_device(NO_DEVICE).unwrap(),
            Overlay::Is(_) => dataplane.peers.set_overlay_device(overlay).unwrap(),
        }
        let counters = vec![Counter::default(); Event::ALL.len()];
        Self { world, programs: TestRuns::new(dataplane).unwrap(), counters, heard: Heard::default() }
    }

    fn compare(
        &mut self,
        input: &Input<'_>,
        program: model::Program,
        ifindex: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), String> {
        let key = input.flow();
        let note = input.note(&self.world);
        let [sent_as, received_as] = input.sent_and_received_as(key.unwrap_or_default());
        let before = key.and_then(|key| self.make_known(input, key, ifindex));
        let is_fresh = |age: Option<Age>| age == Some(Age::Fresh);
        let packet = model::Packet {
            frame: input.frame,
            is_gso: input.gso_size() != 0,
            note,
            told_by: input.told_by(),
            known: Known {
                egress: before.is_some() && is_fresh(input.egress()),
                ingress: before.is_some() && is_fresh(input.ingress()),
                is_gone: input.is_gone(),
                pod_mac: POD_MAC,
                gateway_mac: GATEWAY_MAC,
                sent_as,
                told_by: input.known_treatment().0,
                dscp: input.known_treatment().1,
                received_as,
                original: input.original(),
                sender: input.sender(),
                heard: input.heard(),
            },
        };
        self.set_heard(packet.known.heard);
        let place = self.place_of_original(program, note, key);
        let left =
            if key.is_some() && goes_in(&self.world, program) { Original::default() } else { packet.known.original };
        self.programs.set_original(place, left).unwrap();
        self.programs.set_pod(ifindex, packet.known.sender).unwrap();
        self.programs.set_gone(ifindex, input.is_gone()).unwrap();
        let fate = self.world.fate(program, packet);
        let start = now();
        self.run(input, program, packet.note, ifindex, &fate, out)?;
        check_frame(&self.world, &fate.frame, input.frame, out)?;
        self.check_counter(&fate, input.frame.len())?;
        self.check_flow(&fate, key, before, ifindex, start)?;
        let after = Original { hash: left.hash, ..self.programs.original(place).unwrap() };
        equal("what is left for the other side of the stack", after, fate.original.unwrap_or(left))?;
        self.programs.set_original(place, Original::default()).unwrap();
        equal("the MAC that the pod sends from", self.programs.pod(ifindex).unwrap(), fate.sender)?;
        self.check_heard(&fate)?;
        self.check_traffic(&fate)
    }

    /// Has the programs know the packet's flow, as the input says.
    fn make_known(&mut self, input: &Input<'_>, key: FlowKey, veth: u32) -> Option<Flow> {
        let now = now();
        let time = |age| match age {
            Age::Never => 0,
            Age::Fresh => (now - A_MOMENT).as_nanos() as u64,
            Age::Stale => now.saturating_sub(BYPASS_TIME + A_MOMENT).as_nanos() as u64,
            Age::Ahead => (now + BYPASS_TIME).as_nanos() as u64,
        };
        let [sent_as, received_as] = input.sent_and_received_as(key);
        let released = time(input.ingress()?);
        let ingress = Ingress { released, received_as, veth, pod_mac: POD_MAC, gateway_mac: GATEWAY_MAC };
        let (told_by, dscp) = input.known_treatment();
        let egress = egress(time(input.egress()?), sent_as, told_by, dscp);
        let flow = Flow { egress, ingress, ..Flow::new(key) };
        self.programs.insert_flow(&flow).unwrap();
        Some(flow)
    }

    fn run(
        &mut self,
        input: &Input<'_>,
        program: model::Program,
        note: u16,
        ifindex: u32,
        fate: &Fate,
        out: &mut Vec<u8>,
    ) -> Result<(), String> {
        let hook = match program {
            model::Program::ToOverlay => Hook::ToOverlay,
            model::Program::FromOverlay => Hook::FromOverlay,
            model::Program::FromUnderlay => Hook::FromUnderlay,
            model::Program::FromPod => Hook::FromPod,
            model::Program::ToPod => Hook::ToPod,
            model::Program::ToUnderlay => Hook::ToUnderlay,
            model::Program::XdpDecap => {
                let mode = if input.is_generic() { XdpMode::Generic } else { XdpMode::Native };
                let verdict = self.programs.xdp(mode, input.frame, out).map_err(|error| error.to_string())?;
                // XDP_DROP and XDP_PASS (include/uapi/linux/bpf.h).
                let expected = if fate.event.is_some_and(|event| event.outcome() == Outcome::Drop) { 1 } else { 2 };
                return equal("verdict", verdict, expected);
            }
        };
        let ToldBy { mark, priority } = input.told_by();
        let packet = Packet { frame: input.frame, ifindex, gso_size: input.gso_size(), note, mark, priority };
        let after = match input.look() {
            Look::Verdict => {
                let (verdict, after) = self.programs.verdict(hook, packet, out).map_err(|error| error.to_string())?;
                // TC_ACT_REDIRECT, TC_ACT_UNSPEC, TC_ACT_SHOT (include/uapi/linux/pkt_cls.h).
                let expected = match fate.event.map(Event::outcome) {
                    Some(Outcome::Forward) => 7,
                    Some(Outcome::Drop) => 2,
                    Some(Outcome::Pass) | None => -1,
                };
                equal("verdict", verdict, expected)?;
                after
            }
            Look::Note => {
                let after = self.programs.note(hook, packet, out).map_err(|error| error.to_string())?;
                equal("note", after.note, fate.note)?;
                // PACKET_HOST (include/uapi/linux/if_packet.h): the pod's stack takes TCP in no other.
                if [Event::Delivered, Event::DirectDelivered].map(Some).contains(&fate.event) {
                    equal("packet type", after.packet_type, 0)?;
                }
                after
            }
        };
        equal("mark and priority", ToldBy { mark: after.mark, priority: after.priority }, fate.told_by)
    }

    fn check_counter(&mut self, fate: &Fate, len: usize) -> Result<(), String> {
        let Some(event) = fate.event else { return Ok(()) };
        let expected = &mut self.counters[event as usize];
        *expected = Counter { packets: expected.packets + 1, bytes: expected.bytes + len as u64 };
        let counter = self.programs.counter(event).unwrap();
        match counter == *expected {
            true => Ok(()),
            false => Err(format!("not counted as {}, but {}", event.label(), self.moved())),
        }
    }

    /// The counters that are not as they must be.
    fn moved(&self) -> String {
        let counters = self.programs.counters().unwrap();
        let moved =
            counters.iter().zip(&self.counters).filter(|((_, counter), expected)| counter.packets > expected.packets);
        moved.map(|((event, _), _)| event.label()).collect::<Vec<_>>().join(", ")
    }

    fn check_flow(
        &mut self,
        fate: &Fate,
        key: Option<FlowKey>,
        before: Option<Flow>,
        ifindex: u32,
        start: Duration,
    ) -> Result<(), String> {
        let changed = match fate.flow {
            FlowChange::Unchanged | FlowChange::Removed => None,
            FlowChange::OriginalRemoved(key) | FlowChange::Egress { key, .. } | FlowChange::Ingress { key, .. } => {
                Some(key)
            }
        };
        // What is noted may be another flow's than the packet's by now; then that one stays as it was.
        if let Some(key) = key.filter(|key| changed != Some(*key)) {
            let expected = if fate.flow == FlowChange::Removed { None } else { before };
            equal("what is known of the flow", self.take_flow(&key), expected)?;
        }
        let Some(key) = changed else { return Ok(()) };
        let after = self.take_flow(&key);
        let known = before.filter(|before| before.key == key).unwrap_or(Flow::new(key));
        let released = after.map_or([0; 2], |flow| [flow.egress.released, flow.ingress.released]);
        let (expected, time) = match fate.flow {
            FlowChange::OriginalRemoved(_) => return equal("what is known of the flow", after, None),
            FlowChange::Egress { sent_as, told_by, dscp, .. } => {
                (Flow { egress: egress(released[0], sent_as, told_by, dscp), ..known }, released[0])
            }
            FlowChange::Ingress { received_as, pod_mac, gateway_mac, .. } => {
                let ingress = Ingress { released: released[1], received_as, veth: ifindex, pod_mac, gateway_mac };
                (Flow { ingress, ..known }, released[1])
            }
            FlowChange::Unchanged | FlowChange::Removed => return Ok(()),
        };
        equal("what is known of the flow", after, Some(expected))?;
        let possible = (start - A_MOMENT).as_nanos() as u64..=now().as_nanos() as u64;
        match possible.contains(&time) {
            true => Ok(()),
            false => Err(format!("the flow was noted at {time:?}, not within {possible:?}")),
        }
    }

    fn take_flow(&mut self, key: &FlowKey) -> Option<Flow> {
        let flow = self.programs.flow(key).unwrap();
        if flow.is_some() {
            self.programs.forget_flow(key).unwrap();
        }
        flow
    }

    /// Where a program leaves the packet's flow, or else looks for it.
    fn place_of_original(&self, program: model::Program, note: u16, key: Option<FlowKey>) -> u32 {
        let is_from_pod =
            matches!(program, model::Program::FromPod | model::Program::ToOverlay | model::Program::ToUnderlay);
        let tag = match key {
            Some(key) if goes_in(&self.world, program) => key.tag(self.world.config.vni),
            _ => note.into(),
        };
        Original::index(tag, is_from_pod)
    }

    /// Has all peers' last packets have come so, long ago.
    fn set_heard(&mut self, heard: LastHeard) {
        let heard = match heard {
            LastHeard::Never => Heard::default(),
            LastHeard::InTunnel => Heard { last: 3, direct: 1 },
            LastHeard::Directly => Heard { last: 2, direct: 1 },
        };
        if std::mem::replace(&mut self.heard, heard) == heard {
            return;
        }
        for address in self.addresses() {
            let id = self.programs.id_of(address).unwrap();
            self.programs.set_heard(id, heard).unwrap();
        }
    }

    fn check_heard(&mut self, fate: &Fate) -> Result<(), String> {
        let Some(address) = fate.heard else { return Ok(()) };
        let id = self.programs.id_of(address).unwrap();
        let Heard { last, direct } = self.programs.heard(id).unwrap();
        equal(
            "whether it was heard, and without a tunnel",
            (last != self.heard.last, direct != self.heard.direct),
            (true, fate.is_heard_directly),
        )?;
        self.programs.set_heard(id, self.heard).unwrap();
        Ok(())
    }

    fn check_traffic(&mut self, fate: &Fate) -> Result<(), String> {
        let Some(counted) = fate.traffic else { return Ok(()) };
        let counter = |bytes| Counter { packets: 1, bytes: bytes as u64 };
        let (address, expected) = match counted {
            Counted::Sent(address, bytes) => (address, Traffic { sent: counter(bytes), ..Traffic::default() }),
            Counted::Received(address, bytes) => (address, Traffic { received: counter(bytes), ..Traffic::default() }),
        };
        let id = self.programs.id_of(address).unwrap();
        equal("what is counted for the peer", self.programs.take_traffic(id).unwrap(), expected)
    }

    fn addresses(&self) -> BTreeSet<[u8; 4]> {
        self.world.leases.iter().map(|lease| lease.peer.address).collect()
    }

    fn look_around(&mut self) -> Result<(), String> {
        let counters: Vec<_> = self.programs.counters().unwrap().into_iter().map(|(_, counter)| counter).collect();
        if counters != self.counters {
            return Err(format!("counted besides: {}", self.moved()));
        }
        equal("flows", self.programs.flows().unwrap(), vec![])?;
        let is_heard =
            |address: &[u8; 4]| self.programs.heard(self.programs.id_of(*address).unwrap()).unwrap() != self.heard;
        if let Some(address) = self.addresses().into_iter().find(is_heard) {
            return Err(format!("{address:?} was heard"));
        }
        let addresses = self.addresses();
        let mut is_counted = |address: &[u8; 4]| {
            let id = self.programs.id_of(*address).unwrap();
            self.programs.take_traffic(id).unwrap() != Traffic::default()
        };
        match addresses.into_iter().find(|address| is_counted(address)) {
            Some(address) => Err(format!("something was counted for {address:?}")),
            None => Ok(()),
        }
    }
}

/// What has the programs exclude what is excluded in a world.
fn plan(world: &World) -> Plan {
    let Excluded { addresses, ports } = &world.excluded;
    let prefix = |([a, b, c, d], len): &([u8; 4], u32)| format!("{a}.{b}.{c}.{d}/{len}").parse().unwrap();
    let protocol = |number| if number == 6 { Protocol::Tcp } else { Protocol::Udp };
    let range = |(number, first, last): &(u32, u16, u16)| Ports::new(protocol(*number), &(*first..=*last));
    let (addresses, ports) = (addresses.iter().map(prefix).collect(), ports.iter().map(range).collect());
    Plan { addresses, ports, ..Plan::default() }
}

/// Makes a device for `flannel.<VNI>`, with the routes of a world; its number.
fn make_overlay(world: &World) -> u32 {
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    let mac = |mac: Mac| mac.map(|octet| format!("{octet:02x}")).join(":");
    let address = |[a, b, c, d]: [u8; 4]| format!("{a}.{b}.{c}.{d}");
    ip(&format!("link add overlay address {} type vxlan id 1 dstport 8472 local 192.168.64.1", mac(DEVICE_MAC)));
    // With no local address the kernel has no table of them, and takes every next hop for a broadcast address
    // (`__inet_dev_addr_type`).
    ["lo", "eth0", "eth1", "overlay"].iter().for_each(|device| drop(ip(&format!("link set {device} up"))));
    for route in &world.routes {
        let network = format!("{}/{}", address(route.network), route.len);
        match route.next_hop {
            Some(next_hop) => {
                let next_hop = address(next_hop);
                if let Some(known) = route.next_hop_mac {
                    ip(&format!("neigh replace {next_hop} lladdr {} dev overlay nud permanent", mac(known)));
                }
                ip(&format!("route add {network} via {next_hop} dev overlay onlink"));
            }
            None => drop(ip(&format!("route add {network} dev eth0"))),
        }
    }
    let links: serde_json::Value = serde_json::from_str(&ip("-j link show overlay")).unwrap();
    links[0]["ifindex"].as_u64().unwrap() as u32
}

fn check_frame(world: &World, expected: &Frame, before: &[u8], after: &[u8]) -> Result<(), String> {
    const IPV4: usize = 14;
    const SOURCE_PORT: usize = 34;
    match expected {
        Frame::Unchanged => equal_bytes(after, before),
        Frame::Is(expected) => equal_bytes(after, expected),
        Frame::InTunnel(expected) => {
            if after.len() < 64 {
                return equal_bytes(after, expected);
            }
            let port = u16::from_be_bytes([after[SOURCE_PORT], after[SOURCE_PORT + 1]]);
            let ports = world.config.source_ports;
            if !(ports.min..ports.max).contains(&port) {
                return Err(format!("source port {port}, not within {ports:?}"));
            }
            if !model::is_sum_right(after, IPV4) {
                return Err("the outer IPv4 checksum is wrong".to_owned());
            }
            let mut after = after.to_vec();
            for field in [IPV4 + 4, IPV4 + 10, SOURCE_PORT] {
                after[field..field + 2].fill(0);
            }
            equal_bytes(&after, expected)
        }
    }
}

fn equal_bytes(is: &[u8], expected: &[u8]) -> Result<(), String> {
    match is == expected {
        true => Ok(()),
        false => Err(format!("the frame is\n  {}\n, the model's\n  {}", hex(is), hex(expected))),
    }
}

fn equal<T: PartialEq + std::fmt::Debug>(what: &str, is: T, expected: T) -> Result<(), String> {
    match is == expected {
        true => Ok(()),
        false => Err(format!("{what}: {is:x?}, the model's {expected:x?}")),
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap().into()
}

fn ip(line: &str) -> String {
    let output = Command::new("ip").args(line.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "ip {line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
