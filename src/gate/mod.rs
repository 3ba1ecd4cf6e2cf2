//! The process that takes the traffic, counts it, and holds it while a model wakes.

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
