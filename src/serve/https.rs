//! Serving a router over TLS: HTTP/1.1 and HTTP/2 by ALPN, bounded in connections and in every wait, and ended
//! without cutting requests that were accepted.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::tls::ServerTls;

/// Bounds of a server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at a time; more wait in the kernel's queue.
    pub connections: usize,
    /// Longest TLS handshake.
    pub handshake: Duration,
    /// Longest wait for a request's head on HTTP/1.1.
    pub head: Duration,
    /// After `shutdown`, requests get this long to finish.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4096,
            handshake: Duration::from_secs(5),
            head: Duration::from_secs(30),
            drain: Duration::from_secs(20),
        }
    }
}

/// An idle HTTP/2 peer is asked for a sign of life this often, and dropped if none comes in as long again: a peer whose
/// machine died never closes.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Serves `router` until `shutdown`, then finishes the requests it holds. Handlers find the peer's address as
/// `ConnectInfo<SocketAddr>`. Long exchanges (the gates' link) must end by themselves at `shutdown`.
///
/// ```no_run
/// # async fn f(certificates: ebb::serve::certificates::Certificates, router: axum::Router, stop: tokio_util::sync::CancellationToken) -> anyhow::Result<()> {
/// let listener = tokio::net::TcpListener::bind("10.77.1.2:9443").await?;
/// ebb::serve::https::serve_https(listener, certificates.server(), router, Default::default(), stop).await;
/// # Ok(()) }
/// ```
pub async fn serve_https(
    listener: TcpListener,
    tls: ServerTls,
    router: Router,
    limits: Limits,
    shutdown: CancellationToken,
) {
    let graceful = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(limits.connections));
    loop {
        let accepted = async {
            // Ours alone and never closed, so this only ever waits.
            let place = places.clone().acquire_owned().await.ok();
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            accepted = accepted => accepted,
            () = shutdown.cancelled() => break,
        };
        let (tcp, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, mostly: a pause lets some close, a return would take the whole port away.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let watcher = graceful.watcher();
        let (tls, router) = (tls.clone(), router.clone());
        tokio::spawn(async move {
            let _place = place;
            connection(tcp, peer, &tls, router, limits, watcher).await;
        });
    }
    drop(listener);
    if tokio::time::timeout(limits.drain, graceful.shutdown())
        .await
        .is_err()
    {
        tracing::warn!(
            seconds = limits.drain.as_secs(),
            "some requests did not finish in time; their connections are cut"
        );
    }
}

async fn connection(
    tcp: TcpStream,
    peer: SocketAddr,
    tls: &ServerTls,
    router: Router,
    limits: Limits,
    watcher: Watcher,
) {
    // Answers are small; Nagle would hold each back until the last one's ACK.
    let _ = tcp.set_nodelay(true);
    let acceptor = tokio_rustls::TlsAcceptor::from(tls.current());
    let stream = match tokio::time::timeout(limits.handshake, acceptor.accept(tcp)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::debug!(%peer, %error, "no TLS handshake");
            return;
        }
        Err(_) => {
            tracing::debug!(%peer, "TLS handshake took too long");
            return;
        }
    };
    let service = TowerToHyperService::new(router.layer(axum::Extension(ConnectInfo(peer))));
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE);
    let served = builder
        .serve_connection_with_upgrades(TokioIo::new(stream), service)
        .into_owned();
    if let Err(error) = watcher.watch(served).await {
        tracing::debug!(%peer, error = %error, "connection ended");
    }
}
