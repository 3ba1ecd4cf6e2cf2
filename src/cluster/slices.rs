//! The EndpointSlice that Ebb keeps beside a gated Service, and what is read from Services and pods for it.
//! [`slice`] and [`ready_pod`] are pure, so that a gate which stops as the last one can write the same slice.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{ObjectReference, Pod, Service, ServicePort};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::{Resource, ResourceExt};

use crate::api::{annotations, names};
use crate::plan::endpoints::{self, Targets};

/// Kubernetes takes no more endpoints in one slice.
const MAX_ENDPOINTS: usize = 1000;
const SERVICE_NAME: &str = "kubernetes.io/service-name";
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";

/// Name of the slice beside a Service.
#[must_use]
pub fn slice_name(service: &str) -> String {
    format!("{service}-ebb")
}

/// The Service's ports that can be gated, with their keys (name, or number where it has none).
#[must_use]
pub fn ports(service: &Service) -> Vec<(String, &ServicePort)> {
    service
        .spec
        .iter()
        .flat_map(|spec| spec.ports.iter().flatten())
        .filter(|port| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP"))
        .map(|port| (port_key(port), port))
        .collect()
}

fn port_key(port: &ServicePort) -> String {
    match port.name.as_deref() {
        None | Some("") => port.port.to_string(),
        Some(name) => name.to_owned(),
    }
}

/// The gate ports that stand on the Service; empty where there are none or they cannot be read.
#[must_use]
pub fn gate_ports(service: &Service) -> BTreeMap<String, u16> {
    service
        .annotations()
        .get(annotations::GATE_PORTS)
        .and_then(|text| serde_json::from_str(text).ok())
        .unwrap_or_default()
}

/// The address family that the slice has: the Service's first one.
#[must_use]
pub fn address_type(service: &Service) -> &'static str {
    let first = service
        .spec
        .as_ref()
        .and_then(|spec| spec.ip_families.as_ref()?.first());
    if first.is_some_and(|family| family == "IPv6") {
        "IPv6"
    } else {
        "IPv4"
    }
}

/// Whether an address can stand in a slice of that type.
#[must_use]
pub fn of_type(ip: IpAddr, address_type: &str) -> bool {
    ip.is_ipv6() == (address_type == "IPv6")
}

/// Whether the pod's `Ready` condition is true.
#[must_use]
pub fn is_ready(pod: &Pod) -> bool {
    pod.status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// The pod's addresses.
pub fn addresses(pod: &Pod) -> impl Iterator<Item = IpAddr> {
    let status = pod.status.as_ref();
    let all = status.into_iter().flat_map(|status| {
        let first = status.pod_ip.clone();
        let rest = status.pod_ips.iter().flatten().map(|ip| ip.ip.clone());
        first.into_iter().chain(rest)
    });
    all.filter_map(|ip| ip.parse().ok())
}

/// The pod as a target of the Service; `None` unless it serves.
#[must_use]
pub fn ready_pod(service: &Service, pod: &Pod) -> Option<endpoints::Pod> {
    if pod.metadata.deletion_timestamp.is_some() || !is_ready(pod) {
        return None;
    }
    let family = address_type(service);
    let ports = ports(service)
        .iter()
        .map(|(_, port)| target_port(port, pod))
        .collect();
    Some(endpoints::Pod {
        ip: addresses(pod).find(|ip| of_type(*ip, family))?,
        node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
        name: pod.name_any(),
        uid: pod.uid().unwrap_or_default(),
        ports,
    })
}

fn target_port(port: &ServicePort, pod: &Pod) -> Option<u16> {
    match &port.target_port {
        None => u16::try_from(port.port).ok(),
        Some(IntOrString::Int(number)) if *number == 0 => u16::try_from(port.port).ok(),
        Some(IntOrString::Int(number)) => u16::try_from(*number).ok(),
        Some(IntOrString::String(name)) => pod
            .spec
            .iter()
            .flat_map(|spec| &spec.containers)
            .flat_map(|container| container.ports.iter().flatten())
            .find(|port| {
                port.name.as_deref() == Some(name) && port.protocol.as_deref().unwrap_or("TCP") == "TCP"
            })
            .and_then(|port| u16::try_from(port.container_port).ok()),
    }
}

/// The Service as an owner: what it owns goes with it.
#[must_use]
pub fn owner(service: &Service) -> OwnerReference {
    OwnerReference {
        api_version: Service::api_version(&()).into_owned(),
        kind: Service::kind(&()).into_owned(),
        name: service.name_any(),
        uid: service.uid().unwrap_or_default(),
        ..OwnerReference::default()
    }
}

/// The slice beside `service` that points at `targets`; gates are reached on `gate_ports`.
#[must_use]
pub fn slice(service: &Service, targets: &Targets, gate_ports: &BTreeMap<String, u16>) -> EndpointSlice {
    let name = service.name_any();
    let ports = ports(service);
    let (mut endpoints, numbers): (Vec<Endpoint>, Vec<Option<u16>>) = match targets {
        Targets::Gates(gates) => (
            gates
                .iter()
                .map(|gate| endpoint(gate.ip, gate.node.clone(), None))
                .collect(),
            ports
                .iter()
                .map(|(key, _)| gate_ports.get(key).copied())
                .collect(),
        ),
        Targets::Pods { pods, ports } => (
            pods.iter()
                .map(|pod| {
                    let target = ObjectReference {
                        kind: Some("Pod".to_owned()),
                        namespace: service.namespace(),
                        name: Some(pod.name.clone()),
                        uid: Some(pod.uid.clone()),
                        ..ObjectReference::default()
                    };
                    endpoint(pod.ip, pod.node.clone(), Some(target))
                })
                .collect(),
            ports.iter().copied().map(Some).collect(),
        ),
        Targets::Nobody => (
            Vec::new(),
            ports
                .iter()
                .map(|(key, _)| gate_ports.get(key).copied())
                .collect(),
        ),
    };
    endpoints.truncate(MAX_ENDPOINTS);
    EndpointSlice {
        metadata: ObjectMeta {
            name: Some(slice_name(&name)),
            namespace: service.namespace(),
            labels: Some(BTreeMap::from([
                (SERVICE_NAME.to_owned(), name),
                (MANAGED_BY.to_owned(), names::MANAGED_BY.to_owned()),
            ])),
            owner_references: Some(vec![owner(service)]),
            ..ObjectMeta::default()
        },
        address_type: address_type(service).to_owned(),
        endpoints,
        ports: Some(
            ports
                .iter()
                .zip(numbers)
                .filter_map(|((_, port), number)| {
                    Some(EndpointPort {
                        name: Some(port.name.clone().unwrap_or_default()),
                        port: Some(number?.into()),
                        protocol: Some("TCP".to_owned()),
                        app_protocol: port.app_protocol.clone(),
                    })
                })
                .collect(),
        ),
    }
}

fn endpoint(ip: IpAddr, node: Option<String>, target: Option<ObjectReference>) -> Endpoint {
    Endpoint {
        addresses: vec![ip.to_string()],
        conditions: Some(EndpointConditions {
            ready: Some(true),
            serving: Some(true),
            terminating: Some(false),
        }),
        node_name: node,
        target_ref: target,
        ..Endpoint::default()
    }
}

/// Whether the slice in the cluster already says what `wanted` says.
#[must_use]
pub fn same(have: &EndpointSlice, wanted: &EndpointSlice) -> bool {
    let labels = |slice: &EndpointSlice| -> Option<(String, String)> {
        let labels = slice.metadata.labels.as_ref()?;
        Some((labels.get(SERVICE_NAME)?.clone(), labels.get(MANAGED_BY)?.clone()))
    };
    have.address_type == wanted.address_type
        && have.endpoints == wanted.endpoints
        && have.ports.as_deref().unwrap_or_default() == wanted.ports.as_deref().unwrap_or_default()
        && labels(have) == labels(wanted)
        && have.metadata.owner_references == wanted.metadata.owner_references
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn service() -> Service {
        serde_json::from_value(json!({
            "metadata": {"name": "llama", "namespace": "models", "uid": "u1"},
            "spec": {"ports": [
                {"name": "http", "port": 80, "targetPort": "api", "appProtocol": "http"},
                {"name": "metrics", "port": 9000},
                {"name": "udp", "port": 53, "protocol": "UDP"},
            ]},
        }))
        .unwrap()
    }

    fn pod(ready: &str) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "llama-1", "namespace": "models", "uid": "p1"},
            "spec": {"nodeName": "n1", "containers": [
                {"name": "server", "ports": [{"name": "api", "containerPort": 8000}]}
            ]},
            "status": {"podIP": "10.77.1.1", "podIPs": [{"ip": "10.77.1.1"}, {"ip": "fd00::1"}],
                       "conditions": [{"type": "Ready", "status": ready}]},
        }))
        .unwrap()
    }

    #[test]
    fn named_target_ports_are_those_of_the_pod() {
        let service = service();
        let target = ready_pod(&service, &pod("True")).unwrap();
        assert_eq!(target.ports, Some(vec![8000, 9000]));
        assert!(ready_pod(&service, &pod("False")).is_none());
        let pods = endpoints::pods(&[target]).unwrap();
        let slice = slice(&service, &pods, &BTreeMap::new());
        let ports = slice.ports.unwrap();
        assert_eq!(
            (ports[0].name.as_deref(), ports[0].port),
            (Some("http"), Some(8000))
        );
        assert_eq!(ports[0].app_protocol.as_deref(), Some("http"));
        let endpoint = &slice.endpoints[0];
        assert_eq!(
            endpoint.target_ref.as_ref().unwrap().name.as_deref(),
            Some("llama-1")
        );
    }

    #[test]
    fn gates_are_reached_on_the_gate_ports_and_the_service_owns_the_slice() {
        let gates = Targets::Gates(vec![endpoints::Gate {
            ip: [10, 77, 0, 9].into(),
            node: None,
            state: endpoints::GateState::ListedAndReady,
        }]);
        let ports = BTreeMap::from([("http".to_owned(), 20_001), ("metrics".to_owned(), 20_002)]);
        let slice = slice(&service(), &gates, &ports);
        assert!(same(&slice, &slice.clone()));
        assert_eq!(slice.metadata.name.as_deref(), Some("llama-ebb"));
        assert_eq!(slice.metadata.owner_references.unwrap()[0].uid, "u1");
        let numbers: Vec<_> = slice.ports.unwrap().iter().map(|port| port.port).collect();
        assert_eq!(numbers, [Some(20_001), Some(20_002)]);
    }
}
