//! The routing table: which gate port belongs to which workload, and what the watches show of each workload. Made
//! anew from the view at every change; a pure function of Kubernetes objects.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{Pod, Service, ServicePort};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;
use kube::runtime::watcher::Event;
use parking_lot::Mutex;

use super::probe::Checks;
use crate::api::annotations;
use crate::api::names;
use crate::api::units::{Bytes, PodUid};
use crate::api::workload::{WorkloadKind, WorkloadRef};
use crate::cluster::slices;
use crate::cluster::view::Hook;
use crate::cluster::workloads::{self, IntoWorkload, Workload, service_facts};
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

    /// Forgets workloads that are gone.
    fn retain(&self, keep: impl Fn(&WorkloadRef) -> bool) {
        self.0.lock().retain(|workload, _| keep(workload));
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

/// A workload as far as the table needs it.
struct Known {
    workload: Workload,
    labels: Labels,
    settled: bool,
}

impl Known {
    fn new(workload: Workload, observed: Option<i64>, generation: Option<i64>) -> Known {
        Known {
            labels: workload.template_labels(),
            workload,
            settled: observed >= generation,
        }
    }
}

/// Makes the table. What it has read of an object is kept until the object changes: most do not, from one table to
/// the next.
#[derive(Default)]
pub struct Tables {
    zeros: Zeros,
    known: HashMap<WorkloadRef, (Option<String>, Arc<Known>)>,
    checks: HashMap<PodUid, (Option<String>, Arc<Checks>)>,
}

impl Tables {
    /// Tables that know of the zeros that were seen in passing.
    #[must_use]
    pub fn new(zeros: Zeros) -> Self {
        Self {
            zeros,
            ..Self::default()
        }
    }

    /// Makes the table of these objects.
    pub fn build(&mut self, objects: &Objects) -> Table {
        let mut gated: Vec<(&Service, BTreeMap<String, u16>)> = objects
            .services
            .iter()
            .filter_map(|service| Some((service.as_ref(), gate_ports(service)?)))
            .collect();
        // Where two Services claim one port, one with Ebb's key has it, then the older: the annotation alone is
        // anybody's to write on a Service that is not gated.
        gated.sort_by_key(|(service, _)| {
            (
                !has_key(service),
                service.metadata.creation_timestamp.as_ref().map(|time| time.0),
                service.namespace(),
                service.name_any(),
            )
        });
        let known = self.known(objects, &gated);
        let mut table = Table::default();
        for (service, ports) in gated {
            let here = service
                .metadata
                .namespace
                .as_deref()
                .and_then(|name| known.get(name));
            let to = workload_of(service, here.map_or(&[], Vec::as_slice));
            for (key, port) in slices::ports(service) {
                let Some(gate_port) = ports.get(&key) else {
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
            if pod
                .metadata
                .namespace
                .as_deref()
                .is_some_and(|name| known.contains_key(name))
                && let Some(owner) = workloads::workload_of(pod)
                && let Some(list) = pods.get_mut(&owner)
            {
                list.push(pod);
            }
        }
        let all_checks = std::mem::take(&mut self.checks);
        for (reference, pods) in pods {
            let checks = pods.iter().map(|pod| self.checks_of(pod, &all_checks)).collect();
            if let Some((_, known)) = self.known.get(&reference) {
                let facts = facts(known, &pods, checks, self.zeros.of(&reference));
                table.workloads.insert(reference, Arc::new(facts));
            }
        }
        table
    }

    /// The workloads of the namespaces in which anything is gated, by namespace.
    fn known<'a>(
        &mut self,
        objects: &Objects,
        gated: &[(&'a Service, BTreeMap<String, u16>)],
    ) -> HashMap<&'a str, Vec<Arc<Known>>> {
        let mut by_namespace: HashMap<&str, Vec<Arc<Known>>> = gated
            .iter()
            .filter_map(|(service, _)| Some((service.metadata.namespace.as_deref()?, Vec::new())))
            .collect();
        let mut before = std::mem::take(&mut self.known);
        for object in &objects.deployments {
            let status = object.status.as_ref();
            let read = || {
                let observed = status.and_then(|status| status.observed_generation);
                Known::new(object.workload(), observed, object.metadata.generation)
            };
            self.remember(
                WorkloadKind::Deployment,
                &object.metadata,
                read,
                &mut before,
                &mut by_namespace,
            );
        }
        for object in &objects.stateful_sets {
            let status = object.status.as_ref();
            let read = || {
                let observed = status.and_then(|status| status.observed_generation);
                Known::new(object.workload(), observed, object.metadata.generation)
            };
            self.remember(
                WorkloadKind::StatefulSet,
                &object.metadata,
                read,
                &mut before,
                &mut by_namespace,
            );
        }
        self.zeros.retain(|workload| self.known.contains_key(workload));
        by_namespace
    }

    fn remember(
        &mut self,
        kind: WorkloadKind,
        metadata: &ObjectMeta,
        read: impl FnOnce() -> Known,
        before: &mut HashMap<WorkloadRef, (Option<String>, Arc<Known>)>,
        by_namespace: &mut HashMap<&str, Vec<Arc<Known>>>,
    ) {
        let (Some(namespace), Some(name)) = (&metadata.namespace, &metadata.name) else {
            return;
        };
        let Some(list) = by_namespace.get_mut(namespace.as_str()) else {
            return;
        };
        let reference = WorkloadRef {
            kind,
            namespace: namespace.clone(),
            name: name.clone(),
        };
        let version = &metadata.resource_version;
        let known = match before.remove(&reference) {
            Some((at, known)) if at == *version => known,
            _ => Arc::new(read()),
        };
        list.push(known.clone());
        self.known.insert(reference, (version.clone(), known));
    }

    fn checks_of(
        &mut self,
        pod: &Pod,
        before: &HashMap<PodUid, (Option<String>, Arc<Checks>)>,
    ) -> (PodUid, Arc<Checks>) {
        let (uid, version) = (uid(pod), pod.resource_version());
        let checks = match before.get(&uid) {
            Some((at, checks)) if *at == version => checks.clone(),
            _ => Arc::new(Checks::of(pod)),
        };
        self.checks.insert(uid.clone(), (version, checks.clone()));
        (uid, checks)
    }
}

/// Whether a Service's selector has Ebb's key.
fn has_key(service: &Service) -> bool {
    let selector = service.spec.as_ref().and_then(|spec| spec.selector.as_ref());
    selector.is_some_and(|selector| selector.contains_key(names::GATED_KEY))
}

/// The gate ports of a Service that goes through the gates.
fn gate_ports(service: &Service) -> Option<BTreeMap<String, u16>> {
    // Not the selector's key decides: where a person takes it off while no controller lives, Ebb's slice still points
    // here, and a closed port would refuse what comes. The controller takes slice and annotation away together.
    let text = service.annotations().get(annotations::GATE_PORTS)?;
    match serde_json::from_str::<BTreeMap<String, u16>>(text) {
        Ok(mut ports) => {
            // Where no controller gave it, the annotation is anybody's, and must not open whatever port it names.
            ports.retain(|_, port| names::GATE_PORTS.contains(port));
            Some(ports)
        }
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

fn target(port: &ServicePort) -> Target {
    let number = |number: i32| Target::Number(u16::try_from(number).unwrap_or(0));
    match &port.target_port {
        Some(IntOrString::String(name)) => Target::Name(name.clone()),
        Some(IntOrString::Int(value)) if *value != 0 => number(*value),
        _ => number(port.port),
    }
}

/// The workload behind a Service. One that Ebb does not manage any more is still served while the Service leads here.
fn workload_of(service: &Service, known: &[Arc<Known>]) -> Result<WorkloadRef, String> {
    let mut facts = service_facts(service);
    facts.mode = None;
    let matching = |managed_only: bool| {
        gating(
            facts,
            known
                .iter()
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

fn facts(known: &Known, pods: &[&Pod], checks: BTreeMap<PodUid, Arc<Checks>>, zero: Option<u64>) -> Facts {
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
        checks,
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
        ready: slices::is_ready(pod),
        ports: named_ports(pod),
    }
}

fn named_ports(pod: &Pod) -> BTreeMap<String, u16> {
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
