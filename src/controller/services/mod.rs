//! Services that go through the gates: selector key, gate ports, the slice beside them, and a headless twin with the
//! old selector for scrapers and port-forwards.

mod actions;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt;
use serde_json::json;
use tokio::time::Instant;

use self::actions::{Action, carry_out, key};
use super::facts::{self, ByNamespace};
use super::gates::LinkedGate;
use super::headless;
use super::metrics::Part;
use super::reconcile::{Backoff, Context, Reconciler, sooner};
use crate::api::{annotations, names};
use crate::cluster::call::CallError;
use crate::cluster::events::{self, Told};
use crate::cluster::slices;
use crate::cluster::workloads::service_facts;
use crate::plan::endpoints::{self, Gate, GateState, Targets};
use crate::plan::gate_ports::{self, Assignment, Wish};
use crate::plan::gating::{Gating, gating};

/// So long after its beginning a leader waits for gates that the slices list before it does without them.
const SETTLING: Duration = Duration::from_secs(4);
/// So long Ebb's slice stays beside Kubernetes' own after the key was taken off, so that there is always one.
const OVERLAP: Duration = Duration::from_secs(2);
/// Writes at a time.
const CONCURRENCY: usize = 8;

/// Keeps all gated Services as they have to be.
pub struct Services {
    context: Context,
    backoff: Backoff<String>,
    /// Services whose key or ports were written and are still to be seen: the webhook may see things otherwise for a
    /// moment and undo them, which nothing would tell.
    written: Backoff<String>,
    told: HashMap<String, String>,
    ungated: HashMap<String, Instant>,
}

/// What one pass looks at.
struct Facts {
    gates: Vec<(Arc<Pod>, Option<LinkedGate>)>,
    pods: HashMap<String, Vec<Arc<Pod>>>,
    assignment: Assignment,
    settling: bool,
}

impl Services {
    /// A reconciler that has done nothing yet.
    #[must_use]
    pub fn new(context: Context) -> Self {
        Self {
            context,
            backoff: Backoff::default(),
            written: Backoff::default(),
            told: HashMap::new(),
            ungated: HashMap::new(),
        }
    }

    fn decide(&self, service: &Service, workloads: &ByNamespace) -> Gating {
        let namespace = service.namespace().unwrap_or_default();
        let candidates = workloads.get(&namespace).map_or(&[][..], Vec::as_slice);
        gating(
            service_facts(service),
            candidates.iter().map(|(reference, labels)| (reference, labels)),
        )
    }

    fn facts(&self, services: &[(Arc<Service>, Gating)], workloads: &ByNamespace) -> Facts {
        let view = &self.context.view;
        let linked: HashMap<String, LinkedGate> = self
            .context
            .gates
            .linked()
            .into_iter()
            .map(|gate| (gate.pod.clone(), gate))
            .collect();
        let (mut gates, mut pods) = (Vec::new(), HashMap::<String, Vec<Arc<Pod>>>::new());
        for pod in view.pods.all() {
            if facts::is_gate(&pod, &self.context.namespace) {
                let link = linked.get(&pod.name_any()).cloned();
                gates.push((pod, link));
            } else if let Some(namespace) = pod.namespace()
                && workloads.contains_key(&namespace)
            {
                pods.entry(namespace).or_default().push(pod);
            }
        }
        let wishes: Vec<Wish> = services
            .iter()
            .filter(|(_, gating)| matches!(gating, Gating::Gate(_)))
            .map(|(service, _)| Wish {
                service: key(service.as_ref()),
                created_ms: service
                    .creation_timestamp()
                    .map_or(0, |created| created.0.as_millisecond()),
                ports: slices::ports(service).into_iter().map(|(key, _)| key).collect(),
                have: slices::gate_ports(service),
            })
            .collect();
        Facts {
            gates,
            pods,
            assignment: gate_ports::assign(&wishes, names::GATE_PORTS),
            settling: self.context.since.elapsed() < SETTLING,
        }
    }

    /// Tells about a Service once, until there is something else to tell.
    fn tell(&mut self, service: &Service, note: &str) {
        let uid = service.uid().unwrap_or_default();
        if self.told.get(&uid).is_some_and(|told| told == note) {
            return;
        }
        tracing::warn!(service = key(service), reason = note, "a Service is not gated");
        self.context.events.tell(Told {
            regarding: events::reference(service),
            warning: true,
            reason: "NotGated",
            note: note.to_owned(),
        });
        self.told.insert(uid, note.to_owned());
    }

    /// What one Service needs.
    fn plan(
        &mut self,
        service: &Arc<Service>,
        decided: &Gating,
        facts: &Facts,
    ) -> (Vec<Action>, Option<Duration>) {
        match decided {
            Gating::Gate(_) => {
                self.ungated.remove(&key(service.as_ref()));
                let id = key(service.as_ref());
                if facts.assignment.full.contains(&id) {
                    let note = "there is no gate port left for it: the range 20000-29999 is used up";
                    self.tell(service, note);
                    return (Vec::new(), None);
                }
                self.told.remove(&service.uid().unwrap_or_default());
                (self.gate(service, facts), None)
            }
            Gating::Cannot(reason) => {
                self.tell(service, reason);
                self.leave(service, facts)
            }
            Gating::Leave | Gating::Off => self.leave(service, facts),
        }
    }

    fn gate(&self, service: &Arc<Service>, facts: &Facts) -> Vec<Action> {
        let mut actions = Vec::new();
        let ports = facts
            .assignment
            .ports
            .get(&key(service.as_ref()))
            .cloned()
            .unwrap_or_default();
        // The slice goes first: the key empties Kubernetes' own.
        actions.extend(self.slice(service, &ports, facts, true));
        let has_key = selector(service).is_some_and(|selector| selector.contains_key(names::GATED_KEY));
        let mut patch = json!({"metadata": {"resourceVersion": service.resource_version()}});
        if !has_key {
            patch["spec"] = json!({"selector": {names::GATED_KEY: "true"}});
        }
        if slices::gate_ports(service) != ports {
            let text = serde_json::to_string(&ports).unwrap_or_default();
            patch["metadata"]["annotations"] = json!({annotations::GATE_PORTS: text});
        }
        if patch.get("spec").is_some() || patch["metadata"].get("annotations").is_some() {
            actions.push(Action::Patch {
                service: service.clone(),
                patch,
            });
        }
        let namespace = service.namespace().unwrap_or_default();
        if let Some(twin) = headless::twin(service) {
            let have = self.context.view.services.get(&namespace, &twin.name_any());
            match have {
                None => actions.push(Action::Twin {
                    service: Box::new(twin),
                }),
                Some(have) if headless::is_twin(&have) && !headless::same(&have, &twin) => {
                    actions.push(Action::DeleteTwin { service: have });
                }
                Some(_) => {}
            }
        }
        actions
    }

    fn slice(
        &self,
        service: &Service,
        ports: &BTreeMap<String, u16>,
        facts: &Facts,
        through_gates: bool,
    ) -> Option<Action> {
        let namespace = service.namespace().unwrap_or_default();
        let name = slices::slice_name(&service.name_any());
        let have = self.context.view.slices.get(&namespace, &name);
        let gates = if through_gates {
            candidates(service, ports, facts, have.as_deref())
        } else {
            Vec::new()
        };
        let ready: Vec<endpoints::Pod> = facts
            .pods
            .get(&namespace)
            .into_iter()
            .flatten()
            .filter(|pod| selects(service, pod))
            .filter_map(|pod| slices::ready_pod(service, pod))
            .collect();
        let decision = endpoints::decide(&gates, &ready, facts.settling);
        if !through_gates && decision.targets == Targets::Nobody {
            return None;
        }
        let wanted = slices::slice(service, &decision.targets, ports);
        match have {
            None => Some(Action::Create {
                slice: Box::new(wanted),
                reason: decision.reason,
            }),
            Some(have) if have.address_type != wanted.address_type => Some(Action::Delete { slice: have }),
            Some(have) if slices::same(&have, &wanted) => None,
            Some(have) => Some(Action::Replace {
                slice: Box::new(wanted),
                resource_version: have.resource_version(),
                reason: decision.reason,
            }),
        }
    }

    /// Puts a Service back: its pods into the slice, then the key off, then the slice away.
    fn leave(&mut self, service: &Arc<Service>, facts: &Facts) -> (Vec<Action>, Option<Duration>) {
        let namespace = service.namespace().unwrap_or_default();
        let name = service.name_any();
        let slice = self
            .context
            .view
            .slices
            .get(&namespace, &slices::slice_name(&name));
        let has_key = selector(service).is_some_and(|selector| selector.contains_key(names::GATED_KEY));
        let has_ports = service.annotations().contains_key(annotations::GATE_PORTS);
        let mut actions = Vec::new();
        if has_key || has_ports {
            if slice.is_some() {
                actions.extend(self.slice(service, &BTreeMap::new(), facts, false));
            }
            let mut patch = json!({"metadata": {
                "resourceVersion": service.resource_version(),
                "annotations": {annotations::GATE_PORTS: null},
            }});
            if has_key {
                patch["spec"] = json!({"selector": {names::GATED_KEY: null}});
            }
            actions.push(Action::Patch {
                service: service.clone(),
                patch,
            });
        }
        if let Some(twin) = self
            .context
            .view
            .services
            .get(&namespace, &headless::name(&name))
            .filter(|twin| headless::is_twin(twin))
        {
            actions.push(Action::DeleteTwin { service: twin });
        }
        let mut again = None;
        if let Some(slice) = slice
            && !has_key
        {
            let since = *self
                .ungated
                .entry(key(service.as_ref()))
                .or_insert_with(Instant::now);
            match OVERLAP
                .checked_sub(since.elapsed())
                .filter(|left| !left.is_zero())
            {
                Some(left) => again = Some(left),
                None => actions.push(Action::Delete { slice }),
            }
        }
        (actions, again)
    }
}

impl Reconciler for Services {
    const PART: Part = Part::Services;
    const GATHER: Duration = Duration::from_millis(3);

    async fn pass(&mut self) -> Option<Duration> {
        let view = self.context.view.clone();
        let managed = facts::managed(&view);
        let workloads = facts::by_namespace(&managed);
        let services: Vec<(Arc<Service>, Gating)> = view
            .services
            .all()
            .into_iter()
            .filter(|service| service.metadata.deletion_timestamp.is_none() && !headless::is_twin(service))
            .map(|service| {
                let decided = self.decide(&service, &workloads);
                (service, decided)
            })
            .collect();
        let uids: HashSet<String> = services.iter().filter_map(|(service, _)| service.uid()).collect();
        self.told.retain(|uid, _| uids.contains(uid));
        let keys: HashSet<String> = services
            .iter()
            .map(|(service, _)| key(service.as_ref()))
            .collect();
        self.ungated.retain(|key, _| keys.contains(key));
        let facts = self.facts(&services, &workloads);
        let mut next = facts.settling.then_some(SETTLING);
        let mut due = Vec::new();
        for (service, decided) in &services {
            let id = key(service.as_ref());
            if !self.backoff.open(&id) {
                continue;
            }
            let (mut actions, again) = self.plan(service, decided, &facts);
            next = sooner(next, again);
            if !actions
                .iter()
                .any(|action| matches!(action, Action::Patch { .. }))
            {
                self.written.went_well(&id);
            } else if self.written.open(&id) {
                self.written.failed(&id);
            } else {
                actions.retain(|action| !matches!(action, Action::Patch { .. }));
            }
            if !actions.is_empty() {
                due.push((id, actions));
            }
        }
        let context = self.context.clone();
        let results: Vec<(String, Result<(), CallError>)> = futures::stream::iter(due)
            .map(|(id, actions)| {
                let context = context.clone();
                async move {
                    for action in actions {
                        if let Err(error) = carry_out(&context, action).await {
                            return (id, Err(error));
                        }
                    }
                    (id, Ok(()))
                }
            })
            .buffer_unordered(CONCURRENCY)
            .collect()
            .await;
        for (id, result) in results {
            match result {
                Ok(()) => self.backoff.went_well(&id),
                // The view is a moment behind; the change that we ran into is on its way.
                Err(CallError::Conflict | CallError::Gone) => self.backoff.failed(&id),
                Err(error) => {
                    tracing::warn!(service = id, %error, "cannot write what a Service needs; trying again");
                    context.failed(Self::PART);
                    self.backoff.failed(&id);
                }
            }
        }
        self.backoff.forget_old();
        self.written.forget_old();
        sooner(next, sooner(self.backoff.next(), self.written.next()))
    }
}

/// The gates as candidates for one Service.
fn candidates(
    service: &Service,
    ports: &BTreeMap<String, u16>,
    facts: &Facts,
    have: Option<&EndpointSlice>,
) -> Vec<Gate> {
    let family = slices::address_type(service);
    let listed: HashSet<&String> = have
        .into_iter()
        .flat_map(|slice| &slice.endpoints)
        .flat_map(|endpoint| &endpoint.addresses)
        .collect();
    facts
        .gates
        .iter()
        .filter_map(|(pod, link)| {
            let deleted = pod.metadata.deletion_timestamp.is_some();
            let (ip, state) = match link {
                // Its own word for its address counts only where the cluster says the same.
                Some(link) if slices::addresses(pod).any(|ip| ip == link.ip) => (
                    link.ip,
                    GateState::Linked {
                        listens: ports.values().all(|port| link.ports.contains(port)),
                        stopping: link.stopping || deleted,
                    },
                ),
                _ if !deleted && slices::is_ready(pod) => {
                    let ip = slices::addresses(pod).find(|ip| listed.contains(&ip.to_string()))?;
                    (ip, GateState::ListedAndReady)
                }
                _ => return None,
            };
            slices::of_type(ip, family).then(|| Gate {
                ip,
                node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
                state,
            })
        })
        .collect()
}

fn selector(service: &Service) -> Option<&BTreeMap<String, String>> {
    service.spec.as_ref()?.selector.as_ref()
}

/// Whether the Service would select the pod without Ebb's key.
fn selects(service: &Service, pod: &Pod) -> bool {
    let labels = pod.labels();
    selector(service).is_some_and(|selector| {
        let mut own = selector
            .iter()
            .filter(|(key, _)| *key != names::GATED_KEY)
            .peekable();
        own.peek().is_some() && own.all(|(key, value)| labels.get(key) == Some(value))
    })
}
