//! Placement against brute force.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::api::host::Host;
use crate::api::packing::Packing;
use crate::plan::gating::Labels;
use crate::plan::ledger::{
    Claim, Entry, Event, Fence, GpuFacts, Images, Inventory, NodeFacts, PodFacts, Start,
};

const GIB: u64 = 1 << 30;

fn request(gpus: u32, bytes: u64, sharing: Sharing) -> GpuRequest {
    GpuRequest {
        gpus: NonZeroU32::new(gpus).unwrap(),
        bytes_per_gpu: Bytes(bytes),
        sharing,
    }
}

fn node(name: &str, gpus: &[u64]) -> Vec<Event> {
    let gpu = |(index, usable): (u32, &u64)| GpuFacts {
        id: GpuId::from(format!("{name}/{index}").as_str()),
        index,
        usable: Bytes(*usable),
        used: None,
        foreign: None,
        used_by: BTreeMap::new(),
        closed: None,
    };
    vec![
        Event::Node(NodeFacts {
            name: name.into(),
            fence: None,
            allocatable: None,
            labels: Arc::default(),
            images: Images::default(),
        }),
        Event::Inventory(Inventory {
            node: name.into(),
            closed: None,
            gpus: (0u32..).zip(gpus).map(gpu).collect(),
        }),
    ]
}

fn gpu_label() -> Arc<Labels> {
    Arc::new(Labels::from([(
        crate::api::names::GPU_LABEL.to_owned(),
        "true".to_owned(),
    )]))
}

fn want(request: &GpuRequest) -> Want {
    Want {
        gpus: Some(request.clone()),
        host: Host::default(),
        needs: Needs::default(),
    }
}

fn best(ledger: &Ledger, request: &GpuRequest) -> Result<(NodeName, Choice), Refusal> {
    let hands = Hands::default();
    let judge = Judge {
        packing: Packing::BestFit,
        hands: &hands,
        images: &[],
    };
    let nodes: Vec<&NodeState> = ledger.nodes().collect();
    let ranking = rank(nodes.iter().copied(), &want(request), None, judge);
    match ranking.order.into_iter().next() {
        Some((node, choice)) => Ok((nodes[node].name().clone(), choice)),
        None => somewhere(ledger, request).map(|_| unreachable!()),
    }
}

fn bind(ledger: &mut Ledger, pod: usize, request: &GpuRequest) -> Result<(NodeName, Choice), Refusal> {
    let (node, choice) = best(ledger, request)?;
    ledger.apply(Event::Pod(PodFacts {
        entry: Entry {
            uid: format!("pod-{pod}").as_str().into(),
            namespace: "models".into(),
            name: format!("pod-{pod}").into(),
            host: Host::default(),
            claim: Claim::of(request, choice.gpus.clone()),
        },
        node: Some(node.clone()),
        finished: false,
        start: Start::Over,
    }));
    Ok((node, choice))
}

fn requests() -> impl Strategy<Value = Vec<GpuRequest>> {
    let sharing = prop_oneof![4 => Just(Sharing::Shared), 1 => Just(Sharing::Exclusive)];
    prop::collection::vec(
        (1u32..=3, 1u64..=45, sharing).prop_map(|(gpus, bytes, sharing)| request(gpus, bytes, sharing)),
        1..30,
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn never_over_a_gpu_and_refused_only_without_room(
        shapes in prop::collection::vec(prop::collection::vec(prop_oneof![Just(24u64), Just(40), Just(80)], 0..4), 1..4),
        requests in requests(),
    ) {
        let mut ledger = Ledger::default();
        for (index, gpus) in shapes.iter().enumerate() {
            for event in node(&format!("node-{index}"), gpus) {
                ledger.apply(event);
            }
        }
        // Kept apart from the ledger: usable, taken and tenants of every GPU.
        let mut gpus: BTreeMap<GpuId, (u64, u64, usize)> = BTreeMap::new();
        for node in ledger.nodes() {
            for gpu in node.gpus() {
                gpus.insert(gpu.id.clone(), (gpu.usable.0, 0, 0));
            }
        }
        for (index, request) in requests.iter().enumerate() {
            let fits = (0..shapes.len()).any(|node| {
                let room = gpus.iter().filter(|(id, (usable, taken, tenants))| {
                    id.as_str().starts_with(&format!("node-{node}/"))
                        && usable - taken >= request.bytes_per_gpu.0
                        && (request.sharing == Sharing::Shared || *tenants == 0)
                });
                room.count() >= count(request)
            });
            prop_assert_eq!(fits_anywhere(&ledger, request).is_ok(), fits);
            prop_assert_eq!(&best(&ledger, request), &best(&ledger.clone(), request));
            match bind(&mut ledger, index, request) {
                Ok((_, choice)) => {
                    prop_assert!(fits);
                    prop_assert_eq!(choice.gpus.len(), count(request));
                    for id in &choice.gpus {
                        let (usable, taken, tenants) = gpus.get_mut(id).unwrap();
                        *taken = match request.sharing {
                            Sharing::Shared => *taken + request.bytes_per_gpu.0,
                            Sharing::Exclusive => *usable,
                        };
                        *tenants += 1;
                        prop_assert!(*taken <= *usable);
                    }
                }
                Err(refusal) => {
                    prop_assert!(!fits);
                    prop_assert!(!refusal.to_string().is_empty());
                }
            }
        }
    }
}

#[test]
fn two_that_fit_together_share_one_gpu() {
    let mut ledger = Ledger::default();
    for name in ["a", "b"] {
        node(name, &[80 * GIB, 80 * GIB])
            .into_iter()
            .for_each(|event| ledger.apply(event));
    }
    let small = request(1, 18 * GIB, Sharing::Shared);
    let first = bind(&mut ledger, 0, &small).unwrap();
    let second = bind(&mut ledger, 1, &small).unwrap();
    assert_eq!(first.0, second.0);
    assert_eq!(first.1.gpus, second.1.gpus);
}

#[test]
fn a_used_node_comes_before_a_tighter_empty_one() {
    let mut ledger = Ledger::rebuild(node("big", &[80 * GIB]));
    bind(&mut ledger, 0, &request(1, 18 * GIB, Sharing::Shared)).unwrap();
    node("small", &[24 * GIB])
        .into_iter()
        .for_each(|event| ledger.apply(event));
    let (node, _) = best(&ledger, &request(1, 20 * GIB, Sharing::Shared)).unwrap();
    assert_eq!(node.as_str(), "big");
}

#[test]
fn the_tightest_gpu_and_the_smallest_whole_card() {
    let mut ledger = Ledger::rebuild(node("a", &[80, 24, 40]));
    let gpu = |ledger: &Ledger, request: &GpuRequest| best(ledger, request).unwrap().1.gpus[0].to_string();
    assert_eq!(gpu(&ledger, &request(1, 20, Sharing::Shared)), "a/1");
    assert_eq!(gpu(&ledger, &request(1, 30, Sharing::Exclusive)), "a/2");
    bind(&mut ledger, 0, &request(1, 55, Sharing::Shared)).unwrap();
    assert_eq!(gpu(&ledger, &request(1, 25, Sharing::Shared)), "a/0");
}

#[test]
fn refusals_say_the_nearest_miss() {
    let mut ledger = Ledger::rebuild(node("node-7", &[24 * GIB, 40 * GIB]));
    bind(&mut ledger, 0, &request(1, 28 * GIB, Sharing::Shared)).unwrap();
    bind(&mut ledger, 1, &request(1, 8 * GIB, Sharing::Shared)).unwrap();
    bind(&mut ledger, 2, &request(1, 20 * GIB, Sharing::Shared)).unwrap();
    ledger.apply(Event::Node(NodeFacts {
        name: "old".into(),
        fence: Some(Fence::Releasing),
        allocatable: None,
        labels: gpu_label(),
        images: Images::default(),
    }));
    // A node whose agent says nothing counts; one that has no GPU does not.
    for (name, labels) in [("silent", gpu_label()), ("plain", Arc::default())] {
        ledger.apply(Event::Node(NodeFacts {
            name: name.into(),
            fence: None,
            allocatable: None,
            labels,
            images: Images::default(),
        }));
    }
    let refusal = best(&ledger, &request(1, 18 * GIB, Sharing::Shared)).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "0 of 3 GPU nodes have room for 18 GiB on one GPU: 1 being emptied for release, 1 no GPU told of by an \
         ebb-agent, 1 no GPU with 18 GiB free; nearest: GPU 0 of node-7 has 4 GiB free, 18 GiB asked"
    );
    assert_eq!(refusal.releasing(), 1);
}

#[test]
fn memory_that_no_pod_declared_is_told() {
    let mut ledger = Ledger::rebuild(node("n", &[24 * GIB]));
    let mut inventory = Inventory {
        node: "n".into(),
        closed: None,
        gpus: vec![GpuFacts {
            id: "n/0".into(),
            index: 0,
            usable: Bytes(24 * GIB),
            used: Some(Bytes(9 * GIB)),
            foreign: None,
            used_by: BTreeMap::new(),
            closed: None,
        }],
    };
    let words = |ledger: &Ledger| {
        let refusal = fits_anywhere(ledger, &request(1, 20 * GIB, Sharing::Shared)).unwrap_err();
        refusal.to_string()
    };
    ledger.apply(Event::Inventory(inventory.clone()));
    assert!(
        words(&ledger).ends_with("has 15 GiB free, 20 GiB asked; 9 GiB held by processes outside Kubernetes")
    );
    bind(&mut ledger, 1, &request(1, 2 * GIB, Sharing::Shared)).unwrap();
    inventory.gpus[0].used = Some(Bytes(8 * GIB));
    ledger.apply(Event::Inventory(inventory));
    assert!(words(&ledger).ends_with("; 6 GiB are in use beyond what its pods declared"));
}

#[test]
fn a_start_is_waited_for_and_no_node_is_asked_for_meanwhile() {
    let mut ledger = Ledger::new(Some(600_000));
    for event in node("a", &[24, 24]).into_iter().chain(node("b", &[24])) {
        ledger.apply(event);
    }
    let mut starts = |pod: &str, node: &str, gpus: &[&str], since_ms: u64| {
        let gpus: Vec<GpuId> = gpus.iter().map(|gpu| GpuId::from(*gpu)).collect();
        let asks = u32::try_from(gpus.len()).unwrap();
        ledger.apply(Event::Pod(PodFacts {
            entry: Entry {
                uid: pod.into(),
                namespace: "models".into(),
                name: pod.into(),
                host: Host::default(),
                claim: Claim::of(&request(asks, 10, Sharing::Shared), gpus),
            },
            node: Some(node.into()),
            finished: false,
            start: Start::Bound { since_ms },
        }));
    };
    // A pod with several GPUs starts on all of them.
    starts("pair", "a", &["a/0", "a/1"], 2_000);
    starts("late", "b", &["b/0"], 3_000);
    ledger.expire(20_000);
    let small = request(1, 10, Sharing::Shared);
    let refusal = best(&ledger, &small).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "waiting for a start: GPU 0 of a: models/pair is starting (for 18 s, at most 10 min): one start at a time per GPU"
    );
    assert_eq!(refusal.waits_for().map(|busy| busy.node.as_str()), Some("a"));
    // For a plan about nodes there is room; what is too large for it, is so all the same.
    let rooms: Vec<GpuRoom> = ledger
        .node("a")
        .unwrap()
        .gpus()
        .iter()
        .map(GpuRoom::from)
        .collect();
    assert!(rooms.iter().all(|room| room.takes(&small)));
    let large = best(&ledger, &request(1, 20, Sharing::Shared)).unwrap_err();
    assert!(large.waits_for().is_none(), "{large}");
    assert!(large.nearest().is_some_and(|miss| miss.free == Bytes(14)));
    // Loading takes more than what is declared, for as long as it lasts.
    let Event::Inventory(mut loading) = node("b", &[24]).remove(1) else {
        unreachable!()
    };
    loading.gpus[0].used = Some(Bytes(20));
    ledger.apply(Event::Inventory(loading));
    let on_b = ledger.node("b").unwrap();
    assert_eq!(
        (on_b.gpus()[0].free, on_b.gpus()[0].settled),
        (Bytes(4), Bytes(14))
    );
    let told = fit(on_b, &small, None).unwrap_err();
    assert!(matches!(&told, NodeRefusal::Starting { .. }), "{told}");
    // The limit is each start's own.
    ledger.expire(602_000);
    assert_eq!(best(&ledger, &small).unwrap().0.as_str(), "a");
}

#[test]
fn only_one_winner_even_among_equals() {
    let mut ledger = Ledger::default();
    for name in ["c", "a", "b"] {
        node(name, &[24])
            .into_iter()
            .for_each(|event| ledger.apply(event));
    }
    let small = want(&request(1, 10, Sharing::Shared));
    let nodes = ["b", "c", "a"].map(|name| ledger.node(name).unwrap());
    let hands = Hands::default();
    for packing in [Packing::Fragmentation, Packing::BestFit, Packing::Spread] {
        let ranking = rank(
            nodes,
            &small,
            None,
            Judge {
                packing,
                hands: &hands,
                images: &[],
            },
        );
        assert_eq!(ranking.order[0].0, 2);
        assert_eq!(ranking.scores(), [9, 8, 10], "{packing}");
    }
}

#[test]
fn a_new_node_helps_only_if_its_cards_are_large_and_many_enough() {
    let shape = NodeShape(vec![Bytes(24), Bytes(24)]);
    assert!(fits_empty(&shape, &request(2, 24, Sharing::Exclusive)));
    assert!(!fits_empty(&shape, &request(1, 25, Sharing::Shared)));
    assert!(!fits_empty(&shape, &request(3, 1, Sharing::Shared)));
}

#[test]
fn an_asker_does_not_stand_in_its_own_way() {
    let mut ledger = Ledger::rebuild(node("a", &[24]));
    let large = request(1, 20, Sharing::Shared);
    let asker = PodUid::from("asker");
    let choice = fit(ledger.node("a").unwrap(), &large, Some(&asker)).unwrap();
    let entry = Entry {
        uid: asker.clone(),
        namespace: "models".into(),
        name: "asker".into(),
        host: Host::default(),
        claim: Claim::of(&large, choice.gpus.clone()),
    };
    ledger.hold(
        &"a".into(),
        entry,
        crate::plan::ledger::Stage::Reserved { until_ms: 1 },
    );
    let node = ledger.node("a").unwrap();
    assert_eq!(fit(node, &large, Some(&asker)).unwrap().gpus, choice.gpus);
    assert!(still_fits(node, &large, &choice.gpus, &asker));
    assert!(fit(node, &large, Some(&PodUid::from("other"))).is_err());
}
