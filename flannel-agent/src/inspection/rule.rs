//! Rule sets in one shape, whichever program lists them.

use std::collections::{HashMap, HashSet};

use super::{marks::MarkWrite, packet::Match};

/// Where in its way through the host a packet meets a chain (`enum nf_inet_hooks`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Hook {
    Ingress,
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
    Egress,
}

impl Hook {
    /// As nftables and, in capitals, iptables call it.
    pub(super) fn parse(name: &str) -> Option<Self> {
        Some(match name.to_ascii_lowercase().as_str() {
            "ingress" => Self::Ingress,
            "prerouting" => Self::Prerouting,
            "input" => Self::Input,
            "forward" => Self::Forward,
            "output" => Self::Output,
            "postrouting" => Self::Postrouting,
            "egress" => Self::Egress,
            _ => return None,
        })
    }

    /// As an operator reads it.
    pub(super) const fn label(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Prerouting => "PREROUTING",
            Self::Input => "INPUT",
            Self::Forward => "FORWARD",
            Self::Output => "OUTPUT",
            Self::Postrouting => "POSTROUTING",
            Self::Egress => "egress",
        }
    }
}

/// Which packets a table is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Family {
    /// IPv4: nftables' families `ip` and `inet`, and iptables'.
    Ip,
    /// Frames of a bridge.
    Bridge,
    /// Packets of a device.
    Netdev,
}

/// A chain that the kernel calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Base {
    pub(super) hook: Hook,
    pub(super) priority: i32,
    /// Those of a chain of a device; none where the listing does not say.
    pub(super) devices: Vec<String>,
    /// It meets the first packet of a connection only (net/netfilter/nf_nat_core.c).
    pub(super) is_nat: bool,
    /// What no rule decides on is dropped.
    pub(super) drops: bool,
}

/// A chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Chain {
    pub(super) base: Option<Base>,
    pub(super) rules: Vec<Rule>,
}

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    /// As it is found in its chain: `handle 5`, `rule 3`.
    pub(super) name: String,
    /// What each packet has to meet.
    pub(super) matches: Vec<Match>,
    /// What it does to those, besides deciding on them.
    pub(super) acts: Vec<Act>,
    /// What it writes into marks.
    pub(super) marks: Vec<MarkWrite>,
    pub(super) verdict: Verdict,
}

/// What a rule does to each packet.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Act {
    /// What becomes of a packet does not follow from what became of the one before: a limit, a queue, a copy.
    Decides(String),
    /// It is counted or logged.
    Observes(String),
    /// A conntrack helper reads its connection.
    Helper(String),
    /// It is changed.
    Alters(String),
    /// It is dropped.
    Drops,
    /// It gets no connection.
    Untracks,
}

/// What a rule decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The next rule decides.
    Continue,
    /// The chain that the kernel called ends here, and the packet goes on.
    Accept,
    /// The packet is gone.
    Drop,
    /// The rule behind the jump decides.
    Return,
    Jump(String),
    Goto(String),
    /// The first of these whose conditions are met; of a map that may have a name.
    Map(Option<String>, Vec<(Vec<Match>, Self)>),
}

impl Verdict {
    /// The chains that it leads to.
    pub(super) fn targets<'a>(&'a self, found: &mut Vec<&'a str>) {
        match self {
            Self::Jump(target) | Self::Goto(target) => found.push(target),
            Self::Map(_, elements) => elements.iter().for_each(|(_, verdict)| verdict.targets(found)),
            Self::Continue | Self::Accept | Self::Drop | Self::Return => {}
        }
    }
}

/// A table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Table {
    /// As it is found: `nft inet t`, `iptables-legacy -t mangle`.
    pub(super) label: String,
    pub(super) family: Family,
    /// As nf_tables knows it: its number of the family, and the name. One of x_tables has none.
    pub(super) id: Option<(u8, String)>,
    pub(super) chains: HashMap<String, Chain>,
}

impl Table {
    pub(super) fn new(label: String, family: Family, id: Option<(u8, String)>) -> Self {
        Self { label, family, id, chains: HashMap::new() }
    }

    /// The chains that the kernel calls for more than the first packet of a connection.
    pub(super) fn bases(&self) -> impl Iterator<Item = (&str, &Base)> {
        let bases = self.chains.iter().filter_map(|(name, chain)| Some((name.as_str(), chain.base.as_ref()?)));
        bases.filter(|(_, base)| !base.is_nat)
    }

    /// A chain and those that it leads to.
    pub(super) fn reached_from<'a>(&'a self, chain: &'a str) -> HashSet<&'a str> {
        let mut reached = HashSet::new();
        let mut ahead = vec![chain];
        while let Some(name) = ahead.pop() {
            let Some((name, chain)) = self.chains.get_key_value(name) else { continue };
            if reached.insert(name.as_str()) {
                chain.rules.iter().for_each(|rule| rule.verdict.targets(&mut ahead));
            }
        }
        reached
    }
}
