//! Finds out, while it matters, which replicas can take requests: new ones by their readiness probe, those that
//! refused a connection by connecting again.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::hold::Door;
use super::probe::{self, Checks, Found};
use super::state::Gate;
use crate::api::units::PodUid;
use crate::plan::hold::Grant;

/// Between two looks at a pod that only the kubelet can judge.
const KUBELET_INTERVAL: Duration = Duration::from_millis(100);
const FIRST_REACH: Duration = Duration::from_millis(10);
const MAX_REACH: Duration = Duration::from_millis(500);

/// Probes a pod for as long as somebody waits for it.
pub(super) async fn probe(gate: Arc<Gate>, door: Arc<Door>, pod: PodUid) {
    let begun = Instant::now();
    let mut answered = false;
    while door.wants_probe(&pod) {
        let wait = match gate.checks(&door.workload, &pod) {
            Some((ip, checks)) => match checks.as_ref() {
                Checks::Own(checks) => {
                    let found = probe::ask(ip, checks).await;
                    if found == Found::Ready {
                        answered = true;
                        break;
                    }
                    probe::interval(found, begun.elapsed())
                }
                Checks::Kubelet => KUBELET_INTERVAL,
            },
            None => KUBELET_INTERVAL,
        };
        tokio::time::sleep(wait).await;
    }
    door.probed(&pod, answered);
}

/// Tries a replica that refused a connection until it accepts one, or is gone.
pub(super) async fn reach(door: Arc<Door>, grant: Grant) {
    let mut wait = FIRST_REACH;
    while door.wants_reach(&grant) {
        tokio::time::sleep(wait).await;
        if probe::accepts(grant.address).await {
            break;
        }
        wait = if door.queued() > 0 {
            // Somebody waits for it, so it is worth a few packets.
            FIRST_REACH
        } else {
            (wait * 2).min(MAX_REACH)
        };
    }
    door.reached(&grant);
}
