//! The downward API: what a pod may be told about itself.

use super::quantity;
use k8s_openapi::api::core::v1::{Container, ObjectFieldSelector, Pod, ResourceFieldSelector};
use kube::ResourceExt;
use std::collections::BTreeMap;

/// What the node knows that the pod's object does not say yet.
#[derive(Clone, Debug, Default)]
pub struct NodeFacts {
    /// The pod's address.
    pub pod_ip: String,
    /// The node's address.
    pub host_ip: String,
    /// The node's CPU, as a quantity: what an unset limit means.
    pub cpu: String,
    /// The node's memory, as a quantity.
    pub memory: String,
}

/// Resolves a `fieldRef`.
///
/// # Errors
/// Names a path that the kubelet does not support either.
pub fn field(pod: &Pod, facts: &NodeFacts, selector: &ObjectFieldSelector) -> Result<String, String> {
    let path = selector.field_path.as_str();
    let spec = pod.spec.as_ref();
    if let Some((map, key)) = path.strip_suffix("']").and_then(|rest| rest.split_once("['")) {
        let map = match map {
            "metadata.annotations" => pod.annotations(),
            "metadata.labels" => pod.labels(),
            _ => return Err(format!("fieldPath {path:?} does not support subscript")),
        };
        return Ok(map.get(key).cloned().unwrap_or_default());
    }
    Ok(match path {
        "metadata.name" => pod.name_any(),
        "metadata.namespace" => pod.namespace().unwrap_or_default(),
        "metadata.uid" => pod.uid().unwrap_or_default(),
        "metadata.annotations" => format_map(pod.annotations()),
        "metadata.labels" => format_map(pod.labels()),
        "spec.nodeName" => spec.and_then(|s| s.node_name.clone()).unwrap_or_default(),
        "spec.serviceAccountName" => spec
            .and_then(|s| s.service_account_name.clone())
            .unwrap_or_default(),
        "status.podIP" | "status.podIPs" => facts.pod_ip.clone(),
        "status.hostIP" | "status.hostIPs" => facts.host_ip.clone(),
        _ => return Err(format!("unsupported fieldPath: {path}")),
    })
}

/// Resolves a `resourceFieldRef`; `own` is the container it stands in.
///
/// # Errors
/// Names the resource or container that does not exist.
pub fn resource(
    pod: &Pod,
    facts: &NodeFacts,
    own: Option<&Container>,
    selector: &ResourceFieldSelector,
) -> Result<String, String> {
    let container = match selector.container_name.as_deref().filter(|name| !name.is_empty()) {
        Some(name) => pod
            .spec
            .iter()
            .flat_map(|spec| {
                spec.containers
                    .iter()
                    .chain(spec.init_containers.iter().flatten())
            })
            .find(|container| container.name == name)
            .ok_or_else(|| format!("container {name:?} not found"))?,
        None => own.ok_or("containerName is required")?,
    };
    let unsupported = || format!("unsupported container resource: {}", selector.resource);
    let (kind, name) = selector.resource.split_once('.').ok_or_else(unsupported)?;
    let wanted = container.resources.as_ref().and_then(|resources| match kind {
        "limits" => resources.limits.as_ref()?.get(name),
        _ => resources.requests.as_ref()?.get(name),
    });
    let value = match (kind, name, wanted) {
        ("limits" | "requests", "cpu" | "memory" | "ephemeral-storage", Some(quantity)) => quantity.0.clone(),
        // A container without a limit may use the whole node.
        ("limits", "cpu", None) => facts.cpu.clone(),
        ("limits", "memory", None) => facts.memory.clone(),
        ("limits" | "requests", "cpu" | "memory" | "ephemeral-storage", None) => "0".to_owned(),
        _ => return Err(unsupported()),
    };
    let divisor = match selector.divisor.as_ref().map(|d| d.0.as_str()) {
        None | Some("0" | "") => 1000,
        Some(text) => quantity::milli(text)?,
    };
    if divisor <= 0 {
        return Err(format!("divisor of {} must be above 0", selector.resource));
    }
    Ok(quantity::ceil_div(quantity::milli(&value)?, divisor).to_string())
}

/// `key="value"` lines, sorted, values escaped as Go's `%q` does for ordinary text.
fn format_map(map: &BTreeMap<String, String>) -> String {
    map.iter()
        .map(|(key, value)| format!("{key}={value:?}"))
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u",
                "annotations": {"ebb.dev/gpu-devices": "GPU-1", "b": "say \"hi\""}},
            "spec": {"nodeName": "node-a", "containers": [{"name": "c", "resources": {"limits": {"cpu": "1500m", "memory": "3Gi"}}}, {"name": "d"}]}
        }))
        .unwrap()
    }

    fn facts() -> NodeFacts {
        NodeFacts {
            pod_ip: "10.77.1.2".into(),
            host_ip: "10.77.1.1".into(),
            cpu: "16".into(),
            memory: "64Gi".into(),
        }
    }

    fn path(path: &str) -> Result<String, String> {
        field(
            &pod(),
            &facts(),
            &ObjectFieldSelector {
                api_version: None,
                field_path: path.into(),
            },
        )
    }

    #[test]
    fn fields_come_from_the_bound_pod_and_the_node() {
        assert_eq!(
            path("metadata.annotations['ebb.dev/gpu-devices']").unwrap(),
            "GPU-1"
        );
        assert_eq!(path("metadata.annotations['missing']").unwrap(), "");
        assert_eq!(
            path("metadata.annotations").unwrap(),
            "b=\"say \\\"hi\\\"\"\nebb.dev/gpu-devices=\"GPU-1\""
        );
        assert_eq!(path("status.podIP").unwrap(), "10.77.1.2");
        assert_eq!(path("spec.nodeName").unwrap(), "node-a");
        assert!(path("spec.hostname").is_err());
        assert!(path("spec['x']").is_err());
    }

    #[test]
    fn resources_round_up_and_default_to_the_node() {
        let pod = pod();
        let ask = |container: &str, what: &str, divisor: &str| {
            let selector = serde_json::from_value(
                serde_json::json!({"containerName": container, "resource": what, "divisor": divisor}),
            )
            .unwrap();
            resource(&pod, &facts(), None, &selector)
        };
        assert_eq!(ask("c", "limits.cpu", "0").unwrap(), "2");
        assert_eq!(ask("c", "limits.cpu", "1m").unwrap(), "1500");
        assert_eq!(ask("c", "limits.memory", "1Mi").unwrap(), "3072");
        assert_eq!(ask("d", "limits.cpu", "0").unwrap(), "16");
        assert_eq!(ask("d", "requests.cpu", "0").unwrap(), "0");
        assert!(ask("d", "limits.ebb.dev/gpu-memory", "0").is_err());
        assert!(ask("x", "limits.cpu", "0").is_err());
    }
}
