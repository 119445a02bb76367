//! What is merged is cut apart again, and must be what there was.

use etherparse::PacketBuilder;
use proptest::prelude::*;

use super::*;
use crate::udp::{batch, segment};

const HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 64, 2);

#[derive(Clone, Debug)]
struct Tcp {
    port: u16,
    sequence: u32,
    ack: u32,
    window: u16,
    ttl: u8,
    psh: bool,
    fin: bool,
    timestamp: u32,
    len: usize,
}

const PLAIN: Tcp =
    Tcp { port: 80, sequence: 1000, ack: 5, window: 900, ttl: 60, psh: false, fin: false, timestamp: 3, len: 100 };

impl Tcp {
    fn packet(&self) -> Vec<u8> {
        let builder = PacketBuilder::ipv4([10, 5, 1, 2], [10, 5, 2, 3], self.ttl);
        let mut builder = builder.tcp(40_000, self.port, self.sequence, self.window).ack(self.ack);
        builder = if self.psh { builder.psh() } else { builder };
        builder = if self.fin { builder.fin() } else { builder };
        let [a, b, c, d] = self.timestamp.to_be_bytes();
        let builder = builder.options_raw(&[1, 1, 8, 10, a, b, c, d, 0, 0, 0, 6]).unwrap();
        let payload: Vec<u8> = (0..self.len).map(|place| (self.sequence as usize + place) as u8).collect();
        let mut packet = Vec::new();
        builder.write(&mut packet, &payload).unwrap();
        packet
    }
}

fn udp(port: u16, len: usize, number: u8) -> Vec<u8> {
    let mut packet = Vec::new();
    let builder = PacketBuilder::ipv4([10, 5, 1, 2], [10, 5, 2, 3], 60).udp(40_000, port);
    builder.write(&mut packet, &vec![number; len]).unwrap();
    packet
}

/// What is handed to the device: whole packets with their headers, and of how many each was made.
fn merged(packets: &[Vec<u8>], takes_udp: bool) -> Vec<(Vec<u8>, usize)> {
    let mut merger = Merger::new(takes_udp);
    for (buffer, packet) in packets.iter().enumerate() {
        let ipv4 = Ipv4::of(packet).unwrap();
        merger.add(packets, Place { buffer, bytes: 0..packet.len() }, &ipv4);
    }
    let mut written = Vec::new();
    merger.write(packets, |slices, count| {
        written.push((slices.iter().flat_map(|slice| slice.to_vec()).collect(), count));
    });
    written
}

fn counts(packets: &[Vec<u8>]) -> Vec<usize> {
    merged(packets, true).into_iter().map(|(_, count)| count).collect()
}

/// What the kernel would make of it, by the code that does the same for packets on their way out.
fn cut((packet, _): &(Vec<u8>, usize)) -> Vec<Vec<u8>> {
    let (header, packet) = packet.split_first_chunk().unwrap();
    let vnet = VnetHeader::read(header).unwrap();
    let (mut packet, mut batch) = (packet.to_vec(), batch::Batch::default());
    let ipv4 = Ipv4::of(&packet).unwrap();
    segment::push(&mut batch, HOST, 0, &mut packet, &ipv4, &vnet).unwrap();
    let mut all = Vec::new();
    for message in &batch.messages {
        let pieces = batch.pieces[message.pieces.clone()].iter().map(|piece| match piece {
            batch::Piece::Header(range) => &batch.headers[range.clone()],
            batch::Piece::Packet(_, range) => &packet[range.clone()],
        });
        let bytes: Vec<u8> = pieces.flatten().copied().collect();
        all.extend(bytes.chunks(message.datagram_len).map(<[u8]>::to_vec));
    }
    all
}

/// `count` segments, one after the other.
fn row(count: u32, of: &Tcp) -> Vec<Tcp> {
    (0..count).map(|number| Tcp { sequence: of.sequence.wrapping_add(number * of.len as u32), ..of.clone() }).collect()
}

fn packets(segments: &[Tcp]) -> Vec<Vec<u8>> {
    segments.iter().map(Tcp::packet).collect()
}

#[test]
fn segments_that_follow_one_another_are_one() {
    let all = packets(&row(5, &Tcp { sequence: u32::MAX - 150, ..PLAIN }));
    let written = merged(&all, true);
    assert_eq!(written.len(), 1);
    // All forbid fragments: the identification is nobody's concern.
    let cut: Vec<_> = cut(&written[0]).into_iter().map(without_id).collect();
    assert_eq!(cut, all.into_iter().map(without_id).collect::<Vec<_>>());
}

/// Without identification and the checksum that covers it.
fn without_id(mut packet: Vec<u8>) -> Vec<u8> {
    packet[4..6].fill(0);
    packet[10..12].fill(0);
    packet
}

#[test]
fn what_differs_stays_apart() {
    type Change = fn(&mut Tcp);
    let differ: [(&str, Change); 7] = [
        ("a gap", |tcp| tcp.sequence += 1),
        ("another acknowledgement", |tcp| tcp.ack += 1),
        ("another window", |tcp| tcp.window += 1),
        ("another TTL", |tcp| tcp.ttl += 1),
        ("the end", |tcp| tcp.fin = true),
        ("another time stamp", |tcp| tcp.timestamp += 1),
        ("a longer one", |tcp| tcp.len += 1),
    ];
    for (what, change) in differ {
        let mut segments = row(3, &PLAIN);
        change(&mut segments[1]);
        assert_eq!(counts(&packets(&segments)), [1, 1, 1], "{what}");
    }
    let mut segments = row(3, &PLAIN);
    segments[1].psh = true;
    assert_eq!(counts(&packets(&segments)), [2, 1], "pushed");
    let mut segments = row(3, &PLAIN);
    segments[1].len = 50;
    segments[2].sequence -= 50;
    assert_eq!(counts(&packets(&segments)), [2, 1], "a shorter one");
}

#[test]
fn the_type_of_service_and_ids_of_what_may_be_fragmented_matter() {
    let mut all = packets(&row(2, &PLAIN));
    // Not ECN-capable, and marked: a mark must not be lost.
    all[1][1] = 3;
    assert_eq!(counts(&all), [1, 1]);
    for (id, count) in [(0u16, vec![1, 1]), (1, vec![2])] {
        let mut all = packets(&row(2, &PLAIN));
        all.iter_mut().for_each(|packet| packet[6] = 0);
        all[1][4..6].copy_from_slice(&id.to_be_bytes());
        assert_eq!(counts(&all), count, "{id}");
    }
}

#[test]
fn flows_are_told_apart_and_their_order_stays() {
    let [one, two] = [80, 81].map(|port| row(3, &Tcp { port, ..PLAIN }));
    let mixed: Vec<_> = one.iter().zip(&two).flat_map(|(one, two)| [one.packet(), two.packet()]).collect();
    assert_eq!(counts(&mixed), [3, 3]);
    // A bare acknowledgement between segments of its flow is overtaken by none.
    let mut segments = row(3, &PLAIN);
    segments.insert(1, Tcp { len: 0, ..segments[1].clone() });
    assert_eq!(counts(&packets(&segments)), [1, 1, 2]);
}

#[test]
fn a_damaged_one_is_left_to_the_receiver() {
    for (damaged, expected) in [(0, vec![1, 2]), (1, vec![1, 1, 1]), (2, vec![2, 1])] {
        let mut all = packets(&row(3, &PLAIN));
        *all[damaged].last_mut().unwrap() ^= 1;
        assert_eq!(counts(&all), expected, "{damaged}");
        let written = merged(&all, true);
        assert!(written.iter().any(|(bytes, count)| *count == 1 && bytes[vnet::LEN..] == all[damaged]));
    }
}

#[test]
fn datagrams_of_one_length_are_one_where_the_device_takes_that() {
    let all: Vec<_> = [100, 100, 60, 100].into_iter().map(|len| udp(53, len, 7)).collect();
    // As with Linux, which gives them an identification only where they may be fragmented.
    assert_eq!(counts(&all), [3, 1]);
    assert_eq!(merged(&all, false).len(), 4);
    let mut without_checksum = all;
    without_checksum[1][26..28].fill(0);
    assert_eq!(counts(&without_checksum), [1, 1, 1, 1]);
}

#[test]
fn no_merged_packet_is_too_long() {
    let written = merged(&packets(&row(100, &Tcp { len: 1420, ..PLAIN })), true);
    assert!(written.iter().all(|(bytes, _)| bytes.len() <= vnet::LEN + MAX_LEN));
    assert_eq!(written.iter().map(|(_, count)| count).collect::<Vec<_>>(), [&46, &46, &8]);
    let many = vec![udp(53, 10, 1); 70];
    assert_eq!(counts(&many), [64, 6]);
}

prop_compose! {
    fn any_segment()(
        port in 80..82u16, step in 0..4u32, len in prop_oneof![Just(100usize), 0..101usize], psh in any::<bool>(),
        fin in prop::bool::weighted(0.1),
    ) -> Tcp {
        Tcp { port, sequence: 1000 + 100 * step, len, psh, fin, ..PLAIN }
    }
}

proptest! {
    /// Of each flow, the same packets come out as went in, in the same order.
    #[test]
    fn nothing_is_lost_doubled_or_overtaken(segments in proptest::collection::vec(any_segment(), 0..40)) {
        let all = packets(&segments);
        let out: Vec<_> = merged(&all, true).iter().flat_map(cut).map(without_id).collect();
        let of = |packets: &[Vec<u8>], port: u8| -> Vec<_> {
            packets.iter().filter(|packet| packet[23] == port).cloned().collect()
        };
        let all: Vec<_> = all.into_iter().map(without_id).collect();
        for port in [80, 81] {
            prop_assert_eq!(of(&out, port), of(&all, port));
        }
    }

    #[test]
    fn no_packet_makes_it_panic(packets in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 20..90), 0..8)) {
        let packets: Vec<_> = packets.into_iter().map(|mut packet| {
            packet[0] = 0x45;
            packet[9] = if packet[9] & 1 == 0 { TCP } else { UDP };
            let len = packet.len() as u16;
            packet[2..4].copy_from_slice(&len.to_be_bytes());
            packet
        }).collect();
        let total: usize = merged(&packets, true).iter().map(|(_, count)| count).sum();
        prop_assert_eq!(total, packets.len());
    }
}
