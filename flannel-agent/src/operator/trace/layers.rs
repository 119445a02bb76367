//! A packet in a line for each of its layers.

use etherparse::{LaxNetSlice, LaxSlicedPacket, LinkSlice, TransportSlice};

use crate::lease::MacAddress;

/// Bytes of a VXLAN header (RFC 7348, section 5).
const VXLAN_LEN: usize = 8;

/// The layers of a packet from the Ethernet header on, with those in a tunnel to this port; as far as they can be read.
pub(super) fn layers(frame: &[u8], tunnel_port: u16) -> Vec<String> {
    let Ok(packet) = LaxSlicedPacket::from_ethernet(frame) else {
        return vec![format!("{} bytes, shorter than an Ethernet header", frame.len())];
    };
    let mut layers = Vec::new();
    if let Some(LinkSlice::Ethernet2(ethernet)) = &packet.link {
        let [source, destination] = [ethernet.source(), ethernet.destination()].map(MacAddress);
        layers.push(format!("Ethernet {source} > {destination}, type {:#06x}", ethernet.ether_type().0));
    }
    match &packet.net {
        Some(LaxNetSlice::Ipv4(ip)) => {
            let header = ip.header();
            let (source, destination) = (header.source_addr(), header.destination_addr());
            let dont = if header.dont_fragment() { ", DF" } else { "" };
            layers.push(format!(
                "IPv4 {source} > {destination}, TTL {}, {} bytes{dont}",
                header.ttl(),
                header.total_len()
            ));
        }
        Some(LaxNetSlice::Ipv6(_)) => layers.push("IPv6".to_owned()),
        Some(LaxNetSlice::Arp(_)) => layers.push("ARP".to_owned()),
        None => {}
    }
    match &packet.transport {
        Some(TransportSlice::Udp(udp)) => {
            layers.push(format!("UDP {} > {}", udp.source_port(), udp.destination_port()));
            if udp.destination_port() == tunnel_port
                && let Some((&[_, _, _, _, a, b, c, _], inner)) = udp.payload().split_at_checked(VXLAN_LEN)
            {
                layers.push(format!("VXLAN VNI {}", u32::from_be_bytes([0, a, b, c])));
                // No tunnel within the tunnel is looked into.
                layers.extend(self::layers(inner, 0));
            }
        }
        Some(TransportSlice::Tcp(tcp)) => {
            let flags =
                [(tcp.syn(), "SYN"), (tcp.fin(), "FIN"), (tcp.rst(), "RST"), (tcp.psh(), "PSH"), (tcp.ack(), "ACK")];
            let flags: Vec<_> = flags.iter().filter(|(is_set, _)| *is_set).map(|(_, name)| *name).collect();
            layers.push(format!("TCP {} > {}, {}", tcp.source_port(), tcp.destination_port(), flags.join(" ")));
        }
        Some(TransportSlice::Icmpv4(icmp)) => layers.push(format!("ICMP type {}", icmp.type_u8())),
        Some(TransportSlice::Icmpv6(_) | TransportSlice::Igmp(_)) | None => {}
    }
    layers
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;

    const ONE: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const TWO: [u8; 6] = [2, 0, 0, 0, 0, 2];

    #[test]
    fn a_tunnel_packet_has_the_layers_of_both() {
        let mut inner = Vec::new();
        let builder = PacketBuilder::ethernet2(ONE, TWO).ipv4([10, 5, 1, 2], [10, 5, 2, 2], 63);
        builder.tcp(40000, 80, 1, 1).ack(1).write(&mut inner, &[0; 12]).unwrap();
        let mut frame = Vec::new();
        let builder = PacketBuilder::ethernet2(TWO, ONE).ipv4([192, 0, 2, 1], [192, 0, 2, 2], 64).udp(50000, 8472);
        builder.write(&mut frame, &[&[8, 0, 0, 0, 0, 0, 7, 0], &inner[..]].concat()).unwrap();
        assert_eq!(
            layers(&frame, 8472),
            [
                "Ethernet 02:00:00:00:00:02 > 02:00:00:00:00:01, type 0x0800",
                "IPv4 192.0.2.1 > 192.0.2.2, TTL 64, 102 bytes, DF",
                "UDP 50000 > 8472",
                "VXLAN VNI 7",
                "Ethernet 02:00:00:00:00:01 > 02:00:00:00:00:02, type 0x0800",
                "IPv4 10.5.1.2 > 10.5.2.2, TTL 63, 52 bytes, DF",
                "TCP 40000 > 80, ACK",
            ]
        );
        assert_eq!(layers(&frame, 4789).len(), 3);
        assert_eq!(layers(&frame[..10], 8472), ["10 bytes, shorter than an Ethernet header"]);
        assert_eq!(layers(&frame[..60], 8472).last().unwrap(), "10 bytes, shorter than an Ethernet header");
    }
}
