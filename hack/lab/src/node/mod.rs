//! Stand-in nodes: kubelets that start a real process per container.
//!
//! A pod's way through here: the one watch of [`nodes`] hands it to the worker in
//! `worker`, which sets up its `volumes` and runs each `container`: the `environment` is
//! resolved, `process` starts the program of the image (through `exec`, which makes its
//! mount namespace), `probes` judge it, and `report` writes what `status` computes from all that.
//!
//! What differs from a kubelet: all pods share one network namespace, so a process must listen on its
//! own pod address; images are programs of this machine; users, resource limits and security contexts
//! are not enforced; there are no PersistentVolumes, no image volumes and no ephemeral containers.

mod atomic_dir;
mod backoff;
mod call;
mod cgroups;
mod container;
mod environment;
mod events;
pub mod exec;
mod expand;
mod fields;
pub mod images;
mod kubelet_api;
mod machine;
pub mod nodes;
mod pod;
pub mod pod_resources;
mod probes;
mod process;
pub mod quantity;
mod registration;
mod report;
mod runtime;
mod services;
pub mod spec;
mod status;
mod supervise;
mod volumes;
mod worker;

pub use images::Images;
pub use nodes::Nodes;
pub use runtime::{Options, lab_program};
pub use spec::NodeSpec;

use crate::client;
use anyhow::Context as _;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// Settings of everything that runs nodes.
#[derive(Debug, clap::Args)]
pub struct Common {
    /// How to reach the cluster.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: PathBuf,
    /// Folder for logs (pods/NS_POD_UID/CONTAINER.log), volumes and GPU state (nodes/NODE/nvml.state).
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// The program that stands for a container image; may be repeated.
    #[arg(long = "image", value_name = "NAME=PATH")]
    pub images: Vec<String>,
    /// Folder of libnvidia-ml.so.1 (default: the one built with this program).
    #[arg(long, value_name = "DIR")]
    pub libraries: Option<PathBuf>,
    /// First pause of a crash loop, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    pub restart_backoff: f64,
    /// How often mounted ConfigMaps, Secrets and tokens are brought up to date, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0)]
    pub volume_refresh: f64,
}

impl Common {
    /// The options these settings ask for, with nodes from `first_index` on.
    ///
    /// # Errors
    /// Says which setting is wrong.
    pub fn options(&self, first_index: u8) -> anyhow::Result<Options> {
        let images = Images::default();
        for text in &self.images {
            images.add_text(text).map_err(anyhow::Error::msg)?;
        }
        let mut options = Options::new(&self.dir, images)?;
        options.first_index = first_index;
        let seconds = |value: f64, name: &str| {
            Duration::try_from_secs_f64(value)
                .map_err(|_| anyhow::anyhow!("--{name} {value} is no number of seconds"))
        };
        options.restart_backoff = seconds(self.restart_backoff, "restart-backoff")?;
        options.volume_refresh =
            seconds(self.volume_refresh, "volume-refresh")?.max(Duration::from_millis(100));
        if let Some(dir) = &self.libraries {
            options.libraries = dir
                .canonicalize()
                .with_context(|| format!("reading {}", dir.display()))?;
        }
        Ok(options)
    }
}

/// Arguments of the subcommand.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    /// A node, e.g. `gpu-a=gpus:2,gpu-memory:24Gi,card:NVIDIA L4,label:k=v,taint:k=v:NoSchedule,cpu:16,memory:64Gi,pods:110`
    /// or just its name for one without GPUs; may be repeated.
    #[arg(long = "node", value_name = "NAME[=SPEC]", required = true, value_parser = |text: &str| text.parse::<NodeSpec>())]
    nodes: Vec<NodeSpec>,
    /// The nodes get 10.77.N.0/24 and so on from here; keep processes on one cluster apart.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..))]
    first_index: u8,
}

/// Runs the subcommand to its end.
///
/// # Errors
/// Says what failed and what to do next.
pub fn run(args: Args) -> anyhow::Result<()> {
    logs();
    let options = args.common.options(args.first_index)?;
    runtime()?.block_on(async move {
        let nodes = Nodes::start(client::from_kubeconfig(&args.common.kubeconfig).await?, options).await?;
        for spec in args.nodes {
            let name = spec.name.clone();
            nodes.add(spec).await?;
            println!("node {name} is up");
        }
        stopped().await?;
        nodes.power_off().await;
        Ok(())
    })
}

/// Returns at SIGINT or SIGTERM.
///
/// # Errors
/// When the handlers cannot be set.
pub async fn stopped() -> anyhow::Result<()> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    Ok(())
}

pub(crate) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting the async runtime")
}

pub(crate) fn logs() {
    let filter =
        tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info,kube=warn".into());
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .try_init();
}

/// Locks; a panic of another holder leaves data that is still whole here.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
