//! The nodes as they were last seen, and which leases they are. Heartbeats change nothing of that; of two nodes with one
//! podCIDR one has the lease. Plain functions without I/O.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use ipnet::Ipv4Net;

use super::{
    annotations::{Announcement, Names},
    node::{Metadata, Node},
};
use crate::{
    lease::LeaseKey,
    registry::{Entry, Grant, PassedOver, Update},
};

/// The nodes by name.
#[derive(Debug)]
pub(super) struct Nodes {
    names: Names,
    /// This host's.
    own: String,
    nodes: HashMap<Arc<str>, Known>,
    /// Which of them has the lease of a podCIDR.
    holders: BTreeMap<Ipv4Net, Arc<str>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Known {
    uid: String,
    created: String,
    /// The lease that its podCIDRs are, or what is wrong with them.
    key: Result<Option<LeaseKey>, String>,
    announcement: Announcement,
}

/// What a node is in the lease table.
enum Role {
    /// Nothing: flannel does not serve it.
    None,
    Lease(Entry),
    PassedOver(PassedOver),
}

impl Nodes {
    pub(super) fn new(names: Names, own: &str) -> Self {
        Self { names, own: own.to_owned(), nodes: HashMap::new(), holders: BTreeMap::new() }
    }

    /// Takes in a part of the whole list.
    pub(super) fn extend(&mut self, nodes: Vec<Node>) {
        for Node { metadata, spec } in nodes {
            let key = spec.lease_key().map_err(|error| error.to_string());
            let (name, known) = self.known(metadata, key);
            self.nodes.insert(name, known);
        }
    }

    /// The table, once all of the list is there.
    pub(super) fn table(&mut self) -> (Vec<Entry>, Vec<PassedOver>) {
        let mut holders: BTreeMap<Ipv4Net, Arc<str>> = BTreeMap::new();
        for (name, known) in &self.nodes {
            let Some(key) = known.leased() else { continue };
            let holder = holders.entry(key.subnet).or_insert_with(|| Arc::clone(name));
            if self.comes_before(name, holder) {
                *holder = Arc::clone(name);
            }
        }
        self.holders = holders;
        let (mut entries, mut passed_over) = (Vec::new(), Vec::new());
        for name in self.nodes.keys() {
            match self.role(name) {
                Role::None => {}
                Role::Lease(entry) => entries.push(entry),
                Role::PassedOver(node) => passed_over.push(node),
            }
        }
        (entries, passed_over)
    }

    /// Whether nothing is known of the podCIDRs of a node that has written annotations.
    pub(super) fn needs_spec(&self, metadata: &Metadata) -> bool {
        let known = self.nodes.get(metadata.name.as_str()).filter(|known| known.uid == metadata.uid);
        // Only who has them is served, and that is what the annotation says.
        let is_managed = || self.names.read(metadata.annotations.clone().unwrap_or_default()).is_managed;
        known.is_none_or(|known| known.key == Ok(None)) && is_managed()
    }

    /// A node is there, or was changed. `key` says what its podCIDRs are where the node was read whole.
    pub(super) fn set(&mut self, metadata: Metadata, key: Option<Result<Option<LeaseKey>, String>>) -> Vec<Update> {
        let before = self.nodes.get(metadata.name.as_str());
        let same = before.filter(|known| known.uid == metadata.uid);
        let key = key.or_else(|| same.map(|known| known.key.clone())).unwrap_or(Ok(None));
        let revision = revision(&metadata.resource_version);
        let (name, known) = self.known(metadata, key);
        if before == Some(&known) {
            return Vec::new();
        }
        let role_before = self.nodes.contains_key(&name).then(|| self.role(&name));
        let leased_before = self.held_by(&name);
        self.nodes.insert(Arc::clone(&name), known);
        let mut updates = self.settle(&name, leased_before, revision);
        match self.role(&name) {
            Role::Lease(entry) => updates.push(Update::Set(Box::new(entry))),
            Role::PassedOver(node) => updates.push(Update::PassedOver(node)),
            Role::None if matches!(role_before, Some(Role::PassedOver(_))) => {
                updates.push(Update::PassedOverRemoved(name.to_string()));
            }
            Role::None => {}
        }
        updates
    }

    /// A node was deleted.
    pub(super) fn remove(&mut self, metadata: &Metadata) -> Vec<Update> {
        let Some((name, known)) = self.nodes.get_key_value(metadata.name.as_str()) else { return Vec::new() };
        if known.uid != metadata.uid {
            // Another one has its name by now.
            return Vec::new();
        }
        let name = Arc::clone(name);
        let was_passed_over = matches!(self.role(&name), Role::PassedOver(_));
        let leased = self.held_by(&name);
        self.nodes.remove(&name);
        let mut updates = self.settle(&name, leased, revision(&metadata.resource_version));
        if was_passed_over {
            updates.push(Update::PassedOverRemoved(name.to_string()));
        }
        updates
    }

    fn known(&self, metadata: Metadata, key: Result<Option<LeaseKey>, String>) -> (Arc<str>, Known) {
        let Metadata { name, uid, creation_timestamp, annotations, .. } = metadata;
        let announcement = self.names.read(annotations.unwrap_or_default());
        (name.into(), Known { uid, created: creation_timestamp.unwrap_or_default(), key, announcement })
    }

    /// The lease that a node has.
    fn held_by(&self, name: &Arc<str>) -> Option<LeaseKey> {
        let key = self.nodes.get(name)?.leased()?;
        (self.holders.get(&key.subnet) == Some(name)).then_some(key)
    }

    /// Says who has what a node had and has, after it was changed.
    fn settle(&mut self, name: &Arc<str>, before: Option<LeaseKey>, revision: i64) -> Vec<Update> {
        let mut updates = Vec::new();
        let now = self.nodes.get(name).and_then(Known::leased);
        if let Some(key) = before
            && now != Some(key)
        {
            self.holders.remove(&key.subnet);
            updates.push(Update::Removed { key, name: name.to_string(), revision });
            let claimants =
                self.nodes.iter().filter(|(_, known)| known.leased().map(|key| key.subnet) == Some(key.subnet));
            let heir = claimants
                .map(|(name, _)| Arc::clone(name))
                .reduce(|a, b| if self.comes_before(&a, &b) { a } else { b });
            if let Some(heir) = heir.filter(|heir| heir != name) {
                self.holders.insert(key.subnet, Arc::clone(&heir));
                if let Role::Lease(entry) = self.role(&heir) {
                    updates.push(Update::Set(Box::new(entry)));
                }
            }
        }
        if let Some(key) = now {
            let holder = self.holders.entry(key.subnet).or_insert_with(|| Arc::clone(name));
            if **name == *self.own {
                *holder = Arc::clone(name);
            }
        }
        updates
    }

    /// Whose a podCIDR is that two nodes have: this host's, else the older one's.
    fn comes_before(&self, a: &str, b: &str) -> bool {
        let rank = |name: &str| {
            let created = self.nodes.get(name).map(|known| known.created.clone());
            (name != self.own, created, name.to_owned())
        };
        rank(a) < rank(b)
    }

    fn role(&self, name: &str) -> Role {
        let Some(known) = self.nodes.get(name).filter(|known| known.announcement.is_managed) else { return Role::None };
        let passed_over = |key, reason| Role::PassedOver(PassedOver { name: name.to_owned(), key, reason });
        let key = match &known.key {
            Ok(Some(key)) => *key,
            Ok(None) => return passed_over(None, "it has no podCIDR".to_owned()),
            Err(reason) => return passed_over(None, reason.clone()),
        };
        if let Some(holder) = self.holders.get(&key.subnet).filter(|holder| ***holder != *name) {
            return passed_over(None, format!("its podCIDR {} is that of the node {holder} too", key.subnet));
        }
        match known.announcement.attributes() {
            Ok(attributes) => {
                let grant = Grant::NodeUid(known.uid.clone());
                Role::Lease(Entry { key, name: name.to_owned(), attributes, grant, version: 0 })
            }
            Err(reason) => passed_over(Some(key), reason),
        }
    }
}

impl Known {
    /// The lease that it claims.
    fn leased(&self) -> Option<LeaseKey> {
        self.key.as_ref().ok().copied().flatten().filter(|_| self.announcement.is_managed)
    }
}

/// A resource version as a number, which it is since 1.35 by contract and was before (Kubernetes: KEP-5504). For people,
/// and to tell what went together.
pub(super) fn revision(version: &str) -> i64 {
    version.parse().unwrap_or(0)
}
