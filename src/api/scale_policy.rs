//! `ScalePolicy`: which workloads Ebb scales, and how.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::duration::Span;
use super::packing::Packing;

/// Which namespaces and workloads Ebb scales, and the values they get. A workload is managed when it asks for
/// `ebb.dev/gpu-memory` and a policy selects it; where several do, the one with the highest `priority` counts, then
/// the first by name. A workload's own `ebb.dev/…` annotations override these values within `bounds`.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "ebb.dev",
    version = "v1alpha1",
    kind = "ScalePolicy",
    doc = "Which namespaces and workloads Ebb scales, and the values they get.",
    status = "PolicyStatus",
    shortname = "sp",
    category = "ebb",
    printcolumn = r#"{"name":"Idle-After","type":"string","jsonPath":".spec.idleAfter"}"#,
    printcolumn = r#"{"name":"Min","type":"integer","jsonPath":".spec.minReplicas"}"#,
    printcolumn = r#"{"name":"Max","type":"integer","jsonPath":".spec.maxReplicas"}"#,
    printcolumn = r#"{"name":"Workloads","type":"integer","jsonPath":".status.selected"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type=='Ready')].status"}"#
)]
#[kube(validation = Rule::new("self.spec.minReplicas <= self.spec.maxReplicas").message("minReplicas must not be above maxReplicas"))]
#[kube(validation = Rule::new("self.spec.initialReplicas <= self.spec.maxReplicas").message("initialReplicas must not be above maxReplicas"))]
#[serde(rename_all = "camelCase")]
pub struct ScalePolicySpec {
    /// Namespaces that this policy selects by label. Empty: all of them.
    #[serde(default)]
    pub namespace_selector: LabelSelector,
    /// Workloads that this policy selects by label. Empty: all that ask for `ebb.dev/gpu-memory`.
    #[serde(default)]
    pub workload_selector: LabelSelector,
    /// Where several policies select a workload, the highest priority counts.
    #[serde(default)]
    pub priority: i32,
    /// Replicas a workload never goes below. 0 lets it sleep.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1000))]
    pub min_replicas: u32,
    /// Replicas a workload never goes above.
    #[serde(default = "defaults::max_replicas")]
    #[schemars(range(min = 1, max = 1000))]
    pub max_replicas: u32,
    /// Replicas of a workload when it is created. 0: it starts asleep.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1000))]
    pub initial_replicas: u32,
    /// Requests in flight that one replica should hold.
    #[serde(default = "defaults::target_in_flight")]
    #[schemars(range(min = 1, max = 100_000))]
    pub target_in_flight: u32,
    /// Time without a request after which a workload sleeps, as `10m`.
    #[serde(default = "defaults::idle_after")]
    pub idle_after: Span,
    /// How a workload's pods are placed among the nodes where they fit. `fragmentation`: where the free GPU memory stays
    /// most usable for what the cluster is really asked for. `best-fit`: where the least is left beside them, on nodes in
    /// use before empty ones. `spread`: on the emptiest nodes and GPUs, which keeps replicas apart and nodes busy.
    #[serde(default)]
    pub placement: Packing,
    /// What happens to a pod that goes on using more GPU memory than it declared. `Tell`: an Event and a condition on
    /// the pod. `Evict`: the same, and it is evicted, as its PodDisruptionBudget allows.
    #[serde(default)]
    pub over_use: OverUse,
    /// What happens to requests while a workload wakes.
    #[serde(default)]
    pub cold_start: ColdStart,
    /// The range inside which a workload's own annotations may override this policy.
    #[serde(default)]
    pub bounds: Bounds,
}

/// What happens to a pod that goes on using more GPU memory than it declared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OverUse {
    /// People are told.
    #[default]
    Tell,
    /// People are told, and it is evicted.
    Evict,
}

/// What happens to requests while a workload wakes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ColdStart {
    /// Longest time that a request is held.
    pub max_wait: Span,
    /// Requests that may be held for one workload.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub queue_requests: u32,
    /// Bytes of held requests for one workload, as a quantity (`64Mi`).
    #[schemars(length(max = 32), extend("x-kubernetes-validations" = [{
        "rule": "isQuantity(self)",
        "message": "queueBytes must be a quantity, as 64Mi",
    }]))]
    pub queue_bytes: String,
}

impl Default for ColdStart {
    fn default() -> Self {
        Self {
            max_wait: Span::from_secs(900),
            queue_requests: 10_000,
            queue_bytes: "64Mi".to_owned(),
        }
    }
}

/// The range inside which a workload's own annotations may override a policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Bounds {
    /// Longest `ebb.dev/idle-after`. Absent: no bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_idle_after: Option<Span>,
    /// Highest `ebb.dev/max-replicas` and `ebb.dev/min-replicas`. Absent: no bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub max_replicas: Option<u32>,
}

/// What a policy does at present.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyStatus {
    /// Workloads (ScalePolicy) or nodes (NodePolicy) that it selects.
    pub selected: u32,
    /// `Ready`: whether the policy can be followed, and if not, why.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// Generation of the spec that this status was made from.
    pub observed_generation: i64,
}

mod defaults {
    use super::Span;

    pub(super) const fn max_replicas() -> u32 {
        1
    }

    pub(super) const fn target_in_flight() -> u32 {
        32
    }

    pub(super) const fn idle_after() -> Span {
        Span::from_secs(600)
    }
}
