//! What the agent writes: its `GpuNode`, the node's `ebb.dev/gpu-memory`, and its Lease.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, Resource, ResourceExt};
use serde_json::json;

use crate::api::gpu_node::{GpuNode, GpuNodeStatus};
use crate::api::names;
use crate::api::units::{Bytes, NodeName};

/// Writes for one node.
#[derive(Clone)]
pub struct Publisher {
    node: NodeName,
    lease_name: String,
    leases: Api<Lease>,
    /// The cluster's nodes.
    pub nodes: Api<Node>,
    /// The cluster's inventories.
    pub gpu_nodes: Api<GpuNode>,
}

impl Publisher {
    /// A publisher for the node of that name; its Lease is in Ebb's namespace.
    #[must_use]
    pub fn new(client: Client, node: NodeName, namespace: &str) -> Self {
        Self {
            lease_name: names::agent_lease(node.as_str()),
            leases: Api::namespaced(client.clone(), namespace),
            node,
            nodes: Api::all(client.clone()),
            gpu_nodes: Api::all(client),
        }
    }

    /// The node's name, and so the `GpuNode`'s.
    #[must_use]
    pub fn name(&self) -> &str {
        self.node.as_str()
    }

    /// The name of the Lease.
    #[must_use]
    pub fn lease_name(&self) -> &str {
        &self.lease_name
    }

    /// Renews the Lease, or makes it, owned by the Node so that it goes with it.
    ///
    /// # Errors
    /// The API server's.
    pub async fn renew(&self, owner: &Node, duration: Duration) -> kube::Result<Lease> {
        let object = json!({
            "apiVersion": Lease::api_version(&()),
            "kind": Lease::kind(&()),
            "metadata": {
                "name": self.lease_name,
                "labels": {names::NAME_LABEL: names::AGENT, names::PART_OF_LABEL: names::PART_OF},
                "ownerReferences": [self.reference(owner)],
            },
            "spec": {
                "holderIdentity": self.node,
                "leaseDurationSeconds": duration.as_secs().max(1),
                "renewTime": format!("{:.6}", Timestamp::now()),
            },
        });
        self.leases
            .patch(&self.lease_name, &params(), &Patch::Apply(object))
            .await
    }

    fn reference(&self, owner: &Node) -> serde_json::Value {
        json!({
            "apiVersion": Node::api_version(&()),
            "kind": Node::kind(&()),
            "name": self.node,
            "uid": owner.uid(),
        })
    }

    /// Makes the `GpuNode`, owned by the Node so that it goes with it.
    ///
    /// # Errors
    /// The API server's.
    pub async fn create(&self, owner: &Node) -> kube::Result<GpuNode> {
        let object = json!({
            "apiVersion": GpuNode::api_version(&()),
            "kind": GpuNode::kind(&()),
            "metadata": {
                "name": self.node,
                "ownerReferences": [self.reference(owner)],
            },
            "spec": {},
        });
        self.gpu_nodes
            .patch(self.node.as_str(), &params(), &Patch::Apply(object))
            .await
    }

    /// Writes the inventory. An identical one changes nothing, the resource version included.
    ///
    /// # Errors
    /// The API server's; 404 when there is no `GpuNode` yet.
    pub async fn inventory(&self, status: &GpuNodeStatus) -> kube::Result<GpuNode> {
        let object = json!({
            "apiVersion": GpuNode::api_version(&()),
            "kind": GpuNode::kind(&()),
            "metadata": {"name": self.node},
            "status": status,
        });
        self.gpu_nodes
            .patch_status(self.node.as_str(), &params(), &Patch::Apply(object))
            .await
    }

    /// Writes the node's figure, in both places: the API server does not derive one from the other after the
    /// kubelet's own first registration.
    ///
    /// # Errors
    /// The API server's.
    pub async fn capacity(&self, bytes: Bytes) -> kube::Result<Node> {
        let figure = json!({names::GPU_MEMORY: bytes.0.to_string()});
        let status = json!({"status": {"capacity": figure, "allocatable": figure}});
        // A merge patch, not an apply: the kubelet writes these maps too, and taking a key from it must not need force.
        let params = PatchParams {
            field_manager: Some(names::AGENT.to_owned()),
            ..PatchParams::default()
        };
        self.nodes
            .patch_status(self.node.as_str(), &params, &Patch::Merge(status))
            .await
    }
}

/// Nobody else writes these objects: a conflict is with an older agent.
fn params() -> PatchParams {
    PatchParams::apply(names::AGENT).force()
}

/// Whether the `GpuNode` goes when this Node goes.
#[must_use]
pub fn is_owned_by(gpu_node: &GpuNode, node: &Node) -> bool {
    let uid = node.uid().unwrap_or_default();
    gpu_node.owner_references().iter().any(|owner| owner.uid == uid)
}
