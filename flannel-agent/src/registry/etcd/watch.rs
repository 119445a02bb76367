//! Following the table: a snapshot, then its changes; a fresh snapshot after every gap.

use etcd_client::{Client, EventType, KeyValue, WatchOptions, WatchResponse, WatchStream};
use tracing::{debug, warn};

use super::{Etcd, EtcdError, MAX_ANSWER, Read, Stored};
use crate::{
    health::Heartbeat,
    registry::{PassedOver, ResyncCause, Update, Updates},
    retry,
};

const CALL: &str = "watch the leases";

/// The watch ended.
struct Gap {
    cause: ResyncCause,
    error: EtcdError,
}

/// What was seen last.
#[derive(Clone, Copy)]
struct Position {
    cluster_id: u64,
    revision: i64,
}

impl Etcd {
    /// Reports the whole table and then every change to it, for ever. Each gap in the changes, whatever its cause, ends
    /// in a fresh snapshot. Returns when nobody receives any more.
    pub async fn watch(mut self, cause: ResyncCause, updates: Updates, heartbeat: Heartbeat) {
        let mut back_off = retry::BackOff::default();
        let mut position = None;
        // Why the next snapshot is read. The first failure after one explains the gap; those that follow only say that
        // nothing has come back yet.
        let mut cause = Some(cause);
        loop {
            heartbeat.beat();
            let once = self.watch_once(&updates, &mut cause, &mut position, &mut back_off, &heartbeat);
            let gap = match once.await {
                Ok(()) => return,
                Err(gap) => gap,
            };
            let delay = back_off.delay();
            warn!("the watch on the leases ended: {}; a fresh one begins in {delay:?}", gap.error);
            cause.get_or_insert(gap.cause);
            if updates.send(Update::Away(gap.error.to_string())).await.is_err() {
                return;
            }
            tokio::time::sleep(delay).await;
        }
    }

    async fn watch_once(
        &mut self,
        updates: &Updates,
        cause: &mut Option<ResyncCause>,
        position: &mut Option<Position>,
        back_off: &mut retry::BackOff,
        heartbeat: &Heartbeat,
    ) -> Result<(), Gap> {
        let table = self.table().await.map_err(|error| Gap { cause: error.resync_cause(), error })?;
        let (cluster_id, revision) = (table.cluster_id, table.revision);
        let cause = cause.take().unwrap_or(ResyncCause::Connection);
        let cause = match position.replace(Position { cluster_id, revision }) {
            Some(before) if before.cluster_id != cluster_id => {
                warn!("another etcd cluster answers: {cluster_id:x}, not {:x}", before.cluster_id);
                ResyncCause::OtherCluster
            }
            Some(before) if before.revision > revision => {
                warn!(
                    "etcd went back from revision {} to {revision}: its data is gone, or a backup was restored",
                    before.revision
                );
                ResyncCause::RolledBack
            }
            _ => cause,
        };
        if updates.send(Update::Snapshot(table.into(), cause)).await.is_err() {
            return Ok(());
        }
        let client = self.client().await.map_err(|error| Gap { cause: error.resync_cause(), error })?;
        let mut stream = self.follow(client, revision + 1).await.map_err(|error| self.gap(&error))?;
        back_off.reset();
        loop {
            let next = tokio::select! {
                next = heartbeat.during(stream.message()) => next,
                () = updates.closed() => return Ok(()),
            };
            let response = match next {
                Ok(Some(response)) if response.canceled() => return Err(self.cancelled(&response)),
                Ok(Some(response)) => response,
                Ok(None) => {
                    let error = self.ended(CALL, ResyncCause::Connection, "etcd closed the stream".to_owned());
                    return Err(Gap { cause: ResyncCause::Connection, error });
                }
                Err(error) => return Err(self.gap(&error)),
            };
            if let Some(header) = response.header() {
                // The two watches tell of one revision one after the other.
                let seen = position.map_or(revision, |position| position.revision).max(header.revision());
                *position = Some(Position { cluster_id, revision: seen });
            }
            for event in response.events() {
                let Some(kv) = event.kv() else { continue };
                let update = match event.event_type() {
                    EventType::Put => self.put(kv),
                    EventType::Delete => self.deletion(kv),
                };
                if let Some(update) = update
                    && updates.send(update).await.is_err()
                {
                    return Ok(());
                }
            }
        }
    }

    /// Watches the config and the leases on one stream, from a revision on.
    async fn follow(&self, client: Client, start: i64) -> Result<WatchStream, etcd_client::Error> {
        let options = WatchOptions::new().with_start_revision(start).with_fragment();
        let mut watches = client.watch_client().max_decoding_message_size(MAX_ANSWER);
        let mut stream = watches.watch(self.config_key(), Some(options.clone())).await?;
        stream.watch(self.leases_key(), Some(options.with_prefix())).await?;
        Ok(stream)
    }

    fn put(&self, kv: &KeyValue) -> Option<Update> {
        match self.read(kv) {
            Read::Config(value) => Some(Update::Config(Some(value))),
            Read::Lease(lease) => Some(Update::Set(Box::new(lease.into()))),
            Read::PassedOver(passed_over) => Some(Update::PassedOver(passed_over)),
            Read::Foreign => None,
        }
    }

    fn deletion(&self, kv: &KeyValue) -> Option<Update> {
        // A deletion has the key only, so that every lease's is read as one without a usable value.
        match self.read(kv) {
            Read::Config(_) => Some(Update::Config(None)),
            Read::Lease(Stored { key, .. }) | Read::PassedOver(PassedOver { key: Some(key), .. }) => {
                Some(Update::Removed { key, name: key.to_string(), revision: kv.mod_revision() })
            }
            Read::PassedOver(passed_over) => Some(Update::PassedOverRemoved(passed_over.name)),
            Read::Foreign => {
                debug!("a key that is not ours was deleted");
                None
            }
        }
    }

    fn gap(&mut self, error: &etcd_client::Error) -> Gap {
        let error = self.failed(CALL, error);
        Gap { cause: error.resync_cause(), error }
    }

    /// A watch ends with such a message, not with an error.
    fn cancelled(&mut self, response: &WatchResponse) -> Gap {
        let (cause, text) = match response.compact_revision() {
            0 => {
                let reason = response.cancel_reason();
                let cause = ResyncCause::of_message(reason).unwrap_or(ResyncCause::Cancelled);
                let text = match cause {
                    // Before 3.6 it says so of a session that has expired, too.
                    ResyncCause::Unauthenticated => {
                        "etcd cancelled it: the session of this user has expired, or its role has changed".to_owned()
                    }
                    _ => format!("etcd cancelled it: {reason}"),
                };
                (cause, text)
            }
            revision => (ResyncCause::Compacted, format!("changes before revision {revision} are compacted away")),
        };
        Gap { cause, error: self.ended(CALL, cause, text) }
    }
}
