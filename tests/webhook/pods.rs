//! Pods: what they get when they are created, and what nobody may change after.

use serde_json::{Value, json};

use super::installation::{Installation, within};

fn pod(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "models"},
        "spec": {
            "initContainers": [{"name": "fetch", "image": "busybox"}],
            "containers": [
                {"name": "side", "image": "busybox"},
                {"name": "model", "image": "vllm/vllm-openai:v0.11", "args": ["--gpu-memory-utilization=$(SHARE)"],
                 "env": [{"name": "SHARE", "value": "$(EBB_GPU_MEMORY_SHARE)"}],
                 "resources": {"limits": {"ebb.dev/gpu-memory": "17.5Gi"}}},
            ],
        },
    })
}

pub async fn created(ebb: &Installation) {
    let output = ebb.ok(&["create", "-f", "-"], &pod("plain").to_string()).await;
    assert!(!output.stderr.contains("Warning"), "{}", output.stderr);
    let object = ebb.get("pod", "plain").await;
    let spec = &object["spec"];
    assert_eq!(spec["schedulerName"], "ebb-scheduler");
    assert_eq!(spec.get("runtimeClassName"), None);
    let names: Vec<_> = spec["containers"][1]["env"]
        .as_array()
        .unwrap()
        .iter()
        .map(|variable| variable["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        [
            "NVIDIA_VISIBLE_DEVICES",
            "EBB_GPU_MEMORY_BYTES",
            "EBB_GPU_MEMORY_SHARE",
            "SHARE"
        ]
    );
    assert_eq!(
        spec["containers"][1]["env"][0]["valueFrom"]["fieldRef"]["fieldPath"],
        "metadata.annotations['ebb.dev/gpu-devices']"
    );
    let void = json!([{"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"}]);
    assert_eq!(spec["containers"][0]["env"], void);
    assert_eq!(spec["initContainers"][0]["env"], void);
    ebb.ok(&["delete", "pod", "plain"], "").await;

    // A person's own choice of GPUs is replaced, of the scheduler kept; both are told.
    let mut own = pod("own");
    own["spec"]["containers"][1]["env"] = json!([{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}]);
    own["spec"]["containers"][1]["args"] = json!([]);
    own["spec"]["schedulerName"] = "other".into();
    let output = ebb
        .ok(
            &["create", "--dry-run=server", "-o", "json", "-f", "-"],
            &own.to_string(),
        )
        .await;
    for words in [
        "its own NVIDIA_VISIBLE_DEVICES is replaced",
        "the pod goes to scheduler other",
        "looks like vLLM",
    ] {
        assert!(output.stderr.contains(words), "{words}: {}", output.stderr);
    }
    assert!(!output.stdout.contains("\"all\""), "{}", output.stdout);

    // The RuntimeClass, once the cluster has it; its own admission adds what it brings.
    let class = "
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {name: nvidia}
handler: nvidia
scheduling: {tolerations: [{key: gpu, operator: Exists}]}
";
    ebb.ok(&["apply", "-f", "-"], class).await;
    within("the runtime class is used", async || {
        let output = ebb
            .ok(
                &["create", "--dry-run=server", "-o", "json", "-f", "-"],
                &pod("class").to_string(),
            )
            .await;
        let object: Value = serde_json::from_str(&output.stdout).unwrap();
        object["spec"]["runtimeClassName"] == "nvidia"
            && object["spec"]["tolerations"].to_string().contains("\"gpu\"")
    })
    .await;
    ebb.ok(&["delete", "runtimeclass", "nvidia"], "").await;
    within("it is known to be gone", async || {
        ebb.run(
            &["create", "--dry-run=server", "-f", "-"],
            &pod("class").to_string(),
        )
        .await
        .status
        .success()
    })
    .await;
}

pub async fn refused(ebb: &Installation) {
    let create = ["create", "-f", "-"];
    let mut forged = pod("forged");
    forged["metadata"]["annotations"] = json!({"ebb.dev/gpu-devices": "runtime.nvidia.com/gpu=GPU-1"});
    ebb.refused(
        &create,
        &forged.to_string(),
        "ebb.dev/gpu-devices is written when the pod is bound",
    )
    .await;
    // Also on a pod that asks for no GPU memory.
    forged["spec"]["containers"][1]["resources"] = json!({});
    ebb.refused(&create, &forged.to_string(), "is written when the pod is bound")
        .await;
    let mut two = pod("two");
    two["spec"]["containers"][0]["resources"] = json!({"limits": {"ebb.dev/gpu-memory": "1Gi"}});
    ebb.refused(
        &create,
        &two.to_string(),
        "containers `side` and `model` both ask",
    )
    .await;
    let mut init = pod("init");
    init["spec"]["initContainers"][0]["resources"] = json!({"limits": {"ebb.dev/gpu-memory": "1Gi"}});
    ebb.refused(&create, &init.to_string(), "init container `fetch`")
        .await;
    let mut placed = pod("placed");
    placed["spec"]["nodeName"] = "node-a".into();
    ebb.refused(&create, &placed.to_string(), "names its node").await;
}

pub async fn frozen(ebb: &Installation) {
    ebb.ok(&["create", "-f", "-"], &pod("frozen").to_string()).await;
    let words = "says what the pod was bound to";
    // What it asks for is a person's until then.
    ebb.ok(&["annotate", "pod", "frozen", "ebb.dev/sharing=exclusive"], "")
        .await;
    // Before the bind only the Binding may set them.
    ebb.refused(
        &["annotate", "pod", "frozen", "ebb.dev/gpu-memory-share=1.0"],
        "",
        words,
    )
    .await;
    let binding = json!({
        "apiVersion": "v1", "kind": "Binding",
        "metadata": {"name": "frozen", "namespace": "models", "annotations": {
            "ebb.dev/gpu-devices": "runtime.nvidia.com/gpu=GPU-1", "ebb.dev/gpu-memory-bytes": "18790481920",
            "ebb.dev/gpu-memory-share": "0.7812"}},
        "target": {"kind": "Node", "name": "node-a"},
    });
    ebb.ok(
        &[
            "create",
            "--raw",
            "/api/v1/namespaces/models/pods/frozen/binding",
            "-f",
            "-",
        ],
        &binding.to_string(),
    )
    .await;
    let bound = ebb.get("pod", "frozen").await;
    assert_eq!(bound["spec"]["nodeName"], "node-a");
    assert_eq!(
        bound["metadata"]["annotations"]["ebb.dev/gpu-memory-share"],
        "0.7812"
    );
    for key in [
        "ebb.dev/gpu-devices",
        "ebb.dev/gpu-memory-bytes",
        "ebb.dev/gpu-memory-share",
        "ebb.dev/sharing",
    ] {
        ebb.refused(
            &["annotate", "pod", "frozen", "--overwrite", &format!("{key}=1")],
            "",
            words,
        )
        .await;
        ebb.refused(&["annotate", "pod", "frozen", &format!("{key}-")], "", words)
            .await;
        let patch = json!({"metadata": {"annotations": {key: "1"}}}).to_string();
        ebb.refused(
            &[
                "patch",
                "pod",
                "frozen",
                "--subresource=status",
                "--type=merge",
                "-p",
                &patch,
            ],
            "",
            words,
        )
        .await;
    }
    // Everything else goes on as always.
    ebb.ok(&["annotate", "pod", "frozen", "note=x"], "").await;
    let ready = r#"{"status":{"phase":"Running"}}"#;
    ebb.ok(
        &[
            "patch",
            "pod",
            "frozen",
            "--subresource=status",
            "--type=merge",
            "-p",
            ready,
        ],
        "",
    )
    .await;
    ebb.ok(&["delete", "pod", "frozen", "--grace-period=0", "--force"], "")
        .await;
}
