//! Gates as processes under their own rights, against a real API server. Pods are given addresses by hand here: what
//! they serve is this test's own.
#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use ebb_lab::cluster::{Cluster, Options, Program, Signal};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Pod, Secret};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

/// For what must come; correctness only.
const SOON: Duration = Duration::from_secs(60);
const PORT: u16 = 20_001;
const GATES: [&str; 2] = ["10.77.5.1", "10.77.5.2"];
const CONTROLLER_IP: &str = "10.77.5.9";
const POD_IP: &str = "10.77.6.1";
const GET: &str = "GET /v1/models HTTP/1.1\r\nhost: m.models\r\nconnection: close\r\n\r\n";

const NAMESPACE: &str = include_str!("../manifests/00-namespace.yaml");
const RIGHTS: &str = include_str!("../manifests/10-rbac.yaml");
const MODEL: &str = include_str!("gate/model.yaml");

struct Lab {
    cluster: Cluster,
    gates: Vec<Program>,
}

impl Lab {
    /// A control plane and the two gates.
    async fn up() -> Lab {
        Lab::with_gates(Lab::control_plane().await, &["--controller", "10.77.5.99:9445"]).await
    }

    /// The same with a controller that puts the model to sleep after a second.
    async fn with_controller() -> Lab {
        let cluster = Lab::control_plane().await;
        let idle = [
            "annotate",
            "-n",
            "models",
            "deployment/m",
            "ebb.dev/idle-after=1s",
            "--overwrite",
        ];
        cluster.kubectl(&idle).await.unwrap().success().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_ebb"));
        command
            .args([
                "controller",
                "--listen-ip",
                CONTROLLER_IP,
                "--pod-name",
                "ebb-controller-0",
            ])
            .env("KUBECONFIG", kubeconfig(&cluster, "ebb-controller").await);
        cluster.spawn("controller", command).unwrap();
        for (number, ip) in GATES.iter().enumerate() {
            gate_pod(&cluster, &format!("ebb-gate-{number}"), ip).await;
        }
        let secrets: Api<Secret> = Api::namespaced(cluster.client(), "ebb-system");
        let ca = eventually("the controller has made its CA", || async {
            secrets.get("ebb-serving").await.ok()?.data?.remove("ca.crt")
        })
        .await;
        let (ca_file, token_file) = (cluster.dir().join("ca.crt"), cluster.dir().join("gate.token"));
        std::fs::write(&ca_file, ca.0).unwrap();
        std::fs::write(
            &token_file,
            token(&cluster, "ebb-gate", &["--audience=ebb"]).await,
        )
        .unwrap();
        let arguments = [
            format!("--controller={CONTROLLER_IP}:9445"),
            format!("--ca-file={}", ca_file.display()),
            format!("--token-file={}", token_file.display()),
        ];
        Lab::with_gates(cluster, &arguments.each_ref().map(String::as_str)).await
    }

    async fn control_plane() -> Cluster {
        let cluster = Cluster::up(Options::default()).await.unwrap();
        cluster.apply(&ebb::api::crds_yaml()).await.unwrap();
        let established = [
            "wait",
            "--for=condition=Established",
            "crd",
            "--all",
            "--timeout=60s",
        ];
        cluster.kubectl(&established).await.unwrap().success().unwrap();
        for manifests in [NAMESPACE, RIGHTS, MODEL] {
            cluster.apply(manifests).await.unwrap();
        }
        cluster
    }

    async fn with_gates(cluster: Cluster, arguments: &[&str]) -> Lab {
        let kubeconfig = kubeconfig(&cluster, "ebb-gate").await;
        let gates: Vec<Program> = GATES
            .iter()
            .enumerate()
            .map(|(number, ip)| {
                let mut command = Command::new(env!("CARGO_BIN_EXE_ebb"));
                command
                    .args(["gate", "--settle=200ms"])
                    .args(arguments)
                    .env("KUBECONFIG", &kubeconfig)
                    .env("POD_IP", ip)
                    .env("POD_NAME", format!("ebb-gate-{number}"));
                cluster.spawn(&format!("gate-{number}"), command).unwrap()
            })
            .collect();
        let lab = Lab { cluster, gates };
        for (ip, gate) in GATES.iter().zip(&lab.gates) {
            eventually(&format!("{ip} is ready:\n{}", gate.log_tail()), || async {
                let health = format!("{ip}:8080").parse().ok()?;
                let answer = exchange(health, "GET /readyz HTTP/1.0\r\n\r\n").await?;
                answer.contains("200 OK").then_some(())
            })
            .await;
        }
        lab
    }

    fn deployments(&self) -> Api<Deployment> {
        Api::namespaced(self.cluster.client(), "models")
    }

    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.cluster.client(), "models")
    }

    async fn model(&self) -> Deployment {
        self.deployments().get("m").await.unwrap()
    }

    async fn scaled_to(&self, replicas: i32) {
        eventually(&format!("m is scaled to {replicas}"), || async {
            let model = self.model().await;
            (model.spec?.replicas == Some(replicas)).then_some(())
        })
        .await;
    }

    async fn scale(&self, replicas: i32) {
        let patch = json!({"spec": {"replicas": replicas}});
        self.deployments()
            .patch_scale("m", &PatchParams::default(), &Patch::Merge(patch))
            .await
            .unwrap();
    }

    /// The workload's one pod gets an address, as from a kubelet, and is Ready or not.
    async fn place_pod(&self, ready: bool) -> String {
        let pods = self.pods();
        let status = json!({"status": {
            "phase": "Running",
            "podIP": POD_IP,
            "podIPs": [{"ip": POD_IP}],
            "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}],
        }});
        // The one that was listed may be the last life's, and gone by now: asked again.
        eventually("m has a pod, which is placed", || async {
            let listed = pods.list(&ListParams::default()).await.ok()?;
            let pod = listed
                .items
                .into_iter()
                .find(|pod| pod.metadata.deletion_timestamp.is_none())?;
            pods.patch_status(&pod.name_any(), &PatchParams::default(), &Patch::Merge(&status))
                .await
                .ok()?;
            Some(pod.name_any())
        })
        .await
    }

    /// Attempts to wake that ended so, over both gates.
    async fn wakes(&self, result: &str) -> u32 {
        let line = format!("ebb_gate_wakes_total{{result=\"{result}\"}} ");
        let mut sum = 0;
        for ip in GATES {
            let health = format!("{ip}:8080").parse().unwrap();
            let metrics = exchange(health, "GET /metrics HTTP/1.0\r\n\r\n").await.unwrap();
            let count = metrics.lines().find_map(|found| found.strip_prefix(&line));
            sum += count.map_or(0, |count| count.parse::<u32>().unwrap());
        }
        sum
    }

    /// What the slice beside the Service points at, and on which port.
    async fn slice(&self) -> (Vec<String>, Option<i32>) {
        let slices: Api<EndpointSlice> = Api::namespaced(self.cluster.client(), "models");
        let slice = slices.get("m-ebb").await.unwrap();
        let addresses = slice
            .endpoints
            .iter()
            .flat_map(|endpoint| endpoint.addresses.clone())
            .collect();
        (addresses, slice.ports.unwrap_or_default()[0].port)
    }
}

/// What a kubelet would say of a gate: the controller counts only gates that are pods.
async fn gate_pod(cluster: &Cluster, name: &str, ip: &str) {
    let pods: Api<Pod> = Api::namespaced(cluster.client(), "ebb-system");
    let pod = serde_json::from_value(json!({
        "metadata": {"name": name, "labels": {"app.kubernetes.io/name": "ebb-gate"}},
        "spec": {
            "nodeName": "somewhere",
            "serviceAccountName": "ebb-gate",
            "containers": [{"name": "gate", "image": "ebb:dev"}],
        },
    }))
    .unwrap();
    pods.create(&PostParams::default(), &pod).await.unwrap();
    let status = json!({"status": {
        "phase": "Running",
        "podIP": ip,
        "podIPs": [{"ip": ip}],
        "conditions": [{"type": "Ready", "status": "True"}],
    }});
    pods.patch_status(name, &PatchParams::default(), &Patch::Merge(status))
        .await
        .unwrap();
}

/// A token of a ServiceAccount of Ebb's.
async fn token(cluster: &Cluster, account: &str, flags: &[&str]) -> String {
    let mut arguments = vec!["create", "token", account, "-n", "ebb-system"];
    arguments.extend_from_slice(flags);
    let output = cluster.kubectl(&arguments).await.unwrap().success().unwrap();
    output.stdout.trim().to_owned()
}

/// A kubeconfig with the rights of a ServiceAccount of Ebb's and no others.
async fn kubeconfig(cluster: &Cluster, account: &str) -> std::path::PathBuf {
    let admin = std::fs::read_to_string(cluster.kubeconfig()).unwrap();
    let mut config: serde_yaml_ng::Value = serde_yaml_ng::from_str(&admin).unwrap();
    let user = json!({"token": token(cluster, account, &[]).await});
    config["users"][0]["user"] = serde_yaml_ng::to_value(user).unwrap();
    let path = cluster.dir().join(format!("{account}.kubeconfig"));
    std::fs::write(&path, serde_yaml_ng::to_string(&config).unwrap()).unwrap();
    path
}

async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut ask: impl FnMut() -> F) -> T {
    timeout(SOON, async {
        loop {
            if let Some(found) = ask().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("not in time: {what}"))
}

fn gate(number: usize) -> SocketAddr {
    SocketAddr::new(GATES[number].parse().unwrap(), PORT)
}

async fn exchange(address: SocketAddr, text: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    stream.write_all(text.as_bytes()).await.ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.ok()?;
    Some(answer)
}

/// A model server that answers at once; on `/stream` in two parts, the second after `go` is notified.
async fn serve_model(go: Arc<tokio::sync::Notify>) {
    let ip: IpAddr = POD_IP.parse().unwrap();
    let listener = TcpListener::bind((ip, 8000)).await.unwrap();
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        let go = go.clone();
        tokio::spawn(async move {
            loop {
                let mut head = Vec::new();
                let mut byte = [0];
                while !head.ends_with(b"\r\n\r\n") {
                    if stream.read(&mut byte).await.unwrap_or(0) == 0 {
                        return;
                    }
                    head.push(byte[0]);
                }
                let answer: &[u8] = if head.starts_with(b"GET /stream") {
                    let first = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n";
                    stream.write_all(first).await.unwrap();
                    go.notified().await;
                    b"4\r\nlast\r\n0\r\n\r\n"
                } else {
                    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
                };
                if stream.write_all(answer).await.is_err() {
                    return;
                }
            }
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn race_a_hundred_requests_at_two_gates_are_one_wake() {
    let lab = Arc::new(Lab::up().await);
    let before = lab.model().await.metadata.generation.unwrap();
    // Status writes all the time: the version that showed the zero is never the newest for long.
    let writes = Arc::new(AtomicU32::new(0));
    let writer = tokio::spawn({
        let (lab, writes) = (lab.clone(), writes.clone());
        async move {
            loop {
                let number = writes.fetch_add(1, Ordering::SeqCst);
                let status = json!({"status": {"conditions": [{
                    "type": "Test", "status": "True", "reason": "Write", "message": number.to_string()}]}});
                let params = PatchParams::default();
                let _ = lab
                    .deployments()
                    .patch_status("m", &params, &Patch::Merge(status))
                    .await;
            }
        }
    });
    eventually("statuses are written", || async {
        (writes.load(Ordering::SeqCst) > 3).then_some(())
    })
    .await;
    let requests: Vec<_> = (0..100)
        .map(|number| tokio::spawn(exchange(gate(number % 2), GET)))
        .collect();
    lab.scaled_to(1).await;
    writer.abort();
    let model = tokio::spawn(serve_model(Arc::default()));
    // Not Ready by the kubelet's word: the gates find out themselves.
    lab.place_pod(false).await;
    for request in requests {
        let answer = timeout(SOON, request).await.unwrap().unwrap().unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.contains("server-timing: ebb;desc=\"cold\""), "{answer}");
    }
    // Every change of the spec counts in the generation, so there was one.
    assert_eq!(lab.model().await.metadata.generation, Some(before + 1));
    assert_eq!(lab.wakes("Raised").await, 1);
    println!(
        "{} writes came too late and were tried again",
        lab.wakes("Conflict").await
    );

    // Asleep again, and the next request wakes it again.
    lab.scale(0).await;
    eventually("the pod is gone", || async {
        let pods = lab.pods().list(&ListParams::default()).await.ok()?;
        pods.items.is_empty().then_some(())
    })
    .await;
    let request = tokio::spawn(exchange(gate(0), GET));
    lab.scaled_to(1).await;
    lab.place_pod(false).await;
    let answer = timeout(SOON, request).await.unwrap().unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(lab.model().await.metadata.generation, Some(before + 3));

    // A person who takes the right to scale away is told by the answer.
    lab.scale(0).await;
    let no_scale = r#"{"rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}]}"#;
    lab.cluster
        .kubectl(&["patch", "clusterrole", "ebb-gate", "--type=merge", "-p", no_scale])
        .await
        .unwrap()
        .success()
        .unwrap();
    let answer = eventually("the wake is refused", || async {
        let answer = timeout(Duration::from_secs(5), exchange(gate(1), GET))
            .await
            .ok()??;
        answer.contains("refuses the wake").then_some(answer)
    })
    .await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    model.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gates_that_stop_leave_the_model_reachable_and_cut_nothing() {
    let lab = Lab::up().await;
    let go = Arc::new(tokio::sync::Notify::new());
    let model = tokio::spawn(serve_model(go.clone()));
    lab.scale(1).await;
    lab.place_pod(true).await;
    eventually("a request passes", || async {
        let answer = timeout(Duration::from_secs(5), exchange(gate(1), GET))
            .await
            .ok()??;
        answer.starts_with("HTTP/1.1 200").then_some(())
    })
    .await;
    assert_eq!(
        lab.slice().await,
        (GATES.map(str::to_owned).to_vec(), Some(20_001))
    );

    lab.gates[0].kill(Signal::SIGTERM).unwrap();
    assert!(timeout(SOON, lab.gates[0].wait()).await.unwrap().success());
    assert_eq!(lab.slice().await, (vec![GATES[1].to_owned()], Some(20_001)));

    let mut streaming = TcpStream::connect(gate(1)).await.unwrap();
    streaming
        .write_all(b"GET /stream HTTP/1.1\r\nhost: m\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"first\r\n") {
        let mut byte = [0];
        timeout(SOON, streaming.read_exact(&mut byte))
            .await
            .unwrap()
            .unwrap();
        answer.push(byte[0]);
    }
    lab.gates[1].kill(Signal::SIGTERM).unwrap();
    eventually("the slice points at the pod", || async {
        (lab.slice().await == (vec![POD_IP.to_owned()], Some(8000))).then_some(())
    })
    .await;
    eventually("the gate port is closed", || async {
        TcpStream::connect(gate(1)).await.is_err().then_some(())
    })
    .await;
    assert!(lab.gates[1].ended().is_none(), "it still has a stream to finish");
    go.notify_one();
    let mut rest = String::new();
    timeout(SOON, streaming.read_to_string(&mut rest))
        .await
        .unwrap()
        .unwrap();
    assert!(rest.contains("last") && rest.ends_with("0\r\n\r\n"), "{rest}");
    assert!(timeout(SOON, lab.gates[1].wait()).await.unwrap().success());
    model.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_controller_puts_to_sleep_what_no_gate_needs_and_nothing_else() {
    let lab = Lab::with_controller().await;
    let go = Arc::new(tokio::sync::Notify::new());
    let model = tokio::spawn(serve_model(go.clone()));
    let streaming = tokio::spawn(exchange(
        gate(1),
        "GET /stream HTTP/1.1\r\nhost: m\r\nconnection: close\r\n\r\n",
    ));
    lab.scaled_to(1).await;
    lab.place_pod(true).await;
    // Open for much longer than the second after which the model may sleep.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(
        lab.model().await.spec.unwrap().replicas,
        Some(1),
        "a stream is open"
    );
    go.notify_one();
    let answer = timeout(SOON, streaming).await.unwrap().unwrap().unwrap();
    assert!(answer.contains("first") && answer.contains("last"), "{answer}");
    lab.scaled_to(0).await;
    let request = tokio::spawn(exchange(gate(0), GET));
    lab.scaled_to(1).await;
    lab.place_pod(true).await;
    let answer = timeout(SOON, request).await.unwrap().unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    model.abort();
}
