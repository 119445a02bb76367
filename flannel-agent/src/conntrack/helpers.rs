//! Connections that conntrack's helpers read: what they read there lets other connections in, so every packet of these takes
//! the stack. A program can't see which connections have a helper (`skb->_nfct` needs the kernel's types, and more
//! capabilities than the agent has); helpers are known by their ports.

use std::ops::RangeInclusive;

use crate::bypass::{Kind, Ports, Protocol, Restriction, Scope};

/// The ports at which the kernel's helpers read where nobody says otherwise: by themselves (`nf_conntrack_helper`, kernels
/// before 6.0), or by the rules that assign them (`ct helper set`, `-j CT --helper`), as firewalls write these. By module
/// in net/netfilter/nf_conntrack_*.c, which have the ports in a parameter or a constant.
const HELPERS: [(&str, Protocol, RangeInclusive<u16>); 13] = [
    ("ftp", Protocol::Tcp, 21..=21),
    ("tftp", Protocol::Udp, 69..=69),
    ("sip", Protocol::Udp, 5060..=5061),
    ("sip", Protocol::Tcp, 5060..=5061),
    ("irc", Protocol::Tcp, 6667..=6667),
    ("Q.931", Protocol::Tcp, 1720..=1720),
    ("RAS", Protocol::Udp, 1719..=1719),
    ("pptp", Protocol::Tcp, 1723..=1723),
    ("amanda", Protocol::Udp, 10080..=10080),
    ("snmp", Protocol::Udp, 161..=161),
    ("snmp_trap", Protocol::Udp, 162..=162),
    ("netbios-ns", Protocol::Udp, 137..=137),
    ("sane", Protocol::Tcp, 6566..=6566),
];

/// What keeps their flows off the bypass.
pub fn restrictions() -> Vec<Restriction> {
    let restriction = |(name, protocol, ports): &(&str, Protocol, RangeInclusive<u16>)| Restriction {
        kind: Kind::Helper,
        subject: format!("conntrack's helper {name}"),
        scope: Scope::Ports(Ports::new(*protocol, ports)),
    };
    HELPERS.iter().map(restriction).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bypass::{BypassFlag, Plan};

    #[test]
    fn helpers_keep_their_ports_off_the_bypass() {
        for flag in [BypassFlag::Auto, BypassFlag::On] {
            let plan = Plan::of(flag, &restrictions());
            assert_eq!(plan.ports.len(), HELPERS.len());
            assert!(plan.ports.contains(&Ports::new(Protocol::Tcp, &(21..=21))));
            assert!(plan.ports.contains(&Ports::new(Protocol::Udp, &(5060..=5061))));
        }
    }
}
