//! Flows: what identifies one to the network between the hosts, and what is remembered of one that may pass the host's
//! stack by.

use crate::packet::Mac;

/// A flow as its local pod sees it. All in wire order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
        let word = |bytes: [u8; 4]| u64::from(u32::from_ne_bytes(bytes));
        let ports = [self.local_port[0], self.local_port[1], self.remote_port[0], self.remote_port[1]];
        // Two rounds of Fibonacci hashing.
        const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
        let hash = (word(self.local) | word(self.remote) << 32).wrapping_mul(MULTIPLIER);
        let rest = word(ports) | u64::from(self.protocol ^ vni << 8) << 32;
        let hash = (hash ^ hash >> 29 ^ rest).wrapping_mul(MULTIPLIER);
        (hash >> 51) as u32 & Self::TAG_MASK
    }
}

/// What is known of a flow. Times are those at which the host's stack let a packet of it out unchanged, in nanoseconds
/// of CLOCK_MONOTONIC; 0 for never.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Whose this is. The kernel may give an entry to another flow while a program looks at it: who reads this last, and
    /// finds the flow that it looked for, has read what belongs to it.
    pub key: FlowKey,
    /// From the pod to the overlay.
    pub egress: u64,
    /// From the overlay to the pod.
    pub ingress: u64,
    /// The host's side of the pod's veth, as of `ingress`.
    pub veth: u32,
    /// The pod's MAC, as of `ingress`.
    pub pod_mac: Mac,
    /// The MAC that the pod's packets come from, as of `ingress`.
    pub gateway_mac: Mac,
    /// Room for what a later version notes.
    #[cfg(feature = "next-layout")]
    pub reserved: [u64; 2],
}

impl Flow {
    /// Nothing is known yet.
    pub const fn new(key: FlowKey) -> Self {
        Self {
            key,
            egress: 0,
            ingress: 0,
            veth: 0,
            pod_mac: [0; 6],
            gateway_mac: [0; 6],
            #[cfg(feature = "next-layout")]
            reserved: [0; 2],
        }
    }
}

const _: () =
    assert!(size_of::<FlowKey>() == 16 && size_of::<Flow>() == if cfg!(feature = "next-layout") { 64 } else { 48 });

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
