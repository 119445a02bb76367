//! The header before each packet of a TUN device with `IFF_VNET_HDR` (`struct virtio_net_hdr`, linux/virtio_net.h): what the
//! kernel leaves to be done, or says of a packet that it is given.

/// Bytes of it.
pub(super) const LEN: usize = 10;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum field holds the sum of the pseudo-header, and the rest is still to be added.
const NEEDS_CHECKSUM: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_*`.
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_UDP_L4: u8 = 5;
/// Beside the kind: the first segment has CWR, and no other (RFC 3168, section 6.1.2).
const GSO_ECN: u8 = 0x80;

/// What there is to be segmented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Tcp,
    Udp,
}

impl Kind {
    /// Where the transport header has its checksum.
    pub(super) const fn checksum_offset(self) -> usize {
        match self {
            Self::Tcp => 16,
            Self::Udp => 6,
        }
    }
}

/// The header, read. Lengths and places in bytes, places from the beginning of the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct VnetHeader {
    /// Where the checksum begins to count, and where it is put, where that is still to be done.
    pub(super) checksum: Option<(usize, usize)>,
    /// What the packet is to be segmented as, and the payload of each segment but the last.
    pub(super) segments: Option<(Kind, usize)>,
}

impl VnetHeader {
    /// Of a packet that is complete.
    pub(super) const NONE: [u8; LEN] = [0; LEN];

    /// [`None`] for a kind of packet that was not agreed on.
    pub(super) fn read(bytes: &[u8; LEN]) -> Option<Self> {
        let word = |place: usize| usize::from(u16::from_ne_bytes([bytes[place], bytes[place + 1]]));
        let start = word(6);
        let checksum = (bytes[0] & NEEDS_CHECKSUM != 0).then_some((start, start + word(8)));
        let kind = match bytes[1] & !GSO_ECN {
            GSO_NONE => return Some(Self { checksum, segments: None }),
            GSO_TCPV4 => Kind::Tcp,
            GSO_UDP_L4 => Kind::Udp,
            _ => return None,
        };
        Some(Self { checksum, segments: Some((kind, word(4))) })
    }

    /// Of a packet that was made of several: headers of `headers_len` bytes of which `ip_len` are IPv4's, and segments of
    /// `size` bytes.
    pub(super) fn of_segments(kind: Kind, ip_len: usize, headers_len: usize, size: usize) -> [u8; LEN] {
        let gso = match kind {
            Kind::Tcp => GSO_TCPV4,
            Kind::Udp => GSO_UDP_L4,
        };
        let mut header = [NEEDS_CHECKSUM, gso, 0, 0, 0, 0, 0, 0, 0, 0];
        let words = [headers_len, size, ip_len, kind.checksum_offset()];
        for (place, word) in header[2..].as_chunks_mut::<2>().0.iter_mut().zip(words) {
            *place = (word as u16).to_ne_bytes();
        }
        header
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for kind in [Kind::Tcp, Kind::Udp] {
            let header = VnetHeader::of_segments(kind, 20, 52, 1420);
            let checksum = Some((20, 20 + kind.checksum_offset()));
            assert_eq!(VnetHeader::read(&header), Some(VnetHeader { checksum, segments: Some((kind, 1420)) }));
        }
        assert_eq!(VnetHeader::read(&VnetHeader::NONE), Some(VnetHeader { checksum: None, segments: None }));
    }

    #[test]
    fn congestion_marks_are_no_kind_of_their_own_and_ipv6_is_refused() {
        let mut header = VnetHeader::of_segments(Kind::Tcp, 20, 40, 1000);
        header[1] |= GSO_ECN;
        assert_eq!(VnetHeader::read(&header).unwrap().segments, Some((Kind::Tcp, 1000)));
        header[1] = 4;
        assert_eq!(VnetHeader::read(&header), None);
    }
}
