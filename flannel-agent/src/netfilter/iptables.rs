//! flannel's chains of iptables, in the language of `iptables-restore`(8).

use std::fmt::Write as _;

use ipnet::Ipv4Net;

use super::{FORWARD_COMMENT, KUBE_MARK, MASQUERADE_COMMENT, MULTICAST, Masquerade, Names, Rules};

/// One of the two places of iptables that have rules of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Where sources are translated.
    Postrouting,
    /// Where forwarding is decided.
    Forward,
}

impl Place {
    pub(super) const fn table(self) -> &'static str {
        match self {
            Self::Postrouting => "nat",
            Self::Forward => "filter",
        }
    }

    /// The kernel's chain, which jumps to ours.
    pub(super) const fn hook(self) -> &'static str {
        match self {
            Self::Postrouting => "POSTROUTING",
            Self::Forward => "FORWARD",
        }
    }

    const fn comment(self) -> &'static str {
        match self {
            Self::Postrouting => MASQUERADE_COMMENT,
            Self::Forward => FORWARD_COMMENT,
        }
    }

    pub(super) fn chain(self, names: &Names) -> &str {
        match self {
            Self::Postrouting => &names.masquerade,
            Self::Forward => &names.forward,
        }
    }

    /// The rules of our chain.
    pub(super) fn rules(self, rules: &Rules) -> Vec<String> {
        let Rules { network, subnet, .. } = rules;
        let comment = format!("-m comment --comment \"{}\"", self.comment());
        match (self, rules.masquerade) {
            (Self::Postrouting, Masquerade::Off) => Vec::new(),
            (Self::Postrouting, masquerade) => {
                let random = if masquerade == Masquerade::FullyRandom { " --random-fully" } else { "" };
                vec![
                    format!("-m mark --mark {KUBE_MARK}/{KUBE_MARK} {comment} -j RETURN"),
                    format!("-s {subnet} -d {network} {comment} -j RETURN"),
                    format!("-s {network} -d {subnet} {comment} -j RETURN"),
                    format!("! -s {network} -d {subnet} {comment} -j RETURN"),
                    format!("-s {network} ! -d {MULTICAST} {comment} -j MASQUERADE{random}"),
                    format!("! -s {network} -d {network} {comment} -j MASQUERADE{random}"),
                ]
            }
            (Self::Forward, _) => {
                vec![format!("-s {network} {comment} -j ACCEPT"), format!("-d {network} {comment} -j ACCEPT")]
            }
        }
    }

    /// What of a chain's listing by `iptables -S` is there: the rules of the kernel's chain that are ours, where `chains`
    /// are our chains, and of a flannel before 0.20, which had none and named this Network in each.
    pub(super) fn ours(self, listing: &str, chains: &[&str], network: Option<Ipv4Net>) -> Vec<String> {
        let comment = format!("--comment \"{}\"", self.comment());
        let network = network.map(|network| format!(" {network} "));
        let is_ours = |line: &&str| {
            let target = line.rsplit_once("-j ").map_or("", |(_, target)| target);
            let jumps = chains.contains(&target);
            let names_it = network.as_ref().is_some_and(|network| line.contains(network));
            line.starts_with("-A ") && (jumps || names_it && line.contains(&comment))
        };
        listing.lines().filter(is_ours).map(str::to_owned).collect()
    }
}

/// What iptables has of ours in one place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// What becomes of packets that no rule of the kernel's chain decides on.
    pub(super) policy: String,
    /// The rules of the kernel's chain that are ours, as `iptables -S` lists them.
    pub(super) jumps: Vec<String>,
    /// Our chains that are there, with their rules.
    pub(super) chains: Vec<(String, String)>,
}

impl Found {
    /// Whether what reaches the end of the kernel's chain may pass.
    pub(super) fn accepts(&self) -> bool {
        self.policy != "DROP"
    }
}

/// The policy of a kernel's chain in its listing by `iptables -S`.
pub(super) fn policy(listing: &str) -> String {
    let policy = listing.lines().find_map(|line| line.strip_prefix("-P ")?.split(' ').nth(1));
    policy.unwrap_or_default().to_owned()
}

/// One commit that takes away what was found, and sets the rules of a chain, if there are any. Empty where there is
/// nothing to do.
pub(super) fn replace(place: Place, chain: &str, rules: &[String], found: &Found) -> String {
    if rules.is_empty() && found.jumps.is_empty() && found.chains.is_empty() {
        return String::new();
    }
    let mut text = format!("*{}\n", place.table());
    let is_wanted = !rules.is_empty();
    let unwanted = || found.chains.iter().map(|(name, _)| name.as_str()).filter(|name| !is_wanted || *name != chain);
    // Makes the chain, or empties it.
    for name in unwanted().chain(is_wanted.then_some(chain)) {
        let _infallible = writeln!(text, ":{name} - [0:0]");
    }
    for jump in &found.jumps {
        let _infallible = writeln!(text, "-D {}", jump.trim_start_matches("-A "));
    }
    for name in unwanted() {
        let _infallible = writeln!(text, "-X {name}");
    }
    for rule in rules {
        let _infallible = writeln!(text, "-A {chain} {rule}");
    }
    if is_wanted {
        let (hook, comment) = (place.hook(), place.comment());
        let _infallible = writeln!(text, "-A {hook} -m comment --comment \"{comment}\" -j {chain}");
    }
    text + "COMMIT\n"
}

#[cfg(test)]
mod tests {
    use flannel_common::vxlan::Vni;

    use super::*;
    use crate::netfilter::Preference;

    const MASQUERADE_JUMP: &str = r#"-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG"#;

    fn rules() -> Rules {
        Rules {
            vni: Vni::DEFAULT,
            network: "10.5.0.0/16".parse().expect("CIDR"),
            subnet: "10.5.28.0/24".parse().expect("CIDR"),
            masquerade: Masquerade::FullyRandom,
            forward: true,
            preference: Preference::Iptables,
        }
    }

    #[test]
    fn flannels_text() {
        let place = Place::Postrouting;
        assert_eq!(
            replace(place, "FLANNEL-POSTRTG", &place.rules(&rules()), &Found::default()),
            r#"*nat
:FLANNEL-POSTRTG - [0:0]
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.28.0/24 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 -d 10.5.28.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.28.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
COMMIT
"#
        );
        let place = Place::Forward;
        assert_eq!(
            replace(place, "FLANNEL-FWD", &place.rules(&rules()), &Found::default()),
            r#"*filter
:FLANNEL-FWD - [0:0]
-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
COMMIT
"#
        );
    }

    #[test]
    fn what_was_there_goes_in_the_same_commit() {
        let found = Found {
            policy: "ACCEPT".to_owned(),
            jumps: vec![MASQUERADE_JUMP.to_owned()],
            chains: vec![("FLANNEL-POSTRTG".to_owned(), String::new())],
        };
        let gone = "*nat\n:FLANNEL-POSTRTG - [0:0]\n\
                    -D POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG\n\
                    -X FLANNEL-POSTRTG\nCOMMIT\n";
        assert_eq!(replace(Place::Postrouting, "FLANNEL-POSTRTG", &[], &found), gone);
        let renewed = replace(Place::Postrouting, "FLANNEL-POSTRTG", &["-j RETURN".to_owned()], &found);
        assert!(renewed.contains("-D POSTROUTING") && !renewed.contains("-X"), "{renewed}");
        assert_eq!(replace(Place::Postrouting, "FLANNEL-POSTRTG", &[], &Found::default()), "");
    }

    #[test]
    fn ours_are_known_and_nobody_elses() {
        let network = Some("10.5.0.0/16".parse().expect("CIDR"));
        let old =
            r#"-A POSTROUTING -s 10.5.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE"#;
        let listing = [
            "-P POSTROUTING ACCEPT",
            MASQUERADE_JUMP,
            old,
            "-A POSTROUTING -s 10.5.0.0/16 -j MASQUERADE",
            r#"-A POSTROUTING -s 10.6.0.0/16 -m comment --comment "flanneld masq" -j RETURN"#,
            r#"-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG-7"#,
            "-A POSTROUTING -j FLANNEL-POSTRTG-MINE",
        ]
        .join("\n");
        assert_eq!(Place::Postrouting.ours(&listing, &["FLANNEL-POSTRTG"], network), [MASQUERADE_JUMP, old]);
        assert_eq!(policy(&listing), "ACCEPT");
        assert_eq!(policy(""), "");
    }
}
