//! The process that holds webhook, extender and reconcilers, and leads by Lease.

mod conditions;
mod facts;
mod gates;
mod headless;
mod link;
mod metrics;
mod nodes;
mod reach;
mod reconcile;
mod services;
mod tokens;
mod workloads;

use tokio_util::sync::CancellationToken;

/// Arguments of the process.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs until `shutdown` is cancelled, then finishes what it holds.
///
/// # Errors
/// When it cannot start, with what to do about it.
pub async fn run(_args: Args, _shutdown: CancellationToken) -> anyhow::Result<()> {
    anyhow::bail!("not built yet")
}
