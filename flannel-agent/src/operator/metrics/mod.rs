//! What Prometheus is told: over HTTP by the agent itself, and by `flannel-agent metrics` for node_exporter's textfile collector.
//!
//! * [`catalogue`] — each metric; pure
//! * [`exposition`] — the text formats; pure
//! * `agent` — what the agent says of itself
//! * `dataplane` — what the kernel has
//! * `host` — what is the same for all overlays, and the process
//!
//! Nothing that can't be read fails the rest: it is missing, and [`SourceUp`](Metric::SourceUp) says so.

mod agent;
pub mod catalogue;
mod dataplane;
pub mod exposition;
mod host;

use std::{
    collections::BTreeMap,
    fmt::Display,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use flannel_common::{maps::ABI_VERSION, vxlan::Vni};
use tracing::{debug, warn};

use self::{
    catalogue::Metric,
    exposition::{Exposition, Format},
};
use super::OperatorError;
use crate::{
    atomic_file,
    cli::Cli,
    dataplane::pinned_vnis,
    device::Netlink,
    lock::Lock,
    status::{Status, now},
    waiting::Waiting,
};

/// For everybody to read: node_exporter has a user of its own.
const MODE: u32 = 0o644;

/// Where metrics come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    /// What agents wrote of themselves.
    Status,
    /// The programs' counters.
    Counters,
    /// The flows past the host's stack.
    Flows,
    /// The maps of peers.
    Peers,
    /// The kernel's neighbours.
    Neighbours,
    /// What is attached.
    Hooks,
    /// `/proc`.
    Host,
}

impl Source {
    const ALL: [Self; 7] =
        [Self::Status, Self::Counters, Self::Flows, Self::Peers, Self::Neighbours, Self::Hooks, Self::Host];

    const fn label(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Counters => "counters",
            Self::Flows => "flows",
            Self::Peers => "peers",
            Self::Neighbours => "neighbours",
            Self::Hooks => "hooks",
            Self::Host => "host",
        }
    }
}

/// What was read, and what could not be.
#[derive(Default)]
struct Collected {
    exposition: Exposition,
    /// What was wrong last, by the source.
    failed: BTreeMap<Source, String>,
}

impl Collected {
    /// What was read of a source.
    fn read<T, E: Display>(&mut self, source: Source, result: Result<T, E>) -> Option<T> {
        result.inspect_err(|error| drop(self.failed.insert(source, error.to_string()))).ok()
    }
}

/// Whose metrics are told.
#[derive(Clone, Copy, Debug)]
enum Whose {
    /// Of all overlays of this host.
    Host,
    /// Of this process, which began then, in seconds since 1970.
    Process { started: u64 },
}

/// Which metrics are told, and where they come from.
#[derive(Clone, Debug)]
pub struct Metrics {
    run_dir: PathBuf,
    pin_dir: PathBuf,
    is_per_peer: bool,
    whose: Whose,
}

impl Metrics {
    /// Those of every overlay of this host, whether or not agents run.
    pub fn of_host(cli: &Cli) -> Self {
        Self {
            run_dir: cli.run_dir.clone(),
            pin_dir: cli.bpf_pin_dir.clone(),
            is_per_peer: cli.metrics_per_peer,
            whose: Whose::Host,
        }
    }

    /// Those of this process, which is an agent that has just begun, and of its overlay.
    pub fn of_this_agent(cli: &Cli) -> Self {
        Self { whose: Whose::Process { started: now() }, ..Self::of_host(cli) }
    }

    /// Reads them. What can't be read is left out.
    pub async fn collect(&self) -> Exposition {
        let Collected { exposition, failed } = self.collected().await;
        for (source, error) in failed {
            debug!("metrics: {}: {error}", source.label());
        }
        exposition
    }

    async fn collected(&self) -> Collected {
        let mut collected = Collected::default();
        let layout = ABI_VERSION.to_string();
        collected.exposition.add(Metric::BuildInfo, &[env!("CARGO_PKG_VERSION"), &layout], true);
        let statuses = self.statuses(&mut collected);
        let netlink = collected.read(Source::Neighbours, Netlink::open());
        for (vni, status) in &statuses {
            let is_running = match self.whose {
                Whose::Process { .. } => Some(true),
                Whose::Host => Lock::is_held(&self.run_dir, *vni).ok(),
            };
            agent::tell(&mut collected.exposition, *vni, status, is_running);
            let netlink = netlink.as_ref().map(|(netlink, ..)| netlink);
            dataplane::Reading { pin_dir: &self.pin_dir, vni: *vni, status, netlink, is_per_peer: self.is_per_peer }
                .tell(&mut collected)
                .await;
        }
        // What agents pinned that left no status.
        if let Whose::Host = self.whose {
            let mut pinned = pinned_vnis(&self.pin_dir);
            pinned.retain(|vni| statuses.iter().all(|(known, _)| known != vni));
            pinned.sort_by_key(|vni| vni.get());
            pinned.into_iter().for_each(|vni| dataplane::counters(&mut collected, &self.pin_dir, vni));
        }
        host::conntrack(&mut collected);
        if let Whose::Process { started } = self.whose {
            host::process(&mut collected, started);
        }
        for source in Source::ALL {
            let is_up = !collected.failed.contains_key(&source);
            collected.exposition.add(Metric::SourceUp, &[source.label()], is_up);
        }
        collected
    }

    /// What agents wrote of themselves that are meant.
    fn statuses(&self, collected: &mut Collected) -> Vec<(Vni, Status)> {
        let is_meant = |pid: u32| match self.whose {
            Whose::Host => true,
            Whose::Process { .. } => pid == std::process::id(),
        };
        let waiting = Waiting::read_all(&self.run_dir).iter().filter(|waiting| is_meant(waiting.pid)).count();
        collected.exposition.add(Metric::AgentsWaiting, &[], waiting);
        let statuses = Status::read_each(&self.run_dir);
        let statuses =
            statuses.into_iter().filter_map(|(vni, status)| Some((vni, collected.read(Source::Status, status)?)));
        statuses.filter(|(_, status)| is_meant(status.pid)).collect()
    }
}

/// Prints the metrics of every overlay of this host, or writes them to a file in one step. What could not be read is said.
///
/// # Errors
/// [`OperatorError::Textfile`] or [`OperatorError::Output`].
pub async fn print(cli: &Cli, textfile: Option<&Path>) -> Result<(), OperatorError> {
    let Collected { exposition, failed } = Metrics::of_host(cli).collected().await;
    for (source, error) in failed {
        warn!("what comes from the source {:?} is missing: {error}", source.label());
    }
    let text = exposition.encode(Format::Text);
    match textfile {
        Some(path) => atomic_file::write(path, text.as_bytes(), MODE)?,
        None => io::stdout().lock().write_all(text.as_bytes()).map_err(OperatorError::Output)?,
    }
    Ok(())
}
