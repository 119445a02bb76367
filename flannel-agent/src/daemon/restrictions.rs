//! What has to see each packet of this host, as each observer found it last, and what follows from all of it.

use std::collections::{BTreeMap, BTreeSet};

use tracing::{info, warn};

use super::agent::{Agent, COMPARE_PERIOD};
use crate::bypass::{BypassFlag, Kind, Plan, Restriction};

/// Who looks for restrictions. Each says all that it has found, and what it said before is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Observer {
    /// Queues, filters and programs of links.
    Links,
    /// conntrack's helpers, at the ports where they are always.
    Helpers,
}

/// What is known.
pub(super) struct Restrictions {
    flag: BypassFlag,
    found: BTreeMap<Observer, BTreeSet<Restriction>>,
    plan: Plan,
}

impl Restrictions {
    pub(super) fn new(flag: BypassFlag) -> Self {
        Self { flag, found: BTreeMap::new(), plan: Plan::of(flag, []) }
    }

    /// Takes what an observer has found. Whether anything is different.
    pub(super) fn replace(&mut self, observer: Observer, found: BTreeSet<Restriction>) -> bool {
        let before = self.found.entry(observer).or_default();
        if *before == found {
            return false;
        }
        // What is always there is no news.
        let is_news = |restriction: &&Restriction| restriction.kind != Kind::Helper;
        for restriction in found.difference(before).filter(is_news) {
            info!("restricts the bypass: {} ({})", restriction.subject, restriction.kind.label());
        }
        for restriction in before.difference(&found).filter(is_news) {
            info!("no longer restricts the bypass: {} ({})", restriction.subject, restriction.kind.label());
        }
        *before = found;
        self.plan = Plan::of(self.flag, self.all());
        true
    }

    /// What takes the stack.
    pub(super) const fn plan(&self) -> &Plan {
        &self.plan
    }

    /// All that was found.
    pub(super) fn all(&self) -> impl Iterator<Item = &Restriction> {
        self.found.values().flatten()
    }
}

impl Agent<'_> {
    /// Takes what an observer has found, and has the dataplane act on it.
    pub(super) fn observed(&mut self, observer: Observer, found: BTreeSet<Restriction>) {
        if self.restrictions.replace(observer, found) {
            self.record.restrictions(self.restrictions.all());
            self.restrict_or_say();
        }
    }

    /// Has the dataplane carry the plan out.
    pub(super) fn restrict_or_say(&mut self) {
        if let Err(error) = self.dataplane.restrict(self.restrictions.plan()) {
            warn!("{error}; what has to see each packet may not; trying again in {COMPARE_PERIOD:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bypass::Scope;

    #[test]
    fn what_an_observer_no_longer_names_is_over() {
        let mut restrictions = Restrictions::new(BypassFlag::Auto);
        let queue = Restriction { kind: Kind::Queue, subject: "tbf on veth1".to_owned(), scope: Scope::Pod(7) };
        assert!(!restrictions.replace(Observer::Links, BTreeSet::new()));
        assert!(restrictions.replace(Observer::Links, [queue.clone()].into()));
        assert!(!restrictions.replace(Observer::Links, [queue.clone()].into()));
        assert_eq!((restrictions.plan().pods.len(), restrictions.all().count()), (1, 1));
        assert!(restrictions.replace(Observer::Links, BTreeSet::new()));
        assert_eq!(*restrictions.plan(), Plan::default());
    }
}
