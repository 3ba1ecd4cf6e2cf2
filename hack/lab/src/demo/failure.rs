//! What to look at when a step was not seen.

use std::collections::VecDeque;
use std::path::Path;

use k8s_openapi::api::core::v1::Pod;

use super::observe::{What, node_of};
use super::timeline::Timeline;
use crate::ebb_install::Site;

/// Lines shown of each log.
const TAIL: usize = 8;

/// Prints the state of the pods, the last Events and the ends of Ebb's logs.
pub fn explain(site: &Site, timeline: &Timeline) {
    timeline.line("\nWorkloads and pods when it stopped:");
    site.observer.look(|state| {
        for (name, deployment) in &state.deployments {
            let ready = deployment
                .status
                .as_ref()
                .and_then(|status| status.ready_replicas);
            let wanted = deployment
                .spec
                .as_ref()
                .and_then(|spec| spec.replicas)
                .unwrap_or(1);
            timeline.line(&format!(
                "  Deployment {name}: {}/{wanted} ready",
                ready.unwrap_or(0)
            ));
        }
        for (name, pod) in &state.pods {
            timeline.line(&format!(
                "  Pod {name} on {}: {}",
                node_of(pod).unwrap_or("no node"),
                condition(pod)
            ));
        }
        for (name, node) in &state.nodes {
            let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_ref());
            let taints: Vec<&str> = taints
                .into_iter()
                .flatten()
                .map(|taint| taint.key.as_str())
                .collect();
            timeline.line(&format!("  Node {name}: taints [{}]", taints.join(", ")));
        }
        timeline.line("\nThe last Events:");
        let told = state.moments.iter().filter_map(|moment| match &moment.what {
            What::Told {
                object,
                kind,
                by,
                reason,
                message,
                ..
            } => Some(format!("  {kind} {object}: {reason}: {message}  [{by}]")),
            _ => None,
        });
        let told: Vec<String> = told.collect();
        for line in told.iter().skip(told.len().saturating_sub(15)) {
            timeline.line(line);
        }
    });
    for prefix in ["ebb-controller", "ebb-gate", "ebb-agent", "ebb-scheduler"] {
        for (pod, log) in site.logs(crate::ebb_install::EBB, prefix) {
            let lines = tail(&log, prefix != "ebb-scheduler");
            if !lines.is_empty() {
                timeline.line(&format!("\nThe end of {pod}'s log:"));
                lines.iter().for_each(|line| timeline.line(&format!("  {line}")));
            }
        }
    }
    timeline.line(&format!(
        "\nAll logs and state are kept in {}",
        site.dir().display()
    ));
}

/// A pod's phase, and what its containers wait for or ended by.
fn condition(pod: &Pod) -> String {
    let status = pod.status.clone().unwrap_or_default();
    let mut words = vec![status.phase.unwrap_or_default()];
    for container in status.container_statuses.unwrap_or_default() {
        let state = container.state.unwrap_or_default();
        if let Some(waiting) = state.waiting {
            words.push(format!(
                "{} {}",
                waiting.reason.unwrap_or_default(),
                waiting.message.unwrap_or_default()
            ));
        }
        if let Some(ended) = state
            .terminated
            .or(container.last_state.and_then(|last| last.terminated))
        {
            words.push(format!("ended with {}", ended.exit_code));
        }
    }
    for condition in status.conditions.unwrap_or_default() {
        if condition.status == "False" && condition.message.is_some() {
            words.push(condition.message.unwrap_or_default());
        }
    }
    if pod.metadata.deletion_timestamp.is_some() {
        words.push("terminating".to_owned());
    }
    words.retain(|word| !word.trim().is_empty());
    words.join("; ")
}

/// The last lines of a log; of a JSON log those above `INFO` where there are any.
fn tail(log: &Path, prefer_problems: bool) -> Vec<String> {
    let Ok(text) = std::fs::read_to_string(log) else {
        return Vec::new();
    };
    let last = |lines: &mut dyn Iterator<Item = &str>| {
        let mut kept = VecDeque::with_capacity(TAIL + 1);
        for line in lines {
            kept.push_back(line.to_owned());
            if kept.len() > TAIL {
                kept.pop_front();
            }
        }
        kept
    };
    let problem =
        |line: &&str| line.contains("\"WARN\"") || line.contains("\"ERROR\"") || line.contains("panicked");
    let problems = last(&mut text.lines().filter(problem));
    if prefer_problems && !problems.is_empty() {
        return problems.into();
    }
    last(&mut text.lines()).into()
}
