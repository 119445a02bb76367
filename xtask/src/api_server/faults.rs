//! Faults, as they are asked for under `/double/`, and what was counted. No real server has this.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hyper::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::{answer::Delivery, request::Verb};

/// Which requests a fault befalls, and what befalls them.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Fault {
    /// Only this verb; else any.
    verb: Option<String>,
    /// Only this resource, with its subresource (`nodes/status`); else any.
    resource: Option<String>,
    /// Only this user; else any.
    user: Option<String>,
    /// How many requests; else all, until the faults are cleared.
    times: Option<u64>,
    /// Waits so long before it answers.
    #[serde(default)]
    delay_ms: u64,
    /// Never answers, with the connection left open.
    #[serde(default)]
    pub(super) hang: bool,
    /// Answers with this status.
    pub(super) status: Option<u16>,
    /// The header `Retry-After` of that.
    pub(super) retry_after: Option<u64>,
    /// A list ends after so many items, as if there were no more.
    pub(super) keep: Option<usize>,
    /// The body breaks off in the middle.
    #[serde(default)]
    cut: bool,
    /// The body comes in pieces of 16 KiB, with a pause before each.
    #[serde(default)]
    pause_ms: u64,
}

impl Fault {
    /// How long it waits.
    pub(super) fn delay(&self) -> Duration {
        Duration::from_millis(self.delay_ms)
    }

    /// How the body is sent.
    pub(super) fn delivery(&self) -> Delivery {
        match self {
            Self { cut: true, .. } => Delivery::Cut,
            Self { pause_ms: 0, .. } => Delivery::Whole,
            Self { pause_ms, .. } => Delivery::Slow(Duration::from_millis(*pause_ms)),
        }
    }

    /// The status that it answers with.
    pub(super) fn code(&self) -> Option<StatusCode> {
        self.status.and_then(|code| StatusCode::from_u16(code).ok())
    }

    fn befalls(&self, user: &str, verb: Verb, resource: &str) -> bool {
        let is = |wanted: &Option<String>, given: &str| wanted.as_deref().is_none_or(|wanted| wanted == given);
        self.times != Some(0) && is(&self.user, user) && is(&self.verb, verb.name()) && is(&self.resource, resource)
    }
}

/// What watches that are open are told.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Orders {
    /// Those that are as old as this end.
    pub(super) closed: u64,
    /// Those that are as old as this fall silent, and do not end.
    pub(super) silenced: u64,
    /// How many bookmarks were asked for.
    pub(super) bookmarks: u64,
    /// The number of the last order, by which watches know how old they are.
    pub(super) last: u64,
}

/// All of this.
#[derive(Debug, Default)]
pub(super) struct Control {
    faults: Mutex<Vec<Fault>>,
    /// By user, and by what they did.
    counters: Mutex<BTreeMap<String, BTreeMap<String, i64>>>,
    /// To watches.
    pub(super) orders: watch::Sender<Orders>,
}

impl Control {
    /// The fault that befalls a request.
    pub(super) fn fault(&self, user: &str, verb: Verb, resource: &str) -> Option<Fault> {
        let mut faults = lock(&self.faults);
        let fault = faults.iter_mut().find(|fault| fault.befalls(user, verb, resource))?;
        if let Some(times) = &mut fault.times {
            *times -= 1;
        }
        Some(fault.clone())
    }

    /// Adds to a counter.
    pub(super) fn count(&self, user: &str, what: String, amount: i64) {
        *lock(&self.counters).entry(user.to_owned()).or_default().entry(what).or_default() += amount;
    }

    /// Adds to a gauge while what is returned lives.
    pub(super) fn gauge(self: &Arc<Self>, user: &str, what: String) -> Gauge {
        self.count(user, what.clone(), 1);
        Gauge { control: self.clone(), user: user.to_owned(), what }
    }

    /// Carries out what is asked for at a path; `None` where that is nothing.
    pub(super) fn order(&self, path: &str, body: &[u8]) -> Option<Result<Value, serde_json::Error>> {
        let order = |change: fn(&mut Orders)| {
            self.orders.send_modify(|orders| {
                orders.last += 1;
                change(orders);
            });
            Some(Ok(json!({})))
        };
        match path {
            "counters" => Some(Ok(json!(*lock(&self.counters)))),
            "faults" => Some(serde_json::from_slice(body).map(|fault| {
                lock(&self.faults).push(fault);
                json!({})
            })),
            "clear" => {
                lock(&self.faults).clear();
                Some(Ok(json!({})))
            }
            "close-watches" => order(|orders| orders.closed = orders.last),
            "silence-watches" => order(|orders| orders.silenced = orders.last),
            "bookmark" => order(|orders| orders.bookmarks += 1),
            _ => None,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Something that is counted while it lasts.
#[derive(Debug)]
pub(super) struct Gauge {
    control: Arc<Control>,
    user: String,
    what: String,
}

impl Drop for Gauge {
    fn drop(&mut self) {
        self.control.count(&self.user, std::mem::take(&mut self.what), -1);
    }
}
