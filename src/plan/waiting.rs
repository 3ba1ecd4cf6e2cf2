//! Pods that wait for GPU memory behind Ebb's scheduling gate: whether a new one has to, and which may go on.
//!
//! kube-scheduler tries refused pods again on every event that might help them, and a pod that has room waits behind
//! all of these tries. A gated pod costs the scheduler nothing. So a pod that no GPU has room for gets the gate when it
//! is created, and the leader takes it off when one has.
//!
//! - Only what is sure to be refused is kept: what cannot be judged from here counts as room. A pod that could have
//!   others evicted goes on, since the scheduler evicts nobody for a pod that it does not see.
//! - The order is by priority, then age, then name, and no more go on than fit: those that went on and have nothing
//!   reserved yet have their place taken first. One that the scheduler refused does not count: it had its turn, and
//!   what it cannot use would be kept from all others.
//! - A later pod that fits passes an earlier one that does not. To keep memory free until there is enough for a large
//!   one would leave it unused for nobody knows how long, and the large one is not forgotten: nodes are asked for in
//!   its name, and a priority lets it evict.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fmt;

use super::ledger::{Ledger, NodeState};
use super::nodes_wanted::Toleration;
use super::placement::{self, NodeRefusal, Refusal, Want};
use super::room::{self, GpuRoom, Picked};
use crate::api::gpu_request::GpuRequest;
use crate::api::host::Host;
use crate::api::units::{Bytes, NodeName, PodUid};

/// Different asks without room that one decision remembers, so as not to look for room for each pod anew.
const REMEMBERED: usize = 64;

/// What a pod asks of the cluster, as far as the scheduler's answer can be told from here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// GPU memory.
    pub request: GpuRequest,
    /// CPU, memory and labels of the node.
    pub want: Want,
    /// Its priority.
    pub priority: i32,
    /// Whether it may have pods of lower priority evicted.
    pub evicts: bool,
    /// What it tolerates; `None` while others may still add to that.
    pub tolerations: Option<Vec<Toleration>>,
}

/// A pod without a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Its UID.
    pub uid: PodUid,
    /// `namespace/name`.
    pub name: String,
    /// When it was created, milliseconds since the epoch.
    pub created_ms: i64,
    /// What it needs before it may go on.
    pub needs: Needs,
}

/// What a pod needs before it may go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Room for this.
    Room(Ask),
    /// Nothing that Ebb has, and why.
    Nothing(&'static str),
}

/// Why the scheduler puts nothing on a node, beside what the ledger knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bar {
    /// The node is not Ready.
    NotReady,
    /// The node's status does not say yet how much GPU memory it has.
    Untold,
    /// A taint that the pod does not tolerate.
    Tainted,
}

impl fmt::Display for Bar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Bar::NotReady => "not Ready",
            Bar::Untold => "without ebb.dev/gpu-memory in its status yet",
            Bar::Tainted => "with a taint that the pod does not tolerate",
        })
    }
}

/// The cluster as it is.
#[derive(Clone, Copy)]
pub struct Cluster<'a> {
    /// Who has how much of which GPU.
    pub ledger: &'a Ledger,
    /// What else keeps a pod off a node.
    pub bar: &'a dyn Fn(&NodeName, &Ask) -> Option<Bar>,
    /// Priorities of the bound pods, as far as any could be evicted.
    pub bound: &'a HashMap<PodUid, i32>,
}

/// A pod that may go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opening {
    /// Its UID.
    pub uid: PodUid,
    /// `namespace/name`.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// Whether a pod could be placed now.
///
/// # Errors
/// Why not, with the nodes counted by reason and the nearest miss.
pub fn room(cluster: Cluster<'_>, ask: &Ask) -> Result<(), Refusal> {
    let taken = Taken::default();
    let free = |node| cluster.obstacle(node, ask, &taken).is_none();
    if cluster.ledger.nodes().any(free) || cluster.could_evict(ask) {
        return Ok(());
    }
    Err(why(cluster, ask))
}

/// Why a pod has no room.
#[must_use]
pub fn why(cluster: Cluster<'_>, ask: &Ask) -> Refusal {
    let (mut refusal, taken) = (
        Refusal::new(&ask.request, cluster.ledger.now_ms()),
        Taken::default(),
    );
    for node in cluster.ledger.nodes() {
        match cluster.obstacle(node, ask, &taken) {
            Some(Obstacle::Gpus(reason)) => refusal.add(node, &reason),
            Some(other) => refusal.count(node, &other),
            // Those before it are about to have what is free.
            None => refusal.count(node, &Obstacle::Promised),
        }
    }
    refusal
}

/// Which of the gated pods may go on, in order. `opened`: those that went on and that the scheduler has neither bound
/// nor refused yet.
#[must_use]
pub fn decide(cluster: Cluster<'_>, opened: &[Waiting], gated: &[Waiting]) -> Vec<Opening> {
    let mut taken = Taken::default();
    for pod in in_order(opened) {
        if let Needs::Room(ask) = &pod.needs
            // What is held for it is in the ledger.
            && cluster.ledger.hold_of(&pod.uid).is_none()
            && let Some(node) = cluster.place(ask, &taken)
        {
            taken.take(cluster.ledger, node, ask);
        }
    }
    let largest = cluster.largest_free();
    let mut hopeless: Vec<&Ask> = Vec::new();
    let mut openings = Vec::new();
    for pod in in_order(gated) {
        let reason = match &pod.needs {
            Needs::Nothing(why) => (*why).to_owned(),
            Needs::Room(ask) if hopeless.contains(&ask) => continue,
            Needs::Room(ask) => {
                let place = (ask.request.bytes_per_gpu <= largest)
                    .then(|| cluster.place(ask, &taken))
                    .flatten();
                if let Some(node) = place {
                    taken.take(cluster.ledger, node, ask);
                    format!("{} has room", node.name())
                } else if cluster.could_evict(ask) {
                    "pods of lower priority could make room".to_owned()
                } else {
                    // What is taken only grows, so the next one that asks the same has no room either.
                    if hopeless.len() < REMEMBERED {
                        hopeless.push(ask);
                    }
                    continue;
                }
            }
        };
        openings.push(Opening {
            uid: pod.uid.clone(),
            name: pod.name.clone(),
            reason,
        });
    }
    openings
}

fn in_order(pods: &[Waiting]) -> Vec<&Waiting> {
    let mut pods: Vec<&Waiting> = pods.iter().collect();
    let priority = |pod: &Waiting| match &pod.needs {
        Needs::Room(ask) => ask.priority,
        Needs::Nothing(_) => i32::MAX,
    };
    pods.sort_by(|a, b| {
        (Reverse(priority(a)), a.created_ms, &a.name).cmp(&(Reverse(priority(b)), b.created_ms, &b.name))
    });
    pods
}

/// Why a pod cannot be on a node now.
enum Obstacle {
    Labels,
    Gpus(NodeRefusal),
    Promised,
    Host,
    Barred(Bar),
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Obstacle::Labels => f.write_str("not among those that its nodeSelector or affinity names"),
            Obstacle::Gpus(reason) => reason.fmt(f),
            Obstacle::Promised => f.write_str("promised to pods that come before it"),
            Obstacle::Host => f.write_str("with too little CPU or memory beside its GPUs"),
            Obstacle::Barred(bar) => bar.fmt(f),
        }
    }
}

/// What the pods that came first leave of the nodes they are to go to.
#[derive(Default)]
struct Taken(HashMap<NodeName, Left>);

struct Left {
    gpus: Vec<GpuRoom>,
    host: Host,
}

impl Left {
    fn of(node: &NodeState) -> Left {
        let working = node.gpus().iter().filter(|gpu| gpu.closed.is_none());
        Left {
            gpus: working.map(placement::room_now).collect(),
            host: node.host(),
        }
    }
}

impl Taken {
    fn take(&mut self, ledger: &Ledger, node: &NodeState, ask: &Ask) {
        let left = self
            .0
            .entry(node.name().clone())
            .or_insert_with(|| Left::of(node));
        let tightest = |gpu: &GpuRoom| (gpu.free, gpu.usable, gpu.empty);
        if let Some(picked) = room::pick(&left.gpus, &ask.request, tightest) {
            room::give(&mut left.gpus, &ask.request, picked);
            for (position, gpu) in left.gpus.iter_mut().enumerate() {
                // It starts there, and nobody beside it.
                if ledger.one_start_per_gpu() && position < Picked::MOST && picked.has(position) {
                    gpu.free = Bytes(0);
                }
            }
        }
        left.host = left.host.saturating_sub(ask.want.host);
    }

    fn free(&self, node: &NodeState) -> Bytes {
        match self.0.get(node.name()) {
            Some(left) => left.gpus.iter().map(|gpu| gpu.free).sum(),
            None => node.free(),
        }
    }
}

impl<'a> Cluster<'a> {
    fn obstacle(self, node: &NodeState, ask: &Ask, taken: &Taken) -> Option<Obstacle> {
        let shut = node.shut().map(NodeRefusal::Shut);
        if let Some(shut) = shut {
            return Some(Obstacle::Gpus(shut));
        }
        if !ask.want.needs.met_by(node.labels()) {
            return Some(Obstacle::Labels);
        }
        if let Err(reason) = placement::fit(node, &ask.request, None) {
            return Some(Obstacle::Gpus(reason));
        }
        let left = taken.0.get(node.name());
        if left.is_some_and(|left| room::pick(&left.gpus, &ask.request, |gpu| gpu.free).is_none()) {
            return Some(Obstacle::Promised);
        }
        if !left.map_or(node.host(), |left| left.host).holds(ask.want.host) {
            return Some(Obstacle::Host);
        }
        (self.bar)(node.name(), ask).map(Obstacle::Barred)
    }

    /// The fullest node that has room for it.
    fn place(self, ask: &Ask, taken: &Taken) -> Option<&'a NodeState> {
        let nodes = self.ledger.nodes();
        nodes
            .filter(|node| self.obstacle(node, ask, taken).is_none())
            .min_by_key(|node| (taken.free(node), node.name()))
    }

    /// Whether it had room somewhere if all pods of lower priority were gone.
    fn could_evict(self, ask: &Ask) -> bool {
        let lower = |uid: &PodUid| {
            self.bound
                .get(uid)
                .is_some_and(|priority| *priority < ask.priority)
        };
        let any = ask.evicts && self.bound.values().any(|priority| *priority < ask.priority);
        any && self.ledger.nodes().any(|node| {
            ask.want.needs.met_by(node.labels())
                && placement::fit_without(node, &ask.request, &lower).is_ok()
                && node.host_without(&lower).holds(ask.want.host)
                && (self.bar)(node.name(), ask).is_none()
        })
    }

    /// The most that is free on any GPU that takes new pods.
    fn largest_free(self) -> Bytes {
        let open = self.ledger.nodes().filter(|node| node.shut().is_none());
        let gpus = open.flat_map(|node| node.gpus());
        gpus.map(|gpu| gpu.free).max().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;
