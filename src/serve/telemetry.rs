//! Log lines: JSON in a cluster, text for people.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// How the process logs.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// What to log, as `info` or `info,ebb::gate=debug`.
    #[arg(long, env = "EBB_LOG", default_value = "info", global = true)]
    pub log: String,
    /// `json` or `text`; by default text on a terminal, JSON elsewhere.
    #[arg(long, env = "EBB_LOG_FORMAT", value_parser = ["json", "text"], global = true)]
    pub log_format: Option<String>,
}

/// Starts logging to stderr. A filter that cannot be read falls back to `info`, and says so.
pub fn init(args: &Args) {
    let (filter, problem) = match EnvFilter::try_new(&args.log) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new("info"), Some(error)),
    };
    let json = match args.log_format.as_deref() {
        Some(format) => format == "json",
        None => !std::io::stderr().is_terminal(),
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    if json {
        builder.json().flatten_event(true).init();
    } else {
        builder.init();
    }
    if let Some(error) = problem {
        tracing::warn!(filter = args.log, %error, "cannot read --log; logging at info");
    }
}
