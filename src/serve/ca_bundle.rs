//! Tells the API server whom to trust: writes our CA into the webhook configurations, and again whenever somebody's
//! apply took it out.
//!
//! Every replica does it. The patch touches nothing but `caBundle`, and names the webhook it means, so a configuration
//! that was changed meanwhile refuses it (a JSON patch `test` on the name) and is read again.

use std::time::Duration;

use anyhow::Context;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration, WebhookClientConfig,
};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::api::names;

/// How often the configurations are looked at again. While the CA is missing, admission of GPU pods fails.
const AGAIN: Duration = Duration::from_secs(5);

/// Keeps both configurations at `ca` until `shutdown`.
pub async fn keep(client: Client, mut ca: watch::Receiver<String>, shutdown: CancellationToken) {
    let mut told = None;
    loop {
        let current = ca.borrow_and_update().clone();
        let problem = match inject(&client, &current).await {
            Ok(()) => None,
            Err(error) => Some(format!("{error:#}")),
        };
        // Said once, not every five seconds.
        if problem != told {
            if let Some(error) = &problem {
                tracing::warn!(error, "cannot put the CA into the webhook configurations");
            }
            told = problem;
        }
        tokio::select! {
            () = tokio::time::sleep(AGAIN) => {}
            changed = ca.changed() => if changed.is_err() {
                // The certificates are no longer kept; what is written stays.
                return;
            },
            () = shutdown.cancelled() => return,
        }
    }
}

/// Writes `ca` into both configurations where something else stands.
///
/// # Errors
/// When a configuration is missing, or cannot be read or written.
pub async fn inject(client: &Client, ca: &str) -> anyhow::Result<()> {
    let mutating: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
    let found = mutating
        .get(names::WEBHOOKS)
        .await
        .context("MutatingWebhookConfiguration ebb")?;
    let webhooks = found.webhooks.unwrap_or_default();
    let operations = patch(webhooks.iter().map(|w| (w.name.as_str(), &w.client_config)), ca);
    apply(&mutating, operations)
        .await
        .context("MutatingWebhookConfiguration ebb")?;

    let validating: Api<ValidatingWebhookConfiguration> = Api::all(client.clone());
    let found = validating
        .get(names::WEBHOOKS)
        .await
        .context("ValidatingWebhookConfiguration ebb")?;
    let webhooks = found.webhooks.unwrap_or_default();
    let operations = patch(webhooks.iter().map(|w| (w.name.as_str(), &w.client_config)), ca);
    apply(&validating, operations)
        .await
        .context("ValidatingWebhookConfiguration ebb")
}

fn patch<'a>(webhooks: impl Iterator<Item = (&'a str, &'a WebhookClientConfig)>, ca: &str) -> Vec<Value> {
    let bundle = ByteString(ca.as_bytes().to_vec());
    webhooks
        .enumerate()
        .filter(|(_, (_, config))| config.ca_bundle.as_ref() != Some(&bundle))
        .flat_map(|(index, (name, _))| {
            [
                json!({"op": "test", "path": format!("/webhooks/{index}/name"), "value": name}),
                json!({"op": "add", "path": format!("/webhooks/{index}/clientConfig/caBundle"), "value": bundle}),
            ]
        })
        .collect()
}

async fn apply<K>(api: &Api<K>, operations: Vec<Value>) -> anyhow::Result<()>
where
    K: Clone + serde::de::DeserializeOwned + std::fmt::Debug,
{
    if operations.is_empty() {
        return Ok(());
    }
    let patch: json_patch::Patch = serde_json::from_value(Value::Array(operations))?;
    let params = PatchParams {
        field_manager: Some(names::CONTROLLER.to_owned()),
        ..PatchParams::default()
    };
    api.patch(names::WEBHOOKS, &params, &Patch::Json::<()>(patch))
        .await?;
    tracing::info!("put the CA into a webhook configuration");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_patched() {
        let config = |ca: Option<&str>| WebhookClientConfig {
            ca_bundle: ca.map(|ca| ByteString(ca.as_bytes().to_vec())),
            ..WebhookClientConfig::default()
        };
        let (same, other, none) = (config(Some("ca")), config(Some("old")), config(None));
        let operations = patch([("a", &same), ("b", &other), ("c", &none)].into_iter(), "ca");
        let paths: Vec<_> = operations.iter().filter_map(|o| o["path"].as_str()).collect();
        assert_eq!(
            paths,
            [
                "/webhooks/1/name",
                "/webhooks/1/clientConfig/caBundle",
                "/webhooks/2/name",
                "/webhooks/2/clientConfig/caBundle"
            ]
        );
    }
}
