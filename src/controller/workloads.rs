//! Workloads: put to sleep when idle, scaled by load, and told apart when a wake cannot succeed.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::nodes::Unplaceable;
use super::reach::{Reach, Reaches};
use super::reconcile::{Backoff, Context, Reconciler, sooner};
use super::{facts, metrics::Part};
use crate::api::settings::Settings;
use crate::api::units::Replicas;
use crate::api::workload::{WorkloadKind, WorkloadRef};
use crate::cluster::events::{self, Told};
use crate::cluster::scale;
use crate::cluster::workloads::{Workload, workload_of};
use crate::link::ToGate;
use crate::plan::sleep::GateFacts;
use crate::plan::{autoscale, sleep, wake_failure};

/// Gates must answer the last look within this time.
const LAST_LOOK: Duration = Duration::from_secs(2);
/// And hold for so long, unless told otherwise: longer than the write that follows can take.
const HOLD_FOR: Duration = Duration::from_secs(15);
/// Scale writes under way at a time.
const CONCURRENCY: usize = 16;
/// While requests wait for a wake that cannot succeed, gates are told again after this long.
const TELL_AGAIN: Duration = Duration::from_secs(1);
/// While a workload has more than one replica, its load is sampled this often.
const SAMPLE: Duration = Duration::from_secs(2);

/// What this leader has seen of one workload.
struct Track {
    replicas: Replicas,
    ready: bool,
    awake: Option<Instant>,
    direct: Option<Instant>,
    window: autoscale::Window,
    failure: Option<(String, Instant)>,
    kept: String,
}

/// Writes under way, and when those that failed may be tried again.
#[derive(Default)]
struct UnderWay {
    busy: HashSet<WorkloadRef>,
    backoff: Backoff<WorkloadRef>,
}

/// Watches over all managed workloads.
pub struct Workloads {
    context: Context,
    unplaceable: Unplaceable,
    tracks: HashMap<String, Track>,
    under_way: Arc<Mutex<UnderWay>>,
    tasks: JoinSet<()>,
}

/// What one pass looks at.
struct Facts {
    reaches: Reaches,
    gate_pods: Vec<String>,
    pods: BTreeMap<WorkloadRef, Vec<Arc<Pod>>>,
    now: Timestamp,
}

impl Workloads {
    /// A reconciler that has done nothing yet.
    #[must_use]
    pub fn new(context: Context, unplaceable: Unplaceable) -> Self {
        Self {
            context,
            unplaceable,
            tracks: HashMap::new(),
            under_way: Arc::default(),
            tasks: JoinSet::new(),
        }
    }

    fn facts(&self, workloads: &[Workload]) -> Facts {
        let (mut gate_pods, mut pods) = (Vec::new(), BTreeMap::<WorkloadRef, Vec<Arc<Pod>>>::new());
        for pod in self.context.view.pods.all() {
            if facts::is_gate(&pod, &self.context.namespace) {
                if facts::may_carry_requests(&pod) {
                    gate_pods.push(pod.name_any());
                }
            } else if let Some(workload) = workload_of(&pod) {
                pods.entry(workload).or_default().push(pod);
            }
        }
        Facts {
            reaches: Reaches::new(&self.context.view, workloads),
            gate_pods,
            pods,
            now: Timestamp::now(),
        }
    }

    /// Notes what changed since the last pass, and tells of a wake.
    fn track(&mut self, workload: &Workload, reach: &Reach) {
        let now = Instant::now();
        let ready = workload.ready_replicas.0 > 0;
        let track = self.tracks.entry(workload.uid.clone()).or_insert_with(|| Track {
            replicas: workload.replicas,
            ready,
            awake: None,
            direct: None,
            window: autoscale::Window::default(),
            failure: None,
            kept: String::new(),
        });
        if track.replicas.0 == 0 && workload.replicas.0 > 0 {
            track.awake = Some(now);
            let waiting = self.context.gates.queued(&workload.reference);
            let note = match waiting {
                0 => format!("scaled to {}", workload.replicas),
                1 => format!("scaled to {}: a request waits for it", workload.replicas),
                n => format!("scaled to {}: {n} requests wait for it", workload.replicas),
            };
            self.context.metrics.wakes.inc();
            tell(&self.context, workload, false, "Woke", note);
        }
        if ready && !track.ready {
            track.awake = Some(now);
        }
        if workload.replicas.0 == 0 || ready {
            track.failure = None;
        }
        if matches!(reach, Reach::Direct(_)) {
            track.direct = Some(now);
        }
        track.replicas = workload.replicas;
        track.ready = ready;
    }

    fn sleep(
        &self,
        workload: &Workload,
        settings: &Settings,
        reach: &Reach,
        gates: &[GateFacts],
        now: Timestamp,
    ) -> sleep::Decision {
        let since = |at: Instant| at.elapsed();
        let track = self.tracks.get(&workload.uid);
        let active = self.context.gates.last_active(&workload.reference).map(since);
        let direct = track.and_then(|track| track.direct).map(since);
        let created_ms = now.as_millisecond().saturating_sub(workload.created_ms);
        sleep::decide(&sleep::Facts {
            replicas: workload.replicas,
            ready: workload.ready_replicas,
            min: settings.min_replicas,
            rollout_complete: workload.rollout_complete,
            idle_after: settings.idle_after.0,
            max_wait: settings.max_wait.0,
            since_created: Duration::from_millis(created_ms.try_into().unwrap_or(0)),
            since_awake: track.and_then(|track| track.awake).map(since),
            since_active: sooner(active, direct),
            since_leading: since(self.context.since),
            gates,
            unseen: reach.unseen(),
        })
    }

    fn autoscale(
        &mut self,
        workload: &Workload,
        settings: &Settings,
        gates: &[GateFacts],
    ) -> autoscale::Decision {
        let load = gates.iter().try_fold(0u32, |sum, gate| {
            gate.load
                .map(|load| sum.saturating_add(load.in_flight).saturating_add(load.queued))
        });
        let facts = autoscale::Facts {
            replicas: workload.replicas,
            min: settings.min_replicas,
            max: settings.max_replicas,
            target_in_flight: settings.target_in_flight,
            load: load.filter(|_| !gates.is_empty()),
        };
        let now = self.context.since.elapsed();
        let Some(track) = self.tracks.get_mut(&workload.uid) else {
            return autoscale::Decision::Stay;
        };
        match facts.load {
            Some(load) => track.window.note(now, autoscale::needed(&facts, load)),
            // What nobody saw cannot be called low.
            None => track.window = autoscale::Window::default(),
        }
        autoscale::decide(&facts, &track.window, now)
    }

    /// Tells gates and people of a wake that cannot succeed. When to look again.
    fn failed_wake(&mut self, workload: &Workload, facts: &Facts) -> Option<Duration> {
        let empty = Vec::new();
        let pods = facts.pods.get(&workload.reference).unwrap_or(&empty);
        let reason = wake_failure::decide(&self.wake_facts(workload, pods))?;
        let waiting = self.context.gates.queued(&workload.reference);
        let now = Instant::now();
        let track = self.tracks.get_mut(&workload.uid)?;
        let (new, again) = match &track.failure {
            Some((told, at)) => (*told != reason, now.duration_since(*at) >= TELL_AGAIN),
            None => (true, true),
        };
        if new {
            tell(&self.context, workload, true, "WakeFailed", reason.clone());
            self.context.metrics.wake_failures.inc();
        }
        if new || (waiting > 0 && again) {
            self.context.gates.tell_all(&ToGate::WakeFailed {
                workload: workload.reference.clone(),
                reason: reason.clone(),
            });
            track.failure = Some((reason, now));
        }
        (waiting > 0).then_some(TELL_AGAIN)
    }

    fn wake_facts(&self, workload: &Workload, pods: &[Arc<Pod>]) -> wake_failure::Facts {
        let (namespace, name) = (&workload.reference.namespace, &workload.reference.name);
        let deployment = match workload.reference.kind {
            WorkloadKind::Deployment => self.context.view.deployments.get(namespace, name),
            WorkloadKind::StatefulSet => None,
        };
        let refused = deployment.as_ref().and_then(|deployment| {
            let conditions = deployment.status.as_ref()?.conditions.iter().flatten();
            let mut refusals = conditions.filter(|c| c.type_ == "ReplicaFailure" && c.status == "True");
            refusals.next()?.message.clone()
        });
        wake_failure::Facts {
            replicas: workload.replicas.0,
            ready: workload.ready_replicas.0,
            paused_before_first_rollout: deployment.as_ref().is_some_and(|deployment| {
                deployment
                    .spec
                    .as_ref()
                    .is_some_and(|spec| spec.paused == Some(true))
                    && !deployment
                        .annotations()
                        .contains_key("deployment.kubernetes.io/revision")
            }),
            refused,
            pods: pods.iter().map(|pod| self.pod_facts(pod)).collect(),
        }
    }

    fn pod_facts(&self, pod: &Pod) -> wake_failure::PodFacts {
        let status = pod.status.as_ref();
        let statuses = status.into_iter().flat_map(|status| {
            let init = status.init_container_statuses.iter().flatten();
            init.chain(status.container_statuses.iter().flatten())
        });
        wake_failure::PodFacts {
            name: pod.name_any(),
            ready: crate::cluster::slices::is_ready(pod),
            terminating: pod.metadata.deletion_timestamp.is_some(),
            waiting: statuses
                .filter_map(|container| {
                    let waiting = container.state.as_ref()?.waiting.as_ref()?;
                    Some((
                        container.name.clone(),
                        waiting.reason.clone().unwrap_or_default(),
                        waiting.message.clone().unwrap_or_default(),
                    ))
                })
                .collect(),
            never_placed: self.unplaceable.reason(&pod.uid().unwrap_or_default()),
        }
    }

    /// Starts a scale write in the background, unless one is under way for this workload.
    fn start(&mut self, workload: &Workload, replicas: Replicas, reason: String) {
        if self.tasks.len() >= CONCURRENCY {
            return;
        }
        {
            let mut under_way = self.under_way.lock();
            if !under_way.backoff.open(&workload.reference)
                || !under_way.busy.insert(workload.reference.clone())
            {
                return;
            }
        }
        let (context, under_way) = (self.context.clone(), self.under_way.clone());
        let workload = workload.clone();
        self.tasks.spawn(async move {
            let result = if replicas.0 == 0 {
                put_to_sleep(&context, &workload, &reason).await
            } else {
                set_replicas(&context, &workload, replicas, &reason).await
            };
            let mut under_way = under_way.lock();
            under_way.busy.remove(&workload.reference);
            match result {
                Ok(()) => under_way.backoff.went_well(&workload.reference),
                Err(kept_back) => {
                    tracing::info!(workload = %workload.reference, reason = kept_back, "its replicas stay");
                    under_way.backoff.failed(&workload.reference);
                }
            }
        });
    }
}

/// The last look, and then the conditional write.
async fn put_to_sleep(context: &Context, workload: &Workload, reason: &str) -> Result<(), String> {
    let kept_back = |why: String| {
        context.metrics.sleeps_kept_back.inc();
        why
    };
    let held = context
        .gates
        .hold(&workload.reference, HOLD_FOR, LAST_LOOK)
        .await
        .map_err(kept_back)?;
    if !context.leads() || !held.in_force() {
        return Err(kept_back("the last look took too long".to_owned()));
    }
    let (reference, version) = (&workload.reference, &workload.resource_version);
    match scale::set(&context.client, reference, version, Replicas(0)).await {
        Ok(()) => {
            held.asleep();
            context.metrics.sleeps.inc();
            tell(context, workload, false, "Slept", reason.to_owned());
            Ok(())
        }
        Err(error) => {
            drop(held);
            Err(kept_back(error.to_string()))
        }
    }
}

async fn set_replicas(
    context: &Context,
    workload: &Workload,
    replicas: Replicas,
    reason: &str,
) -> Result<(), String> {
    if !context.leads() {
        return Err("this replica does not lead any more".to_owned());
    }
    scale::set(
        &context.client,
        &workload.reference,
        &workload.resource_version,
        replicas,
    )
    .await
    .map_err(|error| error.to_string())?;
    let note = format!("{} to {replicas}: {reason}", workload.replicas);
    tell(context, workload, false, "Scaled", note);
    Ok(())
}

fn tell(context: &Context, workload: &Workload, warning: bool, reason: &'static str, note: String) {
    tracing::info!(workload = %workload.reference, reason = note, "{reason}");
    context.events.tell(Told {
        regarding: events::workload_reference(&workload.reference, &workload.uid),
        warning,
        reason,
        note,
    });
}

impl Reconciler for Workloads {
    const PART: Part = Part::Workloads;
    const GATHER: Duration = Duration::from_millis(50);

    async fn pass(&mut self) -> Option<Duration> {
        while self.tasks.try_join_next().is_some() {}
        let workloads = facts::managed(&self.context.view);
        let facts = self.facts(&workloads);
        let uids: HashSet<&str> = workloads.iter().map(|workload| workload.uid.as_str()).collect();
        self.tracks.retain(|uid, _| uids.contains(uid.as_str()));
        let known: HashSet<&WorkloadRef> = workloads.iter().map(|workload| &workload.reference).collect();
        self.context.gates.retain(|workload| known.contains(workload));
        let mut next = None;
        for workload in &workloads {
            let Some(settings) = workload.managed() else {
                continue;
            };
            let reach = facts.reaches.of(&workload.reference);
            self.track(workload, &reach);
            if workload.replicas.0 == 0 && settings.min_replicas.0 == 0 {
                continue;
            }
            let gates = self.context.gates.facts(&workload.reference, &facts.gate_pods);
            next = sooner(next, self.failed_wake(workload, &facts));
            if settings.max_replicas.0 > 1 && workload.replicas.0 > 1 {
                next = sooner(next, Some(SAMPLE));
            }
            match self.sleep(workload, settings, &reach, &gates, facts.now) {
                sleep::Decision::Sleep { reason } => {
                    self.start(workload, Replicas(0), reason);
                    continue;
                }
                sleep::Decision::Keep { reason, again_in } => {
                    next = sooner(next, again_in);
                    if let Some(track) = self.tracks.get_mut(&workload.uid)
                        && again_in.is_none()
                        && track.kept != reason
                    {
                        tracing::debug!(workload = %workload.reference, reason, "stays awake");
                        track.kept = reason;
                    }
                }
            }
            if let autoscale::Decision::To { replicas, reason } = self.autoscale(workload, settings, &gates) {
                self.start(workload, replicas, reason);
            }
        }
        let mut under_way = self.under_way.lock();
        under_way.backoff.forget_old();
        let again = under_way.backoff.next();
        drop(under_way);
        sooner(next, again)
    }
}
