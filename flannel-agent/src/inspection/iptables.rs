//! Rules as `iptables-save` lists them (iptables-save(8), iptables-extensions(8)).

use std::{collections::HashMap, net::Ipv4Addr};

use ipnet::Ipv4Net;

use super::{
    marks::{Bits, MarkWrite, Marked},
    packet::{Match, Nets, State, TCP, UDP},
    rule::{Act, Base, Chain, Family, Hook, Rule, Table, Verdict},
};
use crate::netfilter::Saved;

/// `NFPROTO_IPV4`.
const IPV4: u8 = 2;
/// Matches that are met by one packet of a flow and not by the next.
const PER_PACKET: [&str; 13] = [
    "bpf",
    "connbytes",
    "connlimit",
    "hashlimit",
    "length",
    "limit",
    "quota",
    "quota2",
    "rateest",
    "recent",
    "statistic",
    "string",
    "u32",
];
/// Targets that a packet comes out of as it went in, which is all that can be asked of them: what they change is seen where
/// it comes out.
const CHANGES: [&str; 18] = [
    "CHECKSUM",
    "CLASSIFY",
    "CONNMARK",
    "CONNSECMARK",
    "DNAT",
    "DSCP",
    "ECN",
    "HL",
    "MARK",
    "MASQUERADE",
    "NETMAP",
    "REDIRECT",
    "SECMARK",
    "SNAT",
    "TCPMSS",
    "TCPOPTSTRIP",
    "TOS",
    "TTL",
];

/// The tables of a listing.
pub(super) fn parse(Saved { program, is_nf_tables, text }: &Saved) -> Vec<Table> {
    let mut tables = Vec::new();
    let mut table: Option<(&str, Table)> = None;
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            let label = if name == "filter" { (*program).to_owned() } else { format!("{program} -t {name}") };
            let id = is_nf_tables.then(|| (IPV4, name.to_owned()));
            table = Some((name, Table::new(label, Family::Ip, id)));
        } else if line == "COMMIT" {
            tables.extend(table.take().map(|(_, table)| table));
        } else if let Some((name, table)) = &mut table {
            read_line(line, name, table);
        }
    }
    tables
}

fn read_line(line: &str, name: &str, table: &mut Table) {
    if let Some(declared) = line.strip_prefix(':') {
        let mut words = declared.split(' ');
        let chain = words.next().unwrap_or_default();
        // A chain of a user's has no policy.
        let base = words.next().filter(|policy| *policy != "-").and_then(|policy| {
            let (priority, devices) = (priority(name), Vec::new());
            Some(Base { hook: Hook::parse(chain)?, priority, devices, is_nat: name == "nat", drops: policy == "DROP" })
        });
        table.chains.insert(chain.to_owned(), Chain { base, rules: Vec::new() });
        return;
    }
    // In front may be the counters.
    let rule = line.strip_prefix('[').and_then(|line| line.split_once("] ")).map_or(line, |(_, rule)| rule);
    let Some(rule) = rule.strip_prefix("-A ") else { return };
    let mut words = words(rule).into_iter();
    let chain = table.chains.entry(words.next().unwrap_or_default()).or_default();
    let name = format!("rule {}", chain.rules.len() + 1);
    chain.rules.push(Parser::default().rule(name, words));
}

/// As the kernel calls them (`enum nf_ip_hook_priorities`).
fn priority(table: &str) -> i32 {
    match table {
        "raw" => -300,
        "mangle" => -150,
        "security" => 50,
        _ => 0,
    }
}

/// A line's words, where one with blanks is in quotes.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut is_quoted = false;
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => {
                is_quoted = !is_quoted;
                word.get_or_insert_default();
            }
            '\\' if is_quoted => word.get_or_insert_default().extend(characters.next()),
            ' ' if !is_quoted => words.extend(word.take()),
            other => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);
    words
}

/// Whose option it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Context {
    #[default]
    Rule,
    Match(String),
    Target(String),
}

#[derive(Debug, Default)]
struct Parser {
    context: Context,
    matches: Vec<Match>,
    /// The names of those that tell one packet of a flow from the next.
    per_packet: Vec<String>,
    /// The target, and its options.
    target: Option<String>,
    options: HashMap<String, String>,
    is_goto: bool,
    counts: bool,
}

impl Parser {
    fn rule(mut self, name: String, words: impl Iterator<Item = String>) -> Rule {
        let mut words = words.peekable();
        let mut is_negated = false;
        while let Some(word) = words.next() {
            if word == "!" {
                is_negated = true;
                continue;
            }
            // What follows belongs to the option up to the next.
            let mut values = Vec::new();
            while let Some(value) = words.next_if(|next| next != "!" && !is_option(next)) {
                values.push(value);
            }
            self.option(&word, &values, is_negated);
            is_negated = false;
        }
        self.finish(name)
    }

    fn option(&mut self, option: &str, values: &[String], is_negated: bool) {
        let value = values.first().map(String::as_str).unwrap_or_default();
        match option {
            "-m" | "--match" => return self.begin_match(value),
            "-j" | "--jump" | "-g" | "--goto" => {
                self.is_goto = matches!(option, "-g" | "--goto");
                self.target = Some(value.to_owned());
                self.context = Context::Target(value.to_owned());
                return;
            }
            // Counters.
            "-c" => return,
            _ => {}
        }
        let matched = match &self.context {
            Context::Rule => rule_option(option, value),
            Context::Match(name) => match_option(name, option, values),
            Context::Target(_) => {
                self.options.insert(option.to_owned(), values.join(" "));
                return;
            }
        };
        self.matches.extend(matched.map(|matched| matched.unless(is_negated)));
    }

    fn begin_match(&mut self, name: &str) {
        self.context = Context::Match(name.to_owned());
        if PER_PACKET.contains(&name) {
            self.per_packet.push(name.to_owned());
            self.matches.push(Match::Unknown);
        }
        self.counts |= name == "nfacct";
        // Their options say all, or they say nothing.
        let is_read = ["comment", "conntrack", "iprange", "multiport", "nfacct", "state", "tcp", "udp"].contains(&name);
        match name {
            "icmp" | "icmp6" | "sctp" | "esp" | "ah" => self.matches.push(Match::Never),
            "connmark" | "connlabel" => self.matches.push(Match::Noted),
            _ if !is_read => self.matches.push(Match::Unknown),
            _ => {}
        }
    }

    fn finish(mut self, name: String) -> Rule {
        let target = self.target.take().unwrap_or_default();
        let mut acts = Vec::new();
        let own = match target.as_str() {
            "LOG" | "NFLOG" | "ULOG" | "AUDIT" | "TRACE" | "RATEEST" | "IDLETIMER" | "LED" => {
                Some(Act::Observes(target.clone()))
            }
            "NFQUEUE" | "QUEUE" | "TEE" | "SYNPROXY" => Some(Act::Decides(target.clone())),
            "NOTRACK" => Some(Act::Untracks),
            "CT" if self.options.contains_key("--notrack") => Some(Act::Untracks),
            "CT" => self.options.get("--helper").map(|helper| Act::Helper(helper.clone())),
            "" if self.per_packet.is_empty() => Some(Act::Observes(self.observer().to_owned())),
            _ if CHANGES.contains(&target.as_str()) => Some(Act::Alters(target.clone())),
            _ => None,
        };
        let verdict = match target.as_str() {
            "ACCEPT" => Verdict::Accept,
            // What a queue gives back goes on behind it (net/netfilter/nf_queue.c: the next hook).
            "NFQUEUE" | "QUEUE" => Verdict::Accept,
            "DROP" | "REJECT" => Verdict::Drop,
            "RETURN" => Verdict::Return,
            "" => Verdict::Continue,
            _ if own.is_some() => Verdict::Continue,
            _ if self.is_goto => Verdict::Goto(target.clone()),
            _ => Verdict::Jump(target.clone()),
        };
        let is_log = matches!(own, Some(Act::Observes(_)));
        // A limit in front of a log, or of nothing, decides on nothing else.
        let decides = !self.per_packet.is_empty() && !is_log && !target.is_empty();
        if decides {
            acts.push(Act::Decides(self.per_packet.join(", ")));
        }
        if self.counts && !is_log {
            acts.push(Act::Observes("nfacct".to_owned()));
        }
        acts.extend(own);
        let marks = self.mark(&target).into_iter().collect();
        Rule { name, matches: self.matches, acts, marks, verdict }
    }

    /// What a target writes into a mark.
    fn mark(&self, target: &str) -> Option<MarkWrite> {
        let mask = |option: &str| self.options.get(option).and_then(|mask| number(mask)).unwrap_or(u32::MAX);
        // `iptables-save` writes all ways to set a mark as this one.
        let set = || self.options.get("--set-xmark").map(|value| number(value).map_or(Bits::ANY, Bits::own));
        let (of, bits) = match target {
            "MARK" => (Marked::Packet, set().unwrap_or(Bits::ANY)),
            "CONNMARK" if self.options.contains_key("--save-mark") => {
                (Marked::Connection, Bits::of(Marked::Packet, mask("--nfmask")))
            }
            "CONNMARK" if self.options.contains_key("--restore-mark") => {
                (Marked::Packet, Bits::of(Marked::Connection, mask("--ctmask")))
            }
            "CONNMARK" => (Marked::Connection, set().unwrap_or(Bits::ANY)),
            "HMARK" => (Marked::Packet, Bits::ANY),
            "SET" if self.options.contains_key("--map-mark") => (Marked::Packet, Bits::ANY),
            _ => return None,
        };
        Some(MarkWrite { of, bits })
    }

    const fn observer(&self) -> &'static str {
        if self.counts { "nfacct" } else { "counter" }
    }
}

fn is_option(word: &str) -> bool {
    let is_short = word.len() == 2 && word.starts_with('-') && word.as_bytes()[1].is_ascii_lowercase();
    is_short || word.starts_with("--")
}

fn rule_option(option: &str, value: &str) -> Option<Match> {
    Some(match option {
        "-s" | "--source" => nets(value).map_or(Match::Unknown, Match::Source),
        "-d" | "--destination" => nets(value).map_or(Match::Unknown, Match::Destination),
        "-i" | "--in-interface" => Match::Input(vec![device(value)]),
        "-o" | "--out-interface" => Match::Output(vec![device(value)]),
        "-p" | "--protocol" => protocol(value),
        // Fragments never bypass.
        "-f" | "--fragment" => Match::Never,
        _ => Match::Unknown,
    })
}

fn match_option(name: &str, option: &str, values: &[String]) -> Option<Match> {
    let value = values.first().map(String::as_str).unwrap_or_default();
    let or_unknown =
        |ranges: Option<Vec<(u16, u16)>>, make: fn(Vec<(u16, u16)>) -> Match| ranges.map_or(Match::Unknown, make);
    Some(match (name, option) {
        ("comment" | "nfacct", _) => return None,
        ("tcp" | "udp", "--sport" | "--source-port") | ("multiport", "--sports" | "--source-ports") => {
            or_unknown(ports(value), Match::SourcePorts)
        }
        ("tcp" | "udp", "--dport" | "--destination-port") | ("multiport", "--dports" | "--destination-ports") => {
            or_unknown(ports(value), Match::DestinationPorts)
        }
        ("multiport", "--ports") => or_unknown(ports(value), Match::EitherPort),
        ("tcp", "--syn") => Match::Never,
        ("tcp", "--tcp-flags") => flags(value, values.get(1).map(String::as_str).unwrap_or_default()),
        ("conntrack", "--ctstate") | ("state", "--state") => states(value),
        ("iprange", "--src-range") => range(value).map_or(Match::Unknown, Match::Source),
        ("iprange", "--dst-range") => range(value).map_or(Match::Unknown, Match::Destination),
        ("conntrack" | "iprange" | "multiport" | "state" | "tcp" | "udp", _) => Match::Unknown,
        // The match itself can't be told.
        _ => return None,
    })
}

/// Of which flags (a mask) which are set.
fn flags(mask: &str, set: &str) -> Match {
    let has = |list: &str, flag: &str| list == "ALL" || list.split(',').any(|name| name == flag);
    // Packets with one of these take the stack.
    let is_rare = ["SYN", "FIN", "RST"].iter().any(|flag| has(set, flag));
    let lacks_ack = has(mask, "ACK") && !has(set, "ACK");
    let is_varied = ["PSH", "URG"].iter().any(|flag| has(mask, flag));
    match (is_rare || lacks_ack, is_varied) {
        (true, _) => Match::Never,
        (false, true) => Match::Unknown,
        (false, false) => Match::Always,
    }
}

fn states(list: &str) -> Match {
    let mut states = Vec::new();
    for name in list.split(',') {
        states.push(match name {
            "ESTABLISHED" => State::Established,
            "NEW" => State::New,
            "UNTRACKED" => State::Untracked,
            // Such packets are no established connection's.
            "RELATED" | "INVALID" => continue,
            // By translation.
            _ => return Match::Unknown,
        });
    }
    Match::State(states)
}

fn nets(value: &str) -> Option<Vec<Ipv4Net>> {
    value.split(',').map(net).collect()
}

fn net(text: &str) -> Option<Ipv4Net> {
    match text.split_once('/') {
        None => text.parse::<Ipv4Addr>().ok().map(Ipv4Net::from),
        Some((address, mask)) if mask.contains('.') => {
            Ipv4Net::with_netmask(address.parse().ok()?, mask.parse().ok()?).ok().map(|net| net.trunc())
        }
        Some(_) => text.parse::<Ipv4Net>().ok().map(|net| net.trunc()),
    }
}

/// `0x5` or `5`; in front of a mask.
fn number(text: &str) -> Option<u32> {
    let text = text.split('/').next().unwrap_or_default();
    text.strip_prefix("0x").map_or_else(|| text.parse().ok(), |digits| u32::from_str_radix(digits, 16).ok())
}

fn range(value: &str) -> Option<Vec<Ipv4Net>> {
    let (first, last) = value.split_once('-').unwrap_or((value, value));
    Some(Nets::range(first.parse().ok()?, last.parse().ok()?))
}

fn device(value: &str) -> String {
    value.strip_suffix('+').map_or_else(|| value.to_owned(), |start| format!("{start}*"))
}

fn protocol(value: &str) -> Match {
    match value {
        "all" | "0" => Match::Always,
        "tcp" | "6" => Match::Protocol(vec![TCP]),
        "udp" | "17" => Match::Protocol(vec![UDP]),
        _ => Match::Never,
    }
}

/// `80`, `80:90`, `:90`, or several.
fn ports(value: &str) -> Option<Vec<(u16, u16)>> {
    let end = |text: &str, open: u16| if text.is_empty() { Some(open) } else { text.parse().ok() };
    let range = |text: &str| match text.split_once(':') {
        Some((first, last)) => Some((end(first, 0)?, end(last, u16::MAX)?)),
        None => text.parse().ok().map(|port| (port, port)),
    };
    value.split(',').map(range).collect()
}
