//! Wakes a workload: one conditional write of its scale, from 0 up, however many requests wait at however many gates.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};

use super::hold::Door;
use super::metrics::{Outcome, WakeResult};
use super::problem::Problem;
use super::state::Gate;
use crate::api::workload::{WorkloadKind, WorkloadRef};

const FIRST_BACKOFF: Duration = Duration::from_millis(10);
const MAX_BACKOFF: Duration = Duration::from_secs(1);
/// The API server has answered, yet the watch still shows 0: look again.
const WATCH_LAG: Duration = Duration::from_secs(2);
/// One call of the API server.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// A workload's scale.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scale {
    /// `spec.replicas`.
    pub replicas: u32,
    /// The version it was read at.
    pub version: String,
}

/// Why the scale could not be read or written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScaleError {
    /// The workload has changed since that version.
    #[error("the workload has changed")]
    Conflict,
    /// It will not work by trying again.
    #[error("{0}")]
    Refused(String),
    /// It may work later.
    #[error("{0}")]
    Later(String),
}

/// Reads and raises scales.
pub trait Scaler: Send + Sync {
    /// The scale now.
    fn read<'a>(&'a self, workload: &'a WorkloadRef) -> BoxFuture<'a, Result<Scale, ScaleError>>;
    /// Sets the scale to `replicas`, if the workload's version is still `version`.
    fn raise<'a>(
        &'a self,
        workload: &'a WorkloadRef,
        version: &'a str,
        replicas: u32,
    ) -> BoxFuture<'a, Result<Scale, ScaleError>>;
}

/// The scale subresource of the API server.
pub struct KubeScaler(pub Client);

type KubeScale = k8s_openapi::api::autoscaling::v1::Scale;

impl KubeScaler {
    async fn call(
        &self,
        workload: &WorkloadRef,
        patch: Option<serde_json::Value>,
    ) -> Result<Scale, ScaleError> {
        let WorkloadRef { namespace, name, .. } = workload;
        let client = self.0.clone();
        let answer = async {
            match workload.kind {
                WorkloadKind::Deployment => {
                    scale(&Api::<Deployment>::namespaced(client, namespace), name, patch).await
                }
                WorkloadKind::StatefulSet => {
                    scale(&Api::<StatefulSet>::namespaced(client, namespace), name, patch).await
                }
            }
        };
        let scale = tokio::time::timeout(CALL_TIMEOUT, answer)
            .await
            .map_err(|_| ScaleError::Later("the API server did not answer in time".to_owned()))?
            .map_err(classify)?;
        Ok(Scale {
            // The API server leaves a zero out.
            replicas: scale
                .spec
                .and_then(|spec| spec.replicas)
                .and_then(|replicas| u32::try_from(replicas).ok())
                .unwrap_or(0),
            version: scale.metadata.resource_version.unwrap_or_default(),
        })
    }
}

async fn scale<K>(api: &Api<K>, name: &str, patch: Option<serde_json::Value>) -> kube::Result<KubeScale>
where
    K: Clone + serde::de::DeserializeOwned,
{
    match patch {
        None => api.get_scale(name).await,
        Some(patch) => {
            let params = PatchParams::default();
            api.patch_scale(name, &params, &Patch::Merge(patch)).await
        }
    }
}

fn classify(error: kube::Error) -> ScaleError {
    match error {
        kube::Error::Api(status) => match status.code {
            409 => ScaleError::Conflict,
            // Refused by RBAC, gone, not valid: the same answer every time.
            400 | 401 | 403 | 404 | 405 | 422 => {
                ScaleError::Refused(format!("the API server refuses the wake: {}", status.message))
            }
            _ => ScaleError::Later(status.message),
        },
        other => ScaleError::Later(other.to_string()),
    }
}

impl Scaler for KubeScaler {
    fn read<'a>(&'a self, workload: &'a WorkloadRef) -> BoxFuture<'a, Result<Scale, ScaleError>> {
        Box::pin(self.call(workload, None))
    }

    fn raise<'a>(
        &'a self,
        workload: &'a WorkloadRef,
        version: &'a str,
        replicas: u32,
    ) -> BoxFuture<'a, Result<Scale, ScaleError>> {
        let patch = serde_json::json!({
            "metadata": {"resourceVersion": version},
            "spec": {"replicas": replicas},
        });
        Box::pin(self.call(workload, Some(patch)))
    }
}

/// Runs while requests wait for a workload at 0, and ends when it is seen awake or nobody waits any more.
pub(super) async fn run(gate: Arc<Gate>, door: Arc<Door>) {
    let mut backoff = FIRST_BACKOFF;
    // The first try relies on the watch; after that the scale is read anew.
    let mut fresh = gate.zero_at(&door.workload);
    while door.wants_wake() {
        match attempt(&gate, &door, fresh.take()).await {
            Ok(result) => {
                gate.metrics.wake(result);
                if door.seen_awake_within(WATCH_LAG).await {
                    return;
                }
                tracing::warn!(workload = %door.workload, "asked for a wake, but the watch still shows 0; looking again");
                door.wake_lost();
            }
            Err(ScaleError::Conflict) => {
                // Somebody wrote the workload meanwhile, its status perhaps: read it again, it may still be at 0.
                gate.metrics.wake(WakeResult::Conflict);
                tokio::time::sleep(backoff).await;
                backoff = (backoff * 2).min(MAX_BACKOFF / 10);
            }
            Err(ScaleError::Refused(reason)) => {
                gate.metrics.wake(WakeResult::Refused);
                tracing::error!(workload = %door.workload, reason, "cannot wake");
                door.dismiss(&Problem::new(Outcome::WakeFailed, reason));
                return;
            }
            Err(ScaleError::Later(reason)) => {
                gate.metrics.wake(WakeResult::Retried);
                tracing::warn!(workload = %door.workload, reason, "cannot wake yet; trying again");
                tokio::time::sleep(backoff).await;
                backoff = (backoff * 2).min(MAX_BACKOFF);
            }
        }
    }
}

/// `version`: the version at which the watch shows 0, if it is to be relied on.
async fn attempt(gate: &Gate, door: &Door, version: Option<String>) -> Result<WakeResult, ScaleError> {
    let version = match version {
        Some(version) => version,
        None => {
            let scale = gate.scaler.read(&door.workload).await?;
            if scale.replicas > 0 {
                door.wake_asked();
                return Ok(WakeResult::AlreadyAwake);
            }
            scale.version
        }
    };
    let to = gate.wake_to(&door.workload);
    gate.scaler.raise(&door.workload, &version, to).await?;
    door.wake_asked();
    tracing::info!(
        workload = %door.workload,
        replicas = to,
        reason = format!("{} waiting while at 0 replicas", door.queued()),
        "woke"
    );
    Ok(WakeResult::Raised)
}
