//! Soaks, one entry for all: `lab soak NAME` puts a cluster under pressure and fails when anything came out of it that
//! must not be. `--json FILE` writes the figures for machines. Each soak is a file of its own.

pub mod burst;

use std::path::PathBuf;
use std::time::Duration;

use crate::bench::within;

/// Longest that any soak may take.
const LIMIT: Duration = Duration::from_secs(1200);

/// Arguments of the subcommand.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    soak: Soak,
    /// Write the figures to this file as JSON.
    #[arg(long, value_name = "FILE", global = true)]
    json: Option<PathBuf>,
}

#[derive(Debug, clap::Subcommand)]
enum Soak {
    /// Pods that exactly fill the cluster's GPUs, all at once.
    Burst(burst::Args),
}

/// Runs the subcommand to its end.
///
/// # Errors
/// Says what must not be and was.
pub fn run(args: Args) -> anyhow::Result<()> {
    crate::demo::quiet_logs();
    let mut missed = Vec::new();
    let soak = async {
        match args.soak {
            Soak::Burst(args) => burst::run(args, &mut missed).await,
        }
    };
    let report = within(LIMIT, soak)?;
    report.print();
    if let Some(file) = args.json {
        report.write(&file)?;
    }
    anyhow::ensure!(missed.is_empty(), "{}", missed.join("; "));
    Ok(())
}
