//! The batch: who runs, who waits, how fast tokens come, and the counters that `/metrics` shows.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Duration, Instant};

use super::{Args, Fail};

/// The server's state behind every request.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) model: String,
    pub(super) fail: Fail,
    token_rate: f64,
    max_running: u32,
    /// First come, first served.
    places: Arc<Semaphore>,
    loaded: AtomicBool,
    running: AtomicU64,
    waiting: AtomicU64,
    prompt_tokens: AtomicU64,
    generated_tokens: AtomicU64,
    stopped: AtomicU64,
    reached_length: AtomicU64,
    aborted: AtomicU64,
    served: AtomicU64,
    one_more: Notify,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finish {
    Stop,
    Length,
}

impl Finish {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

impl Engine {
    pub(super) fn new(args: &Args) -> Self {
        Self {
            model: args.model.clone(),
            fail: args.fail,
            token_rate: args.token_rate,
            max_running: args.max_running,
            places: Arc::new(Semaphore::new(args.max_running as usize)),
            loaded: AtomicBool::new(false),
            running: AtomicU64::new(0),
            waiting: AtomicU64::new(0),
            prompt_tokens: AtomicU64::new(0),
            generated_tokens: AtomicU64::new(0),
            stopped: AtomicU64::new(0),
            reached_length: AtomicU64::new(0),
            aborted: AtomicU64::new(0),
            served: AtomicU64::new(0),
            one_more: Notify::new(),
        }
    }

    pub(super) fn set_loaded(&self) {
        self.loaded.store(true, Relaxed);
    }

    pub(super) fn is_loaded(&self) -> bool {
        self.loaded.load(Relaxed)
    }

    pub(super) fn running(&self) -> u64 {
        self.running.load(Relaxed)
    }

    pub(super) fn waiting(&self) -> u64 {
        self.waiting.load(Relaxed)
    }

    /// Waits until that many answers were given in all.
    pub(super) async fn answered(&self, answers: u64) {
        // One waiter, and `notify_one` keeps its permit: no answer is missed between the look and the wait.
        while self.served.load(Relaxed) < answers {
            self.one_more.notified().await;
        }
    }

    /// Waits for a place in the batch. A client that leaves while it waits frees its place in the queue.
    pub(super) async fn start(self: &Arc<Self>, prompt_tokens: u64) -> Running {
        let waiting = Waiting::new(self);
        let place = Arc::clone(&self.places).acquire_owned().await;
        drop(waiting);
        self.running.fetch_add(1, Relaxed);
        self.prompt_tokens.fetch_add(prompt_tokens, Relaxed);
        Running {
            engine: Arc::clone(self),
            // The semaphore is never closed; were it, the request would run unbounded rather than fail.
            _place: place.ok(),
            begun: Instant::now(),
            tokens: 0,
            finished: false,
        }
    }

    /// vLLM's metrics in Prometheus' text format.
    pub(super) fn metrics(&self) -> String {
        let running = self.running();
        #[allow(clippy::cast_precision_loss, reason = "a count of requests")]
        let cache = (running as f64 / f64::from(self.max_running)).min(1.0);
        let get = |counter: &AtomicU64| counter.load(Relaxed).to_string();
        let model = escaped(&self.model);
        let mut text = String::new();
        let mut one = |name: &str, kind: &str, help: &str, samples: &[(&str, String)]| {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (labels, value) in samples {
                let _ = writeln!(
                    text,
                    "{name}{{engine=\"0\",{labels}model_name=\"{model}\"}} {value}"
                );
            }
        };
        one(
            "vllm:num_requests_running",
            "gauge",
            "Number of requests in model execution batches.",
            &[("", running.to_string())],
        );
        one(
            "vllm:num_requests_waiting",
            "gauge",
            "Number of requests waiting to be processed.",
            &[("", get(&self.waiting))],
        );
        one(
            "vllm:kv_cache_usage_perc",
            "gauge",
            "KV-cache usage. 1 means 100 percent usage.",
            &[("", format!("{cache}"))],
        );
        one(
            "vllm:prompt_tokens_total",
            "counter",
            "Number of prefill tokens processed.",
            &[("", get(&self.prompt_tokens))],
        );
        one(
            "vllm:generation_tokens_total",
            "counter",
            "Number of generation tokens processed.",
            &[("", get(&self.generated_tokens))],
        );
        one(
            "vllm:request_success_total",
            "counter",
            "Count of successfully processed requests.",
            &[
                ("finished_reason=\"stop\",", get(&self.stopped)),
                ("finished_reason=\"length\",", get(&self.reached_length)),
                ("finished_reason=\"abort\",", get(&self.aborted)),
            ],
        );
        text
    }
}

fn escaped(label: &str) -> String {
    label
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

/// Counts as waiting for as long as it exists.
struct Waiting<'a>(&'a Engine);

impl<'a> Waiting<'a> {
    fn new(engine: &'a Engine) -> Self {
        engine.waiting.fetch_add(1, Relaxed);
        Self(engine)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Relaxed);
    }
}

/// A request in the batch. Dropped before [`Running::finish`], it counts as aborted.
#[derive(Debug)]
pub(super) struct Running {
    engine: Arc<Engine>,
    _place: Option<OwnedSemaphorePermit>,
    begun: Instant,
    tokens: u64,
    finished: bool,
}

impl Running {
    /// Waits until the next token is due. Due times are counted from the start, so a busy machine catches up instead
    /// of slowing down for good.
    pub(super) async fn token(&mut self) {
        self.tokens += 1;
        self.engine.generated_tokens.fetch_add(1, Relaxed);
        #[allow(clippy::cast_precision_loss, reason = "bounded by the longest answer")]
        let due = self.tokens as f64 / self.engine.token_rate;
        // A rate of a token in many years is asked for by nobody but a test.
        let due = Duration::try_from_secs_f64(due).unwrap_or(Duration::from_secs(u32::MAX.into()));
        tokio::time::sleep_until(self.begun + due).await;
    }

    pub(super) fn engine(&self) -> &Engine {
        &self.engine
    }

    pub(super) fn finish(mut self, why: Finish) {
        let counter = match why {
            Finish::Stop => &self.engine.stopped,
            Finish::Length => &self.engine.reached_length,
        };
        counter.fetch_add(1, Relaxed);
        self.finished = true;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let engine = &self.engine;
        engine.running.fetch_sub(1, Relaxed);
        if self.finished {
            engine.served.fetch_add(1, Relaxed);
            engine.one_more.notify_one();
        } else {
            engine.aborted.fetch_add(1, Relaxed);
        }
    }
}
