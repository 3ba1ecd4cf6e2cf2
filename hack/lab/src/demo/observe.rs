//! What the API server says while the story runs: watches in, moments and a state to wait on out.
//!
//! Nothing here is told by Ebb itself. A step of the story counts when it was seen here, so a log line
//! or an exit code alone can never make a run pass.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Event, Node, Pod};
use kube::api::{ApiResource, DynamicObject, GroupVersionKind};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

/// Pod annotations written with the Binding.
const DEVICES: &str = "ebb.dev/gpu-devices";
const BYTES: &str = "ebb.dev/gpu-memory-bytes";
const SHARE: &str = "ebb.dev/gpu-memory-share";

/// What a pod got of its GPUs, as its annotations say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// UUIDs of its GPUs.
    pub uuids: Vec<String>,
    /// Bytes on each of them.
    pub bytes: u64,
    /// The share as it was written.
    pub share: String,
}

/// One thing that happened.
#[derive(Clone, Debug)]
pub struct Moment {
    /// When it was seen.
    pub at: Instant,
    /// The same by the wall clock, to compare with what others wrote down.
    pub unix_ms: u64,
    /// What it was.
    pub what: What,
}

/// The kinds of thing that happen. Objects are named `namespace/name`.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the fields say what they are")]
pub enum What {
    /// A Deployment appeared.
    Created { workload: String, replicas: i32 },
    /// A Deployment's `replicas` changed.
    Scaled { workload: String, from: i32, to: i32 },
    /// A pod got its node, and its GPUs if it asked for some.
    Bound {
        pod: String,
        node: String,
        grant: Option<Grant>,
    },
    /// A pod became Ready.
    Ready { pod: String },
    /// A pod's object is gone.
    PodGone { pod: String },
    /// A Node appeared.
    NodeAdded { node: String, gpus: bool },
    /// A Node became Ready.
    NodeReady { node: String },
    /// Ebb's release taint was put on a Node, or taken off it.
    Fenced { node: String, on: bool },
    /// A Node's object is gone.
    NodeGone { node: String },
    /// An Event: somebody gave a reason.
    Told {
        object: String,
        kind: String,
        by: String,
        reason: String,
        message: String,
        warning: bool,
    },
}

/// A bind, and what was promised of each of its GPUs once it was done.
#[derive(Clone, Debug)]
pub struct Bind {
    /// The pod.
    pub pod: String,
    /// Its node.
    pub node: String,
    /// What it got.
    pub grant: Grant,
    /// Total of all reservations on each of its GPUs, itself included.
    pub totals: BTreeMap<String, u64>,
    /// When it was seen.
    pub at: Instant,
}

/// A GPU node's life.
#[derive(Clone, Copy, Debug)]
pub struct NodeLife {
    /// When its object appeared.
    pub since: Instant,
    /// When it went.
    pub until: Option<Instant>,
}

/// All that was seen so far.
#[derive(Debug, Default)]
pub struct State {
    /// Deployments by `namespace/name`.
    pub deployments: BTreeMap<String, Deployment>,
    /// Pods by `namespace/name`.
    pub pods: BTreeMap<String, Pod>,
    /// Nodes by name.
    pub nodes: BTreeMap<String, Node>,
    /// What has happened, in the order it was seen.
    pub moments: Vec<Moment>,
    /// Every bind of a pod with GPUs.
    pub binds: Vec<Bind>,
    /// Memory that pods can have of each GPU, by UUID, as the agents published it; kept when a node goes.
    pub usable: BTreeMap<String, u64>,
    /// Bytes of each GPU that each pod's processes use, by the pod's UID, as the agents tell it.
    pub used_by: BTreeMap<String, BTreeMap<String, u64>>,
    /// GPU nodes, by name and then in order: a name may come back.
    pub gpu_nodes: Vec<(String, NodeLife)>,
    told: BTreeMap<String, i32>,
}

impl State {
    /// Pods that belong to a Deployment (`namespace/name`), those that terminate included.
    pub fn pods_of<'a>(&'a self, workload: &'a str) -> impl Iterator<Item = &'a Pod> {
        self.pods
            .values()
            .filter(move |pod| workload_of(pod).as_deref() == Some(workload))
    }

    /// The pod of a Deployment that is bound and not on its way out.
    pub fn bound_pod<'a>(&'a self, workload: &'a str) -> Option<&'a Pod> {
        self.pods_of(workload)
            .find(|pod| node_of(pod).is_some() && pod.metadata.deletion_timestamp.is_none())
    }

    /// What a Deployment asks for.
    pub fn replicas(&self, workload: &str) -> Option<i32> {
        let spec = self.deployments.get(workload)?.spec.as_ref()?;
        Some(spec.replicas.unwrap_or(1))
    }

    /// How often a Deployment was taken from 0 to more.
    pub fn wakes(&self, workload: &str) -> usize {
        self.wakes_since(workload, 0)
    }

    /// The same, counted from the moment with index `first`.
    pub fn wakes_since(&self, workload: &str, first: usize) -> usize {
        let wake = |moment: &&Moment| matches!(&moment.what, What::Scaled { workload: w, from: 0, to } if w == workload && *to > 0);
        self.moments.iter().skip(first).filter(wake).count()
    }

    /// The highest total of reservations that any bind left on each GPU.
    pub fn peaks(&self) -> BTreeMap<String, u64> {
        let mut peaks = BTreeMap::new();
        for (uuid, total) in self.binds.iter().flat_map(|bind| &bind.totals) {
            let peak = peaks.entry(uuid.clone()).or_insert(0);
            *peak = (*peak).max(*total);
        }
        peaks
    }

    /// Checks every bind: the total on each GPU must be within what pods can have of it.
    ///
    /// # Errors
    /// The first bind that promised too much, or one on a GPU that no agent published.
    pub fn check_reservations(&self) -> anyhow::Result<()> {
        for bind in &self.binds {
            for (uuid, total) in &bind.totals {
                let Some(usable) = self.usable.get(uuid) else {
                    anyhow::bail!("pod {} was bound to {uuid}, which no GpuNode lists", bind.pod);
                };
                anyhow::ensure!(
                    total <= usable,
                    "once pod {} was bound, {total} bytes of {uuid} were promised; it has {usable}",
                    bind.pod
                );
            }
        }
        Ok(())
    }

    /// Seconds that GPU nodes have been there, all together, up to `now`.
    pub fn gpu_node_seconds(&self, now: Instant) -> f64 {
        let life = |(_, life): &(String, NodeLife)| life.until.unwrap_or(now) - life.since;
        self.gpu_nodes.iter().map(life).map(|d| d.as_secs_f64()).sum()
    }

    /// Names of the GPU nodes that are there.
    pub fn gpu_nodes_now(&self) -> BTreeSet<String> {
        let there = self.gpu_nodes.iter().filter(|(_, life)| life.until.is_none());
        there.map(|(name, _)| name.clone()).collect()
    }

    fn deployment(&mut self, deployment: Deployment) -> Option<What> {
        let workload = key(&deployment);
        let to = deployment
            .spec
            .as_ref()
            .and_then(|spec| spec.replicas)
            .unwrap_or(1);
        let before = self.replicas(&workload);
        self.deployments.insert(workload.clone(), deployment);
        match before {
            None => Some(What::Created {
                workload,
                replicas: to,
            }),
            Some(from) if from != to => Some(What::Scaled { workload, from, to }),
            Some(_) => None,
        }
    }

    fn pod(&mut self, pod: Pod, at: Instant) -> Vec<What> {
        let name = key(&pod);
        // A StatefulSet's next pod has the name of the last one.
        let before = self.pods.get(&name).filter(|old| old.uid() == pod.uid());
        let was_bound = before.is_some_and(|old| node_of(old).is_some());
        let was_ready = before.is_some_and(is_ready);
        let (node, ready) = (node_of(&pod).map(str::to_owned), is_ready(&pod));
        let grant = grant(&pod);
        self.pods.insert(name.clone(), pod);
        let mut whats = Vec::new();
        if let (false, Some(node)) = (was_bound, node) {
            if let Some(grant) = &grant {
                let total = |uuid: &String| (uuid.clone(), self.reserved(uuid));
                let totals = grant.uuids.iter().map(total).collect();
                self.binds.push(Bind {
                    pod: name.clone(),
                    node: node.clone(),
                    grant: grant.clone(),
                    totals,
                    at,
                });
            }
            whats.push(What::Bound {
                pod: name.clone(),
                node,
                grant,
            });
        }
        if ready && !was_ready {
            whats.push(What::Ready { pod: name });
        }
        whats
    }

    /// Bytes that the pods on a GPU were promised and have not given back.
    fn reserved(&self, uuid: &str) -> u64 {
        let over = |pod: &Pod| {
            let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
            matches!(phase, Some("Succeeded" | "Failed"))
        };
        let holding = self
            .pods
            .values()
            .filter(|pod| node_of(pod).is_some() && !over(pod));
        let grants = holding
            .filter_map(grant)
            .filter(|grant| grant.uuids.iter().any(|u| u == uuid));
        grants.map(|grant| grant.bytes).sum()
    }

    fn node(&mut self, node: Node, at: Instant) -> Vec<What> {
        let name = node.name_any();
        let gpus = node
            .labels()
            .get("nvidia.com/gpu.present")
            .is_some_and(|v| v == "true");
        let before = self.nodes.get(&name).filter(|old| old.uid() == node.uid());
        let (known, was_ready, was_fenced) = (
            before.is_some(),
            before.is_some_and(node_is_ready),
            before.is_some_and(is_fenced),
        );
        let (ready, fenced) = (node_is_ready(&node), is_fenced(&node));
        self.nodes.insert(name.clone(), node);
        let mut whats = Vec::new();
        if !known {
            if gpus {
                self.end_node(&name, at);
                self.gpu_nodes.push((
                    name.clone(),
                    NodeLife {
                        since: at,
                        until: None,
                    },
                ));
            }
            whats.push(What::NodeAdded {
                node: name.clone(),
                gpus,
            });
        }
        if ready && !was_ready {
            whats.push(What::NodeReady { node: name.clone() });
        }
        if fenced != was_fenced {
            whats.push(What::Fenced {
                node: name,
                on: fenced,
            });
        }
        whats
    }

    fn end_node(&mut self, name: &str, at: Instant) {
        let open = |(n, life): &&mut (String, NodeLife)| n == name && life.until.is_none();
        if let Some((_, life)) = self.gpu_nodes.iter_mut().find(open) {
            life.until = Some(at);
        }
    }

    fn event(&mut self, event: Event) -> Option<What> {
        // The same Event is written again each time it is repeated.
        let series = event.series.as_ref().and_then(|series| series.count);
        let count = event.count.or(series).unwrap_or(1);
        let uid = event.uid().unwrap_or_default();
        if self.told.insert(uid, count) == Some(count) {
            return None;
        }
        let object = &event.involved_object;
        let name = object.name.clone().unwrap_or_default();
        let by = event.reporting_component.filter(|by| !by.is_empty());
        let by = by.or(event.source.and_then(|source| source.component));
        Some(What::Told {
            object: match object.namespace.as_deref() {
                Some(namespace) if !namespace.is_empty() => format!("{namespace}/{name}"),
                _ => name,
            },
            kind: object.kind.clone().unwrap_or_default(),
            by: by.unwrap_or_default(),
            reason: event.reason.unwrap_or_default(),
            message: event.message.unwrap_or_default(),
            warning: event.type_.as_deref() == Some("Warning"),
        })
    }

    fn gpu_node(&mut self, object: &DynamicObject) {
        let gpus = object
            .data
            .pointer("/status/gpus")
            .and_then(|gpus| gpus.as_array());
        for gpu in gpus.into_iter().flatten() {
            let number = |field: &str| gpu.get(field).and_then(serde_json::Value::as_u64);
            if let (Some(uuid), Some(total)) =
                (gpu.get("uuid").and_then(|u| u.as_str()), number("memoryTotal"))
            {
                let usable = total.saturating_sub(number("memoryReserved").unwrap_or(0));
                self.usable.insert(uuid.to_owned(), usable);
                let pods = gpu.get("pods").and_then(|pods| pods.as_array());
                let used = |pod: &serde_json::Value| {
                    let uid = pod.get("uid")?.as_str()?.to_owned();
                    Some((uid, pod.get("memoryUsed")?.as_u64()?))
                };
                let used = pods.into_iter().flatten().filter_map(used).collect();
                self.used_by.insert(uuid.to_owned(), used);
            }
        }
    }
}

/// Follows one cluster; clones share it.
#[derive(Clone)]
pub struct Observer {
    inner: Arc<Inner>,
}

struct Inner {
    state: Mutex<State>,
    changed: watch::Sender<()>,
    listeners: Mutex<Vec<mpsc::UnboundedSender<Moment>>>,
    tasks: Mutex<Vec<AbortOnDropHandle<()>>>,
}

impl Observer {
    /// Starts the watches of what every cluster has.
    pub fn start(client: &Client) -> Self {
        let observer = Self {
            inner: Arc::new(Inner {
                state: Mutex::default(),
                changed: watch::channel(()).0,
                listeners: Mutex::default(),
                tasks: Mutex::default(),
            }),
        };
        observer.follow(
            Api::all(client.clone()),
            |state, deployment: Change<Deployment>, _| match deployment {
                Change::Is(deployment) => state.deployment(deployment).into_iter().collect(),
                Change::Gone(deployment) => {
                    state.deployments.remove(&key(&deployment));
                    Vec::new()
                }
            },
        );
        observer.follow(
            Api::all(client.clone()),
            |state, pod: Change<Pod>, at| match pod {
                Change::Is(pod) => state.pod(pod, at),
                Change::Gone(pod) => {
                    let pod = key(&pod);
                    state.pods.remove(&pod);
                    vec![What::PodGone { pod }]
                }
            },
        );
        observer.follow(
            Api::all(client.clone()),
            |state, node: Change<Node>, at| match node {
                Change::Is(node) => state.node(node, at),
                Change::Gone(node) => {
                    let node = node.name_any();
                    state.nodes.remove(&node);
                    state.end_node(&node, at);
                    vec![What::NodeGone { node }]
                }
            },
        );
        observer.follow(
            Api::all(client.clone()),
            |state, event: Change<Event>, _| match event {
                Change::Is(event) => state.event(event).into_iter().collect(),
                Change::Gone(_) => Vec::new(),
            },
        );
        observer
    }

    /// Follows the `GpuNode`s as well; call it once their kind exists.
    pub fn follow_gpu_nodes(&self, client: &Client) {
        let kind = ApiResource::from_gvk(&GroupVersionKind::gvk("ebb.dev", "v1alpha1", "GpuNode"));
        let api = Api::<DynamicObject>::all_with(client.clone(), &kind);
        self.follow(api, |state, object: Change<DynamicObject>, _| {
            if let Change::Is(object) = &object {
                state.gpu_node(object);
            }
            Vec::new()
        });
    }

    fn follow<K>(
        &self,
        api: Api<K>,
        take: impl Fn(&mut State, Change<K>, Instant) -> Vec<What> + Send + Sync + 'static,
    ) where
        K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    {
        let inner = Arc::downgrade(&self.inner);
        let task = tokio::spawn(async move {
            let mut events = watcher(api, watcher::Config::default()).default_backoff().boxed();
            loop {
                let change = match events.try_next().await {
                    Ok(Some(watcher::Event::InitApply(object) | watcher::Event::Apply(object))) => {
                        Change::Is(object)
                    }
                    Ok(Some(watcher::Event::Delete(object))) => Change::Gone(object),
                    Ok(Some(_)) => continue,
                    Ok(None) => return,
                    Err(error) => {
                        tracing::warn!(%error, "watching");
                        continue;
                    }
                };
                let Some(inner) = inner.upgrade() else { return };
                let (at, unix_ms) = (Instant::now(), unix_ms());
                let whats = take(&mut lock(&inner.state), change, at);
                for what in whats {
                    let moment = Moment { at, unix_ms, what };
                    lock(&inner.state).moments.push(moment.clone());
                    lock(&inner.listeners).retain(|listener| listener.send(moment.clone()).is_ok());
                }
                inner.changed.send_replace(());
            }
        });
        lock(&self.inner.tasks).push(AbortOnDropHandle::new(task));
    }

    /// The moments from now on.
    pub fn listen(&self) -> mpsc::UnboundedReceiver<Moment> {
        let (sender, receiver) = mpsc::unbounded_channel();
        lock(&self.inner.listeners).push(sender);
        receiver
    }

    /// Looks at the state as it is.
    pub fn look<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&lock(&self.inner.state))
    }

    /// The number of moments so far: a mark to count from.
    pub fn mark(&self) -> usize {
        self.look(|state| state.moments.len())
    }

    /// Waits until `look` finds something in the state.
    ///
    /// # Errors
    /// When it does not within `limit`; the message says what was waited for.
    pub async fn until<T>(
        &self,
        what: &str,
        limit: Duration,
        mut look: impl FnMut(&State) -> Option<T>,
    ) -> anyhow::Result<T> {
        let mut changed = self.inner.changed.subscribe();
        let seen = async {
            loop {
                changed.borrow_and_update();
                if let Some(found) = look(&lock(&self.inner.state)) {
                    return Ok(found);
                }
                changed.changed().await?;
            }
        };
        match tokio::time::timeout(limit, seen).await {
            Ok(seen) => seen,
            Err(_) => anyhow::bail!("not seen within {} s: {what}", limit.as_secs()),
        }
    }
}

enum Change<K> {
    Is(K),
    Gone(K),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

fn key<K: ResourceExt>(object: &K) -> String {
    format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any())
}

/// The node a pod is bound to.
pub fn node_of(pod: &Pod) -> Option<&str> {
    let name = pod.spec.as_ref()?.node_name.as_deref()?;
    Some(name).filter(|name| !name.is_empty())
}

/// What a pod got of its GPUs.
pub fn grant(pod: &Pod) -> Option<Grant> {
    let annotation = |key: &str| pod.annotations().get(key);
    let uuid = |device: &str| {
        device
            .trim()
            .trim_start_matches("runtime.nvidia.com/gpu=")
            .to_owned()
    };
    Some(Grant {
        uuids: annotation(DEVICES)?.split(',').map(uuid).collect(),
        bytes: annotation(BYTES)?.parse().ok()?,
        share: annotation(SHARE)?.clone(),
    })
}

/// The Deployment a pod belongs to, as `namespace/name`, by its ReplicaSet's name.
pub fn workload_of(pod: &Pod) -> Option<String> {
    let owner = pod
        .owner_references()
        .iter()
        .find(|owner| owner.kind == "ReplicaSet")?;
    let (deployment, _hash) = owner.name.rsplit_once('-')?;
    Some(format!("{}/{deployment}", pod.namespace()?))
}

/// Whether a pod is Ready.
pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_deref());
    let ready = |c: &k8s_openapi::api::core::v1::PodCondition| c.type_ == "Ready" && c.status == "True";
    conditions.unwrap_or_default().iter().any(ready)
}

fn node_is_ready(node: &Node) -> bool {
    let conditions = node
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_deref());
    let ready = |c: &k8s_openapi::api::core::v1::NodeCondition| c.type_ == "Ready" && c.status == "True";
    conditions.unwrap_or_default().iter().any(ready)
}

fn is_fenced(node: &Node) -> bool {
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref());
    taints
        .unwrap_or_default()
        .iter()
        .any(|taint| taint.key == "ebb.dev/release")
}
