//! A leader that freezes with a Binding on its way, and thaws when another has long taken over: the memory is promised
//! once. Both are processes; a proxy in front of the API server holds the Binding back at the right moment.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "extender/client.rs"]
mod client;
#[path = "frozen_leader/holding_proxy.rs"]
mod holding_proxy;
#[path = "controller/setup.rs"]
#[allow(dead_code, reason = "shared: each test uses its part")]
mod setup;

use std::net::SocketAddr;

use ebb::api::gpu_node::GpuNode;
use ebb_lab::cluster::Signal;
use holding_proxy::HoldingProxy;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use setup::{Setup, eventually};

const FROZEN: &str = "10.77.0.21";
const NEXT: &str = "10.77.0.22";
const GPU: u64 = 24 << 30;

fn extender(ip: &str) -> SocketAddr {
    format!("{ip}:9444").parse().unwrap()
}

/// A node with one card, as its kubelet and its agent tell of it.
async fn gpu_node(setup: &Setup) {
    setup.ready_node("gpu-a", json!({})).await;
    let nodes: Api<Node> = Api::all(setup.client.clone());
    let amount = json!({"ebb.dev/gpu-memory": GPU.to_string(), "pods": "110"});
    let status = json!({"status": {"capacity": amount, "allocatable": amount}});
    nodes
        .patch_status("gpu-a", &PatchParams::default(), &Patch::Merge(&status))
        .await
        .unwrap();
    let gpu_nodes: Api<GpuNode> = Api::all(setup.client.clone());
    let object = json!({"apiVersion": "ebb.dev/v1alpha1", "kind": "GpuNode", "metadata": {"name": "gpu-a"}, "spec": {}});
    gpu_nodes
        .create(&PostParams::default(), &serde_json::from_value(object).unwrap())
        .await
        .unwrap();
    let status = json!({"status": {
        "driverVersion": "570", "count": 1,
        "gpus": [{"uuid": "GPU-1", "index": 0, "name": "NVIDIA L4", "memoryTotal": GPU, "memoryReserved": 0,
                  "memoryUsed": 0, "healthy": true}],
        "conditions": [{"type": "Ready", "status": "True", "reason": "Reading", "message": "",
                        "lastTransitionTime": "2026-01-01T00:00:00Z"}],
    }});
    gpu_nodes
        .patch_status("gpu-a", &PatchParams::default(), &Patch::Merge(&status))
        .await
        .unwrap();
}

/// A pod that only one of the two can have room for. The cluster's own scheduler leaves it alone: this test asks.
async fn pod(setup: &Setup, name: &str) -> Pod {
    let pods: Api<Pod> = setup.api("models");
    let pod = serde_json::from_value(json!({
        "metadata": {"name": name},
        "spec": {"schedulerName": "ebb-scheduler", "tolerations": [{"operator": "Exists"}], "containers": [
            {"name": "c", "image": "none", "resources": {"limits": {"ebb.dev/gpu-memory": (GPU / 4 * 3).to_string()}}},
        ]},
    }))
    .unwrap();
    eventually("the ServiceAccount", || async {
        pods.create(&PostParams::default(), &pod).await.ok()
    })
    .await
}

/// Asks for a Binding to the node until the answer is one of a leader; its error text.
async fn bind(setup: &Setup, ip: &str, pod: &Pod) -> String {
    let ask =
        json!({"PodName": pod.name_any(), "PodNamespace": "models", "PodUID": pod.uid(), "Node": "gpu-a"});
    eventually("an answer of the leader", || async {
        let answer: Value = client::ask(&setup.client, extender(ip), "bind", &ask)
            .await
            .ok()?;
        let error = answer["Error"].as_str().unwrap().to_owned();
        // It does not lead yet, or its watches have not brought the node yet.
        let too_early = ["does not lead", "no GPU told of", "no such node"];
        (!too_early.iter().any(|text| error.contains(text))).then_some(error)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn race_a_frozen_leader_does_not_bind_after_the_next_one_has() {
    let setup = Setup::up().await;
    gpu_node(&setup).await;
    let proxy = HoldingProxy::start("10.77.0.61:8001".parse().unwrap(), &setup, "/pods/first/binding").await;
    let frozen = setup.controller_through("ebb-controller-a", FROZEN, proxy.address);
    let (first, second) = (pod(&setup, "first").await, pod(&setup, "second").await);
    setup.ca().await;

    // Its Binding is on the way when it freezes.
    let asking = bind(&setup, FROZEN, &first);
    tokio::select! {
        error = asking => panic!("the Binding was not held: {error}"),
        () = proxy.held() => {}
    }
    frozen.kill(Signal::SIGSTOP).unwrap();

    // Another takes over, and gives the memory to another pod.
    let next = setup.controller("ebb-controller-b", NEXT);
    assert_eq!(bind(&setup, NEXT, &second).await, "");

    // The Binding arrives, and then its sender is back.
    let answer = proxy.release().await;
    assert!(answer.starts_with("HTTP/1.1 409"), "{answer}");
    frozen.kill(Signal::SIGCONT).unwrap();
    let pods: Api<Pod> = setup.api("models");
    let node = |pod: Pod| pod.spec.and_then(|spec| spec.node_name);
    assert_eq!(node(pods.get("second").await.unwrap()).as_deref(), Some("gpu-a"));
    // Asked again, the leader finds the memory taken.
    let error = bind(&setup, NEXT, &first).await;
    assert!(error.contains("GiB"), "{error}");
    assert_eq!(node(pods.get("first").await.unwrap()), None);
    assert!(frozen.stop().await.success(), "{}", frozen.log_tail());
    assert!(next.stop().await.success(), "{}", next.log_tail());
    setup.cluster.down().await;
}
