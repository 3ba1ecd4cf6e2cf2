//! How far a pod is in its life, from its object alone: whoever reads it anew comes to the same answer.

use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::api::names;
use crate::plan::ledger::Start;

/// Whether the pod's containers have ended for good: its phase says so, or it is being deleted and each of them has.
#[must_use]
pub fn is_finished(pod: &Pod) -> bool {
    let Some(status) = &pod.status else { return false };
    if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return true;
    }
    let ended = |container: &ContainerStatus| {
        let state = container.state.as_ref();
        state.is_some_and(|state| state.terminated.is_some())
    };
    let statuses = status.container_statuses.as_deref().unwrap_or_default();
    let containers = pod.spec.as_ref().map_or(0, |spec| spec.containers.len());
    pod.metadata.deletion_timestamp.is_some()
        && statuses.len() >= containers.max(1)
        && statuses.iter().all(ended)
}

/// How far the start of a bound pod is. A pod that is not Ready loads, unless it turned so while its container ran: then
/// it has loaded, and is only busy or unwell. A container that ended loads again, but not while it is made to wait.
#[must_use]
pub fn start(pod: &Pod) -> Start {
    let ready = condition(pod, "Ready");
    if ready.is_some_and(|ready| ready.status == "True") {
        return Start::Over;
    }
    let scheduled = condition(pod, "PodScheduled").filter(|scheduled| scheduled.status == "True");
    let scheduled = scheduled.and_then(|scheduled| scheduled.last_transition_time.as_ref());
    let bound_ms = millis(scheduled.or(pod.metadata.creation_timestamp.as_ref()));
    let Some(container) = gpu_container(pod).filter(|container| has_run(container)) else {
        return Start::Bound { since_ms: bound_ms };
    };
    let unready_ms = millis(ready.and_then(|ready| ready.last_transition_time.as_ref()));
    let running = container.state.as_ref().and_then(|state| state.running.as_ref());
    let runs_since = running.and_then(|running| running.started_at.as_ref());
    if runs_since.is_some() && millis(runs_since) < unready_ms {
        return Start::Over;
    }
    // In its back-off it does not load. One that turns Ready between its crashes would close its GPU for ever.
    let crashes_on = backs_off_since(container).is_some_and(|ended_ms| ended_ms <= unready_ms);
    Start::Loading {
        since_ms: if crashes_on {
            bound_ms
        } else {
            bound_ms.max(unready_ms)
        },
    }
}

/// When the container ended last, if the kubelet makes it wait because it does so again and again.
fn backs_off_since(container: &ContainerStatus) -> Option<u64> {
    let waiting = container.state.as_ref()?.waiting.as_ref()?;
    let ended = container.last_state.as_ref()?.terminated.as_ref()?;
    (waiting.reason.as_deref() == Some("CrashLoopBackOff")).then(|| millis(ended.finished_at.as_ref()))
}

/// The status of the container that asks for GPU memory.
fn gpu_container(pod: &Pod) -> Option<&ContainerStatus> {
    let asks = |container: &&k8s_openapi::api::core::v1::Container| {
        let resources = container.resources.as_ref();
        let limits = resources.and_then(|resources| resources.limits.as_ref());
        limits.is_some_and(|limits| limits.contains_key(names::GPU_MEMORY))
    };
    let name = &pod.spec.as_ref()?.containers.iter().find(asks)?.name;
    let mut statuses = pod.status.as_ref()?.container_statuses.iter().flatten();
    statuses.find(|status| status.name == *name)
}

fn has_run(container: &ContainerStatus) -> bool {
    let now = container.state.as_ref();
    let before = container.last_state.as_ref();
    now.is_some_and(|state| state.running.is_some() || state.terminated.is_some())
        || before.is_some_and(|state| state.terminated.is_some())
}

fn condition<'a>(pod: &'a Pod, kind: &str) -> Option<&'a PodCondition> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|condition| condition.type_ == kind)
}

/// Milliseconds since the epoch; 0, long ago, where nobody says.
fn millis(time: Option<&Time>) -> u64 {
    time.map_or(0, |time| u64::try_from(time.0.as_millisecond()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::{Value, json};

    use super::*;

    /// Noon and so many seconds.
    fn at(seconds: u64) -> String {
        format!("2026-01-01T12:00:{seconds:02}Z")
    }

    fn ms(seconds: u64) -> u64 {
        millis(Some(&Time(at(seconds).parse().unwrap())))
    }

    fn pod(ready: Option<(&str, u64)>, state: Value, last_state: Value) -> Pod {
        let mut conditions =
            vec![json!({"type": "PodScheduled", "status": "True", "lastTransitionTime": at(1)})];
        if let Some((status, since)) = ready {
            conditions.push(json!({"type": "Ready", "status": status, "lastTransitionTime": at(since)}));
        }
        serde_json::from_value(json!({
            "metadata": {"name": "p", "creationTimestamp": at(0)},
            "spec": {"containers": [
                {"name": "side"},
                {"name": "server", "resources": {"limits": {"ebb.dev/gpu-memory": "1Gi"}}},
            ]},
            "status": {"phase": "Running", "conditions": conditions, "containerStatuses": [
                {"name": "side", "state": {"running": {"startedAt": at(2)}}, "image": "", "imageID": "", "ready": true, "restartCount": 0},
                {"name": "server", "state": state, "lastState": last_state, "image": "", "imageID": "", "ready": false, "restartCount": 0},
            ]},
        }))
        .unwrap()
    }

    fn running(since: u64) -> Value {
        json!({"running": {"startedAt": at(since)}})
    }

    fn ended(end: u64) -> Value {
        json!({"terminated": {"exitCode": 1, "finishedAt": at(end)}})
    }

    #[test]
    fn a_start_lasts_from_the_bind_until_ready() {
        let waiting = json!({"waiting": {"reason": "ContainerCreating"}});
        let bound = Start::Bound { since_ms: ms(1) };
        assert_eq!(start(&pod(None, waiting.clone(), json!({}))), bound);
        assert_eq!(start(&pod(Some(("False", 2)), waiting, json!({}))), bound);
        // The kubelet says False from the first, before the container runs or in the same second.
        for unready in [2, 3] {
            let loading = pod(Some(("False", unready)), running(3), json!({}));
            assert_eq!(
                start(&loading),
                Start::Loading {
                    since_ms: ms(unready)
                }
            );
        }
        assert_eq!(start(&pod(Some(("True", 9)), running(3), json!({}))), Start::Over);
    }

    #[test]
    fn one_that_was_ready_and_runs_on_has_loaded() {
        assert_eq!(
            start(&pod(Some(("False", 20)), running(3), json!({}))),
            Start::Over
        );
    }

    #[test]
    fn crash_after_ready_is_a_new_start_and_one_before_is_the_same() {
        let crashed = pod(Some(("False", 20)), ended(20), json!({}));
        assert_eq!(start(&crashed), Start::Loading { since_ms: ms(20) });
        let again = pod(Some(("False", 20)), running(25), ended(20));
        assert_eq!(start(&again), Start::Loading { since_ms: ms(20) });
        let back_off = json!({"waiting": {"reason": "CrashLoopBackOff"}});
        let never_ready = pod(Some(("False", 2)), back_off, ended(30));
        assert_eq!(start(&never_ready), Start::Loading { since_ms: ms(2) });
    }

    #[test]
    fn one_that_crashes_again_and_again_has_one_limit_in_all() {
        // Ready as soon as it runs, as one without a readiness probe is, so each crash makes it NotReady anew.
        let back_off = json!({"waiting": {"reason": "CrashLoopBackOff"}});
        let waits = pod(Some(("False", 40)), back_off, ended(40));
        assert_eq!(start(&waits), Start::Loading { since_ms: ms(1) });
        // Its next try is a start as any.
        let again = pod(Some(("False", 40)), running(50), ended(40));
        assert_eq!(start(&again), Start::Loading { since_ms: ms(40) });
    }

    #[test]
    fn a_terminating_pod_has_finished_when_all_its_containers_have() {
        let mut pod = pod(Some(("False", 20)), ended(30), json!({}));
        assert!(!is_finished(&pod), "it is started again");
        pod.metadata.deletion_timestamp = Some(Time(at(31).parse().unwrap()));
        assert!(!is_finished(&pod), "the other one still runs");
        let statuses = pod.status.as_mut().unwrap().container_statuses.as_mut().unwrap();
        statuses[0].state = statuses[1].state.clone();
        assert!(is_finished(&pod));
        pod.status.as_mut().unwrap().container_statuses = None;
        assert!(!is_finished(&pod), "nobody says");
    }
}
