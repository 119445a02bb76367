//! What the agent writes into its run directory as it goes: its status, and what is last known of the lease table.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use flannel_common::vxlan::Vni;
use tokio::task::{JoinHandle, spawn_blocking};
use tracing::{info, warn};

use crate::{
    bypass::{BypassFlag, Restriction},
    cli::Cli,
    config::{NetworkConfig, unknown_keys},
    dataplane::Features,
    device::{external::External, vxlan::VxlanDevice},
    escape::control_characters,
    last_known::LastKnown,
    lease::{LeaseTable, Peer},
    registry::{HostAddresses, OwnLease, PassedOver, Registry, RegistryError, ResyncCause, Snapshot, StoreKind},
    repair::Repair,
    status::{
        API_VERSION, BypassStatus, DriftStatus, EndsStatus, HeldPeer, LeaseState, LeaseStatus, RoutesStatus,
        RulesStatus, Status, StoreStatus, XdpStatus, now,
    },
    xdp::Choice,
};

/// No more entries are named than this, whatever the store holds; all are counted.
const MOST_NAMED: usize = 100;

/// Of what is wrong with an entry, no more is told than so many characters: it may cite what is in the store.
const MOST_TOLD: usize = 500;

/// The state of both files.
pub(super) struct Record {
    run_dir: PathBuf,
    vni: Vni,
    store: String,
    host: HostAddresses,
    /// Where the network config is.
    config_place: String,
    /// The network config that the datapath is made for, as the store had it.
    config: String,
    /// The one whose unknown keys were said last.
    reviewed: Vec<u8>,
    status: Status,
    status_is_due: bool,
    leases_are_due: bool,
    writing: Option<JoinHandle<()>>,
}

/// The status of an agent that has just begun.
pub(super) fn status(
    kind: StoreKind,
    network: &NetworkConfig,
    external: &External,
    device: &VxlanDevice,
    lease: LeaseStatus,
) -> Status {
    Status {
        api_version: API_VERSION.to_owned(),
        written: 0,
        pid: std::process::id(),
        vni: device.vni.get(),
        network: network.network,
        external_interface: external.link.name.clone(),
        public_ip: external.public_ip,
        mtu: device.mtu,
        features: Features::default(),
        bypass: BypassStatus::default(),
        xdp: XdpStatus::default(),
        routes: RoutesStatus::default(),
        rules: RulesStatus::default(),
        lease,
        store: StoreStatus { kind, since: now(), ..StoreStatus::default() },
        config_differs: None,
        peers: 0,
        held: Vec::new(),
        held_total: Default::default(),
        drift: DriftStatus::default(),
    }
}

/// What is wrong with an entry, for logs and terminals.
fn readable(reason: &str) -> String {
    let mut text: String = reason.chars().take(MOST_TOLD).collect();
    if text.len() < reason.len() {
        text += "...";
    }
    control_characters(&text).into_owned()
}

impl Record {
    #[expect(clippy::too_many_arguments, reason = "each is one line of the status")]
    pub(super) fn new(
        cli: &Cli,
        registry: &Registry,
        host: HostAddresses,
        network: &NetworkConfig,
        config: Vec<u8>,
        external: &External,
        device: &VxlanDevice,
        lease: &OwnLease,
        state: LeaseState,
    ) -> Self {
        let lease = LeaseStatus::new(lease.key.subnet, lease.vtep_mac, state);
        let status = status(registry.kind(), network, external, device, lease);
        let mut record = Self {
            run_dir: cli.run_dir.clone(),
            vni: device.vni,
            store: registry.identity().to_owned(),
            host,
            config_place: registry.config_place(),
            config: String::from_utf8_lossy(&config).into_owned(),
            reviewed: Vec::new(),
            status,
            status_is_due: true,
            leases_are_due: true,
            writing: None,
        };
        record.review_config(&config);
        record
    }

    /// Says which keys of a network config are unknown; of the same config once.
    pub(super) fn review_config(&mut self, config: &[u8]) {
        if self.reviewed == config {
            return;
        }
        self.reviewed = config.to_vec();
        for unknown in unknown_keys(&String::from_utf8_lossy(config)) {
            warn!("the network config in {}: {unknown}", self.config_place);
        }
    }

    pub(super) const fn features(&mut self, features: Features) {
        self.status.features = features;
        self.status_is_due = true;
    }

    pub(super) fn xdp(&mut self, choice: &Choice) {
        let xdp = XdpStatus { mode: choice.label().to_owned(), reason: choice.reason.clone() };
        self.status_is_due |= self.status.xdp != xdp;
        self.status.xdp = xdp;
    }

    pub(super) fn bypass(&mut self, flag: BypassFlag, time: Duration, conntrack_liberal: Option<bool>) {
        let bypass = &mut self.status.bypass;
        let before = (bypass.flag, bypass.revalidate_ms, bypass.conntrack_liberal);
        let now = (flag, time.as_millis() as u64, conntrack_liberal);
        self.status_is_due |= before != now;
        (bypass.flag, bypass.revalidate_ms, bypass.conntrack_liberal) = now;
    }

    /// What has to see each packet.
    pub(super) fn restrictions<'a>(&mut self, all: impl Iterator<Item = &'a Restriction>) {
        self.status.bypass.restrictions = all.cloned().collect();
        self.status_is_due = true;
    }

    pub(super) fn ends(&mut self, ends: EndsStatus) {
        self.status_is_due |= self.status.bypass.ends != ends;
        self.status.bypass.ends = ends;
    }

    /// Somebody else changed something, and it is as it should be again.
    pub(super) fn repaired(&mut self, repair: Repair, what: &str) {
        warn!("repaired ({}): {what}", repair.label());
        let repaired = self.status.drift.repaired.entry(repair.label().to_owned()).or_default();
        (repaired.count, repaired.last) = (repaired.count + 1, now());
        self.status_is_due = true;
    }

    /// How it stands with something that only others can repair; said when it changes.
    pub(super) fn waiting(&mut self, about: &str, problem: Option<String>) {
        let waiting = &mut self.status.drift.waiting;
        if waiting.get(about) == problem.as_ref() {
            return;
        }
        self.status_is_due = true;
        match problem {
            Some(problem) => {
                warn!("{problem}");
                waiting.insert(about.to_owned(), problem);
            }
            None => {
                info!("the {about} is well again");
                waiting.remove(about);
            }
        }
    }

    /// The external interface is another one, or has another address or MTU.
    pub(super) fn external(&mut self, external: &External, device: &VxlanDevice) {
        self.status.external_interface.clone_from(&external.link.name);
        (self.status.public_ip, self.status.mtu) = (external.public_ip, device.mtu);
        (self.status_is_due, self.leases_are_due) = (true, true);
    }

    pub(super) fn routes(&mut self, routes: RoutesStatus) {
        self.status_is_due |= self.status.routes != routes;
        self.status.routes = routes;
    }

    pub(super) fn rules(&mut self, rules: RulesStatus) {
        self.status_is_due |= self.status.rules != rules;
        self.status.rules = rules;
    }

    pub(super) const fn lease_state(&self) -> LeaseState {
        self.status.lease.state
    }

    /// A snapshot was read: what was said of single entries is said anew.
    pub(super) fn snapshot(&mut self, snapshot: &Snapshot, cause: ResyncCause) {
        let store = &mut self.status.store;
        if !store.following {
            (store.following, store.since) = (true, now());
        }
        store.problem = None;
        store.revision = snapshot.revision;
        store.cluster_id.clone_from(&snapshot.store_id);
        *store.resyncs.entry(cause.label().to_owned()).or_insert(0) += 1;
        store.passed_over.clear();
        store.remarks.clear();
        self.status_is_due = true;
    }

    /// The store is about to be asked. Until then it was not away: what came before took its time.
    pub(super) fn asks(&mut self) {
        let store = &mut self.status.store;
        if store.resyncs.is_empty() && store.problem.is_none() {
            store.since = now();
            self.status_is_due = true;
        }
    }

    pub(super) fn away(&mut self, reason: String) {
        let store = &mut self.status.store;
        if store.following || store.problem.is_none() {
            (store.following, store.since) = (false, now());
        }
        store.problem = Some(control_characters(&reason).into_owned());
        self.status_is_due = true;
    }

    pub(super) fn event(&mut self) {
        self.status.store.events += 1;
        self.status_is_due = true;
    }

    /// Something is no lease. What its holder announced before may count in its place.
    pub(super) fn pass_over(&mut self, PassedOver { name, reason, .. }: PassedOver, before: Option<Peer>) {
        let mut reason = readable(&reason);
        if let Some(Peer { public_ip, vtep_mac }) = before {
            reason += &format!("; what it announced before counts: {public_ip} with the MAC {vtep_mac}");
        }
        let store = &mut self.status.store;
        store.passed_over_total += 1;
        // It was about what the entry said before.
        store.remarks.remove(&name);
        self.status_is_due = true;
        if store.passed_over.get(&name) == Some(&reason) {
            return;
        }
        warn!("the entry {name:?} is passed over: {reason}");
        if store.passed_over.len() < MOST_NAMED {
            store.passed_over.insert(name, reason);
        }
    }

    /// Something is to be known of an entry that is used.
    pub(super) fn remark(&mut self, name: &str, remark: &str) {
        let remarks = &mut self.status.store.remarks;
        let remark = readable(remark);
        warn!("the entry {name:?}: {remark}");
        if remarks.len() < MOST_NAMED {
            remarks.insert(name.to_owned(), remark);
        }
        self.status_is_due = true;
    }

    /// Nothing is said of an entry any more: it is used, or is gone.
    pub(super) fn usable(&mut self, name: &str) {
        self.status.store.passed_over.remove(name);
        self.status.store.remarks.remove(name);
    }

    pub(super) fn config_differs(&mut self, difference: Option<String>) {
        let difference = difference.map(|difference| control_characters(&difference).into_owned());
        if let Some(difference) = &difference
            && self.status.config_differs.as_ref() != Some(difference)
        {
            warn!("{difference}");
        }
        self.status_is_due |= self.status.config_differs != difference;
        self.status.config_differs = difference;
    }

    pub(super) fn renewed(&mut self) {
        self.status.lease.renewals += 1;
        self.status_is_due = true;
    }

    pub(super) fn lease(&mut self, lease: &OwnLease, state: LeaseState) {
        let status = &mut self.status.lease;
        if state == LeaseState::Lost {
            status.losses += 1;
        }
        (status.subnet, status.vtep_mac, status.state) = (lease.key.subnet, lease.vtep_mac, state);
        status.contested = None;
        (self.status_is_due, self.leases_are_due) = (true, true);
    }

    /// Another host claimed the lease, and was told that this one lives.
    pub(super) fn claimed(&mut self) {
        let status = &mut self.status.lease;
        (status.claims, status.last_claim) = (status.claims + 1, now());
        if status.claims == 1 {
            warn!(
                "another host claims this host's address {} and the lease of {}; it was told that this one lives. Give each \
                 host an address of its own with --public-ip or --iface",
                self.status.public_ip, status.subnet
            );
        }
        self.status_is_due = true;
    }

    /// Another living host has this one's address and lease.
    pub(super) fn contested(&mut self, error: &RegistryError) {
        let (status, problem) = (&mut self.status.lease, error.to_string());
        if status.contested.as_ref() != Some(&problem) {
            warn!("{problem}");
        }
        (status.state, status.contested) = (LeaseState::Contested, Some(problem));
        self.status_is_due = true;
    }

    /// The peers have changed.
    pub(super) const fn peers_changed(&mut self) {
        self.leases_are_due = true;
    }

    /// Takes in how many peers there are, and who is held.
    pub(super) fn refresh(&mut self, table: &LeaseTable) {
        let (wall, clock) = (now(), Instant::now());
        let held: Vec<_> = table
            .held()
            .filter_map(|(subnet, hold)| {
                let peer = table.get(subnet)?;
                let since = wall.saturating_sub(clock.saturating_duration_since(hold.since).as_secs());
                Some(HeldPeer { subnet: *subnet, public_ip: peer.public_ip, reason: hold.reason, since })
            })
            .collect();
        let is_new = |peer: &HeldPeer| {
            let before = self.status.held.iter().find(|before| before.subnet == peer.subnet);
            before.is_none_or(|before| before.reason != peer.reason)
        };
        for peer in held.iter().filter(|peer| is_new(peer)) {
            *self.status.held_total.entry(peer.reason.label().to_owned()).or_insert(0) += 1;
        }
        self.status.held = held;
        self.status.peers = table.len();
        self.status_is_due = true;
    }

    /// Whether something is to be written, and nothing is being written.
    pub(super) fn is_due(&self) -> bool {
        (self.status_is_due || self.leases_are_due) && self.writing.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Writes what is due, beside the agent's own work.
    pub(super) fn write(&mut self, own: &OwnLease, table: &LeaseTable) {
        let write = self.take_due(own, table);
        self.writing = Some(spawn_blocking(write));
    }

    /// Writes what is due, at the end.
    pub(super) async fn finish(&mut self, own: &OwnLease, table: &LeaseTable) {
        if let Some(writing) = self.writing.take() {
            // It says itself what failed.
            let _ended = writing.await;
        }
        self.take_due(own, table)();
    }

    /// Writes what is gone of them, at once.
    pub(super) fn restore_files(&mut self, own: &OwnLease, table: &LeaseTable) {
        self.status_is_due |= !Status::path(&self.run_dir, self.vni).exists();
        self.leases_are_due |= !LastKnown::path(&self.run_dir, self.vni).exists();
        if self.is_due() {
            self.take_due(own, table)();
        }
    }

    fn take_due(&mut self, own: &OwnLease, table: &LeaseTable) -> impl FnOnce() + use<> {
        self.status.written = now();
        let status = std::mem::take(&mut self.status_is_due).then(|| self.status.clone());
        let known = std::mem::take(&mut self.leases_are_due).then(|| LastKnown {
            prefix: self.store.clone(),
            public_ip: self.status.public_ip,
            host: self.host,
            config: self.config.clone(),
            lease: own.clone(),
            peers: table.iter().map(|(subnet, peer)| (*subnet, *peer)).collect(),
        });
        let (run_dir, vni) = (self.run_dir.clone(), self.vni);
        move || {
            let written = status.map_or(Ok(()), |status| status.write(&run_dir, vni));
            let kept = known.map_or(Ok(()), |known| known.write(&run_dir, vni));
            for error in [written, kept].into_iter().filter_map(Result::err) {
                warn!("{error}");
            }
        }
    }
}
