//! The rule sets that others set by themselves: made by hand from what their programs are known to set, listed as
//! `iptables-save` and `nft -j` list them.

use super::{
    RuleSets, concerns_tunnel,
    tests::{around, of_iptables, of_nft},
};
use crate::{
    bypass::Scope,
    netfilter::{Listing, Saved},
};

/// kube-proxy: pkg/proxy/iptables, pkg/proxy/ipvs; Docker 28: daemon/libnetwork/drivers/bridge; Calico: felix/rules; kube-router:
/// pkg/controllers/netpol; ufw: conf/before.rules, src/ufw-init-functions and what `ufw` adds for `deny (routed)`.
pub(super) const IPTABLES: [(&str, &str); 6] = [
    ("kube-proxy", include_str!("fixtures/kube-proxy.iptables")),
    ("kube-proxy by IPVS", include_str!("fixtures/kube-proxy-ipvs.iptables")),
    ("Docker", include_str!("fixtures/docker.iptables")),
    ("Calico", include_str!("fixtures/calico.iptables")),
    ("kube-router", include_str!("fixtures/kube-router.iptables")),
    ("ufw", include_str!("fixtures/ufw.iptables")),
];
/// kube-proxy: pkg/proxy/nftables; Docker 29: daemon/libnetwork/internal/nftables; Calico: felix/nftables; firewalld:
/// src/firewall/core/nftables.py; flannel: pkg/trafficmngr/nftables.
pub(super) const NFT: [(&str, &str); 5] = [
    ("kube-proxy", include_str!("fixtures/kube-proxy.json")),
    ("Docker", include_str!("fixtures/docker.json")),
    ("Calico", include_str!("fixtures/calico.json")),
    ("firewalld", include_str!("fixtures/firewalld.json")),
    ("flannel", include_str!("fixtures/flannel.json")),
];

#[test]
fn what_others_set_by_themselves_is_no_alarm() {
    for (whose, text) in IPTABLES {
        assert_eq!(of_iptables(text), [], "{whose}");
    }
    for (whose, text) in NFT {
        assert_eq!(of_nft(text), [], "{whose}");
    }
}

/// Beside whom tunnel packets are left in their tunnel. Not where every node has kube-proxy and flannel alone.
#[test]
fn tunnel_packets_that_others_decide_on() {
    let concerned = |listing: &Listing| concerns_tunnel(&RuleSets::parse(listing), &around());
    let iptables = IPTABLES.iter().filter(|(_, text)| {
        let saved = Saved { program: "iptables", is_nf_tables: true, text: (*text).to_owned() };
        concerned(&Listing { iptables: vec![saved], nft: Vec::new() })
    });
    let nft =
        NFT.iter().filter(|(_, text)| concerned(&Listing { iptables: Vec::new(), nft: vec![(*text).to_owned()] }));
    let [iptables, nft] =
        [iptables.map(|(whose, _)| *whose).collect::<Vec<_>>(), nft.map(|(whose, _)| *whose).collect()];
    // Sets of addresses and marks can't be told, and ufw drops what it was not told of.
    assert_eq!((iptables, nft), (vec!["kube-proxy by IPVS", "Calico", "ufw"], vec!["Calico"]));
}

/// kube-proxy's mark for what it masquerades is set where forwarded packets pass; Calico's and Docker's are of their own.
#[test]
fn marks_that_others_set_by_themselves() {
    let marks = |text: &str| {
        let saved = Saved { program: "iptables", is_nf_tables: true, text: text.to_owned() };
        RuleSets::parse(&Listing { iptables: vec![saved], nft: Vec::new() }).marks()
    };
    for (whose, text, bits) in [
        ("kube-proxy", include_str!("fixtures/kube-proxy.iptables"), 0x4000),
        ("kube-proxy by IPVS", include_str!("fixtures/kube-proxy-ipvs.iptables"), 0x4000),
        ("ufw", include_str!("fixtures/ufw.iptables"), 0),
    ] {
        assert_eq!(marks(text), bits, "{whose}");
    }
}

/// An operator's limit in front of all of them.
#[test]
fn among_what_others_set_a_limit_is_found() {
    for (whose, text) in IPTABLES {
        let rule = ":FORWARD ACCEPT [0:0]\n-A FORWARD -m limit --limit 10/sec -j DROP\n";
        let limited = text.replacen(":FORWARD ACCEPT [0:0]\n", rule, 2).replacen(
            ":FORWARD DROP [0:0]\n",
            &rule.replace("ACCEPT", "DROP"),
            1,
        );
        let found = of_iptables(&limited);
        let is_limit = |scope: &Scope| *scope == Scope::Everything;
        assert!(!found.is_empty() && found.iter().all(|found| is_limit(&found.scope)), "{whose}: {found:?}");
        let last = found.last().map(|found| found.subject.clone());
        assert_eq!(last.as_deref(), Some("iptables FORWARD rule 1: limit"), "{whose}");
    }
    for (whose, text) in NFT {
        let chain = text.lines().find(|line| line.contains(r#""hook": "forward""#));
        let object: serde_json::Value =
            serde_json::from_str(chain.unwrap_or_default().trim_end_matches(',')).expect("a chain");
        let chain = &object["chain"];
        let limit = format!(
            r#"{{"rule": {{"family": {}, "table": {}, "chain": {}, "handle": 99, "expr": [{{"limit": {{"rate": 5}}}}, {{"drop": null}}]}}}}"#,
            chain["family"], chain["table"], chain["name"]
        );
        let begun = text.find(r#"{"rule""#).expect("a rule");
        let found = of_nft(&format!("{}{limit},\n{}", &text[..begun], &text[begun..]));
        assert_eq!((found.len(), &found[0].scope), (1, &Scope::Everything), "{whose}: {found:?}");
        assert!(found[0].subject.ends_with("handle 99: limit rate"), "{whose}: {found:?}");
    }
}

/// Its program reads the first packets of each connection, and labels what may go on (pkg/dataplane/controller.go).
#[test]
fn a_queue_for_first_packets_is_named_and_costs_no_speed() {
    let found = of_nft(include_str!("fixtures/kube-network-policies.json"));
    let named = |handle: u8| {
        format!(
            "nft inet kube-network-policies postrouting handle {handle}: queue: sees one packet in a second of flows of \
             which nothing is noted"
        )
    };
    let subjects: Vec<_> = found.iter().map(|found| found.subject.clone()).collect();
    assert_eq!(subjects, [named(8), named(9)]);
    assert!(found.iter().all(|found| found.scope == Scope::Nothing), "{found:?}");
    // Without the label, all are queued.
    let all = include_str!("fixtures/kube-network-policies.json").replace(r#""key": "label""#, r#""key": "mark""#);
    assert_eq!(of_nft(&all), found);
    let all = all.replace(r#"["established", "related"]"#, r#"["related"]"#);
    let addresses = |found: &crate::bypass::Restriction| matches!(found.scope, Scope::Addresses(_));
    assert!(of_nft(&all).iter().all(addresses) && of_nft(&all).len() == 4, "{:?}", of_nft(&all));
}
