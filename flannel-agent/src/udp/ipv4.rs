//! The inner packet's header.

use std::net::Ipv4Addr;

use flannel_common::checksum::decrement_ttl;

/// Of a header without options, in bytes.
pub(super) const HEADER_LEN: usize = 20;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;

/// A header that is within its packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ipv4 {
    /// Bytes of it, with options.
    pub(super) header_len: usize,
    /// Bytes of the packet, as the header says.
    pub(super) total_len: usize,
    pub(super) ttl: u8,
    pub(super) protocol: u8,
    /// Whether it is one of several fragments.
    pub(super) is_fragment: bool,
    /// Whether it is a fragment after the first.
    pub(super) is_later_fragment: bool,
    pub(super) source: Ipv4Addr,
    pub(super) destination: Ipv4Addr,
}

/// Why a packet is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotIpv4 {
    OtherVersion,
    Truncated,
}

impl Ipv4 {
    /// Reads the header at the beginning of a packet.
    pub(super) fn of(packet: &[u8]) -> Result<Self, NotIpv4> {
        let first = *packet.first().ok_or(NotIpv4::Truncated)?;
        if first >> 4 != 4 {
            return Err(NotIpv4::OtherVersion);
        }
        let header: &[u8; HEADER_LEN] = packet.first_chunk().ok_or(NotIpv4::Truncated)?;
        let header_len = usize::from(first & 0xf) * 4;
        let total_len = usize::from(u16::from_be_bytes([header[2], header[3]]));
        if header_len < HEADER_LEN || total_len < header_len || packet.len() < total_len {
            return Err(NotIpv4::Truncated);
        }
        let fragment = u16::from_be_bytes([header[6], header[7]]);
        Ok(Self {
            header_len,
            total_len,
            ttl: header[8],
            protocol: header[9],
            is_fragment: fragment & 0x3fff != 0,
            is_later_fragment: fragment & 0x1fff != 0,
            source: Ipv4Addr::new(header[12], header[13], header[14], header[15]),
            destination: Ipv4Addr::new(header[16], header[17], header[18], header[19]),
        })
    }
}

/// Takes one off the TTL of a packet that has a whole header, and puts the checksum right. Whether it may go on: flannel's
/// proxy takes one off on either side of the tunnel, and lets go of what reaches zero.
pub(super) fn forward(packet: &mut [u8]) -> bool {
    let Some(header) = packet.first_chunk_mut::<HEADER_LEN>() else { return false };
    if header[8] <= 1 {
        return false;
    }
    header[8] -= 1;
    [header[10], header[11]] = decrement_ttl([header[10], header[11]]);
    true
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;

    fn packet(ttl: u8) -> Vec<u8> {
        let mut packet = Vec::new();
        PacketBuilder::ipv4([10, 5, 1, 2], [10, 5, 2, 3], ttl).udp(1, 2).write(&mut packet, &[7; 9]).unwrap();
        packet
    }

    #[test]
    fn a_header_is_read() {
        let header = Ipv4::of(&packet(9)).unwrap();
        assert_eq!((header.header_len, header.total_len, header.ttl, header.protocol), (20, 37, 9, UDP));
        assert_eq!((header.source, header.destination), ([10, 5, 1, 2].into(), [10, 5, 2, 3].into()));
        assert!(!header.is_fragment && !header.is_later_fragment);
    }

    #[test]
    fn what_is_cut_off_or_another_version_is_none() {
        let whole = packet(9);
        for len in 0..whole.len() {
            assert_eq!(Ipv4::of(&whole[..len]), Err(NotIpv4::Truncated), "{len}");
        }
        for (place, byte, expected) in [(0, 0x65, NotIpv4::OtherVersion), (0, 0x44, NotIpv4::Truncated)] {
            let mut other = whole.clone();
            other[place] = byte;
            assert_eq!(Ipv4::of(&other), Err(expected));
        }
        let mut shorter_than_its_header = whole;
        shorter_than_its_header[2..4].copy_from_slice(&19u16.to_be_bytes());
        assert_eq!(Ipv4::of(&shorter_than_its_header), Err(NotIpv4::Truncated));
    }

    #[test]
    fn one_hop_less_is_what_another_would_have_sent() {
        for ttl in 2..=255 {
            let mut forwarded = packet(ttl);
            assert!(forward(&mut forwarded));
            assert_eq!(forwarded, packet(ttl - 1));
        }
        for ttl in [0, 1] {
            let mut forwarded = packet(ttl);
            assert!(!forward(&mut forwarded));
            assert_eq!(forwarded, packet(ttl), "{ttl}");
        }
    }
}
