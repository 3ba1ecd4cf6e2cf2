//! The outlook of a node: how much of its free GPU memory will be of no use.
//!
//! Weng et al. (USENIX ATC'23) call free GPU memory a fragment, for a request, where it cannot be given to it, and take
//! the expectation over the requests that come. They look one request ahead. Here the node is filled with the requests
//! that come, as in [`Hands`], as long as any of them fits: what is left over at the end, GPU memory beside too little
//! CPU included, is what the placement before it has wasted. The paper's measure counts beside it, with less weight: it
//! alone sees that a node takes no large request any more, whatever else still fills it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use foldhash::fast::FixedState;

use super::hands::{Card, Hands, PARTS};
use crate::api::gpu_request::Sharing;
use crate::api::host::Host;
use crate::api::units::Bytes;
use crate::plan::room::{self, GpuRoom};

/// How much less than bytes left over, bytes that cannot be given to a request count: they may yet be given to another.
const SCARCE: u128 = 16;
/// Rooms remembered, of some 400 bytes each.
const MOST: usize = 1 << 14;

/// What a node has left.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeRoom {
    /// CPU and memory.
    pub host: Host,
    /// Its GPUs that work.
    pub gpus: Vec<GpuRoom>,
    /// For each of the [`Hands`]' needs, whether the node meets it.
    pub meets: Vec<bool>,
}

impl NodeRoom {
    /// Free bytes on all its GPUs together.
    #[must_use]
    pub fn free(&self) -> Bytes {
        self.gpus.iter().map(|gpu| gpu.free).sum()
    }
}

/// What was counted once: with the same hands, nodes with the same room are as good. Most pods ask what others have
/// asked before, and from one pod to the next one node changes.
#[derive(Debug, Default)]
pub struct Counted {
    known: HashMap<NodeRoom, u128, FixedState>,
    scratch: Vec<GpuRoom>,
}

impl Counted {
    /// How good the node's free GPU memory is, the lower, the better: in bytes × hands × [`PARTS`].
    #[must_use]
    pub fn waste(&mut self, node: &NodeRoom, hands: &Hands) -> u128 {
        if let Some(waste) = self.known.get(node) {
            return *waste;
        }
        let waste = leftover(node, hands, &mut self.scratch) * u128::from(PARTS)
            + fragments(node, hands) * hands.len() as u128 / SCARCE;
        if self.known.len() == MOST {
            self.known.clear();
        }
        self.known.insert(node.clone(), waste);
        waste
    }
}

/// The [`Counted`] of some hands. It changes nothing about them, so copies begin with an empty one and all are equal.
#[derive(Debug, Default)]
pub struct Memory(Mutex<Counted>);

impl Memory {
    pub(super) fn open(&self) -> MutexGuard<'_, Counted> {
        // What is in it is right at any moment.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clone for Memory {
    fn clone(&self) -> Self {
        Memory::default()
    }
}

impl PartialEq for Memory {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Memory {}

/// Bytes that cannot be given to a request now, in the mean over the requests' weights, times [`PARTS`]: the paper's
/// measure, where a request weighs what it asks, which is what is lost when it finds no place, and what it asks weighs
/// the more the less there is for it.
fn fragments(node: &NodeRoom, hands: &Hands) -> u128 {
    let free = u128::from(node.free().0);
    let kinds = hands.kinds().iter();
    kinds
        .map(|(card, weight)| u128::from(*weight) * (free - of_use(node, card)))
        .sum()
}

/// Free bytes that requests like this one could get now, in whole requests: the paper counts what is free on each GPU
/// that takes one, and so finds two halves of a card as good as a whole one.
pub(super) fn of_use(node: &NodeRoom, card: &Card) -> u128 {
    if !node.meets[card.needs] || !node.host.holds(card.host) {
        return 0;
    }
    let (mut gpus, mut bytes) = (0, 0);
    for gpu in node.gpus.iter().filter(|gpu| gpu.takes(&card.gpus)) {
        gpus += 1;
        bytes += match card.gpus.sharing {
            Sharing::Shared => u128::from(gpu.free.0 - gpu.free.0 % card.gpus.bytes_per_gpu.0.max(1)),
            Sharing::Exclusive => u128::from(gpu.free.0),
        };
    }
    if gpus >= card.gpus.gpus.get() { bytes } else { 0 }
}

/// Bytes that are left over when the node is filled, summed over all hands.
fn leftover(node: &NodeRoom, hands: &Hands, scratch: &mut Vec<GpuRoom>) -> u128 {
    let most = |gpus: &[GpuRoom]| gpus.iter().map(|gpu| gpu.free).max().unwrap_or_default();
    let mut sum = 0;
    for hand in hands.ahead(node.free()) {
        scratch.clone_from(&node.gpus);
        let (mut host, mut largest) = (node.host, most(scratch));
        for card in hand {
            // Most cards end here: the node is nearly full.
            if card.gpus.bytes_per_gpu > largest || !node.meets[card.needs] || !host.holds(card.host) {
                continue;
            }
            if room::take(scratch, &card.gpus) {
                host = host.saturating_sub(card.host);
                largest = most(scratch);
                if largest < hands.smallest() {
                    break;
                }
            }
        }
        sum += scratch.iter().map(|gpu| u128::from(gpu.free.0)).sum::<u128>();
    }
    sum
}
