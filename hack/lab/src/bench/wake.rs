//! `wake`: what the first request to a sleeping model costs, beside a bare scale-up.
//!
//! Pairs on one cluster, one after the other and in turns:
//! - *bare*: a PATCH of the scale subresource of a Deployment that is none of Ebb's, bound by the default
//!   scheduler. Time from the PATCH to the pod's `nodeName`, seen by watch.
//! - *Ebb*: a request to a sleeping model through its ClusterIP. Time from opening the connection to the
//!   pod's `nodeName`, seen by the same watch: gate, PATCH, admission, scheduler and extender are in it.
//!
//! And of the same wake: from the model's own log line that it listens to the first byte at the client.
//! Its readiness probe has a period of 10 s, so nobody who waited for the kubelet would come near.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::Context as _;
use k8s_openapi::api::apps::v1::Deployment;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use super::progress;
use super::report::{Figure, Report};
use crate::demo::observe::{What, node_of};
use crate::demo::traffic::{self, Tally};
use crate::ebb_install::{MODELS, Plan, SAMPLE_SCALE_POLICY, Site, ebb_program};

/// The models' Deployments and the model's Service.
const MANIFESTS: &str = include_str!("../../samples/bench-wake.yaml");
/// Longest wait for one step of one pair.
const STEP: Duration = Duration::from_secs(30);
/// Pairs before the first that counts: connections, caches, compiled code.
const WARM_UP: u32 = 2;

#[derive(Debug, Default)]
struct Measured {
    bare_ms: Vec<f64>,
    bound_ms: Vec<f64>,
    over_bare: Vec<f64>,
    first_byte_ms: Vec<f64>,
}

/// Measures `rounds` pairs.
///
/// # Errors
/// Says which step did not come.
pub async fn run(rounds: u32) -> anyhow::Result<Report> {
    progress("starting a cluster and Ebb");
    let mut site = Site::start(Plan::new(ebb_program()?)).await?;
    let measured = measure(&site, rounds).await;
    if measured.is_err() {
        site.keep_dir();
    }
    let measured = measured?;
    progress("");
    let version = site.client.apiserver_version().await?.git_version;
    let mut report = Report::new("wake", BTreeMap::from([("kubernetes".to_owned(), version)]));
    let mut over_bare = Figure::of(&measured.over_bare, "x");
    // The bar is on the two medians; the spread is that of the pairs.
    over_bare.value = Figure::of(&measured.bound_ms, "ms").value / Figure::of(&measured.bare_ms, "ms").value;
    report
        .figures
        .insert("first_request_to_bound_over_bare", over_bare);
    report
        .figures
        .insert("first_request_to_bound_ms", Figure::of(&measured.bound_ms, "ms"));
    report
        .figures
        .insert("bare_patch_to_bound_ms", Figure::of(&measured.bare_ms, "ms"));
    report.figures.insert(
        "listening_to_first_byte_ms",
        Figure::of(&measured.first_byte_ms, "ms"),
    );
    site.nodes.power_off().await;
    Ok(report)
}

async fn measure(site: &Site, rounds: u32) -> anyhow::Result<Measured> {
    site.install_ebb().await?;
    // The model sleeps when this benchmark says so.
    let still = SAMPLE_SCALE_POLICY.replace("idleAfter: 6s", "idleAfter: 1h");
    site.apply_policy(&still).await?;
    site.apply(MANIFESTS).await?;
    let address = site.address(MODELS, "wake").await?;
    site.reachable(address, STEP).await?;
    asleep(site, "bare", "bare").await?;
    let mut measured = Measured::default();
    for round in 0..rounds + WARM_UP {
        progress(&format!("pair {} of {}", round + 1, rounds + WARM_UP));
        let (bare, (bound, first_byte));
        if round % 2 == 0 {
            bare = bare_wake(site).await?;
            (bound, first_byte) = ebb_wake(site, address).await?;
        } else {
            (bound, first_byte) = ebb_wake(site, address).await?;
            bare = bare_wake(site).await?;
        }
        if round >= WARM_UP {
            measured.bare_ms.push(bare);
            measured.bound_ms.push(bound);
            measured.over_bare.push(bound / bare);
            measured.first_byte_ms.push(first_byte);
        }
    }
    Ok(measured)
}

async fn bare_wake(site: &Site) -> anyhow::Result<f64> {
    let mark = site.observer.mark();
    let start = Instant::now();
    scale(site, "bare", "bare", 1).await?;
    let bound = bound(site, "bare/bare", mark, start).await?;
    sleep(site, "bare", "bare").await?;
    Ok(bound)
}

async fn ebb_wake(site: &Site, address: SocketAddr) -> anyhow::Result<(f64, f64)> {
    let mark = site.observer.mark();
    let start = Instant::now();
    let tally = Tally::default();
    let (answer, bound) = tokio::join!(
        traffic::chat(&tally, address, "wake", 1, STEP),
        bound(site, "models/wake", mark, start)
    );
    let (answer, bound) = (answer?, bound?);
    let listening = site.observer.look(|state| {
        let pod = state.bound_pod("models/wake")?;
        Some(pod.metadata.name.clone().unwrap_or_default())
    });
    let pod = listening.context("the model answered and has no pod")?;
    let logs = site.logs(MODELS, &pod);
    let (_, log) = logs.first().with_context(|| format!("no log of pod {pod}"))?;
    let listening = listening_at(log)?;
    let first_byte = answer.first_byte_at.duration_since(UNIX_EPOCH)?.as_secs_f64() * 1000.0;
    sleep(site, MODELS, "wake").await?;
    Ok((bound, first_byte - listening))
}

/// When the model began to listen, in Unix milliseconds, by its own log.
fn listening_at(log: &Path) -> anyhow::Result<f64> {
    let text = std::fs::read_to_string(log)?;
    let mut lines = text
        .lines()
        .rev()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let listening = lines.find(|line| line["event"] == "listening");
    let at = listening.and_then(|line| line["unix_ms"].as_f64());
    at.with_context(|| format!("{} does not say when the model began to listen", log.display()))
}

/// Milliseconds from `start` to a pod of the Deployment having its node.
async fn bound(site: &Site, workload: &str, mark: usize, start: Instant) -> anyhow::Result<f64> {
    let at = site.observer.until("the pod is bound", STEP, |state| {
        let pods: Vec<String> = state
            .pods_of(workload)
            .filter(|pod| node_of(pod).is_some())
            .map(name)
            .collect();
        let bound = |what: &What| matches!(what, What::Bound { pod, .. } if pods.contains(pod));
        let moments = state.moments.iter().skip(mark);
        moments
            .filter(|moment| bound(&moment.what))
            .map(|moment| moment.at)
            .next()
    });
    Ok(at.await?.saturating_duration_since(start).as_secs_f64() * 1000.0)
}

fn name(pod: &k8s_openapi::api::core::v1::Pod) -> String {
    let metadata = &pod.metadata;
    format!(
        "{}/{}",
        metadata.namespace.as_deref().unwrap_or_default(),
        metadata.name.as_deref().unwrap_or_default()
    )
}

async fn sleep(site: &Site, namespace: &str, name: &str) -> anyhow::Result<()> {
    scale(site, namespace, name, 0).await?;
    asleep(site, namespace, name).await
}

async fn asleep(site: &Site, namespace: &str, name: &str) -> anyhow::Result<()> {
    let workload = format!("{namespace}/{name}");
    let gone = site
        .observer
        .until("the pod of the last round is gone", STEP, |state| {
            let none = state.replicas(&workload) == Some(0) && state.pods_of(&workload).next().is_none();
            let settled = state.deployments.get(&workload)?.status.as_ref()?;
            (none && settled.replicas.unwrap_or(0) == 0).then_some(())
        });
    gone.await?;
    // The deployment controller and the gates see the end of it as well: a pair starts from rest.
    tokio::time::sleep(Duration::from_millis(300)).await;
    Ok(())
}

async fn scale(site: &Site, namespace: &str, name: &str, replicas: u32) -> anyhow::Result<()> {
    let api = Api::<Deployment>::namespaced(site.client.clone(), namespace);
    let patch = Patch::Merge(json!({"spec": {"replicas": replicas}}));
    api.patch_scale(name, &PatchParams::default(), &patch).await?;
    Ok(())
}
