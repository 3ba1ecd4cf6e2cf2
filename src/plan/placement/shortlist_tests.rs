//! The survey against the functions that look at one node, and the ranking of what it lists against the ranking of all.
#![allow(clippy::unwrap_used)]

use std::num::NonZeroU32;

use proptest::prelude::*;

use super::super::rank::tests::{Shape, enter, ledger, packing, replay, shape, want};
use super::super::{Needs, Ranking, fit, rank};
use super::*;
use crate::api::gpu_request::{GpuRequest, Sharing};
use crate::api::units::NodeName;
use crate::plan::ledger::{Claim, Entry, Event, Image, Images, NodeFacts, Stage};

/// Gives these nodes, by number, the image of that name.
fn pull(ledger: &mut Ledger, nodes: impl Iterator<Item = usize>, image: &str) {
    for number in nodes {
        let Some(node) = ledger.node(&format!("node-{number}")) else {
            continue;
        };
        let facts = NodeFacts {
            name: node.name().clone(),
            fence: match node.shut() {
                Some(crate::plan::ledger::Shut::Fenced(fence)) => Some(fence),
                _ => None,
            },
            allocatable: node.allocatable(),
            labels: node.labels().clone(),
            images: Images::new([(image, Bytes(7))].into_iter()),
        };
        ledger.apply(Event::Node(facts));
    }
}

fn names(ledger: &Ledger) -> Vec<NodeName> {
    let mut names: Vec<NodeName> = ledger.nodes().map(|node| node.name().clone()).collect();
    names.sort();
    names
}

fn named(ranking: &Ranking, names: &[NodeName]) -> Vec<(NodeName, Choice)> {
    let order = ranking.order.iter();
    order
        .map(|(position, choice)| (names[*position].clone(), choice.clone()))
        .collect()
}

fn ranked(
    ledger: &Ledger,
    names: &[NodeName],
    want: &Want,
    asker: Option<&PodUid>,
    judge: Judge<'_>,
) -> Ranking {
    let nodes = names.iter().map(|name| ledger.node(name.as_str()).unwrap());
    rank(nodes, want, asker, judge)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn what_is_asked_by_name_is_ranked_as_the_nodes_would_be(
        shapes in prop::collection::vec(shape(), 1..60), wants in prop::collection::vec(want(), 1..20),
        packing in packing(),
    ) {
        replay(&shapes, &wants, packing, |ledger, want, judge, _| {
            let mut ledger = ledger.clone();
            pull(&mut ledger, (0..shapes.len()).step_by(3), "model");
            let judge = Judge { images: &[Image::named("model")], ..judge };
            let all = names(&ledger);
            let asker = PodUid::from("asker");
            let asked = ["unknown"].into_iter().chain(all.iter().map(NodeName::as_str));
            let ranking = survey(&ledger, asked, want, &asker, judge).ranking(want, judge);
            let mut with_unknown = vec![NodeName::from("unknown")];
            with_unknown.extend(all.iter().cloned());
            let plain = ranked(&ledger, &all, want, Some(&asker), judge);
            prop_assert_eq!(named(&ranking, &with_unknown), named(&plain, &all));
            prop_assert_eq!(ranking.scores()[0], 0);
            prop_assert_eq!(&ranking.scores_of_equals()[1..], &plain.scores_of_equals()[..]);
            Ok(())
        })?;
    }

    #[test]
    fn a_pod_fits_where_each_node_by_itself_says_so(
        shapes in prop::collection::vec(shape(), 1..8), wants in prop::collection::vec(want(), 1..20),
        held_on in 0usize..8,
    ) {
        replay(&shapes, &wants, Packing::Fragmentation, |ledger, want, judge, _| {
            let Some(request) = &want.gpus else { return Ok(()) };
            let mut ledger = ledger.clone();
            let asker = PodUid::from("asker");
            let all = names(&ledger);
            let name = &all[held_on % all.len()];
            // Its own hold is no obstacle, wherever it is.
            if let Ok(choice) = fit(ledger.node(name.as_str()).unwrap(), request, None) {
                let entry = Entry {
                    uid: asker.clone(),
                    namespace: "models".into(),
                    name: "asker".into(),
                    host: want.host,
                    claim: Claim::of(request, choice.gpus),
                };
                ledger.hold(name, entry, Stage::Reserved { until_ms: 1 });
            }
            let survey = survey(
                &ledger, all.iter().map(NodeName::as_str).chain(["unknown"]), want, &asker, judge,
            );
            prop_assert_eq!(survey.nodes.last(), Some(&None));
            let fits: Vec<bool> = all
                .iter()
                .map(|name| fit(ledger.node(name.as_str()).unwrap(), request, Some(&asker)).is_ok())
                .chain([false])
                .collect();
            prop_assert_eq!(&survey.fits, &fits);
            let only = fits.iter().filter(|fits| **fits).count() == 1;
            prop_assert_eq!(survey.only().is_some(), only);
            Ok(())
        })?;
    }

    #[test]
    fn an_image_decides_among_equals_only(
        shapes in prop::collection::vec(shape(), 1..12), wants in prop::collection::vec(want(), 1..20),
        packing in packing(), with in prop::collection::vec(any::<bool>(), 12),
    ) {
        replay(&shapes, &wants, packing, |ledger, want, judge, cold| {
            let mut ledger = ledger.clone();
            pull(&mut ledger, (0..shapes.len()).filter(|number| with[*number]), "model");
            let all = names(&ledger);
            let judge = Judge { images: &[Image::named("model")], ..judge };
            let warm = ranked(&ledger, &all, want, None, judge);
            let (Some((before, old)), Some((now, new))) = (cold.order.first(), warm.order.first()) else {
                prop_assert_eq!(cold.order.len(), warm.order.len());
                return Ok(());
            };
            let node = |position: &usize| ledger.node(all[*position].as_str()).unwrap();
            let (before, now) = (node(before), node(now));
            // As many GPUs as large, on a node that is as full: nothing of GPU memory was given for the image.
            let figures = |node: &NodeState, choice: &Choice| {
                let gpus = node.gpus().iter().filter(|gpu| choice.gpus.contains(&gpu.id));
                let opens = !node.gpus().is_empty() && node.gpus().iter().all(|gpu| gpu.tenants == 0);
                (gpus.map(|gpu| gpu.free).sum::<Bytes>(), node.free(), opens)
            };
            if packing != Packing::Spread {
                prop_assert_eq!(figures(before, old), figures(now, new));
            }
            let held = |node: &NodeState| node.images().held(judge.images);
            prop_assert!(held(now) >= held(before));
            // Without the image anywhere, or with it everywhere, nothing changes.
            if with[..shapes.len()].iter().all(|one| *one == with[0]) {
                prop_assert_eq!(before.name(), now.name());
            }
            Ok(())
        })?;
    }
}

fn share(bytes: u64) -> Want {
    Want {
        gpus: Some(GpuRequest {
            gpus: NonZeroU32::MIN,
            bytes_per_gpu: Bytes(bytes),
            sharing: Sharing::Shared,
        }),
        host: Host::default(),
        needs: Needs::default(),
    }
}

fn alike(nodes: usize) -> Vec<Shape> {
    let shape = Shape {
        gpus: vec![80, 80],
        cpu: 100,
        fence: None,
        pool: true,
    };
    vec![shape; nodes]
}

#[test]
fn of_equal_nodes_the_one_with_the_image_is_the_best_and_a_fuller_one_is_better_still() {
    let mut ledger = ledger(&alike(4));
    pull(&mut ledger, [2].into_iter(), "model:1");
    let mut mix = super::super::Mix::default();
    mix.observe(&"seen".into(), &share(30));
    let hands = mix.hands(&ledger);
    let best = |ledger: &Ledger, packing| {
        let judge = Judge {
            packing,
            hands: &hands,
            images: &[Image::named("model:1")],
        };
        let all = names(ledger);
        let ranking = ranked(ledger, &all, &share(30), None, judge);
        all[ranking.order[0].0].to_string()
    };
    for packing in [Packing::Fragmentation, Packing::BestFit, Packing::Spread] {
        assert_eq!(best(&ledger, packing), "node-2", "{packing}");
    }
    let choice = fit(
        ledger.node("node-3").unwrap(),
        share(30).gpus.as_ref().unwrap(),
        None,
    )
    .unwrap();
    enter(&mut ledger, 1, &"node-3".into(), &share(30), &choice);
    for packing in [Packing::Fragmentation, Packing::BestFit] {
        assert_eq!(best(&ledger, packing), "node-3", "{packing}");
    }
}

#[test]
fn equals_of_the_best_have_its_score_where_the_scheduler_is_to_decide() {
    let mut ledger = ledger(&alike(4));
    for number in 0..2 {
        let choice = fit(
            ledger.node("node-3").unwrap(),
            share(60).gpus.as_ref().unwrap(),
            None,
        )
        .unwrap();
        enter(&mut ledger, number, &"node-3".into(), &share(60), &choice);
    }
    let mut mix = super::super::Mix::default();
    mix.observe(&"seen".into(), &share(30));
    let hands = mix.hands(&ledger);
    let judge = Judge {
        packing: Packing::Fragmentation,
        hands: &hands,
        images: &[],
    };
    let ranking = ranked(&ledger, &names(&ledger), &share(30), None, judge);
    assert_eq!(ranking.scores(), [10, 0, 0, 0]);
    assert_eq!(ranking.scores_of_equals(), [10, 10, 10, 0]);
}

#[test]
fn many_makes_share_the_places() {
    // Every node is of its own make: each is listed, and none is looked at many times over.
    let shapes: Vec<Shape> = (0..200)
        .map(|number| Shape {
            gpus: vec![80],
            cpu: 1000 * (number + 1),
            fence: None,
            pool: true,
        })
        .collect();
    let ledger = ledger(&shapes);
    let mut mix = super::super::Mix::default();
    mix.observe(&"seen".into(), &share(30));
    let hands = mix.hands(&ledger);
    let judge = Judge {
        packing: Packing::Fragmentation,
        hands: &hands,
        images: &[],
    };
    let all = names(&ledger);
    let asker = PodUid::from("asker");
    let survey = survey(
        &ledger,
        all.iter().map(NodeName::as_str),
        &share(30),
        &asker,
        judge,
    );
    assert_eq!(survey.listed.len(), 200);
}
