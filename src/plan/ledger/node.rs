//! One node's page of the ledger: who is on its GPUs, and what is free on each.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::facts::{Entry, Fence, GpuFacts, Inventory, NodeShape};
use super::images::Images;
use super::remains::Remains;
use super::row::Row;
use super::starts::{Begun, Starting};
use crate::api::gpu_request::Sharing;
use crate::api::host::Host;
use crate::api::names;
use crate::api::units::{Bytes, GpuId, NodeName, PodUid};
use crate::plan::gating::Labels;

/// Why a node as a whole takes nothing new.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shut {
    /// There is no such Node.
    NoNode,
    /// No agent told of its GPUs.
    NoInventory,
    /// Its agent says why.
    Closed(Arc<str>),
    /// The Node itself is fenced.
    Fenced(Fence),
}

/// A node with its GPUs and everyone on them.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeState {
    pub(super) name: NodeName,
    pub(super) exists: bool,
    pub(super) fence: Option<Fence>,
    pub(super) allocatable: Option<Host>,
    pub(super) labels: Arc<Labels>,
    pub(super) images: Images,
    pub(super) inventory: Option<Inventory>,
    /// Why its inventory is not believed any more, where that is so.
    pub(super) silent: Option<Arc<str>>,
    pub(super) pods: BTreeMap<PodUid, Entry>,
    pub(super) holds: BTreeMap<PodUid, Entry>,
    /// Pods that went since the inventory was read: what they used is counted in it, and is free.
    pub(super) departed: Vec<Entry>,
    /// What pods may have left that were deleted before their containers ended.
    pub(super) remains: BTreeMap<PodUid, Remains>,
    /// Starts that go on, of the bound pods.
    pub(super) starts: BTreeMap<PodUid, Begun>,
    /// Longest that a start keeps others off its GPUs, where it does.
    pub(super) start_limit_ms: Option<u64>,
    /// What the pods without GPU memory ask of it.
    pub(super) neighbours: BTreeMap<PodUid, Host>,
    gpus: Vec<GpuState>,
    host: Host,
    row: Row,
}

/// One GPU with what is free on it now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuState {
    /// Its UUID.
    pub id: GpuId,
    /// Its index on the node.
    pub index: u32,
    /// What pods can have of it in all.
    pub usable: Bytes,
    /// What a new pod can have of it.
    pub free: Bytes,
    /// The same once the pods that start on it have started, and have what they declared: loading may take more.
    pub settled: Bytes,
    /// In use beyond what the pods on it declared or are known to use.
    pub foreign: Bytes,
    /// Pods on it, reservations included, and deleted ones that may have left something.
    pub tenants: usize,
    /// Whether one of them has the whole card.
    pub whole: bool,
    /// The pod that starts on it, where that keeps others off.
    pub starting: Option<Starting>,
    /// Why nothing new can be put on it, where that is so.
    pub closed: Option<Arc<str>>,
}

impl NodeState {
    pub(super) fn new(name: NodeName, start_limit_ms: Option<u64>) -> Self {
        Self {
            name,
            exists: false,
            fence: None,
            allocatable: None,
            labels: Arc::default(),
            images: Images::default(),
            inventory: None,
            silent: None,
            pods: BTreeMap::new(),
            holds: BTreeMap::new(),
            departed: Vec::new(),
            remains: BTreeMap::new(),
            starts: BTreeMap::new(),
            start_limit_ms,
            neighbours: BTreeMap::new(),
            gpus: Vec::new(),
            host: Host::UNLIMITED,
            row: Row::default(),
        }
    }

    /// The node's name.
    #[must_use]
    pub fn name(&self) -> &NodeName {
        &self.name
    }

    /// Whether it is a Node that is known to have GPUs, by its agent or by the label that has one started there.
    #[must_use]
    pub fn is_gpu_node(&self) -> bool {
        let labelled = || {
            self.labels
                .get(names::GPU_LABEL)
                .is_some_and(|value| value == "true")
        };
        self.exists && (self.inventory.is_some() || labelled())
    }

    /// Its GPUs by index.
    #[must_use]
    pub fn gpus(&self) -> &[GpuState] {
        &self.gpus
    }

    /// Its labels.
    #[must_use]
    pub fn labels(&self) -> &Arc<Labels> {
        &self.labels
    }

    /// The images that it holds.
    #[must_use]
    pub fn images(&self) -> &Images {
        &self.images
    }

    /// Its figures in a row.
    #[must_use]
    pub fn row(&self) -> &Row {
        &self.row
    }

    /// CPU and memory that it has for pods, where it says so.
    #[must_use]
    pub fn allocatable(&self) -> Option<Host> {
        self.allocatable
    }

    /// CPU and memory that no pod on it asked for; [`Host::UNLIMITED`] where it does not say what it has.
    #[must_use]
    pub fn host(&self) -> Host {
        self.host
    }

    /// The same if these pods were not there.
    #[must_use]
    pub fn host_without(&self, absent: &dyn Fn(&PodUid) -> bool) -> Host {
        let Some(allocatable) = self.allocatable else {
            return Host::UNLIMITED;
        };
        let entries = self.pods.values().chain(self.holds.values());
        let asked = entries
            .map(|entry| (&entry.uid, entry.host))
            .chain(self.neighbours.iter().map(|(uid, host)| (uid, *host)));
        allocatable.saturating_sub(asked.filter(|(uid, _)| !absent(uid)).map(|(_, host)| host).sum())
    }

    /// Pods bound to it, by UID.
    pub fn pods(&self) -> impl Iterator<Item = &Entry> {
        self.pods.values()
    }

    /// Pods bound to it by somebody else, so that nobody knows on which GPU they are.
    pub fn unassigned(&self) -> impl Iterator<Item = &Entry> {
        self.pods.values().filter(|entry| entry.claim.gpus.is_none())
    }

    /// What a pod uses of each GPU, as far as its agent tells.
    pub fn used_by<'a>(&'a self, uid: &'a PodUid) -> impl Iterator<Item = (&'a GpuFacts, Bytes)> + 'a {
        let gpus = self.inventory.iter().flat_map(|inventory| &inventory.gpus);
        gpus.filter_map(|gpu| Some((gpu, *gpu.used_by.get(uid)?)))
    }

    /// Whether something is held on it for this pod.
    #[must_use]
    pub fn holds_for(&self, uid: &PodUid) -> bool {
        self.holds.contains_key(uid)
    }

    /// Whether no pod with GPU memory is on it or about to be.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pods.is_empty() && self.holds.is_empty()
    }

    /// Whether its agent has told of its GPUs, and of nothing that closes all of them.
    #[must_use]
    pub fn is_told(&self) -> bool {
        self.inventory
            .as_ref()
            .is_some_and(|inventory| inventory.closed.is_none() && self.silent.is_none())
    }

    /// Whether it takes nothing new, and why.
    #[must_use]
    pub fn shut(&self) -> Option<Shut> {
        if !self.exists {
            return Some(Shut::NoNode);
        }
        if let Some(fence) = self.fence {
            return Some(Shut::Fenced(fence));
        }
        match &self.inventory {
            None => Some(Shut::NoInventory),
            Some(inventory) => {
                let why = self.silent.as_ref().or(inventory.closed.as_ref());
                why.cloned().map(Shut::Closed)
            }
        }
    }

    /// What it would offer if it were empty: its GPUs that work.
    #[must_use]
    pub fn shape(&self) -> NodeShape {
        NodeShape(
            self.gpus
                .iter()
                .filter(|gpu| gpu.closed.is_none())
                .map(|gpu| gpu.usable)
                .collect(),
        )
    }

    /// Whether this is its shape.
    #[must_use]
    pub fn has_shape(&self, shape: &NodeShape) -> bool {
        let working = self.gpus.iter().filter(|gpu| gpu.closed.is_none());
        working.map(|gpu| gpu.usable).eq(shape.0.iter().copied())
    }

    /// Bytes that are free on all its GPUs together.
    #[must_use]
    pub fn free(&self) -> Bytes {
        self.gpus.iter().map(|gpu| gpu.free).sum()
    }

    /// Bytes that pods can have on all its GPUs together.
    #[must_use]
    pub fn usable(&self) -> Bytes {
        self.gpus.iter().map(|gpu| gpu.usable).sum()
    }

    /// Its GPUs as they would be if these pods were not there.
    #[must_use]
    pub fn gpus_without(&self, absent: &dyn Fn(&PodUid) -> bool) -> Vec<GpuState> {
        let Some(inventory) = &self.inventory else {
            return Vec::new();
        };
        let there = || {
            self.pods
                .values()
                .chain(self.holds.values())
                .filter(|e| !absent(&e.uid))
                .chain(self.remains.values().map(|remains| &remains.entry))
        };
        // Nobody knows where an unassigned pod is, so it counts on every GPU: too much rather than too little.
        let anywhere: Bytes = there()
            .filter(|e| e.claim.gpus.is_none())
            .map(|e| e.claim.bytes_per_gpu)
            .sum();
        let all_taken = there().any(|e| e.claim.gpus.is_none() && e.claim.sharing == Sharing::Exclusive);
        let mut gpus: Vec<GpuState> = inventory
            .gpus
            .iter()
            .map(|gpu| {
                let on = |entry: &&Entry| {
                    let gpus = entry.claim.gpus.as_ref();
                    gpus.is_some_and(|gpus| gpus.contains(&gpu.id))
                };
                let held = |entry: &Entry| {
                    let used = gpu.used_by.get(&entry.uid).copied().unwrap_or_default();
                    entry.claim.bytes_per_gpu.max(used)
                };
                let declared: Bytes = there().filter(on).map(held).sum();
                // What an absent pod has now, it would give back; what one had that went since, it has given back.
                let given_back: Bytes = self
                    .pods
                    .values()
                    .filter(|e| absent(&e.uid))
                    .chain(&self.departed)
                    .filter(|e| e.claim.gpus.is_none() || on(e))
                    .map(held)
                    .sum();
                // Without figures per process, whatever exceeds the declared bytes is somebody's, and not free.
                let used = gpu.used.unwrap_or_default().saturating_sub(given_back);
                let strays = self.strays(gpu);
                let foreign = match gpu.foreign {
                    Some(foreign) => foreign.saturating_add(strays),
                    None => used.saturating_sub(declared.saturating_add(anywhere)).max(strays),
                };
                let occupied = declared
                    .saturating_add(anywhere)
                    .saturating_add(foreign)
                    .max(used);
                let starting = self.starting_on(&gpu.id, absent);
                let settled = |entry: &Entry| match self.begins(&entry.uid) {
                    true => entry.claim.bytes_per_gpu,
                    false => held(entry),
                };
                let occupied_then = match starting {
                    None => occupied,
                    Some(_) => there()
                        .filter(on)
                        .map(settled)
                        .chain([anywhere, gpu.foreign.unwrap_or_default(), strays])
                        .sum(),
                };
                let taken = all_taken || there().filter(on).any(|e| e.claim.sharing == Sharing::Exclusive);
                GpuState {
                    id: gpu.id.clone(),
                    index: gpu.index,
                    usable: gpu.usable,
                    free: if taken {
                        Bytes(0)
                    } else {
                        gpu.usable.saturating_sub(occupied)
                    },
                    settled: if taken {
                        Bytes(0)
                    } else {
                        gpu.usable.saturating_sub(occupied_then)
                    },
                    foreign,
                    tenants: there().filter(|e| e.claim.gpus.is_none() || on(e)).count(),
                    whole: taken,
                    starting,
                    closed: gpu.closed.clone(),
                }
            })
            .collect();
        gpus.sort_by(|a, b| (a.index, &a.id).cmp(&(b.index, &b.id)));
        gpus
    }

    /// Counts again. Tells whether a new pod can have more than before.
    pub(super) fn refresh(&mut self, was_open: bool) -> bool {
        let gpus = self.gpus_without(&|_| false);
        let open = self.shut().is_none();
        let room = |gpu: &GpuState| match (&gpu.closed, &gpu.starting) {
            (None, None) => gpu.free,
            _ => Bytes(0),
        };
        let before = |id: &GpuId| self.gpus.iter().find(|gpu| gpu.id == *id).map(room);
        let freed = open
            && gpus
                .iter()
                .any(|gpu| !was_open || room(gpu) > before(&gpu.id).unwrap_or_default());
        self.gpus = gpus;
        self.host = self.host_without(&|_| false);
        self.row = Row::with(self, &self.gpus, self.host);
        freed
    }

    /// Ends what ends by time.
    pub(super) fn expire(&mut self, now_ms: u64) {
        self.expire_starts(now_ms);
        self.expire_remains(now_ms);
    }

    /// Whether there is nothing left to know about it.
    pub(super) fn blank(&self) -> bool {
        let untold = self.inventory.is_none() && self.silent.is_none();
        !self.exists && untold && self.is_empty() && self.neighbours.is_empty()
    }
}
