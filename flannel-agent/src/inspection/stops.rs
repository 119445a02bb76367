//! What of the rule sets drops packets of the overlay, whoever set it and for whatever reason.

use std::collections::BTreeSet;

use super::{
    RuleSets, Surroundings,
    packet::{Nets, Packet, Way},
    packets,
    rule::Act,
    walk::{self, End, Met},
};
use crate::status::MayStop;

/// Which packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stopped {
    /// Tunnel packets from peers.
    TunnelIn,
    /// Tunnel packets to peers.
    TunnelOut,
    /// Packets of pods to other hosts, and from them.
    Forwarded,
}

impl Stopped {
    const fn of(way: Way) -> Self {
        match way {
            Way::TunnelIn => Self::TunnelIn,
            Way::TunnelOut => Self::TunnelOut,
            Way::Out | Way::In => Self::Forwarded,
        }
    }

    /// In words.
    pub const fn label(self) -> &'static str {
        match self {
            Self::TunnelIn => "tunnel packets from peers",
            Self::TunnelOut => "tunnel packets to peers",
            Self::Forwarded => "packets between pods and other hosts",
        }
    }
}

/// A rule or a policy that drops them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stop {
    /// As an operator finds it: `iptables FORWARD rule 3`, `nft inet filter input handle 7`, `iptables FORWARD policy DROP`.
    pub subject: String,
    /// Which.
    pub stopped: Stopped,
    /// Whether all that get there are dropped; else some may be let through before, by what can't be told from the rules.
    pub is_sure: bool,
    /// Whether it is iptables', where rules that accept in front of it have it met by nothing.
    pub is_iptables: bool,
}

impl RuleSets {
    /// Programs that set rules for a host as a whole, and have some here.
    #[must_use]
    pub fn managers(&self) -> Vec<&'static str> {
        let has_firewalld = self.0.iter().any(|table| table.label.ends_with(" firewalld"));
        let mut chains = self.0.iter().flat_map(|table| table.chains.keys());
        let managers = [("firewalld", has_firewalld), ("ufw", chains.any(|name| name == "ufw-user-input"))];
        managers.into_iter().filter(|(_, is_there)| *is_there).map(|(name, _)| name).collect()
    }
}

/// The rules and policies that may stop tunnel packets which come in, or packets from the overlay to pods.
#[must_use]
pub(super) fn may_stop(sets: &RuleSets, around: &Surroundings) -> MayStop {
    /// Those of a kind that are told of.
    const MOST: usize = 4;
    // Those that are not sure come behind.
    let (mut tunnel, mut forwarding) = (BTreeSet::new(), BTreeSet::new());
    for table in &sets.0 {
        for (name, base) in table.bases() {
            for (_, packet) in packets(table.family, base, around, None) {
                let found = match packet.way {
                    Way::TunnelIn => &mut tunnel,
                    Way::In => &mut forwarding,
                    Way::Out | Way::TunnelOut => continue,
                };
                let (met, end) = walk::walk(table, name, &packet);
                let drops = met.iter().filter(|met| met.act == Act::Drops);
                found
                    .extend(drops.map(|met| {
                        (!met.packet.is_sure(), format!("{} {} {}", table.label, met.chain, met.rule.name))
                    }));
                if base.drops && end != End::Decided {
                    found.insert((false, format!("{} {name}: its policy is drop", table.label)));
                }
            }
        }
    }
    let first = |found: BTreeSet<(bool, String)>| found.into_iter().map(|(_, subject)| subject).take(MOST).collect();
    MayStop { tunnel: first(tunnel), forwarding: first(forwarding) }
}

/// Rules and policies that packets of the overlay are dropped by, where they are about all of these: what is about some addresses, ports or
/// pods, or about what can't be told (a mark, a set), is taken to be meant so. Of tunnel packets, also what is about single peers.
#[must_use]
pub fn stops(sets: &RuleSets, around: &Surroundings) -> Vec<Stop> {
    let mut stops = BTreeSet::new();
    for table in &sets.0 {
        let is_iptables = table.label.starts_with("iptables");
        for (name, base) in table.bases() {
            for (_, mut packet) in packets(table.family, base, around, None) {
                if packet.way == Way::TunnelIn && !around.peers.is_empty() {
                    let peers: Vec<_> = around.peers.iter().map(|peer| (*peer).into()).collect();
                    packet.source = Nets::of(&peers);
                }
                let stopped = Stopped::of(packet.way);
                let (met, end) = walk::walk(table, name, &packet);
                let is_drop =
                    |met: &&Met<'_>| met.act == Act::Drops && met.packet.is_sure() && is_about_all(met, &packet);
                stops.extend(met.iter().filter(is_drop).map(|met| Stop {
                    subject: format!("{} {} {}", table.label, met.chain, met.rule.name),
                    stopped,
                    is_sure: true,
                    is_iptables,
                }));
                if base.drops && end != End::Decided {
                    stops.insert(Stop {
                        subject: format!("{} {name} policy DROP", table.label),
                        stopped,
                        is_sure: matches!(end, End::Open { is_rest: false }),
                        is_iptables,
                    });
                }
            }
        }
    }
    // What some of the packets surely meet needs no doubt beside it.
    let sure: BTreeSet<_> = stops.iter().filter(|stop| stop.is_sure).map(|stop| stop.subject.clone()).collect();
    stops.into_iter().filter(|stop| stop.is_sure || !sure.contains(&stop.subject)).collect()
}

/// Whether a rule is met by all packets of that kind that get there.
fn is_about_all(met: &Met<'_>, begun: &Packet) -> bool {
    let is_tunnel = begun.tunnel_port.is_some();
    let (found, begun) = (&met.packet, begun);
    found.source_ports == begun.source_ports
        && found.either_ports == begun.either_ports
        && (is_tunnel
            || found.source == begun.source
                && found.destination == begun.destination
                && found.destination_ports == begun.destination_ports
                && found.input == begun.input
                && found.output == begun.output)
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            fixtures::{IPTABLES, NFT},
            tests::{around, saved},
        },
        *,
    };
    use crate::netfilter::Listing;

    fn found(listing: &Listing) -> Vec<(String, bool)> {
        let stops = stops(&RuleSets::parse(listing), &around());
        let words = |stop: Stop| (format!("{} drops {}", stop.subject, stop.stopped.label()), stop.is_sure);
        stops.into_iter().map(words).collect()
    }

    fn filter(policies: [&str; 2], rules: &str) -> Vec<(String, bool)> {
        let [input, forward] = policies;
        let text =
            format!("*filter\n:INPUT {input} [0:0]\n:FORWARD {forward} [0:0]\n:OUTPUT ACCEPT [0:0]\n{rules}\nCOMMIT\n");
        found(&Listing { iptables: vec![saved(&text)], nft: Vec::new() })
    }

    #[test]
    fn policies_and_rules_are_found_by_what_stands_in_front_of_them() {
        let both = ["ACCEPT", "ACCEPT"];
        for rules in [
            "",
            "-A FORWARD -i eth1 -j DROP",
            "-A FORWARD -s 10.5.28.7/32 -j DROP",
            "-A FORWARD -p tcp -m tcp --dport 25 -j REJECT",
            "-A FORWARD -m conntrack --ctstate INVALID -j DROP",
            "-A INPUT -s 203.0.113.9/32 -j DROP",
            "-A INPUT -p udp -m udp --dport 4789 -j DROP",
            "-A FORWARD -m set --match-set pods src -j ACCEPT\n-A FORWARD -j DROP",
        ] {
            assert_eq!(filter(both, rules), [], "{rules}");
        }
        let ours = "-A FORWARD -s 10.5.0.0/16 -j ACCEPT\n-A FORWARD -d 10.5.0.0/16 -j ACCEPT";
        assert_eq!(filter(["ACCEPT", "DROP"], ours), []);
        let peers = "-A INPUT -s 192.168.64.0/24 -p udp -m udp --dport 8472 -j ACCEPT";
        assert_eq!(filter(["DROP", "ACCEPT"], peers), []);
        let tunnel = "drops tunnel packets from peers";
        let forwarded = "drops packets between pods and other hosts";
        for (policies, rules, what, is_sure) in [
            (["ACCEPT", "DROP"], "", format!("iptables FORWARD policy DROP {forwarded}"), true),
            (
                ["ACCEPT", "DROP"],
                "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
                format!("iptables FORWARD policy DROP {forwarded}"),
                true,
            ),
            (
                ["ACCEPT", "DROP"],
                "-A FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT",
                format!("iptables FORWARD policy DROP {forwarded}"),
                false,
            ),
            (both, "-A FORWARD -j REJECT", format!("iptables FORWARD rule 1 {forwarded}"), true),
            (["DROP", "ACCEPT"], "", format!("iptables INPUT policy DROP {tunnel}"), true),
            (
                ["DROP", "ACCEPT"],
                "-A INPUT -m set --match-set peers src -j ACCEPT",
                format!("iptables INPUT policy DROP {tunnel}"),
                false,
            ),
            (both, "-A INPUT -p udp -m udp --dport 8472 -j DROP", format!("iptables INPUT rule 1 {tunnel}"), true),
            (both, "-A INPUT -s 192.168.64.2/32 -j REJECT", format!("iptables INPUT rule 1 {tunnel}"), true),
            (both, "-A OUTPUT -j DROP", "iptables OUTPUT rule 1 drops tunnel packets to peers".to_owned(), true),
        ] {
            assert_eq!(filter(policies, rules), [(what, is_sure)], "{policies:?} {rules}");
        }
    }

    /// Where no rule of ours accepts.
    #[test]
    fn what_others_set_by_themselves() {
        let of_iptables = IPTABLES.iter().map(|(whose, text)| {
            let saved = saved(text);
            (*whose, found(&Listing { iptables: vec![saved], nft: Vec::new() }))
        });
        let of_nft = NFT
            .iter()
            .map(|(whose, text)| (*whose, found(&Listing { iptables: Vec::new(), nft: vec![(*text).to_owned()] })));
        let found: Vec<_> = of_iptables.chain(of_nft).filter(|(_, found)| !found.is_empty()).collect();
        let policy = "iptables FORWARD policy DROP drops packets between pods and other hosts".to_owned();
        assert_eq!(found, [("Docker", vec![(policy, true)])]);
    }

    #[test]
    fn ufw_that_was_not_told_of_the_port() {
        let ufw = IPTABLES.iter().find(|(whose, _)| *whose == "ufw").expect("there").1;
        let untold = ufw.replace("-A ufw-user-input -p udp -m udp --dport 8472 -j ACCEPT\n", "");
        assert_ne!(untold, ufw);
        let found = found(&Listing { iptables: vec![saved(&untold)], nft: Vec::new() });
        let policy = "iptables INPUT policy DROP drops tunnel packets from peers".to_owned();
        assert_eq!(found, [(policy, false)]);
    }
}
