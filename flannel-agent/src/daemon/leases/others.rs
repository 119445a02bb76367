//! Leases of hosts that have another backend than this one. They are no peers, and nothing is wrong with them: in a network that
//! changes its backend host by host there are some of each.

use std::collections::BTreeMap;

use crate::{escape::control_characters, lease::LeaseKey};

/// What flannel's alloc and udp are called here, which say nothing of themselves.
const NONE: &str = "none";
/// No more backends are told of than this, whatever the store holds.
const MOST_TOLD: usize = 20;
/// What stands for all further ones.
const FURTHER: &str = "...";

/// The backend of each, as its lease says it.
#[derive(Debug, Default)]
pub(super) struct OtherBackends(BTreeMap<LeaseKey, String>);

impl OtherBackends {
    /// A snapshot was read.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// A lease is one of them. Whether it was before, with the same backend.
    pub(super) fn insert(&mut self, key: LeaseKey, backend: &str) -> bool {
        let backend = if backend.is_empty() { NONE } else { backend };
        let before = self.0.insert(key, control_characters(backend).into_owned());
        before.is_some_and(|before| self.0.get(&key) == Some(&before))
    }

    /// It is none of them any more.
    pub(super) fn remove(&mut self, key: LeaseKey) {
        self.0.remove(&key);
    }

    /// How many leases have each backend.
    pub(super) fn counts(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for backend in self.0.values() {
            let is_told = counts.len() < MOST_TOLD || counts.contains_key(backend);
            let name = if is_told { backend.as_str() } else { FURTHER };
            *counts.entry(name.to_owned()).or_insert(0) += 1;
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_are_counted_by_backend_and_few_of_these_are_named() {
        let key = |n: usize| format!("10.{}.{}.0-24", n / 256, n % 256).parse().expect("key");
        let mut others = OtherBackends::default();
        assert!(!others.insert(key(1), "host-gw") && others.insert(key(1), "host-gw") && !others.insert(key(1), ""));
        assert!(!others.insert(key(2), "wire\u{1b}guard"));
        assert!(!others.insert(key(3), ""));
        let counts = others.counts();
        assert_eq!((counts["none"], counts.len()), (2, 2), "{counts:?}");
        assert!(counts.keys().all(|name| !name.contains('\u{1b}')), "{counts:?}");
        others.remove(key(3));
        assert_eq!(others.counts()["none"], 1);
        (10..500).for_each(|n| assert!(!others.insert(key(n), &format!("backend{n}"))));
        let counts = others.counts();
        assert_eq!((counts.len(), counts.values().sum::<usize>()), (MOST_TOLD + 1, 492));
    }
}
