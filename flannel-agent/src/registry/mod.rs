//! The lease table in the store.
//!
//! * `store` — what every store does, as [`Registry`]
//! * [`etcd`] — the one that does it in etcd
//! * [`kubernetes`] — the one that does it in the nodes of a Kubernetes cluster
//! * `announced` — what each holder of a lease said last that could be used
//! * `updates` — what a watch reports, and when it saw it
//! * `resync` — why the whole table was read again
//!
//! What only one store has is private to this room: nobody else knows which it is.

mod announced;
pub mod etcd;
pub mod kubernetes;
mod resync;
mod store;
mod updates;

use std::{collections::BTreeSet, net::Ipv4Addr, time::Duration};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

pub use self::{
    announced::Announced,
    resync::ResyncCause,
    store::{Registry, RegistryError, StoreKind, StoreOptions},
    updates::{Seen, Updates},
};
use crate::lease::{BackendAttributes, LeaseAttributes, LeaseKey, MacAddress};

/// One lease as the store has it.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The subnet.
    pub key: LeaseKey,
    /// The name that it is found by in the store.
    pub name: String,
    /// Who holds it.
    pub attributes: LeaseAttributes,
    /// What the store knows it by.
    grant: Grant,
    /// How often it was written since it was created, where the store counts that; else 0.
    version: i64,
    /// What an operator should know of it, though it is used.
    pub remark: Option<String>,
}

impl Entry {
    /// Whether the store knows its holder for another than this lease's. Not every store knows holders.
    pub fn is_of_another(&self, own: &OwnLease) -> bool {
        matches!((&self.grant, &own.grant), (Grant::NodeUid(theirs), Grant::NodeUid(ours)) if theirs != ours)
    }

    /// The same, as none that can be used.
    pub fn passed_over(&self, reason: String) -> PassedOver {
        let grant = Some(self.grant.clone());
        PassedOver { grant, ..PassedOver::new(self.name.clone(), Some(self.key), reason) }
    }
}

/// What is in the place of a lease in the store, and none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassedOver {
    /// The name that it is found by in the store.
    pub name: String,
    /// The subnet, where at least that is known: nobody else can have it.
    pub key: Option<LeaseKey>,
    /// What is wrong with it.
    pub reason: String,
    /// What the store knows its holder by, where it has one.
    grant: Option<Grant>,
    /// Whether it announces nothing. Then it may be none of ours, and is passed over without a word where its holder has
    /// never announced anything.
    pub is_silent: bool,
}

impl PassedOver {
    /// Something without a holder.
    const fn new(name: String, key: Option<LeaseKey>, reason: String) -> Self {
        Self { name, key, reason, grant: None, is_silent: false }
    }
}

/// The whole table at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// The network configuration, as it is there.
    pub config: Option<Vec<u8>>,
    /// The leases.
    pub entries: Vec<Entry>,
    /// What is there beside them.
    pub passed_over: Vec<PassedOver>,
    /// The store's revision, for people.
    pub revision: i64,
    /// Which store it is, for people.
    pub store_id: String,
}

/// What the watch reports.
#[derive(Debug)]
pub enum Update {
    /// The whole table. Comes first, and after every gap in the changes.
    Snapshot(Snapshot, ResyncCause),
    /// A lease was taken or changed.
    Set(Box<Entry>),
    /// A lease ended.
    Removed {
        /// The subnet.
        key: LeaseKey,
        /// The name that it was found by in the store.
        name: String,
        /// The store's revision with which it went; others of the same went with it.
        revision: i64,
    },
    /// Something was written that is no lease, or is none any more.
    PassedOver(PassedOver),
    /// What had this name, and was no lease, is gone.
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
    /// What the leases of this overlay's hosts have in common.
    pub backend: BackendAttributes,
    /// For how long the store keeps the lease of a host that is silent.
    pub ttl: Duration,
    /// Subnets that hosts may have which the store does not name: not taken while there are others.
    pub avoid: BTreeSet<Ipv4Net>,
    /// Another living host was seen with the lease: it is asked for also where the MAC is this host's.
    pub is_contested: bool,
}

/// The lease that this host holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OwnLease {
    /// The subnet.
    pub key: LeaseKey,
    /// The MAC that it announces.
    pub vtep_mac: MacAddress,
    /// What the store knows it by.
    #[serde(flatten)]
    grant: Grant,
    /// Its version as this host wrote or found it; 0 where that is not known. What is above that, another wrote.
    #[serde(skip)]
    version: i64,
}

impl OwnLease {
    /// Whether an entry is this lease as it was taken, and nobody wrote it since.
    pub fn is_as_written(&self, entry: &Entry, backend: BackendAttributes) -> bool {
        let is_same = entry.key == self.key && entry.grant == self.grant && entry.version == self.version;
        is_same && backend.announced_mac(&entry.attributes) == Some(self.vtep_mac)
    }

    /// Whether it ends unless it is renewed.
    pub const fn has_term(&self) -> bool {
        match &self.grant {
            Grant::EtcdLease(lease) => *lease != 0,
            Grant::NodeUid(_) => false,
        }
    }

    /// Whether the store knows both by the same.
    pub fn has_grant_of(&self, other: &Self) -> bool {
        self.grant == other.grant
    }
}

/// What a store knows a host's lease by. Of one key, two leases differ in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Grant {
    /// The etcd lease that the key goes with; 0 for a reservation, which needs no renewal.
    EtcdLease(i64),
    /// The uid of the node that has the podCIDR.
    NodeUid(String),
}

/// What the store says of this host's addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HostAddresses {
    /// Counts as `--public-ip`, also where that is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub public_ip: Option<Ipv4Addr>,
    /// Is published in the place of the address that would be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub published: Option<Ipv4Addr>,
}

impl HostAddresses {
    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Another host has this one's address, and lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "another living host, with the MAC {vtep_mac}, has this host's address {public_ip} and the lease {subnet}: a machine \
     that was cloned, a --public-ip that is given twice, or one address behind NAT. Give each host an address of its \
     own with --public-ip or --iface; this one waits until the other is gone"
)]
pub struct Contested {
    /// The address.
    pub public_ip: Ipv4Addr,
    /// The lease that names it.
    pub subnet: Ipv4Net,
    /// The MAC that the other announces.
    pub vtep_mac: MacAddress,
}

/// How it stands with this host's lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnLeaseState {
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
