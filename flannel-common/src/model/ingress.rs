//! From the underlay to pods and the host's stack.

use std::vec::Vec;

use super::{
    Counted, Fate, FlowChange, Frame, Note, Overlay, Packet, World,
    wire::{
        ETHERNET, End, IPV4, Ipv4, Kind, TUNNEL, UDP, bytes, flow, is_ipv4, is_within, one_hop_on, sum, translated,
        word,
    },
};
use crate::{
    event::{Event, Outcome},
    maps::Config,
    packet::Mac,
};

const UDP_AT: usize = ETHERNET + IPV4;
const VXLAN_AT: usize = UDP_AT + 8;
const INNER_ETHERNET_AT: usize = VXLAN_AT + 8;
const INNER_AT: usize = INNER_ETHERNET_AT + ETHERNET;

/// Addresses that no host can have (RFC 6890, as far as Linux has it so), without those of one's own broadcasts.
const NOT_UNICAST: [([u8; 4], u32); 5] =
    [([0, 0, 0, 0], 32), ([127, 0, 0, 0], 8), ([169, 254, 0, 0], 16), ([224, 0, 0, 0], 4), ([255; 4], 32)];
/// The next hops that an agent's routes can have, and what stands for their MAC.
const NEXT_HOPS: [[u8; 4]; 5] = [[169, 254, 1, 1], [192, 0, 0, 8], [192, 0, 2, 1], [198, 51, 100, 1], [203, 0, 113, 1]];
const NEXT_HOP_MAC: Mac = [2, 0, 0, 0, 0, 1];

/// A tunnel packet that may come in.
struct Admitted {
    inner: Ipv4,
    /// Who sent it, as the leases know.
    sender: Option<[u8; 4]>,
    /// Nothing in its outer headers is for the kernel to look at.
    is_plain: bool,
    /// Their lengths and sums are right, and the UDP header has none.
    is_sound: bool,
    outer_len: usize,
}

impl World {
    pub(super) fn ingress_of_underlay(&self, packet: Packet<'_>) -> Fate {
        let frame = packet.frame;
        let to_another = frame[0] & 1 == 0 && frame[..6] != self.config.underlay_mac;
        if !is_ipv4(frame) || to_another {
            return Fate::unchanged(Event::NotTunnel, packet);
        }
        if let Some(fate) = self.without_tunnel(packet) {
            return fate;
        }
        if self.has_no_tunnel() {
            return Fate::unchanged(Event::NotTunnel, packet);
        }
        let admitted = match self.admit(frame, packet.is_gso) {
            Ok(admitted) => admitted,
            Err(event) => return Fate::unchanged(event, packet),
        };
        let (kind, key) = flow(frame, admitted.inner, INNER_AT, End::Destination);
        let slow = Fate {
            note: self.note(Note::Admitted(key)),
            heard: admitted.sender,
            traffic: admitted.sender.map(|sender| Counted::Received(sender, frame.len() - INNER_AT)),
            flow: match kind == Kind::Turn && self.may_bypass() {
                true => FlowChange::Removed,
                false => FlowChange::Unchanged,
            },
            ..Fate::unchanged(if admitted.sender.is_some() { Event::Admitted } else { Event::AdmittedByRoute }, packet)
        };
        let is_left = !self.may_bypass() || self.config.flags & Config::LEFT_IN_TUNNEL != 0;
        let slow = match is_left || !admitted.is_plain || !admitted.is_sound || packet.is_gso {
            true => slow,
            false => Fate {
                event: Some(Event::HandedIn),
                frame: Frame::Is(
                    [&self.config.vtep_mac[..], &frame[INNER_ETHERNET_AT + 6..INNER_AT], &frame[INNER_AT..]].concat(),
                ),
                ..slow
            },
        };
        let may_bypass = self.may_bypass() && kind == Kind::Data && packet.known.ingress && !packet.known.is_gone;
        if !may_bypass || !admitted.is_plain || packet.is_gso || admitted.inner.ttl() < 2 {
            return slow;
        }
        let mut out = Vec::new();
        out.extend(packet.known.pod_mac);
        out.extend(packet.known.gateway_mac);
        out.extend([8, 0]);
        let received_as = packet.known.received_as;
        out.extend(translated(one_hop_on(&frame[INNER_AT..]), key, received_as, End::Destination));
        let event = if received_as == key { Event::Delivered } else { Event::DeliveredTranslated };
        Fate { event: Some(event), frame: Frame::Is(out), note: packet.note, ..slow }
    }

    /// A peer on the link may send its pods' packets to ours as they are, from the MAC that it is known by.
    fn without_tunnel(&self, packet: Packet<'_>) -> Option<Fate> {
        if self.config.flags & Config::DIRECT == 0 {
            return None;
        }
        let frame = packet.frame;
        let ip = Ipv4::at(frame, ETHERNET)?;
        let (from, to) = (ip.source(), ip.destination());
        let is_ours = self.is_of_own_subnet(to) && !self.is_own_broadcast(to) && !self.is_of_own_subnet(from);
        let peer = self.leaseholder(from).filter(|peer| is_ours && peer.is_on_link && peer.has_route)?;
        if frame[0] & 1 != 0 {
            return None;
        }
        if peer.next_hop_mac.is_some_and(|mac| frame[6..12] != mac) {
            return Some(Fate::unchanged(Event::DirectForeignMac, packet));
        }
        let (kind, key) = flow(frame, ip, ETHERNET, End::Destination);
        let slow = Fate {
            note: self.note(Note::Admitted(key)),
            // As from its device to ours.
            frame: Frame::Is([&self.config.vtep_mac[..], &peer.vtep_mac, &[8, 0], &frame[ETHERNET..]].concat()),
            heard: Some(peer.address),
            is_heard_directly: true,
            traffic: Some(Counted::Received(peer.address, frame.len() - ETHERNET)),
            flow: match kind == Kind::Turn && self.may_bypass() {
                true => FlowChange::Removed,
                false => FlowChange::Unchanged,
            },
            ..Fate::unchanged(Event::DirectHandedIn, packet)
        };
        let slow = match self.has_no_tunnel() {
            false => slow,
            true => Fate {
                event: Some(Event::DirectReceived),
                note: self.note(Note::Received(key)),
                original: self.left(packet, kind, key),
                frame: Frame::Unchanged,
                ..slow
            },
        };
        let may_bypass = self.may_bypass() && kind == Kind::Data && packet.known.ingress && !packet.known.is_gone;
        if !may_bypass || ip.ttl() < 2 {
            return Some(slow);
        }
        let received_as = packet.known.received_as;
        let inner = translated(one_hop_on(&frame[ETHERNET..]), key, received_as, End::Destination);
        let out = [&packet.known.pod_mac[..], &packet.known.gateway_mac, &[8, 0], &inner].concat();
        Some(Fate {
            event: Some(Event::DirectDelivered),
            frame: Frame::Is(out),
            note: packet.note,
            original: None,
            ..slow
        })
    }

    pub(super) fn xdp_decap(&self, packet: Packet<'_>) -> Fate {
        let frame = packet.frame;
        let left = Fate { event: None, ..Fate::unchanged(Event::NotTunnel, packet) };
        if self.config.flags & Config::LEFT_IN_TUNNEL != 0 {
            return left;
        }
        if !is_ipv4(frame) || frame[..6] != self.config.underlay_mac {
            return left;
        }
        let admitted = match self.admit(frame, false) {
            Ok(admitted) => admitted,
            Err(event) if event.outcome() == Outcome::Drop => return Fate { event: Some(event), ..left },
            Err(_) => return left,
        };
        let left = Fate { heard: admitted.sender, ..left };
        if !admitted.is_plain || admitted.outer_len > self.config.mtu as usize + TUNNEL {
            return left;
        }
        let mut out = Vec::new();
        // In front of it, the metadata by which `from_underlay` knows it.
        out.extend(0xf1a7_7e1d_u32.to_ne_bytes());
        out.extend(self.config.vni.to_ne_bytes());
        out.extend(&frame[INNER_ETHERNET_AT..]);
        let traffic = admitted.sender.map(|sender| Counted::Received(sender, frame.len() - INNER_AT));
        Fate { event: Some(Event::XdpDecapsulated), frame: Frame::Is(out), traffic, ..left }
    }

    /// Who may send what (design: "what may pass").
    fn admit(&self, frame: &[u8], is_gso: bool) -> Result<Admitted, Event> {
        let config = &self.config;
        let ip = Ipv4::at(frame, ETHERNET).ok_or(Event::NotTunnel)?;
        if ip.protocol() != UDP || ip.destination() != self.own_address() {
            return Err(Event::NotTunnel);
        }
        if ip.is_later_fragment() {
            return Err(Event::UnderlayFragment);
        }
        // A whole UDP header to our port, wherever the outer header says that it is.
        let udp_at = ETHERNET + if ip.is_plain() { IPV4 } else { ip.header_len() };
        let is_tunnel = frame.len() >= udp_at + 8 && word(frame, udp_at + 2) == Some(config.port);
        match (is_tunnel, ip.is_plain()) {
            (false, _) => return Err(Event::NotTunnel),
            (true, false) => return Err(Event::OuterOptions),
            (true, true) => {}
        }

        let vxlan: [u8; 8] = bytes(frame, VXLAN_AT).ok_or(Event::TunnelTruncated)?;
        let vni = u32::from_be_bytes([0, vxlan[4], vxlan[5], vxlan[6]]);
        if vxlan[0] & 8 == 0 || vni != config.vni {
            return Err(Event::ForeignVni);
        }
        let has_reserved_bits = vxlan[0] != 8 || vxlan[1..4] != [0; 3] || vxlan[7] != 0;

        let ether_type = frame.get(INNER_ETHERNET_AT..INNER_AT).ok_or(Event::TunnelTruncated)?;
        if ether_type[12..] != [8, 0] {
            return Err(Event::InnerNotIpv4);
        }
        let inner = Ipv4::at(frame, INNER_AT).ok_or(Event::TunnelTruncated)?;
        let outer_len = ip.total_len();
        let is_cut = ETHERNET + outer_len > frame.len();
        let lacks_inner = !ip.has_more_fragments() && inner.total_len() > outer_len.saturating_sub(TUNNEL);
        if !is_gso && (is_cut || lacks_inner) {
            return Err(Event::TunnelTruncated);
        }
        if inner.version() != 4 {
            return Err(Event::InnerNotIpv4);
        }

        let (from, to) = (inner.source(), inner.destination());
        let destination_mac = &frame[INNER_ETHERNET_AT..INNER_ETHERNET_AT + 6];
        let is_unicast = |address| !NOT_UNICAST.iter().any(|(network, len)| is_within(address, *network, *len));
        if destination_mac[0] & 1 == 1 || !is_unicast(from) || !is_unicast(to) || self.is_own_broadcast(to) {
            return Err(Event::InnerNotUnicast);
        }
        let sender = match self.is_leased(ip.source(), from, to, destination_mac) {
            Ok(()) => Some(ip.source()),
            Err(_) if self.is_routed(ip.source(), from, to, destination_mac) => None,
            Err(event) => return Err(event),
        };
        let is_plain = sender.is_some() && !has_reserved_bits && !ip.has_more_fragments() && ip.ecn() != 3;
        let has_right_sum = sum(&frame[ETHERNET..UDP_AT]) == 0xffff;
        let udp_len = word(frame, UDP_AT + 4).map(usize::from);
        let is_sound = has_right_sum && udp_len == outer_len.checked_sub(IPV4) && word(frame, UDP_AT + 6) == Some(0);
        Ok(Admitted { inner, sender, is_plain, is_sound, outer_len })
    }

    /// What the leases, and the prefixes beside them, say.
    fn is_leased(&self, sender: [u8; 4], from: [u8; 4], to: [u8; 4], mac: &[u8]) -> Result<(), Event> {
        if !self.is_peer(sender) {
            return Err(Event::UnknownVtep);
        }
        let is_its_own = match self.leaseholder(from) {
            Some(peer) => peer.address == sender,
            None => from == sender && from != self.own_address() || self.is_behind(from),
        };
        if !is_its_own || self.is_of_own_subnet(from) {
            return Err(Event::SpoofedInnerSource);
        }
        if mac != self.config.vtep_mac {
            return Err(Event::InnerForeignMac);
        }
        if !self.is_here(to) {
            return Err(Event::ForeignInnerDestination);
        }
        Ok(())
    }

    /// This host's, or behind it.
    fn is_here(&self, address: [u8; 4]) -> bool {
        self.is_of_own_subnet(address) || self.is_behind(address)
    }

    /// Behind some host, as the operator has it: no pod, and no host.
    fn is_behind(&self, address: [u8; 4]) -> bool {
        let is_host = address == self.own_address() || self.is_peer(address);
        self.is_named(address) && !is_host && self.leaseholder(address).is_none()
    }

    /// Whether somebody other than an agent has the kernel send there what goes back to where the packet is from.
    fn is_routed(&self, sender: [u8; 4], from: [u8; 4], to: [u8; 4], mac: &[u8]) -> bool {
        let device_mac = match self.overlay {
            Overlay::Unknown => return false,
            Overlay::Gone => return !self.is_of_own_subnet(from),
            Overlay::Is(mac) => mac,
        };
        let Some(route) = self.route(from) else { return false };
        let (Some(next_hop), Some(next_hop_mac)) = (route.next_hop, route.next_hop_mac) else { return false };
        if self.is_of_own_subnet(from) || NEXT_HOPS.contains(&next_hop) || next_hop_mac == NEXT_HOP_MAC {
            return false;
        }
        let as_leased = self.leaseholder(next_hop).filter(|peer| peer.vtep_mac == next_hop_mac);
        match (as_leased, self.leaseholder(from)) {
            (Some(peer), of_source)
                if peer.address != sender && of_source.is_none_or(|of_source| of_source.address != peer.address) =>
            {
                false
            }
            // A site behind that host.
            (Some(_), None) => mac == self.config.vtep_mac && self.is_of_own_subnet(to),
            // Another daemon keeps the peers, and says what is whose.
            _ => mac == device_mac,
        }
    }

    /// The last address of this host's subnet.
    fn is_own_broadcast(&self, address: [u8; 4]) -> bool {
        let next = u32::from_be_bytes(address).wrapping_add(1);
        self.is_of_own_subnet(address) && !self.is_of_own_subnet(next.to_be_bytes())
    }

    /// Not the first two of the host's subnet.
    pub(super) fn is_pod(&self, address: [u8; 4]) -> bool {
        let two_before = u32::from_be_bytes(address).wrapping_sub(2);
        self.is_of_own_subnet(address) && self.is_of_own_subnet(two_before.to_be_bytes())
    }

    /// The stack hands it to a pod: it may have come by the overlay.
    pub(super) fn to_pod(&self, packet: Packet<'_>) -> Fate {
        let frame = packet.frame;
        let unnoted = Fate { note: 0, ..Fate::unchanged(Event::PodNotFromOverlay, packet) };
        let ip = Ipv4::at(frame, ETHERNET).filter(|_| is_ipv4(frame) && self.may_bypass());
        let (Some(ip), Some(pod_mac), Some(gateway_mac)) = (ip, bytes(frame, 0), bytes(frame, 6)) else {
            return unnoted;
        };
        let (kind, received_as) = flow(frame, ip, ETHERNET, End::Destination);
        if !self.is_note(packet.note, Note::Received) {
            return unnoted;
        }
        let unnoted = Fate { event: Some(Event::PodReceived), ..unnoted };
        if kind == Kind::Turn {
            return Fate { flow: FlowChange::Removed, ..unnoted };
        }
        if kind != Kind::Data || !self.is_of_own_subnet(ip.destination()) {
            return unnoted;
        }
        let key = match self.original(packet, received_as) {
            None => return unnoted,
            Some((key, false)) => {
                let flow = FlowChange::OriginalRemoved(key);
                return Fate { event: Some(Event::PodChanged), flow, ..unnoted };
            }
            Some((key, true)) => key,
        };
        // A bridge may have sent every pod a copy.
        if packet.known.sender != Some(pod_mac) || self.is_excluded([key, received_as]) {
            return unnoted;
        }
        let flow = FlowChange::Ingress { key, received_as, pod_mac, gateway_mac };
        Fate { event: Some(Event::PodReleased), flow, ..unnoted }
    }
}
