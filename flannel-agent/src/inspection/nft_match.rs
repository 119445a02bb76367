//! What a rule of nftables asks of a packet.

use std::{collections::HashMap, net::Ipv4Addr};

use ipnet::Ipv4Net;
use serde_json::Value;

use super::packet::{Match, Nets, State, TCP, UDP};

/// The sets and maps of a table.
#[derive(Debug, Default)]
pub(super) struct Sets<'a>(HashMap<&'a str, Set<'a>>);

#[derive(Debug)]
struct Set<'a> {
    elements: &'a [Value],
    /// Packets add to it, or time takes away: what is in it now says little.
    is_dynamic: bool,
}

impl<'a> Sets<'a> {
    pub(super) fn insert(&mut self, name: &'a str, object: &'a Value, is_map: bool) {
        let elements = object.get("elem").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let flags = object.get("flags").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let has_flag = |flag: &str| flags.iter().any(|value| value == flag);
        // A set that packets add to has a size; nft before 1.1 does not list its flag.
        let is_dynamic = has_flag("dynamic") || has_flag("timeout") || object.get("size").is_some();
        self.0.insert(name, Set { elements, is_dynamic: is_dynamic && !is_map });
    }

    /// The elements of a set or a map, named or in its place; [`None`] where they can't be told.
    pub(super) fn elements_of(&self, value: &'a Value) -> Option<&'a [Value]> {
        match value {
            Value::String(name) => {
                let set = self.0.get(name.strip_prefix('@')?)?;
                (!set.is_dynamic).then_some(set.elements)
            }
            _ => value.get("set")?.as_array().map(Vec::as_slice),
        }
    }
}

/// A condition.
#[derive(Debug)]
pub(super) struct Condition {
    /// All of these.
    pub(super) matches: Vec<Match>,
    /// What tells one packet of a flow from the next.
    pub(super) per_packet: Option<&'static str>,
}

/// Of a `match` statement.
pub(super) fn condition<'a>(value: &'a Value, sets: &Sets<'a>) -> Condition {
    let null = &Value::Null;
    let part = |key: &str| value.get(key).unwrap_or(null);
    let (left, right) = (part("left"), part("right"));
    let per_packet = per_packet(left);
    if per_packet.is_some() {
        return Condition { matches: vec![Match::Unknown], per_packet };
    }
    let op = part("op").as_str().unwrap_or("==");
    if is_noted(left) {
        return Condition { matches: vec![Match::Noted], per_packet };
    }
    let matches = match op {
        "==" | "in" | "!=" => {
            let values = match right {
                Value::String(name) if name.starts_with('@') => sets.elements_of(right),
                Value::Object(object) if object.contains_key("set") => sets.elements_of(right),
                Value::Array(all) => Some(all.as_slice()),
                one => Some(std::slice::from_ref(one)),
            };
            compare(left, values, op == "!=")
        }
        // A port may be compared by size; nothing else that narrows.
        _ => implied(left).into_iter().chain([Match::Unknown]).collect(),
    };
    Condition { matches, per_packet }
}

/// That a key has one value.
pub(super) fn equals(key: &Value, value: &Value) -> Vec<Match> {
    compare(key, Some(std::slice::from_ref(value)), false)
}

/// Whether an expression takes something from each packet that differs within a flow.
pub(super) fn per_packet(expression: &Value) -> Option<&'static str> {
    match expression {
        Value::Array(all) => all.iter().find_map(per_packet),
        Value::Object(object) => object.iter().find_map(|(kind, value)| {
            let is = |key: &str, names: &[&str]| {
                value.get(key).and_then(Value::as_str).is_some_and(|value| names.contains(&value))
            };
            match kind.as_str() {
                "numgen" => Some("numgen"),
                "meta" if is("key", &["random"]) => Some("meta random"),
                "meta" if is("key", &["length"]) => Some("meta length"),
                "ct" if is("key", &["bytes", "packets", "avgpkt"]) => Some("ct bytes"),
                "payload" if is("field", &["length"]) => Some("length"),
                "payload" if is("base", &["ih"]) => Some("payload"),
                "payload" if is("base", &["th"]) && is_behind_ports(value) => Some("payload"),
                _ => per_packet(value),
            }
        }),
        _ => None,
    }
}

/// Whether an expression is what somebody has noted of a connection.
fn is_noted(expression: &Value) -> bool {
    let masked = expression.get("&").and_then(|masked| masked.get(0));
    let key = masked.unwrap_or(expression).get("ct").and_then(|ct| ct.get("key")).and_then(Value::as_str);
    matches!(key, Some("mark" | "label" | "labels"))
}

/// Whether what is read of a transport header is behind its ports.
fn is_behind_ports(payload: &Value) -> bool {
    let number = |key: &str| payload.get(key).and_then(Value::as_u64).unwrap_or_default();
    number("offset") + number("len") > 32
}

/// Among these values, where they are known. A condition of several parts can be met by parts of several values.
fn compare(left: &Value, values: Option<&[Value]>, is_negated: bool) -> Vec<Match> {
    let mut matches = implied(left);
    if let Some(parts) = left.get("concat").and_then(Value::as_array) {
        matches.extend(concatenated(parts, values, is_negated));
        return matches;
    }
    let plain = match values {
        Some(values) => among(left, values, is_negated),
        None => Match::Unknown,
    };
    matches.push(plain.unless(is_negated));
    matches
}

fn concatenated(parts: &[Value], values: Option<&[Value]>, is_negated: bool) -> Vec<Match> {
    let mut matches: Vec<_> = parts.iter().flat_map(implied).collect();
    let Some(values) = values.filter(|_| !is_negated) else {
        matches.push(Match::Unknown);
        return matches;
    };
    let values: Option<Vec<&Vec<Value>>> = values.iter().map(|value| plain(value).get("concat")?.as_array()).collect();
    for (index, part) in parts.iter().enumerate() {
        let of_part = values
            .as_ref()
            .and_then(|values| values.iter().map(|value| value.get(index).cloned()).collect::<Option<Vec<Value>>>());
        matches.push(of_part.map_or(Match::Unknown, |values| among(part, &values, false)));
    }
    if values.is_none_or(|values| values.len() != 1) {
        matches.push(Match::Unknown);
    }
    matches
}

/// Without the element's timeout, counter and comment.
fn plain(value: &Value) -> &Value {
    value.get("elem").and_then(|element| element.get("val")).unwrap_or(value)
}

/// What a key says by itself: the ports of TCP are TCP's.
fn implied(left: &Value) -> Vec<Match> {
    let left = left.get("&").and_then(|masked| masked.get(0)).unwrap_or(left);
    let protocol = left.get("payload").and_then(|payload| payload.get("protocol")).and_then(Value::as_str);
    match protocol {
        Some("tcp") => vec![Match::Protocol(vec![TCP])],
        Some("udp") => vec![Match::Protocol(vec![UDP])],
        None | Some("ip" | "th" | "ether" | "vlan") => Vec::new(),
        Some(_) => vec![Match::Never],
    }
}

/// Whether a key is among values.
fn among(left: &Value, values: &[Value], is_negated: bool) -> Match {
    let key = |kind: &str, name: &str| left.get(kind).and_then(|value| value.get(name)).and_then(Value::as_str);
    let field = (key("payload", "protocol").unwrap_or_default(), key("payload", "field").unwrap_or_default());
    let or_unknown = |known: Option<Match>| known.unwrap_or(Match::Unknown);
    if let Some(masked) = left.get("&").and_then(Value::as_array) {
        return or_unknown(masked_flags(masked, values));
    }
    match (field, key("meta", "key"), key("ct", "key")) {
        (("ip", "saddr"), ..) => or_unknown(nets(values).map(Match::Source)),
        (("ip", "daddr"), ..) => or_unknown(nets(values).map(Match::Destination)),
        (("tcp" | "udp" | "th", "sport"), ..) => or_unknown(ports(values).map(Match::SourcePorts)),
        (("tcp" | "udp" | "th", "dport"), ..) => or_unknown(ports(values).map(Match::DestinationPorts)),
        (("ip", "protocol"), ..) | (_, Some("l4proto"), _) => or_unknown(protocols(values)),
        // In the form without a mask one of them is enough.
        (("tcp", "flags"), ..) => match flags(values) {
            Some(Flags { rare: true, ack: false, varied: false }) => Match::Never,
            Some(Flags { ack: true, rare: false, .. }) if !is_negated => Match::Always,
            _ => Match::Unknown,
        },
        (_, Some("iifname" | "iif"), _) => or_unknown(names(values).map(Match::Input)),
        (_, Some("oifname" | "oif"), _) => or_unknown(names(values).map(Match::Output)),
        (_, Some("nfproto"), _) => version(values, "ipv4"),
        (_, Some("protocol"), _) => version(values, "ip"),
        (("ether", "type"), ..) => version(values, "ip"),
        (_, _, Some("state")) => or_unknown(states(values)),
        _ => Match::Unknown,
    }
}

fn texts(values: &[Value]) -> Option<Vec<&str>> {
    values.iter().map(|value| plain(value).as_str()).collect()
}

fn names(values: &[Value]) -> Option<Vec<String>> {
    Some(texts(values)?.into_iter().map(str::to_owned).collect())
}

fn version(values: &[Value], ours: &str) -> Match {
    match texts(values) {
        Some(names) if names.contains(&ours) => Match::Always,
        Some(_) => Match::Never,
        None => Match::Unknown,
    }
}

fn protocols(values: &[Value]) -> Option<Match> {
    let number = |value: &Value| match plain(value) {
        Value::String(name) => Some(match name.as_str() {
            "tcp" => TCP,
            "udp" => UDP,
            // None that can bypass.
            _ => 0,
        }),
        value => u8::try_from(value.as_u64()?).ok(),
    };
    values.iter().map(number).collect::<Option<Vec<_>>>().map(Match::Protocol)
}

fn states(values: &[Value]) -> Option<Match> {
    let mut states = Vec::new();
    for name in texts(values)? {
        match name {
            "established" => states.push(State::Established),
            "new" => states.push(State::New),
            "untracked" => states.push(State::Untracked),
            // Such packets are no established connection's.
            "related" | "invalid" => {}
            _ => return None,
        }
    }
    Some(Match::State(states))
}

fn nets(values: &[Value]) -> Option<Vec<Ipv4Net>> {
    let mut nets = Vec::new();
    for value in values {
        let value = plain(value);
        if let Some(prefix) = value.get("prefix") {
            let address: Ipv4Addr = prefix.get("addr")?.as_str()?.parse().ok()?;
            nets.push(Ipv4Net::new(address, u8::try_from(prefix.get("len")?.as_u64()?).ok()?).ok()?.trunc());
        } else if let Some(range) = value.get("range") {
            let end = |index: usize| range.get(index)?.as_str()?.parse().ok();
            nets.extend(Nets::range(end(0)?, end(1)?));
        } else {
            nets.push(Ipv4Net::from(value.as_str()?.parse::<Ipv4Addr>().ok()?));
        }
    }
    Some(nets)
}

fn ports(values: &[Value]) -> Option<Vec<(u16, u16)>> {
    let number = |value: &Value| u16::try_from(value.as_u64()?).ok();
    let range = |value: &Value| match plain(value).get("range") {
        Some(range) => Some((number(range.get(0)?)?, number(range.get(1)?)?)),
        None => number(plain(value)).map(|port| (port, port)),
    };
    values.iter().map(range).collect()
}

/// Which kinds of TCP's flags there are.
struct Flags {
    /// Packets with one of these take the stack: SYN, FIN, RST.
    rare: bool,
    /// All others have it.
    ack: bool,
    /// Some have it.
    varied: bool,
}

fn flags(values: &[Value]) -> Option<Flags> {
    let names = match values {
        [one] if one.get("|").is_some() => texts(one.get("|")?.as_array()?)?,
        values => texts(values)?,
    };
    let has = |names: &[&str], wanted: &[&str]| names.iter().any(|name| wanted.contains(name));
    let rare = has(&names, &["syn", "fin", "rst"]);
    let ack = has(&names, &["ack"]);
    Some(Flags { rare, ack, varied: names.iter().any(|name| !["syn", "fin", "rst", "ack"].contains(name)) })
}

/// `tcp flags & (fin|syn) == syn`.
fn masked_flags(masked: &[Value], values: &[Value]) -> Option<Match> {
    let [key, mask] = masked else { return None };
    if key.get("payload")?.get("field")?.as_str()? != "flags" {
        return None;
    }
    let list = |value: &Value| match value {
        Value::Array(all) => flags(all),
        one => flags(std::slice::from_ref(one)),
    };
    let (mask, set) = (list(mask)?, flags(values)?);
    Some(match set {
        Flags { rare: true, .. } => Match::Never,
        Flags { ack: false, .. } if mask.ack => Match::Never,
        _ if mask.varied => Match::Unknown,
        _ => Match::Always,
    })
}
