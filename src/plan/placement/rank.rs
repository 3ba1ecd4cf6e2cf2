//! Which node, and which of its GPUs, a pod is best put on.
//!
//! - *fragmentation*: the place whose gradient is the smallest ([`super::outlook`]). Only the tightest places are looked
//!   at, some different ones of each make of node: equal nodes are one, and the rest is never far better.
//! - *best fit*: the tightest place on a node in use.
//! - *spread*: the most room.
//!
//! Ties go to a node in use, the tightest GPUs, the fullest node, the first by name. The same nodes, request and hands
//! give the same answer, in whatever order the nodes come.

#[cfg(test)]
#[path = "rank_tests.rs"]
mod tests;

use std::cmp::Reverse;

use super::hands::{Hands, PARTS, total};
use super::mix::Want;
use super::outlook::{NodeRoom, waste};
use super::{Choice, MAX_SCORE, NodeRefusal, open, refusal};
use crate::api::gpu_request::{GpuRequest, Sharing};
use crate::api::host::Host;
use crate::api::packing::Packing;
use crate::api::units::{Bytes, NodeName, PodUid};
use crate::plan::ledger::{GpuState, NodeState};
use crate::plan::room::{self, GpuRoom, Picked};

/// Different places that are looked at closely. On the public traces 16 leave 0.1 % more of the GPUs unallocated; all
/// of them leave no less.
const SHORTLIST: usize = 32;
/// Of each make of node at least so many.
const OF_EACH_MAKE: usize = 8;
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
}

impl Judge<'_> {
    /// Without any request to expect there is nothing to leave room for.
    fn packing(&self) -> Packing {
        match self.packing {
            Packing::Fragmentation if self.hands.is_empty() => Packing::BestFit,
            packing => packing,
        }
    }
}

/// How tight a place is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Tight {
    left_on_gpus: Bytes,
    free_on_node: Bytes,
    host: Host,
}

/// A place as it is ordered, the best first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    /// What the pod being there costs others: what it adds to the node's waste, what it takes from requests that can go
    /// nowhere else, and an empty node. In bytes × hands × [`PARTS`].
    gradient: i128,
    opens_node: bool,
    tight: Tight,
    picked: Picked,
}

/// Places in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranking {
    /// Positions of the nodes that were looked at in the list that was given, the best first, with the pod's GPUs there.
    pub order: Vec<(usize, Choice)>,
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
        best_on(&seen.room(judge.hands), want, judge, &mut Vec::new()),
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
    let most = match judge.packing() {
        Packing::Fragmentation => SHORTLIST,
        // Their order is that of the list itself.
        Packing::BestFit | Packing::Spread => usize::from(MAX_SCORE),
    };
    let mut lists: Vec<(Make, Vec<Listed<'n>>)> = Vec::new();
    let mut count = 0;
    for (position, node) in nodes.into_iter().enumerate() {
        count = position + 1;
        if open(node).is_err() {
            continue;
        }
        let seen = Seen::new(node, asker);
        let Some(key) = look(&seen, want, judge) else {
            continue;
        };
        let make = Make::of(node, judge);
        let known = lists.iter().position(|(known, _)| *known == make);
        let number = known.unwrap_or_else(|| {
            lists.push((make, Vec::new()));
            lists.len() - 1
        });
        let list = &mut lists[number].1;
        if list.len() == most && list.last().is_some_and(|worst| worst.key < key) {
            continue;
        }
        enter(
            list,
            Listed {
                key,
                room: seen.room(judge.hands),
                position,
                seen,
            },
        );
        list.truncate(most);
    }
    // Room for each make: what is tight on one may be scarce there, and plenty on another.
    let each = (most / lists.len().max(1)).max(OF_EACH_MAKE);
    let mut scratch = Vec::new();
    let mut places: Vec<(Rank, &NodeName, Listed<'_>)> = lists
        .into_iter()
        .flat_map(|(_, list)| list.into_iter().take(each))
        .filter_map(|listed| {
            let rank = best_on(&listed.room, want, judge, &mut scratch)?;
            Some((rank, listed.seen.node.name(), listed))
        })
        .collect();
    if judge.packing() == Packing::Fragmentation {
        places.sort_by(|a, b| (&a.0, a.1).cmp(&(&b.0, b.1)));
    }
    Ranking {
        order: places
            .into_iter()
            .map(|(rank, _, listed)| (listed.position, listed.seen.choice(rank.picked)))
            .collect(),
        nodes: count,
    }
}

/// A node as the asker sees it.
struct Seen<'n> {
    node: &'n NodeState,
    /// Its GPUs without what is held for the asker, where something is.
    without: Option<(Vec<GpuState>, Host)>,
}

impl<'n> Seen<'n> {
    fn new(node: &'n NodeState, asker: Option<&PodUid>) -> Self {
        let absent = |asker: &PodUid| {
            let is = |uid: &PodUid| uid == asker;
            (node.gpus_without(&is), node.host_without(&is))
        };
        Seen {
            node,
            without: asker.filter(|uid| node.holds_for(uid)).map(absent),
        }
    }

    fn gpus(&self) -> &[GpuState] {
        self.without.as_ref().map_or(self.node.gpus(), |(gpus, _)| gpus)
    }

    fn host(&self) -> Host {
        self.without.as_ref().map_or(self.node.host(), |(_, host)| *host)
    }

    fn working(&self) -> impl Iterator<Item = &GpuState> {
        self.gpus().iter().filter(|gpu| gpu.closed.is_none())
    }

    fn room(&self, hands: &Hands) -> NodeRoom {
        NodeRoom {
            host: self.host(),
            gpus: self.working().map(super::room_now).collect(),
            meets: hands.met_by(self.node.labels()),
        }
    }

    fn choice(&self, picked: Picked) -> Choice {
        let gpus = || {
            self.working()
                .enumerate()
                .filter(|(position, _)| picked.has(*position))
        };
        Choice {
            usable: gpus().map(|(_, gpu)| gpu.usable).min().unwrap_or_default(),
            gpus: gpus().map(|(_, gpu)| gpu.id.clone()).collect(),
        }
    }
}

/// What a node is like when it is empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Make {
    gpus: usize,
    usable: Bytes,
    host: Option<Host>,
}

impl Make {
    fn of(node: &NodeState, judge: Judge<'_>) -> Make {
        match judge.packing() {
            Packing::Fragmentation => Make {
                gpus: node.gpus().len(),
                usable: node.usable(),
                host: node.allocatable(),
            },
            // Their order is that of all nodes.
            Packing::BestFit | Packing::Spread => Make::default(),
        }
    }
}

/// Where a node stands in the shortlist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Fragmentation(Tight),
    BestFit(bool, Tight),
    Spread(Reverse<Bytes>, Reverse<Bytes>),
}

struct Listed<'n> {
    key: Key,
    room: NodeRoom,
    position: usize,
    seen: Seen<'n>,
}

/// Puts a node in its place in the list; of two in the same state, the first by name stays. For the other ways each
/// node is its own.
fn enter<'n>(list: &mut Vec<Listed<'n>>, new: Listed<'n>) {
    let apart = !matches!(new.key, Key::Fragmentation(_));
    let found = list.binary_search_by(|known| {
        let state = || (known.key, &known.room).cmp(&(new.key, &new.room));
        let names = || known.seen.node.name().cmp(new.seen.node.name());
        match apart {
            true => known.key.cmp(&new.key).then_with(names),
            false => state(),
        }
    });
    match found {
        Err(place) => list.insert(place, new),
        Ok(place) if new.seen.node.name() < list[place].seen.node.name() => list[place] = new,
        Ok(_) => {}
    }
}

/// A first look at a node, without anything but its figures; `None` when the request does not fit.
fn look(seen: &Seen<'_>, want: &Want, judge: Judge<'_>) -> Option<Key> {
    let spread = judge.packing() == Packing::Spread;
    let (mut left, mut looked) = (Bytes(0), Picked::default());
    if let Some(request) = &want.gpus {
        for _ in 0..request.gpus.get() {
            let fitting = seen.gpus().iter().take(Picked::MOST).enumerate();
            let fitting =
                fitting.filter(|(position, gpu)| !looked.has(*position) && super::takes(gpu, request));
            let (position, gpu) = if spread {
                fitting.max_by_key(|(position, gpu)| (gpu.free, Reverse(*position)))?
            } else {
                fitting.min_by_key(|(_, gpu)| gpu.free)?
            };
            looked = looked.with(position);
            left = left.saturating_add(beside(gpu.free, gpu.usable, request));
        }
    }
    let gpus = seen.gpus();
    let free_on_node: Bytes = gpus.iter().map(|gpu| gpu.free).sum();
    let tight = Tight {
        left_on_gpus: left,
        free_on_node,
        host: seen.host(),
    };
    Some(match judge.packing() {
        Packing::Fragmentation => Key::Fragmentation(tight),
        Packing::BestFit => Key::BestFit(gpus.iter().all(|gpu| gpu.tenants == 0), tight),
        Packing::Spread => Key::Spread(Reverse(free_on_node), Reverse(left)),
    })
}

/// What is left beside the request on one GPU. The rest of a whole card is lost to others: the smallest card that does
/// is best.
fn beside(free: Bytes, usable: Bytes, request: &GpuRequest) -> Bytes {
    match request.sharing {
        Sharing::Shared => free.saturating_sub(request.bytes_per_gpu),
        Sharing::Exclusive => usable.saturating_sub(request.bytes_per_gpu),
    }
}

/// The best GPUs of one node, and how good they are.
fn best_on(room: &NodeRoom, want: &Want, judge: Judge<'_>, scratch: &mut Vec<GpuRoom>) -> Option<Rank> {
    let packing = judge.packing();
    let hands = judge.hands;
    let opens_node = !room.gpus.is_empty() && room.gpus.iter().all(|gpu| gpu.empty);
    let before = match packing {
        Packing::Fragmentation => waste(room, hands, scratch),
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
                    signed(waste(&after, hands, scratch) + opening + taken) - signed(before)
                }
                Packing::BestFit | Packing::Spread => 0,
            };
            Rank {
                gradient,
                opens_node,
                tight: Tight {
                    left_on_gpus,
                    free_on_node: room.gpus.iter().map(|gpu| gpu.free).sum(),
                    host: room.host,
                },
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
