//! What several reconcilers read from the view in the same way.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;

use crate::api::workload::WorkloadRef;
use crate::cluster::slices;
use crate::cluster::view::View;
use crate::cluster::workloads::{IntoWorkload, Workload};
use crate::plan::gating::Labels;

/// Label by which gate pods are found.
const NAME_LABEL: &str = "app.kubernetes.io/name";

/// All workloads that Ebb manages, as the webhook and the gates understand it: with settings that can be read.
#[must_use]
pub fn managed(view: &View) -> Vec<Workload> {
    let deployments = view.deployments.all();
    let stateful_sets = view.stateful_sets.all();
    deployments
        .iter()
        .filter(|object| is_managed(object.as_ref()))
        .map(|object| object.workload())
        .chain(
            stateful_sets
                .iter()
                .filter(|object| is_managed(object.as_ref()))
                .map(|object| object.workload()),
        )
        .filter(|workload| workload.managed().is_some())
        .collect()
}

// Looked at before the whole object is read.
fn is_managed(object: &impl ResourceExt) -> bool {
    object.meta().deletion_timestamp.is_none()
        && object
            .annotations()
            .get(crate::api::annotations::MANAGED)
            .is_some_and(|value| value == "true")
}

/// Managed workloads with their pods' labels, by namespace.
pub type ByNamespace = BTreeMap<String, Vec<(WorkloadRef, Labels)>>;

/// Sorts workloads by namespace.
#[must_use]
pub fn by_namespace(workloads: &[Workload]) -> ByNamespace {
    let mut map = ByNamespace::new();
    for workload in workloads {
        map.entry(workload.reference.namespace.clone())
            .or_default()
            .push((workload.reference.clone(), workload.template_labels()));
    }
    map
}

/// Whether this is one of the gates' pods.
#[must_use]
pub fn is_gate(pod: &Pod, namespace: &str) -> bool {
    pod.metadata.namespace.as_deref() == Some(namespace)
        && pod
            .labels()
            .get(NAME_LABEL)
            .is_some_and(|name| name == crate::api::names::GATE)
}

/// Whether a gate's pod can carry requests as far as the cluster knows: it is Ready, or it is finishing what it has.
#[must_use]
pub fn may_carry_requests(pod: &Pod) -> bool {
    let running = pod
        .status
        .as_ref()
        .is_some_and(|status| status.phase.as_deref() == Some("Running"));
    running && (pod.metadata.deletion_timestamp.is_some() || slices::is_ready(pod))
}
