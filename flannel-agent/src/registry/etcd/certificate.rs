//! What a certificate says, and what is wrong with it, in words.

use std::net::IpAddr;

use tokio_rustls::rustls::{
    CertificateError, Error,
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use x509_parser::{
    certificate::X509Certificate,
    extensions::GeneralName,
    prelude::{ASN1Time, ExtendedKeyUsage, FromDer as _},
    public_key::PublicKey,
    x509::X509Name,
};

use super::explain::Cause;

/// The shortest RSA key that Go's crypto/tls takes, in bits.
const SHORTEST_RSA: usize = 1024;
/// Signatures that nobody believes any more, by the content of their object identifiers (RFC 3279, section 2.2).
const BROKEN_SIGNATURES: [(&[u8], &str); 3] = [
    (&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x04], "MD5"),
    (&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x05], "SHA-1"),
    (&[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x01], "SHA-1"),
];

/// The content of the object identifier that a DER encoded algorithm begins with.
pub(super) fn oid(algorithm: &[u8]) -> Option<&[u8]> {
    match algorithm {
        [0x06, length, rest @ ..] => rest.get(..usize::from(*length)),
        _ => None,
    }
}

fn purposes<'a>(certificate: &'a X509Certificate<'_>) -> Option<&'a ExtendedKeyUsage<'a>> {
    certificate.extended_key_usage().ok().flatten().map(|extension| extension.value)
}

/// Whether it says that it is for anything.
pub(super) fn is_for_any_purpose(certificate: &X509Certificate<'_>) -> bool {
    purposes(certificate).is_some_and(|purposes| purposes.any)
}

/// Whether a server may show it.
pub(super) fn is_for_servers(certificate: &X509Certificate<'_>) -> bool {
    purposes(certificate).is_none_or(|purposes| purposes.any || purposes.server_auth)
}

/// A name of `X.509`, which may be empty.
fn name(name: &X509Name<'_>) -> String {
    match name.to_string() {
        empty if empty.is_empty() => "no name".to_owned(),
        name => name,
    }
}

/// Whom a certificate is for: its subjectAltName.
fn hosts(certificate: &X509Certificate<'_>) -> Vec<String> {
    let extension = certificate.subject_alternative_name().ok().flatten();
    let names = extension.map(|extension| &extension.value.general_names);
    let host = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => {
            let address = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
            address.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from)).ok().map(|address| address.to_string())
        }
        _ => None,
    };
    names.into_iter().flatten().filter_map(host).collect()
}

/// A time as `2026-01-31 10:00:00 UTC`, without what the parser's own form has around it.
fn time(time: ASN1Time) -> String {
    let time = time.to_datetime();
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02} UTC",
        time.year(),
        u8::from(time.month()),
        time.day(),
        time.hour(),
        time.minute(),
        time.second()
    )
}

fn is_at(time: ASN1Time, other: UnixTime) -> bool {
    u64::try_from(time.timestamp()).is_ok_and(|time| time == other.as_secs())
}

/// Which certificate of the chain a date belongs to.
fn owner<'a>(
    leaf: &X509Certificate<'_>,
    others: impl Iterator<Item = &'a CertificateDer<'a>>,
    has_date: impl Fn(&X509Certificate<'_>) -> bool,
) -> String {
    if has_date(leaf) {
        return format!("its certificate ({})", name(leaf.subject()));
    }
    let parsed = others.filter_map(|der| X509Certificate::from_der(der).ok());
    let mut owners = parsed.map(|(_, other)| other).filter(has_date);
    let owner = owners.next().map(|owner| format!("the certificate of its authority ({})", name(owner.subject())));
    owner.unwrap_or_else(|| "a certificate of its chain".to_owned())
}

/// How a subjectAltName is written for OpenSSL.
fn openssl_name(host: &ServerName<'_>) -> String {
    match host {
        ServerName::IpAddress(address) => format!("IP:{}", IpAddr::from(*address)),
        other => format!("DNS:{}", other.to_str()),
    }
}

/// Why a certificate of etcd's is not believed, and what to make instead. [`None`] for what is no matter of the
/// certificate.
pub(super) fn refusal<'a>(
    error: &Error,
    leaf: &X509Certificate<'_>,
    mut others: impl Iterator<Item = &'a CertificateDer<'a>>,
    host: &ServerName<'_>,
    authorities: &str,
) -> Option<Cause> {
    let Error::InvalidCertificate(error) = error else { return None };
    let its = format!("its certificate ({})", name(leaf.subject()));
    let san = format!("subjectAltName={}", openssl_name(host));
    let broken = BROKEN_SIGNATURES.iter().find(|(oid, _)| *oid == leaf.signature_algorithm.algorithm.as_bytes());
    let short = match leaf.public_key().parsed() {
        Ok(PublicKey::RSA(key)) => Some(key.key_size()).filter(|bits| *bits < SHORTEST_RSA),
        _ => None,
    };
    let (fault, remedy) = match error {
        CertificateError::ExpiredContext { not_after, .. } => {
            let owner = owner(leaf, others, |other| is_at(other.validity().not_after, *not_after));
            let date = ASN1Time::from_timestamp(i64::try_from(not_after.as_secs()).ok()?).ok()?;
            (format!("{owner} expired on {}", time(date)), "renew it, or set this host's clock right".to_owned())
        }
        // One that ends before it begins.
        CertificateError::Expired => {
            let owner = owner(leaf, others, |other| other.validity().not_after < other.validity().not_before);
            (format!("{owner} is valid at no time: it ends before it begins"), "make another".to_owned())
        }
        CertificateError::NotValidYetContext { not_before, .. } => {
            let owner = owner(leaf, others, |other| is_at(other.validity().not_before, *not_before));
            let date = ASN1Time::from_timestamp(i64::try_from(not_before.as_secs()).ok()?).ok()?;
            (
                format!("{owner} is not valid before {}", time(date)),
                "set this host's clock right, or the one of the host that made it".to_owned(),
            )
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => match hosts(leaf) {
            names if names.is_empty() => (
                format!("{its} names its host in the subject alone, which counts no more: it has no subjectAltName"),
                format!("make one with `openssl req -x509 ... -addext {san}`, or with a line `{san}` in the -extfile"),
            ),
            names => (
                format!("{its} is for {}, not for {}", names.join(", "), host.to_str()),
                format!("use one of its names in --etcd-endpoints, or make one with {san}"),
            ),
        },
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => (
            format!("{its} is not for servers: its extendedKeyUsage lacks serverAuth"),
            "make one with extendedKeyUsage=serverAuth, or without any".to_owned(),
        ),
        CertificateError::UnhandledCriticalExtension => (
            format!("{its} has an extension that is marked critical and not known here"),
            "make one without".to_owned(),
        ),
        _ if broken.is_some() => {
            let (_, hash) = broken?;
            (format!("{its} is signed with {hash}, which nobody trusts any more"), "sign it with SHA-256".to_owned())
        }
        _ if short.is_some() => {
            (format!("{its} has an RSA key of {} bits", short?), "make one with at least 2048 bits".to_owned())
        }
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            let issuer = leaf.issuer();
            let namesake = others.any(|other| {
                X509Certificate::from_der(other).is_ok_and(|(_, other)| other.subject().as_raw() == issuer.as_raw())
            });
            let fault = if namesake {
                format!("{its} is signed by another {} than the one in {authorities}", name(issuer))
            } else if issuer.as_raw() == leaf.subject().as_raw() {
                format!("{its} is signed by itself, and not in {authorities}")
            } else {
                format!("{its} is signed by {}, which is not in {authorities}", name(issuer))
            };
            (fault, "put the certificate of the authority that signed it into the file of --etcd-cafile".to_owned())
        }
        _ if leaf.is_ca() => (
            format!("{its} is one of an authority (CA:TRUE), and signed by none in {authorities}"),
            "make one with basicConstraints=CA:FALSE, or put it into the file of --etcd-cafile too".to_owned(),
        ),
        other => (format!("{its} is not believed: {other}"), "make another".to_owned()),
    };
    Some(Cause { fault, remedy })
}

/// What a server may dislike about this client's certificate.
pub(super) fn client_faults(der: &CertificateDer<'_>, now: UnixTime) -> Vec<String> {
    let Ok((_, certificate)) = X509Certificate::from_der(der) else { return vec!["can't be read".to_owned()] };
    let validity = certificate.validity();
    let is_past = |time: ASN1Time| u64::try_from(time.timestamp()).is_ok_and(|time| time < now.as_secs());
    let mut faults = Vec::new();
    if is_past(validity.not_after) {
        faults.push(format!("expired on {}", time(validity.not_after)));
    }
    if !is_past(validity.not_before) {
        faults.push(format!("is not valid before {}", time(validity.not_before)));
    }
    if purposes(&certificate).is_some_and(|purposes| !purposes.any && !purposes.client_auth) {
        faults.push("lacks clientAuth in its extendedKeyUsage".to_owned());
    }
    if faults.is_empty() {
        faults.push(format!("is signed by {}: does etcd's --trusted-ca-file have it?", name(certificate.issuer())));
    }
    faults
}

/// Whose a certificate is.
pub(super) fn subject(der: &CertificateDer<'_>) -> String {
    X509Certificate::from_der(der).map_or_else(|_| "unreadable".to_owned(), |(_, parsed)| name(parsed.subject()))
}
