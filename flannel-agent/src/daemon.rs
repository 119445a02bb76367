//! The life of the daemon: wait for the store, set up, follow changes.
//!
//! Until it holds a lease it touches nothing on the host, so waiting can be interrupted at any time. Setting up takes
//! milliseconds, is not interrupted, and is undone where it fails and nothing was there before.

use std::{collections::BTreeMap, io, path::PathBuf, time::Duration};

use flannel_common::maps::Config;
use ipnet::Ipv4Net;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};
use tracing::{debug, info, warn};

use crate::{
    cleanup::{self, CleanupError},
    cli::Cli,
    config::NetworkConfig,
    dataplane::{self, Capacity, Dataplane, DataplaneError, Hook, PinDirectory},
    device::{
        self, Changed, DeviceError, DeviceEvent, Link, Netlink,
        external::{External, SelectError},
        vxlan::{Existing, VxlanDevice},
    },
    lease::{Peer, PeerChange, Peers},
    lock::{Lock, LockError},
    preflight::{self, PreflightError},
    registry::{
        Entry, LeaseRequest, OwnLease, Update,
        etcd::{Registry, RegistryError},
    },
    retry,
    subnet_env::{self, SubnetEnv},
    underlay::{Endpoint, Underlay},
};

/// For how long the store keeps the lease of a host that is silent; flannel's.
const LEASE_TTL: Duration = Duration::from_secs(24 * 60 * 60);
/// How often everything is compared without an event.
const COMPARE_PERIOD: Duration = Duration::from_secs(10);
/// The least time between two looks at the kernel, so that a burst of events costs one.
const SETTLE_TIME: Duration = Duration::from_millis(10);

/// Why the daemon ends.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The host lacks what no waiting brings.
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    /// No interface to the other hosts.
    #[error(transparent)]
    Interface(#[from] SelectError),
    /// The interface to the other hosts was deleted; one of the same name is another.
    #[error("the external interface {0} is gone; start the agent again when there is one")]
    InterfaceGone(String),
    /// The kernel's network.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Programs or maps.
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    /// The store, in a way that waiting does not heal.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Another agent serves this overlay.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// `subnet.env`.
    #[error(transparent)]
    SubnetEnv(#[from] subnet_env::WriteError),
    /// Taking something away.
    #[error(transparent)]
    Cleanup(#[from] CleanupError),
    /// No signal handler.
    #[error("wait for signals: {0}")]
    Signal(io::Error),
    /// The counters were asked for where no agent ever ran.
    #[error("no dataplane is pinned below {0}; name the directory with --bpf-pin-dir")]
    NoDataplane(PathBuf),
}

impl DaemonError {
    /// The process' exit code, as `--help` explains it.
    pub const fn exit_code(&self) -> u8 {
        const FAILED: u8 = 1;
        const HOST_LACKS: u8 = 77;
        const BAD_CONFIGURATION: u8 = 78;
        match self {
            Self::Preflight(_)
            | Self::Interface(SelectError::NoMatch(_))
            | Self::Dataplane(
                DataplaneError::NotBpffs { .. } | DataplaneError::Load(_) | DataplaneError::Program { .. },
            ) => HOST_LACKS,
            Self::Registry(RegistryError::File { .. } | RegistryError::PlainEndpoints) => BAD_CONFIGURATION,
            _ => FAILED,
        }
    }
}

/// Runs until a signal or until the lease is lost, then leaves the datapath as it is.
///
/// # Errors
/// [`DaemonError`], where going on or trying again can't help.
pub async fn run(cli: &Cli) -> Result<(), DaemonError> {
    let mut shutdown = Shutdown::listen()?;
    preflight::check()?;
    dataplane::require_bpffs(&cli.bpf_pin_dir)?;
    let (netlink, device_events, _connection) = Netlink::open()?;

    let prepared = tokio::select! {
        prepared = prepare(cli, &netlink) => prepared?,
        () = shutdown.requested() => return Ok(()),
    };
    let _lock = Lock::take(&cli.run_dir, prepared.network.backend.vni)?;
    let agent = set_up(cli, netlink, prepared).await?;
    agent.follow(device_events, shutdown).await
}

/// Prints every counter of every pinned overlay.
///
/// # Errors
/// [`DaemonError::NoDataplane`] or [`DaemonError::Dataplane`].
pub fn print_counters(cli: &Cli) -> Result<(), DaemonError> {
    let vnis = dataplane::pinned_vnis(&cli.bpf_pin_dir);
    if vnis.is_empty() {
        return Err(DaemonError::NoDataplane(cli.bpf_pin_dir.clone()));
    }
    for vni in vnis {
        println!("{:<28}{:>12}{:>16}  flannel.{vni}", "event", "packets", "bytes");
        for (event, counter) in dataplane::pinned_counters(&PinDirectory::new(&cli.bpf_pin_dir, vni))? {
            println!("{:<28}{:>12}{:>16}  {}", event.label(), counter.packets, counter.bytes, event.description());
        }
    }
    Ok(())
}

/// What is known once the lease is held.
struct Prepared {
    registry: Registry,
    network: NetworkConfig,
    external: External,
    device: VxlanDevice,
    lease: OwnLease,
    /// The lease table as it was right after.
    entries: Vec<Entry>,
}

/// Waits for network config and lease. Touches nothing on the host.
async fn prepare(cli: &Cli, netlink: &Netlink) -> Result<Prepared, DaemonError> {
    // Looked for first: it needs no store, and a wrong flag should be known at once.
    let external = netlink.external_interface(&cli.selection()).await?;
    info!(
        "external interface {} with address {}, published as {}",
        external.link.name, external.address, external.public_ip
    );

    let mut registry = Registry::new(cli.etcd())?;
    let network = retry::until_ok(async || registry.network_config().await, RegistryError::is_final).await?;
    if network.backend.direct_routing {
        warn!("DirectRouting is not used: packets to peers on the same link are encapsulated too");
    }
    let device = VxlanDevice::new(&network.backend, &external);
    let request = LeaseRequest {
        public_ip: external.public_ip,
        vtep_mac: netlink.vxlan_mac(&device).await?.map(crate::lease::MacAddress),
        previous: subnet_env::previous_subnet(&cli.subnet_file()),
        ttl: LEASE_TTL,
    };
    let lease = retry::until_ok(async || registry.acquire(&network, &request).await, RegistryError::is_final).await?;
    info!("lease {} of {}", lease.key.subnet, network.network);
    let (entries, _) = retry::until_ok(async || registry.leases().await, RegistryError::is_final).await?;
    Ok(Prepared { registry, network, external, device, lease, entries })
}

/// Makes everything. Where that fails half-way, what was not there before is taken away again.
async fn set_up(cli: &Cli, netlink: Netlink, prepared: Prepared) -> Result<Agent, DaemonError> {
    let vni = prepared.network.backend.vni;
    let had_pins = PinDirectory::new(&cli.bpf_pin_dir, vni).exists();
    let had_device = netlink.link_by_name(&prepared.device.name).await?.is_some();
    let result = make(cli, netlink.clone(), prepared).await;
    if result.is_err() {
        let undone = cleanup::undo(cli, &netlink, vni, !had_pins, !had_device).await;
        if let Err(error) = undone {
            warn!("what was made before the failure could not be removed: {error}");
        }
    }
    result
}

async fn make(cli: &Cli, netlink: Netlink, prepared: Prepared) -> Result<Agent, DaemonError> {
    let Prepared { registry, network, external, device, lease, entries } = prepared;
    let subnet = lease.key.subnet;
    let config = Config {
        network: network.network.network().to_bits(),
        slot_shift: 32 - u32::from(network.subnet_len),
        slots: Capacity::of(&network).slots,
        subnet: subnet.network().to_bits(),
        subnet_mask: subnet.netmask().to_bits(),
        vtep_address: external.address.to_bits(),
        vni: device.vni.get(),
        mtu: device.mtu,
        underlay_header_len: if external.link.mac.is_some() { 14 } else { 0 },
        port: device.port,
        vtep_mac: lease.vtep_mac.0,
        source_ports: device::local_ports(),
    };
    let endpoint = Endpoint {
        external: external.clone(),
        port: device.port,
        vni: device.vni,
        vtep_mac: lease.vtep_mac,
        overlay: 0,
    };

    let pins = PinDirectory::new(&cli.bpf_pin_dir, device.vni);
    let dataplane = Dataplane::load(pins, &config, Capacity::of(&network), cli.bpf_log_level)?;
    let mut agent = Agent {
        netlink,
        dataplane,
        underlay: Underlay::new(endpoint),
        peers: Peers::default(),
        network: network.network,
        external,
        device,
        own: lease.clone(),
        renewal: tokio::spawn(std::future::pending()),
        updates: mpsc::channel(1).1,
    };
    // Peers before programs: none that is attached may meet empty maps.
    agent.take_snapshot(&entries);
    agent.compare(Changed::Topology).await?;

    device::enable_forwarding()?;
    let link = agent.ensure_datapath(Existing::Replace).await?;
    agent.dataplane.discard_other_versions()?;
    let env = SubnetEnv { network: network.network, subnet, mtu: link.mtu, ip_masq: false };
    env.write(&cli.subnet_file())?;
    // Last: until here a host of flannel's could go on as it was.
    if let Err(error) = agent.netlink.sweep(&link, network.network).await {
        warn!("{error}");
    }
    info!("{} carries {subnet} to {} peers", link.name, agent.dataplane.peers.len());

    let (updates, receiver) = mpsc::channel(1024);
    agent.updates = receiver;
    tokio::spawn(registry.clone().watch(updates));
    agent.renewal = tokio::spawn(renew(registry, lease));
    Ok(agent)
}

/// The running agent.
struct Agent {
    netlink: Netlink,
    dataplane: Dataplane,
    underlay: Underlay,
    peers: Peers,
    network: Ipv4Net,
    external: External,
    device: VxlanDevice,
    own: OwnLease,
    /// Ends when the lease is lost.
    renewal: JoinHandle<()>,
    updates: mpsc::Receiver<Update>,
}

/// Whether this host still holds its lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Held,
    Lost,
}

impl Agent {
    /// Follows store and kernel until a signal, or until the lease is lost, which ends the process as flannel's does:
    /// started anew, it takes a lease again.
    async fn follow(
        mut self,
        mut device_events: mpsc::Receiver<DeviceEvent>,
        mut shutdown: Shutdown,
    ) -> Result<(), DaemonError> {
        let mut compare = interval(COMPARE_PERIOD);
        compare.set_missed_tick_behavior(MissedTickBehavior::Delay);
        compare.reset();
        let mut pending = None;
        let mut not_before = Instant::now();
        loop {
            tokio::select! {
                () = shutdown.requested() => {
                    info!("stopped as asked; the datapath goes on");
                    return Ok(());
                }
                _ = &mut self.renewal => {
                    warn!("Lease has been revoked. Shutting down daemon.");
                    return Ok(());
                }
                Some(update) = self.updates.recv() => {
                    if self.take_updates(update) == Standing::Lost {
                        warn!("Lease has been revoked. Shutting down daemon.");
                        return Ok(());
                    }
                    self.underlay.look_up(&self.netlink, &self.peers).await;
                    self.write_peers();
                }
                Some(DeviceEvent { kind, ifindex }) = device_events.recv() => {
                    let event = match ifindex {
                        // Its neighbours are ours.
                        Some(index) if self.underlay.is_overlay(index) => Some(Changed::Topology),
                        Some(index) if !self.underlay.depends_on(index) => None,
                        _ => Some(kind),
                    };
                    if pending != Some(Changed::Topology) {
                        pending = event.or(pending);
                    }
                }
                () = sleep_until(not_before), if pending.is_some() => {
                    self.compare_or_say(pending.take().unwrap_or(Changed::Topology)).await?;
                    not_before = Instant::now() + SETTLE_TIME;
                }
                _ = compare.tick() => self.compare_or_say(Changed::Topology).await?,
            }
        }
    }

    /// Takes in an update and all that wait behind it.
    fn take_updates(&mut self, first: Update) -> Standing {
        let mut next = Some(first);
        while let Some(update) = next {
            let standing = match update {
                Update::Snapshot(entries) => self.take_snapshot(&entries),
                Update::Set(entry) => self.take_entry(&entry),
                Update::Removed(key) if key == self.own.key => Standing::Lost,
                Update::Removed(key) => {
                    self.apply(PeerChange::Remove(key.subnet));
                    Standing::Held
                }
            };
            if standing == Standing::Lost {
                return Standing::Lost;
            }
            next = self.updates.try_recv().ok();
        }
        Standing::Held
    }

    fn take_snapshot(&mut self, entries: &[Entry]) -> Standing {
        let peers: BTreeMap<_, _> =
            entries.iter().filter_map(|entry| Some((entry.key.subnet, self.peer_of(entry)?))).collect();
        for change in self.peers.replace(peers) {
            debug!("{change:?}");
        }
        let is_own = |entry: &Entry| entry.key == self.own.key && entry.attributes.public_ip == self.external.public_ip;
        if entries.iter().any(is_own) { Standing::Held } else { Standing::Lost }
    }

    fn take_entry(&mut self, entry: &Entry) -> Standing {
        if entry.key == self.own.key {
            let is_own = entry.attributes.public_ip == self.external.public_ip;
            return if is_own { Standing::Held } else { Standing::Lost };
        }
        let subnet = entry.key.subnet;
        // A lease that came to name no VTEP is one peer less.
        let change = self.peer_of(entry).map_or(PeerChange::Remove(subnet), |peer| PeerChange::Set(subnet, peer));
        self.apply(change);
        Standing::Held
    }

    fn apply(&mut self, change: PeerChange) {
        if let Some(change) = self.peers.apply(change) {
            debug!("{change:?}");
        }
    }

    /// The host to encapsulate to for an entry, unless it is this one or none of our kind.
    fn peer_of(&self, entry: &Entry) -> Option<Peer> {
        if entry.key == self.own.key || entry.attributes.public_ip == self.external.public_ip {
            return None;
        }
        entry.peer().inspect_err(|error| warn!("the lease {} is passed over: {error}", entry.key)).ok()
    }

    /// Makes the device, what leads into it and what is attached to it, or what of that is not there.
    async fn ensure_datapath(&mut self, existing: Existing) -> Result<Link, DaemonError> {
        let Self { netlink, dataplane, underlay, external, device, own, network, .. } = self;
        let link = netlink.ensure_vxlan(device, own.vtep_mac.0).await?;
        underlay.set_overlay(link.index);
        dataplane.attach(Hook::FromUnderlay, &external.link.name, external.link.index)?;
        dataplane.attach(Hook::FromOverlay, &link.name, link.index)?;
        dataplane.attach(Hook::ToOverlay, &link.name, link.index)?;
        netlink.ensure_address(&link, *network, own.key.subnet.network()).await?;
        netlink.ensure_route(&link, device, *network, existing).await?;
        Ok(link)
    }

    /// Repairs and compares. What fails is said, and tried again at the next event or period; an external interface that
    /// is gone is nothing to repair.
    async fn compare_or_say(&mut self, event: Changed) -> Result<(), DaemonError> {
        if event == Changed::Topology
            && let Err(error) = self.ensure_datapath(Existing::Keep).await
        {
            warn!("{error}; trying again in {COMPARE_PERIOD:?}");
        }
        if let Err(error) = self.compare(event).await {
            warn!("{error}; comparing again in {COMPARE_PERIOD:?}");
        }
        let External { link, .. } = &self.external;
        if self.underlay.has_link(link.index) { Ok(()) } else { Err(DaemonError::InterfaceGone(link.name.clone())) }
    }

    /// Brings the maps to what lease table and kernel say now.
    async fn compare(&mut self, event: Changed) -> Result<(), DaemonError> {
        self.underlay.refresh(&self.netlink, &self.peers, event).await?;
        self.dataplane.peers.sync(&self.underlay.desired(&self.peers))?;
        Ok(())
    }

    fn write_peers(&mut self) {
        if let Err(error) = self.dataplane.peers.sync(&self.underlay.desired(&self.peers)) {
            warn!("{error}; comparing again in {COMPARE_PERIOD:?}");
        }
    }
}

/// Keeps the lease, three times per term. Returns when the store no longer has it.
async fn renew(mut registry: Registry, lease: OwnLease) {
    let mut back_off = retry::BackOff::default();
    let mut delay = LEASE_TTL / 3;
    loop {
        tokio::time::sleep(delay).await;
        match registry.keep_alive(&lease).await {
            Ok(true) => {
                debug!("lease {} renewed", lease.key.subnet);
                back_off.reset();
                delay = LEASE_TTL / 3;
            }
            Ok(false) => return,
            Err(error) => {
                delay = back_off.delay();
                warn!("{error}; renewing the lease again in {delay:?}");
            }
        }
    }
}

/// SIGINT and SIGTERM.
struct Shutdown {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl Shutdown {
    fn listen() -> Result<Self, DaemonError> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).map_err(DaemonError::Signal)?,
            terminate: signal(SignalKind::terminate()).map_err(DaemonError::Signal)?,
        })
    }

    async fn requested(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
