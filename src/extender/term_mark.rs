//! The mark that a new leader leaves on every pod that is not bound yet: the number of its term.
//!
//! A leader that was stopped right before it sent a Binding (SIGSTOP, a frozen machine) sends it when it goes on, long
//! after another took over: no clock of its own can keep it from that. But the Binding names the `resourceVersion` that
//! was read before the Lease was looked at, and the mark moves it: such a Binding is a 409. A pod that is made after the
//! marks needs none: a leader before cannot have read it while it still led.

use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::json;

use super::Extender;
use crate::api::annotations;
use crate::api::gpu_request::gpu_request;
use crate::cluster::call::{CallError, limited};
use crate::cluster::ledger_feed;

/// Marks on their way at one time. The API server does about that many at once on two cores.
const AT_ONCE: usize = 32;

/// Marks all of these pods that a Binding could still take, and enters those that got theirs meanwhile.
///
/// # Errors
/// If one could not be marked; then this leader must not answer yet.
pub(super) async fn mark(extender: &Extender, pods: Vec<Pod>, term: u64) -> Result<usize, CallError> {
    let bindable: Vec<Pod> = pods.into_iter().filter(bindable).collect();
    let count = bindable.len();
    stream::iter(bindable)
        .map(|pod| mark_one(extender, pod, term))
        .buffer_unordered(AT_ONCE)
        .try_for_each(|()| std::future::ready(Ok(())))
        .await?;
    Ok(count)
}

/// Whether the API server would take a Binding of it that takes GPU memory. It refuses one of a pod behind a scheduling
/// gate, and a gate that is taken off moves the version too.
fn bindable(pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else { return false };
    spec.node_name.is_none()
        && spec.scheduling_gates.as_ref().is_none_or(Vec::is_empty)
        && pod.metadata.deletion_timestamp.is_none()
        && matches!(gpu_request(spec, pod.metadata.annotations.as_ref()), Ok(Some(_)))
}

async fn mark_one(extender: &Extender, pod: Pod, term: u64) -> Result<(), CallError> {
    let pods: Api<Pod> = Api::namespaced(extender.client.clone(), &pod.namespace().unwrap_or_default());
    let patch = json!({"metadata": {
        // A precondition: another pod of that name is new.
        "uid": pod.metadata.uid,
        "annotations": {annotations::TERM: term.to_string()},
    }});
    let how = PatchParams::default();
    match limited(pods.patch(&pod.name_any(), &how, &Patch::Merge(&patch))).await {
        Ok(marked) => {
            // A Binding may have come between the list and the mark.
            if let Some(event) = ledger_feed::pod_event(&marked) {
                extender.ledger.update(|ledger| ledger.apply(event));
            }
            Ok(())
        }
        Err(CallError::Gone | CallError::Conflict) => Ok(()),
        Err(error) => Err(error),
    }
}
