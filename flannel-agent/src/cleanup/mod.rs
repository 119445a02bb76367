//! Taking away everything that the agent made on this host. The lease stays in the store until it ends, so that a host
//! that comes back has its subnet again.

use std::{fs, io};

use flannel_common::vxlan::Vni;
use tracing::info;

use crate::{
    cli::Cli,
    conntrack, control,
    dataplane::{self, DataplaneError},
    device::{DeviceError, Netlink, vxlan::VxlanDevice},
    last_known::LastKnown,
    lock::{Lock, LockError},
    netfilter::{self, NetfilterError},
    status::Status,
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
        path: std::path::PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Takes away pins, filters, devices with their routes, packet rules, and `subnet.env`.
///
/// # Errors
/// [`CleanupError::Running`] before anything is touched, else the first of what failed.
pub async fn run(cli: &Cli) -> Result<(), CleanupError> {
    let (netlink, _events, _connection) = Netlink::open()?;
    let vnis = dataplane::pinned_vnis(&cli.bpf_pin_dir);
    let locks: Vec<Lock> = vnis.iter().map(|vni| Lock::take(&cli.run_dir, *vni)).collect::<Result<_, _>>()?;
    for vni in &vnis {
        undo(cli, &netlink, *vni, true, true).await?;
    }
    drop(locks);
    for vni in &vnis {
        for path in [
            LastKnown::path(&cli.run_dir, *vni),
            Status::path(&cli.run_dir, *vni),
            control::path(&cli.run_dir, *vni),
            Lock::path(&cli.run_dir, *vni),
        ] {
            remove_file(&path)?;
        }
    }
    conntrack::restore(&cli.run_dir).map_err(|source| CleanupError::File { path: cli.run_dir.clone(), source })?;
    remove_file(&cli.subnet_file())?;
    // Only where it is empty: others may keep files there.
    let _kept = fs::remove_dir(&cli.run_dir);
    info!("everything that the agent made on this host is removed; its lease stays in the store until it ends");
    Ok(())
}

/// Takes away what was made: programs and maps with packet rules and the blackhole route, the device with what hangs on it, or both.
///
/// # Errors
/// [`CleanupError`].
pub async fn undo(cli: &Cli, netlink: &Netlink, vni: Vni, programs: bool, device: bool) -> Result<(), CleanupError> {
    // Said last: it keeps nothing else from being taken away.
    let rules = if programs { netfilter::remove(vni).await } else { Ok(()) };
    if programs {
        netlink.set_blackhole(vni, None).await?;
        // The external interface of the agent that attached them is not known here.
        for link in netlink.links().await? {
            dataplane::detach_filters(&link.name, vni);
        }
        dataplane::remove(&cli.bpf_pin_dir, vni)?;
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

fn remove_file(path: &std::path::Path) -> Result<(), CleanupError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(CleanupError::File { path: path.to_owned(), source }),
    }
}
