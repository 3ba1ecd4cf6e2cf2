//! A client of model servers: one connection per request, and the times it saw.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, HOST};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

/// Requests of one run, counted.
#[derive(Debug, Default)]
pub struct Tally {
    sent: AtomicUsize,
    answered: AtomicUsize,
}

impl Tally {
    /// How many were sent.
    pub fn sent(&self) -> usize {
        self.sent.load(Relaxed)
    }

    /// How many were answered in full with a success.
    pub fn answered(&self) -> usize {
        self.answered.load(Relaxed)
    }
}

/// One answer.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: http::StatusCode,
    /// From before the connection was opened until the head had come.
    pub first_byte: Duration,
    /// When the head came, by the wall clock that servers log by.
    pub first_byte_at: SystemTime,
    /// Until all had come.
    pub total: Duration,
    /// The longest time between two parts of the body.
    pub longest_gap: Duration,
    /// All of the body.
    pub body: Bytes,
}

impl Answer {
    /// Server-sent events that carry a token.
    pub fn tokens(&self) -> usize {
        let text = String::from_utf8_lossy(&self.body);
        let events = text.lines().filter_map(|line| line.strip_prefix("data: "));
        let tokens = events.filter_map(|event| serde_json::from_str::<Value>(event).ok());
        tokens
            .filter(|event| {
                event
                    .pointer("/choices/0/delta/content")
                    .is_some_and(|c| c.as_str() != Some(""))
            })
            .count()
    }

    /// Whether a stream came to its own end.
    pub fn is_done(&self) -> bool {
        self.body.trim_ascii_end().ends_with(b"data: [DONE]")
    }
}

/// Sends one request and reads the whole answer.
///
/// # Errors
/// When there is no whole answer within `limit`.
pub async fn send(
    address: SocketAddr,
    method: http::Method,
    path: &str,
    body: Option<Value>,
    limit: Duration,
) -> anyhow::Result<Answer> {
    let exchange = exchange(address, method, path, body, |_| ());
    let answer = tokio::time::timeout(limit, exchange).await;
    answer.with_context(|| {
        format!(
            "no whole answer from http://{address}{path} within {} s",
            limit.as_secs()
        )
    })?
}

/// A chat completion; counted, and only a 200 is an answer.
///
/// # Errors
/// When there is no such answer within `limit`.
pub async fn chat(
    tally: &Tally,
    address: SocketAddr,
    model: &str,
    max_tokens: u32,
    limit: Duration,
) -> anyhow::Result<Answer> {
    let body = json!({
        "model": model, "max_tokens": max_tokens,
        "messages": [{"role": "user", "content": "Is the tide coming in?"}],
    });
    tally.sent.fetch_add(1, Relaxed);
    let answer = send(
        address,
        http::Method::POST,
        "/v1/chat/completions",
        Some(body),
        limit,
    )
    .await?;
    anyhow::ensure!(
        answer.status == http::StatusCode::OK,
        "{model} answered {}: {}",
        answer.status,
        String::from_utf8_lossy(&answer.body)
    );
    tally.answered.fetch_add(1, Relaxed);
    Ok(answer)
}

/// A streamed chat completion; `part` is called with the bytes so far, each time that some have come.
///
/// # Errors
/// When the stream does not come to its end within `limit`.
pub async fn stream(
    tally: &Tally,
    address: SocketAddr,
    model: &str,
    max_tokens: u32,
    limit: Duration,
    part: impl FnMut(usize),
) -> anyhow::Result<Answer> {
    let body = json!({
        "model": model, "max_tokens": max_tokens, "stream": true,
        "messages": [{"role": "user", "content": "Tell me of the sea, slowly."}],
    });
    tally.sent.fetch_add(1, Relaxed);
    let exchange = exchange(
        address,
        http::Method::POST,
        "/v1/chat/completions",
        Some(body),
        part,
    );
    let answer = tokio::time::timeout(limit, exchange).await;
    let answer =
        answer.with_context(|| format!("the stream of {model} took over {} s", limit.as_secs()))??;
    anyhow::ensure!(
        answer.status == http::StatusCode::OK,
        "{model} answered {}",
        answer.status
    );
    anyhow::ensure!(
        answer.is_done(),
        "the stream of {model} was cut after {} tokens",
        answer.tokens()
    );
    tally.answered.fetch_add(1, Relaxed);
    Ok(answer)
}

async fn exchange(
    address: SocketAddr,
    method: http::Method,
    path: &str,
    body: Option<Value>,
    mut part: impl FnMut(usize),
) -> anyhow::Result<Answer> {
    let start = Instant::now();
    let bytes = body.map(|body| Bytes::from(body.to_string())).unwrap_or_default();
    let request = http::Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, address.to_string())
        .header(CONTENT_TYPE, "application/json")
        .header(CONNECTION, "close")
        .body(Full::new(bytes))?;
    let stream = TcpStream::connect(address).await;
    let stream = stream.with_context(|| format!("connecting to {address}"))?;
    stream.set_nodelay(true)?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(connection));
    let response = sender.send_request(request).await;
    let response = response.with_context(|| format!("asking http://{address}{path}"))?;
    let (first_byte, first_byte_at) = (start.elapsed(), SystemTime::now());
    let (head, mut incoming) = response.into_parts();
    let (mut body, mut last, mut longest_gap) = (Vec::new(), Instant::now(), Duration::ZERO);
    while let Some(frame) = incoming.frame().await {
        let frame = frame.with_context(|| {
            format!(
                "the answer of {address}{path} broke off after {} bytes",
                body.len()
            )
        })?;
        longest_gap = longest_gap.max(last.elapsed());
        last = Instant::now();
        if let Some(data) = frame.data_ref() {
            body.extend_from_slice(data);
            part(body.len());
        }
    }
    drop(driver);
    Ok(Answer {
        status: head.status,
        first_byte,
        first_byte_at,
        total: start.elapsed(),
        longest_gap,
        body: body.into(),
    })
}
