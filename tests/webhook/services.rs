//! Services: the selector key, and whose it is.

use serde_json::Value;

use super::apply::differences;
use super::installation::Installation;
use super::{annotated, deployment, service};

const GATED: &str = "ebb.dev/gated";

fn selector(object: &Value) -> String {
    object["spec"]["selector"].to_string()
}

async fn managed(ebb: &Installation, name: &str) {
    ebb.ok(&["apply", "-f", "-"], &deployment(name, 1)).await;
    ebb.sees(|view| view.deployments.get("models", name).is_some())
        .await;
}

pub async fn gated(ebb: &Installation) {
    // The Service first: nothing to gate yet. The controller touches it when the workload is there.
    ebb.ok(&["apply", "-f", "-"], &service("gate")).await;
    assert_eq!(selector(&ebb.get("service", "gate").await), r#"{"app":"gate"}"#);
    managed(ebb, "gate").await;
    ebb.touch("service", "gate").await;
    let object = ebb.get("service", "gate").await;
    assert_eq!(object["spec"]["selector"][GATED], "true");
    assert_eq!(object["spec"]["selector"]["app"], "gate");
    // Turned off, on again, and off by the workload's going.
    ebb.ok(&["annotate", "service", "gate", "ebb.dev/mode=off"], "")
        .await;
    assert_eq!(selector(&ebb.get("service", "gate").await), r#"{"app":"gate"}"#);
    ebb.ok(&["annotate", "service", "gate", "ebb.dev/mode-"], "")
        .await;
    assert_eq!(
        ebb.get("service", "gate").await["spec"]["selector"][GATED],
        "true"
    );
    ebb.ok(&["delete", "deployment", "gate"], "").await;
    ebb.sees(|view| view.deployments.get("models", "gate").is_none())
        .await;
    ebb.touch("service", "gate").await;
    assert_eq!(selector(&ebb.get("service", "gate").await), r#"{"app":"gate"}"#);
    ebb.ok(&["delete", "service", "gate"], "").await;
}

pub async fn clean_applies(ebb: &Installation) {
    managed(ebb, "tidy").await;
    for created_by in [
        &["apply", "-f", "-"][..],
        &["apply", "--server-side", "-f", "-"],
        &["create", "-f", "-"],
    ] {
        let output = ebb.ok(created_by, &service("tidy")).await;
        assert!(!output.stderr.contains("Warning"), "{}", output.stderr);
        // As the controller does.
        let ports = r#"ebb.dev/gate-ports={"http":20001}"#;
        let account = "--as=system:serviceaccount:ebb-system:ebb-controller";
        let groups = "--as-group=system:masters";
        ebb.ok(&["annotate", "service", "tidy", ports, account, groups], "")
            .await;
        let before = ebb.get("service", "tidy").await;
        assert_eq!(
            before["metadata"]["annotations"]["ebb.dev/gate-ports"],
            r#"{"http":20001}"#
        );
        for how in [
            &["diff", "-f", "-"][..],
            &["apply", "-f", "-"],
            &["diff", "--server-side", "-f", "-"],
            &["apply", "--server-side", "-f", "-"],
            &["apply", "--server-side", "--force-conflicts", "-f", "-"],
            &["apply", "--server-side", "--field-manager=flux", "-f", "-"],
            &["replace", "-f", "-"],
            &["diff", "-f", "-"],
        ] {
            let when = format!("made by {created_by:?}, {how:?}");
            let output = ebb.run(how, &service("tidy")).await;
            if how[0] == "diff" {
                assert_eq!(differences(&output.stdout), Vec::<&str>::new(), "{when}");
            } else {
                assert!(output.status.success(), "{when}: {}", output.stderr);
            }
            let after = ebb.get("service", "tidy").await;
            assert_eq!(after["spec"], before["spec"], "{when}");
            assert_eq!(
                after["metadata"]["annotations"]["ebb.dev/gate-ports"], r#"{"http":20001}"#,
                "{when}"
            );
            let owned = after["metadata"]["managedFields"]
                .as_array()
                .unwrap()
                .iter()
                .any(|entry| entry["fieldsV1"]["f:spec"].get("f:selector").is_some());
            assert!(!owned, "{when}");
        }
        // Nobody else writes them.
        ebb.ok(
            &[
                "annotate",
                "service",
                "tidy",
                r#"ebb.dev/gate-ports={"http":1}"#,
                "--overwrite",
            ],
            "",
        )
        .await;
        let after = ebb.get("service", "tidy").await;
        assert_eq!(
            after["metadata"]["annotations"]["ebb.dev/gate-ports"],
            r#"{"http":20001}"#
        );
        ebb.ok(&["delete", "service", "tidy"], "").await;
    }
    ebb.ok(&["delete", "deployment", "tidy"], "").await;
}

pub async fn left_alone(ebb: &Installation) {
    managed(ebb, "alone").await;
    let headless = service("alone").replace("spec:\n", "spec:\n  clusterIP: None\n");
    let output = ebb.ok(&["create", "-f", "-"], &headless).await;
    assert!(output.stderr.contains("headless"), "{}", output.stderr);
    assert_eq!(selector(&ebb.get("service", "alone").await), r#"{"app":"alone"}"#);
    ebb.ok(&["delete", "service", "alone"], "").await;
    let off = annotated(&service("alone"), "ebb.dev/mode: 'off'");
    let output = ebb.ok(&["create", "-f", "-"], &off).await;
    assert!(!output.stderr.contains("Warning"), "{}", output.stderr);
    assert_eq!(selector(&ebb.get("service", "alone").await), r#"{"app":"alone"}"#);
    ebb.ok(&["delete", "service", "alone"], "").await;
    let other = service("alone").replace("selector: {app: alone}", "selector: {app: other}");
    ebb.ok(&["create", "-f", "-"], &other).await;
    assert_eq!(selector(&ebb.get("service", "alone").await), r#"{"app":"other"}"#);
    ebb.ok(&["delete", "service", "alone"], "").await;
    ebb.ok(&["delete", "deployment", "alone"], "").await;
}
