//! The bodies that kube-scheduler posts and reads, cut down to what is used. Field names as in
//! `k8s.io/kube-scheduler/extender/v1`.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use serde::{Deserialize, Serialize};

/// Body of filter and prioritize.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Args {
    /// The pod to place.
    pub pod: Pod,
    /// Candidates by name; present because the extender is registered as `nodeCacheCapable`.
    #[serde(default)]
    pub node_names: Option<Vec<String>>,
}

/// Answer to filter.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct FilterResult {
    /// Nodes that have room.
    pub node_names: Vec<String>,
    /// The others, each with the reason.
    #[serde(default)]
    pub failed_nodes: BTreeMap<String, String>,
    /// Not empty: the pod cannot be scheduled at all at the moment.
    #[serde(default)]
    pub error: String,
}

/// One line of the answer to prioritize.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "PascalCase")]
pub struct HostPriority {
    /// The node.
    pub host: String,
    /// 0–10, higher is better.
    pub score: i64,
}

/// Body of bind.
#[derive(Debug, Clone, Deserialize)]
pub struct BindArgs {
    /// The pod's name.
    #[serde(rename = "PodName")]
    pub pod: String,
    /// Its namespace.
    #[serde(rename = "PodNamespace")]
    pub namespace: String,
    /// Its UID.
    #[serde(rename = "PodUID")]
    pub uid: String,
    /// The node that the scheduler chose.
    #[serde(rename = "Node")]
    pub node: String,
}

/// Answer to bind.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct BindResult {
    /// Empty when the pod is bound.
    pub error: String,
}

/// Body of preempt.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PreemptArgs {
    /// The pod that wants room.
    pub pod: Pod,
    /// Whom the scheduler would evict, by node; present because the extender is `nodeCacheCapable`.
    #[serde(default)]
    pub node_name_to_meta_victims: BTreeMap<String, Victims>,
}

/// Pods to be evicted from one node.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Victims {
    /// The pods.
    #[serde(default)]
    pub pods: Option<Vec<Victim>>,
    /// Evictions that a PodDisruptionBudget is against; passed back as it came.
    #[serde(default, rename = "NumPDBViolations")]
    pub pdb_violations: i64,
}

/// One pod to be evicted.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Victim {
    /// Its UID.
    #[serde(rename = "UID")]
    pub uid: String,
}

/// Answer to preempt.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PreemptResult {
    /// The nodes where evicting those pods makes room on the GPUs.
    pub node_name_to_meta_victims: BTreeMap<String, Victims>,
}
