//! The nodes as they were last seen, and what they are in the lease table. Heartbeats change nothing of that; of several
//! nodes with one podCIDR one has the lease, the same for whoever looks and whenever. Plain functions without I/O.

use std::{
    collections::{HashMap, hash_map::Entry as Place},
    net::Ipv4Addr,
    sync::Arc,
};

use ipnet::Ipv4Net;

use super::{
    annotations::{Announcement, Names},
    node::{Metadata, Node, PodCidrs},
    unread::Unread,
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
    own: Arc<str>,
    nodes: HashMap<Arc<str>, Known>,
    /// Who has a podCIDR.
    claimants: HashMap<Ipv4Net, Vec<Arc<str>>>,
    /// Which nodes that flannel serves name an address.
    addresses: HashMap<Ipv4Addr, Vec<Arc<str>>>,
    /// Whose podCIDRs are to be read.
    unread: Unread,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Known {
    /// Of two nodes of one name, it is another.
    uid: Arc<str>,
    created: String,
    pod_cidrs: PodCidrs,
    announcement: Announcement,
}

/// What a node is in the lease table.
enum Role {
    /// Nothing: flannel does not serve it, or its podCIDR is being read.
    None,
    Lease(Box<Entry>),
    PassedOver(PassedOver),
}

/// As what a node was reported.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    /// The lease that is its own, whatever it announces.
    key: Option<LeaseKey>,
    /// Whether it was at all.
    is_told: bool,
}

impl Nodes {
    pub(super) fn new(names: Names, own: &str) -> Self {
        Self {
            names,
            own: own.into(),
            nodes: HashMap::new(),
            claimants: HashMap::new(),
            addresses: HashMap::new(),
            unread: Unread::default(),
        }
    }

    /// Takes in a part of the whole list.
    pub(super) fn extend(&mut self, nodes: Vec<Node>) {
        for Node { metadata, spec } in nodes {
            let (name, known) = self.known(metadata, spec.pod_cidrs());
            self.replace(&name, Some(known));
        }
    }

    /// The table, once all of the list is there.
    pub(super) fn table(&self) -> (Vec<Entry>, Vec<PassedOver>) {
        let (mut entries, mut passed_over) = (Vec::new(), Vec::new());
        for name in self.nodes.keys() {
            match self.role(name) {
                Role::None => {}
                Role::Lease(entry) => entries.push(*entry),
                Role::PassedOver(node) => passed_over.push(node),
            }
        }
        (entries, passed_over)
    }

    /// A node is there, or was changed. Its podCIDRs may be unread.
    pub(super) fn set(&mut self, metadata: Metadata, pod_cidrs: PodCidrs) -> Vec<Update> {
        let revision = revision(&metadata.resource_version);
        let (name, mut known) = self.known(metadata, pod_cidrs);
        let before = self.nodes.get(&name);
        let same = before.filter(|before| before.uid == known.uid);
        if let Some(before) = same
            && known.pod_cidrs == PodCidrs::Unread
        {
            known.pod_cidrs.clone_from(&before.pod_cidrs);
        }
        if self.is_to_be_read(&name, &known) {
            let says_something_new = same.is_none_or(|before| before.announcement != known.announcement);
            self.unread.changed(&name, says_something_new);
        }
        if before == Some(&known) { Vec::new() } else { self.change(&name, Some(known), revision) }
    }

    /// A node was deleted.
    pub(super) fn remove(&mut self, metadata: &Metadata) -> Vec<Update> {
        let Some((name, known)) = self.nodes.get_key_value(metadata.name.as_str()) else { return Vec::new() };
        if *known.uid != *metadata.uid {
            // Another one has its name by now.
            return Vec::new();
        }
        self.change(&Arc::clone(name), None, revision(&metadata.resource_version))
    }

    /// The next node that is to be read whole, and its uid.
    pub(super) fn next_unread(&mut self) -> Option<(Arc<str>, Arc<str>)> {
        while let Some(name) = self.unread.next() {
            match self.nodes.get(&name) {
                Some(known) if self.is_to_be_read(&name, known) => return Some((name, Arc::clone(&known.uid))),
                _ => self.unread.forget(&name),
            }
        }
        None
    }

    /// Those that can wait have waited for a while.
    pub(super) fn read_one_again(&mut self) {
        self.unread.one_again();
    }

    /// A node was read whole.
    pub(super) fn learn(&mut self, name: &Arc<str>, uid: &str, pod_cidrs: PodCidrs) -> Vec<Update> {
        self.unread.read(name, &pod_cidrs);
        let known = self.nodes.get(name).filter(|known| *known.uid == *uid && known.pod_cidrs != pod_cidrs);
        // That of a lease is final, and what was asked for before it was known is late.
        let known = known.filter(|known| !matches!(known.pod_cidrs, PodCidrs::Lease(_)));
        let Some(known) = known.cloned() else { return Vec::new() };
        self.change(name, Some(Known { pod_cidrs, ..known }), 0)
    }

    fn known(&self, metadata: Metadata, pod_cidrs: PodCidrs) -> (Arc<str>, Known) {
        let Metadata { name, uid, creation_timestamp, annotations, .. } = metadata;
        let announcement = self.names.read(annotations.unwrap_or_default());
        let (uid, created) = (uid.into(), creation_timestamp.unwrap_or_default());
        (name.into(), Known { uid, created, pod_cidrs, announcement })
    }

    /// Has a node be what it is now, and reports what differs, of others too.
    fn change(&mut self, name: &Arc<str>, now: Option<Known>, revision: i64) -> Vec<Update> {
        let before = self.nodes.get(name);
        let subnets = [before.and_then(Known::subnet), now.as_ref().and_then(Known::subnet)];
        let addresses = [before.and_then(Known::address), now.as_ref().and_then(Known::address)];
        let holders = subnets.map(|subnet| self.holder(subnet?).cloned());
        // As what those were reported that it may concern: who has or had its podCIDR, or names its address.
        let mut told: HashMap<_, _> = [(Arc::clone(name), self.told(name))].into();
        let (mut claimants, mut sharers) = (HashMap::new(), HashMap::new());
        for subnet in subnets.iter().flatten() {
            claimants.extend(self.told_of(self.claimants.get(subnet)));
        }
        for address in addresses.iter().flatten() {
            sharers.extend(self.told_of(self.addresses.get(address)));
        }
        self.replace(name, now);
        if subnets.map(|subnet| self.holder(subnet?).cloned()) != holders {
            told.extend(claimants);
        }
        if addresses[0] != addresses[1] {
            told.extend(sharers);
        }
        self.report(told, revision)
    }

    fn told_of(&self, names: Option<&Vec<Arc<str>>>) -> impl Iterator<Item = (Arc<str>, Told)> {
        names.into_iter().flatten().map(|name| (Arc::clone(name), self.told(name)))
    }

    /// From as what nodes were reported to what they are. First what is gone: what follows may be of the same name.
    fn report(&self, told: HashMap<Arc<str>, Told>, revision: i64) -> Vec<Update> {
        let (mut gone, mut set, mut passed_over) = (Vec::new(), Vec::new(), Vec::new());
        for (name, before) in told {
            let is_named =
                |key: &LeaseKey| self.holder(key.subnet).is_some_and(|holder| self.told(holder).key == Some(*key));
            let ended = before.key.filter(|key| !is_named(key));
            gone.extend(ended.map(|key| Update::Removed { key, name: name.to_string(), revision }));
            match self.role(&name) {
                Role::Lease(entry) => set.push(Update::Set(entry)),
                Role::PassedOver(node) => passed_over.push(Update::PassedOver(node)),
                // Another has its lease; of it itself there is nothing more to say.
                Role::None if before.is_told && ended.is_none() => {
                    gone.push(Update::PassedOverRemoved(name.to_string()));
                }
                Role::None => {}
            }
        }
        gone.into_iter().chain(set).chain(passed_over).collect()
    }

    /// Puts a node in the place of the one of its name.
    fn replace(&mut self, name: &Arc<str>, now: Option<Known>) {
        if let Some(before) = self.nodes.get(name) {
            let (subnet, address) = (before.subnet(), before.address());
            strike_out(&mut self.claimants, subnet, name);
            strike_out(&mut self.addresses, address, name);
        }
        let Some(now) = now else {
            self.nodes.remove(name);
            self.unread.forget(name);
            return;
        };
        if let Some(subnet) = now.subnet() {
            self.claimants.entry(subnet).or_default().push(Arc::clone(name));
        }
        if let Some(address) = now.address() {
            self.addresses.entry(address).or_default().push(Arc::clone(name));
        }
        self.nodes.insert(Arc::clone(name), now);
    }

    /// Whose a podCIDR is that several nodes have: this host's, else that of the oldest that flannel serves.
    fn holder(&self, subnet: Ipv4Net) -> Option<&Arc<str>> {
        self.claimants.get(&subnet)?.iter().min_by_key(|name| {
            let known = self.nodes.get(*name);
            let is_managed = known.is_some_and(|known| known.announcement.is_managed);
            (**name != self.own, !is_managed, known.map(|known| &known.created), *name)
        })
    }

    /// Whether a node's podCIDRs are wanted and not known. Beside this host, only who has annotations is served.
    fn is_to_be_read(&self, name: &Arc<str>, known: &Known) -> bool {
        let is_served = known.announcement.is_managed || *name == self.own;
        is_served && !matches!(known.pod_cidrs, PodCidrs::Lease(_))
    }

    fn told(&self, name: &Arc<str>) -> Told {
        match self.role(name) {
            Role::None => Told::default(),
            Role::Lease(entry) => Told { key: Some(entry.key), is_told: true },
            Role::PassedOver(node) => Told { key: node.key, is_told: true },
        }
    }

    fn role(&self, name: &Arc<str>) -> Role {
        let Some(known) = self.nodes.get(name) else { return Role::None };
        let is_managed = known.announcement.is_managed;
        let name_text = || name.to_string();
        let nobodys = |reason: String| {
            if is_managed { Role::PassedOver(PassedOver::new(name_text(), None, reason)) } else { Role::None }
        };
        let key = match &known.pod_cidrs {
            PodCidrs::Lease(key) => *key,
            PodCidrs::Unread => return Role::None,
            PodCidrs::Unassigned => return nobodys("it has no podCIDR".to_owned()),
            PodCidrs::Invalid(reason) => return nobodys(reason.clone()),
            PodCidrs::Unreadable(reason) => return nobodys(format!("its podCIDR can't be read: {reason}")),
        };
        if let Some(holder) = self.holder(key.subnet).filter(|holder| *holder != name) {
            return nobodys(format!("its podCIDR {} is that of the node {holder} too, which has it", key.subnet));
        }
        let grant = Grant::NodeUid(known.uid.to_string());
        let without = |reason: String, is_silent: bool| {
            Role::PassedOver(PassedOver {
                name: name_text(),
                key: Some(key),
                reason,
                grant: Some(grant.clone()),
                is_silent,
            })
        };
        if !is_managed {
            return without("flannel's annotations are gone from it".to_owned(), true);
        }
        match known.announcement.attributes() {
            Ok(attributes) => {
                let remark = self.remark(name, attributes.public_ip);
                Role::Lease(Box::new(Entry { key, name: name_text(), attributes, grant, version: 0, remark }))
            }
            Err(reason) => without(reason, false),
        }
    }

    /// What is to be said of a node that names an address.
    fn remark(&self, name: &Arc<str>, address: Ipv4Addr) -> Option<String> {
        let other = self.addresses.get(&address)?.iter().filter(|other| *other != name).min()?;
        Some(format!(
            "its public-ip {address} is that of the node {other} too: packets for the pods of both go there. Give each host \
             an address of its own with --public-ip or --iface, or delete the node that is gone"
        ))
    }
}

impl Known {
    /// The podCIDR that it has.
    const fn subnet(&self) -> Option<Ipv4Net> {
        match &self.pod_cidrs {
            PodCidrs::Lease(key) => Some(key.subnet),
            _ => None,
        }
    }

    /// The VTEP address that it names.
    fn address(&self) -> Option<Ipv4Addr> {
        self.announcement.public_ip().filter(|_| self.announcement.is_managed)
    }
}

fn strike_out<K: Eq + std::hash::Hash>(index: &mut HashMap<K, Vec<Arc<str>>>, key: Option<K>, name: &Arc<str>) {
    let Some(Place::Occupied(mut place)) = key.map(|key| index.entry(key)) else { return };
    place.get_mut().retain(|other| other != name);
    if place.get().is_empty() {
        place.remove();
    }
}

/// A resource version as a number, which it is since 1.35 by contract and was before (Kubernetes: KEP-5504). For people,
/// and to tell what went together.
pub(super) fn revision(version: &str) -> i64 {
    version.parse().unwrap_or(0)
}

#[cfg(test)]
mod tests;
