//! What the programs are fuzzed with: eight bytes that choose program, world and circumstances, and a frame. New ones are made
//! from valid frames of every kind, with fields, lengths and nesting changed.

use std::fmt;

use etherparse::EtherType;
use flannel_common::{
    flow::{Constants, FlowKey, Original, Treatment},
    model::{self, LastHeard, Note, Peer, Program, ToldBy, World},
};
use rand::{Rng, RngExt as _, seq::IndexedRandom as _};

use crate::{
    comparison::hex,
    frames::*,
    worlds::{DEVICE_MAC, FOREIGN_MAC, WORLDS},
};

/// When the stack let a packet of a flow out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Age {
    Never,
    Fresh,
    Stale,
    /// By a clock that is ahead.
    Ahead,
}

/// Another flow than one, as netfilter may make of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Translated {
    Not,
    Local,
    Remote,
    Both,
}

impl Translated {
    const ALL: [Self; 4] = [Self::Not, Self::Local, Self::Remote, Self::Both];

    fn of(bits: u8) -> Self {
        Self::ALL[usize::from(bits) % Self::ALL.len()]
    }

    /// With a remote end out of a few, some of which no host leases.
    pub fn apply(self, key: FlowKey, remote: u8) -> FlowKey {
        let remotes = [[10, 5, 2, 9], [10, 5, 3, 7], [10, 5, 5, 5], [10, 96, 0, 10], [172, 16, 1, 5], [10, 5, 2, 2]];
        let remote = remotes[usize::from(remote) % remotes.len()];
        let remote = |key| FlowKey { remote, remote_port: [0x14, 0xe9], ..key };
        let local = |key: FlowKey| {
            let [a, b, c, d] = key.local;
            FlowKey { local: [a, b, c, d ^ 1], local_port: [0xff, 0xff], ..key }
        };
        match self {
            Self::Not => key,
            Self::Local => local(key),
            Self::Remote => remote(key),
            Self::Both => local(remote(key)),
        }
    }
}

/// What a run is to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    Verdict,
    Note,
}

/// One input.
pub struct Input<'a> {
    head: [u8; Input::HEAD],
    pub frame: &'a [u8],
}

const PROGRAMS: [Program; 9] = [
    Program::FromUnderlay,
    Program::XdpDecap,
    Program::ToOverlay,
    Program::FromPod,
    Program::FromOverlay,
    Program::ToPod,
    Program::XdpDecap,
    Program::FromUnderlay,
    Program::ToUnderlay,
];

impl<'a> Input<'a> {
    pub const HEAD: usize = 8;
    /// With the head.
    pub const MAX_LEN: usize = 2048;

    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        let (head, frame) = bytes.split_first_chunk()?;
        Some(Self { head: *head, frame })
    }

    pub fn program(&self) -> Program {
        PROGRAMS[usize::from(self.head[0]) % PROGRAMS.len()]
    }

    /// Of `xdp_decap`.
    pub fn is_generic(&self) -> bool {
        self.head[0] & 0x80 != 0
    }

    pub fn world(&self) -> usize {
        usize::from(self.head[1]) % WORLDS.len()
    }

    /// [`None`] where nothing is known of the flow.
    pub fn egress(&self) -> Option<Age> {
        self.age(0)
    }

    pub fn ingress(&self) -> Option<Age> {
        self.age(2)
    }

    fn age(&self, shift: u8) -> Option<Age> {
        let ages = [Age::Fresh, Age::Never, Age::Stale, Age::Ahead];
        (self.head[2] & 0x80 != 0).then(|| ages[usize::from(self.head[2] >> shift & 3)])
    }

    pub fn note(&self, world: &World) -> u16 {
        let note = match self.head[3] % 6 {
            0 => Note::None,
            1 => self.original_flow().map_or(Note::None, Note::FromPod),
            2 => model::flow_of(self.frame, 14, false).map_or(Note::None, Note::Admitted),
            3 => Note::HandedOn,
            4 => self.original_flow().map_or(Note::None, Note::Received),
            _ => return u16::from_be_bytes([self.head[4], self.head[5]]),
        };
        world.note(note)
    }

    pub fn gso_size(&self) -> u32 {
        match self.head[6] {
            size @ 0xf0.. => u32::from(size & 0xf) * 100,
            _ => 0,
        }
    }

    /// The MAC that the pod at the veth is known to send from: seldom none, or another than that of the frame.
    pub fn sender(&self) -> Option<Mac> {
        let to = *self.frame.first_chunk()?;
        match self.head[7] >> 5 {
            0 => None,
            1 => Some(NEXT_HOP_MAC),
            _ => Some(to),
        }
    }

    /// Whether the pod's link is gone: seldom.
    pub fn is_gone(&self) -> bool {
        self.head[6] >> 4 == 0xe
    }

    /// How the peers' last packets came.
    pub fn heard(&self) -> LastHeard {
        [LastHeard::Never, LastHeard::InTunnel, LastHeard::Directly][usize::from(self.head[4]) % 3]
    }

    /// By what a packet is told from others when a program gets it: seldom by anything.
    pub fn told_by(&self) -> ToldBy {
        match self.head[2] >> 4 & 7 {
            5 => ToldBy { mark: 0x4000, priority: 6 },
            6 => ToldBy { mark: 0, priority: 2 },
            _ => ToldBy::default(),
        }
    }

    /// By what packets of its flow were when the stack let them out, and their TOS octet without congestion notification: most
    /// often the packet's own.
    pub fn known_treatment(&self) -> (ToldBy, u8) {
        let dscp = self.frame.get(IPV4 + 1).copied().unwrap_or_default() & 0xfc;
        match self.head[2] >> 4 & 7 {
            0 => (ToldBy { mark: 0x4000, priority: 6 }, dscp),
            1 => (ToldBy::default(), dscp ^ 0x10),
            _ => (ToldBy::default(), dscp),
        }
    }

    pub fn look(&self) -> Look {
        if self.head[7] & 1 == 0 { Look::Verdict } else { Look::Note }
    }

    /// As what packets of a flow leave the stack, from its pod and to it.
    pub fn sent_and_received_as(&self, key: FlowKey) -> [FlowKey; 2] {
        [self.head[7] >> 1, self.head[7] >> 3].map(|bits| Translated::of(bits & 3).apply(key, self.head[5]))
    }

    /// The flow that a packet out of the stack had before.
    fn original_flow(&self) -> Option<FlowKey> {
        let sends = matches!(self.program(), Program::ToOverlay | Program::ToUnderlay);
        let after = model::flow_of(self.frame, IPV4, sends)?;
        Some(Translated::of(self.head[1] >> 2).apply(after, self.head[5]))
    }

    /// What is left where its note leads to: most often its own, as these frames have no hash.
    pub fn original(&self) -> Original {
        let Some(key) = self.original_flow() else { return Original::default() };
        let constants = model::constants(self.frame, IPV4);
        let treatment = model::treatment(self.frame, IPV4, 0);
        let original = |key, constants, hash| Original::new(key, constants, treatment, hash);
        let changed = |treatment| Original::new(key, constants, treatment, 0);
        match self.head[1] >> 4 {
            0 => Original::default(),
            1 => original(key, constants, 1),
            2 => original(key, Constants { sequence: !constants.sequence, ..constants }, 0),
            3 => original(key, Constants { id_and_len: !constants.id_and_len, ..constants }, 0),
            4 => original(FlowKey { protocol: key.protocol ^ 1, ..key }, constants, 0),
            5 => Original { key: Translated::Both.apply(key, 0), ..original(key, constants, 0) },
            6 => changed(Treatment { tos: treatment.tos ^ 0xb8, ..treatment }),
            7 => changed(Treatment { ttl: treatment.ttl.wrapping_add(1), ..treatment }),
            8 => changed(Treatment { begin: !treatment.begin, ..treatment }),
            _ => original(key, constants, 0),
        }
    }

    /// The flow that the program looks for.
    pub fn flow(&self) -> Option<FlowKey> {
        match self.program() {
            Program::FromUnderlay => {
                let config = WORLDS[self.world()]().config;
                let to = self.frame.get(IPV4 + 16..).and_then(|octets| octets.first_chunk().copied());
                let is_direct = to.is_some_and(|to| config.is_local(u32::from_be_bytes(to)));
                model::flow_of(self.frame, if is_direct { IPV4 } else { INNER_IPV4 }, false)
            }
            Program::FromPod | Program::ToOverlay | Program::ToUnderlay => model::flow_of(self.frame, IPV4, true),
            Program::ToPod | Program::FromOverlay => model::flow_of(self.frame, IPV4, false),
            Program::XdpDecap => None,
        }
    }
}

impl fmt::Debug for Input<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Input")
            .field("program", &self.program())
            .field("world", &self.world())
            .field("egress, ingress", &(self.egress(), self.ingress()))
            .field("gso_size", &self.gso_size())
            .field("note", &self.note(&WORLDS[self.world()]()))
            .field("sender, is gone", &(self.sender(), self.is_gone()))
            .field("original", &self.original())
            .field("sent_as, received_as", &self.flow().map(|key| self.sent_and_received_as(key)))
            .field("heard", &self.heard())
            .field("told by, known", &(self.told_by(), self.known_treatment()))
            .field("look", &self.look())
            .field("frame", &hex(self.frame))
            .finish()
    }
}

const IPV4: usize = 14;
const INNER_IPV4: usize = 64;

/// Replaces an input, or changes it, in a way that a fuzzer of bytes would hardly find.
pub fn mutate(input: &mut Vec<u8>, random: &mut impl Rng) {
    if input.len() < Input::HEAD + 14 || random.random_ratio(1, 4) {
        *input = fresh(random);
    }
    // Not seldom none: what is valid must stay so.
    for _ in 0..random.random_range(0..4) {
        change(input, random);
    }
    input.truncate(Input::MAX_LEN);
}

/// A valid frame for some program.
fn fresh(random: &mut impl Rng) -> Vec<u8> {
    let mut input = vec![0; Input::HEAD];
    random.fill(&mut input[..]);
    let head = Input { head: input[..].try_into().unwrap(), frame: &[] };
    let (program, world) = (head.program(), WORLDS[head.world()]());
    if random.random_ratio(3, 4) {
        // No aggregate, and the flow known.
        input[6] = 0;
        input[2] |= 0x80;
    }
    input.extend(frame(program, &world, random));
    input
}

fn frame(program: Program, world: &World, random: &mut impl Rng) -> Vec<u8> {
    let lease = world.leases.choose(random).unwrap();
    let there = match random.random_range(0..8) {
        0 => beside(world, random),
        _ => within(lease.network, lease.len, random),
    };
    let here = within(world.config.subnet.to_be_bytes(), world.config.subnet_mask.leading_ones(), random);
    let of = |packet: Vec<u8>, source, destination| [ethernet(source, destination, EtherType::IPV4), packet].concat();
    match program {
        Program::FromUnderlay if random.random_ratio(1, 4) => {
            let from = lease.peer.next_hop_mac.filter(|_| random.random_ratio(7, 8)).unwrap_or(FOREIGN_MAC);
            of(packet(there, here, random), from, world.config.underlay_mac)
        }
        Program::FromUnderlay | Program::XdpDecap => {
            let peer = lease.peer;
            let to = if random.random_ratio(1, 16) { DEVICE_MAC } else { world.config.vtep_mac };
            let inner = of(packet(there, here, random), peer.vtep_mac, to);
            around(world, peer, &inner)
        }
        Program::ToUnderlay if random.random_ratio(1, 4) => {
            of(packet(here, there, random), world.config.underlay_mac, lease.peer.next_hop_mac.unwrap_or(FOREIGN_MAC))
        }
        Program::ToUnderlay => of(packet(here, there, random), world.config.underlay_mac, NEXT_HOP_MAC),
        Program::ToOverlay => of(packet(here, there, random), world.config.vtep_mac, NEXT_HOP_MAC),
        Program::FromPod => of(packet(here, there, random), [0x0a, 0x58, 0, 0, 0, 2], [0x0a, 0x58, 0, 0, 0, 1]),
        Program::FromOverlay | Program::ToPod => {
            of(packet(there, here, random), lease.peer.vtep_mac, world.config.vtep_mac)
        }
    }
}

fn around(world: &World, peer: Peer, inner: &[u8]) -> Vec<u8> {
    let tunnel = Tunnel { source: peer.address, port: world.config.port, ..FROM_TWO };
    tunnel.around(&vxlan(8, world.config.vni), inner)
}

/// An address that the kernel has a route for, or that the operator accepts.
fn beside(world: &World, random: &mut impl Rng) -> [u8; 4] {
    let routes = world.routes.iter().map(|route| (route.network, route.len));
    let all: Vec<_> = routes.chain(world.accepted.iter().copied()).collect();
    let (network, len) = *all.choose(random).unwrap();
    within(network, len, random)
}

/// An address of a subnet.
fn within(network: [u8; 4], len: u32, random: &mut impl Rng) -> [u8; 4] {
    let hosts = u32::MAX.checked_shr(len).unwrap_or(0);
    (u32::from_be_bytes(network) | random.random::<u32>() & hosts).to_be_bytes()
}

fn packet(source: [u8; 4], destination: [u8; 4], random: &mut impl Rng) -> Vec<u8> {
    match random.random_range(0..8) {
        0 => icmp(source, destination),
        1..4 => udp(source, destination),
        _ => tcp(source, destination),
    }
}

/// One change.
fn change(input: &mut Vec<u8>, random: &mut impl Rng) {
    let frame = Input::HEAD;
    match random.random_range(0..12) {
        // Circumstances.
        0 => {
            let at = random.random_range(0..Input::HEAD);
            input[at] = random.random();
        }
        // An end, or more than there should be.
        1 => input.truncate(random.random_range(frame..=input.len())),
        2 => {
            let len = *[1, 14, 46, 200, 1300, 1451].choose(random).unwrap();
            input.resize(input.len() + len, random.random());
        }
        // A tunnel within or around.
        3 => {
            let world = WORLDS[Input::new(input).unwrap().world()]();
            let peer = world.leases.choose(random).unwrap().peer;
            let nested = around(&world, peer, &input[frame..]);
            input.splice(frame.., nested);
        }
        4 if input.len() > frame + INNER_IPV4 => drop(input.drain(frame..frame + 50)),
        5 => {
            let at = random.random_range(frame..=input.len());
            let bytes: [u8; 4] = random.random();
            input.splice(at..at, bytes);
        }
        6 => {
            let bit = random.random_range(0..(input.len() - frame).max(1) * 8);
            if let Some(byte) = input.get_mut(frame + bit / 8) {
                *byte ^= 1 << (bit % 8);
            }
        }
        7 => {
            let ip = *[IPV4, INNER_IPV4].choose(random).unwrap();
            model::put_sum(&mut input[frame..], ip);
        }
        _ => set_field(input, random),
    }
}

/// A field of some header, at an interesting value.
fn set_field(input: &mut [u8], random: &mut impl Rng) {
    let head = Input::new(input).unwrap();
    let (world, len) = (WORLDS[head.world()](), head.frame.len());
    let ip = if random.random() { IPV4 } else { INNER_IPV4 };
    let word = |value: usize| (value as u16).to_be_bytes().to_vec();
    let pick = |values: &[u8], random: &mut _| vec![*values.choose(random).unwrap()];
    let (at, value) = match random.random_range(0..20) {
        0 => (ip, pick(&[0x45, 0x46, 0x4f, 0x44, 0x40, 0x65, 0x55], random)),
        1 => (ip + 1, pick(&[0, 1, 2, 3, 0xb8, 0xff], random)),
        2 | 3 => {
            let whole = len.saturating_sub(ip);
            let lens = [whole, whole + 1, whole.saturating_sub(1), 0, 19, 20, 49, 50, 51, 70, 78, 1500, 1501, 0xffff];
            (ip + 2, word(*lens.choose(random).unwrap()))
        }
        4 | 5 => (ip + 6, word(*[0, 0x2000, 0x4000, 0x8000, 1, 185, 0x2001, 0x1fff, 0x3fff].choose(random).unwrap())),
        6 => (ip + 8, pick(&[0, 1, 2, 64, 255], random)),
        7 => (ip + 9, pick(&[6, 17, 1, 0, 4, 47, 132, 255], random)),
        8 => (ip + 10, random.random::<[u8; 2]>().to_vec()),
        9 | 10 => (ip + 12, address(&world, random).to_vec()),
        11 | 12 => (ip + 16, address(&world, random).to_vec()),
        13 => {
            let port = *[world.config.port, 8472, 4789, 53, 0, 0xffff].choose(random).unwrap();
            (ip + *[20, 22, 24, 2].choose(random).unwrap(), word(port.into()))
        }
        14 => {
            let whole = len.saturating_sub(ip + 20);
            (ip + 24, word(*[whole, whole + 1, 0, 7, 8, 16, 0xffff].choose(random).unwrap()))
        }
        15 => (ip + 33, random.random::<[u8; 1]>().to_vec()),
        16 => (42, pick(&[8, 0, 0xff, 0x88, 0x0c, 0xf7], random)),
        17 => {
            let at = *[43, 44, 45, 46, 47, 48, 49].choose(random).unwrap();
            (at, pick(&[0, 1, 0x98, 0xff], random))
        }
        18 => {
            let mac: Mac =
                *[NODE_ONE_MAC, VTEP_ONE_MAC, VTEP_TWO_MAC, DEVICE_MAC, [0xff; 6], [1, 0, 0x5e, 0, 0, 1], [0; 6]]
                    .choose(random)
                    .unwrap();
            (*[0, 6, 50, 56].choose(random).unwrap(), mac.to_vec())
        }
        _ => {
            let kind = *[0x0800, 0x0806, 0x86dd, 0x8100, 0x88a8, 0, 46, 0x0801].choose(random).unwrap();
            (*[12, 62].choose(random).unwrap(), word(kind))
        }
    };
    if let Some(field) = input.get_mut(Input::HEAD + at..Input::HEAD + at + value.len()) {
        field.copy_from_slice(&value);
    }
}

/// Somebody's, or one that nobody may have.
fn address(world: &World, random: &mut impl Rng) -> [u8; 4] {
    let config = &world.config;
    let lease = world.leases.choose(random).unwrap();
    let own_len = config.subnet_mask.leading_ones();
    let own = config.subnet.to_be_bytes();
    match random.random_range(0..14) {
        0 => config.vtep_address.to_be_bytes(),
        1 => lease.peer.address,
        2 | 3 => within(lease.network, lease.len, random),
        4 | 5 => within(own, own_len, random),
        6 => own,
        7 => (config.subnet | !config.subnet_mask).to_be_bytes(),
        8 => within(config.network.to_be_bytes(), 16, random),
        9 => STRANGER,
        11 | 12 => beside(world, random),
        10 => *[
            [127, 0, 0, 1],
            [169, 254, 1, 1],
            [169, 253, 0, 1],
            [224, 0, 0, 1],
            [223, 255, 255, 255],
            [255; 4],
            [0; 4],
            [0, 0, 0, 1],
            [240, 0, 0, 1],
            [255, 255, 255, 254],
        ]
        .choose(random)
        .unwrap(),
        _ => random.random(),
    }
}
