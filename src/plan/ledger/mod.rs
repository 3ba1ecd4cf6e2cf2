//! The ledger: what is free on every GPU of the cluster, and who has the rest.
//!
//! Per GPU, `free = usable − foreign − Σ max(declared, used)` over the pods on it. `usable` is the card's memory without
//! what the driver keeps; `foreign` is used by processes that are no pod of ours. A figure that NVML cannot give is
//! unknown, not zero: then the declared bytes stand, and what the whole card is known to use beyond them counts as
//! foreign.
//!
//! A pod is entered from the moment its Binding is on the way ([`Ledger::hold`]) and stays until it has finished: a
//! terminating pod still has its memory, and so may one that was deleted by force ([`remains`]). Every event says how
//! something *is*, so that any of them can come twice, and a ledger made from scratch out of the same objects is equal to
//! one that lived through all changes.
//!
//! A GPU on which a pod starts takes no other start ([`starts`]), if the ledger is told so. What ends by time ends in
//! [`Ledger::expire`].

#[cfg(test)]
mod example_tests;
mod facts;
#[cfg(test)]
mod grants_tests;
mod holds;
mod images;
mod node;
mod nodes;
mod remains;
mod row;
mod starts;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;

pub use facts::{
    Claim, Entry, Event, Fence, GpuFacts, Inventory, NeighbourFacts, NodeFacts, NodeShape, PodFacts, Start,
};
pub use holds::{Hold, Stage};
pub use images::{Image, Images};
pub use node::{GpuState, NodeState, Shut};
pub use row::{Figures, Make, Row};
pub use starts::Starting;

use crate::api::units::{NodeName, PodUid};

/// Deleted pods that are remembered, so that a list which was read before the deletion does not bring one back.
const REMEMBERED_GONE: usize = 4096;

/// All nodes with their GPUs and everyone on them.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    nodes: nodes::Nodes,
    bound: HashMap<PodUid, NodeName>,
    neighbours: HashMap<PodUid, NodeName>,
    holds: HashMap<PodUid, Hold>,
    gone: HashSet<PodUid>,
    gone_order: VecDeque<PodUid>,
    freed: u64,
    /// Longest that a start keeps others off its GPUs; `None`: starts keep nobody off.
    start_limit_ms: Option<u64>,
    now_ms: u64,
    /// When something on which node ends by time. Entries can be outdated, and are gone when their time has come.
    deadlines: BTreeSet<(u64, NodeName)>,
}

impl Ledger {
    /// An empty ledger whose GPUs take one start at a time, each for so long at most; `None`: any number.
    #[must_use]
    pub fn new(start_limit_ms: Option<u64>) -> Ledger {
        Ledger {
            start_limit_ms,
            ..Ledger::default()
        }
    }

    /// A ledger made from scratch.
    #[must_use]
    pub fn rebuild(events: impl IntoIterator<Item = Event>) -> Ledger {
        let mut ledger = Ledger::default();
        for event in events {
            ledger.apply(event);
        }
        ledger
    }

    /// Enters how something is now.
    pub fn apply(&mut self, event: Event) {
        match event {
            Event::Node(facts) => self.change(&facts.name.clone(), |node| {
                node.exists = true;
                node.fence = facts.fence;
                node.allocatable = facts.allocatable;
                node.labels = facts.labels;
                node.images = facts.images;
            }),
            Event::NodeGone(name) => self.change(&name, |node| {
                node.exists = false;
                node.fence = None;
                node.allocatable = None;
                node.labels = Arc::default();
                node.images = Images::default();
            }),
            Event::Inventory(inventory) => {
                self.change(&inventory.node.clone(), |node| node.read(inventory));
            }
            Event::InventoryGone(name) => self.change(&name, NodeState::unread),
            Event::Agent { node, silent } => self.change(&node, |node| node.silent = silent),
            Event::Pod(facts) => self.pod(facts),
            Event::Neighbour(facts) => self.neighbour(facts),
            Event::PodGone(uid) => {
                self.forget(&uid, false);
                self.forget_neighbour(&uid);
                self.release(&uid);
                if self.gone.insert(uid.clone()) {
                    self.gone_order.push_back(uid);
                }
                if self.gone_order.len() > REMEMBERED_GONE
                    && let Some(oldest) = self.gone_order.pop_front()
                {
                    self.gone.remove(&oldest);
                }
            }
        }
    }

    fn pod(&mut self, facts: PodFacts) {
        let uid = facts.entry.uid.clone();
        if self.gone.contains(&uid) {
            return;
        }
        // A pod never leaves the node it is bound to, so one without a node is either not bound yet or old news;
        // neither says anything about a Binding that is on its way.
        let Some(name) = facts.node else { return };
        if self.bound.get(&uid).is_some_and(|earlier| *earlier != name) {
            self.forget(&uid, true);
        }
        if facts.finished {
            self.forget(&uid, true);
            self.release(&uid);
            return;
        }
        self.bound.insert(uid.clone(), name.clone());
        let now_ms = self.now_ms;
        let mut ends_ms = None;
        self.change(&name, |node| {
            node.pods.insert(uid.clone(), facts.entry);
            node.holds.remove(&uid);
            ends_ms = node.note_start(&uid, facts.start, now_ms);
        });
        if let Some(ends_ms) = ends_ms {
            self.remind(ends_ms, &name);
        }
        self.release(&uid);
    }

    fn neighbour(&mut self, facts: NeighbourFacts) {
        if self.gone.contains(&facts.uid) {
            return;
        }
        let Some(name) = facts.node else { return };
        if facts.finished
            || self
                .neighbours
                .get(&facts.uid)
                .is_some_and(|earlier| *earlier != name)
        {
            self.forget_neighbour(&facts.uid);
        }
        if !facts.finished {
            self.neighbours.insert(facts.uid.clone(), name.clone());
            self.change(&name, |node| {
                node.neighbours.insert(facts.uid, facts.host);
            });
        }
    }

    fn forget_neighbour(&mut self, uid: &PodUid) {
        if let Some(name) = self.neighbours.remove(uid) {
            self.change(&name, |node| {
                node.neighbours.remove(uid);
            });
        }
    }

    /// Takes the pod's entry off; `ended`: its containers are known to have ended.
    fn forget(&mut self, uid: &PodUid, ended: bool) {
        if let Some(name) = self.bound.remove(uid) {
            let until_ms = self.now_ms.saturating_add(remains::AT_MOST_MS);
            let mut left = false;
            self.change(&name, |node| left = node.depart(uid, ended, until_ms));
            if left {
                self.remind(until_ms, &name);
            }
        }
    }

    /// Something on this node ends then.
    fn remind(&mut self, at_ms: u64, name: &NodeName) {
        if at_ms > self.now_ms {
            self.deadlines.insert((at_ms, name.clone()));
        }
    }

    /// Whether its GPUs take one start at a time.
    #[must_use]
    pub fn one_start_per_gpu(&self) -> bool {
        self.start_limit_ms.is_some()
    }

    /// Sets the clock, which never goes back. What ends by now ends with [`Self::expire`].
    pub fn set_clock(&mut self, now_ms: u64) {
        self.now_ms = self.now_ms.max(now_ms);
    }

    /// Milliseconds of the ledger's clock, as it was last set.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        self.now_ms
    }

    /// Ends what ends by time: holds, starts that take too long, what deleted pods may have left.
    pub fn expire(&mut self, now_ms: u64) {
        self.set_clock(now_ms);
        self.expire_holds(now_ms);
        let mut due = BTreeSet::new();
        while self
            .deadlines
            .first()
            .is_some_and(|(at_ms, _)| *at_ms <= self.now_ms)
        {
            due.extend(self.deadlines.pop_first().map(|(_, name)| name));
        }
        let now_ms = self.now_ms;
        for name in due {
            // What is gone has nothing that could end.
            if self.nodes.get(name.as_str()).is_some() {
                self.change(&name, |node| node.expire(now_ms));
            }
        }
    }

    fn change(&mut self, name: &NodeName, change: impl FnOnce(&mut NodeState)) {
        let limit_ms = self.start_limit_ms;
        let new = || NodeState::new(name.clone(), limit_ms);
        let freed = self.nodes.change(name, new, |node| {
            let was_open = node.shut().is_none();
            change(node);
            node.refresh(was_open)
        });
        if freed {
            self.freed += 1;
        }
    }

    /// The node of that name.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<&NodeState> {
        self.nodes.get(name)
    }

    /// The node of each name, where it is known: its row and its page.
    #[must_use]
    pub fn find<'n, 'a>(
        &'n self,
        names: impl Iterator<Item = &'a str>,
    ) -> Vec<Option<(&'n Row, &'n NodeState)>> {
        self.nodes.find(names)
    }

    /// All nodes, in no particular order.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeState> {
        self.nodes.values()
    }

    /// Pods bound to a node, by UID.
    pub fn node_pods(&self, name: &str) -> impl Iterator<Item = &Entry> {
        self.node(name).into_iter().flat_map(NodeState::pods)
    }

    /// UIDs of all pods that are entered, those without GPU memory included.
    pub fn entered_pods(&self) -> impl Iterator<Item = &PodUid> {
        self.bound.keys().chain(self.neighbours.keys())
    }

    /// UIDs of all pods with GPU memory that are entered as bound.
    pub fn bound_pods(&self) -> impl Iterator<Item = &PodUid> {
        self.bound.keys()
    }

    /// Grows whenever a new pod can have more somewhere than before.
    #[must_use]
    pub fn freed(&self) -> u64 {
        self.freed
    }
}
