//! What a rule that packets meet comes to.

use std::{collections::BTreeSet, net::Ipv4Addr};

use ipnet::Ipv4Net;

use super::{
    Surroundings,
    packet::{Nets, Packet, PortRanges, State, TCP, UDP, Way},
    rule::{Act, Hook},
};
use crate::bypass::{Kind, Ports, Protocol, Restriction, Scope};

/// Of how many prefixes, ranges of ports or pods one rule may be. One of more is taken to be about everything.
const MOST: usize = 32;

/// A rule, and what of the overlay's packets may meet it there.
pub(super) struct Finding {
    /// As an operator finds it.
    pub(super) subject: String,
    pub(super) hook: Hook,
    pub(super) act: Act,
    /// As it was at the beginning of the way, and as it is met.
    pub(super) packets: Vec<(Packet, Packet)>,
}

impl Finding {
    /// The restrictions that it comes to.
    pub(super) fn restrictions(&self, around: &Surroundings) -> Vec<Restriction> {
        let tunnel = self.packets.first().is_some_and(|(_, met)| matches!(met.way, Way::TunnelIn | Way::TunnelOut));
        let (kind, subject, scopes) = match (&self.act, tunnel) {
            (_, true) => return self.of_tunnel(around).into_iter().collect(),
            (Act::Alters(_) | Act::Drops | Act::Untracks, _) => return Vec::new(),
            (Act::Helper(name), _) => (Kind::Helper, format!("{}: {name}", self.subject), self.scopes(around)),
            (Act::Decides(what), _) if self.is_first_look() => {
                let subject =
                    format!("{}: {what}: sees one packet in a second of flows of which nothing is noted", self.subject);
                (Kind::Rule, subject, [Scope::Nothing].into())
            }
            (Act::Decides(what), _) if self.is_for_all() => {
                (Kind::Rule, format!("{}: {what}", self.subject), self.scopes(around))
            }
            (Act::Decides(what), _) if self.is_for_unanswered() => {
                let subject =
                    format!("{}: {what}: sees one packet in a second of UDP that is not answered", self.subject);
                (Kind::Rule, subject, [Scope::Nothing].into())
            }
            (Act::Observes(what), _) if self.is_for_all() => {
                let subject = format!("{}: {what}: sees one packet in a second of each flow", self.subject);
                (Kind::Rule, subject, [Scope::Nothing].into())
            }
            (Act::Decides(_) | Act::Observes(_), _) => return Vec::new(),
        };
        scopes.into_iter().map(|scope| Restriction { kind, subject: subject.clone(), scope }).collect()
    }

    /// Whether it is met by more than the first packets of connections.
    fn is_for_all(&self) -> bool {
        self.packets.iter().any(|(_, met)| met.state != State::New)
    }

    /// Whether it is a queue for connections of which nothing is noted yet: who reads it notes what may go on.
    fn is_first_look(&self) -> bool {
        matches!(&self.act, Act::Decides(what) if what.eq_ignore_ascii_case("queue") || what == "NFQUEUE")
            && self.is_for_all()
            && self.packets.iter().all(|(_, met)| met.is_first_look || met.state == State::New)
    }

    /// Whether it is met by all packets of UDP that nobody answers.
    fn is_for_unanswered(&self) -> bool {
        self.packets.iter().any(|(_, met)| (met.state, met.protocol) == (State::New, UDP))
    }

    /// The narrowest that holds all that may meet it.
    fn scopes(&self, around: &Surroundings) -> BTreeSet<Scope> {
        let mut scopes = BTreeSet::new();
        // A helper is given with the first packet of a connection; all others follow.
        let counts = |met: &Packet| met.state != State::New || matches!(self.act, Act::Helper(_));
        for (begun, met) in self.packets.iter().filter(|(_, met)| counts(met)) {
            match scopes_of(begun, met, around) {
                Some(of_packet) => scopes.extend(of_packet),
                None => return self.of_protocol(),
            }
        }
        if scopes.len() > MOST { self.of_protocol() } else { scopes }
    }

    /// What has no address or port of its own may still be of one protocol.
    fn of_protocol(&self) -> BTreeSet<Scope> {
        let is_only = |protocol| self.packets.iter().all(|(_, met)| met.protocol == protocol);
        let all = |protocol| Scope::Ports(Ports::new(protocol, &(0..=u16::MAX)));
        let scope = if is_only(TCP) {
            all(Protocol::Tcp)
        } else if is_only(UDP) {
            all(Protocol::Udp)
        } else {
            Scope::Everything
        };
        [scope].into()
    }

    /// Tunnel packets do not pass these rules; with flannel they do. Only what is about them by address or port is named.
    fn of_tunnel(&self, around: &Surroundings) -> Option<Restriction> {
        let (begun, met) = self.packets.first()?;
        let names_port = met.destination_ports != begun.destination_ports;
        let is_meant = (met.source != begun.source || met.destination != begun.destination || names_port)
            && met.source_ports == begun.source_ports;
        let is_sure = met.is_sure();
        let what = match &self.act {
            Act::Drops if is_sure => "drops packets".to_owned(),
            Act::Alters(what) if is_sure => format!("sets {what} of packets"),
            Act::Decides(what) | Act::Observes(what) => format!("has {what} for packets"),
            _ => return None,
        };
        if !is_meant {
            return None;
        }
        let (preposition, nets) = match met.way {
            Way::TunnelIn => ("from", &met.source),
            _ => ("to", &met.destination),
        };
        let concerns = |peer: &Ipv4Addr| nets.0.iter().any(|net| net.contains(peer));
        if !around.peers.iter().any(concerns) {
            return None;
        }
        let whom = if nets.0.iter().any(|net| net.prefix_len() == 0) {
            format!("to port {}", around.port)
        } else {
            let some: Vec<_> = nets.0.iter().take(3).map(written).collect();
            format!("{preposition} {}{}", some.join(", "), if nets.0.len() > 3 { ", ..." } else { "" })
        };
        let hook = self.hook.label();
        let subject = format!("{} {what} {whom}: tunnel packets do not pass {hook}", self.subject);
        // Left in their tunnel, packets meet it as with flannel.
        let scope = match (&self.act, met.way) {
            (Act::Decides(_), Way::TunnelIn) => Scope::ExternalInterface,
            _ => Scope::Nothing,
        };
        Some(Restriction { kind: Kind::Rule, subject, scope })
    }
}

fn written(net: &Ipv4Net) -> String {
    if net.prefix_len() == 32 { net.addr().to_string() } else { net.to_string() }
}

/// By pod, address or port, whichever is narrowest; [`None`] for all of them.
fn scopes_of(begun: &Packet, met: &Packet, around: &Surroundings) -> Option<BTreeSet<Scope>> {
    let devices = match met.way {
        Way::Out => (&begun.input, &met.input),
        _ => (&begun.output, &met.output),
    };
    if devices.0 != devices.1 && devices.1.len() <= MOST {
        let pods: Option<BTreeSet<_>> =
            devices.1.iter().map(|device| Some(Scope::Pod(around.pods.get(&**device)?.index))).collect();
        if pods.is_some() {
            return pods;
        }
    }
    let nets = [(&begun.source, &met.source), (&begun.destination, &met.destination)];
    let narrowed = nets.into_iter().filter(|(begun, met)| begun != met && met.0.len() <= MOST);
    let addresses = |nets: &Nets| -> u64 { nets.0.iter().map(|net| 1_u64 << (32 - u32::from(net.prefix_len()))).sum() };
    let narrowest = narrowed.map(|(_, met)| met).min_by_key(|nets| addresses(nets));
    let ranges = [
        (&begun.source_ports, &met.source_ports),
        (&begun.destination_ports, &met.destination_ports),
        (&begun.either_ports, &met.either_ports),
    ];
    let narrowed = ranges.into_iter().filter(|(begun, met)| begun != met && met.0.len() <= MOST);
    let width = |ranges: &PortRanges| -> u32 {
        ranges.0.iter().map(|(first, last)| u32::from(*last) - u32::from(*first) + 1).sum()
    };
    let ports = narrowed.map(|(_, met)| met).min_by_key(|ranges| width(ranges));
    match (narrowest, ports) {
        // A subnet of pods has more flows than a port.
        (Some(nets), ports) if ports.is_none() || addresses(nets) <= 4 => {
            Some(nets.0.iter().map(|net| Scope::Addresses(*net)).collect())
        }
        (_, Some(ports)) => {
            let protocol = if met.protocol == TCP { Protocol::Tcp } else { Protocol::Udp };
            Some(ports.0.iter().map(|(first, last)| Scope::Ports(Ports::new(protocol, &(*first..=*last)))).collect())
        }
        _ => None,
    }
}
