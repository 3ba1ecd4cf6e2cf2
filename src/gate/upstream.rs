//! Connections to replicas: kept and used again, and exact about whether a request can have reached the other side.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, Version};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::body::ReadAhead;
use super::tcp;

/// A replica that does not take a connection within this is left out.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Idle connections are closed before the servers do it (uvicorn, the shortest of the common ones, after 5 s): a
/// request that meets a closing connection may be lost.
const KEEP_IDLE: Duration = Duration::from_secs(4);
/// Idle connections kept per replica.
const MAX_IDLE: usize = 64;

type Http1 = http1::SendRequest<ReadAhead>;
type Http2 = http2::SendRequest<ReadAhead>;

/// What became of a request.
pub enum Sent {
    /// The replica answered.
    Answer(Response<Answer>),
    /// The replica cannot have seen it: it can go to another one.
    Unsent(Request<ReadAhead>, String),
    /// Its own body could not be read to the end: the client broke off, or sent something that is no body.
    Broken(String),
    /// It was sent, and no answer came.
    Failed(String),
}

/// The connections to all replicas.
#[derive(Default)]
pub struct Pool {
    idle: Mutex<HashMap<SocketAddr, Vec<(Http1, Instant)>>>,
    shared: Mutex<HashMap<SocketAddr, Http2>>,
}

impl Pool {
    /// Sends a request, in the HTTP version that it carries.
    pub async fn send(self: &Arc<Self>, address: SocketAddr, mut request: Request<ReadAhead>) -> Sent {
        if request.version() == Version::HTTP_2 {
            return self.send2(address, request).await;
        }
        // A kept connection may turn out closed at the moment of use, before it took anything; a new one then tells
        // whether the replica is there.
        while let Some(mut sender) = self.checkout(address) {
            match sender.try_send_request(request).await {
                Ok(answer) => return Sent::Answer(self.answer(address, sender, answer)),
                Err(mut error) => match error.take_message() {
                    Some(back) => request = back,
                    None => return failed(&error.into_error()),
                },
            }
        }
        let stream = match connect(address).await {
            Ok(stream) => stream,
            Err(error) => return Sent::Unsent(request, error),
        };
        let (mut sender, connection) = match http1::handshake(TokioIo::new(stream)).await {
            Ok(made) => made,
            Err(error) => return Sent::Unsent(request, describe(&error)),
        };
        tokio::spawn(async move {
            let _ = connection.with_upgrades().await;
        });
        match sender.try_send_request(request).await {
            Ok(answer) => Sent::Answer(self.answer(address, sender, answer)),
            Err(mut error) => match error.take_message() {
                Some(back) => Sent::Unsent(back, describe(error.error())),
                None => failed(&error.into_error()),
            },
        }
    }

    async fn send2(self: &Arc<Self>, address: SocketAddr, mut request: Request<ReadAhead>) -> Sent {
        let kept = self.shared.lock().get(&address).cloned();
        if let Some(mut sender) = kept.filter(|sender| !sender.is_closed()) {
            match sender.try_send_request(request).await {
                Ok(answer) => return Sent::Answer(answer.map(Answer::plain)),
                Err(mut error) => match error.take_message() {
                    Some(back) => request = back,
                    None => return failed(&error.into_error()),
                },
            }
        }
        let stream = match connect(address).await {
            Ok(stream) => stream,
            Err(error) => return Sent::Unsent(request, error),
        };
        let made = http2::Builder::new(TokioExecutor::new())
            .adaptive_window(true)
            .handshake(TokioIo::new(stream))
            .await;
        let (mut sender, connection) = match made {
            Ok(made) => made,
            Err(error) => return Sent::Unsent(request, describe(&error)),
        };
        tokio::spawn(async move {
            let _ = connection.await;
        });
        self.shared.lock().insert(address, sender.clone());
        match sender.try_send_request(request).await {
            Ok(answer) => Sent::Answer(answer.map(Answer::plain)),
            Err(mut error) => match error.take_message() {
                Some(back) => Sent::Unsent(back, describe(error.error())),
                None => failed(&error.into_error()),
            },
        }
    }

    fn checkout(&self, address: SocketAddr) -> Option<Http1> {
        let mut idle = self.idle.lock();
        let kept = idle.get_mut(&address)?;
        while let Some((sender, since)) = kept.pop() {
            if since.elapsed() < KEEP_IDLE && sender.is_ready() {
                return Some(sender);
            }
        }
        idle.remove(&address);
        None
    }

    fn answer(
        self: &Arc<Self>,
        address: SocketAddr,
        sender: Http1,
        answer: Response<Incoming>,
    ) -> Response<Answer> {
        answer.map(|body| Answer {
            body,
            connection: Some((self.clone(), address, sender)),
        })
    }

    fn keep(self: Arc<Self>, address: SocketAddr, mut sender: Http1) {
        if sender.is_ready() {
            self.put(address, sender);
        } else if !sender.is_closed() {
            // The last bytes are read, but the connection has not noticed yet.
            tokio::spawn(async move {
                if let Ok(Ok(())) = tokio::time::timeout(Duration::from_secs(1), sender.ready()).await {
                    self.put(address, sender);
                }
            });
        }
    }

    fn put(&self, address: SocketAddr, sender: Http1) {
        let mut idle = self.idle.lock();
        let kept = idle.entry(address).or_default();
        if kept.len() < MAX_IDLE {
            kept.push((sender, Instant::now()));
        }
    }

    /// Closes what was idle for too long. To be called every few seconds.
    pub fn sweep(&self) {
        self.idle.lock().retain(|_, kept| {
            kept.retain(|(sender, since)| since.elapsed() < KEEP_IDLE && !sender.is_closed());
            !kept.is_empty()
        });
        self.shared.lock().retain(|_, sender| !sender.is_closed());
    }
}

async fn connect(address: SocketAddr) -> Result<TcpStream, String> {
    let stream = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address))
        .await
        .map_err(|_| {
            format!(
                "{address} did not take a connection within {} s",
                CONNECT_TIMEOUT.as_secs()
            )
        })?
        .map_err(|error| format!("{address} did not take a connection: {error}"))?;
    tcp::prepare(&stream);
    Ok(stream)
}

fn failed(error: &hyper::Error) -> Sent {
    // The only thing of ours that can fail here is the body, which is the client's.
    if error.is_user() {
        let why = std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
        Sent::Broken(format!("its body cannot be read to the end: {why}"))
    } else {
        Sent::Failed(describe(error))
    }
}

fn describe(error: &hyper::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// A replica's answer. Read to its end, its connection is used again; dropped before, it is closed, which is how the
/// replica learns that nobody wants the rest.
pub struct Answer {
    body: Incoming,
    connection: Option<(Arc<Pool>, SocketAddr, Http1)>,
}

impl Answer {
    fn plain(body: Incoming) -> Self {
        Self {
            body,
            connection: None,
        }
    }

    /// The connection is about to carry another protocol: it will not be used again.
    pub fn forget_connection(&mut self) {
        self.connection = None;
    }

    fn ended(&mut self) {
        if let Some((pool, address, sender)) = self.connection.take() {
            pool.keep(address, sender);
        }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(None) = polled {
            self.ended();
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if self.body.is_end_stream() {
            self.ended();
        }
    }
}
