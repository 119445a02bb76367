//! Rules about tunnel packets that come in: which have them left in their tunnel.

use super::{
    RuleSets, concerns_tunnel,
    tests::{around, saved},
};
use crate::netfilter::Listing;

#[test]
fn what_comes_in_from_peers_in_the_tunnel() {
    let concerns = |text: &str| {
        let listing = Listing { iptables: vec![saved(text)], nft: Vec::new() };
        concerns_tunnel(&RuleSets::parse(&listing), &around())
    };
    let with = |table: &str, policy: &str, rules: &str| {
        concerns(&format!(
            "*{table}\n:PREROUTING ACCEPT [0:0]\n:INPUT {policy} [0:0]\n:FORWARD DROP [0:0]\n:OUTPUT ACCEPT [0:0]\n\
             {rules}\nCOMMIT\n"
        ))
    };
    assert!(!concerns(""));
    for (policy, rules) in [
        ("ACCEPT", ""),
        ("ACCEPT", "-A INPUT -i lo -j DROP"),
        ("ACCEPT", "-A INPUT -p tcp -j DROP\n-A INPUT -p udp -m udp --dport 53 -j DROP"),
        ("ACCEPT", "-A INPUT -s 203.0.113.9/32 -j REJECT"),
        ("ACCEPT", "-A INPUT -p udp -m udp --dport 8472 -j ACCEPT\n-A INPUT -j DROP"),
        ("DROP", "-A INPUT -p udp -m udp --dport 8472 -j ACCEPT"),
        ("ACCEPT", "-A FORWARD -j DROP\n-A OUTPUT -j DROP"),
    ] {
        assert!(!with("filter", policy, rules), "{policy} {rules}");
    }
    for (policy, rules) in [
        ("DROP", ""),
        ("DROP", "-A INPUT -p udp -m udp --dport 8473 -j ACCEPT"),
        ("DROP", "-A INPUT -s 192.168.64.3/32 -j ACCEPT"),
        ("DROP", "-A INPUT -p udp -m udp --dport 8472 -m set --match-set peers src -j ACCEPT"),
        ("ACCEPT", "-A INPUT -j DROP"),
        ("ACCEPT", "-A INPUT -s 192.168.64.2/32 -j REJECT"),
        ("ACCEPT", "-A INPUT -p udp -m udp --dport 8472 -m limit --limit 1/sec -j ACCEPT"),
        ("ACCEPT", "-A INPUT -m set --match-set blocked src -j DROP"),
        ("ACCEPT", "-A INPUT -p udp -m udp --dport 8472 -j LOG"),
        ("ACCEPT", "-A INPUT -p udp -m udp --dport 8472 -j MARK --set-xmark 0x5/0xffffffff"),
    ] {
        assert!(with("filter", policy, rules), "{policy} {rules}");
    }
    assert!(with("raw", "ACCEPT", "-A PREROUTING -i eth0 -p udp -m udp --dport 8472 -j DROP"));
    assert!(!with("raw", "ACCEPT", "-A PREROUTING -p udp -m udp --dport 8472 -j NOTRACK"));
    assert!(!with("raw", "ACCEPT", "-A PREROUTING -i eth1 -p udp -m udp --dport 8472 -j DROP"));
}
