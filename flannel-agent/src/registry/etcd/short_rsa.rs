//! RSA keys of 1,024 to 2,047 bits. Go's crypto/tls takes them, the TLS library's cryptography does not: it begins at
//! 2,048. Longer keys never come here.

use std::{fmt, sync::Arc};

use rsa::{
    PrivateKey, PublicKey,
    pkcs1::{DecodeRsaPrivateKey as _, DecodeRsaPublicKey as _},
    pkcs1v15,
    pkcs8::DecodePrivateKey as _,
    pss,
    sha2::{Sha256, Sha384, Sha512},
    signature::{SignatureEncoding as _, Signer as _, Verifier as _},
    traits::PublicKeyParts as _,
};
use tokio_rustls::rustls::{
    Error, SignatureAlgorithm, SignatureScheme,
    pki_types::{AlgorithmIdentifier, InvalidSignature, PrivateKeyDer, SignatureVerificationAlgorithm, alg_id},
    sign::{Signer, SigningKey},
};

/// Where the library's keys begin.
const LONG: u32 = 2048;
/// What a client key of this size signs with, the preferred first. A PSS signature with SHA-512 and a salt as long as
/// its hash needs 1,040 bits (RFC 8017, 9.1.1).
const SCHEMES: [SignatureScheme; 5] = [
    SignatureScheme::RSA_PSS_SHA256,
    SignatureScheme::RSA_PSS_SHA384,
    SignatureScheme::RSA_PKCS1_SHA256,
    SignatureScheme::RSA_PKCS1_SHA384,
    SignatureScheme::RSA_PKCS1_SHA512,
];

/// An algorithm of the library's that takes shorter keys as well.
#[derive(Debug)]
pub(super) struct AnyLength(pub(super) &'static dyn SignatureVerificationAlgorithm);

impl SignatureVerificationAlgorithm for AnyLength {
    fn verify_signature(&self, key: &[u8], message: &[u8], signature: &[u8]) -> Result<(), InvalidSignature> {
        match PublicKey::from_pkcs1_der(key) {
            Ok(short) if short.n().bit_width() < LONG => verify(self.signature_alg_id(), short, message, signature),
            _ => self.0.verify_signature(key, message, signature),
        }
    }

    fn public_key_alg_id(&self) -> AlgorithmIdentifier {
        self.0.public_key_alg_id()
    }

    fn signature_alg_id(&self) -> AlgorithmIdentifier {
        self.0.signature_alg_id()
    }
}

fn verify(
    algorithm: AlgorithmIdentifier,
    key: PublicKey,
    message: &[u8],
    signature: &[u8],
) -> Result<(), InvalidSignature> {
    let pkcs1 = || pkcs1v15::Signature::try_from(signature).map_err(|_| InvalidSignature);
    let pss = || pss::Signature::try_from(signature).map_err(|_| InvalidSignature);
    let valid = match algorithm {
        alg_id::RSA_PKCS1_SHA256 => pkcs1v15::VerifyingKey::<Sha256>::new(key).verify(message, &pkcs1()?),
        alg_id::RSA_PKCS1_SHA384 => pkcs1v15::VerifyingKey::<Sha384>::new(key).verify(message, &pkcs1()?),
        alg_id::RSA_PKCS1_SHA512 => pkcs1v15::VerifyingKey::<Sha512>::new(key).verify(message, &pkcs1()?),
        alg_id::RSA_PSS_SHA256 => pss::VerifyingKey::<Sha256>::new(key).verify(message, &pss()?),
        alg_id::RSA_PSS_SHA384 => pss::VerifyingKey::<Sha384>::new(key).verify(message, &pss()?),
        alg_id::RSA_PSS_SHA512 => pss::VerifyingKey::<Sha512>::new(key).verify(message, &pss()?),
        _ => return Err(InvalidSignature),
    };
    valid.map_err(|_| InvalidSignature)
}

/// A client key of such a size; [`None`] for any other.
pub(super) fn signing_key(der: &PrivateKeyDer<'_>) -> Option<Arc<dyn SigningKey>> {
    let key = match der {
        PrivateKeyDer::Pkcs1(der) => PrivateKey::from_pkcs1_der(der.secret_pkcs1_der()).ok(),
        PrivateKeyDer::Pkcs8(der) => PrivateKey::from_pkcs8_der(der.secret_pkcs8_der()).ok(),
        _ => None,
    }?;
    (key.n().bit_width() < LONG).then(|| Arc::new(ShortKey(key)) as Arc<dyn SigningKey>)
}

struct ShortKey(PrivateKey);

impl fmt::Debug for ShortKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ShortKey").finish_non_exhaustive()
    }
}

impl SigningKey for ShortKey {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        let scheme = SCHEMES.into_iter().find(|scheme| offered.contains(scheme))?;
        Some(Box::new(ShortSigner { key: self.0.clone(), scheme }))
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::RSA
    }
}

struct ShortSigner {
    key: PrivateKey,
    scheme: SignatureScheme,
}

impl fmt::Debug for ShortSigner {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ShortSigner").field("scheme", &self.scheme).finish_non_exhaustive()
    }
}

impl Signer for ShortSigner {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        let key = self.key.clone();
        let signature = match self.scheme {
            SignatureScheme::RSA_PSS_SHA256 => {
                pss::SigningKey::<Sha256>::new(key).try_sign(message).map(|s| s.to_vec())
            }
            SignatureScheme::RSA_PSS_SHA384 => {
                pss::SigningKey::<Sha384>::new(key).try_sign(message).map(|s| s.to_vec())
            }
            SignatureScheme::RSA_PKCS1_SHA256 => {
                pkcs1v15::SigningKey::<Sha256>::new(key).try_sign(message).map(|s| s.to_vec())
            }
            SignatureScheme::RSA_PKCS1_SHA384 => {
                pkcs1v15::SigningKey::<Sha384>::new(key).try_sign(message).map(|s| s.to_vec())
            }
            SignatureScheme::RSA_PKCS1_SHA512 => {
                pkcs1v15::SigningKey::<Sha512>::new(key).try_sign(message).map(|s| s.to_vec())
            }
            other => return Err(Error::General(format!("no short RSA key signs with {other:?}"))),
        };
        signature.map_err(|error| Error::General(error.to_string()))
    }

    fn scheme(&self) -> SignatureScheme {
        self.scheme
    }
}
