//! Pods that found no room. kube-scheduler tries a refused pod again on cluster events only. The event that frees memory
//! (a pod's deletion, a GPU's recovery) may reach it before it reaches the ledger, or be none to the scheduler at all;
//! then the pod would wait for minutes. So a refused pod that fits by now gets one Node event, once per time that
//! memory freed.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::{Extender, cause_node_event, wire};
use crate::api::gpu_request::GpuRequest;
use crate::api::units::{NodeName, PodUid};
use crate::plan::ledger::Ledger;
use crate::plan::placement;

/// Pods remembered. Beyond that many waiting, some event is never far.
const MOST: usize = 10_000;
/// The scheduler itself takes some 20 ms from an event to the next try; only what it missed is worth an event.
const GATHER: Duration = Duration::from_millis(50);
/// Reservations end by time, which nobody tells of.
const TICK: Duration = Duration::from_secs(1);

/// The pods that found no room, each with what it asks.
#[derive(Default)]
pub struct Refused(Mutex<HashMap<PodUid, Waiting>>);

struct Waiting {
    namespace: Arc<str>,
    name: Arc<str>,
    request: GpuRequest,
    /// [`Ledger::freed`] when it was refused or last had an event caused for it.
    freed: u64,
}

impl Refused {
    pub(super) fn remember(&self, uid: &PodUid, pod: &wire::Pod<'_>, request: &GpuRequest, freed: u64) {
        let mut waiting = self.0.lock();
        if waiting.len() < MOST || waiting.contains_key(uid) {
            waiting.insert(
                uid.clone(),
                Waiting {
                    namespace: pod.namespace().into(),
                    name: pod.name().into(),
                    request: request.clone(),
                    freed,
                },
            );
        }
    }

    pub(super) fn forget(&self, uid: &PodUid) {
        self.0.lock().remove(uid);
    }

    fn is_empty(&self) -> bool {
        self.0.lock().is_empty()
    }

    /// The node for which some pod was refused before memory freed there; each pod counts once per such time.
    pub(super) fn fits_by_now(&self, ledger: &Ledger) -> Option<NodeName> {
        let freed = ledger.freed();
        let mut waiting = self.0.lock();
        let mut node = None;
        for pod in waiting.values_mut().filter(|pod| pod.freed < freed) {
            if let Ok(place) = placement::somewhere(ledger, &pod.request) {
                pod.freed = freed;
                node.get_or_insert(place);
            }
        }
        node
    }

    fn keep(&self, still_waits: impl Fn(&PodUid, &Waiting) -> bool) {
        self.0.lock().retain(|uid, pod| still_waits(uid, pod));
    }
}

/// Causes Node events for refused pods, for ever.
pub(super) async fn retry(extender: &Extender) {
    let mut freed = extender.ledger.freed();
    loop {
        // With nobody waiting there is nothing that time alone could change.
        let idle = extender.refused.is_empty();
        tokio::select! {
            changed = freed.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(TICK), if !idle => {}
        }
        tokio::time::sleep(GATHER).await;
        freed.mark_unchanged();
        if extender.refused.is_empty() {
            continue;
        }
        extender.refused.keep(|uid, waiting| {
            let pod = extender.view.pods.get(&waiting.namespace, &waiting.name);
            pod.is_some_and(|pod| {
                pod.metadata.uid.as_deref() == Some(uid.as_str())
                    && pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_none())
            })
        });
        let now_ms = extender.now_ms();
        extender.ledger.update(|ledger| ledger.expire(now_ms));
        let (node, count) = extender
            .ledger
            .read(|ledger| (extender.refused.fits_by_now(ledger), ledger.freed()));
        if let Some(node) = node
            && let Err(error) = cause_node_event(extender, node.as_str(), &count.to_string()).await
        {
            tracing::warn!(%node, %error, "cannot have the scheduler try refused pods again");
        }
    }
}
