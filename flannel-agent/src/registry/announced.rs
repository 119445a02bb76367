//! What each holder of a lease said last that could be used.
//!
//! An announcement that somebody has damaged says nothing of its host, which lives on. So what the same holder announced
//! before counts until it says something else that can be used, or its lease ends.

use std::collections::BTreeMap;

use ipnet::Ipv4Net;

use super::{Entry, Grant, PassedOver};
use crate::lease::Peer;

/// The last announcement of each holder that named a VTEP, by subnet.
#[derive(Clone, Debug, Default)]
pub struct Announced(BTreeMap<Ipv4Net, Announcement>);

#[derive(Clone, Debug)]
struct Announcement {
    /// Whose; [`None`] where an agent before this one heard it.
    grant: Option<Grant>,
    peer: Peer,
}

impl Announced {
    /// What an agent before this one knew. Whose it was is not known: it counts as that of whoever has the subnet.
    pub fn new(known: &BTreeMap<Ipv4Net, Peer>) -> Self {
        let announced = known.iter().map(|(subnet, peer)| (*subnet, Announcement { grant: None, peer: *peer }));
        Self(announced.collect())
    }

    /// A holder announces this.
    pub fn note(&mut self, entry: &Entry, peer: Peer) {
        self.0.insert(entry.key.subnet, Announcement { grant: Some(entry.grant.clone()), peer });
    }

    /// What the holder of an entry announced before; [`None`] where that was another, or nobody.
    pub fn before(&self, entry: &Entry) -> Option<Peer> {
        self.of(entry.key.subnet, &entry.grant)
    }

    /// What counts in the place of something that names no VTEP.
    pub fn in_place_of(&mut self, passed_over: &PassedOver) -> Option<Peer> {
        let (subnet, grant) = (passed_over.key?.subnet, passed_over.grant.as_ref()?);
        let peer = self.of(subnet, grant)?;
        self.0.insert(subnet, Announcement { grant: Some(grant.clone()), peer });
        Some(peer)
    }

    /// A lease ended.
    pub fn forget(&mut self, subnet: Ipv4Net) {
        self.0.remove(&subnet);
    }

    fn of(&self, subnet: Ipv4Net, grant: &Grant) -> Option<Peer> {
        let announcement = self.0.get(&subnet)?;
        let is_theirs = announcement.grant.as_ref().is_none_or(|theirs| theirs == grant);
        is_theirs.then_some(announcement.peer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{LeaseAttributes, MacAddress};

    const PEER: Peer =
        Peer { public_ip: std::net::Ipv4Addr::new(192, 168, 64, 2), vtep_mac: MacAddress([2, 0, 0, 0, 0, 2]) };

    fn entry(uid: &str) -> Entry {
        Entry {
            key: "10.5.2.0-24".parse().expect("key"),
            name: "b".to_owned(),
            attributes: LeaseAttributes::vxlan(PEER.public_ip, 1, PEER.vtep_mac),
            grant: Grant::NodeUid(uid.to_owned()),
            version: 0,
            remark: None,
        }
    }

    #[test]
    fn it_counts_for_the_same_holder_until_the_lease_ends() {
        let mut announced = Announced::default();
        assert_eq!(announced.in_place_of(&entry("1").passed_over(String::new())), None);
        announced.note(&entry("1"), PEER);
        assert_eq!(announced.in_place_of(&entry("1").passed_over(String::new())), Some(PEER));
        assert_eq!(announced.in_place_of(&entry("2").passed_over(String::new())), None, "another node of this name");
        announced.forget(entry("1").key.subnet);
        assert_eq!(announced.in_place_of(&entry("1").passed_over(String::new())), None);
    }

    #[test]
    fn what_an_agent_before_heard_is_the_first_holders_that_is_seen() {
        let mut announced = Announced::new(&BTreeMap::from([(entry("1").key.subnet, PEER)]));
        let nobodys = PassedOver::new("b".to_owned(), Some(entry("1").key), String::new());
        assert_eq!(announced.in_place_of(&nobodys), None, "a store that does not say whose");
        assert_eq!(announced.in_place_of(&entry("1").passed_over(String::new())), Some(PEER));
        assert_eq!(announced.in_place_of(&entry("2").passed_over(String::new())), None);
        assert_eq!(announced.before(&entry("1")), Some(PEER));
    }
}
