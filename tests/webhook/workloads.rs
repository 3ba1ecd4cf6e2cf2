//! Deployments and StatefulSets: annotations and replicas.

use serde_json::{Value, json};

use super::installation::{Installation, within};
use super::{annotated, deployment, stateful_set};

pub fn note<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    object["metadata"]["annotations"][format!("ebb.dev/{key}")].as_str()
}

pub async fn created_asleep(ebb: &Installation) {
    for (kind, manifest) in [
        ("deployment", deployment("born", 1)),
        ("statefulset", stateful_set("born", 1)),
    ] {
        let output = ebb.ok(&["apply", "-f", "-"], &manifest).await;
        assert!(!output.stderr.contains("Warning"), "{}", output.stderr);
        let object = ebb.get(kind, "born").await;
        assert_eq!(object["spec"]["replicas"], 0);
        for (key, value) in [
            ("managed", "true"),
            ("policy", "default"),
            ("idle-after", "10m"),
            ("min-replicas", "0"),
            ("max-replicas", "3"),
            ("target-in-flight", "32"),
            ("placement", "fragmentation"),
            ("max-wait", "15m"),
            ("queue-requests", "10000"),
            ("queue-bytes", "64Mi"),
        ] {
            assert_eq!(note(&object, key), Some(value), "{kind} {key}");
        }
        assert_eq!(object["spec"]["template"]["metadata"].get("annotations"), None);
        assert_eq!(object["spec"]["template"]["spec"].get("runtimeClassName"), None);
        assert_eq!(
            object["spec"]["template"]["spec"]["schedulerName"],
            "default-scheduler"
        );
        // Who creates more than one is told.
        let several = manifest
            .replace("born", "several")
            .replace("replicas: 1", "replicas: 2");
        let output = ebb.ok(&["create", "--dry-run=server", "-f", "-"], &several).await;
        assert!(
            output.stderr.contains("starts with 0 replicas instead of 2"),
            "{}",
            output.stderr
        );
        ebb.ok(&["delete", kind, "born"], "").await;
    }
}

pub async fn own_values(ebb: &Installation) {
    let manifest = annotated(
        &deployment("own", 1),
        "ebb.dev/idle-after: 90s, ebb.dev/initial-replicas: '2', ebb.dev/max-replicas: '4'",
    );
    ebb.ok(&["apply", "-f", "-"], &manifest).await;
    let object = ebb.get("deployment", "own").await;
    assert_eq!(object["spec"]["replicas"], 2);
    assert_eq!(note(&object, "idle-after"), Some("90s"));
    assert_eq!(note(&object, "max-replicas"), Some("4"));
    let listed: Vec<_> = note(&object, "injected").unwrap().split(',').collect();
    assert!(
        listed.contains(&"max-wait") && !listed.contains(&"idle-after"),
        "{listed:?}"
    );

    for (annotation, words) in [
        ("ebb.dev/idle-after: soon", "`soon` is not a duration"),
        ("ebb.dev/idle-after: 3h", "allows at most 2h"),
        ("ebb.dev/max-replicas: '6'", "allows at most 5"),
        ("ebb.dev/min-replicas: '4'", "cannot both be"),
        ("ebb.dev/target-in-flight: '0'", "a whole number from 1"),
        ("ebb.dev/queue-bytes: lots", "is not a quantity"),
        ("ebb.dev/managed: maybe", "write \"false\""),
    ] {
        let bad = annotated(&deployment("bad", 1), annotation);
        ebb.refused(&["create", "-f", "-"], &bad, words).await;
        // The same as a change of one that exists.
        let bad = annotated(&deployment("own", 1), annotation);
        ebb.refused(&["apply", "-f", "-"], &bad, words).await;
    }
    // A value of one's own that is taken out again becomes the policy's.
    ebb.ok(&["apply", "-f", "-"], &deployment("own", 1)).await;
    let object = ebb.get("deployment", "own").await;
    assert_eq!(note(&object, "idle-after"), Some("10m"));
    assert_eq!(object["spec"]["replicas"], 2);
    // A value of Ebb's that is edited becomes one's own; one that is removed comes back.
    ebb.ok(
        &[
            "annotate",
            "deployment",
            "own",
            "ebb.dev/max-wait=1m",
            "--overwrite",
        ],
        "",
    )
    .await;
    ebb.ok(
        &[
            "annotate",
            "deployment",
            "own",
            "ebb.dev/queue-bytes-",
            "ebb.dev/injected-",
        ],
        "",
    )
    .await;
    let object = ebb.get("deployment", "own").await;
    assert_eq!(note(&object, "max-wait"), Some("1m"));
    assert_eq!(note(&object, "queue-bytes"), Some("64Mi"));
    assert!(!note(&object, "injected").unwrap().contains("max-wait"));
    ebb.ok(&["delete", "deployment", "own"], "").await;
}

pub async fn opting_out_and_in(ebb: &Installation) {
    ebb.ok(&["apply", "-f", "-"], &deployment("opt", 1)).await;
    let out = annotated(&deployment("opt", 2), "ebb.dev/managed: 'false'");
    let output = ebb.ok(&["apply", "-f", "-"], &out).await;
    assert!(!output.stderr.contains("Warning"), "{}", output.stderr);
    let object = ebb.get("deployment", "opt").await;
    assert_eq!(object["spec"]["replicas"], 2, "replicas are the person's again");
    assert_eq!(note(&object, "managed"), Some("false"));
    for key in ["policy", "idle-after", "injected", "queue-bytes"] {
        assert_eq!(note(&object, key), None, "{key}");
    }
    ebb.ok(&["apply", "-f", "-"], &deployment("opt", 1)).await;
    let object = ebb.get("deployment", "opt").await;
    assert_eq!(note(&object, "managed"), Some("true"));
    assert_eq!(
        object["spec"]["replicas"], 2,
        "from here on only the scale moves it"
    );
    ebb.ok(&["delete", "deployment", "opt"], "").await;
}

pub async fn policy_change(ebb: &Installation) {
    ebb.ok(
        &["apply", "-f", "-"],
        &annotated(&deployment("old", 1), "ebb.dev/max-wait: 2m"),
    )
    .await;
    // Another policy takes over.
    let policy = "
apiVersion: ebb.dev/v1alpha1
kind: ScalePolicy
metadata: {name: strict}
spec:
  workloadSelector: {matchLabels: {app: old}}
  priority: 10
  idleAfter: 5m
  coldStart: {maxWait: 1m}
";
    ebb.ok(&["apply", "-f", "-"], policy).await;
    ebb.sees(|view| view.scale_policies.get("", "strict").is_some())
        .await;
    ebb.touch("deployment", "old").await;
    let object = ebb.get("deployment", "old").await;
    assert_eq!(note(&object, "policy"), Some("strict"));
    assert_eq!(note(&object, "idle-after"), Some("5m"));
    assert_eq!(note(&object, "max-replicas"), Some("1"));
    assert_eq!(note(&object, "max-wait"), Some("2m"));
    ebb.ok(&["delete", "scalepolicy", "strict"], "").await;
    ebb.sees(|view| view.scale_policies.get("", "strict").is_none())
        .await;
    ebb.touch("deployment", "old").await;
    assert_eq!(
        note(&ebb.get("deployment", "old").await, "policy"),
        Some("default")
    );
    // A bound that is tightened later stops nobody's update; it is told.
    let tight =
        |wait: &str| json!({"spec": {"bounds": {"maxIdleAfter": wait}, "idleAfter": "1m"}}).to_string();
    ebb.ok(
        &[
            "annotate",
            "deployment",
            "old",
            "ebb.dev/idle-after=1h",
            "--overwrite",
        ],
        "",
    )
    .await;
    ebb.ok(
        &[
            "patch",
            "scalepolicy",
            "default",
            "--type=merge",
            "-p",
            &tight("30m"),
        ],
        "",
    )
    .await;
    ebb.sees(|view| {
        let policy = view.scale_policies.get("", "default");
        policy.is_some_and(|p| {
            p.spec
                .bounds
                .max_idle_after
                .is_some_and(|b| b.to_string() == "30m")
        })
    })
    .await;
    let output = ebb
        .ok(
            &[
                "patch",
                "deployment",
                "old",
                "--type=merge",
                "-p",
                r#"{"metadata":{"labels":{"a":"b"}}}"#,
            ],
            "",
        )
        .await;
    assert!(output.stderr.contains("allows at most 30m"), "{}", output.stderr);
    assert_eq!(
        note(&ebb.get("deployment", "old").await, "idle-after"),
        Some("1h")
    );
    let back = json!({"spec": {"bounds": {"maxIdleAfter": "2h"}, "idleAfter": "10m"}}).to_string();
    ebb.ok(
        &["patch", "scalepolicy", "default", "--type=merge", "-p", &back],
        "",
    )
    .await;
    ebb.sees(|view| {
        let policy = view.scale_policies.get("", "default");
        policy.is_some_and(|p| p.spec.idle_after.to_string() == "10m")
    })
    .await;
    ebb.ok(&["delete", "deployment", "old"], "").await;
}

pub async fn what_is_not_ours(ebb: &Installation) {
    // No GPU memory; another namespace; a request that cannot be served.
    let plain = deployment("plain", 2).replace("resources: {limits: {ebb.dev/gpu-memory: 18Gi}}", "");
    ebb.ok(&["apply", "-f", "-"], &plain).await;
    let object = ebb.get("deployment", "plain").await;
    assert_eq!(object["spec"]["replicas"], 2);
    assert_eq!(note(&object, "managed"), None);
    let elsewhere = deployment("there", 1).replace("namespace: models", "namespace: default");
    ebb.cluster.apply(&elsewhere).await.unwrap();
    let output = ebb
        .cluster
        .kubectl(&["get", "deployment", "there", "-n", "default", "-o", "json"])
        .await
        .unwrap();
    let object: Value = serde_json::from_str(&output.stdout).unwrap();
    assert_eq!(object["spec"]["replicas"], 1);
    assert_eq!(note(&object, "managed"), None);
    let zero = deployment("zero", 1).replace("18Gi", "'0'");
    ebb.refused(&["create", "-f", "-"], &zero, "asks for 0 bytes")
        .await;
    let cards = deployment("cards", 1).replace(
        "metadata: {labels: {app: cards}}",
        "metadata: {labels: {app: cards}, annotations: {ebb.dev/gpus: many}}",
    );
    ebb.refused(
        &["create", "-f", "-"],
        &cards,
        "annotation ebb.dev/gpus is `many`",
    )
    .await;
    // What asked for GPU memory and no longer does is let go.
    ebb.ok(&["apply", "-f", "-"], &deployment("plain", 1)).await;
    assert_eq!(
        note(&ebb.get("deployment", "plain").await, "managed"),
        Some("true")
    );
    ebb.ok(&["apply", "-f", "-"], &plain).await;
    let object = ebb.get("deployment", "plain").await;
    assert_eq!(note(&object, "managed"), None);
    assert_eq!(note(&object, "injected"), None);
    assert_eq!(object["spec"]["replicas"], 2);
    ebb.ok(&["delete", "deployment", "plain"], "").await;
}

pub async fn policies(ebb: &Installation) {
    let scale = |spec: &str| {
        format!("apiVersion: ebb.dev/v1alpha1\nkind: ScalePolicy\nmetadata: {{name: bad}}\nspec: {spec}\n")
    };
    for (spec, words) in [
        ("{idleAfter: 999999h}", "is not a duration"),
        (
            "{workloadSelector: {matchExpressions: [{key: a, operator: Like}]}}",
            "operator `Like`",
        ),
        ("{coldStart: {queueBytes: '0'}}", "no request fits"),
        ("{coldStart: {queueBytes: 1m}}", "not a whole number of bytes"),
        ("{maxReplicas: 4, bounds: {maxReplicas: 3}}", "above the bound"),
    ] {
        ebb.refused(&["create", "-f", "-"], &scale(spec), words).await;
    }
    let node = "
apiVersion: ebb.dev/v1alpha1
kind: NodePolicy
metadata: {name: bad}
spec:
  nodeSelector: {matchLabels: {pool: gpu}}
  provider: {kind: http, url: 'https://nodes:1/?a=b', group: g}
  node: {gpus: 1, gpuMemory: 24Gi}
";
    ebb.refused(&["create", "-f", "-"], node, "needs the base URL")
        .await;
    let node = node.replace("/?a=b", "");
    ebb.refused(
        &["create", "-f", "-"],
        &node.replace("24Gi", "'0'"),
        "more than 0 bytes",
    )
    .await;
    ebb.refused(
        &["create", "-f", "-"],
        &node.replace(
            "matchLabels: {pool: gpu}",
            "matchExpressions: [{key: pool, operator: DoesNotExist}]",
        ),
        "name at least one label",
    )
    .await;
    ebb.ok(&["create", "-f", "-"], &node).await;

    // The CA comes back after a replace took it out.
    let manifest = include_str!("../../manifests/webhooks.yaml");
    ebb.ok(&["replace", "-f", "-"], manifest).await;
    within("the CA is back", async || {
        let output = ebb
            .ok(
                &[
                    "get",
                    "mutatingwebhookconfiguration",
                    "ebb",
                    "-o",
                    "jsonpath={.webhooks[*].clientConfig.caBundle}",
                ],
                "",
            )
            .await;
        output.stdout.split_whitespace().count() == 3
    })
    .await;
    within("admission works again", async || {
        ebb.run(
            &["create", "--dry-run=server", "-f", "-"],
            &deployment("again", 1),
        )
        .await
        .status
        .success()
    })
    .await;
}
