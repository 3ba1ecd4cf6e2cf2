//! The bodies are those that a real kube-scheduler 1.36 posts.
#![allow(clippy::unwrap_used)]

use super::*;

fn filter_body(uid: &str) -> String {
    json!({
        "Pod": {
            "metadata": {"name": "d1-659d7955cd-k6z7w", "namespace": "default", "uid": uid},
            "spec": {"containers": [{"name": "c", "resources": {"limits": {"ebb.dev/gpu-memory": "18Gi"}}}]},
            "status": {"phase": "Pending"},
        },
        "Nodes": null,
        "NodeNames": ["n0000", "n0001"],
    })
    .to_string()
}

#[test]
fn while_nobody_leads_every_node_is_refused_in_words_and_nothing_is_an_error() {
    let args: wire::Args = parse(filter_body("u").as_bytes()).map_err(|_| ()).unwrap();
    let result = serde_json::to_value(away::filter(args)).unwrap();
    assert_eq!(result["NodeNames"], json!([]));
    assert_eq!(result["FailedNodes"]["n0001"], NO_LEADER);
    assert_eq!(result["Error"], "");
}

#[test]
fn bind_and_preempt_bodies_are_read_as_the_scheduler_spells_them() {
    let bind = br#"{"PodName":"p","PodNamespace":"default","PodUID":"69078e7b","Node":"n0002"}"#;
    let bind: wire::BindArgs = parse(bind).map_err(|_| ()).unwrap();
    assert_eq!((bind.uid.as_str(), bind.node.as_str()), ("69078e7b", "n0002"));
    let preempt = json!({
        "Pod": {"metadata": {"name": "hi"}, "spec": {"containers": []}},
        "NodeNameToVictims": null,
        "NodeNameToMetaVictims": {"n0000": {"Pods": [{"UID": "a"}], "NumPDBViolations": 2}, "n1": {"Pods": null}},
    })
    .to_string();
    let preempt: wire::PreemptArgs = parse(preempt.as_bytes()).map_err(|_| ()).unwrap();
    let back = serde_json::to_value(&preempt.node_name_to_meta_victims).unwrap();
    assert_eq!(
        back["n0000"],
        json!({"Pods": [{"UID": "a"}], "NumPDBViolations": 2})
    );
}

#[test]
fn adversarial_bodies_are_refused_with_a_reason() {
    for body in [
        "",
        "{}",
        "null",
        "[]",
        r#"{"Pod": 3}"#,
        r#"{"Pod": {"spec": {"containers": "x"}}}"#,
    ] {
        assert_eq!(
            parse::<wire::Args>(body.as_bytes())
                .unwrap_err()
                .as_ref()
                .status(),
            StatusCode::BAD_REQUEST,
            "{body}"
        );
    }
}
