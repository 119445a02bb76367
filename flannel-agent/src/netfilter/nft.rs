//! The table of nftables, in the language of `nft`(8).

use super::{KUBE_MARK, MASQUERADE_COMMENT, MULTICAST, Masquerade, Names, Rules};

/// Our chain. Not flannel's `postrtg`: the kernel lets no chain have another priority than it has, and a daemon of flannel's
/// that takes over would fail to make its own in the table that it has in common with ours.
pub(super) const CHAIN: &str = "postrtg-late";

/// The table with the rules that masquerade, or [`None`] where nothing is to be.
///
/// Its chain comes behind those of others at `srcnat`, so that their rules win, as they do where iptables' are appended.
pub(super) fn table(rules: &Rules) -> Option<String> {
    let masquerade = match rules.masquerade {
        Masquerade::Off => return None,
        Masquerade::Plain => "masquerade",
        Masquerade::FullyRandom => "masquerade fully-random",
    };
    let Rules { vni, network, subnet, .. } = rules;
    let rules = [
        format!("meta mark & {KUBE_MARK} == {KUBE_MARK} return"),
        format!("ip saddr {subnet} ip daddr {network} return"),
        format!("ip saddr {network} ip daddr {subnet} return"),
        // flannel's has the two the other way round, with which the last rule is never reached.
        format!("ip saddr != {network} ip daddr {subnet} return"),
        format!("ip saddr {network} ip daddr != {MULTICAST} {masquerade}"),
        format!("ip saddr != {network} ip daddr {network} {masquerade}"),
    ];
    let rules: String = rules.iter().map(|rule| format!("\t\t{rule} comment \"{MASQUERADE_COMMENT}\"\n")).collect();
    Some(format!(
        "table ip {table} {{\n\
         \tcomment \"rules for flannel.{vni}\"\n\
         \tchain {CHAIN} {{\n\
         \t\ttype nat hook postrouting priority srcnat + 10; policy accept;\n\
         {rules}\
         \t}}\n\
         }}\n",
        table = Names::of(*vni).table
    ))
}

/// One transaction that takes tables away, each with its family, and sets one. Empty where there is nothing to do.
pub(super) fn replace(unwanted: &[&str], wanted: Option<&str>) -> String {
    let deletions = unwanted.iter().map(|table| format!("delete table {table}\n"));
    deletions.chain(wanted.map(str::to_owned)).collect()
}

/// What takes our chain away from a table that is listed so, and with it the table where there is no other. Empty where it is
/// not there.
pub(super) fn without_chain(table: &str, listing: &str) -> String {
    let chains = || listing.lines().filter_map(|line| line.trim().strip_prefix("chain ")?.strip_suffix(" {"));
    match (chains().any(|chain| chain == CHAIN), chains().count()) {
        (false, _) => String::new(),
        (true, 1) => format!("delete table ip {table}\n"),
        (true, _) => format!("flush chain ip {table} {CHAIN}\ndelete chain ip {table} {CHAIN}\n"),
    }
}

#[cfg(test)]
mod tests {
    use flannel_common::vxlan::Vni;

    use super::*;
    use crate::netfilter::Preference;

    fn rules(masquerade: Masquerade) -> Rules {
        Rules {
            vni: Vni::DEFAULT,
            network: "10.5.0.0/16".parse().expect("CIDR"),
            subnet: "10.5.28.0/24".parse().expect("CIDR"),
            masquerade,
            forward: true,
            preference: Preference::Any,
        }
    }

    #[test]
    fn flannels_rules_with_the_fourth_put_right() {
        assert_eq!(table(&rules(Masquerade::Off)), None);
        let text = table(&rules(Masquerade::FullyRandom)).expect("a table");
        assert_eq!(
            text.lines().filter(|line| line.contains("comment \"flanneld masq\"")).collect::<Vec<_>>(),
            [
                "\t\tmeta mark & 0x4000 == 0x4000 return comment \"flanneld masq\"",
                "\t\tip saddr 10.5.28.0/24 ip daddr 10.5.0.0/16 return comment \"flanneld masq\"",
                "\t\tip saddr 10.5.0.0/16 ip daddr 10.5.28.0/24 return comment \"flanneld masq\"",
                "\t\tip saddr != 10.5.0.0/16 ip daddr 10.5.28.0/24 return comment \"flanneld masq\"",
                "\t\tip saddr 10.5.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random comment \"flanneld masq\"",
                "\t\tip saddr != 10.5.0.0/16 ip daddr 10.5.0.0/16 masquerade fully-random comment \"flanneld masq\"",
            ]
        );
        assert!(!table(&rules(Masquerade::Plain)).expect("a table").contains("random"));
    }

    #[test]
    fn beside_flannels_chains_only_ours_goes() {
        let ours = table(&rules(Masquerade::Plain)).expect("a table");
        assert_eq!(without_chain("flannel-ipv4", &ours), "delete table ip flannel-ipv4\n");
        let flannels = "table ip flannel-ipv4 {\n\tchain postrtg {\n\t}\n";
        assert_eq!(without_chain("flannel-ipv4", flannels), "");
        let both = ours.trim_end().trim_end_matches('}').to_owned() + "\tchain postrtg {\n\t}\n}\n";
        let text = "flush chain ip flannel-ipv4 postrtg-late\ndelete chain ip flannel-ipv4 postrtg-late\n";
        assert_eq!(without_chain("flannel-ipv4", &both), text);
    }

    #[test]
    fn one_transaction_deletes_and_sets() {
        assert_eq!(replace(&[], None), "");
        assert_eq!(
            replace(&["ip6 flannel-ipv6"], Some("table ip x {}\n")),
            "delete table ip6 flannel-ipv6\ntable ip x {}\n"
        );
    }
}
