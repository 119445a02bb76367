//! What the tables answer about a packet, in words.

use std::{net::Ipv4Addr, time::Duration};

use flannel_common::{
    flow::FlowKey,
    maps::{ACCEPTED, CONFIG, Config, EXCLUDED, FLOWS, HEARD, PODS, PREFIXES, SUBNETS, VTEP_ADDRESSES, VTEPS, Vtep},
    packet::Mac,
};
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

use super::host::Host;
use crate::{
    dataplane::{
        DataplaneError,
        tables::{Entry, Leased},
    },
    lease::MacAddress,
    operator::{drops::age, interface_name},
};

/// A table, what it was asked, and what it has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Consulted {
    pub(super) table: &'static str,
    pub(super) key: String,
    pub(super) answer: String,
}

impl Consulted {
    fn new(table: &'static str, key: impl ToString, answer: impl Into<String>) -> Self {
        Self { table, key: key.to_string(), answer: answer.into() }
    }
}

/// What a program was loaded with that a packet's fate may depend on.
pub(super) fn constants(config: &Config) -> Consulted {
    let time = Duration::from_nanos(config.bypass_time);
    let mut words = vec![match config.bypass_time {
        0 => "nothing bypasses the stack".to_owned(),
        _ => format!("flows bypass the stack for {} s", time.as_secs_f64()),
    }];
    let flags = [
        (Config::QUEUED, "packets go by the queue of flannel.VNI"),
        (Config::SHOWN, "a copy is shown to who captures on flannel.VNI (not by a trace)"),
        (Config::LEFT_IN_TUNNEL, "packets are left in the tunnel for the kernel to take out"),
        (Config::DIRECT, "peers on the same link are sent packets without encapsulation"),
        (Config::NO_TUNNEL, "there is no tunnel"),
    ];
    words.extend(flags.iter().filter(|(flag, _)| config.has(*flag)).map(|(_, words)| (*words).to_owned()));
    words.push(format!("MTU {}", config.mtu));
    Consulted::new(CONFIG, "", words.join("; "))
}

/// Who leases the subnet of an address, and how that one is reached.
pub(super) fn leaseholder(host: &Host, address: Ipv4Addr) -> Result<Vec<Consulted>, DataplaneError> {
    let Some(Leased { entry, id }) = host.tables.leaseholder(&host.config, address)? else {
        let key = match host.config.slot(address.to_bits()) {
            Some(slot) => format!("slot {slot} ({address})"),
            None => format!("{address} (no slot: outside the Network)"),
        };
        return Ok(vec![Consulted::new(SUBNETS, key, "nobody"), Consulted::new(PREFIXES, address, "nobody")]);
    };
    let leased = match entry {
        Entry::Slot(slot) => Consulted::new(SUBNETS, format!("slot {slot} ({address})"), format!("VTEP no. {id}")),
        Entry::Prefix => Consulted::new(PREFIXES, address, format!("VTEP no. {id}")),
    };
    let vtep = host.tables.vtep(id)?;
    let words = vtep.map_or_else(|| "nothing".to_owned(), |vtep| vtep_words(&vtep));
    let mut consulted = vec![leased, Consulted::new(VTEPS, format!("no. {id}"), words)];
    if host.config.has(Config::DIRECT) && !host.config.has(Config::NO_TUNNEL) {
        let heard = host.tables.heard(id)?.unwrap_or_default();
        let words = match (heard.last, heard.is_direct()) {
            (0, _) => "never heard: sent packets without encapsulation, where it is on the link",
            (_, true) => "sends without encapsulation, and is sent so",
            (_, false) => "sends in the tunnel, and is sent so",
        };
        consulted.push(Consulted::new(HEARD, format!("no. {id}"), words));
    }
    Ok(consulted)
}

/// A peer in words.
pub(super) fn vtep_words(vtep: &Vtep) -> String {
    let address = Ipv4Addr::from_bits(vtep.address);
    let mut words = vec![format!("{address}, MAC {}", MacAddress(vtep.header.peer_vtep_mac()))];
    if vtep.ifindex == 0 {
        words.push("the underlay has no route to it".to_owned());
        return words.join("; ");
    }
    let device = interface_name(vtep.ifindex).unwrap_or_else(|| format!("device no. {} (gone)", vtep.ifindex));
    let next_hop = Ipv4Addr::from(vtep.next_hop);
    let mac: Mac = vtep.header.underlay_macs().0;
    let (by_flow, resolved) = (vtep.flags & Vtep::BY_FLOW != 0, vtep.flags & Vtep::RESOLVED != 0);
    words.push(match (by_flow, resolved) {
        (true, _) => format!("the kernel chooses the next hop of each flow (such as by {device})"),
        (false, true) => format!("next hop {next_hop} by {device}, whose MAC is {}", MacAddress(mac)),
        (false, false) => format!("next hop {next_hop} by {device}, whose MAC the kernel finds out for each packet"),
    });
    if vtep.flags & Vtep::ON_LINK != 0 {
        words.push("on the same link".to_owned());
    }
    if vtep.mtu != 0 {
        words.push(format!("packets of up to {} bytes fit on the way", vtep.mtu));
    }
    words.join("; ")
}

/// Whether the sender of a tunnel packet is known.
pub(super) fn sender(host: &Host, outer: Ipv4Addr, inner: Ipv4Addr) -> Result<Vec<Consulted>, DataplaneError> {
    let known = match host.tables.vtep_of(outer)? {
        Some(id) => format!("VTEP no. {id}"),
        None => "no VTEP".to_owned(),
    };
    let accepted = if host.tables.is_accepted(inner)? { "accepted" } else { "not in a prefix of --accept-source" };
    Ok(vec![Consulted::new(VTEP_ADDRESSES, outer, known), Consulted::new(ACCEPTED, inner, accepted)])
}

/// What is noted of a flow.
pub(super) fn flow(host: &Host, key: &FlowKey) -> Result<Vec<Consulted>, DataplaneError> {
    let name = name(key);
    let Some(flow) = host.tables.flow(key)? else {
        let mut consulted = vec![Consulted::new(FLOWS, name, "nothing")];
        consulted.extend(excluded(host, key)?);
        return Ok(consulted);
    };
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_err(DataplaneError::Clock)?.into();
    let released = |released: u64, direction: &str, as_key: &FlowKey, more: String| {
        if released == 0 {
            return None;
        }
        let ago = Duration::saturating_sub(now, Duration::from_nanos(released));
        let translated = if as_key == key { String::new() } else { format!(" as {}", self::name(as_key)) };
        Some(format!("{direction}: the stack let a packet out {} ago{translated}{more}", age(ago)))
    };
    let (egress, ingress) = (&flow.egress, &flow.ingress);
    let mark = match (egress.mark, egress.priority) {
        (0, 0) => String::new(),
        (mark, priority) => format!(" with mark {mark:#x} and priority {priority:#x}"),
    };
    let veth = interface_name(ingress.veth).unwrap_or_else(|| format!("device no. {}", ingress.veth));
    let words = [
        released(egress.released, "from the pod", &egress.sent_as, mark),
        released(ingress.released, "to the pod", &ingress.received_as, format!(" to {veth}")),
    ];
    let words: Vec<_> = words.into_iter().flatten().collect();
    let words = if words.is_empty() { "nothing was let out".to_owned() } else { words.join("; ") };
    Ok([vec![Consulted::new(FLOWS, name, words)], excluded(host, key)?].concat())
}

fn excluded(host: &Host, key: &FlowKey) -> Result<Vec<Consulted>, DataplaneError> {
    Ok(match host.tables.is_excluded(key)? {
        true => {
            vec![Consulted::new(EXCLUDED, name(key), "its packets always take the stack, for a rule of the host's")]
        }
        false => Vec::new(),
    })
}

/// The MAC that a pod sends from.
pub(super) fn pod(host: &Host, veth: u32) -> Result<Consulted, DataplaneError> {
    let mac = host.tables.pod(veth)?;
    let words = mac.map_or_else(|| "none seen yet".to_owned(), |mac| format!("sends from {}", MacAddress(mac)));
    Ok(Consulted::new(PODS, interface_name(veth).unwrap_or_else(|| format!("device no. {veth}")), words))
}

fn name(key: &FlowKey) -> String {
    let [local, remote] = [key.local, key.remote].map(Ipv4Addr::from);
    let [local_port, remote_port] = [key.local_port, key.remote_port].map(u16::from_be_bytes);
    let protocol = match key.protocol {
        6 => "TCP",
        17 => "UDP",
        _ => return format!("{local} and {remote}, IP protocol {}", key.protocol),
    };
    format!("{local}:{local_port} and {remote}:{remote_port} {protocol}")
}
