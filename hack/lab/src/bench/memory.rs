//! `memory`: what the controller takes on a large cluster that is full of pods.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::ebb_install::ebb_program;
use crate::fleet::objects::{self, Ask, GIB, Nodes, Place};
use crate::fleet::{Fleet, progress, usage};

use super::report::{Figure, Report};

/// What pods ask for: four share a GPU at most.
const ASK: u64 = 6 * GIB;
/// It is looked at this often.
const LOOK: Duration = Duration::from_millis(500);
/// So often after it leads: what it took to start is given back by then, or never.
const LOOKS: usize = 20;

/// Arguments of the benchmark.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Args {
    /// Nodes of the cluster.
    #[arg(long, value_name = "N", default_value_t = 5000, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    nodes: u16,
    /// GPUs of each.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=16))]
    gpus: u32,
    /// Bound pods.
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    pods: u32,
}

/// Measures.
///
/// # Errors
/// Says what could not be measured.
pub async fn run(args: Args) -> anyhow::Result<Report> {
    progress("starting a cluster");
    let mut fleet = Fleet::start(ebb_program()?).await?;
    let measured = measure(&fleet, args).await;
    if measured.is_err() {
        fleet.keep_dir();
    }
    let (rss, peak) = measured?;
    progress("");
    let version = fleet.client.apiserver_version().await?.git_version;
    let mut report = Report::new("memory", BTreeMap::from([("kubernetes".to_owned(), version)]));
    for (name, value) in [("controller_rss_mib", rss), ("controller_peak_rss_mib", peak)] {
        report.figures.insert(name, Figure::of(&value, "MiB"));
    }
    Ok(report)
}

async fn measure(fleet: &Fleet, args: Args) -> anyhow::Result<(Vec<f64>, Vec<f64>)> {
    let nodes = Nodes {
        count: args.nodes.into(),
        gpus: args.gpus,
        usable: 4 * ASK,
    };
    progress(&format!(
        "making {} nodes with {} GPUs each",
        args.nodes, args.gpus
    ));
    nodes.create(&fleet.client).await?;
    progress(&format!("making {} bound pods", args.pods));
    let gpus = nodes.all_gpus();
    let place = |(gpu, (node, _)): (&String, &(String, u64))| Place {
        node: node.clone(),
        gpu: gpu.clone(),
    };
    let ask = Ask {
        bytes: ASK,
        exclusive: false,
    };
    let pods: Vec<(Ask, Option<Place>)> = gpus
        .iter()
        .cycle()
        .take(args.pods as usize)
        .map(|gpu| (ask, Some(place(gpu))))
        .collect();
    objects::create_placed_pods(&fleet.client, "pod", &pods).await?;
    progress("starting the controller");
    let replica = fleet.controller(0).await?;
    replica.leads().await?;
    let (mut rss, mut peak) = (Vec::new(), Vec::new());
    for _ in 0..LOOKS {
        tokio::time::sleep(LOOK).await;
        let memory = usage::memory(&replica.program)?;
        progress(&format!("{:.0} MiB, at most {:.0} MiB", memory.rss, memory.peak));
        rss.push(memory.rss);
        peak.push(memory.peak);
    }
    // What it takes once it has settled.
    let settled = rss.split_off(LOOKS / 2);
    Ok((settled, peak.split_off(LOOKS - 1)))
}
