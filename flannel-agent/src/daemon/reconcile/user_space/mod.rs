//! What keeps a host in step whose network's packets go through a tunnel in user space (`udp`): the tunnel with its device, packet
//! rules, forwarding and `subnet.env`. No programs are needed.
//!
//! * `tunnel` — starting it, whom it reaches, and what it counts

mod tunnel;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::Ipv4Addr,
    time::Duration,
};

use ipnet::Ipv4Net;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::{Beginning, COMPARE_PERIOD, drift::ensure_forwarding, host::Host, schedule::SETTLE_TIME};
use crate::{
    cleanup,
    cli::Cli,
    daemon::DaemonError,
    device::{
        self, Changed, DeviceError, DeviceEvent, Link, host_routes::Interest, overlay_route::ForeignNextHops,
        tun::EnsuredTun, vxlan::VxlanDevice,
    },
    lease::LeaseTable,
    netfilter::keeper::Keeper,
    registry::OwnLease,
    repair::Repair,
    status::{RoutesStatus, RulesStatus},
    udp::Tunnel,
};

/// What only others can repair, by what it is about.
const TUNNEL: &str = "tunnel";
const ROUTE: &str = "route into the overlay";
/// How often what the tunnel counts is told, where it has changed.
const COUNT_PERIOD: Duration = Duration::from_secs(5);

/// Keeps a tunnel in step.
pub(in crate::daemon) struct UserSpace<'a> {
    pub(in crate::daemon) host: Host<'a>,
    /// [`None`] where it could not be started again.
    tunnel: Option<Tunnel>,
    /// The device, once there was one.
    device: Option<Link>,
    /// What tunnels before this one counted, by label.
    counted: BTreeMap<String, u64>,
    count_at: Instant,
    /// Something is to be compared, ...
    is_comparison_due: bool,
    /// ... and when at the earliest.
    compare_at: Instant,
    rules: Keeper,
}

/// What there is to see to.
pub(in crate::daemon) enum TunnelDue {
    Device(DeviceEvent),
    /// How it stands with the packet rules.
    Rules(RulesStatus),
    Comparison,
    /// The tunnel carries nothing any more.
    Failure(String),
}

impl<'a> UserSpace<'a> {
    /// Makes nothing yet.
    pub(in crate::daemon) fn new(cli: &'a Cli, beginning: Beginning<'_>) -> Self {
        let mut host = Host::new(cli, beginning, cli.packet_rules.ip_masq);
        host.status.routes(RoutesStatus {
            mode: "network".to_owned(),
            reason: format!("one to {} into the TUN device, as flannel's", host.network.network),
            problem: None,
        });
        Self {
            host,
            tunnel: None,
            device: None,
            counted: BTreeMap::new(),
            count_at: Instant::now(),
            is_comparison_due: false,
            compare_at: Instant::now(),
            rules: Keeper::new(cli.packet_rules.resync()),
        }
    }

    /// Makes everything for the first time: the tunnel first, so that nothing was touched where there can be none. The link that
    /// the tunnel leaves by.
    pub(in crate::daemon) async fn make(&mut self, table: &LeaseTable) -> Result<Link, DaemonError> {
        let (vni, kind) = (self.host.backend.vni(), self.host.backend.kind());
        self.device = self.host.netlink.tun_of(vni).await?;
        self.start(table).await?;
        if let Err(error) = cleanup::leave_datapath(self.host.cli, &self.host.netlink, vni, kind).await {
            warn!("something of another backend stays: {error}");
        }
        device::enable_forwarding()?;
        self.ensure().await?;
        self.host.netlink.remove_flannels_blackhole(self.host.lease.key.subnet).await?;
        self.set_rules().await;
        Ok(self.host.uplink.external.link.clone())
    }

    /// Takes away what a flannel that ran here before made for its peers.
    pub(in crate::daemon) async fn sweep(&self, table: &LeaseTable) {
        if let Err(error) = self.sweep_flannels(table).await {
            warn!("something of flannel's stays: {error}");
        }
    }

    async fn sweep_flannels(&self, table: &LeaseTable) -> Result<(), DeviceError> {
        let hosts: HashMap<_, _> = table.iter().map(|(subnet, peer)| (*subnet, peer.public_ip)).collect();
        self.host.netlink.sweep_link_routes(&self.host.uplink.external.link, &hosts).await?;
        let name = VxlanDevice::name_of(self.host.backend.vni());
        let Some(message) = self.host.netlink.link_by_name(&name).await? else { return Ok(()) };
        let link = Link { name, index: message.header.index, mtu: 0, mac: None };
        let (network, len) = (self.host.network.network, self.host.lease.key.subnet.prefix_len());
        let is_lease = |address: Ipv4Addr| {
            Ipv4Net::new(address, len).is_ok_and(|lease| lease.network() == address && network.contains(&lease))
        };
        self.host.netlink.sweep(&link, is_lease, &HashSet::new(), &ForeignNextHops::new()).await
    }

    pub(in crate::daemon) fn say_carried(&self) {
        let device = self.device.as_ref().map_or("the tunnel", |device| &device.name);
        info!(
            "{device} carries {}, in user space: the slow road; vxlan is faster where it can be had",
            self.host.lease.key.subnet
        );
    }

    /// The next that there is to [see to](Self::see_to).
    pub(in crate::daemon) async fn next(&mut self) -> TunnelDue {
        let Self { host: Host { device_events, .. }, tunnel, rules, is_comparison_due, compare_at, .. } = self;
        let failure = async {
            match tunnel {
                Some(tunnel) => tunnel.failed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Some(event) = device_events.recv() => TunnelDue::Device(event),
            rules = rules.changed() => TunnelDue::Rules(rules),
            () = sleep_until(*compare_at), if *is_comparison_due => TunnelDue::Comparison,
            cause = failure => TunnelDue::Failure(cause),
        }
    }

    pub(in crate::daemon) async fn see_to(&mut self, due: TunnelDue, table: &LeaseTable) {
        match due {
            TunnelDue::Device(event) => self.is_comparison_due |= self.concerns(event),
            TunnelDue::Rules(rules) => self.host.status.rules(rules),
            TunnelDue::Comparison => {
                self.review(table).await;
                self.is_comparison_due = false;
                self.compare_at = Instant::now() + SETTLE_TIME;
            }
            TunnelDue::Failure(cause) => {
                let device = self.device.as_ref().map_or_else(String::new, |device| device.name.clone());
                self.restart(table).await;
                if self.tunnel.is_some() {
                    self.host.status.repaired(Repair::Device, &format!("{device}: {cause}"));
                }
            }
        }
    }

    fn concerns(&self, event: DeviceEvent) -> bool {
        let own = [self.device.as_ref().map(|device| device.index), Some(self.host.uplink.external.link.index)];
        match event.kind {
            Changed::TrafficControl | Changed::Neighbour => false,
            Changed::Way | Changed::Route | Changed::Topology => {
                !self.host.uplink.is_present || event.ifindex.is_none() || own.contains(&event.ifindex)
            }
        }
    }

    /// Has the device be as it should, and what leads to it.
    async fn ensure(&mut self) -> Result<Vec<Repair>, DaemonError> {
        let Some(tunnel) = &self.tunnel else { return Ok(Vec::new()) };
        let device = self.settings().tun_device(tunnel.device());
        let EnsuredTun { link, repairs, is_routed } = self.host.netlink.ensure_tun(&device).await?;
        self.host.netlink.set_interest(Interest {
            overlay: link.index,
            is_shared: false,
            prefixes: vec![self.host.network.network],
            subnet: self.host.lease.key.subnet,
            addresses: Vec::new(),
        });
        let elsewhere = format!(
            "a route of somebody else's leads {} elsewhere, which stays: only what others route into {} is carried",
            self.host.network.network, link.name
        );
        self.host.status.waiting(ROUTE, (!is_routed).then_some(elsewhere));
        self.device = Some(link);
        let blackhole = self.host.cli.packet_rules.ip_blackhole_route.then_some(self.host.lease.key.subnet);
        self.host.netlink.set_blackhole(self.host.backend.vni(), blackhole).await?;
        Ok(repairs)
    }

    async fn ensure_or_say(&mut self) {
        match self.ensure().await {
            Ok(repairs) => {
                let device = self.device.as_ref().map_or_else(String::new, |device| device.name.clone());
                repairs.into_iter().for_each(|repair| self.host.status.repaired(repair, &device));
            }
            // It is about to be heard that the device is gone.
            Err(error) => warn!("{error}; trying again in {COMPARE_PERIOD:?}"),
        }
    }

    /// Compares everything, whether or not something was told of.
    pub(in crate::daemon) async fn review(&mut self, table: &LeaseTable) {
        self.follow_external(table).await;
        self.ensure_or_say().await;
    }

    /// Looks at what changes without an event, and at what is still to be done.
    pub(in crate::daemon) async fn look(&mut self, table: &LeaseTable) {
        ensure_forwarding(&mut self.host.status);
        if !self.host.uplink.is_present {
            self.follow_external(table).await;
        }
        if self.tunnel.is_none() {
            self.restart(table).await;
        }
        self.host.write_where_due();
        if self.count_at.elapsed() >= COUNT_PERIOD {
            self.tell_counts();
        }
    }

    /// Goes on with a lease. Where it is of another subnet, the tunnel is started anew with its address.
    pub(in crate::daemon) async fn move_to(&mut self, lease: OwnLease, table: &LeaseTable) {
        if !self.host.take_lease(lease) {
            return;
        }
        self.restart(table).await;
        self.set_rules().await;
        self.host.tell_move();
        self.say_carried();
    }

    async fn follow_external(&mut self, table: &LeaseTable) {
        let Some(change) = self.host.find_external().await else { return };
        if change.is_other_source {
            self.restart(table).await;
        } else {
            self.ensure_or_say().await;
        }
        self.host.tell_external();
    }

    /// Before pods are told of their subnet, as far as that can be.
    async fn set_rules(&self) {
        self.rules.set(self.host.cli.packet_rules.rules(&self.host.network, self.host.lease.key.subnet)).await;
    }
}
