//! The questions asked of the API server while a cluster comes up.

use anyhow::Context;
use k8s_openapi::api::core::v1::{Node, ServiceAccount};
use kube::api::{DeleteParams, PostParams};
use kube::{Api, Client};
use tokio::net::TcpStream;

use super::control_plane::PROXY_NODE;
use super::namespace::{CONTROL_PLANE_IP, KUBERNETES_SERVICE_IP};

pub(super) async fn is_ready(client: &Client) -> bool {
    match http::Request::get("/readyz").body(Vec::new()) {
        Ok(request) => client.request_text(request).await.is_ok(),
        Err(_) => false,
    }
}

pub(super) async fn has_default_service_account(client: &Client) -> bool {
    Api::<ServiceAccount>::namespaced(client.clone(), "default")
        .get("default")
        .await
        .is_ok()
}

pub(super) async fn cluster_ip_works() -> bool {
    TcpStream::connect((KUBERNETES_SERVICE_IP, 443)).await.is_ok()
}

pub(super) async fn scheduler_is_healthy() -> bool {
    TcpStream::connect(("127.0.0.1", 10259)).await.is_ok()
}

/// The Node that kube-proxy reads its address from while it starts; no pod is ever put there.
pub(super) async fn create_proxy_node(client: &Client) -> anyhow::Result<()> {
    let node: Node = serde_json::from_value(serde_json::json!({
        "metadata": {"name": PROXY_NODE},
        "spec": {"unschedulable": true},
        "status": {"addresses": [{"type": "InternalIP", "address": CONTROL_PLANE_IP}]},
    }))?;
    Api::all(client.clone())
        .create(&PostParams::default(), &node)
        .await
        .context("making the Node that kube-proxy looks for")?;
    Ok(())
}

pub(super) async fn delete_proxy_node(client: &Client) -> anyhow::Result<()> {
    Api::<Node>::all(client.clone())
        .delete(PROXY_NODE, &DeleteParams::default())
        .await
        .context("deleting the Node that kube-proxy looked for")?;
    Ok(())
}
