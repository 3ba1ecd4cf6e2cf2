//! What is granted, against a card that really has only so much: pods load, are Ready, end gently or by force, processes
//! outlive their pods, others use the card too, and readings come when they come.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::num::NonZeroU32;

use proptest::prelude::*;

use super::*;
use crate::api::gpu_request::{GpuRequest, Sharing};
use crate::api::host::Host;
use crate::api::units::{Bytes, GpuId};
use crate::plan::placement;

const USABLE: u64 = 24;
const GPUS: u8 = 2;
const PODS: u8 = 8;
const LIMIT_MS: u64 = 60_000;

fn gpu(index: u8) -> GpuId {
    GpuId::from(format!("GPU-{index}").as_str())
}

fn uid(pod: u8) -> PodUid {
    PodUid::from(format!("pod-{pod}").as_str())
}

fn node() -> NodeName {
    NodeName::from("node-7")
}

#[derive(Clone, Debug)]
enum Step {
    /// A pod asks for so much on so many GPUs, and is bound if it fits.
    Ask { bytes: u64, gpus: u32 },
    /// Its process begins to load and has this part of what it declared.
    Load { pod: u8, eighths: u64 },
    /// It has all of it, and is Ready.
    Ready(u8),
    /// Its container crashes and starts again.
    Crash(u8),
    /// It ends, and then goes.
    End(u8),
    /// It goes, and its process lives.
    Force(u8),
    /// A process whose pod is gone ends.
    Reap(u8),
    /// Somebody else uses a card.
    Foreign { gpu: u8, bytes: u64 },
    /// A card is lost, or comes back.
    Lost { gpu: u8, lost: bool },
    /// The agent reads.
    Read,
    /// Time passes.
    Wait(u64),
    /// Another leader begins.
    Rebuild,
}

fn step() -> impl Strategy<Value = Step> {
    let pod = || 0..PODS;
    prop_oneof![
        6 => (2u64..16, 1u32..=2).prop_map(|(bytes, gpus)| Step::Ask { bytes, gpus }),
        3 => (pod(), 0u64..=8).prop_map(|(pod, eighths)| Step::Load { pod, eighths }),
        4 => pod().prop_map(Step::Ready),
        1 => pod().prop_map(Step::Crash),
        1 => pod().prop_map(Step::End),
        2 => pod().prop_map(Step::Force),
        1 => pod().prop_map(Step::Reap),
        1 => (0..GPUS, 0u64..8).prop_map(|(gpu, bytes)| Step::Foreign { gpu, bytes }),
        1 => (0..GPUS, any::<bool>()).prop_map(|(gpu, lost)| Step::Lost { gpu, lost }),
        3 => Just(Step::Read),
        2 => (0u64..20_000).prop_map(Step::Wait),
        1 => Just(Step::Rebuild),
    ]
}

struct Pod {
    facts: PodFacts,
    /// What its process really has on each of its GPUs.
    has: u64,
}

/// The machine and the API server, as they really are.
struct World {
    ledger: Ledger,
    now_ms: u64,
    pods: BTreeMap<u8, Pod>,
    /// Processes whose pods are gone, and since when.
    orphans: BTreeMap<u8, (Pod, u64)>,
    foreign: [u64; GPUS as usize],
    lost: [bool; GPUS as usize],
    /// Whether NVML tells memory per process here.
    told_apart: bool,
    next: u8,
}

impl World {
    fn new(told_apart: bool) -> World {
        let mut world = World {
            ledger: Ledger::new(Some(LIMIT_MS)),
            now_ms: 1_000_000,
            pods: BTreeMap::new(),
            orphans: BTreeMap::new(),
            foreign: [0; GPUS as usize],
            lost: [false; GPUS as usize],
            told_apart,
            next: 0,
        };
        world.ledger.expire(world.now_ms);
        world.ledger.apply(World::node());
        world.read();
        world
    }

    fn node() -> Event {
        Event::Node(NodeFacts {
            name: node(),
            fence: None,
            allocatable: None,
            labels: Arc::default(),
            images: Default::default(),
        })
    }

    fn processes(&self) -> impl Iterator<Item = (u8, &Pod)> {
        let orphans = self.orphans.iter().map(|(pod, (process, _))| (*pod, process));
        self.pods
            .iter()
            .map(|(number, pod)| (*number, pod))
            .chain(orphans)
    }

    fn inventory(&self) -> Event {
        let on = |pod: &Pod, index: u8| pod.facts.entry.claim.gpus.as_ref().unwrap().contains(&gpu(index));
        let gpus = (0..GPUS).map(|index| {
            let mut used_by = BTreeMap::new();
            for (number, pod) in self.processes().filter(|(_, pod)| on(pod, index) && pod.has > 0) {
                used_by.insert(uid(number), Bytes(pod.has));
            }
            let foreign = self.foreign[usize::from(index)];
            let used = foreign + used_by.values().map(|bytes| bytes.0).sum::<u64>();
            GpuFacts {
                id: gpu(index),
                index: index.into(),
                usable: Bytes(USABLE),
                used: Some(Bytes(used)),
                foreign: self.told_apart.then_some(Bytes(foreign)),
                used_by: if self.told_apart { used_by } else { BTreeMap::new() },
                closed: self.lost[usize::from(index)].then(|| "lost".into()),
            }
        });
        Event::Inventory(Inventory {
            node: node(),
            closed: None,
            gpus: gpus.collect(),
        })
    }

    fn read(&mut self) {
        let inventory = self.inventory();
        self.ledger.apply(inventory);
    }

    fn tell(&mut self, number: u8) {
        let facts = self.pods[&number].facts.clone();
        self.ledger.apply(Event::Pod(facts));
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Ask { bytes, gpus } => self.ask(bytes, gpus),
            Step::Load { pod, eighths } => self.change(pod, |pod, since_ms| {
                if !matches!(pod.facts.start, Start::Over) {
                    pod.has = pod.facts.entry.claim.bytes_per_gpu.0 * eighths / 8;
                    pod.facts.start = Start::Loading {
                        since_ms: pod.facts.start.since_ms().unwrap_or(since_ms),
                    };
                }
            }),
            Step::Ready(pod) => self.change(pod, |pod, _| {
                pod.has = pod.facts.entry.claim.bytes_per_gpu.0;
                pod.facts.start = Start::Over;
            }),
            Step::Crash(pod) => self.change(pod, |pod, since_ms| {
                if matches!(pod.facts.start, Start::Over) {
                    pod.has = 0;
                    pod.facts.start = Start::Loading { since_ms };
                }
            }),
            Step::End(number) => {
                self.change(number, |pod, _| pod.facts.finished = true);
                if self.pods.remove(&number).is_some() {
                    self.ledger.apply(Event::PodGone(uid(number)));
                }
            }
            Step::Force(number) => {
                if let Some(pod) = self.pods.remove(&number) {
                    self.ledger.apply(Event::PodGone(uid(number)));
                    self.orphans.insert(number, (pod, self.now_ms));
                }
            }
            Step::Reap(number) => {
                self.orphans.remove(&number);
            }
            Step::Foreign { gpu, bytes } => {
                self.foreign[usize::from(gpu)] = bytes;
                self.read();
            }
            Step::Lost { gpu, lost } => {
                self.lost[usize::from(gpu)] = lost;
                self.read();
            }
            Step::Read => self.read(),
            Step::Wait(ms) => {
                self.now_ms += ms;
                // A process that was killed is gone within a minute.
                let now_ms = self.now_ms;
                self.orphans
                    .retain(|_, (_, since_ms)| now_ms - *since_ms < 60_000);
                self.ledger.expire(now_ms);
            }
            // Which part of a card's total is an orphan's, only the leader knows that saw its pod.
            Step::Rebuild if !self.told_apart => {}
            Step::Rebuild => {
                let mut ledger = Ledger::new(Some(LIMIT_MS));
                ledger.apply(World::node());
                for pod in self.pods.values() {
                    ledger.apply(Event::Pod(pod.facts.clone()));
                }
                ledger.expire(self.now_ms);
                self.ledger = ledger;
                self.read();
            }
        }
    }

    fn change(&mut self, number: u8, change: impl FnOnce(&mut Pod, u64)) {
        let now_ms = self.now_ms;
        if let Some(pod) = self.pods.get_mut(&number) {
            change(pod, now_ms);
            self.tell(number);
        }
    }

    fn ask(&mut self, bytes: u64, gpus: u32) {
        if self.next == PODS {
            return;
        }
        let request = GpuRequest {
            gpus: NonZeroU32::new(gpus).unwrap(),
            bytes_per_gpu: Bytes(bytes),
            sharing: Sharing::Shared,
        };
        let Ok(choice) = placement::fit(self.ledger.node("node-7").unwrap(), &request, None) else {
            return;
        };
        let number = self.next;
        self.next += 1;
        self.check(&choice.gpus, bytes);
        let entry = Entry {
            uid: uid(number),
            namespace: "models".into(),
            name: format!("model-{number}").into(),
            host: Host::default(),
            claim: Claim::of(&request, choice.gpus),
        };
        assert!(self.ledger.hold(&node(), entry.clone(), Stage::Posted));
        // While it is held nobody else starts there.
        let beside = placement::still_fits(
            self.ledger.node("node-7").unwrap(),
            &GpuRequest {
                gpus: NonZeroU32::MIN,
                bytes_per_gpu: Bytes(1),
                sharing: Sharing::Shared,
            },
            &entry.claim.gpus.as_ref().unwrap()[..1],
            &uid(PODS),
        );
        assert!(!beside, "a second start beside one that is held");
        let facts = PodFacts {
            entry,
            node: Some(node()),
            finished: false,
            start: Start::Bound {
                since_ms: self.now_ms,
            },
        };
        self.pods.insert(number, Pod { facts, has: 0 });
        self.tell(number);
    }

    /// What really is on the cards when a pod is granted these.
    fn check(&self, gpus: &[GpuId], bytes: u64) {
        for id in gpus {
            let on = |pod: &Pod| pod.facts.entry.claim.gpus.as_ref().unwrap().contains(id);
            let declared: u64 = self
                .pods
                .values()
                .filter(|pod| on(pod))
                .map(|pod| pod.facts.entry.claim.bytes_per_gpu.0)
                .sum();
            let orphaned: u64 = self
                .orphans
                .values()
                .filter(|(pod, _)| on(pod))
                .map(|(pod, _)| pod.has)
                .sum();
            let index = (0..GPUS).find(|index| gpu(*index) == *id).unwrap();
            // In a card's total alone, it hides behind what pods declared and do not use yet.
            let foreign = if self.told_apart {
                self.foreign[usize::from(index)]
            } else {
                0
            };
            assert!(
                bytes + declared + orphaned + foreign <= USABLE,
                "{bytes} granted on {id:?} beside {declared} declared, {orphaned} orphaned and {foreign} foreign"
            );
            assert!(!self.lost[usize::from(index)], "granted on a lost card");
            let starting = |pod: &&Pod| {
                let since_ms = pod.facts.start.since_ms();
                on(pod) && since_ms.is_some_and(|since_ms| since_ms + LIMIT_MS > self.now_ms)
            };
            assert_eq!(
                self.pods.values().filter(starting).count(),
                0,
                "a second start on {id:?}"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, ..ProptestConfig::default() })]

    #[test]
    fn adversarial_nothing_is_granted_that_is_not_there(
        told_apart: bool, steps in prop::collection::vec(step(), 0..60),
    ) {
        let mut world = World::new(told_apart);
        for step in steps {
            world.take(step);
        }
    }
}
