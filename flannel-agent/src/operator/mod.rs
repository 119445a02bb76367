//! The operator's commands. They read what the agent pinned and wrote, so that all but requests work without one.

mod asked;
mod audit;
pub mod bundle;
pub mod capture;
mod config;
mod dataplane;
mod decode;
pub mod doctor;
mod drops;
pub mod explain;
mod hooks;
mod host_settings;
mod lease;
mod manual;
pub mod metrics;
pub mod overview;
mod peers;
pub mod ping;
mod pod_settings;
mod refused;
mod secrets;
pub mod status;
pub mod trace;
mod unreached;
mod version;

use std::{array, time::Duration};

use flannel_common::vxlan::Vni;
use nix::net::if_::if_indextoname;

pub use self::{
    audit::print as print_audit,
    bundle::make as make_bundle,
    capture::print as print_capture,
    config::{print as print_config, validate},
    doctor::print as print_doctor,
    drops::{follow as follow_drops, print as print_drops},
    explain::print as print_explanation,
    lease::print as print_lease,
    manual::{manual, print_completions},
    metrics::print as print_metrics,
    peers::print as print_peers,
    status::print as print_status,
    trace::print as print_trace,
    version::print as print_version,
};
use crate::{
    atomic_file::WriteError,
    cli::Cli,
    config::{BackendType, ConfigError},
    control::{self, ControlError, Reply, Request},
    dataplane::{DataplaneError, PinDirectory, PinnedPeers, pinned_counters, pinned_vnis},
    device::DeviceError,
    lock::Lock,
    plural::counted,
    status::{ReadError, Status, TunnelStatus},
    udp,
};

/// How long an agent is waited for that is to do something.
const LIMIT: Duration = Duration::from_secs(5);

/// A command could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// There is nothing to read.
    #[error(transparent)]
    Status(#[from] ReadError),
    /// The agent was not reached.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The agent would not.
    #[error("the agent of flannel.{vni} refuses: {reason}")]
    Refused {
        /// Whose.
        vni: Vni,
        /// Why.
        reason: String,
    },
    /// Pins.
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    /// The kernel was not asked what is attached.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A network config can't be read.
    #[error("read the network config of {place}: {source}")]
    NoConfig {
        /// Where it should be.
        place: String,
        /// Why not.
        source: std::io::Error,
    },
    /// The store has none that can be used, or does not answer.
    #[error("{0}")]
    Asked(String),
    /// A network config that the agent would refuse.
    #[error("{place}: {source}")]
    Config {
        /// Where it is.
        place: String,
        /// What is wrong with it.
        source: Box<ConfigError>,
    },
    /// The archive could not be made.
    #[error(transparent)]
    Bundle(#[from] bundle::BundleError),
    /// A manual page could not be written.
    #[error("write the manual: {0}")]
    Manual(std::io::Error),
    /// Nobody leases what is asked for.
    #[error(
        "no peer of this host's overlays has {0}: neither as VTEP address nor in its lease; `flannel-agent peers` lists them"
    )]
    NoPeer(ping::Target),
    /// Echo requests.
    #[error(transparent)]
    Echo(#[from] ping::EchoError),
    /// A packet was to be traced.
    #[error(transparent)]
    Trace(#[from] Box<trace::TraceError>),
    /// Packets were to be captured.
    #[error(transparent)]
    Capture(#[from] capture::CaptureError),
    /// Something is no event.
    #[error("{reason:?} is no reason{hint}; `flannel-agent counters` lists them")]
    UnknownReason {
        /// As it was written.
        reason: String,
        /// What may have been meant.
        hint: String,
    },
    /// A sample is not there, or no longer.
    #[error("no sample of {reason} has the number {number} by now; `flannel-agent drops` lists those that are kept")]
    NoSample {
        /// Of what.
        reason: &'static str,
        /// What was asked for.
        number: u64,
    },
    /// The counters were asked for where no agent ever ran.
    #[error("no dataplane is pinned below {0}; name the directory with --bpf-pin-dir")]
    NoDataplane(std::path::PathBuf),
    /// The metrics were not written where they were asked for.
    #[error(transparent)]
    Textfile(#[from] WriteError),
    /// The metrics were not printed.
    #[error("print the metrics: {0}")]
    Output(std::io::Error),
}

/// Prints every counter of every pinned overlay, and of every tunnel in user space, whose agent tells them every few seconds.
///
/// # Errors
/// [`OperatorError::NoDataplane`], [`OperatorError::Dataplane`] or [`OperatorError::Status`].
pub fn print_counters(cli: &Cli) -> Result<(), OperatorError> {
    let (vnis, tunnels) = (pinned_vnis(&cli.bpf_pin_dir), tunnels(cli)?);
    if vnis.is_empty() && tunnels.is_empty() {
        return Err(OperatorError::NoDataplane(cli.bpf_pin_dir.clone()));
    }
    for vni in vnis {
        println!("{:<28}{:>12}{:>16}  flannel.{vni}", "event", "packets", "bytes");
        for (event, counter) in pinned_counters(&PinDirectory::new(&cli.bpf_pin_dir, vni))? {
            println!("{:<28}{:>12}{:>16}  {}", event.label(), counter.packets, counter.bytes, event.description());
        }
    }
    for (vni, tunnel) in tunnels {
        println!("{:<32}{:>12}  {}, VNI {vni}", "event", "packets", tunnel.device);
        for event in udp::Event::ALL {
            let packets = tunnel.packets.get(event.label()).copied().unwrap_or(0);
            println!("{:<32}{packets:>12}  {}", event.label(), event.description());
        }
    }
    Ok(())
}

/// The tunnels in user space of this host's agents, as they were told of last.
fn tunnels(cli: &Cli) -> Result<Vec<(Vni, TunnelStatus)>, ReadError> {
    let statuses = match Status::read_all(&cli.run_dir) {
        Err(ReadError::None(_)) => Vec::new(),
        statuses => statuses?,
    };
    Ok(statuses.into_iter().filter_map(|(vni, status)| Some((vni, status.tunnel?))).collect())
}

/// Has every agent of this run directory release the peers that it holds.
///
/// # Errors
/// [`OperatorError`].
pub async fn release_guard(cli: &Cli) -> Result<(), OperatorError> {
    for (vni, _) in Status::read_all(&cli.run_dir)? {
        match control::ask(&control::path(&cli.run_dir, vni), Request::ReleaseGuard, Duration::ZERO, LIMIT).await? {
            Reply::Released { peers } => println!("flannel.{vni}: {} released", counted(peers, "peer")),
            Reply::Refused { reason } => return Err(OperatorError::Refused { vni, reason }),
            reply @ Reply::Condition(_) => {
                return Err(OperatorError::Refused { vni, reason: format!("it answers something else: {reply:?}") });
            }
        }
    }
    Ok(())
}

/// Whether an agent serves that overlay now. [`None`] where that can't be told: only its user may know.
fn is_running(cli: &Cli, vni: Vni) -> Option<bool> {
    Lock::is_held(&cli.run_dir, vni).ok()
}

/// What follows an overlay's name where it is known that nobody serves it.
const fn agent_note(is_running: Option<bool>) -> &'static str {
    match is_running {
        Some(false) => " (no agent is running; the programs go on without one)",
        Some(true) | None => "",
    }
}

/// Where an overlay's peers are.
fn pinned_peers(pins: &PinDirectory, status: &Status) -> PinnedPeers {
    PinnedPeers {
        pins: pins.clone(),
        network: status.network,
        subnet_len: status.lease.subnet.prefix_len(),
        is_direct: status.direct_routing,
        has_tunnel: status.backend_type() == BackendType::Vxlan,
    }
}

/// [`None`] for a link that is gone.
fn interface_name(ifindex: u32) -> Option<String> {
    if_indextoname(ifindex).ok()?.into_string().ok()
}

/// More than these are not named one by one.
const MOST_NAMED: usize = 8;

fn named<T: AsRef<str>>(all: &[T]) -> String {
    let first: Vec<_> = all.iter().take(MOST_NAMED).map(AsRef::as_ref).collect();
    let named = first.join(", ");
    match all.len().saturating_sub(MOST_NAMED) {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

/// Rows in columns that are as wide as their widest cell, two blanks apart. A library that lays out cells of any kind takes 30 ms for
/// 5,000 peers.
fn rows<const N: usize>(rows: impl IntoIterator<Item = [String; N]>) -> String {
    let rows: Vec<_> = rows.into_iter().collect();
    let widths: [usize; N] =
        array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default());
    let line = |row: &[String; N]| -> String {
        row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}  ")).collect()
    };
    rows.iter().map(|row| line(row).trim_end().to_owned() + "\n").collect()
}
