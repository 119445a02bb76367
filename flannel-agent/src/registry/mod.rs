//! The lease table in the store.

pub mod etcd;

use std::{net::Ipv4Addr, time::Duration};

use flannel_common::packet::is_unicast;
use ipnet::Ipv4Net;

use crate::lease::{InvalidLease, LeaseAttributes, LeaseKey, MacAddress, Peer};

/// One lease as the store has it.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The subnet.
    pub key: LeaseKey,
    /// Who holds it.
    pub attributes: LeaseAttributes,
    /// The value's bytes.
    pub value: Vec<u8>,
    /// The etcd lease that the key goes with; 0 for a key that stays, a reservation.
    pub etcd_lease: i64,
    /// The store's revision in which the key was created; two keys of one name differ in it.
    pub create_revision: i64,
}

impl Entry {
    /// The lease as a host to encapsulate to.
    ///
    /// # Errors
    /// [`InvalidLease`] for a host without a VTEP.
    pub fn peer(&self) -> Result<Peer, InvalidLease> {
        let data = self.attributes.vxlan_data()?;
        if !is_unicast(self.attributes.public_ip.to_bits()) {
            return Err(InvalidLease::PublicIp(self.attributes.public_ip));
        }
        Ok(Peer { public_ip: self.attributes.public_ip, vtep_mac: data.vtep_mac })
    }
}

/// What the watch reports.
#[derive(Debug)]
pub enum Update {
    /// The whole table. Comes first, and after every gap in the changes.
    Snapshot(Vec<Entry>),
    /// A lease was taken or changed.
    Set(Box<Entry>),
    /// A lease ended.
    Removed(LeaseKey),
}

/// What a host asks for.
#[derive(Clone, Debug)]
pub struct LeaseRequest {
    /// Its VTEP address; a lease with it is the host's own.
    pub public_ip: Ipv4Addr,
    /// The MAC of its vxlan device. Without one the own lease's is kept, or one made up.
    pub vtep_mac: Option<MacAddress>,
    /// The subnet it had before.
    pub previous: Option<Ipv4Net>,
    /// For how long the store keeps the lease of a host that is silent.
    pub ttl: Duration,
}

/// The lease that this host holds.
#[derive(Clone, Debug)]
pub struct OwnLease {
    /// The subnet.
    pub key: LeaseKey,
    /// The MAC that it announces.
    pub vtep_mac: MacAddress,
    /// The etcd lease behind it; 0 for a reservation, which needs no renewal.
    pub etcd_lease: i64,
}
