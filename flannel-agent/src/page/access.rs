//! Whom the page is shown to.
//!
//! A page of another origin can have a browser on this host send requests here. It can't read the answers, unless its own name is made
//! to lead here (DNS rebinding): then `Host` names it, and the request is refused.

use std::net::{IpAddr, SocketAddr};

use axum::{
    extract::{ConnectInfo, Request, connect_info::Connected},
    http::{
        HeaderName, HeaderValue, Method, StatusCode,
        header::{ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, HOST, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS},
        uri::Authority,
    },
    middleware::Next,
    response::{IntoResponse as _, Response},
    serve::IncomingStream,
};
use tokio::net::TcpListener;

/// With each answer. Scripts, styles and requests are of this origin or not at all; `data:` is for the icon, which is empty.
const HEADERS: [(HeaderName, &str); 5] = [
    (
        CONTENT_SECURITY_POLICY,
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'",
    ),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (REFERRER_POLICY, "no-referrer"),
    (CACHE_CONTROL, "no-store"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
];

/// The address of this host that a connection came to.
#[derive(Clone, Copy, Debug)]
pub(super) struct LocalAddress(Option<IpAddr>);

impl Connected<IncomingStream<'_, TcpListener>> for LocalAddress {
    fn connect_info(stream: IncomingStream<'_, TcpListener>) -> Self {
        Self(stream.io().local_addr().ok().as_ref().map(SocketAddr::ip))
    }
}

/// Answers what may be asked.
pub(super) async fn check(ConnectInfo(local): ConnectInfo<LocalAddress>, request: Request, next: Next) -> Response {
    let mut answer = match refusal(local, &request) {
        Some(refusal) => refusal,
        None => next.run(request).await,
    };
    answer.headers_mut().extend(HEADERS.map(|(name, value)| (name, HeaderValue::from_static(value))));
    answer
}

fn refusal(LocalAddress(local): LocalAddress, request: &Request) -> Option<Response> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let allowed = [(ALLOW, "GET, HEAD")];
        return Some((StatusCode::METHOD_NOT_ALLOWED, allowed, "only GET and HEAD are answered\n").into_response());
    }
    let mut hosts = request.headers().get_all(HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else {
        return Some((StatusCode::BAD_REQUEST, "one Host is expected\n").into_response());
    };
    // A target in absolute form has one of its own (RFC 9112, section 3.2.2).
    let target = request.uri().authority();
    let is_own = host.to_str().is_ok_and(|host| is_own(host, local))
        && target.is_none_or(|target| is_own(target.as_str(), local));
    let words = "this is asked for as localhost, or by the address that it is reached at\n";
    (!is_own).then(|| (StatusCode::MISDIRECTED_REQUEST, words).into_response())
}

/// Whether that names this host's loopback or the address that the connection came to. Names of others may lead to either, and through
/// a forwarded port any port does.
fn is_own(host: &str, local: Option<IpAddr>) -> bool {
    let Ok(authority) = host.parse::<Authority>() else { return false };
    let name = authority.host();
    let address = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(name).parse::<IpAddr>();
    match address.map(|address| address.to_canonical()) {
        Ok(address) => address.is_loopback() || local.is_some_and(|local| local.to_canonical() == address),
        Err(_) => name.eq_ignore_ascii_case("localhost") && !host.contains('@'),
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    #[test]
    fn a_host_is_loopback_or_what_the_connection_came_to() {
        let local = Some([192, 0, 2, 1].into());
        for host in [
            "localhost",
            "LocalHost:8471",
            "127.0.0.1",
            "127.0.0.1:8471",
            "127.8.8.8:1",
            "[::1]:8471",
            "[::ffff:127.0.0.1]",
            "192.0.2.1",
            "192.0.2.1:8471",
        ] {
            assert!(is_own(host, local), "{host}");
        }
        for host in [
            "",
            "evil.example",
            "evil.example:8471",
            "localhost.evil.example",
            "localhost@evil.example",
            "evil.example@localhost",
            "evil@127.0.0.1@evil.example",
            "127.0.0.1.evil.example",
            "0.0.0.0:8471",
            "[::]:8471",
            "192.0.2.2",
            "a b",
        ] {
            assert!(!is_own(host, local), "{host}");
        }
        assert!(is_own("127.0.0.1", None) && !is_own("192.0.2.1", None));
    }

    #[test]
    fn each_part_that_names_a_host_counts() {
        let local = LocalAddress(None);
        let status = |request: Request| refusal(local, &request).map(|answer| answer.status());
        let request = |uri: &str, hosts: &[&str]| {
            let builder = hosts.iter().fold(Request::builder().uri(uri), |builder, host| builder.header(HOST, *host));
            builder.body(Body::empty()).unwrap()
        };
        assert_eq!(status(request("/", &["localhost"])), None);
        assert_eq!(status(request("http://localhost/", &["localhost"])), None);
        assert_eq!(status(request("http://evil/", &["localhost"])), Some(StatusCode::MISDIRECTED_REQUEST));
        assert_eq!(status(request("/", &["evil"])), Some(StatusCode::MISDIRECTED_REQUEST));
        assert_eq!(status(request("/", &[])), Some(StatusCode::BAD_REQUEST));
        assert_eq!(status(request("/", &["localhost", "localhost"])), Some(StatusCode::BAD_REQUEST));
        for method in [Method::POST, Method::PUT, Method::DELETE, Method::OPTIONS, Method::CONNECT, Method::TRACE] {
            let mut request = request("/", &["localhost"]);
            *request.method_mut() = method;
            assert_eq!(status(request), Some(StatusCode::METHOD_NOT_ALLOWED));
        }
    }
}
