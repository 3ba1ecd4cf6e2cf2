//! Writing a pod's status, and its deletion, to the API server.

use super::pod::PodContext;
use super::status;
use k8s_openapi::api::core::v1::{Pod, PodCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// The pause after a write that failed, doubled up to [`LONGEST`].
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(5);

/// Writes the status whenever the view changes, until `finish`; what is true then is written last.
pub async fn run(cx: Arc<PodContext>, finish: CancellationToken) {
    let mut view = cx.view.subscribe();
    let mut known = cx.known.clone();
    let mut writer = Writer::new(&cx);
    let mut pause = PAUSE;
    loop {
        let finishing = finish.is_cancelled();
        view.mark_unchanged();
        match writer.sync(&cx).await {
            Ok(Sync::Gone) => return,
            Ok(Sync::Done) => {
                pause = PAUSE;
                if finishing {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(pod = cx.name, namespace = cx.namespace, %error, "writing the pod's status");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST);
                continue;
            }
        }
        tokio::select! {
            _ = view.changed() => {}
            // Conditions of others (readiness gates) take part in Ready.
            changed = known.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            () = finish.cancelled() => {}
        }
    }
}

/// Writes the status once, trying a few times.
pub async fn once(cx: &Arc<PodContext>) {
    let finish = CancellationToken::new();
    finish.cancel();
    let _ = tokio::time::timeout(Duration::from_secs(30), run(Arc::clone(cx), finish)).await;
}

enum Sync {
    Done,
    Gone,
}

struct Writer {
    api: Api<Pod>,
    conditions: Vec<PodCondition>,
    written: Value,
}

impl Writer {
    fn new(cx: &PodContext) -> Self {
        let before = cx
            .latest()
            .status
            .as_ref()
            .and_then(|status| status.conditions.clone());
        Self {
            api: Api::namespaced(cx.runtime.client.clone(), &cx.namespace),
            conditions: before.unwrap_or_default(),
            written: Value::Null,
        }
    }

    async fn sync(&mut self, cx: &PodContext) -> kube::Result<Sync> {
        if cx.known.borrow().gone {
            return Ok(Sync::Gone);
        }
        let view = cx.view.borrow().clone();
        let (status, conditions) =
            status::patch(&cx.latest(), &view, &self.conditions, &Time(Timestamp::now()));
        if status == self.written {
            return Ok(Sync::Done);
        }
        // The UID keeps this from reaching a new pod of the same name.
        let patch = json!({"metadata": {"uid": cx.uid}, "status": status});
        match self
            .api
            .patch_status(&cx.name, &PatchParams::default(), &Patch::Strategic(&patch))
            .await
        {
            Ok(_) => {
                self.written = status;
                self.conditions = conditions;
                Ok(Sync::Done)
            }
            Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => Ok(Sync::Gone),
            Err(error) => Err(error),
        }
    }
}

/// Removes a pod's object once nothing of it runs any more.
pub async fn delete(client: &Client, pod: &Pod) {
    let api: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
    let now = DeleteParams {
        grace_period_seconds: Some(0),
        preconditions: Some(Preconditions {
            uid: pod.uid(),
            resource_version: None,
        }),
        ..DeleteParams::default()
    };
    let mut pause = PAUSE;
    loop {
        match api.delete(&pod.name_any(), &now).await {
            Ok(_) => return,
            Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => return,
            Err(error) => tracing::warn!(pod = pod.name_any(), %error, "deleting the pod"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST);
    }
}
