//! A pod's status as the kubelet computes it: phase and conditions from the containers' states.

use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateWaiting, ContainerStatus, Pod, PodCondition, PodSpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde_json::{Value, json};

/// What the node knows about one of its pods.
#[derive(Clone, Debug, Default)]
pub struct PodView {
    /// The pod's address, once it has one.
    pub ip: Option<String>,
    /// The node's address.
    pub host_ip: String,
    /// When the node took the pod.
    pub start_time: Option<Time>,
    /// Init containers, in order.
    pub init: Vec<ContainerStatus>,
    /// Ordinary containers, in order.
    pub main: Vec<ContainerStatus>,
    /// Reason and message when the node refused or ended the pod.
    pub failed: Option<(String, String)>,
    /// Whether every process has ended and none will be started any more.
    pub ended: bool,
}

impl PodView {
    /// The view of a pod whose containers all wait to be created.
    pub fn waiting(pod: &Pod) -> Self {
        let spec = pod.spec.as_ref();
        let has_init = spec.is_some_and(|s| s.init_containers.as_ref().is_some_and(|i| !i.is_empty()));
        // While init containers run the kubelet says PodInitializing of the others.
        let reason = if has_init {
            "PodInitializing"
        } else {
            "ContainerCreating"
        };
        let init = spec
            .and_then(|s| s.init_containers.as_deref())
            .unwrap_or_default();
        let main = spec.map(|s| s.containers.as_slice()).unwrap_or_default();
        Self {
            init: init.iter().map(|c| new_container(c, "PodInitializing")).collect(),
            main: main.iter().map(|c| new_container(c, reason)).collect(),
            ..Self::default()
        }
    }

    /// The status of the container called `name`.
    pub fn container(&mut self, name: &str) -> Option<&mut ContainerStatus> {
        self.init
            .iter_mut()
            .chain(&mut self.main)
            .find(|container| container.name == name)
    }

    /// The status of the container called `name`, to read.
    pub fn find(&self, name: &str) -> Option<&ContainerStatus> {
        self.init
            .iter()
            .chain(&self.main)
            .find(|container| container.name == name)
    }
}

fn new_container(container: &Container, reason: &str) -> ContainerStatus {
    ContainerStatus {
        name: container.name.clone(),
        image: container.image.clone().unwrap_or_default(),
        state: Some(waiting(reason, None)),
        started: Some(false),
        ..ContainerStatus::default()
    }
}

/// A waiting state.
pub fn waiting(reason: &str, message: Option<String>) -> ContainerState {
    ContainerState {
        waiting: Some(ContainerStateWaiting {
            reason: Some(reason.to_owned()),
            message,
        }),
        ..ContainerState::default()
    }
}

/// Whether an init container is a sidecar: one that runs on beside the ordinary containers.
pub fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// The exit code of the last run that ended, if the container does not run now.
fn stopped(status: &ContainerStatus) -> Option<i32> {
    let state = status.state.as_ref()?;
    if state.running.is_some() {
        return None;
    }
    let last = status
        .last_state
        .as_ref()
        .and_then(|last| last.terminated.as_ref());
    state.terminated.as_ref().or(last).map(|ended| ended.exit_code)
}

fn running(status: &ContainerStatus) -> bool {
    status.state.as_ref().is_some_and(|state| state.running.is_some())
}

/// The pod's phase.
pub fn phase(spec: &PodSpec, view: &PodView) -> &'static str {
    if view.failed.is_some() {
        return "Failed";
    }
    let never = spec.restart_policy.as_deref() == Some("Never");
    let init = spec.init_containers.as_deref().unwrap_or_default();
    let mut initialising = false;
    for (container, status) in init.iter().zip(&view.init) {
        if is_sidecar(container) {
            initialising |= status.started != Some(true) && !any_started(view) && stopped(status).is_none();
            continue;
        }
        match stopped(status) {
            None => initialising = true,
            Some(0) => {}
            Some(_) if never => return "Failed",
            Some(_) => {}
        }
    }
    let stopped_codes: Vec<i32> = view.main.iter().filter_map(stopped).collect();
    let runs = view.main.iter().filter(|status| running(status)).count();
    let waits = view.main.len() - runs - stopped_codes.len();
    if initialising || waits > 0 {
        // A pod that is deleted before it ran ends as failed, as nothing of it succeeded.
        return if view.ended { "Failed" } else { "Pending" };
    }
    let mut sidecars = init
        .iter()
        .zip(&view.init)
        .filter(|(container, _)| is_sidecar(container));
    if runs > 0 || sidecars.any(|(_, status)| running(status)) {
        return "Running";
    }
    let all_succeeded = stopped_codes.iter().all(|code| *code == 0);
    match spec.restart_policy.as_deref() {
        _ if view.ended => {
            if all_succeeded {
                "Succeeded"
            } else {
                "Failed"
            }
        }
        Some("Never") => {
            if all_succeeded {
                "Succeeded"
            } else {
                "Failed"
            }
        }
        Some("OnFailure") if all_succeeded => "Succeeded",
        _ => "Running",
    }
}

fn any_started(view: &PodView) -> bool {
    view.main
        .iter()
        .any(|status| running(status) || stopped(status).is_some())
}

struct Condition {
    kind: &'static str,
    status: bool,
    reason: Option<&'static str>,
    message: Option<String>,
}

fn condition(
    kind: &'static str,
    verdict: Result<Option<&'static str>, (&'static str, Option<String>)>,
) -> Condition {
    match verdict {
        Ok(reason) => Condition {
            kind,
            status: true,
            reason,
            message: None,
        },
        Err((reason, message)) => Condition {
            kind,
            status: false,
            reason: Some(reason),
            message,
        },
    }
}

fn conditions(pod: &Pod, spec: &PodSpec, view: &PodView, phase: &str) -> Vec<Condition> {
    let init = spec.init_containers.as_deref().unwrap_or_default();
    let incomplete: Vec<&str> = init
        .iter()
        .zip(&view.init)
        .filter(|(container, status)| {
            if is_sidecar(container) {
                status.started != Some(true)
            } else {
                !status.ready
            }
        })
        .map(|(container, _)| container.name.as_str())
        .collect();
    let initialized = if phase == "Succeeded" {
        Ok(Some("PodCompleted"))
    } else if incomplete.is_empty() || any_started(view) {
        Ok(None)
    } else {
        let message = format!("containers with incomplete status: [{}]", incomplete.join(" "));
        Err(("ContainersNotInitialized", Some(message)))
    };
    let sidecars = init
        .iter()
        .zip(&view.init)
        .filter(|(container, _)| is_sidecar(container))
        .map(|(_, status)| status);
    let unready: Vec<&str> = sidecars
        .chain(&view.main)
        .filter(|status| !status.ready)
        .map(|status| status.name.as_str())
        .collect();
    let containers_ready = match phase {
        "Succeeded" => Err(("PodCompleted", None)),
        "Failed" => Err(("PodFailed", None)),
        _ if unready.is_empty() => Ok(None),
        _ => Err((
            "ContainersNotReady",
            Some(format!("containers with unready status: [{}]", unready.join(" "))),
        )),
    };
    let ready = containers_ready.clone().and_then(|_| {
        let existing = pod
            .status
            .as_ref()
            .and_then(|status| status.conditions.as_deref())
            .unwrap_or_default();
        let missing: Vec<String> = spec
            .readiness_gates
            .iter()
            .flatten()
            .filter_map(|gate| {
                let kind = &gate.condition_type;
                match existing.iter().find(|c| &c.type_ == kind) {
                    None => Some(format!(
                        "corresponding condition of pod readiness gate {kind:?} does not exist."
                    )),
                    Some(c) if c.status != "True" => Some(format!(
                        "the status of pod readiness gate {kind:?} is not \"True\", but {}",
                        c.status
                    )),
                    Some(_) => None,
                }
            })
            .collect();
        if missing.is_empty() {
            Ok(None)
        } else {
            Err(("ReadinessGatesNotReady", Some(missing.join(", "))))
        }
    });
    let sandbox = view.ip.is_some() && !view.ended;
    let mut all = vec![
        condition("Initialized", initialized),
        condition("Ready", ready),
        condition("ContainersReady", containers_ready),
    ];
    all.push(Condition {
        kind: "PodReadyToStartContainers",
        status: sandbox,
        reason: None,
        message: None,
    });
    all
}

/// The strategic merge patch of `status` that brings the object up to `view`.
///
/// It names the conditions of the kubelet only, so that those of others (PodScheduled, readiness
/// gates) stay. `before` are the conditions last written: one that keeps its status keeps its time.
pub fn patch(pod: &Pod, view: &PodView, before: &[PodCondition], now: &Time) -> (Value, Vec<PodCondition>) {
    let Some(spec) = pod.spec.as_ref() else {
        return (json!({}), Vec::new());
    };
    let phase = phase(spec, view);
    let mut written = Vec::new();
    let mut list = Vec::new();
    for Condition {
        kind,
        status,
        reason,
        message,
    } in conditions(pod, spec, view, phase)
    {
        let status = if status { "True" } else { "False" };
        let same = before.iter().find(|c| c.type_ == kind && c.status == status);
        let since = same
            .and_then(|c| c.last_transition_time.clone())
            .unwrap_or_else(|| now.clone());
        // The nulls matter: in a merge a field that is left out would keep its old text.
        list.push(json!({
            "type": kind, "status": status, "reason": reason, "message": message, "lastProbeTime": null,
            "lastTransitionTime": since, "observedGeneration": pod.metadata.generation,
        }));
        written.push(PodCondition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            last_transition_time: Some(since),
            ..PodCondition::default()
        });
    }
    let mut status = json!({
        "phase": phase,
        "conditions": list,
        "hostIP": view.host_ip,
        // Both lists merge by address: without the directive a pod that starts again elsewhere would have two.
        "hostIPs": [{"$patch": "replace"}, {"ip": view.host_ip}],
        "startTime": view.start_time,
        "observedGeneration": pod.metadata.generation,
    });
    if let Some(ip) = &view.ip {
        status["podIP"] = json!(ip);
        status["podIPs"] = json!([{"$patch": "replace"}, {"ip": ip}]);
    }
    if !view.init.is_empty() {
        status["initContainerStatuses"] = json!(view.init);
    }
    if view.failed.is_none() || any_started(view) {
        status["containerStatuses"] = json!(view.main);
    }
    if let Some((reason, message)) = &view.failed {
        status["reason"] = json!(reason);
        status["message"] = json!(message);
    }
    (status, written)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use k8s_openapi::api::core::v1::{ContainerStateRunning, ContainerStateTerminated};
    use k8s_openapi::jiff::Timestamp;

    fn pod(restart: &str, init: bool) -> Pod {
        let init = if init { json!([{"name": "i"}]) } else { json!([]) };
        serde_json::from_value(json!({
            "metadata": {"name": "p", "generation": 2},
            "spec": {"restartPolicy": restart, "containers": [{"name": "a"}, {"name": "b"}], "initContainers": init}
        }))
        .unwrap()
    }

    fn run() -> ContainerState {
        ContainerState {
            running: Some(ContainerStateRunning::default()),
            ..ContainerState::default()
        }
    }

    fn exit(exit_code: i32) -> ContainerState {
        let terminated = Some(ContainerStateTerminated {
            exit_code,
            ..ContainerStateTerminated::default()
        });
        ContainerState {
            terminated,
            ..ContainerState::default()
        }
    }

    fn phase_of(restart: &str, states: [ContainerState; 2], ended: bool) -> &'static str {
        let pod = pod(restart, false);
        let mut view = PodView::waiting(&pod);
        for (status, state) in view.main.iter_mut().zip(states) {
            status.state = Some(state);
        }
        view.ended = ended;
        phase(pod.spec.as_ref().unwrap(), &view)
    }

    #[test]
    fn phases_follow_the_kubelets_table() {
        let wait = || waiting("ContainerCreating", None);
        assert_eq!(phase_of("Always", [wait(), run()], false), "Pending");
        assert_eq!(phase_of("Always", [run(), run()], false), "Running");
        assert_eq!(phase_of("Always", [exit(1), run()], false), "Running");
        assert_eq!(phase_of("Always", [exit(1), exit(0)], false), "Running");
        assert_eq!(phase_of("Never", [exit(1), exit(0)], false), "Failed");
        assert_eq!(phase_of("Never", [exit(0), exit(0)], false), "Succeeded");
        assert_eq!(phase_of("OnFailure", [exit(0), exit(1)], false), "Running");
        assert_eq!(phase_of("OnFailure", [exit(0), exit(0)], false), "Succeeded");
        assert_eq!(phase_of("Always", [exit(0), exit(143)], true), "Failed");
        assert_eq!(phase_of("Always", [exit(0), exit(0)], true), "Succeeded");
    }

    #[test]
    fn a_crash_loop_counts_as_running_not_as_pending() {
        let pod = pod("Always", false);
        let mut view = PodView::waiting(&pod);
        view.main[0].state = Some(run());
        view.main[1].state = Some(waiting("CrashLoopBackOff", None));
        view.main[1].last_state = Some(exit(1));
        assert_eq!(phase(pod.spec.as_ref().unwrap(), &view), "Running");
    }

    #[test]
    fn init_containers_hold_the_phase_and_the_condition() {
        let pod = pod("Always", true);
        let mut view = PodView::waiting(&pod);
        let now = Time(Timestamp::UNIX_EPOCH);
        let (status, _) = patch(&pod, &view, &[], &now);
        assert_eq!(status["phase"], "Pending");
        assert_eq!(
            status["conditions"][0]["message"],
            "containers with incomplete status: [i]"
        );
        view.init[0].state = Some(exit(0));
        view.init[0].ready = true;
        let (status, _) = patch(&pod, &view, &[], &now);
        assert_eq!(status["conditions"][0]["status"], "True");
    }

    #[test]
    fn a_condition_that_stays_keeps_its_time_and_old_texts_are_cleared() {
        let pod = pod("Always", false);
        let mut view = PodView {
            ip: Some("10.77.1.2".into()),
            ..PodView::waiting(&pod)
        };
        let early = Time(Timestamp::UNIX_EPOCH);
        let late = Time(Timestamp::from_second(100).unwrap());
        let (first, written) = patch(&pod, &view, &[], &early);
        assert_eq!(first["conditions"][1]["reason"], "ContainersNotReady");
        for status in &mut view.main {
            status.state = Some(run());
            status.ready = true;
        }
        let (second, _) = patch(&pod, &view, &written, &late);
        let ready = &second["conditions"][1];
        assert_eq!(ready["status"], "True");
        assert!(ready["reason"].is_null() && ready.get("reason").is_some());
        assert_eq!(ready["lastTransitionTime"], json!(late));
        assert_eq!(second["conditions"][0]["lastTransitionTime"], json!(early));
    }

    #[test]
    fn readiness_gates_hold_ready_back() {
        let mut pod = pod("Always", false);
        pod.spec.as_mut().unwrap().readiness_gates = Some(vec![
            serde_json::from_value(json!({"conditionType": "x/y"})).unwrap(),
        ]);
        let mut view = PodView::waiting(&pod);
        for status in &mut view.main {
            status.state = Some(run());
            status.ready = true;
        }
        let (status, _) = patch(&pod, &view, &[], &Time(Timestamp::UNIX_EPOCH));
        assert_eq!(status["conditions"][1]["reason"], "ReadinessGatesNotReady");
        assert_eq!(status["conditions"][2]["status"], "True");
    }
}
