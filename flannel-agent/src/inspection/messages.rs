//! nf_tables' messages (include/uapi/linux/netfilter/nf_tables.h): what changes which chain.

/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u8 = 10;
/// `struct nlmsghdr`, host order; the length is the first word, the type the half-word behind.
const HEADER_LEN: usize = 16;
/// `struct nfgenmsg`, whose first byte is the family.
const GENERAL_LEN: usize = 4;
/// `NFPROTO_INET`, `_IPV4`, `_NETDEV`, `_BRIDGE` (include/uapi/linux/netfilter.h).
pub(super) const FAMILIES: [u8; 4] = [1, 2, 5, 7];

/// `enum nf_tables_msg_types`.
mod kind {
    pub(super) const NEW_CHAIN: u8 = 3;
    pub(super) const NEW_RULE: u8 = 6;
    pub(super) const DELETE_RULE: u8 = 8;
    pub(super) const NEW_ELEMENT: u8 = 12;
    pub(super) const DELETE_ELEMENT: u8 = 14;
    pub(super) const NEW_GENERATION: u8 = 15;
}

/// Expressions of rules that decide on, copy or log each packet by itself, whatever their arguments.
const ACTING: [&str; 12] =
    ["connlimit", "dup", "fwd", "hash", "last", "limit", "log", "numgen", "objref", "queue", "quota", "synproxy"];
/// Extensions of iptables that do.
const ACTING_EXTENSIONS: [&str; 23] = [
    "AUDIT",
    "CT",
    "LOG",
    "NFLOG",
    "NFQUEUE",
    "SYNPROXY",
    "TEE",
    "TRACE",
    "ULOG",
    "bpf",
    "connbytes",
    "connlimit",
    "hashlimit",
    "length",
    "limit",
    "nfacct",
    "quota",
    "rateest",
    "recent",
    "statistic",
    "string",
    "u32",
    "NOTRACK",
];

/// What a message is about.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Message<'a> {
    pub(super) family: u8,
    pub(super) table: &'a str,
    pub(super) change: Change<'a>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change<'a> {
    /// A chain that the kernel calls for more than the first packet of a connection.
    Base {
        chain: &'a str,
    },
    /// A rule is new. It leads to chains, and to maps, which have an `@` in front.
    Rule {
        chain: &'a str,
        is_acting: bool,
        leads_to: Vec<String>,
    },
    /// A rule is gone.
    Gone {
        chain: &'a str,
    },
    /// A set or a map has another element than before; one of a map may lead to a chain.
    Element {
        set: &'a str,
        chains: Vec<&'a str>,
    },
    Other,
}

/// Those of a datagram. What is cut short is left out.
pub(super) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        loop {
            let len = usize::try_from(word(datagram)?).ok()?;
            let message = datagram.get(..len).filter(|_| len >= HEADER_LEN + GENERAL_LEN)?;
            datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
            if let Some(message) = read(message) {
                return Some(message);
            }
        }
    })
}

fn word(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

/// A number in an attribute: network order.
fn number(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}

fn read(message: &[u8]) -> Option<Message<'_>> {
    let half = u16::from_ne_bytes(*message.get(4..)?.first_chunk()?);
    let [kind, subsystem] = half.to_le_bytes();
    if subsystem != SUBSYSTEM || kind == kind::NEW_GENERATION {
        return None;
    }
    let family = *message.get(HEADER_LEN)?;
    let attributes = message.get(HEADER_LEN + GENERAL_LEN..)?;
    // The table is the first attribute of all of them.
    let text = |number| find(attributes, number).and_then(text);
    let table = text(1)?;
    let change = match kind {
        // `NFTA_CHAIN_NAME`, `_HOOK`, `_TYPE`.
        kind::NEW_CHAIN => match (text(3), find(attributes, 4), text(7)) {
            (Some(chain), Some(_), kind) if kind != Some("nat") => Change::Base { chain },
            _ => Change::Other,
        },
        // `NFTA_RULE_CHAIN`, `_EXPRESSIONS`.
        kind::NEW_RULE => {
            let mut rule = Rule::default();
            for (_, expression) in all(find(attributes, 4).unwrap_or_default()) {
                rule.expression(expression);
            }
            Change::Rule { chain: text(2)?, is_acting: rule.is_acting, leads_to: rule.leads_to }
        }
        kind::DELETE_RULE => Change::Gone { chain: text(2)? },
        // `NFTA_SET_ELEM_LIST_SET`, `_ELEMENTS`.
        kind::NEW_ELEMENT | kind::DELETE_ELEMENT => {
            let elements = find(attributes, 3).unwrap_or_default();
            // `NFTA_SET_ELEM_DATA`.
            let chains = all(elements).filter_map(|(_, element)| verdict_chain(find(element, 2)?));
            let chains = if kind == kind::NEW_ELEMENT { chains.collect() } else { Vec::new() };
            Change::Element { set: text(2)?, chains }
        }
        _ => Change::Other,
    };
    Some(Message { family, table, change })
}

#[derive(Debug, Default)]
struct Rule {
    is_acting: bool,
    leads_to: Vec<String>,
}

impl Rule {
    fn expression(&mut self, expression: &[u8]) {
        // `NFTA_EXPR_NAME`, `_DATA`.
        let Some(name) = find(expression, 1).and_then(text) else { return };
        let data = find(expression, 2).unwrap_or_default();
        let value = |attribute| find(data, attribute).and_then(number);
        self.is_acting |= match name {
            "immediate" => {
                // `NFTA_IMMEDIATE_DATA`.
                self.leads_to.extend(find(data, 2).and_then(verdict_chain).map(str::to_owned));
                false
            }
            "lookup" => {
                // `NFTA_LOOKUP_SET`.
                self.leads_to.extend(find(data, 1).and_then(text).map(|set| format!("@{set}")));
                false
            }
            // `NFTA_MATCH_NAME`, `NFTA_TARGET_NAME`.
            "match" | "target" => {
                find(data, 1).and_then(text).is_some_and(|extension| ACTING_EXTENSIONS.contains(&extension))
            }
            // `NFTA_DYNSET_EXPR`, `_EXPRESSIONS`: something for each element.
            "dynset" => find(data, 7).is_some() || find(data, 10).is_some(),
            // `NFTA_META_KEY`: `NFT_META_LEN`, `NFT_META_PRANDOM`.
            "meta" => matches!(value(2), Some(0 | 24)),
            // `NFTA_CT_KEY`: `NFT_CT_PKTS`, `_BYTES`, `_AVGPKT`.
            "ct" => matches!(value(2), Some(13..=15)),
            // `NFTA_PAYLOAD_BASE`, `_OFFSET`: the transport header's behind its ports, but for TCP's flags, or what is
            // in it.
            "payload" => match (value(2), value(3)) {
                (Some(2), Some(offset)) => offset >= 4 && offset != 13,
                (Some(base), _) => base > 2,
                (None, _) => false,
            },
            name => ACTING.contains(&name),
        };
    }
}

/// The chain of a verdict: `NFTA_DATA_VERDICT`, in it `NFTA_VERDICT_CHAIN`.
fn verdict_chain(data: &[u8]) -> Option<&str> {
    find(find(data, 2)?, 2).and_then(text)
}

/// Without the byte 0 at its end.
fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes.split(|byte| *byte == 0).next()?).ok()
}

fn find(attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    all(attributes).find_map(|(kind, value)| (kind == wanted).then_some(value))
}

/// Attributes (`struct nlattr`, host order) without the flags in their types.
fn all(mut attributes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    const TYPE: u16 = 0x3fff;
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes(*attributes.first_chunk()?));
        let kind = u16::from_ne_bytes(*attributes.get(2..)?.first_chunk()?) & TYPE;
        let value = attributes.get(4..len)?;
        attributes = attributes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}
