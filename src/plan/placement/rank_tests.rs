//! Ranking against brute force: the books kept apart, the measure counted anew, every order of the nodes.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::api::gpu_request::GpuRequest;
use crate::api::units::{GpuId, MilliCpu};
use crate::plan::ledger::{
    Claim, Entry, Event, Fence, GpuFacts, GpuState, Images, Inventory, Ledger, NodeFacts, PodFacts, Start,
};
use crate::plan::placement::{Mix, Needs, REMEMBERED, fit};
use crate::plan::room::GpuRoom;

#[derive(Clone, Debug)]
pub(in crate::plan::placement) struct Shape {
    pub gpus: Vec<u64>,
    pub cpu: u64,
    pub fence: Option<Fence>,
    pub pool: bool,
}

pub(in crate::plan::placement) fn shape() -> impl Strategy<Value = Shape> {
    let fence = prop_oneof![
        6 => Just(None),
        1 => prop_oneof![Just(Fence::Releasing), Just(Fence::Cordoned), Just(Fence::Deleting)].prop_map(Some),
    ];
    (
        prop::collection::vec(prop_oneof![Just(24u64), Just(40), Just(80)], 0..5),
        5u64..60,
        fence,
        any::<bool>(),
    )
        .prop_map(|(gpus, cpu, fence, pool)| Shape {
            gpus,
            cpu,
            fence,
            pool,
        })
}

pub(in crate::plan::placement) fn want() -> impl Strategy<Value = Want> {
    let sharing = prop_oneof![4 => Just(Sharing::Shared), 1 => Just(Sharing::Exclusive)];
    let gpus = prop_oneof![
        8 => (1u32..=3, 1u64..=45, sharing).prop_map(|(gpus, bytes, sharing)| {
            Some(GpuRequest { gpus: NonZeroU32::new(gpus).unwrap(), bytes_per_gpu: Bytes(bytes), sharing })
        }),
        1 => Just(None),
    ];
    (gpus, 0u64..12, prop::bool::weighted(0.2)).prop_map(|(gpus, cpu, picky)| {
        let mut needs = Needs::default();
        if picky {
            needs.require("pool", ["a"].into_iter());
        }
        Want {
            gpus,
            host: host(cpu),
            needs,
        }
    })
}

pub(in crate::plan::placement) fn packing() -> impl Strategy<Value = Packing> {
    prop_oneof![
        Just(Packing::Fragmentation),
        Just(Packing::BestFit),
        Just(Packing::Spread)
    ]
}

pub(in crate::plan::placement) fn host(cpu: u64) -> Host {
    Host {
        cpu: MilliCpu(cpu),
        memory: Bytes(cpu),
    }
}

pub(in crate::plan::placement) fn ledger(shapes: &[Shape]) -> Ledger {
    let events = shapes.iter().enumerate().flat_map(|(number, shape)| {
        let name = format!("node-{number}");
        let gpu = |(index, usable): (u32, &u64)| GpuFacts {
            id: GpuId::from(format!("{name}/{index}").as_str()),
            index,
            usable: Bytes(*usable),
            used: None,
            foreign: None,
            used_by: BTreeMap::new(),
            closed: None,
        };
        let pool = if shape.pool { "a" } else { "b" };
        [
            Event::Node(NodeFacts {
                name: name.as_str().into(),
                fence: shape.fence,
                allocatable: Some(host(shape.cpu)),
                labels: Arc::new(BTreeMap::from([("pool".to_owned(), pool.to_owned())])),
                images: Images::default(),
            }),
            Event::Inventory(Inventory {
                node: name.as_str().into(),
                closed: None,
                gpus: (0u32..).zip(&shape.gpus).map(gpu).collect(),
            }),
        ]
    });
    Ledger::rebuild(events.collect::<Vec<_>>())
}

pub(in crate::plan::placement) fn enter(
    ledger: &mut Ledger,
    number: usize,
    node: &NodeName,
    want: &Want,
    choice: &Choice,
) {
    let Some(request) = &want.gpus else { return };
    ledger.apply(Event::Pod(PodFacts {
        entry: Entry {
            uid: format!("pod-{number}").as_str().into(),
            namespace: "models".into(),
            name: format!("pod-{number}").into(),
            host: want.host,
            claim: Claim::of(request, choice.gpus.clone()),
        },
        node: Some(node.clone()),
        finished: false,
        start: Start::Over,
    }));
}

/// Lets the pods come, as they would with a scheduler that takes the best, and calls `look` before each.
pub(in crate::plan::placement) fn replay(
    shapes: &[Shape],
    wants: &[Want],
    packing: Packing,
    mut look: impl FnMut(&Ledger, &Want, Judge<'_>, &Ranking) -> Result<(), TestCaseError>,
) -> Result<(), TestCaseError> {
    let (mut ledger, mut mix) = (ledger(shapes), Mix::default());
    for (number, want) in wants.iter().enumerate() {
        mix.observe(&format!("pod-{number}").as_str().into(), want);
        let hands = mix.hands(&ledger);
        let judge = Judge {
            packing,
            hands: &hands,
            images: &[],
        };
        let nodes = sorted(&ledger);
        let ranking = rank(nodes.iter().copied(), want, None, judge);
        look(&ledger, want, judge, &ranking)?;
        if let Some((best, choice)) = ranking.order.first() {
            let node = nodes[*best].name().clone();
            enter(&mut ledger, number, &node, want, choice);
        }
    }
    Ok(())
}

pub(in crate::plan::placement) fn sorted(ledger: &Ledger) -> Vec<&NodeState> {
    let mut nodes: Vec<&NodeState> = ledger.nodes().collect();
    nodes.sort_by_key(|node| node.name().clone());
    nodes
}

/// The measure once more, from nothing but its definition.
fn naive_leftover(node: &NodeState, host: Host, gpus: &[GpuRoom], hands: &Hands) -> i128 {
    let free: Bytes = gpus.iter().map(|gpu| gpu.free).sum();
    let meets = hands.met_by(node.labels());
    let mut sum = 0;
    for hand in hands.ahead(free) {
        let (mut gpus, mut host) = (gpus.to_vec(), host);
        for card in hand {
            let mut able: Vec<usize> = (0..gpus.len())
                .filter(|gpu| gpus[*gpu].takes(&card.gpus))
                .collect();
            able.sort_by_key(|gpu| (gpus[*gpu].free, gpus[*gpu].usable, gpus[*gpu].empty, *gpu));
            let asked = card.gpus.gpus.get() as usize;
            if !meets[card.needs]
                || host.cpu < card.host.cpu
                || host.memory < card.host.memory
                || able.len() < asked
            {
                continue;
            }
            host = host.saturating_sub(card.host);
            for gpu in &able[..asked] {
                let gpu = &mut gpus[*gpu];
                gpu.empty = false;
                gpu.exclusive = card.gpus.sharing == Sharing::Exclusive;
                gpu.free = if gpu.exclusive {
                    Bytes(0)
                } else {
                    gpu.free.saturating_sub(card.gpus.bytes_per_gpu)
                };
            }
        }
        sum += gpus.iter().map(|gpu| i128::from(gpu.free.0)).sum::<i128>();
    }
    let fragments: i128 = hands
        .kinds()
        .iter()
        .map(|(card, part)| {
            let able: Vec<&GpuRoom> = gpus.iter().filter(|gpu| gpu.takes(&card.gpus)).collect();
            let fits = able.len() >= card.gpus.gpus.get() as usize
                && meets[card.needs]
                && host.cpu >= card.host.cpu
                && host.memory >= card.host.memory;
            let of_use = if fits {
                able.iter().map(|gpu| whole_requests(gpu, &card.gpus)).sum()
            } else {
                0
            };
            i128::from(*part) * i128::from(free.0 - of_use)
        })
        .sum();
    sum * i128::from(PARTS) + fragments * hands.len() as i128 / 16
}

fn whole_requests(gpu: &GpuRoom, request: &GpuRequest) -> u64 {
    match request.sharing {
        Sharing::Shared => gpu.free.0 / request.bytes_per_gpu.0 * request.bytes_per_gpu.0,
        Sharing::Exclusive => gpu.free.0,
    }
}

/// The gradient of a place, counted anew on both sides.
pub(in crate::plan::placement) fn naive_gradient(
    node: &NodeState,
    want: &Want,
    choice: &Choice,
    hands: &Hands,
) -> i128 {
    let before: Vec<GpuRoom> = node.gpus().iter().map(GpuRoom::from).collect();
    let mut after = before.clone();
    for (room, gpu) in after.iter_mut().zip(node.gpus()) {
        if let Some(request) = want.gpus.as_ref().filter(|_| choice.gpus.contains(&gpu.id)) {
            room.empty = false;
            room.exclusive = request.sharing == Sharing::Exclusive;
            room.free = if room.exclusive {
                Bytes(0)
            } else {
                room.free.saturating_sub(request.bytes_per_gpu)
            };
        }
    }
    let opens = !before.is_empty() && before.iter().all(|gpu| gpu.empty);
    let opening = if opens {
        i128::from(PARTS) * hands.len() as i128 * i128::from(hands.mean().0) / 8
    } else {
        0
    };
    let left = node.host().saturating_sub(want.host);
    let price = want.gpus.as_ref().map_or(0, |request| {
        let meets = hands.met_by(node.labels());
        total(request) * u128::from(hands.price(&meets)) * hands.len() as u128
    });
    naive_leftover(node, left, &after, hands) + opening + i128::try_from(price).unwrap()
        - naive_leftover(node, node.host(), &before, hands)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn never_over_a_gpu_whichever_way(
        shapes in prop::collection::vec(shape(), 1..6), wants in prop::collection::vec(want(), 1..30), packing in packing(),
    ) {
        // Kept apart from the ledger: usable, taken and tenants of every GPU.
        let mut gpus: BTreeMap<GpuId, (u64, u64, usize)> = BTreeMap::new();
        for node in ledger(&shapes).nodes() {
            gpus.extend(node.gpus().iter().map(|gpu| (gpu.id.clone(), (gpu.usable.0, 0, 0))));
        }
        replay(&shapes, &wants, packing, |ledger, want, judge, ranking| {
            for (position, choice) in &ranking.order {
                let node = sorted(ledger)[*position];
                prop_assert_eq!(node.shut(), None);
                prop_assert_eq!(&place(node, want, None, judge).unwrap(), choice);
            }
            let Some(request) = &want.gpus else { return Ok(()) };
            let Some((best, choice)) = ranking.order.first() else {
                // Refused only without room: nowhere is there enough.
                let nowhere = ledger.nodes().all(|node| fit(node, request, None).is_err());
                prop_assert!(nowhere);
                return Ok(());
            };
            let name = sorted(ledger)[*best].name().clone();
            prop_assert_eq!(choice.gpus.iter().collect::<BTreeSet<_>>().len(), request.gpus.get() as usize);
            for id in &choice.gpus {
                let there = id.as_str().starts_with(name.as_str());
                prop_assert!(there);
                let (usable, taken, tenants) = gpus.get_mut(id).unwrap();
                prop_assert!(request.sharing == Sharing::Shared || *tenants == 0);
                *taken = match request.sharing {
                    Sharing::Shared => *taken + request.bytes_per_gpu.0,
                    Sharing::Exclusive => *usable,
                };
                *tenants += 1;
                prop_assert!(*taken <= *usable);
            }
            Ok(())
        })?;
    }

    #[test]
    fn the_order_of_the_nodes_changes_nothing(
        shapes in prop::collection::vec(shape(), 1..8), wants in prop::collection::vec(want(), 1..20),
        packing in packing(), turn in 0usize..8,
    ) {
        replay(&shapes, &wants, packing, |ledger, want, judge, ranking| {
            let nodes = sorted(ledger);
            let mut turned: Vec<&NodeState> = nodes.iter().rev().copied().collect();
            let by = turn % turned.len();
            turned.rotate_left(by);
            let other = rank(turned.iter().copied(), want, None, judge);
            fn named<'a>(nodes: &[&'a NodeState], ranking: &Ranking) -> Vec<(&'a NodeName, Choice)> {
                ranking.order.iter().map(|(node, choice)| (nodes[*node].name(), choice.clone())).collect()
            }
            prop_assert_eq!(named(&nodes, ranking), named(&turned, &other));
            let scores: BTreeMap<_, _> = turned.iter().map(|node| node.name()).zip(other.scores()).collect();
            for (node, score) in nodes.iter().zip(ranking.scores()) {
                prop_assert_eq!(scores[node.name()], score);
            }
            Ok(())
        })?;
    }

    #[test]
    fn the_gradient_is_what_a_count_from_scratch_says(
        shapes in prop::collection::vec(shape(), 1..8), wants in prop::collection::vec(want(), 1..20),
    ) {
        replay(&shapes, &wants, Packing::Fragmentation, |ledger, want, judge, ranking| {
            if judge.hands.is_empty() {
                return Ok(());
            }
            let nodes = sorted(ledger);
            let gradients: Vec<i128> = ranking
                .order
                .iter()
                .map(|(node, choice)| naive_gradient(nodes[*node], want, choice, judge.hands))
                .collect();
            prop_assert!(gradients.is_sorted(), "{:?}", gradients);
            // Nothing better was overlooked: every node, and for a share of one GPU every GPU.
            for node in nodes.iter().filter(|node| node.shut().is_none()) {
                for choice in choices(node, want) {
                    prop_assert!(gradients[0] <= naive_gradient(node, want, &choice, judge.hands));
                }
            }
            Ok(())
        })?;
    }
}

/// Every place on a node that comes into question.
fn choices(node: &NodeState, want: &Want) -> Vec<Choice> {
    let Some(request) = &want.gpus else {
        return vec![Choice::default()];
    };
    if request.gpus.get() == 1 && request.sharing == Sharing::Shared {
        let fitting = node.gpus().iter().filter(|gpu| super::super::takes(gpu, request));
        let choice = |gpu: &GpuState| Choice {
            gpus: vec![gpu.id.clone()],
            usable: gpu.usable,
        };
        return fitting.map(choice).collect();
    }
    fit(node, request, None).into_iter().collect()
}

#[test]
fn the_mix_is_bounded_and_counts_a_pod_once() {
    let want = |bytes| Want {
        gpus: Some(GpuRequest {
            gpus: NonZeroU32::MIN,
            bytes_per_gpu: Bytes(bytes),
            sharing: Sharing::Shared,
        }),
        host: Host::default(),
        needs: Needs::default(),
    };
    let ledger = ledger(&[Shape {
        gpus: vec![80],
        cpu: 10,
        fence: None,
        pool: true,
    }]);
    let mut mix = Mix::default();
    mix.observe(&"a".into(), &want(10));
    mix.observe(&"huge".into(), &want(Bytes::MAX.0));
    for _ in 0..100 {
        mix.observe(&"b".into(), &want(30));
    }
    assert_eq!(mix.hands(&ledger).mean(), Bytes(20));
    for number in 0..2 * REMEMBERED {
        mix.observe(&format!("{number}").as_str().into(), &want(50));
    }
    assert_eq!(
        mix.hands(&ledger).mean(),
        Bytes(50),
        "what was long ago is forgotten"
    );
}

#[test]
fn a_share_goes_where_another_that_comes_still_fits() {
    // 30s and 50s come: a 30 beside the 50 fills the card, beside a 45 it would leave 5 that nobody wants.
    let shapes: Vec<Shape> = (0..2)
        .map(|_| Shape {
            gpus: vec![80],
            cpu: 1000,
            fence: None,
            pool: true,
        })
        .collect();
    let mut ledger = ledger(&shapes);
    let want = |bytes| Want {
        gpus: Some(GpuRequest {
            gpus: NonZeroU32::MIN,
            bytes_per_gpu: Bytes(bytes),
            sharing: Sharing::Shared,
        }),
        host: Host::default(),
        needs: Needs::default(),
    };
    let mut mix = Mix::default();
    for number in 0..64 {
        mix.observe(
            &format!("seen-{number}").as_str().into(),
            &want(if number % 2 == 0 { 30 } else { 50 }),
        );
    }
    for (number, (node, bytes)) in [("node-0", 45), ("node-1", 50)].into_iter().enumerate() {
        let choice = fit(
            ledger.node(node).unwrap(),
            want(bytes).gpus.as_ref().unwrap(),
            None,
        )
        .unwrap();
        enter(&mut ledger, number, &node.into(), &want(bytes), &choice);
    }
    let hands = mix.hands(&ledger);
    let judge = Judge {
        packing: Packing::Fragmentation,
        hands: &hands,
        images: &[],
    };
    let nodes = sorted(&ledger);
    assert_eq!(rank(nodes.iter().copied(), &want(30), None, judge).order[0].0, 1);
}

#[test]
fn two_that_fit_together_share_one_gpu() {
    let shapes = [0; 3].map(|_| Shape {
        gpus: vec![40; 4],
        cpu: 1000,
        fence: None,
        pool: true,
    });
    let want = Want {
        gpus: Some(GpuRequest {
            gpus: NonZeroU32::MIN,
            bytes_per_gpu: Bytes(18),
            sharing: Sharing::Shared,
        }),
        host: Host::default(),
        needs: Needs::default(),
    };
    let mut chosen = Vec::new();
    let wants = vec![want; 4];
    replay(&shapes, &wants, Packing::Fragmentation, |_, _, _, ranking| {
        chosen.push(ranking.order[0].1.gpus[0].to_string());
        Ok(())
    })
    .unwrap();
    assert_eq!(chosen, ["node-0/0", "node-0/0", "node-0/1", "node-0/1"]);
}

#[test]
fn a_card_that_others_cannot_do_without_is_left_to_them() {
    let shapes: Vec<Shape> = [true, false]
        .map(|pool| Shape {
            gpus: vec![80; 4],
            cpu: 1000,
            fence: None,
            pool,
        })
        .to_vec();
    let any = |bytes| Want {
        gpus: Some(GpuRequest {
            gpus: NonZeroU32::MIN,
            bytes_per_gpu: Bytes(bytes),
            sharing: Sharing::Shared,
        }),
        host: Host::default(),
        needs: Needs::default(),
    };
    let mut picky = any(40);
    picky.needs.require("pool", ["a"].into_iter());
    let ledger = ledger(&shapes);
    for (picky_of_8, chosen) in [(0, 0), (4, 1)] {
        let mut mix = Mix::default();
        for number in 0..64 {
            let want = if number % 8 < picky_of_8 {
                picky.clone()
            } else {
                any(40)
            };
            mix.observe(&format!("seen-{number}").as_str().into(), &want);
        }
        let hands = mix.hands(&ledger);
        let judge = Judge {
            packing: Packing::Fragmentation,
            hands: &hands,
            images: &[],
        };
        let nodes = sorted(&ledger);
        assert_eq!(
            rank(nodes.iter().copied(), &any(40), None, judge).order[0].0,
            chosen
        );
        assert_eq!(
            rank(nodes.iter().take(1).copied(), &picky, None, judge).order[0].0,
            0
        );
    }
}

#[test]
fn spread_takes_the_emptiest_node_and_card() {
    let shapes: Vec<Shape> = (0..2)
        .map(|_| Shape {
            gpus: vec![80, 80],
            cpu: 1000,
            fence: None,
            pool: true,
        })
        .collect();
    let want = Want {
        gpus: Some(GpuRequest {
            gpus: NonZeroU32::MIN,
            bytes_per_gpu: Bytes(10),
            sharing: Sharing::Shared,
        }),
        host: Host::default(),
        needs: Needs::default(),
    };
    let mut chosen = Vec::new();
    replay(
        &shapes,
        &[want.clone(), want.clone(), want.clone(), want],
        Packing::Spread,
        |_, _, _, ranking| {
            chosen.push(ranking.order[0].1.gpus[0].to_string());
            Ok(())
        },
    )
    .unwrap();
    assert_eq!(chosen, ["node-0/0", "node-1/0", "node-0/1", "node-1/1"]);
}
