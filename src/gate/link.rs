//! The gate's end of the link to the controller's leader (see [`crate::link`]): reports numbers, and holds, resumes
//! and refuses as the leader says. Without a link everything goes on; only nothing is put to sleep.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use futures::StreamExt;
use http::header::AUTHORIZATION;
use http::{Request, StatusCode, Uri};
use http_body::Frame;
use http_body_util::{BodyExt, Limited, StreamBody};
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::listener::Listeners;
use super::metrics::Outcome;
use super::problem::Problem;
use super::state::Gate;
use crate::api::workload::WorkloadRef;
use crate::link::{
    Activity, FromGate, HEARTBEAT, MAX_LINE, MIN_INTERVAL, Misdirected, PATH as LINK_PATH, ToGate,
};
use crate::serve::tls;

const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const MAX_BACKOFF: Duration = Duration::from_secs(2);
/// Longest time for each step of a dial, and for the other end to take a line.
const STEP_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for the other end to end the exchange, too.
const GOODBYE: Duration = Duration::from_millis(300);
/// Most workloads in one line, so that it stays far below the longest that the other end takes.
const PER_LINE: usize = 2_000;

/// Where to and as whom.
#[derive(Clone, Debug)]
pub struct Config {
    /// `HOST:PORT` of the link Service.
    pub controller: String,
    /// The name that the controller's certificate carries.
    pub server_name: String,
    /// CA certificates, read again at each dial: they are renewed in place.
    pub ca_file: PathBuf,
    /// The ServiceAccount token, read again at each dial.
    pub token_file: PathBuf,
    /// The pod's name.
    pub pod: String,
    /// The address that slices can point at.
    pub ip: IpAddr,
}

/// The two ends of this gate's life.
#[derive(Clone, Debug)]
pub struct Ends {
    /// It was told to stop.
    pub stopping: CancellationToken,
    /// It has nothing left to report.
    pub done: CancellationToken,
}

/// How a session ended.
enum Ended {
    /// There is a leader elsewhere.
    Leader(String),
    /// This end is done.
    Done,
}

/// Keeps a link until `done`.
pub async fn run(gate: Arc<Gate>, listeners: Arc<Listeners>, config: Config, ends: Ends) {
    let mut to = config.controller.clone();
    let mut backoff = FIRST_BACKOFF;
    let mut complained = String::new();
    loop {
        let begun = Instant::now();
        let session = Session {
            gate: &gate,
            listeners: &listeners,
            config: &config,
            ends: &ends,
            told: HashMap::new(),
            told_ports: Vec::new(),
        };
        let ended = session.run(&to).await;
        gate.metrics.link_up.set(0);
        match ended {
            Ok(Ended::Done) => return,
            Ok(Ended::Leader(leader)) if leader != to => {
                to = leader;
                continue;
            }
            Ok(Ended::Leader(_)) => {}
            Err(error) => {
                let error = format!("{error:#}");
                // Once per reason: it may take minutes until there is a controller.
                if error != complained {
                    tracing::warn!(
                        to,
                        error,
                        "no link to the controller; nothing is put to sleep without it"
                    );
                    complained = error;
                }
            }
        }
        if begun.elapsed() > MAX_BACKOFF * 2 {
            complained.clear();
        }
        to.clone_from(&config.controller);
        backoff = if begun.elapsed() > MAX_BACKOFF * 2 {
            FIRST_BACKOFF
        } else {
            (backoff * 2).min(MAX_BACKOFF)
        };
        tokio::select! {
            () = ends.done.cancelled() => return,
            () = tokio::time::sleep(jitter(backoff)) => {}
        }
    }
}

/// Between half of it and all of it, so that gates do not come all at once.
fn jitter(time: Duration) -> Duration {
    let random = RandomState::new().build_hasher().finish() % 1024;
    time / 2 + time / 2 * u32::try_from(random).unwrap_or(0) / 1024
}

struct Session<'a> {
    gate: &'a Arc<Gate>,
    listeners: &'a Listeners,
    config: &'a Config,
    ends: &'a Ends,
    /// What the leader was told last, and how much activity there had been then.
    told: HashMap<WorkloadRef, (u32, u32, u64)>,
    told_ports: Vec<u16>,
}

type Lines = mpsc::Sender<Result<Frame<Bytes>, std::convert::Infallible>>;

impl Session<'_> {
    async fn run(mut self, to: &str) -> anyhow::Result<Ended> {
        let (lines, body) = mpsc::channel(64);
        let hello = FromGate::Hello {
            pod: self.config.pod.clone(),
            ip: self.config.ip,
        };
        send(&lines, &hello).await?;
        let response = tokio::select! {
            () = self.ends.done.cancelled() => return Ok(Ended::Done),
            response = dial(self.config, to, ReceiverStream::new(body)) => response?,
        };
        if response.status() == StatusCode::MISDIRECTED_REQUEST {
            let body = timeout(STEP_TIMEOUT, Limited::new(response.into_body(), 4096).collect()).await?;
            let body = body
                .map_err(|error| anyhow::anyhow!(error))
                .context("a 421 without a body")?;
            let misdirected: Misdirected = serde_json::from_slice(&body.to_bytes())?;
            let leader = misdirected.leader.context("the controllers have no leader yet")?;
            return Ok(Ended::Leader(leader));
        }
        if response.status() != StatusCode::OK {
            bail!(
                "{to} answered {}: check that this pod's token has the audience `ebb`",
                response.status()
            );
        }
        tracing::info!(to, "link to the controller stands");
        self.gate.metrics.link_up.set(1);
        self.report(&lines, true).await?;
        self.talk(lines, response.into_body()).await
    }

    async fn talk(&mut self, lines: Lines, mut answer: Incoming) -> anyhow::Result<Ended> {
        let mut reader = LineReader::default();
        let mut tick = tokio::time::interval(MIN_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut reported = Instant::now();
        let mut told_stopping = false;
        loop {
            tokio::select! {
                () = self.ends.done.cancelled() => {
                    // An end in order: the last line, and then the other end's.
                    drop(lines);
                    let _ = timeout(GOODBYE, async { while let Some(Ok(_)) = answer.frame().await {} }).await;
                    return Ok(Ended::Done);
                }
                () = self.ends.stopping.cancelled(), if !told_stopping => {
                    told_stopping = true;
                    send(&lines, &FromGate::Stopping).await?;
                }
                _ = tick.tick() => {
                    let heartbeat = reported.elapsed() >= HEARTBEAT;
                    if self.report(&lines, heartbeat).await? {
                        reported = Instant::now();
                    }
                }
                frame = answer.frame() => {
                    let frame = frame.context("the controller ended the link")??;
                    let Ok(data) = frame.into_data() else { continue };
                    reader.push(&data)?;
                    while let Some(line) = reader.next() {
                        match serde_json::from_slice(&line) {
                            Ok(message) => self.hear(&lines, message).await?,
                            Err(error) => tracing::warn!(%error, "a line that this gate does not know"),
                        }
                    }
                }
            }
        }
    }

    /// Sends what changed; with `always`, even nothing. Returns whether anything was sent.
    async fn report(&mut self, lines: &Lines, always: bool) -> anyhow::Result<bool> {
        let mut changed: Vec<Activity> = Vec::new();
        for door in self.gate.doors() {
            let (activity, count) = door.activity();
            let now = (activity.in_flight, activity.queued, count);
            if self.told.get(&activity.workload) != Some(&now) {
                self.told.insert(activity.workload.clone(), now);
                changed.push(activity);
            }
        }
        let ports = self.listeners.ports();
        if changed.is_empty() && ports == self.told_ports && !always {
            return Ok(false);
        }
        self.told_ports.clone_from(&ports);
        let mut parts = changed.chunks(PER_LINE);
        let mut part = parts.next().unwrap_or_default();
        loop {
            let report = FromGate::Report {
                ports: ports.clone(),
                workloads: part.to_vec(),
            };
            send(lines, &report).await?;
            match parts.next() {
                Some(next) => part = next,
                None => return Ok(true),
            }
        }
    }

    async fn hear(&mut self, lines: &Lines, message: ToGate) -> anyhow::Result<()> {
        match message {
            ToGate::Hold { id, workload, for_ms } => {
                let known = self.told.get(&workload).map_or(0, |(_, _, count)| *count);
                let busy = self.gate.door(&workload).hold(id, for_ms, known);
                tracing::debug!(%workload, id, busy, "last look before a sleep");
                send(lines, &FromGate::Held { id, busy }).await
            }
            ToGate::Resume { id } => {
                // Only the door that has this hold reacts.
                for door in self.gate.doors() {
                    door.resume(id);
                }
                Ok(())
            }
            ToGate::WakeFailed { workload, reason } => {
                let door = self.gate.door(&workload);
                if door.queued() > 0 {
                    tracing::warn!(%workload, reason, "cannot be woken; those who wait are told");
                    door.dismiss(&Problem::new(Outcome::WakeFailed, reason));
                }
                Ok(())
            }
        }
    }
}

async fn send(lines: &Lines, message: &FromGate) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    timeout(STEP_TIMEOUT, lines.send(Ok(Frame::data(line.into()))))
        .await
        .context("the controller takes no lines")?
        .map_err(|_| anyhow::anyhow!("the link broke"))
}

async fn dial(
    config: &Config,
    to: &str,
    body: ReceiverStream<Result<Frame<Bytes>, std::convert::Infallible>>,
) -> anyhow::Result<http::Response<Incoming>> {
    let ca = std::fs::read_to_string(&config.ca_file)
        .with_context(|| format!("cannot read the CA {}", config.ca_file.display()))?;
    let tls = tls::client_config(&ca, None)?;
    let token = std::fs::read_to_string(&config.token_file)
        .with_context(|| format!("cannot read the token {}", config.token_file.display()))?;
    let address = timeout(STEP_TIMEOUT, tokio::net::lookup_host(to))
        .await
        .with_context(|| format!("no answer on what address {to} has"))?
        .with_context(|| format!("cannot find {to}"))?
        .next()
        .with_context(|| format!("{to} has no address"))?;
    let stream = tls::dial(address, &config.server_name, tls, STEP_TIMEOUT)
        .await
        .with_context(|| format!("cannot reach {to} ({address}) as {}", config.server_name))?;
    let (mut sender, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(Duration::from_secs(2))
        .keep_alive_timeout(Duration::from_secs(3))
        .keep_alive_while_idle(true)
        .handshake(TokioIo::new(stream))
        .await?;
    // Ends when both halves of the exchange are dropped.
    tokio::spawn(async move {
        let _ = connection.await;
    });
    let uri: Uri = format!("https://{}{LINK_PATH}", config.server_name).parse()?;
    let request = Request::post(uri)
        .header(AUTHORIZATION, format!("Bearer {}", token.trim()))
        .body(StreamBody::new(body.boxed()))?;
    timeout(STEP_TIMEOUT, sender.send_request(request))
        .await
        .with_context(|| format!("{to} does not answer the link"))?
        .with_context(|| format!("the link to {to}"))
}

/// Cuts a stream of bytes into lines.
#[derive(Default)]
struct LineReader {
    buffer: Vec<u8>,
    searched: usize,
}

impl LineReader {
    fn push(&mut self, data: &[u8]) -> anyhow::Result<()> {
        self.buffer.extend_from_slice(data);
        if self.buffer.len() > MAX_LINE && !self.buffer.contains(&b'\n') {
            bail!("a line of more than {MAX_LINE} bytes");
        }
        Ok(())
    }

    fn next(&mut self) -> Option<Vec<u8>> {
        let Some(end) = self.buffer[self.searched..]
            .iter()
            .position(|byte| *byte == b'\n')
        else {
            self.searched = self.buffer.len();
            return None;
        };
        let end = self.searched + end;
        let rest = self.buffer.split_off(end + 1);
        let mut line = std::mem::replace(&mut self.buffer, rest);
        line.truncate(end);
        self.searched = 0;
        Some(line)
    }
}

#[cfg(test)]
#[path = "link_tests.rs"]
mod tests;
