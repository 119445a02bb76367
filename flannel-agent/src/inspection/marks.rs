//! Which marks packets of the overlay can have, as far as packet rules give them: those that routing rules may ask for.

use std::ops::BitOr;

use serde_json::Value;

use super::{
    RuleSets,
    rule::{Hook, Rule, Table},
};

/// Whose mark it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Marked {
    Packet,
    /// conntrack's, which rules save to and restore from.
    Connection,
}

/// Which bits a mark may be given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Bits {
    /// By the rule itself.
    pub(super) own: u32,
    /// As the packet's mark has them.
    pub(super) of_packet: u32,
    /// As the connection's mark has them.
    pub(super) of_connection: u32,
}

impl Bits {
    pub(super) const ANY: Self = Self { own: u32::MAX, of_packet: 0, of_connection: 0 };

    pub(super) const fn own(bits: u32) -> Self {
        Self { own: bits, of_packet: 0, of_connection: 0 }
    }

    pub(super) const fn of(marked: Marked, mask: u32) -> Self {
        match marked {
            Marked::Packet => Self { own: 0, of_packet: mask, of_connection: 0 },
            Marked::Connection => Self { own: 0, of_packet: 0, of_connection: mask },
        }
    }

    /// What an expression of nftables may come to (libnftables-json(5)).
    pub(super) fn of_expression(value: &Value) -> Self {
        if let Some(number) = value.as_u64() {
            return Self::own(number as u32);
        }
        let Some((kind, operand)) = value.as_object().and_then(|value| value.iter().next()) else { return Self::ANY };
        match (kind.as_str(), operand.as_array().map(Vec::as_slice)) {
            ("|" | "^", Some(operands)) => operands.iter().map(Self::of_expression).fold(Self::default(), Self::bitor),
            ("&", Some([left, right])) => match (left.as_u64(), right.as_u64()) {
                (_, Some(mask)) => Self::of_expression(left).within(mask as u32),
                (Some(mask), None) => Self::of_expression(right).within(mask as u32),
                (None, None) => Self::of_expression(left),
            },
            _ => Marked::of_key(value).map_or(Self::ANY, |marked| Self::of(marked, u32::MAX)),
        }
    }

    const fn within(self, mask: u32) -> Self {
        let Self { own, of_packet, of_connection } = self;
        Self { own: own & mask, of_packet: of_packet & mask, of_connection: of_connection & mask }
    }
}

impl BitOr for Bits {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self {
            own: self.own | other.own,
            of_packet: self.of_packet | other.of_packet,
            of_connection: self.of_connection | other.of_connection,
        }
    }
}

impl Marked {
    /// By what nftables calls it.
    pub(super) fn of_key(key: &Value) -> Option<Self> {
        let is_mark = |of: &str| key.get(of).and_then(|of| of.get("key")).is_some_and(|key| key == "mark");
        match (is_mark("meta"), is_mark("ct")) {
            (true, _) => Some(Self::Packet),
            (false, true) => Some(Self::Connection),
            (false, false) => None,
        }
    }
}

/// That a rule writes a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MarkWrite {
    pub(super) of: Marked,
    pub(super) bits: Bits,
}

impl RuleSets {
    /// The bits that a mark of forwarded packets may have: by any rule that is reached where such packets pass, whatever it asks of
    /// them besides. A bit of a connection's mark is one that some rule writes there.
    #[must_use]
    pub fn marks(&self) -> u32 {
        let writes: Vec<MarkWrite> = self.0.iter().flat_map(forwarded).flat_map(|rule| rule.marks.clone()).collect();
        let (mut packet, mut connection) = (0, 0);
        loop {
            let before: (u32, u32) = (packet, connection);
            for MarkWrite { of, bits } in &writes {
                let bits = bits.own | bits.of_packet & packet | bits.of_connection & connection;
                match of {
                    Marked::Packet => packet |= bits,
                    Marked::Connection => connection |= bits,
                }
            }
            if before == (packet, connection) {
                return packet;
            }
        }
    }
}

/// The rules that forwarded packets may get to.
fn forwarded(table: &Table) -> impl Iterator<Item = &Rule> {
    let is_passed = |hook: Hook| !matches!(hook, Hook::Input | Hook::Output);
    let bases =
        table.chains.iter().filter(move |(_, chain)| chain.base.as_ref().is_some_and(|base| is_passed(base.hook)));
    let reached: std::collections::HashSet<&str> = bases.flat_map(|(name, _)| table.reached_from(name)).collect();
    reached.into_iter().filter_map(|name| table.chains.get(name)).flat_map(|chain| &chain.rules)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netfilter::{Listing, Saved};

    fn of_iptables(table: &str, rules: &str) -> u32 {
        let chains =
            ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"].map(|chain| format!(":{chain} ACCEPT [0:0]\n"));
        let text = format!("*{table}\n{}{rules}\nCOMMIT\n", chains.concat());
        let saved = Saved { program: "iptables", is_nf_tables: false, text };
        RuleSets::parse(&Listing { iptables: vec![saved], ..Listing::default() }).marks()
    }

    fn of_nft(statements: &str) -> u32 {
        let text = format!(
            r#"{{"nftables": [
            {{"chain": {{"family": "inet", "table": "t", "name": "f", "type": "filter", "hook": "forward", "prio": 0}}}},
            {{"rule": {{"family": "inet", "table": "t", "chain": "f", "handle": 5, "expr": [{statements}]}}}}]}}"#
        );
        RuleSets::parse(&Listing { nft: vec![text], ..Listing::default() }).marks()
    }

    #[test]
    fn of_iptables_where_forwarded_packets_pass() {
        for (rules, expected) in [
            ("-A PREROUTING -j MARK --set-xmark 0x5/0xffffffff", 5),
            ("-A FORWARD -p tcp -j MINE\n-A MINE -j MARK --set-xmark 0x4000/0x4000", 0x4000),
            ("-A POSTROUTING -j MARK --set-xmark 0x0/0x4000", 0),
            ("-A OUTPUT -j MARK --set-xmark 0x5/0xffffffff", 0),
            ("-A OUTPUT -j MINE\n-A MINE -j MARK --set-xmark 0x5/0xffffffff", 0),
            ("-A PREROUTING -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff", 0),
            (
                "-A PREROUTING -j CONNMARK --restore-mark --nfmask 0xff --ctmask 0xff\n-A FORWARD -j CONNMARK --set-xmark 0x105/0xffffffff",
                5,
            ),
            ("-A PREROUTING -j HMARK --hmark-mod 2", u32::MAX),
        ] {
            assert_eq!(of_iptables("mangle", rules), expected, "{rules}");
        }
        // As wg-quick has them, for packets that have the mark already.
        let wireguard = "-A PREROUTING -p udp -m comment --comment \"wg-quick(8) rule for wg0\" -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff\n\
                         -A POSTROUTING -p udp -m mark --mark 0xca6c -j CONNMARK --save-mark --nfmask 0xffffffff --ctmask 0xffffffff";
        assert_eq!(of_iptables("mangle", wireguard), 0);
        let both = format!("{wireguard}\n-A FORWARD -j MARK --set-xmark 0x4000/0x4000");
        assert_eq!(of_iptables("mangle", &both), 0x4000);
    }

    #[test]
    fn of_nftables() {
        let set = |key: &str, value: &str| {
            format!(r#"{{"mangle": {{"key": {{"{key}": {{"key": "mark"}}}}, "value": {value}}}}}"#)
        };
        let mark = r#"{"meta": {"key": "mark"}}"#;
        for (statements, expected) in [
            (set("meta", "5"), 5),
            (set("meta", &format!(r#"{{"|": [{mark}, 16384]}}"#)), 16384),
            (set("meta", &format!(r#"{{"^": [{{"&": [{mark}, 255]}}, 256]}}"#)), 256),
            (set("meta", r#"{"ct": {"key": "mark"}}"#), 0),
            (format!("{}, {}", set("ct", "7"), set("meta", r#"{"&": [{"ct": {"key": "mark"}}, 3]}"#)), 3),
            (set("meta", r#"{"map": {"key": 1, "data": "@m"}}"#), u32::MAX),
            (set("meta", r#"{"numgen": {"mode": "inc", "mod": 2}}"#), u32::MAX),
            (r#"{"mangle": {"key": {"meta": {"key": "priority"}}, "value": 5}}"#.to_owned(), 0),
        ] {
            assert_eq!(of_nft(&statements), expected, "{statements}");
        }
    }
}
