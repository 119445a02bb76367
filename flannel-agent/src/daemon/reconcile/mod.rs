//! What keeps the kernel in step with network config, lease and peers: what there should be, what there is, and repair.
//!
//! * `target` — making the datapath for a lease, and for another one
//! * `uplink` — following the external interface
//! * `datapath` — device, programs, routes, and the programs of pods
//! * `drift` — bringing back in step what somebody else changed
//! * `schedule` — what is due, and when
//! * `endings` — connections and pods that end
//! * `inspection` — which packets others' packet rules are looked through for
//! * `restrictions` — what has to see each packet of this host, and what follows for the bypass
//! * `routes` — which routes lead into the overlay, and keeping them so
//! * `status` — what is told of it
//! * `subnet_file` — `subnet.env`, and what somebody else did to it
//! * `sweep` — what another backend, or a flannel that ran here before, left
//! * `host` — lease, external interface and `subnet.env` where no programs are: what `user_space` and `allocation` share
//! * `user_space` — all of it where the network's packets go through a tunnel in user space
//! * `allocation` — all of it where the network has no datapath

mod allocation;
mod datapath;
mod drift;
mod endings;
mod host;
mod inspection;
mod restrictions;
mod routes;
mod schedule;
mod status;
mod subnet_file;
mod sweep;
mod target;
mod uplink;
mod user_space;

use std::{net::Ipv4Addr, time::Duration};

use ipnet::Ipv4Net;
use tokio::sync::mpsc;
use tracing::{debug, warn};

pub(super) use self::{
    allocation::Allocation,
    drift::LOOK_PERIOD,
    restrictions::WATCH_PERIOD,
    schedule::Due,
    user_space::{TunnelDue, UserSpace},
};
use self::{
    endings::Endings,
    inspection::Inspected,
    restrictions::Restrictions,
    routes::{Endpoints, RouteState},
    schedule::Schedule,
    status::DatapathStatus,
    subnet_file::SubnetFile,
    target::Target,
    uplink::Uplink,
};
use super::DaemonError;
use crate::{
    backend::Backend,
    cli::Cli,
    config::NetworkConfig,
    conntrack::Liberal,
    dataplane::{Dataplane, Features},
    device::{
        Changed, DeviceEvent, Netlink,
        external::{External, Selection},
    },
    lease::{LeaseTable, PeerChange},
    netfilter::keeper::Keeper,
    probe::Probes,
    registry::{OwnLease, Registry},
    repair::Repair,
    status::Status,
    underlay::Underlay,
    xdp,
};

/// How often everything is compared without an event.
pub(super) const COMPARE_PERIOD: Duration = Duration::from_secs(10);
/// A host is alive that was heard within this time.
const SILENCE: Duration = Duration::from_secs(30);

/// What the datapath is made from.
pub(super) struct Beginning<'a> {
    pub(super) netlink: Netlink,
    pub(super) device_events: mpsc::Receiver<DeviceEvent>,
    pub(super) features: Features,
    pub(super) network: NetworkConfig,
    pub(super) lease: OwnLease,
    /// The rule that the external interface is chosen by.
    pub(super) selection: Selection,
    pub(super) external: External,
    pub(super) backend: Backend,
    pub(super) registry: &'a Registry,
}

/// Keeps the kernel in step.
pub(super) struct Reconciler<'a> {
    cli: &'a Cli,
    netlink: Netlink,
    dataplane: Dataplane,
    target: Target,
    uplink: Uplink,
    xdp: xdp::Choice,
    /// What depends on the external interface is still to be brought in step.
    is_rebuild_due: bool,
    underlay: Underlay,
    probes: Probes,
    routes: RouteState,
    bypass: Bypass,
    rules: Keeper,
    subnet_file: SubnetFile,
    schedule: Schedule,
    status: DatapathStatus,
    events: Vec<Event>,
}

/// What keeps flows off the bypass, or ends it.
struct Bypass {
    /// What has to see each packet.
    restrictions: Restrictions,
    inspected: Inspected,
    conntrack: Liberal,
    endings: Endings,
}

/// What became of the datapath, that concerns who follows the store.
#[derive(Clone, Copy, Debug)]
pub(super) enum Event {
    /// The external interface is another one, or something about it is different.
    External {
        /// The address that the others are told.
        public_ip: Ipv4Addr,
        /// Whether this host sends from another address than before.
        is_other_source: bool,
    },
    /// Everything is made for another lease than before.
    Moved,
}

impl<'a> Reconciler<'a> {
    /// Loads the programs. Nothing else is made yet.
    pub(super) async fn new(cli: &'a Cli, beginning: Beginning<'_>) -> Result<Self, DaemonError> {
        let Beginning { netlink, device_events, features, network, lease, selection, external, backend, registry } =
            beginning;
        let endpoint = backend.endpoint(&external, lease.vtep_mac);
        let endpoints = Endpoints { store_kind: registry.kind(), urls: registry.endpoints() };
        let status = DatapathStatus::new(features, &external, &backend);
        let target = Target { network, lease, moving_to: None, backend };
        Ok(Self {
            cli,
            netlink,
            dataplane: target.load(cli, &external)?,
            underlay: Underlay::new(endpoint),
            probes: Probes::default(),
            routes: RouteState::new(cli, endpoints, &target.network),
            bypass: Bypass {
                restrictions: Restrictions::new(cli.bypass, features.tcx),
                inspected: Inspected::default(),
                conntrack: Liberal::new(&cli.run_dir),
                endings: Endings::default(),
            },
            rules: Keeper::new(cli.packet_rules.resync()),
            subnet_file: SubnetFile::new(cli, target.backend.vni()),
            schedule: Schedule::new(device_events),
            status,
            events: Vec::new(),
            xdp: uplink::choose_xdp(cli, &target.backend, &external.link).await,
            is_rebuild_due: false,
            uplink: Uplink::new(selection, external),
            target,
        })
    }

    /// Whether packets arrive from the host behind a subnet. Where that can't be told, they do: the peer is kept.
    pub(super) fn is_heard(&self, subnet: Ipv4Net) -> bool {
        let silence = self.dataplane.peers.silence_of(subnet);
        silence.map_or(true, |silence| silence.is_some_and(|silence| silence < SILENCE))
    }

    /// What has happened since it was asked for last.
    pub(super) fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Whether something is told otherwise than when it was asked for last.
    pub(super) const fn is_told_otherwise(&self) -> bool {
        self.status.is_due
    }

    /// Puts what is known of the datapath into this host's status.
    pub(super) fn tell(&mut self, status: &mut Status) {
        self.status.tell(status);
        status.programs = self.dataplane.runs();
    }

    /// Brings the maps to what lease table and kernel say now.
    async fn compare(&mut self, event: Changed, table: &LeaseTable) -> Result<(), DaemonError> {
        // First: what changes while it asks is heard of.
        self.follow_routes(table);
        if event >= Changed::Way {
            self.look_at_routing_rules(table).await;
        }
        for next_hop in self.underlay.refresh(&self.netlink, table, event).await? {
            self.status.repaired(Repair::NextHop, &format!("{} has another MAC", next_hop.address));
        }
        self.dataplane.peers.sync(&self.underlay.desired(table))?;
        if event >= Changed::Way && self.target.backend.own_device_name().is_none() {
            // Only now it is known who is on the link.
            self.follow_link_routes(table).await;
        }
        if event >= Changed::Way {
            self.follow_smaller_paths(table).await;
        }
        // By a link that was none of the underlay's, answers may come in.
        if self.underlay.take_new_links() {
            self.schedule.are_pods_due = true;
        }
        Ok(())
    }

    /// Has peers on the link show how they send, where that matters and is not known.
    pub(super) async fn ask_peers(&mut self) {
        let Target { backend, lease, .. } = &self.target;
        if !backend.has_both_ways() {
            return;
        }
        match self.dataplane.peers.unheard_on_link() {
            Ok(peers) => {
                let (source, own) = (self.uplink.external.address, lease.key.subnet.network());
                for (ifindex, next_hop) in self.probes.ask(&peers, source, own, backend.port()) {
                    if let Err(error) = self.netlink.resolve(ifindex, next_hop).await {
                        debug!("{error}");
                    }
                }
            }
            Err(error) => debug!("{error}; peers on the link are asked later how they send"),
        }
    }

    /// Brings the maps up by these changes only, which the table has already.
    pub(super) async fn apply(&mut self, changes: Vec<PeerChange>, table: &LeaseTable) {
        if changes.is_empty() {
            return;
        }
        self.follow_routes(table);
        for change in &changes {
            let written = match change {
                PeerChange::Set(subnet, peer) => {
                    self.underlay.look_up(&self.netlink, peer.public_ip).await;
                    self.dataplane.peers.set(*subnet, &self.underlay.vtep(peer))
                }
                PeerChange::Remove(subnet) => self.dataplane.peers.withdraw(*subnet),
            };
            if let Err(error) = written {
                warn!("{error}; comparing again in {COMPARE_PERIOD:?}");
            }
        }
        // After the maps: what is routed there has somewhere to go.
        if self.target.backend.own_device_name().is_none() {
            return self.follow_link_routes(table).await;
        }
        for change in &changes {
            self.route_peer(change, table).await;
        }
    }
}
