//! The writes that Services need, as values, and how each is carried out.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, ResourceExt};

use crate::api::names;
use crate::cluster::call::{CallError, limited};
use crate::controller::reconcile::Context;

/// One write, decided on.
pub enum Action {
    /// Key, annotation or both, at the version that was read.
    Patch {
        service: Arc<Service>,
        patch: serde_json::Value,
    },
    /// The slice is missing.
    Create {
        slice: Box<EndpointSlice>,
        reason: &'static str,
    },
    /// The slice says something else.
    Replace {
        slice: Box<EndpointSlice>,
        resource_version: Option<String>,
        reason: &'static str,
    },
    /// The slice is not wanted any more, or has to be made anew.
    Delete { slice: Arc<EndpointSlice> },
    /// The headless twin is missing.
    Twin { service: Box<Service> },
    /// The twin is not wanted any more.
    DeleteTwin { service: Arc<Service> },
}

/// Carries out one write.
///
/// # Errors
/// [`CallError::Conflict`] when the object changed since it was read, or another replica leads now.
pub async fn carry_out(context: &Context, action: Action) -> Result<(), CallError> {
    if !context.leads() {
        return Err(CallError::Conflict);
    }
    let client = context.client.clone();
    let params = PostParams {
        field_manager: Some(names::CONTROLLER.to_owned()),
        ..PostParams::default()
    };
    match action {
        Action::Patch { service, patch } => {
            let api: Api<Service> = Api::namespaced(client, &service.namespace().unwrap_or_default());
            let params = PatchParams {
                field_manager: Some(names::CONTROLLER.to_owned()),
                ..PatchParams::default()
            };
            limited(api.patch(&service.name_any(), &params, &Patch::Merge(&patch))).await?;
        }
        Action::Create { slice, reason } => {
            let namespace = slice.namespace().unwrap_or_default();
            let api: Api<EndpointSlice> = Api::namespaced(client, &namespace);
            limited(api.create(&params, &slice)).await?;
            log(&slice, reason);
        }
        Action::Replace {
            mut slice,
            resource_version,
            reason,
        } => {
            slice.metadata.resource_version = resource_version;
            let namespace = slice.namespace().unwrap_or_default();
            let api: Api<EndpointSlice> = Api::namespaced(client, &namespace);
            limited(api.replace(&slice.name_any(), &params, &slice)).await?;
            log(&slice, reason);
        }
        Action::Delete { slice } => {
            let api: Api<EndpointSlice> = Api::namespaced(client, &slice.namespace().unwrap_or_default());
            limited(api.delete(&slice.name_any(), &this_one(slice.as_ref()))).await?;
        }
        Action::Twin { service } => {
            let api: Api<Service> = Api::namespaced(client, &service.namespace().unwrap_or_default());
            limited(api.create(&params, &service)).await?;
        }
        Action::DeleteTwin { service } => {
            let api: Api<Service> = Api::namespaced(client, &service.namespace().unwrap_or_default());
            limited(api.delete(&service.name_any(), &this_one(service.as_ref()))).await?;
        }
    }
    Ok(())
}

fn this_one(object: &impl ResourceExt) -> DeleteParams {
    DeleteParams {
        preconditions: Some(Preconditions {
            uid: object.uid(),
            resource_version: None,
        }),
        ..DeleteParams::default()
    }
}

fn log(slice: &EndpointSlice, reason: &str) {
    let targets: Vec<&String> = slice
        .endpoints
        .iter()
        .flat_map(|endpoint| &endpoint.addresses)
        .take(10)
        .collect();
    tracing::info!(slice = key(slice), ?targets, reason, "wrote a slice");
}

/// `namespace/name`.
pub fn key(object: &impl ResourceExt) -> String {
    format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any())
}
