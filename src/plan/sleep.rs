//! m→0: whether a workload may be put to sleep now, as far as the last reports say. What follows a yes is the last
//! look (`Hold` to every gate) and a conditional write.
//!
//! No data is not idle: whoever could have carried a request and says nothing keeps the workload awake.

use std::time::Duration;

use crate::api::duration::Span;
use crate::api::units::Replicas;

/// What one gate says of a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GateFacts {
    /// The gate's pod.
    pub pod: String,
    /// Its numbers; `None`: it has not told any.
    pub load: Option<Load>,
}

/// The numbers of one gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Requests forwarded and not answered yet.
    pub in_flight: u32,
    /// Requests held.
    pub queued: u32,
    /// Since the last request came or ended; `None`: it has seen none.
    pub idle: Option<Duration>,
}

/// All that the decision is made from.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// Replicas asked for.
    pub replicas: Replicas,
    /// Replicas that serve.
    pub ready: Replicas,
    /// Never below.
    pub min: Replicas,
    /// Whether the newest template runs everywhere.
    pub rollout_complete: bool,
    /// Time without a request after which it sleeps.
    pub idle_after: Duration,
    /// Longest time that a request may wait for it; so long a start may take without anybody waiting.
    pub max_wait: Duration,
    /// Since it was created.
    pub since_created: Duration,
    /// Since it was seen to be scaled up from 0, or to become ready, whichever was later. `None`: not since this
    /// leader began.
    pub since_awake: Option<Duration>,
    /// Since the last activity that any gate told, those that are gone included.
    pub since_active: Option<Duration>,
    /// Since this leader began; what was before it did not see.
    pub since_leading: Duration,
    /// Every gate that could carry a request now.
    pub gates: &'a [GateFacts],
    /// Why requests can reach the workload past the gates, or not at all through them.
    pub unseen: Option<&'a str>,
}

/// What to do, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Take the last look, and put it to sleep.
    Sleep {
        /// Why.
        reason: String,
    },
    /// Leave it as it is.
    Keep {
        /// Why.
        reason: String,
        /// After this long the answer may be another without any news.
        again_in: Option<Duration>,
    },
}

fn keep(reason: impl Into<String>) -> Decision {
    Decision::Keep {
        reason: reason.into(),
        again_in: None,
    }
}

fn seconds(duration: Duration) -> Span {
    Span::from_secs(duration.as_secs())
}

/// Decides for one workload.
#[must_use]
pub fn decide(facts: &Facts<'_>) -> Decision {
    if facts.replicas.0 == 0 {
        return keep("it sleeps");
    }
    if facts.min.0 > 0 {
        return keep(format!("min-replicas is {}", facts.min));
    }
    if let Some(unseen) = facts.unseen {
        return keep(unseen);
    }
    if facts.gates.is_empty() {
        return keep("no gate is connected, so nobody knows whether it is called");
    }
    let mut quiet: Option<Duration> = facts.since_active;
    for gate in facts.gates {
        let Some(load) = gate.load else {
            return keep(format!("gate {} has not told whether it is called", gate.pod));
        };
        if load.in_flight > 0 || load.queued > 0 {
            return keep(format!(
                "{} in flight and {} waiting at gate {}",
                load.in_flight, load.queued, gate.pod
            ));
        }
        quiet = shorter(quiet, load.idle);
    }
    if !facts.rollout_complete {
        return keep("its rollout is not finished");
    }
    let starting = facts.ready.0 == 0;
    let limit = if starting {
        facts.idle_after.max(facts.max_wait)
    } else {
        facts.idle_after
    };
    let asked = quiet;
    let idle = [
        facts.since_awake,
        Some(facts.since_created),
        Some(facts.since_leading),
    ]
    .into_iter()
    .fold(quiet, shorter)
    .unwrap_or_default();
    if idle < limit {
        return Decision::Keep {
            reason: format!("idle for {} of {}", seconds(idle), Span(limit)),
            again_in: Some(limit.saturating_sub(idle)),
        };
    }
    Decision::Sleep {
        reason: if starting {
            format!(
                "nobody waits for it, and it has not become ready within {}",
                Span(limit)
            )
        } else if let Some(asked) = asked {
            format!("no request for {} (idle-after {})", seconds(asked), Span(limit))
        } else {
            format!(
                "not called since it is awake, {} ago (idle-after {})",
                seconds(idle),
                Span(limit)
            )
        },
    }
}

fn shorter(a: Option<Duration>, b: Option<Duration>) -> Option<Duration> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn idle(gates: &[GateFacts]) -> Facts<'_> {
        Facts {
            replicas: Replicas(1),
            ready: Replicas(1),
            min: Replicas(0),
            rollout_complete: true,
            idle_after: secs(600),
            max_wait: secs(900),
            since_created: secs(9000),
            since_awake: Some(secs(9000)),
            since_active: None,
            since_leading: secs(9000),
            gates,
            unseen: None,
        }
    }

    fn gate(load: Option<Load>) -> GateFacts {
        GateFacts {
            pod: "gate-a".to_owned(),
            load,
        }
    }

    fn quiet(idle: Option<Duration>) -> GateFacts {
        gate(Some(Load {
            in_flight: 0,
            queued: 0,
            idle,
        }))
    }

    fn sleeps(facts: &Facts<'_>) -> bool {
        matches!(decide(facts), Decision::Sleep { .. })
    }

    #[test]
    fn sleeps_when_idle_for_long_enough_and_says_how_long() {
        let gates = [quiet(Some(secs(601))), quiet(None)];
        let Decision::Sleep { reason } = decide(&idle(&gates)) else {
            panic!("must sleep")
        };
        assert_eq!(reason, "no request for 10m1s (idle-after 10m)");
    }

    #[test]
    fn a_woken_model_that_nobody_asks_starts_its_clock_at_ready() {
        let gates = [quiet(None)];
        let facts = Facts {
            since_awake: Some(secs(599)),
            ..idle(&gates)
        };
        assert_eq!(
            decide(&facts),
            Decision::Keep {
                reason: "idle for 9m59s of 10m".to_owned(),
                again_in: Some(secs(1))
            }
        );
    }

    #[test]
    fn a_long_load_without_a_caller_is_not_cut_short() {
        let gates = [quiet(Some(secs(700)))];
        let facts = Facts {
            ready: Replicas(0),
            ..idle(&gates)
        };
        assert!(!sleeps(&facts));
    }

    #[test]
    fn adversarial_no_data_is_never_idle() {
        assert!(!sleeps(&idle(&[])));
        assert!(!sleeps(&idle(&[quiet(None), gate(None)])));
    }

    fn any_gate() -> impl Strategy<Value = GateFacts> {
        proptest::option::of((0u32..2, 0u32..2, proptest::option::of(0u64..2000))).prop_map(|load| {
            gate(load.map(|(in_flight, queued, idle)| Load {
                in_flight,
                queued,
                idle: idle.map(secs),
            }))
        })
    }

    proptest! {
        #[test]
        fn never_sleeps_with_activity_or_without_data(
            gates in proptest::collection::vec(any_gate(), 0..4),
            (replicas, ready, min) in (0u32..3, 0u32..3, 0u32..2),
            rollout_complete: bool,
            (created, leading) in (0u64..2000, 0u64..2000),
            awake in proptest::option::of(0u64..2000),
            active in proptest::option::of(0u64..2000),
        ) {
            let facts = Facts {
                replicas: Replicas(replicas), ready: Replicas(ready), min: Replicas(min), rollout_complete,
                since_created: secs(created), since_awake: awake.map(secs), since_active: active.map(secs),
                since_leading: secs(leading), ..idle(&gates)
            };
            if sleeps(&facts) {
                prop_assert!(replicas > 0 && min == 0 && rollout_complete && !gates.is_empty());
                for gate in &gates {
                    let load = gate.load.expect("data");
                    prop_assert!(load.in_flight == 0 && load.queued == 0);
                    prop_assert!(load.idle.is_none_or(|idle| idle >= secs(600)));
                }
                for age in [Some(created), Some(leading), awake, active].into_iter().flatten() {
                    prop_assert!(age >= 600);
                }
            }
        }

        #[test]
        fn looking_again_when_told_to_is_soon_enough(idle_s in 0u64..600) {
            let gates = [quiet(Some(secs(idle_s)))];
            let Decision::Keep { again_in: Some(again_in), .. } = decide(&idle(&gates)) else { panic!("too early") };
            let later = [quiet(Some(secs(idle_s) + again_in))];
            prop_assert!(sleeps(&idle(&later)));
        }
    }
}
