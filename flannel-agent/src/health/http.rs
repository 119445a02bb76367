//! `/healthz` and `/readyz` (flannel: main.go, `mustRunHealthz`), with flannel's answers where all is well; and `/metrics`.

use std::{io, net::SocketAddr};

use axum::{
    Router,
    extract::State,
    http::StatusCode,
    routing::{any, get},
};
use tokio::{net::TcpListener, task::JoinHandle};
use tracing::info;

use super::{Health, metrics::Scrapes};
use crate::operator::metrics::Metrics;

/// Neither probes nor scrapes can be answered.
#[derive(Debug, thiserror::Error)]
#[error("listen at {address} for health probes and scrapes: {source}; check --healthz-ip and --healthz-port")]
pub struct ServeError {
    address: SocketAddr,
    source: io::Error,
}

/// Answers probes and scrapes as long as the process lives.
///
/// # Errors
/// [`ServeError`] where the address can't be had.
pub async fn serve(address: SocketAddr, health: Health, metrics: Metrics) -> Result<JoinHandle<()>, ServeError> {
    let listener = TcpListener::bind(address).await.map_err(|source| ServeError { address, source })?;
    info!("/healthz, /readyz and /metrics are answered at {address}");
    let scrapes = Scrapes::new(metrics, health.clone());
    let router = Router::new().route("/healthz", any(healthz)).route("/readyz", any(readyz)).with_state(health);
    let router = router.merge(Router::new().route("/metrics", get(Scrapes::answer)).with_state(scrapes));
    Ok(tokio::spawn(async move {
        // It tries again by itself what fails.
        let _never = axum::serve(listener, router).await;
    }))
}

async fn healthz(State(health): State<Health>) -> (StatusCode, String) {
    match health.silent() {
        None => (StatusCode::OK, "flanneld is running".to_owned()),
        Some(silent) => (StatusCode::INTERNAL_SERVER_ERROR, silent.to_string()),
    }
}

async fn readyz(State(health): State<Health>) -> (StatusCode, &'static str) {
    match health.is_ready() {
        true => (StatusCode::OK, "flanneld is ready"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "flanneld is not ready yet"),
    }
}
