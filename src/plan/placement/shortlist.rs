//! Which nodes come into question for a pod: the first look at all of them, by nothing but their figures.
//!
//! [`rank`](super::rank) looks closely at the few nodes that are listed here: the tightest places, some different ones of
//! each make of node. Nodes in equal state are one, and the rest is never far better. Filter and prioritize ask by name
//! ([`survey`]), and read rows of figures rather than the pages they are from.

#[cfg(test)]
#[path = "shortlist_tests.rs"]
mod tests;

use std::cmp::{Ordering, Reverse};

use super::hands::Hands;
use super::mix::Want;
use super::outlook::NodeRoom;
use super::rank::{Judge, Ranking, order};
use super::{Choice, beside, offers};
use crate::api::host::Host;
use crate::api::packing::Packing;
use crate::api::units::{Bytes, PodUid};
use crate::plan::ledger::{GpuState, Ledger, Make, NodeState, Row};
use crate::plan::room::{GpuRoom, Picked};

/// Different places that are looked at closely. On the public traces 16 leave 0.1 % more of the GPUs unallocated; all
/// of them leave no less.
const SHORTLIST: usize = 32;
/// Of each make of node at least so many.
const OF_EACH_MAKE: usize = 8;
/// Many makes share so many places, one each at least.
const OF_MANY_MAKES: usize = 128;

/// A node as the asker sees it.
pub(super) struct Seen<'n> {
    pub(super) node: &'n NodeState,
    row: &'n Row,
    /// The node without what is held for the asker, where something is.
    without: Option<Box<Without>>,
}

struct Without {
    gpus: Vec<GpuState>,
    host: Host,
    row: Row,
}

impl<'n> Seen<'n> {
    pub(super) fn new(node: &'n NodeState, asker: Option<&PodUid>) -> Self {
        match asker.filter(|uid| node.holds_for(uid)) {
            None => Seen::as_it_is(node, node.row()),
            Some(asker) => Seen::without(node, asker),
        }
    }

    fn as_it_is(node: &'n NodeState, row: &'n Row) -> Self {
        Seen {
            node,
            row,
            without: None,
        }
    }

    fn without(node: &'n NodeState, asker: &PodUid) -> Self {
        let is = |uid: &PodUid| uid == asker;
        let (gpus, host) = (node.gpus_without(&is), node.host_without(&is));
        let row = Row::with(node, &gpus, host);
        Seen {
            without: Some(Box::new(Without { gpus, host, row })),
            ..Seen::as_it_is(node, node.row())
        }
    }

    fn row(&self) -> &Row {
        self.without.as_ref().map_or(self.row, |without| &without.row)
    }

    pub(super) fn gpus(&self) -> &[GpuState] {
        self.without
            .as_ref()
            .map_or(self.node.gpus(), |without| &without.gpus)
    }

    fn host(&self) -> Host {
        self.without
            .as_ref()
            .map_or(self.node.host(), |without| without.host)
    }

    fn working(&self) -> impl Iterator<Item = &GpuState> {
        self.gpus().iter().filter(|gpu| gpu.closed.is_none())
    }

    pub(super) fn room(&self, hands: &Hands) -> NodeRoom {
        NodeRoom {
            host: self.host(),
            gpus: self.rooms().collect(),
            meets: hands.met_by(self.node.labels()),
        }
    }

    fn rooms(&self) -> impl Iterator<Item = GpuRoom> {
        self.working().map(super::room_now)
    }

    /// Bytes of the pod's images that it holds.
    pub(super) fn warm(&self, judge: Judge<'_>) -> Warm {
        Reverse(self.node.images().held(judge.images))
    }

    pub(super) fn choice(&self, picked: Picked) -> Choice {
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

/// How tight a place is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Tight {
    pub(super) left_on_gpus: Bytes,
    pub(super) free_on_node: Bytes,
    pub(super) host: Host,
}

/// Where a node stands in the shortlist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    Fragmentation(Tight),
    BestFit(bool, Tight),
    Spread(Reverse<Bytes>, Reverse<Bytes>),
}

/// Bytes of the pod's images that a node holds; the most first.
pub(super) type Warm = Reverse<Bytes>;

/// A node on the shortlist.
pub(super) struct Listed<'n> {
    key: Key,
    pub(super) position: usize,
    pub(super) seen: Seen<'n>,
    /// Positions of the other nodes in the same state.
    pub(super) equals: Vec<usize>,
}

/// The tightest nodes where a pod fits, of each make.
pub(super) struct Shortlist<'n, 'a> {
    want: &'a Want,
    judge: Judge<'a>,
    packing: Packing,
    most: usize,
    lists: Vec<(Make, Vec<Listed<'n>>)>,
}

impl<'n, 'a> Shortlist<'n, 'a> {
    pub(super) fn new(want: &'a Want, judge: Judge<'a>) -> Self {
        let packing = judge.packing();
        Shortlist {
            want,
            judge,
            packing,
            most: match packing {
                Packing::Fragmentation => SHORTLIST,
                // Their order is that of the list itself.
                Packing::BestFit | Packing::Spread => usize::from(super::MAX_SCORE),
            },
            lists: Vec::new(),
        }
    }

    /// Takes a look at a node, and says whether the pod fits there.
    pub(super) fn look(&mut self, position: usize, seen: Seen<'n>) -> bool {
        let Some(key) = look(seen.row(), self.want, self.packing) else {
            return false;
        };
        let make = match self.packing {
            Packing::Fragmentation => seen.row().make,
            // Their order is that of all nodes.
            Packing::BestFit | Packing::Spread => Make::default(),
        };
        let known = self.lists.iter().position(|(known, _)| *known == make);
        let number = known.unwrap_or_else(|| {
            self.lists.push((make, Vec::new()));
            self.lists.len() - 1
        });
        let list = &mut self.lists[number].1;
        if list.len() == self.most && list.last().is_some_and(|worst| worst.key < key) {
            return true;
        }
        enter(
            list,
            Listed {
                key,
                position,
                seen,
                equals: Vec::new(),
            },
            self.judge,
        );
        list.truncate(self.most);
        true
    }

    /// Those that are worth a closer look. Room for each make: what is tight on one may be scarce there, and plenty on
    /// another.
    pub(super) fn listed(self) -> impl Iterator<Item = Listed<'n>> {
        let makes = self.lists.len().max(1);
        let each = OF_EACH_MAKE.min(OF_MANY_MAKES / makes);
        let each = each.max(self.most / makes).max(1);
        let lists = self.lists.into_iter();
        lists.flat_map(move |(_, list)| list.into_iter().take(each))
    }
}

/// Puts a node in its place in the list. Of nodes in the same state one stays: the one that holds the most of the pod's
/// images, the first by name. For the other ways each node is its own.
fn enter<'n>(list: &mut Vec<Listed<'n>>, mut new: Listed<'n>, judge: Judge<'_>) {
    let found = list.binary_search_by(|known| {
        let by_key = known.key.cmp(&new.key);
        by_key.then_with(|| match new.key {
            Key::Fragmentation(_) => state(&known.seen, &new.seen, judge.hands),
            Key::BestFit(..) | Key::Spread(..) => first(&known.seen, &new.seen, judge),
        })
    });
    match found {
        Err(place) => list.insert(place, new),
        Ok(place) => {
            let known = &mut list[place];
            if first(&new.seen, &known.seen, judge).is_lt() {
                new.equals = std::mem::take(&mut known.equals);
                std::mem::swap(known, &mut new);
            }
            known.equals.push(new.position);
        }
    }
}

/// The order of nodes by all that matters about them beside their [`Key`]: equal are those in the same state.
fn state(a: &Seen<'_>, b: &Seen<'_>, hands: &Hands) -> Ordering {
    // The rows say it all, and lie nearer than the pages.
    let gpus = a.row().gpus.cmp(&b.row().gpus);
    gpus.then_with(|| hands.compare(a.node.labels(), b.node.labels()))
}

/// The order of nodes in the same state.
fn first(a: &Seen<'_>, b: &Seen<'_>, judge: Judge<'_>) -> Ordering {
    let warm = a.warm(judge).cmp(&b.warm(judge));
    warm.then_with(|| a.node.name().cmp(b.node.name()))
}

/// A first look at a node, without anything but its figures; `None` when the pod does not fit.
fn look(row: &Row, want: &Want, packing: Packing) -> Option<Key> {
    if !row.open {
        return None;
    }
    let (mut left, mut looked) = (Bytes(0), Picked::default());
    if let Some(request) = &want.gpus {
        for _ in 0..request.gpus.get() {
            let mut best: Option<(usize, Bytes)> = None;
            for (position, gpu) in row.gpus.iter().take(Picked::MOST).enumerate() {
                if looked.has(position) || !offers(gpu, request) {
                    continue;
                }
                let better = best.is_none_or(|(_, free)| match packing {
                    Packing::Spread => gpu.free > free,
                    Packing::Fragmentation | Packing::BestFit => gpu.free < free,
                });
                if better {
                    best = Some((position, gpu.free));
                }
            }
            let (position, free) = best?;
            looked = looked.with(position);
            left = left.saturating_add(beside(free, row.gpus[position].usable, request));
        }
    }
    let tight = Tight {
        left_on_gpus: left,
        free_on_node: row.free,
        host: row.host,
    };
    Some(match packing {
        Packing::Fragmentation => Key::Fragmentation(tight),
        Packing::BestFit => Key::BestFit(row.gpus.iter().all(|gpu| gpu.empty), tight),
        Packing::Spread => Key::Spread(Reverse(row.free), Reverse(left)),
    })
}

/// What filter answers from.
pub struct Survey<'n> {
    /// The nodes in the order in which they were given; `None` for one that nobody knows.
    pub nodes: Vec<Option<&'n NodeState>>,
    /// Whether the pod fits there.
    pub fits: Vec<bool>,
    /// Those that rank would look at.
    listed: Vec<Listed<'n>>,
}

impl Survey<'_> {
    /// Orders them as [`rank`](super::rank()) would have done.
    #[must_use]
    pub fn ranking(self, want: &Want, judge: Judge<'_>) -> Ranking {
        order(self.listed.into_iter(), want, judge, self.fits.len())
    }

    /// How many nodes have room.
    #[must_use]
    pub fn fitting(&self) -> usize {
        self.fits.iter().filter(|fits| **fits).count()
    }

    /// Positions of the nodes that have room.
    pub fn positions(&self) -> impl Iterator<Item = usize> {
        let fits = self.fits.iter().enumerate();
        fits.filter(|(_, fits)| **fits).map(|(position, _)| position)
    }

    /// The node with room, if it is the only one.
    #[must_use]
    pub fn only(&self) -> Option<&NodeState> {
        let mut fitting = self.nodes.iter().zip(&self.fits).filter(|(_, fits)| **fits);
        match (fitting.next(), fitting.next()) {
            (Some((node, _)), None) => *node,
            _ => None,
        }
    }
}

/// Looks at the nodes of these names. What is held for `asker` itself counts as free.
#[must_use]
pub fn survey<'n, 'a>(
    ledger: &'n Ledger,
    names: impl Iterator<Item = &'a str>,
    want: &Want,
    asker: &PodUid,
    judge: Judge<'_>,
) -> Survey<'n> {
    let found = ledger.find(names);
    let held = ledger.hold_of(asker).map(|hold| hold.node.as_str());
    let held = held.and_then(|name| ledger.node(name));
    let mut shortlist = Shortlist::new(want, judge);
    let fits = found.iter().enumerate().map(|(position, node)| {
        let Some((row, node)) = *node else { return false };
        // The page itself is not opened: that would take most of the time.
        let seen = match held.filter(|held| std::ptr::eq(*held, node)) {
            Some(node) => Seen::without(node, asker),
            None => Seen::as_it_is(node, row),
        };
        shortlist.look(position, seen)
    });
    Survey {
        fits: fits.collect(),
        nodes: found.iter().map(|node| node.map(|(_, page)| page)).collect(),
        listed: shortlist.listed().collect(),
    }
}
