//! Arguments → one process.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use ebb::serve::telemetry;

/// Lets GPU model servers sleep, wakes them on the first request, packs them
/// by GPU memory, and gives emptied GPU nodes back.
#[derive(Parser)]
#[command(name = "ebb", version, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    telemetry: telemetry::Args,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Decide and act for the whole cluster: webhook, scheduler extender, scaling, nodes.
    Controller(ebb::controller::Args),
    /// Take the traffic of managed Services, and hold it while a model wakes.
    Gate(ebb::gate::Args),
    /// Publish the GPUs of this node (runs on every GPU node).
    Agent(ebb::agent::Args),
    /// Print the CustomResourceDefinitions as YAML.
    Crds,
    /// Print what registers Ebb with kube-scheduler, as YAML.
    Scheduler(ebb::extender::registration::Args),
}

/// Exit code for arguments or configuration that cannot work (`EX_USAGE`): a restart will not help.
const USAGE: u8 = 64;

fn main() -> ExitCode {
    // Two crypto providers in one dependency tree make rustls panic at first use, so say which before anything else.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::from(USAGE)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    if let Command::Crds = cli.command {
        print!("{}", ebb::api::crds_yaml());
        return ExitCode::SUCCESS;
    }
    telemetry::init(&cli.telemetry);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("ebb: cannot start the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(async {
        let shutdown = ebb::serve::shutdown::on_signals()?;
        match cli.command {
            Command::Controller(args) => ebb::controller::run(args, shutdown).await,
            Command::Gate(args) => ebb::gate::run(args, shutdown).await,
            Command::Agent(args) => ebb::agent::run(args, shutdown).await,
            Command::Crds => Ok(()),
            Command::Scheduler(args) => ebb::extender::registration::run(args).await,
        }
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "stopped by an error");
            ExitCode::FAILURE
        }
    }
}
