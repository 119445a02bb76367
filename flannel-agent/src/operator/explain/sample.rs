//! A dropped packet, joined with the lease, peer or pod that explains it.

use std::net::{IpAddr, Ipv4Addr};

use flannel_common::{event::Event, packet::Mac};
use ipnet::Ipv4Net;

use crate::{
    dataplane::{Dropped, PeerWay, PinDirectory, Way},
    lease::MacAddress,
    operator::{
        OperatorError,
        decode::{Decoded, decode},
        interface_name, pinned_peers,
    },
    status::Status,
};

/// Bytes of an Ethernet header.
const ETHERNET_LEN: usize = 14;
/// From the outer IPv4 header to the inner Ethernet header: IPv4, UDP, VXLAN.
const TUNNEL_LEN: usize = 36;

/// What drops are joined with. Of an overlay whose agent has left no status, only what is in the packet is known.
pub(in crate::operator) struct Known {
    /// The agent's own word.
    status: Option<Status>,
    peers: Vec<PeerWay>,
}

/// The addresses of a packet.
struct Ends {
    outer_source: Option<Ipv4Addr>,
    outer_destination: Option<Ipv4Addr>,
    /// In the tunnel where there is one.
    source: Option<Ipv4Addr>,
    destination: Option<Ipv4Addr>,
}

impl Ends {
    fn of(decoded: &Decoded) -> Self {
        let v4 = |address: Option<IpAddr>| match address {
            Some(IpAddr::V4(address)) => Some(address),
            _ => None,
        };
        let inner = decoded.inner.as_ref().unwrap_or(&decoded.outer);
        Self {
            outer_source: v4(decoded.outer.source),
            outer_destination: v4(decoded.outer.destination),
            source: v4(inner.source),
            destination: v4(inner.destination),
        }
    }
}

impl Known {
    /// Reads it; without an agent, too.
    ///
    /// # Errors
    /// [`OperatorError::Dataplane`].
    pub(in crate::operator) fn read(pins: &PinDirectory, status: Option<Status>) -> Result<Self, OperatorError> {
        let peers = match &status {
            Some(status) => pinned_peers(pins, status).read()?,
            None => Vec::new(),
        };
        Ok(Self { status, peers })
    }

    fn own(&self) -> Option<Ipv4Net> {
        self.status.as_ref().map(|status| status.lease.subnet)
    }

    /// Whose lease an address is in, in words.
    fn whose(&self, address: Ipv4Addr) -> String {
        if self.own().is_some_and(|own| own.contains(&address)) {
            return format!("{address} is in this host's own lease");
        }
        let leased = self.peers.iter().filter(|peer| peer.subnet.contains(&address));
        match leased.max_by_key(|peer| peer.subnet.prefix_len()) {
            Some(PeerWay { subnet, address: vtep, .. }) => {
                format!("{address} is in {subnet}, which the host with the VTEP address {vtep} leases")
            }
            None if self.peers.iter().any(|peer| peer.address == address) => {
                format!("{address} is the VTEP address of a peer")
            }
            None => match &self.status {
                Some(status) if status.network.contains(&address) => {
                    format!("{address} is in the Network {}, but in no lease", status.network)
                }
                Some(status) => format!("{address} is outside the Network {}", status.network),
                None => format!("whose {address} is can't be told: no agent has left its status here"),
            },
        }
    }

    /// A sender of tunnel packets, in words that may stand within a sentence.
    fn sender(&self, address: Option<Ipv4Addr>) -> String {
        let Some(address) = address else { return "a sender that can't be read".to_owned() };
        let leased = self.peers.iter().filter(|peer| peer.address == address).map(|peer| peer.subnet.to_string());
        let leased: Vec<_> = leased.collect();
        match leased.as_slice() {
            [] => format!("{address} (no VTEP of the lease table)"),
            some => format!("{address} (which leases {})", some.join(", ")),
        }
    }

    /// Whose vxlan device has a MAC, in words.
    fn whose_mac(&self, mac: Mac) -> String {
        let text = MacAddress(mac);
        match self.peers.iter().find(|peer| peer.vtep_mac == mac) {
            Some(peer) => format!("{text} is that of the host with the VTEP address {}", peer.address),
            None => format!("{text} is no peer's: an old one of this host's"),
        }
    }

    /// Why the packet was dropped, in words.
    pub(in crate::operator) fn explain(&self, reason: Event, dropped: &Dropped) -> String {
        let Ends { outer_source, outer_destination, source, destination } =
            Ends::of(&decode(reason, &dropped.frame, dropped.link_header_len));
        let interface =
            interface_name(dropped.ifindex).unwrap_or_else(|| format!("interface no. {} (gone)", dropped.ifindex));
        let mac = |at: usize| {
            let bytes = dropped.frame.get(at..)?;
            bytes.first_chunk::<6>().copied()
        };
        let sender = || self.sender(outer_source);
        let whose = |address: Option<Ipv4Addr>| {
            address.map_or_else(|| "the address can't be read".to_owned(), |address| self.whose(address))
        };
        match reason {
            Event::UnknownVtep => {
                let holder = source.and_then(|source| self.peers.iter().find(|peer| peer.subnet.contains(&source)));
                match (outer_source, holder) {
                    (Some(outer), Some(peer)) => format!(
                        "{outer} is no VTEP of the lease table, and uses {}, which {} leases: is it another address of that host (--iface, \
                         --public-ip), or a second host with that lease?",
                        peer.subnet, peer.address
                    ),
                    _ => format!("sent by {}; its inner source {}", sender(), whose(source)),
                }
            }
            Event::SpoofedInnerSource => format!("sent by {}; its inner source {}", sender(), whose(source)),
            Event::ForeignInnerDestination => {
                let own = self.own().map_or_else(String::new, |own| format!("this host leases {own}; "));
                format!("{own}its inner destination {}; sent by {}", whose(destination), sender())
            }
            Event::InnerForeignMac => {
                let own =
                    self.status.as_ref().map(|status| format!("flannel.{} has {}", status.vni, status.lease.vtep_mac));
                let found = mac(dropped.link_header_len + TUNNEL_LEN).map(|mac| self.whose_mac(mac));
                format!(
                    "the inner frame is for another MAC than this host's ({}): {}; sent by {}",
                    own.unwrap_or_else(|| "of which no agent has left word".to_owned()),
                    found.unwrap_or_else(|| "it can't be read".to_owned()),
                    sender()
                )
            }
            Event::InnerNotUnicast => format!("from {} to {}, sent by {}", text(source), text(destination), sender()),
            Event::InnerNotIpv4 | Event::TunnelTruncated | Event::OuterOptions => format!("sent by {}", sender()),
            Event::PodTunnel => {
                let to = outer_destination.map_or_else(String::new, |to| format!(", to {}", self.sender(Some(to))));
                format!("sent by the pod at {interface} with the address {}{to}", text(outer_source))
            }
            Event::NotAdmitted => format!(
                "came out of the tunnel at {interface} past the check of senders, from {}; it was for {}",
                whose(source),
                whose(destination)
            ),
            Event::EncapNoPeer | Event::EncapNoRoute | Event::EncapTooBig => {
                self.why_not_sent(destination, dropped.len)
            }
            Event::RoutedNoPeer | Event::RoutedNotOnLink => whose(destination),
            Event::DirectForeignMac => {
                let from =
                    mac(6).map_or_else(|| "a MAC that can't be read".to_owned(), |mac| MacAddress(mac).to_string());
                format!(
                    "came from {from} at {interface}, which is not the MAC of the host that leases it: {}",
                    whose(source)
                )
            }
            Event::DecapForeignVlan
            | Event::DecapFailed
            | Event::EncapFailed
            | Event::EncapNested
            | Event::EncapNoRoom
            | Event::PodEncapFailed => {
                format!("at {interface}, from {} to {}", whose(source), whose(destination))
            }
            // Nothing of this is dropped.
            _ => String::new(),
        }
    }

    fn why_not_sent(&self, destination: Option<Ipv4Addr>, len: u32) -> String {
        let Some(destination) = destination else {
            return "not an IPv4 packet; the overlay carries nothing else".to_owned();
        };
        let Some(peer) = self.peers.iter().find(|peer| peer.subnet.contains(&destination)) else {
            return self.whose(destination);
        };
        let largest = self.status.as_ref().map(|status| status.mtu);
        let size = len.saturating_sub(ETHERNET_LEN as u32);
        match (peer.way, largest) {
            (Way::NoRoute, _) => {
                format!("{destination} is in {}, whose host {} the underlay has no route to", peer.subnet, peer.address)
            }
            (_, Some(mtu)) if size > mtu => {
                format!("it has {size} bytes, and the overlay's MTU is {mtu}; it is for {}", self.whose(destination))
            }
            _ => format!("{}; by now it could be sent", self.whose(destination)),
        }
    }
}

fn text(address: Option<Ipv4Addr>) -> String {
    address.map_or_else(|| "an address that can't be read".to_owned(), |address| address.to_string())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use etherparse::PacketBuilder;
    use flannel_common::event::Outcome;

    use super::*;

    const OWN_MAC: Mac = [2, 0, 0, 0, 0, 1];

    fn known() -> Known {
        let peer = |subnet: &str, address: [u8; 4], way| PeerWay {
            subnet: subnet.parse().unwrap(),
            address: address.into(),
            way,
            next_hop: address.into(),
            smaller_mtu: None,
            vtep_mac: [2, 0, 0, 0, 0, address[3]],
            ifindex: 7,
            heard: None,
            traffic: None,
        };
        let peers = vec![
            peer("10.5.2.0/24", [192, 168, 64, 2], Way::Encapsulated),
            peer("10.5.3.0/24", [192, 168, 64, 3], Way::NoRoute),
        ];
        Known { status: None, peers }
    }

    fn dropped(outer: [u8; 4], source: [u8; 4], destination: [u8; 4]) -> Dropped {
        let mut inner = Vec::new();
        let builder = PacketBuilder::ethernet2(OWN_MAC, [2, 0, 0, 0, 0, 3]).ipv4(source, destination, 64);
        builder.udp(40000, 53).write(&mut inner, &[0; 8]).unwrap();
        let mut frame = Vec::new();
        let builder = PacketBuilder::ethernet2(OWN_MAC, OWN_MAC).ipv4(outer, [192, 168, 64, 1], 64).udp(50000, 8472);
        builder.write(&mut frame, &[&[8, 0, 0, 0, 0, 0, 1, 0], &inner[..]].concat()).unwrap();
        let len = frame.len() as u32;
        Dropped { number: 1, ago: Duration::ZERO, ifindex: 0, len, link_header_len: ETHERNET_LEN, frame }
    }

    #[test]
    fn whatever_is_dropped_is_joined_with_something() {
        let dropped = dropped([192, 168, 64, 99], [10, 5, 2, 2], [10, 5, 1, 2]);
        for event in Event::ALL.iter().filter(|event| event.outcome() == Outcome::Drop) {
            assert!(!known().explain(*event, &dropped).is_empty(), "{}", event.label());
        }
        let cut = Dropped { frame: dropped.frame[..20].to_vec(), ..dropped };
        for event in Event::ALL.iter().filter(|event| event.outcome() == Outcome::Drop) {
            assert!(!known().explain(*event, &cut).is_empty(), "{}", event.label());
        }
    }

    #[test]
    fn leases_and_peers_are_named() {
        let known = known();
        let stranger = known.explain(Event::UnknownVtep, &dropped([192, 168, 64, 99], [10, 5, 2, 2], [10, 5, 1, 2]));
        let said = "192.168.64.99 is no VTEP of the lease table, and uses 10.5.2.0/24, which 192.168.64.2 leases: is it another \
                    address of that host (--iface, --public-ip), or a second host with that lease?";
        assert_eq!(stranger, said);
        let spoofed =
            known.explain(Event::SpoofedInnerSource, &dropped([192, 168, 64, 2], [10, 5, 3, 2], [10, 5, 1, 2]));
        let said = "sent by 192.168.64.2 (which leases 10.5.2.0/24); its inner source 10.5.3.2 is in 10.5.3.0/24, which the host with the VTEP \
                    address 192.168.64.3 leases";
        assert_eq!(spoofed, said);
        let foreign = known.explain(Event::InnerForeignMac, &dropped([192, 168, 64, 2], [10, 5, 2, 2], [10, 5, 1, 2]));
        let said = "02:00:00:00:00:03 is that of the host with the VTEP address 192.168.64.3";
        assert!(foreign.contains(said), "{foreign}");
        let unroutable = known.why_not_sent(Some([10, 5, 3, 9].into()), 98);
        let said = "10.5.3.9 is in 10.5.3.0/24, whose host 192.168.64.3 the underlay has no route to";
        assert_eq!(unroutable, said);
    }
}
