//! Deployments and StatefulSets as one: what Ebb needs to know of a workload, whichever kind it is.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec, Service};
use kube::ResourceExt;

use crate::api::annotations;
use crate::api::settings::{SettingError, Settings};
use crate::api::units::Replicas;
use crate::api::workload::{WorkloadKind, WorkloadRef};
use crate::plan::gating::{Labels, ServiceFacts};

/// Label with the hash of the pod template, on every pod of a ReplicaSet.
const TEMPLATE_HASH: &str = "pod-template-hash";

/// The workload that a pod belongs to, by its owner. A Deployment's pods are owned by a ReplicaSet whose name is the
/// Deployment's and the pod's template hash.
#[must_use]
pub fn workload_of(pod: &Pod) -> Option<WorkloadRef> {
    let owner = pod
        .owner_references()
        .iter()
        .find(|owner| owner.controller == Some(true))?;
    let hash = pod.labels().get(TEMPLATE_HASH).map(String::as_str);
    owned_by(&pod.namespace()?, &owner.kind, &owner.name, hash)
}

/// The same by what a pod says of the owner that controls it: kind, name, and the template hash among its own labels.
#[must_use]
pub fn owned_by(namespace: &str, kind: &str, name: &str, template_hash: Option<&str>) -> Option<WorkloadRef> {
    let (kind, name) = match kind {
        "StatefulSet" => (WorkloadKind::StatefulSet, name),
        "ReplicaSet" => {
            let deployment = name.strip_suffix(template_hash?)?.strip_suffix('-')?;
            (WorkloadKind::Deployment, deployment)
        }
        _ => return None,
    };
    Some(WorkloadRef {
        kind,
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    })
}

/// A workload as the cluster has it now.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Kind, namespace, name.
    pub reference: WorkloadRef,
    /// Its UID, for Events.
    pub uid: String,
    /// The version these facts were read at, for conditional writes.
    pub resource_version: String,
    /// `spec.replicas`; absent means 1, as Kubernetes says.
    pub replicas: Replicas,
    /// `status.readyReplicas`.
    pub ready_replicas: Replicas,
    /// Whether the controller has rolled the newest template out everywhere.
    pub rollout_complete: bool,
    /// When it was created, milliseconds since the epoch.
    pub created_ms: i64,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// Its pod template.
    pub template: PodTemplateSpec,
    /// What it runs by; `None` when not managed.
    pub settings: Result<Option<Settings>, SettingError>,
}

impl Workload {
    /// Labels that its pods carry.
    #[must_use]
    pub fn template_labels(&self) -> Labels {
        self.template
            .metadata
            .as_ref()
            .and_then(|m| m.labels.clone())
            .unwrap_or_default()
    }

    /// Its settings, if it is managed and they can be read.
    #[must_use]
    pub fn managed(&self) -> Option<&Settings> {
        self.settings.as_ref().ok().and_then(Option::as_ref)
    }
}

/// An object that is a workload.
pub trait IntoWorkload {
    /// Its facts. Missing parts of a half-made object become empty or zero, as Kubernetes defaults them.
    fn workload(&self) -> Workload;
}

fn replicas(count: Option<i32>) -> Replicas {
    Replicas(count.unwrap_or(0).try_into().unwrap_or(0))
}

fn created_ms(time: Option<k8s_openapi::apimachinery::pkg::apis::meta::v1::Time>) -> i64 {
    time.map_or(0, |time| time.0.as_millisecond())
}

/// What both kinds say in the same fields. `desired` and `ready` are replicas.
fn workload(
    kind: WorkloadKind,
    object: &impl ResourceExt,
    template: PodTemplateSpec,
    desired: i32,
    ready: Option<i32>,
    rollout_complete: bool,
) -> Workload {
    Workload {
        reference: WorkloadRef {
            kind,
            namespace: object.namespace().unwrap_or_default(),
            name: object.name_any(),
        },
        uid: object.uid().unwrap_or_default(),
        resource_version: object.resource_version().unwrap_or_default(),
        replicas: replicas(Some(desired)),
        ready_replicas: replicas(ready),
        rollout_complete,
        created_ms: created_ms(object.creation_timestamp()),
        annotations: object.annotations().clone(),
        settings: Settings::read(object.annotations()),
        template,
    }
}

impl IntoWorkload for Deployment {
    fn workload(&self) -> Workload {
        let spec = self.spec.clone().unwrap_or_default();
        let status = self.status.clone().unwrap_or_default();
        let desired = spec.replicas.unwrap_or(1);
        let updated = status.updated_replicas.unwrap_or(0);
        let rollout_complete = status.observed_generation >= self.metadata.generation
            && updated >= desired
            && status.replicas.unwrap_or(0) <= updated;
        let (kind, ready) = (WorkloadKind::Deployment, status.ready_replicas);
        workload(kind, self, spec.template, desired, ready, rollout_complete)
    }
}

impl IntoWorkload for StatefulSet {
    fn workload(&self) -> Workload {
        let spec = self.spec.clone().unwrap_or_default();
        let status = self.status.clone().unwrap_or_default();
        let desired = spec.replicas.unwrap_or(1);
        let rollout_complete = status.observed_generation >= self.metadata.generation
            && status.current_revision == status.update_revision;
        let (kind, ready) = (WorkloadKind::StatefulSet, status.ready_replicas);
        workload(kind, self, spec.template, desired, ready, rollout_complete)
    }
}

/// What `plan::gating` needs of a Service.
#[must_use]
pub fn service_facts(service: &Service) -> ServiceFacts<'_> {
    let spec = service.spec.as_ref();
    ServiceFacts {
        headless: spec.is_some_and(|s| s.cluster_ip.as_deref() == Some("None")),
        external_name: spec.is_some_and(|s| s.type_.as_deref() == Some("ExternalName")),
        only_tcp: spec.and_then(|s| s.ports.as_ref()).is_none_or(|ports| {
            ports
                .iter()
                .all(|port| port.protocol.as_deref().is_none_or(|p| p == "TCP"))
        }),
        selector: spec.and_then(|s| s.selector.as_ref()),
        mode: service.annotations().get(annotations::MODE).map(String::as_str),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn a_pod_leads_to_its_deployment() {
        let pod: Pod = serde_json::from_value(json!({"metadata": {
            "name": "llama-7b-6d5f-x2", "namespace": "models",
            "labels": {"pod-template-hash": "6d5f"},
            "ownerReferences": [
                {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "llama-7b-6d5f", "uid": "u", "controller": true}
            ],
        }}))
        .unwrap();
        let workload = workload_of(&pod).unwrap();
        assert_eq!(
            (workload.kind, workload.name.as_str()),
            (WorkloadKind::Deployment, "llama-7b")
        );
    }
}
