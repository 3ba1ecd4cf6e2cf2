//! Benchmarks, one entry for all: `lab bench NAME` prints a table, and `--json FILE` writes the same for machines.
//!
//! A figure is a ratio of interleaved pairs wherever it can be, so that it says the same on another
//! machine. `report` is the table and the file; each benchmark is a file of its own.

pub mod chance;
mod memory;
pub mod report;
mod scheduler;
mod waiting;
mod wake;

use std::path::PathBuf;
use std::time::Duration;

use crate::node;
use report::Report;

/// Longest that any benchmark may take.
const LIMIT: Duration = Duration::from_secs(1200);

/// Arguments of the subcommand.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    bench: Bench,
    /// Write the figures to this file as JSON.
    #[arg(long, value_name = "FILE", global = true)]
    json: Option<PathBuf>,
}

#[derive(Debug, clap::Subcommand)]
enum Bench {
    /// A sleeping model's first request, beside a bare scale-up.
    Wake {
        /// Pairs to measure.
        #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(3..=200))]
        rounds: u32,
    },
    /// Pods a second with Ebb as the scheduler's extender, beside the same scheduler without.
    Scheduler(scheduler::Args),
    /// A pod that has room, beside many that wait for some.
    Waiting {
        /// Pairs to measure.
        #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(3..=200))]
        rounds: u32,
        /// Pods that wait.
        #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=2000))]
        pods: u32,
    },
    /// The controller's memory on a large cluster.
    Memory(memory::Args),
}

/// Runs the subcommand to its end.
///
/// # Errors
/// Says what could not be measured.
pub fn run(args: Args) -> anyhow::Result<()> {
    crate::demo::quiet_logs();
    let bench = async {
        match args.bench {
            Bench::Wake { rounds } => wake::run(rounds).await,
            Bench::Scheduler(args) => scheduler::run(args).await,
            Bench::Waiting { rounds, pods } => waiting::run(rounds, pods).await,
            Bench::Memory(args) => memory::run(args).await,
        }
    };
    let report = within(LIMIT, bench)?;
    report.print();
    if let Some(file) = args.json {
        report.write(&file)?;
    }
    Ok(())
}

/// Runs to the end, at most so long, or until Ctrl-C.
pub(crate) fn within(
    limit: Duration,
    measuring: impl Future<Output = anyhow::Result<Report>>,
) -> anyhow::Result<Report> {
    node::runtime()?.block_on(async {
        tokio::select! {
            report = tokio::time::timeout(limit, measuring) => {
                report.unwrap_or_else(|_| Err(anyhow::anyhow!("not measured within {} s", limit.as_secs())))
            }
            stopped = node::stopped() => {
                stopped?;
                anyhow::bail!("stopped before the end")
            }
        }
    })
}
