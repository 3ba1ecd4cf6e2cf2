//! Keeps the ledger current from the same watches that feed the view: Kubernetes objects in, ledger events out.

use std::collections::HashSet;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod, PodSpec};
use kube::ResourceExt;
use kube::runtime::watcher;
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;

use super::clock::Clock;
use super::pod_life;
use super::view::{Hook, Hooks};
use crate::api::gpu_node::{Gpu, GpuNode};
use crate::api::gpu_request::{GpuRequest, GpuRequestError, Sharing, gpu_request};
use crate::api::units::{Bytes, GpuId, NodeName, PodUid};
use crate::api::{annotations, host, names};
use crate::plan::ledger::{
    Claim, Entry, Event, Fence, GpuFacts, Images, Inventory, Ledger, NeighbourFacts, NodeFacts, PodFacts,
};
use crate::plan::placement::{Needs, Want};

/// How the kubelet and container runtimes name a GPU by CDI.
pub const CDI_PREFIX: &str = "runtime.nvidia.com/gpu=";

/// The one ledger of the process. Cheap to clone; all clones are one.
#[derive(Clone, Default)]
pub struct SharedLedger(Arc<Shared>);

struct Shared {
    ledger: RwLock<Ledger>,
    freed: watch::Sender<u64>,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            ledger: RwLock::default(),
            freed: watch::Sender::new(0),
        }
    }
}

impl SharedLedger {
    /// An empty one whose GPUs take one start at a time, each for so long at most; `None`: any number.
    #[must_use]
    pub fn new(start_limit: Option<Duration>) -> Self {
        let limit_ms = |limit: Duration| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        Self(Arc::new(Shared {
            ledger: RwLock::new(Ledger::new(start_limit.map(limit_ms))),
            freed: watch::Sender::new(0),
        }))
    }

    /// Looks at it. The closure keeps the lock from being held over an await.
    pub fn read<R>(&self, look: impl FnOnce(&Ledger) -> R) -> R {
        look(&self.0.ledger.read())
    }

    /// Changes it, and tells [`Self::freed`]'s receivers when that made room.
    pub fn update<R>(&self, change: impl FnOnce(&mut Ledger) -> R) -> R {
        let (result, freed) = {
            let mut ledger = self.0.ledger.write();
            let result = change(&mut ledger);
            (result, ledger.freed())
        };
        self.0.freed.send_if_modified(|known| {
            // Two writers may come here in the other order.
            let more = freed > *known;
            *known = freed.max(*known);
            more
        });
        result
    }

    /// A copy to try things on: "what if this node were fenced, and its pods had to go elsewhere".
    #[must_use]
    pub fn copy(&self) -> Ledger {
        self.read(Ledger::clone)
    }

    /// Raised whenever a new pod can have more memory somewhere than before.
    #[must_use]
    pub fn freed(&self) -> watch::Receiver<u64> {
        self.0.freed.subscribe()
    }
}

/// The hooks that keep a ledger current once they are given to [`super::view::View::start`].
#[must_use]
pub fn feed(ledger: &SharedLedger, clock: Clock) -> Hooks {
    let hook_of = || (ledger.clone(), clock);
    Hooks {
        pods: Some(hook(hook_of(), pod_uid, pod_event, Event::PodGone, |ledger| {
            ledger.entered_pods().cloned().collect()
        })),
        nodes: Some(hook(
            hook_of(),
            |node: &Node| node_name(node),
            |node| Some(Event::Node(node_facts(node))),
            Event::NodeGone,
            |ledger| ledger.nodes().map(|node| node.name().clone()).collect(),
        )),
        gpu_nodes: Some(hook(
            hook_of(),
            |node: &GpuNode| node_name(node),
            |node| Some(Event::Inventory(inventory(node))),
            Event::InventoryGone,
            |ledger| ledger.nodes().map(|node| node.name().clone()).collect(),
        )),
    }
}

/// One kind's watch events as ledger events. After a full list, whatever the ledger knows and the list does not have is
/// gone.
fn hook<K: 'static, Id: std::hash::Hash + Eq + Send + 'static>(
    (ledger, clock): (SharedLedger, Clock),
    id: impl Fn(&K) -> Id + Send + Sync + 'static,
    is: impl Fn(&K) -> Option<Event> + Send + Sync + 'static,
    gone: impl Fn(Id) -> Event + Send + Sync + 'static,
    known: impl Fn(&Ledger) -> Vec<Id> + Send + Sync + 'static,
) -> Hook<K> {
    let listed: Mutex<HashSet<Id>> = Mutex::default();
    let tell = move |change: &dyn Fn(&mut Ledger)| {
        ledger.update(|ledger| {
            ledger.set_clock(clock.now_ms());
            change(ledger);
        });
    };
    let now = move |ledger: &mut Ledger, object: &K| {
        if let Some(event) = is(object) {
            ledger.apply(event);
        }
    };
    Box::new(move |event| match event {
        watcher::Event::Init => listed.lock().clear(),
        watcher::Event::InitApply(object) => {
            listed.lock().insert(id(object));
            tell(&|ledger| now(ledger, object));
        }
        watcher::Event::InitDone => {
            let listed = std::mem::take(&mut *listed.lock());
            tell(&|ledger| {
                for id in known(ledger) {
                    if !listed.contains(&id) {
                        ledger.apply(gone(id));
                    }
                }
            });
        }
        watcher::Event::Apply(object) => tell(&|ledger| now(ledger, object)),
        // Its last state comes with it: whether a pod's containers have ended.
        watcher::Event::Delete(object) => tell(&|ledger| {
            now(ledger, object);
            ledger.apply(gone(id(object)));
        }),
    })
}

/// The pod's UID.
#[must_use]
pub fn pod_uid(pod: &Pod) -> PodUid {
    PodUid::from(pod.metadata.uid.as_deref().unwrap_or_default())
}

fn node_name<K: kube::Resource>(node: &K) -> NodeName {
    NodeName::from(node.meta().name.as_deref().unwrap_or_default())
}

/// What the ledger needs of a pod.
#[must_use]
pub fn pod_event(pod: &Pod) -> Option<Event> {
    let spec = pod.spec.as_ref()?;
    let node = spec.node_name.as_deref().map(NodeName::from);
    let finished = pod_life::is_finished(pod);
    let request = match gpu_request(spec, pod.metadata.annotations.as_ref()) {
        Ok(Some(request)) => request,
        Ok(None) => {
            return Some(Event::Neighbour(NeighbourFacts {
                uid: pod_uid(pod),
                node,
                host: host::of_spec(spec),
                finished,
            }));
        }
        Err(error) => unreadable(pod, &error),
    };
    let claim = claim(pod, &request);
    Some(Event::Pod(PodFacts {
        entry: entry(pod, claim),
        node,
        finished,
        start: pod_life::start(pod),
    }))
}

/// A pod whose request makes no sense, and which somebody bound all the same: it could use anything.
fn unreadable(pod: &Pod, error: &GpuRequestError) -> GpuRequest {
    tracing::warn!(pod = pod.name_any(), namespace = pod.namespace(), %error, "unreadable GPU memory request");
    GpuRequest {
        gpus: NonZeroU32::MIN,
        bytes_per_gpu: Bytes::MAX,
        sharing: Sharing::Exclusive,
    }
}

/// A pod's page entry with this claim.
#[must_use]
pub fn entry(pod: &Pod, claim: Claim) -> Entry {
    Entry {
        uid: pod_uid(pod),
        namespace: pod.metadata.namespace.as_deref().unwrap_or_default().into(),
        name: pod.metadata.name.as_deref().unwrap_or_default().into(),
        host: pod.spec.as_ref().map(host::of_spec).unwrap_or_default(),
        claim,
    }
}

/// What a pod asks of a node; nothing where that makes no sense.
#[must_use]
pub fn want(pod: &Pod) -> Option<Want> {
    let gpus = gpu_request(pod.spec.as_ref()?, pod.metadata.annotations.as_ref()).ok()?;
    Some(want_of(pod, gpus))
}

/// The same where what it asks of GPUs is known.
#[must_use]
pub fn want_of(pod: &Pod, gpus: Option<GpuRequest>) -> Want {
    let spec = pod.spec.as_ref();
    Want {
        gpus,
        host: spec.map(host::of_spec).unwrap_or_default(),
        needs: spec.map(needs).unwrap_or_default(),
    }
}

/// The labels that a node must have: by `nodeSelector`, and by a required affinity where that has no alternatives.
fn needs(spec: &PodSpec) -> Needs {
    let mut needs = Needs::default();
    for (key, value) in spec.node_selector.iter().flatten() {
        needs.require(key, std::iter::once(value.as_str()));
    }
    let affinity = spec
        .affinity
        .as_ref()
        .and_then(|affinity| affinity.node_affinity.as_ref());
    let required =
        affinity.and_then(|node| node.required_during_scheduling_ignored_during_execution.as_ref());
    if let Some([term]) = required.map(|required| required.node_selector_terms.as_slice()) {
        for expression in term
            .match_expressions
            .iter()
            .flatten()
            .filter(|e| e.operator == "In")
        {
            let values = expression.values.iter().flatten();
            needs.require(&expression.key, values.map(String::as_str));
        }
    }
    needs
}

fn claim(pod: &Pod, request: &GpuRequest) -> Claim {
    let written = pod.annotations();
    let bytes = written
        .get(annotations::GPU_MEMORY_BYTES)
        .and_then(|text| text.parse().ok());
    Claim {
        gpus: written.get(annotations::GPU_DEVICES).map(|text| devices(text)),
        bytes_per_gpu: bytes.map_or(request.bytes_per_gpu, Bytes),
        sharing: request.sharing,
    }
}

/// The UUIDs in the annotation's value, which are CDI names or bare.
#[must_use]
pub fn devices(text: &str) -> Vec<GpuId> {
    text.split(',')
        .map(str::trim)
        .map(|name| name.strip_prefix(CDI_PREFIX).unwrap_or(name))
        .filter(|uuid| !uuid.is_empty())
        .map(GpuId::from)
        .collect()
}

/// What the ledger needs of a Node.
#[must_use]
pub fn node_facts(node: &Node) -> NodeFacts {
    let spec = node.spec.as_ref();
    let taints = spec.and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    let fence = if node.metadata.deletion_timestamp.is_some() {
        Some(Fence::Deleting)
    } else if taints.iter().any(|taint| taint.key == names::RELEASE_TAINT) {
        Some(Fence::Releasing)
    } else if spec.is_some_and(|spec| spec.unschedulable == Some(true)) {
        Some(Fence::Cordoned)
    } else {
        None
    };
    let allocatable = node
        .status
        .as_ref()
        .and_then(|status| status.allocatable.as_ref());
    NodeFacts {
        name: node_name(node),
        fence,
        allocatable: allocatable.map(|list| host::of_list(Some(list))),
        labels: Arc::new(node.labels().clone()),
        images: images(node),
    }
}

fn images(node: &Node) -> Images {
    let held = node
        .status
        .iter()
        .filter_map(|status| status.images.as_ref())
        .flatten();
    Images::new(held.flat_map(|image| {
        let size = Bytes(
            image
                .size_bytes
                .and_then(|size| size.try_into().ok())
                .unwrap_or_default(),
        );
        image
            .names
            .iter()
            .flatten()
            .map(move |name| (name.as_str(), size))
    }))
}

/// What the ledger needs of a GpuNode.
#[must_use]
pub fn inventory(node: &GpuNode) -> Inventory {
    let status = node.status.as_ref();
    let conditions = status
        .map(|status| status.conditions.as_slice())
        .unwrap_or_default();
    let ready = conditions.iter().find(|condition| condition.type_ == "Ready");
    let closed = match ready {
        Some(ready) if ready.status == "True" => None,
        Some(ready) if ready.message.is_empty() => Some(ready.reason.as_str().into()),
        Some(ready) => Some(ready.message.as_str().into()),
        None => Some("the agent has not read them yet".into()),
    };
    Inventory {
        node: node_name(node),
        closed,
        gpus: status
            .map(|status| status.gpus.iter().map(gpu_facts).collect())
            .unwrap_or_default(),
    }
}

fn gpu_facts(gpu: &Gpu) -> GpuFacts {
    let why = || gpu.unhealthy_reason.as_deref().unwrap_or("unhealthy");
    let pods = gpu.pods.iter();
    GpuFacts {
        id: gpu.uuid.clone(),
        index: gpu.index,
        usable: gpu.usable(),
        used: gpu.memory_used,
        foreign: gpu.memory_foreign,
        // A pod without a figure is left out: then what it declared stands.
        used_by: pods
            .filter_map(|pod| Some((pod.uid.clone(), pod.memory_used?)))
            .collect(),
        closed: (!gpu.healthy).then(|| why().into()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::api::units::MilliCpu;
    use serde_json::json;
    use watcher::Event as Seen;

    #[test]
    fn devices_by_cdi_name_or_uuid() {
        let expected = vec![GpuId::from("GPU-a"), GpuId::from("GPU-b")];
        assert_eq!(
            devices("runtime.nvidia.com/gpu=GPU-a,runtime.nvidia.com/gpu=GPU-b"),
            expected
        );
        assert_eq!(devices("GPU-a, GPU-b,"), expected);
        assert!(devices("").is_empty());
    }

    fn pod(uid: &str, extra: serde_json::Value) -> Pod {
        let mut pod = json!({
            "metadata": {"name": uid, "namespace": "models", "uid": uid},
            "spec": {"containers": [{"name": "c", "resources": {"limits": {"ebb.dev/gpu-memory": "18Gi"}}}]},
        });
        json_patch::merge(&mut pod, &extra);
        serde_json::from_value(pod).unwrap()
    }

    #[test]
    fn crash_of_a_watch_drops_what_the_new_list_does_not_name() {
        let ledger = SharedLedger::default();
        let hooks = feed(&ledger, Clock::start());
        let told = hooks.pods.unwrap();
        let bound = |uid| pod(uid, json!({"spec": {"nodeName": "n"}}));
        for event in [
            Seen::Init,
            Seen::InitApply(bound("a")),
            Seen::InitApply(bound("b")),
            Seen::InitDone,
            Seen::Init,
            Seen::InitApply(bound("b")),
            Seen::InitDone,
        ] {
            told(&event);
        }
        let left = ledger.read(|ledger| ledger.bound_pods().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(left, ["b"]);
    }

    #[test]
    fn a_pod_that_somebody_else_bound_is_unassigned_and_a_finished_one_has_nothing() {
        let entry = |pod: &Pod| match pod_event(pod) {
            Some(Event::Pod(facts)) => facts,
            other => panic!("{other:?}"),
        };
        let bound = entry(&pod("a", json!({"spec": {"nodeName": "n"}})));
        assert_eq!((bound.entry.claim.gpus, bound.finished), (None, false));
        let ours = pod(
            "b",
            json!({"spec": {"nodeName": "n"}, "status": {"phase": "Failed"}, "metadata": {"annotations": {
                "ebb.dev/gpu-devices": "runtime.nvidia.com/gpu=GPU-a", "ebb.dev/gpu-memory-bytes": "7"}}}),
        );
        let ours = entry(&ours);
        assert_eq!(ours.entry.claim.gpus, Some(vec![GpuId::from("GPU-a")]));
        assert_eq!((ours.entry.claim.bytes_per_gpu, ours.finished), (Bytes(7), true));
    }

    #[test]
    fn a_pod_without_gpu_memory_takes_cpu_and_memory_from_its_node() {
        let other = json!({
            "metadata": {"uid": "c"},
            "spec": {"nodeName": "n", "containers": [{"name": "c", "resources": {"requests": {"cpu": "1500m", "memory": "2Ki"}}}]},
        });
        let neighbour = Event::Neighbour(NeighbourFacts {
            uid: "c".into(),
            node: Some("n".into()),
            host: host::Host {
                cpu: MilliCpu(1500),
                memory: Bytes(2048),
            },
            finished: false,
        });
        assert_eq!(
            pod_event(&serde_json::from_value(other).unwrap()),
            Some(neighbour)
        );
    }

    #[test]
    fn what_pods_use_reaches_the_ledger_and_unknown_stays_unknown() {
        let gpu = |extra: serde_json::Value| {
            let mut gpu = json!({"uuid": "GPU-a", "index": 0, "name": "NVIDIA L4", "memoryTotal": 24, "memoryReserved": 1,
                "memoryUsed": 20, "healthy": true});
            json_patch::merge(&mut gpu, &extra);
            gpu_facts(&serde_json::from_value(gpu).unwrap())
        };
        let told = gpu(json!({"memoryForeign": 3, "pods": [{"uid": "p", "memoryUsed": 17}, {"uid": "q"}]}));
        assert_eq!(told.foreign, Some(Bytes(3)));
        assert_eq!(told.used_by, [("p".into(), Bytes(17))].into());
        let untold = gpu(json!({}));
        assert_eq!((untold.foreign, untold.used_by.len()), (None, 0));
    }

    #[test]
    fn needs_of_selector_and_affinity() {
        let affinity = json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
            {"matchExpressions": [{"key": "card", "operator": "In", "values": ["a", "b"]}]}]}}});
        let pod = pod(
            "p",
            json!({"spec": {"nodeSelector": {"pool": "x"}, "affinity": affinity}}),
        );
        let needs = want(&pod).unwrap().needs;
        let labels = |pairs: &[(&str, &str)]| {
            pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect()
        };
        assert!(needs.met_by(&labels(&[("pool", "x"), ("card", "b")])));
        assert!(!needs.met_by(&labels(&[("pool", "x"), ("card", "c")])));
        assert!(!needs.met_by(&labels(&[("card", "a")])));
    }
}
