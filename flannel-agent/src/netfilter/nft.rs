//! The table of nftables, in the language of `nft`(8).

use super::{KUBE_MARK, MASQUERADE_COMMENT, MULTICAST, Masquerade, Names, Rules};

/// Our chain. Not flannel's `postrtg`: the kernel lets no chain have another priority than it has, and a daemon of flannel's
/// that takes over would fail to make its own in the table that it has in common with ours.
pub(super) const CHAIN: &str = "postrtg-late";

/// How many rules our table has.
const RULES: usize = 6;

/// How much is asked of `nft`, from all to the least that does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// As flannel's.
    Full,
    /// Without a comment on the table, which `nft` takes since 0.9.7.
    WithoutComment,
    /// And with the packet's own source port where it is free.
    Plain,
}

impl Form {
    pub(super) const ALL: [Self; 3] = [Self::Full, Self::WithoutComment, Self::Plain];
}

/// The table with the rules that masquerade, or [`None`] where nothing is to be.
///
/// Its chain comes behind those of others at `srcnat`, which is 100, so that their rules win, as they do where iptables'
/// are appended. `nft` knows the name since 0.9.1.
pub(super) fn table(rules: &Rules, form: Form) -> Option<String> {
    let masquerade = match rules.masquerade {
        Masquerade::Off => return None,
        Masquerade::Plain => "masquerade",
        Masquerade::FullyRandom if form == Form::Plain => "masquerade",
        Masquerade::FullyRandom => "masquerade fully-random",
    };
    let about = match form {
        Form::Full => format!("\tcomment \"rules for flannel.{}\"\n", rules.vni),
        Form::WithoutComment | Form::Plain => String::new(),
    };
    let Rules { vni, network, subnet, .. } = rules;
    let rules: [_; RULES] = [
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
         {about}\
         \tchain {CHAIN} {{\n\
         \t\ttype nat hook postrouting priority 110; policy accept;\n\
         {rules}\
         \t}}\n\
         }}\n",
        table = Names::of(*vni).table
    ))
}

/// Whether a listing of our table has all of its rules.
pub(super) fn is_complete(listing: &str) -> bool {
    listing.matches(MASQUERADE_COMMENT).count() == RULES
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
        assert_eq!(table(&rules(Masquerade::Off), Form::Full), None);
        let text = table(&rules(Masquerade::FullyRandom), Form::Full).expect("a table");
        assert!(is_complete(&text) && !is_complete("table ip flannel-ipv4 {\n}\n"));
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
        assert!(!table(&rules(Masquerade::Plain), Form::Full).expect("a table").contains("random"));
    }

    #[test]
    fn an_older_program_is_asked_for_less() {
        let has = Form::ALL.map(|form| {
            let text = table(&rules(Masquerade::FullyRandom), form).expect("a table");
            (text.contains("\tcomment \"rules for"), text.contains("fully-random"))
        });
        assert_eq!(has, [(true, true), (false, true), (false, false)]);
    }

    #[test]
    fn beside_flannels_chains_only_ours_goes() {
        let ours = table(&rules(Masquerade::Plain), Form::Full).expect("a table");
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
