//! Tenants: pods on GPUs that do not keep to what Ebb promised others. Told on the pod itself, where its owner looks: an
//! Event, and for one that uses too much a condition, which ends with the pod and is what a new leader goes on from.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::json;
use tokio::time::Instant;

use super::metrics::Part;
use super::reconcile::{Backoff, Context, Reconciler, sooner};
use crate::api::scale_policy::OverUse;
use crate::api::units::{NodeName, PodUid};
use crate::api::workload::{WorkloadKind, WorkloadRef};
use crate::api::{annotations, names};
use crate::cluster::call::{CallError, limited};
use crate::cluster::events::{self, Told};
use crate::cluster::evict::{EvictError, evict};
use crate::cluster::workloads::workload_of;
use crate::plan::ledger::Entry;
use crate::plan::over_use::{self, Decision, Excess, Facts, Use};

/// Type of the pod's condition.
const CONDITION: &str = "ebb.dev/GpuMemoryOverUse";
/// Reason of the Event, and of the condition while it is true.
const OVER_USE: &str = "GpuMemoryOverUse";
/// Steps that one pass takes; the others are the next one's.
const AT_ONCE: usize = 16;

/// Watches over pods on GPUs.
pub struct Tenants {
    context: Context,
    /// Pods that are over, and since when.
    over: HashMap<PodUid, Instant>,
    /// Pods that somebody else bound, and were told of.
    strangers: HashSet<PodUid>,
    /// Evictions that were kept back, and what was told of it.
    kept: HashMap<PodUid, String>,
    backoff: Backoff<PodUid>,
}

/// What the ledger shows.
#[derive(Default)]
struct Seen {
    over: Vec<(Entry, Excess)>,
    within: HashSet<PodUid>,
    strangers: Vec<(Entry, NodeName)>,
}

impl Tenants {
    /// A reconciler that has done nothing yet.
    #[must_use]
    pub fn new(context: Context) -> Self {
        Self {
            context,
            over: HashMap::new(),
            strangers: HashSet::new(),
            kept: HashMap::new(),
            backoff: Backoff::default(),
        }
    }

    fn look(&self) -> Seen {
        self.context.ledger.read(|ledger| {
            let mut seen = Seen::default();
            for node in ledger.nodes() {
                let strangers = node.unassigned().filter(|_| !node.gpus().is_empty());
                seen.strangers
                    .extend(strangers.map(|entry| (entry.clone(), node.name().clone())));
                for entry in node.pods() {
                    match over_use::look(node, entry) {
                        Some(Use::Over(excess)) => seen.over.push((entry.clone(), excess)),
                        Some(Use::Within) => {
                            seen.within.insert(entry.uid.clone());
                        }
                        None => {}
                    }
                }
            }
            seen
        })
    }

    fn pod(&self, entry: &Entry) -> Option<Arc<Pod>> {
        let pod = self.context.view.pods.get(&entry.namespace, &entry.name)?;
        (pod.metadata.uid.as_deref() == Some(entry.uid.as_str())).then_some(pod)
    }

    fn tell(&self, pod: &Pod, reason: &'static str, note: String) {
        let name = pod.name_any();
        tracing::warn!(pod = name, namespace = pod.namespace(), reason = note, "{reason}");
        self.context.events.tell(Told {
            regarding: events::reference(pod),
            warning: true,
            reason,
            note,
        });
    }

    /// Tells once of each pod that somebody else bound.
    fn tell_strangers(&mut self, strangers: &[(Entry, NodeName)]) {
        let there: HashSet<&PodUid> = strangers.iter().map(|(entry, _)| &entry.uid).collect();
        self.strangers.retain(|uid| there.contains(uid));
        for (entry, node) in strangers {
            if !self.strangers.contains(&entry.uid)
                && let Some(pod) = self.pod(entry)
            {
                self.strangers.insert(entry.uid.clone());
                let note = format!(
                    "bound to {node} by somebody else than Ebb, so its GPU is not known: it counts on every GPU of its \
                     node; use schedulerName {}",
                    names::SCHEDULER
                );
                self.tell(&pod, "BoundByOthers", note);
            }
        }
    }

    /// What the pod's policy says, and the policy's name.
    fn policy(&self, pod: &Pod) -> Option<(OverUse, String)> {
        let WorkloadRef {
            kind,
            namespace,
            name,
        } = workload_of(pod)?;
        let view = &self.context.view;
        let annotations = match kind {
            WorkloadKind::Deployment => view.deployments.get(&namespace, &name)?.annotations().clone(),
            WorkloadKind::StatefulSet => view.stateful_sets.get(&namespace, &name)?.annotations().clone(),
        };
        let policy = annotations.get(annotations::POLICY)?;
        let spec = view.scale_policies.get("", policy)?;
        Some((spec.spec.over_use, policy.clone()))
    }

    /// One step with a pod that is over. When to look again.
    async fn step(&mut self, entry: &Entry, excess: Excess) -> Option<Duration> {
        let since = *self.over.get(&entry.uid)?;
        let pod = self.pod(entry)?;
        let told = condition(&pod) == Some("True");
        let policy = self.policy(&pod);
        let decision = over_use::decide(&Facts {
            excess,
            // What an earlier leader told of has lasted.
            lasts: if told { over_use::SETTLE } else { since.elapsed() },
            terminating: pod.metadata.deletion_timestamp.is_some(),
            policy: policy.as_ref().map(|(what, name)| (*what, name.as_str())),
        });
        let (reason, evicts) = match decision {
            Decision::Wait { again_in } => return again_in,
            Decision::Tell { reason } => (reason, false),
            Decision::Evict { reason } => (reason, true),
        };
        if !told {
            let written = self.write(&pod, "True", OVER_USE, &reason).await;
            if self.failed(&entry.uid, &written) {
                return None;
            }
            self.tell(&pod, OVER_USE, reason);
        }
        if evicts {
            self.evict(&pod, entry).await;
        }
        None
    }

    async fn evict(&mut self, pod: &Pod, entry: &Entry) {
        if !self.context.leads() {
            return;
        }
        let (namespace, name) = (&entry.namespace, &entry.name);
        match evict(&self.context.client, namespace, name, entry.uid.as_str()).await {
            Ok(()) => {
                self.context.metrics.over_use_evictions.inc();
                self.kept.remove(&entry.uid);
                // The view will show that it ends.
                self.backoff.failed(&entry.uid);
            }
            Err(EvictError::Gone) => {}
            Err(error) => {
                self.backoff.failed(&entry.uid);
                let why = error.to_string();
                if !matches!(error, EvictError::Budget(_)) {
                    self.context.failed(Self::PART);
                }
                if self.kept.get(&entry.uid) != Some(&why) {
                    self.tell(
                        pod,
                        "EvictionWaits",
                        format!("it uses too much GPU memory and is not evicted: {why}"),
                    );
                    self.kept.insert(entry.uid.clone(), why);
                }
            }
        }
    }

    /// Whether the write failed; then it is tried again later.
    fn failed(&mut self, uid: &PodUid, written: &Result<(), CallError>) -> bool {
        match written {
            Ok(()) => false,
            Err(error) => {
                if !matches!(error, CallError::Conflict | CallError::Gone) {
                    tracing::warn!(pod = %uid, %error, "cannot write a pod's condition; trying again");
                    self.context.failed(Self::PART);
                }
                self.backoff.failed(uid);
                true
            }
        }
    }

    async fn write(&self, pod: &Pod, status: &str, reason: &str, message: &str) -> Result<(), CallError> {
        if !self.context.leads() {
            return Err(CallError::Conflict);
        }
        // Merged by type: the kubelet's own conditions stay.
        let patch = json!({
            "metadata": {"uid": pod.metadata.uid},
            "status": {"conditions": [{
                "type": CONDITION, "status": status, "reason": reason, "message": message,
                "lastTransitionTime": Timestamp::now(),
            }]},
        });
        let namespace = pod.namespace().unwrap_or_default();
        let pods: Api<Pod> = Api::namespaced(self.context.client.clone(), &namespace);
        let params = PatchParams::default();
        limited(pods.patch_status(&pod.name_any(), &params, &Patch::Strategic(patch))).await?;
        Ok(())
    }
}

/// The status of the pod's condition.
fn condition(pod: &Pod) -> Option<&str> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let ours = conditions.iter().find(|condition| condition.type_ == CONDITION)?;
    Some(ours.status.as_str())
}

impl Reconciler for Tenants {
    const PART: Part = Part::Tenants;
    const GATHER: Duration = Duration::from_millis(250);

    async fn pass(&mut self) -> Option<Duration> {
        let seen = self.look();
        self.tell_strangers(&seen.strangers);
        let over: HashSet<&PodUid> = seen.over.iter().map(|(entry, _)| &entry.uid).collect();
        // A reading that tells nothing of a pod is no reading that it is within.
        let known: HashSet<PodUid> = self
            .context
            .ledger
            .read(|ledger| ledger.bound_pods().cloned().collect());
        self.over
            .retain(|uid, _| known.contains(uid) && !seen.within.contains(uid));
        self.kept.retain(|uid, _| over.contains(uid));
        let now = Instant::now();
        for uid in over {
            self.over.entry(uid.clone()).or_insert(now);
        }
        let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
        let metrics = &self.context.metrics;
        metrics.pods_over_use.set(count(seen.over.len()));
        metrics.pods_bound_by_others.set(count(seen.strangers.len()));

        let mut next = None;
        let due = |this: &Self, entry: &Entry| this.backoff.open(&entry.uid);
        let open: Vec<&(Entry, Excess)> = seen
            .over
            .iter()
            .filter(|(entry, _)| due(self, entry))
            .take(AT_ONCE)
            .collect();
        for (entry, excess) in open {
            next = sooner(next, self.step(entry, *excess).await);
        }
        let ended: Vec<Arc<Pod>> = self
            .context
            .view
            .pods
            .all()
            .into_iter()
            .filter(|pod| condition(pod) == Some("True"))
            .filter(|pod| seen.within.contains(pod.uid().unwrap_or_default().as_str()))
            .take(AT_ONCE)
            .collect();
        for pod in ended {
            let uid = PodUid::from(pod.uid().unwrap_or_default().as_str());
            if self.backoff.open(&uid) {
                let message = "it uses no more GPU memory than it declared";
                let written = self.write(&pod, "False", "WithinDeclared", message).await;
                self.failed(&uid, &written);
            }
        }
        self.backoff.forget_old();
        sooner(next, self.backoff.next())
    }
}
