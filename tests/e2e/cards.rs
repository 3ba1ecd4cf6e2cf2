//! Cards of two sizes, and the cluster's own scheduler in the place of Ebb's.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};
use ebb_lab::demo::observe::{grant, is_ready, node_of};
use ebb_lab::ebb_install::{EBB, MODELS};
use ebb_lab::node::NodeSpec;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use serde_json::json;

use crate::stage::{STEP, Stage};

const GIB: u64 = 1 << 30;
/// What each replica asks.
const ASKED: u64 = 18 * GIB;
/// The large card's node.
const LARGE: &str = "large-card";

pub async fn all(stage: Stage<'_>) -> anyhow::Result<()> {
    stage.site.install_ebb().await?;
    stage.scenario("one manifest, a card of 24 GiB and one of 80 GiB");
    two_sizes(stage).await?;
    stage.scenario("the cluster's own scheduler, by the configuration that Ebb makes for it");
    own_scheduler(stage).await
}

/// Each replica on a node of its own; the server takes the share that it is told.
async fn two_sizes(stage: Stage<'_>) -> anyhow::Result<()> {
    let large = NodeSpec::gpu(LARGE, 1, 80 * GIB, "NVIDIA H100 80GB HBM3");
    stage.site.nodes.add(large).await?;
    let told = stage.observer().until("the large card is known", STEP, |state| {
        let status = state.nodes.get(LARGE)?.status.as_ref()?;
        status.allocatable.as_ref()?.get("ebb.dev/gpu-memory").map(drop)
    });
    told.await?;
    stage.site.apply(&manifest("two-sizes", 2)).await?;
    let pods = ready(stage, "two-sizes", 2).await?;
    let mut shares = Vec::new();
    for pod in &pods {
        let arguments = arguments(stage, pod)?;
        let given = grant(pod).context("no GPU in its annotations")?;
        ensure!(given.bytes == ASKED && given.uuids.len() == 1, "{given:?}");
        // 18 GiB of what the driver leaves of the card: half a GiB less than it has.
        let share = if node_of(pod) == Some(LARGE) {
            "0.2264"
        } else {
            "0.7659"
        };
        let expected = format!("--gpu-memory-utilization={share}");
        ensure!(
            arguments.contains(&expected),
            "{}: {arguments:?}, not {expected}",
            pod.name_any()
        );
        shares.push(share);
    }
    shares.sort_unstable();
    ensure!(
        shares == ["0.2264", "0.7659"],
        "both on one size of card: {shares:?}"
    );
    stage
        .timeline
        .check("its arguments say 0.7659 on the one card, 0.2264 on the other");
    Ok(())
}

/// The program writes the configuration; a real kube-scheduler runs with it, in the place of both others.
async fn own_scheduler(stage: Stage<'_>) -> anyhow::Result<()> {
    let cluster = stage.site.cluster();
    stage
        .site
        .kubectl(&["scale", "deployment", "-n", EBB, "ebb-scheduler", "--replicas=0"])
        .await?;
    let kubeconfig = stage.site.dir().join("certificates/scheduler.kubeconfig");
    let printed = Command::new(&stage.site.plan.ebb)
        .args(["scheduler", "config", "--scheduler-kubeconfig"])
        .arg(&kubeconfig)
        .env("KUBECONFIG", cluster.kubeconfig())
        .output()?;
    let said = String::from_utf8_lossy(&printed.stderr);
    ensure!(printed.status.success(), "ebb scheduler config: {said}");
    let config = stage.site.dir().join("own-scheduler.yaml");
    std::fs::write(&config, &printed.stdout)?;

    let before = cluster.program("kube-scheduler").context("no scheduler runs")?;
    before.stop().await;
    let gone = stage
        .observer()
        .until("Ebb's own scheduler is gone", STEP, |state| {
            let left = state
                .pods
                .values()
                .any(|pod| pod.name_any().starts_with("ebb-scheduler"));
            (!left).then_some(())
        });
    gone.await?;
    cluster.spawn(
        "own-scheduler",
        scheduler(cluster.programs(), &config, &kubeconfig, stage.site.dir()),
    )?;

    stage.site.apply(&manifest("by-own", 1)).await?;
    let pods = ready(stage, "by-own", 1).await?;
    let given = grant(&pods[0]).context("bound past the extender: no GPU in its annotations")?;
    ensure!(given.bytes == ASKED, "{given:?}");
    stage.timeline.check("a model is bound through the extender");
    let plain = manifest("plain", 1).replace("limits: {ebb.dev/gpu-memory: 18Gi}", "limits: {}");
    stage
        .site
        .apply(&plain.replace(
            "\"--gpu-memory-utilization=$(EBB_GPU_MEMORY_SHARE)\"",
            "\"--memory=1\"",
        ))
        .await?;
    let placed = stage
        .observer()
        .until("a pod without a GPU is placed", STEP, |state| {
            state.bound_pod(&format!("{MODELS}/plain")).map(drop)
        });
    placed.await?;
    stage.timeline.check("pods without a GPU are placed as before");
    stage.observer().look(|state| state.check_reservations())
}

fn scheduler(programs: &Path, config: &Path, kubeconfig: &Path, dir: &Path) -> Command {
    let mut command = Command::new(programs.join("kube-scheduler"));
    command
        .arg(format!("--config={}", config.display()))
        .arg(format!("--authentication-kubeconfig={}", kubeconfig.display()))
        .arg(format!("--authorization-kubeconfig={}", kubeconfig.display()))
        .arg("--bind-address=127.0.0.1")
        .arg(format!("--cert-dir={}", dir.join("own-scheduler").display()));
    command
}

/// Replicas that will not share a node.
fn manifest(name: &str, replicas: u32) -> String {
    let labels = json!({"app": name});
    let apart = json!({"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
        {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": labels}}]}});
    format!(
        r#"{{apiVersion: v1, kind: Namespace, metadata: {{name: {MODELS}}}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: {name}, namespace: {MODELS}}}
spec:
  replicas: {replicas}
  selector: {{matchLabels: {labels}}}
  template:
    metadata: {{labels: {labels}}}
    spec:
      affinity: {apart}
      containers:
        - name: server
          image: lab/model:1
          args: [model, "--model={name}", "--load-time=100ms", "--gpu-memory-utilization=$(EBB_GPU_MEMORY_SHARE)"]
          env: [{{name: POD_IP, valueFrom: {{fieldRef: {{fieldPath: status.podIP}}}}}}]
          readinessProbe: {{httpGet: {{path: /health, port: 8000}}, periodSeconds: 1}}
          resources: {{limits: {{ebb.dev/gpu-memory: 18Gi}}}}
"#
    )
}

async fn ready(stage: Stage<'_>, name: &str, count: usize) -> anyhow::Result<Vec<Pod>> {
    let workload = format!("{MODELS}/{name}");
    let what = format!("{workload} is Ready {count} times");
    let all = stage.observer().until(&what, STEP, |state| {
        let pods: Vec<Pod> = state
            .pods_of(&workload)
            .filter(|pod| is_ready(pod))
            .cloned()
            .collect();
        (pods.len() == count).then_some(pods)
    });
    all.await
}

/// The arguments of the process that runs in a pod.
fn arguments(stage: Stage<'_>, pod: &Pod) -> anyhow::Result<Vec<String>> {
    let logs = stage.site.logs(MODELS, &pod.name_any());
    let (_, log) = logs.first().context("the pod has no log")?;
    let pid = std::fs::read_to_string(log.with_extension("pid"))?;
    let line = std::fs::read(format!("/proc/{}/cmdline", pid.trim()))?;
    let arguments = line.split(|byte| *byte == 0).map(String::from_utf8_lossy);
    Ok(arguments.map(|argument| argument.into_owned()).collect())
}
