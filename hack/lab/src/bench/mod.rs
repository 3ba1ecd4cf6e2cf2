//! Benchmarks, one entry for all: `lab bench NAME` prints a table, and `--json FILE` writes the same for machines.
//!
//! A figure is a ratio of interleaved pairs wherever it can be, so that it says the same on another
//! machine. `report` is the table and the file; each benchmark is a file of its own.

pub mod report;
mod waiting;
mod wake;

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use crate::node;
use report::Report;

/// Longest that any benchmark may take.
const LIMIT: Duration = Duration::from_secs(540);

/// Arguments of the subcommand.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Which benchmark: `wake` (a sleeping model's first request, beside a bare scale-up), `waiting` (a pod that has
    /// room, beside many that wait for some).
    #[arg(value_enum)]
    name: Name,
    /// Write the figures to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Pairs to measure.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(3..=200))]
    rounds: u32,
    /// Pods that wait, for `waiting`.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=2000))]
    pods: u32,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Name {
    Wake,
    Waiting,
}

/// Runs the subcommand to its end.
///
/// # Errors
/// Says what could not be measured.
pub fn run(args: Args) -> anyhow::Result<()> {
    crate::demo::quiet_logs();
    let report: Report = node::runtime()?.block_on(async {
        let bench = async {
            match args.name {
                Name::Wake => wake::run(args.rounds).await,
                Name::Waiting => waiting::run(args.rounds, args.pods).await,
            }
        };
        tokio::select! {
            report = tokio::time::timeout(LIMIT, bench) => {
                report.unwrap_or_else(|_| Err(anyhow::anyhow!("not measured within {} s", LIMIT.as_secs())))
            }
            stopped = node::stopped() => {
                stopped?;
                anyhow::bail!("stopped before the end")
            }
        }
    })?;
    report.print();
    if let Some(file) = args.json {
        report.write(&file)?;
    }
    Ok(())
}

/// One line on stderr, redrawn on a terminal.
fn progress(text: &str) {
    let mut out = std::io::stderr().lock();
    let _ = if std::io::IsTerminal::is_terminal(&out) {
        write!(out, "\r\x1b[K{text}").and_then(|()| out.flush())
    } else if text.is_empty() {
        Ok(())
    } else {
        writeln!(out, "{text}")
    };
}
