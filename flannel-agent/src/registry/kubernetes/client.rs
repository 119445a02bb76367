//! Calls to the API server: with credentials that are read again, on connections that are noticed to be dead, and with
//! errors that name verb, resource and subresource.

use std::{error::Error as StdError, fmt, time::Duration};

use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Limited};
use hyper_rustls::{FixedServerNameResolver, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Builder, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use kube::{
    Client, Config,
    client::{Body, ConfigExt as _},
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::time::timeout;
use tokio_rustls::rustls::{crypto::aws_lc_rs, pki_types::ServerName};
use tower::{BoxError, ServiceBuilder};

use super::{Kubernetes, KubernetesError, lines::Lines};
use crate::registry::ResyncCause;

/// For how long a connection may take to be made, ...
const CONNECT_TIME: Duration = Duration::from_secs(5);
/// ... the API server to begin its answer, ...
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// ... and each part of it to come after the one before.
const PART_TIME: Duration = Duration::from_secs(10);
/// A connection that is quiet is tested after so long, and given up where nothing comes back for so long. (As the one to
/// etcd: the kernel answers for a server that hangs, so that HTTP/2 has to ask.)
const PING_AFTER: Duration = Duration::from_secs(10);
const PING_TIME: Duration = Duration::from_secs(5);
/// Of one that speaks no HTTP/2 only the kernel's tests tell.
const KEEP_ALIVE_RETRIES: u32 = 2;
/// What an answer may be in size: several times a chunk of the list with nodes as large as they get.
const MAX_ANSWER: usize = 64 << 20;
/// An API server that asks for patience gets no more at once than this.
const LONGEST_PATIENCE: Duration = Duration::from_secs(60);
/// Of what a server says beside a status, no more is told on.
const MOST_TOLD: usize = 300;

const METADATA_ONLY: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json";
const STRATEGIC_MERGE: &str = "application/strategic-merge-patch+json";

/// What is asked for, in the words that a role allows it by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call<'a> {
    pub(super) verb: &'static str,
    /// With its subresource.
    pub(super) resource: &'static str,
    /// Of which object; empty for all.
    pub(super) name: &'a str,
}

impl fmt::Display for Call<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { verb, resource, name } = self;
        write!(f, "{verb} {resource}")?;
        if name.is_empty() { Ok(()) } else { write!(f, " {name}") }
    }
}

/// The object that an error comes with (Kubernetes: metav1.Status).
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Status {
    pub(super) code: u16,
    pub(super) message: String,
    details: Option<StatusDetails>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct StatusDetails {
    retry_after_seconds: u64,
}

impl Kubernetes {
    pub(super) async fn client(&mut self) -> Result<Client, KubernetesError> {
        if let Some(client) = &self.client {
            return Ok(client.clone());
        }
        let unusable = |error: BoxError| KubernetesError::Credentials(causes(&*error));
        let client = connect(self.access.config()?).map_err(unusable)?;
        self.client = Some(client.clone());
        Ok(client)
    }

    /// Reads an object, or a list.
    pub(super) async fn get<T: DeserializeOwned>(&mut self, call: Call<'_>, path: &str) -> Result<T, KubernetesError> {
        let answer =
            self.send(call, request(Method::GET, path, header::ACCEPT, "application/json", Vec::new())).await?;
        self.read(call, answer).await
    }

    /// Writes what a strategic merge patch says.
    pub(super) async fn patch(&mut self, call: Call<'_>, path: &str, patch: &Value) -> Result<(), KubernetesError> {
        let body = patch.to_string().into_bytes();
        let answer = self.send(call, request(Method::PATCH, path, header::CONTENT_TYPE, STRATEGIC_MERGE, body)).await?;
        let _node: serde::de::IgnoredAny = self.read(call, answer).await?;
        Ok(())
    }

    /// Begins a watch of metadata.
    pub(super) async fn watch_lines(&mut self, call: Call<'_>, path: &str) -> Result<Lines, KubernetesError> {
        let answer = self.send(call, request(Method::GET, path, header::ACCEPT, METADATA_ONLY, Vec::new())).await?;
        Ok(Lines::new(answer.into_body()))
    }

    async fn send(
        &mut self,
        call: Call<'_>,
        request: Result<Request<Body>, http::Error>,
    ) -> Result<Response<Body>, KubernetesError> {
        let request = request.map_err(|error| self.failed(call, &error))?;
        let client = self.client().await?;
        let answer = match timeout(ANSWER_TIME, client.send(request)).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return Err(self.failed(call, &error)),
            Err(_) => {
                return Err(self.ended(call, ResyncCause::Connection, format!("no answer within {ANSWER_TIME:?}")));
            }
        };
        if answer.status().is_success() {
            return Ok(answer);
        }
        let (code, patience) = (answer.status(), retry_after(answer.headers()));
        let text = timeout(ANSWER_TIME, Limited::new(answer.into_body(), 1 << 20).collect()).await;
        let text = text.ok().and_then(Result::ok).map(|body| body.to_bytes()).unwrap_or_default();
        let status: Status = match serde_json::from_slice(&text) {
            Ok(status) => status,
            Err(_) => {
                let message: String = String::from_utf8_lossy(&text).trim().chars().take(MOST_TOLD).collect();
                if code == StatusCode::NOT_FOUND {
                    let cause = format!("what answers is no API server (404, {message}); check its URL");
                    return Err(self.ended(call, ResyncCause::Connection, cause));
                }
                Status { message, ..Status::default() }
            }
        };
        let told = status.details.as_ref().map(|details| Duration::from_secs(details.retry_after_seconds));
        if matches!(code, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
            && let Some(patience) = patience.or(told)
        {
            tokio::time::sleep(patience.min(LONGEST_PATIENCE)).await;
        }
        Err(self.refused(call, code.as_u16(), &status.message))
    }

    async fn read<T: DeserializeOwned>(
        &mut self,
        call: Call<'_>,
        answer: Response<Body>,
    ) -> Result<T, KubernetesError> {
        let mut answer = answer.into_body();
        let mut body = Vec::new();
        loop {
            let cause = match timeout(PART_TIME, answer.frame()).await {
                Ok(None) => break,
                Ok(Some(Ok(part))) if body.len() + part.data_ref().map_or(0, |data| data.len()) <= MAX_ANSWER => {
                    body.extend(part.into_data().unwrap_or_default());
                    continue;
                }
                Ok(Some(Ok(_))) => format!("an answer of more than {MAX_ANSWER} bytes"),
                Ok(Some(Err(error))) => format!("the answer was cut off: {}", causes(&error)),
                Err(_) => format!("the answer did not go on within {PART_TIME:?}"),
            };
            return Err(self.ended(call, ResyncCause::Connection, cause));
        }
        let parsed = serde_json::from_slice(&body);
        parsed.map_err(|error| {
            self.ended(call, ResyncCause::Connection, format!("the answer is not understood: {error}"))
        })
    }

    fn failed(&mut self, call: Call<'_>, error: &(dyn StdError + 'static)) -> KubernetesError {
        let cause = causes(error);
        let hint = if cause.contains("UnknownIssuer") || cause.contains("unknown issuer") {
            ": another authority signed the API server's certificate than the one that is given; check \
             certificate-authority in the kubeconfig, or the service account's ca.crt"
        } else {
            ""
        };
        self.ended(call, ResyncCause::Connection, cause + hint)
    }

    /// What a status means for the call that it answers.
    pub(super) fn refused(&mut self, call: Call<'_>, code: u16, message: &str) -> KubernetesError {
        let Call { verb, resource, .. } = call;
        let (kind, cause) = match code {
            401 => (
                ResyncCause::Unauthenticated,
                format!(
                    "the API server does not know who asks (401, {message}): the token has expired, or is another \
                     cluster's; check the kubeconfig, or the service account's token"
                ),
            ),
            403 => (
                ResyncCause::Unauthenticated,
                format!(
                    "forbidden (403, {message}): give the agent's service account a ClusterRole with the verb {verb} on {resource}"
                ),
            ),
            404 => return KubernetesError::NotFound { call: call.to_string(), url: self.url.clone() },
            410 => (
                ResyncCause::Compacted,
                format!("the API server no longer has the changes since then (410, {message})"),
            ),
            429 => (ResyncCause::Cancelled, format!("the API server asks for patience (429, {message})")),
            code => (ResyncCause::Cancelled, format!("it failed ({code}, {message})")),
        };
        self.ended(call, kind, cause)
    }

    /// A call failed: the next one is made on a fresh connection, with credentials that are read again.
    pub(super) fn ended(&mut self, call: Call<'_>, kind: ResyncCause, cause: String) -> KubernetesError {
        self.client = None;
        KubernetesError::Call { call: call.to_string(), url: self.url.clone(), kind, cause }
    }
}

/// Makes nothing yet but what the first call is sent by.
fn connect(config: Config) -> Result<Client, BoxError> {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(CONNECT_TIME));
    connector.set_keepalive(Some(PING_AFTER));
    connector.set_keepalive_interval(Some(PING_TIME));
    connector.set_keepalive_retries(Some(KEEP_ALIVE_RETRIES));
    // Where there is one already, it is the same.
    let _present = aws_lc_rs::default_provider().install_default();
    let mut https = HttpsConnectorBuilder::new().with_tls_config(config.rustls_client_config()?).https_or_http();
    if let Some(name) = &config.tls_server_name {
        https = https.with_server_name_resolver(FixedServerNameResolver::new(ServerName::try_from(name.clone())?));
    }
    let connections = Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .pool_timer(TokioTimer::new())
        .http2_keep_alive_interval(PING_AFTER)
        .http2_keep_alive_timeout(PING_TIME)
        .http2_keep_alive_while_idle(true)
        .build::<_, Body>(https.enable_all_versions().wrap_connector(connector));
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(connections);
    Ok(Client::new(service, config.default_namespace))
}

fn request(
    method: Method,
    path: &str,
    name: header::HeaderName,
    value: &str,
    body: Vec<u8>,
) -> Result<Request<Body>, http::Error> {
    let request = Request::builder().method(method).uri(path).header(name, value);
    request.header(header::USER_AGENT, concat!("flannel-agent/", env!("CARGO_PKG_VERSION"))).body(Body::from(body))
}

/// For a path or a query (RFC 3986, section 2.1).
pub(super) fn escape(text: &str) -> String {
    use std::fmt::Write as _;
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => escaped.push(byte.into()),
            // Writing to a text does not fail.
            _ => drop(write!(escaped, "%{byte:02X}")),
        }
    }
    escaped
}

/// In seconds; a date is not what API servers write.
fn retry_after(headers: &header::HeaderMap) -> Option<Duration> {
    headers.get(header::RETRY_AFTER)?.to_str().ok()?.parse().ok().map(Duration::from_secs)
}

/// An error with all that caused it, in one line.
pub(super) fn causes(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        source = error.source();
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
