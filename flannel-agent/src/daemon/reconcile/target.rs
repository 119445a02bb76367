//! What the datapath is made for, and making it: at the start, and for another lease.

use flannel_common::maps::Config;
use tracing::{info, warn};

use super::{COMPARE_PERIOD, Event, Reconciler, endings, restrictions::Observer};
use crate::{
    backend::Backend,
    cli::Cli,
    config::NetworkConfig,
    conntrack::helpers,
    daemon::DaemonError,
    dataplane::{Capacity, Dataplane, PinDirectory},
    device::{self, Changed, Link, external::External},
    lease::LeaseTable,
    registry::OwnLease,
    subnet_env::SubnetEnv,
};

/// What the datapath is made for.
pub(super) struct Target {
    pub(super) network: NetworkConfig,
    pub(super) lease: OwnLease,
    /// The lease that it has still to be made for.
    pub(super) moving_to: Option<OwnLease>,
    pub(super) backend: Backend,
}

impl Target {
    /// Loads the programs.
    pub(super) fn load(&self, cli: &Cli, external: &External) -> Result<Dataplane, DaemonError> {
        let Self { network, lease, moving_to: _, backend } = self;
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
            vni: backend.vni().get(),
            mtu: backend.mtu(),
            underlay_header_len: external.link.header_len(),
            underlay_mac: external.link.mac.unwrap_or_default(),
            port: backend.port(),
            vtep_mac: lease.vtep_mac.0,
            source_ports: device::local_ports(),
            flags: backend.flags(),
        };
        let pins = PinDirectory::new(&cli.bpf_pin_dir, backend.vni());
        let mut dataplane = Dataplane::load(pins, &config, capacity, cli.bpf_log_level)?;
        dataplane.accept(&cli.accept_source)?;
        Ok(dataplane)
    }

    /// What container runtimes are told.
    pub(super) fn subnet_env(&self, ip_masq: bool) -> SubnetEnv {
        let (network, subnet, mtu) = (self.network.network, self.lease.key.subnet, self.backend.mtu());
        SubnetEnv { network, subnet, mtu, ip_masq }
    }
}

impl Reconciler<'_> {
    /// Makes the datapath for the first time.
    pub(in crate::daemon) async fn make(&mut self, table: &LeaseTable) -> Result<Link, DaemonError> {
        self.read_routes(table).await?;
        // Peers before programs: none that is attached may meet empty maps.
        self.compare(Changed::Topology, table).await?;
        // Before programs: none passes by who looks already.
        self.find_own_device().await?;
        let pods = self.look_at_links().await?;
        self.inspect_for_pods(&pods);
        self.inspect_for_peers(table);
        self.wait_for_inspection(table).await;

        device::enable_forwarding()?;
        self.ensure_conntrack();
        self.observed(Observer::Helpers, helpers::restrictions().into_iter().collect());
        endings::watch_links(&self.dataplane.forgetter());
        tokio::spawn(endings::follow_links(self.netlink.links_that_go(), self.dataplane.forgetter()));
        let (link, _made) = self.ensure_datapath(table).await?;
        if let Err(error) = self.dataplane.discard_other_versions() {
            warn!("{error}");
        }
        self.netlink.remove_flannels_blackhole(self.target.lease.key.subnet).await?;
        self.set_rules().await;
        Ok(link)
    }

    /// Goes on with a lease. Where it is of another subnet, programs, device and `subnet.env` are made for that.
    pub(in crate::daemon) async fn move_to(&mut self, lease: OwnLease, table: &LeaseTable) {
        let Target { lease: before, moving_to, .. } = &mut self.target;
        if moving_to.is_none() && lease.key == before.key && lease.vtep_mac == before.vtep_mac {
            info!("the lease of {} is held again", lease.key.subnet);
            *before = lease;
            return;
        }
        warn!(
            "this host moves from {} to {}: subnet.env is rewritten, and its pods need new addresses",
            before.key.subnet, lease.key.subnet
        );
        *moving_to = Some(lease);
        self.finish_move(table).await;
    }

    /// Makes everything for the lease that it has still to be made for. Where that fails half-way, it begins anew at the
    /// next comparison.
    pub(super) async fn finish_move(&mut self, table: &LeaseTable) {
        let Some(lease) = self.target.moving_to.clone() else { return };
        match self.remake(lease, table).await {
            Ok(()) => self.target.moving_to = None,
            Err(error) => warn!("{error}; trying again in {COMPARE_PERIOD:?}"),
        }
    }

    async fn remake(&mut self, lease: OwnLease, table: &LeaseTable) -> Result<(), DaemonError> {
        self.underlay.set_vtep_mac(lease.vtep_mac);
        self.target.lease = lease;
        let link = self.rebuild(table).await?;
        self.say_carried(&link);
        // What overlapped the subnet that it had was skipped.
        self.events.push(Event::Moved);
        Ok(())
    }

    /// Loads the programs anew, and makes everything for the lease and the external interface as they are now.
    pub(super) async fn rebuild(&mut self, table: &LeaseTable) -> Result<Link, DaemonError> {
        // The maps with the peers are adopted, and the programs swapped in one step each.
        let dataplane = self.target.load(self.cli, &self.uplink.external)?;
        let before = std::mem::replace(&mut self.dataplane, dataplane);
        self.dataplane.succeed(before);
        self.restrict_or_say();
        self.compare(Changed::Topology, table).await?;
        let (link, _made) = self.ensure_datapath(table).await?;
        self.set_rules().await;
        self.write_subnet_env()?;
        Ok(link)
    }

    /// Before pods are told of their subnet, as far as that can be.
    async fn set_rules(&self) {
        self.rules.set(self.cli.packet_rules.rules(&self.target.network, self.target.lease.key.subnet)).await;
    }

    pub(in crate::daemon) fn write_subnet_env(&self) -> Result<(), DaemonError> {
        self.subnet_file.write(&self.target.subnet_env(self.cli.packet_rules.ip_masq))
    }

    pub(in crate::daemon) fn say_carried(&self, link: &Link) {
        info!("{} carries {} to {} peers", link.name, self.target.lease.key.subnet, self.dataplane.peers.len());
    }
}
