//! The controller against a real API server: Services and slices, the gates' link, sleep as a conditional write, nodes
//! released and asked for. Gates and the provider are played by the test; the controller runs as its own process under
//! its own ServiceAccount.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "controller/gate.rs"]
mod gate;
#[path = "controller/provider.rs"]
mod provider;
#[path = "controller/setup.rs"]
#[allow(dead_code, reason = "shared: each test uses its part")]
mod setup;

use std::net::SocketAddr;
use std::time::Duration;

use ebb::api::gpu_node::GpuNode;
use ebb::api::node_policy::NodePolicy;
use ebb::api::scale_policy::ScalePolicy;
use ebb::api::workload::{WorkloadKind, WorkloadRef};
use ebb::link::{Activity, FromGate, ToGate};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::events::v1::Event;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

use gate::FakeGate;
use provider::FakeProvider;
use setup::{Setup, eventually};

const CONTROLLER: &str = "10.77.0.21";

fn link(ip: &str) -> SocketAddr {
    format!("{ip}:9445").parse().unwrap()
}

async fn managed_deployment(setup: &Setup, replicas: i32) {
    let api: Api<Deployment> = setup.api("models");
    let deployment = serde_json::from_value(json!({
        "metadata": {"name": "llama", "annotations": {
            "ebb.dev/managed": "true", "ebb.dev/policy": "default", "ebb.dev/idle-after": "1s",
            "ebb.dev/min-replicas": "0", "ebb.dev/max-replicas": "1", "ebb.dev/target-in-flight": "32",
            "ebb.dev/max-wait": "2s", "ebb.dev/queue-requests": "100", "ebb.dev/queue-bytes": "64Mi",
        }},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": "llama"}},
            "template": {
                "metadata": {"labels": {"app": "llama"}},
                "spec": {"schedulerName": "nobody", "containers": [{"name": "server", "image": "none"}]},
            },
        },
    }))
    .unwrap();
    api.create(&PostParams::default(), &deployment).await.unwrap();
    let services: Api<Service> = setup.api("models");
    let service = serde_json::from_value(json!({
        "metadata": {"name": "llama"},
        "spec": {"selector": {"app": "llama"}, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
    }))
    .unwrap();
    services.create(&PostParams::default(), &service).await.unwrap();
}

fn workload() -> WorkloadRef {
    WorkloadRef {
        kind: WorkloadKind::Deployment,
        namespace: "models".to_owned(),
        name: "llama".to_owned(),
    }
}

fn report(ports: Vec<u16>, in_flight: u32) -> FromGate {
    FromGate::Report {
        ports,
        workloads: vec![Activity {
            workload: workload(),
            in_flight,
            queued: 0,
            idle_ms: None,
        }],
    }
}

async fn addresses(slices: &Api<EndpointSlice>) -> Vec<String> {
    match slices.get_opt("llama-ebb").await.unwrap() {
        Some(slice) => slice
            .endpoints
            .into_iter()
            .flat_map(|endpoint| endpoint.addresses)
            .collect(),
        None => Vec::new(),
    }
}

async fn points_at(slices: &Api<EndpointSlice>, ip: &str) {
    eventually(&format!("a slice that points at {ip}"), || async {
        (addresses(slices).await == [ip]).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn services_sleep_and_fail_open() {
    let setup = Setup::up().await;
    let controller = setup.controller("ebb-controller-a", CONTROLLER);
    managed_deployment(&setup, 1).await;
    setup
        .ready_pod("models", "llama-ready", json!({"app": "llama"}), "10.77.1.1")
        .await;
    let (services, slices): (Api<Service>, Api<EndpointSlice>) = (setup.api("models"), setup.api("models"));

    // No gate: the pods themselves.
    points_at(&slices, "10.77.1.1").await;
    let gated = eventually("the selector key and the gate port", || async {
        let service = services.get("llama").await.ok()?;
        let port = service.annotations().get("ebb.dev/gate-ports")?.clone();
        let key = service.spec?.selector?.get("ebb.dev/gated").cloned()?;
        Some((key, serde_json::from_str::<Value>(&port).unwrap()))
    })
    .await;
    assert_eq!(gated.0, "true");
    let port = u16::try_from(gated.1["http"].as_u64().unwrap()).unwrap();
    eventually("the headless twin", || async {
        services.get_opt("llama-ebb-pods").await.unwrap()
    })
    .await;

    // A token for another audience is refused, and one of another pod, too.
    let pod = gate::pod(&setup, "ebb-gate-a", "10.77.0.31").await;
    let wrong = gate::token(&setup, &pod, "somebody").await;
    let refused = FakeGate::dial(&setup, link(CONTROLLER), &wrong).await;
    assert_eq!(refused.err(), Some(401));

    // A gate that listens takes over.
    let token = gate::token(&setup, &pod, "ebb").await;
    let mut linked = FakeGate::dial(&setup, link(CONTROLLER), &token).await.unwrap();
    let hello = FromGate::Hello {
        pod: "ebb-gate-a".to_owned(),
        ip: "10.77.0.31".parse().unwrap(),
    };
    linked.say(hello.clone()).await;
    linked.say(report(vec![port], 1)).await;
    points_at(&slices, "10.77.0.31").await;
    let heartbeat = linked.sender();
    let beating = tokio::spawn(async move {
        let empty = || FromGate::Report {
            ports: vec![port],
            workloads: Vec::new(),
        };
        while heartbeat.send(empty()).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    });

    // A request in flight keeps it awake however long.
    let deployments: Api<Deployment> = setup.api("models");
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(
        linked.from.try_recv().is_err(),
        "no last look while a request is in flight"
    );
    assert_eq!(
        deployments.get("llama").await.unwrap().spec.unwrap().replicas,
        Some(1)
    );

    // Idle: the last look. Busy after all: not put to sleep, and told to go on.
    linked.say(report(vec![port], 0)).await;
    let ToGate::Hold { id, .. } = linked.from.recv().await.unwrap() else {
        panic!("a hold")
    };
    linked
        .say(FromGate::Held {
            id,
            busy: Some("1 in flight".to_owned()),
        })
        .await;
    assert_eq!(linked.from.recv().await, Some(ToGate::Resume { id }));
    assert_eq!(
        deployments.get("llama").await.unwrap().spec.unwrap().replicas,
        Some(1)
    );

    // Idle indeed.
    let ToGate::Hold { id, .. } = linked.from.recv().await.unwrap() else {
        panic!("a hold")
    };
    linked.say(FromGate::Held { id, busy: None }).await;
    eventually("replicas 0", || async {
        let deployment = deployments.get("llama").await.ok()?;
        (deployment.spec?.replicas.unwrap_or(0) == 0).then_some(())
    })
    .await;
    let events: Api<Event> = setup.api("models");
    let slept = eventually("the Event", || async {
        let all = events.list(&ListParams::default()).await.ok()?;
        all.items
            .into_iter()
            .find(|event| event.reason.as_deref() == Some("Slept"))
    })
    .await;
    assert!(slept.note.unwrap_or_default().contains("nobody waits"));

    // The gate dies: within two seconds the pods stand in the slice.
    beating.abort();
    let died = tokio::time::Instant::now();
    linked.die();
    points_at(&slices, "10.77.1.1").await;
    println!(
        "failed open {} ms after the link was lost",
        died.elapsed().as_millis()
    );

    // Opting out puts everything back.
    let off = json!({"metadata": {"annotations": {"ebb.dev/mode": "off"}}});
    services
        .patch("llama", &PatchParams::default(), &Patch::Merge(off))
        .await
        .unwrap();
    eventually("the slice to go", || async {
        slices.get_opt("llama-ebb").await.unwrap().is_none().then_some(())
    })
    .await;
    let service = services.get("llama").await.unwrap();
    assert!(!service.annotations().contains_key("ebb.dev/gate-ports"));
    assert!(
        !service
            .spec
            .unwrap()
            .selector
            .unwrap()
            .contains_key("ebb.dev/gated")
    );
    eventually("the twin to go", || async {
        services
            .get_opt("llama-ebb-pods")
            .await
            .unwrap()
            .is_none()
            .then_some(())
    })
    .await;

    assert!(controller.stop().await.success(), "{}", controller.log_tail());
    setup.cluster.down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_does_not_lead_says_who_does_and_takes_over() {
    let setup = Setup::up().await;
    let first = setup.controller("ebb-controller-a", CONTROLLER);
    let pod = gate::pod(&setup, "ebb-gate-a", "10.77.0.31").await;
    let token = gate::token(&setup, &pod, "ebb").await;
    setup.ca().await;
    eventually("a leader", || async {
        tokio::net::TcpStream::connect(link(CONTROLLER)).await.ok()?;
        FakeGate::dial(&setup, link(CONTROLLER), &token).await.ok()
    })
    .await;
    let second = setup.controller("ebb-controller-b", "10.77.0.22");
    let refused = eventually("an answer of the second", || async {
        tokio::net::TcpStream::connect(link("10.77.0.22")).await.ok()?;
        FakeGate::dial(&setup, link("10.77.0.22"), &token).await.err()
    })
    .await;
    assert_eq!(refused, 421);
    assert!(first.stop().await.success(), "{}", first.log_tail());
    eventually("the second to lead", || async {
        FakeGate::dial(&setup, link("10.77.0.22"), &token).await.ok()
    })
    .await;
    assert!(second.stop().await.success(), "{}", second.log_tail());
    setup.cluster.down().await;
}

async fn node_policy(setup: &Setup, min: u32, max: u32) {
    let api: Api<NodePolicy> = Api::all(setup.client.clone());
    let policy = serde_json::from_value(json!({
        "apiVersion": "ebb.dev/v1alpha1", "kind": "NodePolicy",
        "metadata": {"name": "l4"},
        "spec": {
            "nodeSelector": {"matchLabels": {"pool": "l4"}},
            "provider": {"kind": "http", "url": "http://10.77.0.41:8000", "group": "l4"},
            "node": {"gpus": 1, "gpuMemory": "24Gi", "labels": {"pool": "l4"}},
            "minNodes": min, "maxNodes": max, "settleTime": "1s",
        },
    }))
    .unwrap();
    api.create(&PostParams::default(), &policy).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_node_is_fenced_and_its_removal_asked_for_once() {
    let setup = Setup::up().await;
    let provider = FakeProvider::start("10.77.0.41:8000".parse().unwrap(), &["n1", "n2"]).await;
    setup.ready_node("n1", json!({"pool": "l4"})).await;
    setup.ready_node("n2", json!({"pool": "l4"})).await;
    setup.ready_node("other", json!({"pool": "cpu"})).await;
    let pods: Api<Pod> = setup.api("models");
    for node in ["n1", "n2"] {
        let pod = serde_json::from_value(json!({
            "metadata": {"name": format!("on-{node}")},
            "spec": {"nodeName": node, "containers": [{"name": "c", "image": "none"}]},
        }))
        .unwrap();
        eventually("the ServiceAccount", || async {
            pods.create(&PostParams::default(), &pod).await.ok()
        })
        .await;
    }
    let controller = setup.controller("ebb-controller-a", CONTROLLER);
    node_policy(&setup, 1, 5).await;

    // Occupied nodes stay.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let nodes: Api<Node> = Api::all(setup.client.clone());
    let marked = |node: &Node| node.annotations().contains_key("ebb.dev/release");
    assert!(!marked(&nodes.get("n1").await.unwrap()));

    // Both become empty; one must stay.
    let now = DeleteParams::default().grace_period(0);
    for node in ["n1", "n2"] {
        pods.delete(&format!("on-{node}"), &now).await.unwrap();
    }
    let removed = eventually("a removal", || async { provider.deletes().first().cloned() }).await;
    let node = eventually("the mark released", || async {
        let node = nodes.get(&removed).await.ok()?;
        let mark: Value = serde_json::from_str(node.annotations().get("ebb.dev/release")?).ok()?;
        (mark["state"] == "released").then_some(node)
    })
    .await;
    let taints: Vec<String> = node
        .spec
        .unwrap()
        .taints
        .unwrap()
        .into_iter()
        .map(|taint| taint.key)
        .collect();
    assert!(
        taints.contains(&"ebb.dev/release".to_owned()) && taints.contains(&"nvidia.com/gpu".to_owned()),
        "{taints:?}"
    );

    // Neither a restart nor time asks again, and the last node stays.
    controller.kill(ebb_lab::cluster::Signal::SIGKILL).unwrap();
    controller.wait().await;
    let again = setup.controller("ebb-controller-b", "10.77.0.22");
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(provider.deletes().len(), 1);
    let stays = if removed == "n1" { "n2" } else { "n1" };
    let kept = nodes.get(stays).await.unwrap();
    assert!(
        !kept
            .spec
            .unwrap()
            .taints
            .unwrap()
            .iter()
            .any(|taint| taint.key == "ebb.dev/release")
    );
    assert!(!marked(&nodes.get("other").await.unwrap()));
    assert!(again.stop().await.success(), "{}", again.log_tail());
    setup.cluster.down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn crash_a_node_is_asked_for_once_whoever_leads() {
    let setup = Setup::up().await;
    let provider = FakeProvider::start("10.77.0.41:8000".parse().unwrap(), &[]).await;
    node_policy(&setup, 0, 5).await;
    let controller = setup.controller("ebb-controller-a", CONTROLLER);
    let pods: Api<Pod> = setup.api("models");
    let asking = |name: &str, memory: &str| -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": name},
            "spec": {"schedulerName": "ebb-scheduler", "tolerations": [{"operator": "Exists"}], "containers": [
                {"name": "c", "image": "none", "resources": {"limits": {"ebb.dev/gpu-memory": memory}}},
            ]},
        }))
        .unwrap()
    };
    eventually("the ServiceAccount", || async {
        pods.create(&PostParams::default(), &asking("a", "18Gi"))
            .await
            .ok()
    })
    .await;
    eventually("a node to be asked for", || async {
        provider.posts().first().cloned()
    })
    .await;
    // It fits beside the first one on the node that boots.
    pods.create(&PostParams::default(), &asking("b", "4Gi"))
        .await
        .unwrap();
    // Nothing that could be asked for has room for this one.
    pods.create(&PostParams::default(), &asking("c", "80Gi"))
        .await
        .unwrap();
    let events: Api<Event> = setup.api("models");
    eventually("the Event on the pod that no node fits", || async {
        let all = events.list(&ListParams::default()).await.ok()?;
        all.items
            .into_iter()
            .find(|event| event.reason.as_deref() == Some("NoNodeFits"))
    })
    .await;
    let policies: Api<NodePolicy> = Api::all(setup.client.clone());
    let status = policies.get("l4").await.unwrap().status.unwrap();
    assert_eq!(status.asked.len(), 1);
    let request = status.asked[0].request_id.clone();
    assert_eq!(provider.posts()[0]["requestId"], request.as_str());

    controller.kill(ebb_lab::cluster::Signal::SIGKILL).unwrap();
    controller.wait().await;
    let again = setup.controller("ebb-controller-b", "10.77.0.22");
    tokio::time::sleep(Duration::from_secs(9)).await;
    assert_eq!(provider.posts().len(), 1, "{:?}", provider.posts());

    // The node comes: the request is done with.
    let name = format!("new-{request}");
    setup.ready_node(&name, json!({"pool": "l4"})).await;
    let nodes: Api<Node> = Api::all(setup.client.clone());
    let amount = json!({"status": {
        "capacity": {"ebb.dev/gpu-memory": "24Gi"}, "allocatable": {"ebb.dev/gpu-memory": "24Gi"},
    }});
    nodes
        .patch_status(&name, &PatchParams::default(), &Patch::Merge(amount))
        .await
        .unwrap();
    let gpu_nodes: Api<GpuNode> = Api::all(setup.client.clone());
    let gpu_node = serde_json::from_value(json!({
        "apiVersion": "ebb.dev/v1alpha1", "kind": "GpuNode", "metadata": {"name": name}, "spec": {},
    }))
    .unwrap();
    gpu_nodes.create(&PostParams::default(), &gpu_node).await.unwrap();
    let status = json!({"status": {
        "driverVersion": "570", "count": 1,
        "gpus": [{"uuid": "GPU-1", "index": 0, "name": "NVIDIA L4", "memoryTotal": 25769803776u64,
                  "memoryReserved": 0, "healthy": true}],
        "conditions": [{"type": "Ready", "status": "True", "reason": "Answers", "message": "",
                        "lastTransitionTime": "2026-01-01T00:00:00Z"}],
    }});
    gpu_nodes
        .patch_status(&name, &PatchParams::default(), &Patch::Merge(status))
        .await
        .unwrap();
    eventually("the request to be done with", || async {
        policies
            .get("l4")
            .await
            .ok()?
            .status?
            .asked
            .is_empty()
            .then_some(())
    })
    .await;
    assert_eq!(provider.posts().len(), 1);
    assert!(again.stop().await.success(), "{}", again.log_tail());
    setup.cluster.down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workloads_older_than_ebb_are_adopted_follow_their_policy_and_are_let_go() {
    let setup = Setup::up().await;
    let deployments: Api<Deployment> = setup.api("models");
    let services: Api<Service> = setup.api("models");
    let objects = json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "llama", "namespace": "models"},
         "spec": {"selector": {"matchLabels": {"app": "llama"}}, "template": {
             "metadata": {"labels": {"app": "llama"}},
             "spec": {"containers": [{"name": "server", "image": "none",
                                      "resources": {"limits": {"ebb.dev/gpu-memory": "18Gi"}}}]}}}},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "llama", "namespace": "models"},
         "spec": {"selector": {"app": "llama"}, "ports": [{"port": 80, "targetPort": 8000}]}},
    ]});
    setup.cluster.apply(&objects.to_string()).await.unwrap();
    let before = eventually("the rollout", || async {
        let deployment = deployments.get("llama").await.ok()?;
        (deployment.status.as_ref()?.replicas == Some(1)).then_some(deployment)
    })
    .await;
    let controller = setup.controller("ebb-controller-a", CONTROLLER);
    setup.webhooks(CONTROLLER).await;
    let policies: Api<ScalePolicy> = Api::all(setup.client.clone());
    let policy = serde_json::from_value(json!({
        "apiVersion": "ebb.dev/v1alpha1", "kind": "ScalePolicy", "metadata": {"name": "all"}, "spec": {},
    }))
    .unwrap();
    eventually("a policy", || async {
        policies.create(&PostParams::default(), &policy).await.ok()
    })
    .await;

    let idle_after = |wanted: Option<&'static str>| {
        let deployments = &deployments;
        eventually("what the policy says", move || async move {
            let deployment = deployments.get("llama").await.ok()?;
            let is = deployment
                .annotations()
                .get("ebb.dev/idle-after")
                .map(String::as_str);
            (is == wanted).then_some(deployment)
        })
    };
    let adopted = idle_after(Some("10m")).await;
    assert_eq!(adopted.annotations()["ebb.dev/managed"], "true");
    let (now, then) = (adopted.spec.unwrap(), before.spec.unwrap());
    assert_eq!((now.replicas, &now.template), (Some(1), &then.template));
    eventually("the Service to be gated", || async {
        let service = services.get("llama").await.ok()?;
        let port = service.annotations().contains_key("ebb.dev/gate-ports");
        (port && service.spec?.selector?.contains_key("ebb.dev/gated")).then_some(())
    })
    .await;
    eventually("the policy's status", || async {
        let status = policies.get("all").await.ok()?.status?;
        (status.selected == 1 && status.conditions[0].status == "True").then_some(())
    })
    .await;

    let shorter = json!({"spec": {"idleAfter": "5m"}});
    policies
        .patch("all", &PatchParams::default(), &Patch::Merge(shorter))
        .await
        .unwrap();
    idle_after(Some("5m")).await;

    policies.delete("all", &DeleteParams::default()).await.unwrap();
    let free = idle_after(None).await;
    assert!(
        free.annotations().keys().all(|key| !key.starts_with("ebb.dev/")),
        "{:?}",
        free.annotations()
    );
    assert_eq!(free.spec.unwrap().replicas, Some(1));
    eventually("the Service to be put back", || async {
        let service = services.get("llama").await.ok()?;
        (!service.spec?.selector?.contains_key("ebb.dev/gated")).then_some(())
    })
    .await;
    assert!(controller.stop().await.success(), "{}", controller.log_tail());
    setup.cluster.down().await;
}
