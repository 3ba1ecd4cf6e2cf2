//! The API server without TLS, for one client, with one request held back until told: what a network does to a message
//! of a process that freezes right after it sent it.

use std::net::SocketAddr;
use std::sync::Arc;

use ebb::serve::tls;
use ebb_lab::cluster::API_SERVER;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, oneshot};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

use crate::setup::Setup;

pub struct HoldingProxy {
    pub address: SocketAddr,
    held: Arc<Held>,
}

/// The one request that is held, and how it went.
struct Held {
    path: &'static str,
    /// There is one.
    seen: Notify,
    /// It may go on.
    go: Notify,
    answered: Mutex<Option<oneshot::Sender<String>>>,
    answer: Mutex<Option<oneshot::Receiver<String>>>,
}

impl HoldingProxy {
    /// Listens, and holds the first request whose head has this in its path.
    pub async fn start(address: SocketAddr, setup: &Setup, path: &'static str) -> HoldingProxy {
        let ca = std::fs::read_to_string(setup.cluster.dir().join("certificates/ca.crt")).unwrap();
        let mut config = (*tls::client_config(&ca, None).unwrap()).clone();
        // What passes must be readable line by line.
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let connector = TlsConnector::from(Arc::new(config));
        let listener = TcpListener::bind(address).await.unwrap();
        let (answered, answer) = oneshot::channel();
        let held = Arc::new(Held {
            path,
            seen: Notify::new(),
            go: Notify::new(),
            answered: Mutex::new(Some(answered)),
            answer: Mutex::new(Some(answer)),
        });
        let shared = Arc::clone(&held);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(connection(client, connector.clone(), Arc::clone(&shared)));
            }
        });
        HoldingProxy { address, held }
    }

    /// Waits until the request is here.
    pub async fn held(&self) {
        self.held.seen.notified().await;
    }

    /// Lets it go on; the first line of the API server's answer.
    pub async fn release(&self) -> String {
        let answer = self.held.answer.lock().take().expect("released once");
        self.held.go.notify_one();
        answer.await.unwrap()
    }
}

async fn connection(client: TcpStream, connector: TlsConnector, held: Arc<Held>) {
    let host = API_SERVER.trim_start_matches("https://");
    let server = TcpStream::connect(host).await.unwrap();
    let address: SocketAddr = host.parse().unwrap();
    let name = ServerName::IpAddress(address.ip().into());
    let Ok(server) = connector.connect(name, server).await else {
        return;
    };
    let (client_in, client_out) = client.into_split();
    let (server_in, server_out) = tokio::io::split(server);
    let waits = Arc::new(Mutex::new(false));
    tokio::select! {
        () = requests(client_in, server_out, &held, &waits) => {}
        () = answers(server_in, client_out, &held, &waits) => {}
    }
}

/// Requests of one connection come one after the other, each with its head in one write.
async fn requests(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    held: &Held,
    waits: &Mutex<bool>,
) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let is_it = String::from_utf8_lossy(&buffer[..count])
            .lines()
            .next()
            .is_some_and(|line| line.starts_with("POST ") && line.contains(held.path));
        if is_it && held.answered.lock().is_some() {
            held.seen.notify_one();
            held.go.notified().await;
            *waits.lock() = true;
        }
        if to.write_all(&buffer[..count]).await.is_err() || to.flush().await.is_err() {
            return;
        }
    }
}

async fn answers(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    held: &Held,
    waits: &Mutex<bool>,
) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        if std::mem::take(&mut *waits.lock()) {
            let text = String::from_utf8_lossy(&buffer[..count]);
            let line = text.lines().next().unwrap_or_default().to_owned();
            if let Some(answered) = held.answered.lock().take() {
                let _ = answered.send(line);
            }
        }
        // A client that has frozen or gone does not keep the answer from being seen here.
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}
