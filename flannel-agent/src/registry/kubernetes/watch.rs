//! Following the nodes: one list in chunks, then a watch of their metadata. A watch that ends as it should goes on where
//! it was; every other gap ends in a fresh list.

use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};

use rand::RngExt as _;
use serde::Deserialize;
use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tracing::{debug, warn};

use super::{
    Kubernetes, KubernetesError,
    client::{Call, Status, escape},
    node::{Node, NodeList, PodCidrs},
    nodes::{Nodes, revision},
};
use crate::{
    health::Heartbeat,
    registry::{ResyncCause, Snapshot, Update, Updates},
    retry,
};

/// How many nodes one part of the list has.
const CHUNK: usize = 500;
/// For how many seconds a watch is asked for; each for another, so that not all agents begin anew at once (as client-go).
const WATCH_SECONDS: std::ops::Range<u64> = 300..600;
/// How much longer it may take to end.
const OVERTIME: Duration = Duration::from_secs(30);
/// A watch that ends sooner, without a word, is none.
const SHORTEST: Duration = Duration::from_secs(1);
/// How often the file with the network config is looked at.
const CONFIG_PERIOD: Duration = Duration::from_secs(5);

/// How many nodes are read whole at once, ...
const READS: usize = 8;
/// ... and how often one of those for which that can wait.
const READ_PERIOD: Duration = Duration::from_secs(1);

const LIST: Call<'_> = Call { verb: "list", resource: "nodes", name: "" };
const WATCH: Call<'_> = Call { verb: "watch", resource: "nodes", name: "" };

/// One line of a watch (Kubernetes: metav1.WatchEvent).
#[derive(Deserialize)]
struct Event {
    #[serde(rename = "type")]
    kind: String,
    object: Box<serde_json::value::RawValue>,
}

/// The nodes as of a version, and what is asked of them beside the watch.
struct Followed {
    nodes: Nodes,
    version: String,
    reads: JoinSet<Reading>,
}

/// A node that was read whole.
struct Reading {
    name: Arc<str>,
    /// Of the one that it was asked for.
    uid: Arc<str>,
    pod_cidrs: PodCidrs,
}

/// Why a watch is over.
enum Over {
    /// Nobody receives any more.
    Unheard,
    /// The server ended it.
    Ended,
}

impl Kubernetes {
    /// Network config and nodes. The watch that is begun next goes on from there: all nodes of a cluster, whole, are not
    /// asked for twice.
    pub async fn snapshot(&mut self) -> Result<Snapshot, KubernetesError> {
        let (mut nodes, version) = self.list().await?;
        let snapshot = self.table(&mut nodes, &version);
        *self.listed.lock().unwrap_or_else(PoisonError::into_inner) = Some((nodes, version));
        Ok(snapshot)
    }

    fn table(&self, nodes: &mut Nodes, version: &str) -> Snapshot {
        let (entries, passed_over) = nodes.table();
        let config = self.read_config().ok();
        Snapshot { config, entries, passed_over, revision: revision(version), store_id: self.url.clone() }
    }

    async fn list(&mut self) -> Result<(Nodes, String), KubernetesError> {
        let own = self.own_name().await?;
        let mut nodes = Nodes::new(self.names.clone(), &own);
        let mut next = String::new();
        let version = loop {
            let path = format!("/api/v1/nodes?limit={CHUNK}{next}");
            let NodeList { metadata, items } = self.get(LIST, &path).await?;
            nodes.extend(items);
            match metadata.next.filter(|next| !next.is_empty()) {
                Some(token) => next = format!("&continue={}", escape(&token)),
                None => break metadata.resource_version,
            }
        };
        Ok((nodes, version))
    }

    /// Reports all nodes and then every change to them, for ever. Returns when nobody receives any more.
    pub async fn watch(mut self, cause: ResyncCause, updates: Updates, heartbeat: Heartbeat) {
        let mut back_off = retry::BackOff::default();
        let mut before = 0;
        // Why the next list is read. The first failure after one explains the gap.
        let mut cause = Some(cause);
        loop {
            heartbeat.beat();
            let error = match self.follow(&updates, &mut cause, &mut before, &mut back_off, &heartbeat).await {
                Ok(()) => return,
                Err(error) => error,
            };
            let delay = back_off.delay();
            warn!("the watch on the nodes ended: {error}; a fresh one begins in {delay:?}");
            cause.get_or_insert(error.resync_cause());
            if updates.send(Update::Away(error.to_string())).await.is_err() {
                return;
            }
            tokio::time::sleep(delay).await;
        }
    }

    async fn follow(
        &mut self,
        updates: &Updates,
        cause: &mut Option<ResyncCause>,
        before: &mut i64,
        back_off: &mut retry::BackOff,
        heartbeat: &Heartbeat,
    ) -> Result<(), KubernetesError> {
        let listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (mut nodes, version) = match listed {
            Some(listed) => listed,
            None => heartbeat.during(self.list()).await?,
        };
        let snapshot = self.table(&mut nodes, &version);
        let mut cause = cause.take().unwrap_or(ResyncCause::Connection);
        if std::mem::replace(before, snapshot.revision) > snapshot.revision {
            warn!("Kubernetes went back to revision {}: its data is gone, or a backup was restored", snapshot.revision);
            cause = ResyncCause::RolledBack;
        }
        if updates.send(Update::Snapshot(snapshot, cause)).await.is_err() {
            return Ok(());
        }
        let mut followed = Followed { nodes, version, reads: JoinSet::new() };
        loop {
            let begun = Instant::now();
            let over = self.watch_once(updates, &mut followed, back_off, heartbeat).await;
            *before = revision(&followed.version);
            match over? {
                Over::Unheard => return Ok(()),
                Over::Ended => debug!("the watch on the nodes is over and goes on at {}", followed.version),
            }
            if begun.elapsed() < SHORTEST {
                return Err(self.ended(WATCH, ResyncCause::Connection, "the server ended it at once".to_owned()));
            }
            back_off.reset();
        }
    }

    async fn watch_once(
        &mut self,
        updates: &Updates,
        followed: &mut Followed,
        back_off: &mut retry::BackOff,
        heartbeat: &Heartbeat,
    ) -> Result<Over, KubernetesError> {
        let seconds = rand::rng().random_range(WATCH_SECONDS);
        let path = format!(
            "/api/v1/nodes?watch=true&allowWatchBookmarks=true&resourceVersion={}&timeoutSeconds={seconds}",
            escape(&followed.version)
        );
        let mut lines = heartbeat.during(self.watch_lines(WATCH, &path)).await?;
        let end = Instant::now() + Duration::from_secs(seconds) + OVERTIME;
        let mut config = interval(CONFIG_PERIOD);
        config.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut read_again = interval(READ_PERIOD);
        read_again.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.begin_reads(followed);
            let next = tokio::select! {
                next = heartbeat.during(timeout(end.saturating_duration_since(Instant::now()), lines.next())) => next,
                () = updates.closed() => return Ok(Over::Unheard),
                _ = config.tick() => {
                    let now = self.read_config().ok();
                    if now != self.seen_config {
                        self.seen_config.clone_from(&now);
                        if updates.send(Update::Config(now)).await.is_err() {
                            return Ok(Over::Unheard);
                        }
                    }
                    continue;
                }
                Some(read) = followed.reads.join_next() => {
                    // One that was cancelled goes with all that is followed.
                    let Ok(Reading { name, uid, pod_cidrs }) = read else { continue };
                    if matches!(pod_cidrs, PodCidrs::Unreadable(_)) {
                        // The watch may go on with credentials that no longer count. What can't be made is said by the next call.
                        self.client = None;
                        let _made = self.client().await;
                    }
                    for update in followed.nodes.learn(&name, &uid, pod_cidrs) {
                        if updates.send(update).await.is_err() {
                            return Ok(Over::Unheard);
                        }
                    }
                    continue;
                }
                _ = read_again.tick() => {
                    followed.nodes.read_one_again();
                    continue;
                }
            };
            let line = match next {
                Ok(Ok(Some(line))) => line,
                Ok(Ok(None)) => return Ok(Over::Ended),
                Ok(Err(error)) => return Err(self.ended(WATCH, ResyncCause::Connection, error.to_string())),
                Err(_) => {
                    let cause = "the server did not end it in time".to_owned();
                    return Err(self.ended(WATCH, ResyncCause::Connection, cause));
                }
            };
            let changes = self.read_event(followed, &line)?;
            // Not before: a server that only begins to answer would be asked for all nodes again and again.
            back_off.reset();
            for update in changes {
                if updates.send(update).await.is_err() {
                    return Ok(Over::Unheard);
                }
            }
        }
    }

    /// Asks for nodes whose podCIDRs are not known, beside the watch: one that is not answered keeps nobody waiting.
    fn begin_reads(&self, Followed { nodes, reads, .. }: &mut Followed) {
        while reads.len() < READS
            && let Some((name, uid)) = nodes.next_unread()
        {
            let mut kubernetes = self.clone();
            reads.spawn(async move {
                let pod_cidrs = match kubernetes.node(&name).await {
                    Ok(node) if *node.metadata.uid == *uid => node.spec.pod_cidrs(),
                    // Gone, or another of its name is there: the watch tells of it.
                    Ok(_) | Err(KubernetesError::NotFound { .. }) => PodCidrs::Unread,
                    Err(error) => PodCidrs::Unreadable(error.to_string()),
                };
                Reading { name, uid, pod_cidrs }
            });
        }
    }

    fn read_event(&mut self, followed: &mut Followed, line: &[u8]) -> Result<Vec<Update>, KubernetesError> {
        let unclear = |error: serde_json::Error| format!("an event is not understood: {error}");
        let event: Result<Event, _> = serde_json::from_slice(line).map_err(unclear);
        let event = event.map_err(|cause| self.ended(WATCH, ResyncCause::Cancelled, cause))?;
        if event.kind == "ERROR" {
            let Status { code, message, .. } = serde_json::from_str(event.object.get()).unwrap_or_default();
            return Err(self.refused(WATCH, code, &message));
        }
        let object: Result<Node, _> = serde_json::from_str(event.object.get()).map_err(unclear);
        let Node { metadata, spec } = object.map_err(|cause| self.ended(WATCH, ResyncCause::Cancelled, cause))?;
        followed.version.clone_from(&metadata.resource_version);
        Ok(match event.kind.as_str() {
            "ADDED" | "MODIFIED" => {
                // A server that knows no metadata sends the node whole. The metadata say nothing of podCIDRs.
                let pod_cidrs = match spec.pod_cidrs() {
                    PodCidrs::Unassigned => PodCidrs::Unread,
                    pod_cidrs => pod_cidrs,
                };
                followed.nodes.set(metadata, pod_cidrs)
            }
            "DELETED" => followed.nodes.remove(&metadata),
            // A bookmark.
            _ => Vec::new(),
        })
    }
}
