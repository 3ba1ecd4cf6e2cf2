//! Writes to the scale subresource pass no webhook, and whoever lifts a workload from 0 is then named as the owner of its
//! `replicas`: a person's next unforced server-side apply of another count would be a 409. So the leader sends an empty
//! patch to every managed workload whose `replicas` somebody owns; that one passes the webhook, which takes the
//! ownership out.

use std::fmt::Debug;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use kube::api::{PartialObjectMeta, Patch, PatchParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::api::{annotations, names};
use crate::plan::admission::ownership::is_owned;
use crate::serve::lease::Leadership;

/// How long one patch may take.
const LIMIT: Duration = Duration::from_secs(5);

/// Cleans up while this process leads, until `shutdown`.
pub async fn keep(client: Client, leadership: Leadership, shutdown: CancellationToken) {
    tokio::select! {
        ((), ()) = async {
            tokio::join!(
                follow::<Deployment>(&client, &leadership),
                follow::<StatefulSet>(&client, &leadership),
            )
        } => {}
        () = shutdown.cancelled() => {}
    }
}

/// Metadata only, and nothing is kept: this sees every write to every workload of the cluster.
async fn follow<K>(client: &Client, leadership: &Leadership)
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + Debug
        + DeserializeOwned
        + Send
        + 'static,
{
    // Leadership that comes later starts over, with the whole list: nobody may have cleaned up in between.
    let mut state = leadership.state();
    loop {
        if leadership.term_now().is_none() {
            if state.changed().await.is_err() {
                return;
            }
            continue;
        }
        let mut events = std::pin::pin!(
            watcher(
                Api::<PartialObjectMeta<K>>::all(client.clone()),
                watcher::Config::default()
            )
            .default_backoff()
            .applied_objects()
        );
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                changed = state.changed() => match changed {
                    Ok(()) => break,
                    Err(_) => return,
                },
            };
            match event {
                Some(Ok(object)) => disown::<K>(client, &object).await,
                Some(Err(error)) => tracing::warn!(%error, "watch of owners broke; it is started again"),
                None => break,
            }
        }
    }
}

async fn disown<K>(client: &Client, object: &PartialObjectMeta<K>)
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + Debug
        + DeserializeOwned,
{
    let managed = object
        .annotations()
        .get(annotations::MANAGED)
        .is_some_and(|m| m == "true");
    let Ok(metadata) = serde_json::to_value(&object.metadata) else {
        return;
    };
    if !managed || !is_owned(&json!({"metadata": metadata}), "replicas") {
        return;
    }
    let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
    let api: Api<K> = Api::namespaced(client.clone(), &namespace);
    let params = PatchParams {
        field_manager: Some(names::CONTROLLER.to_owned()),
        ..PatchParams::default()
    };
    let patch = Patch::Merge(json!({}));
    match tokio::time::timeout(LIMIT, api.patch_metadata(&name, &params, &patch)).await {
        Ok(Ok(_)) => tracing::debug!(namespace, name, "took the ownership of its replicas out"),
        Ok(Err(error)) => {
            tracing::warn!(namespace, name, %error, "cannot take the ownership of its replicas out")
        }
        Err(_) => tracing::warn!(
            namespace,
            name,
            "no answer in time while taking the ownership of its replicas out"
        ),
    }
}
