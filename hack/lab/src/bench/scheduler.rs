//! `scheduler`: how many pods a second kube-scheduler binds with Ebb as its extender, beside the same without.
//!
//! Pairs on one cluster, one after the other and in turns. Each side of a pair starts a kube-scheduler with the profile
//! of `manifests/scheduler.yaml`; one side without the `extenders`. There the controller does not run at all: its
//! watches would take part of the machine. All pods wait before the scheduler starts, since making them would take part
//! of the machine too, and more of the faster side's. The rate is that from the first bound pod to the last.
//!
//! Where `EBB_HANDLERS` names the benchmark of the handlers, its figures for a cluster of that size are told too.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;

use crate::cluster::Program;
use crate::ebb_install::ebb_program;
use crate::fleet::binds::BindWatch;
use crate::fleet::books::audit;
use crate::fleet::objects::{self, Ask, GIB, Nodes};
use crate::fleet::replica::Replica;
use crate::fleet::scheduler::Extender;
use crate::fleet::{Fleet, progress, usage};

use super::report::{Figure, Report};

/// Longest wait for all pods of one run.
const STEP: Duration = Duration::from_secs(180);
/// Bytes of each GPU that pods can have.
const USABLE: u64 = 24 * GIB;
/// The handlers' figures that are told here.
const HANDLERS: [&str; 4] = [
    "filter_p50_ms",
    "filter_p99_ms",
    "prioritize_p50_ms",
    "prioritize_p99_ms",
];
/// What pods ask for, in turns.
const SIZES: [u64; 5] = [4, 6, 8, 12, 16];

/// Arguments of the benchmark.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Args {
    /// Nodes of the cluster.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u16).range(1..=5000))]
    nodes: u16,
    /// GPUs of each.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=16))]
    gpus: u32,
    /// Pods that wait when the scheduler starts.
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u16).range(2..=20_000))]
    pods: u16,
    /// Pairs to measure.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=50))]
    pairs: u32,
}

#[derive(Debug, Default)]
struct Measured {
    with: Vec<f64>,
    without: Vec<f64>,
    ratio: Vec<f64>,
    rss: Vec<f64>,
    planned: Vec<f64>,
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
    let measured = measured?;
    progress("");
    let version = fleet.client.apiserver_version().await?.git_version;
    let peer = BTreeMap::from([("kube-scheduler without extender".to_owned(), version)]);
    let mut report = Report::new("scheduler", peer);
    for (name, values, unit) in [
        ("pods_per_s_over_none", &measured.ratio, "x"),
        ("pods_per_s", &measured.with, "/s"),
        ("pods_per_s_none", &measured.without, "/s"),
        ("controller_rss_mib", &measured.rss, "MiB"),
        ("planned_binds", &measured.planned, "%"),
    ] {
        report.figures.insert(name, Figure::of(values, unit));
    }
    drop(fleet);
    for (name, figure) in handlers(args).await? {
        report.figures.insert(name, figure);
    }
    Ok(report)
}

/// The handlers' own figures, in which no network and no scheduler has a part.
async fn handlers(args: Args) -> anyhow::Result<Vec<(&'static str, Figure)>> {
    let Some(program) = std::env::var_os("EBB_HANDLERS") else {
        return Ok(Vec::new());
    };
    progress("measuring the handlers alone");
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("handlers.json");
    let mut command = tokio::process::Command::new(program);
    command
        .args([
            "--nodes",
            &args.nodes.to_string(),
            "--gpus",
            &args.gpus.to_string(),
        ])
        .arg("--json")
        .arg(&file)
        .kill_on_drop(true);
    let output = tokio::time::timeout(STEP, command.output())
        .await
        .context("the handlers were not measured in time")??;
    anyhow::ensure!(
        output.status.success(),
        "the benchmark of the handlers failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let told: Value = serde_json::from_slice(&std::fs::read(&file)?)?;
    let number = |name: &str, field: &str| {
        let value = told["figures"][name][field].as_f64();
        value.with_context(|| format!("the benchmark of the handlers tells no {name}"))
    };
    let figure = |name: &'static str| {
        anyhow::Ok((
            name,
            Figure {
                value: number(name, "value")?,
                unit: "ms",
                spread: number(name, "spread")?,
            },
        ))
    };
    HANDLERS.into_iter().map(figure).collect()
}

async fn measure(fleet: &Fleet, args: Args) -> anyhow::Result<Measured> {
    let nodes = Nodes {
        count: args.nodes.into(),
        gpus: args.gpus,
        usable: USABLE,
    };
    progress(&format!(
        "making {} nodes with {} GPUs each",
        args.nodes, args.gpus
    ));
    nodes.create(&fleet.client).await?;
    let asks: Vec<Ask> = (0..usize::from(args.pods))
        .map(|index| Ask {
            bytes: SIZES[index % SIZES.len()] * GIB,
            exclusive: false,
        })
        .collect();
    let mut measured = Measured::default();
    for pair in 0..args.pairs {
        let (with, without);
        if pair % 2 == 0 {
            with = with_ebb(fleet, nodes, &asks, &mut measured).await?;
            without = without_ebb(fleet, &asks).await?;
        } else {
            without = without_ebb(fleet, &asks).await?;
            with = with_ebb(fleet, nodes, &asks, &mut measured).await?;
        }
        progress(&format!(
            "pair {} of {}: {with:.1} pods/s, {without:.1} without: {:.3} x",
            pair + 1,
            args.pairs,
            with / without
        ));
        measured.with.push(with);
        measured.without.push(without);
        measured.ratio.push(with / without);
    }
    Ok(measured)
}

async fn with_ebb(fleet: &Fleet, nodes: Nodes, asks: &[Ask], measured: &mut Measured) -> anyhow::Result<f64> {
    let replica = fleet.controller(0).await?;
    replica.leads().await?;
    let extender = Extender::At(replica.extender());
    let rate = burst(fleet, asks, extender, Some(&replica)).await?;
    let books = audit(&objects::pods(&fleet.client).await?, &nodes.all_gpus());
    anyhow::ensure!(books.faults.is_empty(), "double bookings: {:?}", books.faults);
    let binds = replica.binds().await?;
    anyhow::ensure!(binds.planned > 0, "nothing was bound by Ebb: {binds:?}");
    measured.rss.push(usage::memory(&replica.program)?.rss);
    #[allow(clippy::cast_precision_loss, reason = "thousands of pods")]
    measured
        .planned
        .push(100.0 * binds.planned as f64 / asks.len() as f64);
    replica.program.stop().await;
    objects::clear(&fleet.client).await?;
    Ok(rate)
}

async fn without_ebb(fleet: &Fleet, asks: &[Ask]) -> anyhow::Result<f64> {
    let rate = burst(fleet, asks, Extender::None, None).await?;
    objects::clear(&fleet.client).await?;
    Ok(rate)
}

/// Has all pods bound; pods a second.
async fn burst(
    fleet: &Fleet,
    asks: &[Ask],
    extender: Extender,
    replica: Option<&Replica>,
) -> anyhow::Result<f64> {
    let binds = BindWatch::start(&fleet.client);
    objects::create_pods(&fleet.client, "pod", asks).await?;
    let scheduler = fleet.scheduler(extender).await?;
    binds.reach(1, STEP).await?;
    let api_server = fleet.cluster().program("kube-apiserver");
    let programs: Vec<&Program> = [Some(&scheduler), api_server.as_ref(), replica.map(|r| &r.program)]
        .into_iter()
        .flatten()
        .collect();
    let before = cpu(&programs)?;
    binds.reach(asks.len(), STEP).await?;
    let after = cpu(&programs)?;
    scheduler.stop().await;
    let times = binds.times();
    let took = times[times.len() - 1] - times[0];
    let shares: Vec<String> = programs
        .iter()
        .zip(after.iter().zip(before))
        .map(|(program, (after, before))| format!("{} {:.1} s", program.name(), after - before))
        .collect();
    progress(&format!(
        "  {} in {:.1} s; processor time: {}",
        if replica.is_some() { "with Ebb" } else { "without " },
        took.as_secs_f64(),
        shares.join(", ")
    ));
    #[allow(clippy::cast_precision_loss, reason = "thousands of pods")]
    Ok((times.len() - 1) as f64 / took.as_secs_f64())
}

fn cpu(programs: &[&Program]) -> anyhow::Result<Vec<f64>> {
    programs
        .iter()
        .map(|program| usage::cpu_seconds(program))
        .collect()
}
