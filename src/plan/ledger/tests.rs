//! The ledger against a model that keeps nothing but the objects themselves.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::api::gpu_request::Sharing;
use crate::api::host::Host;
use crate::api::units::{Bytes, GpuId, MilliCpu};

const NODES: u8 = 3;
const GPUS: u8 = 3;
const PODS: u8 = 6;

pub(super) fn name(node: u8) -> NodeName {
    NodeName::from(format!("node-{node}").as_str())
}

pub(super) fn uid(pod: u8) -> PodUid {
    PodUid::from(format!("pod-{pod}").as_str())
}

/// What a node has for pods, in the small numbers of these tests.
const CAPACITY: Host = Host {
    cpu: MilliCpu(30),
    memory: Bytes(40),
};

/// What the pod of this number asks.
fn host(pod: u64) -> Host {
    Host {
        cpu: MilliCpu(pod + 1),
        memory: Bytes(2 * pod),
    }
}

pub(super) fn gpu(node: u8, index: u8) -> GpuId {
    GpuId::from(format!("GPU-{node}-{index}").as_str())
}

fn node_event() -> impl Strategy<Value = Event> {
    let fence = prop_oneof![
        3 => Just(None),
        1 => prop_oneof![Just(Fence::Releasing), Just(Fence::Cordoned), Just(Fence::Deleting)].prop_map(Some),
    ];
    (0..NODES, fence).prop_map(|(node, fence)| {
        Event::Node(NodeFacts {
            name: name(node),
            fence,
            allocatable: Some(CAPACITY),
            labels: Arc::default(),
            images: Images::default(),
        })
    })
}

fn inventory_event() -> impl Strategy<Value = Event> {
    let gpu_facts = (
        10u64..40,
        prop::option::of(0u64..50),
        prop::option::of(0u64..10),
        prop::bool::weighted(0.2),
        prop::collection::btree_map(0..PODS, 0u64..30, 0..2),
    );
    (
        0..NODES,
        prop::bool::weighted(0.1),
        prop::collection::vec(gpu_facts, 0..=usize::from(GPUS)),
    )
        .prop_map(|(node, closed, gpus)| {
            Event::Inventory(Inventory {
                node: name(node),
                closed: closed.then(|| "no driver".into()),
                gpus: (0u8..)
                    .zip(gpus)
                    .map(|(index, (usable, used, foreign, lost, used_by))| GpuFacts {
                        id: gpu(node, index),
                        index: index.into(),
                        usable: Bytes(usable),
                        used: used.map(Bytes),
                        foreign: foreign.map(Bytes),
                        used_by: used_by
                            .into_iter()
                            .map(|(pod, used)| (uid(pod), Bytes(used)))
                            .collect(),
                        closed: lost.then(|| "lost".into()),
                    })
                    .collect(),
            })
        })
}

fn claim(node: u8) -> impl Strategy<Value = Claim> {
    (
        prop::option::weighted(0.85, prop::collection::btree_set(0..GPUS, 1..=2)),
        1u64..20,
        prop::bool::weighted(0.15),
    )
        .prop_map(move |(gpus, bytes, exclusive)| Claim {
            gpus: gpus.map(|gpus| gpus.into_iter().map(|index| gpu(node, index)).collect()),
            bytes_per_gpu: Bytes(bytes),
            sharing: if exclusive {
                Sharing::Exclusive
            } else {
                Sharing::Shared
            },
        })
}

pub(super) fn entry(pod: u8, claim: Claim) -> Entry {
    Entry {
        uid: uid(pod),
        namespace: "models".into(),
        name: format!("model-{pod}").into(),
        host: host(pod.into()),
        claim,
    }
}

fn start() -> impl Strategy<Value = Start> {
    let since = || 0u64..100;
    prop_oneof![
        2 => Just(Start::Over),
        1 => since().prop_map(|since_ms| Start::Bound { since_ms }),
        2 => since().prop_map(|since_ms| Start::Loading { since_ms }),
    ]
}

/// How long a start keeps others off: not at all, shorter than time passes here, longer.
fn start_limit() -> impl Strategy<Value = Option<u64>> {
    prop_oneof![Just(None), Just(Some(50)), Just(Some(10 * remains::AT_MOST_MS))]
}

fn pod_event() -> impl Strategy<Value = Event> {
    // A pod has one node for life, as in Kubernetes.
    (
        0..PODS,
        prop::bool::weighted(0.8),
        prop::bool::weighted(0.1),
        start(),
    )
        .prop_flat_map(|(pod, is_bound, finished, start)| {
            let node = pod % NODES;
            claim(node).prop_map(move |claim| {
                Event::Pod(PodFacts {
                    entry: entry(pod, claim),
                    node: is_bound.then(|| name(node)),
                    finished: finished && is_bound,
                    start,
                })
            })
        })
}

fn neighbour(pod: u8) -> PodUid {
    PodUid::from(format!("neighbour-{pod}").as_str())
}

fn neighbour_event() -> impl Strategy<Value = Event> {
    (0..PODS, prop::bool::weighted(0.8), prop::bool::weighted(0.1)).prop_map(|(pod, is_bound, finished)| {
        Event::Neighbour(NeighbourFacts {
            uid: neighbour(pod),
            node: is_bound.then(|| name(pod % NODES)),
            host: host(pod.into()),
            finished: finished && is_bound,
        })
    })
}

#[derive(Clone, Debug)]
enum Step {
    Told(Event),
    Hold(u8, u8, Claim, Stage),
    Release(u8),
    Expire(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let stage = prop_oneof![
        (0u64..100).prop_map(|until_ms| Stage::Reserved { until_ms }),
        (0u64..100).prop_map(|until_ms| Stage::Doubtful { until_ms }),
        Just(Stage::Posted),
        Just(Stage::Bound),
    ];
    prop_oneof![
        2 => node_event().prop_map(Step::Told),
        1 => (0..NODES).prop_map(|node| Step::Told(Event::NodeGone(name(node)))),
        3 => inventory_event().prop_map(Step::Told),
        1 => (0..NODES).prop_map(|node| Step::Told(Event::InventoryGone(name(node)))),
        1 => (0..NODES, any::<bool>()).prop_map(|(node, silent)| Step::Told(Event::Agent {
            node: name(node),
            silent: silent.then(|| "its agent is silent".into()),
        })),
        6 => pod_event().prop_map(Step::Told),
        2 => neighbour_event().prop_map(Step::Told),
        2 => (0..PODS).prop_map(|pod| Step::Told(Event::PodGone(uid(pod)))),
        1 => (0..PODS).prop_map(|pod| Step::Told(Event::PodGone(neighbour(pod)))),
        2 => (0..PODS, 0..NODES, stage).prop_flat_map(|(pod, node, stage)| {
            claim(node).prop_map(move |claim| Step::Hold(pod, node, claim, stage))
        }),
        1 => (0..PODS).prop_map(Step::Release),
        1 => (0u64..100).prop_map(Step::Expire),
    ]
}

/// The objects as the API would list them.
#[derive(Default)]
struct Objects {
    nodes: BTreeMap<NodeName, Event>,
    inventories: BTreeMap<NodeName, Event>,
    agents: BTreeMap<NodeName, Event>,
    pods: BTreeMap<PodUid, PodFacts>,
    neighbours: BTreeMap<PodUid, NeighbourFacts>,
    gone: Vec<PodUid>,
}

impl Objects {
    fn apply(&mut self, event: &Event) {
        match event.clone() {
            Event::Node(facts) => {
                self.nodes.insert(facts.name.clone(), event.clone());
            }
            Event::NodeGone(name) => {
                self.nodes.remove(&name);
            }
            Event::Inventory(inventory) => {
                self.inventories.insert(inventory.node.clone(), event.clone());
            }
            Event::InventoryGone(name) => {
                self.inventories.remove(&name);
            }
            Event::Agent { node, .. } => {
                self.agents.insert(node, event.clone());
            }
            Event::Pod(facts) => {
                let uid = facts.entry.uid.clone();
                let known = self.pods.get(&uid);
                // Neither the node nor the end of a pod is ever taken back.
                let goes_back = known.is_some_and(|known| {
                    known.node.is_some() && facts.node.is_none() || known.finished && !facts.finished
                });
                if !self.gone.contains(&uid) && !goes_back {
                    self.pods.insert(uid, facts);
                }
            }
            Event::Neighbour(facts) => {
                let known = self.neighbours.get(&facts.uid);
                let goes_back = known.is_some_and(|known| known.node.is_some() && facts.node.is_none());
                if !self.gone.contains(&facts.uid) && !goes_back {
                    self.neighbours.insert(facts.uid.clone(), facts);
                }
            }
            Event::PodGone(uid) => {
                self.pods.remove(&uid);
                self.neighbours.remove(&uid);
                self.gone.push(uid);
            }
        }
    }

    fn events(&self, pods_first: bool) -> Vec<Event> {
        let neighbours = self.neighbours.values().cloned().map(Event::Neighbour);
        let pods = self.pods.values().cloned().map(Event::Pod).chain(neighbours);
        let told = self.inventories.values().chain(self.agents.values());
        let nodes = self.nodes.values().chain(told).cloned();
        if pods_first {
            pods.chain(nodes).collect()
        } else {
            nodes.chain(pods).collect()
        }
    }

    /// Whether the API could send this now.
    fn possible(&self, event: &Event) -> bool {
        match event {
            Event::Pod(facts) => !self
                .pods
                .get(&facts.entry.uid)
                .is_some_and(|known| known.finished && !facts.finished),
            Event::Neighbour(facts) => !self
                .neighbours
                .get(&facts.uid)
                .is_some_and(|known| known.finished && !facts.finished),
            _ => true,
        }
    }
}

fn run(limit: Option<u64>, steps: Vec<Step>) -> (Ledger, Objects) {
    let (mut ledger, mut objects) = (Ledger::new(limit), Objects::default());
    for step in steps {
        match step {
            Step::Told(event) if objects.possible(&event) => {
                objects.apply(&event);
                ledger.apply(event.clone());
                if matches!(event, Event::Pod(_)) {
                    ledger.apply(event);
                }
            }
            Step::Told(_) => {}
            Step::Hold(pod, node, claim, stage) => {
                ledger.hold(&name(node), entry(pod, claim), stage);
            }
            Step::Release(pod) => ledger.release(&uid(pod)),
            Step::Expire(now_ms) => ledger.expire(now_ms),
        }
    }
    (ledger, objects)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, ..ProptestConfig::default() })]

    #[test]
    fn equals_one_made_from_scratch(
        limit in start_limit(), steps in prop::collection::vec(step(), 0..40), pods_first: bool,
    ) {
        let (mut ledger, objects) = run(limit, steps);
        // Holds are no objects: they end with the process.
        for hold in ledger.holds.keys().cloned().collect::<Vec<_>>() {
            ledger.release(&hold);
        }
        // What pods took with them since the last reading is no object either, nor what they may have left: the next
        // reading settles it, or time does.
        for inventory in objects.inventories.values() {
            ledger.apply(inventory.clone());
        }
        // The rows say what the pages say, wherever a page was moved to.
        for node in ledger.nodes() {
            let found = ledger.find([node.name().as_str(), "nobody"].into_iter());
            prop_assert_eq!(&found, &[Some((node.row(), node)), None]);
            prop_assert_eq!(node.row(), &Row::with(node, node.gpus(), node.host()));
        }
        let mut now_ms = ledger.now_ms;
        if ledger.nodes.values().any(|node| !node.remains.is_empty()) {
            now_ms += remains::AT_MOST_MS;
        }
        let mut fresh = Ledger::new(limit);
        for event in objects.events(pods_first) {
            fresh.apply(event);
        }
        // Now, and when every start has taken too long.
        for now_ms in [now_ms, 100 * remains::AT_MOST_MS] {
            ledger.expire(now_ms);
            fresh.expire(now_ms);
            prop_assert_eq!(&ledger.nodes, &fresh.nodes);
            prop_assert_eq!(&ledger.bound, &fresh.bound);
            prop_assert_eq!(&ledger.neighbours, &fresh.neighbours);
            prop_assert!(fresh.holds.is_empty() && ledger.nodes.values().all(|node| node.holds.is_empty()));
            prop_assert!(ledger.deadlines.iter().all(|(at_ms, _)| *at_ms > now_ms));
        }
        prop_assert!(ledger.nodes().flat_map(NodeState::gpus).all(|gpu| gpu.starting.is_none()));
    }

    #[test]
    fn no_ghost_outlives_its_pod(
        limit in start_limit(), steps in prop::collection::vec(step(), 0..40), by_time: bool,
    ) {
        let (mut ledger, objects) = run(limit, steps);
        for pod in 0..PODS {
            ledger.release(&uid(pod));
            ledger.apply(Event::PodGone(uid(pod)));
        }
        if by_time {
            ledger.expire(ledger.now_ms + remains::AT_MOST_MS);
        }
        for inventory in objects.inventories.values() {
            let Event::Inventory(mut inventory) = inventory.clone() else { continue };
            for gpu in &mut inventory.gpus {
                (gpu.used, gpu.used_by) = (gpu.used.map(|_| Bytes(0)), BTreeMap::new());
                gpu.foreign = gpu.foreign.map(|_| Bytes(0));
                // Without any figure only time tells.
                if gpu.used.is_none() && !by_time {
                    gpu.foreign = Some(Bytes(0));
                }
            }
            ledger.apply(Event::Inventory(inventory));
        }
        for gpu in ledger.nodes().flat_map(NodeState::gpus) {
            prop_assert_eq!((gpu.free, gpu.tenants, &gpu.starting), (gpu.usable, 0, &None));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, ..ProptestConfig::default() })]

    #[test]
    fn free_is_what_the_definition_says(limit in start_limit(), steps in prop::collection::vec(step(), 0..40)) {
        let (ledger, _) = run(limit, steps);
        for node in ledger.nodes() {
            let remains = node.remains.values().map(|remains| &remains.entry);
            let entries: Vec<&Entry> = node.pods.values().chain(node.holds.values()).chain(remains).collect();
            let inventory = node.inventory.iter().flat_map(|inventory| &inventory.gpus);
            for (state, facts) in node.gpus().iter().zip(inventory) {
                let is_on = |e: &&&Entry| e.claim.gpus.as_ref().is_none_or(|gpus| gpus.contains(&facts.id));
                let on: Vec<_> = entries.iter().filter(is_on).collect();
                let held: u64 = on
                    .iter()
                    .map(|e| {
                        let used = facts.used_by.get(&e.uid).filter(|_| e.claim.gpus.is_some());
                        e.claim.bytes_per_gpu.0.max(used.map_or(0, |used| used.0))
                    })
                    .sum();
                let left: u64 = node
                    .departed
                    .iter()
                    .filter(|e| is_on(&e))
                    .map(|e| e.claim.bytes_per_gpu.0.max(facts.used_by.get(&e.uid).map_or(0, |used| used.0)))
                    .sum();
                // A pod that is entered on another GPU has no business on this one.
                let entered = || entries.iter().copied().chain(&node.departed);
                let known = |uid: &PodUid| entered().any(|e| e.uid == *uid && is_on(&&e));
                let strays: u64 = facts.used_by.iter().filter(|(uid, _)| !known(uid)).map(|(_, b)| b.0).sum();
                let used = facts.used.map_or(0, |u| u.0).saturating_sub(left);
                let occupied = (held + facts.foreign.map_or(0, |f| f.0) + strays).max(used);
                let whole = on.iter().any(|e| e.claim.sharing == Sharing::Exclusive);
                let free = if whole { 0 } else { facts.usable.0.saturating_sub(occupied) };
                // Without figures per process a stray is part of what exceeds the declared bytes, or all of it.
                let occupied_untold = held + used.saturating_sub(held).max(strays);
                let free_untold = if whole { 0 } else { facts.usable.0.saturating_sub(occupied_untold) };
                let expected = if facts.foreign.is_some() { free } else { free_untold };
                prop_assert_eq!(state.free, Bytes(expected));
                prop_assert_eq!(state.tenants, on.len());
                let starts = |e: &&&Entry| {
                    let held = node.holds.contains_key(&e.uid);
                    let begun = node.starts.get(&e.uid).and_then(|begun| begun.start.since_ms());
                    held || begun.is_some_and(|since| since.saturating_add(limit.unwrap_or(0)) > ledger.now_ms)
                };
                let starting = limit.is_some() && on.iter().copied().filter(|e| starts(e)).count() > 0;
                prop_assert_eq!(state.starting.is_some(), starting);
            }
        }
        for node in ledger.nodes() {
            let asked = node.pods.values().chain(node.holds.values()).map(|e| e.host);
            let asked: Host = asked.chain(node.neighbours.values().copied()).sum();
            let left = node.allocatable.map_or(Host::UNLIMITED, |all| all.saturating_sub(asked));
            prop_assert_eq!(node.host(), left);
        }
        // Every bound pod and every hold is on exactly one page.
        let pods: usize = ledger.nodes().map(|node| node.pods.len()).sum();
        let holds: usize = ledger.nodes().map(|node| node.holds.len()).sum();
        prop_assert_eq!((pods, holds), (ledger.bound.len(), ledger.holds.len()));
        prop_assert!(ledger.holds.keys().all(|uid| !ledger.bound.contains_key(uid)));
    }
}
