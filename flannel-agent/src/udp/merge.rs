//! Packets that have arrived, in as few as the stack takes: segments that follow one another are handed in as one packet that
//! is still to be segmented, as the kernel's own aggregation does (`tcp_gro_receive`, `udp_gro_receive_segment`, net/ipv4).
//!
//! Only what the kernel would cut apart again into the same packets is put together. The order within a flow stays. What is in
//! a merged packet has a right checksum: the kernel takes its word for it.

use std::{io::IoSlice, net::Ipv4Addr, ops::Range};

use super::{
    checksum,
    ipv4::{HEADER_LEN, Ipv4, TCP, UDP},
    vnet::{self, Kind, VnetHeader},
};

/// Bytes of a merged packet.
const MAX_LEN: usize = 65_535;
/// Segments of one packet: what one call can write is 1,024 pieces, and one of UDP's may have so many
/// (`UDP_MAX_SEGMENTS` up to 6.8).
const MAX_SEGMENTS: [usize; 2] = [512, 64];
/// As many of the last packets are looked at for the one that a segment follows.
const OPEN: usize = 32;

const ACK: u8 = 0x10;
const PSH: u8 = 0x08;

/// Where a packet lies: in which buffer, and where there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) buffer: usize,
    pub(super) bytes: Range<usize>,
}

/// Whose a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Flow {
    kind: Kind,
    source: Ipv4Addr,
    destination: Ipv4Addr,
    ports: [u8; 4],
}

/// A segment that may follow another, or be followed.
#[derive(Clone, Copy)]
struct Segment {
    headers_len: usize,
    payload_len: usize,
    sequence: u32,
    is_pushed: bool,
}

/// Packets that become one.
#[derive(Debug)]
struct Group {
    flow: Option<Flow>,
    first: Place,
    headers_len: usize,
    /// Payload of each segment but the last.
    size: usize,
    payload_len: usize,
    count: usize,
    next_sequence: u32,
    is_pushed: bool,
    is_closed: bool,
    is_verified: bool,
    /// The last of its pieces behind the first packet, and the first of them.
    pieces: Option<(usize, usize)>,
}

/// The payload of a segment, and where the next one's is.
#[derive(Debug)]
struct Piece {
    place: Place,
    next: Option<usize>,
}

/// Packets of one batch.
#[derive(Debug)]
pub(super) struct Merger {
    groups: Vec<Group>,
    pieces: Vec<Piece>,
    /// Whether the device takes UDP that is still to be segmented (since 6.2).
    takes_udp: bool,
}

impl Merger {
    pub(super) const fn new(takes_udp: bool) -> Self {
        Self { groups: Vec::new(), pieces: Vec::new(), takes_udp }
    }

    pub(super) fn clear(&mut self) {
        self.groups.clear();
        self.pieces.clear();
    }

    /// Adds a packet whose header is right: to one before it, or as one of its own.
    pub(super) fn add<B: AsRef<[u8]>>(&mut self, buffers: &[B], place: Place, ipv4: &Ipv4) {
        let bytes = &buffers[place.buffer].as_ref()[place.bytes.clone()];
        let flow = flow(bytes, ipv4).filter(|flow| flow.kind == Kind::Tcp || self.takes_udp);
        let segment = flow.and_then(|flow| segment(bytes, ipv4, flow.kind));
        let before = flow.and_then(|flow| {
            let recent = self.groups.len().saturating_sub(OPEN);
            let found = self.groups[recent..].iter().rposition(|group| group.flow == Some(flow));
            found.map(|index| recent + index)
        });
        if let (Some(index), Some(flow), Some(segment)) = (before, flow, segment) {
            let group = &mut self.groups[index];
            let first = &buffers[group.first.buffer].as_ref()[group.first.bytes.clone()];
            if group.takes(first, bytes, &segment, flow.kind) {
                if group.verify(first, flow.kind) && is_right(bytes, flow.kind) {
                    group.push(&mut self.pieces, &place, &segment);
                    return;
                }
                // One of them is damaged: nothing is put to the first any more.
                group.is_closed = true;
            }
        }
        // What comes later of the flow may not overtake this one.
        if let Some(index) = before {
            self.groups[index].is_closed = true;
        }
        self.groups.push(Group::new(flow, place, ipv4, segment));
    }

    /// Hands each packet to `write`, in their order, with its header and the number of those that it was made of.
    pub(super) fn write<B: AsRef<[u8]>>(&self, buffers: &[B], mut write: impl FnMut(&[IoSlice<'_>], usize)) {
        for group in &self.groups {
            let first = &buffers[group.first.buffer].as_ref()[group.first.bytes.clone()];
            let (Some(flow), Some((_, begin))) = (group.flow, group.pieces) else {
                write(&[IoSlice::new(&VnetHeader::NONE), IoSlice::new(first)], 1);
                continue;
            };
            let (vnet, headers) = group.headers(first, flow.kind);
            let mut slices = Vec::with_capacity(group.count + 2);
            slices.extend([&vnet[..], &headers[..group.headers_len], &first[group.headers_len..]].map(IoSlice::new));
            let mut next = Some(begin);
            while let Some(Piece { place, next: after }) = next.and_then(|index| self.pieces.get(index)) {
                slices.push(IoSlice::new(&buffers[place.buffer].as_ref()[place.bytes.clone()]));
                next = *after;
            }
            write(&slices, group.count);
        }
    }
}

/// IPv4's and TCP's headers at their longest.
const HEADERS_LEN: usize = HEADER_LEN + 60;

impl Group {
    fn new(flow: Option<Flow>, first: Place, ipv4: &Ipv4, segment: Option<Segment>) -> Self {
        // What can't be continued has its flow's name nevertheless, so that nothing overtakes it.
        let is_closed = segment.is_none_or(|segment| segment.is_pushed);
        let segment =
            segment.unwrap_or(Segment { headers_len: ipv4.header_len, payload_len: 0, sequence: 0, is_pushed: false });
        let Segment { headers_len, payload_len, sequence, is_pushed } = segment;
        let next_sequence = sequence.wrapping_add(payload_len as u32);
        Self {
            flow,
            first,
            headers_len,
            size: payload_len,
            payload_len,
            count: 1,
            next_sequence,
            is_pushed,
            is_closed,
            is_verified: false,
            pieces: None,
        }
    }

    /// Whether a segment of the same flow is the next one, and differs in nothing that the kernel could not make again.
    fn takes(&self, first: &[u8], bytes: &[u8], segment: &Segment, kind: Kind) -> bool {
        let Segment { headers_len, payload_len, sequence, .. } = *segment;
        if self.is_closed
            || headers_len != self.headers_len
            || payload_len > self.size
            || self.count >= MAX_SEGMENTS[kind as usize]
            || headers_len + self.payload_len + payload_len > MAX_LEN
        {
            return false;
        }
        // Type of service; flags; TTL.
        if first[1] != bytes[1] || first[6] != bytes[6] || first[8] != bytes[8] {
            return false;
        }
        // Where fragments are allowed, the identification matters.
        let id = |bytes: &[u8]| u16::from_be_bytes([bytes[4], bytes[5]]);
        let is_fragmentable = first[6] & 0x40 == 0;
        if is_fragmentable && id(bytes) != id(first).wrapping_add(self.count as u16) {
            return false;
        }
        match kind {
            // Acknowledgement and offset; window; urgent pointer and options.
            Kind::Tcp => {
                sequence == self.next_sequence
                    && first[28..33] == bytes[28..33]
                    && first[34..36] == bytes[34..36]
                    && first[38..headers_len] == bytes[38..headers_len]
            }
            Kind::Udp => true,
        }
    }

    /// Whether the first packet's checksum is right.
    fn verify(&mut self, first: &[u8], kind: Kind) -> bool {
        self.is_verified = self.is_verified || is_right(first, kind);
        self.is_verified
    }

    fn push(&mut self, pieces: &mut Vec<Piece>, place: &Place, segment: &Segment) {
        let start = place.bytes.start + segment.headers_len;
        let place = Place { buffer: place.buffer, bytes: start..place.bytes.end };
        let index = pieces.len();
        pieces.push(Piece { place, next: None });
        match &mut self.pieces {
            Some((last, _)) => {
                pieces[*last].next = Some(index);
                *last = index;
            }
            none => *none = Some((index, index)),
        }
        self.count += 1;
        self.payload_len += segment.payload_len;
        self.next_sequence = self.next_sequence.wrapping_add(segment.payload_len as u32);
        self.is_pushed = segment.is_pushed;
        self.is_closed = segment.is_pushed || segment.payload_len < self.size;
    }

    /// Of the merged packet: what the kernel is told, and its first [`Group::headers_len`] bytes.
    fn headers(&self, first: &[u8], kind: Kind) -> ([u8; vnet::LEN], [u8; HEADERS_LEN]) {
        let mut headers = [0; HEADERS_LEN];
        headers[..self.headers_len].copy_from_slice(&first[..self.headers_len]);
        let len = self.headers_len + self.payload_len;
        headers[2..4].copy_from_slice(&(len as u16).to_be_bytes());
        headers[10..12].fill(0);
        let check = checksum::complete(checksum::sum(&headers[..HEADER_LEN]));
        headers[10..12].copy_from_slice(&check);
        let transport_len = (len - HEADER_LEN) as u16;
        let mut addresses = [0; 8];
        addresses.copy_from_slice(&headers[12..20]);
        let protocol = match kind {
            Kind::Tcp => {
                headers[33] |= if self.is_pushed { PSH } else { 0 };
                TCP
            }
            Kind::Udp => {
                headers[24..26].copy_from_slice(&transport_len.to_be_bytes());
                UDP
            }
        };
        let field = HEADER_LEN + kind.checksum_offset();
        let pseudo = checksum::fold(checksum::pseudo_header(&addresses, protocol, transport_len));
        headers[field..field + 2].copy_from_slice(&pseudo);
        (VnetHeader::of_segments(kind, HEADER_LEN, self.headers_len, self.size), headers)
    }
}

/// [`None`] for what has no flow that matters here.
fn flow(bytes: &[u8], ipv4: &Ipv4) -> Option<Flow> {
    let kind = match ipv4.protocol {
        TCP => Kind::Tcp,
        UDP => Kind::Udp,
        _ => return None,
    };
    let ports = *bytes.get(ipv4.header_len..)?.first_chunk()?;
    let Ipv4 { source, destination, .. } = *ipv4;
    (!ipv4.is_later_fragment).then_some(Flow { kind, source, destination, ports })
}

/// [`None`] for a packet that stays alone.
fn segment(bytes: &[u8], ipv4: &Ipv4, kind: Kind) -> Option<Segment> {
    if ipv4.header_len != HEADER_LEN || ipv4.is_fragment {
        return None;
    }
    let transport = &bytes[HEADER_LEN..];
    match kind {
        Kind::Tcp => {
            let header: &[u8; 20] = transport.first_chunk()?;
            let len = usize::from(header[12] >> 4) * 4;
            let (flags, payload_len) = (header[13], transport.len().checked_sub(len)?);
            let sequence = u32::from_be_bytes(*header[4..].first_chunk()?);
            let is_plain = len >= header.len() && flags & !PSH == ACK && payload_len > 0;
            let is_pushed = flags & PSH != 0;
            is_plain.then_some(Segment { headers_len: HEADER_LEN + len, payload_len, sequence, is_pushed })
        }
        Kind::Udp => {
            let header: &[u8; 8] = transport.first_chunk()?;
            let len = usize::from(u16::from_be_bytes([header[4], header[5]]));
            // Without a checksum (zero) there is nothing to go by.
            let is_plain = len == transport.len() && len > header.len() && header[6..8] != [0; 2];
            let payload_len = len.saturating_sub(header.len());
            is_plain.then_some(Segment { headers_len: HEADER_LEN + 8, payload_len, sequence: 0, is_pushed: false })
        }
    }
}

/// Whether the transport's checksum is right.
fn is_right(bytes: &[u8], kind: Kind) -> bool {
    let (Some(addresses), Some(transport)) = (bytes[12..].first_chunk(), bytes.get(HEADER_LEN..)) else { return false };
    let protocol = match kind {
        Kind::Tcp => TCP,
        Kind::Udp => UDP,
    };
    let pseudo = checksum::pseudo_header(addresses, protocol, transport.len() as u16);
    checksum::fold(pseudo + checksum::sum(transport)) == [0xff; 2]
}

#[cfg(test)]
mod tests;
