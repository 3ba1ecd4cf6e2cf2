//! Why a request does not fit, in words that `kubectl describe pod` shows.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use super::{count, has_room, nearness};
use crate::api::gpu_request::{GpuRequest, Sharing};
use crate::api::units::{Bytes, NodeName};
use crate::plan::ledger::{Fence, GpuState, NodeState, Shut, Starting};

/// Kinds whose words are kept; agents' own reasons, of which there may be many, are made each time beyond that.
const MOST_WORDS: usize = 16;

/// Why a request does not fit on one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeRefusal {
    /// The node takes nothing new.
    Shut(Shut),
    /// It has fewer working GPUs than asked.
    TooFewGpus {
        /// Working GPUs.
        has: usize,
        /// Asked GPUs.
        asked: usize,
    },
    /// Its cards are smaller than asked, even empty.
    CardTooSmall {
        /// Usable bytes of its largest card.
        largest: Bytes,
        /// Asked bytes.
        asked: Bytes,
    },
    /// Too few of its GPUs are without other pods.
    NoWholeCard {
        /// GPUs that are.
        empty: usize,
        /// Asked GPUs.
        asked: usize,
    },
    /// Too few of its GPUs have that much free.
    NoRoom {
        /// GPUs that have.
        fitting: usize,
        /// Asked GPUs.
        gpus: usize,
        /// The GPU that comes nearest.
        nearest: Miss,
    },
    /// It has room, on GPUs where another pod starts at present.
    Starting {
        /// The first of them.
        on: Busy,
    },
}

/// A GPU that takes the request as soon as another pod has started on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Busy {
    /// Its node.
    pub node: NodeName,
    /// Its index there.
    pub gpu: u32,
    /// The pod that starts.
    pub pod: Starting,
}

impl Busy {
    fn told(&self, now_ms: u64) -> String {
        let Busy { node, gpu, pod } = self;
        format!(
            "GPU {gpu} of {node}: {}: one start at a time per GPU",
            pod.told(now_ms)
        )
    }

    /// The one that began first is over first.
    fn order(&self) -> (u64, &NodeName, u32) {
        (self.pod.since_ms.unwrap_or(u64::MAX), &self.node, self.gpu)
    }
}

/// A GPU on which the request nearly fits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Miss {
    /// Its node.
    pub node: NodeName,
    /// Its index there.
    pub gpu: u32,
    /// Free bytes.
    pub free: Bytes,
    /// Asked bytes.
    pub asked: Bytes,
    /// Bytes in use beyond what its pods declared.
    pub foreign: Bytes,
    /// Whether no pod is on it.
    pub empty: bool,
}

impl fmt::Display for Miss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "GPU {} of {} has {} free, {} asked",
            self.gpu, self.node, self.free, self.asked
        )?;
        match (self.foreign, self.empty) {
            (Bytes(0), _) => Ok(()),
            // Without figures per process, a pod that takes more than it declared looks the same.
            (foreign, false) => write!(f, "; {foreign} are in use beyond what its pods declared"),
            (foreign, true) => write!(f, "; {foreign} held by processes outside Kubernetes"),
        }
    }
}

impl NodeRefusal {
    /// Whether both have the same words, where both are for the same request.
    fn is_like(&self, other: &NodeRefusal) -> bool {
        match (self, other) {
            (NodeRefusal::Shut(shut), NodeRefusal::Shut(other)) => shut == other,
            _ => std::mem::discriminant(self) == std::mem::discriminant(other),
        }
    }

    /// Whether evicting pods from the node could make the request fit there. A start is over soon enough by itself.
    #[must_use]
    pub fn evicting_could_help(&self) -> bool {
        matches!(self, NodeRefusal::NoRoom { .. } | NodeRefusal::NoWholeCard { .. })
    }
}

/// The same words for all nodes with the same trouble, so that the scheduler's message counts them.
impl fmt::Display for NodeRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NodeRefusal::Shut(Shut::NoNode) => f.write_str("no such node"),
            NodeRefusal::Shut(Shut::NoInventory) => f.write_str("no GPU told of by an ebb-agent"),
            NodeRefusal::Shut(Shut::Closed(why)) => write!(f, "GPUs not usable: {why}"),
            NodeRefusal::Shut(Shut::Fenced(fence)) => write!(f, "{fence}"),
            NodeRefusal::TooFewGpus { asked, .. } => write!(f, "fewer than {asked} working GPUs"),
            NodeRefusal::CardTooSmall { asked, .. } => {
                write!(f, "no GPU with {asked} of memory, even empty")
            }
            NodeRefusal::NoWholeCard { asked: 1, .. } => f.write_str("no GPU without other pods"),
            NodeRefusal::NoWholeCard { asked, .. } => write!(f, "fewer than {asked} GPUs without other pods"),
            NodeRefusal::NoRoom { gpus: 1, nearest, .. } => {
                write!(f, "no GPU with {} free", nearest.asked)
            }
            NodeRefusal::NoRoom { gpus, nearest, .. } => {
                write!(f, "fewer than {gpus} GPUs with {} free", nearest.asked)
            }
            NodeRefusal::Starting { .. } => {
                f.write_str("another pod is starting where it has room: one start at a time per GPU")
            }
        }
    }
}

/// The reasons of many nodes in as few different texts as possible, since the scheduler's message counts equal ones:
/// each kind's words, and for the node that comes nearest its GPU and figures.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reasons {
    now_ms: u64,
    nearest: Option<Miss>,
    /// Boxed, as an error it is part of is passed around.
    busy: Option<Busy>,
    /// The words of each kind, once they have been made.
    words: Vec<(NodeRefusal, Arc<str>)>,
}

impl Reasons {
    /// No reason yet, at this moment of the ledger's clock.
    #[must_use]
    pub fn at(now_ms: u64) -> Self {
        Self {
            now_ms,
            ..Self::default()
        }
    }

    /// Looks at one node's reason; all are looked at before any text is made.
    pub fn see(&mut self, refusal: &NodeRefusal) {
        match refusal {
            NodeRefusal::NoRoom { nearest, .. }
                if self
                    .nearest
                    .as_ref()
                    .is_none_or(|known| nearness(nearest) < nearness(known)) =>
            {
                self.nearest = Some(nearest.clone());
            }
            NodeRefusal::Starting { on }
                if self.busy.as_ref().is_none_or(|known| on.order() < known.order()) =>
            {
                self.busy = Some(on.clone());
            }
            _ => {}
        }
    }

    /// The text for one node; all of them are for the same request.
    pub fn text(&mut self, refusal: &NodeRefusal) -> Arc<str> {
        match refusal {
            NodeRefusal::NoRoom { nearest, .. } if Some(nearest) == self.nearest.as_ref() => {
                return nearest.to_string().into();
            }
            NodeRefusal::Starting { on } if Some(on) == self.busy.as_ref() => {
                return on.told(self.now_ms).into();
            }
            _ => {}
        }
        if let Some((_, words)) = self.words.iter().find(|(known, _)| known.is_like(refusal)) {
            return words.clone();
        }
        let words: Arc<str> = refusal.to_string().into();
        if self.words.len() < MOST_WORDS {
            self.words.push((refusal.clone(), words.clone()));
        }
        words
    }
}

/// Why a request fits on no node: the GPU nodes counted by reason, and the nearest miss.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    request: GpuRequest,
    reasons: BTreeMap<Arc<str>, usize>,
    /// Boxed, as this is an error that is passed around.
    nearest: Box<Reasons>,
    fenced: usize,
}

impl Refusal {
    /// A refusal by no node yet, at this moment of the ledger's clock.
    #[must_use]
    pub fn new(request: &GpuRequest, now_ms: u64) -> Self {
        Self {
            request: request.clone(),
            reasons: BTreeMap::new(),
            nearest: Box::new(Reasons::at(now_ms)),
            fenced: 0,
        }
    }

    /// Counts a node whose GPUs have no room.
    pub fn add(&mut self, node: &NodeState, reason: &NodeRefusal) {
        debug_assert!(!matches!(reason, NodeRefusal::NoRoom { nearest, .. } if nearest.node != *node.name()));
        if !node.is_gpu_node() {
            return;
        }
        if matches!(reason, NodeRefusal::Shut(Shut::Fenced(Fence::Releasing))) {
            self.fenced += 1;
        }
        self.count(node, reason);
        self.nearest.see(reason);
    }

    /// Counts a node that has another reason than its GPUs.
    pub fn count(&mut self, node: &NodeState, reason: &dyn fmt::Display) {
        // On a cluster with many other nodes, "no GPU" would drown the rest.
        if node.is_gpu_node() {
            *self.reasons.entry(reason.to_string().into()).or_default() += 1;
        }
    }

    /// The GPU on which it nearly fits.
    #[must_use]
    pub fn nearest(&self) -> Option<&Miss> {
        self.nearest.nearest.as_ref()
    }

    /// The GPU that takes it as soon as another pod has started there: it waits for that, and not for room.
    #[must_use]
    pub fn waits_for(&self) -> Option<&Busy> {
        self.nearest.busy.as_ref()
    }

    /// Nodes that Ebb is emptying; taking one back might make room.
    #[must_use]
    pub fn releasing(&self) -> usize {
        self.fenced
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let GpuRequest {
            gpus,
            bytes_per_gpu,
            sharing,
        } = &self.request;
        if let Some(busy) = self.waits_for() {
            return write!(f, "waiting for a start: {}", busy.told(self.nearest.now_ms));
        }
        match self.reasons.values().sum::<usize>() {
            0 => f.write_str("there is no GPU node with room for ")?,
            1 => f.write_str("0 of 1 GPU node has room for ")?,
            nodes => write!(f, "0 of {nodes} GPU nodes have room for ")?,
        }
        match (gpus.get(), sharing) {
            (1, Sharing::Shared) => write!(f, "{bytes_per_gpu} on one GPU")?,
            (n, Sharing::Shared) => write!(f, "{bytes_per_gpu} on each of {n} GPUs")?,
            (1, Sharing::Exclusive) => write!(f, "a whole GPU of {bytes_per_gpu}")?,
            (n, Sharing::Exclusive) => write!(f, "{n} whole GPUs of {bytes_per_gpu}")?,
        }
        // The commonest first; of equals, by their words.
        let mut reasons: Vec<_> = self.reasons.iter().collect();
        reasons.sort_by_key(|(_, nodes)| Reverse(**nodes));
        for (position, (reason, nodes)) in reasons.into_iter().enumerate() {
            let separator = if position == 0 { ":" } else { "," };
            write!(f, "{separator} {nodes} {reason}")?;
        }
        match self.nearest() {
            Some(nearest) => write!(f, "; nearest: {nearest}"),
            None => Ok(()),
        }
    }
}

/// Why the request does not fit on these GPUs; called when it does not.
pub(super) fn why(node: &NodeState, gpus: &[GpuState], request: &GpuRequest) -> NodeRefusal {
    let asked = count(request);
    let working = || gpus.iter().filter(|gpu| gpu.closed.is_none());
    if working().count() < asked {
        return NodeRefusal::TooFewGpus {
            has: working().count(),
            asked,
        };
    }
    let large = || working().filter(|gpu| gpu.usable >= request.bytes_per_gpu);
    if large().count() < asked {
        return NodeRefusal::CardTooSmall {
            largest: working().map(|gpu| gpu.usable).max().unwrap_or_default(),
            asked: request.bytes_per_gpu,
        };
    }
    if request.sharing == Sharing::Exclusive {
        let empty = large().filter(|gpu| gpu.tenants == 0).count();
        if empty < asked {
            return NodeRefusal::NoWholeCard { empty, asked };
        }
    }
    let busy = || large().filter(|gpu| has_room(gpu, request));
    if busy().count() >= asked {
        let on = busy().filter_map(|gpu| {
            Some(Busy {
                node: node.name().clone(),
                gpu: gpu.index,
                pod: gpu.starting.clone()?,
            })
        });
        if let Some(on) = on.min_by(|a, b| a.order().cmp(&b.order())) {
            return NodeRefusal::Starting { on };
        }
    }
    let nearest = large()
        .filter(|gpu| gpu.free < request.bytes_per_gpu)
        .map(|gpu| Miss {
            node: node.name().clone(),
            gpu: gpu.index,
            free: gpu.free,
            asked: request.bytes_per_gpu,
            foreign: gpu.foreign,
            empty: gpu.tenants == 0,
        })
        .min_by(|a, b| nearness(a).cmp(&nearness(b)));
    NodeRefusal::NoRoom {
        fitting: large().filter(|gpu| gpu.free >= request.bytes_per_gpu).count(),
        gpus: asked,
        // There is one: enough cards are large and empty enough, and yet too few have room.
        nearest: nearest.unwrap_or(Miss {
            node: node.name().clone(),
            gpu: 0,
            free: Bytes(0),
            asked: request.bytes_per_gpu,
            foreign: Bytes(0),
            empty: true,
        }),
    }
}
