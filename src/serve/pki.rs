//! Certificates as values: a CA and the leaves it signs, made and judged for a given point in time. No IO.
//!
//! ECDSA P-256 throughout: every client in a cluster takes it, and a handshake costs the controller little.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use x509_parser::prelude::{FromDer, X509Certificate};

const DAY: Duration = Duration::from_secs(24 * 3600);
/// How long a CA is good for.
pub const CA_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How long a leaf is good for.
pub const LEAF_LIFETIME: Duration = Duration::from_secs(90 * 24 * 3600);
/// Certificates begin this long before they are made: clocks of a cluster differ.
const BACKDATE: Duration = Duration::from_secs(3600);

/// What cannot be done with certificates or keys.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// Making or signing failed.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// A PEM text is none, or holds something else.
    #[error("cannot read {what}: {problem}")]
    Read {
        /// Which part.
        what: &'static str,
        /// What is wrong.
        problem: String,
    },
}

/// A certificate and its key, both PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    /// The certificate (of a CA that was renewed: the new one first, the old one after it).
    pub certificate: String,
    /// Its private key, PKCS#8.
    pub key: String,
}

/// The key stays out of logs.
impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").finish_non_exhaustive()
    }
}

/// What a leaf is for.
#[derive(Clone, Debug)]
pub enum Leaf {
    /// Serving under these DNS names. Also good as a client, so that one replica can forward to the other.
    Server(Vec<String>),
    /// A client of this name.
    Client(String),
}

/// DNS names and addresses under which a Service of the cluster is reached.
#[must_use]
pub fn service_names(service: &str, namespace: &str) -> Vec<String> {
    vec![
        format!("{service}.{namespace}.svc"),
        format!("{service}.{namespace}.svc.cluster.local"),
        format!("{service}.{namespace}"),
        service.to_owned(),
    ]
}

/// A new CA.
///
/// # Errors
/// When the system gives no randomness.
pub fn new_ca(now: SystemTime) -> Result<Identity, PkiError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = params(Vec::new(), now, CA_LIFETIME)?;
    // Two CAs of one name in a bundle confuse verifiers that look issuers up by name, so the name carries the date.
    params
        .distinguished_name
        .push(DnType::CommonName, format!("Ebb CA {}", unix_seconds(now)));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(Identity {
        certificate: params.self_signed(&key)?.pem(),
        key: key.serialize_pem(),
    })
}

/// A leaf signed by `ca` (by the first certificate of its bundle).
///
/// # Errors
/// When the CA cannot be read.
pub fn new_leaf(ca: &Identity, leaf: &Leaf, now: SystemTime) -> Result<Identity, PkiError> {
    let issuer = Issuer::from_ca_cert_pem(&ca.certificate, KeyPair::from_pem(&ca.key)?)?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let (names, common_name, usages) = match leaf {
        Leaf::Server(names) => (
            names.clone(),
            names.first().cloned().unwrap_or_default(),
            vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ],
        ),
        Leaf::Client(name) => (
            Vec::new(),
            name.clone(),
            vec![ExtendedKeyUsagePurpose::ClientAuth],
        ),
    };
    let mut params = params(names, now, LEAF_LIFETIME)?;
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.is_ca = IsCa::NoCa;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = usages;
    Ok(Identity {
        certificate: params.signed_by(&key, &issuer)?.pem(),
        key: key.serialize_pem(),
    })
}

/// Whether a certificate should be made anew: less than a third of its lifetime is left, it is not valid yet, it
/// cannot be read, or (leaves) it lacks one of `names`.
#[must_use]
pub fn is_due(certificate_pem: &str, names: &[String], now: SystemTime) -> bool {
    let Ok(der) = first_certificate(certificate_pem) else {
        return true;
    };
    let Ok((_, certificate)) = X509Certificate::from_der(&der) else {
        return true;
    };
    let validity = certificate.validity();
    let (from, until, now) = (
        validity.not_before.timestamp(),
        validity.not_after.timestamp(),
        unix_seconds(now),
    );
    if now < from || until.saturating_sub(now) < until.saturating_sub(from) / 3 {
        return true;
    }
    let Ok(Some(alternative)) = certificate.subject_alternative_name() else {
        return !names.is_empty();
    };
    let has = |wanted: &str| {
        alternative.value.general_names.iter().any(|name| match name {
            x509_parser::extensions::GeneralName::DNSName(name) => *name == wanted,
            x509_parser::extensions::GeneralName::IPAddress(bytes) => {
                wanted.parse::<IpAddr>().is_ok_and(|ip| match ip {
                    IpAddr::V4(ip) => ip.octets() == **bytes,
                    IpAddr::V6(ip) => ip.octets() == **bytes,
                })
            }
            _ => false,
        })
    };
    !names.iter().all(|name| has(name))
}

/// Whether `leaf` was signed by the first certificate of `ca`.
#[must_use]
pub fn is_signed_by(leaf_pem: &str, ca_pem: &str) -> bool {
    let (Ok(leaf), Ok(ca)) = (first_certificate(leaf_pem), first_certificate(ca_pem)) else {
        return false;
    };
    let (Ok((_, leaf)), Ok((_, ca))) = (X509Certificate::from_der(&leaf), X509Certificate::from_der(&ca))
    else {
        return false;
    };
    leaf.issuer() == ca.subject() && leaf.verify_signature(Some(ca.public_key())).is_ok()
}

/// Whether a key belongs to the first certificate of a PEM text.
#[must_use]
pub fn is_key_of(key_pem: &str, certificate_pem: &str) -> bool {
    let (Ok(key), Ok(der)) = (KeyPair::from_pem(key_pem), first_certificate(certificate_pem)) else {
        return false;
    };
    X509Certificate::from_der(&der).is_ok_and(|(_, certificate)| {
        *certificate.public_key().subject_public_key.data == *key.public_key_raw()
    })
}

/// The first certificate of a PEM text alone, as PEM: what an old CA is kept by when a new one goes before it.
#[must_use]
pub fn first_pem(bundle: &str) -> &str {
    const END: &str = "-----END CERTIFICATE-----";
    match bundle.find(END) {
        Some(at) => bundle[..at + END.len()].trim_start(),
        None => bundle,
    }
}

fn first_certificate(pem: &str) -> Result<Vec<u8>, PkiError> {
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject;
    CertificateDer::from_pem_slice(pem.as_bytes())
        .map(|der| der.to_vec())
        .map_err(|error| PkiError::Read {
            what: "a certificate",
            problem: error.to_string(),
        })
}

fn params(names: Vec<String>, now: SystemTime, lifetime: Duration) -> Result<CertificateParams, PkiError> {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(DAY);
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.not_before = epoch + now.saturating_sub(BACKDATE);
    params.not_after = epoch + now + lifetime;
    Ok(params)
}

fn unix_seconds(time: SystemTime) -> i64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_leaf_is_renewed_when_a_third_of_its_time_is_left() {
        let now = SystemTime::now();
        let ca = new_ca(now).unwrap();
        let names = service_names("ebb-controller", "ebb-system");
        let leaf = new_leaf(&ca, &Leaf::Server(names.clone()), now).unwrap();
        assert!(!is_due(&leaf.certificate, &names, now));
        assert!(!is_due(&leaf.certificate, &names, now + DAY * 59));
        assert!(is_due(&leaf.certificate, &names, now + DAY * 61));
        assert!(is_due(&leaf.certificate, &names, now - DAY));
        assert!(is_due(&leaf.certificate, &["other".to_owned()], now));
        assert!(is_due("", &[], now));
        assert!(is_signed_by(&leaf.certificate, &ca.certificate));
        assert!(is_key_of(&leaf.key, &leaf.certificate));
        assert!(!is_key_of(&ca.key, &leaf.certificate));
        assert!(!is_signed_by(
            &leaf.certificate,
            &new_ca(now).unwrap().certificate
        ));
    }

    #[test]
    fn the_first_certificate_of_a_bundle_is_the_one_that_signs() {
        let now = SystemTime::now();
        let (old, mut new) = (new_ca(now - DAY).unwrap(), new_ca(now).unwrap());
        let alone = new.certificate.clone();
        new.certificate.push_str(&old.certificate);
        let leaf = new_leaf(&new, &Leaf::Client("scheduler".to_owned()), now).unwrap();
        assert!(is_signed_by(&leaf.certificate, &new.certificate));
        assert_eq!(first_pem(&new.certificate), alone.trim());
    }
}
