//! The stand-in node group behind Ebb's `http` provider: asked for a node it boots
//! one after a while, asked to take one away it does, and it writes down every call.

mod api;
mod journal;
mod ledger;

pub use api::Group;
pub use ledger::{Failure, NodeState};

use crate::node::{self, NodeSpec, Nodes, quantity};
use anyhow::Context as _;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The label that tells a node's group.
pub const GROUP_LABEL: &str = "ebb.dev/node-group";

/// What a node group is like.
#[derive(Clone, Debug)]
pub struct GroupSpec {
    /// Its name; nodes are called NAME-1, NAME-2 and so on.
    pub name: String,
    /// The most nodes it has at once.
    pub max: usize,
    /// From being asked for to registering.
    pub boot_time: Duration,
    /// What each node looks like, its name aside.
    pub template: NodeSpec,
    /// The journal, one JSON line per call.
    pub journal: Option<PathBuf>,
    /// How it fails.
    pub failure: Failure,
}

/// Arguments of the subcommand.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: node::Common,
    /// The group's name.
    #[arg(long, value_name = "NAME")]
    group: String,
    /// The most nodes it has at once.
    #[arg(long, value_name = "N", default_value_t = 4)]
    max: usize,
    /// How many are there from the start, without a boot time.
    #[arg(long, value_name = "N", default_value_t = 0)]
    initial: usize,
    /// From being asked for a node until it registers, e.g. 3s or 500ms.
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = duration)]
    boot_time: Duration,
    /// GPUs of each node.
    #[arg(long, value_name = "N", default_value_t = 1)]
    gpus: u32,
    /// Memory of each GPU.
    #[arg(long, value_name = "BYTES", default_value = "24Gi", value_parser = quantity::bytes)]
    gpu_memory: u64,
    /// What the driver keeps of it.
    #[arg(long, value_name = "BYTES", default_value = "512Mi", value_parser = quantity::bytes)]
    gpu_reserved: u64,
    /// Name of the card.
    #[arg(long, value_name = "NAME", default_value = "NVIDIA L4")]
    card: String,
    /// CPUs of each node.
    #[arg(long, value_name = "N", default_value = "16")]
    cpu: String,
    /// Memory of each node.
    #[arg(long, value_name = "BYTES", default_value = "64Gi")]
    memory: String,
    /// A label of each node; may be repeated.
    #[arg(long = "labels", value_name = "KEY=VALUE")]
    labels: Vec<String>,
    /// A taint of each node; may be repeated.
    #[arg(long = "taint", value_name = "KEY=VALUE:EFFECT")]
    taints: Vec<node::spec::Taint>,
    /// Where the API listens.
    #[arg(long, value_name = "IP:PORT")]
    listen: SocketAddr,
    /// Append one JSON line per call to this file.
    #[arg(long, value_name = "FILE")]
    journal: Option<PathBuf>,
    /// Fail: `stockout` answers 503, `undelivered` accepts and never delivers.
    #[arg(long, value_name = "HOW", default_value = "none")]
    fail: Failure,
    /// The nodes get 10.77.N.0/24 and so on from here; keep processes on one cluster apart.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u8).range(1..))]
    first_index: u8,
}

/// Runs the subcommand to its end.
///
/// # Errors
/// Says what failed and what to do next.
pub fn run(args: Args) -> anyhow::Result<()> {
    node::logs();
    let options = args.common.options(args.first_index)?;
    let mut template = if args.gpus == 0 {
        NodeSpec::system("")
    } else {
        NodeSpec::gpu("", args.gpus, args.gpu_memory, args.card)
    };
    if let Some(gpus) = &mut template.gpus {
        gpus.reserved = args.gpu_reserved;
    }
    quantity::milli(&args.cpu).map_err(anyhow::Error::msg)?;
    quantity::bytes(&args.memory).map_err(anyhow::Error::msg)?;
    (template.cpu, template.memory) = (args.cpu, args.memory);
    template.taints = args.taints;
    template.labels = labels(&args.labels)?;
    let spec = GroupSpec {
        name: args.group,
        max: args.max,
        boot_time: args.boot_time,
        template,
        journal: args.journal,
        failure: args.fail,
    };
    node::runtime()?.block_on(async move {
        let nodes = Arc::new(
            Nodes::start(
                crate::client::from_kubeconfig(&args.common.kubeconfig).await?,
                options,
            )
            .await?,
        );
        let listener = tokio::net::TcpListener::bind(args.listen).await;
        let listener = listener.with_context(|| format!("listening on {}", args.listen))?;
        let group = Group::start(Arc::clone(&nodes), spec)?;
        for _ in 0..args.initial {
            println!("node {} is up", group.add_now().await?);
        }
        println!("node group listens on http://{}", args.listen);
        tokio::select! {
            served = axum::serve(listener, group.router()) => served.context("serving the API")?,
            stopped = node::stopped() => stopped?,
        }
        nodes.power_off().await;
        Ok(())
    })
}

fn labels(texts: &[String]) -> anyhow::Result<BTreeMap<String, String>> {
    let pairs = texts.iter().flat_map(|text| text.split(','));
    pairs
        .map(|pair| {
            let (key, value) = pair
                .split_once('=')
                .with_context(|| format!("label {pair:?}: write KEY=VALUE"))?;
            Ok((key.to_owned(), value.to_owned()))
        })
        .collect()
}

/// Reads `3s`, `500ms`, `2m` or a number of seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("{text:?} is no time: write for example 3s, 500ms or 2m");
    let end = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let factor = match unit {
        "ms" => 0.001,
        "s" | "" => 1.0,
        "m" => 60.0,
        _ => return Err(bad()),
    };
    let number: f64 = number.parse().map_err(|_| bad())?;
    Duration::try_from_secs_f64(number * factor).map_err(|_| bad())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn times_are_read() {
        assert_eq!(duration("3s").unwrap(), Duration::from_secs(3));
        assert_eq!(duration("500ms").unwrap(), Duration::from_millis(500));
        assert_eq!(duration("1.5").unwrap(), Duration::from_millis(1500));
        for text in ["", "s", "-1s", "3h", "1e99s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn labels_may_be_listed_or_repeated() {
        let read = labels(&["a=1,b=2".to_owned(), "c=3".to_owned()]).unwrap();
        assert_eq!(read.len(), 3);
        assert!(labels(&["a".to_owned()]).is_err());
    }
}
