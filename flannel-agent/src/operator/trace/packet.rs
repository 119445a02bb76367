//! The packets that are traced, as they are at each place on their way.

use std::net::Ipv4Addr;

use etherparse::{EtherType, PacketBuilder, err::packet::BuildWriteError};
use flannel_common::{
    flow::FlowKey,
    maps::Config,
    packet::{Inner, Mac, OuterHeader, Tunnel},
    vxlan::Vni,
};
use nix::libc::{IPPROTO_ICMP, IPPROTO_TCP, IPPROTO_UDP};

/// As pods send it.
pub(super) const TTL: u8 = 64;
/// What a header of the link layer takes.
pub(super) const ETHERNET_LEN: usize = 14;
/// What IPv4 and the largest of the headers behind it take.
pub(super) const SMALLEST: u16 = 40;

/// What is in a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    /// A segment of an established connection.
    Tcp,
    /// A datagram.
    Udp,
    /// An echo request.
    Icmp,
}

/// A packet between two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Query {
    pub(super) source: Ipv4Addr,
    pub(super) destination: Ipv4Addr,
    pub(super) protocol: Protocol,
    pub(super) source_port: u16,
    pub(super) destination_port: u16,
    /// Bytes of IPv4 packet.
    pub(super) size: u16,
}

impl Query {
    /// From the IPv4 header on. It must not be fragmented, as most senders have it.
    pub(super) fn ipv4(&self, ttl: u8) -> Result<Vec<u8>, BuildWriteError> {
        let mut packet = Vec::new();
        let builder = PacketBuilder::ipv4(self.source.octets(), self.destination.octets(), ttl);
        let payload = |headers: usize| vec![0; usize::from(self.size).saturating_sub(headers)];
        match self.protocol {
            Protocol::Tcp => {
                let builder = builder.tcp(self.source_port, self.destination_port, 1, u16::MAX).ack(1).psh();
                builder.write(&mut packet, &payload(40))
            }
            Protocol::Udp => builder.udp(self.source_port, self.destination_port).write(&mut packet, &payload(28)),
            Protocol::Icmp => builder.icmpv4_echo_request(1, 1).write(&mut packet, &payload(28)),
        }?;
        Ok(packet)
    }

    /// The same in a frame.
    pub(super) fn frame(&self, ttl: u8, source: Mac, destination: Mac) -> Result<Vec<u8>, BuildWriteError> {
        Ok([&destination[..], &source, &EtherType::IPV4.0.to_be_bytes(), &self.ipv4(ttl)?].concat())
    }

    /// The same in a tunnel to this host, which another forwards to it.
    pub(super) fn tunnel(
        &self,
        ttl: u8,
        config: &Config,
        vni: Vni,
        from: &Sender,
        device_mac: Mac,
    ) -> Result<Vec<u8>, BuildWriteError> {
        let packet = self.ipv4(ttl)?;
        let mut header = OuterHeader::template(&Tunnel {
            next_hop_mac: device_mac,
            device_mac: from.underlay_mac,
            source: from.address.octets(),
            destination: config.vtep_address.to_be_bytes(),
            port: config.port,
            vni,
            peer_vtep_mac: config.vtep_mac,
            vtep_mac: from.vtep_mac,
        });
        let source_port = config.source_ports.of(u32::from(self.source_port));
        header.complete(&Inner { len: packet.len() as u32, tos: 0, id: 0, source_port });
        Ok([&header.0[..], &packet].concat())
    }

    /// The flow, as the local pod sees it.
    pub(super) fn flow(&self, is_from_pod: bool) -> FlowKey {
        let ports = match self.protocol {
            Protocol::Tcp | Protocol::Udp => [self.source_port, self.destination_port].map(u16::to_be_bytes),
            Protocol::Icmp => [[0; 2]; 2],
        };
        let (source, destination) = ((self.source.octets(), ports[0]), (self.destination.octets(), ports[1]));
        let (local, remote) = if is_from_pod { (source, destination) } else { (destination, source) };
        let protocol = match self.protocol {
            Protocol::Tcp => IPPROTO_TCP,
            Protocol::Udp => IPPROTO_UDP,
            Protocol::Icmp => IPPROTO_ICMP,
        };
        FlowKey {
            local: local.0,
            remote: remote.0,
            local_port: local.1,
            remote_port: remote.1,
            protocol: protocol as u32,
        }
    }
}

/// The host that sends a packet to this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sender {
    /// Its VTEP address.
    pub(super) address: Ipv4Addr,
    /// The MAC of its vxlan device.
    pub(super) vtep_mac: Mac,
    /// The MAC that its packets have on this host's link; zero where that is not known.
    pub(super) underlay_mac: Mac,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_is_as_long_as_asked_for_with_each_protocol() {
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Icmp] {
            for size in [SMALLEST, 84, 1451] {
                let query = Query {
                    source: [10, 5, 1, 2].into(),
                    destination: [10, 5, 2, 2].into(),
                    protocol,
                    source_port: 40000,
                    destination_port: 80,
                    size,
                };
                let packet = query.ipv4(TTL).unwrap();
                assert_eq!(packet.len(), usize::from(size), "{protocol:?}");
                assert_eq!(u16::from_be_bytes([packet[2], packet[3]]), size);
                assert_eq!(query.frame(TTL, [1; 6], [2; 6]).unwrap()[ETHERNET_LEN..], packet);
            }
        }
    }
}
