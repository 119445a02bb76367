//! A page to look at (`--http-ui`): this host, its peers, the traffic between them, what is to be looked at, and what was dropped.
//!
//! * `/`, `/page.css`, `/page.js` — the page; it loads nothing from elsewhere
//! * `/api/v1/overview` — what it shows, as JSON ([`Overviews`]); it asks for it as long as somebody looks
//! * `access` — whom it is shown to: anybody who reaches the address, but no page of another origin
//!
//! Nothing here changes anything. While nobody looks, nothing is read.

mod access;

use std::{io, net::SocketAddr};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    middleware,
    response::{IntoResponse as _, Response},
    routing::get,
};
use tokio::{net::TcpListener, task::JoinHandle};
use tracing::{debug, info, warn};

use self::access::LocalAddress;
use crate::{
    operator::overview::{FRESH, Overviews},
    shared_reading::{SharedReading, complete},
};

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const JAVASCRIPT: &str = "text/javascript; charset=utf-8";
const JSON: &str = "application/json";

/// The page can't be had.
#[derive(Debug, thiserror::Error)]
#[error("listen at {address} for the page: {source}; check --http-ui")]
pub struct PageError {
    address: SocketAddr,
    source: io::Error,
}

/// What was read, as JSON; [`None`] where it could not be.
type Document = Option<Vec<u8>>;

/// What the page shows. Clones are the same.
#[derive(Clone)]
struct Shown {
    overviews: Overviews,
    latest: SharedReading<Document>,
}

/// Serves the page as long as the process lives.
///
/// # Errors
/// [`PageError`] where the address can't be had.
pub async fn serve(address: SocketAddr, overviews: Overviews) -> Result<JoinHandle<()>, PageError> {
    let listener = TcpListener::bind(address).await.map_err(|source| PageError { address, source })?;
    info!("the page is at http://{address}/");
    if !address.ip().to_canonical().is_loopback() {
        warn!(
            "--http-ui={address} is no loopback address: who reaches it sees leases, peers and drops, without encryption or password"
        );
    }
    let shown = Shown { overviews, latest: SharedReading::new(FRESH) };
    let router = Router::new()
        .route("/", get(([(CONTENT_TYPE, HTML)], include_str!("page.html"))))
        .route("/page.css", get(([(CONTENT_TYPE, CSS)], include_str!("page.css"))))
        .route("/page.js", get(([(CONTENT_TYPE, JAVASCRIPT)], include_str!("page.js"))))
        .route("/api/v1/overview", get(Shown::overview).with_state(shown))
        .layer(middleware::from_fn(access::check));
    let service = router.into_make_service_with_connect_info::<LocalAddress>();
    Ok(tokio::spawn(async move {
        // It tries again by itself what fails.
        let _never = axum::serve(listener, service).await;
    }))
}

impl Shown {
    async fn overview(State(Self { overviews, latest }): State<Self>) -> Response {
        match latest.tell(move || read(&overviews), Option::clone).await {
            Ok(Some(document)) => ([(CONTENT_TYPE, JSON)], document).into_response(),
            Ok(None) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
            Err(error) => {
                debug!("read what the page shows: {error}");
                StatusCode::INTERNAL_SERVER_ERROR.into_response()
            }
        }
    }
}

fn read(overviews: &Overviews) -> Document {
    let overview = complete(overviews.read());
    let document = overview.and_then(|overview| serde_json::to_vec(&overview).map_err(io::Error::from));
    document.inspect_err(|error| debug!("read what the page shows: {error}")).ok()
}
