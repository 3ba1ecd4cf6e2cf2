//! The ledger in single cases.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use super::tests::{entry, gpu, name, uid};
use super::*;
use crate::api::gpu_request::Sharing;
use crate::api::units::Bytes;

fn one_node() -> Event {
    Event::Node(NodeFacts {
        name: name(0),
        fence: None,
        allocatable: None,
        labels: Arc::default(),
        images: Default::default(),
    })
}

fn one_gpu(used: Option<u64>) -> Ledger {
    Ledger::rebuild([one_node(), inventory(used)])
}

fn inventory(used: Option<u64>) -> Event {
    Event::Inventory(Inventory {
        node: name(0),
        closed: None,
        gpus: vec![GpuFacts {
            id: gpu(0, 0),
            index: 0,
            usable: Bytes(24),
            used: used.map(Bytes),
            foreign: None,
            used_by: BTreeMap::new(),
            closed: None,
        }],
    })
}

fn on_gpu(bytes: u64) -> Claim {
    Claim {
        gpus: Some(vec![gpu(0, 0)]),
        bytes_per_gpu: Bytes(bytes),
        sharing: Sharing::Shared,
    }
}

fn bound(pod: u8, claim: Claim) -> Event {
    Event::Pod(PodFacts {
        entry: entry(pod, claim),
        node: Some(name(0)),
        finished: false,
        start: Start::Over,
    })
}

/// Its containers have ended.
fn ended(pod: u8, claim: Claim) -> Event {
    match bound(pod, claim) {
        Event::Pod(facts) => Event::Pod(PodFacts {
            finished: true,
            ..facts
        }),
        other => other,
    }
}

fn free(ledger: &Ledger) -> u64 {
    ledger.node("node-0").unwrap().free().0
}

#[test]
fn unknown_use_is_not_zero_and_known_use_beyond_the_declared_is_not_free() {
    let mut ledger = one_gpu(None);
    ledger.apply(bound(0, on_gpu(10)));
    assert_eq!(free(&ledger), 14);
    ledger.apply(inventory(Some(16)));
    assert_eq!(free(&ledger), 8);
    assert_eq!(ledger.node("node-0").unwrap().gpus()[0].foreign, Bytes(6));
    // The kubelet tells that the containers have ended after they have, so this reading is older than that.
    let freed = ledger.freed();
    ledger.apply(ended(0, on_gpu(10)));
    ledger.apply(Event::PodGone(uid(0)));
    assert_eq!(free(&ledger), 18);
    assert!(ledger.freed() > freed);
    // A reading that still counts it: its memory was not given back.
    ledger.apply(inventory(Some(16)));
    assert_eq!(free(&ledger), 8);
    ledger.apply(inventory(Some(0)));
    assert_eq!(free(&ledger), 24);
}

#[test]
fn race_watch_before_the_answer_of_the_binding() {
    let mut ledger = one_gpu(None);
    assert!(ledger.hold(&name(0), entry(0, on_gpu(10)), Stage::Posted));
    assert_eq!(free(&ledger), 14);
    ledger.apply(bound(0, on_gpu(10)));
    ledger.apply(ended(0, on_gpu(10)));
    ledger.apply(Event::PodGone(uid(0)));
    ledger.set_stage(&uid(0), Stage::Bound);
    assert_eq!(free(&ledger), 24);
    assert!(
        !ledger.hold(&name(0), entry(0, on_gpu(10)), Stage::Posted),
        "a gone pod gets no hold"
    );
}

#[test]
fn race_list_read_before_the_deletion_brings_no_pod_back() {
    let mut ledger = one_gpu(None);
    ledger.apply(bound(0, on_gpu(10)));
    ledger.apply(ended(0, on_gpu(10)));
    ledger.apply(Event::PodGone(uid(0)));
    ledger.apply(bound(0, on_gpu(10)));
    assert_eq!(free(&ledger), 24);
}

#[test]
fn a_reservation_ends_and_a_binding_on_its_way_does_not() {
    let mut ledger = one_gpu(None);
    ledger.hold(&name(0), entry(0, on_gpu(10)), Stage::Posted);
    assert!(!ledger.hold(&name(0), entry(0, on_gpu(1)), Stage::Reserved { until_ms: 5 }));
    ledger.hold(&name(0), entry(1, on_gpu(4)), Stage::Reserved { until_ms: 5 });
    assert_eq!(free(&ledger), 10);
    ledger.expire(4);
    assert_eq!(free(&ledger), 10);
    ledger.expire(5);
    assert_eq!(free(&ledger), 14);
    ledger.expire(u64::MAX);
    assert_eq!(free(&ledger), 14);
}

#[test]
fn crash_of_a_node_leaves_no_ghost() {
    let mut ledger = one_gpu(None);
    ledger.apply(bound(0, on_gpu(10)));
    ledger.apply(Event::NodeGone(name(0)));
    ledger.apply(Event::InventoryGone(name(0)));
    assert_eq!(ledger.node_pods("node-0").count(), 1, "its pods are not gone yet");
    ledger.apply(Event::PodGone(uid(0)));
    assert_eq!(ledger.nodes().count(), 0);
}

#[test]
fn adversarial_a_pod_deleted_by_force_keeps_its_memory_until_a_reading_shows_it_gone() {
    let mut ledger = one_gpu(Some(10));
    ledger.set_clock(5_000);
    ledger.apply(bound(0, on_gpu(10)));
    ledger.apply(Event::PodGone(uid(0)));
    assert_eq!(free(&ledger), 14);
    ledger.apply(inventory(Some(10)));
    assert_eq!(free(&ledger), 14, "the same reading again");
    let freed = ledger.freed();
    ledger.apply(inventory(Some(0)));
    assert_eq!(free(&ledger), 24);
    assert!(ledger.freed() > freed, "who was refused is tried again");
}

#[test]
fn what_no_reading_ever_tells_is_waited_for_two_minutes() {
    let mut ledger = one_gpu(None);
    ledger.expire(5_000);
    ledger.apply(bound(0, on_gpu(10)));
    ledger.apply(Event::PodGone(uid(0)));
    ledger.apply(inventory(None));
    ledger.expire(124_999);
    assert_eq!(free(&ledger), 14);
    ledger.expire(125_000);
    assert_eq!(free(&ledger), 24);
}

#[test]
fn a_process_without_its_pod_is_counted_by_the_reading_that_tells_of_it() {
    let mut ledger = one_gpu(Some(0));
    ledger.apply(bound(0, on_gpu(10)));
    ledger.apply(Event::PodGone(uid(0)));
    let Event::Inventory(mut told) = inventory(Some(9)) else {
        unreachable!()
    };
    told.gpus[0].foreign = Some(Bytes(0));
    told.gpus[0].used_by = BTreeMap::from([(uid(0), Bytes(9))]);
    ledger.apply(Event::Inventory(told.clone()));
    assert_eq!(free(&ledger), 15);
    // For ever, if need be: it is there.
    ledger.expire(u64::MAX / 2);
    assert_eq!(free(&ledger), 15);
    (told.gpus[0].used, told.gpus[0].used_by) = (Some(Bytes(0)), BTreeMap::new());
    ledger.apply(Event::Inventory(told));
    assert_eq!(free(&ledger), 24);
}

#[test]
fn a_pod_that_never_ran_leaves_nothing() {
    let mut ledger = one_gpu(Some(0));
    let Event::Pod(facts) = bound(0, on_gpu(10)) else {
        unreachable!()
    };
    ledger.apply(Event::Pod(PodFacts {
        start: Start::Bound { since_ms: 0 },
        ..facts
    }));
    ledger.apply(Event::PodGone(uid(0)));
    assert_eq!(free(&ledger), 24);
}

#[test]
fn adversarial_a_pod_that_uses_a_card_it_was_not_given() {
    let mut ledger = one_gpu(None);
    let elsewhere = Claim {
        gpus: Some(vec![gpu(0, 1)]),
        ..on_gpu(10)
    };
    ledger.apply(bound(0, on_gpu(10)));
    ledger.apply(bound(1, elsewhere));
    let Event::Inventory(mut reading) = inventory(Some(5)) else {
        unreachable!()
    };
    // The pod of this card has not taken all that it declared yet: the total alone would hide the other one.
    reading.gpus[0].foreign = Some(Bytes(0));
    reading.gpus[0].used_by = BTreeMap::from([(uid(0), Bytes(2)), (uid(1), Bytes(3))]);
    ledger.apply(Event::Inventory(reading));
    assert_eq!(free(&ledger), 24 - 10 - 3);
}

#[test]
fn adversarial_a_node_whose_clock_is_ahead_closes_no_gpu_for_longer() {
    const LIMIT_MS: u64 = 600_000;
    let now_ms = 1_000_000;
    let mut ledger = Ledger::new(Some(LIMIT_MS));
    ledger.set_clock(now_ms);
    let Event::Pod(facts) = bound(0, on_gpu(8)) else {
        panic!("a pod")
    };
    let loads = Event::Pod(PodFacts {
        // Its node's clock is a day ahead.
        start: Start::Loading {
            since_ms: now_ms + 86_400_000,
        },
        ..facts
    });
    for event in [one_node(), inventory(Some(0)), loads.clone()] {
        ledger.apply(event);
    }
    let starting = |ledger: &Ledger| ledger.nodes().any(|node| node.gpus()[0].starting.is_some());
    assert!(starting(&ledger));
    let freed = ledger.freed();
    ledger.set_clock(now_ms + LIMIT_MS / 2);
    // Seen again, it has not begun anew.
    ledger.apply(loads);
    ledger.expire(now_ms + LIMIT_MS + starts::AHEAD_MS);
    assert!(!starting(&ledger));
    assert!(ledger.freed() > freed, "who waits is told");
}

#[test]
fn a_bind_that_failed_holds_nothing_and_one_in_doubt_does() {
    let mut ledger = one_gpu(None);
    ledger.hold(&name(0), entry(0, on_gpu(10)), Stage::Posted);
    ledger.release_posted(&uid(0));
    assert_eq!(free(&ledger), 24);
    for stage in [
        Stage::Doubtful { until_ms: 5 },
        Stage::Reserved { until_ms: 5 },
        Stage::Bound,
    ] {
        ledger.release(&uid(0));
        ledger.hold(&name(0), entry(0, on_gpu(10)), stage);
        ledger.release_posted(&uid(0));
        assert_eq!(free(&ledger), 14, "{stage:?}");
    }
}
