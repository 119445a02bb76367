//! The lease table in etcd, in flannel's keys and values (flannel: pkg/subnet/etcd).
//!
//! Unlike flannel's, a renewal is a keep-alive of the same etcd lease, which is no event to anybody, and every write
//! is a transaction on the key's being what was read.

mod tenancy;
mod watch;

use std::{fs, io, path::PathBuf, time::Duration};

use etcd_client::{Certificate, Client, ConnectOptions, GetOptions, Identity, KeyValue, TlsOptions};
use futures_util::future::select_ok;

use super::{Entry, PassedOver, ResyncCause, Snapshot};
use crate::{
    config::{ConfigError, NetworkConfig},
    lease::{LeaseAttributes, LeaseKey},
};

/// For how long one request may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a connection with a watch on it is tested, and how long that may take. Idle ones are not: etcd takes that
/// for abuse and closes them.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));
/// How large an answer may be. The client's own limit of 4 MiB is less than three values of the size that etcd takes,
/// which would keep the whole table from every host.
const MAX_ANSWER: usize = 1 << 30;

/// How etcd is reached.
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    /// URLs.
    pub endpoints: Vec<String>,
    /// The path that config and leases are under.
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
pub enum RegistryError {
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
    /// Certificates for connections that have none.
    #[error("TLS files are given, but no endpoint is https://; change --etcd-endpoints, or drop the files")]
    PlainEndpoints,
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
        source: ConfigError,
    },
    /// Another host has this one's address, and lives.
    #[error(
        "another living host, with the MAC {vtep_mac}, has this host's address {public_ip} and the lease {subnet}: a machine \
         that was cloned, a --public-ip that is given twice, or one address behind NAT. Give each host an address of its \
         own with --public-ip or --iface; this one waits until the other is gone"
    )]
    Contested {
        /// The address.
        public_ip: std::net::Ipv4Addr,
        /// The lease that names it.
        subnet: ipnet::Ipv4Net,
        /// The MAC that the other announces.
        vtep_mac: crate::lease::MacAddress,
    },
    /// No free subnet.
    #[error("out of subnets: {0} has none free; wait for a lease to end, or widen SubnetMin to SubnetMax")]
    OutOfSubnets(ipnet::Ipv4Net),
    /// Others were faster every time.
    #[error("max retries reached trying to acquire a subnet")]
    LostRaces,
}

impl RegistryError {
    /// Whether trying again can't help.
    pub const fn is_final(&self) -> bool {
        matches!(self, Self::File { .. } | Self::PlainEndpoints)
    }

    /// Whether the store did not answer, or has no config that can be used: what was known before still counts then.
    pub const fn is_away(&self) -> bool {
        matches!(self, Self::Call { .. } | Self::NoConfig(_) | Self::Config { .. })
    }

    const fn resync_cause(&self) -> ResyncCause {
        match self {
            Self::Call { kind, .. } => *kind,
            _ => ResyncCause::Connection,
        }
    }
}

/// The lease table. Connects when it has to, and anew after a failure, to whichever endpoint answers first: a client
/// that balances over all of them fails a call whenever it picks one that is dead.
#[derive(Clone)]
pub struct Registry {
    options: EtcdOptions,
    prefix: String,
    client: Option<Client>,
}

impl Registry {
    /// Checks how etcd is to be reached; asks nothing of it yet.
    ///
    /// # Errors
    /// [`RegistryError::File`] or [`RegistryError::PlainEndpoints`].
    pub fn new(options: EtcdOptions) -> Result<Self, RegistryError> {
        tls_options(&options)?;
        Ok(Self { prefix: normalise(&options.prefix), options, client: None })
    }

    async fn client(&mut self) -> Result<Client, RegistryError> {
        if let Some(client) = &self.client {
            return Ok(client.clone());
        }
        let mut connect = ConnectOptions::new()
            .with_connect_timeout(REQUEST_TIMEOUT)
            .with_timeout(REQUEST_TIMEOUT)
            .with_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        // Read anew each time: certificates are renewed.
        let tls = tls_options(&self.options)?.unwrap_or_default();
        if let Some((name, password)) = &self.options.user {
            connect = connect.with_user(name, password);
        }
        let key = self.config_key();
        let attempts = self.options.endpoints.iter().map(|endpoint| {
            let (key, connect, tls) = (key.as_str(), connect.clone(), tls.clone());
            Box::pin(async move {
                // Per endpoint: the client refuses TLS options for one in clear text.
                let connect = if endpoint.starts_with("https://") { connect.with_tls(tls) } else { connect };
                let mut client = Client::connect([endpoint], Some(connect)).await?;
                // Without user and password, connecting asks nothing of the server.
                client.get(key, Some(GetOptions::new().with_count_only())).await?;
                Ok(client)
            })
        });
        let first = select_ok(attempts).await.map(|(client, _slower)| client);
        let client = first.map_err(|error| self.failed("connect", &error))?;
        self.client = Some(client.clone());
        Ok(client)
    }

    /// Makes the next call on a fresh connection: one from an address that this host no longer has hangs.
    pub fn disconnect(&mut self) {
        self.client = None;
    }

    /// A call failed: the next one is made on a fresh connection.
    fn failed(&mut self, call: &'static str, error: &etcd_client::Error) -> RegistryError {
        let cause = explain(error);
        let kind = ResyncCause::of_message(&cause).unwrap_or(ResyncCause::Connection);
        self.ended(call, kind, cause)
    }

    fn ended(&mut self, call: &'static str, kind: ResyncCause, cause: String) -> RegistryError {
        self.client = None;
        RegistryError::Call { call, endpoints: self.options.endpoints.join(","), kind, cause }
    }

    /// The path that config and leases are under.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The key of the network configuration.
    pub fn config_key(&self) -> String {
        format!("{}/config", self.prefix)
    }

    /// Everything below the prefix in one read: config and leases.
    ///
    /// # Errors
    /// [`RegistryError::Call`].
    pub async fn snapshot(&mut self) -> Result<Snapshot, RegistryError> {
        let mut kv = self.client().await?.kv_client().max_decoding_message_size(MAX_ANSWER);
        let response = kv.get(format!("{}/", self.prefix), Some(GetOptions::new().with_prefix())).await;
        let response = response.map_err(|error| self.failed("list the leases", &error))?;
        let (revision, cluster_id) =
            response.header().map_or((0, 0), |header| (header.revision(), header.cluster_id()));
        let mut snapshot = Snapshot { revision, cluster_id, ..Snapshot::default() };
        for kv in response.kvs() {
            match self.read(kv) {
                Read::Config(value) => snapshot.config = Some(value),
                Read::Lease(entry) => snapshot.entries.push(entry),
                Read::PassedOver(passed_over) => snapshot.passed_over.push(passed_over),
                Read::Foreign => {}
            }
        }
        Ok(snapshot)
    }

    /// Reads and checks the network configuration.
    ///
    /// # Errors
    /// [`RegistryError::NoConfig`], [`RegistryError::Config`] or [`RegistryError::Call`].
    pub async fn network_config(&mut self) -> Result<(NetworkConfig, Vec<u8>), RegistryError> {
        let response = self.client().await?.get(self.config_key(), None).await;
        let response = response.map_err(|error| self.failed("read the config", &error))?;
        let value = response.kvs().first().map(|kv| kv.value().to_vec());
        let value = value.ok_or_else(|| RegistryError::NoConfig(self.config_key()))?;
        Ok((self.parse_config(&value)?, value))
    }

    /// Checks the network configuration.
    ///
    /// # Errors
    /// [`RegistryError::Config`].
    pub fn parse_config(&self, value: &[u8]) -> Result<NetworkConfig, RegistryError> {
        NetworkConfig::parse(&String::from_utf8_lossy(value))
            .map_err(|source| RegistryError::Config { key: self.config_key(), source })
    }

    fn lease_key(&self, key: &LeaseKey) -> String {
        format!("{}/subnets/{key}", self.prefix)
    }

    /// What a key and its value are.
    fn read(&self, kv: &KeyValue) -> Read {
        let key = String::from_utf8_lossy(kv.key());
        let Some(name) = key.strip_prefix(&self.prefix).and_then(|rest| rest.strip_prefix('/')) else {
            return Read::Foreign;
        };
        if name == "config" {
            return Read::Config(kv.value().to_vec());
        }
        let Some(name) = name.strip_prefix("subnets/") else { return Read::Foreign };
        let passed_over =
            |key: Option<LeaseKey>, reason: String| Read::PassedOver(PassedOver { name: name.to_owned(), key, reason });
        let key: LeaseKey = match name.parse() {
            Ok(key) => key,
            Err(error) => return passed_over(None, error.to_string()),
        };
        match LeaseAttributes::from_json(kv.value()) {
            Ok(attributes) => Read::Lease(Entry {
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

/// A key below the prefix.
enum Read {
    Config(Vec<u8>),
    Lease(Entry),
    PassedOver(PassedOver),
    /// Somebody else's.
    Foreign,
}

fn tls_options(options: &EtcdOptions) -> Result<Option<TlsOptions>, RegistryError> {
    let read = |path: &PathBuf| fs::read(path).map_err(|source| RegistryError::File { path: path.clone(), source });
    let mut tls = TlsOptions::new();
    match &options.ca_file {
        Some(path) => tls = tls.ca_certificate(Certificate::from_pem(read(path)?)),
        None => tls = tls.with_native_roots(),
    }
    if let Some((certificate, key)) = &options.identity {
        tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
    }
    let is_tls = |endpoint: &String| endpoint.starts_with("https://");
    match (options.endpoints.iter().any(is_tls), options.ca_file.is_some() || options.identity.is_some()) {
        (true, _) => Ok(Some(tls)),
        (false, false) => Ok(None),
        // flannel would go on in clear text.
        (false, true) => Err(RegistryError::PlainEndpoints),
    }
}

/// The prefix as Go's `path.Join` leaves it: one slash between parts, none at the end.
fn normalise(prefix: &str) -> String {
    prefix.split('/').filter(|part| !part.is_empty()).fold(String::new(), |path, part| path + "/" + part)
}

/// The cause in one line, with what may mend it.
fn explain(error: &etcd_client::Error) -> String {
    let mut causes = vec![match error {
        etcd_client::Error::GRpcStatus(status) => status.message().to_owned(),
        other => other.to_string(),
    }];
    let mut source = match error {
        etcd_client::Error::GRpcStatus(status) => std::error::Error::source(status),
        etcd_client::Error::TransportError(error) => std::error::Error::source(error),
        _ => None,
    };
    while let Some(cause) = source {
        causes.push(cause.to_string());
        source = cause.source();
    }
    causes.dedup();
    let cause = causes.join(": ");
    let hint = hint(&cause);
    cause + hint
}

/// What may mend a cause.
fn hint(cause: &str) -> &'static str {
    match cause.to_lowercase() {
        text if text.contains("certificate") || text.contains("tls") || text.contains("corrupt message") => {
            "; check that the endpoint speaks TLS, and --etcd-cafile, --etcd-certfile and --etcd-keyfile"
        }
        text if text.contains("authentication failed") || text.contains("user name is empty") => {
            "; check --etcd-username and --etcd-password"
        }
        text if text.contains("permission denied") => "; give that user the prefix in etcd",
        text if text.contains("space exceeded") => {
            "; etcd is full: compact and defragment it, then `etcdctl alarm disarm`"
        }
        // A server that refuses a certificate may have closed the connection before its reason is read (TLS 1.3).
        text if text.contains("connection closed") || text.contains("broken pipe") || text.contains("reset") => {
            "; check --etcd-endpoints, and that etcd runs; with certificates, check that the endpoint speaks TLS, and \
             --etcd-cafile, --etcd-certfile and --etcd-keyfile"
        }
        text if text.contains("connect") || text.contains("timed out") || text.contains("timeout") => {
            "; check --etcd-endpoints, and that etcd runs"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_is_closed_may_be_for_a_certificate() {
        for cause in ["connect: connection closed", "connect: stream closed because of a broken pipe"] {
            assert!(hint(cause).contains("that etcd runs") && hint(cause).contains("--etcd-cafile"), "{cause}");
        }
        assert!(!hint("connect: tcp connect error: Connection refused").contains("--etcd-cafile"));
        assert!(!hint("received fatal alert: CertificateRequired").contains("that etcd runs"));
    }

    #[test]
    fn prefixes_are_joined_as_go_joins_paths() {
        assert_eq!(normalise("/coreos.com/network"), "/coreos.com/network");
        assert_eq!(normalise("//coreos.com//network/"), "/coreos.com/network");
        assert_eq!(normalise("network"), "/network");
    }
}
