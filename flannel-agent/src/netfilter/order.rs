//! The place of our jump among other people's rules of a chain; pure, on rules as `iptables -S` lists them.
//!
//! It is appended, as flannel's is: what is there before the agent comes first, what is appended later comes behind.
//! From then on it stays where it is, also when the agent is started again. Where it is gone (a flush, a reload of a
//! saved set, a firewall that makes its chains anew), flannel appends it once more, so that whoever was quicker stands in
//! front. Here it goes where it was:
//!
//! * behind every rule that stood in front of it. Nothing that was refused before us is let through by a reload.
//! * in front of every rule that stood behind it, and of a rule that refuses *everything*. Such a rule is about what
//!   nobody knows, and the Network is known.
//! * behind all other new rules. One that names what it refuses is meant so, and with flannel it would hold.
//!
//! Where these disagree the first one wins.

/// How others' rules of a chain stand about our jump, when that was last there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Order {
    before: Vec<String>,
    behind: Vec<String>,
}

impl Order {
    /// That of a chain's rules; [`None`] where no jump of ours is among them.
    pub(super) fn about(chain: &[String], is_ours: impl Fn(&String) -> bool) -> Option<Self> {
        let jump = chain.iter().position(&is_ours)?;
        let others = |rules: &[String]| rules.iter().filter(|rule| !is_ours(rule)).cloned().collect();
        Some(Self { before: others(&chain[..jump]), behind: others(&chain[jump..]) })
    }

    /// How many rules come before our jump.
    pub(super) const fn place(&self) -> usize {
        self.before.len()
    }

    /// How many of a chain's rules, of which none is ours, our jump goes behind. `table` is all of the chain's table.
    pub(super) fn place_among(&self, chain: &[String], table: &str) -> usize {
        let is_of = |known: &[String]| {
            // Each stands for one.
            let mut known = known.to_vec();
            let mut take = |rule: &String| known.iter().position(|one| one == rule).map(|at| known.swap_remove(at));
            chain.iter().map(|rule| take(rule).is_some()).collect::<Vec<_>>()
        };
        let first = is_of(&self.before).iter().rposition(|is_before| *is_before).map_or(0, |last| last + 1);
        let mut rest = is_of(&self.behind).into_iter().zip(chain).skip(first);
        let stop = rest.position(|(is_behind, rule)| is_behind || refuses_everything(rule, table, &mut Vec::new()));
        stop.map_or(chain.len(), |at| first + at)
    }
}

/// Whether nothing that reaches a rule gets past it but by an ACCEPT of a chain that it leads to.
fn refuses_everything<'a>(rule: &'a str, table: &'a str, seen: &mut Vec<&'a str>) -> bool {
    let Some(target) = unconditional_target(rule) else { return false };
    if matches!(target, "DROP" | "REJECT") {
        return true;
    }
    if seen.contains(&target) {
        return false;
    }
    seen.push(target);
    let start = format!("-A {target} ");
    let mut rules = table.lines().filter(|line| line.starts_with(&start));
    // What is behind one that lets everything go is not reached.
    rules
        .find_map(|rule| match unconditional_target(rule) {
            Some("RETURN" | "ACCEPT") => Some(false),
            _ => refuses_everything(rule, table, seen).then_some(true),
        })
        .unwrap_or(false)
}

/// Where a rule sends all packets; [`None`] where it looks at them first.
fn unconditional_target(rule: &str) -> Option<&str> {
    let (_, mut rest) = rule.strip_prefix("-A ")?.split_once(' ')?;
    while let Some(comment) = rest.strip_prefix("-m comment --comment ") {
        rest = behind_word(comment)?;
    }
    let target = rest.strip_prefix("-j ").or_else(|| rest.strip_prefix("-g "))?;
    target.split(' ').next()
}

/// What comes behind a word, or behind several in quotes. Quotes in these are escaped.
fn behind_word(text: &str) -> Option<&str> {
    let Some(quoted) = text.strip_prefix('"') else { return text.split_once(' ').map(|(_, rest)| rest) };
    let mut escaped = false;
    let end = quoted.find(|c| {
        let is_end = c == '"' && !escaped;
        escaped = c == '\\' && !escaped;
        is_end
    })?;
    quoted[end + 1..].strip_prefix(' ')
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "-A FORWARD -j FLANNEL-FWD";
    const REJECT: &str = "-A FORWARD -j REJECT --reject-with icmp-host-prohibited";
    const ESTABLISHED: &str = "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT";
    const BLOCKED: &str = "-A FORWARD -s 192.0.2.1/32 -j DROP";

    fn chain(rules: &[&str]) -> Vec<String> {
        rules.iter().map(|rule| (*rule).to_owned()).collect()
    }

    fn order(rules: &[&str]) -> Order {
        Order::about(&chain(rules), |rule| rule == OURS).expect("ours is there")
    }

    /// Where ours goes, as rules in front of it and behind it.
    fn set_again<'a>(order: &Order, rules: &'a [&'a str]) -> (&'a [&'a str], &'a [&'a str]) {
        rules.split_at(order.place_among(&chain(rules), ""))
    }

    #[test]
    fn a_reload_puts_nobody_in_front_who_was_behind() {
        let order = order(&[ESTABLISHED, OURS, BLOCKED, REJECT]);
        assert_eq!(order.place(), 1);
        assert_eq!(set_again(&order, &[ESTABLISHED, BLOCKED, REJECT]), (&[ESTABLISHED][..], &[BLOCKED, REJECT][..]));
        assert_eq!(set_again(&order, &[BLOCKED]), (&[][..], &[BLOCKED][..]));
        assert_eq!(set_again(&order, &[]), (&[][..], &[][..]));
        assert_eq!(Order::about(&chain(&[REJECT]), |rule| rule == OURS), None);
    }

    #[test]
    fn who_was_in_front_stays_there() {
        let first = order(&[BLOCKED, REJECT, OURS]);
        assert_eq!(set_again(&first, &[BLOCKED, REJECT]), (&[BLOCKED, REJECT][..], &[][..]));
        // Once, and not a second time.
        assert_eq!(set_again(&first, &[REJECT, BLOCKED, REJECT]), (&[REJECT, BLOCKED][..], &[REJECT][..]));
        // Even where one that refuses everything has come before it.
        let blocked = order(&[BLOCKED, OURS]);
        assert_eq!(set_again(&blocked, &[REJECT, BLOCKED]), (&[REJECT, BLOCKED][..], &[][..]));
    }

    #[test]
    fn of_new_rules_only_one_that_refuses_everything_goes_behind() {
        let alone = order(&[OURS]);
        assert_eq!(set_again(&alone, &[BLOCKED, REJECT]), (&[BLOCKED][..], &[REJECT][..]));
        assert_eq!(set_again(&Order::default(), &[BLOCKED, REJECT]), (&[BLOCKED][..], &[REJECT][..]));
        assert_eq!(set_again(&alone, &[ESTABLISHED, BLOCKED]), (&[ESTABLISHED, BLOCKED][..], &[][..]));
    }

    #[test]
    fn what_refuses_everything() {
        const TABLE: &str = r#"-P FORWARD ACCEPT
-N zone
-A FORWARD -j zone
-A zone -j zone-log
-A zone -p icmp -j ACCEPT
-A zone -m comment --comment "all the \"rest\"" -j reject
-A reject -p tcp -j REJECT --reject-with tcp-reset
-A reject -j REJECT --reject-with icmp-port-unreachable
-A zone-log -m limit --limit 3/min -j LOG
-A allowed -j RETURN
-A allowed -j DROP
-A ring -j ring"#;
        let refuses = |rule: &str| refuses_everything(rule, TABLE, &mut Vec::new());
        for rule in [REJECT, "-A FORWARD -j DROP", "-A FORWARD -j zone", "-A FORWARD -g reject"] {
            assert!(refuses(rule), "{rule}");
        }
        for rule in [
            BLOCKED,
            ESTABLISHED,
            "-A FORWARD -i eth0 -j DROP",
            "-A FORWARD -i eth0 -j zone",
            "-A FORWARD -j zone-log",
            "-A FORWARD -j allowed",
            "-A FORWARD -j ring",
            "-A FORWARD -j LOG",
            "-A FORWARD -m comment --comment \"-j DROP\" -j ACCEPT",
            "-A FORWARD -m comment --comment unfinished",
            "-A FORWARD",
            "",
        ] {
            assert!(!refuses(rule), "{rule}");
        }
    }
}
