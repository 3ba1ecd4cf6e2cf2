//! The benchmark `handlers`: how long the extender takes over filter and prioritize, from the bytes that kube-scheduler
//! posts to the bytes that it reads, in a large cluster in full use. No network, no scheduler.
//!
//! [`cluster`] makes the cluster, its pods and the bodies. Started by `hack/bench handlers`.

mod cluster;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::ensure;
use clap::Parser;
use cluster::{Cluster, Kind, TOO_MUCH, body, draw};
use ebb::api::packing::Packing;
use ebb::api::units::PodUid;
use ebb::cluster::ledger_feed::SharedLedger;
use ebb::extender::{Desk, Refused, Verb};
use ebb::plan::ledger::{Event, Hold, Ledger};
use ebb::plan::placement::{Field, Hands, Mix};
use ebb_lab::bench::chance::Chance;
use ebb_lab::bench::report::{Figure, Report};
use parking_lot::Mutex;
use serde_json::Value;

/// Every n-th call of each kind: the pod is tried again, and one comes for which there is no room.
const SELDOM: usize = 10;
/// Pods of which the extender has heard before the first call.
const HEARD: usize = 2048;
/// Pods that are placed before any is measured.
const WARM_UP: usize = 200;
/// The figures: a quantile of what was measured under a name.
const FIGURES: [(&str, f64, &str); 13] = [
    ("filter_p50_ms", 0.5, "filter"),
    ("filter_p99_ms", 0.99, "filter"),
    ("filter_all_p50_ms", 0.5, "filter_all"),
    ("filter_all_p99_ms", 0.99, "filter_all"),
    ("prioritize_p50_ms", 0.5, "prioritize"),
    ("prioritize_p99_ms", 0.99, "prioritize"),
    ("filter_again_p50_ms", 0.5, "filter_again"),
    ("filter_again_p99_ms", 0.99, "filter_again"),
    ("prioritize_again_p50_ms", 0.5, "prioritize_again"),
    ("prioritize_again_p99_ms", 0.99, "prioritize_again"),
    ("deal_lock_p50_ms", 0.5, "deal_lock"),
    ("filter_refused_p50_ms", 0.5, "refused"),
    ("filter_refused_p99_ms", 0.99, "refused"),
];

/// How long filter and prioritize take, bytes in to bytes out, JSON included.
///
/// The cluster's cards are of three types, its nodes between 45 and 100 % full, its pods small and large, on one GPU and
/// on several. Pod after pod is filtered and prioritized, with the nodes by name, as kube-scheduler 1.36 does it:
/// prioritize is sent what filter answered, and the one with the highest score is bound. Between any two calls something
/// changes: a pod is bound, a pod ends, an agent tells of a GPU. What a call waited for a processor that other programs
/// had is taken off, and told.
///
/// `again`: a pod that has a hold already, as when its bind failed. `refused`: one for which no node has room.
/// `deal_lock`: how long the ledger is kept, every 256 pods, to deal the mix of requests anew in the background.
#[derive(Debug, Parser)]
#[command(name = "hack/bench handlers", verbatim_doc_comment)]
struct Args {
    /// Nodes.
    #[arg(long, value_name = "N", default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    nodes: u32,
    /// GPUs of each.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=16))]
    gpus: u32,
    /// Pods to place.
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(10..=100_000))]
    pods: u32,
    /// Chance starts here.
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
    /// Write the figures to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// The leader's extender without its network.
struct Extender {
    ledger: SharedLedger,
    refused: Refused,
    mix: Mutex<Mix>,
    measured: BTreeMap<&'static str, Vec<f64>>,
    /// Calls in which another program had the processor for a while.
    disturbed: usize,
    started: Instant,
}

/// How long this thread has waited, in all, for a processor that other programs had; 0 where the kernel does not count it.
fn waited() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let field = text.split_whitespace().nth(1);
    Duration::from_nanos(field.and_then(|nanos| nanos.parse().ok()).unwrap_or_default())
}

impl Extender {
    fn new(ledger: Ledger) -> Extender {
        let extender = Extender {
            ledger: SharedLedger::default(),
            refused: Refused::default(),
            mix: Mutex::default(),
            measured: BTreeMap::new(),
            disturbed: 0,
            started: Instant::now(),
        };
        extender.ledger.update(|empty| *empty = ledger);
        extender
    }

    /// The answer, its time under this name.
    fn answer(&mut self, name: &'static str, verb: Verb, body: &[u8]) -> anyhow::Result<Value> {
        let desk = Desk {
            ledger: &self.ledger,
            refused: &self.refused,
            mix: &self.mix,
            packing: &|_| Packing::default(),
            now_ms: u64::try_from(self.started.elapsed().as_millis())?,
        };
        let (waited, start) = (waited(), Instant::now());
        let answer = verb.here(desk, body)?;
        let took = start.elapsed();
        let own = took.saturating_sub(self::waited().saturating_sub(waited));
        self.disturbed += usize::from(own < took);
        self.measured
            .entry(name)
            .or_default()
            .push(own.as_secs_f64() * 1000.0);
        Ok(serde_json::from_slice(&answer)?)
    }

    /// What the extender does in the background. Only its look at the ledger can keep a pod waiting.
    fn deal_if_due(&mut self) {
        let Some(requests) = self.mix.get_mut().take_due() else {
            return;
        };
        let start = Instant::now();
        let field = self.ledger.read(Field::of);
        let took = start.elapsed().as_secs_f64() * 1000.0;
        self.measured.entry("deal_lock").or_default().push(took);
        self.mix.get_mut().put(Hands::deal(requests.iter(), &field));
    }

    fn tell(&self, event: Event) {
        self.ledger.update(|ledger| ledger.apply(event));
    }

    fn hold(&self, uid: &PodUid) -> Option<Hold> {
        self.ledger.read(|ledger| ledger.hold_of(uid).cloned())
    }
}

/// One pod as kube-scheduler places it.
fn place(
    extender: &mut Extender,
    cluster: &mut Cluster,
    chance: &mut Chance,
    kind: &Kind,
    number: usize,
) -> anyhow::Result<()> {
    let uid = cluster.uid();
    let (prefers, seldom) = (number % 2 == 1, number.is_multiple_of(SELDOM));
    let filter = body(&uid, kind, prefers, &cluster.candidates(kind));
    let name = if prefers { "filter_all" } else { "filter" };
    let passed = extender.answer(name, Verb::Filter, &filter)?;
    extender.deal_if_due();
    extender.tell(cluster.told_anew(chance));
    let names: Vec<&str> = passed["NodeNames"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    // The scheduler asks nobody to prioritize a single node.
    if names.len() > 1 {
        let prioritize = body(&uid, kind, prefers, &names);
        extender.answer("prioritize", Verb::Prioritize, &prioritize)?;
    }
    if seldom {
        extender.tell(cluster.told_anew(chance));
        extender.answer("filter_again", Verb::Filter, &filter)?;
        extender.tell(cluster.told_anew(chance));
        let again = body(&uid, kind, prefers, &cluster.candidates(kind));
        extender.answer("prioritize_again", Verb::Prioritize, &again)?;
    }
    if let Some(hold) = extender.hold(&uid) {
        extender.tell(cluster.bind(uid, hold.node, kind.host(), hold.claim));
        // Full or not, the cluster stays as it is: what comes goes.
        while cluster.is_fuller_than_at_first()
            && let Some(event) = cluster.end(chance)
        {
            extender.tell(event);
        }
    }
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mut chance = Chance::new(args.seed);
    let (mut cluster, ledger) = Cluster::new(args.nodes as usize, args.gpus, &mut chance);
    let usable: u64 = ledger.nodes().map(|node| node.usable().0).sum();
    let free: u64 = ledger.nodes().map(|node| node.free().0).sum();
    println!(
        "{} nodes of {} GPUs, {} pods on them, {} % of their memory taken; {} pods to place",
        args.nodes,
        args.gpus,
        ledger.bound_pods().count(),
        100 - free * 100 / usable.max(1),
        args.pods
    );
    let mut extender = Extender::new(ledger);
    for _ in 0..HEARD {
        extender
            .mix
            .lock()
            .observe(&cluster.uid(), &draw(&mut chance).want());
    }
    for number in 0..WARM_UP + args.pods as usize {
        if number == WARM_UP {
            extender.measured.clear();
            extender.disturbed = 0;
        }
        let kind = draw(&mut chance);
        place(&mut extender, &mut cluster, &mut chance, kind, number)?;
        if number.is_multiple_of(SELDOM) {
            let uid = cluster.uid();
            let all = cluster.candidates(&TOO_MUCH);
            let filter = body(&uid, &TOO_MUCH, false, &all);
            let refused = extender.answer("refused", Verb::Filter, &filter)?;
            let reasons = refused["FailedNodes"].as_object().map_or(0, serde_json::Map::len)
                + refused["FailedAndUnresolvableNodes"]
                    .as_object()
                    .map_or(0, serde_json::Map::len);
            ensure!(
                reasons == all.len(),
                "{reasons} of {} nodes were refused",
                all.len()
            );
        }
    }
    let mut report = Report::new("handlers", BTreeMap::new());
    for (name, at, values) in FIGURES {
        if let Some(values) = extender.measured.get(values) {
            report.figures.insert(name, Figure::at(values, at, "ms"));
        }
    }
    report.print();
    let calls: usize = extender.measured.values().map(Vec::len).sum();
    println!(
        "{} of {calls} calls had to wait for a processor that another program had; that is taken off.",
        extender.disturbed
    );
    match &args.json {
        Some(file) => report.write(file),
        None => Ok(()),
    }
}
