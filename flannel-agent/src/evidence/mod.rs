//! What the packets themselves say of the network: peers that are sent to and do not answer, and packets that were admitted and
//! get lost on this host. A task looks at the counters of the pinned maps every two seconds.
//!
//! * `silence` — peers that do not answer; pure
//! * `losses` — packets that get lost; pure
//! * `probe` — asking a peer that is silent
//! * `sizes` — peers that small packets reach and large ones do not

mod losses;
mod probe;
mod silence;
mod sizes;

use std::{net::Ipv4Addr, time::Duration};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::watch,
    task::{JoinHandle, spawn_blocking},
    time::{Instant, MissedTickBehavior, interval},
};
use tracing::debug;

pub use self::{losses::LossKind, sizes::NarrowPeer};
use self::{losses::Losses, probe::Prober, silence::Silence, sizes::Sizes};
use crate::{
    dataplane::{PeerWatch, PinnedPeers, Way, pinned_counters},
    status::now,
};

/// How often the counters are looked at.
const PERIOD: Duration = Duration::from_secs(2);
/// For how long something has to go on before it is evidence.
const LASTING: Duration = Duration::from_secs(4);
/// When no packet has followed for so long, what was seen before is no evidence any more.
const FORGOTTEN: Duration = Duration::from_secs(60);

/// What is found. Times are in seconds since 1970.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EvidenceStatus {
    /// Peers that do not answer, by subnet.
    pub silent: Vec<SilentPeer>,
    /// Peers that large packets do not reach, by subnet.
    pub narrow: Vec<NarrowPeer>,
    /// Packets that get lost on this host.
    pub lost: Vec<Loss>,
}

/// A peer that is sent packets, and from which nothing comes; nor does it answer when the agent asks it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SilentPeer {
    /// Its subnet.
    pub subnet: Ipv4Net,
    /// Its VTEP address.
    pub public_ip: Ipv4Addr,
    /// Since when packets were sent to it in vain.
    pub since: u64,
    /// When it was heard last; [`None`] for never.
    pub last_heard: Option<u64>,
    /// How many packets, the agent's own not counted.
    pub sent: u64,
}

/// Packets that are lost at one place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Loss {
    /// Which.
    pub kind: LossKind,
    /// Since when none came through.
    pub since: u64,
    /// How many went in since then.
    pub packets: u64,
}

/// Where the counters are, and how they are read.
pub struct Source {
    /// The maps.
    pub peers: PinnedPeers,
    /// Whether the programs see what reaches pods: where nothing bypasses the stack they do not look.
    pub sees_pods: bool,
}

/// What is found, kept current by a task that ends with this.
pub struct Evidence {
    found: watch::Receiver<EvidenceStatus>,
    task: JoinHandle<()>,
}

impl Evidence {
    /// Of these counters; [`None`] where a backend has none.
    pub fn new(source: Option<Source>) -> Self {
        let (sender, found) = watch::channel(EvidenceStatus::default());
        let task = tokio::spawn(async move {
            match source {
                Some(source) => keep(source, sender).await,
                None => drop(sender),
            }
        });
        Self { found, task }
    }

    /// Whether it is otherwise than when it was asked for last.
    pub fn is_new(&self) -> bool {
        self.found.has_changed().unwrap_or_default()
    }

    /// What is found by now.
    pub fn take(&mut self) -> EvidenceStatus {
        self.found.borrow_and_update().clone()
    }
}

impl Drop for Evidence {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn keep(source: Source, sender: watch::Sender<EvidenceStatus>) {
    let Source { peers, sees_pods } = source;
    let mut looks = interval(PERIOD);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut silence, mut losses) = (Silence::default(), Losses::new(sees_pods));
    let mut sizes = Sizes::new();
    let mut watch = PeerWatch::new(peers);
    let prober = Prober::open();
    loop {
        looks.tick().await;
        let look = move || {
            let looked = watch.look().and_then(|ways| Ok((ways, pinned_counters(&watch.maps().pins)?)));
            (watch, looked)
        };
        let Ok((watched, looked)) = spawn_blocking(look).await else { return };
        watch = watched;
        let (ways, counters) = match looked {
            Ok(looked) => looked,
            // The maps may be being recreated; the next look finds them.
            Err(error) => {
                debug!("the counters can't be looked at: {error}");
                continue;
            }
        };
        let (at, clock) = (Instant::now(), now());
        let are_unreached = ways.iter().any(|peer| matches!(peer.way, Way::NoRoute | Way::NotOnLink));
        let (silent, owing) = silence.take(&ways, at, clock);
        let to_ask = Silence::to_ask(&owing).into_iter();
        silence.asked(to_ask.map(|peer| (peer.subnet, peer.public_ip, prober.ask(peer.subnet))));
        let (narrow, asked) = sizes.take(&owing, at, clock);
        silence.asked(asked);
        let found = EvidenceStatus { silent, narrow, lost: losses.take(&counters, are_unreached, at, clock) };
        sender.send_if_modified(|known| {
            let is_new = *known != found;
            *known = found;
            is_new
        });
    }
}
