//! Datagrams that are to be sent, in as few messages as the kernel allows.
//!
//! A message of several datagrams to one host (`UDP_SEGMENT`, udp(7)) has all of one length, but for the last, which may be
//! shorter.

use std::{net::Ipv4Addr, ops::Range};

/// Datagrams of one message (`UDP_MAX_SEGMENTS`, linux/udp.h: 64 up to 6.8, more since).
const MAX_DATAGRAMS: usize = 64;
/// Bytes of one message: what IPv4 and UDP leave of 65,535.
pub(super) const MAX_BYTES: usize = 65_507;

/// Where some bytes lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// Among the headers that were rebuilt.
    Header(Range<usize>),
    /// In a packet that was read, by its number.
    Packet(usize, Range<usize>),
}

/// A message of datagrams to one host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) host: Ipv4Addr,
    /// Bytes of each datagram but the last.
    pub(super) datagram_len: usize,
    pub(super) datagrams: usize,
    /// Bytes of all of them.
    pub(super) len: usize,
    /// Its pieces among all.
    pub(super) pieces: Range<usize>,
    is_closed: bool,
}

/// Messages, in the order in which they are to be sent.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) headers: Vec<u8>,
    pub(super) pieces: Vec<Piece>,
    pub(super) messages: Vec<Message>,
}

impl Batch {
    pub(super) fn clear(&mut self) {
        self.headers.clear();
        self.pieces.clear();
        self.messages.clear();
    }

    /// Adds a datagram to a host: pieces of so many bytes together, to be sent after all that was added before.
    pub(super) fn push<const N: usize>(&mut self, host: Ipv4Addr, len: usize, pieces: [Piece; N]) {
        self.pieces.extend(pieces);
        let end = self.pieces.len();
        if let Some(last) = self.messages.last_mut().filter(|last| last.takes(host, len)) {
            last.datagrams += 1;
            last.len += len;
            last.pieces.end = end;
            last.is_closed = len < last.datagram_len;
            return;
        }
        self.messages.push(Message {
            host,
            datagram_len: len,
            datagrams: 1,
            len,
            pieces: end - N..end,
            is_closed: false,
        });
    }
}

impl Message {
    fn takes(&self, host: Ipv4Addr, len: usize) -> bool {
        !self.is_closed
            && self.host == host
            && len <= self.datagram_len
            && self.datagrams < MAX_DATAGRAMS
            && self.len + len <= MAX_BYTES
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOSTS: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 168, 64, 1), Ipv4Addr::new(192, 168, 64, 2)];

    fn batch(datagrams: &[(usize, usize)]) -> Batch {
        let mut batch = Batch::default();
        for (number, (host, len)) in datagrams.iter().enumerate() {
            batch.push(HOSTS[*host], *len, [Piece::Packet(number, 0..*len)]);
        }
        batch
    }

    fn datagrams(batch: &Batch) -> Vec<usize> {
        batch.messages.iter().map(|message| message.datagrams).collect()
    }

    #[test]
    fn datagrams_of_one_length_to_one_host_are_one_message() {
        assert_eq!(datagrams(&batch(&[(0, 100), (0, 100), (0, 60)])), [3]);
        assert_eq!(datagrams(&batch(&[(0, 100), (0, 60), (0, 60)])), [2, 1], "a shorter one is the last");
        assert_eq!(datagrams(&batch(&[(0, 60), (0, 100)])), [1, 1], "none may be longer than the first");
        assert_eq!(datagrams(&batch(&[(0, 60), (1, 60), (0, 60)])), [1, 1, 1]);
        assert_eq!(datagrams(&batch(&[(0, 60); 65])), [64, 1]);
        assert_eq!(datagrams(&batch(&[(0, 1472); 64])), [44, 20]);
    }

    proptest! {
        #[test]
        fn each_is_sent_once_in_its_order_within_the_limits(
            datagrams in proptest::collection::vec((0..2usize, 20..1500usize), 0..200),
        ) {
            let batch = batch(&datagrams);
            let mut sent = Vec::new();
            for message in &batch.messages {
                prop_assert!(message.datagrams <= MAX_DATAGRAMS && message.len <= MAX_BYTES);
                let pieces = &batch.pieces[message.pieces.clone()];
                prop_assert_eq!(pieces.len(), message.datagrams);
                let lens = pieces.iter().map(|piece| match piece {
                    Piece::Packet(number, bytes) => {
                        sent.push((*number, HOSTS.iter().position(|host| *host == message.host).unwrap(), bytes.len()));
                        bytes.len()
                    }
                    Piece::Header(_) => unreachable!(),
                });
                let lens: Vec<usize> = lens.collect();
                prop_assert_eq!(lens.iter().sum::<usize>(), message.len);
                let (last, others) = lens.split_last().unwrap();
                prop_assert!(others.iter().all(|len| *len == message.datagram_len) && *last <= message.datagram_len);
            }
            let expected: Vec<_> = datagrams.iter().enumerate().map(|(at, (host, len))| (at, *host, *len)).collect();
            prop_assert_eq!(sent, expected);
        }
    }
}
