//! A packet as the stack leaves it to its device, made what the wire takes: checksums completed, segments cut (as
//! `tcp_gso_segment` and `__udp_gso_segment` would, net/ipv4).

use std::net::Ipv4Addr;

use super::{
    Event,
    batch::{Batch, Piece},
    checksum,
    ipv4::{HEADER_LEN, Ipv4, TCP, UDP},
    vnet::{Kind, VnetHeader},
};

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// Adds a packet to a batch, in one datagram or several to a host. `number` is the packet's among those that were read.
///
/// # Errors
/// [`Event::SendNotSegmentable`] where the header does not fit the packet.
pub(super) fn push(
    batch: &mut Batch,
    host: Ipv4Addr,
    number: usize,
    packet: &mut [u8],
    ipv4: &Ipv4,
    vnet: &VnetHeader,
) -> Result<(), Event> {
    let packet = packet.get_mut(..ipv4.total_len).ok_or(Event::SendNotSegmentable)?;
    match vnet.segments {
        Some((kind, size)) => segments(batch, host, number, packet, ipv4, (kind, size)),
        None => {
            if let Some((start, place)) = vnet.checksum {
                complete_checksum(packet, start, place, ipv4.protocol).ok_or(Event::SendNotSegmentable)?;
            }
            batch.push(host, packet.len(), [Piece::Packet(number, 0..packet.len())]);
            Ok(())
        }
    }
}

/// [`None`] where the places are not within the packet.
fn complete_checksum(packet: &mut [u8], start: usize, place: usize, protocol: u8) -> Option<()> {
    let sum = checksum::sum(packet.get(start..)?);
    let field = packet.get_mut(place..)?.first_chunk_mut()?;
    *field = of_transport(protocol, sum);
    Some(())
}

/// In UDP, zero stands for no checksum (RFC 768).
fn of_transport(protocol: u8, sum: u64) -> [u8; 2] {
    match checksum::complete(sum) {
        [0, 0] if protocol == UDP => [0xff; 2],
        field => field,
    }
}

fn segments(
    batch: &mut Batch,
    host: Ipv4Addr,
    number: usize,
    packet: &[u8],
    ipv4: &Ipv4,
    (kind, size): (Kind, usize),
) -> Result<(), Event> {
    let transport = ipv4.header_len;
    let headers_len = transport
        + match kind {
            Kind::Tcp if ipv4.protocol == TCP => {
                usize::from(packet.get(transport + 12).ok_or(Event::SendNotSegmentable)? >> 4) * 4
            }
            Kind::Udp if ipv4.protocol == UDP => 8,
            _ => return Err(Event::SendNotSegmentable),
        };
    // A TCP header has at least 20 bytes, with the flags and the checksum among them.
    let is_whole = kind == Kind::Udp || headers_len >= transport + HEADER_LEN;
    let (headers, payload) = packet.split_at_checked(headers_len).ok_or(Event::SendNotSegmentable)?;
    if !is_whole || ipv4.is_fragment || size == 0 || payload.is_empty() {
        return Err(Event::SendNotSegmentable);
    }
    let count = payload.len().div_ceil(size);
    for (index, segment) in payload.chunks(size).enumerate() {
        let at = batch.headers.len();
        batch.headers.extend_from_slice(headers);
        let is_last = index + 1 == count;
        write_headers(&mut batch.headers[at..], transport, segment, kind, index, size, is_last)
            .ok_or(Event::SendNotSegmentable)?;
        let place = headers_len + index * size;
        let pieces = [Piece::Header(at..at + headers_len), Piece::Packet(number, place..place + segment.len())];
        batch.push(host, headers_len + segment.len(), pieces);
    }
    Ok(())
}

/// Makes the packet's headers those of one of its segments. [`None`] where they are too short.
fn write_headers(
    headers: &mut [u8],
    transport: usize,
    segment: &[u8],
    kind: Kind,
    index: usize,
    size: usize,
    is_last: bool,
) -> Option<()> {
    let len = headers.len() + segment.len();
    let (ipv4, header) = headers.split_at_mut_checked(transport)?;
    let id = u16::from_be_bytes([ipv4[4], ipv4[5]]).wrapping_add(index as u16);
    ipv4[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    ipv4[4..6].copy_from_slice(&id.to_be_bytes());
    ipv4[10..12].fill(0);
    let check = checksum::complete(checksum::sum(ipv4));
    ipv4[10..12].copy_from_slice(&check);
    let addresses: &[u8; 8] = ipv4[12..].first_chunk()?;
    let transport_len = (header.len() + segment.len()) as u16;
    let protocol = match kind {
        Kind::Tcp => {
            let sequence = u32::from_be_bytes(*header[4..].first_chunk()?).wrapping_add((index * size) as u32);
            header[4..8].copy_from_slice(&sequence.to_be_bytes());
            if !is_last {
                header[13] &= !(FIN | PSH);
            }
            if index > 0 {
                header[13] &= !CWR;
            }
            TCP
        }
        Kind::Udp => {
            header[4..6].copy_from_slice(&transport_len.to_be_bytes());
            UDP
        }
    };
    let field = kind.checksum_offset();
    header[field..field + 2].fill(0);
    let pseudo = checksum::pseudo_header(addresses, protocol, transport_len);
    // Headers have a multiple of four bytes: the payload begins with a word.
    let sum = pseudo + checksum::sum(header) + checksum::sum(segment);
    header[field..field + 2].copy_from_slice(&of_transport(protocol, sum));
    Some(())
}

#[cfg(test)]
mod tests {
    use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    use super::*;

    const HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 64, 2);
    const OPTIONS: [u8; 12] = [1, 1, 8, 10, 0, 0, 0, 5, 0, 0, 0, 6];

    /// What a receiver gets.
    fn datagrams(batch: &Batch, packet: &[u8]) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        for message in &batch.messages {
            let mut bytes = Vec::new();
            for piece in &batch.pieces[message.pieces.clone()] {
                bytes.extend_from_slice(match piece {
                    Piece::Header(range) => &batch.headers[range.clone()],
                    Piece::Packet(_, range) => &packet[range.clone()],
                });
            }
            assert_eq!(bytes.len(), message.len);
            all.extend(bytes.chunks(message.datagram_len).map(<[u8]>::to_vec));
        }
        all
    }

    fn cut(mut packet: Vec<u8>, vnet: &VnetHeader) -> Result<Vec<Vec<u8>>, Event> {
        let mut batch = Batch::default();
        let ipv4 = Ipv4::of(&packet).unwrap();
        push(&mut batch, HOST, 0, &mut packet, &ipv4, vnet)?;
        Ok(datagrams(&batch, &packet))
    }

    fn tcp(payload: &[u8]) -> Vec<u8> {
        let builder = PacketBuilder::ipv4([10, 5, 1, 2], [10, 5, 2, 3], 62);
        let builder = builder.tcp(40_000, 80, u32::MAX - 5000, 900).ack(77).psh().fin().cwr();
        let builder = builder.options_raw(&OPTIONS).unwrap();
        let mut packet = Vec::new();
        builder.write(&mut packet, payload).unwrap();
        packet
    }

    fn udp(payload: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        PacketBuilder::ipv4([10, 5, 1, 2], [10, 5, 2, 3], 62).udp(40_000, 53).write(&mut packet, payload).unwrap();
        packet
    }

    fn vnet(kind: Kind, size: usize) -> VnetHeader {
        VnetHeader { checksum: Some((20, 20 + kind.checksum_offset())), segments: Some((kind, size)) }
    }

    /// That both checksums are right; the transport's payload.
    fn checked(datagram: &[u8]) -> Vec<u8> {
        let sliced = SlicedPacket::from_ip(datagram).unwrap();
        let etherparse::NetSlice::Ipv4(ip) = sliced.net.unwrap() else { panic!("no IPv4") };
        assert_eq!(ip.header().to_header().calc_header_checksum(), ip.header().header_checksum());
        match sliced.transport.unwrap() {
            TransportSlice::Tcp(tcp) => {
                let expected = tcp.calc_checksum_ipv4(ip.header().source(), ip.header().destination()).unwrap();
                assert_eq!(tcp.checksum(), expected);
                tcp.payload().to_vec()
            }
            TransportSlice::Udp(udp) => {
                let header = udp.to_header();
                let expected = header.calc_checksum_ipv4(&ip.header().to_header(), udp.payload()).unwrap();
                assert_eq!(udp.checksum(), expected);
                udp.payload().to_vec()
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn tcp_is_cut_as_the_kernel_would() {
        let payload: Vec<u8> = (0..10_000).map(|place| (place % 251) as u8).collect();
        let datagrams = cut(tcp(&payload), &vnet(Kind::Tcp, 1420)).unwrap();
        assert_eq!(datagrams.len(), 8);
        let got: Vec<u8> = datagrams.iter().flat_map(|datagram| checked(datagram)).collect();
        assert_eq!(got, payload);
        for (index, datagram) in datagrams.iter().enumerate() {
            let sliced = SlicedPacket::from_ip(datagram).unwrap();
            let Some(TransportSlice::Tcp(header)) = sliced.transport else { panic!("no TCP") };
            let sequence = (u32::MAX - 5000).wrapping_add(1420 * index as u32);
            assert_eq!((header.sequence_number(), header.acknowledgment_number()), (sequence, 77));
            assert_eq!(header.options(), OPTIONS);
            let is_last = index == 7;
            assert_eq!((header.psh(), header.fin(), header.cwr()), (is_last, is_last, index == 0), "{index}");
            let id = u16::from_be_bytes([datagram[4], datagram[5]]);
            assert_eq!(usize::from(id), index, "the packet's own is 0");
        }
    }

    #[test]
    fn a_checksum_that_was_left_open_is_completed() {
        for (whole, kind) in [(tcp(b"abc"), Kind::Tcp), (udp(b"abcd"), Kind::Udp)] {
            let mut open = whole.clone();
            let field = 20 + kind.checksum_offset();
            let pseudo = checksum::pseudo_header(open[12..].first_chunk().unwrap(), open[9], open.len() as u16 - 20);
            open[field..field + 2].copy_from_slice(&checksum::fold(pseudo));
            let vnet = VnetHeader { checksum: Some((20, field)), segments: None };
            assert_eq!(cut(open, &vnet).unwrap(), [whole]);
        }
    }

    #[test]
    fn a_header_that_does_not_fit_is_refused() {
        let refused = Err(Event::SendNotSegmentable);
        let packet = tcp(&[1; 100]);
        assert_eq!(cut(packet.clone(), &vnet(Kind::Tcp, 0)), refused);
        assert_eq!(cut(packet.clone(), &vnet(Kind::Udp, 10)), refused);
        assert_eq!(cut(tcp(&[]), &vnet(Kind::Tcp, 10)), refused);
        for offset in [0, 0x40, 0xf0] {
            let mut other = packet.clone();
            other[32] = offset;
            let datagrams = cut(other, &vnet(Kind::Tcp, 10));
            assert_eq!(datagrams.is_err(), offset < 0x50, "{offset:#x}");
        }
        let outside = VnetHeader { checksum: Some((20, 200)), segments: None };
        assert_eq!(cut(packet, &outside), refused);
    }

    proptest! {
        #[test]
        fn any_payload_arrives_whole(
            payload in proptest::collection::vec(any::<u8>(), 1..9000),
            size in 8..2000usize,
            is_tcp: bool,
        ) {
            let (packet, kind) = if is_tcp { (tcp(&payload), Kind::Tcp) } else { (udp(&payload), Kind::Udp) };
            let datagrams = cut(packet, &vnet(kind, size)).unwrap();
            let got: Vec<u8> = datagrams.iter().flat_map(|datagram| checked(datagram)).collect();
            prop_assert_eq!(got, payload);
        }

        #[test]
        fn no_header_makes_it_panic(
            mut packet in proptest::collection::vec(any::<u8>(), 20..200),
            checksum in proptest::option::of((0..300usize, 0..300usize)),
            size in 0..300usize,
            kind in proptest::option::of(any::<bool>()),
        ) {
            packet[0] = 0x40 | packet[0] & 0xf;
            let len = packet.len() as u16;
            packet[2..4].copy_from_slice(&len.to_be_bytes());
            let Ok(ipv4) = Ipv4::of(&packet) else { return Ok(()) };
            let segments = kind.map(|is_tcp| (if is_tcp { Kind::Tcp } else { Kind::Udp }, size));
            let _verdict = push(&mut Batch::default(), HOST, 0, &mut packet, &ipv4, &VnetHeader { checksum, segments });
        }
    }
}
