//! `lab up`: a cluster for a person to use, until Ctrl-C.

use std::time::Instant;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use super::{Cluster, Options};

/// Arguments of the subcommand.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Keep the folder with logs and data when the cluster ends.
    #[arg(long)]
    keep: bool,
}

/// Brings a cluster up and keeps it until Ctrl-C or SIGTERM.
///
/// # Errors
/// If the cluster does not come up, or one of its programs ends by itself.
pub fn run(args: Args) -> anyhow::Result<()> {
    tokio::runtime::Runtime::new()
        .context("starting the runtime")?
        .block_on(keep_up(args))
}

async fn keep_up(args: Args) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let began = Instant::now();
    eprintln!("lab: bringing a Kubernetes control plane up");
    let options = Options {
        keep: args.keep || Options::default().keep,
        ..Options::default()
    };
    let cluster = tokio::select! {
        cluster = Cluster::up(options) => cluster?,
        _ = interrupt.recv() => return Ok(()),
        _ = terminate.recv() => return Ok(()),
    };
    eprintln!("lab: up after {:.1} s", began.elapsed().as_secs_f64());
    eprintln!("  try it     hack/enter kubectl get namespaces");
    eprintln!("  a shell    hack/enter");
    eprintln!("  its logs   {}", cluster.dir().display());
    eprintln!("  Ctrl-C ends it and removes everything");
    let outcome = tokio::select! {
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
        error = cluster.first_end() => Err(error),
    };
    eprintln!("lab: taking it down");
    cluster.down().await;
    outcome
}
