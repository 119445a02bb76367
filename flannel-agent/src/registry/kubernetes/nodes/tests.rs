//! The nodes by cases, and the updates of any course of events beside a list of what it leads to.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::LazyLock,
};

use flannel_common::vxlan::Vni;
use proptest::{collection::vec, prelude::*, sample::select};

use super::*;
use crate::{
    lease::{BackendAttributes, LeaseAttributes, Peer},
    registry::Announced,
};

const BACKEND: BackendAttributes = BackendAttributes::Vxlan { vni: Vni::DEFAULT };

/// A node as the API server has it.
#[derive(Clone, Debug)]
struct Object {
    uid: String,
    created: u8,
    pod_cidr: &'static str,
    announcement: &'static [(&'static str, &'static str)],
}

type Announcing = &'static [(&'static str, &'static str)];

const SOUND: [Announcing; 3] = [
    &[
        ("kube-subnet-manager", "true"),
        ("backend-type", "vxlan"),
        ("backend-data", r#"{"VNI":1,"VtepMAC":"0a:00:00:00:00:01"}"#),
        ("public-ip", "192.168.64.1"),
    ],
    &[
        ("kube-subnet-manager", "true"),
        ("backend-type", "vxlan"),
        ("backend-data", r#"{"VNI":1,"VtepMAC":"0a:00:00:00:00:02"}"#),
        ("public-ip", "192.168.64.2"),
    ],
    // The address of the first.
    &[
        ("kube-subnet-manager", "true"),
        ("backend-type", "vxlan"),
        ("backend-data", r#"{"VNI":1,"VtepMAC":"0a:00:00:00:00:03"}"#),
        ("public-ip", "192.168.64.1"),
    ],
];
const NONSENSE: [Announcing; 6] = [
    &[("kube-subnet-manager", "true")],
    &[
        ("kube-subnet-manager", "true"),
        ("backend-type", "vxlan"),
        ("backend-data", r#"{"VNI":1,"Vtep"#),
        ("public-ip", "192.168.64.1"),
    ],
    &[
        ("kube-subnet-manager", "true"),
        ("backend-type", "vxlan"),
        ("backend-data", r#"{"VNI":1,"VtepMAC":"00:00:00:00:00:00"}"#),
        ("public-ip", "192.168.64.1"),
    ],
    &[
        ("kube-subnet-manager", "true"),
        ("backend-type", "vxlan"),
        ("backend-data", r#"{"VNI":7,"VtepMAC":"0a:00:00:00:00:01"}"#),
        ("public-ip", "192.168.64.2"),
    ],
    &[("kube-subnet-manager", "false")],
    &[],
];
const POD_CIDRS: [&str; 5] = ["10.5.1.0/24", "10.5.2.0/24", "10.5.1.0/24,fd00:1::/64", "", "abc"];
const NAMES: [&str; 4] = ["a", "b", "c", "own"];

fn metadata(name: &str, object: &Object) -> Metadata {
    let annotations = object.announcement.iter();
    let annotations =
        annotations.map(|(suffix, value)| (format!("flannel.alpha.coreos.com/{suffix}"), (*value).to_owned()));
    Metadata {
        name: name.to_owned(),
        uid: object.uid.clone(),
        resource_version: "7".to_owned(),
        creation_timestamp: Some(format!("2026-01-01T00:00:0{}Z", object.created)),
        annotations: Some(annotations.collect()),
    }
}

/// The node whole, as a list or a read shows it.
fn whole(name: &str, object: &Object) -> Node {
    let pod_cidrs: Vec<_> = object.pod_cidr.split(',').filter(|cidr| !cidr.is_empty()).collect();
    let spec = serde_json::json!({ "podCIDR": pod_cidrs.first().copied().unwrap_or_default(), "podCIDRs": pod_cidrs });
    Node { metadata: metadata(name, object), spec: serde_json::from_value(spec).expect("spec") }
}

fn nodes() -> Nodes {
    static NAMES: LazyLock<Names> = LazyLock::new(|| Names::new("flannel.alpha.coreos.com").expect("flannel's own"));
    Nodes::new(NAMES.clone(), "own")
}

fn listed(objects: &BTreeMap<&'static str, Object>) -> Nodes {
    let mut nodes = nodes();
    nodes.extend(objects.iter().map(|(name, object)| whole(name, object)).collect());
    nodes
}

/// What follows from the updates, as the daemon makes it.
#[derive(Debug, Default)]
struct Follower {
    entries: BTreeMap<LeaseKey, (String, Grant, LeaseAttributes)>,
    passed_over: BTreeMap<String, (Option<LeaseKey>, String)>,
    remarks: BTreeMap<String, String>,
    announced: Announced,
    peers: BTreeMap<LeaseKey, Peer>,
}

impl Follower {
    fn list(&mut self, nodes: &Nodes) {
        (self.entries, self.passed_over, self.remarks, self.peers) = Default::default();
        let (entries, passed_over) = nodes.table();
        let updates = entries.into_iter().map(|entry| Update::Set(Box::new(entry)));
        self.take(updates.chain(passed_over.into_iter().map(Update::PassedOver)));
    }

    fn take(&mut self, updates: impl IntoIterator<Item = Update>) {
        for update in updates {
            match update {
                Update::Set(entry) => {
                    self.say_nothing_of(&entry.name);
                    if let Some(remark) = &entry.remark {
                        self.remarks.insert(entry.name.clone(), remark.clone());
                    }
                    let value = (entry.name.clone(), entry.grant.clone(), entry.attributes.clone());
                    self.entries.insert(entry.key, value);
                    match BACKEND.peer(&entry.attributes) {
                        Ok(peer) => {
                            self.announced.note(&entry, peer);
                            self.peers.insert(entry.key, peer);
                        }
                        Err(error) => self.replace(&entry.passed_over(error.to_string())),
                    }
                }
                Update::Removed { key, name, .. } => {
                    self.say_nothing_of(&name);
                    self.announced.forget(key.subnet);
                    self.entries.remove(&key);
                    self.peers.remove(&key);
                }
                Update::PassedOver(passed_over) => {
                    self.say_nothing_of(&passed_over.name);
                    self.replace(&passed_over);
                    self.entries.retain(|key, _| Some(*key) != passed_over.key);
                    if !passed_over.is_silent {
                        let PassedOver { name, key, reason, .. } = passed_over;
                        self.passed_over.insert(name, (key, reason));
                    }
                }
                Update::PassedOverRemoved(name) => self.say_nothing_of(&name),
                update => panic!("{update:?}"),
            }
        }
    }

    fn say_nothing_of(&mut self, name: &str) {
        self.passed_over.remove(name);
        self.remarks.remove(name);
    }

    fn replace(&mut self, passed_over: &PassedOver) {
        let Some(key) = passed_over.key else { return };
        match self.announced.in_place_of(passed_over) {
            Some(peer) => self.peers.insert(key, peer),
            None => self.peers.remove(&key),
        };
    }
}

/// What happens to a node.
#[derive(Clone, Debug)]
enum Event {
    /// It is made; where there is one of its name, that is deleted, and nobody hears of it.
    Made(u8, &'static str, Announcing),
    /// It is given a podCIDR, where it has none.
    Assigned(&'static str),
    Announces(Announcing),
    Reports,
    Deleted,
    /// The API server fails to show it whole.
    Unreadable,
    /// All nodes are listed again.
    Listed,
}

fn announcing() -> impl Strategy<Value = Announcing> {
    prop_oneof![3 => select(&SOUND[..]), 2 => select(&NONSENSE[..])]
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (0u8..3, select(&POD_CIDRS[..]), announcing())
            .prop_map(|(created, pod_cidr, says)| Event::Made(created, pod_cidr, says)),
        2 => select(&POD_CIDRS[..]).prop_map(Event::Assigned),
        6 => announcing().prop_map(Event::Announces),
        2 => Just(Event::Reports),
        2 => Just(Event::Deleted),
        1 => Just(Event::Unreadable),
        1 => Just(Event::Listed),
    ]
}

fn peer_of(announcement: &Announcement) -> Option<Peer> {
    let attributes = announcement.attributes().ok().filter(|_| announcement.is_managed)?;
    BACKEND.peer(&attributes).ok()
}

/// Has the nodes read that are to be, until none is.
fn read_all(nodes: &mut Nodes, objects: &BTreeMap<&'static str, Object>, follower: &mut Follower) {
    for _ in 0..20 {
        while let Some((name, uid)) = nodes.next_unread() {
            let object = objects.get(&*name).filter(|object| object.uid == *uid);
            let pod_cidrs = object.map_or(PodCidrs::Unread, |object| whole(&name, object).spec.pod_cidrs());
            follower.take(nodes.learn(&name, &uid, pod_cidrs));
        }
        nodes.read_one_again();
    }
}

proptest! {
    #[test]
    fn updates_lead_to_what_a_list_shows(events in vec((select(&NAMES[..]), event()), 1..40)) {
        let mut objects = BTreeMap::<&'static str, Object>::new();
        let (mut nodes, mut follower) = (nodes(), Follower::default());
        // Who announced what that could be used, while it had the subnet.
        let mut last = BTreeMap::<LeaseKey, (Grant, Peer)>::new();
        // What each said last that could be used, whether it had it or not.
        let mut said_by = BTreeMap::<String, Peer>::new();
        for (number, (name, event)) in events.into_iter().enumerate() {
            let mut fails = false;
            match event {
                Event::Made(created, pod_cidr, announcement) => {
                    objects.insert(name, Object { uid: format!("uid{number}"), created, pod_cidr, announcement });
                }
                Event::Assigned(pod_cidr) => {
                    let Some(object) = objects.get_mut(name).filter(|object| object.pod_cidr.is_empty()) else { continue };
                    object.pod_cidr = pod_cidr;
                }
                Event::Announces(announcement) => {
                    let Some(object) = objects.get_mut(name) else { continue };
                    object.announcement = announcement;
                }
                Event::Reports => {}
                Event::Unreadable => fails = true,
                Event::Deleted => {
                    let Some(object) = objects.remove(name) else { continue };
                    follower.take(nodes.remove(&metadata(name, &object)));
                }
                Event::Listed => {
                    nodes = listed(&objects);
                    follower.list(&nodes);
                }
            }
            if let Some(object) = objects.get(name) {
                let announcement = nodes.names.read(metadata(name, object).annotations.unwrap_or_default());
                if let Some(peer) = peer_of(&announcement) {
                    said_by.insert(object.uid.clone(), peer);
                }
                follower.take(nodes.set(metadata(name, object), PodCidrs::Unread));
            }
            while fails && let Some((name, uid)) = nodes.next_unread() {
                follower.take(nodes.learn(&name, &uid, PodCidrs::Unreadable("429".to_owned())));
            }
            read_all(&mut nodes, &objects, &mut follower);

            let (entries, passed_over) = listed(&objects).table();
            let table: BTreeMap<_, _> = entries
                .iter()
                .map(|entry| (entry.key, (entry.name.clone(), entry.grant.clone(), entry.attributes.clone())))
                .collect();
            prop_assert_eq!(&follower.entries, &table);
            let said = passed_over.iter().filter(|passed_over| !passed_over.is_silent);
            let said: BTreeMap<_, _> =
                said.map(|said| (said.name.clone(), (said.key, said.reason.clone()))).collect();
            prop_assert_eq!(&follower.passed_over, &said);
            let remarks = entries.iter().filter_map(|entry| Some((entry.name.clone(), entry.remark.clone()?)));
            prop_assert_eq!(&follower.remarks, &remarks.collect());

            let mut peers = BTreeMap::new();
            let mut unusable = passed_over;
            let mut named = BTreeSet::new();
            for entry in &entries {
                named.insert(entry.key);
                match BACKEND.peer(&entry.attributes) {
                    Ok(peer) => {
                        last.insert(entry.key, (entry.grant.clone(), peer));
                        peers.insert(entry.key, peer);
                    }
                    Err(error) => unusable.push(entry.passed_over(error.to_string())),
                }
            }
            for unusable in unusable {
                let Some(key) = unusable.key else { continue };
                named.insert(key);
                if let Some((_, peer)) = last.get(&key).filter(|(grant, _)| unusable.grant.as_ref() == Some(grant)) {
                    peers.insert(key, *peer);
                }
            }
            last.retain(|key, _| named.contains(key));
            for (key, peer) in &peers {
                prop_assert_eq!(follower.peers.get(key), Some(peer));
            }
            // Beside them only what a node said last that still lives. A list shows podCIDRs also of nodes that flannel has
            // never served, one of which may have that of one that it serves no more.
            for (key, peer) in follower.peers.iter().filter(|(key, _)| !peers.contains_key(key)) {
                let said_it = |object: &Object| {
                    said_by.get(&object.uid) == Some(peer)
                        && whole("", object).spec.pod_cidrs() == PodCidrs::Lease(*key)
                };
                prop_assert!(objects.values().any(said_it), "{}: {:?}", key, peer);
            }
        }
    }
}

fn object(uid: &str, pod_cidr: &'static str, announcement: Announcing) -> Object {
    Object { uid: uid.to_owned(), created: 1, pod_cidr, announcement }
}

/// In words.
fn words(updates: &[Update]) -> Vec<String> {
    let words = |update: &Update| match update {
        Update::Set(entry) => format!("{} has {}", entry.name, entry.key),
        Update::Removed { key, name, .. } => format!("{name} has {key} no more"),
        Update::PassedOver(PassedOver { name, key: Some(key), .. }) => format!("{name} is not understood, with {key}"),
        Update::PassedOver(PassedOver { name, .. }) => format!("{name} is passed over"),
        Update::PassedOverRemoved(name) => format!("{name} is forgotten"),
        update => format!("{update:?}"),
    };
    updates.iter().map(words).collect()
}

#[test]
fn who_is_new_is_read_and_a_heartbeat_is_nothing() {
    let mut nodes = nodes();
    let mut node = object("1", "10.5.1.0/24", NONSENSE[5]);
    assert!(nodes.set(metadata("a", &node), PodCidrs::Unread).is_empty());
    assert!(nodes.next_unread().is_none(), "flannel does not serve it");
    node.announcement = SOUND[0];
    assert!(nodes.set(metadata("a", &node), PodCidrs::Unread).is_empty());
    let (name, uid) = nodes.next_unread().expect("its podCIDR is not known");
    assert_eq!((&*name, &*uid), ("a", "1"));
    assert_eq!(words(&nodes.learn(&name, "0", PodCidrs::Unassigned)), [""; 0], "of another of its name");
    assert_eq!(words(&nodes.learn(&name, &uid, whole("a", &node).spec.pod_cidrs())), ["a has 10.5.1.0-24"]);
    assert!(nodes.set(metadata("a", &node), PodCidrs::Unread).is_empty());
    assert!(nodes.next_unread().is_none());
    // Another of its name.
    node.uid = "2".to_owned();
    assert_eq!(words(&nodes.set(metadata("a", &node), PodCidrs::Unread)), ["a has 10.5.1.0-24 no more"]);
    assert_eq!(nodes.next_unread().map(|(_, uid)| uid.to_string()).as_deref(), Some("2"));
}

#[test]
fn a_pod_cidr_goes_to_the_oldest_and_from_it_to_the_next() {
    let mut nodes = nodes();
    let older = object("1", "10.5.1.0/24", SOUND[0]);
    let younger = Object { created: 2, ..object("2", "10.5.1.0/24", SOUND[1]) };
    nodes.extend(vec![whole("b", &younger)]);
    let read = |name: &str, object: &Object| (metadata(name, object), whole(name, object).spec.pod_cidrs());
    let (metadata_of_older, pod_cidrs) = read("a", &older);
    assert_eq!(words(&nodes.set(metadata_of_older, pod_cidrs)), ["a has 10.5.1.0-24", "b is passed over"]);
    // What it says does not matter for whose it is.
    let nonsense = Object { announcement: NONSENSE[0], ..older.clone() };
    assert_eq!(
        words(&nodes.set(metadata("a", &nonsense), PodCidrs::Unread)),
        ["a is not understood, with 10.5.1.0-24"]
    );
    assert_eq!(words(&nodes.remove(&metadata("a", &older))), ["a is forgotten", "b has 10.5.1.0-24"]);
    // This host's is its own.
    let (metadata_of_own, pod_cidrs) = read("own", &Object { created: 9, ..object("3", "10.5.1.0/24", SOUND[2]) });
    assert_eq!(words(&nodes.set(metadata_of_own, pod_cidrs)), ["own has 10.5.1.0-24", "b is passed over"]);
}

/// D10 of flannel's: an update of one family only is lost where a node has both.
#[test]
fn what_changes_for_one_family_is_a_change() {
    const BEFORE: Announcing = &[
        ("kube-subnet-manager", "true"),
        ("backend-type", "vxlan"),
        ("backend-data", r#"{"VNI":1,"VtepMAC":"0a:00:00:00:00:01"}"#),
        ("backend-v6-data", r#"{"VNI":1,"VtepMAC":"0a:00:00:00:06:01"}"#),
        ("public-ip", "192.168.64.1"),
        ("public-ipv6", "fd00::1"),
    ];
    const AFTER: Announcing = &[
        ("kube-subnet-manager", "true"),
        ("backend-type", "vxlan"),
        ("backend-data", r#"{"VNI":1,"VtepMAC":"0a:00:00:00:00:02"}"#),
        ("backend-v6-data", r#"{"VNI":1,"VtepMAC":"0a:00:00:00:06:01"}"#),
        ("public-ip", "192.168.64.1"),
        ("public-ipv6", "fd00::1"),
    ];
    let mut nodes = nodes();
    let mut node = object("1", "10.5.1.0/24,fd00:1::/64", BEFORE);
    nodes.extend(vec![whole("a", &node)]);
    node.announcement = AFTER;
    let updates = nodes.set(metadata("a", &node), PodCidrs::Unread);
    let [Update::Set(entry)] = &updates[..] else { panic!("{updates:?}") };
    assert_eq!(entry.attributes.announced_mac().map(|mac| mac.to_string()).as_deref(), Some("0a:00:00:00:00:02"));
}

#[test]
fn two_nodes_with_one_address_are_both_used_and_said() {
    let mut nodes = nodes();
    nodes.extend(vec![
        whole("a", &object("1", "10.5.1.0/24", SOUND[0])),
        whole("b", &object("2", "10.5.2.0/24", SOUND[2])),
    ]);
    let remarks = |entries: Vec<Entry>| entries.into_iter().filter_map(|entry| entry.remark).collect::<Vec<_>>();
    let said = remarks(nodes.table().0);
    assert!(
        said.iter().any(|remark| remark.starts_with("its public-ip 192.168.64.1 is that of the node a too")),
        "{said:?}"
    );
    assert_eq!(said.len(), 2);
    // Both are told anew when they differ again.
    let other = object("2", "10.5.2.0/24", SOUND[1]);
    let mut updates = words(&nodes.set(metadata("b", &other), PodCidrs::Unread));
    updates.sort();
    assert_eq!(updates, ["a has 10.5.1.0-24", "b has 10.5.2.0-24"]);
    assert_eq!(remarks(nodes.table().0).len(), 0);
}
