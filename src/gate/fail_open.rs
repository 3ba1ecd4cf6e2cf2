//! A gate that stops takes itself out of the EndpointSlices that point at it. The last one leaves the workload's
//! pods there in its place, so that an awake model stays reachable without any gate.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointPort, EndpointSlice};
use kube::api::PostParams;
use kube::{Api, Client, ResourceExt};

use crate::api::names;
use crate::cluster::slices;
use crate::cluster::view::Kind;
use crate::plan::endpoints;

/// Slices written at the same time.
const AT_ONCE: usize = 16;
const ATTEMPTS: u32 = 20;
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(20);
/// One call of the API server.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);

/// What is needed of the view.
#[derive(Clone)]
pub struct Sight {
    /// Slices that Ebb wrote.
    pub slices: Kind<EndpointSlice>,
    /// All Services.
    pub services: Kind<Service>,
    /// All pods.
    pub pods: Kind<Pod>,
}

/// Takes `ip` out of every slice.
pub async fn leave(client: &Client, sight: &Sight, ip: IpAddr) {
    let own: Vec<Arc<EndpointSlice>> = sight
        .slices
        .all()
        .into_iter()
        .filter(|slice| lists(slice, ip))
        .collect();
    futures::stream::iter(own)
        .for_each_concurrent(AT_ONCE, |slice| async move {
            if let Err(error) = leave_one(client, sight, &slice, ip).await {
                tracing::warn!(
                    slice = slice.name_any(),
                    namespace = slice.namespace(),
                    %error,
                    "cannot take this gate out of the slice; the controller does it when the pod is gone"
                );
            }
        })
        .await;
}

async fn leave_one(client: &Client, sight: &Sight, slice: &EndpointSlice, ip: IpAddr) -> anyhow::Result<()> {
    let namespace = slice.namespace().unwrap_or_default();
    let api: Api<EndpointSlice> = Api::namespaced(client.clone(), &namespace);
    let mut current = slice.clone();
    for _ in 0..ATTEMPTS {
        if !lists(&current, ip) {
            return Ok(());
        }
        let name = current.name_any();
        let next = without(current, ip, |slice| pods_instead(sight, &namespace, slice));
        let written =
            tokio::time::timeout(CALL_TIMEOUT, api.replace(&name, &PostParams::default(), &next)).await?;
        match written {
            Ok(_) => return Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => return Ok(()),
            Err(kube::Error::Api(status)) if status.code == 409 => {
                tokio::time::sleep(BETWEEN_ATTEMPTS).await;
                match tokio::time::timeout(CALL_TIMEOUT, api.get_opt(&name)).await?? {
                    Some(newer) => current = newer,
                    None => return Ok(()),
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    anyhow::bail!("it was changed under every attempt")
}

fn lists(slice: &EndpointSlice, ip: IpAddr) -> bool {
    slice.endpoints.iter().any(|endpoint| has(endpoint, ip))
}

fn has(endpoint: &Endpoint, ip: IpAddr) -> bool {
    endpoint.addresses.iter().any(|address| address.parse() == Ok(ip))
}

/// Ports and endpoints of a slice.
type Shape = (Option<Vec<EndpointPort>>, Vec<Endpoint>);

/// The slice without this gate; where no gate is left, with `instead`, if there is anything to put there.
fn without(
    mut slice: EndpointSlice,
    ip: IpAddr,
    instead: impl FnOnce(&EndpointSlice) -> Option<Shape>,
) -> EndpointSlice {
    slice.endpoints.retain(|endpoint| !has(endpoint, ip));
    let serves = |endpoint: &Endpoint| endpoint.conditions.as_ref().and_then(|c| c.ready) != Some(false);
    if !slice.endpoints.iter().any(serves)
        && let Some((ports, pods)) = instead(&slice)
    {
        slice.ports = ports;
        slice.endpoints = pods;
    }
    slice
}

fn pods_instead(sight: &Sight, namespace: &str, slice: &EndpointSlice) -> Option<Shape> {
    let name = slice.labels().get("kubernetes.io/service-name")?;
    let service = sight.services.get(namespace, name)?;
    let pods = sight.pods.all();
    let here = pods
        .iter()
        .map(Arc::as_ref)
        .filter(|pod| pod.namespace().as_deref() == Some(namespace));
    let (ports, endpoints) = shape_of(&service, here)?;
    tracing::info!(
        service = name,
        namespace,
        pods = endpoints.len(),
        reason = "the last gate stops",
        "the Service is pointed at the pods themselves"
    );
    Some((ports, endpoints))
}

/// What the controller's slice of this Service would hold without any gate. `None`: no pod is ready.
fn shape_of<'a>(service: &Service, pods: impl Iterator<Item = &'a Pod>) -> Option<Shape> {
    let selector = service.spec.as_ref()?.selector.as_ref()?;
    let ready: Vec<endpoints::Pod> = pods
        .filter(|pod| {
            selector
                .iter()
                .all(|(key, value)| key == names::GATED_KEY || pod.labels().get(key) == Some(value))
        })
        .filter_map(|pod| slices::ready_pod(service, pod))
        .collect();
    let slice = slices::slice(service, &endpoints::pods(&ready)?, &BTreeMap::new());
    Some((slice.ports, slice.endpoints))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn slice(addresses: &[&str]) -> EndpointSlice {
        let endpoints: Vec<_> = addresses
            .iter()
            .map(|address| json!({"addresses": [address], "conditions": {"ready": true}}))
            .collect();
        serde_json::from_value(json!({
            "metadata": {"name": "m-ebb", "resourceVersion": "7", "labels": {"kubernetes.io/service-name": "m"}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 20001, "protocol": "TCP"}],
            "endpoints": endpoints,
        }))
        .unwrap()
    }

    fn addresses(slice: &EndpointSlice) -> Vec<&str> {
        slice
            .endpoints
            .iter()
            .flat_map(|endpoint| &endpoint.addresses)
            .map(String::as_str)
            .collect()
    }

    fn service() -> Service {
        serde_json::from_value(json!({
            "metadata": {"name": "m", "namespace": "models"},
            "spec": {
                "selector": {"app": "m", "ebb.dev/gated": "true"},
                "ports": [{"name": "http", "port": 80, "targetPort": "web", "protocol": "TCP"}],
            },
        }))
        .unwrap()
    }

    fn pod(ip: &str, ready: bool) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": format!("m-{ip}"), "namespace": "models", "labels": {"app": "m"}},
            "spec": {"nodeName": "n1", "containers": [
                {"name": "m", "ports": [{"name": "web", "containerPort": 8000}]}]},
            "status": {"podIP": ip, "conditions": [
                {"type": "Ready", "status": if ready { "True" } else { "False" }}]},
        }))
        .unwrap()
    }

    #[test]
    fn others_stay_and_the_version_with_them() {
        let left = without(
            slice(&["10.0.0.1", "10.0.0.2"]),
            "10.0.0.1".parse().unwrap(),
            |_| panic!("a gate is left"),
        );
        assert_eq!(addresses(&left), ["10.0.0.2"]);
        assert_eq!(left.metadata.resource_version.as_deref(), Some("7"));
        assert_eq!(left.ports.unwrap()[0].port, Some(20001));
    }

    #[test]
    fn the_last_one_leaves_the_ready_pods_there() {
        let pods = [pod("10.0.1.1", true), pod("10.0.1.2", false)];
        let left = without(slice(&["10.0.0.1"]), "10.0.0.1".parse().unwrap(), |_| {
            shape_of(&service(), pods.iter())
        });
        assert_eq!(addresses(&left), ["10.0.1.1"]);
        let port = &left.ports.unwrap()[0];
        assert_eq!((port.name.as_deref(), port.port), (Some("http"), Some(8000)));
    }

    #[test]
    fn asleep_the_last_one_leaves_nothing() {
        let left = without(slice(&["10.0.0.1"]), "10.0.0.1".parse().unwrap(), |_| {
            shape_of(&service(), std::iter::empty())
        });
        assert!(addresses(&left).is_empty());
    }
}
