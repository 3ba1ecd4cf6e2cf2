//! rustls configurations from PEM, servers whose certificate can be replaced while they run, and dialling by address.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use arc_swap::ArcSwap;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::net::TcpStream;

use super::pki::Identity;

/// Application protocols, the preferred one first.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// Whether a server asks its clients for a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientAuth {
    /// It does not.
    None,
    /// It takes only clients with a certificate of our CA.
    Required,
}

/// A server's configuration that every new connection reads anew. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct ServerTls(Arc<ArcSwap<ServerConfig>>);

impl ServerTls {
    /// Starts with this configuration.
    #[must_use]
    pub fn new(config: Arc<ServerConfig>) -> Self {
        Self(Arc::new(ArcSwap::new(config)))
    }

    /// Connections accepted from now on use this one.
    pub fn replace(&self, config: Arc<ServerConfig>) {
        self.0.store(config);
    }

    /// The configuration for a new connection.
    #[must_use]
    pub fn current(&self) -> Arc<ServerConfig> {
        self.0.load_full()
    }
}

/// A client's configuration that every new connection reads anew. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct ClientTls(Arc<ArcSwap<ClientConfig>>);

impl ClientTls {
    /// Starts with this configuration.
    #[must_use]
    pub fn new(config: Arc<ClientConfig>) -> Self {
        Self(Arc::new(ArcSwap::new(config)))
    }

    /// Connections dialled from now on use this one.
    pub fn replace(&self, config: Arc<ClientConfig>) {
        self.0.store(config);
    }

    /// The configuration for a new connection.
    #[must_use]
    pub fn current(&self) -> Arc<ClientConfig> {
        self.0.load_full()
    }
}

/// A server that shows `identity` and, if asked to, takes only clients with a certificate of `ca`.
///
/// # Errors
/// When a PEM text cannot be read.
pub fn server_config(identity: &Identity, ca: &str, auth: ClientAuth) -> anyhow::Result<Arc<ServerConfig>> {
    let builder = ServerConfig::builder();
    let builder = match auth {
        ClientAuth::None => builder.with_no_client_auth(),
        ClientAuth::Required => builder.with_client_cert_verifier(
            WebPkiClientVerifier::builder(Arc::new(roots(ca)?))
                .build()
                .context("cannot verify clients by the CA certificate")?,
        ),
    };
    let (chain, key) = chain(identity)?;
    let mut config = builder
        .with_single_cert(chain, key)
        .context("the certificate and its key do not belong together")?;
    config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).to_vec();
    Ok(Arc::new(config))
}

/// A client that trusts `ca` (one or more certificates as PEM) and nobody else, and shows `identity` where it has one.
///
/// # Errors
/// When a PEM text cannot be read.
pub fn client_config(ca: &str, identity: Option<&Identity>) -> anyhow::Result<Arc<ClientConfig>> {
    let builder = ClientConfig::builder().with_root_certificates(roots(ca)?);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            let (chain, key) = chain(identity)?;
            builder
                .with_client_auth_cert(chain, key)
                .context("the client certificate and its key do not belong together")?
        }
    };
    config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).to_vec();
    Ok(Arc::new(config))
}

/// Dials an address and expects the certificate of `name` there. Replicas are dialled by pod address, while their
/// certificate carries the Service's name.
///
/// # Errors
/// When there is no connection, no handshake, or another certificate within `limit`.
pub async fn dial(
    address: SocketAddr,
    name: &str,
    config: Arc<ClientConfig>,
    limit: Duration,
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let name = ServerName::try_from(name.to_owned())
        .map_err(|error| std::io::Error::new(std::io::ErrorKind::InvalidInput, error))?;
    let connect = async {
        let tcp = TcpStream::connect(address).await?;
        // Requests are small; Nagle would hold each back until the last one's ACK.
        tcp.set_nodelay(true)?;
        tokio_rustls::TlsConnector::from(config).connect(name, tcp).await
    };
    tokio::time::timeout(limit, connect)
        .await
        .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
}

fn roots(ca: &str) -> anyhow::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(ca.as_bytes()) {
        roots
            .add(certificate.context("cannot read the CA certificate")?)
            .context("cannot use the CA certificate")?;
    }
    anyhow::ensure!(!roots.is_empty(), "the CA file holds no certificate");
    Ok(roots)
}

fn chain(identity: &Identity) -> anyhow::Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let chain = CertificateDer::pem_slice_iter(identity.certificate.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .context("cannot read the certificate")?;
    let key =
        PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).context("cannot read the private key")?;
    Ok((chain, key))
}
