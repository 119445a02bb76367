//! What the programs must make of a packet, said a second time: from the rules, over plain slices and lists, by no code that
//! the programs share. Tests run both on the same packet, and any difference is a mistake in one of them.
//!
//! Shared are the names of things ([`Event`], [`Config`], [`FlowKey`] and [`Original`] as data), and [`FlowKey::tag`] and
//! [`Original::digest`], which mean nothing but themselves.
//!
//! * `wire` — headers, read and written by their offsets (RFC 791, 768, 9293, 7348)
//! * `egress` — from pods and the host's stack to the underlay
//! * `ingress` — from the underlay to pods and the host's stack

mod egress;
mod ingress;
mod wire;

use std::vec::Vec;

pub use self::wire::{constants, flow_of, is_sum_right, put_sum, treatment};
use crate::{
    event::Event,
    flow::{FlowKey, Original},
    maps::Config,
    packet::Mac,
};

/// A program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// Egress of `flannel.<VNI>`.
    ToOverlay,
    /// Ingress of `flannel.<VNI>`.
    FromOverlay,
    /// Ingress of the external interface.
    FromUnderlay,
    /// Ingress of the host's side of a pod's veth.
    FromPod,
    /// Egress of the same.
    ToPod,
    /// The external interface's driver.
    XdpDecap,
    /// Egress of the external interface.
    ToUnderlay,
}

/// A host, with what it knows.
#[derive(Clone, Debug)]
pub struct World {
    /// Its constants.
    pub config: Config,
    /// Who leases what.
    pub leases: Vec<Lease>,
    /// What the operator has named: network address in wire order, prefix length.
    pub accepted: Vec<([u8; 4], u32)>,
    /// `flannel.<VNI>`.
    pub overlay: Overlay,
    /// The kernel's.
    pub routes: Vec<Route>,
    /// Whose flows take the stack.
    pub excluded: Excluded,
}

/// Ends of flows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Excluded {
    /// Network address in wire order, prefix length.
    pub addresses: Vec<([u8; 4], u32)>,
    /// IP protocol number, first and last port.
    pub ports: Vec<(u32, u16, u16)>,
}

/// What there is of `flannel.<VNI>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overlay {
    /// No agent has noted it.
    Unknown,
    /// The device that an agent noted is not there.
    Gone,
    /// It has this MAC.
    Is(Mac),
}

/// A route of the kernel's.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// Network address, wire order.
    pub network: [u8; 4],
    /// Prefix length.
    pub len: u32,
    /// By `flannel.<VNI>`, to this next hop; [`None`] for any other device.
    pub next_hop: Option<[u8; 4]>,
    /// MAC of the next hop, where it has one.
    pub next_hop_mac: Option<Mac>,
}

/// A subnet and its VTEP.
#[derive(Clone, Copy, Debug)]
pub struct Lease {
    /// Network address, wire order.
    pub network: [u8; 4],
    /// Prefix length.
    pub len: u32,
    /// Who leases it.
    pub peer: Peer,
}

/// Another host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Of its VTEP, wire order.
    pub address: [u8; 4],
    /// Of its vxlan device.
    pub vtep_mac: Mac,
    /// The underlay's next hop towards it, where that is resolved.
    pub next_hop_mac: Option<Mac>,
    /// Whether the underlay has a route to it.
    pub has_route: bool,
    /// Whether it is on the same link as this host.
    pub is_on_link: bool,
    /// The largest packet that fits on the way to it, where that is less than the overlay's MTU, in bytes.
    pub smaller_mtu: Option<u16>,
}

/// A packet that a program sees.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// From the Ethernet header on.
    pub frame: &'a [u8],
    /// Whether it is to be segmented, into neither TCP nor UDP: the kernel makes no room in such a packet.
    pub is_gso: bool,
    /// `tc_index`.
    pub note: u16,
    /// By which this host tells it from others.
    pub told_by: ToldBy,
    /// What is known of its flow.
    pub known: Known,
}

/// What rules, queues and routes of a host tell a packet from others by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ToldBy {
    /// `mark`.
    pub mark: u32,
    /// `priority`.
    pub priority: u32,
}

/// When the stack let a packet of a flow out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// To the overlay, lately.
    pub egress: bool,
    /// To the pod, lately.
    pub ingress: bool,
    /// The pod's link is gone.
    pub is_gone: bool,
    /// The pod's MAC.
    pub pod_mac: Mac,
    /// The MAC that its packets come from.
    pub gateway_mac: Mac,
    /// As what the stack lets its packets out to the overlay.
    pub sent_as: FlowKey,
    /// How the stack told them from others.
    pub told_by: ToldBy,
    /// Their TOS octet, without its two bits of congestion notification.
    pub dscp: u8,
    /// As what it lets them out to the pod.
    pub received_as: FlowKey,
    /// What is left where the packet's note leads to.
    pub original: Original,
    /// The MAC that the pod at this veth last sent from, of what took the stack.
    pub sender: Option<Mac>,
    /// How peers sent their last packets.
    pub heard: LastHeard,
}

/// How a packet of a peer came last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LastHeard {
    /// None came.
    #[default]
    Never,
    /// In a tunnel.
    InTunnel,
    /// Without one.
    Directly,
}

/// What must become of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fate {
    /// What is counted; [`None`] where nothing is.
    pub event: Option<Event>,
    /// The whole frame, behind XDP metadata where there is some.
    pub frame: Frame,
    /// `tc_index`.
    pub note: u16,
    /// What it is told from others by.
    pub told_by: ToldBy,
    /// What is known of its flow from then on.
    pub flow: FlowChange,
    /// What is left where the packet's note leads to, but for the hash, which is the kernel's; [`None`] where it is as before.
    pub original: Option<Original>,
    /// Which VTEP is known to be alive.
    pub heard: Option<[u8; 4]>,
    /// Its packet was in no tunnel.
    pub is_heard_directly: bool,
    /// What is counted for which VTEP.
    pub traffic: Option<Counted>,
    /// The MAC that the pod at this veth is known to send from, from then on.
    pub sender: Option<Mac>,
}

/// A packet between this host and a VTEP: its address, and the bytes of the packet without any header of the link or the tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counted {
    /// To it.
    Sent([u8; 4], usize),
    /// From it.
    Received([u8; 4], usize),
}

/// The bytes of a packet afterwards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// As before.
    Unchanged,
    /// These.
    Is(Vec<u8>),
    /// These, but for outer identification, source port and IPv4 checksum, which are zero here.
    InTunnel(Vec<u8>),
}

/// What becomes of what is known of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowChange {
    /// Nothing.
    Unchanged,
    /// It is forgotten.
    Removed,
    /// The one of which the packet was before the stack is forgotten.
    OriginalRemoved(FlowKey),
    /// The stack let a packet of it out to the overlay, now.
    Egress {
        /// Which flow.
        key: FlowKey,
        /// What the stack made of it.
        sent_as: FlowKey,
        /// How it told it from others.
        told_by: ToldBy,
        /// The TOS octet, without its two bits of congestion notification.
        dscp: u8,
    },
    /// The stack let a packet of it out to the pod, now.
    Ingress {
        /// Which flow.
        key: FlowKey,
        /// What the stack made of it.
        received_as: FlowKey,
        /// The frame's destination.
        pod_mac: Mac,
        /// The frame's source.
        gateway_mac: Mac,
    },
}

impl Fate {
    fn unchanged(event: Event, packet: Packet<'_>) -> Self {
        Self {
            event: Some(event),
            frame: Frame::Unchanged,
            note: packet.note,
            told_by: packet.told_by,
            flow: FlowChange::Unchanged,
            original: None,
            heard: None,
            is_heard_directly: false,
            traffic: None,
            sender: packet.known.sender,
        }
    }
}

/// What a program tells another in `tc_index`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Note {
    /// Nothing.
    None,
    /// `from_pod` left a packet of this flow to the stack.
    FromPod(FlowKey),
    /// `to_overlay` left the packet to the kernel.
    HandedOn,
    /// `from_underlay` let a packet of this flow in.
    Admitted(FlowKey),
    /// `from_overlay` saw a packet of this flow come out of the tunnel.
    Received(FlowKey),
}

impl World {
    /// What a program must make of a packet. `frame` has at least an Ethernet header, and for TC programs an IPv4 header where
    /// its type says so (the kernel runs these on no other).
    pub fn fate(&self, program: Program, packet: Packet<'_>) -> Fate {
        match program {
            Program::ToOverlay => self.to_overlay(packet),
            Program::FromOverlay => self.ingress_of_overlay(packet),
            Program::FromUnderlay => self.ingress_of_underlay(packet),
            Program::FromPod => self.ingress_of_pod(packet),
            Program::ToPod => self.to_pod(packet),
            Program::XdpDecap => self.xdp_decap(packet),
            Program::ToUnderlay => self.to_underlay(packet),
        }
    }

    /// A note as `tc_index` has it.
    pub fn note(&self, note: Note) -> u16 {
        let (kind, tag) = match note {
            Note::None => return 0,
            Note::FromPod(key) => (0b100, key.tag(self.config.vni)),
            Note::HandedOn => (0b101, self.config.vni),
            Note::Admitted(key) => (0b110, key.tag(self.config.vni)),
            Note::Received(key) => (0b111, key.tag(self.config.vni)),
        };
        kind << 13 | (tag % (1 << 13)) as u16
    }

    /// Whether a note is of this kind, whatever its tag.
    fn is_note(&self, note: u16, kind: fn(FlowKey) -> Note) -> bool {
        self.note(kind(FlowKey::default())) >> 13 == note >> 13
    }

    /// The flow that a packet had before the stack, where what was left there is this packet's, and whether nothing but addresses,
    /// ports and TTL was changed. Frames have no hash here.
    fn original(&self, packet: Packet<'_>, after: FlowKey) -> Option<(FlowKey, bool)> {
        let Original { key, digest, hash, treatment } = packet.known.original;
        let is_its = digest == Original::digest(&key, wire::constants(packet.frame, wire::ETHERNET)) && hash == 0;
        let is_same = treatment == wire::treatment(packet.frame, wire::ETHERNET, 0).digest();
        (is_its && key.protocol == after.protocol).then_some((key, is_same))
    }

    /// What is left of a packet that goes on to the stack.
    fn left(&self, packet: Packet<'_>, kind: wire::Kind, key: FlowKey) -> Option<Original> {
        let is_left = self.may_bypass() && kind == wire::Kind::Data;
        let (constants, treatment) =
            (wire::constants(packet.frame, wire::ETHERNET), wire::treatment(packet.frame, wire::ETHERNET, 1));
        is_left.then(|| Original::new(key, constants, treatment, 0))
    }

    /// Whether a flow has an end that is excluded, under one of its names.
    fn is_excluded(&self, names: [FlowKey; 2]) -> bool {
        let Excluded { addresses, ports } = &self.excluded;
        names.iter().any(|key| {
            let ends = [(key.local, key.local_port), (key.remote, key.remote_port)];
            ends.into_iter().any(|(address, port)| {
                let port = u16::from_be_bytes(port);
                addresses.iter().any(|(network, len)| wire::is_within(address, *network, *len))
                    || ports
                        .iter()
                        .any(|(protocol, first, last)| *protocol == key.protocol && (*first..=*last).contains(&port))
            })
        })
    }

    /// Who leases the subnet of an address: a lease of the Network's own length before any other, else the longest.
    fn leaseholder(&self, address: [u8; 4]) -> Option<&Peer> {
        let rank = |lease: &&Lease| (self.is_of_grid(lease), lease.len);
        let holds = |lease: &&Lease| wire::is_within(address, lease.network, lease.len);
        self.leases.iter().filter(holds).max_by_key(rank).map(|lease| &lease.peer)
    }

    /// Whether an address is in the Network, where its leases are on a grid.
    fn is_of_network(&self, address: [u8; 4]) -> bool {
        let Config { network, slot_shift, slots, .. } = self.config;
        let end = u64::from(network) + (u64::from(slots) << slot_shift);
        (u64::from(network)..end).contains(&u64::from(u32::from_be_bytes(address)))
    }

    fn is_of_grid(&self, lease: &Lease) -> bool {
        let Config { network, slot_shift, slots, .. } = self.config;
        let first = u64::from(network);
        let end = first + (u64::from(slots) << slot_shift);
        lease.len + slot_shift == 32 && (first..end).contains(&u64::from(u32::from_be_bytes(lease.network)))
    }

    /// Whether a packet to a peer goes without a tunnel: where the operator wants that, both are on one link, and the peer does
    /// it so, as far as is known, or can do nothing else.
    fn is_direct(&self, peer: &Peer, heard: LastHeard) -> bool {
        let is_wanted = self.config.flags & Config::DIRECT != 0;
        is_wanted && peer.has_route && peer.is_on_link && (heard != LastHeard::InTunnel || self.has_no_tunnel())
    }

    fn has_no_tunnel(&self) -> bool {
        self.config.flags & Config::NO_TUNNEL != 0
    }

    fn is_peer(&self, address: [u8; 4]) -> bool {
        self.leases.iter().any(|lease| lease.peer.address == address)
    }

    fn is_named(&self, address: [u8; 4]) -> bool {
        self.accepted.iter().any(|(network, len)| wire::is_within(address, *network, *len))
    }

    /// The kernel's route to an address: the longest.
    fn route(&self, address: [u8; 4]) -> Option<&Route> {
        let leads = |route: &&Route| wire::is_within(address, route.network, route.len);
        self.routes.iter().filter(leads).max_by_key(|route| route.len)
    }

    fn is_of_own_subnet(&self, address: [u8; 4]) -> bool {
        let len = self.config.subnet_mask.leading_ones();
        wire::is_within(address, self.config.subnet.to_be_bytes(), len)
    }

    fn own_address(&self) -> [u8; 4] {
        self.config.vtep_address.to_be_bytes()
    }

    fn may_bypass(&self) -> bool {
        self.config.bypass_time > 0
    }
}
