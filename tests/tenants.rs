//! Pods on GPUs that do not keep to what Ebb promised others, against a real API server: told, and evicted where that is
//! allowed. The controller runs as its own process under its own ServiceAccount.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "controller/setup.rs"]
#[allow(dead_code, reason = "shared: each test uses its part")]
mod setup;

use ebb::api::gpu_node::GpuNode;
use ebb::api::scale_policy::ScalePolicy;
use ebb::cluster::evict::{EvictError, evict};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

use setup::{Setup, eventually};

const CONTROLLER: &str = "10.77.0.21";
const GIB: u64 = 1 << 30;

/// A node with one card of 24 GiB.
async fn gpu_node(setup: &Setup) {
    setup.ready_node("gpu-1", json!({})).await;
    let api: Api<GpuNode> = Api::all(setup.client.clone());
    let node = json!({"apiVersion": "ebb.dev/v1alpha1", "kind": "GpuNode", "metadata": {"name": "gpu-1"}, "spec": {}});
    api.create(&PostParams::default(), &serde_json::from_value(node).unwrap())
        .await
        .unwrap();
    tell(setup, json!({"memoryUsed": 0})).await;
}

/// What its agent tells of the card.
async fn tell(setup: &Setup, figures: Value) {
    let mut gpu = json!({"uuid": "GPU-a", "index": 0, "name": "NVIDIA L4", "memoryTotal": 24 * GIB, "memoryReserved": 0,
        "healthy": true});
    json_patch::merge(&mut gpu, &figures);
    let status = json!({"status": {
        "driverVersion": "570.124.06", "count": 1, "gpus": [gpu],
        "conditions": [{"type": "Ready", "status": "True", "reason": "Reading", "message": "",
            "lastTransitionTime": jiff::Timestamp::now()}],
    }});
    let api: Api<GpuNode> = Api::all(setup.client.clone());
    api.patch_status("gpu-1", &PatchParams::default(), &Patch::Merge(&status))
        .await
        .unwrap();
}

/// A Running and Ready pod on that node.
async fn pod(setup: &Setup, name: &str, annotations: Value) -> Pod {
    let api: Api<Pod> = setup.api("models");
    let pod = json!({
        "metadata": {"name": name, "labels": {"app": name}, "annotations": annotations},
        "spec": {"nodeName": "gpu-1", "terminationGracePeriodSeconds": 0, "containers": [{"name": "server", "image": "none",
            "resources": {"limits": {"ebb.dev/gpu-memory": "10Gi"}}}]},
    });
    let pod = serde_json::from_value(pod).unwrap();
    eventually("the ServiceAccount", || async {
        api.create(&PostParams::default(), &pod).await.ok()
    })
    .await;
    let status = json!({"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}});
    api.patch_status(name, &PatchParams::default(), &Patch::Strategic(status))
        .await
        .unwrap()
}

async fn events(setup: &Setup, pod: &str, reason: &str) -> Vec<Event> {
    let api: Api<Event> = setup.api("models");
    let list = api.list(&ListParams::default()).await.unwrap();
    let is = |event: &Event| {
        let regarding = event
            .regarding
            .as_ref()
            .and_then(|regarding| regarding.name.as_deref());
        regarding == Some(pod) && event.reason.as_deref() == Some(reason)
    };
    list.items.into_iter().filter(is).collect()
}

async fn event(setup: &Setup, pod: &str, reason: &str) -> String {
    let told = eventually(&format!("{reason} about {pod}"), || async {
        events(setup, pod, reason).await.into_iter().next()
    })
    .await;
    assert_eq!(told.type_.as_deref(), Some("Warning"));
    told.note.unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn told_and_evicted() {
    let setup = Setup::up().await;
    let _controller = setup.controller("ebb-controller-a", CONTROLLER);
    gpu_node(&setup).await;
    bound_by_others(&setup).await;
    eviction(&setup).await;
    over_use(&setup).await;
}

/// What the pod's condition says.
async fn condition(setup: &Setup, pod: &str, status: &str) -> String {
    let api: Api<Pod> = setup.api("models");
    eventually(&format!("the condition of {pod} is {status}"), || async {
        let conditions = api.get(pod).await.unwrap().status?.conditions?;
        let ours = conditions
            .into_iter()
            .find(|condition| condition.type_ == "ebb.dev/GpuMemoryOverUse")?;
        (ours.status == status).then_some(ours.message.unwrap_or_default())
    })
    .await
}

/// A pod that goes on using more than it declared is told in the same words by Event and condition, until it does not;
/// where its policy says so it is evicted.
async fn over_use(setup: &Setup) {
    let on_card =
        || json!({"ebb.dev/gpu-devices": "GPU-a", "ebb.dev/gpu-memory-bytes": (10 * GIB).to_string()});
    let uses = |pod: &Pod, gib: u64| {
        json!({"memoryUsed": gib * GIB, "memoryForeign": 0,
            "pods": [{"uid": pod.metadata.uid, "memoryUsed": gib * GIB}]})
    };
    let greedy = pod(setup, "greedy", on_card()).await;
    tell(setup, uses(&greedy, 12)).await;
    let told = condition(setup, "greedy", "True").await;
    assert_eq!(
        told,
        "uses 12 GiB of GPU 0, declared 10 GiB: raise ebb.dev/gpu-memory or lower --gpu-memory-utilization; 2 GiB more \
         than it declared are kept from other pods"
    );
    assert_eq!(event(setup, "greedy", "GpuMemoryOverUse").await, told);
    tell(setup, uses(&greedy, 10)).await;
    condition(setup, "greedy", "False").await;

    let api: Api<ScalePolicy> = Api::all(setup.client.clone());
    let policy = json!({"apiVersion": "ebb.dev/v1alpha1", "kind": "ScalePolicy", "metadata": {"name": "strict"},
        "spec": {"overUse": "Evict"}});
    api.create(&PostParams::default(), &serde_json::from_value(policy).unwrap())
        .await
        .unwrap();
    let deployments: Api<Deployment> = setup.api("models");
    let deployment = json!({"metadata": {"name": "model", "annotations": {"ebb.dev/policy": "strict"}},
        "spec": {"selector": {"matchLabels": {"app": "model"}}, "template": {
            "metadata": {"labels": {"app": "model"}, "annotations": on_card()},
            "spec": {"nodeName": "gpu-1", "terminationGracePeriodSeconds": 0, "containers": [{"name": "c", "image": "none",
                "resources": {"limits": {"ebb.dev/gpu-memory": "10Gi"}}}]}}}});
    deployments
        .create(
            &PostParams::default(),
            &serde_json::from_value(deployment).unwrap(),
        )
        .await
        .unwrap();
    let pods: Api<Pod> = setup.api("models");
    let evicted = eventually("the Deployment's pod", || async {
        let list = pods
            .list(&ListParams::default().labels("app=model"))
            .await
            .unwrap();
        list.items.into_iter().next()
    })
    .await;
    let name = evicted.name_any();
    tell(setup, uses(&evicted, 12)).await;
    let told = event(setup, &name, "GpuMemoryOverUse").await;
    assert!(
        told.ends_with("evicted, as ScalePolicy strict says (overUse: Evict)"),
        "{told}"
    );
    eventually("its eviction", || async {
        pods.get_opt(&name).await.unwrap().is_none().then_some(())
    })
    .await;
}

/// A pod that never came to Ebb's scheduler is told so once.
async fn bound_by_others(setup: &Setup) {
    pod(setup, "stranger", json!({})).await;
    let note = event(setup, "stranger", "BoundByOthers").await;
    assert!(
        note.contains("bound to gpu-1 by somebody else than Ebb")
            && note.contains("use schedulerName ebb-scheduler"),
        "{note}"
    );
    // Whatever changes about it, the next one's Event comes and its own stays one.
    let api: Api<Pod> = setup.api("models");
    let label = json!({"metadata": {"labels": {"changed": "yes"}}});
    api.patch("stranger", &PatchParams::default(), &Patch::Merge(label))
        .await
        .unwrap();
    pod(setup, "another", json!({})).await;
    event(setup, "another", "BoundByOthers").await;
    let told = events(setup, "stranger", "BoundByOthers").await;
    assert!(told.len() == 1 && told[0].series.is_none(), "{told:?}");
}

/// The controller may evict, and it evicts this pod or none.
async fn eviction(setup: &Setup) {
    let (client, pods) = (setup.as_controller().await, setup.api::<Pod>("models"));
    let guarded = pod(setup, "guarded", json!({})).await;
    let uid = guarded.uid().unwrap();
    let budgets: Api<PodDisruptionBudget> = setup.api("models");
    let budget = json!({"metadata": {"name": "guarded"},
        "spec": {"maxUnavailable": 0, "selector": {"matchLabels": {"app": "guarded"}}}});
    budgets
        .create(&PostParams::default(), &serde_json::from_value(budget).unwrap())
        .await
        .unwrap();
    let kept = eventually("the budget's answer", || async {
        match evict(&client, "models", "guarded", &uid).await {
            Err(EvictError::Budget(why)) => Some(why),
            other => panic!("{other:?}"),
        }
    })
    .await;
    assert!(kept.contains("disruption"), "{kept}");
    assert!(pods.get("guarded").await.is_ok());
    budgets.delete("guarded", &DeleteParams::default()).await.unwrap();
    eventually("the answer about another pod of that name", || async {
        match evict(&client, "models", "guarded", "another-uid").await {
            Err(EvictError::Gone) => Some(()),
            Err(EvictError::Budget(_)) => None,
            other => panic!("{other:?}"),
        }
    })
    .await;
    assert!(pods.get("guarded").await.is_ok());
    eventually("the eviction", || async {
        evict(&client, "models", "guarded", &uid).await.ok()
    })
    .await;
    eventually("the pod's end", || async {
        pods.get_opt("guarded").await.unwrap().is_none().then_some(())
    })
    .await;
    let gone = evict(&client, "models", "guarded", &uid).await;
    assert!(matches!(gone, Err(EvictError::Gone)), "{gone:?}");
}
