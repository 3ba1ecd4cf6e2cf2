//! n→m: replicas from the requests in flight, up at once, down only when a whole window agrees. 0→n is the gate's,
//! m→0 is [`super::sleep`]'s.

use std::collections::VecDeque;
use std::time::Duration;

use crate::api::units::Replicas;

/// So long the load must have been lower before a replica is taken away.
pub const STABLE_WINDOW: Duration = Duration::from_secs(60);
/// Samples kept per workload; the oldest go first, which can only make a scale-down come sooner by one sample.
const MAX_SAMPLES: usize = 256;

/// All that the decision is made from.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Replicas asked for now.
    pub replicas: Replicas,
    /// Never below.
    pub min: Replicas,
    /// Never above.
    pub max: Replicas,
    /// Requests in flight that one replica should hold.
    pub target_in_flight: u32,
    /// In flight and waiting, over all gates; `None`: some gate has told nothing.
    pub load: Option<u32>,
}

/// What to do, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Set this many.
    To {
        /// Replicas to ask for.
        replicas: Replicas,
        /// Why.
        reason: String,
    },
    /// As it is.
    Stay,
}

/// What the load would need, over the last [`STABLE_WINDOW`].
#[derive(Clone, Debug, Default)]
pub struct Window(VecDeque<(Duration, u32)>);

impl Window {
    /// Notes what was needed at `now` (on any clock that only grows), and forgets what is older than the window.
    pub fn note(&mut self, now: Duration, needed: Replicas) {
        self.0.push_back((now, needed.0));
        while self.0.len() > MAX_SAMPLES
            || self
                .0
                .front()
                .is_some_and(|(at, _)| now.saturating_sub(*at) > STABLE_WINDOW)
        {
            self.0.pop_front();
        }
    }

    /// The most that was needed, once the window is full; before that nothing can be said.
    fn most(&self, now: Duration) -> Option<u32> {
        let (oldest, _) = self.0.front()?;
        let full = now.saturating_sub(*oldest) + STABLE_WINDOW / 10 >= STABLE_WINDOW;
        if full {
            self.0.iter().map(|(_, n)| *n).max()
        } else {
            None
        }
    }
}

/// Replicas that a load needs within the bounds, at least one.
#[must_use]
pub fn needed(facts: &Facts, load: u32) -> Replicas {
    let target = facts.target_in_flight.max(1);
    let most = facts.max.0.max(1);
    Replicas(load.div_ceil(target).clamp(facts.min.0.max(1).min(most), most))
}

/// Decides for one workload, after [`Window::note`] of what is needed now.
#[must_use]
pub fn decide(facts: &Facts, window: &Window, now: Duration) -> Decision {
    if facts.replicas < facts.min {
        return Decision::To {
            replicas: facts.min,
            reason: format!("min-replicas is {}", facts.min),
        };
    }
    let Some(load) = facts.load else {
        return Decision::Stay;
    };
    if facts.replicas.0 == 0 {
        return Decision::Stay;
    }
    let needed = needed(facts, load);
    if needed > facts.replicas {
        return Decision::To {
            replicas: needed,
            reason: format!(
                "{load} requests in flight or waiting, {} per replica wanted",
                facts.target_in_flight
            ),
        };
    }
    match window.most(now) {
        Some(most) if most.max(needed.0) < facts.replicas.0 => Decision::To {
            replicas: Replicas(most.max(needed.0)),
            reason: format!(
                "the load needed no more than {} for {} s",
                most.max(needed.0),
                STABLE_WINDOW.as_secs()
            ),
        },
        _ => Decision::Stay,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn facts(replicas: u32, load: u32) -> Facts {
        Facts {
            replicas: Replicas(replicas),
            min: Replicas(0),
            max: Replicas(4),
            target_in_flight: 32,
            load: Some(load),
        }
    }

    fn to(decision: Decision) -> Option<u32> {
        match decision {
            Decision::To { replicas, .. } => Some(replicas.0),
            Decision::Stay => None,
        }
    }

    #[test]
    fn up_at_once_within_the_bounds() {
        let window = Window::default();
        assert_eq!(to(decide(&facts(1, 100), &window, Duration::ZERO)), Some(4));
        assert_eq!(to(decide(&facts(1, 10_000), &window, Duration::ZERO)), Some(4));
        assert_eq!(to(decide(&facts(1, 32), &window, Duration::ZERO)), None);
    }

    #[test]
    fn down_only_when_the_whole_window_agrees() {
        let mut window = Window::default();
        for second in 0..=70u64 {
            let now = Duration::from_secs(second);
            let load = if second == 5 { 100 } else { 10 };
            let now_facts = facts(4, load);
            window.note(now, needed(&now_facts, load));
            let decision = to(decide(&now_facts, &window, now));
            assert_eq!(decision, (second > 65).then_some(1), "at {second} s");
        }
    }

    #[test]
    fn wakes_are_the_gates_except_up_to_the_minimum() {
        assert_eq!(
            to(decide(&facts(0, 100), &Window::default(), Duration::ZERO)),
            None
        );
        let kept = Facts {
            min: Replicas(2),
            load: None,
            ..facts(0, 0)
        };
        assert_eq!(to(decide(&kept, &Window::default(), Duration::ZERO)), Some(2));
    }

    proptest! {
        #[test]
        fn never_out_of_bounds_and_never_to_zero(
            replicas in 0u32..10, load in proptest::option::of(0u32..1000), (min, extra) in (0u32..4, 0u32..4),
            notes in proptest::collection::vec((0u64..200, 0u32..8), 0..20),
        ) {
            let mut window = Window::default();
            let mut at = 0;
            for (step, needed) in notes {
                at += step;
                window.note(Duration::from_secs(at), Replicas(needed));
            }
            let max = (min + extra).max(1);
            let facts = Facts { replicas: Replicas(replicas), min: Replicas(min), max: Replicas(max), target_in_flight: 32, load };
            if let Some(to) = to(decide(&facts, &window, Duration::from_secs(at))) {
                prop_assert!(to >= min.max(1));
                prop_assert!(to <= max || to < replicas);
            }
        }
    }
}
