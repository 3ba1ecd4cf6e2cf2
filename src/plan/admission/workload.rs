//! Deployments and StatefulSets: annotations on the metadata, replicas kept, nothing in the pod template.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::PodSpec;
use serde_json::Value;

use super::patch::{Operation, set_texts};
use super::select::{self, Policy};
use super::{Request, Requester, Verdict, annotation, ownership, texts, values};
use crate::api::annotations as key;
use crate::api::gpu_request::gpu_request;
use crate::plan::gating::Labels;

/// Where a workload's replicas stand.
const REPLICAS: &str = "/spec/replicas";
const ANNOTATIONS: &str = "/metadata/annotations";

/// Decides for a Deployment or StatefulSet.
#[must_use]
pub fn workload<'a>(
    request: Request<'_>,
    namespace_labels: &Labels,
    policies: impl IntoIterator<Item = Policy<'a>>,
) -> Verdict {
    if request.is_going() {
        return Verdict::allow();
    }
    let mut warnings = Vec::new();
    let asks = match asks(request.object) {
        Ok(asks) => asks,
        // What is stored is as bad: it was there before Ebb, and a refusal would also stop its own controller.
        Err(problem) if request.old.is_some_and(|old| self::asks(old).is_err()) => {
            warnings.push(format!("Ebb does not manage this workload: {problem}"));
            false
        }
        Err(problem) => return Verdict::refuse(problem),
    };
    let policy = select::policy(
        policies,
        namespace_labels,
        &texts(request.object, "/metadata/labels"),
    );
    let opted_out = annotation(request.object, key::MANAGED) == Some("false");
    match policy {
        Some(policy) if asks && !opted_out => managed(request, policy, warnings),
        _ => {
            if asks && annotation(request.object, key::MANAGED) == Some("true") && policy.is_none() {
                let ours = ours(request).contains(key::MANAGED);
                if !ours && request.requester == Requester::Person {
                    warnings.push(
                        "ebb.dev/managed is \"true\", but no ScalePolicy selects this workload: Ebb leaves it alone \
                         until one does"
                            .to_owned(),
                    );
                }
            }
            unmanaged(request, warnings)
        }
    }
}

fn managed(request: Request<'_>, policy: Policy<'_>, mut warnings: Vec<String>) -> Verdict {
    let now = texts(request.object, ANNOTATIONS);
    let stored = request.old.map(|old| texts(old, ANNOTATIONS));
    let values = values::managed(&now, stored.as_ref(), policy);
    for problem in &values.problems {
        // A bound that was tightened later, or a value from before Ebb: refusing everything from now on would also stop
        // the workload's own controller.
        let is_new = stored
            .as_ref()
            .is_none_or(|stored| stored.get(problem.key) != now.get(problem.key));
        if is_new {
            return Verdict::refuse(problem);
        }
        warnings.push(problem.to_string());
    }
    let mut patch = set_texts(request.object, ANNOTATIONS, &values.wanted);
    let asked = request.object.pointer(REPLICAS).and_then(Value::as_i64);
    let kept = match request.old {
        None => i64::from(values.initial),
        // Absent means 1, as Kubernetes says.
        Some(old) => old.pointer(REPLICAS).and_then(Value::as_i64).unwrap_or(1),
    };
    if asked != Some(kept) {
        patch.push(Operation::add(REPLICAS, kept));
        let asked = asked.unwrap_or(1);
        if request.requester == Requester::Person {
            if request.old.is_some() {
                warnings.push(format!(
                    "replicas of a workload that Ebb scales stay as they are ({kept} now, {asked} asked for): requests \
                     wake it; `kubectl scale` overrides, ebb.dev/managed: \"false\" takes Ebb off"
                ));
            } else if asked > 1 {
                // A manifest that says nothing asks for 1.
                warnings.push(format!(
                    "Ebb scales this workload: it starts with {kept} replicas instead of {asked}; \
                     ebb.dev/initial-replicas changes that"
                ));
            }
        }
    }
    patch.extend(ownership::disown(request.object, request.old, "replicas"));
    Verdict {
        refusal: None,
        patch,
        warnings,
    }
}

fn unmanaged(request: Request<'_>, warnings: Vec<String>) -> Verdict {
    let now = texts(request.object, ANNOTATIONS);
    let stored = request.old.map(|old| texts(old, ANNOTATIONS));
    let wanted: BTreeMap<_, _> = values::unmanaged(&now, stored.as_ref());
    Verdict {
        refusal: None,
        patch: set_texts(request.object, ANNOTATIONS, &wanted),
        warnings,
    }
}

fn ours(request: Request<'_>) -> std::collections::BTreeSet<&'static str> {
    let now = texts(request.object, ANNOTATIONS);
    let stored = request.old.map(|old| texts(old, ANNOTATIONS));
    values::injected(&now, stored.as_ref())
}

/// Whether the pod template asks for GPU memory.
fn asks(object: &Value) -> Result<bool, String> {
    let template = object.pointer("/spec/template/spec").cloned().unwrap_or_default();
    let spec: PodSpec =
        serde_json::from_value(template).map_err(|error| format!("cannot read the pod template: {error}"))?;
    let annotations = texts(object, "/spec/template/metadata/annotations");
    gpu_request(&spec, Some(&annotations))
        .map(|request| request.is_some())
        .map_err(|error| error.to_string())
}
