//! The same manifests, applied again in every way that people and their tools do it.

use std::collections::BTreeMap;

use anyhow::ensure;
use ebb_lab::ebb_install::{MODELS, SAMPLE_MODELS};
use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, ResourceExt};

use crate::stage::{STEP, Stage};

/// A model that sleeps and one that is awake.
const SLEEPING: &str = "code";
const AWAKE: &str = "tiny-chat";

/// The ways to apply.
const WAYS: [&[&str]; 3] = [
    &["apply", "-f", "-"],
    &["apply", "--server-side", "-f", "-"],
    &["apply", "--server-side", "--force-conflicts", "-f", "-"],
];

pub async fn all(stage: Stage<'_>) -> anyhow::Result<()> {
    stage.install().await?;
    stage.wake(AWAKE).await?;
    // Client-side first and last: each way must be clean after every other one.
    for way in WAYS.iter().chain(&WAYS).chain(WAYS.iter().take(1)) {
        stage.scenario(&format!("kubectl {} on sleeping and awake models", way.join(" ")));
        apply_again(stage, way).await?;
    }
    // From nothing, by a tool that has only ever applied on the server: its fields are owned from the first write.
    stage.scenario("models that were only ever applied on the server");
    stage
        .site
        .kubectl(&["delete", "namespace", MODELS, "--wait=true", "--timeout=60s"])
        .await?;
    stage.site.kubectl_with(WAYS[1], SAMPLE_MODELS).await?.success()?;
    stage.wake(AWAKE).await?;
    for way in &WAYS[1..] {
        apply_again(stage, way).await?;
    }
    stage.scenario("a person's own replicas are kept out, and the person is told");
    a_replicas_edit_is_kept_out(stage).await?;
    stage.scenario("an unmanaged Deployment is nobody's business");
    unmanaged_is_left_alone(stage).await
}

/// What must not change by applying what is there already.
#[derive(Debug, PartialEq)]
struct Still {
    replicas: BTreeMap<String, Option<i32>>,
    /// ReplicaSets and the template generation they were made from.
    replica_sets: Vec<String>,
    pods: Vec<String>,
}

async fn still(stage: Stage<'_>) -> anyhow::Result<Still> {
    let sets = Api::<ReplicaSet>::namespaced(stage.site.client.clone(), MODELS);
    let mut replica_sets: Vec<String> = sets
        .list(&ListParams::default())
        .await?
        .iter()
        .map(ResourceExt::name_any)
        .collect();
    let pods = Api::<Pod>::namespaced(stage.site.client.clone(), MODELS);
    let mut pods: Vec<String> = pods
        .list(&ListParams::default())
        .await?
        .iter()
        .filter_map(ResourceExt::uid)
        .collect();
    replica_sets.sort();
    pods.sort();
    let replicas = stage.observer().look(|state| {
        [SLEEPING, AWAKE]
            .map(|name| (name.to_owned(), state.replicas(&format!("{MODELS}/{name}"))))
            .into()
    });
    Ok(Still {
        replicas,
        replica_sets,
        pods,
    })
}

async fn apply_again(stage: Stage<'_>, way: &[&str]) -> anyhow::Result<()> {
    let before = still(stage).await?;
    ensure!(
        before.replicas[SLEEPING] == Some(0) && before.replicas[AWAKE] == Some(1),
        "{before:?}"
    );
    let mark = stage.observer().mark();
    stage.site.kubectl_with(way, SAMPLE_MODELS).await?.success()?;
    let diff = if way.contains(&"--server-side") {
        stage
            .site
            .kubectl_with(&["diff", "--server-side", "-f", "-"], SAMPLE_MODELS)
            .await?
    } else {
        stage
            .site
            .kubectl_with(&["diff", "-f", "-"], SAMPLE_MODELS)
            .await?
    };
    ensure!(
        diff.status.success(),
        "kubectl diff is not empty:\n{}{}",
        diff.stdout,
        diff.stderr
    );
    settled(stage).await?;
    let after = still(stage).await?;
    ensure!(
        before == after,
        "applying what was there changed {before:?} into {after:?}"
    );
    let scaled = stage.observer().look(|state| {
        let models = [SLEEPING, AWAKE].map(|name| format!("{MODELS}/{name}"));
        models
            .iter()
            .map(|name| state.wakes_since(name, mark))
            .sum::<usize>()
    });
    ensure!(scaled == 0, "applying what was there woke {scaled} models");
    stage
        .timeline
        .check("no error, no difference, nothing woken, no new ReplicaSet");
    Ok(())
}

/// Waits until the deployment controller has seen the last write of every model.
async fn settled(stage: Stage<'_>) -> anyhow::Result<()> {
    let observed = stage
        .observer()
        .until("the deployment controller saw every write", STEP, |state| {
            let models = state
                .deployments
                .iter()
                .filter(|(name, _)| name.starts_with(MODELS));
            let behind = |deployment: &k8s_openapi::api::apps::v1::Deployment| {
                let observed = deployment
                    .status
                    .as_ref()
                    .and_then(|status| status.observed_generation);
                observed < deployment.metadata.generation
            };
            (!models.map(|(_, deployment)| deployment).any(behind)).then_some(())
        });
    observed.await
}

async fn a_replicas_edit_is_kept_out(stage: Stage<'_>) -> anyhow::Result<()> {
    for (name, live) in [(SLEEPING, 0), (AWAKE, 1)] {
        let edit = r#"{"spec":{"replicas":3}}"#;
        let target = format!("deployment/{name}");
        let output = stage
            .site
            .cluster()
            .kubectl(&["patch", &target, "-n", MODELS, "--type=merge", "-p", edit])
            .await?
            .success()?;
        ensure!(
            output.stderr.contains("Warning") && output.stderr.contains("replicas"),
            "no warning was shown for {name}: {}",
            output.stderr
        );
        let text = stage
            .site
            .kubectl(&["get", &target, "-n", MODELS, "-o", "jsonpath={.spec.replicas}"])
            .await?;
        ensure!(
            text == live.to_string(),
            "{name} has {text} replicas after the edit, not {live}"
        );
        stage.timeline.check(output.stderr.trim());
    }
    Ok(())
}

async fn unmanaged_is_left_alone(stage: Stage<'_>) -> anyhow::Result<()> {
    let yaml = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: plain, namespace: models}
spec:
  replicas: 1
  selector: {matchLabels: {app: plain}}
  template:
    metadata: {labels: {app: plain}}
    spec:
      containers: [{name: server, image: "lab/model:1", args: [model], env: [{name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}]}]
"#;
    stage.site.apply(yaml).await?;
    stage
        .observer()
        .until("the unmanaged pod is Ready", STEP, |state| {
            state
                .pods_of("models/plain")
                .any(ebb_lab::demo::observe::is_ready)
                .then_some(())
        })
        .await?;
    let scheduler = stage.observer().look(|state| {
        let pod = state.pods_of("models/plain").next()?;
        pod.spec.as_ref()?.scheduler_name.clone()
    });
    ensure!(
        scheduler.as_deref() == Some("default-scheduler"),
        "it was scheduled by {scheduler:?}"
    );
    stage
        .site
        .kubectl(&["scale", "deployment/plain", "-n", MODELS, "--replicas=0"])
        .await?;
    stage
        .timeline
        .check("started at once, by the default scheduler, with nothing added");
    Ok(())
}
