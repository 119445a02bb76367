//! Single rules: whether they are found, and of what.

use ipnet::Ipv4Net;

use super::*;
use crate::{
    bypass::{Kind, Ports, Protocol, Scope},
    netfilter::Saved,
};

/// A host with a bridge of pods, and with one pod that has a route to its veth.
pub(super) fn around() -> Surroundings {
    let pod = |index, is_bridged| Pod { index, is_bridged };
    Surroundings {
        network: "10.5.0.0/16".parse().expect("CIDR"),
        subnet: "10.5.28.0/24".parse().expect("CIDR"),
        overlay: "flannel.1".to_owned(),
        underlay: ["eth0".to_owned()].into(),
        address: Ipv4Addr::new(192, 168, 64, 1),
        port: 8472,
        bridges: ["cni0".to_owned()].into(),
        pods: [("veth1".to_owned(), pod(7, true)), ("cali1".to_owned(), pod(8, false))].into(),
        peers: Arc::new([Ipv4Addr::new(192, 168, 64, 2)].into()),
    }
}

pub(super) fn saved(text: &str) -> Saved {
    Saved { program: "iptables", is_nf_tables: true, text: text.to_owned() }
}

pub(super) fn of_iptables(text: &str) -> Vec<Restriction> {
    let listing = Listing { iptables: vec![saved(text)], nft: Vec::new() };
    inspect(&RuleSets::parse(&listing), &around())
}

pub(super) fn of_nft(text: &str) -> Vec<Restriction> {
    let listing = Listing { iptables: Vec::new(), nft: vec![text.to_owned()] };
    inspect(&RuleSets::parse(&listing), &around())
}

/// Of rules of a table's chain.
fn table(table: &str, rules: &str) -> Vec<Restriction> {
    of_iptables(&format!(
        "*{table}\n:PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n\
         :POSTROUTING ACCEPT [0:0]\n:MINE - [0:0]\n{rules}\nCOMMIT\n"
    ))
}

fn forward(rules: &str) -> Vec<Restriction> {
    table("filter", rules)
}

fn everything(subject: &str) -> Vec<Restriction> {
    scoped(subject, &[Scope::Everything])
}

fn scoped(subject: &str, scopes: &[Scope]) -> Vec<Restriction> {
    let of = |scope: &Scope| Restriction { kind: Kind::Rule, subject: subject.to_owned(), scope: scope.clone() };
    scopes.iter().map(of).collect()
}

fn tcp(first: u16, last: u16) -> Scope {
    Scope::Ports(Ports::new(Protocol::Tcp, &(first..=last)))
}

fn udp(first: u16, last: u16) -> Scope {
    Scope::Ports(Ports::new(Protocol::Udp, &(first..=last)))
}

fn addresses(net: &str) -> Scope {
    Scope::Addresses(net.parse::<Ipv4Net>().expect("CIDR"))
}

const SEES: &str = "sees one packet in a second of each flow";

#[test]
fn each_kind_of_iptables() {
    for (rule, what) in [
        ("-m limit --limit 10/sec -j ACCEPT", "limit"),
        ("-m hashlimit --hashlimit-above 125kb/s --hashlimit-name x -j DROP", "hashlimit"),
        ("-m statistic --mode random --probability 0.50000000000 -j DROP", "statistic"),
        (r#"-m string --string "a \"b\" -j ACCEPT" --algo bm -j DROP"#, "string"),
        ("-m connlimit --connlimit-above 3 --connlimit-mask 32 --connlimit-saddr -j DROP", "connlimit"),
        ("-m quota --quota 1000 -j ACCEPT", "quota"),
        ("-m connbytes --connbytes 100 --connbytes-mode bytes --connbytes-dir both -j DROP", "connbytes"),
        ("-m length --length 1000:65535 -j DROP", "length"),
        ("-m recent --update --seconds 1 --hitcount 5 --name x --mask 255.255.255.255 --rsource -j DROP", "recent"),
        ("-m u32 --u32 \"0x0&0xffff=0x1\" -j DROP", "u32"),
        ("-m limit --limit 10/sec -j MINE", "limit"),
        ("-m limit --limit 10/sec -j MARK --set-xmark 0x1/0xffffffff", "limit"),
        ("-j NFQUEUE --queue-num 1", "NFQUEUE"),
        ("-j TEE --gateway 10.0.0.9", "TEE"),
        ("-m quota ! --quota 5 -m limit --limit 1/sec -j DROP", "quota, limit"),
        ("-m set --match-set those src -j NFQUEUE --queue-num 1", "NFQUEUE"),
        ("-m addrtype ! --dst-type LOCAL -m mark --mark 0x1 -j NFQUEUE --queue-num 1", "NFQUEUE"),
    ] {
        assert_eq!(forward(&format!("-A FORWARD {rule}")), everything(&format!("iptables FORWARD rule 1: {what}")));
    }
    for (rule, what) in [
        ("-j LOG --log-prefix \"all: \"", "LOG"),
        ("-j NFLOG --nflog-group 5", "NFLOG"),
        ("-m limit --limit 3/min -j LOG", "LOG"),
        ("-m nfacct --nfacct-name pods", "nfacct"),
        ("", "counter"),
    ] {
        let expected = scoped(&format!("iptables FORWARD rule 2: {what}: {SEES}"), &[Scope::Nothing]);
        assert_eq!(forward(&format!("-A FORWARD -p icmp -j ACCEPT\n[5:300] -A FORWARD {rule}")), expected, "{rule}");
    }
    // What asks nothing of a packet, and what changes it, is seen where it comes out.
    for rule in [
        "-m limit --limit 3/min",
        "-m comment --comment limit -j ACCEPT",
        "-p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu",
        "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m limit --limit 1/sec -j ACCEPT",
        "-p tcp -m tcp --tcp-flags FIN,SYN,RST,PSH,ACK,URG NONE -m limit --limit 1/sec -j LOG",
        "-p icmp -m limit --limit 1/sec -j ACCEPT",
        "-m conntrack --ctstate INVALID -m limit --limit 1/sec -j LOG",
        "-m conntrack --ctstate RELATED -m limit --limit 1/sec -j LOG",
        "-m conntrack --ctstate UNTRACKED -j NFQUEUE --queue-num 1",
        "-p tcp -m conntrack --ctstate NEW -m limit --limit 1/sec -j ACCEPT",
        "-m conntrack --ctstate NEW -m limit --limit 1/sec -j LOG",
        "-j MARK --set-xmark 0x1/0x1",
        "-j DSCP --set-dscp 0x0a",
        "-m conntrack --ctstate ESTABLISHED -j CONNMARK --save-mark",
    ] {
        assert_eq!(forward(&format!("-A FORWARD {rule}")), [], "{rule}");
    }
    // UDP may go on without an answer.
    let unanswered = forward("-A FORWARD -m conntrack --ctstate NEW -j NFQUEUE --queue-num 1");
    let subject = "iptables FORWARD rule 1: NFQUEUE: sees one packet in a second of UDP that is not answered";
    assert_eq!(unanswered, scoped(subject, &[Scope::Nothing]));
}

#[test]
fn a_rule_is_about_what_it_names() {
    let limit = "-m limit --limit 10/sec -j ACCEPT";
    for (conditions, scopes) in [
        ("-s 10.5.28.7/32", vec![addresses("10.5.28.7/32")]),
        ("-d 10.5.3.0/24", vec![addresses("10.5.3.0/24")]),
        ("-d 10.5.3.0/255.255.255.0", vec![addresses("10.5.3.0/24")]),
        ("-s 10.5.28.7/32 -d 10.5.3.0/24", vec![addresses("10.5.28.7/32")]),
        ("-m iprange --dst-range 10.5.3.0-10.5.4.255", vec![addresses("10.5.3.0/24"), addresses("10.5.4.0/24")]),
        ("-p tcp -m tcp --dport 80", vec![tcp(80, 80)]),
        ("-p udp -m udp --sport 1000:", vec![udp(1000, 65535)]),
        ("-p tcp -m multiport --dports 80,443,8000:8080", vec![tcp(80, 80), tcp(443, 443), tcp(8000, 8080)]),
        ("-p tcp -m multiport --ports 80", vec![tcp(80, 80)]),
        ("-d 10.5.3.0/24 -p tcp -m tcp --dport 80", vec![tcp(80, 80)]),
        ("-d 10.5.3.4/32 -p tcp -m tcp --dport 80", vec![addresses("10.5.3.4/32")]),
        ("-p tcp", vec![tcp(0, 65535)]),
        ("-p udp -m udp ! --dport 53", vec![udp(0, 65535)]),
        ("-i cali1", vec![Scope::Pod(8)]),
        ("-o cali+ -s 10.5.3.4/32", vec![Scope::Pod(8)]),
        // Of those behind a bridge, the bridge is the device.
        ("-i veth1", vec![]),
        ("-i cni0", vec![Scope::Everything]),
        ("-i flannel.1", vec![Scope::Everything]),
        ("! -i eth0", vec![Scope::Everything]),
        ("-i eth0", vec![]),
        ("-o docker0", vec![]),
        ("-i cni0 -o cni0", vec![]),
        ("! -i flannel.1 -o eth0", vec![]),
        ("-i flannel.1 -o flannel.1", vec![]),
        ("-s 10.6.0.0/16", vec![]),
        ("-s 10.0.0.0/8", vec![Scope::Everything]),
        ("! -s 10.5.0.0/16", vec![]),
        ("! -s 10.5.28.7/32", vec![Scope::Everything]),
        ("-s 10.5.28.0/24 -d 10.5.28.0/24", vec![]),
        ("-d 10.0.3.0/255.0.255.0", vec![Scope::Everything]),
        ("-d 10.5.3.0/24 -m mark --mark 0x1/0x1", vec![addresses("10.5.3.0/24")]),
        ("-m conntrack --ctstate RELATED,ESTABLISHED", vec![Scope::Everything]),
        ("-m conntrack --ctstate DNAT", vec![Scope::Everything]),
        ("-p sctp -m sctp --dport 80", vec![]),
    ] {
        let mut expected = scoped("iptables FORWARD rule 1: limit", &scopes);
        expected.sort();
        assert_eq!(forward(&format!("-A FORWARD {conditions} {limit}")), expected, "{conditions}");
    }
}

#[test]
fn where_a_packet_gets_to() {
    let limit = "-m limit --limit 10/sec -j DROP";
    let mine = everything("iptables MINE rule 1: limit");
    assert_eq!(forward(&format!("-A FORWARD -j MINE\n-A MINE {limit}")), mine);
    assert_eq!(forward(&format!("-A FORWARD -g MINE\n-A MINE {limit}")), mine);
    assert_eq!(forward(&format!("-A MINE {limit}")), []);
    assert_eq!(forward(&format!("-A FORWARD -i eth0 -j MINE\n-A MINE {limit}")), []);
    let narrowed = forward(&format!("-A FORWARD -s 10.5.28.7/32 -j MINE\n-A MINE {limit}"));
    assert_eq!(narrowed, scoped("iptables MINE rule 1: limit", &[addresses("10.5.28.7/32")]));
    // From two sides.
    let both =
        forward(&format!("-A FORWARD -s 10.5.28.7/32 -j MINE\n-A FORWARD -d 10.5.28.7/32 -j MINE\n-A MINE {limit}"));
    assert_eq!(both, narrowed);
    for in_front in [
        "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n-A FORWARD -p udp -j ACCEPT",
        "-A FORWARD -s 10.5.0.0/16 -j ACCEPT\n-A FORWARD -d 10.5.0.0/16 -j ACCEPT",
        "-A FORWARD -j MINE\n-A MINE -s 10.5.0.0/16 -j ACCEPT",
        "-A FORWARD -g MINE",
        "-A FORWARD -j DROP",
        "-A FORWARD -i cni0 -j ACCEPT\n-A FORWARD -i cali+ -j ACCEPT\n-A FORWARD -i flannel.1 -j RETURN\n",
    ] {
        let found =
            forward(&format!("{in_front}\n-A FORWARD -m hashlimit --hashlimit-above 1/s --hashlimit-name x -j DROP"));
        let is_right = if in_front.contains("cali+") { found.len() == 1 } else { found.is_empty() };
        assert!(is_right, "{in_front}: {found:?}");
    }
    // What surely ends nothing.
    for in_front in [
        "-A FORWARD -m mark --mark 0x1 -j ACCEPT",
        "-A FORWARD -p tcp -m tcp --dport 80 -j ACCEPT",
        "-A FORWARD -m limit --limit 1/sec -j LOG",
        "-A FORWARD -j MINE\n-A MINE -j RETURN",
        "-A FORWARD -j MINE\n-A MINE -s 10.5.28.7 -j ACCEPT",
    ] {
        let found = forward(&format!("{in_front}\n-A FORWARD {limit}"));
        let is_last = |restriction: &Restriction| restriction.subject.ends_with(": limit");
        assert!(found.iter().any(|found| is_last(found) && found.scope == Scope::Everything), "{in_front}: {found:?}");
    }
    // Loops end.
    assert_eq!(forward(&format!("-A FORWARD -j MINE\n-A MINE -j MINE\n-A MINE {limit}")).len(), 1);
}

#[test]
fn where_a_table_is_called() {
    let queue = "-j NFQUEUE --queue-num 1";
    for chain in ["PREROUTING", "FORWARD", "POSTROUTING"] {
        let expected = everything(&format!("iptables -t mangle {chain} rule 1: NFQUEUE"));
        assert_eq!(table("mangle", &format!("-A {chain} {queue}")), expected);
    }
    assert_eq!(table("nat", &format!("-A PREROUTING {queue}")), []);
    assert_eq!(table("mangle", &format!("-A INPUT {queue}\n-A OUTPUT {queue}")), []);
    assert_eq!(table("mangle", &format!("-A POSTROUTING -o eth0 {queue}\n-A PREROUTING -i eth0 {queue}")), []);
    // A service's address, before its translation.
    let service =
        table("mangle", &format!("-A PREROUTING -d 10.96.0.10/32 {queue}\n-A FORWARD -d 10.96.0.10/32 {queue}"));
    assert_eq!(service, scoped("iptables -t mangle PREROUTING rule 1: NFQUEUE", &[addresses("10.96.0.10/32")]));
}

#[test]
fn helpers_and_what_has_no_connection() {
    let helper = |subject: &str, scope| Restriction { kind: Kind::Helper, subject: subject.to_owned(), scope };
    let ftp = table("raw", "-A PREROUTING -p tcp -m tcp --dport 2121 -j CT --helper ftp");
    assert_eq!(ftp, [helper("iptables -t raw PREROUTING rule 1: ftp", tcp(2121, 2121))]);
    let new = r#"{"nftables": [
        {"chain": {"family": "inet", "table": "t", "name": "f", "type": "filter", "hook": "forward", "prio": 0}},
        {"rule": {"family": "inet", "table": "t", "chain": "f", "handle": 5, "expr": [
            {"match": {"op": "==", "left": {"ct": {"key": "state"}}, "right": "new"}},
            {"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": 21}},
            {"ct helper": "ftp-standard"}]}}]}"#;
    assert_eq!(of_nft(new), [helper("nft inet t f handle 5: ftp-standard", tcp(21, 21))]);

    let raw = "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -m tcp --dport 80 -j CT --notrack\nCOMMIT\n";
    let filter = "*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
                  -A FORWARD -p tcp -m limit --limit 1/sec -j ACCEPT\nCOMMIT\n";
    assert_eq!(of_iptables(filter), []);
    assert_eq!(of_iptables(&format!("{raw}{filter}")), scoped("iptables FORWARD rule 2: limit", &[tcp(0, 65535)]));
}

#[test]
fn the_tunnel_packets_themselves() {
    let named = |subject: &str, scope| scoped(subject, &[scope]);
    let drop = forward("-A OUTPUT -d 10.0.0.9/32 -j DROP\n-A OUTPUT -d 192.168.64.2/32 -j DROP");
    let subject = "iptables OUTPUT rule 2 drops packets to 192.168.64.2: tunnel packets do not pass OUTPUT";
    assert_eq!(drop, named(subject, Scope::Nothing));
    let port = table("mangle", "-A OUTPUT -p udp -m udp --dport 8472 -j MARK --set-xmark 0x5/0xffffffff");
    let subject =
        "iptables -t mangle OUTPUT rule 1 sets MARK of packets to port 8472: tunnel packets do not pass OUTPUT";
    assert_eq!(port, named(subject, Scope::Nothing));
    let limit = forward("-A INPUT -s 192.168.64.0/24 -p udp -m udp --dport 8472 -m limit --limit 1/sec -j ACCEPT");
    let subject = "iptables INPUT rule 1 has limit for packets from 192.168.64.0/24: tunnel packets do not pass INPUT";
    assert_eq!(limit, named(subject, Scope::ExternalInterface));
    for rule in [
        "-A INPUT -s 192.168.64.2/32 -p tcp -j DROP",
        "-A INPUT -s 192.168.65.0/24 -j DROP",
        "-A INPUT -i lo -j DROP",
        "-A INPUT -j DROP",
        "-A INPUT ! -s 192.168.64.0/24 -p udp -m udp --dport 8472 -j DROP",
        "-A INPUT -p udp -m udp --dport 8473 -j DROP",
        "-A INPUT -p udp -m udp --dport 8472 -j ACCEPT\n-A INPUT -p udp -m udp --dport 8472 -j DROP",
        "-A OUTPUT -m mark --mark 0x8000/0x8000 -j DROP",
        "-A OUTPUT -d 192.168.64.2/32 -m owner --uid-owner 5 -j DROP",
        "-A OUTPUT -j MARK --set-xmark 0x0/0xf0000",
        "-A OUTPUT -m limit --limit 1/sec -j LOG",
    ] {
        assert_eq!(forward(rule), [], "{rule}");
    }
}

/// Of a rule of a chain in nftables' family `inet`.
fn nft(hook: &str, statements: &str) -> Vec<Restriction> {
    of_nft(&format!(
        r#"{{"nftables": [
        {{"set": {{"family": "inet", "name": "s", "table": "t", "type": "ipv4_addr", "flags": ["interval"],
            "elem": [{{"prefix": {{"addr": "10.5.3.0", "len": 24}}}}, {{"elem": {{"val": "10.5.4.4", "comment": "c"}}}}]}}}},
        {{"set": {{"family": "inet", "name": "d", "table": "t", "type": "ipv4_addr", "size": 65535, "elem": ["10.5.3.4"]}}}},
        {{"map": {{"family": "inet", "name": "m", "table": "t", "type": "ifname", "map": "verdict",
            "elem": [["cali1", {{"goto": {{"target": "x"}}}}], ["eth0", {{"jump": {{"target": "y"}}}}]]}}}},
        {{"chain": {{"family": "inet", "table": "t", "name": "f", "type": "filter", "hook": "{hook}", "prio": 0}}}},
        {{"rule": {{"family": "inet", "table": "t", "chain": "x", "handle": 8, "expr": [{{"queue": {{"num": 1}}}}]}}}},
        {{"rule": {{"family": "inet", "table": "t", "chain": "y", "handle": 9, "expr": [{{"queue": {{"num": 1}}}}]}}}},
        {{"rule": {{"family": "inet", "table": "t", "chain": "f", "handle": 5, "expr": [{statements}]}}}}]}}"#
    ))
}

const DROP: &str = r#"{"drop": null}"#;

#[test]
fn each_kind_of_nftables() {
    for (statements, what) in [
        (r#"{"limit": {"rate": 10, "per": "second", "inv": true}}, {"drop": null}"#, "limit rate"),
        (r#"{"limit": "l"}, {"accept": null}"#, "limit rate"),
        (r#"{"quota": {"val": 5, "inv": true}}, {"drop": null}"#, "quota"),
        (r#"{"quota": "q"}, {"counter": null}, {"drop": null}"#, "quota"),
        (r#"{"ct count": {"val": 5, "inv": true}}, {"reject": null}"#, "ct count"),
        (
            r#"{"match": {"op": "==", "left": {"numgen": {"mode": "random", "mod": 2}}, "right": 0}}, {"drop": null}"#,
            "numgen",
        ),
        (
            r#"{"vmap": {"key": {"numgen": {"mode": "inc", "mod": 2}}, "data": {"set": [[0, {"drop": null}]]}}}"#,
            "numgen",
        ),
        (r#"{"mangle": {"key": {"meta": {"key": "mark"}}, "value": {"numgen": {"mode": "inc", "mod": 2}}}}"#, "numgen"),
        (
            r#"{"match": {"op": ">", "left": {"meta": {"key": "length"}}, "right": 1000}}, {"drop": null}"#,
            "meta length",
        ),
        (
            r#"{"match": {"op": "<", "left": {"meta": {"key": "random"}}, "right": 1000}}, {"drop": null}"#,
            "meta random",
        ),
        (r#"{"match": {"op": ">", "left": {"ct": {"key": "bytes"}}, "right": 1000}}, {"drop": null}"#, "ct bytes"),
        (
            r#"{"match": {"op": "==", "left": {"payload": {"base": "ih", "offset": 0, "len": 16}}, "right": 1}}, {"drop": null}"#,
            "payload",
        ),
        (
            r#"{"match": {"op": "==", "left": {"payload": {"base": "th", "offset": 64, "len": 16}}, "right": 1}}, {"drop": null}"#,
            "payload",
        ),
        (
            r#"{"set": {"op": "add", "elem": 1, "set": "@d", "stmt": [{"limit": {"rate": 5}}]}}, {"accept": null}"#,
            "limit",
        ),
        (r#"{"meter": {"key": 1, "stmt": {"limit": {"rate": 5}}, "name": "m"}}, {"drop": null}"#, "limit"),
        (r#"{"queue": {"num": 1}}"#, "queue"),
        (r#"{"dup": {"addr": "10.0.0.1"}}"#, "dup"),
    ] {
        assert_eq!(nft("forward", statements), everything(&format!("nft inet t f handle 5: {what}")), "{statements}");
    }
    for (statements, what) in [
        (r#"{"counter": {"packets": 0, "bytes": 0}}"#, "counter"),
        (r#"{"counter": null}"#, "counter"),
        (r#"{"counter": "c"}, {"accept": null}"#, "counter c"),
        (r#"{"counter": {"map": {"key": 1, "data": "@m"}}}"#, "counter"),
        (r#"{"set": {"op": "update", "elem": 1, "set": "@d", "stmt": [{"counter": null}]}}"#, "counter"),
        (r#"{"log": {"group": 5}}"#, "log"),
        (r#"{"limit": {"rate": 5}}, {"log": null}"#, "log"),
    ] {
        let expected = scoped(&format!("nft inet t f handle 5: {what}: {SEES}"), &[Scope::Nothing]);
        assert_eq!(nft("forward", statements), expected, "{statements}");
    }
    for statements in [
        "",
        r#"{"counter": null}, {"accept": null}"#,
        r#"{"counter": null}, {"jump": {"target": "nowhere"}}"#,
        r#"{"limit": {"rate": 5}}"#,
        r#"{"set": {"op": "update", "elem": 1, "set": "@d"}}"#,
        r#"{"mangle": {"key": {"meta": {"key": "mark"}}, "value": 5}}"#,
        r#"{"flow": {"op": "add", "flowtable": "@ft"}}"#,
        r#"{"xt": {"type": "match", "name": "hashlimit"}}, {"drop": null}"#,
        r#"{"something": {"new": 1}}, {"drop": null}"#,
        r#"{"match": {"op": "==", "left": {"&": [{"payload": {"protocol": "tcp", "field": "flags"}}, ["syn", "rst"]]}, "right": "syn"}}, {"queue": {}}"#,
        r#"{"match": {"op": "in", "left": {"payload": {"protocol": "tcp", "field": "flags"}}, "right": "syn"}}, {"queue": {}}"#,
        r#"{"match": {"op": "==", "left": {"payload": {"protocol": "icmp", "field": "type"}}, "right": "echo-request"}}, {"queue": {}}"#,
        r#"{"match": {"op": "==", "left": {"meta": {"key": "nfproto"}}, "right": "ipv6"}}, {"queue": {}}"#,
        r#"{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["invalid", "related"]}}, {"queue": {}}"#,
    ] {
        assert_eq!(nft("forward", statements), [], "{statements}");
    }
}

#[test]
fn what_a_rule_of_nftables_names() {
    let matched = |op: &str, left: &str, right: &str| {
        format!(r#"{{"match": {{"op": "{op}", "left": {left}, "right": {right}}}}}, {{"queue": {{"num": 1}}}}"#)
    };
    let field =
        |protocol: &str, field: &str| format!(r#"{{"payload": {{"protocol": "{protocol}", "field": "{field}"}}}}"#);
    let meta = |key: &str| format!(r#"{{"meta": {{"key": "{key}"}}}}"#);
    let concat = format!(r#"{{"concat": [{}, {}]}}"#, field("ip", "daddr"), field("tcp", "dport"));
    for (op, left, right, scopes) in [
        ("==", field("ip", "daddr"), r#""10.5.3.4""#, vec![addresses("10.5.3.4/32")]),
        ("==", field("ip", "daddr"), r#""@s""#, vec![addresses("10.5.3.0/24"), addresses("10.5.4.4/32")]),
        ("!=", field("ip", "daddr"), r#""@s""#, vec![Scope::Everything]),
        ("==", field("ip", "daddr"), r#"{"range": ["10.5.3.0", "10.5.3.255"]}"#, vec![addresses("10.5.3.0/24")]),
        // What packets or time change tells nothing.
        ("==", field("ip", "daddr"), r#""@d""#, vec![Scope::Everything]),
        ("==", field("ip", "daddr"), r#""@gone""#, vec![Scope::Everything]),
        ("==", field("ip", "daddr"), r#""10.6.3.4""#, vec![]),
        ("==", field("tcp", "dport"), "80", vec![tcp(80, 80)]),
        ("==", field("tcp", "dport"), r#"{"set": [80, {"range": [90, 99]}]}"#, vec![tcp(80, 80), tcp(90, 99)]),
        ("!=", field("tcp", "dport"), "80", vec![tcp(0, 65535)]),
        (">", field("udp", "dport"), "80", vec![udp(0, 65535)]),
        ("==", field("th", "dport"), "80", vec![tcp(80, 80), udp(80, 80)]),
        ("==", meta("l4proto"), r#"{"set": ["tcp", "udp"]}"#, vec![Scope::Everything]),
        ("==", meta("l4proto"), r#""tcp""#, vec![tcp(0, 65535)]),
        ("==", meta("l4proto"), "17", vec![udp(0, 65535)]),
        ("==", meta("iifname"), r#""cali*""#, vec![Scope::Pod(8)]),
        ("==", meta("iifname"), r#"{"set": ["eth0", "docker0"]}"#, vec![]),
        ("!=", meta("oifname"), r#""eth0""#, vec![Scope::Everything]),
        ("==", meta("mark"), "5", vec![Scope::Everything]),
        ("in", r#"{"ct": {"key": "state"}}"#.to_owned(), r#"["established", "related"]"#, vec![Scope::Everything]),
        (
            "==",
            concat,
            r#"{"set": [{"concat": ["10.5.3.4", 80]}, {"concat": ["10.6.3.4", 90]}]}"#,
            vec![addresses("10.5.3.4/32")],
        ),
    ] {
        let mut expected = scoped("nft inet t f handle 5: queue", &scopes);
        expected.sort();
        assert_eq!(nft("forward", &matched(op, &left, right)), expected, "{op} {left} {right}");
    }
    let map = r#"{"vmap": {"key": {"meta": {"key": "iifname"}}, "data": "@m"}}"#;
    assert_eq!(nft("forward", map), scoped("nft inet t x handle 8: queue", &[Scope::Pod(8)]));
    let state = r#"{"vmap": {"key": {"ct": {"key": "state"}}, "data": {"set": [["established", {"accept": null}],
        ["new", {"goto": {"target": "x"}}], ["invalid", {"drop": null}]]}}}"#;
    assert!(nft("forward", state).iter().all(|found| found.scope == Scope::Nothing));
}

#[test]
fn chains_of_devices_and_bridges() {
    let of = |chain: &str| {
        of_nft(&format!(
            r#"{{"nftables": [{{"chain": {{"table": "t", "name": "f", "type": "filter", "prio": 0, {chain}}}}},
            {{"rule": {{"family": "{}", "table": "t", "chain": "f", "handle": 5, "expr": [{{"limit": {{"rate": 5}}}}, {DROP}]}}}}]}}"#,
            if chain.contains("netdev") { "netdev" } else { "bridge" }
        ))
    };
    let pod = |subject: &str, index| scoped(subject, &[Scope::Pod(index)]);
    let subject = "nft netdev t f handle 5: limit rate";
    assert_eq!(of(r#""family": "netdev", "hook": "ingress", "dev": "veth1""#), pod(subject, 7));
    assert_eq!(of(r#""family": "netdev", "hook": "egress", "dev": "cali1""#), pod(subject, 8));
    assert_eq!(of(r#""family": "netdev", "hook": "egress", "dev": ["flannel.1", "eth1"]"#), everything(subject));
    assert_eq!(of(r#""family": "netdev", "hook": "ingress", "dev": "docker0""#), []);
    // Old ones do not say of which device.
    assert_eq!(of(r#""family": "netdev", "hook": "ingress""#), everything(subject));
    assert_eq!(of(r#""family": "bridge", "hook": "forward""#), []);
    assert_eq!(of(r#""family": "bridge", "hook": "postrouting""#), everything("nft bridge t f handle 5: limit rate"));
}

#[test]
fn what_is_not_understood_is_no_rule() {
    for text in ["", "{", "[]", r#"{"nftables": 5}"#, r#"{"nftables": [{"rule": 5}, {"chain": {}}, {}]}"#] {
        assert_eq!(of_nft(text), []);
    }
    for text in ["*filter", "*filter\n:\n-A\n-A \n-A FORWARD -m\nCOMMIT", "COMMIT", "-A FORWARD -j LOG"] {
        assert_eq!(of_iptables(text), []);
    }
}

#[test]
fn thirty_thousand_rules() {
    let rules: String = (0..30_000_u32)
        .map(|number| format!("-A FORWARD -s 10.5.{}.{}/32 -p tcp -j MINE\n", number >> 8 & 255, number & 255))
        .collect();
    let begun = std::time::Instant::now();
    let found = forward(&format!("{rules}-A MINE -p tcp -m tcp --dport 80 -j RETURN\n-A FORWARD -j NFQUEUE"));
    assert_eq!(found, everything("iptables FORWARD rule 30001: NFQUEUE"));
    assert!(begun.elapsed() < std::time::Duration::from_secs(20), "{:?}", begun.elapsed());
}
