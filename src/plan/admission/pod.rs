//! Pods that ask for GPU memory: the scheduler, the runtime class and the environment they get when they are created,
//! and the annotations that nobody may change once the Binding wrote them.

use k8s_openapi::api::core::v1::PodSpec;
use serde_json::{Value, json};

use super::patch::Operation;
use super::{Request, Verdict, annotation, texts};
use crate::api::gpu_request::{gpu_container, gpu_request};
use crate::api::{annotations as key, names};

/// What a Binding writes on a pod.
const BOUND: [&str; 3] = [key::GPU_DEVICES, key::GPU_MEMORY_BYTES, key::GPU_MEMORY_SHARE];

/// What a person wrote, from which the Binding was made.
const ASKED: [&str; 2] = [key::GPUS, key::SHARING];

/// The variables, and the annotations they read when the container is created.
const VARIABLES: [(&str, &str); 3] = [
    (names::VISIBLE_DEVICES_ENV, key::GPU_DEVICES),
    (names::MEMORY_BYTES_ENV, key::GPU_MEMORY_BYTES),
    (names::MEMORY_SHARE_ENV, key::GPU_MEMORY_SHARE),
];

/// What is known of the cluster that a pod is created in.
pub struct Cluster<'a> {
    /// Whether it has NVIDIA's RuntimeClass.
    pub runtime_class: bool,
    /// Why no GPU has room for the pod now, where that is so. Asked only where the answer matters.
    pub no_room: &'a dyn Fn() -> Option<String>,
}

/// Decides for a pod that is created.
#[must_use]
pub fn create(request: Request<'_>, cluster: &Cluster<'_>) -> Verdict {
    if let Some(refusal) = brings_gpus(request.object) {
        return Verdict::refuse(refusal);
    }
    let object = request.object;
    let spec: PodSpec = match serde_json::from_value(object.get("spec").cloned().unwrap_or_default()) {
        Ok(spec) => spec,
        Err(error) => return Verdict::refuse(format!("cannot read the pod: {error}")),
    };
    match gpu_request(&spec, Some(&texts(object, "/metadata/annotations"))) {
        Err(error) => return Verdict::refuse(error),
        Ok(None) => return Verdict::allow(),
        Ok(Some(_)) => {}
    }
    let Some(gpu) = gpu_container(&spec) else {
        return Verdict::allow();
    };
    if spec.node_name.as_ref().is_some_and(|node| !node.is_empty()) {
        return Verdict::refuse(
            "the pod asks for ebb.dev/gpu-memory and names its node: nobody would pick its GPU; leave spec.nodeName \
             out and use a nodeSelector",
        );
    }
    let mut verdict = Verdict::allow();
    match spec.scheduler_name.as_deref() {
        None | Some("" | names::DEFAULT_SCHEDULER) => verdict
            .patch
            .push(Operation::add("/spec/schedulerName", names::SCHEDULER)),
        Some(names::SCHEDULER) => {}
        Some(other) => verdict.warnings.push(format!(
            "the pod goes to scheduler {other}: it gets a GPU only if that one asks Ebb's extender"
        )),
    }
    if cluster.runtime_class && spec.runtime_class_name.is_none() {
        verdict
            .patch
            .push(Operation::add("/spec/runtimeClassName", names::RUNTIME_CLASS));
    }
    for list in ["initContainers", "containers"] {
        let containers = object["spec"].get(list).and_then(Value::as_array);
        for (index, container) in containers.into_iter().flatten().enumerate() {
            let env = if list == "containers" && index == gpu {
                gpu_env(container, &mut verdict.warnings)
            } else {
                void_env(container, &mut verdict.warnings)
            };
            if container.get("env") != Some(&env) {
                verdict
                    .patch
                    .push(Operation::add(format!("/spec/{list}/{index}/env"), env));
            }
        }
    }
    if let Some(warning) = object["spec"]["containers"].get(gpu).and_then(takes_whole_card) {
        verdict.warnings.push(warning);
    }
    if goes_to_ebb(&spec)
        && !is_gated(&spec)
        && let Some(reason) = (cluster.no_room)()
    {
        verdict.patch.push(gate(&spec));
        verdict
            .warnings
            .push(format!("the pod waits for GPU memory: {reason}"));
    }
    verdict
}

/// Whether Ebb's scheduler will place it, once it is changed as [`create`] does.
fn goes_to_ebb(spec: &PodSpec) -> bool {
    matches!(
        spec.scheduler_name.as_deref(),
        None | Some("" | names::DEFAULT_SCHEDULER | names::SCHEDULER)
    )
}

/// Whether it has the gate already: it was asked about before, or a person wants it so.
fn is_gated(spec: &PodSpec) -> bool {
    let mut gates = spec.scheduling_gates.iter().flatten();
    gates.any(|gate| gate.name == names::SCHEDULING_GATE)
}

/// Adds the scheduling gate.
fn gate(spec: &PodSpec) -> Operation {
    let gate = json!({"name": names::SCHEDULING_GATE});
    if spec.scheduling_gates.is_some() {
        Operation::add("/spec/schedulingGates/-", gate)
    } else {
        Operation::add("/spec/schedulingGates", json!([gate]))
    }
}

/// The GPU container's environment. Ebb's variables come first, so that a person's own, and arguments, can refer to them
/// as `$(EBB_GPU_MEMORY_SHARE)`.
fn gpu_env(container: &Value, warnings: &mut Vec<String>) -> Value {
    let ours: Vec<Value> = VARIABLES
        .iter()
        .map(|(name, annotation)| {
            let path = format!("metadata.annotations['{annotation}']");
            json!({"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}})
        })
        .collect();
    let mut env = ours.clone();
    for variable in env_of(container) {
        let name = variable.get("name").and_then(Value::as_str).unwrap_or_default();
        if !VARIABLES.iter().any(|(ours, _)| *ours == name) {
            env.push(variable.clone());
        } else if !ours.contains(variable) {
            warnings.push(format!(
                "container `{}`: its own {name} is replaced: Ebb picks the GPU and says so there",
                name_of(container)
            ));
        }
    }
    Value::Array(env)
}

/// The environment of a container beside it: without the variable, NVIDIA's runtime would give it all cards if its image
/// says so.
fn void_env(container: &Value, warnings: &mut Vec<String>) -> Value {
    let mut env = env_of(container).to_vec();
    let own = env
        .iter()
        .find(|variable| variable.get("name").and_then(Value::as_str) == Some(names::VISIBLE_DEVICES_ENV));
    match own {
        None => env.insert(0, json!({"name": names::VISIBLE_DEVICES_ENV, "value": "void"})),
        Some(own) if own.get("value").and_then(Value::as_str) == Some("void") => {}
        Some(_) => warnings.push(format!(
            "container `{}` sets NVIDIA_VISIBLE_DEVICES itself: what it uses on a GPU, Ebb has not counted",
            name_of(container)
        )),
    }
    Value::Array(env)
}

/// What to say of a vLLM server that would take most of whatever card it finds.
fn takes_whole_card(container: &Value) -> Option<String> {
    let texts = |field: &str| {
        container
            .get(field)
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
    };
    let image = container.get("image").and_then(Value::as_str).unwrap_or_default();
    let words = || texts("command").chain(texts("args"));
    let vllm = std::iter::once(image)
        .chain(words())
        .any(|text| text.to_ascii_lowercase().contains("vllm"));
    let limited = words()
        .chain(env_of(container).iter().filter_map(|v| v.get("value")?.as_str()))
        .any(|text| text.contains(names::MEMORY_SHARE_ENV) || text.contains(names::MEMORY_BYTES_ENV));
    (vllm && !limited).then(|| {
        format!(
            "container `{}` looks like vLLM, which takes 0.92 of the card it finds: give it \
             --gpu-memory-utilization=$(EBB_GPU_MEMORY_SHARE)",
            name_of(container)
        )
    })
}

/// Why a pod that is created must not carry what only its Binding writes.
#[must_use]
pub fn brings_gpus(object: &Value) -> Option<String> {
    let key = BOUND.iter().find(|key| annotation(object, key).is_some())?;
    Some(format!(
        "annotation {key} is written when the pod is bound to its GPU: leave it out"
    ))
}

/// Decides for a pod that is updated, its status included: what its Binding wrote stays as it is, and what that was
/// made from. A whole card would be anybody's once its pod no longer says so.
#[must_use]
pub fn update(request: Request<'_>) -> Verdict {
    let bound = request
        .old
        .and_then(|old| old.pointer("/spec/nodeName"))
        .and_then(Value::as_str)
        .is_some_and(|node| !node.is_empty());
    let asked = ASKED.iter().filter(|_| bound);
    let changed = BOUND.iter().chain(asked).find(|key| {
        let stored = request.old.and_then(|old| annotation(old, key));
        annotation(request.object, key) != stored
    });
    match changed {
        None => Verdict::allow(),
        Some(key) => Verdict::refuse(format!(
            "annotation {key} says what the pod was bound to: it can neither be set, changed nor removed; delete the \
             pod to have it placed anew"
        )),
    }
}

fn env_of(container: &Value) -> &[Value] {
    container
        .get("env")
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

fn name_of(container: &Value) -> &str {
    container.get("name").and_then(Value::as_str).unwrap_or_default()
}
