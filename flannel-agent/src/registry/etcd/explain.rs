//! Errors in plain words: what is wrong, and what to do about it. One cause, not the chain of what it went through.

use std::{error::Error, fmt, io};

use tokio_rustls::rustls::{
    self, AlertDescription, CertificateError, PeerIncompatible,
    pki_types::{CertificateDer, UnixTime},
};
use tonic::{Code, Status};

use super::{REQUEST_TIMEOUT, certificate, connect::ConnectError};

const WHERE: &str = "check --etcd-endpoints, and that etcd runs there";

/// What is wrong, and what may mend it; nothing for what mends itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cause {
    pub(super) fault: String,
    pub(super) remedy: String,
}

impl fmt::Display for Cause {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.remedy.as_str() {
            "" => self.fault.fmt(formatter),
            remedy => write!(formatter, "{}; {remedy}", self.fault),
        }
    }
}

impl Error for Cause {}

fn cause(fault: impl Into<String>, remedy: impl Into<String>) -> Cause {
    Cause { fault: fault.into(), remedy: remedy.into() }
}

/// A permission that a role in etcd needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Permission {
    /// To read and watch the network configuration.
    ReadConfig,
    /// To read, watch and write what is below `subnets/`.
    WriteLeases,
}

/// What the words depend on besides the error.
pub(super) struct Asked<'a> {
    /// The key of the config.
    pub(super) config_key: &'a str,
    /// What the leases' keys begin with, slash and all.
    pub(super) leases_key: &'a str,
    /// What the call needs.
    pub(super) permission: Permission,
    /// Who asks, where it is by a password.
    pub(super) user: Option<&'a str>,
    /// Who asks, where it is by a certificate.
    pub(super) identity: Option<&'a CertificateDer<'static>>,
}

/// What answers at an endpoint that could not be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Speaks {
    /// HTTP/2 in clear text.
    Http2,
    /// Another HTTP in clear text, with this for an answer.
    Http1(String),
    /// TLS.
    Tls,
}

/// Why an endpoint that answers so can't be used.
pub(super) fn misunderstood(speaks: &Speaks, asked_for_tls: bool) -> Option<Cause> {
    match (speaks, asked_for_tls) {
        (Speaks::Http1(line), _) => Some(cause(
            format!("what answers there speaks HTTP/1, not gRPC ({line}): another server, or a proxy"),
            "check --etcd-endpoints: the client port of etcd, by default 2379",
        )),
        (Speaks::Http2, true) => Some(cause(
            "what answers there speaks in clear text, not TLS",
            "write http:// in --etcd-endpoints, or give etcd a certificate (its --cert-file, --key-file)",
        )),
        (Speaks::Tls, false) => {
            Some(cause("what answers there speaks TLS, not clear text", "write https:// in --etcd-endpoints"))
        }
        (Speaks::Http2, false) | (Speaks::Tls, true) => None,
    }
}

/// The causes behind an error, the outermost first.
fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    let below = |error: &'a (dyn Error + 'static)| match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref)
    {
        Some(inner) => Some(inner as &(dyn Error + 'static)),
        None => error.source(),
    };
    std::iter::successors(Some(error), move |error| below(*error))
}

/// What the client's error is about: its own type tells no source.
pub(super) fn inner(error: &etcd_client::Error) -> &(dyn Error + 'static) {
    match error {
        etcd_client::Error::GRpcStatus(status) => status,
        etcd_client::Error::TransportError(error) => error,
        etcd_client::Error::IoError(error) => error,
        etcd_client::Error::InvalidUri(error) => error,
        other => other,
    }
}

/// The words for an error. [`None`] where a connection ended without a reason.
pub(super) fn explain(error: &(dyn Error + 'static), asked: &Asked<'_>) -> Option<Cause> {
    let links = || chain(error);
    if let Some(known) = links().find_map(|error| error.downcast_ref::<Cause>()) {
        return Some(known.clone());
    }
    if let Some(error) = links().find_map(|error| error.downcast_ref::<rustls::Error>()) {
        return of_tls(error, asked);
    }
    if let Some(error) = links().find_map(|error| error.downcast_ref::<ConnectError>()) {
        return of_connecting(error);
    }
    let said_by_etcd = links().find_map(|error| error.downcast_ref::<Status>()).filter(|status| {
        // One without a source came over the wire.
        status.source().is_none() || status.code() == Code::Cancelled
    });
    if let Some(cause) = said_by_etcd.and_then(|status| of_status(status, asked)) {
        return Some(cause);
    }
    if links().any(|error| error.to_string().contains("keep-alive timed out")) {
        return Some(cause("etcd stopped answering", WHERE));
    }
    None
}

/// The words for a connection that ended, where nothing more is known.
pub(super) fn broken(error: &(dyn Error + 'static), is_tls: bool) -> Cause {
    let last = chain(error).last().map(ToString::to_string).unwrap_or_default();
    let why = if last.is_empty() { String::new() } else { format!(": {last}") };
    // A server that refuses a certificate may have closed the connection before its reason is read (TLS 1.3).
    let remedy = if is_tls {
        format!("{WHERE}, and that it takes the certificate of --etcd-certfile")
    } else {
        WHERE.to_owned()
    };
    cause(format!("the connection ended{why}"), remedy)
}

fn of_connecting(error: &ConnectError) -> Option<Cause> {
    let seconds = REQUEST_TIMEOUT.as_secs();
    Some(match error {
        ConnectError::Endpoint => cause("this is no URL of a server", "write it like https://etcd.example:2379"),
        ConnectError::Resolve { host, source } => {
            let text = source.to_string();
            let text = text.strip_prefix("failed to lookup address information: ").unwrap_or(&text);
            cause(
                format!("{host} can't be resolved: {text}"),
                "check --etcd-endpoints, and this host's /etc/resolv.conf",
            )
        }
        ConnectError::Tcp(source) => match source.kind() {
            io::ErrorKind::ConnectionRefused => cause("connection refused", WHERE),
            io::ErrorKind::HostUnreachable => {
                cause("no route to the host, or it is down", "check --etcd-endpoints, and this host's routes")
            }
            io::ErrorKind::NetworkUnreachable => {
                cause("no route to its network", "check --etcd-endpoints, and this host's routes")
            }
            io::ErrorKind::PermissionDenied => {
                cause("this host's packet filter forbids it", "allow the connection in its OUTPUT rules")
            }
            io::ErrorKind::TimedOut => no_answer("to the connection", seconds),
            _ => cause(format!("no connection: {source}"), WHERE),
        },
        ConnectError::TcpTimeout => no_answer("to the connection", seconds),
        ConnectError::TlsTimeout => no_answer("to the TLS handshake", seconds),
        // It ended within the handshake, without a word.
        ConnectError::Tls(_) => return None,
    })
}

fn no_answer(to: &str, seconds: u64) -> Cause {
    cause(
        format!("no answer {to} in {seconds} s"),
        format!("{WHERE} and answers, and that no packet filter stands between"),
    )
}

fn of_tls(error: &rustls::Error, asked: &Asked<'_>) -> Option<Cause> {
    use rustls::Error as Tls;
    Some(match error {
        // Neither is TLS: what it is can only be found out by asking in another way.
        Tls::InvalidMessage(_) => return None,
        Tls::InvalidCertificate(CertificateError::Other(other)) => match other.0.downcast_ref::<Cause>() {
            Some(known) => known.clone(),
            None => cause(format!("its certificate is not believed: {other}"), "make another"),
        },
        Tls::InvalidCertificate(CertificateError::BadEncoding) => {
            cause("its certificate can't be read", "make another: `openssl x509 -in FILE -text` says what is wrong")
        }
        Tls::InvalidCertificate(CertificateError::BadSignature) => {
            cause("its certificate is not that of its key", "check etcd's --cert-file and --key-file")
        }
        Tls::InvalidCertificate(other) => cause(format!("its certificate is not believed: {other}"), "make another"),
        Tls::PeerIncompatible(PeerIncompatible::ServerDoesNotSupportTls12Or13)
        | Tls::AlertReceived(AlertDescription::ProtocolVersion) => {
            cause("it speaks no TLS of version 1.2 or newer", "raise its --tls-min-version")
        }
        Tls::AlertReceived(AlertDescription::HandshakeFailure) => cause(
            "it found no cipher or key type that both sides know",
            "check etcd's --cipher-suites, and the kind of key that its certificate has",
        ),
        Tls::AlertReceived(AlertDescription::UnrecognisedName) => {
            cause("it knows no server of that name", "check the names in --etcd-endpoints")
        }
        Tls::AlertReceived(alert) => match asked.identity {
            None => cause(
                "it wants a client certificate, and none is given",
                "give one with --etcd-certfile and --etcd-keyfile",
            ),
            Some(identity) => {
                let faults = certificate::client_faults(identity, UnixTime::now()).join(", ");
                let subject = certificate::subject(identity);
                cause(
                    format!("it refuses this client's certificate ({subject}), with the alert {alert:?}: it {faults}"),
                    "check --etcd-certfile and --etcd-keyfile",
                )
            }
        },
        other => cause(format!("TLS failed: {other}"), WHERE),
    })
}

/// The words for what etcd says (etcd: api/v3rpc/rpctypes/error.go).
fn of_status(status: &Status, asked: &Asked<'_>) -> Option<Cause> {
    let said = status.message();
    let has = |text: &str| said.contains(text);
    Some(if has("permission denied") {
        lacks(asked)
    } else if has("invalid auth token") || has("auth revision") || has("revision of auth store") {
        cause("etcd no longer takes the session of this user, which begins anew", "")
    } else if has("user name is empty") {
        cause("etcd asks for a user and a password", "give them with --etcd-username and --etcd-password")
    } else if has("authentication failed") || has("user name not found") {
        let user = asked.user.unwrap_or_default();
        cause(
            format!("authentication failed: etcd does not know the user {user} with this password"),
            "check --etcd-username and --etcd-password",
        )
    } else if has("no leader") || has("leader changed") || has("not leader") {
        cause(
            "etcd has no leader: most of its members are away, or they are electing one",
            "see `etcdctl endpoint status --cluster`",
        )
    } else if has("space exceeded") {
        cause(
            "etcd is full: its database has reached its quota",
            "compact and defragment it, then `etcdctl alarm disarm`",
        )
    } else if has("corrupt cluster") {
        cause(
            "etcd found its members' data to differ (alarm CORRUPT)",
            "see `etcdctl alarm list`, and restore the member",
        )
    } else if has("request timed out") {
        cause(
            "etcd did not agree in time: its members are slow, or do not reach one another",
            "see `etcdctl endpoint status --cluster`",
        )
    } else if has("too many requests") || has("request is too large") {
        cause(format!("etcd refuses it: {}", said.trim_start_matches("etcdserver: ")), "")
    } else if status.code() == Code::Cancelled && has("Timeout expired") {
        let seconds = REQUEST_TIMEOUT.as_secs();
        cause(format!("no answer to the request in {seconds} s"), format!("{WHERE} and answers"))
    } else if has("missing grpc-status trailer") {
        cause("etcd closed the connection, as one that stops does", "")
    } else if status.code() == Code::Unimplemented {
        cause("what answers there is no etcd of version 3.4 or newer", WHERE)
    } else if let Some(code) = http_status(status) {
        cause(
            format!("what answers there is no etcd, but another server or a proxy (HTTP status {code})"),
            "check --etcd-endpoints: the client port of etcd, by default 2379",
        )
    } else if status.source().is_none() && !said.is_empty() {
        cause(said.trim_start_matches("etcdserver: "), "")
    } else {
        return None;
    })
}

/// The status of an HTTP answer that was no gRPC, in the words of the gRPC library.
fn http_status(status: &Status) -> Option<u16> {
    let (_, code) = status.message().split_once("mapped from HTTP status code ")?;
    code.trim().parse().ok()
}

fn lacks(asked: &Asked<'_>) -> Cause {
    let who = match (asked.user, asked.identity) {
        (Some(user), _) => format!("the user {user}"),
        (None, Some(identity)) => format!("the user of this client's certificate ({})", certificate::subject(identity)),
        (None, None) => "this client".to_owned(),
    };
    let (may_not, grant) = match asked.permission {
        Permission::ReadConfig => ("read", format!("read {}", asked.config_key)),
        Permission::WriteLeases => {
            ("read and write", format!("--prefix=true readwrite {}", asked.leases_key.trim_end_matches('/')))
        }
    };
    let on = grant.rsplit(' ').next().unwrap_or_default();
    cause(
        format!("permission denied: {who} may not {may_not} {on}"),
        format!("`etcdctl role grant-permission ROLE {grant}`, for a role that the user has"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: Asked<'_> = Asked {
        config_key: "/coreos.com/network/config",
        leases_key: "/coreos.com/network/subnets/",
        permission: Permission::WriteLeases,
        user: Some("kim"),
        identity: None,
    };

    fn words(error: &(dyn Error + 'static)) -> String {
        explain(error, &ASKED).unwrap_or_else(|| broken(error, false)).to_string()
    }

    #[test]
    fn what_etcd_says_is_put_in_plain_words() {
        for (code, said, text) in [
            (
                Code::PermissionDenied,
                "etcdserver: permission denied",
                "permission denied: the user kim may not read and write /coreos.com/network/subnets; `etcdctl role \
                 grant-permission ROLE --prefix=true readwrite /coreos.com/network/subnets`, for a role that the user has",
            ),
            (
                Code::InvalidArgument,
                "etcdserver: authentication failed, invalid user ID or password",
                "authentication failed: etcd does not know the user kim with this password; check --etcd-username and \
                 --etcd-password",
            ),
            (
                Code::InvalidArgument,
                "etcdserver: user name is empty",
                "etcd asks for a user and a password; give them with --etcd-username and --etcd-password",
            ),
            (
                Code::Unauthenticated,
                "etcdserver: invalid auth token",
                "etcd no longer takes the session of this user, which begins anew",
            ),
            (
                Code::Unavailable,
                "etcdserver: no leader",
                "etcd has no leader: most of its members are away, or they are electing one; see `etcdctl endpoint \
                 status --cluster`",
            ),
            (
                Code::ResourceExhausted,
                "etcdserver: mvcc: database space exceeded",
                "etcd is full: its database has reached its quota; compact and defragment it, then `etcdctl alarm disarm`",
            ),
            (
                Code::Unavailable,
                "etcdserver: request timed out",
                "etcd did not agree in time: its members are slow, or do not reach one another; see `etcdctl endpoint \
                 status --cluster`",
            ),
            (Code::Unavailable, "etcdserver: server stopped", "server stopped"),
            (
                Code::Unavailable,
                "grpc-status header missing, mapped from HTTP status code 503",
                "what answers there is no etcd, but another server or a proxy (HTTP status 503); check --etcd-endpoints: \
                 the client port of etcd, by default 2379",
            ),
            (
                Code::Cancelled,
                "Timeout expired",
                "no answer to the request in 5 s; check --etcd-endpoints, and that etcd runs there and answers",
            ),
        ] {
            assert_eq!(words(&Status::new(code, said)), text);
        }
    }

    #[test]
    fn connections_that_fail_are_told_by_their_one_cause() {
        let tcp = |error: i32| ConnectError::Tcp(io::Error::from_raw_os_error(error));
        let tls = |error: rustls::Error| ConnectError::Tls(io::Error::new(io::ErrorKind::InvalidData, error));
        let resolve = ConnectError::Resolve {
            host: "etcd.example".to_owned(),
            source: io::Error::other("failed to lookup address information: Name or service not known"),
        };
        for (error, text) in [
            (tcp(111), "connection refused; check --etcd-endpoints, and that etcd runs there"),
            (tcp(113), "no route to the host, or it is down; check --etcd-endpoints, and this host's routes"),
            (tcp(101), "no route to its network; check --etcd-endpoints, and this host's routes"),
            (
                ConnectError::TcpTimeout,
                "no answer to the connection in 5 s; check --etcd-endpoints, and that etcd runs there and answers, and \
                 that no packet filter stands between",
            ),
            (
                resolve,
                "etcd.example can't be resolved: Name or service not known; check --etcd-endpoints, and this host's \
                 /etc/resolv.conf",
            ),
            (
                tls(rustls::Error::AlertReceived(AlertDescription::CertificateRequired)),
                "it wants a client certificate, and none is given; give one with --etcd-certfile and --etcd-keyfile",
            ),
            (
                tls(rustls::Error::AlertReceived(AlertDescription::ProtocolVersion)),
                "it speaks no TLS of version 1.2 or newer; raise its --tls-min-version",
            ),
        ] {
            // As the client's library wraps it.
            let wrapped = io::Error::other(error);
            assert_eq!(words(&wrapped), text);
        }
    }

    #[test]
    fn a_connection_that_is_closed_may_be_for_a_certificate() {
        let closed = io::Error::from(io::ErrorKind::BrokenPipe);
        assert_eq!(explain(&closed, &ASKED), None);
        assert!(broken(&closed, true).to_string().contains("--etcd-certfile"));
        assert!(!broken(&closed, false).to_string().contains("--etcd-certfile"));
    }

    #[test]
    fn what_speaks_otherwise_is_named() {
        let line = "HTTP/1.1 400 Bad Request".to_owned();
        assert!(misunderstood(&Speaks::Http1(line), false).unwrap().fault.contains("(HTTP/1.1 400 Bad Request)"));
        assert!(misunderstood(&Speaks::Http2, true).unwrap().remedy.contains("http://"));
        assert!(misunderstood(&Speaks::Tls, false).unwrap().remedy.contains("https://"));
        assert_eq!(misunderstood(&Speaks::Tls, true), None);
        assert_eq!(misunderstood(&Speaks::Http2, false), None);
    }
}
