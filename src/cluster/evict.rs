//! Evicting a pod: asked of the API server, which holds it against PodDisruptionBudgets.
//!
//! Built by hand: kube's own helper sends the options under a name that the API server does not know, and so without
//! the precondition that it be this pod and not the next of its name.

use kube::Client;
use serde_json::{Value, json};

use super::call::{CallError, limited};

/// Why a pod was not evicted.
#[derive(Debug, thiserror::Error)]
pub enum EvictError {
    /// A PodDisruptionBudget does not allow it now: try again later.
    #[error("its PodDisruptionBudget does not allow it now: {0}")]
    Budget(String),
    /// It is gone, or another pod has its name.
    #[error("the pod is gone")]
    Gone,
    /// The API server refused, as it does for a pod with two PodDisruptionBudgets.
    #[error("the API server refused: {0}")]
    Refused(String),
    /// The call failed.
    #[error(transparent)]
    Call(CallError),
}

/// Evicts the pod with this UID.
///
/// # Errors
/// Why it stays.
pub async fn evict(client: &Client, namespace: &str, name: &str, uid: &str) -> Result<(), EvictError> {
    let body = json!({
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": name, "namespace": namespace},
        "deleteOptions": {"preconditions": {"uid": uid}},
    });
    let request = http::Request::post(format!("/api/v1/namespaces/{namespace}/pods/{name}/eviction"))
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(body.to_string().into_bytes())
        .map_err(|error| EvictError::Call(CallError::Api(kube::Error::HttpError(error))))?;
    match limited(client.request::<Value>(request)).await {
        // A refusal can come in the body of a success.
        Ok(status) if status["status"] == "Failure" => Err(EvictError::Refused(
            status["message"].as_str().unwrap_or_default().to_owned(),
        )),
        Ok(_) => Ok(()),
        Err(CallError::Gone | CallError::Conflict) => Err(EvictError::Gone),
        Err(CallError::Api(kube::Error::Api(status))) if status.code == 429 => {
            Err(EvictError::Budget(status.message.clone()))
        }
        Err(CallError::Api(kube::Error::Api(status))) => Err(EvictError::Refused(status.message.clone())),
        Err(error) => Err(EvictError::Call(error)),
    }
}
