//! Making the datapath for a lease.

use std::{collections::BTreeSet, sync::Arc};

use flannel_common::maps::Config;
use tokio::sync::{Notify, mpsc, watch};
use tracing::{info, warn};

use super::{
    DaemonError,
    agent::Agent,
    endings::{Endings, follow_links, watch_links},
    inspection::Inspected,
    record::Record,
    renewal::LeaseHolder,
    restrictions::{Observer, Restrictions},
    routes::RouteState,
    start::Prepared,
};
use crate::{
    cleanup,
    cli::Cli,
    config::NetworkConfig,
    conntrack::{Liberal, helpers},
    control,
    dataplane::{Capacity, Dataplane, Features, PinDirectory},
    device::{self, Changed, Netlink, external::External, offload::Offloads, vxlan::VxlanDevice},
    health::Health,
    lease::LeaseTable,
    netfilter::keeper::Keeper,
    registry::{Announced, OwnLease, ResyncCause},
    status::LeaseState,
    underlay::{Endpoint, Underlay},
    xdp,
};

/// Makes everything. Where that fails half-way, what was not there before is taken away again.
pub(super) async fn set_up<'a>(
    cli: &'a Cli,
    netlink: Netlink,
    prepared: Prepared,
    features: Features,
    health: &Health,
) -> Result<Agent<'a>, DaemonError> {
    let vni = prepared.network.backend.vni;
    let had_pins = PinDirectory::new(&cli.bpf_pin_dir, vni).exists();
    let had_device = netlink.link_by_name(&prepared.device.name).await?.is_some();
    let result = make(cli, netlink.clone(), prepared, features, health).await;
    if result.is_err() {
        let undone = cleanup::undo(cli, &netlink, vni, !had_pins, !had_device).await;
        if let Err(error) = undone {
            warn!("what was made before the failure could not be removed: {error}");
        }
    }
    result
}

async fn make<'a>(
    cli: &'a Cli,
    netlink: Netlink,
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
        device,
        request,
        lease,
        known,
        snapshot,
        lock: _,
    } = prepared;
    let endpoint = Endpoint {
        external: external.clone(),
        port: device.port,
        source_ports: device::local_ports(),
        vni: device.vni,
        vtep_mac: lease.vtep_mac,
        overlay: 0,
    };
    let dataplane = load(cli, &network, &external, &device, &lease)?;
    let xdp = xdp::choose(cli.xdp, &external.link, &Offloads::of(&external.link).await);
    let (renewal_sender, renewal) = mpsc::channel(8);
    let doubt = Arc::new(Notify::new());
    let (public_ip, followed_ip) = watch::channel(external.public_ip);
    let (unnamed, followed_unnamed) = watch::channel(BTreeSet::new());
    // Pods do not hang on what an operator may ask.
    let requests = control::listen(&control::path(&cli.run_dir, request.vni)).unwrap_or_else(|error| {
        warn!("no requests can be taken: {error}");
        mpsc::channel(1).1
    });
    let lease_state = if snapshot.is_some() { LeaseState::Held } else { LeaseState::LastKnown };
    let mut agent = Agent {
        cli,
        netlink,
        dataplane,
        conntrack: Liberal::new(&cli.run_dir),
        endings: Endings::default(),
        public_ip,
        has_external: true,
        is_rebuild_due: false,
        other_since: None,
        is_subnet_env_incomplete: false,
        rules: Keeper::new(cli.packet_rules.resync()),
        routes: RouteState::new(cli, &registry, &network),
        underlay: Underlay::new(endpoint),
        announced: Announced::new(&known),
        table: LeaseTable::new(known, cli.guard_grace()),
        record: Record::new(cli, &registry, host, &network, config, &external, &device, &lease, lease_state),
        restrictions: Restrictions::new(cli.bypass, features.tcx),
        inspected: Inspected::default(),
        xdp,
        network,
        selection,
        external,
        device,
        own: lease.clone(),
        moving_to: None,
        registry: registry.clone(),
        updates: mpsc::channel(1).1,
        renewal,
        asked: None,
        unnamed,
        doubt: Arc::clone(&doubt),
        requests,
        health: health.clone(),
    };
    agent.record.features(features);
    // Peers before programs: none that is attached may meet empty maps.
    if let Some(snapshot) = snapshot {
        agent.take_peers(&snapshot, false);
    }
    agent.read_routes().await?;
    agent.compare(Changed::Topology).await?;
    // Before programs: none passes by who looks already.
    if let Some(link) = agent.netlink.link_by_name(&agent.device.name).await? {
        agent.underlay.set_overlay(link.header.index);
    }
    let pods = agent.look_at_links().await?;
    agent.inspect_for_pods(&pods);
    agent.inspect_for_peers();
    agent.wait_for_inspection().await;

    device::enable_forwarding()?;
    agent.ensure_conntrack();
    agent.observed(Observer::Helpers, helpers::restrictions().into_iter().collect());
    watch_links(&agent.dataplane.forgetter());
    tokio::spawn(follow_links(agent.netlink.links_that_go(), agent.dataplane.forgetter()));
    let (link, _made) = agent.ensure_datapath().await?;
    if let Err(error) = agent.dataplane.discard_other_versions() {
        warn!("{error}");
    }
    agent.netlink.remove_flannels_blackhole(agent.own.key.subnet).await?;
    agent.set_rules().await;
    agent.watch(ResyncCause::Start);
    // First: the CNI plugin takes a subnet.env without a status beside it for another daemon's.
    agent.refresh();
    agent.write_record();
    agent.write_subnet_env()?;
    // Last: until here a host of flannel's could go on as it was.
    agent.sweep(&link).await;
    info!("{} carries {} to {} peers", link.name, agent.own.key.subnet, agent.dataplane.peers.len());

    let renew_interval = registry.renew_interval(cli.renew_interval()?);
    let network = agent.network.clone();
    let heartbeat = health.heartbeat("lease");
    let (public_ip, unnamed) = (followed_ip, followed_unnamed);
    let events = renewal_sender;
    let holder =
        LeaseHolder { registry, request, lease, public_ip, unnamed, network, renew_interval, doubt, events, heartbeat };
    tokio::spawn(holder.keep(lease_state == LeaseState::Held));
    Ok(agent)
}

/// Loads the programs for a lease.
pub(super) fn load(
    cli: &Cli,
    network: &NetworkConfig,
    external: &External,
    device: &VxlanDevice,
    lease: &OwnLease,
) -> Result<Dataplane, DaemonError> {
    let subnet = lease.key.subnet;
    // Those of others have it too, but for a few.
    let subnet_len = subnet.prefix_len();
    let capacity = Capacity::of(network.network, subnet_len);
    let config = Config {
        bypass_time: cli.bypass_time().as_nanos() as u64,
        network: network.network.network().to_bits(),
        slot_shift: 32 - u32::from(subnet_len),
        slots: capacity.slots,
        subnet: subnet.network().to_bits(),
        subnet_mask: subnet.netmask().to_bits(),
        vtep_address: external.address.to_bits(),
        vni: device.vni.get(),
        mtu: device.mtu,
        underlay_header_len: if external.link.mac.is_some() { 14 } else { 0 },
        underlay_mac: external.link.mac.unwrap_or_default(),
        port: device.port,
        vtep_mac: lease.vtep_mac.0,
        source_ports: device::local_ports(),
        flags: 0,
    };
    let pins = PinDirectory::new(&cli.bpf_pin_dir, device.vni);
    let mut dataplane = Dataplane::load(pins, &config, capacity, cli.bpf_log_level)?;
    dataplane.accept(&cli.accept_source)?;
    Ok(dataplane)
}
