//! The benchmark `packing`: how many GPUs stay unallocated when pods arrive one by one until they ask for as many GPUs
//! as the cluster has. Ebb's own placement (`ebb::plan::placement`, what the scheduler extender calls) beside fragmentation
//! gradient descent as published, best fit and chance.
//!
//! [`lists`] reads the files and makes the arrivals, [`cluster`] keeps the books and refuses what does not fit, [`product`]
//! and [`peers`] place. Started by `hack/bench packing`.

mod cluster;
mod lists;
mod peers;
mod product;

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write as _};
use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::Parser;
use cluster::{Cluster, Packer};
use ebb_lab::bench::report::{Figure, Report};
use lists::Lists;
use product::Others;

/// GPUs left unallocated when pods have asked for as many as there are.
///
/// The lists are those of the public trace cluster-trace-gpu-v2023 (https://github.com/alibaba/clusterdata, folder
/// cluster-trace-gpu-v2023/csv; Weng et al., USENIX ATC'23), or any of the same columns: nodes as
/// `sn,cpu_milli,memory_mib,gpu,model` (openb_node_list_gpu_node.csv), pods as
/// `name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec` (openb_pod_list_default.csv and its like). They are not shipped
/// with Ebb.
///
/// For each seed the pod list is padded by drawing from itself until it asks for 130 % of the cluster's GPUs, and
/// shuffled. Pods arrive one by one and stay; one that fits nowhere is dropped and counts as arrived. The figure is the
/// share of GPUs that is not allocated when what has arrived asks for all of them, in the mean of the seeds. CPU, memory
/// and card types, which kube-scheduler's own filters look after, are kept here.
///
/// Pods without a GPU are placed by each way too: `ebb` is what Ebb does where `managedResources` is left out of its
/// scheduler's configuration and all pods are its own. `ebb_as_installed` places the pods with a GPU only, and
/// kube-scheduler's default spreads the others over the same nodes. All cards count as 16,000 MiB.
#[derive(Debug, Parser)]
#[command(name = "hack/bench packing", verbatim_doc_comment)]
struct Args {
    /// The nodes, as CSV.
    #[arg(long, value_name = "FILE")]
    nodes: PathBuf,
    /// The pods, as CSV.
    #[arg(long, value_name = "FILE")]
    pods: PathBuf,
    /// The seeds, first and last.
    #[arg(long, value_name = "FIRST-LAST", default_value = "42-51", value_parser = seeds)]
    seeds: RangeInclusive<u64>,
    /// Write the figures to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn seeds(text: &str) -> Result<RangeInclusive<u64>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (first.parse(), last.parse()) {
        (Ok(first), Ok(last)) if first <= last => Ok(first..=last),
        _ => Err("write them as 42-51".to_owned()),
    }
}

/// The ways to place, by the name of their figure.
const WAYS: [(&str, &str); 5] = [
    ("ebb", "unallocated_pct.ebb"),
    ("ebb_as_installed", "unallocated_pct.ebb_as_installed"),
    ("fgd", "unallocated_pct.fgd"),
    ("best_fit", "unallocated_pct.best_fit"),
    ("random", "unallocated_pct.random"),
];

fn packer(way: &str, lists: &Lists, cluster: &Cluster) -> Box<dyn Packer> {
    match way {
        "ebb" => Box::new(product::Ebb::new(lists, cluster, Others::Ebb)),
        "ebb_as_installed" => Box::new(product::Ebb::new(lists, cluster, Others::KubeScheduler)),
        "fgd" => Box::new(peers::Fgd::new(lists, cluster)),
        "best_fit" => Box::new(peers::BestFit),
        _ => Box::new(peers::Random),
    }
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let lists = Lists::read(&args.nodes, &args.pods)?;
    let mut measured: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for seed in args.seeds.clone() {
        let arrivals = lists.arrivals(seed);
        for (way, figure) in WAYS {
            progress(&format!(
                "seed {seed} of {}-{}: {way}",
                args.seeds.start(),
                args.seeds.end()
            ));
            let mut cluster = Cluster::new(&arrivals.machines);
            let mut packer = packer(way, &lists, &cluster);
            let unallocated = cluster.replay(&lists, &arrivals, packer.as_mut(), seed)?;
            measured.entry(figure).or_default().push(unallocated);
        }
    }
    progress("");
    let peers = BTreeMap::from([
        ("fgd".to_owned(), "as published with USENIX ATC'23".to_owned()),
        ("best_fit".to_owned(), "as published beside it".to_owned()),
        ("random".to_owned(), "-".to_owned()),
    ]);
    let mut report = Report::new("packing", peers);
    for (figure, values) in measured {
        report.figures.insert(figure, Figure::mean(&values, "%"));
    }
    println!(
        "\n{} nodes, {} GPUs, {} pods in {} kinds",
        lists.machines.len(),
        lists.gpus(),
        lists.pods.len(),
        lists.kinds.len()
    );
    report.print();
    match &args.json {
        Some(file) => report.write(file),
        None => Ok(()),
    }
}

/// One line on stderr, redrawn on a terminal.
fn progress(text: &str) {
    let mut out = std::io::stderr().lock();
    let _ = if out.is_terminal() {
        write!(out, "\r\x1b[K{text}").and_then(|()| out.flush())
    } else if text.is_empty() {
        Ok(())
    } else {
        writeln!(out, "{text}")
    };
}
