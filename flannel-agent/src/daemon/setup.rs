//! Making the datapath for a lease, and all that keeps it.

use std::fmt::Display;

use flannel_common::maps::Config;
use tokio::sync::mpsc;
use tracing::warn;

use super::{
    DaemonError,
    agent::Agent,
    datapath::Datapath,
    leases::{self, Leases},
    reconcile,
    report::{self, Reporter},
    start::Prepared,
};
use crate::{
    backend::{has_datapath, is_in_user_space},
    bypass::BypassFlag,
    cleanup,
    cli::Cli,
    config::BackendType,
    dataplane::{Features, PinDirectory, PinnedPeers},
    device::{DeviceEvent, Netlink},
    evidence::{self, Evidence},
    health::Health,
    histogram::Histogram,
    registry::ResyncCause,
    status::{LeaseState, LeaseStatus},
};

/// Makes everything. Where that fails half-way, what was not there before is taken away again.
pub(super) async fn set_up<'a>(
    cli: &'a Cli,
    netlink: Netlink,
    device_events: mpsc::Receiver<DeviceEvent>,
    prepared: Prepared,
    features: Features,
    health: &Health,
) -> Result<Agent<'a>, DaemonError> {
    let (vni, backend) = (prepared.backend.vni(), prepared.backend.kind());
    let had_pins = PinDirectory::new(&cli.bpf_pin_dir, vni).exists();
    if is_in_user_space(backend) {
        let had_tun = netlink.tun_of(vni).await?.is_some();
        let result = make(cli, netlink.clone(), device_events, prepared, features, health).await;
        // Before there is a tunnel, nothing else is touched.
        if result.is_err() && !had_tun && netlink.tun_of(vni).await?.is_some() {
            say_what_stays(netlink.remove_tun(vni).await);
            if !had_pins {
                say_what_stays(cleanup::undo(cli, &netlink, vni, true, false).await);
            }
        }
        return result;
    }
    if !has_datapath(backend) {
        return make(cli, netlink, device_events, prepared, features, health).await;
    }
    let had_device = match prepared.backend.own_device_name() {
        Some(name) => netlink.link_by_name(name).await?.is_some(),
        None => true,
    };
    let result = make(cli, netlink.clone(), device_events, prepared, features, health).await;
    if result.is_err() {
        say_what_stays(cleanup::undo(cli, &netlink, vni, !had_pins, !had_device).await);
    }
    result
}

fn say_what_stays<E: Display>(undone: Result<(), E>) {
    if let Err(error) = undone {
        warn!("what was made before the failure could not be removed: {error}");
    }
}

async fn make<'a>(
    cli: &'a Cli,
    netlink: Netlink,
    device_events: mpsc::Receiver<DeviceEvent>,
    prepared: Prepared,
    features: Features,
    health: &Health,
) -> Result<Agent<'a>, DaemonError> {
    let Prepared {
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
        lock: _,
    } = prepared;
    let (vni, attributes) = (backend.vni(), backend.attributes());
    let lease_state = if snapshot.is_some() { LeaseState::Held } else { LeaseState::LastKnown };
    let own = LeaseStatus::new(lease.key.subnet, lease.vtep_mac, lease_state);
    let first = report::status(registry.kind(), &network, &external, &backend, own);
    let beginning = reconcile::Beginning {
        netlink,
        device_events,
        features,
        network: network.clone(),
        lease: lease.clone(),
        selection,
        external: external.clone(),
        backend,
        registry: &registry,
    };
    let peers = PinnedPeers {
        pins: PinDirectory::new(&cli.bpf_pin_dir, vni),
        network: network.network,
        subnet_len: lease.key.subnet.prefix_len(),
        is_direct: beginning.backend.flags() & Config::DIRECT != 0,
        has_tunnel: beginning.backend.kind() == BackendType::Vxlan,
    };
    let source = has_datapath(beginning.backend.kind())
        .then(|| evidence::Source { peers, sees_pods: cli.bypass != BypassFlag::Off });
    let datapath = Datapath::new(cli, beginning).await?;
    let evidence = Evidence::new(source);
    let reporter = Reporter::new(cli.run_dir.clone(), vni, first, health.clone());
    let beginning = leases::Beginning {
        registry,
        host,
        network,
        attributes,
        config,
        public_ip: external.public_ip,
        lease,
        lease_state,
        known,
        grace: cli.guard_grace(),
    };
    let leases = Leases::new(beginning, health.clone());
    let mut agent = Agent { leases, datapath, reporter, evidence, convergence: Histogram::default() };
    if let Some(snapshot) = snapshot {
        agent.leases.take_peers(&snapshot, false);
    }
    let link = agent.datapath.make(agent.leases.table()).await?;
    agent.leases.watch(ResyncCause::Start);
    // First: the CNI plugin takes a subnet.env without a status beside it for another daemon's.
    agent.leases.refresh();
    agent.write_record();
    agent.datapath.write_subnet_env()?;
    // Last: until here a host of flannel's could go on as it was.
    agent.datapath.sweep(&link, agent.leases.table()).await;
    agent.datapath.say_carried(&link);
    agent.leases.keep_lease(request, cli.renew_interval()?);
    Ok(agent)
}
