//! The Node object and its Lease, written and renewed as a kubelet does.

use super::images::Images;
use super::machine::Machine;
use super::quantity;
use super::spec::arch;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, DeleteParams, GetParams, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::time::Instant;

const LEASES: &str = "kube-node-lease";
/// How often the Lease is renewed and the status looked at.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// How often a status in which nothing changed is written.
const REPORT: Duration = Duration::from_secs(300);

/// Creates the Node, or takes an existing one over; returns its UID.
///
/// # Errors
/// When the API server refuses.
pub async fn register(client: &Client, machine: &Machine, images: &Images) -> kube::Result<String> {
    let api: Api<Node> = Api::all(client.clone());
    let name = &machine.spec.name;
    let node = object(machine, images);
    let node: Node = serde_json::from_value(node).map_err(kube::Error::SerdeError)?;
    let node = match api.create(&PostParams::default(), &node).await {
        Ok(created) => created,
        Err(kube::Error::Api(status)) if status.code == 409 => {
            let existing = api.get(name).await?;
            let labels = json!({"metadata": {"labels": machine.spec.all_labels()}});
            api.patch(name, &PatchParams::default(), &Patch::Strategic(labels))
                .await?;
            let status = returned_status(machine, images, &existing);
            api.patch_status(
                name,
                &PatchParams::default(),
                &Patch::Strategic(json!({"status": status})),
            )
            .await?
        }
        Err(error) => return Err(error),
    };
    let uid = node.uid().unwrap_or_default();
    renew(client, name, &uid).await?;
    Ok(uid)
}

/// Deletes the Node and its Lease, as a cloud does when the machine is gone.
///
/// # Errors
/// When the API server refuses; an object that is gone already is none.
pub async fn deregister(client: &Client, name: &str) -> kube::Result<()> {
    let nodes: Api<Node> = Api::all(client.clone());
    let leases: Api<Lease> = Api::namespaced(client.clone(), LEASES);
    for result in [
        nodes.delete(name, &DeleteParams::default()).await.map(drop),
        leases.delete(name, &DeleteParams::default()).await.map(drop),
    ] {
        match result {
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            other => other?,
        }
    }
    Ok(())
}

/// Renews the Lease and keeps the status true, for as long as it is polled.
pub async fn heartbeat(client: Client, machine: &Machine, images: &Images, uid: &str) {
    let api: Api<Node> = Api::all(client.clone());
    let name = machine.spec.name.as_str();
    // Many nodes of one process: spread.
    tokio::time::sleep(HEARTBEAT.mul_f64(super::probes::random())).await;
    let mut ticks = tokio::time::interval(HEARTBEAT);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut reported = Instant::now();
    loop {
        ticks.tick().await;
        if let Err(error) = renew(&client, name, uid).await {
            tracing::warn!(node = name, %error, "renewing the lease");
        }
        // From the API server's cache: this is a look, not a decision.
        let cached = GetParams {
            resource_version: Some("0".to_owned()),
        };
        let ready = match api.get_with(name, &cached).await {
            Ok(node) => is_ready(&node),
            Err(_) => continue,
        };
        if !ready || reported.elapsed() > REPORT {
            let patch = json!({"status": status(machine, images)});
            match api
                .patch_status(name, &PatchParams::default(), &Patch::Strategic(patch))
                .await
            {
                Ok(_) => reported = Instant::now(),
                Err(error) => tracing::warn!(node = name, %error, "writing the node's status"),
            }
        }
    }
}

fn is_ready(node: &Node) -> bool {
    let conditions = node
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_deref())
        .unwrap_or_default();
    conditions
        .iter()
        .any(|c| c.type_ == "Ready" && c.status == "True")
}

async fn renew(client: &Client, name: &str, uid: &str) -> kube::Result<()> {
    let api: Api<Lease> = Api::namespaced(client.clone(), LEASES);
    let now = MicroTime(Timestamp::now());
    let patch = json!({"spec": {"renewTime": now, "holderIdentity": name, "leaseDurationSeconds": 40}});
    match api
        .patch(name, &PatchParams::default(), &Patch::Merge(patch))
        .await
    {
        Err(kube::Error::Api(status)) if status.code == 404 => {}
        other => return other.map(drop),
    }
    let lease = json!({
        "metadata": {"name": name, "namespace": LEASES, "ownerReferences": [
            {"apiVersion": "v1", "kind": "Node", "name": name, "uid": uid}]},
        "spec": {"renewTime": now, "holderIdentity": name, "leaseDurationSeconds": 40}
    });
    let lease: Lease = serde_json::from_value(lease).map_err(kube::Error::SerdeError)?;
    match api.create(&PostParams::default(), &lease).await {
        // The namespace is made by the controller manager, which may not be up yet: the next beat tries again.
        Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => Ok(()),
        other => other.map(drop),
    }
}

fn object(machine: &Machine, images: &Images) -> Value {
    let spec = &machine.spec;
    let taints: Vec<Value> = spec
        .taints
        .iter()
        .map(|taint| json!({"key": taint.key, "value": taint.value, "effect": taint.effect}))
        .collect();
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": spec.name,
            "labels": spec.all_labels(),
            "annotations": {"volumes.kubernetes.io/controller-managed-attach-detach": "true"},
        },
        "spec": {
            "podCIDR": format!("10.77.{}.0/24", machine.index),
            "podCIDRs": [format!("10.77.{}.0/24", machine.index)],
            "providerID": format!("lab://{}", spec.name),
            "taints": taints,
        },
        "status": status(machine, images),
    })
}

fn status(machine: &Machine, images: &Images) -> Value {
    let spec = &machine.spec;
    let now = Time(Timestamp::now());
    let condition = |kind: &str, status: &str, reason: &str, message: &str| {
        json!({"type": kind, "status": status, "reason": reason, "message": message,
            "lastHeartbeatTime": now, "lastTransitionTime": now})
    };
    let images: Vec<Value> = images
        .names()
        .iter()
        .map(|name| json!({"names": [name], "sizeBytes": 1}))
        .collect();
    json!({
        // Without the Hostname that a kubelet adds: nothing resolves it here, and the API server would try it first.
        "addresses": [{"type": "InternalIP", "address": machine.ip}],
        "capacity": {"cpu": spec.cpu, "memory": spec.memory, "pods": spec.pods.to_string(), "ephemeral-storage": "100Gi"},
        "allocatable": {"cpu": spec.cpu, "memory": allocatable_memory(&spec.memory), "pods": spec.pods.to_string(), "ephemeral-storage": "100Gi"},
        "conditions": [
            condition("MemoryPressure", "False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
            condition("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
            condition("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
            condition("Ready", "True", "KubeletReady", "kubelet is posting ready status"),
        ],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": super::kubelet_api::PORT}},
        "images": images,
        "nodeInfo": {
            "architecture": arch(), "operatingSystem": "linux", "osImage": "Ebb lab",
            "kernelVersion": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
            "kubeletVersion": "v1.36.3", "kubeProxyVersion": "", "containerRuntimeVersion": "lab://1.0",
            "machineID": spec.name, "systemUUID": spec.name, "bootID": format!("{}-{:x}", spec.name, now.0.as_nanosecond()),
        },
    })
}

/// What a kubelet leaves of the memory after its eviction threshold of 100Mi.
fn allocatable_memory(capacity: &str) -> String {
    match quantity::bytes(capacity) {
        Ok(bytes) => format!("{}Ki", bytes.saturating_sub(100 << 20) >> 10),
        Err(_) => capacity.to_owned(),
    }
}

/// The status of a node that comes back: resources that the kubelet does not know itself start at
/// zero until somebody publishes them again.
fn returned_status(machine: &Machine, images: &Images, existing: &Node) -> Value {
    let mut status = status(machine, images);
    let known = existing
        .status
        .as_ref()
        .and_then(|status| status.capacity.clone())
        .unwrap_or_default();
    for name in known.keys().filter(|name| is_extended(name)) {
        status["capacity"][name] = json!("0");
        status["allocatable"][name] = json!("0");
    }
    status
}

fn is_extended(name: &str) -> bool {
    match name.split_once('/') {
        Some((domain, _)) => domain != "kubernetes.io" && !domain.ends_with(".kubernetes.io"),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::node::spec::NodeSpec;

    fn machine() -> Machine {
        Machine::new(
            NodeSpec::gpu("g", 2, 24 << 30, "NVIDIA L4"),
            3,
            "/none".into(),
            None,
        )
    }

    #[test]
    fn the_object_is_a_node_with_addresses_and_conditions() {
        let node: Node = serde_json::from_value(object(&machine(), &Images::default())).unwrap();
        assert!(is_ready(&node));
        let status = node.status.unwrap();
        assert_eq!(status.addresses.unwrap()[0].address, "10.77.3.1");
        assert!(!status.capacity.unwrap().contains_key("ebb.dev/gpu-memory"));
        assert_eq!(node.spec.unwrap().pod_cidr.unwrap(), "10.77.3.0/24");
    }

    #[test]
    fn a_node_that_comes_back_zeroes_what_it_does_not_know() {
        let mut existing = Node::default();
        let capacity =
            serde_json::from_value(json!({"ebb.dev/gpu-memory": "48Gi", "cpu": "1", "hugepages-2Mi": "0"}))
                .unwrap();
        existing.status = Some(k8s_openapi::api::core::v1::NodeStatus {
            capacity: Some(capacity),
            ..Default::default()
        });
        let status = returned_status(&machine(), &Images::default(), &existing);
        assert_eq!(status["allocatable"]["ebb.dev/gpu-memory"], "0");
        assert_eq!(status["capacity"]["cpu"], "16");
        assert!(status["capacity"].get("hugepages-2Mi").is_none());
    }
}
