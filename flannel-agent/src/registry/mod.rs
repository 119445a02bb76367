//! The lease table in the store.

pub mod etcd;
mod resync;

use std::{collections::BTreeSet, net::Ipv4Addr, time::Duration};

use flannel_common::{packet::is_unicast, vxlan::Vni};
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

pub use self::resync::ResyncCause;
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
    /// The store's revision in which it was last written.
    pub mod_revision: i64,
    /// How often it was written since it was created.
    pub version: i64,
}

impl Entry {
    /// The MAC that it announces, where it is a vxlan host's.
    pub fn announced_mac(&self) -> Option<MacAddress> {
        self.attributes.vxlan_data().ok().map(|data| data.vtep_mac)
    }

    /// The lease as a host to encapsulate to.
    ///
    /// # Errors
    /// [`InvalidLease`] for a host without a VTEP in this overlay.
    pub fn peer(&self, vni: Vni) -> Result<Peer, InvalidLease> {
        let data = self.attributes.vxlan_data()?;
        if data.vni != vni.get() {
            return Err(InvalidLease::Vni { theirs: data.vni, ours: vni });
        }
        if !is_unicast(self.attributes.public_ip.to_bits()) {
            return Err(InvalidLease::PublicIp(self.attributes.public_ip));
        }
        Ok(Peer { public_ip: self.attributes.public_ip, vtep_mac: data.vtep_mac })
    }
}

/// A key of the store that is no lease, or whose value is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassedOver {
    /// The key below `subnets/`, as text.
    pub name: String,
    /// The subnet, where at least the key says one: nobody else can have it.
    pub key: Option<LeaseKey>,
    /// What is wrong with it.
    pub reason: String,
}

/// The whole table at one revision of the store.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// The network configuration, as it is there.
    pub config: Option<Vec<u8>>,
    /// The leases.
    pub entries: Vec<Entry>,
    /// What is there beside them.
    pub passed_over: Vec<PassedOver>,
    /// The store's revision.
    pub revision: i64,
    /// Which store it is.
    pub cluster_id: u64,
}

/// What the watch reports.
#[derive(Debug)]
pub enum Update {
    /// The whole table. Comes first, and after every gap in the changes.
    Snapshot(Snapshot, ResyncCause),
    /// A lease was taken or changed.
    Set(Box<Entry>),
    /// A lease ended, in this revision of the store.
    Removed(LeaseKey, i64),
    /// A key was written that is no lease, or is none any more.
    PassedOver(PassedOver),
    /// A key that was no lease is gone.
    PassedOverRemoved(String),
    /// The network configuration was written, or deleted.
    Config(Option<Vec<u8>>),
    /// The watch ended; another one begins after a while.
    Away(String),
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
    /// The overlay that it is in.
    pub vni: Vni,
    /// For how long the store keeps the lease of a host that is silent.
    pub ttl: Duration,
    /// Subnets that hosts may have which the store does not name: not taken while there are others.
    pub avoid: BTreeSet<Ipv4Net>,
    /// Another living host was seen with the lease: it is asked for also where the MAC is this host's.
    pub is_contested: bool,
}

/// The lease that this host holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OwnLease {
    /// The subnet.
    pub key: LeaseKey,
    /// The MAC that it announces.
    pub vtep_mac: MacAddress,
    /// The etcd lease behind it; 0 for a reservation, which needs no renewal.
    pub etcd_lease: i64,
    /// The key's version as this host wrote or found it; 0 where that is not known. What is above that, another wrote.
    #[serde(skip)]
    pub version: i64,
}

/// How it stands with this host's lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is this host's, and renewed.
    Held,
    /// The same, and another host that has this one's address asked whether somebody lives who holds it. It was answered.
    Claimed,
    /// It ended: this host was silent for too long, or the store has lost it.
    Expired,
    /// It ended, and another host has the subnet.
    Taken(Ipv4Addr),
    /// Another host with this one's address holds it, and announces this MAC.
    Contested(MacAddress),
    /// It was deleted before its term ended. Whether that was meant for this host, the rest of the table tells.
    Deleted,
}
