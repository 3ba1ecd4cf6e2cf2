//! Bursts that exactly fill the cluster's GPUs, between a real kube-scheduler and a real API server. `hack/soak burst` is
//! the same with thousands of pods.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::time::Duration;

use ebb_lab::fleet::Fleet;
use ebb_lab::soak::burst::{Args, Outcome, burst};

/// Longest that one burst takes.
const LIMIT: Duration = Duration::from_secs(120);

async fn run(args: Args) -> Outcome {
    let mut fleet = Fleet::start(env!("CARGO_BIN_EXE_ebb").into()).await.unwrap();
    let outcome = tokio::time::timeout(LIMIT, burst(&fleet, args)).await;
    let right = |outcome: &Outcome| outcome.check();
    let outcome = outcome.map_err(anyhow::Error::from).flatten();
    if outcome.as_ref().map_or(true, |outcome| right(outcome).is_err()) {
        fleet.keep_dir();
    }
    let outcome = outcome.unwrap();
    println!("{outcome:?}");
    outcome.check().unwrap();
    outcome
}

#[tokio::test(flavor = "multi_thread")]
async fn race_a_burst_is_bound_where_it_was_planned() {
    let outcome = run(Args {
        nodes: 3,
        kill_leader: false,
        most_kills: 0,
    })
    .await;
    // Every bind is counted, once.
    let binds = outcome.binds;
    assert_eq!(binds.planned + binds.elsewhere, outcome.pods as u64, "{binds:?}");
    assert!(outcome.planned() >= 95.0, "{binds:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn crash_the_leader_is_killed_within_a_burst() {
    let outcome = run(Args {
        nodes: 6,
        kill_leader: true,
        most_kills: 1,
    })
    .await;
    assert_eq!(outcome.kills.len(), 1, "no pod waited when the leader was killed");
}
