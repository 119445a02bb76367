//! The lease table in etcd, in flannel's keys and values (flannel: pkg/subnet/etcd).
//!
//! Unlike flannel's, a renewal is a keep-alive of the same etcd lease, which is no event to anybody, and every write
//! is a transaction on the key's being what was read.

pub mod address;
mod certificate;
mod connect;
mod explain;
mod lease;
mod short_rsa;
mod tls;
mod verify;
mod watch;

use std::{io, path::PathBuf, time::Duration};

use etcd_client::{GetOptions, KeyValue, Txn, TxnOp, TxnOpResponse};

use self::{
    address::Prefix,
    connect::Connection,
    explain::{Asked, Permission},
    tls::Tls,
};
use super::{Contested, Entry, Grant, PassedOver, ResyncCause, Snapshot};
use crate::{
    config::{ConfigError, NetworkConfig},
    lease::{LeaseAttributes, LeaseKey},
};

/// For how long one request may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How large an answer may be. The client's own limit of 4 MiB is less than three values of the size that etcd takes,
/// which would keep the whole table from every host.
const MAX_ANSWER: usize = 1 << 30;

/// How etcd is reached.
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    /// URLs.
    pub endpoints: Vec<String>,
    /// The path that config and leases are under, as the operator wrote it.
    pub prefix: String,
    /// The authority that signed the servers' certificates.
    pub ca_file: Option<PathBuf>,
    /// This client's certificate and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// User and password.
    pub user: Option<(String, String)>,
}

/// The store could not be used as asked.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// A certificate or key can't be read.
    #[error(
        "cannot read {path}: {source}; check --etcd-cafile, --etcd-certfile and --etcd-keyfile{}",
        crate::privileges::permission_hint(.source)
    )]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A certificate or key can't be used.
    #[error("{subject}: {problem}; check --etcd-cafile, --etcd-certfile and --etcd-keyfile")]
    Certificate {
        /// Its file.
        subject: String,
        /// Why not, and what to make instead.
        problem: String,
    },
    /// etcd refused, or did not answer.
    #[error("etcd at {endpoints}: {call}: {cause}")]
    Call {
        /// What was asked.
        call: &'static str,
        /// Whom.
        endpoints: String,
        /// What became of the connection, as the reason for a fresh snapshot.
        kind: ResyncCause,
        /// Why not, and what may help.
        cause: String,
    },
    /// There is no network configuration yet.
    #[error(
        "flannel config not found in etcd store. Did you create your config using etcdv3 API? (etcdctl put {0} '{{...}}')"
    )]
    NoConfig(String),
    /// The network configuration can't be used.
    #[error("the network config in etcd ({key}): {source}")]
    Config {
        /// Its key.
        key: String,
        /// What is wrong with it.
        source: Box<ConfigError>,
    },
    /// Another host has this one's address, and lives.
    #[error(transparent)]
    Contested(#[from] Contested),
    /// No free subnet.
    #[error("out of subnets: {0} has none free; wait for a lease to end, or widen SubnetMin to SubnetMax")]
    OutOfSubnets(ipnet::Ipv4Net),
    /// Others were faster every time.
    #[error("max retries reached trying to acquire a subnet")]
    LostRaces,
}

impl EtcdError {
    /// Whether trying again can't help.
    pub const fn is_final(&self) -> bool {
        matches!(self, Self::File { .. })
    }

    /// Whether the store did not answer, or has no config that can be used: what was known before still counts then.
    pub const fn is_away(&self) -> bool {
        matches!(self, Self::Call { .. } | Self::NoConfig(_) | Self::Config { .. })
    }

    /// Whether a flag or a file of this host's is to blame.
    pub const fn is_misconfiguration(&self) -> bool {
        matches!(self, Self::File { .. } | Self::Certificate { .. })
    }

    const fn resync_cause(&self) -> ResyncCause {
        match self {
            Self::Call { kind, .. } => *kind,
            _ => ResyncCause::Connection,
        }
    }
}

/// The lease table. Connects when it has to, and anew after a failure.
#[derive(Clone)]
pub struct Etcd {
    options: EtcdOptions,
    prefix: Prefix,
    connection: Option<Connection>,
}

impl Etcd {
    /// Checks how etcd is to be reached; asks nothing of it yet.
    ///
    /// # Errors
    /// [`EtcdError::File`] or [`EtcdError::Certificate`].
    pub fn new(options: EtcdOptions) -> Result<Self, EtcdError> {
        // As flannel: certificates are for who is reached by TLS.
        if options.endpoints.iter().any(|endpoint| connect::is_tls(endpoint)) {
            Tls::read(&options)?;
        }
        Ok(Self { prefix: Prefix::new(&options.prefix), options, connection: None })
    }

    /// URLs.
    pub fn endpoints(&self) -> &[String] {
        &self.options.endpoints
    }

    /// Makes the next call on a fresh connection: one from an address that this host no longer has hangs.
    pub fn disconnect(&mut self) {
        self.connection = None;
    }

    /// A call that needs the leases failed: the next one is made on a fresh connection.
    fn failed(&mut self, call: &'static str, error: &etcd_client::Error) -> EtcdError {
        self.refused(call, Permission::WriteLeases, error)
    }

    /// The same for a call that needs a certain permission.
    fn refused(&mut self, call: &'static str, permission: Permission, error: &etcd_client::Error) -> EtcdError {
        let kind = connect::kind(error).unwrap_or(ResyncCause::Connection);
        let tls = self.connection.as_ref().and_then(|connection| connection.tls.as_ref());
        let (config_key, leases_key) = (self.config_key(), self.leases_key());
        let asked = Asked {
            config_key: &config_key,
            leases_key: &leases_key,
            permission,
            user: self.options.user.as_ref().map(|(user, _)| user.as_str()),
            identity: tls.and_then(|tls| tls.identity.as_ref()),
        };
        let error = explain::inner(error);
        let cause = explain::explain(error, &asked).unwrap_or_else(|| explain::broken(error, tls.is_some()));
        self.ended(call, kind, cause.to_string())
    }

    fn ended(&mut self, call: &'static str, kind: ResyncCause, cause: String) -> EtcdError {
        let endpoint = self.connection.take().map(|connection| connection.endpoint);
        let endpoints = endpoint.unwrap_or_else(|| self.options.endpoints.join(","));
        EtcdError::Call { call, endpoints, kind, cause }
    }

    /// A name for the path that config and leases are under; for the same keys it is the same.
    pub fn prefix(&self) -> &str {
        self.prefix.identity()
    }

    /// The key of the network configuration.
    pub fn config_key(&self) -> String {
        self.prefix.key("config")
    }

    /// Config and leases at one revision.
    ///
    /// # Errors
    /// [`EtcdError::Call`].
    pub async fn snapshot(&mut self) -> Result<Snapshot, EtcdError> {
        self.table().await.map(Into::into)
    }

    /// Config and leases at one revision. Reads what flannel reads, and nothing else below the prefix: a role may be
    /// confined to that.
    ///
    /// # Errors
    /// [`EtcdError::Call`].
    async fn table(&mut self) -> Result<Table, EtcdError> {
        let mut kv = self.client().await?.kv_client().max_decoding_message_size(MAX_ANSWER);
        let reads =
            [TxnOp::get(self.config_key(), None), TxnOp::get(self.leases_key(), Some(GetOptions::new().with_prefix()))];
        let response = match kv.txn(Txn::new().and_then(reads)).await {
            Ok(response) => response,
            Err(error) => {
                // Of a transaction, etcd does not say which part it refuses.
                let config = kv.get(self.config_key(), Some(GetOptions::new().with_count_only())).await;
                let permission = if config.is_ok() { Permission::WriteLeases } else { Permission::ReadConfig };
                return Err(self.refused("list the leases", permission, &error));
            }
        };
        let (revision, cluster_id) =
            response.header().map_or((0, 0), |header| (header.revision(), header.cluster_id()));
        let mut table = Table { revision, cluster_id, ..Table::default() };
        for answer in response.op_responses() {
            let TxnOpResponse::Get(answer) = answer else { continue };
            for kv in answer.kvs() {
                match self.read(kv) {
                    Read::Config(value) => table.config = Some(value),
                    Read::Lease(lease) => table.leases.push(lease),
                    Read::PassedOver(passed_over) => table.passed_over.push(passed_over),
                    Read::Foreign => {}
                }
            }
        }
        Ok(table)
    }

    /// Reads and checks the network configuration.
    ///
    /// # Errors
    /// [`EtcdError::NoConfig`], [`EtcdError::Config`] or [`EtcdError::Call`].
    pub async fn network_config(&mut self) -> Result<(NetworkConfig, Vec<u8>), EtcdError> {
        let response = self.client().await?.get(self.config_key(), None).await;
        let response = response.map_err(|error| self.refused("read the config", Permission::ReadConfig, &error))?;
        let value = response.kvs().first().map(|kv| kv.value().to_vec());
        let value = value.ok_or_else(|| EtcdError::NoConfig(self.config_key()))?;
        Ok((self.parse_config(&value)?, value))
    }

    /// Checks the network configuration.
    ///
    /// # Errors
    /// [`EtcdError::Config`].
    pub fn parse_config(&self, value: &[u8]) -> Result<NetworkConfig, EtcdError> {
        NetworkConfig::parse(&String::from_utf8_lossy(value))
            .map_err(|source| EtcdError::Config { key: self.config_key(), source: Box::new(source) })
    }

    /// What the leases' keys begin with.
    fn leases_key(&self) -> String {
        self.prefix.key("subnets/")
    }

    fn lease_key(&self, key: &LeaseKey) -> String {
        self.prefix.key(&format!("subnets/{key}"))
    }

    /// What a key and its value are.
    fn read(&self, kv: &KeyValue) -> Read {
        let key = String::from_utf8_lossy(kv.key());
        let Some(name) = self.prefix.name_of(&key) else { return Read::Foreign };
        if name == "config" {
            return Read::Config(kv.value().to_vec());
        }
        let Some(name) = name.strip_prefix("subnets/") else { return Read::Foreign };
        let passed_over = |key: Option<LeaseKey>, reason: String| {
            let grant = Some(Grant::EtcdLease(kv.lease()));
            Read::PassedOver(PassedOver { grant, ..PassedOver::new(name.to_owned(), key, reason) })
        };
        let key: LeaseKey = match name.parse() {
            Ok(key) => key,
            Err(error) => return passed_over(None, error.to_string()),
        };
        match LeaseAttributes::from_json(kv.value()) {
            Ok(attributes) => Read::Lease(Stored {
                key,
                attributes,
                value: kv.value().to_vec(),
                etcd_lease: kv.lease(),
                create_revision: kv.create_revision(),
                mod_revision: kv.mod_revision(),
                version: kv.version(),
            }),
            Err(error) => passed_over(Some(key), error.to_string()),
        }
    }
}

/// One lease as etcd has it.
#[derive(Clone, Debug)]
struct Stored {
    key: LeaseKey,
    attributes: LeaseAttributes,
    /// The value's bytes.
    value: Vec<u8>,
    /// The etcd lease that the key goes with; 0 for a key that stays, a reservation.
    etcd_lease: i64,
    /// The revision in which the key was created; two keys of one name differ in it.
    create_revision: i64,
    /// The revision in which it was last written.
    mod_revision: i64,
    /// How often it was written since it was created.
    version: i64,
}

impl From<Stored> for Entry {
    fn from(Stored { key, attributes, etcd_lease, version, .. }: Stored) -> Self {
        Self { key, name: key.to_string(), attributes, grant: Grant::EtcdLease(etcd_lease), version, remark: None }
    }
}

/// What is below the prefix at one revision.
#[derive(Default)]
struct Table {
    config: Option<Vec<u8>>,
    leases: Vec<Stored>,
    passed_over: Vec<PassedOver>,
    revision: i64,
    cluster_id: u64,
}

impl From<Table> for Snapshot {
    fn from(Table { config, leases, passed_over, revision, cluster_id }: Table) -> Self {
        let entries = leases.into_iter().map(Into::into).collect();
        Self { config, entries, passed_over, revision, store_id: format!("{cluster_id:x}") }
    }
}

impl Grant {
    /// The etcd lease; 0 for a reservation.
    const fn etcd_lease(&self) -> i64 {
        match self {
            Self::EtcdLease(lease) => *lease,
            // Of no lease that was taken from etcd.
            Self::NodeUid(_) => 0,
        }
    }
}

/// A key below the prefix.
enum Read {
    Config(Vec<u8>),
    Lease(Stored),
    PassedOver(PassedOver),
    /// Somebody else's.
    Foreign,
}
