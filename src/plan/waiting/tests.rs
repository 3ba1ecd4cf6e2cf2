//! One GPU against the list that anybody would make by hand, and many for what must never be.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::api::gpu_request::Sharing;
use crate::api::units::{GpuId, MilliCpu};
use crate::plan::gating::Labels;
use crate::plan::ledger::{
    Claim, Entry, Event, GpuFacts, Images, Inventory, NodeFacts, PodFacts, Stage, Start,
};
use crate::plan::placement;

const GIB: u64 = 1 << 30;

/// A node with one card, of so many GiB, and four cores.
fn node(name: &str, gib: u64) -> Vec<Event> {
    vec![
        Event::Node(NodeFacts {
            name: name.into(),
            fence: None,
            allocatable: Some(cores(4)),
            labels: Arc::new(Labels::from([("name".to_owned(), name.to_owned())])),
            images: Images::default(),
        }),
        Event::Inventory(Inventory {
            node: name.into(),
            closed: None,
            gpus: vec![GpuFacts {
                id: format!("GPU-{name}").as_str().into(),
                index: 0,
                usable: Bytes(gib * GIB),
                used: None,
                foreign: None,
                used_by: BTreeMap::new(),
                closed: None,
            }],
        }),
    ]
}

fn cores(cores: u64) -> Host {
    Host {
        cpu: MilliCpu(cores * 1000),
        memory: Bytes(0),
    }
}

fn nodes(gib: &[u64]) -> Ledger {
    let events = gib
        .iter()
        .enumerate()
        .flat_map(|(number, gib)| node(&format!("n{number}"), *gib));
    Ledger::rebuild(events)
}

fn asks(gib: u64) -> Ask {
    let request = GpuRequest {
        gpus: NonZeroU32::MIN,
        bytes_per_gpu: Bytes(gib * GIB),
        sharing: Sharing::Shared,
    };
    Ask {
        want: Want {
            gpus: Some(request.clone()),
            host: Host::default(),
            needs: placement::Needs::default(),
        },
        request,
        priority: 0,
        evicts: true,
        tolerations: None,
    }
}

fn pod(number: i64, gib: u64) -> Waiting {
    Waiting {
        uid: format!("uid-{number}").as_str().into(),
        name: format!("models/p{number}"),
        created_ms: number,
        needs: Needs::Room(asks(gib)),
    }
}

fn entry(uid: &PodUid, node: &str, gib: u64) -> Entry {
    Entry {
        uid: uid.clone(),
        namespace: "models".into(),
        name: uid.as_str().into(),
        host: Host::default(),
        claim: Claim {
            gpus: Some(vec![GpuId::from(format!("GPU-{node}").as_str())]),
            bytes_per_gpu: Bytes(gib * GIB),
            sharing: Sharing::Shared,
        },
    }
}

fn bind(ledger: &mut Ledger, uid: &str, node: &str, gib: u64) {
    ledger.apply(Event::Pod(PodFacts {
        entry: entry(&uid.into(), node, gib),
        node: Some(node.into()),
        finished: false,
        start: Start::Over,
    }));
}

/// Names of those that may go on.
fn open(ledger: &Ledger, opened: &[Waiting], gated: &[Waiting]) -> Vec<String> {
    let bound = HashMap::new();
    let openings = decide(cluster(ledger, &bound), opened, gated);
    openings.into_iter().map(|opening| opening.name).collect()
}

fn cluster<'a>(ledger: &'a Ledger, bound: &'a HashMap<PodUid, i32>) -> Cluster<'a> {
    Cluster {
        ledger,
        bar: &|_, _| None,
        bound,
    }
}

fn told(ledger: &Ledger, ask: &Ask) -> Option<String> {
    let bound = HashMap::new();
    room(cluster(ledger, &bound), ask)
        .err()
        .map(|why| why.to_string())
}

#[test]
fn by_priority_then_age_and_a_small_one_passes_a_large_one() {
    let ledger = nodes(&[24]);
    let mut urgent = pod(9, 10);
    let Needs::Room(ask) = &mut urgent.needs else {
        unreachable!()
    };
    ask.priority = 1;
    let gated = [pod(3, 4), pod(1, 20), pod(2, 8), urgent];
    assert_eq!(
        open(&ledger, &[], &gated),
        ["models/p9", "models/p2", "models/p3"]
    );
}

#[test]
fn race_those_that_went_on_keep_their_place_until_it_is_reserved() {
    let mut ledger = nodes(&[24]);
    let (opened, gated) = ([pod(1, 18)], [pod(2, 18), pod(3, 6)]);
    assert_eq!(open(&ledger, &opened, &gated), ["models/p3"]);
    // With its reservation in the ledger it is counted once, not twice.
    let (opened, gated) = ([pod(1, 8)], [pod(2, 16)]);
    ledger.hold(&"n0".into(), entry(&"uid-1".into(), "n0", 8), Stage::Posted);
    assert_eq!(open(&ledger, &opened, &gated), ["models/p2"]);
}

#[test]
fn one_that_fits_nowhere_takes_no_place() {
    let ledger = nodes(&[24]);
    assert_eq!(open(&ledger, &[pod(1, 30)], &[pod(2, 24)]), ["models/p2"]);
}

#[test]
fn without_any_gpu_node_all_wait_and_are_told() {
    let ledger = Ledger::default();
    assert_eq!(open(&ledger, &[], &[pod(1, 1)]), Vec::<String>::new());
    assert_eq!(
        told(&ledger, &asks(1)).as_deref(),
        Some("there is no GPU node with room for 1 GiB on one GPU")
    );
}

#[test]
fn what_the_scheduler_filters_on_is_room_too() {
    let ledger = nodes(&[24, 40]);
    let mut picky = asks(30);
    picky.want.needs.require("name", std::iter::once("n0"));
    assert_eq!(
        told(&ledger, &picky).as_deref(),
        Some(
            "0 of 2 GPU nodes have room for 30 GiB on one GPU: 1 no GPU with 30 GiB of memory, even empty, 1 not among \
             those that its nodeSelector or affinity names"
        )
    );
    let mut busy = asks(1);
    busy.want.host = cores(5);
    assert!(
        told(&ledger, &busy)
            .unwrap()
            .contains("2 with too little CPU or memory")
    );
    busy.want.host = cores(4);
    assert_eq!(told(&ledger, &busy), None);
    // Of two that need all cores of a node each, one goes to each node.
    let gated: Vec<Waiting> = (0..3)
        .map(|number| Waiting {
            needs: Needs::Room(busy.clone()),
            ..pod(number, 1)
        })
        .collect();
    assert_eq!(open(&ledger, &[], &gated), ["models/p0", "models/p1"]);
}

#[test]
fn a_node_that_the_scheduler_refuses_is_no_room() {
    let (ledger, bound) = (nodes(&[24]), HashMap::new());
    let barred = Cluster {
        bar: &|_, _| Some(Bar::NotReady),
        ..cluster(&ledger, &bound)
    };
    assert_eq!(decide(barred, &[], &[pod(1, 1)]), []);
    let told = room(barred, &asks(1)).unwrap_err().to_string();
    assert!(told.ends_with(": 1 not Ready"), "{told}");
}

#[test]
fn a_pod_that_could_evict_is_never_kept() {
    let mut ledger = nodes(&[24]);
    bind(&mut ledger, "low", "n0", 20);
    let bound = HashMap::from([("low".into(), -1)]);
    let cluster = cluster(&ledger, &bound);
    let mut ask = asks(18);
    assert_eq!(room(cluster, &ask), Ok(()));
    let gated = Waiting {
        needs: Needs::Room(ask.clone()),
        ..pod(1, 18)
    };
    assert_eq!(decide(cluster, &[], &[gated]).len(), 1);
    // Equal priorities evict nobody, nor does who must not; and eviction makes no card larger.
    for (priority, evicts, gib) in [(-1, true, 18), (0, false, 18), (0, true, 30)] {
        ask = Ask {
            priority,
            evicts,
            ..asks(gib)
        };
        assert!(room(cluster, &ask).is_err(), "{ask:?}");
    }
}

#[test]
fn what_needs_nothing_of_ebb_goes_on() {
    let stray = Waiting {
        needs: Needs::Nothing("another scheduler"),
        ..pod(1, 0)
    };
    assert_eq!(open(&Ledger::default(), &[], &[stray]), ["models/p1"]);
}

proptest! {
    #[test]
    fn on_one_gpu_it_is_the_list_made_by_hand(
        free in 0u64..40,
        opened in proptest::collection::vec(1u64..20, 0..4),
        gated in proptest::collection::vec((1u64..20, 0i32..3), 0..12),
    ) {
        let ledger = nodes(&[free]);
        let mut left = free;
        let opened: Vec<Waiting> = (100..).zip(&opened).map(|(number, gib)| pod(number, *gib)).collect();
        for gib in opened.iter().map(gib) {
            if gib <= left {
                left -= gib;
            }
        }
        let mut pods: Vec<Waiting> = (0..).zip(&gated).map(|(number, (gib, priority))| Waiting {
            needs: Needs::Room(Ask { priority: *priority, ..asks(*gib) }),
            ..pod(number, *gib)
        }).collect();
        let found = open(&ledger, &opened, &pods);
        pods.sort_by_key(|pod| match &pod.needs {
            Needs::Room(ask) => (Reverse(ask.priority), pod.created_ms),
            Needs::Nothing(_) => unreachable!(),
        });
        let mut expected = Vec::new();
        for pod in &pods {
            if gib(pod) <= left {
                left -= gib(pod);
                expected.push(pod.name.clone());
            }
        }
        prop_assert_eq!(found, expected);
    }

    /// However pods and nodes are: those that go on fit all together, and none of those kept fits beside them.
    #[test]
    fn no_more_than_fit_and_none_kept_in_vain(
        cards in proptest::collection::vec(0u64..30, 0..5),
        gated in proptest::collection::vec(1u64..20, 0..20),
    ) {
        let mut ledger = nodes(&cards);
        let pods: Vec<Waiting> = (0..).zip(&gated).map(|(number, gib)| pod(number, *gib)).collect();
        let found = open(&ledger, &[], &pods);
        // Bound one after the other, each to the fullest GPU that takes it, as the scheduler does.
        for pod in pods.iter().filter(|pod| found.contains(&pod.name)) {
            let fitting = ledger.nodes().filter(|node| node.free() >= Bytes(gib(pod) * GIB));
            let fullest = fitting.min_by_key(|node| (node.free(), node.name().clone()));
            let node = fullest.map(|node| node.name().to_string());
            prop_assert!(node.is_some(), "{} went on and has no room", pod.name);
            bind(&mut ledger, pod.uid.as_str(), &node.unwrap(), gib(pod));
        }
        for pod in pods.iter().filter(|pod| !found.contains(&pod.name)) {
            prop_assert!(told(&ledger, &asks(gib(pod))).is_some(), "{} is kept and has room", pod.name);
        }
    }
}

fn gib(pod: &Waiting) -> u64 {
    match &pod.needs {
        Needs::Room(ask) => ask.request.bytes_per_gpu.0 / GIB,
        Needs::Nothing(_) => 0,
    }
}
