//! HTTP: the part of vLLM's OpenAI server that clients, probes and scrapers use.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures::{Stream, StreamExt, stream};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Fail;
use super::engine::{Engine, Finish, Running};

/// Prompts with images are large; past this it is a mistake.
const MAX_BODY: usize = 64 << 20;
/// An answer without `max_tokens` ends by itself after this many tokens.
const USUAL_TOKENS: u64 = 16;
/// vLLM's context length, as `/v1/models` tells it; no answer is longer.
const MAX_TOKENS: u64 = 131_072;
/// The longest that `x-lab-delay-ms` can hold an answer.
const MAX_DELAY: Duration = Duration::from_secs(600);

type Shared = State<Arc<Engine>>;

/// All paths.
pub(super) fn router(engine: Arc<Engine>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completion))
        .route("/v1/models", get(models))
        .route("/health", get(health))
        .route("/ping", get(health).post(health))
        .route("/metrics", get(metrics))
        .route(
            "/version",
            get(|| async { axum::Json(json!({"version": "0.11.0+lab"})) }),
        )
        .fallback(|| async { error(StatusCode::NOT_FOUND, "NotFoundError", "Not Found", None) })
        .layer(from_fn_with_state(Arc::clone(&engine), only_when_loaded))
        // Outside the layer: what the container was given can be asked for while it loads.
        .route("/env", get(|| async { axum::Json(super::environment()) }))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(engine)
}

async fn only_when_loaded(State(engine): Shared, request: Request, next: Next) -> Response {
    if engine.is_loaded() {
        return next.run(request).await;
    }
    error(
        StatusCode::SERVICE_UNAVAILABLE,
        "ServiceUnavailableError",
        "The model is still loading.",
        None,
    )
}

async fn health() -> StatusCode {
    StatusCode::OK
}

async fn metrics(State(engine): Shared) -> impl IntoResponse {
    (
        [(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")],
        engine.metrics(),
    )
}

async fn models(State(engine): Shared) -> impl IntoResponse {
    axum::Json(json!({"object": "list", "data": [{
        "id": engine.model, "object": "model", "created": now(), "owned_by": "vllm", "root": engine.model,
        "parent": null, "max_model_len": MAX_TOKENS,
    }]}))
}

/// What the two kinds of completion have in common.
#[derive(Debug, Deserialize)]
struct Ask {
    model: Option<String>,
    messages: Option<Vec<Value>>,
    prompt: Option<Value>,
    max_tokens: Option<i64>,
    max_completion_tokens: Option<i64>,
    #[serde(default)]
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Chat,
    Text,
}

/// An answer that is about to be given.
#[derive(Debug)]
struct Plan {
    kind: Kind,
    id: String,
    created: u64,
    model: String,
    prompt_tokens: u64,
    tokens: u64,
    finish: Finish,
    include_usage: bool,
}

async fn chat(State(engine): Shared, headers: HeaderMap, body: Bytes) -> Response {
    complete(Kind::Chat, engine, &headers, &body).await
}

async fn completion(State(engine): Shared, headers: HeaderMap, body: Bytes) -> Response {
    complete(Kind::Text, engine, &headers, &body).await
}

async fn complete(kind: Kind, engine: Arc<Engine>, headers: &HeaderMap, body: &[u8]) -> Response {
    let (plan, streamed) = match plan(kind, &engine.model, body) {
        Ok(planned) => planned,
        Err(refusal) => return refusal,
    };
    let running = engine.start(plan.prompt_tokens).await;
    if let Some(delay) = delay(headers) {
        tokio::time::sleep(delay).await;
    }
    if engine.fail == Fail::Error {
        running.finish(Finish::Stop);
        return error(
            StatusCode::INTERNAL_SERVER_ERROR,
            "InternalServerError",
            "Internal server error",
            None,
        );
    }
    if streamed {
        let body = Body::from_stream(events(plan, running));
        return ([(CONTENT_TYPE, "text/event-stream; charset=utf-8")], body).into_response();
    }
    whole(&plan, running).await
}

fn delay(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("x-lab-delay-ms")?.to_str().ok()?;
    Some(Duration::from_millis(text.parse().ok()?).min(MAX_DELAY))
}

#[allow(clippy::result_large_err, reason = "the refusal is the answer, made once")]
fn plan(kind: Kind, served: &str, body: &[u8]) -> Result<(Plan, bool), Response> {
    let bad = |message: &str, param| error(StatusCode::BAD_REQUEST, "BadRequestError", message, param);
    let ask: Ask = serde_json::from_slice(body).map_err(|e| bad(&format!("Invalid JSON body: {e}"), None))?;
    if let Some(model) = ask.model.as_deref().filter(|model| *model != served) {
        let message = format!("The model `{model}` does not exist.");
        return Err(error(
            StatusCode::NOT_FOUND,
            "NotFoundError",
            &message,
            Some("model"),
        ));
    }
    let prompt_tokens = match kind {
        Kind::Chat => match &ask.messages {
            Some(messages) if !messages.is_empty() => messages.iter().map(count_tokens).sum(),
            _ => return Err(bad("Field required: messages", Some("messages"))),
        },
        Kind::Text => count_tokens(
            ask.prompt
                .as_ref()
                .ok_or_else(|| bad("Field required: prompt", Some("prompt")))?,
        ),
    };
    let (tokens, finish) = match ask.max_completion_tokens.or(ask.max_tokens) {
        None => (USUAL_TOKENS, Finish::Stop),
        Some(most) => match u64::try_from(most) {
            Ok(most @ 1..=MAX_TOKENS) => (most, Finish::Length),
            Ok(1..) => {
                return Err(bad(
                    &format!("max_tokens must be at most {MAX_TOKENS}, got {most}."),
                    Some("max_tokens"),
                ));
            }
            _ => {
                return Err(bad(
                    &format!("max_tokens must be at least 1, got {most}."),
                    Some("max_tokens"),
                ));
            }
        },
    };
    let plan = Plan {
        kind,
        id: id(kind),
        created: now(),
        model: served.to_owned(),
        prompt_tokens,
        tokens,
        finish,
        include_usage: ask.stream_options.is_some_and(|options| options.include_usage),
    };
    Ok((plan, ask.stream.unwrap_or(false)))
}

/// A word is a token, near enough.
fn count_tokens(value: &Value) -> u64 {
    match value {
        Value::String(text) => text.split_whitespace().count() as u64,
        Value::Array(parts) => parts.iter().map(count_tokens).sum(),
        Value::Object(fields) => ["content", "text"]
            .iter()
            .filter_map(|key| fields.get(*key))
            .map(count_tokens)
            .sum(),
        Value::Number(_) => 1,
        _ => 0,
    }
}

fn id(kind: Kind) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
    format!(
        "{prefix}-{:x}-{:x}",
        std::process::id(),
        NEXT.fetch_add(1, Relaxed)
    )
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

impl Plan {
    /// The text of the n-th token, from 0.
    fn token(place: u64) -> &'static str {
        const WORDS: [&str; 8] = [
            "the", " tide", " goes", " out", " and", " comes", " back", " again,",
        ];
        WORDS[usize::try_from(place % 8).unwrap_or(0)]
    }

    fn usage(&self) -> Value {
        json!({"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens,
            "total_tokens": self.prompt_tokens + self.tokens})
    }

    fn object(&self, chunk: bool, choices: Value) -> Value {
        let object = match (self.kind, chunk) {
            (Kind::Chat, false) => "chat.completion",
            (Kind::Chat, true) => "chat.completion.chunk",
            (Kind::Text, _) => "text_completion",
        };
        json!({"id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices})
    }

    fn chunk(&self, text: &str, first: bool, finish: Option<Finish>) -> Value {
        let finish = finish.map(Finish::as_str);
        let choice = match (self.kind, first) {
            (Kind::Chat, true) => {
                json!({"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": finish})
            }
            (Kind::Chat, false) => {
                json!({"index": 0, "delta": {"content": text}, "finish_reason": finish})
            }
            (Kind::Text, _) => json!({"index": 0, "text": text, "finish_reason": finish}),
        };
        self.object(true, json!([choice]))
    }
}

async fn whole(plan: &Plan, mut running: Running) -> Response {
    let mut text = String::new();
    for place in 0..plan.tokens {
        running.token().await;
        text.push_str(Plan::token(place));
    }
    let finish = plan.finish.as_str();
    let choice = match plan.kind {
        Kind::Chat => {
            json!({"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish})
        }
        Kind::Text => json!({"index": 0, "text": text, "finish_reason": finish}),
    };
    let mut answer = plan.object(false, json!([choice]));
    answer["usage"] = plan.usage();
    if running.engine().fail == Fail::CloseMidStream {
        let full = answer.to_string().into_bytes();
        let half = Bytes::copy_from_slice(&full[..full.len() / 2]);
        let late = stream::once(async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            Err(cut())
        });
        let body = Body::from_stream(stream::iter([Ok(half)]).chain(late));
        return (
            [
                (CONTENT_TYPE, "application/json"),
                (CONTENT_LENGTH, &full.len().to_string()),
            ],
            body,
        )
            .into_response();
    }
    running.finish(plan.finish);
    axum::Json(answer).into_response()
}

/// Why the connection is cut; nobody but hyper sees it.
fn cut() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "told to fail")
}

/// Where a streamed answer is.
enum Step {
    Token(u64),
    Usage,
    Done,
    Over,
}

/// Server-sent events: one token an event, each when it is due.
fn events(plan: Plan, running: Running) -> impl Stream<Item = io::Result<Bytes>> {
    stream::unfold(
        (plan, Some(running), Step::Token(0)),
        |(plan, running, step)| async move {
            let (line, running, step) = match step {
                Step::Token(place) => {
                    let mut running = running?;
                    if running.engine().fail == Fail::CloseMidStream && place >= plan.tokens / 2 {
                        // hyper throws away what it has not written when a body fails.
                        running.token().await;
                        return Some((Err(cut()), (plan, None, Step::Over)));
                    }
                    running.token().await;
                    let last = place + 1 == plan.tokens;
                    let chunk = plan.chunk(Plan::token(place), place == 0, last.then_some(plan.finish));
                    if last {
                        running.finish(plan.finish);
                        let next = if plan.include_usage {
                            Step::Usage
                        } else {
                            Step::Done
                        };
                        (chunk.to_string(), None, next)
                    } else {
                        (chunk.to_string(), Some(running), Step::Token(place + 1))
                    }
                }
                Step::Usage => {
                    let mut chunk = plan.object(true, json!([]));
                    chunk["usage"] = plan.usage();
                    (chunk.to_string(), None, Step::Done)
                }
                Step::Done => ("[DONE]".to_owned(), None, Step::Over),
                Step::Over => return None,
            };
            Some((
                Ok(Bytes::from(format!("data: {line}\n\n"))),
                (plan, running, step),
            ))
        },
    )
}

/// An error in OpenAI's shape.
fn error(status: StatusCode, kind: &str, message: &str, param: Option<&str>) -> Response {
    let body = json!({"error": {"message": message, "type": kind, "param": param, "code": status.as_u16()}});
    (status, axum::Json(body)).into_response()
}
