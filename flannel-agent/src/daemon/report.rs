//! What is told: this host's status and what its next agent is left, as files in the run directory; whether it is well;
//! and what an operator asks.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use flannel_common::{maps::Config, vxlan::Vni};
use tokio::{
    sync::mpsc,
    task::{JoinHandle, spawn_blocking},
};
use tracing::warn;

use crate::{
    backend::Backend,
    config::NetworkConfig,
    control::{self, Condition, Pending},
    dataplane::Features,
    device::external::External,
    evidence::EvidenceStatus,
    health::{Health, Heartbeat, Silent},
    histogram::Histogram,
    last_known::LastKnown,
    registry::StoreKind,
    repair::DriftStatus,
    status::{
        API_VERSION, BypassStatus, LeaseStatus, MayStop, RoutesStatus, RulesStatus, Status, StoreStatus, XdpStatus, now,
    },
};

/// The status of an agent that has just begun.
pub(super) fn status(
    kind: StoreKind,
    network: &NetworkConfig,
    external: &External,
    backend: &Backend,
    lease: LeaseStatus,
) -> Status {
    Status {
        api_version: API_VERSION.to_owned(),
        written: 0,
        pid: std::process::id(),
        vni: backend.vni().get(),
        network: network.network,
        external_interface: external.link.name.clone(),
        underlay_interfaces: Vec::new(),
        public_ip: external.public_ip,
        mtu: backend.mtu(),
        backend: backend.kind().label().to_owned(),
        direct_routing: backend.flags() & Config::DIRECT != 0,
        features: Features::default(),
        bypass: BypassStatus::default(),
        xdp: XdpStatus::default(),
        routes: RoutesStatus::default(),
        rules: RulesStatus::default(),
        tunnel: None,
        lease,
        store: StoreStatus { kind, since: now(), ..StoreStatus::default() },
        config_differs: None,
        peers: 0,
        held: Vec::new(),
        held_total: Default::default(),
        other_backends: Default::default(),
        drift: DriftStatus::default(),
        may_stop: MayStop::default(),
        evidence: EvidenceStatus::default(),
        convergence: Histogram::default(),
        programs: Default::default(),
    }
}

/// Tells others of this host.
pub(super) struct Reporter {
    run_dir: PathBuf,
    vni: Vni,
    /// The status of an agent that has just begun.
    first: Status,
    missing: Missing,
    writing: Option<JoinHandle<()>>,
    health: Health,
    requests: mpsc::Receiver<Pending>,
    /// Why the status could not be written the last time.
    unwritten: Arc<Mutex<Option<String>>>,
}

/// What is to be written.
pub(super) struct Due {
    pub(super) status: Option<Status>,
    pub(super) known: Option<LastKnown>,
}

/// Which of the files were not as they should be when they were looked for, and are to be written again.
#[derive(Clone, Copy, Default)]
pub(super) struct Missing {
    pub(super) status: bool,
    pub(super) known: bool,
}

impl Reporter {
    pub(super) fn new(run_dir: PathBuf, vni: Vni, first: Status, health: Health) -> Self {
        // Pods do not hang on what an operator may ask.
        let unwritten = Arc::default();
        let condition = condition(health.clone(), Arc::clone(&unwritten));
        let requests = control::listen(&control::path(&run_dir, vni), condition).unwrap_or_else(|error| {
            warn!("no requests can be taken: {error}");
            mpsc::channel(1).1
        });
        Self { run_dir, vni, first, missing: Missing::default(), writing: None, health, requests, unwritten }
    }

    pub(super) fn heartbeat(&self, name: &'static str) -> Heartbeat {
        self.health.heartbeat(name)
    }

    /// The next thing that an operator asks.
    pub(super) async fn asked(&mut self) -> Pending {
        match self.requests.recv().await {
            Some(pending) => pending,
            None => std::future::pending().await,
        }
    }

    /// A status to put into what is known.
    pub(super) fn status(&self) -> Status {
        Status { written: now(), ..self.first.clone() }
    }

    /// Whether nothing is being written.
    pub(super) fn is_idle(&self) -> bool {
        self.writing.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Takes note of which files are gone, or could not be written.
    pub(super) fn look_for_files(&mut self) {
        self.missing.status |= !Status::path(&self.run_dir, self.vni).exists() || lock(&self.unwritten).is_some();
        self.missing.known |= !LastKnown::path(&self.run_dir, self.vni).exists();
    }

    pub(super) const fn missing(&self) -> Missing {
        self.missing
    }

    /// Writes what is due, beside the agent's own work.
    pub(super) fn write(&mut self, due: Due) {
        let write = self.writer(due);
        self.writing = Some(spawn_blocking(write));
    }

    /// Writes what is due, at once.
    pub(super) fn write_now(&mut self, due: Due) {
        self.writer(due)();
    }

    /// Waits until nothing is being written.
    pub(super) async fn written(&mut self) {
        if let Some(writing) = self.writing.take() {
            // It says itself what failed.
            let _ended = writing.await;
        }
    }

    fn writer(&mut self, Due { status, known }: Due) -> impl FnOnce() + use<> {
        self.missing = Missing::default();
        let (run_dir, vni, unwritten) = (self.run_dir.clone(), self.vni, Arc::clone(&self.unwritten));
        move || {
            let written = status.map_or(Ok(()), |status| {
                let written = status.write(&run_dir, vni);
                *lock(&unwritten) = written.as_ref().err().map(ToString::to_string);
                written
            });
            let kept = known.map_or(Ok(()), |known| known.write(&run_dir, vni));
            for error in [written, kept].into_iter().filter_map(Result::err) {
                warn!("{error}");
            }
        }
    }
}

/// What is answered when somebody asks how the agent is.
fn condition(health: Health, unwritten: Arc<Mutex<Option<String>>>) -> impl Fn() -> Condition {
    move || Condition {
        is_ready: health.is_ready(),
        silent: health.silent().map(|Silent { name, silence }| (name.to_owned(), silence.as_secs())),
        unwritten: lock(&unwritten).clone(),
    }
}

/// One text: whole, whoever panicked.
fn lock(unwritten: &Mutex<Option<String>>) -> MutexGuard<'_, Option<String>> {
    unwritten.lock().unwrap_or_else(PoisonError::into_inner)
}
