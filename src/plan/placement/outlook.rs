//! The outlook of a node: how much of its free GPU memory will be of no use.
//!
//! Weng et al. (USENIX ATC'23) call free GPU memory a fragment, for a request, where it cannot be given to it, and take
//! the expectation over the requests that come. They look one request ahead. Here the node is filled with the requests
//! that come, as in [`Hands`], as long as any of them fits: what is left over at the end, GPU memory beside too little
//! CPU included, is what the placement before it has wasted. The gradient is what a placement adds to that.

use super::mix::Hands;
use crate::api::host::Host;
use crate::plan::room::{self, GpuRoom};

/// What a node has left.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeRoom {
    /// CPU and memory.
    pub host: Host,
    /// Its GPUs that work.
    pub gpus: Vec<GpuRoom>,
    /// For each of the [`Hands`]' needs, whether the node meets it.
    pub meets: Vec<bool>,
}

/// Bytes that are left over when the node is filled, summed over all hands.
#[must_use]
pub fn leftover(node: &NodeRoom, hands: &Hands, scratch: &mut Vec<GpuRoom>) -> u128 {
    let free = node.gpus.iter().map(|gpu| gpu.free).sum();
    let mut sum = 0;
    for hand in hands.ahead(free) {
        scratch.clone_from(&node.gpus);
        let mut host = node.host;
        for card in hand {
            if node.meets[card.needs] && host.holds(card.host) && room::take(scratch, &card.gpus) {
                host = host.saturating_sub(card.host);
            }
        }
        sum += scratch.iter().map(|gpu| u128::from(gpu.free.0)).sum::<u128>();
    }
    sum
}
