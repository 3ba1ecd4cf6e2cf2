//! `ebb agent` as a process under its own ServiceAccount, on a real API server, with the library really loaded.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "agent/admission.rs"]
mod admission;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use ebb::api::gpu_node::GpuNode;
use ebb::api::names::GPU_MEMORY;
use ebb_lab::cluster::{Cluster, Options, Program, Signal};
use ebb_lab::node::pod_resources;
use ebb_lab::nvml_state::{Health, Process, STATE_ENV, State, library_dir};
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

const GIB: u64 = 1 << 30;
const NODE: &str = "gpu-a";
const IP: &str = "10.77.9.1";
/// What pods can have on one card.
const USABLE: u64 = 24 * GIB - GIB / 2;
/// How long a test waits for what must come.
const PATIENCE: Duration = Duration::from_secs(60);

const ROLE: &str = r#"
apiVersion: v1
kind: ServiceAccount
metadata: {name: ebb-agent, namespace: default}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: ebb-agent}
rules:
- {apiGroups: [""], resources: [nodes], verbs: [get, list, watch]}
- {apiGroups: [""], resources: [nodes/status], verbs: [patch]}
- {apiGroups: [ebb.dev], resources: [gpunodes], verbs: [get, list, watch, create, patch]}
- {apiGroups: [ebb.dev], resources: [gpunodes/status], verbs: [patch]}
- {apiGroups: [coordination.k8s.io], resources: [leases], verbs: [create, patch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: ebb-agent}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: ebb-agent}
subjects: [{kind: ServiceAccount, name: ebb-agent, namespace: default}]
"#;

/// A cluster with one GPU node that has no kubelet, and the agent's own credentials.
struct Stage {
    cluster: Cluster,
    nodes: Api<Node>,
    gpu_nodes: Api<GpuNode>,
    state: PathBuf,
    kubeconfig: PathBuf,
}

impl Stage {
    async fn set() -> Self {
        let cluster = Cluster::up(Options::default()).await.unwrap();
        cluster.apply(&gpu_node_crd()).await.unwrap();
        cluster
            .kubectl(&["wait", "crd/gpunodes.ebb.dev", "--for=condition=Established"])
            .await
            .unwrap()
            .success()
            .unwrap();
        cluster.apply(ROLE).await.unwrap();
        let client = cluster.client();
        let kubeconfig = cluster.dir().join("agent.kubeconfig");
        std::fs::write(&kubeconfig, own_kubeconfig(&cluster).await).unwrap();
        let stage = Self {
            nodes: Api::all(client.clone()),
            gpu_nodes: Api::all(client),
            state: cluster.dir().join("nvml"),
            kubeconfig,
            cluster,
        };
        stage.add_node().await;
        stage
    }

    async fn add_node(&self) {
        let node = serde_json::from_value(json!({"metadata": {"name": NODE}})).unwrap();
        self.nodes.create(&PostParams::default(), &node).await.unwrap();
    }

    /// `name` is of the log, too.
    fn agent(&self, name: &str) -> Program {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ebb"));
        command
            .args(["agent", "--interval", "200ms", "--namespace", "default"])
            .args(["--lease-duration", "4s", "--pod-resources-interval", "200ms"])
            .arg("--pod-resources-socket")
            .arg(self.socket())
            .env("HOST_PROC", self.cluster.dir().join("proc"))
            .env("KUBECONFIG", &self.kubeconfig)
            .env("NODE_NAME", NODE)
            .env("POD_IP", IP)
            .env("LD_LIBRARY_PATH", library_dir())
            .env(STATE_ENV, &self.state);
        self.cluster.spawn(name, command).unwrap()
    }

    fn socket(&self) -> PathBuf {
        self.cluster.dir().join("kubelet").join("kubelet.sock")
    }

    async fn lease(&self) -> Option<Lease> {
        let leases: Api<Lease> = Api::namespaced(self.cluster.client(), "default");
        leases.get_opt(&format!("ebb-agent-{NODE}")).await.unwrap()
    }

    /// When the Lease was renewed last.
    async fn renewed(&self) -> Option<MicroTime> {
        self.lease().await?.spec?.renew_time
    }

    fn gpus(&self, change: impl FnOnce(&mut State)) {
        State::update(&self.state, change).unwrap();
    }

    /// The `GpuNode`, once it looks as it should.
    async fn inventory(&self, what: &str, seen: impl Fn(&GpuNode) -> bool) -> GpuNode {
        eventually(what, async || {
            let found = self.gpu_nodes.get_opt(NODE).await.ok()?;
            found.filter(|gpu_node| gpu_node.status.is_some() && seen(gpu_node))
        })
        .await
    }

    async fn figure_becomes(&self, bytes: u64) {
        eventually(&format!("{bytes} bytes on the node"), async || {
            let status = self.nodes.get(NODE).await.ok()?.status?;
            let figure = bytes.to_string();
            let is = |list: Option<
                std::collections::BTreeMap<_, k8s_openapi::apimachinery::pkg::api::resource::Quantity>,
            >| {
                list.is_some_and(|list| list.get(GPU_MEMORY).is_some_and(|quantity| quantity.0 == figure))
            };
            (is(status.capacity) && is(status.allocatable)).then_some(())
        })
        .await;
    }

    async fn ready_says(&self, text: &str) {
        eventually(&format!("/readyz says {text:?}"), async || {
            get("/readyz")?.contains(text).then_some(())
        })
        .await;
    }
}

fn gpu_node_crd() -> String {
    let crds = Command::new(env!("CARGO_BIN_EXE_ebb"))
        .arg("crds")
        .output()
        .unwrap();
    let crds = String::from_utf8(crds.stdout).unwrap();
    let mut crds = crds.split("---\n");
    crds.find(|crd| crd.contains("kind: GpuNode")).unwrap().to_owned()
}

async fn own_kubeconfig(cluster: &Cluster) -> String {
    let accounts: Api<ServiceAccount> = Api::namespaced(cluster.client(), "default");
    let request = TokenRequest {
        spec: TokenRequestSpec::default(),
        ..TokenRequest::default()
    };
    let answer = accounts
        .create_token_request("ebb-agent", &PostParams::default(), &request)
        .await
        .unwrap();
    let text = std::fs::read_to_string(cluster.kubeconfig()).unwrap();
    let mut config: Value = serde_yaml_ng::from_str(&text).unwrap();
    config["users"][0]["user"] = json!({"token": answer.status.unwrap().token});
    serde_yaml_ng::to_string(&config).unwrap()
}

async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < until, "never seen: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The answer with its head, or nothing when nobody listens.
fn get(path: &str) -> Option<String> {
    let mut stream = TcpStream::connect((IP, 8080)).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {IP}\r\nConnection: close\r\n\r\n"
    )
    .ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

fn writes() -> Vec<String> {
    let metrics = get("/metrics").unwrap();
    metrics
        .lines()
        .filter(|line| line.starts_with("ebb_agent_writes_total") && !line.contains("Lease"))
        .map(str::to_owned)
        .collect()
}

fn two_gpus() -> State {
    State::new(NODE, 2, 24 * GIB, GIB / 2, "NVIDIA L4")
}

fn healthy(gpu_node: &GpuNode) -> Vec<bool> {
    gpu_node
        .status
        .iter()
        .flat_map(|status| &status.gpus)
        .map(|gpu| gpu.healthy)
        .collect()
}

fn ready(gpu_node: &GpuNode) -> (String, String) {
    let condition = &gpu_node.status.as_ref().unwrap().conditions[0];
    (condition.status.clone(), condition.reason.clone())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publishes_what_nvml_says_and_puts_it_right() {
    let stage = Stage::set().await;
    let agent = stage.agent("agent");

    // No driver yet: said in both places, and no room on the node.
    stage.ready_says("the NVIDIA driver is not loaded").await;
    stage
        .inventory("no driver", |found| {
            ready(found) == ("False".into(), "DriverNotLoaded".into())
        })
        .await;
    stage.figure_becomes(0).await;

    let gpus = two_gpus();
    gpus.create(&stage.state).unwrap();
    let found = stage
        .inventory("two cards", |found| healthy(found) == [true, true])
        .await;
    let status = found.status.as_ref().unwrap();
    assert_eq!(ready(&found), ("True".into(), "Read".into()));
    assert_eq!(status.driver_version, "570.124.06");
    assert_eq!(status.gpus[1].uuid.as_str(), gpus.devices[1].uuid);
    assert_eq!(status.gpus[1].usable().0, USABLE);
    assert_eq!(status.gpus[1].memory_used.map(|used| used.0), Some(0));
    let owner = &found.metadata.owner_references.as_ref().unwrap()[0];
    assert_eq!((owner.kind.as_str(), owner.name.as_str()), ("Node", NODE));
    stage.figure_becomes(2 * USABLE).await;
    stage.ready_says("200 OK").await;

    // Settled: reading after reading, nothing is written.
    let before = writes();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(writes(), before);

    // The kubelet registers again.
    let zero = json!({GPU_MEMORY: "0"});
    let zeroed = json!({"status": {"capacity": zero, "allocatable": zero}});
    let kubelet = PatchParams::default();
    stage
        .nodes
        .patch_status(NODE, &kubelet, &Patch::Merge(zeroed))
        .await
        .unwrap();
    stage.figure_becomes(2 * USABLE).await;

    // A program takes memory.
    let (uuid, pid) = (gpus.devices[0].uuid.clone(), std::process::id());
    stage.gpus(|state| state.take(&uuid, pid, 10 * GIB).unwrap());
    let uses = |bytes: u64| {
        move |found: &GpuNode| found.status.as_ref().unwrap().gpus[0].memory_used.unwrap().0 == bytes
    };
    stage.inventory("used memory", uses(10 * GIB)).await;
    stage.gpus(|state| state.release_pid(pid));
    stage.inventory("no used memory", uses(0)).await;

    // A card falls off the bus and comes back.
    stage.gpus(|state| state.devices[1].health = Health::Lost);
    let lost = stage
        .inventory("a lost card", |found| healthy(found) == [true, false])
        .await;
    let gpu = &lost.status.as_ref().unwrap().gpus[1];
    assert!(
        gpu.unhealthy_reason
            .as_ref()
            .unwrap()
            .contains("fell off the bus")
    );
    assert_eq!(
        (gpu.uuid.as_str(), gpu.memory_used),
        (gpus.devices[1].uuid.as_str(), None)
    );
    stage.figure_becomes(USABLE).await;
    stage.gpus(|state| state.devices[1].health = Health::Healthy);
    stage.figure_becomes(2 * USABLE).await;

    // Somebody deletes the inventory.
    stage
        .gpu_nodes
        .delete(NODE, &DeleteParams::default())
        .await
        .unwrap();
    let again = stage
        .inventory("it is back", |found| healthy(found) == [true, true])
        .await;
    assert_ne!(again.metadata.uid, found.metadata.uid);

    // The garbage collector looks for new kinds every 30 s, and when it starts.
    stage
        .cluster
        .program("kube-controller-manager")
        .unwrap()
        .restart()
        .await
        .unwrap();

    // The node goes, its inventory with it, and the agent does not bring it back.
    stage.nodes.delete(NODE, &DeleteParams::default()).await.unwrap();
    eventually("the GpuNode gone", async || {
        stage
            .gpu_nodes
            .get_opt(NODE)
            .await
            .unwrap()
            .is_none()
            .then_some(())
    })
    .await;
    stage.ready_says("there is no Node").await;
    assert!(stage.gpu_nodes.get_opt(NODE).await.unwrap().is_none());
    stage.add_node().await;
    stage.figure_becomes(2 * USABLE).await;

    // What was published stays when it is told to stop.
    agent.kill(Signal::SIGTERM).unwrap();
    assert_eq!(agent.wait().await.code(), Some(0));
    stage.figure_becomes(2 * USABLE).await;
    stage
        .inventory("it stays", |found| healthy(found) == [true, true])
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crash_of_agent_or_api_server_loses_nothing() {
    let stage = Stage::set().await;
    two_gpus().create(&stage.state).unwrap();
    let first = stage.agent("agent-1");
    stage
        .inventory("two cards", |found| healthy(found) == [true, true])
        .await;
    stage.figure_becomes(2 * USABLE).await;

    // A card is lost while no agent runs: the next one knows which it was only from what the first one wrote.
    first.kill(Signal::SIGKILL).unwrap();
    first.wait().await;
    stage.gpus(|state| state.devices[0].health = Health::Lost);
    let second = stage.agent("agent-2");
    let found = stage
        .inventory("a lost card", |found| healthy(found) == [false, true])
        .await;
    assert_eq!(
        found.status.unwrap().gpus[0].uuid.as_str(),
        two_gpus().devices[0].uuid
    );
    stage.figure_becomes(USABLE).await;

    // The API server goes and comes back; what changed meanwhile is written then.
    let server = stage.cluster.program("kube-apiserver").unwrap();
    let cards = stage.state.clone();
    let change = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        State::update(&cards, |state| state.devices[0].health = Health::Healthy).unwrap();
    };
    let (restarted, ()) = tokio::join!(server.restart(), change);
    restarted.unwrap();
    stage.figure_becomes(2 * USABLE).await;
    stage
        .inventory("both cards", |found| healthy(found) == [true, true])
        .await;
    stage.ready_says("200 OK").await;
    assert!(second.ended().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adversarial_without_its_role_it_says_so_and_recovers() {
    let stage = Stage::set().await;
    two_gpus().create(&stage.state).unwrap();
    stage
        .cluster
        .kubectl(&["delete", "clusterrolebinding", "ebb-agent"])
        .await
        .unwrap()
        .success()
        .unwrap();
    let _agent = stage.agent("agent");
    stage.ready_says("forbidden").await;
    stage.cluster.apply(ROLE).await.unwrap();
    stage
        .inventory("two cards", |found| healthy(found) == [true, true])
        .await;
    stage.ready_says("200 OK").await;
}

fn verified(gpu_node: &GpuNode) -> (String, String) {
    let conditions = &gpu_node.status.as_ref().unwrap().conditions;
    let verified = conditions
        .iter()
        .find(|condition| condition.type_ == "Verified")
        .unwrap();
    (verified.status.clone(), verified.reason.clone())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tells_whose_memory_it_is_and_who_else_hands_cards_out() {
    const UID: &str = "0f3b7a5e-2f4c-4b57-9a66-1f5f1a3f6f10";
    let stage = Stage::set().await;
    let mut gpus = two_gpus();
    let (first, second) = (gpus.devices[0].uuid.clone(), gpus.devices[1].uuid.clone());
    let process = |pid: u32, bytes: u64| Process {
        uuid: first.clone(),
        pid,
        bytes,
        told: true,
    };
    gpus.processes = vec![process(4242, 3 * GIB), process(4243, GIB)];
    gpus.create(&stage.state).unwrap();
    let slice = format!("kubepods-burstable-pod{}.slice", UID.replace('-', "_"));
    for (pid, path) in [
        (4242, format!("/../../{slice}/cri-containerd-9a1c.scope")),
        (4243, "/user.slice".into()),
    ] {
        let dir = stage.cluster.dir().join("proc").join(pid.to_string());
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("cgroup"), format!("0::{path}\n")).unwrap();
    }
    let _agent = stage.agent("agent");
    let found = stage
        .inventory("the pod's memory", |found| {
            found.status.as_ref().is_some_and(|status| status.gpus.len() == 2)
        })
        .await;
    let gpu = &found.status.as_ref().unwrap().gpus[0];
    let pods: Vec<_> = gpu
        .pods
        .iter()
        .map(|pod| (pod.uid.as_str(), pod.memory_used.map(|used| used.0)))
        .collect();
    assert_eq!(pods, [(UID, Some(3 * GIB))]);
    assert_eq!(gpu.memory_foreign.map(|bytes| bytes.0), Some(GIB));
    assert_eq!(verified(&found), ("Unknown".into(), "NoSocket".into()));
    let metrics = get("/metrics").unwrap();
    let line = metrics
        .lines()
        .find(|line| line.starts_with("ebb_agent_pod_gpu_memory_bytes{"))
        .unwrap();
    assert!(
        line.contains(UID) && line.contains(&first) && line.ends_with(&(3 * GIB).to_string()),
        "{line}"
    );

    // A kubelet that hands out nothing, and then a card.
    let listener = pod_resources::listen(&stage.socket()).unwrap();
    let allocations = stage.socket().with_file_name(pod_resources::ALLOCATIONS);
    let kubelet = tokio::spawn(pod_resources::serve(listener, allocations.clone()));
    stage
        .inventory("one owner", |found| {
            verified(found) == ("True".into(), "OneOwner".into())
        })
        .await;
    stage.figure_becomes(2 * USABLE).await;
    std::fs::write(&allocations, format!("default train-0 nvidia.com/gpu {second}\n")).unwrap();
    let handed = stage
        .inventory("a card with two owners", |found| healthy(found) == [true, false])
        .await;
    let why = handed.status.as_ref().unwrap().gpus[1]
        .unhealthy_reason
        .clone()
        .unwrap();
    assert!(
        why.starts_with("handed to default/train-0 as nvidia.com/gpu: a GPU has one owner"),
        "{why}"
    );
    assert_eq!(verified(&handed), ("False".into(), "HandedOut".into()));
    stage.figure_becomes(USABLE).await;
    // A kubelet that is silent gives nothing back.
    kubelet.abort();
    stage.ready_says("200 OK").await;
    std::fs::remove_file(stage.socket()).unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(healthy(&stage.gpu_nodes.get(NODE).await.unwrap()), [true, false]);
    // Back, and the pod has ended.
    std::fs::remove_file(&allocations).unwrap();
    let listener = pod_resources::listen(&stage.socket()).unwrap();
    let _kubelet = tokio::spawn(pod_resources::serve(listener, allocations));
    stage
        .inventory("it is free again", |found| healthy(found) == [true, true])
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crash_of_the_driver_ends_the_renewals() {
    let stage = Stage::set().await;
    two_gpus().create(&stage.state).unwrap();
    let _agent = stage.agent("agent");
    let found = stage
        .inventory("two cards", |found| healthy(found) == [true, true])
        .await;
    let lease = eventually("its Lease", async || stage.lease().await).await;
    assert_eq!(found.status.unwrap().lease, lease.metadata.name);
    assert_eq!(lease.metadata.owner_references.unwrap()[0].kind, "Node");
    assert_eq!(
        lease.metadata.labels.unwrap()["app.kubernetes.io/name"],
        "ebb-agent"
    );
    let spec = lease.spec.unwrap();
    assert_eq!(spec.lease_duration_seconds, Some(4));
    let moves = async |since: Option<MicroTime>| {
        eventually("a renewal", async || {
            let now = stage.renewed().await;
            (now != since).then_some(())
        })
        .await;
    };
    moves(spec.renew_time).await;

    // A call into the driver that does not return: the library opens a pipe to which nobody writes.
    let kept = stage.state.with_extension("kept");
    let pipe = stage.state.with_extension("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    std::fs::copy(&stage.state, &kept).unwrap();
    std::fs::rename(&pipe, &stage.state).unwrap();
    stage.ready_says("a call into NVIDIA's driver hangs").await;
    let last = stage.renewed().await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(stage.renewed().await, last, "three renewals were due");

    // It returns.
    let hung = std::fs::OpenOptions::new()
        .write(true)
        .open(&stage.state)
        .unwrap();
    std::fs::rename(&kept, &stage.state).unwrap();
    drop(hung);
    moves(last).await;
    stage.ready_says("200 OK").await;
}
