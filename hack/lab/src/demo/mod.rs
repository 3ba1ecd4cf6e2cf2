//! Ebb's story, run and told: a fresh cluster, three models, and every step checked in the API server.
//!
//! `story` is what happens · `observe` is what the API server says · `traffic` sends requests ·
//! `timeline` prints · `figures` adds up · `failure` tells where to look when a step was not seen.

pub mod failure;
mod figures;
pub mod observe;
pub mod story;
pub mod timeline;
pub mod traffic;

use std::path::PathBuf;
use std::time::Duration;

use crate::ebb_install::{Plan, Site, ebb_program};
use crate::node;
use timeline::Timeline;

/// Longest that the whole story may take; one of its steps gives up long before.
const LIMIT: Duration = Duration::from_secs(300);

/// Arguments of the subcommand.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Leave the cluster running at the end, until Ctrl-C, and print what to try.
    #[arg(long)]
    keep: bool,
    /// The `ebb` program (default: the one built beside this one).
    #[arg(long, value_name = "FILE")]
    ebb: Option<PathBuf>,
}

/// Runs the subcommand to its end.
///
/// # Errors
/// Says which step was not seen.
pub fn run(args: Args) -> anyhow::Result<()> {
    quiet_logs();
    let ebb = match args.ebb {
        Some(path) => path.canonicalize()?,
        None => ebb_program()?,
    };
    node::runtime()?.block_on(tell(Plan::new(ebb), args.keep))
}

async fn tell(plan: Plan, keep: bool) -> anyhow::Result<()> {
    let timeline = Timeline::new();
    timeline.chapter("A Kubernetes control plane, a node group, Ebb");
    let start = timeline.during(
        "starting etcd, the API server, kube-proxy and the nodes",
        Box::pin(Site::start(plan)),
    );
    let mut site = unless_stopped(start).await?;
    let _feed = timeline.follow(site.observer.listen());
    let story = tokio::time::timeout(LIMIT, story::tell(&site, &timeline));
    let told = unless_stopped(async {
        Ok(story.await.unwrap_or_else(|_| {
            Err(anyhow::anyhow!(
                "the story did not end within {} s",
                LIMIT.as_secs()
            ))
        }))
    });
    if let Err(error) = Box::pin(told).await? {
        timeline.failed(format!("{error:#}"));
        failure::explain(&site, &timeline);
        site.keep_dir();
        return Err(error.context("the story was not seen to its end"));
    }
    if keep {
        story::what_to_try(&site, &timeline).await?;
        node::stopped().await?;
    }
    site.nodes.power_off().await;
    Ok(())
}

/// Does `work`, unless Ctrl-C or SIGTERM comes first: all that it started goes with it.
async fn unless_stopped<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::select! {
        done = work => done,
        stopped = node::stopped() => {
            stopped?;
            anyhow::bail!("stopped before the end")
        }
    }
}

/// Warnings only: the timeline is what a person reads.
pub(crate) fn quiet_logs() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| "error,ebb_lab=error,kube=off".into());
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .try_init();
}
