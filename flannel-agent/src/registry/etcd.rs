//! The lease table in etcd, in flannel's keys and values (flannel: pkg/subnet/etcd).
//!
//! Unlike flannel's, a renewal is a keep-alive of the same etcd lease, which is no event to anybody, and every write
//! is a transaction on the key's being what was read.

use std::{fs, io, path::PathBuf, time::Duration};

use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, EventType, GetOptions, Identity, KeyValue, PutOptions,
    TlsOptions, Txn, TxnOp, WatchOptions,
};
use futures_util::future::select_ok;
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::{Entry, LeaseRequest, OwnLease, Update};
use crate::{
    config::{ConfigError, NetworkConfig},
    lease::{InvalidKey, InvalidLease, LeaseAttributes, LeaseKey, MacAddress, allocate, is_allocatable},
    retry,
};

/// For how long one request may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a connection with a watch on it is tested, and how long that may take. Idle ones are not: etcd takes that
/// for abuse and closes them.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));
/// How often an acquisition that lost a race begins again before it is given back to the caller's back-off.
const ACQUIRE_TRIES: usize = 10;

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
    #[error("cannot read {path}: {source}; check --etcd-cafile, --etcd-certfile and --etcd-keyfile")]
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
}

/// Why an entry of the store is passed over.
#[derive(Debug, thiserror::Error)]
enum BadEntry {
    #[error(transparent)]
    Key(#[from] InvalidKey),
    #[error(transparent)]
    Value(#[from] InvalidLease),
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

    /// A call failed: the next one is made on a fresh connection.
    fn failed(&mut self, call: &'static str, error: &etcd_client::Error) -> RegistryError {
        self.ended(call, explain(error))
    }

    fn ended(&mut self, call: &'static str, cause: String) -> RegistryError {
        self.client = None;
        RegistryError::Call { call, endpoints: self.options.endpoints.join(","), cause }
    }

    /// The key of the network configuration.
    pub fn config_key(&self) -> String {
        format!("{}/config", self.prefix)
    }

    /// Reads and checks the network configuration.
    ///
    /// # Errors
    /// [`RegistryError::NoConfig`], [`RegistryError::Config`] or [`RegistryError::Call`].
    pub async fn network_config(&mut self) -> Result<NetworkConfig, RegistryError> {
        let key = self.config_key();
        let response = self.client().await?.get(key.as_str(), None).await;
        let response = response.map_err(|error| self.failed("read the config", &error))?;
        let Some(kv) = response.kvs().first() else { return Err(RegistryError::NoConfig(key)) };
        NetworkConfig::parse(&String::from_utf8_lossy(kv.value()))
            .map_err(|source| RegistryError::Config { key, source })
    }

    /// All leases, and the store's revision at which they were read. Entries that are no leases are passed over.
    ///
    /// # Errors
    /// [`RegistryError::Call`].
    pub async fn leases(&mut self) -> Result<(Vec<Entry>, i64), RegistryError> {
        let options = GetOptions::new().with_prefix();
        let response = self.client().await?.get(self.subnets(), Some(options)).await;
        let response = response.map_err(|error| self.failed("list the leases", &error))?;
        let revision = response.header().map_or(0, |header| header.revision());
        let entries = response.kvs().iter().filter_map(|kv| self.usable_entry(kv)).collect();
        Ok((entries, revision))
    }

    /// Takes a lease: this host's own, else the subnet it had before, else a free one, as flannel does.
    ///
    /// # Errors
    /// [`RegistryError::OutOfSubnets`], [`RegistryError::LostRaces`] or [`RegistryError::Call`].
    pub async fn acquire(&mut self, config: &NetworkConfig, request: &LeaseRequest) -> Result<OwnLease, RegistryError> {
        for _ in 0..ACQUIRE_TRIES {
            if let Some(lease) = self.try_acquire(config, request).await? {
                return Ok(lease);
            }
        }
        Err(RegistryError::LostRaces)
    }

    /// Keeps the lease for another term. `false` where etcd no longer has it.
    ///
    /// # Errors
    /// [`RegistryError::Call`].
    pub async fn keep_alive(&mut self, lease: &OwnLease) -> Result<bool, RegistryError> {
        if lease.etcd_lease == 0 {
            return Ok(true);
        }
        match self.client().await?.lease_keep_alive(lease.etcd_lease).await {
            Ok(_) => Ok(true),
            // The client's words for a response with a TTL of zero.
            Err(etcd_client::Error::LeaseKeepAliveError(message)) if message == "lease not found" => Ok(false),
            Err(error) => Err(self.failed("renew the lease", &error)),
        }
    }

    /// Reports the lease table and then every change to it, for ever. Each gap in the changes, whatever its cause,
    /// ends in a fresh snapshot. Returns when nobody receives any more.
    pub async fn watch(mut self, updates: mpsc::Sender<Update>) {
        let mut back_off = retry::BackOff::default();
        loop {
            match self.watch_once(&updates, &mut back_off).await {
                Ok(()) => return,
                Err(error) => {
                    let delay = back_off.delay();
                    warn!("the watch on the leases ended: {error}; a fresh one begins in {delay:?}");
                    tokio::time::sleep(delay).await;
                }
            }
        }
    }

    async fn watch_once(
        &mut self,
        updates: &mpsc::Sender<Update>,
        back_off: &mut retry::BackOff,
    ) -> Result<(), RegistryError> {
        const CALL: &str = "watch the leases";
        let (entries, revision) = self.leases().await?;
        if updates.send(Update::Snapshot(entries)).await.is_err() {
            return Ok(());
        }
        let options = WatchOptions::new().with_prefix().with_start_revision(revision + 1);
        let stream = self.client().await?.watch(self.subnets(), Some(options)).await;
        let mut stream = stream.map_err(|error| self.failed(CALL, &error))?;
        back_off.reset();
        loop {
            let next = tokio::select! {
                next = stream.message() => next,
                () = updates.closed() => return Ok(()),
            };
            let response = match next {
                Ok(Some(response)) if response.canceled() => return Err(self.ended(CALL, cancellation(&response))),
                Ok(Some(response)) => response,
                Ok(None) => return Err(self.ended(CALL, "etcd closed the stream".to_owned())),
                Err(error) => return Err(self.failed(CALL, &error)),
            };
            for event in response.events() {
                let Some(kv) = event.kv() else { continue };
                let update = match event.event_type() {
                    EventType::Put => self.usable_entry(kv).map(Box::new).map(Update::Set),
                    EventType::Delete => self.key_of(kv).ok().map(Update::Removed),
                };
                if let Some(update) = update
                    && updates.send(update).await.is_err()
                {
                    return Ok(());
                }
            }
        }
    }

    /// One attempt. [`None`] where somebody else changed the table meanwhile.
    async fn try_acquire(
        &mut self,
        config: &NetworkConfig,
        request: &LeaseRequest,
    ) -> Result<Option<OwnLease>, RegistryError> {
        let (entries, _) = self.leases().await?;
        let own = entries.iter().find(|entry| entry.attributes.public_ip == request.public_ip);
        if let Some(own) = own {
            if is_allocatable(config, own.key.subnet) && own.key.ipv6_subnet.is_none() {
                return self.adopt(config, request, own).await;
            }
            info!("our lease of {} does not fit the network config any more and is given up", own.key.subnet);
            self.delete(own).await?;
        }
        let taken = || entries.iter().filter(|entry| own.is_none_or(|own| own.key != entry.key)).map(|e| e.key.subnet);
        let is_free = |subnet: &ipnet::Ipv4Net| !taken().any(|lease| lease.contains(subnet) || subnet.contains(&lease));
        let previous = request.previous.filter(|subnet| is_allocatable(config, *subnet)).filter(is_free);
        let subnet = previous
            .or_else(|| allocate(config, taken(), &mut rand::rng()))
            .ok_or(RegistryError::OutOfSubnets(config.network))?;
        self.create(config, request, subnet.into()).await
    }

    /// Goes on with a lease that is this host's already.
    async fn adopt(
        &mut self,
        config: &NetworkConfig,
        request: &LeaseRequest,
        own: &Entry,
    ) -> Result<Option<OwnLease>, RegistryError> {
        // A device that is gone (a reboot) is made again with the MAC that the peers know.
        let announced = own.attributes.vxlan_data().ok().map(|data| data.vtep_mac);
        let vtep_mac = request.vtep_mac.or(announced).unwrap_or_else(|| MacAddress::random(&mut rand::rng()));
        let lease = OwnLease { key: own.key, vtep_mac, etcd_lease: own.etcd_lease };
        if !self.keep_alive(&lease).await? {
            return Ok(None);
        }
        let value = LeaseAttributes::vxlan(request.public_ip, config.backend.vni.get(), vtep_mac).to_json();
        if own.value != value.as_bytes() {
            let key = self.lease_key(&own.key);
            let unchanged = Compare::create_revision(key.as_str(), CompareOp::Equal, own.create_revision);
            if !self.put_if(unchanged, key, value, own.etcd_lease).await? {
                return Ok(None);
            }
        }
        Ok(Some(lease))
    }

    async fn create(
        &mut self,
        config: &NetworkConfig,
        request: &LeaseRequest,
        key: LeaseKey,
    ) -> Result<Option<OwnLease>, RegistryError> {
        let vtep_mac = request.vtep_mac.unwrap_or_else(|| MacAddress::random(&mut rand::rng()));
        let value = LeaseAttributes::vxlan(request.public_ip, config.backend.vni.get(), vtep_mac).to_json();
        let ttl = request.ttl.as_secs() as i64;
        let granted = self.client().await?.lease_grant(ttl, None).await;
        let etcd_lease = granted.map_err(|error| self.failed("grant an etcd lease", &error))?.id();
        let name = self.lease_key(&key);
        let absent = Compare::version(name.as_str(), CompareOp::Equal, 0);
        if self.put_if(absent, name, value, etcd_lease).await? {
            return Ok(Some(OwnLease { key, vtep_mac, etcd_lease }));
        }
        // Nothing hangs on it: it ends by itself.
        if let Err(error) = self.client().await?.lease_revoke(etcd_lease).await {
            warn!("an etcd lease that was not needed stays until it expires: {error}");
        }
        Ok(None)
    }

    async fn put_if(
        &mut self,
        condition: Compare,
        key: String,
        value: String,
        etcd_lease: i64,
    ) -> Result<bool, RegistryError> {
        let options = (etcd_lease != 0).then(|| PutOptions::new().with_lease(etcd_lease));
        let txn = Txn::new().when([condition]).and_then([TxnOp::put(key, value, options)]);
        let response = self.client().await?.txn(txn).await;
        Ok(response.map_err(|error| self.failed("write the lease", &error))?.succeeded())
    }

    async fn delete(&mut self, entry: &Entry) -> Result<(), RegistryError> {
        let key = self.lease_key(&entry.key);
        let unchanged = Compare::create_revision(key.as_str(), CompareOp::Equal, entry.create_revision);
        let txn = Txn::new().when([unchanged]).and_then([TxnOp::delete(key, None)]);
        let response = self.client().await?.txn(txn).await;
        response.map(drop).map_err(|error| self.failed("give up a lease", &error))
    }

    fn subnets(&self) -> String {
        format!("{}/subnets/", self.prefix)
    }

    fn lease_key(&self, key: &LeaseKey) -> String {
        format!("{}{key}", self.subnets())
    }

    fn key_of(&self, kv: &KeyValue) -> Result<LeaseKey, BadEntry> {
        let key = std::str::from_utf8(kv.key()).map_err(|_| InvalidKey)?;
        Ok(key.strip_prefix(&self.subnets()).ok_or(InvalidKey)?.parse()?)
    }

    fn entry(&self, kv: &KeyValue) -> Result<Entry, BadEntry> {
        Ok(Entry {
            key: self.key_of(kv)?,
            attributes: LeaseAttributes::from_json(kv.value())?,
            value: kv.value().to_vec(),
            etcd_lease: kv.lease(),
            create_revision: kv.create_revision(),
        })
    }

    fn usable_entry(&self, kv: &KeyValue) -> Option<Entry> {
        self.entry(kv)
            .inspect_err(|error| warn!("the entry {:?} is passed over: {error}", String::from_utf8_lossy(kv.key())))
            .ok()
    }
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

fn cancellation(response: &etcd_client::WatchResponse) -> String {
    match response.compact_revision() {
        0 => format!("etcd cancelled it: {}", response.cancel_reason()),
        revision => format!("changes before revision {revision} are compacted away"),
    }
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
    let hint = match cause.to_lowercase() {
        text if text.contains("certificate") || text.contains("tls") || text.contains("corrupt message") => {
            "; check that the endpoint speaks TLS, and --etcd-cafile, --etcd-certfile and --etcd-keyfile"
        }
        text if text.contains("authentication failed") || text.contains("user name is empty") => {
            "; check --etcd-username and --etcd-password"
        }
        text if text.contains("permission denied") => "; give that user the prefix in etcd",
        text if text.contains("connect") || text.contains("timed out") || text.contains("timeout") => {
            "; check --etcd-endpoints, and that etcd runs"
        }
        _ => "",
    };
    cause + hint
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_joined_as_go_joins_paths() {
        assert_eq!(normalise("/coreos.com/network"), "/coreos.com/network");
        assert_eq!(normalise("//coreos.com//network/"), "/coreos.com/network");
        assert_eq!(normalise("network"), "/network");
    }
}
