//! Flows: what identifies one to the network between the hosts, what is remembered of one that may bypass the host's stack,
//! and of a packet while it is in the stack.

use crate::packet::Mac;

/// A flow as its local pod sees it. All in wire order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// The local pod's address.
    pub local: [u8; 4],
    /// The other end's.
    pub remote: [u8; 4],
    /// The local pod's port.
    pub local_port: [u8; 2],
    /// The other end's.
    pub remote_port: [u8; 2],
    /// IP protocol number, zero-extended: no byte of a map's key may be undefined.
    pub protocol: u32,
}

impl FlowKey {
    /// Bits of [`FlowKey::tag`].
    pub const TAG_MASK: u32 = 0x1fff;

    /// A digest of 13 bits, for the note that a packet carries through the stack: one that comes out translated has
    /// another, but for one in 8,192. The VNI tells overlays apart that share an interface.
    #[inline(always)]
    pub fn tag(&self, vni: u32) -> u32 {
        let rest = self.ports() | u64::from(self.protocol ^ vni << 8) << 32;
        (mix(self.addresses(), rest) >> 51) as u32 & Self::TAG_MASK
    }

    #[inline(always)]
    fn addresses(&self) -> u64 {
        let word = |bytes: [u8; 4]| u64::from(u32::from_ne_bytes(bytes));
        word(self.local) | word(self.remote) << 32
    }

    #[inline(always)]
    fn ports(&self) -> u64 {
        let ports = [self.local_port[0], self.local_port[1], self.remote_port[0], self.remote_port[1]];
        u64::from(u32::from_ne_bytes(ports))
    }
}

/// What is known of a flow, as it was before the host's stack. Times are those at which the stack let a packet of it out, in
/// nanoseconds of CLOCK_MONOTONIC; 0 for never.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Whose this is. The kernel may give an entry to another flow while a program looks at it: who reads this last, and
    /// finds the flow that it looked for, has read what belongs to it.
    pub key: FlowKey,
    /// From the pod to the overlay.
    pub egress: Egress,
    /// From the overlay to the pod.
    pub ingress: Ingress,
    /// Room for what a later version notes.
    #[cfg(feature = "next-layout")]
    pub reserved: [u64; 2],
}

/// What is known of a flow's packets from the pod.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Egress {
    /// When the stack let one out.
    pub released: u64,
    /// As what: the same flow, or another where netfilter translates.
    pub sent_as: FlowKey,
    /// The mark that the stack gave it.
    pub mark: u32,
    /// The priority that the stack gave it, by its TOS or by a rule.
    pub priority: u32,
    /// The differentiated services field that it had, as in [`dscp`]: the stack's priority follows it.
    pub dscp: u32,
    /// No byte may be undefined.
    pub reserved: u32,
}

/// What is known of a flow's packets to the pod.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ingress {
    /// When the stack let one out.
    pub released: u64,
    /// As what.
    pub received_as: FlowKey,
    /// The host's side of the pod's veth.
    pub veth: u32,
    /// The pod's MAC.
    pub pod_mac: Mac,
    /// The MAC that the pod's packets come from.
    pub gateway_mac: Mac,
}

impl Flow {
    /// Nothing is known yet.
    pub fn new(key: FlowKey) -> Self {
        Self {
            key,
            egress: Egress::default(),
            ingress: Ingress::default(),
            #[cfg(feature = "next-layout")]
            reserved: [0; 2],
        }
    }
}

const _: () = {
    assert!(size_of::<FlowKey>() == 16 && size_of::<Original>() == 32);
    assert!(size_of::<Flow>() == if cfg!(feature = "next-layout") { 112 } else { 96 });
};

/// The last packet of a tag that was left to the stack, as it was before. It is found by the tag, which the packet carries
/// through the stack, and told from others by what no translation changes. Two CPUs may write one at once: the digest of
/// what they left together fits neither's packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Original {
    /// Its flow.
    pub key: FlowKey,
    /// [`Original::digest`].
    pub digest: u64,
    /// The kernel's hash of its flow, or its socket's number for it. It stays with the packet, and nobody else can know it.
    pub hash: u32,
    /// [`Treatment::digest`], as it is to be on the other side of the stack.
    pub treatment: u32,
}

impl Original {
    /// How many there are: one for each tag and direction.
    pub const COUNT: u32 = 2 * (FlowKey::TAG_MASK + 1);

    /// Where that of a tag is, for packets from pods or to them.
    #[inline(always)]
    pub const fn index(tag: u32, is_from_pod: bool) -> u32 {
        tag & FlowKey::TAG_MASK | if is_from_pod { 0 } else { FlowKey::TAG_MASK + 1 }
    }

    /// That of a packet of the flow `key`.
    #[inline(always)]
    pub fn new(key: FlowKey, constants: Constants, treatment: Treatment, hash: u32) -> Self {
        Self { key, digest: Self::digest(&key, constants), hash, treatment: treatment.digest() }
    }

    /// A digest of a flow, and of what no translation changes in a packet.
    #[inline(always)]
    pub fn digest(key: &FlowKey, constants: Constants) -> u64 {
        let Constants { id_and_len, sequence, acknowledgement } = constants;
        let digest = mix(key.addresses(), key.ports() | u64::from(key.protocol) << 32);
        mix(digest ^ u64::from(id_and_len), u64::from(sequence) | u64::from(acknowledgement) << 32)
    }
}

/// What no translation changes in a packet, in the byte order of the packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Constants {
    /// Total length and identification of IPv4.
    pub id_and_len: u32,
    /// TCP's sequence number; of UDP nothing.
    pub sequence: u32,
    /// TCP's acknowledgement number; of UDP nothing.
    pub acknowledgement: u32,
}

/// What a packet is known by when it comes out of the stack: what a rule may change, and neither routing nor a translation does.
/// In the byte order of the packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Treatment {
    /// The TOS octet of IPv4.
    pub tos: u8,
    /// The TTL that it has after the stack.
    pub ttl: u8,
    /// IPv4's flags and fragment offset.
    pub frags: [u8; 2],
    /// TCP's header length, flags and window, zeros for its checksum, and its urgent pointer; of UDP nothing.
    pub control: u64,
    /// The eight octets behind a header without options; zeros where there are fewer.
    pub begin: u64,
}

impl Treatment {
    /// The part of [`Treatment::control`] in the octets of a TCP header from its header length on.
    #[inline(always)]
    pub const fn control(octets: [u8; 8]) -> u64 {
        const CHECKSUM: u64 = u64::from_ne_bytes([0, 0, 0, 0, 0xff, 0xff, 0, 0]);
        u64::from_ne_bytes(octets) & !CHECKSUM
    }

    /// Of 32 bits: nobody gains by finding two that are equal.
    #[inline(always)]
    pub const fn digest(self) -> u32 {
        let Self { tos, ttl, frags: [f0, f1], control, begin } = self;
        let ip = u32::from_ne_bytes([tos, ttl, f0, f1]) as u64;
        (mix(mix(ip, control), begin) >> 32) as u32
    }
}

/// The differentiated services code point within a TOS octet (RFC 2474), where it is there. What is beside it, congestion
/// notification, differs from packet to packet of a flow.
#[inline(always)]
pub const fn dscp(tos: u8) -> u32 {
    (tos & 0xfc) as u32
}

/// A round of Fibonacci hashing for each word.
#[inline(always)]
const fn mix(one: u64, two: u64) -> u64 {
    const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
    let hash = one.wrapping_mul(MULTIPLIER);
    (hash ^ hash >> 29 ^ two).wrapping_mul(MULTIPLIER)
}

/// The range of UDP source ports for encapsulated packets, host order: `net.ipv4.ip_local_port_range`, as the
/// kernel's vxlan device takes it when it has no range of its own.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourcePorts {
    /// First port.
    pub min: u16,
    /// Last port of the range; the kernel's formula never yields it.
    pub max: u16,
}

impl SourcePorts {
    /// The outer UDP source port of a flow with this packet hash: `udp_flow_src_port` (include/net/udp.h), so that
    /// paths chosen by hash (ECMP, bonds, receive queues) are those that the kernel's vxlan device would get.
    #[inline(always)]
    pub fn of(self, hash: u32) -> u16 {
        // Only the upper 16 bits decide; the kernel folds the lower ones in so that they do too.
        let hash = hash ^ (hash << 16);
        let span = self.max.wrapping_sub(self.min);
        ((u64::from(hash) * u64::from(span)) >> 32) as u16 + self.min
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LINUX: SourcePorts = SourcePorts { min: 32768, max: 60999 };

    #[test]
    fn the_kernels_formula() {
        assert_eq!(LINUX.of(0), 32768);
        assert_eq!(LINUX.of(u32::MAX), 32768);
        assert_eq!(LINUX.of(0xffff_0000), 60998);
        assert_eq!(LINUX.of(0x8000_0000), 32768 + (60999 - 32768) / 2);
    }

    #[test]
    fn tags_differ_by_each_part() {
        let key = FlowKey {
            local: [10, 5, 1, 2],
            remote: [10, 5, 2, 2],
            local_port: [0x9c, 0x40],
            remote_port: [0, 80],
            protocol: 6,
        };
        let tag = key.tag(1);
        assert!(tag <= FlowKey::TAG_MASK);
        assert_ne!(tag, key.tag(2));
        for other in [
            FlowKey { local: [10, 5, 1, 3], ..key },
            FlowKey { remote: [10, 5, 2, 3], ..key },
            FlowKey { local_port: [0x9c, 0x41], ..key },
            FlowKey { remote_port: [0, 81], ..key },
            FlowKey { protocol: 17, ..key },
        ] {
            assert_ne!(tag, other.tag(1), "{other:?}");
        }
    }

    #[test]
    fn digests_differ_by_each_part() {
        let key = FlowKey { local: [10, 5, 1, 2], remote: [10, 5, 2, 2], protocol: 6, ..FlowKey::default() };
        let constants = Constants { id_and_len: 1, sequence: 2, acknowledgement: 3 };
        let digest = Original::digest(&key, constants);
        for (key, constants) in [
            (FlowKey { local: [10, 5, 1, 3], ..key }, constants),
            (FlowKey { remote: [10, 5, 2, 3], ..key }, constants),
            (FlowKey { local_port: [0, 1], ..key }, constants),
            (FlowKey { remote_port: [0, 1], ..key }, constants),
            (FlowKey { protocol: 17, ..key }, constants),
            (key, Constants { id_and_len: 2, ..constants }),
            (key, Constants { sequence: 3, ..constants }),
            (key, Constants { acknowledgement: 4, ..constants }),
        ] {
            assert_ne!(digest, Original::digest(&key, constants), "{key:?} {constants:?}");
        }
    }

    #[test]
    fn treatments_differ_by_each_part() {
        let none = Treatment::default();
        for (at, treatment) in [
            Treatment { tos: 1, ..none },
            Treatment { ttl: 1, ..none },
            Treatment { frags: [0x40, 0], ..none },
            Treatment { control: 1, ..none },
            Treatment { control: 1 << 63, ..none },
            Treatment { begin: 1, ..none },
            Treatment { begin: 1 << 63, ..none },
        ]
        .into_iter()
        .enumerate()
        {
            assert_ne!(treatment.digest(), none.digest(), "{at}");
        }
        assert_eq!(dscp(0xbb), 0xb8);
    }

    #[test]
    fn each_tag_and_direction_has_a_place() {
        assert_eq!(Original::index(0, true), 0);
        assert_eq!(Original::index(0x1fff, true), 0x1fff);
        assert_eq!(Original::index(0, false), 0x2000);
        assert_eq!(Original::index(0x3fff, false), Original::COUNT - 1);
    }

    proptest! {
        /// As seldom equal as chance has it.
        #[test]
        fn tags_of_neighbours_collide_by_chance_only(port in 1u16..60000, host: u8) {
            let key = |port: u16, host: u8| FlowKey {
                local: [10, 5, 1, 2], remote: [10, 5, 2, host], local_port: port.to_be_bytes(),
                remote_port: [0, 80], protocol: 6,
            };
            let equal = (1..=64u16).filter(|step| key(port, host).tag(1) == key(port.wrapping_add(*step), host).tag(1));
            prop_assert!(equal.count() <= 3);
        }

        #[test]
        fn stays_in_range(hash: u32, min in 1u16..60000, span in 1u16..5000) {
            let ports = SourcePorts { min, max: min + span };
            let port = ports.of(hash);
            prop_assert!(port >= ports.min && port < ports.max);
        }
    }
}
