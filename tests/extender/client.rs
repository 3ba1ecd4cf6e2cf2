//! Asks an extender as kube-scheduler does: JSON over mutual TLS, with the scheduler's own certificate.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use ebb::serve::forward::Forwarder;
use ebb::serve::pki::Identity;
use ebb::serve::tls::{self, ClientTls};
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};
use serde_json::Value;

/// Longest wait for an answer.
const LIMIT: Duration = Duration::from_secs(60);

pub async fn ask(client: &Client, extender: SocketAddr, verb: &str, body: &Value) -> anyhow::Result<Value> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), "ebb-system");
    let data = secrets
        .get("ebb-scheduler-client")
        .await?
        .data
        .unwrap_or_default();
    let part = |key: &str| -> anyhow::Result<String> {
        let bytes = data.get(key).with_context(|| format!("no {key} in the Secret"))?;
        Ok(String::from_utf8(bytes.0.clone())?)
    };
    let identity = Identity {
        certificate: part("tls.crt")?,
        key: part("tls.key")?,
    };
    let config = tls::client_config(&part("ca.crt")?, Some(&identity))?;
    let name = "ebb-controller.ebb-system.svc".to_owned();
    let dialler = Forwarder::new(ClientTls::new(config), name, LIMIT, 1 << 20);
    let (head, ()) = http::Request::post(format!("/scheduler/{verb}"))
        .header("content-type", "application/json")
        .body(())?
        .into_parts();
    let answer = dialler
        .forward(extender, head, serde_json::to_vec(body)?.into())
        .await?;
    ensure!(answer.status().is_success(), "{answer:?}");
    Ok(serde_json::from_slice(answer.body())?)
}
