//! Writes of the scale subresource, each at the version that was read.

use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;

use super::call::{CallError, limited};
use crate::api::names;
use crate::api::units::Replicas;
use crate::api::workload::{WorkloadKind, WorkloadRef};

/// Sets the replicas if the workload still is at `resource_version`.
///
/// # Errors
/// [`CallError::Conflict`] when anything about it changed; then nothing was written.
pub async fn set(
    client: &Client,
    workload: &WorkloadRef,
    resource_version: &str,
    replicas: Replicas,
) -> Result<(), CallError> {
    let patch = Patch::Merge(json!({
        "metadata": {"resourceVersion": resource_version},
        "spec": {"replicas": replicas},
    }));
    let params = PatchParams {
        field_manager: Some(names::CONTROLLER.to_owned()),
        ..PatchParams::default()
    };
    let (namespace, name) = (&workload.namespace, &workload.name);
    match workload.kind {
        WorkloadKind::Deployment => {
            let api: Api<Deployment> = Api::namespaced(client.clone(), namespace);
            limited(api.patch_scale(name, &params, &patch)).await?;
        }
        WorkloadKind::StatefulSet => {
            let api: Api<StatefulSet> = Api::namespaced(client.clone(), namespace);
            limited(api.patch_scale(name, &params, &patch)).await?;
        }
    }
    Ok(())
}
