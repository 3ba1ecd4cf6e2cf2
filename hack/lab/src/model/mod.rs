//! A stand-in model server: it takes as long to load as it is told, holds GPU memory in its node's state file, and
//! then answers as vLLM's OpenAI server does.
//!
//! `memory` decides how much to hold on which GPUs · `engine` is the batch with its queue and its counters · `api`
//! is HTTP · this file is the life of the process: take memory, load, listen, finish on SIGTERM.

mod api;
mod engine;
mod memory;

use std::io::Write;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use axum::serve::ListenerExt;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use engine::Engine;
use memory::{Held, Wanted};

/// Arguments of the subcommand.
#[derive(Debug, Clone, clap::Args)]
// As vLLM's parser: the last of a repeated flag counts.
#[command(args_override_self = true)]
pub struct Args {
    /// Where to listen. Port 8000 on $POD_IP when left out, and on 127.0.0.1 outside a pod.
    #[arg(long, env = "MODEL_LISTEN")]
    listen: Option<SocketAddr>,
    /// The name that requests call the model by.
    #[arg(long, env = "MODEL_NAME", default_value = "lab/model")]
    model: String,
    /// How long loading takes.
    #[arg(long, env = "MODEL_LOAD_TIME", default_value = "2s", value_parser = duration)]
    load_time: Duration,
    /// GPU memory to hold in all, split evenly over the GPUs: bytes (`18Gi`), or `share` for
    /// $EBB_GPU_MEMORY_SHARE of each GPU. $EBB_GPU_MEMORY_BYTES when left out; vLLM's 0.92 of each GPU when that is
    /// not set either.
    #[arg(long, env = "MODEL_MEMORY")]
    memory: Option<memory::Memory>,
    /// GPU memory to hold, as a fraction of each GPU that is seen; wins over --memory.
    #[arg(long, env = "MODEL_GPU_MEMORY_UTILIZATION", value_parser = fraction)]
    gpu_memory_utilization: Option<f64>,
    /// GPU memory that loading takes on each GPU beside that, as far as it is free, and gives back: bytes (`6Gi`).
    #[arg(long, env = "MODEL_LOAD_PEAK", default_value = "0", value_parser = memory::bytes)]
    load_peak: u64,
    /// What the port does while the model loads: `closed` refuses connections, `503` answers them.
    #[arg(long, env = "MODEL_WHILE_LOADING", value_enum, default_value = "closed")]
    while_loading: WhileLoading,
    /// Tokens a second, for each request.
    #[arg(long, env = "MODEL_TOKEN_RATE", default_value = "50", value_parser = rate)]
    token_rate: f64,
    /// Requests answered at the same time; the others wait their turn.
    #[arg(long, env = "MODEL_MAX_RUNNING", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    max_running: u32,
    /// How to fail: none, crash-loading, hang-loading, close-mid-stream, error (every answer is a 500),
    /// exit-after=30s (after it began to serve) or exit-after=5 (answers).
    #[arg(long, env = "MODEL_FAIL", default_value = "none")]
    fail: Fail,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum WhileLoading {
    Closed,
    #[value(name = "503")]
    Unavailable,
}

/// One way to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fail {
    None,
    CrashLoading,
    HangLoading,
    CloseMidStream,
    Error,
    ExitAfterTime(Duration),
    ExitAfterAnswers(u64),
}

impl FromStr for Fail {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "none" | "" => Self::None,
            "crash-loading" => Self::CrashLoading,
            "hang-loading" => Self::HangLoading,
            "close-mid-stream" => Self::CloseMidStream,
            "error" => Self::Error,
            _ => {
                let after = text
                    .strip_prefix("exit-after=")
                    .ok_or("not a way to fail; see --help")?;
                match after.parse() {
                    Ok(answers) => Self::ExitAfterAnswers(answers),
                    Err(_) => Self::ExitAfterTime(duration(after)?),
                }
            }
        })
    }
}

/// `2s`, `500ms`, `1m 30s`, or seconds.
fn duration(text: &str) -> Result<Duration, String> {
    if let Ok(seconds) = text.parse() {
        return Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string());
    }
    let parsed: jiff::SignedDuration = text.parse().map_err(|error: jiff::Error| error.to_string())?;
    parsed
        .try_into()
        .map_err(|_| "a duration is not negative".to_owned())
}

fn fraction(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        // The kubelet leaves `$(NAME)` as it is when the container has no such variable.
        _ if text.starts_with("$(") => Err(format!("invalid float value: '{text}': is that variable set?")),
        _ => Err(format!(
            "GPU memory utilization must be over 0 and at most 1.0. Got {text}."
        )),
    }
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if (0.001..=1e6).contains(&value) => Ok(value),
        _ => Err("between 0.001 and 1000000 tokens a second".to_owned()),
    }
}

/// What Ebb and the node put into the environment, for tests and for people who look.
fn environment() -> Value {
    let told =
        |name: &str| name.starts_with("EBB_") || name.starts_with("POD_") || name.starts_with("NVIDIA_");
    let vars = std::env::vars().filter(|(name, _)| told(name) || name == "NODE_NAME" || name == "HOSTNAME");
    vars.map(|(name, value)| (name, Value::String(value)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// One line of the server's own log. Nobody may be reading it any more: that is no reason to stop.
fn log(event: &str, mut fields: Value) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    fields["event"] = event.into();
    fields["unix_ms"] = u64::try_from(now.as_millis()).unwrap_or(u64::MAX).into();
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{fields}").and_then(|()| out.flush());
}

/// Runs the subcommand to its end.
///
/// # Errors
/// When it cannot start: the address, the GPU's state file, or too little memory.
pub fn run(args: Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    match runtime.block_on(live(args))? {
        0 => Ok(()),
        // Not by a return: the caller's report of an error is not what a dying server prints.
        code => std::process::exit(code.into()),
    }
}

/// The exit code of a process that a signal ended, as a shell tells it.
const BY_SIGTERM: u8 = 143;
const BY_SIGINT: u8 = 130;
const CRASHED: u8 = 1;

/// What the process does next, decided by a signal, by `--fail`, or by having finished.
enum Stop {
    /// Finish what has begun, then end with 0.
    Gently,
    /// End now with this code.
    Now(u8),
}

async fn live(args: Args) -> anyhow::Result<u8> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    log("env", environment());

    let mut held = match take_memory(&args) {
        Ok(held) => held,
        Err(error) => {
            log("failed", json!({"reason": format!("{error:#}")}));
            eprintln!("{error:#}");
            return Ok(CRASHED);
        }
    };
    log("memory", held.as_json());

    let address = match (args.listen, std::env::var("POD_IP")) {
        (Some(address), _) => address,
        (None, Ok(ip)) => SocketAddr::new(ip.parse().context("POD_IP is not an IP address")?, 8000),
        (None, Err(_)) => SocketAddr::from(([127, 0, 0, 1], 8000)),
    };
    let engine = Arc::new(Engine::new(&args));
    let stop = CancellationToken::new();

    let early = match args.while_loading {
        WhileLoading::Closed => None,
        WhileLoading::Unavailable => Some(listen(address, &engine, &stop).await?),
    };
    tokio::select! {
        _ = terminate.recv() => return Ok(BY_SIGTERM),
        _ = interrupt.recv() => return Ok(BY_SIGINT),
        loaded = load(&args) => if loaded.is_err() {
            log("failed", json!({"reason": "crash while loading"}));
            eprintln!("RuntimeError: Engine core initialization failed. See root cause above.");
            return Ok(CRASHED);
        }
    }
    held.settle()?;
    engine.set_loaded();
    let server = match early {
        Some(server) => {
            log("ready", json!({"at": address.to_string()}));
            server
        }
        None => listen(address, &engine, &stop).await?,
    };

    let next = tokio::select! {
        _ = terminate.recv() => Stop::Gently,
        _ = interrupt.recv() => Stop::Now(BY_SIGINT),
        () = fails(args.fail, &engine) => Stop::Now(CRASHED),
    };
    let code = match next {
        Stop::Now(code) => code,
        Stop::Gently => {
            log(
                "stopping",
                json!({"running": engine.running(), "waiting": engine.waiting()}),
            );
            stop.cancel();
            tokio::select! {
                done = server => { done.context("the server task")?; 0 }
                _ = terminate.recv() => BY_SIGTERM,
                _ = interrupt.recv() => BY_SIGINT,
            }
        }
    };
    drop(held);
    log("stopped", json!({"code": code}));
    Ok(code)
}

fn take_memory(args: &Args) -> anyhow::Result<Held> {
    let env = |name: &str| std::env::var(name).ok();
    let wanted = Wanted::choose(args.gpu_memory_utilization, args.memory, env)?;
    Held::take(wanted, args.load_peak, env)
}

/// Loading: the time passes, or it fails as asked.
async fn load(args: &Args) -> Result<(), ()> {
    match args.fail {
        Fail::HangLoading => std::future::pending().await,
        Fail::CrashLoading => {
            tokio::time::sleep(args.load_time / 2).await;
            Err(())
        }
        _ => {
            tokio::time::sleep(args.load_time).await;
            Ok(())
        }
    }
}

/// Ends when the server is to crash; never, mostly.
async fn fails(fail: Fail, engine: &Engine) {
    match fail {
        Fail::ExitAfterTime(time) => tokio::time::sleep(time).await,
        Fail::ExitAfterAnswers(answers) => {
            engine.answered(answers).await;
            // The last answer is still on its way out of this process.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        _ => std::future::pending().await,
    }
}

async fn listen(
    address: SocketAddr,
    engine: &Arc<Engine>,
    stop: &CancellationToken,
) -> anyhow::Result<tokio::task::JoinHandle<()>> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}"))?;
    let at = listener.local_addr()?;
    log("listening", json!({"at": at.to_string()}));
    // A token is one small write: without this the next one waits for the client's acknowledgement.
    let listener = listener.tap_io(|stream| {
        let _ = stream.set_nodelay(true);
    });
    let serve = axum::serve(listener, api::router(Arc::clone(engine)))
        .with_graceful_shutdown(stop.clone().cancelled_owned());
    Ok(tokio::spawn(async move {
        if let Err(error) = serve.await {
            log("failed", json!({"reason": error.to_string()}));
        }
    }))
}
