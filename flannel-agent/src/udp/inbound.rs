//! From the peers to the device.

use std::{
    fs::File,
    io::{self, Write as _},
    net::UdpSocket,
};

use super::{
    Event,
    answer::{Answers, Why},
    ipv4::{self, Ipv4, NotIpv4},
    merge::{Merger, Place},
    queue::Queue,
    socket::{Arrived, Receiver},
};

/// One queue's way in.
pub(super) struct Inbound {
    pub(super) queue: Queue,
    pub(super) tun: File,
    pub(super) socket: UdpSocket,
    /// Whether the device takes UDP that is still to be segmented.
    pub(super) segments_udp: bool,
    pub(super) answers: Answers,
}

impl Inbound {
    /// Hands the stack what arrives, until the tunnel is stopped.
    ///
    /// # Errors
    /// Where the socket has failed.
    pub(super) fn run(mut self) -> io::Result<()> {
        let mut receiver = Receiver::new();
        let mut merger = Merger::new(self.segments_udp);
        while self.queue.wait_readable(&self.socket)? {
            while !self.queue.is_stopped() {
                let arrived = receiver.receive(&self.socket)?;
                if arrived.is_empty() {
                    break;
                }
                self.queue.refresh_peers();
                merger.clear();
                for (buffer, message) in arrived.iter().enumerate() {
                    self.take_apart(&mut receiver.buffers, buffer, message, &mut merger);
                }
                self.deliver(&receiver.buffers, &merger);
            }
        }
        Ok(())
    }

    fn take_apart(&mut self, buffers: &mut [Box<[u8]>], buffer: usize, message: &Arrived, merger: &mut Merger) {
        if message.len == 0 {
            self.queue.counters.add(Event::Truncated, 1);
        }
        let mut is_heard = false;
        for start in (0..message.len).step_by(message.datagram_len.max(1)) {
            let end = message.len.min(start + message.datagram_len);
            match self.admit(&mut buffers[buffer][start..end], message) {
                Ok(ipv4) => {
                    is_heard = true;
                    // What is behind the packet is none of it.
                    let bytes = start..start + ipv4.total_len;
                    merger.add(buffers, Place { buffer, bytes }, &ipv4);
                }
                Err(event) => self.queue.counters.add(event, 1),
            }
        }
        if is_heard {
            self.queue.peers.hear(message.host);
        }
    }

    fn admit(&mut self, packet: &mut [u8], message: &Arrived) -> Result<Ipv4, Event> {
        let ipv4 = Ipv4::of(packet).map_err(|reason| match reason {
            NotIpv4::OtherVersion => Event::NotIpv4,
            NotIpv4::Truncated => Event::Truncated,
        })?;
        self.queue.peers.admit(message.host, ipv4.source, ipv4.destination)?;
        if !ipv4::forward(packet) {
            self.answers.tell(packet, &ipv4, Why::TimeExceeded);
            return Err(Event::TtlExceeded);
        }
        Ok(ipv4)
    }

    fn deliver(&mut self, buffers: &[Box<[u8]>], merger: &Merger) {
        merger.write(buffers, |slices, packets| {
            let event = match self.tun.write_vectored(slices) {
                Ok(_) => Event::Received,
                // The device is down, or its memory is used up.
                Err(_) => Event::DeliveryFailed,
            };
            self.queue.counters.add(event, packets as u64);
        });
    }
}
