//! Keeps the ledger by the watches of pods, nodes and inventories.

use std::collections::HashSet;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::ResourceExt;
use kube::runtime::watcher::Event;
use parking_lot::{Mutex, RwLock};

use super::view::{Hook, Hooks};
use crate::api::gpu_node::GpuNode;
use crate::api::gpu_request::{Sharing, gpu_request};
use crate::api::units::{Bytes, GpuId, NodeName, PodUid};
use crate::api::{annotations, names};
use crate::plan::ledger::{GpuFacts, Ledger, Reservation};

/// How the kubelet and container runtimes name a GPU by CDI.
pub const CDI_PREFIX: &str = "runtime.nvidia.com/gpu=";

/// The ledger, shared by the watches that keep it and those who ask it. Never held over an await.
pub type SharedLedger = Arc<RwLock<Ledger>>;

/// An empty ledger, and the hooks that fill it once [`super::view::View::start`] has them.
#[must_use]
pub fn feed() -> (SharedLedger, Hooks) {
    let ledger = SharedLedger::default();
    let hooks = Hooks {
        pods: Some(hook(
            &ledger,
            |pod: &Pod| PodUid::from(pod.uid().unwrap_or_default().as_str()),
            |ledger, uid, pod| match reservation(pod) {
                Some(reservation) => ledger.pod_bound(uid, reservation),
                // Not bound: what is expected for it stays. Ended: it holds nothing any more.
                None if ended(pod) || ledger.is_bound(uid) => ledger.pod_gone(uid),
                None => {}
            },
            Ledger::pod_gone,
        )),
        nodes: Some(hook(
            &ledger,
            |node: &Node| NodeName::from(node.name_any().as_str()),
            |ledger, name, node| ledger.node_seen(name, closed(node)),
            Ledger::node_gone,
        )),
        gpu_nodes: Some(hook(
            &ledger,
            |node: &GpuNode| NodeName::from(node.name_any().as_str()),
            |ledger, name, node| ledger.gpus_seen(name, gpus(node)),
            |ledger, name| ledger.gpus_seen(name, Vec::new()),
        )),
    };
    (ledger, hooks)
}

/// One kind's hook. After a watch broke, a new full list comes: what it does not name any more is gone.
fn hook<K, Key>(
    ledger: &SharedLedger,
    key: impl Fn(&K) -> Key + Send + Sync + 'static,
    seen: impl Fn(&mut Ledger, &Key, &K) + Send + Sync + 'static,
    gone: impl Fn(&mut Ledger, &Key) + Send + Sync + 'static,
) -> Hook<K>
where
    Key: Clone + Eq + std::hash::Hash + Send + 'static,
{
    let ledger = ledger.clone();
    // Keys of the last full list and all that came after it; during a new list, those of the old one not seen again.
    let known: Mutex<(HashSet<Key>, HashSet<Key>)> = Mutex::default();
    Box::new(move |event| {
        let (current, before) = &mut *known.lock();
        match event {
            Event::Init => *before = std::mem::take(current),
            Event::InitApply(object) | Event::Apply(object) => {
                let key = key(object);
                before.remove(&key);
                seen(&mut ledger.write(), &key, object);
                current.insert(key);
            }
            Event::Delete(object) => {
                let key = key(object);
                gone(&mut ledger.write(), &key);
                current.remove(&key);
            }
            Event::InitDone => {
                let mut ledger = ledger.write();
                before.drain().for_each(|key| gone(&mut ledger, &key));
            }
        }
    })
}

/// Whether the pod's containers have ended for good.
fn ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// What a bound pod holds. A pod that is being deleted holds it until it is gone; one whose containers have ended for
/// good holds nothing.
#[must_use]
pub fn reservation(pod: &Pod) -> Option<Reservation> {
    let spec = pod.spec.as_ref()?;
    let node = spec.node_name.as_deref()?;
    if ended(pod) {
        return None;
    }
    let asked = gpu_request(spec, pod.metadata.annotations.as_ref())
        .ok()
        .flatten()?;
    let annotation = |key: &str| pod.annotations().get(key).map(String::as_str);
    let gpus: Vec<GpuId> = annotation(annotations::GPU_DEVICES)
        .map(devices)
        .unwrap_or_default();
    let told: Option<u64> = annotation(annotations::GPU_MEMORY_BYTES).and_then(|bytes| bytes.parse().ok());
    Some(Reservation {
        pod: format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any()),
        node: NodeName::from(node),
        gpus,
        bytes_per_gpu: told.map_or(asked.bytes_per_gpu, Bytes),
        exclusive: asked.sharing == Sharing::Exclusive,
    })
}

/// The GPUs that an `ebb.dev/gpu-devices` annotation names.
#[must_use]
pub fn devices(annotation: &str) -> Vec<GpuId> {
    annotation
        .split(',')
        .map(|name| name.trim())
        .filter(|name| !name.is_empty())
        .map(|name| GpuId::from(name.strip_prefix(CDI_PREFIX).unwrap_or(name)))
        .collect()
}

/// Why a node takes no new pods, if it does not.
#[must_use]
pub fn closed(node: &Node) -> Option<String> {
    let spec = node.spec.as_ref();
    let taints = spec.and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    if node.metadata.deletion_timestamp.is_some() {
        Some("the node is being deleted".to_owned())
    } else if taints.iter().any(|taint| taint.key == names::RELEASE_TAINT) {
        Some("the node is being emptied to be released".to_owned())
    } else if spec.and_then(|spec| spec.unschedulable).unwrap_or(false) {
        Some("the node is cordoned".to_owned())
    } else {
        None
    }
}

fn gpus(node: &GpuNode) -> Vec<GpuFacts> {
    node.status
        .iter()
        .flat_map(|status| &status.gpus)
        .map(|gpu| GpuFacts {
            id: gpu.uuid.clone(),
            index: gpu.index,
            usable: gpu.usable(),
            unhealthy: (!gpu.healthy).then(|| {
                gpu.unhealthy_reason
                    .clone()
                    .unwrap_or_else(|| "unhealthy".to_owned())
            }),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn crash_of_a_watch_drops_what_the_new_list_does_not_name() {
        let (ledger, hooks) = feed();
        let nodes = hooks.nodes.expect("feed gives a hook for nodes");
        let named = |name: &str| Node {
            metadata: kube::api::ObjectMeta {
                name: Some(name.to_owned()),
                ..Default::default()
            },
            ..Default::default()
        };
        for event in [
            Event::Init,
            Event::InitApply(named("a")),
            Event::InitApply(named("b")),
            Event::InitDone,
            Event::Init,
            Event::InitApply(named("b")),
            Event::InitDone,
        ] {
            nodes(&event);
        }
        assert_eq!(
            ledger.read().nodes().map(NodeName::as_str).collect::<Vec<_>>(),
            ["b"]
        );
    }
}
