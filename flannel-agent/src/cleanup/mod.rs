//! Taking away everything that the agent made on this host, and nothing that somebody else uses by now. The lease stays in
//! the store until it ends, so that a host that comes back has its subnet again.
//!
//! * `takeover` — whether somebody else does
//!
//! An overlay is found by whatever is left of it: pins, files of the run directory, or a device with the agent's next hop.
//! Where flannel's daemon has taken it over, what only the agent can have made goes: programs, maps, its route with its
//! next hop, its files, its rules where they are told from flannel's. What the two have in common stays: the device with its
//! address, `subnet.env`, and the chains of iptables.

mod takeover;

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use flannel_common::vxlan::Vni;
use tracing::{info, warn};

use crate::{
    backend::{has_datapath, is_in_user_space},
    cli::Cli,
    config::BackendType,
    conntrack, control,
    dataplane::{self, DataplaneError, PinDirectory},
    device::{DeviceError, Link, Netlink, vxlan::VxlanDevice},
    last_known::LastKnown,
    lock::{Lock, LockError, NamespaceLock},
    netfilter::{self, NetfilterError},
    ownership::Written,
    status::Status,
    subnet_env, waiting,
};

/// Something could not be taken away. What could was.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// Pins.
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    /// Links.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// An agent still runs.
    #[error(transparent)]
    Running(#[from] LockError),
    /// Packet rules.
    #[error("remove the packet rules: {0}")]
    Netfilter(#[from] NetfilterError),
    /// A file.
    #[error("remove {path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Takes away pins, filters, devices with their routes, packet rules, and `subnet.env`, of every overlay of this host whose
/// agent does not run.
///
/// # Errors
/// The first of what failed, after the rest was done; [`CleanupError::Running`] for an overlay that was not touched.
pub async fn run(cli: &Cli) -> Result<(), CleanupError> {
    let (netlink, _events, _connection) = Netlink::open()?;
    let overlays = overlays(cli, &netlink).await?;
    waiting::remove_stale(&cli.run_dir);
    if overlays.is_empty() {
        let (pins, files) = (cli.bpf_pin_dir.display(), cli.run_dir.display());
        info!(
            "nothing of an agent is left on this host: no pins below {pins}, no files in {files}, no device with its next hop"
        );
        return Ok(());
    }
    let mut results = Vec::new();
    let mut running = Vec::new();
    let connections: usize = overlays.keys().map(|vni| connections(cli, *vni)).sum();
    for (vni, device) in &overlays {
        // An agent with other directories may serve the same number, and have what goes by it.
        let locks = Lock::take(&cli.run_dir, *vni).and_then(|lock| Ok((lock, NamespaceLock::take(*vni)?)));
        match locks {
            Ok(locks) => results.push(clean(cli, &netlink, *vni, device.as_ref(), &locks).await),
            Err(error) => {
                running.push(format!("flannel.{vni}"));
                results.push(Err(error.into()));
            }
        }
    }
    if running.is_empty() {
        results.push(restore_conntrack(cli, connections));
        // Only where it is empty: others may keep files there.
        let _kept = fs::remove_dir(&cli.run_dir);
    } else if running.len() < overlays.len() {
        info!("left as it is: {}, and what conntrack is told for all overlays", running.join(", "));
    }
    results.into_iter().collect()
}

/// How many TCP connections conntrack may have lost sight of.
fn connections(cli: &Cli, vni: Vni) -> usize {
    // Where the maps are gone, so is the knowledge.
    dataplane::pinned_connections(&PinDirectory::new(&cli.bpf_pin_dir, vni)).unwrap_or(0)
}

/// Has conntrack be as strict as it was, unless that would cut off connections that go on. What it was is kept then, for an
/// agent that comes back.
fn restore_conntrack(cli: &Cli, connections: usize) -> Result<(), CleanupError> {
    let changed = conntrack::changed(&cli.run_dir);
    if NamespaceLock::is_held_by_others() {
        // One with another run directory would have to put it back, and lose packets until it has.
        return Ok(());
    }
    if connections > 0 && !changed.is_empty() {
        info!(
            "left {} at 1: conntrack has seen few packets of {connections} TCP connections, and would call the rest of them \
             INVALID, which kube-proxy's rules drop; set them to 0 when these connections have ended",
            changed.join(" and ")
        );
        return Ok(());
    }
    conntrack::restore(&cli.run_dir).map_err(|source| CleanupError::File { path: cli.run_dir.clone(), source })
}

/// What agents left, with the devices that are there.
async fn overlays(cli: &Cli, netlink: &Netlink) -> Result<BTreeMap<Vni, Option<Link>>, DeviceError> {
    let left = dataplane::pinned_vnis(&cli.bpf_pin_dir).into_iter().chain(vnis_of_files(&cli.run_dir));
    let mut overlays: BTreeMap<_, _> = left.map(|vni| (vni, None)).collect();
    for (vni, _) in netlink.tuns().await? {
        // That of an agent with other directories.
        if NamespaceLock::holder(vni).is_none() {
            overlays.entry(vni).or_default();
        }
    }
    for link in netlink.links().await? {
        let Some(vni) = VxlanDevice::vni_of(&link.name) else { continue };
        if !overlays.contains_key(&vni) {
            if !netlink.has_our_next_hop(link.index).await? {
                continue;
            }
            // Of programs without a pin none would be left.
            if NamespaceLock::holder(vni).is_some() || dataplane::has_programs(link.index) {
                info!(
                    "left {}: it has programs of an agent with another --run-dir and --bpf-pin-dir; name these to clean it up",
                    link.name
                );
                continue;
            }
        }
        overlays.insert(vni, Some(link));
    }
    Ok(overlays)
}

async fn clean(
    cli: &Cli,
    netlink: &Netlink,
    vni: Vni,
    device: Option<&Link>,
    _locks: &(Lock, NamespaceLock),
) -> Result<(), CleanupError> {
    let name = VxlanDevice::name_of(vni);
    let status = status_of(cli, vni);
    let mut results = Vec::new();
    let taken = clear_kernel(cli, netlink, vni, device, status.as_ref(), &mut results).await?;
    // Nobody else can take that over.
    results.push(netlink.remove_tun(vni).await.map_err(Into::into));
    match taken {
        Some(reason) => {
            info!("removed the agent's programs, maps, files, and route of {name}");
            info!(
                "left {name} with its address, subnet.env and rules in iptables: {reason}. If nobody uses them, remove \
                 them by hand, as after flannel's daemon"
            );
        }
        None => {
            results.push(remove_subnet_env(cli, vni, status.as_ref()));
            info!("removed everything that the agent of {name} made; its lease stays in the store until it ends");
        }
    }
    results.extend(files(&cli.run_dir, vni).iter().map(|path| remove_file(path).map(drop)));
    results.into_iter().collect()
}

/// Takes away what an overlay's agent made in the kernel, or where somebody else has taken it over, what only an agent can have
/// made. What shows that, in words.
async fn clear_kernel(
    cli: &Cli,
    netlink: &Netlink,
    vni: Vni,
    device: Option<&Link>,
    status: Option<&Status>,
    results: &mut Vec<Result<(), CleanupError>>,
) -> Result<Option<String>, CleanupError> {
    let taken = takeover::evidence(cli, netlink, vni, device, status).await?;
    if taken.is_some() {
        results.push(netfilter::remove_own(vni).await.map_err(Into::into));
        results.push(undo_programs(cli, netlink, vni).await);
        if let Some(Link { name, index, .. }) = device {
            results.push(netlink.remove_route(name, *index).await.map_err(Into::into));
        }
        return Ok(taken);
    }
    // First: without programs they lead nowhere.
    if let Some(status) = status {
        results.push(netlink.remove_link_routes(status.network, None).await.map_err(Into::into));
    }
    results.push(undo(cli, netlink, vni, true, true).await);
    Ok(None)
}

/// Takes away what an agent made in the kernel for an overlay that has no datapath any more, or another one now that needs no
/// programs, and leaves its files. Touches nothing where none made any.
///
/// # Errors
/// [`CleanupError`].
pub async fn leave_datapath(cli: &Cli, netlink: &Netlink, vni: Vni, backend: BackendType) -> Result<(), CleanupError> {
    let keeps_tun = is_in_user_space(backend);
    let overlays = overlays(cli, netlink).await?;
    let (device, status) = (overlays.get(&vni).and_then(Option::as_ref), status_of(cli, vni));
    let is_made = match (device, &status) {
        _ if PinDirectory::new(&cli.bpf_pin_dir, vni).exists() => true,
        (_, Some(status)) if is_in_user_space(status.backend_type()) => !keeps_tun,
        (_, Some(status)) => has_datapath(status.backend_type()),
        (Some(device), None) => netlink.has_our_next_hop(device.index).await?,
        (None, None) => false,
    };
    if !keeps_tun {
        netlink.remove_tun(vni).await?;
    }
    if !is_made {
        return Ok(());
    }
    // One that goes on in user space has it already.
    let lock = if keeps_tun { None } else { Some(NamespaceLock::take(vni)?) };
    let connections = connections(cli, vni);
    let mut results = Vec::new();
    let taken = clear_kernel(cli, netlink, vni, device, status.as_ref(), &mut results).await?;
    drop(lock);
    if overlays.len() == 1 {
        results.push(restore_conntrack(cli, connections));
    }
    match taken {
        Some(reason) => info!("removed programs and maps of the backend before, and left the rest: {reason}"),
        None => info!("removed everything of the backend before"),
    }
    results.into_iter().collect()
}

/// What the agent of an overlay wrote last.
fn status_of(cli: &Cli, vni: Vni) -> Option<Status> {
    let all = Status::read_all(&cli.run_dir).unwrap_or_default();
    all.into_iter().find_map(|(of, status)| (of == vni).then_some(status))
}

/// Takes away what was made: programs and maps with packet rules and the blackhole route, the device with what hangs on it, or both.
///
/// # Errors
/// [`CleanupError`].
pub async fn undo(cli: &Cli, netlink: &Netlink, vni: Vni, programs: bool, device: bool) -> Result<(), CleanupError> {
    // Said last: it keeps nothing else from being taken away.
    let rules = if programs { netfilter::remove(vni).await } else { Ok(()) };
    if programs {
        undo_programs(cli, netlink, vni).await?;
    }
    let name = VxlanDevice::name_of(vni);
    match netlink.link_by_name(&name).await? {
        // The address, the route and the neighbour go with it.
        Some(message) if device => {
            netlink.delete_link(&name, message.header.index).await?;
            info!("removed {name}");
        }
        Some(message) if programs => netlink.remove_route(&name, message.header.index).await?,
        _ => {}
    }
    Ok(rules?)
}

async fn undo_programs(cli: &Cli, netlink: &Netlink, vni: Vni) -> Result<(), CleanupError> {
    netlink.set_blackhole(vni, None).await?;
    let interfaces: Vec<_> = netlink.links().await?.into_iter().map(|link| link.name).collect();
    Ok(dataplane::remove(&cli.bpf_pin_dir, vni, &interfaces)?)
}

/// Removes the `subnet.env` that an overlay's agent wrote.
fn remove_subnet_env(cli: &Cli, vni: Vni, status: Option<&Status>) -> Result<(), CleanupError> {
    let path = match Written::recall(&cli.run_dir, vni) {
        Some(written) => written.path,
        None => {
            let path = cli.subnet_file();
            let subnet = subnet_env::previous_subnet(&path);
            if status.is_some_and(|status| subnet.is_some_and(|subnet| subnet != status.lease.subnet)) {
                warn!("left {}: it is of another overlay", path.display());
                return Ok(());
            }
            path
        }
    };
    if remove_file(&path)? {
        info!("removed {}", path.display());
    }
    Ok(())
}

/// An overlay's files in the run directory.
fn files(run_dir: &Path, vni: Vni) -> [PathBuf; 5] {
    [
        LastKnown::path(run_dir, vni),
        Status::path(run_dir, vni),
        control::path(run_dir, vni),
        Written::record(run_dir, vni),
        // Last: until then nobody else begins.
        Lock::path(run_dir, vni),
    ]
}

/// The overlays that have some.
fn vnis_of_files(run_dir: &Path) -> Vec<Vni> {
    let entries = fs::read_dir(run_dir).into_iter().flatten().flatten();
    let vnis = entries.filter_map(|entry| {
        let name = entry.file_name();
        let number = name.to_str()?.strip_prefix("flannel.")?.split('.').next()?.parse().ok()?;
        let vni = Vni::new_checked(number).ok()?;
        files(run_dir, vni).contains(&entry.path()).then_some(vni)
    });
    vnis.collect()
}

/// Whether there was one.
fn remove_file(path: &Path) -> Result<bool, CleanupError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(CleanupError::File { path: path.to_owned(), source }),
    }
}
