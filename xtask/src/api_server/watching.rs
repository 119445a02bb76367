//! Watches: what changed since a revision, and then each change as it comes
//! (<https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes>).

use std::{collections::VecDeque, io, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::stream;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::{Response, body::Frame, header};
use serde_json::json;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use super::{
    answer::Body,
    faults::{Control, Gauge, Orders},
    objects::{Change, Object, Objects},
    request::{Query, Target},
    status::Status,
};

/// Bookmarks come that often, and before the end (apiserver/pkg/storage/cacher/cache_watcher.go).
const BOOKMARK_EVERY: Duration = Duration::from_secs(60);
const BOOKMARK_BEFORE_END: Duration = Duration::from_secs(2);
/// How long a watch lasts that asks for no time: the real server's, which takes up to twice as long, by chance.
const LASTS: Duration = Duration::from_secs(1800);

/// An open watch.
struct Watch {
    objects: Arc<Objects>,
    revisions: watch::Receiver<u64>,
    orders: watch::Receiver<Orders>,
    /// The order before it was opened.
    age: u64,
    /// How many bookmarks were asked for that it knows of.
    bookmarks: u64,
    target: Target,
    only: Option<String>,
    partial: bool,
    /// All changes up to here are sent.
    position: u64,
    pending: VecDeque<Bytes>,
    next_bookmark: Option<Instant>,
    end: Instant,
    ended: bool,
    _open: Gauge,
}

/// Opens a watch.
pub(super) fn watch(
    objects: &Arc<Objects>,
    control: &Arc<Control>,
    user: &str,
    target: &Target,
    query: &Query,
    partial: bool,
) -> Result<Response<Body>, Status> {
    refuse_unknown(query)?;
    let now = Instant::now();
    let end = now + query.seconds("timeoutSeconds")?.unwrap_or(LASTS);
    let mut orders = control.orders.subscribe();
    let Orders { last: age, bookmarks, .. } = *orders.borrow_and_update();
    let mut watch = Watch {
        revisions: objects.revision.subscribe(),
        objects: objects.clone(),
        orders,
        age,
        bookmarks,
        target: target.clone(),
        only: query.only_name()?.map(str::to_owned),
        partial,
        position: 0,
        pending: VecDeque::new(),
        next_bookmark: None,
        end,
        ended: false,
        _open: control.gauge(user, format!("watching {}", target.resource.plural)),
    };
    if query.flag("allowWatchBookmarks")? {
        watch.next_bookmark = watch.bookmark_after(now);
    }
    match query.number("resourceVersion")? {
        None | Some(0) => watch.begin_with_all(),
        Some(revision) => watch.position = revision,
    }
    let events = stream::unfold(watch, |mut watch| async move {
        let event: io::Result<_> = Ok(Frame::data(watch.next().await?));
        Some((event, watch))
    });
    let mut response = Response::new(StreamBody::new(events).boxed_unsync());
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    Ok(response)
}

/// What a server without streaming lists says (apimachinery/pkg/apis/meta/internalversion/validation).
fn refuse_unknown(query: &Query) -> Result<(), Status> {
    let refuse = |field: &str, cause: &str| {
        let message = format!("ListOptions.meta.k8s.io \"\" is invalid: {field}: Forbidden: {cause}");
        Err(Status::unprocessable(message))
    };
    if query.get("sendInitialEvents").is_some() {
        let cause = "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled";
        return refuse("sendInitialEvents", cause);
    }
    if query.get("resourceVersionMatch").is_some() {
        let cause = "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided";
        return refuse("resourceVersionMatch", cause);
    }
    Ok(())
}

impl Watch {
    fn begin_with_all(&mut self) {
        let (revision, objects) = self.objects.now();
        self.position = revision;
        let wanted = objects.values().filter(|object| self.is_wanted(object));
        self.pending = wanted.map(|object| self.event("ADDED", object)).collect();
    }

    /// The next event, or the end.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(event) = self.pending.pop_front() {
                return Some(event);
            }
            let orders = *self.orders.borrow_and_update();
            if self.age < orders.silenced {
                std::future::pending::<()>().await;
            }
            if self.ended || self.age < orders.closed || Instant::now() >= self.end {
                return None;
            }
            self.collect();
            if !self.pending.is_empty() || self.ended {
                continue;
            }
            let is_due = self.next_bookmark.is_some_and(|next| next <= Instant::now());
            if self.next_bookmark.is_some() && (is_due || self.bookmarks < orders.bookmarks) {
                self.bookmarks = orders.bookmarks;
                self.next_bookmark = self.bookmark_after(Instant::now());
                return Some(self.bookmark());
            }
            let bookmark = self.next_bookmark.unwrap_or(self.end).min(self.end);
            tokio::select! {
                _ = self.revisions.changed() => {}
                _ = self.orders.changed() => {}
                () = sleep_until(bookmark) => {}
            }
        }
    }

    /// What has changed meanwhile.
    fn collect(&mut self) {
        self.revisions.borrow_and_update();
        match self.objects.since(self.position) {
            Ok((changes, newest)) => {
                for Change { event, object } in changes {
                    if self.is_wanted(&object) {
                        self.pending.push_back(self.event(event, &object));
                    }
                }
                // A client may begin at a revision that is still to come.
                self.position = self.position.max(newest);
            }
            Err(oldest) => {
                let message = format!("too old resource version: {} ({oldest})", self.position);
                let event = json!({"type": "ERROR", "object": Status::expired(message).value()});
                self.pending.push_back(format!("{event}\n").into());
                self.ended = true;
            }
        }
    }

    fn is_wanted(&self, object: &Object) -> bool {
        let (plural, namespace, name) = &object.key;
        *plural == self.target.resource.plural
            && (self.target.namespace.is_empty() || self.target.namespace == *namespace)
            && self.only.as_ref().is_none_or(|only| only == name)
    }

    fn event(&self, event: &str, object: &Object) -> Bytes {
        let text = if self.partial { object.partial() } else { object.text() };
        let mut line = BytesMut::with_capacity(text.len() + 64);
        line.extend_from_slice(b"{\"type\":\"");
        line.extend_from_slice(event.as_bytes());
        line.extend_from_slice(b"\",\"object\":");
        line.extend_from_slice(&text);
        line.extend_from_slice(b"}\n");
        line.freeze()
    }

    fn bookmark(&self) -> Bytes {
        let resource = self.target.resource;
        let (kind, version) = match self.partial {
            true => ("PartialObjectMetadata", "meta.k8s.io/v1".to_owned()),
            false => (resource.kind, resource.api_version()),
        };
        let metadata = json!({"resourceVersion": self.position.to_string(), "creationTimestamp": null});
        let object = json!({"kind": kind, "apiVersion": version, "metadata": metadata});
        format!("{}\n", json!({"type": "BOOKMARK", "object": object})).into()
    }

    /// When the bookmark after that time is due: in a minute, or a moment before the end.
    fn bookmark_after(&self, time: Instant) -> Option<Instant> {
        let last = self.end.checked_sub(BOOKMARK_BEFORE_END).filter(|last| *last > time);
        Some(last.map_or(time + BOOKMARK_EVERY, |last| last.min(time + BOOKMARK_EVERY)))
    }
}
