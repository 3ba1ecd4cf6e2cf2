//! Stand-in nodes on a real control plane: what a person sees of a pod is what a kubelet would show.
#![allow(clippy::unwrap_used)]

use ebb_lab::cluster::{Cluster, Options as ClusterOptions};
use ebb_lab::node::{Images, NodeSpec, Nodes, Options};
use ebb_lab::nvml_state::State;
use k8s_openapi::api::core::v1::{Event, Node, Pod};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams};
use serde_json::json;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Long enough for a loaded machine; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(60);

struct Lab {
    cluster: Cluster,
    nodes: Nodes,
    pods: Api<Pod>,
}

impl Lab {
    async fn up() -> Self {
        let cluster = Cluster::up(ClusterOptions::default()).await.unwrap();
        let images = Images::default();
        images.insert("lab/model:1", env!("CARGO_BIN_EXE_lab"));
        images.insert("sh:1", "/bin/sh");
        images.insert("kubectl:1", cluster.programs().join("kubectl"));
        let mut options = Options::new(cluster.dir().join("lab"), images).unwrap();
        options.lab = env!("CARGO_BIN_EXE_lab").into();
        options.restart_backoff = Duration::from_secs(1);
        options.volume_refresh = Duration::from_millis(300);
        let client = ebb_lab::client::from_kubeconfig(cluster.kubeconfig())
            .await
            .unwrap();
        let nodes = Nodes::start(client, options).await.unwrap();
        let pods = Api::namespaced(cluster.client(), "default");
        Self { cluster, nodes, pods }
    }

    async fn down(self) {
        self.nodes.power_off().await;
        self.cluster.down().await;
    }

    async fn pod(&self, name: &str) -> Pod {
        self.pods.get(name).await.unwrap()
    }

    /// Waits until `seen` is true of the pod.
    async fn wait(&self, name: &str, what: &str, seen: impl Fn(&Pod) -> bool) -> Pod {
        let mut last = None;
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            if let Some(pod) = self.pods.get_opt(name).await.unwrap() {
                if seen(&pod) {
                    return pod;
                }
                last = pod.status;
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        panic!(
            "pod {name} never was {what}; it is {}",
            serde_json::to_string_pretty(&last).unwrap()
        );
    }

    async fn wait_gone(&self, name: &str) {
        eventually(&format!("pod {name} gone"), async || {
            self.pods.get_opt(name).await.unwrap().is_none()
        })
        .await;
    }

    fn dir(&self, pod: &Pod) -> PathBuf {
        let meta = &pod.metadata;
        let (name, uid) = (meta.name.as_deref().unwrap(), meta.uid.as_deref().unwrap());
        self.cluster
            .dir()
            .join("lab/pods")
            .join(format!("default_{name}_{uid}"))
    }

    fn log(&self, pod: &Pod, container: &str) -> String {
        std::fs::read_to_string(self.dir(pod).join(format!("{container}.log"))).unwrap_or_default()
    }

    fn pid(&self, pod: &Pod, container: &str) -> String {
        std::fs::read_to_string(self.dir(pod).join(format!("{container}.pid")))
            .unwrap()
            .trim()
            .to_owned()
    }
}

async fn eventually(what: &str, seen: impl AsyncFn() -> bool) {
    let began = Instant::now();
    while !seen().await {
        assert!(began.elapsed() < PATIENCE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod
        .status
        .as_ref()
        .and_then(|s| s.conditions.as_deref())
        .unwrap_or_default();
    conditions
        .iter()
        .any(|c| c.type_ == "Ready" && c.status == "True")
}

fn waits(pod: &Pod, reason: &str) -> bool {
    let containers = pod
        .status
        .as_ref()
        .and_then(|s| s.container_statuses.as_deref())
        .unwrap_or_default();
    containers.iter().any(|c| {
        let waiting = c.state.as_ref().and_then(|state| state.waiting.as_ref());
        waiting.and_then(|w| w.reason.as_deref()) == Some(reason)
    })
}

fn alive(pid: &str) -> bool {
    // A zombie still has its folder, but runs no more.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')')
        .next()
        .is_some_and(|rest| !rest.trim_start().starts_with('Z') && !rest.is_empty())
}

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
            "echo hook >> /proc/1/../../tmp/$HOSTNAME-hook; sleep 0.3",
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
