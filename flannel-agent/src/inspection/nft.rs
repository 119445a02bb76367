//! Rules as `nft -j list ruleset` lists them (libnftables-json(5)).

use std::collections::{BTreeMap, HashMap};

use serde_json::Value;

use super::{
    marks::{Bits, MarkWrite, Marked},
    nft_match::{self, Condition, Sets},
    packet::Match,
    rule::{Act, Base, Chain, Family, Hook, Rule, Table, Verdict},
};

/// The tables of the families that packets of the overlay meet. What is not understood narrows nothing.
pub(super) fn parse(document: &Value) -> Vec<Table> {
    let objects = document.get("nftables").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let mut sets: HashMap<(&str, &str), Sets<'_>> = HashMap::new();
    // In the order of their names, so that what is found has one too.
    let mut tables: BTreeMap<(&str, &str), Table> = BTreeMap::new();
    let objects = || objects.iter().filter_map(|object| object.as_object()?.iter().next());
    for (kind, object) in objects().filter(|(kind, _)| matches!(kind.as_str(), "set" | "map")) {
        let (Some(table), Some(name)) = (table_of(object), text(object, "name")) else { continue };
        sets.entry(table).or_default().insert(name, object, kind == "map");
    }
    for (kind, object) in objects() {
        let Some((family_name, name)) = table_of(object) else { continue };
        let Some((family, number)) = family(family_name) else { continue };
        let id = || Some((number, name.to_owned()));
        let make = || Table::new(format!("nft {family_name} {name}"), family, id());
        match kind.as_str() {
            "chain" => {
                let Some(chain) = text(object, "name") else { continue };
                let table = tables.entry((family_name, name)).or_insert_with(make);
                table.chains.entry(chain.to_owned()).or_default().base = base(object);
            }
            "rule" => {
                let Some(chain) = text(object, "chain") else { continue };
                let table = tables.entry((family_name, name)).or_insert_with(make);
                let sets = sets.entry((family_name, name)).or_default();
                let chain: &mut Chain = table.chains.entry(chain.to_owned()).or_default();
                let name = match object.get("handle").and_then(Value::as_u64) {
                    Some(handle) => format!("handle {handle}"),
                    None => format!("rule {}", chain.rules.len() + 1),
                };
                chain.rules.push(rule(name, object.get("expr"), sets));
            }
            _ => {}
        }
    }
    tables.into_values().collect()
}

fn text<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    object.get(key)?.as_str()
}

fn table_of(object: &Value) -> Option<(&str, &str)> {
    Some((text(object, "family")?, text(object, "table")?))
}

/// With the kernel's number (`enum` of `NFPROTO_`).
fn family(name: &str) -> Option<(Family, u8)> {
    Some(match name {
        "inet" => (Family::Ip, 1),
        "ip" => (Family::Ip, 2),
        "netdev" => (Family::Netdev, 5),
        "bridge" => (Family::Bridge, 7),
        _ => return None,
    })
}

fn base(chain: &Value) -> Option<Base> {
    let hook = Hook::parse(text(chain, "hook")?)?;
    let devices = match chain.get("dev") {
        Some(Value::String(device)) => vec![device.clone()],
        Some(Value::Array(devices)) => devices.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => Vec::new(),
    };
    let priority = chain.get("prio").and_then(Value::as_i64).and_then(|priority| i32::try_from(priority).ok());
    let is_nat = text(chain, "type") == Some("nat");
    let drops = text(chain, "policy") == Some("drop");
    Some(Base { hook, priority: priority.unwrap_or_default(), devices, is_nat, drops })
}

/// What a rule's statements come to.
#[derive(Debug, Default)]
struct Reading {
    matches: Vec<Match>,
    per_packet: Vec<String>,
    acts: Vec<Act>,
    marks: Vec<MarkWrite>,
    verdict: Option<Verdict>,
    /// Whether it does anything besides counting.
    acts_otherwise: bool,
    counts: bool,
}

fn rule<'a>(name: String, statements: Option<&'a Value>, sets: &Sets<'a>) -> Rule {
    let mut reading = Reading::default();
    for statement in statements.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default() {
        for (kind, value) in statement.as_object().into_iter().flatten() {
            reading.statement(kind, value, sets);
        }
    }
    let verdict = reading.verdict.unwrap_or(Verdict::Continue);
    let is_log = reading.acts.iter().any(|act| matches!(act, Act::Observes(_))) && verdict == Verdict::Continue;
    let mut acts = Vec::new();
    // A limit in front of a log, or of nothing, decides on nothing else.
    if !reading.per_packet.is_empty() && !is_log && (reading.acts_otherwise || verdict != Verdict::Continue) {
        acts.push(Act::Decides(reading.per_packet.join(", ")));
    }
    acts.extend(reading.acts);
    if reading.counts && !reading.acts_otherwise && acts.is_empty() && verdict == Verdict::Continue {
        acts.push(Act::Observes("counter".to_owned()));
    }
    Rule { name, matches: reading.matches, acts, marks: reading.marks, verdict }
}

impl Reading {
    fn statement<'a>(&mut self, kind: &str, value: &'a Value, sets: &Sets<'a>) {
        match kind {
            "match" => {
                let Condition { matches, per_packet } = nft_match::condition(value, sets);
                self.matches.extend(matches);
                self.per_packet.extend(per_packet.map(str::to_owned));
            }
            "vmap" => {
                let (elements, per_packet) = verdict_map(value, sets);
                self.per_packet.extend(per_packet.map(str::to_owned));
                let name =
                    value.get("data").and_then(Value::as_str).map(|name| name.trim_start_matches('@').to_owned());
                self.verdict = Some(Verdict::Map(name, elements));
            }
            "limit" | "quota" | "ct count" => self.per_packet(if kind == "limit" { "limit rate" } else { kind }),
            // A set that is filled by packets, each element with a limit of its own.
            "set" | "map" | "meter" => {
                let of_each = value.get("stmt").map(statements_of).unwrap_or_default();
                for kind in of_each {
                    match kind {
                        "counter" => self.acts.push(Act::Observes("counter".to_owned())),
                        kind => self.per_packet(kind),
                    }
                }
                self.acts_otherwise |= self.per_packet.is_empty();
            }
            // A number, not an object of that name.
            "counter" if value.get("packets").is_some() || value.is_null() => self.counts = true,
            "counter" => {
                let name = value.as_str().map(|name| format!("counter {name}"));
                self.acts.push(Act::Observes(name.unwrap_or_else(|| "counter".to_owned())));
            }
            "log" => self.acts.push(Act::Observes("log".to_owned())),
            "queue" => {
                self.acts.push(Act::Decides("queue".to_owned()));
                self.verdict = Some(Verdict::Accept);
            }
            "dup" | "fwd" | "synproxy" => self.acts.push(Act::Decides(kind.to_owned())),
            "ct helper" => self.acts.push(Act::Helper(value.as_str().unwrap_or(kind).to_owned())),
            "notrack" => self.acts.push(Act::Untracks),
            "mangle" => {
                let key = value.get("key").map(changed).unwrap_or_default();
                let per_packet = nft_match::per_packet(value);
                self.per_packet.extend(per_packet.map(str::to_owned));
                if let Some(of) = value.get("key").and_then(Marked::of_key) {
                    let bits = value.get("value").map_or(Bits::ANY, Bits::of_expression);
                    self.marks.push(MarkWrite { of, bits });
                }
                // A counter of a connection's, or its mark, is nothing of the packet's.
                self.acts.push(Act::Alters(key));
                self.acts_otherwise = true;
            }
            "accept" => self.verdict = Some(Verdict::Accept),
            "drop" | "reject" => self.verdict = Some(Verdict::Drop),
            "return" => self.verdict = Some(Verdict::Return),
            "jump" | "goto" => self.verdict = verdict(kind, value),
            // What an extension of iptables does is read from iptables' own listing.
            _ => self.acts_otherwise = true,
        }
    }

    fn per_packet(&mut self, name: &str) {
        self.per_packet.push(name.to_owned());
        self.matches.push(Match::Unknown);
    }
}

/// What is done for each element: in a list, or a single one.
fn statements_of(value: &Value) -> Vec<&str> {
    let all = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    all.iter().filter_map(Value::as_object).flat_map(|object| object.keys().map(String::as_str)).collect()
}

/// What a statement changes, in nft's words.
fn changed(key: &Value) -> String {
    let of = |kind: &str, name: &str| key.get(kind).and_then(|value| text(value, name)).map(str::to_owned);
    of("meta", "key").or_else(|| of("payload", "field")).or_else(|| of("ct", "key")).unwrap_or_default()
}

fn verdict(kind: &str, value: &Value) -> Option<Verdict> {
    Some(match kind {
        "accept" => Verdict::Accept,
        "drop" => Verdict::Drop,
        "return" => Verdict::Return,
        "continue" => Verdict::Continue,
        "jump" => Verdict::Jump(text(value, "target")?.to_owned()),
        "goto" => Verdict::Goto(text(value, "target")?.to_owned()),
        _ => return None,
    })
}

type Elements = Vec<(Vec<Match>, Verdict)>;

fn verdict_map<'a>(value: &'a Value, sets: &Sets<'a>) -> (Elements, Option<&'static str>) {
    let key = value.get("key").unwrap_or(&Value::Null);
    let data = value.get("data").unwrap_or(&Value::Null);
    let per_packet = nft_match::per_packet(key);
    let mut elements = Vec::new();
    for element in sets.elements_of(data).unwrap_or_default() {
        let Some([of, then]) = element.as_array().map(Vec::as_slice) else { continue };
        let Some((kind, target)) = then.as_object().and_then(|then| then.iter().next()) else { continue };
        let Some(verdict) = verdict(kind, target) else { continue };
        elements.push((nft_match::equals(key, of), verdict));
    }
    (elements, per_packet)
}
