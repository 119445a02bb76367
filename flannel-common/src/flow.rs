//! What identifies a flow to the network between the hosts.

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

    proptest! {
        #[test]
        fn stays_in_range(hash: u32, min in 1u16..60000, span in 1u16..5000) {
            let ports = SourcePorts { min, max: min + span };
            let port = ports.of(hash);
            prop_assert!(port >= ports.min && port < ports.max);
        }
    }
}
