//! From the device to the peers.

use std::{
    fs::File,
    io::{self, Read as _},
    net::UdpSocket,
};

use super::{
    Event,
    answer::{Answers, Why},
    batch::Batch,
    ipv4::{self, Ipv4, NotIpv4},
    queue::Queue,
    segment,
    socket::Sender,
    vnet::{self, VnetHeader},
};

/// Packets of one batch; each may be 64 KiB.
const PACKETS: usize = 16;
const PACKET_LEN: usize = vnet::LEN + 65_535;

/// One queue's way out.
pub(super) struct Outbound {
    pub(super) queue: Queue,
    pub(super) tun: File,
    pub(super) socket: UdpSocket,
    pub(super) port: u16,
    pub(super) answers: Answers,
}

impl Outbound {
    /// Sends what the device has, until the tunnel is stopped.
    ///
    /// # Errors
    /// Where the device is gone.
    pub(super) fn run(mut self) -> io::Result<()> {
        let mut packets: Vec<_> = (0..PACKETS).map(|_| vec![0; PACKET_LEN].into_boxed_slice()).collect();
        let mut batch = Batch::default();
        while self.queue.wait_readable(&self.tun)? {
            while !self.queue.is_stopped() && self.fill(&mut batch, &mut packets)? {
                Sender { socket: &self.socket, port: self.port }.send(&batch, &packets, &self.queue.counters);
            }
        }
        Ok(())
    }

    /// Makes a batch of the packets that there are. Whether there was any.
    fn fill(&mut self, batch: &mut Batch, packets: &mut [Box<[u8]>]) -> io::Result<bool> {
        batch.clear();
        self.queue.refresh_peers();
        let mut has_read = false;
        for (number, packet) in packets.iter_mut().enumerate() {
            let len = match self.tun.read(packet) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(len) => len,
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => break,
                Err(error) => return Err(error),
            };
            has_read = true;
            if let Err(event) = self.push(batch, number, &mut packet[..len]) {
                self.queue.counters.add(event, 1);
            }
        }
        Ok(has_read)
    }

    fn push(&mut self, batch: &mut Batch, number: usize, read: &mut [u8]) -> Result<(), Event> {
        let (header, packet) = read.split_first_chunk_mut::<{ vnet::LEN }>().ok_or(Event::SendNotIpv4)?;
        let ipv4 = Ipv4::of(packet).map_err(|reason| match reason {
            NotIpv4::OtherVersion | NotIpv4::Truncated => Event::SendNotIpv4,
        })?;
        let Some(host) = self.queue.peers.owner_of(ipv4.destination) else {
            self.answers.tell(packet, &ipv4, Why::NetUnreachable);
            return Err(Event::SendNoPeer);
        };
        if !ipv4::forward(packet) {
            self.answers.tell(packet, &ipv4, Why::TimeExceeded);
            return Err(Event::SendTtlExceeded);
        }
        let vnet = VnetHeader::read(header).ok_or(Event::SendNotSegmentable)?;
        segment::push(batch, host, number, packet, &ipv4, &vnet)
    }
}
