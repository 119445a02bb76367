//! What others' packet rules do to each packet: looked for in the rule sets of nftables and of both iptables.
//!
//! * [`Surroundings`] — which packets are the overlay's; [`inspect`] — what those meet; pure
//! * `packet` — packets and the conditions of rules; `rule` — rule sets in one shape; `walk` — the way through them
//! * `nft`, `nft_match`, `iptables` — the two languages
//! * `stops` — what drops them, for who asks why nothing arrives
//! * `finding` — what a rule comes to; `marks` — which marks packets may have
//! * [`reader`] — the task that looks again where something may have changed; `events`, `messages` — what nf_tables tells of
//!   changes; `legacy` — whether x_tables has any
//!
//! # What is looked for
//!
//! Rules that decide on a packet by something else than what all packets of its flow have: limits, quotas, chance, queues,
//! copies, payload. Their flows take the stack, as far as the rule's own conditions tell which those are: a superset, since
//! what can't be told narrows nothing. Rules that log or count are named only. What changes a packet (marks, DSCP, TTL) is
//! seen by the programs where the packet comes out; chains of type `nat` meet the first packet of a connection only.
//!
//! A rule counts where a packet can get to it: in a hook that forwarded packets pass, by its jumps, its conditions, and with
//! nothing in front that surely decides. So what stands behind `ct state established accept` is met by UDP that nobody
//! answers, and by nothing else that can bypass; a rule there decides on that again in each second, as the stack does.
//!
//! The tunnel packets themselves pass `INPUT` and `OUTPUT` with flannel and neither here. Rules there that are about a peer's
//! address or the tunnel's port are named. Where any does more than let them in, those that take the stack pass `INPUT` here too
//! ([`concerns_tunnel`]).

mod events;
mod finding;
mod iptables;
mod legacy;
mod marks;
mod messages;
mod nft;
mod nft_match;
mod packet;
pub mod reader;
mod rule;
mod stops;
mod walk;

#[cfg(test)]
mod tests;

#[cfg(test)]
mod fixtures;

#[cfg(test)]
mod tunnel_tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::Arc,
};

use ipnet::Ipv4Net;

pub use self::stops::{Stop, Stopped, stops};
use self::{
    finding::Finding,
    packet::{Devices, Nets, Packet, PortRanges, State, TCP, UDP, Way},
    rule::{Act, Base, Family, Hook, Table},
};
use crate::{bypass::Restriction, netfilter::Listing};

/// Up to here, conntrack has not seen the packet (`NF_IP_PRI_CONNTRACK`).
const CONNTRACK: i32 = -200;

/// What tells the packets of the overlay from others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Surroundings {
    /// The overlay's Network.
    pub network: Ipv4Net,
    /// This host's subnet.
    pub subnet: Ipv4Net,
    /// The name of `flannel.<VNI>`.
    pub overlay: String,
    /// The names of the links that tunnel packets come in by, and leave by.
    pub underlay: BTreeSet<String>,
    /// This host's VTEP address.
    pub address: Ipv4Addr,
    /// The tunnel's UDP port, host order.
    pub port: u16,
    /// The bridges of pods.
    pub bridges: BTreeSet<String>,
    /// The host's sides of pods' veths.
    pub pods: BTreeMap<String, Pod>,
    /// The VTEP addresses of peers.
    pub peers: Arc<BTreeSet<Ipv4Addr>>,
}

/// The host's side of a pod's veth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its number.
    pub index: u32,
    /// Whether it is a port of a bridge, which is the device then that packets come by.
    pub is_bridged: bool,
}

/// A listing in one shape.
#[derive(Clone, Debug, Default)]
pub struct RuleSets(Vec<Table>);

impl RuleSets {
    /// What cannot be read has no rules.
    #[must_use]
    pub fn parse(listing: &Listing) -> Self {
        let mut tables = Vec::new();
        listing.iptables.iter().for_each(|saved| tables.extend(iptables::parse(saved)));
        for text in &listing.nft {
            let document = serde_json::from_str(text).unwrap_or_default();
            // iptables says more of its own.
            let is_iptables = |table: &Table| tables.iter().any(|other: &Table| other.id == table.id);
            let others: Vec<_> = nft::parse(&document).into_iter().filter(|table| !is_iptables(table)).collect();
            tables.extend(others);
        }
        Self(tables)
    }
}

/// What of the rules the overlay's packets can meet.
#[must_use]
pub fn inspect(sets: &RuleSets, around: &Surroundings) -> Vec<Restriction> {
    let mut findings = BTreeMap::new();
    let mut untracked = BTreeSet::new();
    for table in &sets.0 {
        look_through(table, around, None, &mut findings, &mut untracked);
    }
    if !untracked.is_empty() {
        for table in &sets.0 {
            look_through(table, around, Some(&untracked), &mut findings, &mut BTreeSet::new());
        }
    }
    let mut restrictions: Vec<_> =
        findings.into_values().flat_map(|finding: Finding| finding.restrictions(around)).collect();
    restrictions.sort();
    restrictions.dedup();
    restrictions
}

/// Whether what comes in from peers in the tunnel meets a rule, or a chain's policy, that does more than to let it go on. What may
/// be met is: with flannel it would be.
#[must_use]
pub fn concerns_tunnel(sets: &RuleSets, around: &Surroundings) -> bool {
    sets.0.iter().any(|table| {
        table.bases().any(|(name, base)| {
            let incoming = packets(table.family, base, around, None);
            incoming.into_iter().filter(|(_, packet)| packet.way == Way::TunnelIn).any(|(_, packet)| {
                let (met, end) = walk::walk(table, name, &packet);
                let is_of_peer = |met: &walk::Met<'_>| {
                    let mut nets = met.packet.source.0.iter();
                    met.act != Act::Untracks && nets.any(|net| around.peers.iter().any(|peer| net.contains(peer)))
                };
                base.drops && end != walk::End::Decided || met.iter().any(is_of_peer)
            })
        })
    })
}

type Findings = BTreeMap<(String, Act, Option<Hook>), Finding>;
/// Of which packets some have no connection.
type Untracked = BTreeSet<(Way, u8)>;

/// Adds what is met in a table. Where some packets are known to have no connection, these; else all others.
fn look_through(
    table: &Table,
    around: &Surroundings,
    untracked: Option<&Untracked>,
    findings: &mut Findings,
    untracks: &mut Untracked,
) {
    let mut bases: Vec<_> = table.bases().collect();
    bases.sort_by_key(|(name, base)| (base.priority, *name));
    for (name, base) in bases {
        let reached = table.reached_from(name);
        let rules = || reached.iter().filter_map(|name| table.chains.get(*name)).flat_map(|chain| &chain.rules);
        let has = |is: fn(&Act) -> bool| rules().any(|rule| rule.acts.iter().any(is));
        let is_about_all = has(|act| !matches!(act, Act::Alters(_)));
        for (all, packet) in packets(table.family, base, around, untracked) {
            let is_tunnel = matches!(packet.way, Way::TunnelIn | Way::TunnelOut);
            if !is_about_all && !is_tunnel {
                continue;
            }
            for met in walk::walk(table, name, &packet).0 {
                if met.act == Act::Untracks {
                    untracks.insert((met.packet.way, met.packet.protocol));
                    continue;
                }
                let subject = format!("{} {} {}", table.label, met.chain, met.rule.name);
                let key = (subject.clone(), met.act.clone(), is_tunnel.then_some(base.hook));
                let (hook, act) = (base.hook, met.act);
                let finding =
                    findings.entry(key).or_insert_with(|| Finding { subject, hook, act, packets: Vec::new() });
                finding.packets.push((all.clone(), met.packet));
            }
        }
    }
}

/// What of the overlay's packets a hook is for, and what of those a chain is called for.
fn packets(family: Family, base: &Base, around: &Surroundings, untracked: Option<&Untracked>) -> Vec<(Packet, Packet)> {
    let bridge_or_pods = || {
        let routed = around.pods.iter().filter(|(_, pod)| !pod.is_bridged).map(|(name, _)| name.as_str());
        devices(around.bridges.iter().map(String::as_str).chain(routed))
    };
    let ports = || devices(around.pods.iter().filter(|(_, pod)| pod.is_bridged).map(|(name, _)| name.as_str()));
    let all = || {
        let bridges = around.bridges.iter().map(String::as_str);
        devices(bridges.chain(around.pods.keys().map(String::as_str)))
    };
    let overlay = || devices([around.overlay.as_str()]);
    let underlay = || devices(around.underlay.iter().map(String::as_str));
    let none = || devices([]);
    let ways: Vec<(Way, Devices, Devices)> = match (family, base.hook) {
        (Family::Ip, Hook::Prerouting) => vec![
            (Way::Out, bridge_or_pods(), none()),
            (Way::In, overlay(), none()),
            (Way::TunnelIn, underlay(), none()),
        ],
        (Family::Ip, Hook::Forward) => {
            vec![(Way::Out, bridge_or_pods(), overlay()), (Way::In, overlay(), bridge_or_pods())]
        }
        // nftables knows the first device here, iptables does not.
        (Family::Ip, Hook::Postrouting) => vec![
            (Way::Out, bridge_or_pods(), overlay()),
            (Way::In, overlay(), bridge_or_pods()),
            (Way::TunnelOut, none(), underlay()),
        ],
        (Family::Ip, Hook::Input) => vec![(Way::TunnelIn, underlay(), none())],
        (Family::Ip, Hook::Output) => vec![(Way::TunnelOut, none(), underlay())],
        (Family::Bridge, Hook::Prerouting | Hook::Input) => vec![(Way::Out, ports(), none())],
        (Family::Bridge, Hook::Output | Hook::Postrouting) => vec![(Way::In, none(), ports())],
        (Family::Ip | Family::Netdev, Hook::Ingress) => {
            vec![(Way::Out, all(), none()), (Way::In, overlay(), none()), (Way::TunnelIn, underlay(), none())]
        }
        (Family::Netdev, Hook::Egress) => {
            vec![(Way::In, none(), all()), (Way::Out, none(), overlay()), (Way::TunnelOut, none(), underlay())]
        }
        (Family::Ip, Hook::Egress) | (Family::Bridge | Family::Netdev, _) => Vec::new(),
    };
    let own = |devices: &Devices| -> Devices {
        let is_own = |device: &&Arc<str>| base.devices.is_empty() || base.devices.iter().any(|own| **own == ***device);
        devices.iter().filter(is_own).cloned().collect()
    };
    let mut packets = Vec::new();
    for (way, input, output) in ways {
        let (own_input, own_output) = (own(&input), own(&output));
        // What has no device of those that it could have is not there.
        if own_input.is_empty() && own_output.is_empty() {
            continue;
        }
        for packet in of_way(way, &input, &output, (family, base), around, untracked) {
            let met = Packet { input: Arc::clone(&own_input), output: Arc::clone(&own_output), ..packet.clone() };
            packets.push((packet, met));
        }
    }
    packets
}

fn devices<'a>(names: impl IntoIterator<Item = &'a str>) -> Devices {
    names.into_iter().map(Arc::from).collect()
}

fn of_way(
    way: Way,
    input: &Devices,
    output: &Devices,
    (family, base): (Family, &Base),
    around: &Surroundings,
    untracked: Option<&Untracked>,
) -> Vec<Packet> {
    let own = || Nets::of(&[around.subnet]);
    let others = || Nets::without(around.network, around.subnet);
    let is_early = matches!(base.hook, Hook::Prerouting | Hook::Ingress);
    let is_late = matches!(base.hook, Hook::Postrouting | Hook::Egress);
    let (source, destination) = match way {
        // Before its translation it may be for a service, and after, from one.
        Way::Out => (own(), if is_early { Nets::any() } else { others() }),
        Way::In => (if is_late { Nets::any() } else { others() }, own()),
        Way::TunnelOut => (Nets::of(&[around.address.into()]), Nets::any()),
        Way::TunnelIn => (Nets::any(), Nets::of(&[around.address.into()])),
    };
    let is_tunnel = matches!(way, Way::TunnelIn | Way::TunnelOut);
    let packet = |protocol, state| Packet {
        way,
        protocol,
        state,
        input: Arc::clone(input),
        output: Arc::clone(output),
        source: source.clone(),
        destination: destination.clone(),
        source_ports: PortRanges::any(),
        destination_ports: PortRanges::any(),
        tunnel_port: is_tunnel.then_some(around.port),
        either_ports: PortRanges::any(),
        is_unsure: false,
        is_first_look: false,
        gone: Vec::new(),
    };
    let is_unseen = base.hook == Hook::Prerouting && base.priority <= CONNTRACK
        || family != Family::Ip
        || base.hook == Hook::Ingress;
    match (is_tunnel, untracked, is_unseen) {
        (true, None, _) => vec![packet(UDP, State::New)],
        (true, Some(_), _) | (false, Some(_), true) => Vec::new(),
        (false, Some(untracked), false) => {
            let of_way = untracked.iter().filter(|(of, _)| *of == way);
            of_way.map(|(_, protocol)| packet(*protocol, State::Untracked)).collect()
        }
        (false, None, true) => vec![packet(TCP, State::Unseen), packet(UDP, State::Unseen)],
        (false, None, false) => [State::Established, State::New]
            .into_iter()
            .flat_map(|state| [packet(TCP, state), packet(UDP, state)])
            .collect(),
    }
}
