//! Ebb: the nodes and pods are told to a ledger, and the scheduler's questions are put to the functions that its extender
//! calls. What kube-scheduler does between them is done here: it filters by CPU, memory and card type before it asks, and
//! takes one of the nodes with the highest score, by chance among equals.
//!
//! Ebb is not told the list: it learns the mix from what comes. Who places the pods without a GPU is [`Others`].

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use ebb::api::gpu_request::{GpuRequest, Sharing};
use ebb::api::host::Host;
use ebb::api::packing::Packing;
use ebb::api::units::{Bytes, GpuId, MilliCpu, NodeName, PodUid};
use ebb::plan::ledger::{
    Claim, Entry, Event, GpuFacts, Images, Inventory, Ledger, NeighbourFacts, NodeFacts, NodeState, PodFacts,
    Start,
};
use ebb::plan::placement::{self, Judge, Mix, Needs, Want};
use ebb_lab::bench::chance::Chance;

use super::cluster::{Cluster, Packer, Place};
use super::lists::{Kind, Lists, Machine, WHOLE};

/// Memory that stands for a thousandth of a GPU: cards are compared by shares in these lists, and all have 16,000 MiB.
const MILLI: u64 = 16 << 20;
const MIB: u64 = 1 << 20;
/// Label that says a node's type of card.
const CARD: &str = "card";

/// Who places the pods without a GPU.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Others {
    /// Ebb, as where `managedResources` is left out of its scheduler's configuration and all pods are its own.
    Ebb,
    /// kube-scheduler, as Ebb is installed: where the most CPU and memory is free, each as a part of the node's
    /// (NodeResourcesFit's default, LeastAllocated).
    KubeScheduler,
}

/// Ebb's ledger and its record of requests.
pub struct Ebb {
    others: Others,
    /// The nodes when they were empty.
    empty: Vec<Machine>,
    ledger: Ledger,
    mix: Mix,
    wants: Vec<Want>,
    names: Vec<NodeName>,
    pods: usize,
}

impl Ebb {
    /// Ebb on empty nodes.
    pub fn new(lists: &Lists, cluster: &Cluster, others: Others) -> Ebb {
        let names: Vec<NodeName> = (0..cluster.machines.len())
            .map(|number| format!("{number:06}").as_str().into())
            .collect();
        let mut ledger = Ledger::default();
        for (name, machine) in names.iter().zip(&cluster.machines) {
            for event in told(name, machine) {
                ledger.apply(event);
            }
        }
        Ebb {
            others,
            empty: cluster.machines.clone(),
            ledger,
            mix: Mix::default(),
            wants: lists.kinds.iter().map(want).collect(),
            names,
            pods: 0,
        }
    }

    /// Free CPU and memory of a node, in thousandths of what it has, together.
    fn least_allocated(&self, cluster: &Cluster, machine: usize) -> u64 {
        let (all, now) = (&self.empty[machine], &cluster.machines[machine]);
        let part = |now: u64, all: u64| now * 1000 / all.max(1);
        part(now.cpu_milli, all.cpu_milli) + part(now.memory_mib, all.memory_mib)
    }

    fn uid(&self) -> PodUid {
        format!("pod-{}", self.pods).as_str().into()
    }
}

impl Packer for Ebb {
    fn came(&mut self, kind: usize) {
        self.pods += 1;
        self.mix.observe(&self.uid(), &self.wants[kind]);
    }

    fn place(
        &mut self,
        cluster: &Cluster,
        _: &[Kind],
        kind: usize,
        fitting: &[usize],
        chance: &mut Chance,
    ) -> Place {
        let want = &self.wants[kind];
        // No GPU to waste: what a scheduler finds without asking anybody.
        if let Some(bare) = fitting
            .iter()
            .find(|machine| cluster.machines[**machine].gpus.is_empty())
        {
            return Place {
                machine: *bare,
                gpus: Vec::new(),
            };
        }
        if want.gpus.is_none() && self.others == Others::KubeScheduler {
            let score = |machine: &&usize| self.least_allocated(cluster, **machine);
            let most = fitting.iter().min_by_key(|machine| Reverse(score(machine)));
            return Place {
                machine: *most.expect("some node fits"),
                gpus: Vec::new(),
            };
        }
        let hands = self.mix.hands(&self.ledger);
        let judge = Judge {
            packing: Packing::default(),
            hands: &hands,
            images: &[],
        };
        let nodes: Vec<&NodeState> = fitting
            .iter()
            .map(|machine| {
                self.ledger
                    .node(self.names[*machine].as_str())
                    .expect("all nodes were told")
            })
            .collect();
        let scores = placement::rank(nodes.iter().copied(), want, None, judge).scores();
        let winner = highest(&scores, chance);
        // Bind asks again, on that node.
        let choice = placement::place(nodes[winner], want, None, judge)
            .expect("it fits on the nodes that were ranked");
        let position = |id: &GpuId| {
            nodes[winner]
                .gpus()
                .iter()
                .position(|gpu| gpu.id == *id)
                .expect("a GPU of the node")
        };
        Place {
            machine: fitting[winner],
            gpus: choice.gpus.iter().map(position).collect(),
        }
    }

    fn placed(&mut self, _: &[Kind], kind: usize, place: &Place) {
        let want = &self.wants[kind];
        let (uid, name) = (self.uid(), &self.names[place.machine]);
        let Some(request) = &want.gpus else {
            self.ledger.apply(Event::Neighbour(NeighbourFacts {
                uid,
                node: Some(name.clone()),
                host: want.host,
                finished: false,
            }));
            return;
        };
        let gpus = place.gpus.iter().map(|gpu| gpu_id(name, *gpu)).collect();
        self.ledger.apply(Event::Pod(PodFacts {
            entry: Entry {
                uid: uid.clone(),
                namespace: "bench".into(),
                name: uid.0,
                host: want.host,
                claim: Claim::of(request, gpus),
            },
            node: Some(name.clone()),
            finished: false,
            start: Start::Over,
        }));
    }
}

/// One of the highest, as kube-scheduler takes it.
fn highest(scores: &[u8], chance: &mut Chance) -> usize {
    let best = scores.iter().max();
    let equal: Vec<usize> = (0..scores.len())
        .filter(|node| Some(&scores[*node]) == best)
        .collect();
    equal[chance.below(equal.len())]
}

fn gpu_id(node: &NodeName, gpu: usize) -> GpuId {
    format!("{node}/{gpu}").as_str().into()
}

fn told(name: &NodeName, machine: &Machine) -> [Event; 2] {
    let gpu = |index: u32| GpuFacts {
        id: gpu_id(name, index as usize),
        index,
        usable: Bytes(u64::from(WHOLE) * MILLI),
        used: None,
        foreign: None,
        used_by: BTreeMap::new(),
        closed: None,
    };
    let gpus = u32::try_from(machine.gpus.len()).unwrap_or(u32::MAX);
    [
        Event::Node(NodeFacts {
            name: name.clone(),
            fence: None,
            allocatable: Some(Host {
                cpu: MilliCpu(machine.cpu_milli),
                memory: Bytes(machine.memory_mib * MIB),
            }),
            labels: Arc::new(BTreeMap::from([(CARD.to_owned(), machine.card.clone())])),
            images: Images::default(),
        }),
        Event::Inventory(Inventory {
            node: name.clone(),
            closed: None,
            gpus: (0..gpus).map(gpu).collect(),
        }),
    ]
}

fn want(kind: &Kind) -> Want {
    let mut needs = Needs::default();
    if !kind.cards.is_empty() {
        needs.require(CARD, kind.cards.iter().map(String::as_str));
    }
    Want {
        gpus: NonZeroU32::new(kind.gpus).map(|gpus| GpuRequest {
            gpus,
            bytes_per_gpu: Bytes(u64::from(kind.gpu_milli) * MILLI),
            // One whole card is a share of 1000 in these lists; several are whole cards.
            sharing: if kind.gpus > 1 && kind.gpu_milli == WHOLE {
                Sharing::Exclusive
            } else {
                Sharing::Shared
            },
        }),
        host: Host {
            cpu: MilliCpu(kind.cpu_milli),
            memory: Bytes(kind.memory_mib * MIB),
        },
        needs,
    }
}
