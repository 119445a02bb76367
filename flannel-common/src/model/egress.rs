//! From pods and the host's stack to the underlay.

use std::vec::Vec;

use super::{
    Counted, Fate, FlowChange, Frame, Note, Packet, Peer, ToldBy, World,
    wire::{ETHERNET, End, IPV4, Ipv4, Kind, TUNNEL, UDP, bytes, flow, is_ipv4, one_hop_on, translated, word},
};
use crate::{
    event::{Event, Outcome},
    flow::FlowKey,
    maps::Config,
    vxlan::NEXT_HOP_MAC,
};

impl World {
    /// The stack routed it to the overlay: it leaves in the tunnel, or goes on to the kernel's device with a note of that.
    pub(super) fn to_overlay(&self, packet: Packet<'_>) -> Fate {
        // What comes here with that note is a copy of what was just sent.
        if self.config.flags & Config::SHOWN != 0 && packet.note == self.note(Note::HandedOn) {
            return Fate { note: 0, ..Fate::unchanged(Event::EncapShown, packet) };
        }
        let fate = self.encapsulated(packet, self.config.flags & Config::QUEUED != 0);
        let outcome = fate.event.map(Event::outcome);
        // What begins or ends a connection, under the name that it has by now; and what is not treated as others are.
        let ended = self.left_by_pod(packet, Kind::Turn).map(|_| FlowChange::Removed);
        let flow = ended.unwrap_or_else(|| self.released(packet));
        let (event, flow) = match (outcome, flow) {
            (Some(Outcome::Forward), FlowChange::OriginalRemoved(_)) => (Some(Event::EncapsulatedChanged), flow),
            (Some(Outcome::Forward), _) | (_, FlowChange::Removed | FlowChange::OriginalRemoved(_)) => {
                (fate.event, flow)
            }
            _ => (fate.event, FlowChange::Unchanged),
        };
        match (event, outcome) {
            // The kernel gives it back, segmented or as it is.
            (Some(failed), Some(Outcome::Drop)) if failed != Event::EncapFailed => {
                Fate { event: Some(Event::EncapHandedOn), flow, note: self.note(Note::HandedOn), ..fate }
            }
            (Some(Event::EncapQueued), _) => Fate { event, flow, note: self.note(Note::HandedOn), ..fate },
            // The kernel sends it, and nothing of ours meets it again.
            (_, Some(Outcome::Pass)) => Fate { event, flow, note: 0, ..fate },
            _ => Fate { event, flow, ..fate },
        }
    }

    /// The stack sends it out on the link: where that is to a peer, by the route that all share, it is given the peer's MAC.
    pub(super) fn to_underlay(&self, packet: Packet<'_>) -> Fate {
        let other = Fate::unchanged(Event::RoutedOther, packet);
        let Some(ip) = Ipv4::at(packet.frame, ETHERNET).filter(|_| is_ipv4(packet.frame)) else { return other };
        let is_shared = packet.frame.starts_with(&NEXT_HOP_MAC);
        if !is_shared && !self.is_note(packet.note, Note::FromPod) {
            return other;
        }
        let ended = self.left_by_pod(packet, Kind::Turn).map(|_| FlowChange::Removed);
        let flow = ended.unwrap_or_else(|| self.released(packet));
        let peer = self.leaseholder(ip.destination());
        let is_noted = matches!(flow, FlowChange::Egress { .. });
        let unnoted = if is_noted { FlowChange::Unchanged } else { flow };
        let Some(peer_on_link) = peer.filter(|peer| peer.has_route && peer.is_on_link) else {
            let event = match (is_shared, peer) {
                (true, Some(_)) => Event::RoutedNotOnLink,
                (true, None) if self.is_of_network(ip.destination()) => Event::RoutedNoPeer,
                // Another network's.
                _ => Event::RoutedOther,
            };
            return Fate { event: Some(event), flow: unnoted, ..other };
        };
        // By a route of the kernel's own: whether that leads to the peer, its MAC says.
        if !is_shared && peer_on_link.next_hop_mac.is_none_or(|mac| !packet.frame.starts_with(&mac)) {
            return Fate { event: Some(Event::RoutedOther), note: 0, flow: unnoted, ..other };
        }
        let frame = match (is_shared, peer_on_link.next_hop_mac) {
            (true, Some(_)) => self.on_link(peer_on_link, &packet.frame[ETHERNET..]),
            _ => Frame::Unchanged,
        };
        let event = match (is_shared, peer_on_link.next_hop_mac, flow) {
            (true, None, _) => Event::RoutedNeighbour,
            (_, _, FlowChange::OriginalRemoved(_)) => Event::RoutedChanged,
            _ => Event::Routed,
        };
        let traffic = Some(Counted::Sent(peer_on_link.address, packet.frame.len() - ETHERNET));
        Fate { event: Some(event), note: 0, flow, frame, traffic, ..other }
    }

    /// A packet that `from_pod` left to the stack has its flow noted, where it is certain which one it had there.
    fn released(&self, packet: Packet<'_>) -> FlowChange {
        let Some(key) = self.left_by_pod(packet, Kind::Data) else { return FlowChange::Unchanged };
        let Some(ip) = Ipv4::at(packet.frame, ETHERNET) else { return FlowChange::Unchanged };
        match self.original(packet, key) {
            Some((original, false)) => FlowChange::OriginalRemoved(original),
            Some((original, true)) if !self.is_excluded([original, key]) => {
                FlowChange::Egress { key: original, sent_as: key, told_by: packet.told_by, dscp: ip.dscp() }
            }
            _ => FlowChange::Unchanged,
        }
    }

    /// The flow of a packet of that kind that `from_pod` left to the stack, as it is now.
    fn left_by_pod(&self, packet: Packet<'_>, wanted: Kind) -> Option<FlowKey> {
        let ip = Ipv4::at(packet.frame, ETHERNET).filter(|_| is_ipv4(packet.frame))?;
        let (kind, key) = flow(packet.frame, ip, ETHERNET, End::Source);
        (self.may_bypass() && kind == wanted && self.is_note(packet.note, Note::FromPod)).then_some(key)
    }

    /// The kernel's vxlan device gives back what was handed to it, or what came in a tunnel: that only with a note.
    pub(super) fn ingress_of_overlay(&self, packet: Packet<'_>) -> Fate {
        if packet.note == self.note(Note::HandedOn) {
            let fate = self.encapsulated(packet, false);
            let event = match fate.event {
                Some(event) if event.outcome() == Outcome::Pass => Some(Event::NotAdmitted),
                other => other,
            };
            return Fate { event, note: 0, ..fate };
        }
        let not_admitted = Fate::unchanged(Event::NotAdmitted, packet);
        let ip = Ipv4::at(packet.frame, ETHERNET).filter(|_| is_ipv4(packet.frame));
        let Some(ip) = ip else { return not_admitted };
        let (kind, key) = flow(packet.frame, ip, ETHERNET, End::Destination);
        match packet.note == self.note(Note::Admitted(key)) {
            // Once: what is in it, if that is a tunnel packet too, was not admitted.
            true => Fate {
                event: Some(if self.is_pod(ip.destination()) { Event::Received } else { Event::ReceivedByHost }),
                note: self.note(Note::Received(key)),
                original: self.left(packet, kind, key),
                ..not_admitted
            },
            false => not_admitted,
        }
    }

    /// A tunnel carries every IPv4 packet that has a peer and a size.
    fn encapsulated(&self, packet: Packet<'_>, is_queued: bool) -> Fate {
        let unchanged = |event| Fate::unchanged(event, packet);
        if !is_ipv4(packet.frame) {
            return unchanged(Event::EncapNotIpv4);
        }
        if !packet.frame.starts_with(&NEXT_HOP_MAC) {
            return unchanged(Event::EncapOtherNextHop);
        }
        let inner = &packet.frame[ETHERNET..];
        let Some(ip) = Ipv4::at(inner, 0) else { return unchanged(Event::EncapTruncated) };
        let Some(peer) = self.leaseholder(ip.destination()) else { return unchanged(Event::EncapNoPeer) };
        if !peer.has_route {
            return unchanged(Event::EncapNoRoute);
        }
        let traffic = Some(Counted::Sent(peer.address, inner.len()));
        if self.is_direct(peer, packet.known.heard) {
            return Fate { frame: self.on_link(peer, inner), note: 0, traffic, ..unchanged(Event::Direct) };
        }
        if is_queued {
            return unchanged(Event::EncapQueued);
        }
        if packet.is_gso {
            return unchanged(Event::EncapNoRoom);
        }
        if inner.len() > self.config.mtu as usize {
            return unchanged(Event::EncapTooBig);
        }
        let event = match peer.next_hop_mac {
            Some(_) => Event::Encapsulated,
            None => Event::EncapsulatedNeighbour,
        };
        Fate { frame: Frame::InTunnel(self.in_tunnel(peer, ip, inner)), note: 0, traffic, ..unchanged(event) }
    }

    /// A pod sent it. Of what takes the stack it is noted who did.
    pub(super) fn ingress_of_pod(&self, packet: Packet<'_>) -> Fate {
        let fate = self.bypassed_or_left(packet);
        let takes_the_stack = fate.event.is_some_and(|event| event.outcome() == Outcome::Pass);
        match takes_the_stack && self.may_bypass() {
            true => Fate { sender: bytes(packet.frame, 6), ..fate },
            false => fate,
        }
    }

    fn bypassed_or_left(&self, packet: Packet<'_>) -> Fate {
        // Whatever note it bears, the pod may have made it.
        let packet = Packet { note: 0, ..packet };
        let other = Fate::unchanged(Event::PodOther, packet);
        let inner = &packet.frame[ETHERNET..];
        let Some(ip) = Ipv4::at(inner, 0).filter(|_| is_ipv4(packet.frame)) else { return other };
        let (from, to) = (ip.source(), ip.destination());

        // Only the beginning of a datagram has a port.
        let has_port = !self.has_no_tunnel()
            && ip.protocol() == UDP
            && !ip.is_later_fragment()
            && inner.len() >= ip.header_len() + 8;
        let is_to_tunnel = has_port && word(inner, ip.header_len() + 2) == Some(self.config.port);
        if is_to_tunnel && (to == self.own_address() || self.is_peer(to)) {
            return Fate { event: Some(Event::PodTunnel), ..other };
        }
        let (kind, key) = flow(packet.frame, ip, ETHERNET, End::Source);
        if kind == Kind::Other || !self.is_of_own_subnet(from) || self.is_of_own_subnet(to) {
            return other;
        }
        if self.may_bypass() && kind == Kind::Data && packet.told_by != ToldBy::default() {
            return other;
        }
        let slow = Fate {
            event: Some(Event::PodViaStack),
            note: self.note(Note::FromPod(key)),
            original: self.left(packet, kind, key),
            ..other
        };
        if kind == Kind::Turn && self.may_bypass() {
            return Fate { flow: FlowChange::Removed, ..slow };
        }
        let sent_as = packet.known.sent_as;
        let is_fit = inner.len() <= self.config.mtu as usize && ip.ttl() > 1 && ip.dscp() == packet.known.dscp;
        if !self.may_bypass() || kind != Kind::Data || !packet.known.egress || !is_fit {
            return slow;
        }
        let Some(peer) = self.leaseholder(sent_as.remote).filter(|peer| peer.has_route) else { return slow };
        if peer.smaller_mtu.is_some_and(|mtu| inner.len() > usize::from(mtu)) {
            return slow;
        }
        let is_direct = self.is_direct(peer, packet.known.heard);
        // What is to be segmented gets no tunnel here.
        if !is_direct && (packet.is_gso || self.has_no_tunnel()) {
            return slow;
        }
        let event = match (sent_as == key, peer.next_hop_mac) {
            _ if is_direct => Event::PodDirect,
            (false, _) => Event::PodTranslated,
            (true, Some(_)) => Event::PodEncapsulated,
            (true, None) => Event::PodEncapsulatedNeighbour,
        };
        let traffic = Some(Counted::Sent(peer.address, inner.len()));
        let inner = translated(one_hop_on(inner), key, sent_as, End::Source);
        let frame = match is_direct {
            true => self.on_link(peer, &inner),
            false => Frame::InTunnel(self.in_tunnel(peer, ip, &inner)),
        };
        Fate { event: Some(event), frame, note: 0, told_by: packet.known.told_by, original: None, traffic, ..slow }
    }

    /// The frame as the underlay's link carries it. A next hop that is not known is left to the kernel.
    fn on_link(&self, peer: &Peer, inner: &[u8]) -> Frame {
        let [to, from] = [peer.next_hop_mac.unwrap_or_default(), self.config.underlay_mac];
        Frame::Is([&to[..], &from, &[8, 0], inner].concat())
    }

    /// The frame with all outer headers (RFC 7348 section 5), zero where the packet alone does not decide.
    fn in_tunnel(&self, peer: &Peer, ip: Ipv4, inner: &[u8]) -> Vec<u8> {
        let config = &self.config;
        let mut frame = Vec::new();
        // A next hop that is not known is left to the kernel.
        frame.extend(peer.next_hop_mac.unwrap_or_default());
        frame.extend(config.underlay_mac);
        frame.extend([8, 0]);
        // RFC 6040, normal mode, but that a congestion mark already made is not made again outside, as Linux does.
        let ecn = if ip.ecn() == 3 { 2 } else { ip.ecn() };
        frame.extend([0x45, ecn]);
        frame.extend(((inner.len() + TUNNEL) as u16).to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, UDP, 0, 0]);
        frame.extend(self.own_address());
        frame.extend(peer.address);
        frame.extend([0, 0]);
        frame.extend(config.port.to_be_bytes());
        frame.extend(((inner.len() + TUNNEL - IPV4) as u16).to_be_bytes());
        frame.extend([0, 0, 8, 0, 0, 0]);
        frame.extend((config.vni << 8).to_be_bytes());
        frame.extend(peer.vtep_mac);
        frame.extend(config.vtep_mac);
        frame.extend([8, 0]);
        frame.extend(inner);
        frame
    }
}
