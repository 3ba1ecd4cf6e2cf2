//! Stand-in nodes on a real control plane: what a person sees of a pod is what a kubelet would show.
#![allow(clippy::unwrap_used)]

mod support;

use ebb_lab::node::NodeSpec;
use ebb_lab::nvml_state::State;
use k8s_openapi::api::core::v1::{Event, Pod};
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use serde_json::json;
use std::time::{Duration, Instant};
use support::{Lab, PATIENCE, alive, eventually, is_ready};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

async fn http_get(host: &str, port: u16, path: &str) -> std::io::Result<String> {
    let mut stream = tokio::net::TcpStream::connect((host, port)).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text)
}

#[tokio::test(flavor = "multi_thread")]
async fn e2e_a_deployment_serves_through_its_cluster_ip() {
    let lab = Lab::up().await;
    lab.nodes
        .add(NodeSpec::gpu("gpu-a", 2, 24 << 30, "NVIDIA L4"))
        .await
        .unwrap();
    lab.cluster
        .apply(
            r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: chat}
spec:
  replicas: 2
  selector: {matchLabels: {app: chat}}
  template:
    metadata: {labels: {app: chat}, annotations: {team: "blue $$"}}
    spec:
      initContainers:
      - {name: first, image: "sh:1", args: ["-c", "echo from-init > /work-here/deep/file"], volumeMounts: [{name: shared, mountPath: /work-here/deep}]}
      containers:
      - name: server
        image: lab/model:1
        command: [lab, model]
        args: ["--load-time=50ms", "--memory=1Gi", "--model=$(TEAM)-$$(TEAM)"]
        env:
        - {name: TEAM, valueFrom: {fieldRef: {fieldPath: "metadata.annotations['team']"}}}
        - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        - {name: NVIDIA_VISIBLE_DEVICES, value: all}
        ports: [{name: http, containerPort: 8000}]
        readinessProbe: {httpGet: {path: /health, port: http}, periodSeconds: 1}
        volumeMounts: [{name: shared, mountPath: /shared, readOnly: true}]
      volumes: [{name: shared, emptyDir: {}}]
---
apiVersion: v1
kind: Service
metadata: {name: chat}
spec: {selector: {app: chat}, ports: [{port: 80, targetPort: http}]}
"#,
        )
        .await
        .unwrap();
    let out = lab
        .cluster
        .kubectl(&["rollout", "status", "deployment/chat", "--timeout=60s"])
        .await
        .unwrap();
    out.success().unwrap();
    let services: Api<k8s_openapi::api::core::v1::Service> = Api::namespaced(lab.cluster.client(), "default");
    let ip = services
        .get("chat")
        .await
        .unwrap()
        .spec
        .unwrap()
        .cluster_ip
        .unwrap();
    let body = tokio::time::timeout(PATIENCE, async {
        loop {
            match http_get(&ip, 80, "/v1/models").await {
                Ok(body) if body.starts_with("HTTP/1.1 200") => return body,
                // kube-proxy may still be writing the rule.
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    })
    .await
    .unwrap();
    assert!(body.contains("blue $$-$(TEAM)"), "{body}");

    let pods = lab
        .pods
        .list(&ListParams::default().labels("app=chat"))
        .await
        .unwrap()
        .items;
    assert_eq!(pods.len(), 2);
    let status = pods[0].status.clone().unwrap();
    assert!(status.pod_ip.unwrap().starts_with("10.77."));
    assert_eq!(status.phase.as_deref(), Some("Running"));
    let state_file = lab.cluster.dir().join("lab/nodes/gpu-a/nvml.state");
    let processes = || State::load(&state_file).unwrap().processes.len();
    assert_eq!(processes(), 4, "two servers, each on both cards");

    let name = pods[0].metadata.name.clone().unwrap();
    let logs = lab
        .cluster
        .kubectl(&["logs", &name, "-c", "server", "--tail=100"])
        .await
        .unwrap();
    assert!(
        logs.stdout.contains("\"event\":\"listening\""),
        "{}{}",
        logs.stdout,
        logs.stderr
    );

    let events: Api<Event> = Api::namespaced(lab.cluster.client(), "default");
    eventually("a Started event of the pod", async || {
        let list = events.list(&ListParams::default()).await.unwrap();
        list.items
            .iter()
            .any(|e| e.reason.as_deref() == Some("Started") && e.involved_object.name.as_ref() == Some(&name))
    })
    .await;

    lab.cluster
        .kubectl(&["delete", "deployment", "chat", "--wait=false"])
        .await
        .unwrap()
        .success()
        .unwrap();
    for pod in &pods {
        lab.wait_gone(pod.metadata.name.as_deref().unwrap()).await;
    }
    eventually("the GPUs are empty", async || processes() == 0).await;
    assert!(
        !std::path::Path::new("/work-here").exists(),
        "mount points are made in the container only"
    );
    lab.down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn e2e_a_pod_reaches_the_api_server_with_its_own_account() {
    let lab = Lab::up().await;
    lab.nodes.add(NodeSpec::system("sys")).await.unwrap();
    lab.cluster
        .apply(
            r#"
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: view-default}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: view}
subjects: [{kind: ServiceAccount, name: default, namespace: default}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {colour: red}
---
apiVersion: v1
kind: Pod
metadata: {name: asks, labels: {a: b}}
spec:
  restartPolicy: Never
  containers:
  - {name: in-cluster, image: "kubectl:1", args: [get, configmap, settings, -o, "jsonpath={.data.colour}"]}
  - name: by-name
    image: sh:1
    args:
    - -c
    - |
      grep -c kubernetes.default.svc.cluster.local /etc/hosts
      cat /tmp/info/labels /tmp/info/colour; echo
      cat /var/run/secrets/kubernetes.io/serviceaccount/namespace; echo
      until [ "$(cat /tmp/info/colour)" = blue ]; do sleep 0.1; done
      echo now blue
    volumeMounts: [{name: info, mountPath: /tmp/info}]
  volumes:
  - name: info
    projected:
      sources:
      - downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}
      - configMap: {name: settings}
"#,
        )
        .await
        .unwrap();
    let shell = |pod: &Pod| lab.log(pod, "by-name");
    let pod = lab
        .wait("asks", "asked", |pod| shell(pod).lines().count() >= 3)
        .await;
    assert_eq!(shell(&pod), "1\na=\"b\"red\ndefault\n");
    eventually("the answer to the first", async || {
        lab.log(&pod, "in-cluster") == "red"
    })
    .await;
    // A mounted ConfigMap follows its object.
    lab.cluster
        .kubectl(&[
            "patch",
            "configmap",
            "settings",
            "-p",
            r#"{"data":{"colour":"blue"}}"#,
        ])
        .await
        .unwrap();
    let done = lab
        .wait("asks", "completed", |pod| {
            pod.status.as_ref().unwrap().phase.as_deref() == Some("Succeeded")
        })
        .await;
    assert!(shell(&done).ends_with("now blue\n"));
    assert!(!is_ready(&done));
    lab.down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn e2e_deletion_honours_the_grace_and_force_does_not() {
    let lab = Lab::up().await;
    lab.nodes.add(NodeSpec::system("sys")).await.unwrap();
    let stubborn = |name: &str, grace: u32, trap: &str, hook: &str| {
        format!(
            r#"
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  terminationGracePeriodSeconds: {grace}
  containers:
  - name: c
    image: sh:1
    args: ["-c", "trap '{trap}' TERM; echo up; while :; do sleep 0.05; done"]
    lifecycle: {{preStop: {{exec: {{command: [sh, -c, "{hook}"]}}}}}}
---
"#
        )
    };
    let yaml = [
        stubborn(
            "polite",
            30,
            "echo term; sleep 0.5; echo bye; exit 0",
            "sleep 0.3",
        ),
        stubborn("deaf", 3, "echo ignored", "true"),
        stubborn("forced", 30, "echo ignored", "true"),
        stubborn("shortened", 300, "echo ignored", "true"),
    ]
    .concat();
    lab.cluster.apply(&yaml).await.unwrap();
    let mut pods = Vec::new();
    for name in ["polite", "deaf", "forced", "shortened"] {
        lab.wait(name, "ready", is_ready).await;
        let pod = lab.wait(name, "up", |pod| lab.log(pod, "c").contains("up")).await;
        pods.push((pod.clone(), lab.pid(&pod, "c")));
    }
    let began = Instant::now();
    for name in ["polite", "deaf", "shortened"] {
        lab.pods.delete(name, &DeleteParams::default()).await.unwrap();
    }
    lab.pods
        .delete("forced", &DeleteParams::default().grace_period(0))
        .await
        .unwrap();
    eventually("a pod deleted by force is dead", async || !alive(&pods[2].1)).await;
    assert!(
        !lab.log(&pods[2].0, "c").contains("ignored"),
        "no SIGTERM when forced"
    );

    lab.wait_gone("polite").await;
    assert!(lab.log(&pods[0].0, "c").ends_with("term\nbye\n"));
    assert!(!alive(&pods[0].1));
    lab.wait_gone("deaf").await;
    assert!(
        began.elapsed() >= Duration::from_secs(3),
        "SIGKILL came before the grace was over"
    );
    assert!(lab.log(&pods[1].0, "c").contains("ignored"));
    // A second deletion with less grace counts from then.
    assert!(alive(&pods[3].1));
    lab.pods
        .delete("shortened", &DeleteParams::default().grace_period(1))
        .await
        .unwrap();
    lab.wait_gone("shortened").await;
    assert!(began.elapsed() < Duration::from_secs(200));
    lab.down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn e2e_sidecars_init_containers_and_full_nodes() {
    let lab = Lab::up().await;
    let spec = NodeSpec {
        pods: 3,
        ..NodeSpec::system("sys")
    };
    lab.nodes.add(spec).await.unwrap();
    let phase = |pod: &Pod| {
        pod.status
            .as_ref()
            .and_then(|s| s.phase.clone())
            .unwrap_or_default()
    };
    lab.cluster
        .apply(
            r#"
apiVersion: v1
kind: Pod
metadata: {name: with-sidecar}
spec:
  restartPolicy: Never
  initContainers:
  - name: proxy
    image: sh:1
    restartPolicy: Always
    args: ["-c", "trap 'echo stopped; exit 0' TERM; echo > /shared/up; while :; do sleep 0.05; done"]
    startupProbe: {exec: {command: [sh, -c, "test -f /shared/up"]}, periodSeconds: 1}
    volumeMounts: [{name: shared, mountPath: /shared}]
  - {name: once, image: "sh:1", args: ["-c", "test -f /shared/up && echo after the sidecar"], volumeMounts: [{name: shared, mountPath: /shared}]}
  containers:
  - {name: main, image: "sh:1", args: ["-c", "sleep 1; exit 0"]}
  volumes: [{name: shared, emptyDir: {}}]
---
apiVersion: v1
kind: Pod
metadata: {name: fails-early}
spec:
  restartPolicy: Never
  initContainers: [{name: once, image: "sh:1", args: ["-c", "exit 4"]}]
  containers: [{name: main, image: "sh:1", args: ["-c", "echo never"]}]
---
apiVersion: v1
kind: Pod
metadata: {name: too-long}
spec:
  restartPolicy: Never
  activeDeadlineSeconds: 1
  hostNetwork: true
  containers: [{name: main, image: "sh:1", args: ["-c", "exec sleep 1000"]}]
"#,
        )
        .await
        .unwrap();
    let sidecar = lab
        .wait("with-sidecar", "running", |pod| phase(pod) == "Running")
        .await;
    let failed = lab
        .wait("fails-early", "failed", |pod| phase(pod) == "Failed")
        .await;
    assert_eq!(lab.log(&failed, "main"), "");
    let done = lab
        .wait("with-sidecar", "completed", |pod| phase(pod) == "Succeeded")
        .await;
    assert_eq!(lab.log(&sidecar, "once"), "after the sidecar\n");
    assert_eq!(lab.log(&done, "proxy"), "stopped\n");
    let late = lab
        .wait("too-long", "ended by its deadline", |pod| phase(pod) == "Failed")
        .await;
    let status = late.status.unwrap();
    assert_eq!(status.reason.as_deref(), Some("DeadlineExceeded"));
    assert_eq!(status.pod_ip, status.host_ip);

    // Completed pods take no place; the scheduler is passed by, as a static assignment would.
    for n in 0..4 {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": format!("fill-{n}")},
            "spec": {"nodeName": "sys", "terminationGracePeriodSeconds": 0,
                "containers": [{"name": "c", "image": "sh:1", "args": ["-c", "exec sleep 1000"]}]}
        }))
        .unwrap();
        lab.pods.create(&PostParams::default(), &pod).await.unwrap();
        lab.wait(&format!("fill-{n}"), "taken or refused", |pod| {
            is_ready(pod) || phase(pod) == "Failed"
        })
        .await;
    }
    assert!(is_ready(&lab.pod("fill-2").await));
    assert_eq!(
        lab.pod("fill-3").await.status.unwrap().reason.as_deref(),
        Some("OutOfpods")
    );
    lab.down().await;
}
