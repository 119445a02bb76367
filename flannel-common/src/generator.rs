//! What the frame generator of the benchmarks sends.

/// A frame and where it goes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generated {
    /// Number of the device that it is sent out on.
    pub ifindex: u32,
    /// The whole frame.
    pub frame: [u8; Self::LEN],
}

impl Generated {
    /// Bytes of a tunnel packet with a UDP datagram of 64 bytes: Ethernet, IPv4, UDP, VXLAN, Ethernet, IPv4, UDP.
    pub const LEN: usize = 14 + 20 + 8 + 8 + 14 + 20 + 8 + 64;
}

const _: () = assert!(size_of::<Generated>() == 160);

#[cfg(feature = "user")]
// SAFETY: #[repr(C)], an integer and a byte array, no padding (the size is asserted above).
unsafe impl aya::Pod for Generated {}
