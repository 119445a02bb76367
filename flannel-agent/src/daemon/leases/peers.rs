//! Which of the store's entries are peers, and which is this host's own lease.
//!
//! A host whose lease names another backend is no peer, whatever it announced before, as with flannel (pkg/backend/vxlan/
//! vxlan_network.go, `handleSubnetEvents`): it has said that it takes nothing any more of what this backend sends, and whoever went
//! on sending would only hide that the two do not reach each other. It is dropped at once and not held, since the store does not
//! lack it. Its subnet stays its own, and when it comes back to this backend, it is a peer again.

use ipnet::Ipv4Net;
use tracing::{debug, warn};

use super::Leases;
use crate::{
    device::vxlan::VxlanDevice,
    lease::{InvalidLease, LeaseKey, Peer, PeerChange},
    registry::{Entry, PassedOver},
    status::LeaseState,
};

/// An entry of another host's that is no peer.
pub(super) enum NoPeer {
    /// It is a lease, of a host with this backend.
    OtherBackend(String),
    PassedOver(PassedOver),
}

impl From<PassedOver> for NoPeer {
    fn from(passed_over: PassedOver) -> Self {
        Self::PassedOver(passed_over)
    }
}

impl Leases {
    /// An entry is the lease of a host with another backend.
    pub(super) fn renounce(&mut self, entry: &Entry, backend: &str) -> Option<PeerChange> {
        let is_known = self.others.insert(entry.key, backend);
        self.announced.forget(entry.key.subnet);
        let change = self.table.renounce(entry.key);
        let (subnet, host) = (entry.key.subnet, entry.attributes.public_ip);
        match &change {
            Some(PeerChange::Remove(_)) => {
                warn!(
                    "{subnet} is no peer any more: the backend of {host} is {backend:?}, not {}",
                    self.network.backend.kind()
                );
            }
            _ if !is_known => {
                debug!("{subnet} is leased by {host} with the backend {backend:?}, and not reached from here")
            }
            _ => {}
        }
        change
    }

    /// An entry names a VTEP.
    pub(super) fn take_note(&mut self, entry: &Entry, peer: Peer) {
        self.others.remove(entry.key);
        self.announced.note(entry, peer);
        let own_mac = || {
            format!(
                "it announces the MAC {} of this host's vxlan device; give each host a device of its own: `ip link delete \
                 {}` on one of them, and start its agent again",
                peer.vtep_mac,
                VxlanDevice::name_of(self.network.backend.vni())
            )
        };
        let remark = entry.remark.clone().or_else(|| {
            let has_macs = self.attributes.fixed_mac().is_none();
            (has_macs && peer.vtep_mac == self.own.vtep_mac).then(own_mac)
        });
        if let Some(remark) = remark {
            self.status.remark(&entry.name, &remark);
        }
    }

    /// Takes note of what names no VTEP. What the same holder announced before counts in its place.
    pub(super) fn last_of(&mut self, passed_over: PassedOver) -> Option<(LeaseKey, Peer)> {
        if let Some(key) = passed_over.key {
            self.others.remove(key);
        }
        let own = self.own.key.subnet;
        let key = passed_over.key.filter(|key| !overlap(own, key.subnet));
        let last = key.and_then(|_| self.announced.in_place_of(&passed_over));
        if last.is_some() || !passed_over.is_silent {
            self.status.pass_over(passed_over, last);
        } else {
            self.status.usable(&passed_over.name);
        }
        key.zip(last)
    }

    /// The host to encapsulate to for an entry; [`None`] for this one.
    pub(super) fn peer_of(&self, entry: &Entry) -> Result<Option<Peer>, NoPeer> {
        let before = self.announced.before(entry);
        if entry.attributes.public_ip == self.public_ip() {
            let rival = match entry.attributes.announced_mac() {
                _ if entry.key == self.own.key => return Ok(None),
                Some(mac) if mac != self.own.vtep_mac => format!(" with the MAC {mac} of another"),
                None if entry.is_of_another(&self.own) => ", and is another's".to_owned(),
                // A lease that this host had before has never been another's.
                _ if before.is_some() => {
                    let reason = format!("it names this host's own address {}", self.public_ip());
                    return Err(entry.passed_over(reason).into());
                }
                _ => return Ok(None),
            };
            let reason = format!(
                "it names this host's own address {}{rival}, for {}, and this host has {}: two hosts must not have one \
                 address, as machines have behind the NAT of Vagrant. Give each host an address of its own with --iface or \
                 --public-ip",
                self.public_ip(),
                entry.key.subnet,
                self.own.key.subnet
            );
            return Err(entry.passed_over(reason).into());
        }
        let (own, theirs) = (self.own.key.subnet, entry.key.subnet);
        if overlap(own, theirs) {
            return Err(entry.passed_over(format!("it overlaps this host's own lease {own}")).into());
        }
        let peer = match self.attributes.peer(&entry.attributes) {
            Err(InvalidLease::Backend { theirs, .. }) => return Err(NoPeer::OtherBackend(theirs)),
            peer => peer.map_err(|error| entry.passed_over(error.to_string()))?,
        };
        if peer.vtep_mac == self.own.vtep_mac && before.is_some_and(|before| before.vtep_mac != peer.vtep_mac) {
            let reason = format!("it names the MAC {} of this host's own VTEP", peer.vtep_mac);
            return Err(entry.passed_over(reason).into());
        }
        Ok(Some(peer))
    }

    pub(super) fn is_own(&self, entry: &Entry) -> bool {
        entry.key == self.own.key && entry.attributes.public_ip == self.public_ip()
    }

    /// Whether an entry is this host's lease as it was taken, and nobody wrote it since.
    pub(super) fn is_held(&self, entry: &Entry) -> bool {
        self.is_own(entry)
            && self.own.is_as_written(entry, self.attributes)
            && self.attributes.peer(&entry.attributes).is_ok()
    }

    /// The table says something that does not go with holding the lease. Only where it is held: whoever is taking
    /// one looks anyway.
    pub(super) fn doubt_lease(&self) {
        if self.status.lease_state() == LeaseState::Held {
            self.holder.doubt.notify_one();
        }
    }
}

fn overlap(one: Ipv4Net, other: Ipv4Net) -> bool {
    one.contains(&other) || other.contains(&one)
}
