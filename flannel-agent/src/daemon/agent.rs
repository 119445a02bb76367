//! The running agent: makes the datapath, and keeps maps, kernel and lease table in step.

use std::{
    collections::BTreeSet,
    net::Ipv4Addr,
    sync::Arc,
    time::{Duration, Instant as Clock},
};

use ipnet::Ipv4Net;
use nix::time::{ClockId, clock_gettime};
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};
use tracing::{info, warn};

use super::{
    DaemonError, Shutdown,
    drift::{LOOK_PERIOD, ROUTES_PERIOD},
    endings::Endings,
    inspection::Inspected,
    record::Record,
    renewal::RenewalEvent,
    restrictions::{Restrictions, WATCH_PERIOD},
    routes::RouteState,
    store::{Course, is_heard},
};
use crate::{
    cli::Cli,
    config::NetworkConfig,
    conntrack::Liberal,
    control::{Pending, Reply, Request},
    dataplane::Dataplane,
    device::{
        Changed, DeviceEvent, Netlink,
        external::{External, Selection},
        vxlan::VxlanDevice,
    },
    health::{self, Health},
    lease::{LeaseTable, OwnDeletion, PeerChange},
    netfilter::keeper::Keeper,
    ownership::Written,
    registry::{Announced, OwnLease, Registry, ResyncCause, Update},
    repair::Repair,
    status::LeaseState,
    subnet_env::SubnetEnv,
    underlay::Underlay,
    xdp::{self, XdpFlag},
};

/// How often everything is compared without an event.
pub(super) const COMPARE_PERIOD: Duration = Duration::from_secs(10);
/// The least time between two looks at the kernel, so that a burst of events costs one.
const SETTLE_TIME: Duration = Duration::from_millis(10);
/// How much longer it rests than a look for pods took.
const IDLE_FOR_EACH: u32 = 9;
/// The least time between two writes of the agent's files.
const RECORD_PERIOD: Duration = Duration::from_millis(500);

/// For how long this process has used a CPU; zero where the kernel does not say.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// The running agent.
pub(super) struct Agent<'a> {
    pub(super) cli: &'a Cli,
    pub(super) netlink: Netlink,
    pub(super) dataplane: Dataplane,
    pub(super) conntrack: Liberal,
    pub(super) endings: Endings,
    /// Tells the lease's holder of this host's VTEP address.
    pub(super) public_ip: watch::Sender<Ipv4Addr>,
    /// Whether the external interface was there when it was last looked for.
    pub(super) has_external: bool,
    /// What depends on it is still to be brought in step.
    pub(super) is_rebuild_due: bool,
    /// Since when another interface is the right one.
    pub(super) other_since: Option<Clock>,
    /// `subnet.env` lacked something when it was last looked at.
    pub(super) is_subnet_env_incomplete: bool,
    pub(super) rules: Keeper,
    pub(super) routes: RouteState,
    pub(super) underlay: Underlay,
    pub(super) table: LeaseTable,
    /// What counts where an entry comes to name no VTEP.
    pub(super) announced: Announced,
    pub(super) record: Record,
    /// What has to see each packet.
    pub(super) restrictions: Restrictions,
    pub(super) inspected: Inspected,
    pub(super) xdp: xdp::Choice,
    pub(super) network: NetworkConfig,
    /// The rule that the external interface is chosen by.
    pub(super) selection: Selection,
    pub(super) external: External,
    pub(super) device: VxlanDevice,
    /// The lease that the datapath is made for.
    pub(super) own: OwnLease,
    /// The lease that it has still to be made for.
    pub(super) moving_to: Option<OwnLease>,
    pub(super) registry: Registry,
    pub(super) updates: mpsc::Receiver<Update>,
    pub(super) renewal: mpsc::Receiver<RenewalEvent>,
    /// The lease's holder waits to be told how the own lease was deleted.
    pub(super) asked: Option<oneshot::Sender<OwnDeletion>>,
    /// Tells the lease's holder whose subnets are not to be taken, though the store does not name them.
    pub(super) unnamed: watch::Sender<BTreeSet<Ipv4Net>>,
    /// Has the lease's holder look at how it stands with the lease.
    pub(super) doubt: Arc<Notify>,
    pub(super) requests: mpsc::Receiver<Pending>,
    pub(super) health: Health,
}

impl Agent<'_> {
    /// Follows store and kernel until a signal, or until the lease is taken away, which ends the process as flannel's
    /// does: started anew, it takes a lease again.
    pub(super) async fn follow(
        mut self,
        mut device_events: mpsc::Receiver<DeviceEvent>,
        mut shutdown: Shutdown,
    ) -> Result<(), DaemonError> {
        let mut compare = interval(COMPARE_PERIOD);
        compare.set_missed_tick_behavior(MissedTickBehavior::Delay);
        compare.reset();
        let mut look = interval(LOOK_PERIOD);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut watch = interval(WATCH_PERIOD);
        watch.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut routes_asked = Instant::now();
        let mut record = interval(RECORD_PERIOD);
        record.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let heartbeat = self.health.heartbeat("agent");
        let mut alive = interval(health::PERIOD);
        alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut pending = None;
        // What was there when the programs were attached may not be all that is there now.
        let mut pods_pending = true;
        let mut not_before = Instant::now();
        let mut pods_not_before = not_before;
        loop {
            heartbeat.beat();
            let settles_at = self.table.settles_at().map(Instant::from_std);
            tokio::select! {
                _ = alive.tick() => {}
                () = shutdown.requested() => {
                    info!("stopped as asked; the datapath goes on");
                    break;
                }
                Some(event) = self.renewal.recv() => {
                    if self.take_renewal(event).await == Course::End {
                        break;
                    }
                }
                Some(update) = self.updates.recv() => {
                    let changes = self.take_updates(update);
                    self.apply(changes).await;
                }
                () = sleep_until(settles_at.unwrap_or(not_before)), if settles_at.is_some() => {
                    let changes = self.settle();
                    self.apply(changes).await;
                }
                rules = self.rules.changed() => self.record.rules(rules),
                found = self.inspected.reader.changed() => self.take_found(found).await,
                Some((request, answer)) = self.requests.recv() => {
                    // Whoever asked may be gone.
                    let _gone = answer.send(self.serve(request).await);
                }
                Some(DeviceEvent { kind, ifindex, prefix, is_scan_due }) = device_events.recv() => {
                    if is_scan_due {
                        self.scan_routes();
                    }
                    if let Some(prefix) = prefix {
                        self.underlay.forget(prefix);
                    }
                    let event = match ifindex {
                        _ if kind == Changed::TrafficControl => {
                            pods_pending |= ifindex.is_none_or(|index| self.restrictions.places.contains(index));
                            None
                        }
                        // Its neighbours are ours.
                        Some(index) if self.underlay.is_overlay(index) => Some(kind.max(Changed::Route)),
                        Some(index) if !self.underlay.depends_on(index) => {
                            // It may be a pod's, or the bridge of pods.
                            pods_pending |= kind == Changed::Topology;
                            None
                        }
                        _ => Some(kind),
                    };
                    pending = pending.max(event);
                }
                Some(scan) = self.routes.scans.recv() => {
                    if self.take_scan(scan) {
                        pods_pending = true;
                        pending = pending.max(Some(Changed::Route));
                    }
                }
                () = sleep_until(not_before), if pending.is_some() => {
                    self.compare_or_say(pending.take().unwrap_or(Changed::Topology)).await;
                    not_before = Instant::now() + SETTLE_TIME;
                }
                () = sleep_until(pods_not_before), if pods_pending => {
                    pods_pending = false;
                    let begun = cpu_time();
                    if !self.has_external {
                        // It may also be the external interface, made anew.
                        self.follow_external().await;
                    }
                    self.attach_pods_or_say().await;
                    // A look costs by the number of pods, and holds up who makes them. (How long it took by the clock says more
                    // of what else the host does, and on a busy one would put off the next by seconds.)
                    let used = cpu_time().saturating_sub(begun);
                    pods_not_before = Instant::now() + SETTLE_TIME.max(used * IDLE_FOR_EACH);
                }
                _ = compare.tick() => {
                    let changes = self.table.review(is_heard(&self.dataplane.peers), Clock::now());
                    self.apply(changes).await;
                    self.finish_move().await;
                    self.restrict_or_say();
                    self.inspect_for_peers();
                    let verified = self.dataplane.peers.verify_keys();
                    if let Err(error) = verified.and_then(|_| self.dataplane.accept(&self.cli.accept_source)) {
                        warn!("{error}; comparing again in {COMPARE_PERIOD:?}");
                    }
                    if routes_asked.elapsed() >= ROUTES_PERIOD {
                        routes_asked = Instant::now();
                        self.scan_routes();
                        self.compare_or_say(Changed::Topology).await;
                    } else {
                        self.follow_external().await;
                        self.ensure_or_say().await;
                        self.compare_or_say(Changed::Neighbour).await;
                    }
                    self.refresh();
                }
                _ = look.tick() => self.look().await,
                _ = watch.tick() => self.watch_observers().await,
                _ = record.tick(), if self.record.is_due() => self.write_record(),
            }
        }
        self.record.refresh(&self.table);
        self.record.finish(&self.own, &self.table).await;
        Ok(())
    }

    /// Goes on with a lease. Where it is of another subnet, programs, device and `subnet.env` are made for that.
    pub(super) async fn move_to(&mut self, lease: OwnLease) {
        self.record.lease(&lease, LeaseState::Held);
        if self.moving_to.is_none() && lease.key == self.own.key && lease.vtep_mac == self.own.vtep_mac {
            info!("the lease of {} is held again", lease.key.subnet);
            self.own = lease;
            return;
        }
        warn!(
            "this host moves from {} to {}: subnet.env is rewritten, and its pods need new addresses",
            self.own.key.subnet, lease.key.subnet
        );
        self.moving_to = Some(lease);
        self.finish_move().await;
    }

    /// Makes everything for the lease that it has still to be made for. Where that fails half-way, it begins anew at the
    /// next comparison.
    async fn finish_move(&mut self) {
        let Some(lease) = self.moving_to.clone() else { return };
        match self.remake(lease).await {
            Ok(()) => self.moving_to = None,
            Err(error) => warn!("{error}; trying again in {COMPARE_PERIOD:?}"),
        }
    }

    async fn remake(&mut self, lease: OwnLease) -> Result<(), DaemonError> {
        self.own = lease;
        self.table.exclude(self.own.key.subnet);
        self.underlay.set_vtep_mac(self.own.vtep_mac);
        let link = self.rebuild().await?;
        info!("{} carries {} to {} peers", link.name, self.own.key.subnet, self.dataplane.peers.len());
        // What overlapped the subnet that it had was passed over.
        self.watch(ResyncCause::Moved);
        Ok(())
    }

    /// Follows the table from a fresh snapshot on.
    pub(super) fn watch(&mut self, cause: ResyncCause) {
        let (sender, updates) = mpsc::channel(1024);
        // The watch before ends when nobody receives from it.
        self.updates = updates;
        self.record.asks();
        tokio::spawn(self.registry.clone().watch(cause, sender, self.health.heartbeat("watch")));
    }

    async fn serve(&mut self, request: Request) -> Reply {
        match request {
            Request::ReleaseGuard => {
                let changes = self.table.release(Clock::now());
                let peers = changes.len();
                warn!("{peers} held peers are let go, as asked");
                self.apply(changes).await;
                self.refresh();
                self.write_record();
                Reply::Released { peers }
            }
        }
    }

    /// Last: it leaves its packets to the programs before it, and nothing else hangs on it.
    pub(super) fn ensure_xdp(&mut self) -> Result<(), DaemonError> {
        let Self { cli, dataplane, xdp, record, external, .. } = self;
        match dataplane.set_xdp(xdp.mode, external.link.index) {
            Err(error) if cli.xdp == XdpFlag::Auto => {
                warn!("{error}; packets are taken out of the tunnel without XDP");
                *xdp = xdp::Choice { mode: None, reason: error.to_string() };
                dataplane.set_xdp(None, external.link.index)?;
            }
            result => result?,
        }
        record.xdp(xdp);
        Ok(())
    }

    /// A pod that gets no programs goes through the stack, as all packets once did.
    pub(super) async fn attach_pods_or_say(&mut self) {
        if let Err(error) = self.attach_pods().await {
            warn!("{error}; its pod goes through the stack; trying again in {COMPARE_PERIOD:?}");
        }
    }

    async fn attach_pods(&mut self) -> Result<(), DaemonError> {
        // First: a pod that has a queue has it from its first packet on.
        let pods = self.look_at_links().await?;
        self.inspect_for_pods(&pods);
        if !self.dataplane.knows_pods(&pods) {
            // Those that were there before have no need to send something again. Where that can't be told, they do.
            let noted = self.netlink.macs_behind().await.map_err(DaemonError::from);
            let noted = noted.and_then(|macs| Ok(self.dataplane.note_pods(&pods, &macs)?));
            if let Err(error) = noted {
                warn!("{error}; flows into new pods take the stack until these have sent something");
            }
        }
        Ok(self.dataplane.attach_pods(&pods)?)
    }

    /// Before pods are told of their subnet, as far as that can be.
    pub(super) async fn set_rules(&self) {
        self.rules.set(self.cli.packet_rules.rules(&self.network, self.own.key.subnet)).await;
    }

    pub(super) fn write_subnet_env(&self) -> Result<(), DaemonError> {
        let path = self.cli.subnet_file();
        self.subnet_env().write(&path)?;
        Ok(Written::remember(&self.cli.run_dir, self.device.vni, &path)?)
    }

    pub(super) fn subnet_env(&self) -> SubnetEnv {
        let (network, subnet, mtu) = (self.network.network, self.own.key.subnet, self.device.mtu);
        SubnetEnv { network, subnet, mtu, ip_masq: self.cli.packet_rules.ip_masq }
    }

    pub(super) fn write_record(&mut self) {
        self.record.write(&self.own, &self.table);
    }

    /// Brings the maps to what lease table and kernel say now.
    pub(super) async fn compare(&mut self, event: Changed) -> Result<(), DaemonError> {
        // First: what changes while it asks is heard of.
        self.follow_routes();
        for next_hop in self.underlay.refresh(&self.netlink, &self.table, event).await? {
            self.record.repaired(Repair::NextHop, &format!("{} has another MAC", next_hop.address));
        }
        self.dataplane.peers.sync(&self.underlay.desired(&self.table))?;
        if event >= Changed::Way {
            self.look_at_routing_rules().await;
        }
        Ok(())
    }

    /// Brings the maps up by these changes only.
    pub(super) async fn apply(&mut self, changes: impl IntoIterator<Item = PeerChange>) {
        let changes: Vec<_> = changes.into_iter().collect();
        if changes.is_empty() {
            return;
        }
        self.follow_routes();
        for change in &changes {
            self.record.peers_changed();
            let written = match change {
                PeerChange::Set(subnet, peer) => {
                    self.underlay.look_up(&self.netlink, peer.public_ip).await;
                    self.dataplane.peers.set(*subnet, &self.underlay.vtep(peer))
                }
                PeerChange::Remove(subnet) => {
                    self.announced.forget(*subnet);
                    self.dataplane.peers.withdraw(*subnet)
                }
            };
            if let Err(error) = written {
                warn!("{error}; comparing again in {COMPARE_PERIOD:?}");
            }
        }
        // After the maps: what is routed there has somewhere to go.
        for change in &changes {
            self.route_peer(change).await;
        }
    }
}
