//! Passing a request on to the replica that leads: one HTTP/2 (or HTTP/1.1) connection over mutual TLS, bounded in
//! time and size. The caller decides what to answer when it fails.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::tls::{self, ClientTls};

/// Set on requests that were passed on, so that two replicas which take each other for the leader do not play ball.
pub static FORWARDED: HeaderName = HeaderName::from_static("x-ebb-forwarded");

/// Headers that belong to one connection and are not passed on.
const HOP_BY_HOP: [HeaderName; 7] = [
    header::CONNECTION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::CONTENT_LENGTH,
    HeaderName::from_static("keep-alive"),
];

/// Why a request could not be passed on.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// It was passed on once already.
    #[error("the request was passed on by another replica already, so neither of us leads")]
    Loop,
    /// No connection.
    #[error("cannot reach the leader at {leader}: {error}")]
    Connect {
        /// Where it was looked for.
        leader: SocketAddr,
        /// What happened.
        error: std::io::Error,
    },
    /// No answer in time.
    #[error("the leader at {0} did not answer in time")]
    Timeout(SocketAddr),
    /// The exchange broke.
    #[error("the exchange with the leader broke: {0}")]
    Broken(String),
}

/// Passes requests on.
pub struct Forwarder {
    tls: ClientTls,
    name: String,
    limit: Duration,
    max_answer: usize,
    connection: Mutex<Option<(SocketAddr, http2::SendRequest<Full<Bytes>>)>>,
}

impl Forwarder {
    /// `name` is what the leader's certificate is good for, as `ebb-controller.ebb-system.svc`; `limit` bounds dialling
    /// and answer together, `max_answer` the answer's bytes.
    #[must_use]
    pub fn new(tls: ClientTls, name: String, limit: Duration, max_answer: usize) -> Self {
        Self {
            tls,
            name,
            limit,
            max_answer,
            connection: Mutex::new(None),
        }
    }

    /// Passes one request on and returns the leader's answer, whatever its status.
    ///
    /// # Errors
    /// When the leader gave no whole answer in time. Whether it acted on the request is then not known.
    pub async fn forward(
        &self,
        leader: SocketAddr,
        head: http::request::Parts,
        body: Bytes,
    ) -> Result<Response<Bytes>, ForwardError> {
        if head.headers.contains_key(&FORWARDED) {
            return Err(ForwardError::Loop);
        }
        let deadline = Instant::now() + self.limit;
        tokio::time::timeout_at(deadline, self.exchange(leader, head, body))
            .await
            .unwrap_or(Err(ForwardError::Timeout(leader)))
    }

    async fn exchange(
        &self,
        leader: SocketAddr,
        head: http::request::Parts,
        body: Bytes,
    ) -> Result<Response<Bytes>, ForwardError> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = head.method;
        *request.headers_mut() = pass_on(&head.headers);
        let path = head.uri.path_and_query().map_or("/", |p| p.as_str());
        *request.uri_mut() = format!("https://{}{path}", self.name)
            .parse()
            .map_err(|error: http::uri::InvalidUri| ForwardError::Broken(error.to_string()))?;
        let answer = self.send(leader, request).await?;
        let (head, body) = answer.into_parts();
        let body = Limited::new(body, self.max_answer)
            .collect()
            .await
            .map_err(|error| ForwardError::Broken(error.to_string()))?
            .to_bytes();
        let mut answer = Response::new(body);
        *answer.status_mut() = head.status;
        *answer.headers_mut() = pass_on(&head.headers);
        answer.headers_mut().remove(&FORWARDED);
        Ok(answer)
    }

    async fn send(
        &self,
        leader: SocketAddr,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<hyper::body::Incoming>, ForwardError> {
        let broken = |error: hyper::Error| ForwardError::Broken(error.to_string());
        let mut kept = self.connection.lock().await;
        if let Some((address, sender)) = &mut *kept
            && *address == leader
            && !sender.is_closed()
        {
            let mut sender = sender.clone();
            drop(kept);
            return sender.send_request(request).await.map_err(broken);
        }
        // Dialled under the lock: those who come meanwhile share the new connection instead of dialling their own.
        let stream = tls::dial(leader, &self.name, self.tls.current(), self.limit)
            .await
            .map_err(|error| ForwardError::Connect { leader, error })?;
        let h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        let io = TokioIo::new(stream);
        if h2 {
            let (mut sender, connection) = http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .keep_alive_interval(Duration::from_secs(5))
                .keep_alive_timeout(Duration::from_secs(5))
                .keep_alive_while_idle(true)
                .handshake(io)
                .await
                .map_err(broken)?;
            tokio::spawn(connection);
            *kept = Some((leader, sender.clone()));
            drop(kept);
            sender.send_request(request).await.map_err(broken)
        } else {
            drop(kept);
            let (mut sender, connection) = http1::handshake(io).await.map_err(broken)?;
            tokio::spawn(connection);
            sender.send_request(request).await.map_err(broken)
        }
    }
}

fn pass_on(headers: &HeaderMap) -> HeaderMap {
    let mut next: HeaderMap = headers
        .iter()
        .filter(|(name, _)| !HOP_BY_HOP.contains(name) && **name != header::HOST)
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    next.insert(FORWARDED.clone(), HeaderValue::from_static("1"));
    next
}
