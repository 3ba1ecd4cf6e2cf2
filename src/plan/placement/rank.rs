//! Which node, and which of its GPUs, a pod is best put on.
//!
//! - *fragmentation*: the place whose gradient is the smallest ([`super::outlook`]) among those on the
//!   [`super::shortlist`].
//! - *best fit*: the tightest place on a node in use.
//! - *spread*: the most room.
//!
//! Ties go to a node in use, the tightest GPUs, the fullest node, the one that holds the most of the pod's images, the
//! first by name. The same nodes, request and hands give the same answer, in whatever order the nodes come.

#[cfg(test)]
#[path = "rank_tests.rs"]
pub(super) mod tests;

use std::cmp::Reverse;

use super::hands::{Hands, PARTS, total};
use super::mix::Want;
use super::outlook::{Counted, NodeRoom};
use super::shortlist::{Listed, Seen, Shortlist, Warm};
use super::{Choice, MAX_SCORE, NodeRefusal, beside, open, refusal};
use crate::api::gpu_request::Sharing;
use crate::api::host::Host;
use crate::api::packing::Packing;
use crate::api::units::{Bytes, NodeName, PodUid};
use crate::plan::ledger::{Image, NodeState};
use crate::plan::room::{self, Picked};

/// Different GPUs of a node that are looked at closely for a share of one, the tightest.
const OF_EACH_NODE: usize = 4;
/// Using an empty node costs as much as wasting this part of a mean request: it could be given back. Enough to outweigh
/// what is chance in the hands, and not what counts.
const OPENING: u128 = 8;

/// What places are judged by.
#[derive(Clone, Copy, Debug)]
pub struct Judge<'a> {
    /// The way.
    pub packing: Packing,
    /// The requests that may come.
    pub hands: &'a Hands,
    /// The pod's images: of nodes that are as good for GPU memory, one that holds more of them is better.
    pub images: &'a [Image],
}

impl Judge<'_> {
    /// Without any request to expect there is nothing to leave room for.
    pub(super) fn packing(&self) -> Packing {
        match self.packing {
            Packing::Fragmentation if self.hands.is_empty() => Packing::BestFit,
            packing => packing,
        }
    }
}

/// A place as it is ordered, the best first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    /// What the pod being there costs others: what it adds to the node's waste, what it takes from requests that can go
    /// nowhere else, and an empty node. In bytes × hands × [`PARTS`].
    gradient: i128,
    opens_node: bool,
    left_on_gpus: Bytes,
    free_on_node: Bytes,
    /// A pull is saved where that costs no GPU memory.
    warm: Warm,
    host: Host,
    picked: Picked,
}

/// Places in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranking {
    /// Positions of the nodes that were looked at in the list that was given, the best first, with the pod's GPUs there.
    pub order: Vec<(usize, Choice)>,
    /// Positions of the nodes in the same state as the best.
    equals: Vec<usize>,
    /// Nodes that were given.
    nodes: usize,
}

impl Ranking {
    /// What the scheduler is told of each node, in the order they were given. Only the best has the highest score, so
    /// that other scorers' small differences do not make its equal win; the next ones follow by one each.
    #[must_use]
    pub fn scores(&self) -> Vec<u8> {
        let mut scores = vec![0; self.nodes];
        for ((node, _), score) in self
            .order
            .iter()
            .zip((1..=MAX_SCORE).rev().chain(std::iter::repeat(1)))
        {
            scores[*node] = score;
        }
        scores
    }

    /// The same for a pod that says itself which nodes it prefers: nodes in the same state as the best have its score,
    /// and kube-scheduler's own scorers decide among them.
    #[must_use]
    pub fn scores_of_equals(&self) -> Vec<u8> {
        let mut scores = self.scores();
        for node in &self.equals {
            scores[*node] = MAX_SCORE;
        }
        scores
    }
}

/// The GPUs that a pod is best given on this node. What is held for `asker` itself counts as free.
///
/// # Errors
/// Why it does not fit.
pub fn place(
    node: &NodeState,
    want: &Want,
    asker: Option<&PodUid>,
    judge: Judge<'_>,
) -> Result<Choice, NodeRefusal> {
    open(node)?;
    let seen = Seen::new(node, asker);
    match (
        best_on(
            &seen.room(judge.hands),
            Warm::default(),
            want,
            judge,
            &mut judge.hands.counted(),
        ),
        &want.gpus,
    ) {
        (Some(rank), _) => Ok(seen.choice(rank.picked)),
        (None, Some(request)) => Err(refusal::why(node, seen.gpus(), request)),
        (None, None) => Ok(Choice::default()),
    }
}

/// Orders the nodes by where the pod is best put. Nodes where it does not fit, or that take nothing new, are left out.
#[must_use]
pub fn rank<'n>(
    nodes: impl IntoIterator<Item = &'n NodeState>,
    want: &Want,
    asker: Option<&PodUid>,
    judge: Judge<'_>,
) -> Ranking {
    let mut shortlist = Shortlist::new(want, judge);
    let mut count = 0;
    for (position, node) in nodes.into_iter().enumerate() {
        count = position + 1;
        shortlist.look(position, Seen::new(node, asker));
    }
    order(shortlist.listed(), want, judge, count)
}

/// Orders the nodes of a shortlist, `count` of which were given.
pub(super) fn order<'n>(
    listed: impl Iterator<Item = Listed<'n>>,
    want: &Want,
    judge: Judge<'_>,
    count: usize,
) -> Ranking {
    let mut counted = judge.hands.counted();
    let mut places: Vec<(Rank, &NodeName, Listed<'_>)> = listed
        .filter_map(|listed| {
            let (room, warm) = (listed.seen.room(judge.hands), listed.seen.warm(judge));
            let rank = best_on(&room, warm, want, judge, &mut counted)?;
            Some((rank, listed.seen.node.name(), listed))
        })
        .collect();
    if judge.packing() == Packing::Fragmentation {
        places.sort_by(|a, b| (&a.0, a.1).cmp(&(&b.0, b.1)));
    }
    Ranking {
        equals: places
            .first()
            .map_or_else(Vec::new, |(_, _, best)| best.equals.clone()),
        order: places
            .into_iter()
            .map(|(rank, _, listed)| (listed.position, listed.seen.choice(rank.picked)))
            .collect(),
        nodes: count,
    }
}

/// The best GPUs of one node, and how good they are.
fn best_on(
    room: &NodeRoom,
    warm: Warm,
    want: &Want,
    judge: Judge<'_>,
    counted: &mut Counted,
) -> Option<Rank> {
    let packing = judge.packing();
    let hands = judge.hands;
    let opens_node = !room.gpus.is_empty() && room.gpus.iter().all(|gpu| gpu.empty);
    let before = match packing {
        Packing::Fragmentation => counted.waste(room, hands),
        Packing::BestFit | Packing::Spread => 0,
    };
    let opening = match opens_node {
        true => u128::from(PARTS) * hands.len() as u128 * u128::from(hands.mean().0) / OPENING,
        false => 0,
    };
    let taken = match (packing, &want.gpus) {
        (Packing::Fragmentation, Some(request)) => {
            total(request) * u128::from(hands.price(&room.meets)) * hands.len() as u128
        }
        _ => 0,
    };
    options(room, want, packing)
        .into_iter()
        .map(|picked| {
            let mut after = room.clone();
            after.host = after.host.saturating_sub(want.host);
            let mut left_on_gpus = Bytes(0);
            if let Some(request) = &want.gpus {
                let given = room
                    .gpus
                    .iter()
                    .enumerate()
                    .filter(|(position, _)| picked.has(*position));
                left_on_gpus = given.map(|(_, gpu)| beside(gpu.free, gpu.usable, request)).sum();
                room::give(&mut after.gpus, request, picked);
            }
            let gradient = match packing {
                Packing::Fragmentation => {
                    signed(counted.waste(&after, hands) + opening + taken) - signed(before)
                }
                Packing::BestFit | Packing::Spread => 0,
            };
            Rank {
                gradient,
                opens_node,
                left_on_gpus,
                free_on_node: room.free(),
                warm,
                host: room.host,
                picked,
            }
        })
        .min()
}

/// GPUs that come into question for the request: some different ones for a share of a single GPU, else the tightest, or
/// the emptiest to spread.
fn options(room: &NodeRoom, want: &Want, packing: Packing) -> Vec<Picked> {
    let Some(request) = &want.gpus else {
        return vec![Picked::default()];
    };
    let one_share = request.gpus.get() == 1 && request.sharing == Sharing::Shared;
    match packing {
        Packing::Fragmentation if one_share => {
            let gpus = &room.gpus[..room.gpus.len().min(Picked::MOST)];
            let fitting = (0..gpus.len()).filter(|position| gpus[*position].takes(request));
            let mut different: Vec<usize> = fitting
                .filter(|position| !gpus[..*position].contains(&gpus[*position]))
                .collect();
            different.sort_by_key(|position| (gpus[*position].free, gpus[*position]));
            different.truncate(OF_EACH_NODE);
            let picked = different.into_iter();
            picked.map(|position| Picked::default().with(position)).collect()
        }
        Packing::Fragmentation | Packing::BestFit => room::pick(&room.gpus, request, |gpu| gpu.free)
            .into_iter()
            .collect(),
        Packing::Spread => room::pick(&room.gpus, request, |gpu| Reverse(gpu.free))
            .into_iter()
            .collect(),
    }
}

fn signed(bytes: u128) -> i128 {
    i128::try_from(bytes).unwrap_or(i128::MAX)
}
