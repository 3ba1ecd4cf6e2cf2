//! Where a request fits: per node the GPUs it would get, or why it does not fit; among nodes, which one to prefer.
//!
//! [`fit`] and its like ask for room and nothing else. [`rank`] and [`place`] choose among the places that have room, by
//! what a [`Judge`] is told: the way to pack, and the [`Mix`] of requests that the cluster really gets. [`survey`] is the
//! first look at all nodes: which have room, and which of those `rank` would look at. The same ledger, request and mix
//! give the same answer, always.

mod hands;
mod mix;
mod outlook;
mod rank;
mod refusal;
mod shortlist;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;

pub use hands::{Field, Hands};
pub use mix::{Mix, Needs, REMEMBERED, Want};
pub use rank::{Judge, Ranking, place, rank};
pub use refusal::{Busy, Miss, NodeRefusal, Reasons, Refusal};
pub use shortlist::{Survey, survey};

use super::ledger::{Figures, GpuState, Ledger, NodeShape, NodeState, Row};
use super::room::GpuRoom;
use crate::api::gpu_request::{GpuRequest, Sharing};
use crate::api::units::{Bytes, GpuId, NodeName, PodUid};

/// The highest score of a node, as the scheduler's extender protocol has it.
pub const MAX_SCORE: u8 = 10;

/// The GPUs that a request gets on a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// The GPUs, by index.
    pub gpus: Vec<GpuId>,
    /// Usable memory of the smallest of them: what the share is a fraction of.
    pub usable: Bytes,
}

/// The tightest GPUs that the request could get on this node. What is held for `asker` itself counts as free.
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

/// The tightest GPUs that the request could get on this node if these pods were not there.
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

/// A node where the request fits, the first by name.
///
/// # Errors
/// Why it fits nowhere, with counts and the nearest miss.
pub fn somewhere(ledger: &Ledger, request: &GpuRequest) -> Result<NodeName, Refusal> {
    let mut refusal = Refusal::new(request, ledger.now_ms());
    let mut first: Option<&NodeName> = None;
    for node in ledger.nodes() {
        if fits(node.row(), request) {
            if first.is_none_or(|known| node.name() < known) {
                first = Some(node.name());
            }
        } else if let Err(reason) = fit(node, request, None) {
            refusal.add(node, &reason);
        }
    }
    first.cloned().ok_or(refusal)
}

/// Whether the request fits on any node now.
///
/// # Errors
/// Why it does not, with counts and the nearest miss.
pub fn fits_anywhere(ledger: &Ledger, request: &GpuRequest) -> Result<(), Refusal> {
    if ledger.nodes().any(|node| fits(node.row(), request)) {
        return Ok(());
    }
    somewhere(ledger, request).map(|_| ())
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

fn open(node: &NodeState) -> Result<(), NodeRefusal> {
    node.shut().map_or(Ok(()), |shut| Err(NodeRefusal::Shut(shut)))
}

fn count(request: &GpuRequest) -> usize {
    usize::try_from(request.gpus.get()).unwrap_or(usize::MAX)
}

/// Whether a pod that does not have anything there yet has room.
fn fits(row: &Row, request: &GpuRequest) -> bool {
    row.open && row.gpus.iter().filter(|gpu| offers(gpu, request)).count() >= count(request)
}

fn takes(gpu: &GpuState, request: &GpuRequest) -> bool {
    offers(&Figures::from(gpu), request)
}

/// Whether it takes the request once no other pod starts on it.
fn has_room(gpu: &GpuState, request: &GpuRequest) -> bool {
    gpu.closed.is_none()
        && gpu.settled >= request.bytes_per_gpu
        && (request.sharing == Sharing::Shared || gpu.tenants == 0)
}

fn offers(gpu: &Figures, request: &GpuRequest) -> bool {
    gpu.open && gpu.free >= request.bytes_per_gpu && (request.sharing == Sharing::Shared || gpu.empty)
}

/// What is left beside the request on one GPU. The rest of a whole card is lost to others: the smallest card that does
/// is best.
fn beside(free: Bytes, usable: Bytes, request: &GpuRequest) -> Bytes {
    match request.sharing {
        Sharing::Shared => free.saturating_sub(request.bytes_per_gpu),
        Sharing::Exclusive => usable.saturating_sub(request.bytes_per_gpu),
    }
}

fn choose(node: &NodeState, gpus: &[GpuState], request: &GpuRequest) -> Result<Choice, NodeRefusal> {
    let asked = count(request);
    let fitting = || gpus.iter().filter(|gpu| takes(gpu, request));
    if fitting().count() < asked {
        return Err(refusal::why(node, gpus, request));
    }
    let mut fitting: Vec<&GpuState> = fitting().collect();
    // A stable sort: GPUs of equal room stay in the order of their indices.
    fitting.sort_by_key(|gpu| gpu.free);
    fitting.truncate(asked);
    fitting.sort_by_key(|gpu| gpu.index);
    Ok(Choice {
        usable: fitting.iter().map(|gpu| gpu.usable).min().unwrap_or_default(),
        gpus: fitting.into_iter().map(|gpu| gpu.id.clone()).collect(),
    })
}

/// What a plan about nodes sees: a start that goes on is soon over.
impl From<&GpuState> for GpuRoom {
    fn from(gpu: &GpuState) -> GpuRoom {
        GpuRoom {
            usable: gpu.usable,
            free: gpu.settled,
            empty: gpu.tenants == 0,
            exclusive: gpu.whole,
        }
    }
}

/// What a pod that is placed now sees: where another one starts, there is no room.
#[must_use]
pub fn room_now(gpu: &GpuState) -> GpuRoom {
    let room = GpuRoom::from(gpu);
    match gpu.starting {
        None => room,
        Some(_) => GpuRoom {
            free: Bytes(0),
            ..room
        },
    }
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
