//! Ebb installed on a cluster whose GPU nodes are objects only: nobody runs the pods, so that hundreds of them cost
//! nothing, and all that is seen is who was bound where. What is bound is said to be Ready at once.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use ebb::api::gpu_node::GpuNode;
use ebb_lab::ebb_install::{EBB, MODELS, Plan, Site};
use futures::StreamExt as _;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Event, Node, Pod};
use k8s_openapi::api::events;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, ResourceExt as _};
use serde_json::{Value, json};
use tokio_util::task::AbortOnDropHandle;

use super::client;

pub const GIB: u64 = 1 << 30;
/// Longest wait for one thing.
pub const STEP: Duration = Duration::from_secs(60);
/// How often things are looked at.
const LOOK: Duration = Duration::from_millis(50);
/// What the driver keeps of each card.
const RESERVED: u64 = GIB / 2;

/// A pod's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub node: String,
    pub gpus: Vec<String>,
    pub bytes: u64,
    pub share: String,
}

/// The different retries that were caused; see [`Hall::note_retries`].
pub struct Retries {
    seen: Arc<Mutex<BTreeSet<(String, String)>>>,
    _task: AbortOnDropHandle<()>,
}

impl Retries {
    pub fn seen(&self) -> BTreeSet<(String, String)> {
        self.seen.lock().unwrap().clone()
    }
}

pub struct Hall {
    pub site: Site,
    heartbeats: Vec<AbortOnDropHandle<()>>,
    _kubelet: AbortOnDropHandle<()>,
}

/// A pod with this annotation never becomes Ready.
pub const NEVER_READY: &str = "hall/never-ready";

/// Does what kubelets do: says of every pod that is bound that it is Ready, and ends those that are to go.
async fn kubelet(client: kube::Client) {
    let pods: Api<Pod> = Api::namespaced(client, MODELS);
    let mut bound = std::pin::pin!(
        kube::runtime::watcher(pods.clone(), kube::runtime::watcher::Config::default())
            .default_backoff()
            .applied_objects()
    );
    while let Some(pod) = bound.next().await {
        let Ok(pod) = pod else { continue };
        let runs = pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
        let told = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        if runs && pod.metadata.deletion_timestamp.is_some() {
            let _ = end(&pods, &pod.name_any()).await;
        } else if runs && told == Some("Pending") && !pod.annotations().contains_key(NEVER_READY) {
            // It may be gone by now.
            let _ = ready(&pods, &pod.name_any()).await;
        }
    }
}

async fn ready(pods: &Api<Pod>, name: &str) -> kube::Result<Pod> {
    let condition = json!({"type": "Ready", "status": "True", "lastTransitionTime": jiff::Timestamp::now()});
    let status = json!({"status": {"phase": "Running", "conditions": [condition]}});
    pods.patch_status(name, &PatchParams::default(), &Patch::Strategic(&status))
        .await
}

/// Its containers have ended, and it goes.
async fn end(pods: &Api<Pod>, name: &str) -> kube::Result<()> {
    let ended = json!({"status": {"phase": "Succeeded"}});
    pods.patch_status(name, &PatchParams::default(), &Patch::Strategic(&ended))
        .await?;
    force(pods, name).await
}

async fn force(pods: &Api<Pod>, name: &str) -> kube::Result<()> {
    let now = DeleteParams {
        grace_period_seconds: Some(0),
        ..DeleteParams::default()
    };
    pods.delete(name, &now).await.map(drop)
}

impl Hall {
    pub async fn open(ebb: &str) -> anyhow::Result<Hall> {
        let site = Site::start(Plan {
            gpu_nodes: 0,
            ..Plan::new(ebb)
        })
        .await?;
        site.install_ebb().await?;
        site.apply(&format!(
            "{{apiVersion: v1, kind: Namespace, metadata: {{name: {MODELS}}}}}"
        ))
        .await?;
        let hall = Hall {
            _kubelet: AbortOnDropHandle::new(tokio::spawn(kubelet(site.client.clone()))),
            site,
            heartbeats: Vec::new(),
        };
        Ok(hall)
    }

    fn all<K>(&self) -> Api<K>
    where
        K: kube::Resource<DynamicType = ()>,
    {
        Api::all(self.site.client.clone())
    }

    pub fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.site.client.clone(), MODELS)
    }

    /// Adds a Ready node with so many cards of that usable size, as its agent would tell.
    pub async fn add_node(&mut self, name: &str, cards: u64, usable: u64) -> anyhow::Result<()> {
        let nodes: Api<Node> = self.all();
        let node = json!({"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}});
        nodes
            .create(&PostParams::default(), &serde_json::from_value(node)?)
            .await?;
        let quantities = json!({
            "cpu": "64", "memory": "512Gi", "pods": "250", "ebb.dev/gpu-memory": (cards * usable).to_string(),
        });
        let now = jiff::Timestamp::now();
        let ready = json!({"type": "Ready", "status": "True", "reason": "Ready", "message": "",
            "lastHeartbeatTime": now, "lastTransitionTime": now});
        let status = json!({"status": {
            "capacity": quantities, "allocatable": quantities, "conditions": [ready],
        }});
        nodes
            .patch_status(name, &PatchParams::default(), &Patch::Merge(&status))
            .await?;
        let leases: Api<Lease> = Api::namespaced(self.site.client.clone(), "kube-node-lease");
        let lease = json!({"metadata": {"name": name},
            "spec": {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": micro(now)}});
        leases
            .create(&PostParams::default(), &serde_json::from_value(lease)?)
            .await?;
        let renewed = name.to_owned();
        self.heartbeats
            .push(AbortOnDropHandle::new(tokio::spawn(async move {
                loop {
                    tokio::time::sleep(Duration::from_secs(10)).await;
                    let renew = json!({"spec": {"renewTime": micro(jiff::Timestamp::now())}});
                    let _ = leases
                        .patch(&renewed, &PatchParams::default(), &Patch::Merge(&renew))
                        .await;
                }
            })));
        let gpu_nodes: Api<GpuNode> = self.all();
        let gpu_node = json!({"apiVersion": "ebb.dev/v1alpha1", "kind": "GpuNode", "metadata": {"name": name}, "spec": {}});
        gpu_nodes
            .create(&PostParams::default(), &serde_json::from_value(gpu_node)?)
            .await?;
        let gpus = (0..cards).map(|index| self.gpu(name, index, usable)).collect();
        self.tell_gpus(name, gpus).await
    }

    /// One card as an agent tells it.
    pub fn gpu(&self, node: &str, index: u64, usable: u64) -> Value {
        json!({"uuid": format!("GPU-{node}-{index}"), "index": index, "name": "NVIDIA L4",
            "memoryTotal": usable + RESERVED, "memoryReserved": RESERVED, "memoryUsed": 0, "healthy": true})
    }

    /// What the node's agent tells from now on.
    pub async fn tell_gpus(&self, node: &str, gpus: Vec<Value>) -> anyhow::Result<()> {
        let gpu_nodes: Api<GpuNode> = self.all();
        let status = json!({"status": {
            "driverVersion": "570.124.06", "count": gpus.len(), "gpus": gpus,
            "conditions": [{"type": "Ready", "status": "True", "reason": "Reading", "message": "",
                "lastTransitionTime": jiff::Timestamp::now()}],
        }});
        gpu_nodes
            .patch_status(node, &PatchParams::default(), &Patch::Merge(&status))
            .await?;
        Ok(())
    }

    /// Creates a pod that asks for this much GPU memory.
    pub async fn create(&self, name: &str, bytes: u64, annotations: Value) -> anyhow::Result<Pod> {
        self.create_with(name, bytes, json!({"metadata": {"annotations": annotations}}))
            .await
    }

    /// The same with more of a pod merged in.
    pub async fn create_with(&self, name: &str, bytes: u64, extra: Value) -> anyhow::Result<Pod> {
        let mut pod = json!({
            "metadata": {"name": name},
            "spec": {
                "schedulerName": "ebb-scheduler",
                "containers": [{"name": "model", "image": "none.invalid/model:1",
                    "resources": {"limits": {"ebb.dev/gpu-memory": bytes.to_string()}}}],
            },
        });
        json_patch::merge(&mut pod, &extra);
        let pod = serde_json::from_value(pod)?;
        let deadline = tokio::time::Instant::now() + STEP;
        loop {
            match self.pods().create(&PostParams::default(), &pod).await {
                Ok(pod) => return Ok(pod),
                // The namespace's ServiceAccount is not there yet, or no webhook at the moment.
                Err(error) if tokio::time::Instant::now() > deadline => return Err(error.into()),
                Err(_) => tokio::time::sleep(LOOK).await,
            }
        }
    }

    /// Waits until a pod is said to be Ready.
    pub async fn is_ready(&self, name: &str) -> anyhow::Result<()> {
        let deadline = tokio::time::Instant::now() + STEP;
        while !ebb_lab::demo::observe::is_ready(&self.pods().get(name).await?) {
            ensure!(tokio::time::Instant::now() < deadline, "{name} is not Ready");
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// Says of a bound pod that it is Ready.
    pub async fn say_ready(&self, name: &str) -> anyhow::Result<()> {
        ready(&self.pods(), name).await?;
        Ok(())
    }

    /// Deletes a pod whose containers have ended, as the kubelet does.
    pub async fn delete(&self, name: &str) -> anyhow::Result<()> {
        Ok(end(&self.pods(), name).await?)
    }

    /// Deletes a pod by force, whatever its containers do.
    pub async fn force(&self, name: &str) -> anyhow::Result<()> {
        Ok(force(&self.pods(), name).await?)
    }

    /// All models' pods are gone.
    pub async fn clear(&self) -> anyhow::Result<()> {
        for pod in self.pods().list(&ListParams::default()).await? {
            self.delete(&pod.name_any()).await?;
        }
        Ok(())
    }

    /// Where the bound pods are.
    pub async fn placed(&self) -> anyhow::Result<BTreeMap<String, Place>> {
        let pods = self.pods().list(&ListParams::default()).await?;
        Ok(pods
            .into_iter()
            .filter_map(|pod| place(&pod).map(|place| (pod.name_any(), place)))
            .collect())
    }

    /// Waits until the pod is bound.
    pub async fn bound(&self, name: &str) -> anyhow::Result<Place> {
        let deadline = tokio::time::Instant::now() + STEP;
        loop {
            let pod = self.pods().get(name).await?;
            if let Some(place) = place(&pod) {
                return Ok(place);
            }
            let why = pod.status.and_then(|status| status.conditions);
            ensure!(
                tokio::time::Instant::now() < deadline,
                "{name} was not bound: {why:?}"
            );
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Waits until so many pods are bound.
    pub async fn bound_at_least(&self, pods: usize) -> anyhow::Result<()> {
        let deadline = tokio::time::Instant::now() + STEP;
        while self.placed().await?.len() < pods {
            ensure!(tokio::time::Instant::now() < deadline, "fewer than {pods} bound");
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// Waits until the pod has been told why it has no place: by the leader if it is gated, else by the scheduler.
    pub async fn told_why(&self, pod: &Pod) -> anyhow::Result<String> {
        if self.is_gated(&pod.name_any()).await? {
            self.event(pod, "WaitsForGpuMemory").await
        } else {
            self.refused(&pod.name_any()).await
        }
    }

    /// Waits until the scheduler has told that it found no place; what it told.
    pub async fn refused(&self, name: &str) -> anyhow::Result<String> {
        let deadline = tokio::time::Instant::now() + STEP;
        loop {
            let pod = self.pods().get(name).await?;
            ensure!(place(&pod).is_none(), "{name} was bound");
            let conditions = pod
                .status
                .and_then(|status| status.conditions)
                .unwrap_or_default();
            let mut told = conditions.into_iter();
            let told =
                told.find(|c| c.type_ == "PodScheduled" && c.reason.as_deref() == Some("Unschedulable"));
            if let Some(message) = told.and_then(|condition| condition.message) {
                return Ok(message);
            }
            ensure!(tokio::time::Instant::now() < deadline, "{name} was told nothing");
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Waits until an Event on the node's `GpuNode` says this.
    pub async fn told(&self, node: &str, note: &str) -> anyhow::Result<()> {
        let events: Api<events::v1::Event> = self.all();
        let deadline = tokio::time::Instant::now() + STEP;
        loop {
            let list = events.list(&ListParams::default()).await?;
            let about = |event: &events::v1::Event| {
                let regarding = event.regarding.as_ref();
                regarding.is_some_and(|object| {
                    object.kind.as_deref() == Some("GpuNode") && object.name.as_deref() == Some(node)
                })
            };
            if list
                .iter()
                .any(|event| about(event) && event.note.as_deref() == Some(note))
            {
                return Ok(());
            }
            let notes: Vec<_> = list
                .iter()
                .filter(|event| about(event))
                .map(|event| &event.note)
                .collect();
            ensure!(
                tokio::time::Instant::now() < deadline,
                "{node} is told {notes:?}, not {note:?}"
            );
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Whether the pod is behind Ebb's scheduling gate.
    pub async fn is_gated(&self, name: &str) -> anyhow::Result<bool> {
        let spec = self.pods().get(name).await?.spec.unwrap_or_default();
        let mut gates = spec.scheduling_gates.into_iter().flatten();
        Ok(gates.any(|gate| gate.name == "ebb.dev/gpu-memory"))
    }

    /// Waits for an Event with that reason about the pod; its words.
    pub async fn event(&self, pod: &Pod, reason: &str) -> anyhow::Result<String> {
        let events: Api<Event> = Api::namespaced(self.site.client.clone(), MODELS);
        let about = format!(
            "involvedObject.uid={},reason={reason}",
            pod.uid().unwrap_or_default()
        );
        let deadline = tokio::time::Instant::now() + STEP;
        loop {
            let told = events.list(&ListParams::default().fields(&about)).await?;
            if let Some(words) = told.items.into_iter().next().and_then(|event| event.message) {
                return Ok(words);
            }
            ensure!(
                tokio::time::Instant::now() < deadline,
                "no Event {reason} about {}",
                pod.name_any()
            );
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Notes from now on each time that a Node is annotated to have the scheduler try refused pods again.
    pub fn note_retries(&self) -> Retries {
        let seen = Arc::new(Mutex::new(BTreeSet::new()));
        let (noted, nodes) = (seen.clone(), self.all::<Node>());
        let task = tokio::spawn(async move {
            let mut events = std::pin::pin!(watcher::watcher(nodes, watcher::Config::default()));
            let retry = |node: &Node| {
                let retry = node.annotations().get("ebb.dev/scheduling-retry")?;
                Some((node.name_any(), retry.clone()))
            };
            let mut before = BTreeSet::new();
            while let Some(event) = events.next().await {
                match event {
                    Ok(watcher::Event::InitApply(node)) => before.extend(retry(&node)),
                    Ok(watcher::Event::Apply(node)) => {
                        let new = retry(&node).filter(|retry| !before.contains(retry));
                        noted.lock().unwrap().extend(new);
                    }
                    _ => {}
                }
            }
        });
        Retries {
            seen,
            _task: AbortOnDropHandle::new(task),
        }
    }

    /// The leading controller: its pod and where its extender listens.
    pub async fn leader(&self) -> anyhow::Result<(String, SocketAddr)> {
        let leases: Api<Lease> = Api::namespaced(self.site.client.clone(), EBB);
        let lease = leases.get("ebb-controller").await?;
        let holder = lease.spec.and_then(|spec| spec.holder_identity);
        let holder = holder.context("nobody leads")?;
        let (pod, ip) = holder.split_once('_').context("the Lease's holder")?;
        Ok((pod.to_owned(), SocketAddr::new(ip.parse::<IpAddr>()?, 9444)))
    }

    /// Kills the process of a pod of Ebb's, as the kernel would for lack of memory.
    pub fn kill(&self, pod: &str) -> anyhow::Result<()> {
        for (_, log) in self.site.logs(EBB, pod) {
            if let Ok(pid) = std::fs::read_to_string(log.with_extension("pid")) {
                let kill = std::process::Command::new("kill")
                    .args(["-KILL", pid.trim()])
                    .status()?;
                ensure!(kill.success(), "{pod} could not be killed");
            }
        }
        Ok(())
    }

    /// Posts to the leader's extender as the scheduler does, with the scheduler's certificate.
    pub async fn ask(&self, verb: &str, body: &Value) -> anyhow::Result<Value> {
        let (_, address) = self.leader().await?;
        client::ask(&self.site.client, address, verb, body).await
    }

    /// No GPU was ever promised beyond what it has, whoever came and went.
    pub fn check_reservations(&self) -> anyhow::Result<()> {
        self.site.observer.look(|state| state.check_reservations())
    }
}

fn micro(time: jiff::Timestamp) -> String {
    format!("{time:.6}")
}

fn place(pod: &Pod) -> Option<Place> {
    let annotation = |key: &str| pod.annotations().get(key).cloned().unwrap_or_default();
    Some(Place {
        node: pod.spec.as_ref()?.node_name.clone()?,
        gpus: annotation("ebb.dev/gpu-devices")
            .split(',')
            .map(|name| name.trim_start_matches("runtime.nvidia.com/gpu=").to_owned())
            .collect(),
        bytes: annotation("ebb.dev/gpu-memory-bytes").parse().ok()?,
        share: annotation("ebb.dev/gpu-memory-share"),
    })
}
