//! flannel's chains of iptables, in the language of `iptables-restore`(8).

use std::fmt::Write as _;

use ipnet::Ipv4Net;

use super::{FORWARD_COMMENT, KUBE_MARK, MASQUERADE_COMMENT, MULTICAST, Masquerade, Names, Rules, order::Order};

/// One of the two places of iptables that have rules of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
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

    /// Whether a rule of the kernel's chain is ours, as `iptables -S` lists it: one that leads to one of `chains`, which
    /// are ours, or one of a flannel before 0.20, which had no chains and named this Network in each rule.
    fn is_ours(self, rule: &str, chains: &[&str], network: Option<Ipv4Net>) -> bool {
        let target = rule.rsplit_once("-j ").map_or("", |(_, target)| target);
        let is_flannels = |network: Ipv4Net| {
            rule.contains(&format!("--comment \"{}\"", self.comment())) && rule.contains(&format!(" {network} "))
        };
        chains.contains(&target) || network.is_some_and(is_flannels)
    }
}

/// What iptables has in one place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// All rules of the kernel's chain, as `iptables -S` lists them.
    hook: Vec<String>,
    /// Whether what no rule decides on is dropped.
    drops: bool,
    /// What is ours.
    pub(super) ours: Ours,
}

/// What is ours in one place: equal where nobody has changed anything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Ours {
    /// The rules of the kernel's chain.
    jumps: Vec<String>,
    /// Our chains that are there, with their rules.
    chains: Vec<(String, Vec<String>)>,
}

impl Ours {
    pub(super) const fn is_set(&self) -> bool {
        !self.jumps.is_empty() && !self.chains.is_empty()
    }
}

impl Found {
    /// Of the listing of a kernel's chain, and of those of our chains that are there.
    pub(super) fn parse(
        place: Place,
        hook: &str,
        names: &[&str],
        chains: Vec<(String, String)>,
        network: Option<Ipv4Net>,
    ) -> Self {
        let rules = |listing: &str| listing.lines().filter(|line| line.starts_with("-A ")).map(str::to_owned).collect();
        let drops = hook.lines().any(|line| line == format!("-P {} DROP", place.hook()));
        let hook: Vec<String> = rules(hook);
        let jumps = hook.iter().filter(|rule| place.is_ours(rule, names, network)).cloned().collect();
        let chains = chains.into_iter().map(|(name, listing)| (name, rules(&listing))).collect();
        Self { hook, drops, ours: Ours { jumps, chains } }
    }

    /// Whether there is anything that an accept of ours could defeat.
    pub(super) fn may_drop(&self) -> bool {
        self.drops || self.hook.len() > self.ours.jumps.len()
    }

    /// Whether nobody has any rule there.
    pub(super) const fn is_empty(&self) -> bool {
        self.hook.is_empty()
    }

    /// How others' rules stand about ours; [`None`] where it is not there.
    pub(super) fn order(&self) -> Option<Order> {
        Order::about(&self.hook, |rule| self.ours.jumps.contains(rule))
    }

    /// The rules of others.
    pub(super) fn others(&self) -> Vec<String> {
        self.hook.iter().filter(|rule| !self.ours.jumps.contains(rule)).cloned().collect()
    }

    /// Behind how many of others' rules our jump is to be put where these have changed while it was set; [`None`] where it
    /// is right, or gone again.
    pub(super) fn place_again(&self, known: &Order, table: &str) -> Option<usize> {
        let right = known.place_among(&self.others(), table);
        self.order().filter(|order| order.place() != right).map(|_| right)
    }

    /// Behind how many of others' rules a jump to a chain is to be put; [`None`] where there is one, which stays. One to
    /// another chain gives its place to it.
    pub(super) fn place(&self, chain: &str, known: Option<&Order>, table: &str) -> Option<usize> {
        match (&self.ours.jumps[..], self.order(), known) {
            ([jump], ..) if jump.ends_with(&format!("-j {chain}")) => None,
            (_, Some(order), _) => Some(order.place()),
            (_, None, Some(known)) => Some(known.place_among(&self.hook, table)),
            (_, None, None) => Some(self.hook.len()),
        }
    }
}

/// One commit that takes away what was found, and sets the rules of a chain, if there are any, with a jump to it behind
/// so many of others' rules, unless there is one. Empty where there is nothing to do.
pub(super) fn replace(place: Place, chain: &str, rules: &[String], found: &Found, behind: Option<usize>) -> String {
    let Found { hook: all, ours: Ours { jumps, chains }, .. } = found;
    if rules.is_empty() && jumps.is_empty() && chains.is_empty() {
        return String::new();
    }
    let mut text = format!("*{}\n", place.table());
    let is_wanted = !rules.is_empty();
    let unwanted = || chains.iter().map(|(name, _)| name.as_str()).filter(|name| !is_wanted || *name != chain);
    // Makes the chain, or empties it.
    for name in unwanted().chain(is_wanted.then_some(chain)) {
        let _infallible = writeln!(text, ":{name} - [0:0]");
    }
    for jump in jumps.iter().filter(|_| !is_wanted || behind.is_some()) {
        let _infallible = writeln!(text, "-D {}", jump.trim_start_matches("-A "));
    }
    for name in unwanted() {
        let _infallible = writeln!(text, "-X {name}");
    }
    for rule in rules {
        let _infallible = writeln!(text, "-A {chain} {rule}");
    }
    if let Some(behind) = behind.filter(|_| is_wanted) {
        let (hook, comment) = (place.hook(), place.comment());
        let is_last = behind >= all.len() - jumps.len();
        let command = if is_last { format!("-A {hook}") } else { format!("-I {hook} {}", behind + 1) };
        let _infallible = writeln!(text, "{command} -m comment --comment \"{comment}\" -j {chain}");
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
            replace(place, "FLANNEL-POSTRTG", &place.rules(&rules()), &Found::default(), Some(0)),
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
            replace(place, "FLANNEL-FWD", &place.rules(&rules()), &Found::default(), Some(0)),
            r#"*filter
:FLANNEL-FWD - [0:0]
-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
COMMIT
"#
        );
    }

    /// What is found in `nat`, with our chain.
    fn found(hook: &[&str], names: &[&str]) -> Found {
        let network = Some("10.5.0.0/16".parse().expect("CIDR"));
        let chains = vec![("FLANNEL-POSTRTG".to_owned(), "-N FLANNEL-POSTRTG".to_owned())];
        Found::parse(Place::Postrouting, &hook.join("\n"), names, chains, network)
    }

    fn replaced(rules: &[String], found: &Found, known: Option<&Order>) -> String {
        let chain = "FLANNEL-POSTRTG";
        replace(Place::Postrouting, chain, rules, found, found.place(chain, known, ""))
    }

    #[test]
    fn what_was_there_goes_in_the_same_commit() {
        let found = found(&["-P POSTROUTING ACCEPT", MASQUERADE_JUMP], &["FLANNEL-POSTRTG"]);
        let gone = "*nat\n:FLANNEL-POSTRTG - [0:0]\n\
                    -D POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG\n\
                    -X FLANNEL-POSTRTG\nCOMMIT\n";
        assert_eq!(replaced(&[], &found, None), gone);
        assert_eq!(replaced(&[], &Found::default(), None), "");
    }

    #[test]
    fn a_jump_that_is_there_stays_where_it_is() {
        let rules = ["-j RETURN".to_owned()];
        let with = |hook: &[&str], names: &[&str]| replaced(&rules, &found(hook, names), None);
        let behind = "-A POSTROUTING -j MASQUERADE";
        let there = with(&[MASQUERADE_JUMP, behind], &["FLANNEL-POSTRTG"]);
        assert_eq!(there, "*nat\n:FLANNEL-POSTRTG - [0:0]\n-A FLANNEL-POSTRTG -j RETURN\nCOMMIT\n");
        // Twice, or to another chain: one to ours where the first was.
        let twice = with(&[behind, MASQUERADE_JUMP, behind, MASQUERADE_JUMP], &["FLANNEL-POSTRTG"]);
        assert_eq!(twice.matches("-D POSTROUTING").count(), 2, "{twice}");
        assert!(twice.contains("-I POSTROUTING 2 -m comment"), "{twice}");
        let others = with(&["-A POSTROUTING -j FLANNEL-POSTRTG-7", behind], &["FLANNEL-POSTRTG", "FLANNEL-POSTRTG-7"]);
        assert!(others.contains("-D POSTROUTING -j FLANNEL-POSTRTG-7\n"), "{others}");
        assert!(others.contains("-I POSTROUTING 1 -m comment"), "{others}");
        // None at the start: behind all others. One that was known: where it was.
        let none = found(&[behind], &["FLANNEL-POSTRTG"]);
        assert!(replaced(&rules, &none, None).contains("-A POSTROUTING -m comment"));
        let known = found(&[MASQUERADE_JUMP, behind], &["FLANNEL-POSTRTG"]).order().expect("it was there");
        assert!(replaced(&rules, &none, Some(&known)).contains("-I POSTROUTING 1 -m comment"));
    }

    #[test]
    fn a_jump_beside_rules_that_came_meanwhile_is_put_right() {
        let (refusal, specific) = ("-A POSTROUTING -j DROP", "-A POSTROUTING -s 192.0.2.1/32 -j DROP");
        let alone = found(&[MASQUERADE_JUMP], &["FLANNEL-POSTRTG"]).order().expect("it is there");
        let place = |hook: &[&str]| found(hook, &["FLANNEL-POSTRTG"]).place_again(&alone, "");
        assert_eq!(place(&[refusal, MASQUERADE_JUMP]), Some(0));
        assert_eq!(place(&[specific, refusal, MASQUERADE_JUMP]), Some(1));
        assert_eq!(place(&[specific, MASQUERADE_JUMP, refusal]), None);
        assert_eq!(place(&[refusal]), None);
    }

    #[test]
    fn ours_are_known_and_nobody_elses() {
        let old =
            r#"-A POSTROUTING -s 10.5.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE"#;
        let hook = [
            "# Warning: iptables-legacy tables present, use iptables-legacy to see them",
            "-P POSTROUTING ACCEPT",
            MASQUERADE_JUMP,
            old,
            "-A POSTROUTING -s 10.5.0.0/16 -j MASQUERADE",
            r#"-A POSTROUTING -s 10.6.0.0/16 -m comment --comment "flanneld masq" -j RETURN"#,
            r#"-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG-7"#,
            "-A POSTROUTING -j FLANNEL-POSTRTG-MINE",
        ];
        let all = found(&hook, &["FLANNEL-POSTRTG"]);
        assert_eq!(all.ours.jumps, [MASQUERADE_JUMP, old]);
        assert!(all.may_drop() && !found(&hook[..4], &["FLANNEL-POSTRTG"]).may_drop());
        assert!(found(&["-P POSTROUTING DROP"], &[]).may_drop());
    }
}
