//! What an agent's page shows: of itself, its overlay, the peers, what is to be looked at, and what was dropped. Read as `status`,
//! `peers` and `drops` read it, in one go.

use std::{
    collections::BTreeMap,
    fs,
    net::Ipv4Addr,
    path::PathBuf,
    time::{Duration, Instant},
};

use flannel_common::vxlan::Vni;
use ipnet::Ipv4Net;
use serde::Serialize;
use tracing::debug;

use super::{dataplane::Dataplane, drops::Reason, peers::Peer, status::Overlay};
use crate::{
    cli::Cli,
    health::Health,
    lease::MacAddress,
    registry::StoreKind,
    status::{API_VERSION, Status, TunnelStatus, now},
    udp,
    waiting::Waiting,
};

/// Where they come from: this process, which is an agent that has just begun.
#[derive(Clone, Debug)]
pub struct Overviews {
    run_dir: PathBuf,
    pin_dir: PathBuf,
    health: Health,
    host: String,
    /// In seconds since 1970.
    started: u64,
    start: Instant,
}

/// What is known at one moment.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Overview {
    api_version: &'static str,
    version: &'static str,
    /// The host's name, as the kernel has it.
    host: String,
    /// The agent's process.
    pid: u32,
    /// When it began, in seconds since 1970.
    started: u64,
    /// When this was read, in milliseconds since then, by a clock that nobody sets: rates are to be reckoned by it.
    elapsed_ms: u64,
    /// Where `status` would say that all is well, and no loop of the agent hangs.
    is_well: bool,
    /// What is to be looked at in the agent itself, in words.
    troubles: Vec<String>,
    /// What it waits for before it has an overlay.
    waiting: Vec<Waiting>,
    overlays: Vec<OverlayOverview>,
}

/// An overlay's part.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct OverlayOverview {
    name: String,
    vni: u32,
    backend: String,
    network: Ipv4Net,
    lease: Lease,
    public_ip: Ipv4Addr,
    interface: String,
    mtu: u32,
    store: Store,
    /// In the words of `status`.
    troubles: Vec<String>,
    /// As `peers -o json` has them; [`None`] where the backend keeps none in maps, and where they can't be read.
    peers: Option<Vec<Peer>>,
    drops: Vec<Drop>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Lease {
    subnet: Ipv4Net,
    vtep_mac: MacAddress,
    state: &'static str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Store {
    kind: StoreKind,
    following: bool,
    /// In seconds since 1970.
    since: u64,
}

/// What was dropped for a reason. Without the bytes of packets, which are nobody's but their pods'.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Drop {
    reason: &'static str,
    description: &'static str,
    packets: u64,
    /// [`None`] where they are not counted.
    bytes: Option<u64>,
    latest: Option<Latest>,
}

/// The latest packet of a reason.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Latest {
    age_ms: u64,
    summary: String,
}

impl Overviews {
    /// Those of this process.
    pub fn of_this_agent(cli: &Cli, health: Health) -> Self {
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_else(|error| {
            debug!("read the host's name: {error}");
            String::new()
        });
        Self {
            run_dir: cli.run_dir.clone(),
            pin_dir: cli.bpf_pin_dir.clone(),
            health,
            host: host.trim().to_owned(),
            started: now(),
            start: Instant::now(),
        }
    }

    /// Reads one. What can't be read is named among the troubles.
    pub async fn read(&self) -> Overview {
        let elapsed_ms = self.start.elapsed().as_millis() as u64;
        let pid = std::process::id();
        let mut waiting = Waiting::read_all(&self.run_dir);
        waiting.retain(|waiting| waiting.pid == pid);
        let mut troubles: Vec<_> = self.health.silent().map(|silent| silent.to_string()).into_iter().collect();
        let mut overlays = Vec::new();
        for (vni, status) in self.statuses() {
            match status {
                Ok(status) => overlays.push(self.overlay(vni, status).await),
                Err(trouble) => troubles.push(trouble),
            }
        }
        let serves_well = !overlays.is_empty() && overlays.iter().all(|overlay| overlay.troubles.is_empty());
        Overview {
            api_version: API_VERSION,
            version: env!("CARGO_PKG_VERSION"),
            host: self.host.clone(),
            pid,
            started: self.started,
            elapsed_ms,
            is_well: troubles.is_empty() && waiting.is_empty() && serves_well,
            troubles,
            waiting,
            overlays,
        }
    }

    /// What this agent wrote of itself. In a container the one before it may have had the same number.
    fn statuses(&self) -> impl Iterator<Item = (Vni, Result<Status, String>)> {
        let is_own = |status: &Status| status.pid == std::process::id() && status.written >= self.started;
        let all = Status::read_each(&self.run_dir).into_iter();
        all.filter(move |(_, status)| status.as_ref().is_ok_and(is_own) || status.is_err())
            .map(|(vni, status)| (vni, status.map_err(|error| error.to_string())))
    }

    async fn overlay(&self, vni: Vni, status: Status) -> OverlayOverview {
        let overlay = Overlay::own(&self.pin_dir, vni, status).await;
        let Overlay { status, dataplane, troubles, .. } = overlay;
        let mut drops: Vec<_> = dataplane.iter().flat_map(Dataplane::drops).map(Drop::from).collect();
        drops.extend(status.tunnel.iter().flat_map(dropped_in_user_space));
        OverlayOverview {
            name: status.name(),
            vni: status.vni,
            network: status.network,
            lease: Lease {
                subnet: status.lease.subnet,
                vtep_mac: status.lease.vtep_mac,
                state: status.lease.state.label(),
            },
            public_ip: status.public_ip,
            mtu: status.mtu,
            store: Store { kind: status.store.kind, following: status.store.following, since: status.store.since },
            troubles,
            peers: dataplane.as_ref().map(|dataplane| dataplane.peers(&status)),
            drops,
            backend: status.backend,
            interface: status.external_interface,
        }
    }
}

impl From<&Reason> for Drop {
    fn from(dropped: &Reason) -> Self {
        let latest = dropped.samples.first();
        Self {
            reason: dropped.reason,
            description: dropped.description,
            packets: dropped.packets,
            bytes: Some(dropped.bytes),
            latest: latest.map(|sample| Latest { age_ms: sample.age_ms, summary: sample.summary.clone() }),
        }
    }
}

/// Of the backend udp.
fn dropped_in_user_space(tunnel: &TunnelStatus) -> impl Iterator<Item = Drop> {
    let TunnelStatus { packets, .. } = tunnel;
    let count = |event: udp::Event, packets: &BTreeMap<_, u64>| packets.get(event.label()).copied().unwrap_or(0);
    let reasons = udp::Event::ALL.iter().filter(|event| !matches!(event, udp::Event::Sent | udp::Event::Received));
    let reasons = reasons.map(move |event| (event, count(*event, packets))).filter(|(_, packets)| *packets > 0);
    reasons.map(|(event, packets)| Drop {
        reason: event.label(),
        description: event.description().trim(),
        packets,
        bytes: None,
        latest: None,
    })
}

/// How old what is told may be: two who look at once cost what one does.
pub const FRESH: Duration = Duration::from_millis(900);
