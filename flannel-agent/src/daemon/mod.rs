//! The life of the daemon: wait for the store, set up, follow changes.
//!
//! * `start` — what is known before anything is touched: from the store, or where that is away, from the last run
//! * `setup` — making all of it
//! * `agent` — the loop that carries what happens between the three, none of which knows another:
//! * `leases` — what follows the store
//! * `datapath`, `reconcile` — what keeps the host in step: which of three, and the three
//! * `report` — what is told

mod agent;
mod datapath;
mod leases;
mod reconcile;
mod report;
mod setup;
mod start;

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tracing::info;

use crate::{
    atomic_file::WriteError,
    backend::{BackendError, has_datapath, is_in_user_space},
    cleanup::CleanupError,
    cli::{Cli, InvalidMargin},
    dataplane::{self, DataplaneError, Features},
    device::{DeviceError, Netlink, external::SelectError},
    docker_opts::DockerOptsError,
    health::{self, Health, ServeError},
    lock::{Lock, LockError, NamespaceLock},
    operator::{OperatorError, metrics::Metrics, overview::Overviews},
    page::{self, PageError},
    preflight::{self, PreflightError},
    privileges::{self, PrivilegesError},
    registry::RegistryError,
    udp::UdpError,
};

/// Why the daemon ends.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The host lacks what no waiting brings.
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    /// The process keeps what it should not.
    #[error(transparent)]
    Privileges(#[from] PrivilegesError),
    /// No interface to the other hosts.
    #[error(transparent)]
    Interface(#[from] SelectError),
    /// The kernel's network.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The backend can't be had on this host.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// Programs or maps.
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    /// The store, in a way that waiting does not heal.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The tunnel in user space.
    #[error(transparent)]
    Tunnel(#[from] UdpError),
    /// Another agent serves this overlay.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A file of ours.
    #[error(transparent)]
    File(#[from] WriteError),
    /// Taking something away.
    #[error(transparent)]
    Cleanup(#[from] CleanupError),
    /// No signal handler.
    #[error("wait for signals: {0}")]
    Signal(io::Error),
    /// Health probes.
    #[error(transparent)]
    Health(#[from] ServeError),
    /// The page.
    #[error(transparent)]
    Page(#[from] PageError),
    /// A flag that is out of range.
    #[error(transparent)]
    Margin(#[from] InvalidMargin),
    /// A command of the operator's.
    #[error(transparent)]
    Operator(#[from] OperatorError),
    /// Docker's options.
    #[error(transparent)]
    DockerOpts(#[from] DockerOptsError),
}

impl DaemonError {
    /// The process' exit code, as `--help` explains it.
    pub const fn exit_code(&self) -> u8 {
        const FAILED: u8 = 1;
        const HOST_LACKS: u8 = 77;
        const BAD_CONFIGURATION: u8 = 78;
        match self {
            // The kernel said no to something else than what the host has to have.
            Self::Tunnel(UdpError::Device(_) | UdpError::Thread(_)) => FAILED,
            Self::Preflight(_)
            | Self::Tunnel(_)
            | Self::Interface(SelectError::NoMatch(_))
            | Self::Dataplane(
                DataplaneError::NotBpffs { .. } | DataplaneError::Load(_) | DataplaneError::Program { .. },
            ) => HOST_LACKS,
            Self::Margin(_) | Self::Backend(_) => BAD_CONFIGURATION,
            Self::Registry(error) if error.is_misconfiguration() => BAD_CONFIGURATION,
            _ => FAILED,
        }
    }
}

/// Runs until a signal or until the lease is taken away, then leaves the datapath as it is.
///
/// Until it knows of a lease it touches nothing on the host, so waiting can be interrupted at any time. Setting up takes
/// milliseconds, is not interrupted, and is undone where it fails and nothing was there before.
///
/// # Errors
/// [`DaemonError`], where going on or trying again can't help.
pub async fn run(cli: &Cli) -> Result<(), DaemonError> {
    // First: what does not work without is known at once, and not when a certificate is read anew.
    privileges::give_up()?;
    let mut shutdown = Shutdown::listen()?;
    cli.renew_interval()?;
    let features = host_features(cli);
    if features.is_err() && !start::has_no_datapath(cli).await {
        features?;
        return Ok(());
    }
    let (netlink, device_events, _connection) = Netlink::open()?;
    let health = Health::default();
    if let Some(address) = cli.healthz() {
        health::serve(address, health.clone(), Metrics::of_this_agent(cli)).await?;
    }
    if let Some(address) = cli.http_ui {
        page::serve(address, Overviews::of_this_agent(cli, health.clone())).await?;
    }

    let mut prepared = tokio::select! {
        prepared = start::prepare(cli, &netlink) => prepared?,
        () = shutdown.requested() => return Ok(()),
    };
    let features = if has_datapath(prepared.backend.kind()) { features? } else { Features::default() };
    let _lock = match prepared.lock.take() {
        Some(lock) => lock,
        None => Lock::take(&cli.run_dir, prepared.backend.vni())?,
    };
    // Without a datapath there is nothing that another could have too.
    let backend = prepared.backend.kind();
    let _namespace_lock = match has_datapath(backend) || is_in_user_space(backend) {
        true => Some(NamespaceLock::take(prepared.backend.vni())?),
        false => None,
    };
    let agent = setup::set_up(cli, netlink, device_events, prepared, features, &health).await?;
    health.set_ready();
    health::ready();
    tokio::spawn(health::keep_watchdog(health));
    agent.follow(shutdown).await;
    Ok(())
}

/// What the kernel has for programs, where the host has all that they need.
fn host_features(cli: &Cli) -> Result<Features, DaemonError> {
    let features = preflight::check()?;
    info!("this kernel {features}");
    dataplane::require_bpffs(&cli.bpf_pin_dir)?;
    Ok(features)
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
