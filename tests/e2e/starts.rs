//! Model servers measure free memory when they start, and take more than they declare while they load.

use anyhow::{Context as _, ensure};
use ebb_lab::demo::observe::is_ready;
use ebb_lab::demo::traffic::{self, Tally};
use ebb_lab::ebb_install::MODELS;
use kube::ResourceExt as _;
use serde_json::Value;

use crate::stage::{STEP, Stage};

const NAMES: [&str; 2] = ["left", "right"];

/// Each has 11 GiB of the card's 24, and 6 more while it loads.
fn models() -> String {
    let model = |name: &&str| {
        format!(
            r#"
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: {name}, namespace: {MODELS}}}
spec:
  selector: {{matchLabels: {{app: {name}}}}}
  template:
    metadata: {{labels: {{app: {name}}}}}
    spec:
      containers:
        - name: server
          image: lab/model:1
          args: [model, --model={name}, --load-time=2s, --load-peak=6Gi, --gpu-memory-utilization=$(EBB_GPU_MEMORY_SHARE)]
          env: [{{name: POD_IP, valueFrom: {{fieldRef: {{fieldPath: status.podIP}}}}}}]
          ports: [{{name: http, containerPort: 8000}}]
          readinessProbe: {{httpGet: {{path: /health, port: http}}, periodSeconds: 1}}
          resources: {{limits: {{ebb.dev/gpu-memory: 11Gi}}}}
---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {MODELS}}}
spec: {{selector: {{app: {name}}}, ports: [{{name: http, port: 80, targetPort: http}}]}}
"#
        )
    };
    let namespace = format!("{{apiVersion: v1, kind: Namespace, metadata: {{name: {MODELS}}}}}\n");
    NAMES.iter().map(model).fold(namespace, |all, one| all + &one)
}

pub async fn all(stage: Stage<'_>) -> anyhow::Result<()> {
    stage.install_with(&models()).await?;
    stage.scenario("the same bytes two times on one card, woken at the same moment");
    let mut addresses = Vec::new();
    for name in NAMES {
        let address = stage.site.address(MODELS, name).await?;
        stage.site.reachable(address, STEP).await?;
        addresses.push(address);
    }
    let tally = Tally::default();
    let wake = |model: usize| traffic::chat(&tally, addresses[model], NAMES[model], 1, STEP);
    let (left, right) = tokio::join!(wake(0), wake(1));
    left.context("the first model")?;
    right.context("the second model")?;

    let mut cards = Vec::new();
    for name in NAMES {
        let workload = format!("{MODELS}/{name}");
        let pod = stage.observer().until("its pod is Ready", STEP, |state| {
            state
                .pods_of(&workload)
                .find(|pod| is_ready(pod))
                .map(|pod| pod.name_any())
        });
        let (uuid, declared, free) = seen_at_start(stage, &pod.await?)?;
        ensure!(
            free >= declared,
            "{name} saw {free} bytes free at its start, and declared {declared}"
        );
        stage.timeline.check(format!(
            "{name}: {free} bytes free at its start, {declared} declared"
        ));
        cards.push(uuid);
    }
    ensure!(cards[0] == cards[1], "not on one card: {cards:?}");
    Ok(())
}

/// The card that a model's only start was on, what it took there, and what it saw free before.
fn seen_at_start(stage: Stage<'_>, pod: &str) -> anyhow::Result<(String, u64, u64)> {
    let logs = stage.site.logs(MODELS, pod);
    let mut starts = Vec::new();
    for (_, log) in &logs {
        let text = std::fs::read_to_string(log)?;
        for line in text.lines() {
            // The server's own lines are JSON; what it prints on its way down is not.
            let Ok(line) = serde_json::from_str::<Value>(line) else {
                continue;
            };
            ensure!(line["event"] != "failed", "{pod} failed: {}", line["reason"]);
            if line["event"] == "memory" {
                starts.push(line["gpus"][0].clone());
            }
        }
    }
    let [on] = starts.as_slice() else {
        anyhow::bail!("{} starts of {pod} in {logs:?}", starts.len());
    };
    let bytes = |key: &str| on[key].as_u64().with_context(|| format!("{key} of {on}"));
    let uuid = on["uuid"].as_str().context("the card's UUID")?;
    Ok((uuid.to_owned(), bytes("bytes")?, bytes("free")?))
}
