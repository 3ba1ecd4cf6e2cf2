//! Where a request fits: per node the GPUs it would get, or why it does not fit; among nodes, which one to prefer.
//!
//! Tight packing. On a node the request goes to the GPUs that it leaves the least on; among nodes, one that is in use
//! already comes before an empty one (the node is what costs), then the tightest GPUs, then the fullest node, then the
//! name. The same ledger and request give the same answer, always.

mod refusal;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;

pub use refusal::{Miss, NodeRefusal, Reasons, Refusal};

use super::ledger::{GpuState, Ledger, NodeShape, NodeState};
use crate::api::gpu_request::{GpuRequest, Sharing};
use crate::api::units::{Bytes, GpuId, NodeName, PodUid};

/// The highest score of a node, as the scheduler's extender protocol has it.
pub const MAX_SCORE: u8 = 10;

/// The GPUs that a request gets on a node, and how good that is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The GPUs, by index.
    pub gpus: Vec<GpuId>,
    /// Usable memory of the smallest of them: what the share is a fraction of.
    pub usable: Bytes,
    rank: Rank,
}

/// How good a choice is; the smaller, the better. Everything about preference among nodes is in here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    opens_node: bool,
    left_on_gpus: Bytes,
    free_on_node: Bytes,
}

/// The GPUs that the request would get on this node. What is held for `asker` itself counts as free.
///
/// # Errors
/// Why it does not fit.
pub fn fit(node: &NodeState, request: &GpuRequest, asker: Option<&PodUid>) -> Result<Choice, NodeRefusal> {
    open(node)?;
    match asker.filter(|uid| node.holds_for(uid)) {
        None => choose(node, node.gpus(), request),
        Some(asker) => choose(node, &node.gpus_without(&|uid| uid == asker), request),
    }
}

/// The GPUs that the request would get on this node if these pods were not there.
///
/// # Errors
/// Why it would not fit even then.
pub fn fit_without(
    node: &NodeState,
    request: &GpuRequest,
    absent: &dyn Fn(&PodUid) -> bool,
) -> Result<Choice, NodeRefusal> {
    open(node)?;
    choose(node, &node.gpus_without(absent), request)
}

/// Whether the request fits on exactly these GPUs of the node now.
#[must_use]
pub fn still_fits(node: &NodeState, request: &GpuRequest, gpus: &[GpuId], asker: &PodUid) -> bool {
    let states = node.gpus_without(&|uid| uid == asker);
    open(node).is_ok()
        && gpus.len() == count(request)
        && gpus
            .iter()
            .all(|id| states.iter().any(|gpu| gpu.id == *id && takes(gpu, request)))
}

/// The best node for the request among all, and its GPUs there.
///
/// # Errors
/// Why it fits nowhere, with counts and the nearest miss.
pub fn best(ledger: &Ledger, request: &GpuRequest) -> Result<(NodeName, Choice), Refusal> {
    let mut refusal = Refusal::new(request);
    let mut best: Option<(&NodeName, Choice)> = None;
    for node in ledger.nodes() {
        match fit(node, request, None) {
            Err(reason) => refusal.add(node.name(), reason),
            Ok(choice) => {
                let better = best
                    .as_ref()
                    .is_none_or(|(name, known)| (choice.rank, node.name()) < (known.rank, name));
                if better {
                    best = Some((node.name(), choice));
                }
            }
        }
    }
    best.map(|(name, choice)| (name.clone(), choice)).ok_or(refusal)
}

/// Whether the request fits on any node now.
///
/// # Errors
/// Why it does not, with counts and the nearest miss.
pub fn fits_anywhere(ledger: &Ledger, request: &GpuRequest) -> Result<(), Refusal> {
    if ledger.nodes().any(|node| fit(node, request, None).is_ok()) {
        return Ok(());
    }
    best(ledger, request).map(|_| ())
}

/// Whether the request would fit on an empty node of this shape: whether asking for one would help.
#[must_use]
pub fn fits_empty(shape: &NodeShape, request: &GpuRequest) -> bool {
    shape
        .0
        .iter()
        .filter(|usable| **usable >= request.bytes_per_gpu)
        .count()
        >= count(request)
}

/// The scores of these nodes, in their order, and which one is meant to win. Only the winner has the highest score,
/// so that other scorers' small differences do not make one of its equals win instead.
#[must_use]
pub fn scores(candidates: &[(&NodeState, Choice)]) -> (Vec<u8>, Option<usize>) {
    let winner = (0..candidates.len()).min_by_key(|index| {
        let (node, choice) = &candidates[*index];
        (choice.rank, node.name())
    });
    let scores = candidates
        .iter()
        .enumerate()
        .map(|(index, (node, choice))| {
            if Some(index) == winner {
                MAX_SCORE
            } else if choice.rank.opens_node {
                0
            } else {
                1 + eighths_taken(node)
            }
        })
        .collect();
    (scores, winner)
}

/// How full a node is: 0 to 7.
fn eighths_taken(node: &NodeState) -> u8 {
    let usable = u128::from(node.usable().0).max(1);
    let taken = u128::from(node.usable().saturating_sub(node.free()).0);
    u8::try_from((taken * 8 / usable).min(7)).unwrap_or(7)
}

fn open(node: &NodeState) -> Result<(), NodeRefusal> {
    node.shut().map_or(Ok(()), |shut| Err(NodeRefusal::Shut(shut)))
}

fn count(request: &GpuRequest) -> usize {
    usize::try_from(request.gpus.get()).unwrap_or(usize::MAX)
}

fn takes(gpu: &GpuState, request: &GpuRequest) -> bool {
    gpu.closed.is_none()
        && gpu.free >= request.bytes_per_gpu
        && (request.sharing == Sharing::Shared || gpu.tenants == 0)
}

fn choose(node: &NodeState, gpus: &[GpuState], request: &GpuRequest) -> Result<Choice, NodeRefusal> {
    let asked = count(request);
    let mut fitting: Vec<&GpuState> = gpus.iter().filter(|gpu| takes(gpu, request)).collect();
    if fitting.len() < asked {
        return Err(refusal::why(node, gpus, request));
    }
    // A stable sort: GPUs of equal room stay in the order of their indices.
    fitting.sort_by_key(|gpu| gpu.free);
    fitting.truncate(asked);
    fitting.sort_by_key(|gpu| gpu.index);
    let left = |gpu: &&GpuState| match request.sharing {
        Sharing::Shared => gpu.free.saturating_sub(request.bytes_per_gpu),
        // The rest of a whole card is lost to others: the smallest card that does is best.
        Sharing::Exclusive => gpu.usable.saturating_sub(request.bytes_per_gpu),
    };
    let left_on_gpus: Bytes = fitting.iter().map(left).sum();
    Ok(Choice {
        usable: fitting.iter().map(|gpu| gpu.usable).min().unwrap_or_default(),
        rank: Rank {
            opens_node: gpus.iter().all(|gpu| gpu.tenants == 0),
            left_on_gpus,
            free_on_node: gpus.iter().map(|gpu| gpu.free).sum(),
        },
        gpus: fitting.into_iter().map(|gpu| gpu.id.clone()).collect(),
    })
}

/// Nearest misses first: the one that lacks the least, then by node and GPU.
fn nearness(miss: &Miss) -> (Bytes, Reverse<Bytes>, &NodeName, u32) {
    (
        miss.asked.saturating_sub(miss.free),
        Reverse(miss.free),
        &miss.node,
        miss.gpu,
    )
}
