//! What TLS to etcd is made of: the files, read anew for each connection, since certificates are renewed.

use std::{fs, path::Path, sync::Arc};

use tokio_rustls::rustls::{
    ClientConfig, Error, InconsistentKeys,
    client::ResolvesClientCert,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    sign::{CertifiedKey, SingleCertAndKey},
};

use super::{
    EtcdError, EtcdOptions, short_rsa,
    verify::{PROVIDER, Verifier},
};

/// What gRPC speaks.
const ALPN: &[u8] = b"h2";

/// TLS for the connections to come.
#[derive(Clone)]
pub(super) struct Tls {
    pub(super) config: Arc<ClientConfig>,
    /// This client's certificate.
    pub(super) identity: Option<CertificateDer<'static>>,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// [`EtcdError::File`] or [`EtcdError::Certificate`].
    pub(super) fn read(options: &EtcdOptions) -> Result<Self, EtcdError> {
        let (authorities, source) = match &options.ca_file {
            Some(path) => (certificates(path)?, path.display().to_string()),
            None => (rustls_native_certs::load_native_certs().certs, "the authorities of this system".to_owned()),
        };
        let verifier = Verifier::new(authorities, source.clone()).ok_or_else(|| EtcdError::Certificate {
            subject: source,
            problem: "none is there that can be used; give the one that signed etcd's with --etcd-cafile".to_owned(),
        })?;
        let config = ClientConfig::builder_with_provider(PROVIDER.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| EtcdError::Certificate { subject: "TLS".to_owned(), problem: error.to_string() })?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier));
        let identity = options.identity.as_ref().map(|(chain, key)| identity(chain, key)).transpose()?;
        let certificate = identity.as_ref().and_then(|identity| identity.cert.first().cloned());
        let mut config = match identity {
            Some(identity) => {
                let resolver: Arc<dyn ResolvesClientCert> = Arc::new(SingleCertAndKey::from(identity));
                config.with_client_cert_resolver(resolver)
            }
            None => config.with_no_client_auth(),
        };
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Self { config: Arc::new(config), identity: certificate })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, EtcdError> {
    fs::read(path).map_err(|source| EtcdError::File { path: path.to_owned(), source })
}

fn unusable(path: &Path, problem: impl Into<String>) -> EtcdError {
    EtcdError::Certificate { subject: path.display().to_string(), problem: problem.into() }
}

/// All certificates of a file; what else is in it, or around them, is passed over.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, EtcdError> {
    let text = read(path)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let certificates = certificates.map_err(|error| unusable(path, format!("its PEM is damaged: {error}")))?;
    if certificates.is_empty() {
        let problem = "no certificate is in it in PEM (`-----BEGIN CERTIFICATE-----`); one in DER is converted by \
                       `openssl x509 -inform DER`";
        return Err(unusable(path, problem));
    }
    Ok(certificates)
}

fn identity(chain: &Path, key: &Path) -> Result<CertifiedKey, EtcdError> {
    let certificates = certificates(chain)?;
    let text = read(key)?;
    let contains = |needle: &str| text.windows(needle.len()).any(|window| window == needle.as_bytes());
    if contains("ENCRYPTED") {
        return Err(unusable(key, "the key is encrypted; decrypt it with `openssl pkey`"));
    }
    let der = PrivateKeyDer::from_pem_slice(&text)
        .map_err(|_| unusable(key, "no private key is in it in PEM (`-----BEGIN PRIVATE KEY-----`)"))?;
    let signing = match short_rsa::signing_key(&der) {
        Some(short) => short,
        None => PROVIDER.key_provider.load_private_key(der).map_err(|_| {
            unusable(
                key,
                "the key is of no kind that is known here; make one with RSA (1,024 to 8,192 bits), ECDSA (P-256, \
                 P-384, P-521) or Ed25519",
            )
        })?,
    };
    let identity = CertifiedKey::new(certificates, signing);
    match identity.keys_match() {
        Err(Error::InconsistentKeys(InconsistentKeys::KeyMismatch)) => {
            Err(unusable(key, format!("the key is not that of the certificate in {}", chain.display())))
        }
        _ => Ok(identity),
    }
}
