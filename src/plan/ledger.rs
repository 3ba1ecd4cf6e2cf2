//! Who has how much of which GPU.
//!
//! The ledger follows bound pods and the agents' inventories, event by event, and can be made anew from them at any
//! time: both give the same ledger. A reservation that prioritize expects to win stands in it too, until it is bound
//! or its time is over.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::api::units::{Bytes, GpuId, NodeName, PodUid};

/// One GPU, as its agent read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuFacts {
    /// Its UUID.
    pub id: GpuId,
    /// Its index on the node, for people.
    pub index: u32,
    /// Memory that pods can have: total − reserved by the driver.
    pub usable: Bytes,
    /// Why no pod can be put on it, if none can.
    pub unhealthy: Option<String>,
}

/// What a pod has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// `namespace/name`, for people.
    pub pod: String,
    /// The node it is bound to.
    pub node: NodeName,
    /// The GPUs it got; empty when somebody else bound it and said nothing: it may then be on any of the node's.
    pub gpus: Vec<GpuId>,
    /// Bytes on each of them.
    pub bytes_per_gpu: Bytes,
    /// Whether it has its cards for itself.
    pub exclusive: bool,
}

/// A node's side of the ledger.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct NodeEntry {
    /// `None` until the Node object is seen; then why it takes no new pods, if it does not.
    closed: Option<Option<String>>,
    gpus: Vec<GpuFacts>,
}

/// A GPU with what is left of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuRoom<'a> {
    /// The GPU.
    pub gpu: &'a GpuFacts,
    /// What no reservation holds.
    pub free: Bytes,
    /// Whether any reservation is on it.
    pub taken: bool,
}

/// The whole ledger.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    nodes: BTreeMap<NodeName, NodeEntry>,
    bound: HashMap<PodUid, Reservation>,
    /// Reservations that are not bound yet, each with the time (milliseconds of the caller's clock) it lapses at.
    expected: HashMap<PodUid, (Reservation, u64)>,
    on_node: HashMap<NodeName, BTreeSet<PodUid>>,
}

impl PartialEq for Ledger {
    /// Two ledgers are equal when their nodes and bound pods are; what is only expected does not count.
    fn eq(&self, other: &Self) -> bool {
        self.nodes == other.nodes && self.bound == other.bound
    }
}

impl Ledger {
    /// The Node object was seen: `closed` says why it takes no new pods, if it does not.
    pub fn node_seen(&mut self, node: &NodeName, closed: Option<String>) {
        self.nodes.entry(node.clone()).or_default().closed = Some(closed);
    }

    /// The Node object is gone. Its pods stay until they are gone themselves.
    pub fn node_gone(&mut self, node: &NodeName) {
        self.change_node(node, |entry| entry.closed = None);
    }

    /// The agent's inventory was seen.
    pub fn gpus_seen(&mut self, node: &NodeName, mut gpus: Vec<GpuFacts>) {
        gpus.sort_by(|a, b| (a.index, &a.id).cmp(&(b.index, &b.id)));
        self.change_node(node, |entry| entry.gpus = gpus);
    }

    fn change_node(&mut self, node: &NodeName, change: impl FnOnce(&mut NodeEntry)) {
        let entry = self.nodes.entry(node.clone()).or_default();
        change(entry);
        if *entry == NodeEntry::default() {
            self.nodes.remove(node);
        }
    }

    /// A bound pod that holds GPU memory was seen. Seen again, it counts once. It replaces what was expected for it.
    pub fn pod_bound(&mut self, uid: &PodUid, reservation: Reservation) {
        self.drop_pod(uid);
        self.on_node
            .entry(reservation.node.clone())
            .or_default()
            .insert(uid.clone());
        self.bound.insert(uid.clone(), reservation);
    }

    /// The pod is gone, or its containers have ended for good.
    pub fn pod_gone(&mut self, uid: &PodUid) {
        self.drop_pod(uid);
    }

    /// Expects the pod to be bound as `reservation` says, until `lapses_ms`. Does nothing for a pod that is bound.
    pub fn expect(&mut self, uid: &PodUid, reservation: Reservation, lapses_ms: u64) {
        if self.bound.contains_key(uid) {
            return;
        }
        self.drop_pod(uid);
        self.on_node
            .entry(reservation.node.clone())
            .or_default()
            .insert(uid.clone());
        self.expected.insert(uid.clone(), (reservation, lapses_ms));
    }

    /// What was expected for the pod does not come about.
    pub fn unexpect(&mut self, uid: &PodUid) {
        if self.expected.contains_key(uid) {
            self.drop_pod(uid);
        }
    }

    /// Drops every expectation that has lapsed at `now_ms`.
    pub fn lapse(&mut self, now_ms: u64) {
        let lapsed: Vec<PodUid> = self
            .expected
            .iter()
            .filter(|(_, (_, lapses_ms))| *lapses_ms <= now_ms)
            .map(|(uid, _)| uid.clone())
            .collect();
        lapsed.iter().for_each(|uid| self.drop_pod(uid));
    }

    fn drop_pod(&mut self, uid: &PodUid) {
        let old = self
            .bound
            .remove(uid)
            .or_else(|| self.expected.remove(uid).map(|(reservation, _)| reservation));
        if let Some(old) = old
            && let Some(pods) = self.on_node.get_mut(&old.node)
        {
            pods.remove(uid);
            if pods.is_empty() {
                self.on_node.remove(&old.node);
            }
        }
    }

    /// What the pod has or is expected to get.
    #[must_use]
    pub fn reservation(&self, uid: &PodUid) -> Option<&Reservation> {
        self.bound
            .get(uid)
            .or_else(|| self.expected.get(uid).map(|(reservation, _)| reservation))
    }

    /// Whether the pod is bound.
    #[must_use]
    pub fn is_bound(&self, uid: &PodUid) -> bool {
        self.bound.contains_key(uid)
    }

    /// All nodes that have a Node object or an inventory.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeName> {
        self.nodes.keys()
    }

    /// Pods that hold, or are expected to hold, GPU memory of the node.
    pub fn pods_on(&self, node: &NodeName) -> impl Iterator<Item = (&PodUid, &Reservation)> {
        self.on_node
            .get(node)
            .into_iter()
            .flatten()
            .filter_map(|uid| self.reservation(uid).map(|reservation| (uid, reservation)))
    }

    /// Why the node takes no new pods, if it does not.
    ///
    /// # Errors
    /// The reason.
    pub fn open(&self, node: &NodeName) -> Result<(), String> {
        match self.nodes.get(node) {
            None => Err("Ebb does not know this node".to_owned()),
            Some(NodeEntry { closed: None, .. }) => Err("the node is gone".to_owned()),
            Some(NodeEntry {
                closed: Some(Some(reason)),
                ..
            }) => Err(reason.clone()),
            Some(NodeEntry { gpus, .. }) if gpus.is_empty() => {
                Err("no GPU of this node has been published by an agent".to_owned())
            }
            Some(_) => Ok(()),
        }
    }

    /// What is left of each of the node's GPUs, by index, with the pods in `without` taken out.
    #[must_use]
    pub fn room<'a>(&'a self, node: &NodeName, without: &[PodUid]) -> Vec<GpuRoom<'a>> {
        let Some(entry) = self.nodes.get(node) else {
            return Vec::new();
        };
        let mut rooms: Vec<GpuRoom<'a>> = entry
            .gpus
            .iter()
            .map(|gpu| GpuRoom {
                gpu,
                free: gpu.usable,
                taken: false,
            })
            .collect();
        for (uid, reservation) in self.pods_on(node) {
            if without.contains(uid) {
                continue;
            }
            for room in &mut rooms {
                // A pod of unknown GPUs may be on any of them.
                if reservation.gpus.is_empty() || reservation.gpus.contains(&room.gpu.id) {
                    room.taken = true;
                    room.free = if reservation.exclusive {
                        Bytes(0)
                    } else {
                        room.free.saturating_sub(reservation.bytes_per_gpu)
                    };
                }
            }
        }
        rooms
    }
}
