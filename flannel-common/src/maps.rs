//! Names, keys, values and sizes of the BPF maps, and the constants that are patched into the programs at load.
//!
//! Addresses are `u32` in host order where programs calculate with them and `[u8; 4]` in wire order where they are
//! copied to or from packets. No value has implicit padding.

use crate::{
    flow::SourcePorts,
    packet::{Mac, OuterHeader},
};

/// Changes whenever a key, a value or the meaning of a map changes. Part of the pin directory's name, because the
/// kernel adopts a pinned map without comparing its layout.
pub const ABI_VERSION: u32 = 14 + cfg!(feature = "next-layout") as u32;

/// Array: [`Config::slot`] of a destination -> VTEP id, 0 where nobody leases that subnet. One aligned 4-byte store
/// publishes or withdraws a peer.
pub const SUBNETS: &str = "SUBNETS";
/// LPM trie: prefix -> VTEP id, for leases outside the grid of [`SUBNETS`]. Consulted when that has no answer, so a
/// lease in the grid wins over one that overlaps it.
pub const PREFIXES: &str = "PREFIXES";
/// Array: VTEP id -> [`Vtep`]. Id 0 is no peer: of it only `ifindex` is set, to `flannel.<VNI>`. A peer's value in use is
/// not rewritten: a changed peer gets a new id.
pub const VTEPS: &str = "VTEPS";
/// Hash: VTEP address (wire order) -> VTEP id, any of those with this address. Tells an unknown sender from a known one.
pub const VTEP_ADDRESSES: &str = "VTEP_ADDRESSES";
/// LPM trie: prefix -> 1, for inner addresses that no lease covers and that the operator accepts. Consulted when the leases
/// have no answer.
pub const ACCEPTED: &str = "ACCEPTED";
/// Array: VTEP id -> [`Heard`]. Tells a host whose lease the store has lost from one that is gone, and what a host on the same
/// link sends in a tunnel from what it sends without.
pub const HEARD: &str = "HEARD";
/// Per-CPU array: VTEP id -> [`Traffic`], of the first [`MAX_COUNTED`] ids. Id 0 has what was admitted from no peer in particular
/// ([`Event::AdmittedByRoute`](crate::event::Event::AdmittedByRoute)).
pub const TRAFFIC: &str = "TRAFFIC";
/// LRU hash: [`FlowKey`](crate::flow::FlowKey) -> [`Flow`](crate::flow::Flow), for flows that may bypass the host's stack.
pub const FLOWS: &str = "FLOWS";
/// Array: [`Original::index`](crate::flow::Original::index) of a tag -> [`Original`](crate::flow::Original): the last packet
/// with that tag which was left to the stack.
pub const ORIGINALS: &str = "ORIGINALS";
/// LRU hash: the host's side of a pod's veth -> the MAC that the pod last sent from. A bridge that does not know where a MAC
/// is sends a copy of what is for it to every pod.
pub const PODS: &str = "PODS";
/// Array: [`gone_slot`] of a link -> the number of the link that went last of those with this slot, or 0. Of flows to a pod, those
/// of a link that is gone take the stack from that moment on; they are forgotten as soon as somebody gets to it.
pub const GONE: &str = "GONE";
/// LPM trie: prefix -> 1, for addresses whose flows take the stack, under the names before and after a translation.
pub const EXCLUDED: &str = "EXCLUDED";
/// Array: [`excluded_port`] -> a bit for each of 64 ports whose flows take the stack, likewise.
pub const EXCLUDED_PORTS: &str = "EXCLUDED_PORTS";
/// Per-CPU array: [`Event`](crate::event::Event) -> [`Counter`].
pub const COUNTERS: &str = "COUNTERS";
/// Per-CPU array: [`Event`](crate::event::Event) -> [`Drops`](crate::drops::Drops): samples of what was dropped.
pub const DROPS: &str = "DROPS";
/// The read-only global that holds [`Config`].
pub const CONFIG: &str = "CONFIG";

/// Every map that is pinned.
pub const PINNED: [&str; 15] = [
    SUBNETS,
    PREFIXES,
    VTEPS,
    VTEP_ADDRESSES,
    ACCEPTED,
    HEARD,
    TRAFFIC,
    FLOWS,
    ORIGINALS,
    PODS,
    GONE,
    EXCLUDED,
    EXCLUDED_PORTS,
    COUNTERS,
    DROPS,
];

/// The most slots that [`SUBNETS`] has: 16 MiB. A Network with more subnets keeps its leases in [`PREFIXES`].
pub const MAX_SLOTS: u32 = 1 << 22;
/// The most entries of [`PREFIXES`]; an entry takes memory only when it exists.
pub const MAX_PREFIXES: u32 = 1 << 17;
/// The most entries of [`ACCEPTED`].
pub const MAX_ACCEPTED: u32 = 1 << 10;

/// The most entries of [`TRAFFIC`]: 512 KiB for each CPU.
pub const MAX_COUNTED: u32 = 1 << 14;

/// The most flows that are remembered; the one not used for longest makes room.
pub const MAX_FLOWS: u32 = 1 << 16;

/// The most pods whose MAC is remembered. What is for others takes the stack.
pub const MAX_PODS: u32 = 1 << 12;

/// Entries of [`GONE`]. Links are numbered one after the other, so that so many can go before one takes another's place.
pub const GONE_SLOTS: u32 = 1 << 12;

/// Where in [`GONE`] a link is.
#[inline(always)]
pub const fn gone_slot(link: u32) -> u32 {
    link % GONE_SLOTS
}

/// The most entries of [`EXCLUDED`].
pub const MAX_EXCLUDED: u32 = 1 << 12;

/// Entries of [`EXCLUDED_PORTS`]: for the ports of TCP, and then those of UDP.
pub const EXCLUDED_WORDS: u32 = 2 * (1 << 16) / u64::BITS;

/// Where in [`EXCLUDED_PORTS`] a port (host order) is: which entry, and which bit of it.
#[inline(always)]
pub const fn excluded_port(is_udp: bool, port: u16) -> (u32, u64) {
    let first = if is_udp { EXCLUDED_WORDS / 2 } else { 0 };
    (first + port as u32 / u64::BITS, 1 << (port as u32 % u64::BITS))
}

/// When packets of a VTEP were last admitted, as [`heard_time`]; 0 for never.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// Any packet.
    pub last: u32,
    /// One that was not encapsulated.
    pub direct: u32,
}

impl Heard {
    /// Whether a host on the same link is to be sent packets without encapsulation: as it sends them itself, since it may
    /// refuse what comes by a device that its own routes to the sender do not use (`rp_filter` 1); and where it has sent nothing
    /// yet. After it has changed from one to the other, for up to two units what it did before.
    #[inline(always)]
    pub const fn is_direct(self) -> bool {
        let Self { last, direct } = self;
        last == 0 || direct != 0 && last.wrapping_sub(direct) <= 1
    }
}

/// The unit of [`HEARD`]: nanoseconds of CLOCK_MONOTONIC, as a power of two so that the program need not divide
/// (1.07 s).
pub const HEARD_UNIT_SHIFT: u32 = 30;

/// A time of CLOCK_MONOTONIC, in nanoseconds, as [`HEARD`] has it. Wraps after 146 years.
#[inline(always)]
pub const fn heard_time(monotonic: u64) -> u32 {
    (monotonic >> HEARD_UNIT_SHIFT) as u32
}

/// Constants of the programs.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// For how long a flow may bypass the stack after the stack let a packet of it out, in nanoseconds; 0 for never.
    pub bypass_time: u64,
    /// Network address of the overlay's Network, host order.
    pub network: u32,
    /// How far an offset into the Network is shifted right to give its slot: 32 - SubnetLen.
    pub slot_shift: u32,
    /// Slots in [`SUBNETS`].
    pub slots: u32,
    /// Network address of this host's lease, which is also its address on the overlay, host order.
    pub subnet: u32,
    /// Netmask of this host's lease.
    pub subnet_mask: u32,
    /// This host's VTEP address, host order.
    pub vtep_address: u32,
    /// The overlay's VXLAN network identifier.
    pub vni: u32,
    /// MTU of the overlay, in bytes of IPv4 packet.
    pub mtu: u32,
    /// Bytes of link-layer header in front of what the program's link of the underlay receives: 14 for Ethernet, 0 for a device
    /// without (tun, WireGuard).
    pub underlay_header_len: u16,
    /// MAC of the underlay device, zero for a device without.
    pub underlay_mac: Mac,
    /// UDP port of the tunnel, host order.
    pub port: u16,
    /// MAC of this host's vxlan device.
    pub vtep_mac: Mac,
    /// UDP source ports of encapsulated packets.
    pub source_ports: SourcePorts,
    /// [`Config::QUEUED`] and the like, or 0.
    pub flags: u32,
}

impl Config {
    /// What the stack routed to `flannel.<VNI>` goes through that device, and its queue, before it is encapsulated.
    pub const QUEUED: u32 = 1 << 0;
    /// A copy of what is encapsulated there is shown to who captures on the device.
    pub const SHOWN: u32 = 1 << 1;
    /// What is not put into pods right away is left in the tunnel, for others to see it there, or for the kernel to take it out.
    pub const LEFT_IN_TUNNEL: u32 = 1 << 2;
    /// Peers on the same link are sent packets without encapsulation (`DirectRouting`).
    pub const DIRECT: u32 = 1 << 3;
    /// There is no tunnel and no `flannel.<VNI>`: the stack's packets leave by the external interface, and come in by it
    /// (host-gw). With [`Config::DIRECT`].
    pub const NO_TUNNEL: u32 = 1 << 4;

    /// Whether this is among the flags. A constant to the verifier.
    #[inline(always)]
    pub const fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// The slot of an address (host order) in [`SUBNETS`]; [`None`] outside the Network.
    #[inline(always)]
    pub fn slot(&self, address: u32) -> Option<u32> {
        // Addresses below the Network wrap around to large offsets.
        let slot = address.wrapping_sub(self.network).checked_shr(self.slot_shift)?;
        (slot < self.slots).then_some(slot)
    }

    /// Whether an address (host order) lies in this host's lease.
    #[inline(always)]
    pub fn is_local(&self, address: u32) -> bool {
        address & self.subnet_mask == self.subnet
    }

    /// Whether an address (host order) of this host's lease can be a pod's: not the host's own, and not the next, which is the
    /// bridge's.
    #[inline(always)]
    pub fn is_pod(&self, address: u32) -> bool {
        self.is_local(address) && address.wrapping_sub(self.subnet) > 1
    }

    /// Whether an address (host order) is the directed broadcast of this host's lease.
    #[inline(always)]
    pub fn is_local_broadcast(&self, address: u32) -> bool {
        address == self.subnet | !self.subnet_mask
    }
}

/// A peer.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Vtep {
    /// What goes in front of each packet to it.
    #[cfg(not(feature = "next-layout"))]
    pub header: OuterHeader,
    /// Its VTEP address, host order.
    pub address: u32,
    /// The underlay's next hop towards it, wire order.
    pub next_hop: [u8; 4],
    /// The underlay device towards it; 0 where there is no route.
    pub ifindex: u32,
    /// [`Vtep::RESOLVED`] and the like, or 0.
    pub flags: u16,
    /// The largest IPv4 packet that fits on the way to it, in its tunnel, in bytes; 0 where that is the overlay's MTU.
    pub mtu: u16,
    /// What goes in front of each packet to it.
    #[cfg(feature = "next-layout")]
    pub header: OuterHeader,
}

impl Vtep {
    /// The header has the next hop's MAC. Without it the kernel resolves the next hop for each packet.
    pub const RESOLVED: u16 = 1 << 0;
    /// The peer is its own next hop, on a link with Ethernet headers.
    pub const ON_LINK: u16 = 1 << 1;
    /// The header has the MAC that the next hop had last, whether or not the kernel holds that for confirmed now.
    pub const HAS_MAC: u16 = 1 << 2;
    /// The kernel's routes name a next hop for each flow (several next hops, rules by mark or source port), or one with an
    /// IPv6 address: they are asked for each packet.
    pub const BY_FLOW: u16 = 1 << 3;

    /// The id whose entry names `flannel.<VNI>`.
    pub const OVERLAY_DEVICE: u32 = 0;

    /// An entry that names nobody.
    pub const UNUSED: Self =
        Self { header: OuterHeader([0; OuterHeader::LEN]), address: 0, next_hop: [0; 4], ifindex: 0, flags: 0, mtu: 0 };

    /// The largest IPv4 packet that is sent to it past the stack, which answers or fragments what is larger; of an overlay with
    /// an MTU.
    #[inline(always)]
    pub const fn path_mtu(&self, overlay_mtu: u32) -> u32 {
        if self.mtu == 0 { overlay_mtu } else { self.mtu as u32 }
    }
}

/// What `xdp_decap` leaves in front of a packet that it took out of the tunnel (XDP metadata), for `from_underlay`. Equal
/// for all packets of an overlay: the kernel aggregates only packets with equal metadata.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decapsulated {
    /// [`Decapsulated::MAGIC`], since other XDP programs may leave what they like.
    pub magic: u32,
    /// Of the tunnel.
    pub vni: u32,
}

impl Decapsulated {
    /// No number that others are likely to choose.
    pub const MAGIC: u32 = 0xf1a7_7e1d;

    /// That of an overlay.
    #[inline(always)]
    pub const fn of(vni: u32) -> Self {
        Self { magic: Self::MAGIC, vni }
    }
}

/// Packets and their bytes, as long as the packet was when the program saw it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    /// Packets; a segmentable packet counts once.
    #[cfg(not(feature = "next-layout"))]
    pub packets: u64,
    /// Bytes, from the Ethernet header on.
    pub bytes: u64,
    /// Packets; a segmentable packet counts once.
    #[cfg(feature = "next-layout")]
    pub packets: u64,
}

/// What went between this host and a VTEP, with and without a tunnel, and past the stack or not. Bytes are those of the pods'
/// IPv4 packets.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// What was sent to it.
    pub sent: Counter,
    /// What was admitted from it.
    pub received: Counter,
}

/// Of all CPUs.
impl core::iter::Sum for Traffic {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, more| Self {
            sent: [sum.sent, more.sent].into_iter().sum(),
            received: [sum.received, more.received].into_iter().sum(),
        })
    }
}

/// Of all CPUs; wraps around.
impl core::iter::Sum for Counter {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, more| Self {
            packets: sum.packets.wrapping_add(more.packets),
            bytes: sum.bytes.wrapping_add(more.bytes),
        })
    }
}

const _: () = {
    assert!(size_of::<Config>() == 64 && align_of::<Config>() == 8);
    assert!(size_of::<Vtep>() == 80 && align_of::<Vtep>() == 8);
    assert!(size_of::<Counter>() == 16);
    assert!(size_of::<Heard>() == 8);
    assert!(size_of::<Traffic>() == 32);
};

/// The values as aya reads and writes them.
#[cfg(feature = "user")]
mod user {
    use super::{Config, Counter, Heard, Traffic, Vtep};
    use crate::{
        drops::Drops,
        flow::{Flow, FlowKey, Original},
    };

    // SAFETY: #[repr(C)], integers and byte arrays only, no padding (the sizes are asserted above).
    unsafe impl aya::Pod for Config {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Vtep {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Counter {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Heard {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Traffic {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Drops {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FlowKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Flow {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Original {}
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: Config = Config {
        bypass_time: 1_000_000_000,
        network: 0x0a05_0000,
        slot_shift: 8,
        slots: 256,
        subnet: 0x0a05_0100,
        subnet_mask: 0xffff_ff00,
        vtep_address: 0xc0a8_4001,
        vni: 1,
        mtu: 1450,
        underlay_header_len: 14,
        underlay_mac: [2, 0, 0, 0, 1, 1],
        port: 8472,
        vtep_mac: [2, 0, 0, 0, 0, 1],
        source_ports: SourcePorts { min: 32768, max: 60999 },
        flags: 0,
    };

    #[test]
    fn each_port_has_a_bit() {
        assert_eq!(excluded_port(false, 0), (0, 1));
        assert_eq!(excluded_port(false, 65_535), (1023, 1 << 63));
        assert_eq!(excluded_port(true, 64), (1025, 1));
        assert_eq!(excluded_port(true, 65_535).0, EXCLUDED_WORDS - 1);
    }

    #[test]
    fn a_slot_is_arithmetic() {
        assert_eq!(CONFIG.slot(0x0a05_0000), Some(0));
        assert_eq!(CONFIG.slot(0x0a05_02ff), Some(2));
        assert_eq!(CONFIG.slot(0x0a05_ffff), Some(255));
        assert_eq!(CONFIG.slot(0x0a06_0000), None);
        assert_eq!(CONFIG.slot(0x0a04_ffff), None);
        assert_eq!(CONFIG.slot(0), None);
    }

    #[test]
    fn a_host_on_the_link_is_sent_packets_as_it_sends_them() {
        let is_direct = |last, direct| Heard { last, direct }.is_direct();
        assert!(is_direct(0, 0));
        assert!(is_direct(7, 7) && is_direct(8, 7));
        assert!(!is_direct(9, 7) && !is_direct(7, 0) && !is_direct(1, 0));
    }

    #[test]
    fn the_own_subnet() {
        assert!(CONFIG.is_local(0x0a05_0100) && CONFIG.is_local(0x0a05_01ff));
        assert!(!CONFIG.is_local(0x0a05_0200) && !CONFIG.is_local(0x0a05_00ff));
        assert!(CONFIG.is_local_broadcast(0x0a05_01ff) && !CONFIG.is_local_broadcast(0x0a05_02ff));
    }
}
