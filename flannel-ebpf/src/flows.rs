//! Flows that pass the host's stack by.
//!
//! A flow is bypassed only while it is certain what the stack would do with it: where the stack lets a packet out
//! unchanged (`to_overlay`, `to_pod`), that is noted, and on the other side of the stack (`from_pod`, `from_underlay`) the
//! next packets of the same flow may go past it, until the note is too old. Whether a packet was changed on its way is
//! told by the tag that it carries through the stack. What netfilter translates has another tuple on the two sides, and
//! what it refuses comes out nowhere.
//!
//! conntrack sees every packet that begins or ends a connection: SYN, FIN and RST never bypass, and take the flow's
//! notes away.

use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use flannel_common::{
    event::Event,
    flow::{Flow, FlowKey},
    maps::Config,
    packet::Mac,
};
use network_types::{
    eth::EthHdr,
    ip::{IpProto, Ipv4Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use crate::{
    maps::{CONFIG, FLOWS, PODS, VTEP_ADDRESSES},
    packet::{Headers, Note, Packet},
};

/// The fragment offset within `Ipv4Hdr::frags`, and more fragments with it (RFC 791).
const FRAGMENT_OFFSET_MASK: u16 = 0x1fff;
const FRAGMENT_MASK: u16 = 0x2000 | FRAGMENT_OFFSET_MASK;

/// The veth of a flow that came out at several, whose pods all send from its MAC: for a while all is left to the stack.
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
    /// The note of the flow, where the stack let a packet of it out lately in this direction. A packet that begins or
    /// ends a connection takes the note away.
    #[inline(always)]
    pub(crate) fn fresh(&self, config: &Config, direction: Direction, now: u64) -> Option<Flow> {
        // A constant to the verifier, which leaves out what follows.
        if config.bypass_time == 0 {
            return None;
        }
        match self.kind {
            Kind::Data => {}
            Kind::Turn => {
                // There may be none.
                let _absent = FLOWS.remove(self.key);
                return None;
            }
            Kind::Other => return None,
        }
        let flow = known(&self.key)?;
        let released = match direction {
            Direction::Egress => flow.egress,
            Direction::Ingress => flow.ingress,
        };
        (age(released, now) < config.bypass_time).then_some(flow)
    }
}

/// What is known of a flow.
#[inline(always)]
fn known(key: &FlowKey) -> Option<Flow> {
    let entry = FLOWS.get_ptr(key)?;
    // SAFETY: a map value lives as long as the program. The kernel may give it to another flow meanwhile, and writes it from
    // its beginning, where the key is: so the key is read last.
    let (mut flow, owner) = unsafe { (entry.read_volatile(), (&raw const (*entry).key).read_volatile()) };
    flow.key = owner;
    (owner == *key).then_some(flow)
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

/// Egress of `flannel.<VNI>`: a packet that `from_pod` saw, with the tag that it had there, came out of the stack.
#[inline(always)]
pub(crate) fn note_egress(place: &Place) {
    let flow = known(&place.key).unwrap_or(Flow::new(place.key));
    // A whole entry in the place of the one before. Where there is no room, the flow goes on through the stack.
    let _full = FLOWS.insert(place.key, Flow { egress: now(), ..flow }, 0);
}

/// Egress of the host's side of a pod's veth: a packet that came by the overlay, with the tag that it had there, came
/// out of the stack.
#[inline(always)]
pub(crate) fn to_pod(packet: &Packet<'_>) -> Event {
    let config = CONFIG.load();
    if config.bypass_time == 0 || !packet.is_ipv4() {
        packet.forget_note();
        return Event::PodUnnoted;
    }
    let Some(ip) = packet.header::<Ipv4Hdr>(EthHdr::LEN) else {
        return Event::PodUnnoted;
    };
    let place = place(packet, &ip, EthHdr::LEN, Direction::Ingress);
    let is_unchanged = packet.has_note(Note::Received(place.key.tag(config.vni)));
    // The note has served: the pod may send the packet on.
    packet.forget_note();
    if place.kind != Kind::Data || !is_unchanged || !config.is_local(u32::from_be_bytes(ip.dst_addr)) {
        return Event::PodUnnoted;
    }
    let Some(ethernet) = packet.header::<EthHdr>(0) else {
        return Event::PodUnnoted;
    };
    let (now, veth) = (now(), packet.device());
    if !is_of_pod(veth, ethernet.dst_addr) {
        return Event::PodUnnoted;
    }
    let before = known(&place.key).unwrap_or(Flow::new(place.key));
    let age = age(before.ingress, now);
    let flow = if before.veth == AMBIGUOUS && age < 2 * config.bypass_time {
        return Event::PodUnnoted;
    } else if before.veth != veth && age < config.bypass_time {
        // Too old already for `fresh`.
        Flow { ingress: now.wrapping_sub(config.bypass_time), veth: AMBIGUOUS, ..before }
    } else {
        Flow { ingress: now, veth, pod_mac: ethernet.dst_addr, gateway_mac: ethernet.src_addr, ..before }
    };
    match FLOWS.insert(place.key, flow, 0) {
        Ok(()) if flow.veth == veth => Event::PodReleased,
        _ => Event::PodUnnoted,
    }
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
