//! `NodePolicy`: which nodes form a group, who adds and removes them, and when they may go.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::duration::Span;

/// A group of nodes that one provider object adds and removes, and when Ebb may release or ask for one.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "ebb.dev",
    version = "v1alpha1",
    kind = "NodePolicy",
    doc = "A group of nodes that one provider object adds and removes, and when Ebb may release or ask for one.",
    status = "NodePolicyStatus",
    shortname = "np",
    category = "ebb",
    printcolumn = r#"{"name":"Provider","type":"string","jsonPath":".spec.provider.kind"}"#,
    printcolumn = r#"{"name":"Min","type":"integer","jsonPath":".spec.minNodes"}"#,
    printcolumn = r#"{"name":"Max","type":"integer","jsonPath":".spec.maxNodes"}"#,
    printcolumn = r#"{"name":"Settle","type":"string","jsonPath":".spec.settleTime"}"#,
    printcolumn = r#"{"name":"Dry-Run","type":"boolean","jsonPath":".spec.dryRun"}"#,
    printcolumn = r#"{"name":"Nodes","type":"integer","jsonPath":".status.selected"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type=='Ready')].status"}"#
)]
#[kube(validation = Rule::new("self.spec.minNodes <= self.spec.maxNodes").message("minNodes must not be above maxNodes"))]
#[serde(rename_all = "camelCase")]
pub struct NodePolicySpec {
    /// Nodes of the group, by label. Must not be empty: Ebb never takes all nodes for one group by accident.
    #[schemars(extend("x-kubernetes-validations" = [{
        "rule": "size(self.matchLabels) > 0 || size(self.matchExpressions) > 0",
        "message": "nodeSelector must name at least one label, so that no other node is ever released",
    }]))]
    pub node_selector: LabelSelector,
    /// Who adds and removes the nodes.
    pub provider: Provider,
    /// What a new node of this group offers; used to tell whether asking for one would help.
    pub node: NodeShape,
    /// Nodes that always stay.
    #[serde(default)]
    #[schemars(range(min = 0, max = 10_000))]
    pub min_nodes: u32,
    /// Nodes that the group may have, those that boot included.
    #[serde(default = "defaults::max_nodes")]
    #[schemars(range(min = 1, max = 10_000))]
    pub max_nodes: u32,
    /// Time that a node must be empty before it is fenced.
    #[serde(default = "defaults::settle_time")]
    pub settle_time: Span,
    /// Time after which a node that was asked for and has not appeared is given up on.
    #[serde(default = "defaults::boot_timeout")]
    pub boot_timeout: Span,
    /// Decide and tell, but neither fence, release nor ask.
    #[serde(default)]
    pub dry_run: bool,
}

/// Who adds and removes nodes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "self.kind != 'http' || size(self.url) > 0",
    "message": "the http provider needs a url, as http://nodes.example:8080",
}]))]
#[serde(rename_all = "camelCase")]
pub struct Provider {
    /// The provider's kind.
    pub kind: ProviderKind,
    /// Base URL of the `http` provider, as `http://nodes.example:8080`.
    #[serde(default)]
    #[schemars(length(max = 2048), regex(pattern = "^(https?://.+)?$"))]
    pub url: String,
    /// Name of the group at the provider.
    #[schemars(length(min = 1, max = 253))]
    pub group: String,
}

/// The kinds of provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ProviderKind {
    /// A small HTTP API, documented with `ebb::provider::http`.
    Http,
}

/// What a node of a group offers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeShape {
    /// GPUs of one node.
    #[schemars(range(min = 1, max = 64))]
    pub gpus: u32,
    /// Memory that each GPU offers to pods, as a quantity (`24Gi`).
    #[schemars(length(min = 1, max = 32), extend("x-kubernetes-validations" = [{
        "rule": "isQuantity(self)",
        "message": "gpuMemory must be a quantity, as 24Gi",
    }]))]
    pub gpu_memory: String,
    /// Labels that a new node carries; pods with a nodeSelector are held against them.
    #[serde(default)]
    pub labels: std::collections::BTreeMap<String, String>,
}

/// What a node policy does at present.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct NodePolicyStatus {
    /// Nodes that it selects.
    pub selected: u32,
    /// Nodes that the provider was asked for and that cannot take pods yet. Written before the provider is asked, so
    /// that a leader which takes over asks for none of them twice.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["requestId"]))]
    pub asked: Vec<AskedNode>,
    /// `Ready`: whether the policy can be followed, and if not, why.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// Generation of the spec that this status was made from.
    pub observed_generation: i64,
}

/// A node that the provider was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AskedNode {
    /// Names the request at the provider.
    pub request_id: String,
    /// When it was asked for.
    pub at: Time,
    /// Why.
    #[serde(default)]
    pub reason: String,
}

mod defaults {
    use super::Span;

    pub(super) const fn max_nodes() -> u32 {
        10
    }

    pub(super) const fn settle_time() -> Span {
        Span::from_secs(300)
    }

    pub(super) const fn boot_timeout() -> Span {
        Span::from_secs(900)
    }
}
