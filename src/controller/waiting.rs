//! Pods behind Ebb's scheduling gate: told why they wait, and let on when there is room.
//!
//! Everything is read from the view at each pass, so a new leader goes on where the last one stopped. What this one
//! remembers only bridges the time until the view shows what it did.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt as _, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use tokio::time::Instant;

use super::metrics::Part;
use super::reconcile::{Backoff, Context, Reconciler, sooner};
use crate::api::names;
use crate::api::units::PodUid;
use crate::cluster::call::{CallError, limited};
use crate::cluster::events::{self, Told};
use crate::cluster::waiting::{self, Stage};
use crate::extender::Extender;
use crate::plan::waiting::{self as plan, Ask, Cluster, Needs, Opening};

/// While pods wait, they are looked at this often: reservations end by time, which nobody tells of.
const TICK: Duration = Duration::from_secs(1);
/// A leader that does not answer the scheduler yet looks again after this long.
const NOT_YET: Duration = Duration::from_millis(20);
/// Gates taken off in one pass; the rest follows in the next.
const BATCH: usize = 128;
/// Of those, on their way at one time.
const AT_ONCE: usize = 16;
/// The view shows within this time that a gate is off.
const SHOWN: Duration = Duration::from_secs(10);
/// A pod is told again why it waits when that has changed, but not sooner.
const TELL_AGAIN: Duration = Duration::from_secs(300);
/// Reasons worked out in one pass; who asks the same has the same one.
const REASONS: usize = 16;

/// Lets waiting pods on.
pub struct Waiting {
    context: Context,
    /// What the scheduler asks about a pod once its gate is off.
    extender: Arc<Extender>,
    /// Gates that are off, though the view may not show it yet.
    opened: HashMap<PodUid, Instant>,
    /// What each waiting pod was told, and when.
    told: HashMap<PodUid, (String, Instant)>,
    backoff: Backoff<PodUid>,
}

/// The pods of one pass.
#[derive(Default)]
struct Pods {
    by_uid: HashMap<PodUid, Arc<Pod>>,
    gated: Vec<plan::Waiting>,
    opened: Vec<plan::Waiting>,
    /// Priorities of those that could be evicted for one of them.
    bound: HashMap<PodUid, i32>,
}

impl Waiting {
    /// A reconciler that has done nothing yet.
    #[must_use]
    pub fn new(context: Context, extender: Arc<Extender>) -> Self {
        Self {
            context,
            extender,
            opened: HashMap::new(),
            told: HashMap::new(),
            backoff: Backoff::default(),
        }
    }

    fn pods(&self) -> Pods {
        let all = self.context.view.pods.all();
        let mut pods = Pods::default();
        // Mostly nobody waits, and then it does not matter who does not.
        if !all.iter().any(|pod| waiting::gate_of(pod).is_some()) {
            return pods;
        }
        for pod in &all {
            match waiting::stage(pod) {
                Some(Stage::Gated(waiting)) if self.opened.contains_key(&waiting.uid) => {
                    pods.opened.push(waiting);
                }
                Some(Stage::Gated(waiting)) => {
                    pods.by_uid.insert(waiting.uid.clone(), pod.clone());
                    pods.gated.push(waiting);
                }
                Some(Stage::Opened(waiting)) => pods.opened.push(waiting),
                None => {}
            }
        }
        let asks = pods.gated.iter().filter_map(ask).filter(|ask| ask.evicts);
        if let Some(highest) = asks.map(|ask| ask.priority).max() {
            pods.bound = waiting::bound_below(&all, highest);
        }
        pods
    }

    /// What the plan says at this moment.
    fn plan<R>(&self, pods: &Pods, decide: impl FnOnce(Cluster<'_>) -> R) -> R {
        let view = &self.context.view;
        self.context.ledger.read(|ledger| {
            decide(Cluster {
                ledger,
                bar: &|node, ask| waiting::bar(view, node, ask),
                bound: &pods.bound,
            })
        })
    }

    /// Takes gates off. Whether more are due.
    async fn open(&mut self, pods: &Pods, openings: Vec<Opening>) -> bool {
        let mut due: Vec<Opening> = openings;
        due.retain(|opening| self.backoff.open(&opening.uid));
        let more = due.len() > BATCH;
        due.truncate(BATCH);
        let context = &self.context;
        let calls = due.into_iter().filter_map(|opening| {
            let pod = pods.by_uid.get(&opening.uid)?.clone();
            Some(async move { (take_off(context, &pod).await, pod, opening) })
        });
        let done: Vec<_> = stream::iter(calls).buffer_unordered(AT_ONCE).collect().await;
        for (result, pod, opening) in done {
            match result {
                Ok(()) => {
                    self.backoff.went_well(&opening.uid);
                    self.opened.insert(opening.uid, Instant::now());
                    self.context.metrics.gates_opened.inc();
                    self.tell(&pod, "HasRoom", opening.reason);
                }
                // The view is behind: the next pass decides anew.
                Err(CallError::Conflict | CallError::Gone) => self.backoff.failed(&opening.uid),
                Err(error) => {
                    tracing::warn!(pod = opening.name, %error, "cannot take the scheduling gate off; trying again");
                    self.context.failed(Self::PART);
                    self.backoff.failed(&opening.uid);
                }
            }
        }
        more
    }

    /// Tells those that go on waiting why, where they do not know it yet.
    fn tell_reasons(&mut self, pods: &Pods) {
        let now = Instant::now();
        let due: Vec<&plan::Waiting> = pods
            .gated
            .iter()
            .filter(|pod| !self.opened.contains_key(&pod.uid))
            .filter(|pod| {
                let told = self.told.get(&pod.uid);
                told.is_none_or(|(_, at)| now.duration_since(*at) >= TELL_AGAIN)
            })
            .collect();
        let mut reasons: Vec<(&Ask, String)> = Vec::new();
        for pod in due {
            let Some(ask) = ask(pod) else { continue };
            let known = reasons.iter().position(|(other, _)| *other == ask);
            let reason = match known {
                Some(known) => reasons[known].1.clone(),
                None if reasons.len() < REASONS => {
                    let reason = self.plan(pods, |cluster| plan::why(cluster, ask)).to_string();
                    reasons.push((ask, reason.clone()));
                    reason
                }
                None => continue,
            };
            let before = self.told.insert(pod.uid.clone(), (reason.clone(), now));
            if before.is_none_or(|(before, _)| before != reason)
                && let Some(object) = pods.by_uid.get(&pod.uid)
            {
                self.tell(object, "WaitsForGpuMemory", reason);
            }
        }
    }

    fn tell(&self, pod: &Pod, reason: &'static str, note: String) {
        let (namespace, name) = (&pod.metadata.namespace, &pod.metadata.name);
        tracing::info!(pod = name, namespace, reason = note, "{reason}");
        self.context.events.tell(Told {
            regarding: events::reference(pod),
            warning: false,
            reason,
            note,
        });
    }
}

fn ask(pod: &plan::Waiting) -> Option<&Ask> {
    match &pod.needs {
        Needs::Room(ask) => Some(ask),
        Needs::Nothing(_) => None,
    }
}

/// Takes the gate off this very pod; another one of that name, or other gates by now, are a conflict.
async fn take_off(context: &Context, pod: &Pod) -> Result<(), CallError> {
    let (Some(place), true) = (waiting::gate_of(pod), context.leads()) else {
        return Err(CallError::Conflict);
    };
    let path = format!("/spec/schedulingGates/{place}");
    let operations = json!([
        {"op": "test", "path": "/metadata/uid", "value": pod.metadata.uid},
        {"op": "test", "path": format!("{path}/name"), "value": names::SCHEDULING_GATE},
        {"op": "remove", "path": path},
    ]);
    let patch: json_patch::Patch =
        serde_json::from_value(operations).map_err(|error| CallError::Api(kube::Error::SerdeError(error)))?;
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let params = PatchParams {
        field_manager: Some(names::CONTROLLER.to_owned()),
        ..PatchParams::default()
    };
    let api: Api<Pod> = Api::namespaced(context.client.clone(), namespace);
    match limited(api.patch(name, &params, &Patch::Json::<()>(patch))).await {
        Ok(_) => Ok(()),
        // What a failed test is answered with.
        Err(CallError::Api(kube::Error::Api(status))) if status.code == 422 => Err(CallError::Conflict),
        Err(error) => Err(error),
    }
}

impl Reconciler for Waiting {
    const PART: Part = Part::Waiting;
    const GATHER: Duration = Duration::from_millis(10);

    async fn pass(&mut self) -> Option<Duration> {
        self.opened.retain(|_, at| at.elapsed() < SHOWN);
        let pods = self.pods();
        let gated: HashSet<&PodUid> = pods.by_uid.keys().collect();
        self.told.retain(|uid, _| gated.contains(uid));
        let count = i64::try_from(gated.len()).unwrap_or(i64::MAX);
        self.context.metrics.waiting_pods.set(count);
        if pods.gated.is_empty() {
            return None;
        }
        // The scheduler would be refused, and would then wait before it asks again.
        if !self.extender.decides() {
            return Some(NOT_YET);
        }
        let now_ms = self.context.clock.now_ms();
        self.context.ledger.update(|ledger| ledger.expire(now_ms));
        let openings = self.plan(&pods, |cluster| plan::decide(cluster, &pods.opened, &pods.gated));
        let more = self.open(&pods, openings).await;
        self.tell_reasons(&pods);
        self.backoff.forget_old();
        if more {
            return Some(Duration::ZERO);
        }
        sooner(Some(TICK), self.backoff.next())
    }
}
