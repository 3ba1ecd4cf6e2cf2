//! Holds that gates take, refuse, come into and die in.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::api::workload::WorkloadKind;

fn workload() -> WorkloadRef {
    WorkloadRef {
        kind: WorkloadKind::Deployment,
        namespace: "models".to_owned(),
        name: "a".to_owned(),
    }
}

fn activity(in_flight: u32) -> Activity {
    Activity {
        workload: workload(),
        in_flight,
        queued: 0,
        idle_ms: Some(60_000),
    }
}

const IP: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 77, 0, 9));
const LONG: Duration = Duration::from_secs(10);

#[tokio::test(start_paused = true)]
async fn a_hold_needs_the_word_of_every_gate() {
    let gates = Gates::default();
    let (a, mut to_a) = gates.connect("gate-a", IP).unwrap();
    let (b, mut to_b) = gates.connect("gate-b", IP).unwrap();
    let asking = tokio::spawn({
        let gates = gates.clone();
        async move { gates.hold(&workload(), LONG, LONG).await.map(Held::asleep) }
    });
    let Some(ToGate::Hold { id, .. }) = to_a.recv().await else {
        panic!("a hold")
    };
    to_b.recv().await.unwrap();
    gates.held(a, id, None);
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert!(!asking.is_finished());
    gates.held(b, id, None);
    asking.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_busy_gate_ends_the_hold_for_all() {
    let gates = Gates::default();
    let (a, mut to_a) = gates.connect("gate-a", IP).unwrap();
    let asking = tokio::spawn({
        let gates = gates.clone();
        async move { gates.hold(&workload(), LONG, LONG).await.map(Held::asleep) }
    });
    let Some(ToGate::Hold { id, .. }) = to_a.recv().await else {
        panic!("a hold")
    };
    gates.held(a, id, Some("1 in flight".to_owned()));
    assert_eq!(asking.await.unwrap(), Err("gate gate-a: 1 in flight".to_owned()));
    assert_eq!(to_a.recv().await, Some(ToGate::Resume { id }));
}

#[tokio::test(start_paused = true)]
async fn crash_of_a_gate_during_the_last_look_keeps_the_workload_awake() {
    let gates = Gates::default();
    let (a, _to_a) = gates.connect("gate-a", IP).unwrap();
    let asking = tokio::spawn({
        let gates = gates.clone();
        async move { gates.hold(&workload(), LONG, LONG).await.map(Held::asleep) }
    });
    tokio::time::sleep(Duration::from_millis(1)).await;
    gates.disconnect(a);
    assert!(asking.await.unwrap().unwrap_err().contains("was lost"));
}

#[tokio::test(start_paused = true)]
async fn race_a_gate_that_comes_during_the_last_look_is_asked_too() {
    let gates = Gates::default();
    let (a, mut to_a) = gates.connect("gate-a", IP).unwrap();
    let asking = tokio::spawn({
        let gates = gates.clone();
        async move { gates.hold(&workload(), LONG, LONG).await.map(Held::asleep) }
    });
    let Some(ToGate::Hold { id, .. }) = to_a.recv().await else {
        panic!("a hold")
    };
    let (b, mut to_b) = gates.connect("gate-b", IP).unwrap();
    assert!(matches!(to_b.recv().await, Some(ToGate::Hold { .. })));
    gates.held(a, id, None);
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert!(!asking.is_finished());
    gates.held(b, id, None);
    asking.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_lost_gate_leaves_activity_behind_and_an_unlinked_one_counts_as_no_data() {
    let gates = Gates::default();
    let (a, _to_a) = gates.connect("gate-a", IP).unwrap();
    assert!(gates.report(a, vec![20_000], vec![activity(1)]));
    tokio::time::advance(Duration::from_secs(5)).await;
    gates.disconnect(a);
    assert_eq!(gates.last_active(&workload()), Some(Instant::now()));
    assert!(gates.facts(&workload(), &[]).is_empty());
    let facts = gates.facts(&workload(), &["gate-a".to_owned()]);
    assert_eq!(facts[0].load, None);
}

#[tokio::test(start_paused = true)]
async fn adversarial_a_gate_that_does_not_read_loses_its_link() {
    let gates = Gates::default();
    let (_a, _to_a) = gates.connect("gate-a", IP).unwrap();
    for id in 0..=QUEUE as u64 {
        gates.tell_all(&ToGate::Resume { id });
    }
    assert!(gates.facts(&workload(), &[]).is_empty());
}
