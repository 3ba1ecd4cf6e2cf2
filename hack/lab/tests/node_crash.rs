//! What goes wrong on and around stand-in nodes: containers, nodes, the API server, the program itself.
#![allow(clippy::unwrap_used)]

mod support;

use ebb_lab::cluster::Signal;
use ebb_lab::node::NodeSpec;
use k8s_openapi::api::core::v1::{Event, Node};
use kube::api::{Api, ListParams, Patch, PatchParams};
use serde_json::json;
use std::time::Duration;
use support::{Lab, alive, eventually, is_ready, waits};

#[tokio::test(flavor = "multi_thread")]
async fn crash_of_a_container_is_a_crash_loop_and_missing_things_are_waited_for() {
    let lab = Lab::up().await;
    lab.nodes.add(NodeSpec::system("sys")).await.unwrap();
    lab.cluster
        .apply(
            r#"
apiVersion: v1
kind: Pod
metadata: {name: crashes}
spec:
  containers: [{name: c, image: "sh:1", args: ["-c", "echo last words; exit 3"], terminationMessagePolicy: FallbackToLogsOnError}]
---
apiVersion: v1
kind: Pod
metadata: {name: no-image}
spec:
  containers: [{name: c, image: "nobody/has:this"}]
---
apiVersion: v1
kind: Pod
metadata: {name: no-secret-volume}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{name: c, image: "sh:1", args: ["-c", "exec sleep 1000"], volumeMounts: [{name: s, mountPath: /etc/secret-things}]}]
  volumes: [{name: s, secret: {secretName: late}}]
---
apiVersion: v1
kind: Pod
metadata: {name: no-secret-env}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{name: c, image: "sh:1", args: ["-c", "exec sleep 1000"], env: [{name: S, valueFrom: {secretKeyRef: {name: late, key: k}}}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: unhealthy}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: c
    image: sh:1
    args: ["-c", "exec sleep 1000"]
    livenessProbe: {exec: {command: [sh, -c, "echo not well; exit 1"]}, periodSeconds: 1, failureThreshold: 1}
"#,
        )
        .await
        .unwrap();
    let looping = lab
        .wait("crashes", "in a crash loop", |pod| waits(pod, "CrashLoopBackOff"))
        .await;
    let status = looping.status.unwrap();
    assert_eq!(status.phase.as_deref(), Some("Running"));
    let container = &status.container_statuses.unwrap()[0];
    let last = container
        .last_state
        .as_ref()
        .unwrap()
        .terminated
        .as_ref()
        .unwrap();
    assert_eq!(
        (last.exit_code, last.message.as_deref(), last.reason.as_deref()),
        (3, Some("last words\n"), Some("Error"))
    );
    lab.wait("crashes", "restarted again", |pod| {
        pod.status.as_ref().unwrap().container_statuses.as_ref().unwrap()[0].restart_count >= 2
    })
    .await;

    lab.wait("no-image", "backing off", |pod| waits(pod, "ImagePullBackOff"))
        .await;
    lab.wait("no-secret-env", "told that the secret is missing", |pod| {
        waits(pod, "CreateContainerConfigError")
    })
    .await;
    let waiting = lab.pod("no-secret-volume").await;
    assert!(waits(&waiting, "ContainerCreating"));
    lab.cluster
        .kubectl(&["create", "secret", "generic", "late", "--from-literal=k=v"])
        .await
        .unwrap()
        .success()
        .unwrap();
    lab.wait("no-secret-volume", "ready", is_ready).await;
    lab.wait("no-secret-env", "ready", is_ready).await;

    lab.wait("unhealthy", "restarted by its liveness probe", |pod| {
        let containers = pod
            .status
            .as_ref()
            .and_then(|s| s.container_statuses.clone())
            .unwrap_or_default();
        containers.first().is_some_and(|c| c.restart_count >= 1)
    })
    .await;
    let events: Api<Event> = Api::namespaced(lab.cluster.client(), "default");
    eventually("events that say why", async || {
        let list = events.list(&ListParams::default()).await.unwrap();
        let has = |pod: &str, reason: &str, text: &str| {
            list.items.iter().any(|e| {
                e.involved_object.name.as_deref() == Some(pod)
                    && e.reason.as_deref() == Some(reason)
                    && e.message.as_deref().is_some_and(|m| m.contains(text))
            })
        };
        has("unhealthy", "Unhealthy", "Liveness probe failed: not well")
            && has("unhealthy", "Killing", "failed liveness probe")
            && has("no-secret-volume", "FailedMount", "secret \"late\" not found")
            && has("crashes", "BackOff", "Back-off restarting failed container")
    })
    .await;
    lab.down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn crash_of_a_node_kills_its_processes_and_a_return_starts_over() {
    let lab = Lab::up().await;
    let spec = NodeSpec::gpu("gpu-a", 1, 24 << 30, "NVIDIA L4");
    lab.nodes.add(spec.clone()).await.unwrap();
    let nodes: Api<Node> = Api::all(lab.cluster.client());
    let published = json!({"status": {"capacity": {"ebb.dev/gpu-memory": "24Gi"}, "allocatable": {"ebb.dev/gpu-memory": "24Gi"}}});
    nodes
        .patch_status("gpu-a", &PatchParams::default(), &Patch::Strategic(published))
        .await
        .unwrap();
    lab.cluster
        .apply(
            r#"
apiVersion: v1
kind: Pod
metadata: {name: stays}
spec:
  containers: [{name: c, image: "sh:1", args: ["-c", "echo up; exec sleep 1000"]}]
"#,
        )
        .await
        .unwrap();
    let pod = lab.wait("stays", "ready", is_ready).await;
    let pid = lab.pid(&pod, "c");
    assert!(alive(&pid));
    lab.nodes.crash("gpu-a").await.unwrap();
    eventually("the process is dead", async || !alive(&pid)).await;
    assert!(nodes.get_opt("gpu-a").await.unwrap().is_some());
    assert!(is_ready(&lab.pod("stays").await), "a dead node reports nothing");

    lab.nodes.add(spec).await.unwrap();
    let node = nodes.get("gpu-a").await.unwrap().status.unwrap();
    assert_eq!(node.capacity.unwrap()["ebb.dev/gpu-memory"].0, "0");
    assert_eq!(node.allocatable.unwrap()["ebb.dev/gpu-memory"].0, "0");
    lab.wait("stays", "running again", |pod| {
        is_ready(pod)
            && pod.status.as_ref().unwrap().container_statuses.as_ref().unwrap()[0].restart_count == 1
    })
    .await;

    lab.nodes.remove("gpu-a").await.unwrap();
    eventually("the node is gone", async || {
        nodes.get_opt("gpu-a").await.unwrap().is_none()
    })
    .await;
    assert!(lab.nodes.names().is_empty());
    lab.down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn crash_of_the_api_server_is_lived_through() {
    let lab = Lab::up().await;
    lab.nodes.add(NodeSpec::system("sys")).await.unwrap();
    let pod = r#"
apiVersion: v1
kind: Pod
metadata: {name: NAME}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{name: c, image: "sh:1", args: ["-c", "echo up; exec sleep 1000"]}]
"#;
    lab.cluster.apply(&pod.replace("NAME", "first")).await.unwrap();
    let first = lab.wait("first", "ready", is_ready).await;
    let pid = lab.pid(&first, "c");
    let server = lab.cluster.program("kube-apiserver").unwrap();
    server.kill(Signal::SIGKILL).unwrap();
    server.wait().await;
    assert!(alive(&pid), "pods run on without an API server");
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid.parse().unwrap()),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    server.restart().await.unwrap();
    eventually("the API server is back", async || {
        lab.pods.get_opt("first").await.is_ok()
    })
    .await;
    // What happened in between is told now, and new work is taken.
    lab.wait("first", "restarted", |pod| {
        is_ready(pod)
            && pod.status.as_ref().unwrap().container_statuses.as_ref().unwrap()[0].restart_count == 1
    })
    .await;
    eventually("a second pod is taken", async || {
        lab.cluster.apply(&pod.replace("NAME", "second")).await.is_ok()
    })
    .await;
    lab.wait("second", "ready", is_ready).await;
    lab.down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn crash_of_the_nodes_program_takes_its_containers_along() {
    let lab = Lab::up().await;
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_lab"));
    command
        .arg("nodes")
        .arg("--kubeconfig")
        .arg(lab.cluster.kubeconfig())
        .arg("--dir")
        .arg(lab.cluster.dir().join("lab"))
        .args(["--image", "sh:1=/bin/sh", "--first-index", "50"])
        .args(["--node", "gpu-b=gpus:2,gpu-memory:16Gi,label:zone=b"]);
    let program = lab.cluster.spawn("lab-nodes", command).unwrap();
    lab.cluster
        .apply(
            r#"
apiVersion: v1
kind: Pod
metadata: {name: stays}
spec:
  nodeSelector: {zone: b, nvidia.com/gpu.count: "2"}
  containers: [{name: c, image: "sh:1", args: ["-c", "sleep 1000 & exec sleep 1000"]}]
"#,
        )
        .await
        .unwrap();
    let pod = lab.wait("stays", "ready", is_ready).await;
    let pid = lab.pid(&pod, "c");
    assert!(alive(&pid));
    program.kill(Signal::SIGKILL).unwrap();
    eventually("its containers are dead", async || !alive(&pid)).await;
    lab.down().await;
}
