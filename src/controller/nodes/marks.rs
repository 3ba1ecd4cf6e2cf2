//! The mark and the taint on a Node.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Taint};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::api::{annotations, names};
use crate::cluster::call::{CallError, limited};
use crate::plan::release::{Mark, State};

/// The annotation `ebb.dev/release`, as people read it.
#[derive(Serialize, Deserialize)]
struct Written {
    state: State,
    since: Timestamp,
    reason: String,
}

/// The mark on a node. One that cannot be read counts as none: with a taint beside it, both are taken off.
#[must_use]
pub fn read(node: &Node) -> Option<Mark> {
    let text = node.annotations().get(annotations::RELEASE)?;
    let written: Written = serde_json::from_str(text).ok()?;
    Some(Mark {
        state: written.state,
        since_ms: written.since.as_millisecond(),
        reason: written.reason,
    })
}

/// Whether Ebb's taint is on it.
#[must_use]
pub fn is_fenced(node: &Node) -> bool {
    taints(node).any(|taint| taint.key == names::RELEASE_TAINT)
}

fn taints(node: &Node) -> impl Iterator<Item = &Taint> {
    node.spec.iter().flat_map(|spec| spec.taints.iter().flatten())
}

/// Writes mark and taint (or takes both off) if the node still is as it was read. Every kind of patch replaces the
/// taints as a whole, so the version is what keeps those of others.
///
/// # Errors
/// [`CallError::Conflict`] when anything about the node changed; then nothing was written.
pub async fn write(client: &Client, node: &Node, mark: Option<&Mark>) -> Result<(), CallError> {
    let patch = patch(node, mark).map_err(|error| CallError::Api(kube::Error::SerdeError(error)))?;
    let params = PatchParams {
        field_manager: Some(names::CONTROLLER.to_owned()),
        ..PatchParams::default()
    };
    let api: Api<Node> = Api::all(client.clone());
    limited(api.patch(&node.name_any(), &params, &Patch::Merge(patch))).await?;
    Ok(())
}

fn patch(node: &Node, mark: Option<&Mark>) -> Result<serde_json::Value, serde_json::Error> {
    let text = mark
        .map(|mark| {
            serde_json::to_string(&Written {
                state: mark.state,
                since: Timestamp::from_millisecond(mark.since_ms).unwrap_or_default(),
                reason: mark.reason.clone(),
            })
        })
        .transpose()?;
    let mut patch = json!({"metadata": {
        "resourceVersion": node.resource_version(),
        "annotations": {annotations::RELEASE: text},
    }});
    let fence = mark.is_some_and(|mark| mark.state.fenced());
    if fence != is_fenced(node) {
        let mut all: Vec<Taint> = taints(node)
            .filter(|taint| taint.key != names::RELEASE_TAINT)
            .cloned()
            .collect();
        if fence {
            all.push(Taint {
                key: names::RELEASE_TAINT.to_owned(),
                effect: "NoSchedule".to_owned(),
                ..Taint::default()
            });
        }
        let all = if all.is_empty() { None } else { Some(all) };
        patch["spec"] = json!({"taints": all});
    }
    Ok(patch)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn node(taints: serde_json::Value) -> Node {
        serde_json::from_value(json!({
            "metadata": {"name": "n", "resourceVersion": "7"}, "spec": {"taints": taints}
        }))
        .unwrap()
    }

    #[test]
    fn taints_of_others_stay() {
        let other = json!({"key": "nvidia.com/gpu", "effect": "NoSchedule"});
        let ours = json!({"key": "ebb.dev/release", "effect": "NoSchedule"});
        let mut mark = Mark {
            state: State::Fenced,
            since_ms: 1000,
            reason: "empty".to_owned(),
        };
        let fenced = patch(&node(json!([other])), Some(&mark)).unwrap();
        assert_eq!(fenced["spec"]["taints"], json!([other, ours]));
        assert_eq!(fenced["metadata"]["resourceVersion"], "7");
        let text = fenced["metadata"]["annotations"][annotations::RELEASE].clone();
        assert_eq!(
            text,
            r#"{"state":"fenced","since":"1970-01-01T00:00:01Z","reason":"empty"}"#
        );
        let mut marked = node(json!([ours]));
        marked
            .annotations_mut()
            .insert(annotations::RELEASE.to_owned(), text.as_str().unwrap().to_owned());
        assert_eq!(read(&marked), Some(mark.clone()));
        let restored = patch(&node(json!([other, ours])), None).unwrap();
        assert_eq!(restored["spec"]["taints"], json!([other]));
        assert!(restored["metadata"]["annotations"][annotations::RELEASE].is_null());
        mark.state = State::Released;
        assert!(
            patch(&node(json!([ours])), Some(&mark))
                .unwrap()
                .get("spec")
                .is_none()
        );
    }
}
