//! The CustomResourceDefinitions: what is checked in is what the program prints, and a real API server takes it and
//! refuses what the rules forbid.
#![allow(clippy::unwrap_used, missing_docs)]

use ebb_lab::cluster::{Cluster, Options};

const CHECKED_IN: &str = include_str!("../manifests/crds.yaml");

#[test]
fn what_is_checked_in_is_what_the_program_prints() {
    assert!(
        CHECKED_IN == ebb::api::crds_yaml(),
        "manifests/crds.yaml is out of date: cargo run -- crds > manifests/crds.yaml"
    );
}

const SCALE_POLICY: &str = "
apiVersion: ebb.dev/v1alpha1
kind: ScalePolicy
metadata: {name: NAME}
spec: SPEC
";

const NODE_POLICY: &str = "
apiVersion: ebb.dev/v1alpha1
kind: NodePolicy
metadata: {name: NAME}
spec:
  nodeSelector: {matchLabels: {pool: gpu}}
  provider: {kind: http, url: \"http://nodes:8080\", group: g}
  node: {gpus: 1, gpuMemory: 24Gi}
";

fn scale_policy(name: &str, spec: &str) -> String {
    SCALE_POLICY.replace("NAME", name).replace("SPEC", spec)
}

#[tokio::test(flavor = "multi_thread")]
async fn admit_good_policies_and_refuse_bad_ones() {
    let cluster = Cluster::up(Options::default()).await.unwrap();
    let applied = cluster
        .kubectl_with(&["apply", "--server-side", "-f", "-"], CHECKED_IN)
        .await
        .unwrap();
    assert!(applied.status.success(), "{}", applied.stderr);
    assert!(!applied.stderr.contains("Warning"), "{}", applied.stderr);
    cluster
        .kubectl(&[
            "wait",
            "--for=condition=Established",
            "crd",
            "--all",
            "--timeout=60s",
        ])
        .await
        .unwrap()
        .success()
        .unwrap();

    // Discovery may lag a moment behind.
    let explained = loop {
        let output = cluster
            .kubectl(&["explain", "scalepolicy.spec.coldStart.maxWait"])
            .await
            .unwrap();
        if output.status.success() {
            break output.stdout;
        }
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    };
    assert!(
        explained.contains("Longest time that a request is held"),
        "{explained}"
    );
    let explained = cluster.kubectl(&["explain", "nodepolicy"]).await.unwrap().stdout;
    assert!(
        explained.contains("one provider object adds and removes"),
        "{explained}"
    );

    let apply = async |yaml: String| cluster.kubectl_with(&["create", "-f", "-"], &yaml).await.unwrap();
    let good = apply(scale_policy("good", "{}")).await;
    assert!(good.status.success(), "{}", good.stderr);
    let seen = cluster
        .kubectl(&[
            "get",
            "sp",
            "good",
            "-o",
            "jsonpath={.spec.idleAfter} {.spec.coldStart.queueBytes} {.spec.bounds}",
        ])
        .await
        .unwrap()
        .stdout;
    assert_eq!(seen, "10m 64Mi {}");
    for (spec, words) in [
        (
            "{minReplicas: 3, maxReplicas: 2}",
            "minReplicas must not be above maxReplicas",
        ),
        (
            "{initialReplicas: 2}",
            "initialReplicas must not be above maxReplicas",
        ),
        ("{idleAfter: soon}", "spec.idleAfter"),
        ("{maxReplicas: 0}", "spec.maxReplicas"),
        ("{minReplicas: -1}", "spec.minReplicas"),
        ("{coldStart: {queueBytes: lots}}", "queueBytes must be a quantity"),
        ("{replicas: 1}", "unknown field"),
    ] {
        let bad = apply(scale_policy("bad", spec)).await;
        assert!(!bad.status.success(), "{spec} was taken");
        assert!(bad.stderr.contains(words), "{spec}: {}", bad.stderr);
    }

    let good = apply(NODE_POLICY.replace("NAME", "good")).await;
    assert!(good.status.success(), "{}", good.stderr);
    for (from, to, words) in [
        ("{matchLabels: {pool: gpu}}", "{}", "at least one label"),
        ("24Gi", "lots", "gpuMemory must be a quantity"),
        ("http://nodes:8080", "ftp://nodes", "spec.provider.url"),
        ("kind: http", "kind: dance", "spec.provider.kind"),
        (
            ", url: \"http://nodes:8080\"",
            "",
            "the http provider needs a url",
        ),
        ("gpus: 1", "gpus: 0", "spec.node.gpus"),
    ] {
        let bad = apply(NODE_POLICY.replace("NAME", "bad").replace(from, to)).await;
        assert!(!bad.status.success(), "{to} was taken");
        assert!(bad.stderr.contains(words), "{to}: {}", bad.stderr);
    }

    // A status as the agent writes it, with the figures of a large card.
    let gpu_node = "
apiVersion: ebb.dev/v1alpha1
kind: GpuNode
metadata: {name: node-a}
spec: {}
";
    let created = apply(gpu_node.to_owned()).await;
    assert!(created.status.success(), "{}", created.stderr);
    let status = r#"{"status":{"driverVersion":"570.1","count":1,"gpus":[{"uuid":"GPU-1","index":0,"name":"NVIDIA H200",
        "memoryTotal":151397597184,"memoryReserved":536870912,"memoryUsed":0,"healthy":true}],"conditions":[]}}"#;
    cluster
        .kubectl(&[
            "patch",
            "gpunode",
            "node-a",
            "--subresource=status",
            "--type=merge",
            "-p",
            status,
        ])
        .await
        .unwrap()
        .success()
        .unwrap();
    refuses_figures_that_nobody_could_read(&cluster).await;
    let table = cluster.kubectl(&["get", "gn"]).await.unwrap().stdout;
    assert!(
        table.contains("NVIDIA H200") && table.contains("570.1"),
        "{table}"
    );
    cluster.down().await;
}

/// One status that the controller cannot read would break its watch over the GPUs of all nodes.
async fn refuses_figures_that_nobody_could_read(cluster: &Cluster) {
    let gpu = |field: &str, value: &str| {
        let mut gpu = serde_json::json!({"uuid": "GPU-1", "index": 0, "name": "NVIDIA H200", "memoryTotal": 1,
            "memoryReserved": 0, "memoryUsed": 0, "healthy": true});
        gpu[field] = serde_json::from_str(value).unwrap();
        serde_json::json!({"status": {"gpus": [gpu]}}).to_string()
    };
    for (what, status) in [
        ("index", gpu("index", "5000000000")),
        ("memoryTotal", gpu("memoryTotal", "-1")),
        ("memoryTotal", gpu("memoryTotal", "1e30")),
        ("memoryReserved", gpu("memoryReserved", "-1")),
        ("memoryUsed", gpu("memoryUsed", "-1")),
        ("memoryForeign", gpu("memoryForeign", "-1")),
        ("memoryUsed", gpu("pods", r#"[{"uid": "u", "memoryUsed": -1}]"#)),
        ("count", r#"{"status":{"count":5000000000}}"#.to_owned()),
    ] {
        let patched = cluster
            .kubectl(&[
                "patch",
                "gn",
                "node-a",
                "--subresource=status",
                "--type=merge",
                "-p",
                &status,
            ])
            .await
            .unwrap();
        assert!(!patched.status.success(), "{status} was taken");
        assert!(patched.stderr.contains(what), "{status}: {}", patched.stderr);
    }
}
