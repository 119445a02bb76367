//! What is known before anything is touched: network config, lease and lease table, from the store. Where that is away
//! or says nothing that can be used, from this host's last run.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use ipnet::Ipv4Net;
use tokio::time::sleep;
use tracing::{info, warn};

use super::{DaemonError, leases::CLAIM_PERIOD, report};
use crate::{
    backend::{Backend, has_datapath},
    cli::Cli,
    config::NetworkConfig,
    device::{
        Netlink,
        external::{External, Selection},
    },
    last_known::LastKnown,
    lease::Peer,
    lock::Lock,
    registry::{Contested, HostAddresses, LeaseRequest, OwnLease, Registry, RegistryError, Snapshot, StoreKind},
    retry,
    status::{self, LeaseState, LeaseStatus},
    subnet_env,
    waiting::Note,
};

/// What the datapath is made from.
pub(super) struct Prepared {
    pub(super) registry: Registry,
    /// What the store says of this host's addresses, ...
    pub(super) host: HostAddresses,
    /// ... and the rule that the external interface was chosen by.
    pub(super) selection: Selection,
    pub(super) network: NetworkConfig,
    /// As the store has it.
    pub(super) config: Vec<u8>,
    pub(super) external: External,
    pub(super) backend: Backend,
    pub(super) request: LeaseRequest,
    pub(super) lease: OwnLease,
    /// The peers of the last run.
    pub(super) known: BTreeMap<Ipv4Net, Peer>,
    /// The lease table as it was right after the lease was taken; [`None`] where the store is away.
    pub(super) snapshot: Option<Snapshot>,
    /// The overlay's lock, where it had to be taken already.
    pub(super) lock: Option<Lock>,
}

/// Waits for network config and lease. Touches nothing on the host.
pub(super) async fn prepare(cli: &Cli, netlink: &Netlink) -> Result<Prepared, DaemonError> {
    let mut registry = Registry::new(cli.store())?;
    let mut note = Note::new(cli.run_dir.clone());
    let host = host_addresses(cli, &mut registry, &mut note).await?;
    let selection = Selection {
        public_ip: host.public_ip.or(cli.selection().public_ip),
        published: host.published,
        ..cli.selection()
    };
    // Before config and lease are asked for: a wrong flag should be known early.
    let external = netlink.external_interface(&selection).await?;
    info!(
        "external interface {} with address {}, published as {}",
        external.link.name, external.address, external.public_ip
    );
    let known = last_known(cli, &registry, external.public_ip);

    // Trying again can wait where there is something to go on with.
    let is_final = |error: &RegistryError| error.is_final() || known.is_some() && error.is_away();
    let from_store = async {
        let (network, config) = wait_for(&mut note, async || registry.network_config().await, is_final).await?;
        let backend = Backend::new(&network.backend, &external)?;
        let request = LeaseRequest {
            public_ip: external.public_ip,
            vtep_mac: backend.device_mac(netlink).await?,
            previous: subnet_env::previous_subnet(&cli.subnet_file()),
            backend: backend.attributes(),
            ttl: cli.lease_ttl(),
            avoid: known.as_ref().map(|(known, _)| known.peers.keys().copied().collect()).unwrap_or_default(),
            is_contested: false,
        };
        let kind = registry.kind();
        let mut waiting =
            WithoutLease { cli, kind, network: &network, external: &external, backend: &backend, lock: None };
        let lease = loop {
            // Not among what is tried again at once: somebody has to do something.
            let attempt = async || match registry.acquire(&network, &request).await {
                Err(RegistryError::Contested(contested)) => Ok(Err(contested)),
                result => result.map(Ok),
            };
            match wait_for(&mut note, attempt, is_final).await? {
                Ok(lease) => break lease,
                Err(contested) => waiting.say(contested)?,
            }
            sleep(CLAIM_PERIOD).await;
        };
        let lock = waiting.lock;
        let snapshot = wait_for(&mut note, async || registry.snapshot().await, is_final).await?;
        info!("lease {} of {}", lease.key.subnet, network.network);
        Ok((network, config, backend, request, lease, snapshot, lock))
    };
    let outcome: Result<_, DaemonError> = from_store.await;
    let (network, config, backend, request, lease, known, snapshot, lock) = match (outcome, known) {
        (Ok((network, config, backend, request, lease, snapshot, lock)), known) => {
            // What peers are known by is their backend's.
            let is_same = |(_, before): &(LastKnown, NetworkConfig)| {
                before.network == network.network && before.backend.kind() == network.backend.kind()
            };
            let known = known.filter(is_same);
            let known = known.map(|(known, _)| known.peers).unwrap_or_default();
            (network, config, backend, request, lease, known, Some(snapshot), lock)
        }
        (Err(DaemonError::Registry(error)), Some((known, network))) if error.is_away() => {
            let LastKnown { config, lease, peers, .. } = known;
            warn!("{error}; going on with the lease {} and {} peers that were last known", lease.key, peers.len());
            let backend = Backend::new(&network.backend, &external)?;
            let request = LeaseRequest {
                public_ip: external.public_ip,
                vtep_mac: Some(lease.vtep_mac),
                previous: Some(lease.key.subnet),
                backend: backend.attributes(),
                ttl: cli.lease_ttl(),
                avoid: BTreeSet::new(),
                is_contested: false,
            };
            (network, config.into_bytes(), backend, request, lease, peers, None, None)
        }
        (Err(error), _) => return Err(error),
    };
    Ok(Prepared {
        registry,
        host,
        selection,
        network,
        config,
        external,
        backend,
        request,
        lease,
        known,
        snapshot,
        lock,
    })
}

/// An agent whose address another living host has, so that it has no lease.
struct WithoutLease<'a> {
    cli: &'a Cli,
    kind: StoreKind,
    network: &'a NetworkConfig,
    external: &'a External,
    backend: &'a Backend,
    /// Held while it waits: by it `status` knows that an agent is running.
    lock: Option<Lock>,
}

impl WithoutLease<'_> {
    /// Says who has the lease, in the log and as this host's status. Nothing else on the host is touched.
    fn say(&mut self, contested: Contested) -> Result<(), DaemonError> {
        let vni = self.backend.vni();
        if self.lock.is_none() {
            self.lock = Some(Lock::take(&self.cli.run_dir, vni)?);
            warn!("{contested}");
        }
        let mut lease = LeaseStatus::new(contested.subnet, contested.vtep_mac, LeaseState::Contested);
        lease.contested = Some(contested.to_string());
        let mut status = report::status(self.kind, self.network, self.external, self.backend, lease);
        status.written = status::now();
        Ok(status.write(&self.cli.run_dir, vni)?)
    }
}

/// Asks until it is told, and has `status` know meanwhile why there is nothing yet.
async fn wait_for<T>(
    note: &mut Note,
    attempt: impl AsyncFnMut() -> Result<T, RegistryError>,
    is_final: impl Fn(&RegistryError) -> bool,
) -> Result<T, RegistryError> {
    let result = retry::until_ok(attempt, is_final, |error| note.say(&error.to_string())).await;
    note.withdraw();
    result
}

/// What the store says of this host's addresses; where it is away, what it said to this host's last agent.
async fn host_addresses(cli: &Cli, registry: &mut Registry, note: &mut Note) -> Result<HostAddresses, RegistryError> {
    let known = LastKnown::find(&cli.run_dir, registry.identity(), |_| true);
    let is_final = |error: &RegistryError| error.is_final() || known.is_some() && error.is_away();
    match (wait_for(note, async || registry.host_addresses().await, is_final).await, &known) {
        (Err(error), Some(known)) if error.is_away() => {
            warn!("{error}; going on with what was last known of this host's addresses");
            Ok(known.host)
        }
        (result, _) => result,
    }
}

/// Whether the store says at once, or where it is away said last, that the network has no datapath. Then the host need not have
/// what programs need.
pub(super) async fn has_no_datapath(cli: &Cli) -> bool {
    let Ok(mut registry) = Registry::new(cli.store()) else { return false };
    let network = match registry.network_config().await {
        Ok((network, _)) => Some(network),
        Err(error) if error.is_away() => {
            let known = LastKnown::find(&cli.run_dir, registry.identity(), |_| true);
            known.and_then(|known| registry.parse_config(known.config.as_bytes()).ok())
        }
        Err(_) => None,
    };
    network.is_some_and(|network| !has_datapath(network.backend.kind()))
}

/// What this host's last agent knew, where it can still be used.
fn last_known(cli: &Cli, registry: &Registry, public_ip: Ipv4Addr) -> Option<(LastKnown, NetworkConfig)> {
    let known = LastKnown::find(&cli.run_dir, registry.identity(), |known| known.public_ip == public_ip)?;
    match registry.parse_config(known.config.as_bytes()) {
        Ok(network) => Some((known, network)),
        Err(error) => {
            warn!("what was last known is passed over: {error}");
            None
        }
    }
}
