//! What holds for every object: a second look changes nothing, the pod template stays, a person's values survive, and
//! nothing panics.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use serde_json::{Value, json};

use super::select::Policy;
use super::{Request, Requester, Verdict, annotation, pod, policies, service, workload};
use crate::api::annotations as key;
use crate::api::scale_policy::ScalePolicySpec;
use crate::api::workload::{WorkloadKind, WorkloadRef};
use crate::plan::gating::{Gating, Labels};

fn applied(object: &Value, verdict: &Verdict) -> Value {
    let patch: json_patch::Patch =
        serde_json::from_value(serde_json::to_value(&verdict.patch).unwrap()).unwrap();
    let mut object = object.clone();
    json_patch::patch(&mut object, &patch).unwrap();
    object
}

fn request<'a>(object: &'a Value, old: Option<&'a Value>) -> Request<'a> {
    Request {
        object,
        old,
        requester: Requester::Person,
    }
}

/// Any JSON at all.
fn anything() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[a-z/~.]{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 40, 5, |inner| {
        let key = prop_oneof![
            Just("metadata"),
            Just("annotations"),
            Just("labels"),
            Just("managedFields"),
            Just("fieldsV1"),
            Just("f:spec"),
            Just("f:replicas"),
            Just("spec"),
            Just("selector"),
            Just("replicas"),
            Just("template"),
            Just("containers"),
            Just("initContainers"),
            Just("env"),
            Just("name"),
            Just("args"),
            Just("resources"),
            Just("limits"),
            Just("ebb.dev/gpu-memory"),
            Just("ebb.dev/injected"),
            Just("ebb.dev/managed"),
        ]
        .prop_map(str::to_owned);
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::btree_map(key, inner, 0..5)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// A person's own annotations: of ours, with values good and bad, and others.
fn own() -> impl Strategy<Value = std::collections::BTreeMap<String, String>> {
    let key = prop_oneof![
        Just(key::IDLE_AFTER),
        Just(key::MIN_REPLICAS),
        Just(key::MAX_REPLICAS),
        Just(key::TARGET_IN_FLIGHT),
        Just(key::MAX_WAIT),
        Just(key::QUEUE_REQUESTS),
        Just(key::QUEUE_BYTES),
        Just(key::INITIAL_REPLICAS),
        Just("team.example/note"),
    ]
    .prop_map(str::to_owned);
    let value = prop_oneof![
        Just("1".to_owned()),
        Just("2".to_owned()),
        Just("10m".to_owned()),
        Just("1Gi".to_owned()),
        "[a-z0-9]{0,4}",
    ];
    proptest::collection::btree_map(key, value, 0..6)
}

fn deployment(
    annotations: &std::collections::BTreeMap<String, String>,
    replicas: u32,
    memory: &str,
) -> Value {
    json!({
        "metadata": {
            "name": "m", "annotations": annotations, "labels": {"app": "m"},
            "managedFields": [{"manager": "kubectl", "operation": "Apply", "time": "2026-01-01T00:00:00Z",
                "fieldsV1": {"f:spec": {"f:replicas": {}, "f:template": {}}}}],
        },
        "spec": {"replicas": replicas, "template": {
            "metadata": {"labels": {"app": "m"}, "annotations": {"ebb.dev/gpus": "1"}},
            "spec": {"containers": [{"name": "c", "resources": {"limits": {"ebb.dev/gpu-memory": memory}}}]},
        }},
    })
}

fn policy(spec: Value) -> ScalePolicySpec {
    serde_json::from_value(spec).unwrap()
}

fn decide(object: &Value, old: Option<&Value>, spec: &ScalePolicySpec) -> Verdict {
    let policies = [Policy { name: "p", spec }];
    workload::workload(request(object, old), &Labels::new(), policies)
}

fn cluster(runtime_class: bool, full: bool) -> pod::Cluster<'static> {
    pod::Cluster {
        runtime_class,
        no_room: if full {
            &|| Some("0 of 3 GPU nodes have room".to_owned())
        } else {
            &|| None
        },
    }
}

#[test]
fn only_pods_of_our_own_scheduler_are_gated() {
    let full = cluster(false, true);
    for (scheduler, gated) in [
        (json!(null), true),
        (json!("default-scheduler"), true),
        (json!("ebb-scheduler"), true),
        (json!("other"), false),
    ] {
        let object = json!({"metadata": {"name": "p"}, "spec": {"schedulerName": scheduler, "containers": [
            {"name": "c", "resources": {"limits": {"ebb.dev/gpu-memory": "1Gi"}}}]}});
        let stored = applied(&object, &pod::create(request(&object, None), &full));
        assert_eq!(stored["spec"].get("schedulingGates").is_some(), gated, "{stored}");
    }
    let object = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c"}]}});
    assert_eq!(pod::create(request(&object, None), &full), Verdict::allow());
}

proptest! {
    #[test]
    fn adversarial_nothing_panics_and_every_patch_applies(object in anything(), old in proptest::option::of(anything())) {
        let spec = policy(json!({}));
        let gate = Gating::Gate(WorkloadRef {
            kind: WorkloadKind::Deployment,
            namespace: "n".to_owned(),
            name: "m".to_owned(),
        });
        let request = request(&object, old.as_ref());
        for verdict in [
            decide(&object, old.as_ref(), &spec),
            workload::workload(request, &Labels::new(), []),
            pod::create(request, &cluster(true, true)),
            pod::update(request),
            service::service(request, &gate),
            service::service(request, &Gating::Leave),
            policies::scale_policy(request),
            policies::node_policy(request),
        ] {
            // An object without metadata or spec never comes from an API server; a patch of one may fail.
            let whole = object["metadata"].is_object() && object["spec"].is_object();
            let maps = ["/metadata/annotations", "/spec/selector"]
                .iter()
                .all(|at| object.pointer(at).is_none_or(|value| value.is_object() || value.is_null()));
            if whole && maps && verdict.refusal.is_none() {
                applied(&object, &verdict);
            }
        }
    }

    #[test]
    fn a_workload_settles_at_once(
        own in own(),
        replicas in 0u32..4,
        later in 0u32..4,
        initial in 0u32..4,
        memory in prop_oneof![Just("18Gi"), Just("1")],
    ) {
        let spec = policy(json!({"maxReplicas": 3, "initialReplicas": initial.min(3)}));
        let object = deployment(&own, replicas, memory);
        let verdict = decide(&object, None, &spec);
        prop_assume!(verdict.refusal.is_none());
        let stored = applied(&object, &verdict);
        prop_assert_eq!(&stored["spec"]["template"], &object["spec"]["template"]);
        for (key, value) in &own {
            prop_assert_eq!(annotation(&stored, key), Some(value.as_str()));
        }
        // Looked at again in the same request, and by an update without a change.
        prop_assert_eq!(decide(&stored, None, &spec).patch, vec![]);
        let again = decide(&stored, Some(&stored), &spec);
        prop_assert_eq!((again.refusal, again.patch), (None, vec![]));
        // The original manifest in place of it, with whatever count: stored as it was.
        let replaced = deployment(&own, later, memory);
        let verdict = decide(&replaced, Some(&stored), &spec);
        prop_assert_eq!(verdict.refusal.clone(), None);
        let after = applied(&replaced, &verdict);
        prop_assert_eq!(&after["spec"], &stored["spec"]);
        prop_assert_eq!(&after["metadata"], &stored["metadata"]);
        // Another policy: its values in place of the old one's, the person's own as they were.
        let other = policy(json!({"maxReplicas": 3, "idleAfter": "1h", "coldStart": {"queueRequests": 7}}));
        let verdict = decide(&stored, Some(&stored), &other);
        prop_assert_eq!(verdict.refusal.clone(), None);
        let moved = applied(&stored, &verdict);
        for (key, value) in &own {
            prop_assert_eq!(annotation(&moved, key), Some(value.as_str()));
        }
        if !own.contains_key(key::IDLE_AFTER) {
            prop_assert_eq!(annotation(&moved, key::IDLE_AFTER), Some("1h"));
        }
        // No policy any more: everything that was Ebb's is gone, everything else is there.
        let verdict = workload::workload(request(&moved, Some(&moved)), &Labels::new(), []);
        let free = applied(&moved, &verdict);
        let left: std::collections::BTreeMap<String, String> = super::texts(&free, "/metadata/annotations");
        prop_assert_eq!(left, own);
    }

    #[test]
    fn a_pod_settles_at_once(
        own in proptest::collection::vec(
            prop_oneof![Just("NVIDIA_VISIBLE_DEVICES"), Just("EBB_GPU_MEMORY_SHARE"), Just("A"), Just("B")], 0..5),
        side in any::<bool>(),
        class in any::<bool>(),
        full in any::<bool>(),
        gates in proptest::option::of(proptest::collection::vec(Just(json!({"name": "other/gate"})), 0..2)),
    ) {
        let cluster = cluster(class, full);
        let env: Vec<Value> = own.iter().map(|name| json!({"name": name, "value": "all"})).collect();
        let mut containers = vec![json!({
            "name": "m", "env": env, "resources": {"limits": {"ebb.dev/gpu-memory": "1Gi"}},
        })];
        if side {
            containers.insert(0, json!({"name": "s", "env": env}));
        }
        let mut object = json!({"metadata": {"name": "p"}, "spec": {"containers": containers}});
        if let Some(gates) = &gates {
            object["spec"]["schedulingGates"] = json!(gates);
        }
        let verdict = pod::create(request(&object, None), &cluster);
        prop_assert_eq!(verdict.refusal.clone(), None);
        let stored = applied(&object, &verdict);
        prop_assert_eq!(pod::create(request(&stored, None), &cluster).patch, vec![]);
        let mut behind = gates.unwrap_or_default();
        if full {
            behind.push(json!({"name": "ebb.dev/gpu-memory"}));
        }
        let gates = stored["spec"]["schedulingGates"].as_array().cloned();
        prop_assert_eq!(gates.unwrap_or_default(), behind);
        prop_assert_eq!(verdict.warnings.iter().any(|told| told.contains("0 of 3 GPU nodes")), full);
        let model = stored["spec"]["containers"].as_array().unwrap().last().unwrap();
        let names: Vec<_> = model["env"].as_array().unwrap().iter().map(|v| v["name"].as_str().unwrap()).collect();
        prop_assert_eq!(&names[..3], ["NVIDIA_VISIBLE_DEVICES", "EBB_GPU_MEMORY_BYTES", "EBB_GPU_MEMORY_SHARE"]);
        let kept: Vec<_> = own.iter().copied().filter(|name| matches!(*name, "A" | "B")).collect();
        prop_assert_eq!(&names[3..], &kept[..]);
    }
}
