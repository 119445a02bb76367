//! What every store does.

use std::{fmt, net::Ipv4Addr, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    Contested, Entry, HostAddresses, LeaseRequest, OwnLease, OwnLeaseState, ResyncCause, Snapshot, Updates,
    etcd::{Etcd, EtcdError, EtcdOptions},
    kubernetes::{Kubernetes, KubernetesError, KubernetesOptions},
};
use crate::{config::NetworkConfig, health::Heartbeat};

/// Which store it is, for texts only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoreKind {
    /// etcd.
    #[default]
    Etcd,
    /// Kubernetes.
    Kubernetes,
}

impl StoreKind {
    /// As people write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::Kubernetes => "Kubernetes",
        }
    }
}

impl fmt::Display for StoreKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How the store is reached.
#[derive(Clone, Debug)]
pub enum StoreOptions {
    /// etcd.
    Etcd(EtcdOptions),
    /// Kubernetes.
    Kubernetes(KubernetesOptions),
}

/// The store could not be used as asked.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The lease is another's.
    #[error(transparent)]
    Contested(#[from] Contested),
    /// etcd.
    #[error(transparent)]
    Etcd(EtcdError),
    /// Kubernetes.
    #[error(transparent)]
    Kubernetes(#[from] KubernetesError),
}

impl From<EtcdError> for RegistryError {
    fn from(error: EtcdError) -> Self {
        match error {
            EtcdError::Contested(contested) => Self::Contested(contested),
            error => Self::Etcd(error),
        }
    }
}

impl RegistryError {
    /// Whether trying again can't help.
    pub const fn is_final(&self) -> bool {
        match self {
            Self::Contested(_) => false,
            Self::Etcd(error) => error.is_final(),
            Self::Kubernetes(error) => error.is_final(),
        }
    }

    /// Whether the store did not answer, or has no config that can be used: what was known before still counts then.
    pub const fn is_away(&self) -> bool {
        match self {
            Self::Contested(_) => false,
            Self::Etcd(error) => error.is_away(),
            Self::Kubernetes(error) => error.is_away(),
        }
    }

    /// Whether the store answered, and has no network config that can be used.
    pub const fn is_about_config(&self) -> bool {
        match self {
            Self::Contested(_) => false,
            Self::Etcd(error) => matches!(error, EtcdError::NoConfig(_) | EtcdError::Config { .. }),
            Self::Kubernetes(error) => {
                matches!(error, KubernetesError::NoConfig { .. } | KubernetesError::Config { .. })
            }
        }
    }

    /// Whether something of this host's own is to blame: a flag, or a file that one names.
    pub const fn is_misconfiguration(&self) -> bool {
        match self {
            Self::Contested(_) => false,
            Self::Etcd(error) => error.is_misconfiguration(),
            Self::Kubernetes(error) => error.is_misconfiguration(),
        }
    }
}

/// The lease table, in whichever store it is. Connects when it has to, and anew after a failure.
#[derive(Clone)]
pub struct Registry {
    store: Store,
}

#[derive(Clone)]
enum Store {
    Etcd(Box<Etcd>),
    Kubernetes(Box<Kubernetes>),
}

impl Registry {
    /// Checks how the store is to be reached; asks nothing of it yet.
    ///
    /// # Errors
    /// [`RegistryError`], where something on this host is not as it should be.
    pub fn new(options: StoreOptions) -> Result<Self, RegistryError> {
        let store = match options {
            StoreOptions::Etcd(options) => Store::Etcd(Box::new(Etcd::new(options)?)),
            StoreOptions::Kubernetes(options) => Store::Kubernetes(Box::new(Kubernetes::new(options)?)),
        };
        Ok(Self { store })
    }

    /// Which store it is.
    pub const fn kind(&self) -> StoreKind {
        match &self.store {
            Store::Etcd(_) => StoreKind::Etcd,
            Store::Kubernetes(_) => StoreKind::Kubernetes,
        }
    }

    /// A name for this lease table; for the same one it is the same.
    pub fn identity(&self) -> &str {
        match &self.store {
            Store::Etcd(etcd) => etcd.prefix(),
            Store::Kubernetes(kubernetes) => kubernetes.identity(),
        }
    }

    /// Where the network configuration is, for texts.
    pub fn config_place(&self) -> String {
        match &self.store {
            Store::Etcd(_) => StoreKind::Etcd.to_string(),
            Store::Kubernetes(kubernetes) => kubernetes.config_place(),
        }
    }

    /// URLs of the servers that this host must reach.
    pub fn endpoints(&self) -> Vec<String> {
        match &self.store {
            Store::Etcd(etcd) => etcd.endpoints().to_vec(),
            Store::Kubernetes(kubernetes) => vec![kubernetes.url().to_owned()],
        }
    }

    /// What it says of this host's addresses, before anything is chosen by them.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub async fn host_addresses(&mut self) -> Result<HostAddresses, RegistryError> {
        Ok(match &mut self.store {
            Store::Etcd(_) => HostAddresses::default(),
            Store::Kubernetes(kubernetes) => kubernetes.host_addresses().await?,
        })
    }

    /// How often the lease is to be renewed, where it has a term; `asked` is what the operator asked for.
    pub const fn renew_interval(&self, asked: Duration) -> Option<Duration> {
        match &self.store {
            Store::Etcd(_) => Some(asked),
            Store::Kubernetes(_) => None,
        }
    }

    /// Whether each host writes its own lease, so that one that lives puts back what the store has lost.
    pub const fn is_written_by_hosts(&self) -> bool {
        match &self.store {
            Store::Etcd(_) => true,
            Store::Kubernetes(_) => false,
        }
    }

    /// Says that packets of this host's pods can flow, where somebody waits for that.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub async fn complete(&mut self) -> Result<(), RegistryError> {
        match &mut self.store {
            Store::Etcd(_) => Ok(()),
            Store::Kubernetes(kubernetes) => Ok(kubernetes.complete().await?),
        }
    }

    /// Makes the next call on a fresh connection: one from an address that this host no longer has hangs.
    pub fn disconnect(&mut self) {
        match &mut self.store {
            Store::Etcd(etcd) => etcd.disconnect(),
            Store::Kubernetes(kubernetes) => kubernetes.disconnect(),
        }
    }

    /// Reads and checks the network configuration. As it is there, it comes with it.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub async fn network_config(&mut self) -> Result<(NetworkConfig, Vec<u8>), RegistryError> {
        Ok(match &mut self.store {
            Store::Etcd(etcd) => etcd.network_config().await?,
            Store::Kubernetes(kubernetes) => kubernetes.network_config()?,
        })
    }

    /// Checks the network configuration.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn parse_config(&self, value: &[u8]) -> Result<NetworkConfig, RegistryError> {
        Ok(match &self.store {
            Store::Etcd(etcd) => etcd.parse_config(value)?,
            Store::Kubernetes(kubernetes) => kubernetes.parse_config(value)?,
        })
    }

    /// Takes this host's lease.
    ///
    /// # Errors
    /// [`RegistryError::Contested`] where another living host has it; or what keeps it from being taken.
    pub async fn acquire(&mut self, config: &NetworkConfig, request: &LeaseRequest) -> Result<OwnLease, RegistryError> {
        Ok(match &mut self.store {
            Store::Etcd(etcd) => etcd.acquire(config, request).await?,
            Store::Kubernetes(kubernetes) => kubernetes.acquire(config, request).await?,
        })
    }

    /// Keeps the lease for another term where it is still this host's, and says how it stands with it.
    ///
    /// # Errors
    /// [`RegistryError`], where that can't be told.
    pub async fn renew(
        &mut self,
        lease: &mut OwnLease,
        request: &LeaseRequest,
    ) -> Result<OwnLeaseState, RegistryError> {
        Ok(match &mut self.store {
            Store::Etcd(etcd) => etcd.renew(lease, request).await?,
            Store::Kubernetes(kubernetes) => kubernetes.renew(lease, request).await?,
        })
    }

    /// Has the lease name another address of this host. `false` where it is not as this host wrote it, and left so.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub async fn announce(
        &mut self,
        lease: &mut OwnLease,
        request: &LeaseRequest,
        public_ip: Ipv4Addr,
    ) -> Result<bool, RegistryError> {
        Ok(match &mut self.store {
            Store::Etcd(etcd) => etcd.announce(lease, request, public_ip).await?,
            Store::Kubernetes(kubernetes) => kubernetes.announce(lease, request, public_ip).await?,
        })
    }

    /// In how long a lease ends unless it is renewed; [`None`] where it has no end.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub async fn remaining(&mut self, entry: &Entry) -> Result<Option<Duration>, RegistryError> {
        Ok(match &mut self.store {
            Store::Etcd(etcd) => etcd.remaining(entry).await?,
            Store::Kubernetes(_) => None,
        })
    }

    /// Where a lease is in the store, in its words: a key, or a node.
    pub fn key_of(&self, entry: &Entry) -> String {
        match &self.store {
            Store::Etcd(etcd) => etcd.key_of(entry),
            Store::Kubernetes(_) => format!("nodes/{}", entry.name),
        }
    }

    /// Network configuration and leases at one moment.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub async fn snapshot(&mut self) -> Result<Snapshot, RegistryError> {
        Ok(match &mut self.store {
            Store::Etcd(etcd) => etcd.snapshot().await?,
            Store::Kubernetes(kubernetes) => kubernetes.snapshot().await?,
        })
    }

    /// Reports the whole table and then every change to it, for ever. Each gap in the changes, whatever its cause, ends
    /// in a fresh snapshot. Returns when nobody receives any more.
    pub async fn watch(self, cause: ResyncCause, updates: Updates, heartbeat: Heartbeat) {
        match self.store {
            Store::Etcd(etcd) => etcd.watch(cause, updates, heartbeat).await,
            Store::Kubernetes(kubernetes) => kubernetes.watch(cause, updates, heartbeat).await,
        }
    }
}
