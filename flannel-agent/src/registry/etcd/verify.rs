//! Whether a certificate of etcd's is believed: as Go's crypto/x509 decides it, with the TLS library's path building
//! where that is as tolerant, and in words where it is not.

use std::sync::{Arc, LazyLock};

use tokio_rustls::rustls::{
    CertificateError, DigitallySignedStruct, Error, OtherError, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs},
    pki_types::{CertificateDer, ServerName, SignatureVerificationAlgorithm, UnixTime, alg_id::RSA_ENCRYPTION},
    server::ParsedCertificate,
};
use x509_parser::{
    certificate::X509Certificate,
    extensions::ParsedExtension,
    prelude::{ASN1Time, FromDer as _, X509Version},
};

use super::{certificate, short_rsa::AnyLength};

/// The cryptography: the library's own, with RSA keys as short as Go takes them.
pub(super) static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    let mut provider = aws_lc_rs::default_provider();
    let any_length = |algorithm: &&'static dyn SignatureVerificationAlgorithm| match algorithm.public_key_alg_id() {
        RSA_ENCRYPTION => Box::leak(Box::new(AnyLength(*algorithm))),
        _ => *algorithm,
    };
    let algorithms = provider.signature_verification_algorithms;
    let mapping = algorithms
        .mapping
        .iter()
        .map(|(scheme, algorithms)| (*scheme, &*algorithms.iter().map(any_length).collect::<Vec<_>>().leak()));
    provider.signature_verification_algorithms = WebPkiSupportedAlgorithms {
        all: algorithms.all.iter().map(any_length).collect::<Vec<_>>().leak(),
        mapping: mapping.collect::<Vec<_>>().leak(),
    };
    Arc::new(provider)
});

/// Believes what the authorities have signed, and their certificates themselves.
#[derive(Debug)]
pub(super) struct Verifier {
    library: Arc<WebPkiServerVerifier>,
    authorities: Vec<CertificateDer<'static>>,
    /// Where they come from, for messages.
    source: String,
}

impl Verifier {
    /// [`None`] where no authority can be used.
    pub(super) fn new(authorities: Vec<CertificateDer<'static>>, source: String) -> Option<Self> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(authorities.iter().cloned());
        let library = WebPkiServerVerifier::builder_with_provider(roots.into(), PROVIDER.clone()).build().ok()?;
        Some(Self { library, authorities, source })
    }

    fn algorithms(&self) -> &'static [&'static dyn SignatureVerificationAlgorithm] {
        PROVIDER.signature_verification_algorithms.all
    }

    /// The library refuses a certificate that is an authority's too (CA:TRUE), and one for any purpose. Go takes both.
    /// So these are believed here where they are among the authorities, as is any certificate that is, or where one of
    /// the authorities signed them.
    fn is_trusted_directly(&self, der: &CertificateDer<'_>, leaf: &X509Certificate<'_>, now: UnixTime) -> bool {
        if self.authorities.contains(der) {
            return true;
        }
        if !leaf.is_ca() && !certificate::is_for_any_purpose(leaf) {
            return false;
        }
        self.authorities.iter().any(|authority| self.has_signed(authority, leaf, now))
    }

    /// Whether an authority signed a certificate, and may have. One that is confined to names is left to the library.
    fn has_signed(&self, authority: &CertificateDer<'_>, leaf: &X509Certificate<'_>, now: UnixTime) -> bool {
        let Ok((_, issuer)) = X509Certificate::from_der(authority) else { return false };
        let may_sign = issuer.is_ca()
            && issuer.key_usage().is_ok_and(|usage| usage.is_none_or(|usage| usage.value.key_cert_sign()))
            && issuer.name_constraints().is_ok_and(|names| names.is_none());
        if leaf.issuer().as_raw() != issuer.subject().as_raw() || !may_sign || !is_current(&issuer, now) {
            return false;
        }
        let Ok(issuer) = webpki::EndEntityCert::try_from(authority) else { return false };
        let algorithm = leaf.signature_algorithm.algorithm.as_bytes();
        let (message, signature) = (leaf.tbs_certificate.as_ref(), &leaf.signature_value.data);
        self.algorithms()
            .iter()
            .filter(|known| certificate::oid(known.signature_alg_id().as_ref()) == Some(algorithm))
            .any(|known| issuer.verify_signature(*known, message, signature).is_ok())
    }

    fn verify(
        &self,
        der: &CertificateDer<'_>,
        leaf: &X509Certificate<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), Error> {
        if !self.is_trusted_directly(der, leaf, now) {
            return self.library.verify_server_cert(der, others, name, &[], now).map(drop);
        }
        let (not_before, not_after) = (leaf.validity().not_before, leaf.validity().not_after);
        let at = |time: ASN1Time| {
            UnixTime::since_unix_epoch(std::time::Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or(0)))
        };
        if now > at(not_after) {
            return Err(CertificateError::ExpiredContext { time: now, not_after: at(not_after) }.into());
        }
        if now < at(not_before) {
            return Err(CertificateError::NotValidYetContext { time: now, not_before: at(not_before) }.into());
        }
        let is_unknown = |extension: &ParsedExtension<'_>| {
            matches!(extension, ParsedExtension::UnsupportedExtension { .. } | ParsedExtension::ParseError { .. })
        };
        if leaf.iter_extensions().any(|extension| extension.critical && is_unknown(extension.parsed_extension())) {
            return Err(CertificateError::UnhandledCriticalExtension.into());
        }
        if !certificate::is_for_servers(leaf) {
            return Err(CertificateError::InvalidPurpose.into());
        }
        if leaf.version() == X509Version::V3 {
            verify_server_name(&ParsedCertificate::try_from(der)?, name)
        } else {
            Err(CertificateError::NotValidForName.into())
        }
    }
}

fn is_current(certificate: &X509Certificate<'_>, now: UnixTime) -> bool {
    let now = i64::try_from(now.as_secs()).ok().and_then(|now| ASN1Time::from_timestamp(now).ok());
    now.is_some_and(|now| certificate.validity().is_valid_at(now))
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let (_, leaf) = X509Certificate::from_der(end_entity).map_err(|_| CertificateError::BadEncoding)?;
        let verified = self.verify(end_entity, &leaf, intermediates, server_name, now);
        verified.map(|()| ServerCertVerified::assertion()).map_err(|error| {
            let others = intermediates.iter().chain(&self.authorities);
            let refusal = certificate::refusal(&error, &leaf, others, server_name, &self.source);
            match refusal {
                Some(refusal) => CertificateError::Other(OtherError(Arc::new(refusal))).into(),
                None => error,
            }
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.library.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.library.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.library.supported_verify_schemes()
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_types, reason = "OpenSSL makes the certificates; the agent itself starts no program here")]
mod tests {
    use std::{fs, path::Path, process::Command, time::Duration};

    use tokio_rustls::rustls::pki_types::pem::PemObject as _;

    use super::*;

    const HOST: &str = "192.168.64.254";

    fn make(directory: &Path) {
        let script = "
            new() { openssl req -nodes -sha256 -newkey ec -pkeyopt ec_paramgen_curve:P-256 \"$@\" 2>/dev/null; }
            ip=subjectAltName=IP:192.168.64.254
            new -x509 -days 30 -subj /CN=ca -keyout ca.key -out ca.pem
            new -x509 -days 30 -subj /CN=ca -keyout namesake.key -out namesake.pem
            new -x509 -days 30 -subj /CN=both -addext $ip -keyout k -out both.pem
            new -x509 -days 30 -subj /CN=leaf -addext basicConstraints=critical,CA:FALSE -addext $ip -keyout k -out leaf.pem
            sign() { # name, options of the request, then lines of the extensions
              name=$1 options=$2; shift 2; printf '%s\\n' \"$@\" > ext
              new -subj /CN=$name -keyout k -out csr
              openssl x509 -req ${hash:--sha256} $options -in csr -CA ${ca:-ca}.pem -CAkey ${ca:-ca}.key -CAcreateserial -extfile ext -out $name.pem 2>/dev/null
            }
            sign right '-days 30' $ip
            sign wildcard '-days 30' subjectAltName=DNS:*.example.com
            sign cn '-days 30' basicConstraints=CA:FALSE
            sign other '-days 30' subjectAltName=DNS:etcd,IP:10.0.0.1
            sign authority '-days 30' $ip basicConstraints=critical,CA:TRUE
            sign any '-days 30' $ip extendedKeyUsage=anyExtendedKeyUsage
            sign client '-days 30' $ip extendedKeyUsage=clientAuth
            sign critical '-days 30' $ip 1.2.3.4=critical,DER:0500 basicConstraints=CA:TRUE
            sign expired '-days 1' $ip
            hash=-sha1 sign sha1 '-days 30' $ip
            ca=namesake sign foreign '-days 30' $ip
            ca=namesake sign foreign-authority '-days 30' $ip basicConstraints=critical,CA:TRUE
            openssl req -nodes -newkey rsa:1024 -subj /CN=short -keyout k -out csr 2>/dev/null
            echo $ip > ext
            openssl x509 -req -days 30 -in csr -CA ca.pem -CAkey ca.key -CAcreateserial -extfile ext -out short.pem 2>/dev/null
        ";
        let status = Command::new("sh").current_dir(directory).args(["-ec", script]).status().unwrap();
        assert!(status.success());
    }

    fn load(directory: &Path, name: &str) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(&fs::read(directory.join(format!("{name}.pem"))).unwrap()).unwrap()
    }

    #[test]
    fn certificates_are_believed_as_go_believes_them() {
        let directory = tempfile::tempdir().unwrap();
        make(directory.path());
        let load = |name: &str| load(directory.path(), name);
        let now = UnixTime::now();
        let later = |days: u64| UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs() + days * 86_400));
        let check = |authorities: &[&str], name: &str, host: &str, at: UnixTime| {
            let authorities = authorities.iter().map(|name| load(name)).collect();
            let verifier = Verifier::new(authorities, "/ca.pem".to_owned()).unwrap();
            let host = ServerName::try_from(host).unwrap();
            verifier.verify_server_cert(&load(name), &[], &host, &[], at).map(drop)
        };
        for (authorities, name, host) in [
            (&["ca"][..], "right", HOST),
            (&["namesake", "ca"], "right", HOST),
            (&["ca"], "wildcard", "etcd1.example.com"),
            (&["ca"], "authority", HOST),
            (&["ca"], "any", HOST),
            (&["ca"], "short", HOST),
            (&["both"], "both", HOST),
            (&["leaf"], "leaf", HOST),
            // What is among the authorities itself needs nobody's signature.
            (&["ca", "foreign-authority"], "foreign-authority", HOST),
            (&["ca", "foreign"], "foreign", HOST),
        ] {
            let checked = check(authorities, name, host, now);
            assert!(checked.is_ok(), "{name} for {host}: {checked:?}");
        }
        for (authorities, name, host, at, fault, remedy) in [
            ("ca", "cn", HOST, now, "has no subjectAltName", "-addext subjectAltName=IP:192.168.64.254"),
            (
                "ca",
                "wildcard",
                "example.com",
                now,
                "is for *.example.com, not for example.com",
                "subjectAltName=DNS:example.com",
            ),
            ("ca", "wildcard", "a.b.example.com", now, "is for *.example.com, not for a.b", "--etcd-endpoints"),
            ("ca", "other", HOST, now, "(CN=other) is for etcd, 10.0.0.1, not for 192.168.64.254", "--etcd-endpoints"),
            ("both", "both", "10.0.0.1", now, "(CN=both) is for 192.168.64.254, not for 10.0.0.1", "--etcd-endpoints"),
            ("ca", "client", HOST, now, "lacks serverAuth", "extendedKeyUsage=serverAuth"),
            ("ca", "critical", HOST, now, "marked critical", "without"),
            ("ca", "expired", HOST, later(2), "its certificate (CN=expired) expired on 20", "renew it"),
            ("both", "both", HOST, later(31), "its certificate (CN=both) expired on 20", "renew it"),
            (
                "ca",
                "right",
                HOST,
                UnixTime::since_unix_epoch(Duration::from_secs(1)),
                "its certificate (CN=right) is not valid before 20",
                "clock",
            ),
            ("ca", "sha1", HOST, now, "is signed with SHA-1", "SHA-256"),
            ("ca", "foreign", HOST, now, "is signed by another CN=ca than the one in /ca.pem", "--etcd-cafile"),
            ("both", "right", HOST, now, "is signed by CN=ca, which is not in /ca.pem", "--etcd-cafile"),
            ("ca", "foreign-authority", HOST, now, "is one of an authority (CA:TRUE)", "basicConstraints=CA:FALSE"),
        ] {
            let refused = check(&[authorities], name, host, at).unwrap_err();
            let Error::InvalidCertificate(CertificateError::Other(OtherError(words))) = refused else {
                panic!("{name}: {refused:?}");
            };
            let words = words.to_string();
            assert!(words.contains(fault) && words.contains(remedy), "{name}: {words}");
        }
    }
}
