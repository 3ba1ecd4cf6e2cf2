//! What the routing table makes of Services, workloads and pods.
#![allow(clippy::unwrap_used)]

use serde_json::json;

use super::*;

fn service(name: &str, ports: &str, selector: serde_json::Value) -> Arc<Service> {
    Arc::new(
        serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "models", "annotations": {"ebb.dev/gate-ports": ports}},
            "spec": {
                "clusterIP": "10.96.0.7",
                "selector": selector,
                "ports": [
                    {"name": "http", "port": 80, "targetPort": "web"},
                    {"name": "admin", "port": 9000, "targetPort": 9001},
                    {"name": "plain", "port": 7000},
                ],
            },
        }))
        .unwrap(),
    )
}

fn gated(name: &str, ports: &str) -> Arc<Service> {
    service(name, ports, json!({"app": "m", "ebb.dev/gated": "true"}))
}

fn deployment(name: &str, replicas: u32, version: &str) -> Deployment {
    serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "models", "resourceVersion": version, "generation": 3,
            "annotations": {
                "ebb.dev/managed": "true", "ebb.dev/policy": "p", "ebb.dev/idle-after": "10m",
                "ebb.dev/min-replicas": "2", "ebb.dev/max-replicas": "4", "ebb.dev/target-in-flight": "8",
                "ebb.dev/max-wait": "90s", "ebb.dev/queue-requests": "100", "ebb.dev/queue-bytes": "1Mi"}},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "m"}},
            "template": {"metadata": {"labels": {"app": "m"}}}},
        "status": {"observedGeneration": 3},
    }))
    .unwrap()
}

fn pod(name: &str, owner: &str, hash: &str) -> Arc<Pod> {
    Arc::new(
        serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "models", "uid": name, "resourceVersion": "50",
                "labels": {"app": "m", "pod-template-hash": hash},
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": owner, "uid": "u",
                    "controller": true}]},
            "spec": {"containers": [{"name": "m", "ports": [{"name": "web", "containerPort": 8000}]}]},
            "status": {"podIP": "10.77.1.2", "phase": "Running",
                "conditions": [{"type": "Ready", "status": "True"}]},
        }))
        .unwrap(),
    )
}

fn objects() -> Objects {
    Objects {
        services: vec![gated("m", r#"{"http": 20001, "admin": 20002, "7000": 20003}"#)],
        deployments: vec![Arc::new(deployment("m", 0, "40"))],
        stateful_sets: Vec::new(),
        pods: vec![pod("m-1", "m-abc", "abc"), pod("other-1", "other-abc", "abc")],
    }
}

#[test]
fn each_port_of_a_gated_service_leads_to_its_workload() {
    let table = Tables::default().build(&objects());
    assert_eq!(
        table.routes.keys().copied().collect::<Vec<_>>(),
        [20001, 20002],
        "a port with a name is known by its name only"
    );
    assert_eq!(table.routes[&20001].target, Target::Name("web".to_owned()));
    assert_eq!(table.routes[&20002].target, Target::Number(9001));
    let workload = table.routes[&20001].to.clone().unwrap();
    let facts = &table.workloads[&workload];
    assert_eq!((facts.seen.desired, facts.wake_to), (0, 2));
    assert_eq!(facts.seen.zero_version, Some(40));
    assert_eq!(facts.max_wait, Duration::from_secs(90));
    assert!(facts.seen.settled && facts.seen.wakeable);
    let pods: Vec<&str> = facts.seen.pods.iter().map(|pod| pod.uid.as_str()).collect();
    assert_eq!(pods, ["m-1"]);
    assert!(facts.seen.pods[0].ready);
    assert_eq!(facts.seen.pods[0].ports["web"], 8000);
}

#[test]
fn a_service_whose_key_was_taken_off_is_served_while_its_slice_may_still_point_here() {
    let mut objects = objects();
    objects.services = vec![service("m", r#"{"http": 20001}"#, json!({"app": "m"}))];
    assert!(!Tables::default().build(&objects).routes.is_empty());
}

#[test]
fn adversarial_a_port_claimed_by_annotation_alone_is_not_had() {
    let mut objects = objects();
    let claim = service("a", r#"{"http": 20001}"#, json!({"app": "m"}));
    objects.services = vec![claim, gated("m", r#"{"http": 20001}"#)];
    assert_eq!(
        Tables::default().build(&objects).routes[&20001].service,
        "models/m"
    );
}

#[test]
fn adversarial_an_annotation_opens_no_port_outside_the_range() {
    let mut objects = objects();
    objects.services = vec![service(
        "a",
        r#"{"http": 22, "admin": 20002}"#,
        json!({"app": "m"}),
    )];
    let table = Tables::default().build(&objects);
    assert_eq!(table.routes.keys().copied().collect::<Vec<_>>(), [20002]);
}

#[test]
fn what_leads_nowhere_says_why() {
    let mut objects = objects();
    objects.deployments.clear();
    let table = Tables::default().build(&objects);
    assert!(
        table.routes[&20001]
            .to
            .as_ref()
            .unwrap_err()
            .contains("no Deployment")
    );
}

#[test]
fn a_workload_that_ebb_left_is_still_served_but_not_woken() {
    let mut objects = objects();
    let mut left = deployment("m", 0, "40");
    left.metadata.annotations = None;
    objects.deployments = vec![Arc::new(left)];
    let table = Tables::default().build(&objects);
    let workload = table.routes[&20001].to.clone().unwrap();
    assert!(!table.workloads[&workload].seen.wakeable);
}

#[test]
fn adversarial_gate_ports_that_cannot_be_read_open_nothing() {
    let mut objects = objects();
    for text in [
        "",
        "[]",
        r#"{"http": 70000}"#,
        r#"{"http": "20001"}"#,
        r#"{"http": -1}"#,
    ] {
        objects.services = vec![gated("m", text)];
        assert!(Tables::default().build(&objects).routes.is_empty(), "{text}");
    }
}

#[test]
fn a_zero_that_passed_is_remembered() {
    let zeros = Zeros::default();
    let hook = zeros.hook::<Deployment>();
    hook(&Event::Apply(deployment("m", 0, "70")));
    hook(&Event::Apply(deployment("m", 1, "71")));
    let mut objects = objects();
    objects.deployments = vec![Arc::new(deployment("m", 1, "71"))];
    let table = Tables::new(zeros).build(&objects);
    let facts = table.workloads.values().next().unwrap();
    assert_eq!((facts.seen.desired, facts.seen.zero_version), (1, Some(70)));
}

#[test]
fn what_changed_is_read_again_and_what_is_gone_is_forgotten() {
    let mut tables = Tables::default();
    let mut objects = objects();
    tables.build(&objects);
    objects.deployments = vec![Arc::new(deployment("m", 1, "41"))];
    let mut moved = pod("m-1", "m-abc", "abc").as_ref().clone();
    moved.metadata.resource_version = Some("51".to_owned());
    moved.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
    objects.pods = vec![Arc::new(moved)];
    let table = tables.build(&objects);
    let facts = table.workloads.values().next().unwrap();
    assert_eq!(facts.seen.desired, 1);
    assert!(facts.seen.pods[0].terminating);
    objects.pods.clear();
    objects.deployments.clear();
    let table = tables.build(&objects);
    assert!(table.workloads.is_empty());
    assert!(tables.known.is_empty() && tables.checks.is_empty());
}
