//! One listener per gate port, started and stopped as the routing table changes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use super::proxy::{self, Arrived};
use super::state::Gate;
use super::tcp;

/// Largest head of a request; a larger one is answered 431.
const MAX_HEAD: usize = 64 << 10;
/// An idle client connection is kept for longer than any load balancer keeps its side (600 s is the longest), so
/// that it is never this side that closes while a request comes in.
pub(super) const IDLE: Duration = Duration::from_secs(650);
/// After accept failed, which it does when file descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The listeners of a gate.
pub struct Listeners {
    gate: Arc<Gate>,
    ip: IpAddr,
    /// Cancelled: nothing is accepted any more, and connections close once they are idle.
    stop: CancellationToken,
    connections: Arc<Semaphore>,
    running: Mutex<BTreeMap<u16, CancellationToken>>,
}

impl Listeners {
    /// No listener yet.
    #[must_use]
    pub fn new(gate: Arc<Gate>, ip: IpAddr, max_connections: usize, stop: CancellationToken) -> Self {
        Self {
            gate,
            ip,
            stop,
            connections: Arc::new(Semaphore::new(max_connections)),
            running: Mutex::default(),
        }
    }

    /// Gate ports that accept connections now.
    #[must_use]
    pub fn ports(&self) -> Vec<u16> {
        self.running.lock().keys().copied().collect()
    }

    /// Starts and stops listeners until exactly these ports are listened on. Returns the ports that cannot be.
    pub async fn apply(&self, wanted: &BTreeSet<u16>) -> BTreeSet<u16> {
        let missing: Vec<u16> = {
            let mut running = self.running.lock();
            running.retain(|port, stop| {
                let keep = wanted.contains(port);
                if !keep {
                    tracing::info!(port, "gate port closed: no Service uses it any more");
                    stop.cancel();
                }
                keep
            });
            wanted
                .iter()
                .filter(|port| !running.contains_key(port))
                .copied()
                .collect()
        };
        let mut failed = BTreeSet::new();
        for port in missing {
            match TcpListener::bind((self.ip, port)).await {
                Ok(listener) => self.start(port, listener),
                Err(error) => {
                    tracing::warn!(port, %error, "cannot listen on this gate port; trying again");
                    failed.insert(port);
                }
            }
        }
        failed
    }

    fn start(&self, port: u16, listener: TcpListener) {
        let stop = self.stop.child_token();
        tracing::info!(port, "gate port open");
        self.running.lock().insert(port, stop.clone());
        let (gate, connections) = (self.gate.clone(), self.connections.clone());
        tokio::spawn(accept(gate, port, listener, connections, stop));
    }
}

async fn accept(
    gate: Arc<Gate>,
    port: u16,
    listener: TcpListener,
    connections: Arc<Semaphore>,
    stop: CancellationToken,
) {
    loop {
        // The place first: connections beyond the bound wait in the kernel.
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = async {
                let place = connections.clone().acquire_owned().await.ok()?;
                Some((listener.accept().await, place))
            } => accepted,
        };
        let Some((accepted, place)) = accepted else {
            return;
        };
        match accepted {
            Ok((stream, peer)) => {
                let connection = serve(gate.clone(), Arrived { port, peer }, stream, place, stop.clone());
                gate.tracker.spawn(connection);
            }
            Err(error) => {
                tracing::warn!(port, %error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve(
    gate: Arc<Gate>,
    arrived: Arrived,
    stream: TcpStream,
    place: OwnedSemaphorePermit,
    stop: CancellationToken,
) {
    tcp::prepare(&stream);
    // Which HTTP it is shows in the first bytes, for which hyper waits without a limit.
    let mut first = [0];
    let speaks = tokio::select! {
        biased;
        spoke = tokio::time::timeout(IDLE, stream.peek(&mut first)) => matches!(spoke, Ok(Ok(1))),
        () = stop.cancelled() => false,
    };
    if !speaks {
        return;
    }
    gate.metrics.connections.inc();
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE)
        .max_buf_size(MAX_HEAD);
    builder
        .http2()
        .timer(TokioTimer::new())
        .adaptive_window(true)
        .max_header_list_size(u32::try_from(MAX_HEAD).unwrap_or(u32::MAX))
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(20));
    let service = {
        let gate = gate.clone();
        service_fn(move |request| proxy::serve(gate.clone(), arrived, request))
    };
    {
        let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
        tokio::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(port = arrived.port, peer = %arrived.peer, error, "connection ended early");
        }
    }
    gate.metrics.connections.dec();
    drop(place);
}
