//! What is known before anything is touched: network config, lease and lease table, from the store. Where that is away
//! or says nothing that can be used, from this host's last run.

use std::{collections::BTreeMap, net::Ipv4Addr};

use ipnet::Ipv4Net;
use tracing::{info, warn};

use super::DaemonError;
use crate::{
    cli::Cli,
    config::NetworkConfig,
    device::{Netlink, external::External, vxlan::VxlanDevice},
    last_known::LastKnown,
    lease::{MacAddress, Peer},
    registry::{
        LeaseRequest, OwnLease, Snapshot,
        etcd::{Registry, RegistryError},
    },
    retry, subnet_env,
};

/// What the datapath is made from.
pub(super) struct Prepared {
    pub(super) registry: Registry,
    pub(super) network: NetworkConfig,
    /// As the store has it.
    pub(super) config: Vec<u8>,
    pub(super) external: External,
    pub(super) device: VxlanDevice,
    pub(super) request: LeaseRequest,
    pub(super) lease: OwnLease,
    /// The peers of the last run.
    pub(super) known: BTreeMap<Ipv4Net, Peer>,
    /// The lease table as it was right after the lease was taken; [`None`] where the store is away.
    pub(super) snapshot: Option<Snapshot>,
}

/// Waits for network config and lease. Touches nothing on the host.
pub(super) async fn prepare(cli: &Cli, netlink: &Netlink) -> Result<Prepared, DaemonError> {
    // Looked for first: it needs no store, and a wrong flag should be known at once.
    let external = netlink.external_interface(&cli.selection()).await?;
    info!(
        "external interface {} with address {}, published as {}",
        external.link.name, external.address, external.public_ip
    );
    let mut registry = Registry::new(cli.etcd())?;
    let known = last_known(cli, &registry, external.public_ip);

    // Trying again can wait where there is something to go on with.
    let is_final = |error: &RegistryError| error.is_final() || known.is_some() && error.is_away();
    let from_store = async {
        let (network, config) = retry::until_ok(async || registry.network_config().await, is_final).await?;
        let device = VxlanDevice::new(&network.backend, &external);
        let request = LeaseRequest {
            public_ip: external.public_ip,
            vtep_mac: netlink.vxlan_mac(&device).await?.map(MacAddress),
            previous: subnet_env::previous_subnet(&cli.subnet_file()),
            vni: network.backend.vni,
            ttl: cli.lease_ttl(),
        };
        let lease = retry::until_ok(async || registry.acquire(&network, &request).await, is_final).await?;
        let snapshot = retry::until_ok(async || registry.snapshot().await, is_final).await?;
        info!("lease {} of {}", lease.key.subnet, network.network);
        Ok((network, config, device, request, lease, snapshot))
    };
    let outcome: Result<_, DaemonError> = from_store.await;
    match (outcome, known) {
        (Ok((network, config, device, request, lease, snapshot)), known) => {
            let known = known.filter(|(_, before)| before.network == network.network);
            let known = known.map(|(known, _)| known.peers).unwrap_or_default();
            if network.backend.direct_routing {
                warn!("DirectRouting is not used: packets to peers on the same link are encapsulated too");
            }
            let snapshot = Some(snapshot);
            Ok(Prepared { registry, network, config, external, device, request, lease, known, snapshot })
        }
        (Err(DaemonError::Registry(error)), Some((known, network))) if error.is_away() => {
            let LastKnown { config, lease, peers, .. } = known;
            warn!("{error}; going on with the lease {} and {} peers that were last known", lease.key, peers.len());
            let device = VxlanDevice::new(&network.backend, &external);
            let request = LeaseRequest {
                public_ip: external.public_ip,
                vtep_mac: Some(lease.vtep_mac),
                previous: Some(lease.key.subnet),
                vni: network.backend.vni,
                ttl: cli.lease_ttl(),
            };
            let config = config.into_bytes();
            let (known, snapshot) = (peers, None);
            Ok(Prepared { registry, network, config, external, device, request, lease, known, snapshot })
        }
        (Err(error), _) => Err(error),
    }
}

/// What this host's last agent knew, where it can still be used.
fn last_known(cli: &Cli, registry: &Registry, public_ip: Ipv4Addr) -> Option<(LastKnown, NetworkConfig)> {
    let known = LastKnown::find(&cli.run_dir, registry.prefix(), public_ip)?;
    match registry.parse_config(known.config.as_bytes()) {
        Ok(network) => Some((known, network)),
        Err(error) => {
            warn!("what was last known is passed over: {error}");
            None
        }
    }
}
