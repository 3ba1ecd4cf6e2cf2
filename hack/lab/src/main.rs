//! `lab`: one program for every part of the development cluster.

use clap::{Parser, Subcommand};

/// A local Kubernetes control plane with stand-in GPU nodes and model servers.
#[derive(Parser)]
#[command(name = "lab", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Bring a cluster up and keep it until Ctrl-C.
    Up(ebb_lab::cluster::Args),
    /// Run stand-in nodes: pods become real processes.
    Nodes(ebb_lab::node::Args),
    /// Becomes a container; started by the nodes.
    #[command(hide = true)]
    NodeExec(ebb_lab::node::exec::Args),
    /// Run a stand-in model server.
    Model(ebb_lab::model::Args),
    /// Run a stand-in node group behind Ebb's `http` provider API.
    Group(Box<ebb_lab::group::Args>),
    /// Run Ebb's whole story on a fresh cluster and print what happened.
    Demo(ebb_lab::demo::Args),
    /// Run one benchmark by name.
    Bench(ebb_lab::bench::Args),
    /// Put a cluster under pressure.
    Soak(ebb_lab::soak::Args),
}

fn main() -> std::process::ExitCode {
    // Two crypto providers in one tree make rustls panic at first use; say which one before anything else.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Up(args) => ebb_lab::cluster::run(args),
        Command::Nodes(args) => ebb_lab::node::run(args),
        Command::NodeExec(args) => ebb_lab::node::exec::run(args),
        Command::Model(args) => ebb_lab::model::run(args),
        Command::Group(args) => ebb_lab::group::run(*args),
        Command::Demo(args) => ebb_lab::demo::run(args),
        Command::Bench(args) => ebb_lab::bench::run(args),
        Command::Soak(args) => ebb_lab::soak::run(args),
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
