//! A stand-in model server.

/// Arguments of the subcommand.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs the subcommand to its end.
///
/// # Errors
/// Says what failed and what to do next.
pub fn run(_args: Args) -> anyhow::Result<()> {
    anyhow::bail!("not built yet")
}
