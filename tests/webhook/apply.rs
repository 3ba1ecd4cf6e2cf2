//! The bar: the original manifests, applied again in every way that people do, on sleeping and awake workloads.

use serde_json::Value;

use super::installation::{Installation, within};
use super::workloads::note;
use super::{deployment, stateful_set};

/// Rounds of: sleeping, awake with as many as the manifest says, awake with another count.
pub async fn everything_clean(ebb: &Installation, kind: &str) {
    let name = "clean";
    let manifest = |replicas: u32| match kind {
        "deployment" => deployment(name, replicas),
        _ => stateful_set(name, replicas),
    };
    let workload = format!("{kind}/{name}");
    for created_by in [
        &["apply", "-f", "-"][..],
        &["apply", "--server-side", "-f", "-"],
        &["create", "-f", "-"],
    ] {
        ebb.ok(created_by, &manifest(1)).await;
        for (live, manager) in [
            (0, ""),
            (1, "ebb-gate"),
            (2, "ebb-controller"),
            (0, "ebb-controller"),
        ] {
            if !manager.is_empty() {
                ebb.scale(&workload, live, manager).await;
            }
            settled(ebb, kind, name).await;
            let before = ebb.get(kind, name).await;
            assert_eq!(before["spec"]["replicas"], live);
            for how in [
                &["diff", "-f", "-"][..],
                &["apply", "-f", "-"],
                &["diff", "--server-side", "-f", "-"],
                &["apply", "--server-side", "-f", "-"],
                &["apply", "--server-side", "--force-conflicts", "-f", "-"],
                &["apply", "--server-side", "--field-manager=flux", "-f", "-"],
                &["diff", "--server-side", "-f", "-"],
                &["replace", "-f", "-"],
                &["diff", "-f", "-"],
            ] {
                let when = format!("{kind} made by {created_by:?}, {live} live, {how:?}");
                let output = ebb.run(how, &manifest(1)).await;
                if how[0] == "diff" {
                    assert_eq!(differences(&output.stdout), Vec::<&str>::new(), "{when}");
                    assert!(
                        !output.stderr.to_lowercase().contains("error"),
                        "{when}: {}",
                        output.stderr
                    );
                } else {
                    assert!(output.status.success(), "{when}: {}", output.stderr);
                }
                let after = ebb.get(kind, name).await;
                assert_eq!(after["spec"], before["spec"], "{when}");
                assert_eq!(owners(&after), Vec::<String>::new(), "{when}");
                assert_eq!(note(&after, "managed"), Some("true"), "{when}");
                assert_eq!(note(&after, "injected"), note(&before, "injected"), "{when}");
            }
        }
        if kind == "deployment" {
            let sets = ebb
                .ok(&["get", "replicasets", "-l", "app=clean", "-o", "name"], "")
                .await;
            assert_eq!(
                sets.stdout.lines().count(),
                1,
                "a new ReplicaSet: {}",
                sets.stdout
            );
        }
        ebb.ok(&["delete", kind, name], "").await;
    }
}

/// Edits that ask for another count are kept out, and said so; the scale is not.
pub async fn by_hand(ebb: &Installation) {
    ebb.ok(&["apply", "-f", "-"], &deployment("hand", 1)).await;
    let words = "stay as they are (0 now, 5 asked for)";
    let output = ebb.ok(&["apply", "-f", "-"], &deployment("hand", 5)).await;
    assert!(output.stderr.contains(words), "{}", output.stderr);
    let output = ebb
        .ok(
            &["apply", "--server-side", "--force-conflicts", "-f", "-"],
            &deployment("hand", 5),
        )
        .await;
    assert!(output.stderr.contains(words), "{}", output.stderr);
    let output = ebb
        .ok(
            &[
                "patch",
                "deployment",
                "hand",
                "--type=merge",
                "-p",
                r#"{"spec":{"replicas":5}}"#,
            ],
            "",
        )
        .await;
    assert!(output.stderr.contains(words), "{}", output.stderr);
    assert_eq!(ebb.get("deployment", "hand").await["spec"]["replicas"], 0);
    // `kubectl scale` goes by the subresource; it is a person's wish.
    ebb.ok(&["scale", "deployment", "hand", "--replicas=1"], "").await;
    assert_eq!(ebb.get("deployment", "hand").await["spec"]["replicas"], 1);
    // An update at a version that has passed stays a conflict.
    let mut stale = ebb.get("deployment", "hand").await;
    ebb.ok(&["label", "deployment", "hand", "x=y"], "").await;
    stale["metadata"]["labels"]["x"] = "z".into();
    ebb.refused(
        &["replace", "-f", "-"],
        &stale.to_string(),
        "the object has been modified",
    )
    .await;
    // A real change of the template goes through, and rolls once.
    let changed = deployment("hand", 1).replace("lab/model:1", "lab/model:2");
    ebb.ok(
        &["apply", "--server-side", "--force-conflicts", "-f", "-"],
        &changed,
    )
    .await;
    let object = ebb.get("deployment", "hand").await;
    assert_eq!(
        object["spec"]["template"]["spec"]["containers"][0]["image"],
        "lab/model:2"
    );
    assert_eq!(object["spec"]["replicas"], 1);
    ebb.ok(&["delete", "deployment", "hand"], "").await;
}

/// Waits until the workload's own controller has looked, and nobody owns the replicas any more.
async fn settled(ebb: &Installation, kind: &str, name: &str) {
    within("the workload is settled", async || {
        let object = ebb.get(kind, name).await;
        object["status"]["observedGeneration"] == object["metadata"]["generation"]
            && owners(&object).is_empty()
    })
    .await;
}

/// What `kubectl diff` shows, but for what it shows without Ebb too: a server-side apply after a client-side one rewrites
/// kubectl's own annotation, and a Deployment's generation counts annotations.
pub fn differences(diff: &str) -> Vec<&str> {
    const KUBECTL: [&str; 4] = [
        "--- ",
        "+++ ",
        "kubectl.kubernetes.io/last-applied-configuration",
        "{\"apiVersion\":\"",
    ];
    diff.lines()
        .filter(|line| line.starts_with(['+', '-']))
        .filter(|line| {
            !KUBECTL.iter().any(|own| line.contains(own)) && !line[1..].trim().starts_with("generation: ")
        })
        .collect()
}

/// Who owns `spec.replicas`.
fn owners(object: &Value) -> Vec<String> {
    let entries = object["metadata"]["managedFields"].as_array().unwrap();
    entries
        .iter()
        .filter(|entry| entry["fieldsV1"]["f:spec"].get("f:replicas").is_some())
        .map(|entry| entry["manager"].as_str().unwrap().to_owned())
        .collect()
}
