//! Pods and nodes as the plan about waiting pods sees them.

use std::collections::HashMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod, PodSpec};
use kube::ResourceExt;

use super::ledger_feed::{self, SharedLedger};
use super::rooms;
use super::view::View;
use crate::api::names;
use crate::api::units::{NodeName, PodUid};
use crate::plan::nodes_wanted::tolerates;
use crate::plan::placement::Refusal;
use crate::plan::waiting::{self, Ask, Bar, Cluster, Needs, Waiting};

/// What every node is refused with while no controller leads.
pub const NO_LEADER: &str =
    "Ebb's controller is choosing a new leader; the pod is tried again as soon as there is one";

/// How far a pod without a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Behind Ebb's gate.
    Gated(Waiting),
    /// Behind no gate, and the scheduler has neither bound nor refused it.
    Opened(Waiting),
}

/// Where the pod's gate is in its list.
#[must_use]
pub fn gate_of(pod: &Pod) -> Option<usize> {
    let mut gates = pod.spec.as_ref()?.scheduling_gates.iter().flatten();
    gates.position(|gate| gate.name == names::SCHEDULING_GATE)
}

/// How far the pod is, if it waits for GPU memory. One behind somebody else's gate too is none of them: what is free
/// now says nothing of when that gate opens.
#[must_use]
pub fn stage(pod: &Pod) -> Option<Stage> {
    let spec = pod.spec.as_ref()?;
    let gates = spec.scheduling_gates.as_ref().map_or(0, Vec::len);
    let ours = gate_of(pod).is_some();
    let going = pod.metadata.deletion_timestamp.is_some() || spec.node_name.is_some();
    if going || gates != usize::from(ours) {
        return None;
    }
    let of_ebb = spec.scheduler_name.as_deref() == Some(names::SCHEDULER);
    let needs = match ask(pod) {
        _ if !of_ebb => Needs::Nothing("it goes to a scheduler that does not ask Ebb"),
        Some(ask) => Needs::Room(ask),
        None => Needs::Nothing("what it asks of GPUs cannot be read; kube-scheduler is told why"),
    };
    let waiting = Waiting {
        uid: ledger_feed::pod_uid(pod),
        name: format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any()),
        created_ms: pod.creation_timestamp().map_or(0, |at| at.0.as_millisecond()),
        needs,
    };
    if ours {
        return Some(Stage::Gated(waiting));
    }
    let asks = matches!(waiting.needs, Needs::Room(_));
    (asks && !refused(pod)).then_some(Stage::Opened(waiting))
}

/// Whether the scheduler told that it found no place, and evicts nobody for it. A refusal while nobody led is none: the
/// pod had no turn.
fn refused(pod: &Pod) -> bool {
    let Some(status) = &pod.status else { return false };
    let nominated = status.nominated_node_name.as_deref().unwrap_or_default();
    let unschedulable = status
        .conditions
        .iter()
        .flatten()
        .filter(|condition| condition.type_ == "PodScheduled" && condition.status == "False")
        .filter(|condition| condition.reason.as_deref() == Some("Unschedulable"))
        .any(|condition| !condition.message.iter().any(|words| words.contains(NO_LEADER)));
    unschedulable && nominated.is_empty()
}

/// What a pod asks; `None` where it asks for no GPU memory, or for what makes no sense.
#[must_use]
pub fn ask(pod: &Pod) -> Option<Ask> {
    let spec = pod.spec.as_ref()?;
    let want = ledger_feed::want(pod)?;
    Some(Ask {
        request: want.gpus.clone()?,
        want,
        priority: priority(spec),
        evicts: spec.preemption_policy.as_deref() != Some("Never"),
        tolerations: Some(rooms::tolerations(spec)),
    })
}

fn priority(spec: &PodSpec) -> i32 {
    spec.priority.unwrap_or(0)
}

/// Priorities of the bound pods that one of this priority could have evicted.
#[must_use]
pub fn bound_below(pods: &[Arc<Pod>], highest: i32) -> HashMap<PodUid, i32> {
    pods.iter()
        .filter(|pod| pod.metadata.deletion_timestamp.is_none())
        .filter_map(|pod| {
            let spec = pod.spec.as_ref().filter(|spec| spec.node_name.is_some())?;
            let priority = Some(priority(spec)).filter(|priority| *priority < highest)?;
            Some((ledger_feed::pod_uid(pod), priority))
        })
        .collect()
}

/// Why the scheduler would not put the pod on a node, beside what the ledger knows.
#[must_use]
pub fn bar(view: &View, node: &NodeName, ask: &Ask) -> Option<Bar> {
    bar_of(&*view.nodes.get("", node.as_str())?, ask)
}

fn bar_of(node: &Node, ask: &Ask) -> Option<Bar> {
    if !rooms::is_ready(node) {
        return Some(Bar::NotReady);
    }
    if !rooms::offers_gpu_memory(node) {
        return Some(Bar::Untold);
    }
    let tolerations = ask.tolerations.as_ref()?;
    let tolerated = |taint| tolerations.iter().any(|toleration| tolerates(toleration, taint));
    // A node that has just become Ready keeps its taint for a moment, and the scheduler looks at that.
    (!rooms::taints_now(node).iter().all(tolerated)).then_some(Bar::Tainted)
}

/// Whether a pod that is being created could be placed now.
///
/// # Errors
/// Why not.
pub fn room_for(view: &View, ledger: &SharedLedger, mut ask: Ask) -> Result<(), Refusal> {
    // The runtime class may bring more, after this.
    ask.tolerations = None;
    let nobody = HashMap::new();
    let look = |bound: &HashMap<PodUid, i32>| {
        ledger.read(|ledger| {
            let cluster = Cluster {
                ledger,
                bar: &|node, ask| bar(view, node, ask),
                bound,
            };
            waiting::room(cluster, &ask)
        })
    };
    // Most pods have room; who could be evicted is looked up for the others only.
    look(&nobody).or_else(|refusal| {
        let bound = bound_below(&view.pods.all(), ask.priority);
        if bound.is_empty() {
            Err(refusal)
        } else {
            look(&bound)
        }
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::{Value, json};

    fn pod(extra: &Value) -> Pod {
        let mut pod = json!({
            "metadata": {"name": "p", "namespace": "models", "uid": "u"},
            "spec": {"schedulerName": "ebb-scheduler", "containers": [
                {"name": "c", "resources": {"limits": {"ebb.dev/gpu-memory": "18Gi"}}}]},
        });
        json_patch::merge(&mut pod, extra);
        serde_json::from_value(pod).unwrap()
    }

    fn gates(names: &[&str]) -> Value {
        let gates: Vec<Value> = names.iter().map(|name| json!({"name": name})).collect();
        json!({"spec": {"schedulingGates": gates}})
    }

    fn condition(reason: &str) -> Value {
        json!({"status": {"conditions": [{"type": "PodScheduled", "status": "False", "reason": reason}]}})
    }

    #[test]
    fn a_pod_is_gated_opened_or_neither() {
        let is = |extra: &Value| match stage(&pod(extra)) {
            Some(Stage::Gated(_)) => "gated",
            Some(Stage::Opened(_)) => "opened",
            None => "neither",
        };
        assert_eq!(is(&json!({})), "opened");
        assert_eq!(is(&condition("SchedulingGated")), "opened");
        assert_eq!(is(&condition("Unschedulable")), "neither");
        let mut leaderless = condition("Unschedulable");
        leaderless["status"]["conditions"][0]["message"] =
            format!("0/4 nodes are available: 3 {NO_LEADER}.").into();
        assert_eq!(is(&leaderless), "opened");
        let mut nominated = condition("Unschedulable");
        nominated["status"]["nominatedNodeName"] = "n".into();
        assert_eq!(is(&nominated), "opened");
        assert_eq!(is(&gates(&["ebb.dev/gpu-memory"])), "gated");
        assert_eq!(is(&gates(&["other", "ebb.dev/gpu-memory"])), "neither");
        assert_eq!(is(&gates(&["other"])), "neither");
        assert_eq!(is(&json!({"spec": {"nodeName": "n"}})), "neither");
        let going = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}});
        assert_eq!(is(&going), "neither");
        // Nobody else's pod takes a place in the ledger.
        assert_eq!(is(&json!({"spec": {"schedulerName": "other"}})), "neither");
    }

    #[test]
    fn adversarial_what_nobody_could_judge_is_not_kept() {
        let mut other = gates(&["ebb.dev/gpu-memory"]);
        other["spec"]["schedulerName"] = "other".into();
        let mut unread = gates(&["ebb.dev/gpu-memory"]);
        unread["metadata"] = json!({"annotations": {"ebb.dev/gpus": "many"}});
        for pod in [pod(&other), pod(&unread)] {
            let Some(Stage::Gated(waiting)) = stage(&pod) else {
                panic!("{pod:?}")
            };
            assert!(matches!(waiting.needs, Needs::Nothing(_)), "{waiting:?}");
        }
    }

    #[test]
    fn only_lower_priorities_that_stay_can_be_evicted() {
        let bound = |uid: &str, extra: Value| {
            let mut pod = pod(&json!({"metadata": {"uid": uid}, "spec": {"nodeName": "n", "priority": 5}}));
            let mut value = serde_json::to_value(&pod).unwrap();
            json_patch::merge(&mut value, &extra);
            pod = serde_json::from_value(value).unwrap();
            Arc::new(pod)
        };
        let pods = [
            bound("low", json!({})),
            bound("same", json!({"spec": {"priority": 10}})),
            bound(
                "going",
                json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}),
            ),
            bound("waiting", json!({"spec": {"nodeName": null}})),
        ];
        let expected = HashMap::from([(PodUid::from("low"), 5)]);
        assert_eq!(bound_below(&pods, 10), expected);
    }

    #[test]
    fn what_keeps_the_scheduler_off_a_node() {
        let node = |extra: Value| -> Node {
            let mut node = json!({"metadata": {"name": "n"}, "status": {
                "allocatable": {"ebb.dev/gpu-memory": "24Gi"},
                "conditions": [{"type": "Ready", "status": "True"}]}});
            json_patch::merge(&mut node, &extra);
            serde_json::from_value(node).unwrap()
        };
        let tainted =
            |key: &str, effect: &str| node(json!({"spec": {"taints": [{"key": key, "effect": effect}]}}));
        let ask = ask(&pod(
            &json!({"spec": {"tolerations": [{"key": "gpu", "operator": "Exists"}]}}),
        ))
        .unwrap();
        let unready = json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}});
        assert_eq!(bar_of(&node(unready), &ask), Some(Bar::NotReady));
        assert_eq!(
            bar_of(&node(json!({"status": {"allocatable": null}})), &ask),
            Some(Bar::Untold)
        );
        assert_eq!(bar_of(&node(json!({})), &ask), None);
        assert_eq!(bar_of(&tainted("gpu", "NoSchedule"), &ask), None);
        assert_eq!(bar_of(&tainted("other", "PreferNoSchedule"), &ask), None);
        let booting = tainted("node.kubernetes.io/not-ready", "NoSchedule");
        assert_eq!(bar_of(&booting, &ask), Some(Bar::Tainted));
        // At its creation a pod may get more tolerations yet: then none is held against it.
        let early = Ask {
            tolerations: None,
            ..ask
        };
        assert_eq!(bar_of(&booting, &early), None);
    }
}
