//! What the ledger is told: nodes, inventories and pods as they are now, and what a pod has on GPUs.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use super::images::Images;
use crate::api::gpu_request::{GpuRequest, Sharing};
use crate::api::host::Host;
use crate::api::units::{Bytes, GpuId, NodeName, PodUid};
use crate::plan::gating::Labels;

/// Something became so. Applying the same event twice changes nothing.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A Node is like this now.
    Node(NodeFacts),
    /// The Node was deleted.
    NodeGone(NodeName),
    /// The agent of a node says this now.
    Inventory(Inventory),
    /// The node has no inventory any more.
    InventoryGone(NodeName),
    /// Whether the agent of a node is heard of, and if not, in words.
    Agent {
        /// The node.
        node: NodeName,
        /// Why nothing new can be put on any of its GPUs.
        silent: Option<Arc<str>>,
    },
    /// A pod that asks for GPU memory is like this now.
    Pod(PodFacts),
    /// A pod that asks for no GPU memory is like this now.
    Neighbour(NeighbourFacts),
    /// The pod was deleted: the API forgot it. Whether its containers have ended, only [`PodFacts::finished`] says.
    PodGone(PodUid),
}

/// Why a node takes no new pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fence {
    /// Ebb empties it.
    Releasing,
    /// `spec.unschedulable`.
    Cordoned,
    /// It has a deletion time.
    Deleting,
}

impl fmt::Display for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fence::Releasing => "being emptied for release",
            Fence::Cordoned => "cordoned",
            Fence::Deleting => "being deleted",
        })
    }
}

/// What matters about a Node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeFacts {
    /// Its name.
    pub name: NodeName,
    /// Whether it takes new pods.
    pub fence: Option<Fence>,
    /// CPU and memory that it has for pods, where it says so.
    pub allocatable: Option<Host>,
    /// Its labels.
    pub labels: Arc<Labels>,
    /// The images that it holds.
    pub images: Images,
}

/// The GPUs of a node.
#[derive(Clone, Debug, PartialEq)]
pub struct Inventory {
    /// The node's name.
    pub node: NodeName,
    /// Why nothing can be put on any of them, where that is so.
    pub closed: Option<Arc<str>>,
    /// The GPUs, in any order.
    pub gpus: Vec<GpuFacts>,
}

/// One GPU as its agent sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct GpuFacts {
    /// Its UUID.
    pub id: GpuId,
    /// Its index on the node.
    pub index: u32,
    /// The card's memory − what the driver keeps.
    pub usable: Bytes,
    /// Memory in use by all processes together, where NVML can say.
    pub used: Option<Bytes>,
    /// Memory in use by processes that are no pod of ours, where that is known apart.
    pub foreign: Option<Bytes>,
    /// Memory in use by each pod, for those where it is known.
    pub used_by: BTreeMap<PodUid, Bytes>,
    /// Why nothing new can be put on it, where that is so.
    pub closed: Option<Arc<str>>,
}

/// What matters about a pod.
#[derive(Clone, Debug, PartialEq)]
pub struct PodFacts {
    /// What it has on GPUs, and whose it is.
    pub entry: Entry,
    /// The node it is bound to. A pod without one has nothing yet.
    pub node: Option<NodeName>,
    /// Its containers have ended for good. A terminating pod's may not have.
    pub finished: bool,
    /// How far its start is.
    pub start: Start,
}

/// How far a pod's start is. While a model server loads, it takes memory and measures what others leave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// It is bound, and its container has never run: it has no memory yet.
    Bound {
        /// When it was bound, in milliseconds of the ledger's clock.
        since_ms: u64,
    },
    /// Its container loads, or is about to again.
    Loading {
        /// Since it was bound, or lost what it had loaded before.
        since_ms: u64,
    },
    /// It has been Ready since its container runs.
    Over,
}

impl Start {
    /// When it began, while it goes on.
    #[must_use]
    pub const fn since_ms(self) -> Option<u64> {
        match self {
            Start::Bound { since_ms } | Start::Loading { since_ms } => Some(since_ms),
            Start::Over => None,
        }
    }
}

/// What matters about a pod that asks for no GPU memory: what it takes from those that do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NeighbourFacts {
    /// Its UID.
    pub uid: PodUid,
    /// The node it is bound to.
    pub node: Option<NodeName>,
    /// CPU and memory that it asks.
    pub host: Host,
    /// Its containers have ended for good.
    pub finished: bool,
}

/// What one pod has on its node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The pod's UID.
    pub uid: PodUid,
    /// The pod's namespace.
    pub namespace: Arc<str>,
    /// The pod's name.
    pub name: Arc<str>,
    /// CPU and memory that it asks.
    pub host: Host,
    /// What it has on GPUs.
    pub claim: Claim,
}

/// Bytes on GPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Which GPUs; `None` for a pod that somebody else bound, which could be on any of its node.
    pub gpus: Option<Vec<GpuId>>,
    /// Bytes on each of them.
    pub bytes_per_gpu: Bytes,
    /// Whether others can be beside it.
    pub sharing: Sharing,
}

impl Claim {
    /// This request on these GPUs.
    #[must_use]
    pub fn of(request: &GpuRequest, gpus: Vec<GpuId>) -> Claim {
        Claim {
            gpus: Some(gpus),
            bytes_per_gpu: request.bytes_per_gpu,
            sharing: request.sharing,
        }
    }
}

/// The GPUs that a node has, or would have: usable bytes of each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeShape(pub Vec<Bytes>);
