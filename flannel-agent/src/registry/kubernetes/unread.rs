//! Which nodes are to be read whole, and in which order. A watch of metadata does not show podCIDRs, and changes of nodes
//! that have none yet may be mere heartbeats: what has said something new is read at once, and of the others one at a time.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use super::node::PodCidrs;

/// Nodes whose podCIDRs are wanted.
#[derive(Debug, Default)]
pub(super) struct Unread {
    /// To be read at once.
    soon: VecDeque<Arc<str>>,
    /// To be read one after the other: those that could not be read, ...
    failed: VecDeque<Arc<str>>,
    /// ... and those that had none when they were read last.
    later: VecDeque<Arc<str>>,
    /// All that are waited for.
    asked: HashMap<Arc<str>, Asked>,
}

/// How it stands with a node that is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    /// It is in a queue, or being read.
    Once,
    /// It was changed since it was put there.
    Again,
}

impl Unread {
    /// A node was changed whose podCIDRs are not known.
    pub(super) fn changed(&mut self, name: &Arc<str>, says_something_new: bool) {
        let is_asked = self.asked.contains_key(name);
        if says_something_new {
            self.soon.push_back(Arc::clone(name));
        } else if !is_asked {
            self.later.push_back(Arc::clone(name));
        }
        self.asked.insert(Arc::clone(name), if is_asked { Asked::Again } else { Asked::Once });
    }

    /// It is gone, or its podCIDRs are known.
    pub(super) fn forget(&mut self, name: &str) {
        self.asked.remove(name);
    }

    /// The next one.
    pub(super) fn next(&mut self) -> Option<Arc<str>> {
        loop {
            let name = self.soon.pop_front()?;
            if self.asked.contains_key(&name) {
                return Some(name);
            }
        }
    }

    /// It was read. What could not be read comes again by itself, all of it once the API server reads anything; who has
    /// none, where it was changed meanwhile.
    pub(super) fn read(&mut self, name: &Arc<str>, pod_cidrs: &PodCidrs) {
        let Some(asked) = self.asked.remove(name) else { return };
        let queue = match pod_cidrs {
            PodCidrs::Unreadable(_) => Some(&mut self.failed),
            PodCidrs::Lease(_) => None,
            _ => (asked == Asked::Again).then_some(&mut self.later),
        };
        if let Some(queue) = queue {
            queue.push_back(Arc::clone(name));
            self.asked.insert(Arc::clone(name), Asked::Once);
        }
        if !matches!(pod_cidrs, PodCidrs::Unreadable(_)) {
            self.soon.append(&mut self.failed);
        }
    }

    /// One of those that can wait is read now.
    pub(super) fn one_again(&mut self) {
        while let Some(name) = self.failed.pop_front().or_else(|| self.later.pop_front()) {
            if self.asked.contains_key(&name) {
                self.soon.push_back(name);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(unread: &mut Unread) -> Vec<Arc<str>> {
        std::iter::from_fn(|| unread.next()).collect()
    }

    #[test]
    fn heartbeats_of_thousands_are_one_reading_at_a_time() {
        let mut unread = Unread::default();
        let names: Vec<Arc<str>> = (0..2000).map(|number| format!("node{number}").into()).collect();
        names.iter().for_each(|name| unread.changed(name, true));
        assert_eq!(drain(&mut unread), names, "all of them at once");
        names.iter().for_each(|name| unread.read(name, &PodCidrs::Unassigned));
        for _ in 0..10 {
            names.iter().for_each(|name| unread.changed(name, false));
        }
        assert_eq!(drain(&mut unread), []);
        for name in &names[..100] {
            unread.one_again();
            assert_eq!(drain(&mut unread), [Arc::clone(name)]);
        }
        assert!(unread.later.len() <= names.len() && unread.asked.len() <= names.len());
    }

    #[test]
    fn what_is_new_is_not_kept_waiting_by_what_is_not() {
        let mut unread = Unread::default();
        let name: Arc<str> = "node".into();
        unread.changed(&name, false);
        unread.changed(&name, true);
        assert_eq!(drain(&mut unread), [Arc::clone(&name)]);
        // It was changed once more than it was read.
        unread.read(&name, &PodCidrs::Unassigned);
        unread.one_again();
        assert_eq!(drain(&mut unread), [Arc::clone(&name)]);
        // Nothing was changed since then.
        unread.read(&name, &PodCidrs::Unassigned);
        unread.one_again();
        assert_eq!(drain(&mut unread), []);
    }

    #[test]
    fn what_could_not_be_read_comes_again_by_itself() {
        let mut unread = Unread::default();
        let name: Arc<str> = "node".into();
        unread.changed(&name, true);
        assert_eq!(drain(&mut unread), [Arc::clone(&name)]);
        unread.read(&name, &PodCidrs::Unreadable("429".to_owned()));
        assert_eq!(drain(&mut unread), []);
        unread.one_again();
        assert_eq!(drain(&mut unread), [Arc::clone(&name)]);
        unread.forget(&name);
        unread.read(&name, &PodCidrs::Unreadable("429".to_owned()));
        unread.one_again();
        assert_eq!(drain(&mut unread), []);
    }

    #[test]
    fn all_that_failed_is_read_once_anything_can_be() {
        let mut unread = Unread::default();
        let names: Vec<Arc<str>> = (0..100).map(|number| format!("node{number}").into()).collect();
        names.iter().for_each(|name| unread.changed(name, true));
        drain(&mut unread);
        names.iter().for_each(|name| unread.read(name, &PodCidrs::Unreadable("429".to_owned())));
        unread.one_again();
        assert_eq!(drain(&mut unread), names[..1]);
        unread.read(&names[0], &PodCidrs::Unassigned);
        assert_eq!(drain(&mut unread), names[1..]);
    }
}
