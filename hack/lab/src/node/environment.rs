//! A container's environment, resolved when it is created, in the kubelet's order.

use super::expand::expand;
use super::fields::{self, NodeFacts};
use super::services::{self, ServiceEntry};
use k8s_openapi::api::core::v1::{ConfigMap, Container, Pod, Secret};
use kube::{Api, Client, ResourceExt};
use std::collections::{BTreeMap, BTreeSet};

/// The ConfigMaps and Secrets that a container's environment refers to; absent ones are `None`.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    /// ConfigMap name → its data.
    pub config_maps: BTreeMap<String, Option<BTreeMap<String, String>>>,
    /// Secret name → its data as text.
    pub secrets: BTreeMap<String, Option<BTreeMap<String, String>>>,
}

/// Reads what `container` refers to.
///
/// # Errors
/// Says why the API server did not answer; an object that does not exist is no error here.
pub async fn fetch(client: &Client, namespace: &str, container: &Container) -> kube::Result<Objects> {
    let mut config_maps = BTreeSet::new();
    let mut secrets = BTreeSet::new();
    for from in container.env_from.iter().flatten() {
        config_maps.extend(from.config_map_ref.as_ref().map(|r| r.name.clone()));
        secrets.extend(from.secret_ref.as_ref().map(|r| r.name.clone()));
    }
    for source in container
        .env
        .iter()
        .flatten()
        .filter_map(|var| var.value_from.as_ref())
    {
        config_maps.extend(source.config_map_key_ref.as_ref().map(|r| r.name.clone()));
        secrets.extend(source.secret_key_ref.as_ref().map(|r| r.name.clone()));
    }
    let mut objects = Objects::default();
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    for name in config_maps {
        let found = api.get_opt(&name).await?;
        objects
            .config_maps
            .insert(name, found.map(|map| map.data.unwrap_or_default()));
    }
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    for name in secrets {
        let found = api.get_opt(&name).await?.map(|secret| {
            let data = secret.data.unwrap_or_default().into_iter();
            data.map(|(key, value)| (key, String::from_utf8_lossy(&value.0).into_owned()))
                .collect()
        });
        objects.secrets.insert(name, found);
    }
    Ok(objects)
}

/// Resolves the environment of `container`.
///
/// # Errors
/// The kubelet's own message for what is missing; the container then waits with `CreateContainerConfigError`.
pub fn resolve(
    pod: &Pod,
    container: &Container,
    facts: &NodeFacts,
    services: &[ServiceEntry],
    objects: &Objects,
) -> Result<BTreeMap<String, String>, String> {
    let namespace = pod.namespace().unwrap_or_default();
    let links = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.enable_service_links)
        .unwrap_or(true);
    let service_env = services::environment(services, &namespace, links);
    let mut env: BTreeMap<String, String> = BTreeMap::new();
    for from in container.env_from.iter().flatten() {
        let prefix = from.prefix.as_deref().unwrap_or("");
        let (data, kind, name, optional) = if let Some(r) = &from.config_map_ref {
            (objects.config_maps.get(&r.name), "configmap", &r.name, r.optional)
        } else if let Some(r) = &from.secret_ref {
            (objects.secrets.get(&r.name), "secret", &r.name, r.optional)
        } else {
            continue;
        };
        match data.and_then(Option::as_ref) {
            Some(data) => env.extend(
                data.iter()
                    .map(|(key, value)| (format!("{prefix}{key}"), value.clone())),
            ),
            None if optional == Some(true) => {}
            None => return Err(format!("{kind} {name:?} not found")),
        }
    }
    for var in container.env.iter().flatten() {
        let literal = var.value.as_deref().unwrap_or("");
        let value = if !literal.is_empty() {
            expand(literal, |name| {
                env.get(name)
                    .or_else(|| service_env.get(name))
                    .map(String::as_str)
            })
        } else if let Some(source) = &var.value_from {
            if let Some(selector) = &source.field_ref {
                fields::field(pod, facts, selector)?
            } else if let Some(selector) = &source.resource_field_ref {
                fields::resource(pod, facts, Some(container), selector)?
            } else {
                let (data, kind, title, name, key, optional) = if let Some(r) = &source.config_map_key_ref {
                    (
                        objects.config_maps.get(&r.name),
                        "configmap",
                        "ConfigMap",
                        &r.name,
                        &r.key,
                        r.optional,
                    )
                } else if let Some(r) = &source.secret_key_ref {
                    (
                        objects.secrets.get(&r.name),
                        "secret",
                        "Secret",
                        &r.name,
                        &r.key,
                        r.optional,
                    )
                } else {
                    return Err(format!(
                        "the source of env {} is not supported by this node",
                        var.name
                    ));
                };
                let found = data.and_then(Option::as_ref);
                match found.map(|data| data.get(key)) {
                    Some(Some(value)) => value.clone(),
                    _ if optional == Some(true) => continue,
                    None => return Err(format!("{kind} {name:?} not found")),
                    Some(None) => {
                        return Err(format!("couldn't find key {key} in {title} {namespace}/{name}"));
                    }
                }
            }
        } else {
            String::new()
        };
        env.insert(var.name.clone(), value);
    }
    for (name, value) in service_env {
        env.entry(name).or_insert(value);
    }
    Ok(env)
}

/// Expands `$(NAME)` in a command or argument list.
pub fn expand_all(texts: Option<&Vec<String>>, env: &BTreeMap<String, String>) -> Vec<String> {
    let lookup = |name: &str| env.get(name).map(String::as_str);
    texts
        .into_iter()
        .flatten()
        .map(|text| expand(text, lookup))
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn run(container: serde_json::Value, objects: &Objects) -> Result<BTreeMap<String, String>, String> {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "n", "annotations": {"ebb.dev/gpu-devices": "runtime.nvidia.com/gpu=GPU-1"}},
            "spec": {"containers": [container.clone()]}
        }))
        .unwrap();
        let container: Container = serde_json::from_value(container).unwrap();
        let facts = NodeFacts {
            pod_ip: "10.77.1.2".into(),
            ..NodeFacts::default()
        };
        resolve(&pod, &container, &facts, &[], objects)
    }

    #[test]
    fn variables_see_only_those_before_them() {
        let env = run(
            json!({"name": "c", "env": [
                {"name": "LATE", "value": "$(IP)"},
                {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                {"name": "LISTEN", "value": "$(IP):8000"},
                {"name": "NVIDIA_VISIBLE_DEVICES", "valueFrom": {"fieldRef": {"fieldPath": "metadata.annotations['ebb.dev/gpu-devices']"}}},
                {"name": "EMPTY"}
            ]}),
            &Objects::default(),
        )
        .unwrap();
        assert_eq!(env["LATE"], "$(IP)");
        assert_eq!(env["LISTEN"], "10.77.1.2:8000");
        assert_eq!(env["NVIDIA_VISIBLE_DEVICES"], "runtime.nvidia.com/gpu=GPU-1");
        assert_eq!(env["EMPTY"], "");
        assert_eq!(
            expand_all(Some(&vec!["--listen=$(LISTEN)".into(), "$$(IP)".into()]), &env),
            ["--listen=10.77.1.2:8000", "$(IP)"]
        );
    }

    #[test]
    fn sources_are_read_and_missing_ones_told_as_the_kubelet_does() {
        let mut objects = Objects::default();
        objects
            .config_maps
            .insert("cm".into(), Some([("k".to_owned(), "v".to_owned())].into()));
        objects.secrets.insert("gone".into(), None);
        let container = |env: serde_json::Value, from: serde_json::Value| json!({"name": "c", "env": env, "envFrom": from});
        let env = run(
            container(
                json!([{"name": "K", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "k"}}},
                    {"name": "O", "valueFrom": {"secretKeyRef": {"name": "gone", "key": "k", "optional": true}}}]),
                json!([{"prefix": "P_", "configMapRef": {"name": "cm"}}]),
            ),
            &objects,
        )
        .unwrap();
        assert_eq!((env["K"].as_str(), env["P_k"].as_str()), ("v", "v"));
        assert!(!env.contains_key("O"));
        let missing = |env, from| run(container(env, from), &objects).unwrap_err();
        assert_eq!(
            missing(json!([]), json!([{"secretRef": {"name": "gone"}}])),
            "secret \"gone\" not found"
        );
        assert_eq!(
            missing(
                json!([{"name": "K", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "x"}}}]),
                json!([])
            ),
            "couldn't find key x in ConfigMap n/cm"
        );
    }
}
