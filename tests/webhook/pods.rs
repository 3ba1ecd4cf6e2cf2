//! Pods: what they get when they are created, and what nobody may change after.

use serde_json::{Value, json};

use super::installation::{Installation, success, within};

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

/// A node with one free card of 24 GiB, well at this moment.
async fn node(ebb: &Installation) {
    let now = now();
    let quantities = json!({"cpu": "8", "memory": "64Gi", "pods": "100", "ebb.dev/gpu-memory": "24Gi"});
    let manifests = json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a"}},
        {"apiVersion": "ebb.dev/v1alpha1", "kind": "GpuNode", "metadata": {"name": "node-a"}, "spec": {}},
    ]});
    ebb.ok(&["apply", "-f", "-"], &manifests.to_string()).await;
    let status = json!({"status": {"capacity": quantities, "allocatable": quantities, "conditions": [
        {"type": "Ready", "status": "True", "reason": "Ready", "message": "", "lastHeartbeatTime": now,
         "lastTransitionTime": now}]}});
    let told = json!({"status": {"driverVersion": "570.124.06", "count": 1,
        "gpus": [{"uuid": "GPU-1", "index": 0, "name": "NVIDIA L4", "memoryTotal": 25_769_803_776_u64,
            "memoryReserved": 0, "memoryUsed": 0, "healthy": true}],
        "conditions": [{"type": "Ready", "status": "True", "reason": "Reading", "message": "",
            "lastTransitionTime": now}]}});
    for (object, status) in [("node/node-a", status), ("gpunode/node-a", told)] {
        let status = status.to_string();
        ebb.ok(
            &[
                "patch",
                object,
                "--subresource=status",
                "--type=merge",
                "-p",
                &status,
            ],
            "",
        )
        .await;
    }
    within("the webhook knows of its room", async || {
        gates(ebb, &pod("fits")).await.0.is_null()
    })
    .await;
}

/// The gates that a pod would get, and the warnings.
async fn gates(ebb: &Installation, pod: &Value) -> (Value, String) {
    let dry = ["create", "--dry-run=server", "-o", "json", "-f", "-"];
    let output = ebb.ok(&dry, &pod.to_string()).await;
    let object: Value = serde_json::from_str(&output.stdout).unwrap();
    (object["spec"]["schedulingGates"].clone(), output.stderr)
}

fn now() -> String {
    format!("{:.0}", jiff::Timestamp::now())
}

pub async fn gated(ebb: &Installation) {
    let ours = json!([{"name": "ebb.dev/gpu-memory"}]);
    // All machines are asleep: the pod waits, and a dry run says so too.
    let (behind, told) = gates(ebb, &pod("early")).await;
    assert_eq!(behind, ours);
    let words = "the pod waits for GPU memory: there is no GPU node with room for 17.5 GiB on one GPU";
    assert!(told.contains(words), "{told}");
    let output = ebb.ok(&["create", "-f", "-"], &pod("early").to_string()).await;
    assert!(output.stderr.contains(words), "{}", output.stderr);
    assert_eq!(ebb.get("pod", "early").await["spec"]["schedulingGates"], ours);
    ebb.ok(&["delete", "pod", "early"], "").await;

    // Gates of others stay, and another scheduler's pods are left alone.
    let mut behind_others = pod("others");
    behind_others["spec"]["schedulingGates"] = json!([{"name": "other/gate"}]);
    let both = json!([{"name": "other/gate"}, {"name": "ebb.dev/gpu-memory"}]);
    assert_eq!(gates(ebb, &behind_others).await.0, both);
    let mut other = pod("other");
    other["spec"]["schedulerName"] = "other".into();
    assert_eq!(gates(ebb, &other).await.0, Value::Null);

    // With room none is gated, but who needs another node, or more than the node has beside its card.
    node(ebb).await;
    let mut elsewhere = pod("elsewhere");
    elsewhere["spec"]["nodeSelector"] = json!({"pool": "h100"});
    let (behind, told) = gates(ebb, &elsewhere).await;
    assert_eq!(behind, ours);
    assert!(told.contains("1 not among those that its nodeSelector"), "{told}");
    let mut busy = pod("busy");
    busy["spec"]["containers"][0]["resources"] = json!({"requests": {"cpu": "9"}});
    assert_eq!(gates(ebb, &busy).await.0, ours);

    // A full card: gated, unless others could be evicted for it.
    bind(ebb, "full").await;
    within("the webhook knows that it is full", async || {
        gates(ebb, &pod("late")).await.0 == ours
    })
    .await;
    for (name, policy) in [("evicts", "PreemptLowerPriority"), ("waits", "Never")] {
        let class = json!({"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass",
            "metadata": {"name": name}, "value": 10, "preemptionPolicy": policy});
        ebb.ok(&["create", "-f", "-"], &class.to_string()).await;
    }
    let of_class = async |class: &str| {
        let mut urgent = pod("urgent");
        urgent["spec"]["priorityClassName"] = class.into();
        ebb.run(
            &["create", "--dry-run=server", "-o", "json", "-f", "-"],
            &urgent.to_string(),
        )
        .await
    };
    within("the priority class is known", async || {
        of_class("waits").await.status.success()
    })
    .await;
    for (class, expected) in [("evicts", &Value::Null), ("waits", &ours)] {
        let object: Value = serde_json::from_str(&of_class(class).await.stdout).unwrap();
        assert_eq!(&object["spec"]["schedulingGates"], expected, "{class}");
    }
    // What the README says of pods that still wait when Ebb is taken away.
    ebb.ok(&["create", "-f", "-"], &pod("stranded").to_string()).await;
    let waiting = "--field-selector=spec.schedulerName=ebb-scheduler,spec.nodeName=";
    let output = success(ebb.cluster.kubectl(&["delete", "pods", "-A", waiting]).await);
    assert!(
        output.stdout.contains("stranded") && !output.stdout.contains("full"),
        "{}",
        output.stdout
    );
    ebb.ok(&["delete", "pod", "full", "--grace-period=0", "--force"], "")
        .await;
    within("the card is free again", async || {
        gates(ebb, &pod("last")).await.0.is_null()
    })
    .await;
}

/// Creates a pod and binds it to the card of [`node`].
async fn bind(ebb: &Installation, name: &str) {
    ebb.ok(&["create", "-f", "-"], &pod(name).to_string()).await;
    bind_now(ebb, name).await;
}

async fn bind_now(ebb: &Installation, name: &str) {
    let binding = json!({
        "apiVersion": "v1", "kind": "Binding",
        "metadata": {"name": name, "namespace": "models", "annotations": {
            "ebb.dev/gpu-devices": "runtime.nvidia.com/gpu=GPU-1", "ebb.dev/gpu-memory-bytes": "18790481920",
            "ebb.dev/gpu-memory-share": "0.7812"}},
        "target": {"kind": "Node", "name": "node-a"},
    });
    let path = format!("/api/v1/namespaces/models/pods/{name}/binding");
    ebb.ok(&["create", "--raw", &path, "-f", "-"], &binding.to_string())
        .await;
}

pub async fn created(ebb: &Installation) {
    node(ebb).await;
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
    node(ebb).await;
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
    bind_now(ebb, "frozen").await;
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
