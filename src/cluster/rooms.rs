//! Nodes and pods as the plans about nodes see them: free GPU memory, who is on a node, who waits for one.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod, PodSpec};
use kube::ResourceExt;

use crate::api::gpu_request;
use crate::api::names;
use crate::api::units::PodUid;
use crate::plan::ledger::{Hold, Ledger};
use crate::plan::nodes_wanted::{PendingPod, Taint, Toleration};
use crate::plan::room::GpuRoom;

/// A pod that ends within this many seconds has as good as left its GPU: asking for a node would take longer.
const LEAVES_SOON_S: i64 = 60;

/// The pods of the cluster, by node, finished ones left out.
pub struct PodsByNode(HashMap<String, Vec<Arc<Pod>>>);

impl PodsByNode {
    /// Sorts the view's pods.
    #[must_use]
    pub fn new(pods: &[Arc<Pod>]) -> Self {
        let mut map: HashMap<String, Vec<Arc<Pod>>> = HashMap::new();
        for pod in pods {
            if let Some(node) = pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref())
                && !is_finished(pod)
            {
                map.entry(node.clone()).or_default().push(pod.clone());
            }
        }
        Self(map)
    }

    fn on(&self, node: &str) -> &[Arc<Pod>] {
        self.0.get(node).map_or(&[], Vec::as_slice)
    }

    /// What is on the node, in words; `None`: nothing but DaemonSet and mirror pods.
    #[must_use]
    pub fn occupied(&self, node: &str) -> Option<String> {
        self.on(node)
            .iter()
            .find(|pod| !is_daemon(pod) && !is_mirror(pod))
            .map(|pod| format!("pod {}/{}", pod.namespace().unwrap_or_default(), pod.name_any()))
    }
}

fn is_finished(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

fn is_daemon(pod: &Pod) -> bool {
    pod.owner_references()
        .iter()
        .any(|owner| owner.kind == "DaemonSet")
}

fn is_mirror(pod: &Pod) -> bool {
    pod.annotations().contains_key("kubernetes.io/config.mirror")
}

/// Whether the node's `Ready` condition is true.
#[must_use]
pub fn is_ready(node: &Node) -> bool {
    node.status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Whether a person cordoned the node.
#[must_use]
pub fn is_cordoned(node: &Node) -> bool {
    node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true)
}

/// Whether the scheduler knows of the node's GPU memory.
#[must_use]
pub fn offers_gpu_memory(node: &Node) -> bool {
    node.status
        .as_ref()
        .and_then(|status| status.allocatable.as_ref()?.get(names::GPU_MEMORY))
        .is_some_and(|quantity| quantity.0 != "0")
}

/// Pods that are about to have memory on GPUs and that the API server does not know to be bound yet, by UID.
#[must_use]
pub fn expected(ledger: &Ledger) -> HashMap<String, Hold> {
    ledger
        .holds()
        .map(|(uid, hold)| (uid.to_string(), hold.clone()))
        .collect()
}

/// Pods that end so soon that what they have is as good as free.
#[must_use]
pub fn leaving(pods: &[Arc<Pod>], now: Timestamp) -> HashSet<PodUid> {
    pods.iter()
        .filter(|pod| leaves_soon(pod, now))
        .filter_map(|pod| pod.metadata.uid.as_deref().map(PodUid::from))
        .collect()
}

/// The node's healthy GPUs with what bound and expected pods leave of them, `leaving` ones taken out; empty until its
/// agent has told and is well.
#[must_use]
pub fn gpus(ledger: &Ledger, node: &str, leaving: &HashSet<PodUid>) -> Vec<GpuRoom> {
    let Some(node) = ledger.node(node).filter(|node| node.is_told()) else {
        return Vec::new();
    };
    node.gpus_without(&|uid| leaving.contains(uid))
        .iter()
        .filter(|gpu| gpu.closed.is_none())
        .map(GpuRoom::from)
        .collect()
}

fn leaves_soon(pod: &Pod, now: Timestamp) -> bool {
    pod.metadata.deletion_timestamp.as_ref().is_some_and(|end| {
        let left = end.0.as_second() - now.as_second();
        left.abs() <= LEAVES_SOON_S
    })
}

/// Taints that follow the node's conditions; [`is_ready`] and [`is_cordoned`] say the same without delay.
const CONDITION_TAINTS: [&str; 3] = [
    "node.kubernetes.io/not-ready",
    "node.kubernetes.io/unreachable",
    "node.kubernetes.io/unschedulable",
];

/// The node's taints that keep pods away, Ebb's own and those of its conditions left out.
#[must_use]
pub fn taints(node: &Node) -> Vec<Taint> {
    let mut taints = taints_now(node);
    taints.retain(|taint| !CONDITION_TAINTS.contains(&taint.key.as_str()));
    taints
}

/// All taints that keep pods away at this moment, Ebb's own left out.
#[must_use]
pub fn taints_now(node: &Node) -> Vec<Taint> {
    node.spec
        .iter()
        .flat_map(|spec| spec.taints.iter().flatten())
        .filter(|taint| taint.key != names::RELEASE_TAINT && taint.effect != "PreferNoSchedule")
        .map(|taint| Taint {
            key: taint.key.clone(),
            value: taint.value.clone().unwrap_or_default(),
            effect: taint.effect.clone(),
        })
        .collect()
}

/// The pod as one that waits for a GPU; `None` when it does not.
#[must_use]
pub fn pending(pod: &Pod) -> Option<PendingPod> {
    let spec = pod.spec.as_ref()?;
    let waits = spec.node_name.is_none()
        && spec.scheduler_name.as_deref() == Some(names::SCHEDULER)
        && pod.metadata.deletion_timestamp.is_none()
        && !is_finished(pod)
        && spec
            .scheduling_gates
            .iter()
            .flatten()
            .all(|gate| gate.name.starts_with("ebb.dev/"));
    if !waits {
        return None;
    }
    let request = gpu_request::gpu_request(spec, pod.metadata.annotations.as_ref()).ok()??;
    Some(PendingPod {
        uid: pod.uid().unwrap_or_default(),
        name: format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any()),
        created_ms: pod
            .creation_timestamp()
            .map_or(0, |created| created.0.as_millisecond()),
        request,
        node_selector: spec.node_selector.clone().unwrap_or_default(),
        tolerations: tolerations(spec),
    })
}

/// What the pod tolerates.
#[must_use]
pub fn tolerations(spec: &PodSpec) -> Vec<Toleration> {
    spec.tolerations
        .iter()
        .flatten()
        .map(|toleration| Toleration {
            key: toleration.key.clone().filter(|key| !key.is_empty()),
            value: if toleration.operator.as_deref() == Some("Exists") {
                None
            } else {
                Some(toleration.value.clone().unwrap_or_default())
            },
            effect: toleration.effect.clone().filter(|effect| !effect.is_empty()),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn pod(extra: serde_json::Value) -> Arc<Pod> {
        let mut value = json!({
            "metadata": {"name": "p", "namespace": "models"},
            "spec": {"nodeName": "n1", "containers": []},
        });
        json_patch::merge(&mut value, &extra);
        Arc::new(serde_json::from_value(value).unwrap())
    }

    #[test]
    fn only_pods_that_somebody_would_miss_occupy_a_node() {
        let others = [
            pod(
                json!({"metadata": {"ownerReferences": [{"kind": "DaemonSet", "name": "d", "apiVersion": "apps/v1", "uid": "u"}]}}),
            ),
            pod(json!({"metadata": {"annotations": {"kubernetes.io/config.mirror": "x"}}})),
            pod(json!({"status": {"phase": "Succeeded"}})),
        ];
        assert_eq!(PodsByNode::new(&others).occupied("n1"), None);
        let terminating = pod(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}));
        let all = [others[0].clone(), terminating];
        assert_eq!(
            PodsByNode::new(&all).occupied("n1").as_deref(),
            Some("pod models/p")
        );
    }
}
