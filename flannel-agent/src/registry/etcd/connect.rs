//! Connections to etcd: to whichever endpoint answers first. A client that balances over all of them fails a call
//! whenever it picks one that is dead.

use std::{io, time::Duration};

use etcd_client::{Channel, Client, ConnectOptions, GetOptions};
use futures_util::{
    future::select_ok,
    stream::{FuturesUnordered, StreamExt as _},
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpStream, lookup_host},
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{self, pki_types::ServerName},
};
use tonic::transport::{Endpoint, Uri};
use tower::service_fn;

use super::{
    Etcd, EtcdError, EtcdOptions, REQUEST_TIMEOUT,
    explain::{self, Asked, Cause, Permission, Speaks},
    tls::Tls,
};
use crate::registry::ResyncCause;

/// How often a connection with a watch on it is tested, and how long that may take. Idle ones are not: etcd takes that
/// for abuse and closes them.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));
/// How long the name of a server may take to be resolved: a dead name server before a living one costs five seconds.
const RESOLUTION: Duration = Duration::from_secs(15);
/// How long an endpoint that could not be used may take to show what it speaks instead.
const DIAGNOSIS: Duration = Duration::from_secs(1);
/// What a client of HTTP/2 begins with, and empty SETTINGS (RFC 9113, sections 3.4 and 6.5).
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// No connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    /// What is given is no URL of a server.
    #[error("no URL of a server")]
    Endpoint,
    /// The name has no address.
    #[error("resolve {host}")]
    Resolve {
        /// The name.
        host: String,
        /// Why.
        source: io::Error,
    },
    /// TCP.
    #[error("connect")]
    Tcp(#[source] io::Error),
    /// No address answered.
    #[error("connect: timed out")]
    TcpTimeout,
    /// The TLS handshake.
    #[error("TLS handshake")]
    Tls(#[source] io::Error),
    /// The TLS handshake got no answer.
    #[error("TLS handshake: timed out")]
    TlsTimeout,
}

/// A client, and the endpoint that it is connected to.
#[derive(Clone)]
pub(super) struct Connection {
    pub(super) client: Client,
    pub(super) endpoint: String,
    /// For what it may be refused.
    pub(super) tls: Option<Tls>,
}

/// TCP, or TLS over it.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Etcd {
    /// The client of the present connection, or of a new one.
    pub(super) async fn client(&mut self) -> Result<Client, EtcdError> {
        if let Some(connection) = &self.connection {
            return Ok(connection.client.clone());
        }
        // Read anew each time: certificates are renewed.
        let tls = self.options.endpoints.iter().any(|endpoint| is_tls(endpoint)).then(|| Tls::read(&self.options));
        let tls = tls.transpose()?;
        let (config_key, leases_key) = (self.config_key(), self.leases_key());
        let attempts = self.options.endpoints.iter().enumerate().map(|(index, endpoint)| {
            let tls = tls.as_ref().filter(|_| is_tls(endpoint));
            let asked = Asked {
                config_key: &config_key,
                leases_key: &leases_key,
                permission: Permission::ReadConfig,
                user: self.options.user.as_ref().map(|(user, _)| user.as_str()),
                identity: tls.and_then(|tls| tls.identity.as_ref()),
            };
            let options = &self.options;
            async move { (index, attempt(endpoint, tls, options, &asked).await) }
        });
        let mut attempts: FuturesUnordered<_> = attempts.collect();
        let mut failures = Vec::new();
        let connection = loop {
            match attempts.next().await {
                Some((_, Ok(connection))) => break Some(connection),
                Some((index, Err(failure))) => failures.push((index, failure)),
                None => break None,
            }
        };
        drop(attempts);
        if let Some(connection) = connection {
            let client = connection.client.clone();
            self.connection = Some(connection);
            return Ok(client);
        }
        failures.sort_by_key(|(index, _)| *index);
        let kind = failures.iter().find_map(|(_, failure)| failure.kind).unwrap_or(ResyncCause::Connection);
        let causes: Vec<_> = failures.into_iter().map(|(index, failure)| (index, failure.cause)).collect();
        let cause = self.joined(&causes);
        Err(self.ended("connect", kind, cause))
    }

    /// The causes of several endpoints in one line: once where they are the same.
    fn joined(&self, causes: &[(usize, Cause)]) -> String {
        match causes {
            [] => "no endpoint is given; name etcd's with --etcd-endpoints".to_owned(),
            [(_, first), rest @ ..] if rest.iter().all(|(_, cause)| cause == first) => first.to_string(),
            causes => {
                let faults =
                    causes.iter().map(|(index, cause)| format!("{}: {}", self.options.endpoints[*index], cause.fault));
                let mut remedies: Vec<&str> = Vec::new();
                for (_, cause) in causes {
                    if !cause.remedy.is_empty() && !remedies.contains(&cause.remedy.as_str()) {
                        remedies.push(&cause.remedy);
                    }
                }
                faults.chain(remedies.into_iter().map(str::to_owned)).collect::<Vec<_>>().join("; ")
            }
        }
    }
}

pub(super) fn is_tls(endpoint: &str) -> bool {
    endpoint.starts_with("https://")
}

struct Failure {
    cause: Cause,
    kind: Option<ResyncCause>,
}

/// Connects to one endpoint, and asks it for something: connecting alone says little.
async fn attempt(
    endpoint: &str,
    tls: Option<&Tls>,
    options: &EtcdOptions,
    asked: &Asked<'_>,
) -> Result<Connection, Failure> {
    let error = match connect(endpoint, tls, options, asked.config_key).await {
        Ok(client) => return Ok(Connection { client, endpoint: endpoint.to_owned(), tls: tls.cloned() }),
        Err(error) => error,
    };
    let kind = kind(&error);
    let known = explain::explain(explain::inner(&error), asked);
    let broken = explain::broken(explain::inner(&error), tls.is_some());
    let cause = match known {
        Some(cause) => cause,
        None => diagnose(endpoint, tls, asked).await.unwrap_or(broken),
    };
    Err(Failure { cause, kind })
}

/// What an error of etcd's means for a watch.
pub(super) fn kind(error: &etcd_client::Error) -> Option<ResyncCause> {
    match error {
        etcd_client::Error::GRpcStatus(status) => ResyncCause::of_message(status.message()),
        _ => None,
    }
}

async fn connect(
    endpoint: &str,
    tls: Option<&Tls>,
    options: &EtcdOptions,
    key: &str,
) -> Result<Client, etcd_client::Error> {
    let tls = tls.cloned();
    let connector = service_fn(move |uri: Uri| {
        let tls = tls.clone();
        async move { open(&uri, tls.as_ref()).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_shared(endpoint.to_owned())?
        .timeout(REQUEST_TIMEOUT)
        .http2_keep_alive_interval(KEEP_ALIVE.0)
        .keep_alive_timeout(KEEP_ALIVE.1)
        .connect_with_connector(connector)
        .await?;
    let connect = ConnectOptions::new().with_require_leader(true).with_auto_token_refresh(true);
    let as_user = match &options.user {
        Some((name, password)) => connect.clone().with_user(name, password),
        None => connect.clone(),
    };
    let mut client = match Client::from_channel(Channel::Tonic(channel.clone()), Some(as_user)).await {
        // As flannel's client does: user and password are for when it asks.
        Err(etcd_client::Error::GRpcStatus(status)) if status.message().contains("authentication is not enabled") => {
            Client::from_channel(Channel::Tonic(channel), Some(connect)).await
        }
        other => other,
    }?;
    // Without user and password, connecting asks nothing of the server.
    client.get(key, Some(GetOptions::new().with_count_only())).await?;
    Ok(client)
}

async fn open(uri: &Uri, tls: Option<&Tls>) -> Result<Box<dyn Stream>, ConnectError> {
    let tcp = dial(uri, tls.is_some()).await?;
    Ok(match tls {
        Some(tls) => Box::new(handshake(uri, tls, tcp).await?),
        None => Box::new(tcp),
    })
}

fn host(uri: &Uri) -> Result<&str, ConnectError> {
    let host = uri.host().filter(|host| !host.is_empty()).ok_or(ConnectError::Endpoint)?;
    Ok(host.trim_start_matches('[').trim_end_matches(']'))
}

/// TCP to whichever of its addresses answers first.
async fn dial(uri: &Uri, is_tls: bool) -> Result<TcpStream, ConnectError> {
    let host = host(uri)?;
    let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
    let resolve = |source| ConnectError::Resolve { host: host.to_owned(), source };
    let resolved = timeout(RESOLUTION, lookup_host((host, port))).await;
    let silent = || io::Error::new(io::ErrorKind::TimedOut, "no name server answers");
    let addresses: Vec<_> = resolved.map_err(|_| resolve(silent()))?.map_err(resolve)?.collect();
    if addresses.is_empty() {
        return Err(resolve(io::Error::new(io::ErrorKind::NotFound, "it has no address")));
    }
    let attempts = addresses.into_iter().map(|address| Box::pin(TcpStream::connect(address)));
    let (stream, _slower) = timeout(REQUEST_TIMEOUT, select_ok(attempts))
        .await
        .map_err(|_| ConnectError::TcpTimeout)?
        .map_err(ConnectError::Tcp)?;
    stream.set_nodelay(true).map_err(ConnectError::Tcp)?;
    Ok(stream)
}

async fn handshake(uri: &Uri, tls: &Tls, tcp: TcpStream) -> Result<TlsStream<TcpStream>, ConnectError> {
    let name = ServerName::try_from(host(uri)?.to_owned()).map_err(|_| ConnectError::Endpoint)?;
    let connector = TlsConnector::from(tls.config.clone());
    let done = timeout(REQUEST_TIMEOUT, connector.connect(name, tcp)).await.map_err(|_| ConnectError::TlsTimeout)?;
    done.map_err(ConnectError::Tls)
}

/// Asks an endpoint that ended a connection without a word what it speaks, and whether it refuses this client's
/// certificate: in TLS 1.3 it does so after the handshake, where the reason is lost with what was sent meanwhile.
async fn diagnose(endpoint: &str, tls: Option<&Tls>, asked: &Asked<'_>) -> Option<Cause> {
    let uri: Uri = endpoint.parse().ok()?;
    if let Some(tls) = tls {
        let outcome = listen(&uri, tls).await;
        if let Err(error) = &outcome
            && let Some(cause) = explain::explain(error, asked)
        {
            return Some(cause);
        }
        let speaks = hears_plainly(&uri).await?;
        return explain::misunderstood(&speaks, true);
    }
    let speaks = match hears_plainly(&uri).await {
        Some(speaks) => speaks,
        None if speaks_tls(&uri).await => Speaks::Tls,
        None => return None,
    };
    explain::misunderstood(&speaks, false)
}

/// A handshake after which nothing is sent.
async fn listen(uri: &Uri, tls: &Tls) -> Result<(), ConnectError> {
    let tcp = dial(uri, true).await?;
    let mut stream = handshake(uri, tls, tcp).await?;
    match timeout(DIAGNOSIS, stream.read(&mut [0])).await {
        Ok(Err(error)) => Err(ConnectError::Tls(error)),
        _ => Ok(()),
    }
}

/// What an endpoint answers to a client of HTTP/2 in clear text.
async fn hears_plainly(uri: &Uri) -> Option<Speaks> {
    let mut tcp = dial(uri, false).await.ok()?;
    tcp.write_all(HTTP2_PREFACE).await.ok()?;
    let mut answer = [0; 64];
    let length = timeout(DIAGNOSIS, tcp.read(&mut answer)).await.ok()?.ok()?;
    let answer = answer.get(..length)?;
    match answer {
        // A record of TLS: an alert, or a handshake (RFC 8446, section 5.1).
        [0x15 | 0x16, 0x03, ..] => Some(Speaks::Tls),
        // SETTINGS, which come first.
        [_, _, _, 0x04, ..] => Some(Speaks::Http2),
        [b'H', b'T', b'T', b'P', b'/', ..] => {
            let line = String::from_utf8_lossy(answer);
            Some(Speaks::Http1(line.lines().next().unwrap_or_default().trim().to_owned()))
        }
        _ => None,
    }
}

/// Whether an endpoint answers a handshake of TLS with anything of TLS.
async fn speaks_tls(uri: &Uri) -> bool {
    let Ok(mut tcp) = dial(uri, true).await else { return false };
    let hello = client_hello();
    if hello.is_empty() || tcp.write_all(&hello).await.is_err() {
        return false;
    }
    let mut answer = [0; 2];
    let heard = timeout(DIAGNOSIS, tcp.read_exact(&mut answer)).await;
    matches!(heard, Ok(Ok(_))) && matches!(answer, [0x15 | 0x16, 0x03])
}

/// The first words of TLS, from a client that goes no further.
fn client_hello() -> Vec<u8> {
    let hello = || {
        let config = rustls::ClientConfig::builder_with_provider(super::verify::PROVIDER.clone())
            .with_safe_default_protocol_versions()
            .ok()?
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        let name = ServerName::try_from("etcd").ok()?;
        let mut client = rustls::ClientConnection::new(std::sync::Arc::new(config), name).ok()?;
        let mut hello = Vec::new();
        client.write_tls(&mut hello).ok()?;
        Some(hello)
    };
    hello().unwrap_or_default()
}
