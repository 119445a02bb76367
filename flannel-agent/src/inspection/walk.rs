//! The way of a packet through the rules of a table.

use std::collections::HashMap;

use super::{
    packet::{Match, Packet, Truth},
    rule::{Act, Rule, Table, Verdict},
};

/// So deep may chains lead to each other (`NFT_JUMP_STACK_SIZE`, net/netfilter/nf_tables_core.c); iptables' may more.
const DEEPEST: usize = 64;
/// So many rules are looked at for one packet.
const MOST_RULES: usize = 1_000_000;

/// A rule that a packet may meet, and what it does to it.
#[derive(Clone, Debug)]
pub(super) struct Met<'a> {
    pub(super) chain: &'a str,
    pub(super) rule: &'a Rule,
    pub(super) act: Act,
    /// What of the packet may meet it.
    pub(super) packet: Packet,
}

/// How a packet leaves a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Nothing behind where it came from is met either.
    Decided,
    /// It may go on there: all of it, or what is left of it.
    Open { is_rest: bool },
}

impl End {
    const WHOLE: Self = Self::Open { is_rest: false };
    const REST: Self = Self::Open { is_rest: true };
}

/// What a packet meets in a chain that the kernel calls, and how it leaves that: where it is not decided on, the chain's policy does.
pub(super) fn walk<'a>(table: &'a Table, chain: &'a str, packet: &Packet) -> (Vec<Met<'a>>, End) {
    let mut walk = Walk { table, met: Vec::new(), known: HashMap::new(), left: MOST_RULES };
    let end = walk.chain(chain, packet.clone(), 0);
    if walk.left == 0 {
        walk.all(chain, packet);
    }
    (walk.met, end)
}

struct Walk<'a> {
    table: &'a Table,
    met: Vec<Met<'a>>,
    /// How a packet leaves a chain, by what it was when it came in.
    known: HashMap<(&'a str, Packet), End>,
    left: usize,
}

impl<'a> Walk<'a> {
    /// Where there are too many to be told apart, whatever a chain leads to is taken to be met.
    fn all(&mut self, chain: &'a str, packet: &Packet) {
        for name in self.table.reached_from(chain) {
            let Some((chain, rules)) = self.table.chains.get_key_value(name) else { continue };
            let acts = rules.rules.iter().flat_map(|rule| rule.acts.iter().map(move |act| (rule, act)));
            self.met.extend(acts.map(|(rule, act)| Met { chain, rule, act: act.clone(), packet: packet.clone() }));
        }
    }

    fn chain(&mut self, name: &str, packet: Packet, depth: usize) -> End {
        let table = self.table;
        let Some((name, chain)) = table.chains.get_key_value(name) else { return End::WHOLE };
        if let Some(end) = self.known.get(&(name.as_str(), packet.clone())) {
            return *end;
        }
        // No kernel has loops; one that is read while it changes may seem to.
        if depth > DEEPEST {
            self.left = 0;
            return End::REST;
        }
        self.known.insert((name, packet.clone()), End::WHOLE);
        let end = self.rules(name, &chain.rules, &packet, depth);
        self.known.insert((name, packet), end);
        end
    }

    fn rules(&mut self, chain: &'a str, rules: &'a [Rule], packet: &Packet, depth: usize) -> End {
        let mut packet = packet.clone();
        let mut is_rest = false;
        // Whether some of it is back where it came from, whatever becomes of the others here.
        let mut has_returned = false;
        for rule in rules {
            if self.left == 0 {
                return End::REST;
            }
            self.left -= 1;
            let mut met = packet.clone();
            let truth = narrow(&mut met, &rule.matches);
            if truth == Truth::No {
                continue;
            }
            for act in &rule.acts {
                self.met.push(Met { chain, rule, act: act.clone(), packet: met.clone() });
            }
            match self.verdict(chain, rule, &rule.verdict, met.clone(), depth) {
                After::Next => {}
                After::Left(end) if truth == Truth::Yes => {
                    return match end {
                        End::Decided if has_returned => End::REST,
                        End::Decided => End::Decided,
                        End::Open { is_rest: more } => End::Open { is_rest: is_rest || more },
                    };
                }
                // Some of it is gone.
                After::Left(end) => {
                    is_rest = true;
                    has_returned |= end != End::Decided;
                    packet.is_first_look |= is_by_note(&packet, rule);
                    packet.lose(met);
                }
                After::Rest => {
                    is_rest = true;
                    packet.lose(Packet { is_unsure: true, ..met });
                }
            }
        }
        End::Open { is_rest }
    }

    /// What becomes of a packet that meets a rule.
    fn verdict(&mut self, chain: &'a str, rule: &'a Rule, verdict: &'a Verdict, packet: Packet, depth: usize) -> After {
        match verdict {
            Verdict::Continue => After::Next,
            Verdict::Accept => After::Left(End::Decided),
            Verdict::Drop => {
                self.met.push(Met { chain, rule, act: Act::Drops, packet });
                After::Left(End::Decided)
            }
            Verdict::Return => After::Left(End::WHOLE),
            Verdict::Jump(target) => match self.chain(target, packet, depth + 1) {
                End::Decided => After::Left(End::Decided),
                End::REST => After::Rest,
                End::Open { .. } => After::Next,
            },
            Verdict::Goto(target) => After::Left(self.chain(target, packet, depth + 1)),
            Verdict::Map(_, elements) => {
                let mut after = After::Next;
                for (matches, verdict) in elements {
                    let mut met = packet.clone();
                    let truth = narrow(&mut met, matches);
                    if truth == Truth::No {
                        continue;
                    }
                    let of_element = self.verdict(chain, rule, verdict, met, depth);
                    if truth == Truth::Yes {
                        return of_element;
                    }
                    if of_element != After::Next {
                        after = After::Rest;
                    }
                }
                after
            }
        }
    }
}

/// Where a packet is after a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    /// At the next.
    Next,
    /// What is left of it is.
    Rest,
    /// In no rule of this chain any more.
    Left(End),
}

/// Whether a rule lets go on what something is noted of, and all of that.
fn is_by_note(packet: &Packet, rule: &Rule) -> bool {
    let mut noted = packet.clone();
    let others = rule.matches.iter().filter(|condition| **condition != Match::Noted);
    rule.verdict == Verdict::Accept
        && rule.matches.contains(&Match::Noted)
        && others.fold(Truth::Yes, |all, condition| all.and(noted.narrow(condition))) == Truth::Yes
}

fn narrow(packet: &mut Packet, matches: &[Match]) -> Truth {
    let mut all = Truth::Yes;
    for condition in matches {
        all = all.and(packet.narrow(condition));
        if all == Truth::No {
            break;
        }
    }
    all
}
