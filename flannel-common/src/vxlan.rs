//! VXLAN (RFC 7348) as flannel uses it: IPv4 inside IPv4, no group policy, no generic protocol extension.

use core::fmt;

use crate::packet::Mac;

/// UDP destination port that the Linux kernel, and so flannel, uses when none is configured. (IANA's is 4789.)
pub const DEFAULT_PORT: u16 = 8472;

/// Outer IPv4 (20), UDP (8), VXLAN (8) and inner Ethernet (14) header: what encapsulation adds to an Ethernet frame,
/// and what the overlay's MTU is smaller by.
pub const OVERHEAD: u16 = 50;

/// The made-up MAC of the next hops that the agent's routes into the overlay have. By it the programs know that a packet
/// is theirs to encapsulate: what somebody else's route leads to another next hop is the kernel's. Locally administered.
pub const NEXT_HOP_MAC: Mac = [0x02, 0, 0, 0, 0, 0x01];

/// The next hops that an agent's shared routes can have, in host order, in the order of preference. They are nobody's:
/// link-local, RFC 7600's dummy address, and those of documentation (RFC 5737).
pub const NEXT_HOPS: [u32; 5] = [0xa9fe_0101, 0xc000_0008, 0xc000_0201, 0xc633_6401, 0xcb00_7101];

/// A VXLAN network identifier: 24 bits, and small enough that `flannel.<VNI>` is a valid interface name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Vni(u32);

impl Vni {
    /// flannel's VNI when none is configured.
    pub const DEFAULT: Self = Self(1);
    /// The largest VNI with which `flannel.<VNI>` fits an interface name (15 bytes, `IFNAMSIZ` less the NUL).
    pub const MAX: Self = Self(9_999_999);

    /// The VNI of that number.
    ///
    /// # Errors
    /// [`InvalidVni`] beyond [`Vni::MAX`].
    pub const fn new_checked(number: u32) -> Result<Self, InvalidVni> {
        if number <= Self::MAX.0 { Ok(Self(number)) } else { Err(InvalidVni(number)) }
    }

    /// The number, below 2^24.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A number that is no usable VNI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidVni(pub u32);

impl fmt::Display for InvalidVni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(number) = self;
        write!(f, "VNI {number} is out of range: use 0 to {}", Vni::MAX)
    }
}

impl core::error::Error for InvalidVni {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_vni_makes_the_longest_interface_name() {
        assert_eq!(format!("flannel.{}", Vni::MAX).len(), 15);
        assert_eq!(Vni::new_checked(9_999_999), Ok(Vni::MAX));
        assert_eq!(Vni::new_checked(10_000_000), Err(InvalidVni(10_000_000)));
        assert_eq!(Vni::new_checked(0).map(Vni::get), Ok(0));
    }
}
