//! The link port: gates dial the leader, and stay. `POST /v1/link`, JSON lines both ways at the same time; see
//! [`crate::link`].

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use futures::{StreamExt, TryStreamExt};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::codec::{FramedRead, LinesCodec};
use tokio_util::io::StreamReader;
use tokio_util::sync::CancellationToken;

use super::gates::{Gates, LinkId};
use super::metrics::Metrics;
use super::tokens::{Caller, Refused, Tokens};
use crate::link::{FromGate, HEARTBEAT, MAX_LINE, Misdirected, PATH, ToGate};
use crate::serve::lease::{LeaderState, Leadership};

/// So long after the last line a link is given up.
const SILENCE: Duration = HEARTBEAT.saturating_mul(3);

/// What the handler needs.
pub struct LinkServer {
    /// What the gates tell.
    pub gates: Gates,
    /// Who may dial.
    pub tokens: Tokens,
    /// Whether this process leads.
    pub leadership: Leadership,
    /// The link port, the same on every replica.
    pub port: u16,
    /// Figures.
    pub metrics: Metrics,
    /// Ends all links.
    pub shutdown: CancellationToken,
}

/// The link's only path.
pub fn router(server: Arc<LinkServer>) -> Router {
    Router::new().route(PATH, post(accept)).with_state(server)
}

async fn accept(State(server): State<Arc<LinkServer>>, headers: HeaderMap, body: Body) -> Response {
    if server.leadership.term_now().is_none() {
        let leader = server
            .leadership
            .leader()
            .map(|leader| SocketAddr::new(leader.ip, server.port).to_string());
        return (
            StatusCode::MISDIRECTED_REQUEST,
            axum::Json(Misdirected { leader }),
        )
            .into_response();
    }
    let caller = match check(&server, &headers).await {
        Ok(caller) => caller,
        Err(refused) => {
            tracing::warn!(%refused, "refused a link");
            let status = match refused {
                Refused::Missing | Refused::Invalid(_) => StatusCode::UNAUTHORIZED,
                Refused::WrongUser(_) => StatusCode::FORBIDDEN,
                Refused::Unknown(_) => StatusCode::SERVICE_UNAVAILABLE,
            };
            return (status, refused.to_string()).into_response();
        }
    };
    // The answer must be on its way before the first line is read: both directions go on at the same time.
    let (sender, receiver) = tokio::sync::mpsc::channel::<ToGate>(16);
    tokio::spawn(async move {
        match serve(&server, caller, body, sender).await {
            Ok(()) => {}
            Err(error) => tracing::warn!(%error, "a link ended"),
        }
    });
    let lines = ReceiverStream::new(receiver).map(|message| {
        let mut line = serde_json::to_vec(&message).map_err(io::Error::other)?;
        line.push(b'\n');
        Ok::<_, io::Error>(bytes::Bytes::from(line))
    });
    (
        [(header::CONTENT_TYPE, "application/x-ndjson")],
        Body::from_stream(lines),
    )
        .into_response()
}

async fn check(server: &LinkServer, headers: &HeaderMap) -> Result<Caller, Refused> {
    let token = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "))
        .ok_or(Refused::Missing)?;
    server.tokens.check(token.trim()).await
}

/// Why a link ended.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("it broke: {0}")]
    Broken(String),
    #[error("nothing was heard for {} s", SILENCE.as_secs())]
    Silent,
    #[error("its first line was not Hello")]
    NoHello,
    #[error("it says to be pod {said}, while its token is of pod {bound}")]
    WrongPod { said: String, bound: String },
    #[error("there are too many links, or it tells of too many workloads")]
    TooMany,
    #[error("this replica does not lead any more")]
    NotLeading,
}

type Lines = futures::stream::BoxStream<'static, Result<String, LinkError>>;

fn lines(body: Body) -> Lines {
    let reader = StreamReader::new(body.into_data_stream().map_err(io::Error::other));
    FramedRead::new(reader, LinesCodec::new_with_max_length(MAX_LINE))
        .map_err(|error| LinkError::Broken(error.to_string()))
        .boxed()
}

/// The next message; `None` when the gate has ended the link.
async fn next(lines: &mut Lines) -> Result<Option<FromGate>, LinkError> {
    let line = tokio::time::timeout(SILENCE, lines.next())
        .await
        .map_err(|_| LinkError::Silent)?;
    let Some(line) = line.transpose()? else {
        return Ok(None);
    };
    serde_json::from_str(&line)
        .map(Some)
        .map_err(|error| LinkError::Broken(format!("a line cannot be read: {error}")))
}

async fn serve(
    server: &LinkServer,
    caller: Caller,
    body: Body,
    sender: tokio::sync::mpsc::Sender<ToGate>,
) -> Result<(), LinkError> {
    let mut lines = lines(body);
    let Some(FromGate::Hello { pod, ip }) = next(&mut lines).await? else {
        return Err(LinkError::NoHello);
    };
    if let Some(bound) = caller.pod
        && bound != pod
    {
        return Err(LinkError::WrongPod { said: pod, bound });
    }
    let (id, messages) = server.gates.connect(&pod, ip).ok_or(LinkError::TooMany)?;
    let _gone = Gone {
        gates: &server.gates,
        id,
    };
    tracing::info!(gate = pod, %ip, "a gate is connected");
    server.metrics.links.inc();
    let result = converse(server, id, lines, messages, sender).await;
    server.metrics.links.dec();
    tracing::info!(gate = pod, %ip, error = result.as_ref().err().map(ToString::to_string), "a gate is gone");
    result
}

/// Takes the link out of the gates' state, however it ends.
struct Gone<'a> {
    gates: &'a Gates,
    id: LinkId,
}

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        self.gates.disconnect(self.id);
    }
}

async fn converse(
    server: &LinkServer,
    id: LinkId,
    mut lines: Lines,
    mut messages: tokio::sync::mpsc::Receiver<ToGate>,
    sender: tokio::sync::mpsc::Sender<ToGate>,
) -> Result<(), LinkError> {
    let mut state = server.leadership.state();
    let not_leading = async move {
        let _ = state
            .wait_for(|state| !matches!(state, LeaderState::Leading { .. }))
            .await;
    };
    let out = async {
        while let Some(message) = messages.recv().await {
            if sender.send(message).await.is_err() {
                break;
            }
        }
    };
    let within = async {
        while let Some(message) = next(&mut lines).await? {
            match message {
                FromGate::Hello { .. } => return Err(LinkError::Broken("it said Hello twice".to_owned())),
                FromGate::Report { ports, workloads } => {
                    if !server.gates.report(id, ports, workloads) {
                        return Err(LinkError::TooMany);
                    }
                }
                FromGate::Held { id: hold, busy } => server.gates.held(id, hold, busy),
                FromGate::Stopping => server.gates.stopping(id),
            }
        }
        Ok(())
    };
    tokio::select! {
        result = within => result,
        // The gate does not read any more, or another link of the same gate took over.
        () = out => Ok(()),
        () = not_leading => Err(LinkError::NotLeading),
        () = server.shutdown.cancelled() => Ok(()),
    }
}
