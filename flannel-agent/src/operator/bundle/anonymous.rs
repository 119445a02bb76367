//! Other addresses and names in the place of a host's own, each the same wherever it is.
//!
//! IPv4 addresses keep their last octet, and their first, or what of private networks everybody has (`10.`, `172.16.`, `192.168.`). The bits
//! between are changed so that two addresses have as many first bits in common as before: what lay in one subnet still does (as Crypto-PAn does, Fan,
//! Xu, Ammar, Moon 2004). Which bits are changed is drawn anew for each archive.

use std::{
    cell::RefCell,
    collections::{BTreeSet, HashMap, hash_map::RandomState},
    hash::BuildHasher as _,
    net::{Ipv4Addr, Ipv6Addr},
    sync::LazyLock,
};

use flannel_common::vxlan::NEXT_HOP_MAC;
use regex::{Captures, Regex};

use crate::lease::MacAddress;

/// Shorter names would be found in other words.
const SHORTEST: usize = 3;
/// As many bits at the end of an address stay.
const KEPT: u32 = 8;

static MAC: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\b(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}\b").ok());
static IPV4: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\b(?:\d{1,3}\.){3}\d{1,3}\b").ok());
static IPV6: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}").ok());

/// Puts others in the place of addresses and names.
pub(super) struct Anonymizer {
    bits: RandomState,
    names: Option<Regex>,
    /// What stands for each, by kind.
    known: RefCell<HashMap<&'static str, HashMap<String, String>>>,
}

impl Anonymizer {
    pub(super) fn new(names: BTreeSet<String>) -> Self {
        let mut names: Vec<_> = names
            .into_iter()
            .filter(|name| name.len() >= SHORTEST && name != "localhost" && name.parse::<std::net::IpAddr>().is_err())
            .collect();
        // The longest first: one may be in another.
        names.sort_by_key(|name| std::cmp::Reverse(name.len()));
        let pattern = names.iter().map(|name| regex::escape(name)).collect::<Vec<_>>().join("|");
        let names = (!names.is_empty()).then(|| Regex::new(&format!(r"\b(?:{pattern})\b")).ok()).flatten();
        Self { bits: RandomState::new(), names, known: RefCell::default() }
    }

    pub(super) fn apply(&self, text: &str) -> String {
        let replaced = |pattern: Option<&Regex>, text: String, by: &dyn Fn(&str) -> Option<String>| match pattern {
            Some(pattern) => pattern
                .replace_all(&text, |found: &Captures<'_>| by(&found[0]).unwrap_or_else(|| found[0].to_owned()))
                .into_owned(),
            None => text,
        };
        let text = replaced(self.names.as_ref(), text.to_owned(), &|name| {
            Some(self.numbered("host", name, |number| format!("host-{number}")))
        });
        // Before IPv6, which looks alike.
        let text = replaced(MAC.as_ref(), text, &|mac| self.mac(mac));
        let text = replaced(IPV6.as_ref(), text, &|address| self.ipv6(address));
        replaced(IPV4.as_ref(), text, &|address| Some(self.ipv4(address.parse().ok()?).to_string()))
    }

    fn numbered(&self, kind: &'static str, own: &str, other: impl FnOnce(usize) -> String) -> String {
        let mut known = self.known.borrow_mut();
        let known = known.entry(kind).or_default();
        let number = known.len() + 1;
        known.entry(own.to_owned()).or_insert_with(|| other(number)).clone()
    }

    /// [`None`] for one that is everybody's.
    fn mac(&self, text: &str) -> Option<String> {
        let own = text.to_lowercase();
        let is_shared = |mac: &str| {
            ["00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff"].contains(&mac) || mac == MacAddress(NEXT_HOP_MAC).to_string()
        };
        (!is_shared(&own)).then(|| {
            self.numbered("mac", &own, |number| {
                let [.., high, low] = number.to_be_bytes();
                format!("02:00:00:00:{high:02x}:{low:02x}")
            })
        })
    }

    fn ipv6(&self, text: &str) -> Option<String> {
        let own: Ipv6Addr = text.parse().ok()?;
        if own.is_unspecified() || own.is_loopback() || own.is_multicast() {
            return None;
        }
        let prefix = if own.is_unicast_link_local() { "fe80" } else { "fd00" };
        Some(self.numbered("ipv6", &own.to_string(), |number| format!("{prefix}::{number:x}")))
    }

    fn ipv4(&self, own: Ipv4Addr) -> Ipv4Addr {
        let [first, second, ..] = own.octets();
        // What everybody has at the beginning.
        let same = match (first, second) {
            (0 | 127 | 224..=255, _) | (169, 254) => return own,
            (10, _) => 8,
            (172, 16..=31) => 12,
            (192, 168) => 16,
            _ => 8,
        };
        let bits = own.to_bits();
        let changed = (same..32 - KEPT).filter(|position| {
            let before = bits >> (32 - position);
            self.bits.hash_one((position, before)) & 1 == 1
        });
        Ipv4Addr::from_bits(changed.fold(bits, |bits, position| bits ^ 1 << (31 - position)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn common(one: Ipv4Addr, two: Ipv4Addr) -> u32 {
        (one.to_bits() ^ two.to_bits()).leading_zeros()
    }

    #[test]
    fn subnets_stay_subnets_and_addresses_do_not_stay() {
        let anonymizer = Anonymizer::new(BTreeSet::new());
        let addresses =
            ["10.5.1.0", "10.5.1.7", "10.5.200.1", "10.77.3.4", "192.168.64.1", "203.0.113.9", "172.16.9.9"]
                .map(|text| text.parse::<Ipv4Addr>().unwrap());
        let others = addresses.map(|address| anonymizer.ipv4(address));
        for (one, other) in addresses.iter().zip(&others) {
            assert_eq!(one.octets()[3], other.octets()[3]);
            assert_eq!(one.is_private(), other.is_private());
            for (two, another) in addresses.iter().zip(&others) {
                assert_eq!(common(*one, *two), common(*other, *another), "{one} {two}: {other} {another}");
            }
        }
        // One in thousands stays what it was by chance.
        assert!((0..64).any(|n| anonymizer.ipv4(Ipv4Addr::new(10, n, n, 1)) != Ipv4Addr::new(10, n, n, 1)));
        for own in ["127.0.0.1", "0.0.0.0", "169.254.1.1", "255.255.255.0", "224.0.0.1"] {
            let own: Ipv4Addr = own.parse().unwrap();
            assert_eq!(anonymizer.ipv4(own), own);
        }
    }

    #[test]
    fn each_is_the_same_everywhere() {
        let names = ["web7.corp.example", "web7", "db", "10.0.0.1"].map(str::to_owned);
        let anonymizer = Anonymizer::new(names.into());
        let text = "web7.corp.example web7 web70 db 0a:1B:00:00:00:09 fe80::81b:ff:fe00:9/64 2001:db8::1 12:34:56 ::1";
        let first = anonymizer.apply(text);
        assert_eq!(first, anonymizer.apply(text));
        assert_eq!(first, "host-1 host-2 web70 db 02:00:00:00:00:01 fe80::1/64 fd00::2 12:34:56 ::1");
        assert_eq!(anonymizer.apply("0A:1b:00:00:00:09"), "02:00:00:00:00:01");
        assert_eq!(anonymizer.apply("ff:ff:ff:ff:ff:ff"), "ff:ff:ff:ff:ff:ff");
        assert_eq!(anonymizer.apply("version 6.1.0-13, 999.1.2.3"), "version 6.1.0-13, 999.1.2.3");
    }
}
