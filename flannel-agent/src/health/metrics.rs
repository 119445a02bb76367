//! `/metrics`. Reading maps and asking the kernel takes a thread that is none of the agent's loops'; one at a time, however many ask.

use std::time::Duration;

use axum::{
    extract::State,
    http::{
        HeaderMap, StatusCode,
        header::{ACCEPT, CONTENT_TYPE, VARY},
    },
    response::{IntoResponse as _, Response},
};
use tokio::task::JoinError;
use tracing::debug;

use super::Health;
use crate::{
    operator::metrics::{
        Metrics,
        catalogue::Metric,
        exposition::{Exposition, Format},
    },
    shared_reading::{SharedReading, complete},
};

/// For so long a scrape is told what the one before was.
const FRESH: Duration = Duration::from_millis(500);

/// Answers scrapes. Clones are the same.
#[derive(Clone)]
pub(super) struct Scrapes {
    metrics: Metrics,
    health: Health,
    latest: SharedReading<Exposition>,
}

impl Scrapes {
    pub(super) fn new(metrics: Metrics, health: Health) -> Self {
        Self { metrics, health, latest: SharedReading::new(FRESH) }
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
        let latest = self.latest.clone();
        latest.tell(move || self.read(), move |exposition| exposition.encode(format)).await
    }

    fn read(&self) -> Exposition {
        let mut exposition = complete(self.metrics.collect()).unwrap_or_else(|error| {
            debug!("read the metrics: {error}");
            Exposition::default()
        });
        exposition.add(Metric::AgentHealthy, &[], self.health.silent().is_none());
        exposition.add(Metric::AgentReady, &[], self.health.is_ready());
        exposition
    }
}
