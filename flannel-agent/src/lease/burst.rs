//! Deletions that come within seconds: they are judged together, once it has been quiet for a moment.

use std::{
    collections::HashSet,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

/// For how long it must have been quiet after a deletion before it is judged, ...
const SETTLE_TIME: Duration = Duration::from_secs(2);
/// ... and how long that is waited for, where there is always another.
const LONGEST: Duration = Duration::from_secs(10);

/// Whose lease was deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Holder {
    /// This host.
    Own,
    /// Another.
    Host(Ipv4Addr),
}

/// Deletions that came together.
#[derive(Clone, Debug)]
pub(super) struct Burst {
    first: Instant,
    last: Instant,
    /// Whose leases went, also of those that have taken theirs again since.
    holders: HashSet<Holder>,
    /// Those of the revision that was seen last.
    at_once: (i64, HashSet<Holder>),
    /// Several went in one revision, as somebody deleted a range, or they went as the store lost them.
    is_range: bool,
}

impl Burst {
    pub(super) fn new(now: Instant) -> Self {
        Self { first: now, last: now, holders: HashSet::new(), at_once: (0, HashSet::new()), is_range: false }
    }

    /// A lease is gone. `revision` is that of the deletion, where it is known.
    pub(super) fn add(&mut self, holder: Holder, revision: Option<i64>, now: Instant) {
        self.last = now;
        self.holders.insert(holder);
        let Some(revision) = revision else { return };
        if self.at_once.0 != revision {
            self.at_once = (revision, HashSet::new());
        }
        self.at_once.1.insert(holder);
        // Leases end each at its own revision, and a host that gives one up deletes only that.
        self.is_range |= self.at_once.1.len() > 1;
    }

    /// Nobody meant any of them.
    pub(super) const fn mark_unmeant(&mut self) {
        self.is_range = true;
    }

    /// When it can be judged.
    pub(super) fn settles_at(&self) -> Instant {
        (self.last + SETTLE_TIME).min(self.first + LONGEST)
    }

    /// Whether so many of `peers` went, of which `budget` would be believed, that nobody meant it.
    pub(super) fn is_mass(&self, peers: usize, budget: usize) -> bool {
        let others = self.others();
        let has_own = self.holders.contains(&Holder::Own) && others > 0;
        let is_most = others > 1 && others * 2 > peers;
        self.is_range || has_own || is_most || others > budget
    }

    /// How many other hosts' leases went.
    fn others(&self) -> usize {
        self.holders.iter().filter(|holder| **holder != Holder::Own).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Holder = Holder::Host(Ipv4Addr::new(192, 168, 0, 1));
    const B: Holder = Holder::Host(Ipv4Addr::new(192, 168, 0, 2));

    fn is_mass(deletions: &[(Holder, Option<i64>)], peers: usize, budget: usize) -> bool {
        let now = Instant::now();
        let mut burst = Burst::new(now);
        deletions.iter().for_each(|(holder, revision)| burst.add(*holder, *revision, now));
        burst.is_mass(peers, budget)
    }

    #[test]
    fn a_range_is_told_from_single_deletions() {
        assert!(!is_mass(&[(A, Some(7)), (B, Some(8))], 100, 3));
        assert!(is_mass(&[(A, Some(7)), (B, Some(7))], 100, 3));
        assert!(!is_mass(&[(A, Some(7)), (A, Some(7))], 100, 3), "two keys of one host");
        assert!(is_mass(&[(A, Some(7)), (Holder::Own, Some(8))], 100, 3));
        assert!(!is_mass(&[(Holder::Own, Some(8))], 100, 0));
    }

    #[test]
    fn most_of_a_small_cluster_is_many() {
        assert!(!is_mass(&[(A, None)], 1, 3));
        assert!(!is_mass(&[(A, None)], 2, 3));
        assert!(is_mass(&[(A, None), (B, None)], 2, 3));
        assert!(is_mass(&[(A, None), (B, None)], 3, 3));
        assert!(!is_mass(&[(A, None), (B, None)], 4, 3));
    }

    #[test]
    fn it_settles_when_it_is_quiet_and_in_any_case() {
        let start = Instant::now();
        let mut burst = Burst::new(start);
        burst.add(A, None, start);
        assert_eq!(burst.settles_at(), start + SETTLE_TIME);
        burst.add(B, None, start + Duration::from_secs(1));
        assert_eq!(burst.settles_at(), start + Duration::from_secs(1) + SETTLE_TIME);
        burst.add(A, None, start + Duration::from_secs(9));
        assert_eq!(burst.settles_at(), start + LONGEST);
    }
}
