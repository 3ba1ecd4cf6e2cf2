//! Whether the cluster has NVIDIA's RuntimeClass. Known beforehand, so that no pod's creation waits for it.

use std::time::Duration;

use anyhow::Context;
use k8s_openapi::api::node::v1::RuntimeClass;
use kube::{Api, Client};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::api::names;

/// How often it is looked for again. It is installed once, and hardly ever goes.
const AGAIN: Duration = Duration::from_secs(10);

/// Follows it until `shutdown`.
///
/// # Errors
/// When it cannot be looked for at all: the webhook must not guess.
pub async fn follow(client: Client, shutdown: CancellationToken) -> anyhow::Result<watch::Receiver<bool>> {
    let api: Api<RuntimeClass> = Api::all(client);
    let found = api
        .get_opt(names::RUNTIME_CLASS)
        .await
        .context("cannot read RuntimeClass nvidia: check the controller's ClusterRole")?;
    let (sender, receiver) = watch::channel(found.is_some());
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = tokio::time::sleep(AGAIN) => {}
                () = shutdown.cancelled() => return,
            }
            match api.get_opt(names::RUNTIME_CLASS).await {
                Ok(found) => {
                    sender.send_if_modified(|known| {
                        std::mem::replace(known, found.is_some()) != found.is_some()
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot read RuntimeClass nvidia; staying with what was seen")
                }
            }
        }
    });
    Ok(receiver)
}
