//! Whether a policy can be followed, beyond what its schema says.

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Request, Verdict, select};
use crate::api::node_policy::{NodePolicySpec, ProviderKind};
use crate::api::scale_policy::ScalePolicySpec;
use crate::api::units::Bytes;

/// Decides for a ScalePolicy.
#[must_use]
pub fn scale_policy(request: Request<'_>) -> Verdict {
    judge(request, |spec: &ScalePolicySpec| {
        for (field, selector) in [
            ("namespaceSelector", &spec.namespace_selector),
            ("workloadSelector", &spec.workload_selector),
        ] {
            if let Some(problem) = select::problem(selector) {
                return Err(format!("spec.{field}: {problem}"));
            }
        }
        let bytes = quantity("spec.coldStart.queueBytes", &spec.cold_start.queue_bytes)?;
        if bytes == Bytes(0) {
            return Err("spec.coldStart.queueBytes: no request fits into 0 bytes: write 64Mi".to_owned());
        }
        if spec.min_replicas > spec.max_replicas {
            return Err("spec.minReplicas must not be above spec.maxReplicas".to_owned());
        }
        if let Some(bound) = spec.bounds.max_replicas
            && spec.max_replicas > bound
        {
            return Err(format!(
                "spec.maxReplicas is {}, above the bound that it sets itself: spec.bounds.maxReplicas is {bound}",
                spec.max_replicas
            ));
        }
        if let Some(bound) = spec.bounds.max_idle_after
            && spec.idle_after > bound
        {
            return Err(format!(
                "spec.idleAfter is {}, above the bound that it sets itself: spec.bounds.maxIdleAfter is {bound}",
                spec.idle_after
            ));
        }
        Ok(())
    })
}

/// Decides for a NodePolicy.
#[must_use]
pub fn node_policy(request: Request<'_>) -> Verdict {
    judge(request, |spec: &NodePolicySpec| {
        let selector = &spec.node_selector;
        if let Some(problem) = select::problem(selector) {
            return Err(format!("spec.nodeSelector: {problem}"));
        }
        // What only says which label a node must not have selects every node that nobody thought of.
        let names_one = selector
            .match_labels
            .as_ref()
            .is_some_and(|labels| !labels.is_empty())
            || selector
                .match_expressions
                .iter()
                .flatten()
                .any(|expression| matches!(expression.operator.as_str(), "In" | "Exists"));
        if !names_one {
            return Err(
                "spec.nodeSelector must name at least one label that a node has, so that no other node is ever \
                 released"
                    .to_owned(),
            );
        }
        if quantity("spec.node.gpuMemory", &spec.node.gpu_memory)? == Bytes(0) {
            return Err("spec.node.gpuMemory: a GPU offers more than 0 bytes: write 24Gi".to_owned());
        }
        match spec.provider.kind {
            ProviderKind::Http => {
                let uri = spec.provider.url.parse::<http::Uri>();
                let good = uri.is_ok_and(|uri| {
                    matches!(uri.scheme_str(), Some("http" | "https"))
                        && uri.host().is_some_and(|host| !host.is_empty())
                        && uri.query().is_none()
                });
                if !good {
                    return Err(format!(
                        "spec.provider.url is `{}`: the http provider needs the base URL of its API, as \
                         http://nodes.example:8080",
                        spec.provider.url
                    ));
                }
            }
        }
        Ok(())
    })
}

fn judge<T: DeserializeOwned>(request: Request<'_>, check: impl Fn(&T) -> Result<(), String>) -> Verdict {
    if request.is_going() {
        return Verdict::allow();
    }
    // A write that leaves the spec as it is (labels, finalizers) goes through whatever an older Ebb let in.
    if request
        .old
        .is_some_and(|old| old.get("spec") == request.object.get("spec"))
    {
        return Verdict::allow();
    }
    let spec = request.object.get("spec").cloned().unwrap_or(Value::Null);
    match serde_json::from_value(spec) {
        Err(error) => Verdict::refuse(format!("spec: {error}")),
        Ok(spec) => check(&spec).map_or_else(Verdict::refuse, |()| Verdict::allow()),
    }
}

fn quantity(field: &str, text: &str) -> Result<Bytes, String> {
    text.parse().map_err(|error| format!("{field}: {error}"))
}
