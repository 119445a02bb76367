//! What the agent says of itself: one JSON document in the run directory, so that it can be read also when no agent
//! runs. `flannel-agent status` and `flannel-agent metrics` read it.

use std::{
    collections::BTreeMap,
    fs, io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use flannel_common::vxlan::Vni;
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::{
    atomic_file::{self, WriteError},
    bypass::{BypassFlag, Kind, Restriction, Scope},
    config::BackendType,
    dataplane::{Features, ProgramRuns},
    evidence::{EvidenceStatus, Loss, LossKind},
    histogram::Histogram,
    lease::{HoldReason, MacAddress},
    plural::counted,
    registry::StoreKind,
    repair::DriftStatus,
    routes::Choice,
};

/// Of the document's form.
pub const API_VERSION: &str = "flannel-agent/v1";

/// For so many seconds an agent may not have asked the store yet.
const START_TIME: u64 = 5;

/// For so many seconds a claim is told of after it came; who waits claims more often.
const CLAIM_TIME: u64 = 60;

/// Of single entries, no more are put into words than this.
const MOST_NAMED: usize = 10;

const PREFIX: &str = "flannel.";
const SUFFIX: &str = ".status.json";

/// One agent's state. Times are in seconds since 1970.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// [`API_VERSION`].
    pub api_version: String,
    /// When this was written.
    pub written: u64,
    /// The agent's process.
    pub pid: u32,
    /// The overlay's VXLAN network identifier.
    pub vni: u32,
    /// The overlay's Network.
    pub network: Ipv4Net,
    /// The interface to the other hosts.
    pub external_interface: String,
    /// The interfaces that packets from other hosts are taken from.
    #[serde(default)]
    pub underlay_interfaces: Vec<String>,
    /// The address that the others are told.
    pub public_ip: Ipv4Addr,
    /// MTU of the overlay, in bytes.
    pub mtu: u32,
    /// Its backend.
    #[serde(default = "vxlan")]
    pub backend: String,
    /// Whether peers on the same link are sent packets without encapsulation (`DirectRouting`).
    #[serde(default)]
    pub direct_routing: bool,
    /// What the kernel has of what the dataplane calls for.
    #[serde(default)]
    pub features: Features,
    /// Flows past the host's stack.
    #[serde(default)]
    pub bypass: BypassStatus,
    /// Who takes packets out of the tunnel, and why.
    #[serde(default)]
    pub xdp: XdpStatus,
    /// Routes into the overlay.
    #[serde(default)]
    pub routes: RoutesStatus,
    /// Packet rules.
    #[serde(default)]
    pub rules: RulesStatus,
    /// The tunnel of the backend udp, once there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tunnel: Option<TunnelStatus>,
    /// This host's lease.
    pub lease: LeaseStatus,
    /// The store.
    pub store: StoreStatus,
    /// How the network config in the store differs from the one in use, and what to do.
    pub config_differs: Option<String>,
    /// How many subnets have a peer.
    pub peers: usize,
    /// Those of them that the store no longer names.
    pub held: Vec<HeldPeer>,
    /// How often the guard held peers back, in peers, by [`HoldReason::label`].
    pub held_total: BTreeMap<String, u64>,
    /// How many leases are of hosts with another backend, which this host does not reach, by what they call it; `none` where they say
    /// nothing, as with alloc and udp.
    #[serde(default)]
    pub other_backends: BTreeMap<String, usize>,
    /// What somebody else changed.
    #[serde(default)]
    pub drift: DriftStatus,
    /// Rules and policies of others that may stop packets.
    #[serde(default)]
    pub may_stop: MayStop,
    /// What the packets say of the network.
    #[serde(default)]
    pub evidence: EvidenceStatus,
    /// From a change of the peers being seen in the store to its being in the maps.
    #[serde(default)]
    pub convergence: Histogram,
    /// How often each program ran and for how long, by its name. Only where the kernel has counted it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub programs: BTreeMap<String, ProgramRuns>,
}

/// What agents had that did not say it.
fn vxlan() -> String {
    BackendType::Vxlan.label().to_owned()
}

/// Flows past the host's stack.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BypassStatus {
    /// `--bypass`.
    #[serde(default)]
    pub flag: BypassFlag,
    /// For how many milliseconds a flow may bypass the stack before a packet takes it again; 0 for never.
    pub revalidate_ms: u64,
    /// Whether conntrack takes TCP packets outside their window for valid, as it must; [`None`] where it is not loaded.
    pub conntrack_liberal: Option<bool>,
    /// Whether it is seen when connections end.
    #[serde(default)]
    pub ends: EndsStatus,
    /// What has to see each packet.
    #[serde(default)]
    pub restrictions: Vec<Restriction>,
}

impl BypassStatus {
    /// What is not given each packet that it would see with flannel's daemon.
    fn troubles(&self) -> Vec<String> {
        if self.flag == BypassFlag::Off {
            return Vec::new();
        }
        let passed_by = self.restrictions.iter().filter(|restriction| !self.flag.obeys(restriction));
        let words = passed_by.map(|Restriction { subject, scope, .. }| match scope {
            // It says so itself.
            Scope::Nothing => subject.clone(),
            _ => {
                format!("{subject}: does not see each packet of established flows, which bypass the stack (--bypass)")
            }
        });
        at_most(MOST_NAMED, words.collect())
    }

    /// What takes the stack, and because of what. What is for several pods, as on their bridge, is one.
    pub fn rows(&self) -> Vec<String> {
        // Those of helpers are the same on every host.
        let is_told = |restriction: &&Restriction| restriction.kind != Kind::Helper && self.flag.obeys(restriction);
        let mut causes = BTreeMap::<_, Vec<_>>::new();
        for Restriction { subject, scope, .. } in self.restrictions.iter().filter(is_told) {
            causes.entry(subject).or_default().push(scope);
        }
        let words = |(subject, scopes): (&String, Vec<&Scope>)| match scopes[..] {
            [scope] => format!("{subject}: {scope}"),
            [Scope::Pod(_), ..] => format!("{subject}: the packets of {} pods take the stack", scopes.len()),
            _ => {
                let scopes: Vec<_> = scopes.iter().map(ToString::to_string).collect();
                format!("{subject}: {}", scopes.join("; "))
            }
        };
        at_most(MOST_NAMED, causes.into_iter().map(words).collect())
    }
}

/// The first of them, and how many more there are.
fn at_most(most: usize, mut all: Vec<String>) -> Vec<String> {
    let rest = all.len().saturating_sub(most);
    all.truncate(most);
    all.extend((rest > 0).then(|| format!("and {rest} more")));
    all
}

/// conntrack's events, by which a connection's flows leave the bypass when it ends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndsStatus {
    /// Since when they are heard; 0 where they are not. With `nf_conntrack_events` = 2 there are none of connections that
    /// began before, while nobody listened.
    pub since: u64,
    /// How often the kernel could not tell all. Then every flow leaves the bypass for a packet.
    pub lost: u64,
    /// Why there are none, and what to do.
    pub problem: Option<String>,
}

/// Who takes packets out of the tunnel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct XdpStatus {
    /// `native`, `generic` or `off`.
    pub mode: String,
    /// Why, in words.
    pub reason: String,
}

/// Routes into the overlay.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoutesStatus {
    /// `network` or `leases`.
    pub mode: String,
    /// Which, and why, in words.
    pub reason: String,
    /// Why they are wrong here, as they were asked for.
    pub problem: Option<String>,
}

impl RoutesStatus {
    /// What is said of a choice.
    pub fn of(choice: &Choice) -> Self {
        let Choice { routing, reason, problem } = choice;
        Self { mode: routing.label().to_owned(), reason: reason.clone(), problem: problem.clone() }
    }
}

/// Packet rules.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RulesStatus {
    /// What masquerades: `nftables`, `iptables` or `off`; empty before the first attempt.
    pub masquerade: String,
    /// Whether rules of ours in iptables accept what is forwarded.
    pub forward: bool,
    /// In which: `nft` and `legacy`.
    pub forward_in: Vec<String>,
    /// Why it is not masqueraded as it would be by itself.
    pub fallback: Option<String>,
    /// How often they were set again, since another program had changed them.
    pub repairs: u64,
    /// Why they are not as they should be.
    pub problem: Option<String>,
}

/// Rules and policies of others that may stop packets, as an operator finds them, the surest first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MayStop {
    /// Tunnel packets that come in.
    pub tunnel: Vec<String>,
    /// Packets from the overlay to pods.
    pub forwarding: Vec<String>,
}

/// The tunnel of the backend udp.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelStatus {
    /// The name of its TUN device.
    pub device: String,
    /// UDP port of all hosts.
    pub port: u16,
    /// Packets since the agent's start by what became of them, as [`Event::label`](crate::udp::Event::label).
    pub packets: BTreeMap<String, u64>,
}

/// This host's lease.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LeaseStatus {
    /// The subnet.
    pub subnet: Ipv4Net,
    /// The MAC that it announces.
    pub vtep_mac: MacAddress,
    /// How it stands with it.
    pub state: LeaseState,
    /// How often it was renewed.
    pub renewals: u64,
    /// How often another one had to be taken.
    pub losses: u64,
    /// How often another host claimed it that has this one's address.
    #[serde(default)]
    pub claims: u64,
    /// When the last one did.
    #[serde(default)]
    pub last_claim: u64,
    /// Which living host has this one's address and lease, and what to do.
    #[serde(default)]
    pub contested: Option<String>,
    /// When it ends unless it is renewed; [`None`] for one without a term, and where that is not known.
    #[serde(default)]
    pub expiry: Option<u64>,
    /// For how many seconds it is renewed each time, where it ends.
    #[serde(default)]
    pub term: Option<u64>,
}

impl LeaseStatus {
    /// That of a lease which nothing has befallen.
    pub const fn new(subnet: Ipv4Net, vtep_mac: MacAddress, state: LeaseState) -> Self {
        Self {
            subnet,
            vtep_mac,
            state,
            renewals: 0,
            losses: 0,
            claims: 0,
            last_claim: 0,
            contested: None,
            expiry: None,
            term: None,
        }
    }
}

/// How it stands with this host's lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeaseState {
    /// The store has it.
    Held,
    /// It is what this host had when it last spoke to the store.
    LastKnown,
    /// It ended, and another is being taken.
    Lost,
    /// Another living host has this one's address, and with it the lease; this one waits.
    Contested,
}

impl LeaseState {
    /// Each of them.
    pub const ALL: [Self; 4] = [Self::Held, Self::LastKnown, Self::Lost, Self::Contested];

    /// Its name in status and metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::LastKnown => "last_known",
            Self::Lost => "lost",
            Self::Contested => "contested",
        }
    }
}

/// The store, as this agent sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StoreStatus {
    /// Which it is.
    #[serde(default)]
    pub kind: StoreKind,
    /// Whether the lease table is being followed.
    pub following: bool,
    /// Since when that is so.
    pub since: u64,
    /// What was wrong last, where it is not.
    pub problem: Option<String>,
    /// Its revision at the last snapshot.
    pub revision: i64,
    /// Which cluster of that kind it is; of etcd, its ID in hexadecimal digits.
    pub cluster_id: String,
    /// How many changes it reported.
    pub events: u64,
    /// How often the whole table was read, by [`ResyncCause::label`](crate::registry::ResyncCause::label).
    pub resyncs: BTreeMap<String, u64>,
    /// The keys that are there and no leases of this overlay, with the reason.
    pub passed_over: BTreeMap<String, String>,
    /// How often a key was passed over.
    pub passed_over_total: u64,
    /// What is to be known of keys that are used.
    #[serde(default)]
    pub remarks: BTreeMap<String, String>,
}

/// A peer that the guard holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HeldPeer {
    /// Its subnet.
    pub subnet: Ipv4Net,
    /// Its VTEP address.
    pub public_ip: Ipv4Addr,
    /// Why it is held.
    pub reason: HoldReason,
    /// Since when.
    pub since: u64,
}

/// No document can be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// No agent wrote one.
    #[error("no agent has run with the --run-dir {0}")]
    None(PathBuf),
    /// The file can't be read.
    #[error("read {path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Another version's, or damaged.
    #[error("{path} is not understood: {source}")]
    Content {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: serde_json::Error,
    },
}

impl Status {
    /// Its backend; of one that this agent does not know, vxlan.
    pub fn backend_type(&self) -> BackendType {
        BackendType::ALL.into_iter().find(|backend| backend.label() == self.backend).unwrap_or(BackendType::Vxlan)
    }

    /// What people call the overlay.
    pub fn name(&self) -> String {
        match self.backend_type() {
            BackendType::Vxlan => format!("{PREFIX}{}", self.vni),
            backend if self.vni == Vni::DEFAULT.get() => backend.label().to_owned(),
            backend => format!("{backend} {}", self.vni),
        }
    }

    /// Where that of an overlay is kept.
    pub fn path(run_dir: &Path, vni: Vni) -> PathBuf {
        run_dir.join(format!("{PREFIX}{vni}{SUFFIX}"))
    }

    /// The document.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }

    /// Writes it, mode 0644.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn write(&self, run_dir: &Path, vni: Vni) -> Result<(), WriteError> {
        atomic_file::write(&Self::path(run_dir, vni), self.to_json().as_bytes(), 0o644)
    }

    /// All that agents wrote there, ordered by VNI.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn read_all(run_dir: &Path) -> Result<Vec<(Vni, Self)>, ReadError> {
        let all = Self::read_each(run_dir);
        if all.is_empty() {
            return Err(ReadError::None(run_dir.to_owned()));
        }
        all.into_iter().map(|(vni, status)| Ok((vni, status?))).collect()
    }

    /// Each that agents wrote there, ordered by VNI, or why it can't be read.
    pub fn read_each(run_dir: &Path) -> Vec<(Vni, Result<Self, ReadError>)> {
        let mut all = Vec::new();
        for entry in fs::read_dir(run_dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let vni = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?.parse().ok());
            let Some(vni) = vni.and_then(|number| Vni::new_checked(number).ok()) else { continue };
            all.push((vni, Self::read(entry.path())));
        }
        all.sort_by_key(|(vni, _)| vni.get());
        all
    }

    fn read(path: PathBuf) -> Result<Self, ReadError> {
        match atomic_file::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(|source| ReadError::Content { path, source }),
            Err(source) => Err(ReadError::File { path, source }),
        }
    }

    /// Packets that get lost on this host, in words.
    fn lost(&self, &Loss { kind, since, packets }: &Loss) -> String {
        let (name, time) = (self.name(), time(since));
        let (what, suspects, otherwise) = match kind {
            LossKind::Tunnel => (
                format!(
                    "{packets} tunnel packets were admitted in {time}, and none of them came out of {name}: this host's firewall \
                     drops them (INPUT, UDP port of the tunnel), or a filter or program of others takes them"
                ),
                &self.may_stop.tunnel,
                format!("`tc filter show dev {} ingress`", self.external_interface),
            ),
            LossKind::Unreached => {
                return format!("{packets} packets in {time} were for peers that the underlay does not reach");
            }
            LossKind::Forwarding => (
                format!(
                    "{packets} packets for pods came from the overlay in {time}, and none reached a pod: they are not forwarded, \
                     or there are no such pods"
                ),
                &self.may_stop.forwarding,
                "`ip neighbour` for the pods".to_owned(),
            ),
        };
        match suspects.as_slice() {
            [] => format!("{what}; no packet rule was found that stops them, see {otherwise}"),
            suspects => format!("{what}; what may stop them: {}", suspects.join("; ")),
        }
    }

    /// What an operator should look at, in words. Empty where all is well.
    pub fn troubles(&self) -> Vec<String> {
        let (mut troubles, store) = (Vec::new(), self.store.kind);
        let problem = || self.store.problem.as_deref().unwrap_or("not asked yet");
        match self.lease.state {
            LeaseState::Held => {}
            LeaseState::LastKnown => {
                troubles
                    .push(format!("the lease {} is the last known, and not confirmed by {store}", self.lease.subnet));
            }
            LeaseState::Lost => troubles.push(format!("the lease {} is lost; taking another", self.lease.subnet)),
            LeaseState::Contested => troubles.extend(self.lease.contested.clone()),
        }
        let claimed = now().saturating_sub(self.lease.last_claim);
        if self.lease.claims > 0 && claimed < CLAIM_TIME {
            troubles.push(format!(
                "another host claims this host's address {} and the lease {} ({} times, the last {claimed} s ago), and was \
                 told that this one lives. Give each host an address of its own with --public-ip or --iface",
                self.public_ip, self.lease.subnet, self.lease.claims
            ));
        }
        // An agent that has just started is about to ask.
        let has_asked = self.store.problem.is_some() || !self.store.resyncs.is_empty();
        let is_waiting = self.lease.state == LeaseState::Contested;
        let is_starting = !has_asked && (is_waiting || now().saturating_sub(self.store.since) < START_TIME);
        if !self.store.following && !is_starting {
            troubles.push(format!("{store} is not being followed since {}: {}", time(self.store.since), problem()));
        }
        troubles.extend(self.config_differs.clone());
        if self.bypass.revalidate_ms > 0 && self.bypass.conntrack_liberal == Some(false) {
            troubles.push(
                "nf_conntrack_tcp_be_liberal or nf_conntrack_tcp_ignore_invalid_rst is 0: rules that drop INVALID stop \
                 bypassed flows; set both to 1, or use --bypass=off"
                    .to_owned(),
            );
        }
        troubles.extend(self.bypass.troubles());
        troubles.extend(self.bypass.ends.problem.clone());
        troubles.extend(self.drift.waiting.values().cloned());
        troubles.extend(self.drift.undone());
        troubles.extend(self.routes.problem.clone());
        troubles.extend(self.evidence.lost.iter().map(|loss| self.lost(loss)));
        if let Some(problem) = &self.rules.problem {
            troubles.push(format!("packet rules: {problem}"));
        }
        if !self.held.is_empty() {
            let count = self.held.len();
            troubles.push(format!(
                "{store} no longer names {count} of the {}; they are held. If {store} is right: \
                 flannel-agent lease release-guard",
                counted(self.peers, "peer")
            ));
        }
        for (key, reason) in self.store.passed_over.iter().take(MOST_NAMED) {
            troubles.push(format!("the entry {key:?} in {store} is passed over: {reason}"));
        }
        for (key, remark) in self.store.remarks.iter().take(MOST_NAMED) {
            troubles.push(format!("the entry {key:?} in {store}: {remark}"));
        }
        troubles
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// How long ago a time was, in words.
pub fn time(since: u64) -> String {
    let ago = now().saturating_sub(since);
    match ago {
        0..120 => format!("{ago} s"),
        120..7200 => format!("{} min", ago / 60),
        _ => format!("{} h", ago / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bypass::Kind;

    #[test]
    fn what_takes_the_stack_is_said_once_and_what_does_not_is_to_be_looked_at() {
        let restriction = |kind, subject: &str, scope| Restriction { kind, subject: subject.to_owned(), scope };
        let mut bypass = BypassStatus { revalidate_ms: 1000, ..BypassStatus::default() };
        bypass.restrictions = vec![
            restriction(Kind::Queue, "tbf on flannel.1", Scope::OverlayQueue),
            restriction(Kind::Queue, "htb on cni0", Scope::Pod(7)),
            restriction(Kind::Queue, "htb on cni0", Scope::Pod(8)),
            restriction(Kind::Rule, "nft inet t forward handle 5: log", Scope::Nothing),
        ];
        let rows = bypass.rows();
        assert_eq!(rows[0], "htb on cni0: the packets of 2 pods take the stack");
        assert!(rows[1].starts_with("tbf on flannel.1: all packets take the stack"), "{rows:?}");
        assert_eq!((rows.len(), bypass.troubles().len()), (2, 1));
        bypass.flag = BypassFlag::On;
        // A pod's queue is the one thing that is always obeyed.
        assert_eq!((bypass.rows().len(), bypass.troubles().len()), (1, 2));
        bypass.flag = BypassFlag::Off;
        assert!(bypass.troubles().is_empty());
        bypass.flag = BypassFlag::Auto;
        bypass.restrictions =
            (0..25).map(|pod| restriction(Kind::Queue, &format!("tbf on veth{pod}"), Scope::Pod(pod))).collect();
        assert_eq!(bypass.rows().last().map(String::as_str), Some("and 15 more"));
    }
}
