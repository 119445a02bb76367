//! Flows that bypass the host's stack.
//!
//! A flow is bypassed only while it is certain what the stack would do with it: where the stack lets a packet out
//! (`to_overlay`, `to_pod`), that is noted, and on the other side of the stack (`from_pod`, `from_underlay`) the next packets
//! of the same flow may go past it, until the note is too old. What the stack refuses comes out nowhere.
//!
//! What netfilter translates has other addresses and ports on the two sides; what was on the other side is told by
//! [`originals`]. Besides, a packet may have nothing changed but its TTL, and get a mark and a priority: that is all that is made
//! past the stack as well. A flow of whose packets the stack changes more stays with it.
//!
//! conntrack sees every packet that begins or ends a connection: SYN, FIN and RST never bypass, and take the flow's
//! notes away, on either side of the stack.

use core::mem::MaybeUninit;

use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use flannel_common::{
    event::Event,
    flow::{Egress, Flow, FlowKey, Ingress, dscp},
    maps::{Config, gone_slot},
    packet::Mac,
};
use network_types::{
    eth::EthHdr,
    ip::{IpProto, Ipv4Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use crate::{
    excluded::is_excluded,
    maps::{CONFIG, FLOWS, GONE, NOTED, PODS, VTEP_ADDRESSES},
    originals::{self, Found},
    packet::{Headers, Note, Packet, fill_with_zeros},
};

/// The fragment offset within `Ipv4Hdr::frags`, and more fragments with it (RFC 791).
const FRAGMENT_OFFSET_MASK: u16 = 0x1fff;
const FRAGMENT_MASK: u16 = 0x2000 | FRAGMENT_OFFSET_MASK;

/// The veth of a flow that came out at several, whose pods all send from its MAC: for a while all is left to the stack. What is
/// filled with zeros has it.
const AMBIGUOUS: u32 = 0;

/// What a packet is to its flow.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// One of many.
    Data,
    /// It begins or ends a connection.
    Turn,
    /// It has no ports that can be read: a fragment, options, another protocol.
    Other,
}

/// A packet's place in its flow, as the local pod sees it.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) key: FlowKey,
    pub(crate) kind: Kind,
    /// Bytes of TCP or UDP header.
    pub(crate) header_len: u32,
}

/// Which end of a packet the local pod is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// It sends.
    Egress,
    /// It receives.
    Ingress,
}

/// Reads the flow of the IPv4 packet at `offset`, a constant.
#[inline(always)]
pub(crate) fn place(packet: &impl Headers, ip: &Ipv4Hdr, offset: usize, direction: Direction) -> Place {
    let is_plain = ip.vihl == 0x45 && u16::from_be_bytes(ip.frags) & FRAGMENT_MASK == 0;
    let transport = offset + Ipv4Hdr::LEN;
    let mut ports = ([0; 2], [0; 2]);
    let mut kind = Kind::Other;
    let mut header_len = 0;
    if is_plain && ip.proto == IpProto::Tcp as u8 {
        if let Some(tcp) = packet.header::<TcpHdr>(transport) {
            let is_turn = tcp.syn() | tcp.fin() | tcp.rst() != 0;
            kind = if is_turn { Kind::Turn } else { Kind::Data };
            ports = (tcp.source, tcp.dest);
            header_len = u32::from(tcp.doff()) * 4;
        }
    } else if is_plain
        && ip.proto == IpProto::Udp as u8
        && let Some(udp) = packet.header::<UdpHdr>(transport)
    {
        kind = Kind::Data;
        ports = (udp.src, udp.dst);
        header_len = UdpHdr::LEN as u32;
    }
    let (source, destination) = ports;
    let protocol = u32::from(ip.proto);
    let key = match direction {
        Direction::Egress => {
            FlowKey { local: ip.src_addr, remote: ip.dst_addr, local_port: source, remote_port: destination, protocol }
        }
        Direction::Ingress => {
            FlowKey { local: ip.dst_addr, remote: ip.src_addr, local_port: destination, remote_port: source, protocol }
        }
    };
    Place { key, kind, header_len }
}

impl Place {
    /// As what the stack let one of the flow's packets from the pod out lately, if that had the same differentiated services
    /// field. Its mark and priority are the packet's from then on, whatever comes of it: to keep them until that is known, the
    /// stack of `from_pod` has no room.
    #[inline(always)]
    pub(crate) fn fresh_egress(&self, packet: &Packet<'_>, config: &Config, now: u64, tos: u8) -> Option<FlowKey> {
        if !self.may_bypass(config) {
            return None;
        }
        // SAFETY: of a flow that an entry leads to.
        let (released, of_service, sent_as) = known(&self.key, |flow| unsafe {
            let egress = &raw const (*flow).egress;
            packet.set_mark_and_priority((
                (&raw const (*egress).mark).read_volatile(),
                (&raw const (*egress).priority).read_volatile(),
            ));
            (
                (&raw const (*egress).released).read_volatile(),
                (&raw const (*egress).dscp).read_volatile(),
                (&raw const (*egress).sent_as).read_volatile(),
            )
        })?;
        let is_fresh = age(released, now) < config.bypass_time && of_service == dscp(tos);
        is_fresh.then_some(sent_as)
    }

    /// What is known of the flow's packets to the pod, where the stack let one out lately.
    #[inline(always)]
    pub(crate) fn fresh_ingress(&self, config: &Config, now: u64) -> Option<Ingress> {
        if !self.may_bypass(config) {
            return None;
        }
        let ingress = known_ingress(&self.key)?;
        (age(ingress.released, now) < config.bypass_time && !is_gone(ingress.veth)).then_some(ingress)
    }

    /// Whether it is a packet that may bypass the stack at all. One that begins or ends a connection takes the flow's notes
    /// away.
    #[inline(always)]
    fn may_bypass(&self, config: &Config) -> bool {
        // A constant to the verifier, which leaves out what follows.
        if config.bypass_time == 0 {
            return false;
        }
        self.forget_turn(config);
        self.kind == Kind::Data
    }

    /// Takes the flow's notes away where the packet begins or ends a connection.
    #[inline(always)]
    pub(crate) fn forget_turn(&self, config: &Config) {
        if config.bypass_time != 0 && self.kind == Kind::Turn {
            forget(&self.key);
        }
    }
}

/// Forgets what is known of a flow.
#[inline(always)]
fn forget(key: &FlowKey) {
    // There may be nothing.
    let _absent = FLOWS.remove(key);
}

/// An entry of which nothing is known, to be filled in. (No closure does that: one that is called from two programs would be a
/// function, with a stack of its own.)
#[inline(always)]
fn blank(key: FlowKey) -> Option<&'static mut Flow> {
    // Always there.
    let flow = NOTED.get_ptr_mut(0)?;
    // SAFETY: the map's value for this CPU, of integers and byte arrays only. Programs on a CPU do not preempt each other at the
    // same side of a device, and only those of egress call this.
    let flow = unsafe {
        fill_with_zeros(&mut *flow.cast::<MaybeUninit<Flow>>());
        &mut *flow
    };
    flow.key = key;
    Some(flow)
}

/// Puts a whole entry in the place of the one before.
#[inline(always)]
fn remember(flow: &Flow) -> Result<(), i32> {
    FLOWS.insert(flow.key, flow, 0)
}

/// Whether the link is gone. Where the kernel has given its number to another one since, the agent has taken note of that.
#[inline(always)]
fn is_gone(link: u32) -> bool {
    // SAFETY: a map value lives as long as the program; one aligned load.
    GONE.get_ptr(gone_slot(link)).is_some_and(|gone| unsafe { gone.read_volatile() } == link)
}

#[inline(always)]
fn known_egress(key: &FlowKey) -> Option<Egress> {
    // SAFETY: of a flow that an entry leads to.
    known(key, |flow| unsafe { (&raw const (*flow).egress).read_volatile() })
}

#[inline(always)]
fn known_ingress(key: &FlowKey) -> Option<Ingress> {
    // SAFETY: as above.
    known(key, |flow| unsafe { (&raw const (*flow).ingress).read_volatile() })
}

/// A part of what is known of a flow, which is read as volatile.
#[inline(always)]
fn known<T>(key: &FlowKey, read: impl FnOnce(*const Flow) -> T) -> Option<T> {
    let entry = FLOWS.get_ptr(key)?;
    let part = read(entry);
    // SAFETY: a map value lives as long as the program. The kernel may give it to another flow meanwhile, and writes it from
    // its beginning, where the key is: so the key is read last.
    let owner = unsafe { (&raw const (*entry).key).read_volatile() };
    (owner == *key).then_some(part)
}

/// Now, as flows have it. As exact as the kernel's tick.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: takes nothing and returns a number.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// How long ago the stack let a packet out; longer than anything where it never did, which soon after boot is not long ago.
#[inline(always)]
fn age(released: u64, now: u64) -> u64 {
    if released == 0 { u64::MAX } else { now.wrapping_sub(released) }
}

/// A flow that the stack let a packet of out: before and after.
pub(crate) struct Released {
    original: FlowKey,
    sent_as: FlowKey,
    /// The TOS octet: where in the packet it is later depends on the tunnel, and a place that is not a constant may not be read
    /// where the agent lacks CAP_PERFMON.
    tos: u8,
}

/// Egress of `flannel.<VNI>`: what is to be noted of a packet that `from_pod` left to the stack, if it gets away, and whether
/// the stack changed more of it: its flow is forgotten then. Of one answer with three forms the compiler loads what was never
/// stored before it looks which one it is, and the verifier lets only agents with CAP_PERFMON do so (`allow_uninit_stack`).
#[inline(always)]
pub(crate) fn released(packet: &Packet<'_>, config: &Config, is_changed: &mut bool) -> Option<Released> {
    if config.bypass_time == 0 || !packet.is_ipv4() {
        return None;
    }
    let tag = packet.noted(Note::FromPod)?;
    let ip = packet.header::<Ipv4Hdr>(EthHdr::LEN)?;
    let place = place(packet, &ip, EthHdr::LEN, Direction::Egress);
    match place.kind {
        Kind::Data => {}
        Kind::Turn => {
            forget(&place.key);
            return None;
        }
        Kind::Other => return None,
    }
    match originals::find(packet, &ip, &place, tag, Direction::Egress) {
        Found::Same(original) => Some(Released { original, sent_as: place.key, tos: ip.tos }),
        Found::Changed(original) => {
            forget(&original);
            *is_changed = true;
            None
        }
        Found::Nothing => None,
    }
}

impl Released {
    /// Of a packet that is sent, in its tunnel or without one, and has still the mark and the priority that the stack gave it.
    #[inline(always)]
    pub(crate) fn note(&self, packet: &Packet<'_>) {
        let Self { original, sent_as, tos } = *self;
        if is_excluded(&original, &sent_as) {
            return;
        }
        let Some(flow) = blank(original) else { return };
        let (mark, priority) = packet.mark_and_priority();
        flow.egress = Egress { released: now(), sent_as, mark, priority, dscp: dscp(tos), reserved: 0 };
        if let Some(ingress) = known_ingress(&original) {
            flow.ingress = ingress;
        }
        // Where there is no room, the flow goes on through the stack.
        let _full = remember(flow);
    }
}

/// Egress of the host's side of a pod's veth: a packet that came by the overlay came out of the stack.
#[inline(always)]
pub(crate) fn to_pod(packet: &Packet<'_>) -> Event {
    let config = CONFIG.load();
    if config.bypass_time == 0 || !packet.is_ipv4() {
        packet.forget_note();
        return Event::PodNotFromOverlay;
    }
    let Some(ip) = packet.header::<Ipv4Hdr>(EthHdr::LEN) else {
        return Event::PodNotFromOverlay;
    };
    let place = place(packet, &ip, EthHdr::LEN, Direction::Ingress);
    let tag = packet.noted(Note::Received);
    // The note has served: the pod may send the packet on.
    packet.forget_note();
    let Some(tag) = tag else {
        return Event::PodNotFromOverlay;
    };
    if place.kind == Kind::Turn {
        forget(&place.key);
    }
    if place.kind != Kind::Data || !config.is_local(u32::from_be_bytes(ip.dst_addr)) {
        return Event::PodReceived;
    }
    let original = match originals::find(packet, &ip, &place, tag, Direction::Ingress) {
        Found::Same(original) => original,
        Found::Changed(original) => {
            forget(&original);
            return Event::PodChanged;
        }
        Found::Nothing => return Event::PodReceived,
    };
    let Some(ethernet) = packet.header::<EthHdr>(0) else {
        return Event::PodReceived;
    };
    let (now, veth) = (now(), packet.device());
    if !is_of_pod(veth, ethernet.dst_addr) || is_excluded(&original, &place.key) {
        return Event::PodReceived;
    }
    // SAFETY: of a flow that an entry leads to.
    let before = known(&original, |flow| unsafe {
        ((&raw const (*flow).ingress.released).read_volatile(), (&raw const (*flow).ingress.veth).read_volatile())
    });
    let (released, before) = before.unwrap_or_default();
    let age = age(released, now);
    if before == AMBIGUOUS && age < 2 * config.bypass_time {
        return Event::PodReceived;
    }
    let is_ambiguous = before != veth && age < config.bypass_time;
    let Some(flow) = blank(original) else { return Event::PodReceived };
    if is_ambiguous {
        // Too old already to be fresh.
        flow.ingress.released = now.wrapping_sub(config.bypass_time);
    } else {
        let (pod_mac, gateway_mac) = (ethernet.dst_addr, ethernet.src_addr);
        flow.ingress = Ingress { released: now, received_as: place.key, veth, pod_mac, gateway_mac };
    }
    if let Some(egress) = known_egress(&original) {
        flow.egress = egress;
    }
    if remember(flow).is_ok() && !is_ambiguous { Event::PodReleased } else { Event::PodReceived }
}

/// Ingress of the host's side of a pod's veth: notes which MAC the pod sends from, of packets that take the stack. Those are
/// ARP and the first of each flow, and one in a while of every other.
#[inline(always)]
pub(crate) fn note_pod(packet: &Packet<'_>) {
    let (veth, Some(ethernet)) = (packet.device(), packet.header::<EthHdr>(0)) else { return };
    if !is_of_pod(veth, ethernet.src_addr) {
        // Where there is no room, what is for the pod goes on through the stack.
        let _full = PODS.insert(veth, ethernet.src_addr, 0);
    }
}

/// Whether the pod at a veth sends from a MAC. A bridge floods what is for a MAC that it does not know the port of, so that a
/// copy for each pod passes [`to_pod`]; and another pod's stack would take what is put into it past the bridge.
#[inline(always)]
fn is_of_pod(veth: u32, mac: Mac) -> bool {
    // SAFETY: a map value lives as long as the program. If another veth's comes in its place meanwhile, it is compared, and
    // believed only where it is the same.
    unsafe { PODS.get(veth) }.is_some_and(|of_pod| *of_pod == mac)
}

/// Whether a pod's packet is for a VTEP's tunnel port: only hosts may send these, since a masqueraded one would look like
/// its host's.
#[inline(always)]
pub(crate) fn is_tunnel(packet: &Packet<'_>, config: &Config, ip: &Ipv4Hdr) -> bool {
    // A later fragment has payload where the port would be. None reaches back to the port: offsets count eight bytes.
    let is_later_fragment = u16::from_be_bytes(ip.frags) & FRAGMENT_OFFSET_MASK != 0;
    if ip.proto != IpProto::Udp as u8 || is_later_fragment {
        return false;
    }
    // With options the port is elsewhere.
    let udp = packet.header_at::<UdpHdr>(EthHdr::LEN + usize::from(ip.ihl()));
    if udp.is_none_or(|udp| udp.dst != config.port.to_be_bytes()) {
        return false;
    }
    // SAFETY: the value is only tested for presence.
    let is_peer = unsafe { VTEP_ADDRESSES.get(ip.dst_addr) }.is_some();
    is_peer || u32::from_be_bytes(ip.dst_addr) == config.vtep_address
}
