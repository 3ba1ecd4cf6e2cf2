//! `waiting`: what a pod that has room pays for the pods that wait because they have none.
//!
//! Pairs on one cluster, one after the other and in turns: the time from the creation of a pod that has room to its
//! `nodeName`, seen by watch, with nobody waiting and with many waiting. In each half the pod before it was deleted just
//! now: an event that has the scheduler try again whatever was refused. And how often the extender was asked meanwhile,
//! by its own count.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{DeleteParams, ListParams, PostParams};
use serde_json::json;

use super::report::{Figure, Report};
use crate::demo::observe::{State, What, node_of};
use crate::demo::traffic;
use crate::ebb_install::{EBB, MODELS, Plan, Site, ebb_program};
use crate::fleet::progress;

/// Longest wait for one step.
const STEP: Duration = Duration::from_secs(30);
/// Pods with room in each half of a pair.
const PROBES: u32 = 4;
/// Pairs before the first that counts.
const WARM_UP: u32 = 1;
/// Creations and deletions on their way at one time.
const AT_ONCE: usize = 16;
/// After many pods came or went, the cluster gets this long to have told of them.
const REST: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
struct Measured {
    alone_ms: Vec<f64>,
    beside_ms: Vec<f64>,
    ratios: Vec<f64>,
    filters: Vec<f64>,
}

/// Measures `rounds` pairs with that many pods waiting.
///
/// # Errors
/// Says which step did not come.
pub async fn run(rounds: u32, waiting: u32) -> anyhow::Result<Report> {
    progress("starting a cluster and Ebb");
    let mut site = Site::start(Plan::new(ebb_program()?)).await?;
    let measured = measure(&site, rounds, waiting).await;
    if measured.is_err() {
        site.keep_dir();
    }
    let measured = measured?;
    progress("");
    let version = site.client.apiserver_version().await?.git_version;
    let mut report = Report::new("waiting", BTreeMap::from([("kubernetes".to_owned(), version)]));
    let (alone, beside) = (
        Figure::of(&measured.alone_ms, "ms"),
        Figure::of(&measured.beside_ms, "ms"),
    );
    let mut over_alone = Figure::of(&measured.ratios, "x");
    // The bar is on the two medians; the spread is that of the pairs.
    over_alone.value = beside.value / alone.value;
    for (name, figure) in [
        ("created_to_bound_beside_over_alone", over_alone),
        ("created_to_bound_alone_ms", alone),
        ("created_to_bound_beside_waiting_ms", beside),
        (
            "filter_calls_per_pod_beside_waiting",
            Figure::mean(&measured.filters, "x"),
        ),
    ] {
        report.figures.insert(name, figure);
    }
    site.nodes.power_off().await;
    Ok(report)
}

async fn measure(site: &Site, rounds: u32, waiting: u32) -> anyhow::Result<Measured> {
    site.install_ebb().await?;
    // No pod here becomes Ready, since nobody runs it, and none of them is to wait for that.
    let together = "EBB_ONE_START_PER_GPU=false";
    let controller = "deployment/ebb-controller";
    site.kubectl(&["set", "env", controller, "-n", EBB, together])
        .await?;
    site.kubectl(&["rollout", "status", controller, "-n", EBB, "--timeout=60s"])
        .await?;
    let models = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": MODELS}});
    site.apply(&models.to_string()).await?;
    // Two cards of 23.5 GiB: 13 GiB of each are taken.
    for name in ["taken-0", "taken-1"] {
        create(site, name, 13).await?;
        bound(site, name, 0, Instant::now()).await?;
    }
    let mut measured = Measured::default();
    for round in 0..rounds + WARM_UP {
        progress(&format!("pair {} of {}", round + 1, rounds + WARM_UP));
        let alone = probes(site, round * 2).await?;
        let names: Vec<String> = (0..waiting)
            .map(|index| format!("waiting-{round}-{index}"))
            .collect();
        let created = stream::iter(&names).map(|name| create(site, name, 20));
        let created: Vec<()> = created.buffer_unordered(AT_ONCE).try_collect().await?;
        tokio::time::sleep(REST).await;
        let before = filters(site).await?;
        let beside = probes(site, round * 2 + 1).await?;
        let asked = filters(site).await? - before;
        let waits = |pod: &&Pod| name(pod).starts_with("waiting-") && node_of(pod).is_none();
        let still = site
            .observer
            .look(|state| state.pods.values().filter(waits).count());
        ensure!(
            still == created.len(),
            "{still} of {} pods still wait",
            created.len()
        );
        let deleted = stream::iter(&names).map(|name| delete(site, name));
        deleted.buffer_unordered(AT_ONCE).try_collect::<Vec<()>>().await?;
        tokio::time::sleep(REST).await;
        if round >= WARM_UP {
            measured.filters.push(asked / f64::from(PROBES));
            let middle = |values: &[f64]| Figure::of(values, "ms").value;
            measured.ratios.push(middle(&beside) / middle(&alone));
            measured.alone_ms.extend(alone);
            measured.beside_ms.extend(beside);
        }
    }
    Ok(measured)
}

/// Milliseconds that some pods with room took, one after the other.
async fn probes(site: &Site, block: u32) -> anyhow::Result<Vec<f64>> {
    let mut took = Vec::new();
    for index in 0..PROBES {
        let name = format!("probe-{block}-{index}");
        let mark = site.observer.mark();
        let start = Instant::now();
        create(site, &name, 4).await?;
        took.push(bound(site, &name, mark, start).await?);
        delete(site, &name).await?;
        let pod = format!("{MODELS}/{name}");
        let gone = |state: &State| (!state.pods.contains_key(&pod)).then_some(());
        site.observer.until("the pod is gone", STEP, gone).await?;
    }
    Ok(took)
}

async fn create(site: &Site, name: &str, gib: u64) -> anyhow::Result<()> {
    // Nobody runs it: what is measured ends with the bind.
    let pod = json!({
        "metadata": {"name": name},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "model", "image": "none.invalid/model:1",
                "resources": {"limits": {"ebb.dev/gpu-memory": format!("{gib}Gi")}}}],
        },
    });
    let pod: Pod = serde_json::from_value(pod)?;
    let pods = Api::<Pod>::namespaced(site.client.clone(), MODELS);
    let deadline = Instant::now() + STEP;
    // At first the namespace has no ServiceAccount yet.
    while let Err(error) = pods.create(&PostParams::default(), &pod).await {
        ensure!(Instant::now() < deadline, "pod {name} cannot be created: {error}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

async fn delete(site: &Site, name: &str) -> anyhow::Result<()> {
    let pods = Api::<Pod>::namespaced(site.client.clone(), MODELS);
    let now = DeleteParams {
        grace_period_seconds: Some(0),
        ..DeleteParams::default()
    };
    pods.delete(name, &now).await?;
    Ok(())
}

/// Milliseconds from `start` to the pod having its node.
async fn bound(site: &Site, name: &str, mark: usize, start: Instant) -> anyhow::Result<f64> {
    let wanted = format!("{MODELS}/{name}");
    let what = format!("{name} is bound");
    let at = site.observer.until(&what, STEP, |state| {
        let mut moments = state.moments.iter().skip(mark);
        let bound =
            moments.find(|moment| matches!(&moment.what, What::Bound { pod, .. } if *pod == wanted))?;
        Some(bound.at)
    });
    Ok(at.await?.saturating_duration_since(start).as_secs_f64() * 1000.0)
}

/// How often the extender decided a filter call since it was started, all replicas together.
async fn filters(site: &Site) -> anyhow::Result<f64> {
    let pods = Api::<Pod>::namespaced(site.client.clone(), EBB);
    let controllers = ListParams::default().labels("app.kubernetes.io/name=ebb-controller");
    let mut sum = 0.0;
    for pod in pods.list(&controllers).await? {
        let ip = pod.status.as_ref().and_then(|status| status.pod_ip.as_deref());
        let address = SocketAddr::new(ip.context("a controller without an address")?.parse()?, 8080);
        let answer = traffic::send(address, http::Method::GET, "/metrics", None, STEP).await?;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        let lines = text
            .lines()
            .filter(|line| line.starts_with("ebb_extender_decisions_total{verb=\"Filter\"}"));
        for line in lines {
            let value = line.rsplit(' ').next().unwrap_or_default();
            sum += value
                .parse::<f64>()
                .with_context(|| format!("the metric `{line}`"))?;
        }
    }
    Ok(sum)
}

fn name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}
