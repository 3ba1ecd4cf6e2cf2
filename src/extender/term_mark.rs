//! The mark that a new leader leaves on every pod that is not bound yet: the number of its term.
//!
//! A leader that was stopped right before it sent a Binding (SIGSTOP, a frozen machine) sends it when it goes on, long
//! after another took over: no clock of its own can keep it from that. But the Binding names the `resourceVersion` that
//! was read before the Lease was looked at, and the mark moves it: such a Binding is a 409. A pod that is made after the
//! marks needs none: a leader before cannot have read it while it still led.
//!
//! Thousands of marks take seconds, so candidates begin before one of them leads: in the [`Vacancy`], when the leader
//! before must have stopped to decide. Such a mark names the Lease's record that the vacancy follows, and so counts for
//! whoever takes over that very record, whichever candidate set it: nobody decided between the two. A record that was
//! renewed after all makes them all worthless. The list after taking the Lease stays, since a candidate's view may lack
//! a pod that the leader before had read; it shows what is still to be marked.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::sync::{Arc, LazyLock};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::Extender;
use crate::api::annotations;
use crate::api::gpu_request::gpu_request;
use crate::cluster::call::{CallError, limited};
use crate::cluster::ledger_feed;
use crate::serve::lease::Vacancy;

/// Marks on their way at one time. The API server does about that many at once on two cores.
const AT_ONCE: usize = 32;
/// Each process has its own order of pods.
static RANDOM: LazyLock<RandomState> = LazyLock::new(RandomState::new);

/// Marks all of these pods that a Binding could still take, and enters those that got theirs meanwhile. Those that
/// were marked in the vacancy are left.
///
/// # Errors
/// If one could not be marked; then this leader must not answer yet.
pub(super) async fn mark(
    extender: &Extender,
    pods: Vec<Pod>,
    term: u64,
    taken: Option<&Vacancy>,
) -> Result<usize, CallError> {
    let is_marked = |pod: &Pod| taken.is_some_and(|vacancy| carries(pod, &vacancy.mark));
    let left: Vec<Pod> = pods
        .into_iter()
        .filter(|pod| bindable(pod) && !is_marked(pod))
        .collect();
    let count = left.len();
    let text = taken.map_or_else(|| term.to_string(), |vacancy| vacancy.mark.clone());
    stream::iter(left)
        .map(|pod| mark_one(extender, pod, &text))
        .buffer_unordered(AT_ONCE)
        .try_for_each(|()| std::future::ready(Ok(())))
        .await?;
    Ok(count)
}

/// Marks in every vacancy, until `stop`.
pub async fn mark_vacancies(extender: Arc<Extender>, stop: CancellationToken) {
    let mut next = extender.leadership.vacancy();
    let marking = async {
        loop {
            let vacancy = next.borrow_and_update().clone();
            let mark = async {
                if let Some(vacancy) = &vacancy {
                    tokio::time::sleep_until(vacancy.from).await;
                    mark_early(&extender, vacancy).await;
                }
                std::future::pending::<()>().await;
            };
            tokio::select! {
                () = mark => {}
                changed = next.changed() => if changed.is_err() {
                    return;
                },
            }
        }
    };
    tokio::select! {
        () = marking => {}
        () = stop.cancelled() => {}
    }
}

/// Marks what is seen without the mark, until this replica leads: then the rest is the leader's. What fails is too.
async fn mark_early(extender: &Extender, vacancy: &Vacancy) {
    let leads = || extender.leadership.term_now().is_some();
    if leads() {
        return;
    }
    let mut pods: Vec<Arc<Pod>> = extender.view.pods.all();
    pods.retain(|pod| bindable(pod) && !carries(pod, &vacancy.mark));
    // Candidates begin at different ends, and leave what the others have done.
    pods.sort_by_cached_key(|pod| RANDOM.hash_one(&pod.metadata.uid));
    let one = async |pod: Arc<Pod>| {
        let now = extender
            .view
            .pods
            .get(&pod.namespace().unwrap_or_default(), &pod.name_any());
        match now.filter(|now| !leads() && !carries(now, &vacancy.mark)) {
            Some(_) => mark_one(extender, (*pod).clone(), &vacancy.mark)
                .await
                .map(|()| 1),
            None => Ok(0),
        }
    };
    let marked = stream::iter(pods)
        .map(one)
        .buffer_unordered(AT_ONCE)
        .try_fold(0usize, async |sum, one| Ok(sum + one))
        .await;
    match marked {
        Ok(marked) => tracing::info!(marked, "nobody leads; marked the pods that are not bound"),
        Err(error) => tracing::warn!(%error, "cannot mark pods before leading; the next leader does"),
    }
}

fn carries(pod: &Pod, mark: &str) -> bool {
    pod.annotations()
        .get(annotations::TERM)
        .is_some_and(|text| text == mark)
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

async fn mark_one(extender: &Extender, pod: Pod, mark: &str) -> Result<(), CallError> {
    let pods: Api<Pod> = Api::namespaced(extender.client.clone(), &pod.namespace().unwrap_or_default());
    let patch = json!({"metadata": {
        // A precondition: another pod of that name is new.
        "uid": pod.metadata.uid,
        "annotations": {annotations::TERM: mark},
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
