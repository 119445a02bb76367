//! `/metrics`. Reading maps and asking the kernel takes a thread that is none of the agent's loops'; one at a time, however many ask.

use std::{sync::Arc, time::Duration};

use axum::{
    extract::State,
    http::{
        HeaderMap, StatusCode,
        header::{ACCEPT, CONTENT_TYPE, VARY},
    },
    response::{IntoResponse as _, Response},
};
use tokio::{
    runtime,
    sync::Mutex,
    task::{JoinError, spawn_blocking},
    time::Instant,
};
use tracing::debug;

use super::Health;
use crate::operator::metrics::{
    Metrics,
    catalogue::Metric,
    exposition::{Exposition, Format},
};

/// For so long what was read is told to others who ask: whoever floods this with requests costs no more than one who asks so often.
const FRESH: Duration = Duration::from_millis(500);

/// What was read last, and when.
type Latest = Option<(Instant, Exposition)>;

/// Answers scrapes. Clones are the same.
#[derive(Clone)]
pub(super) struct Scrapes {
    metrics: Metrics,
    health: Health,
    latest: Arc<Mutex<Latest>>,
}

impl Scrapes {
    pub(super) fn new(metrics: Metrics, health: Health) -> Self {
        Self { metrics, health, latest: Arc::default() }
    }

    /// Answers one. Several `Accept` headers are one (RFC 9110, section 5.3).
    pub(super) async fn answer(State(scrapes): State<Self>, headers: HeaderMap) -> Response {
        let accept: Vec<_> = headers.get_all(ACCEPT).iter().filter_map(|accept| accept.to_str().ok()).collect();
        let format = Format::of_accept(&accept.join(","));
        match scrapes.text(format).await {
            Ok(text) => ([(CONTENT_TYPE, format.content_type()), (VARY, "Accept")], text).into_response(),
            Err(error) => {
                debug!("read the metrics: {error}");
                StatusCode::INTERNAL_SERVER_ERROR.into_response()
            }
        }
    }

    async fn text(self, format: Format) -> Result<String, JoinError> {
        let mut latest = Arc::clone(&self.latest).lock_owned().await;
        // The lock goes with the work: a client that leaves does not let the next one begin beside it.
        let work = move || {
            if latest.as_ref().is_none_or(|(read, _)| read.elapsed() > FRESH) {
                *latest = Some((Instant::now(), self.read()));
            }
            latest.as_ref().map(|(_, exposition)| exposition.encode(format)).unwrap_or_default()
        };
        spawn_blocking(work).await
    }

    /// On a runtime of its own, since that of the agent's loops has one thread.
    fn read(&self) -> Exposition {
        let runtime = runtime::Builder::new_current_thread().enable_all().build();
        let mut exposition = match runtime {
            Ok(runtime) => runtime.block_on(self.metrics.collect()),
            Err(error) => {
                debug!("read the metrics: {error}");
                Exposition::default()
            }
        };
        exposition.add(Metric::AgentHealthy, &[], self.health.silent().is_none());
        exposition.add(Metric::AgentReady, &[], self.health.is_ready());
        exposition
    }
}
