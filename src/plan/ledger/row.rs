//! A node in one row: what every pod asks of every node.
//!
//! A page ([`NodeState`]) knows all about its node, in a dozen places of the memory. A scan over thousands of nodes for
//! one pod reads the rows instead, which lie side by side, and turns up the few pages that matter.

use smallvec::SmallVec;

use super::node::{GpuState, NodeState};
use crate::api::host::Host;
use crate::api::units::Bytes;

const GIB: u64 = 1 << 30;
const CORE: u64 = 1000;

/// One node's figures.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// Whether it takes new pods at all.
    pub open: bool,
    /// CPU and memory that no pod asked for.
    pub host: Host,
    /// Free bytes on all its GPUs together.
    pub free: Bytes,
    /// What it is like when it is empty.
    pub make: Make,
    /// Its GPUs, in the order of [`NodeState::gpus`].
    pub gpus: SmallVec<[Figures; 8]>,
}

/// One GPU's figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Figures {
    /// What a new pod can have of it.
    pub free: Bytes,
    /// What pods can have of it in all.
    pub usable: Bytes,
    /// Whether no pod is on it.
    pub empty: bool,
    /// Whether a new pod can be put on it at all: it works, and no other pod starts on it.
    pub open: bool,
}

/// What a node is like when it is empty, in whole units: machines of one type differ by some kilobytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Make {
    gpus: usize,
    usable_gib: u64,
    /// Cores and GiB, where it says so.
    host: Option<(u64, u64)>,
}

impl Make {
    fn of(node: &NodeState) -> Make {
        let host = |host: Host| (host.cpu.0 / CORE, host.memory.0 / GIB);
        Make {
            gpus: node.gpus().len(),
            usable_gib: node.usable().0 / GIB,
            host: node.allocatable().map(host),
        }
    }
}

impl From<&GpuState> for Figures {
    fn from(gpu: &GpuState) -> Figures {
        Figures {
            free: gpu.free,
            usable: gpu.usable,
            empty: gpu.tenants == 0,
            open: gpu.closed.is_none() && gpu.starting.is_none(),
        }
    }
}

impl Row {
    /// The row of this node if these were its GPUs, and so much CPU and memory were left.
    #[must_use]
    pub fn with(node: &NodeState, gpus: &[GpuState], host: Host) -> Row {
        Row {
            open: node.shut().is_none(),
            host,
            free: gpus.iter().map(|gpu| gpu.free).sum(),
            make: Make::of(node),
            gpus: gpus.iter().map(Figures::from).collect(),
        }
    }
}
