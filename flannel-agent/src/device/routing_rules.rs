//! Policy routing: rules (`ip rule`) by which tunnel packets to one peer could take different ways.
//!
//! The kernel is asked for the way to each peer by a tunnel packet's addresses, protocol, ports and user
//! ([`next_hop`](super::next_hop)), and its answer follows all rules that these decide on. What is left are rules by the mark, which
//! a tunnel packet has of the packet inside, and by source ports, of which each flow has its own: where there are such, the programs
//! ask the kernel for each packet.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
};

use flannel_common::flow::SourcePorts;
use ipnet::Ipv4Net;
use rtnetlink::{
    IpVersion,
    packet_core::Nla as _,
    packet_route::{
        route::{RouteAttribute, RouteFlags, RouteMessage, RouteType},
        rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage, RulePortRange},
    },
};

use super::{DeviceError, Netlink, next_hop::WayKey};

// linux/fib_rules.h, Linux 6.13 and later.
const FRA_DSCP: u16 = 25;
const FRA_SPORT_MASK: u16 = 28;

/// `lo`: packets of this host's own have it for the device that they came in by.
const LOOPBACK: &str = "lo";
/// Of so many peers it is asked whether a rule leads them elsewhere.
const MOST_PEERS: usize = 64;

/// The tunnel packets of this host.
#[derive(Clone, Copy, Debug)]
pub struct TunnelPackets {
    /// Those without a mark, by the first source port.
    pub key: WayKey,
    /// The ports that they are sent from.
    pub source_ports: SourcePorts,
    /// The bits that their marks may have.
    pub marks: u32,
}

/// A rule by which some of the tunnel packets to a peer take another way than the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyRule {
    /// As `ip rule` shows it.
    pub text: String,
    /// To which peers; [`None`] for all.
    pub to: Option<Ipv4Net>,
    /// Whether it is by the mark.
    pub is_by_mark: bool,
    /// The devices of the other way.
    pub devices: BTreeSet<u32>,
}

/// A rule that some tunnel packets to a peer meet, and others do not.
#[derive(Clone, Debug, PartialEq, Eq)]
struct PacketRule {
    /// As `ip rule` shows it.
    text: String,
    /// Where to. All others are not met.
    to: Option<Ipv4Net>,
    /// Packets to which it is another rule than to those that the ways are asked for.
    others: Vec<WayKey>,
}

impl Netlink {
    /// The rules by which some of the tunnel packets would take another way than the one that all of them take.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn rules_by_packet(
        &self,
        tunnel: TunnelPackets,
        peers: &BTreeSet<Ipv4Addr>,
    ) -> Result<Vec<PolicyRule>, DeviceError> {
        let rules = self.dump("routing rules", || self.handle.rule().get(IpVersion::V4).execute()).await?;
        let mut found = Vec::new();
        for rule in rules.iter().filter_map(|rule| PacketRule::of(rule, tunnel)) {
            if let Some(devices) = self.elsewhere(&rule, tunnel.key, peers).await {
                let is_by_mark = rule.others.iter().any(|other| other.mark != tunnel.key.mark);
                found.push(PolicyRule { text: rule.text, to: rule.to, is_by_mark, devices });
            }
        }
        Ok(found)
    }

    /// The devices that a rule leads to some peer by, where that is another way than that of all packets.
    async fn elsewhere(&self, rule: &PacketRule, asked: WayKey, peers: &BTreeSet<Ipv4Addr>) -> Option<BTreeSet<u32>> {
        let is_met = |peer: &&Ipv4Addr| rule.to.is_none_or(|to| to.contains(*peer));
        let met: Vec<_> = peers.iter().filter(is_met).collect();
        // Of so many it is taken for given.
        let mut elsewhere = (met.len() > MOST_PEERS).then(BTreeSet::new);
        for peer in met.into_iter().take(MOST_PEERS) {
            let usual = self.found_route(*peer, asked).await;
            for other in &rule.others {
                let found = self.found_route(*peer, *other).await;
                // What a mark keeps on this host was kept from the overlay by it.
                if found.as_ref().is_some_and(|route| route.header.kind == RouteType::Local) {
                    continue;
                }
                if found.as_ref().map(where_to) != usual.as_ref().map(where_to) {
                    elsewhere.get_or_insert_default().extend(found.iter().flat_map(devices));
                }
            }
        }
        elsewhere
    }

    /// The route, whole: of several next hops, each port would be answered with another.
    async fn found_route(&self, peer: Ipv4Addr, key: WayKey) -> Option<RouteMessage> {
        self.way(peer, key, RouteFlags::FibMatch).await.ok()
    }
}

/// By what the ways of two routes differ.
fn where_to(route: &RouteMessage) -> (RouteType, Vec<&RouteAttribute>) {
    let is_way = |attribute: &&RouteAttribute| {
        use RouteAttribute::{Gateway, MultiPath, NhId, Oif, Via};
        matches!(attribute, Gateway(_) | Via(_) | Oif(_) | MultiPath(_) | NhId(_))
    };
    (route.header.kind, route.attributes.iter().filter(is_way).collect())
}

fn devices(route: &RouteMessage) -> impl Iterator<Item = u32> {
    route.attributes.iter().flat_map(|attribute| match attribute {
        RouteAttribute::Oif(device) => vec![*device],
        RouteAttribute::MultiPath(next_hops) => next_hops.iter().map(|next_hop| next_hop.interface_index).collect(),
        _ => Vec::new(),
    })
}

impl PacketRule {
    /// [`None`] where all tunnel packets meet it, or none does, as far as it is not by the peer (`fib_rule_match`,
    /// net/core/fib_rules.c; `fib4_rule_match`, net/ipv4/fib_rules.c).
    fn of(message: &RuleMessage, tunnel: TunnelPackets) -> Option<Self> {
        let TunnelPackets { key, source_ports, marks } = tunnel;
        let selectors = Selectors::of(message, key)?;
        let other = |mark: Option<u32>, source_port: Option<u16>| {
            Some(WayKey { mark: mark?, source_port: source_port?, ..key })
        };
        let port = |is_met: bool| (source_ports.min..source_ports.max).find(|port| selectors.has_port(*port) == is_met);
        let others: Vec<_> = if selectors.has_mark(key.mark) && selectors.has_port(key.source_port) {
            [other(selectors.mark_without(marks), Some(key.source_port)), other(Some(key.mark), port(false))]
                .into_iter()
                .flatten()
                .collect()
        } else {
            other(selectors.mark_within(marks), port(true)).into_iter().collect()
        };
        let text = selectors.text(message);
        (!others.is_empty()).then_some(Self { text, to: selectors.to, others })
    }
}

/// What a rule that tunnel packets can meet asks of them besides.
#[derive(Debug, Default)]
struct Selectors {
    mark: u32,
    mask: Option<u32>,
    ports: Option<RulePortRange>,
    ports_mask: Option<u16>,
    to: Option<Ipv4Net>,
}

impl Selectors {
    /// [`None`] where no tunnel packet meets it.
    fn of(message: &RuleMessage, key: WayKey) -> Option<Self> {
        let mut of = Self::default();
        // Without `dsfield`, the way is chosen by a TOS of 0, whatever the packet inside has.
        let mut is_met = message.header.tos == 0;
        for attribute in &message.attributes {
            match attribute {
                RuleAttribute::FwMark(mark) => of.mark = *mark,
                RuleAttribute::FwMask(mask) => of.mask = Some(*mask),
                RuleAttribute::SourcePortRange(ports) => of.ports = Some(*ports),
                RuleAttribute::Other(other) if other.kind() == FRA_SPORT_MASK => {
                    let mut mask = [0; 2];
                    is_met &= other.value_len() == mask.len();
                    if is_met {
                        other.emit_value(&mut mask);
                        of.ports_mask = Some(u16::from_ne_bytes(mask));
                    }
                }
                RuleAttribute::Destination(IpAddr::V4(to)) => of.to = Ipv4Net::new(*to, message.header.dst_len).ok(),
                RuleAttribute::Source(IpAddr::V4(from)) => {
                    let from = Ipv4Net::new(*from, message.header.src_len);
                    is_met &= from.is_ok_and(|from| from.contains(&key.source));
                }
                RuleAttribute::Iifname(device) => is_met &= device == LOOPBACK,
                // flannel's forwarding entries name no device.
                RuleAttribute::Oifname(_) | RuleAttribute::TunId(_) | RuleAttribute::L3MDev(true) => is_met = false,
                RuleAttribute::UidRange(users) => is_met &= users.start == 0,
                RuleAttribute::IpProtocol(protocol) => {
                    is_met &= i32::from(*protocol) == nix::libc::IPPROTO_UDP;
                }
                RuleAttribute::DestinationPortRange(ports) => is_met &= (ports.start..=ports.end).contains(&key.port),
                RuleAttribute::Other(other) if other.kind() == FRA_DSCP => {
                    let mut dscp = [0; 1];
                    if other.value_len() == dscp.len() {
                        other.emit_value(&mut dscp);
                    }
                    is_met &= dscp == [0];
                }
                _ => {}
            }
        }
        is_met.then_some(of)
    }

    fn mask(&self) -> u32 {
        self.mask.unwrap_or(if self.mark == 0 { 0 } else { u32::MAX })
    }

    fn has_mark(&self, mark: u32) -> bool {
        (self.mark ^ mark) & self.mask() == 0
    }

    /// A mark of these bits that it is met with.
    fn mark_within(&self, bits: u32) -> Option<u32> {
        let mark = self.mark & self.mask();
        (mark & !bits == 0).then_some(mark)
    }

    /// One that it is not met with.
    fn mark_without(&self, bits: u32) -> Option<u32> {
        let bits = bits & self.mask();
        (bits != 0).then_some(bits & bits.wrapping_neg())
    }

    fn has_port(&self, port: u16) -> bool {
        match (self.ports, self.ports_mask) {
            (None, _) => true,
            (Some(ports), Some(mask)) if mask != 0 => (ports.start ^ port) & mask == 0,
            (Some(ports), _) => (ports.start..=ports.end).contains(&port),
        }
    }

    fn text(&self, message: &RuleMessage) -> String {
        let priority = message.attributes.iter().find_map(|attribute| match attribute {
            RuleAttribute::Priority(priority) => Some(*priority),
            _ => None,
        });
        let mut text = format!("ip rule {}:", priority.unwrap_or_default());
        if message.header.flags.contains(RuleFlags::Invert) {
            text += " not";
        }
        match self.mask() {
            0 => {}
            u32::MAX => text += &format!(" fwmark {:#x}", self.mark),
            mask => text += &format!(" fwmark {:#x}/{mask:#x}", self.mark),
        }
        match self.ports {
            Some(RulePortRange { start, end }) if start == end => text += &format!(" sport {start}"),
            Some(RulePortRange { start, end }) => text += &format!(" sport {start}-{end}"),
            None => {}
        }
        let table = message.attributes.iter().find_map(|attribute| match attribute {
            RuleAttribute::Table(table) => Some(*table),
            _ => None,
        });
        let table = table.unwrap_or(message.header.table.into());
        text + &match message.header.action {
            RuleAction::ToTable => format!(" lookup {table}"),
            RuleAction::Goto => " goto".to_owned(),
            RuleAction::Nop => " nop".to_owned(),
            RuleAction::Blackhole => " blackhole".to_owned(),
            RuleAction::Unreachable => " unreachable".to_owned(),
            RuleAction::Prohibit => " prohibit".to_owned(),
            other => format!(" action {}", u8::from(other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_route::rule::RuleUidRange;

    use super::*;

    const TUNNEL: TunnelPackets = TunnelPackets {
        key: WayKey { source: Ipv4Addr::new(192, 168, 64, 1), port: 8472, source_port: 32768, mark: 0 },
        source_ports: SourcePorts { min: 32768, max: 60999 },
        marks: 0,
    };

    fn rule(attributes: impl IntoIterator<Item = RuleAttribute>) -> RuleMessage {
        let mut rule = RuleMessage::default();
        rule.header.action = RuleAction::ToTable;
        rule.attributes = vec![RuleAttribute::Priority(100), RuleAttribute::Table(1000)];
        rule.attributes.extend(attributes);
        rule
    }

    fn marked(mark: u32, mask: u32) -> [RuleAttribute; 2] {
        [RuleAttribute::FwMark(mark), RuleAttribute::FwMask(mask)]
    }

    /// Marks and source ports of the packets that are asked for besides, of a host whose packets can have these marks.
    fn others(rule: &RuleMessage, marks: u32) -> Vec<(u32, u16)> {
        let found = PacketRule::of(rule, TunnelPackets { marks, ..TUNNEL });
        found.into_iter().flat_map(|rule| rule.others).map(|key| (key.mark, key.source_port)).collect()
    }

    fn ports(start: u16, end: u16) -> RuleAttribute {
        RuleAttribute::SourcePortRange(RulePortRange { start, end })
    }

    #[test]
    fn what_the_kernels_answer_follows_is_no_rule_by_packet() {
        let destination = |port| RuleAttribute::DestinationPortRange(RulePortRange { start: port, end: port });
        for attributes in [
            vec![],
            vec![destination(8472), RuleAttribute::IpProtocol(nix::libc::IPPROTO_UDP.into())],
            vec![RuleAttribute::UidRange(RuleUidRange { start: 0, end: 0 })],
            vec![RuleAttribute::Source([192, 168, 64, 1].into())],
            vec![RuleAttribute::SuppressPrefixLen(0)],
            vec![RuleAttribute::L3MDev(true)],
            vec![RuleAttribute::Oifname("eth0".to_owned())],
            vec![ports(1, 65535)],
            vec![ports(1, 1024)],
        ] {
            let mut rule = rule(attributes);
            rule.header.src_len = 32;
            assert_eq!(others(&rule, u32::MAX), [], "{:?}", rule.attributes);
            rule.header.flags = RuleFlags::Invert;
            assert_eq!(others(&rule, u32::MAX), [], "not {:?}", rule.attributes);
        }
    }

    #[test]
    fn a_mark_that_no_packet_can_have_is_met_by_none() {
        // kube-proxy marks what it masquerades.
        const KUBE_PROXY: u32 = 0x4000;
        for (what, mark, mask, marks, expected) in [
            ("tailscale's", 0x80000, 0xff0000, KUBE_PROXY, None),
            ("wg-quick's", 51820, u32::MAX, KUBE_PROXY, None),
            ("Cilium's", 0x200, 0xf00, KUBE_PROXY, None),
            ("AWS' VPC CNI's", 0x80, 0x80, KUBE_PROXY | 0x80, Some(0x80)),
            ("an operator's", 5, u32::MAX, 7, Some(5)),
            ("kube-proxy's, as if it were none", 0, 0x4000, KUBE_PROXY, Some(0x4000)),
            ("its own bit only", 0x4000, 0x4000, 0x14000, Some(0x4000)),
            ("none", 0, 0, u32::MAX, None),
        ] {
            let mut rule = rule(marked(mark, mask));
            let expected: Vec<_> = expected.into_iter().map(|mark| (mark, 32768)).collect();
            assert_eq!(others(&rule, marks), expected, "{what}");
            rule.header.flags = RuleFlags::Invert;
            assert_eq!(others(&rule, marks), expected, "not {what}");
        }
        assert_eq!(others(&rule([RuleAttribute::FwMark(5)]), 5), [(5, 32768)], "without a mask");
    }

    #[test]
    fn a_rule_that_tunnel_packets_can_not_meet_is_none_by_packet() {
        let fwmark = || marked(5, u32::MAX).to_vec();
        let port = |port| RulePortRange { start: port, end: port };
        for (attribute, expected) in [
            (RuleAttribute::Iifname("cni0".to_owned()), false),
            (RuleAttribute::Iifname("lo".to_owned()), true),
            (RuleAttribute::Oifname("eth0".to_owned()), false),
            (RuleAttribute::IpProtocol(nix::libc::IPPROTO_TCP.into()), false),
            (RuleAttribute::IpProtocol(nix::libc::IPPROTO_UDP.into()), true),
            (RuleAttribute::DestinationPortRange(port(8473)), false),
            (RuleAttribute::DestinationPortRange(port(8472)), true),
            (RuleAttribute::UidRange(RuleUidRange { start: 1000, end: 2000 }), false),
            (RuleAttribute::UidRange(RuleUidRange { start: 0, end: 2000 }), true),
            (RuleAttribute::Source([192, 168, 64, 2].into()), false),
            (RuleAttribute::TunId(7), false),
        ] {
            let mut rule = rule(fwmark().into_iter().chain([attribute.clone()]));
            rule.header.src_len = 32;
            assert_eq!(!others(&rule, 5).is_empty(), expected, "{attribute:?}");
        }
        let mut by_tos = rule(fwmark());
        by_tos.header.tos = 0x10;
        assert_eq!(others(&by_tos, 5), []);
    }

    #[test]
    fn ports_of_some_flows_are() {
        assert_eq!(others(&rule([ports(40000, 50000)]), 0), [(0, 40000)]);
        assert_eq!(others(&rule([ports(1, 40000)]), 0), [(0, 40001)]);
        assert_eq!(others(&rule(marked(5, 5).into_iter().chain([ports(40000, 50000)])), 5), [(5, 40000)]);
        assert_eq!(others(&rule(marked(5, 5).into_iter().chain([ports(40000, 50000)])), 0), []);
    }

    #[test]
    fn it_is_named_as_ip_rule_shows_it() {
        let mut rule = rule(marked(0x80000, 0xff0000).into_iter().chain([ports(40000, 40000)]));
        rule.header.flags = RuleFlags::Invert;
        let found = PacketRule::of(&rule, TunnelPackets { marks: 0x80000, ..TUNNEL }).expect("a rule by packet");
        assert_eq!(found.text, "ip rule 100: not fwmark 0x80000/0xff0000 sport 40000 lookup 1000");
    }
}
