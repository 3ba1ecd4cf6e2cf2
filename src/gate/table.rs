//! The routing table: which gate port belongs to which workload, and what the watches show of each workload. Made
//! anew from the view at every change; a pure function of Kubernetes objects.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{Pod, Service, ServicePort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;
use kube::runtime::watcher::Event;
use parking_lot::Mutex;

use super::probe::Checks;
use crate::api::annotations;
use crate::api::names;
use crate::api::units::{Bytes, PodUid};
use crate::api::workload::{WorkloadKind, WorkloadRef};
use crate::cluster::view::Hook;
use crate::cluster::workloads::{IntoWorkload, Workload, service_facts};
use crate::plan::gating::{Gating, Labels, gating};
use crate::plan::hold::{Limits, Seen, SeenPod, Target};

/// Bounds for a workload that Ebb does not manage (any more) but whose Service still leads here.
const UNMANAGED: Limits = Limits {
    queue_requests: 1_000,
    queue_bytes: Bytes(16 << 20),
    target_in_flight: u32::MAX,
};
const UNMANAGED_MAX_WAIT: Duration = Duration::from_secs(60);

/// Everything a request needs to know about where it goes.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// By gate port.
    pub routes: BTreeMap<u16, Route>,
    /// What is known of each workload that a route leads to.
    pub workloads: BTreeMap<WorkloadRef, Arc<Facts>>,
}

/// One port of one Service.
#[derive(Clone, Debug)]
pub struct Route {
    /// `namespace/name` of the Service.
    pub service: String,
    /// The port on the pods.
    pub target: Target,
    /// The workload, or why there is none.
    pub to: Result<WorkloadRef, String>,
}

/// What is known of a workload.
#[derive(Clone, Debug)]
pub struct Facts {
    /// What its line needs to know.
    pub seen: Seen,
    /// The version these facts were read at.
    pub resource_version: String,
    /// Replicas to wake it to.
    pub wake_to: u32,
    /// Longest hold of a request.
    pub max_wait: Duration,
    /// How to ask its pods whether they are ready.
    pub checks: BTreeMap<PodUid, Arc<Checks>>,
}

/// The newest version of each workload that had no replicas. Kept by hooks of the watches, since a zero that lasts
/// for a moment is gone before anyone looks at the whole view.
#[derive(Clone, Debug, Default)]
pub struct Zeros(Arc<Mutex<HashMap<WorkloadRef, u64>>>);

impl Zeros {
    /// A hook for a watch of workloads.
    pub fn hook<K: IntoWorkload + 'static>(&self) -> Hook<K> {
        let zeros = self.clone();
        Box::new(move |event| match event {
            Event::Apply(object) | Event::InitApply(object) => zeros.note(&object.workload()),
            Event::Delete(object) => {
                zeros.0.lock().remove(&object.workload().reference);
            }
            Event::Init | Event::InitDone => {}
        })
    }

    fn note(&self, workload: &Workload) {
        if workload.replicas.0 == 0
            && let Ok(version) = workload.resource_version.parse::<u64>()
        {
            let mut zeros = self.0.lock();
            let newest = zeros.entry(workload.reference.clone()).or_insert(version);
            *newest = version.max(*newest);
        }
    }

    fn of(&self, workload: &WorkloadRef) -> Option<u64> {
        self.0.lock().get(workload).copied()
    }
}

/// What the table is made from.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    /// All Services.
    pub services: Vec<Arc<Service>>,
    /// All Deployments.
    pub deployments: Vec<Arc<Deployment>>,
    /// All StatefulSets.
    pub stateful_sets: Vec<Arc<StatefulSet>>,
    /// All pods.
    pub pods: Vec<Arc<Pod>>,
}

struct Known {
    workload: Workload,
    labels: Labels,
    settled: bool,
}

/// Makes the table.
#[must_use]
pub fn build(objects: &Objects, zeros: &Zeros) -> Table {
    let mut gated: Vec<(&Service, BTreeMap<String, u16>)> = objects
        .services
        .iter()
        .filter_map(|service| Some((service.as_ref(), gate_ports(service)?)))
        .collect();
    // Where two Services claim one port, the older keeps it.
    gated.sort_by_key(|(service, _)| {
        (
            service.metadata.creation_timestamp.as_ref().map(|time| time.0),
            service.namespace(),
            service.name_any(),
        )
    });
    let known = known(objects, &gated);
    let mut table = Table::default();
    for (service, ports) in gated {
        let to = workload_of(service, &known);
        for port in service.spec.iter().flat_map(|spec| spec.ports.iter().flatten()) {
            let Some(gate_port) = ports.get(&port_key(port)) else {
                continue;
            };
            table.routes.entry(*gate_port).or_insert_with(|| Route {
                service: format!(
                    "{}/{}",
                    service.namespace().unwrap_or_default(),
                    service.name_any()
                ),
                target: target(port),
                to: to.clone(),
            });
        }
    }
    let mut pods: HashMap<WorkloadRef, Vec<&Pod>> = table
        .routes
        .values()
        .filter_map(|route| Some((route.to.clone().ok()?, Vec::new())))
        .collect();
    for pod in &objects.pods {
        if let Some(owner) = owner(pod)
            && let Some(list) = pods.get_mut(&owner)
        {
            list.push(pod);
        }
    }
    for (reference, pods) in pods {
        if let Some(known) = known.iter().find(|known| known.workload.reference == reference) {
            let facts = facts(known, &pods, zeros.of(&reference));
            table.workloads.insert(reference, Arc::new(facts));
        }
    }
    table
}

/// The gate ports of a Service that goes through the gates.
fn gate_ports(service: &Service) -> Option<BTreeMap<String, u16>> {
    let gated = service
        .spec
        .as_ref()?
        .selector
        .as_ref()?
        .contains_key(names::GATED_KEY);
    let text = service.annotations().get(annotations::GATE_PORTS)?;
    if !gated {
        return None;
    }
    match serde_json::from_str(text) {
        Ok(ports) => Some(ports),
        Err(error) => {
            tracing::warn!(
                service = service.name_any(),
                namespace = service.namespace(),
                %error,
                "cannot read annotation ebb.dev/gate-ports; remove it and the controller writes it again"
            );
            None
        }
    }
}

fn port_key(port: &ServicePort) -> String {
    match &port.name {
        Some(name) if !name.is_empty() => name.clone(),
        _ => port.port.to_string(),
    }
}

/// The port on the pods that a Service port leads to.
#[must_use]
pub fn target(port: &ServicePort) -> Target {
    let number = |number: i32| Target::Number(u16::try_from(number).unwrap_or(0));
    match &port.target_port {
        Some(IntOrString::String(name)) => Target::Name(name.clone()),
        Some(IntOrString::Int(value)) if *value != 0 => number(*value),
        _ => number(port.port),
    }
}

/// The workloads of the namespaces in which anything is gated.
fn known(objects: &Objects, gated: &[(&Service, BTreeMap<String, u16>)]) -> Vec<Known> {
    let here = |namespace: Option<String>| gated.iter().any(|(service, _)| service.namespace() == namespace);
    let settled = |observed: Option<i64>, generation: Option<i64>| observed >= generation;
    let make = |workload: Workload, settled: bool| Known {
        labels: workload.template_labels(),
        workload,
        settled,
    };
    let deployments = objects
        .deployments
        .iter()
        .filter(|d| here(d.namespace()))
        .map(|d| {
            let observed = d.status.as_ref().and_then(|s| s.observed_generation);
            make(d.workload(), settled(observed, d.metadata.generation))
        });
    let stateful_sets = objects
        .stateful_sets
        .iter()
        .filter(|s| here(s.namespace()))
        .map(|s| {
            let observed = s.status.as_ref().and_then(|s| s.observed_generation);
            make(s.workload(), settled(observed, s.metadata.generation))
        });
    deployments.chain(stateful_sets).collect()
}

/// The workload behind a Service. One that Ebb does not manage any more is still served while the Service leads here.
fn workload_of(service: &Service, known: &[Known]) -> Result<WorkloadRef, String> {
    let namespace = service.namespace().unwrap_or_default();
    let mut facts = service_facts(service);
    facts.mode = None;
    let matching = |managed_only: bool| {
        gating(
            facts,
            known
                .iter()
                .filter(|k| k.workload.reference.namespace == namespace)
                .filter(|k| !managed_only || k.workload.managed().is_some())
                .map(|k| (&k.workload.reference, &k.labels)),
        )
    };
    match matching(true) {
        Gating::Gate(workload) => Ok(workload),
        Gating::Cannot(reason) => Err(reason),
        Gating::Leave | Gating::Off => match matching(false) {
            Gating::Gate(workload) => Ok(workload),
            Gating::Cannot(reason) => Err(reason),
            Gating::Leave | Gating::Off => {
                Err("its selector matches no Deployment or StatefulSet".to_owned())
            }
        },
    }
}

/// The workload a pod belongs to. A Deployment's pods name their ReplicaSet, whose name is the Deployment's and the
/// template hash that the pod carries as a label.
fn owner(pod: &Pod) -> Option<WorkloadRef> {
    let owner = pod
        .owner_references()
        .iter()
        .find(|owner| owner.controller == Some(true))?;
    let (kind, name) = match owner.kind.as_str() {
        "StatefulSet" => (WorkloadKind::StatefulSet, owner.name.as_str()),
        "ReplicaSet" => {
            let hash = pod.labels().get("pod-template-hash")?;
            let name = owner.name.strip_suffix(hash.as_str())?.strip_suffix('-')?;
            (WorkloadKind::Deployment, name)
        }
        _ => return None,
    };
    Some(WorkloadRef {
        kind,
        namespace: pod.namespace()?,
        name: name.to_owned(),
    })
}

fn facts(known: &Known, pods: &[&Pod], zero: Option<u64>) -> Facts {
    let workload = &known.workload;
    let settings = workload.managed();
    let version = workload.resource_version.parse::<u64>().ok();
    let zero_now = version.filter(|_| workload.replicas.0 == 0);
    Facts {
        seen: Seen {
            desired: workload.replicas.0,
            zero_version: zero.max(zero_now),
            settled: known.settled,
            wakeable: settings.is_some(),
            limits: settings.map_or(UNMANAGED, |settings| Limits {
                queue_requests: settings.queue_requests,
                queue_bytes: settings.queue_bytes,
                target_in_flight: settings.target_in_flight.max(1),
            }),
            pods: pods.iter().map(|pod| seen_pod(pod)).collect(),
        },
        resource_version: workload.resource_version.clone(),
        wake_to: settings.map_or(1, |settings| settings.min_replicas.0.max(1)),
        max_wait: settings.map_or(UNMANAGED_MAX_WAIT, |settings| settings.max_wait.0),
        checks: pods
            .iter()
            .map(|pod| (uid(pod), Arc::new(Checks::of(pod))))
            .collect(),
    }
}

fn uid(pod: &Pod) -> PodUid {
    PodUid::from(pod.metadata.uid.as_deref().unwrap_or_default())
}

fn seen_pod(pod: &Pod) -> SeenPod {
    let status = pod.status.as_ref();
    let finished = matches!(
        status.and_then(|s| s.phase.as_deref()),
        Some("Failed" | "Succeeded")
    );
    SeenPod {
        uid: uid(pod),
        ip: status
            .and_then(|status| status.pod_ip.as_deref())
            .and_then(|ip| ip.parse().ok()),
        version: pod.resource_version().and_then(|version| version.parse().ok()),
        terminating: pod.metadata.deletion_timestamp.is_some() || finished,
        ready: is_ready(pod),
        ports: named_ports(pod),
    }
}

/// Whether the kubelet calls a pod Ready.
#[must_use]
pub fn is_ready(pod: &Pod) -> bool {
    pod.status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// The container ports of a pod that have a name.
#[must_use]
pub fn named_ports(pod: &Pod) -> BTreeMap<String, u16> {
    pod.spec
        .iter()
        .flat_map(|spec| &spec.containers)
        .flat_map(|container| container.ports.iter().flatten())
        .filter_map(|port| Some((port.name.clone()?, u16::try_from(port.container_port).ok()?)))
        .collect()
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
