//! The way of a node out of the cluster: active → candidate → fenced → releasing → released. Where it is stands on
//! the Node itself, so that a crash at any point resumes or rolls back.
//!
//! | state | taint | on the way on | back |
//! |---|---|---|---|
//! | active | no | empty: candidate | |
//! | candidate | no | still empty after the settle time: fenced | not empty, or wanted |
//! | fenced | yes | still empty once everyone has seen the fence: releasing | not empty, or wanted |
//! | releasing | yes | the provider was asked: released | not empty, and the provider has not begun |
//! | released | yes | the provider takes the node away | |

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::api::duration::Span;

/// Between the fence and the last look: whoever decided on a pod before seeing the fence has bound it by then.
pub const FENCE_SETTLE: Duration = Duration::from_secs(2);

/// Where a node is on its way out. No mark: active.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Empty, for less than the settle time.
    Candidate,
    /// Takes no new pods.
    Fenced,
    /// The provider is about to be asked to remove it; it may have been.
    Releasing,
    /// The provider was asked to remove it.
    Released,
}

/// What stands on a Node that is on its way out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The state.
    pub state: State,
    /// Since when, in milliseconds since the epoch.
    pub since_ms: i64,
    /// Why.
    pub reason: String,
}

/// What the provider says of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtProvider {
    /// It was not asked, or did not answer.
    Unknown,
    /// It has the node.
    Present,
    /// It removes the node.
    Leaving,
    /// It does not know the node.
    Absent,
}

/// All that the decision about one node is made from.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The mark on it.
    pub mark: Option<Mark>,
    /// Whether Ebb's taint is on it.
    pub tainted: bool,
    /// Whether its policy still selects it. One that no policy selects any more goes back to active.
    pub selected: bool,
    /// Whether it is Ready; a node that still boots or has died is not called idle.
    pub ready: bool,
    /// What is on it, in words; `None`: nothing but DaemonSet, mirror and finished pods.
    pub occupied: Option<String>,
    /// A pod that would go there.
    pub wanted: Option<String>,
    /// Why its provider could not take it away.
    pub blocked: Option<String>,
    /// What the provider says of it.
    pub at_provider: AtProvider,
}

/// The group that the node belongs to.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// Time that a node must be empty before it is fenced.
    pub settle_time: Duration,
    /// Nodes that always stay.
    pub min_nodes: u32,
    /// Ready nodes that are not fenced and not on their way out.
    pub staying: u32,
    /// Decide and tell, but change nothing.
    pub dry_run: bool,
}

/// What to do with one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing; look again after this long, if there is something to wait for.
    Stay {
        /// When the answer may be another without any news.
        again_in: Option<Duration>,
    },
    /// Write this mark; `fence` also sets the taint.
    Mark {
        /// The new state.
        state: State,
        /// Why.
        reason: String,
    },
    /// Take mark and taint off.
    Restore {
        /// Why.
        reason: String,
    },
    /// Ask the provider to remove it, then mark it released.
    Remove {
        /// Why, as the mark says.
        reason: String,
    },
    /// The provider was asked before a crash: only mark it released.
    Removed {
        /// Why, as the mark says.
        reason: String,
    },
    /// Would be fenced and released, were it not for the dry run.
    Tell {
        /// Why.
        reason: String,
    },
}

impl State {
    /// Whether a node in this state carries the taint.
    #[must_use]
    pub const fn fenced(self) -> bool {
        !matches!(self, State::Candidate)
    }
}

const STAY: Step = Step::Stay { again_in: None };

/// Decides for one node at `now_ms`.
#[must_use]
pub fn step(facts: &Facts, group: &Group, now_ms: i64) -> Step {
    let Some(mark) = &facts.mark else {
        // A taint without a mark is the rest of something that somebody else undid.
        return if facts.tainted {
            Step::Restore {
                reason: "its release mark was taken off".to_owned(),
            }
        } else {
            active(facts, group)
        };
    };
    // A clock that went back makes a mark look younger, never older.
    let age =
        u64::try_from(now_ms.saturating_sub(mark.since_ms)).map_or(Duration::ZERO, Duration::from_millis);
    let back = if !facts.selected {
        Some("no NodePolicy selects it any more".to_owned())
    } else if let Some(occupied) = &facts.occupied {
        Some(format!("{occupied} is on it"))
    } else if let Some(pod) = &facts.wanted {
        Some(format!("pod {pod} needs it"))
    } else if let Some(blocked) = &facts.blocked {
        Some(blocked.clone())
    } else if group.dry_run {
        Some("its NodePolicy is a dry run now".to_owned())
    } else {
        None
    };
    match (mark.state, back) {
        (State::Candidate | State::Fenced, Some(reason)) => Step::Restore { reason },
        // With the provider at work there is no way back; without its word, it is asked first.
        (State::Releasing, Some(reason)) if facts.at_provider == AtProvider::Present => {
            Step::Restore { reason }
        }
        (State::Releasing, _) => match facts.at_provider {
            AtProvider::Unknown => STAY,
            AtProvider::Present => Step::Remove {
                reason: mark.reason.clone(),
            },
            AtProvider::Leaving => Step::Removed {
                reason: mark.reason.clone(),
            },
            // One that was removed is about to stop being Ready; one that never was the provider's stays.
            AtProvider::Absent if facts.ready => Step::Restore {
                reason: "its provider does not know it".to_owned(),
            },
            AtProvider::Absent => STAY,
        },
        (State::Released, _) => STAY,
        (State::Candidate, None) => {
            if !facts.ready {
                return Step::Restore {
                    reason: "it is not Ready".to_owned(),
                };
            }
            if group.staying <= group.min_nodes {
                return Step::Restore {
                    reason: format!("its NodePolicy keeps {} nodes", group.min_nodes),
                };
            }
            if age < group.settle_time {
                return wait(group.settle_time, age);
            }
            Step::Mark {
                state: State::Fenced,
                reason: format!("empty for {}", Span::from_secs(age.as_secs())),
            }
        }
        (State::Fenced, None) => {
            // Tainted is looked at apart: a person may have taken it off, and then nothing was kept away.
            if !facts.tainted {
                return Step::Restore {
                    reason: "its taint was taken off".to_owned(),
                };
            }
            if group.staying < group.min_nodes {
                return Step::Restore {
                    reason: format!("its NodePolicy keeps {} nodes", group.min_nodes),
                };
            }
            if age < FENCE_SETTLE {
                return wait(FENCE_SETTLE, age);
            }
            Step::Mark {
                state: State::Releasing,
                reason: mark.reason.clone(),
            }
        }
    }
}

fn active(facts: &Facts, group: &Group) -> Step {
    if !facts.selected
        || !facts.ready
        || facts.occupied.is_some()
        || facts.wanted.is_some()
        || facts.blocked.is_some()
        || group.staying <= group.min_nodes
    {
        return STAY;
    }
    let reason = "nothing is on it but DaemonSets, and no pod needs it".to_owned();
    if group.dry_run {
        Step::Tell { reason }
    } else {
        Step::Mark {
            state: State::Candidate,
            reason,
        }
    }
}

fn wait(limit: Duration, age: Duration) -> Step {
    Step::Stay {
        again_in: Some(limit.saturating_sub(age)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(second: i64) -> i64 {
        (1_700_000_000 + second) * 1000
    }

    const GROUP: Group = Group {
        settle_time: Duration::from_secs(60),
        min_nodes: 0,
        staying: 2,
        dry_run: false,
    };

    fn empty(state: Option<(State, i64)>) -> Facts {
        Facts {
            tainted: state.is_some_and(|(state, _)| state.fenced()),
            mark: state.map(|(state, since)| Mark {
                state,
                since_ms: at(since),
                reason: "empty for 1m".to_owned(),
            }),
            selected: true,
            ready: true,
            occupied: None,
            wanted: None,
            blocked: None,
            at_provider: AtProvider::Present,
        }
    }

    fn state_of(step: &Step) -> Option<State> {
        match step {
            Step::Mark { state, .. } => Some(*state),
            _ => None,
        }
    }

    #[test]
    fn the_whole_way() {
        assert_eq!(
            state_of(&step(&empty(None), &GROUP, at(0))),
            Some(State::Candidate)
        );
        let candidate = empty(Some((State::Candidate, 0)));
        assert_eq!(
            step(&candidate, &GROUP, at(59)),
            Step::Stay {
                again_in: Some(Duration::from_secs(1))
            }
        );
        let Step::Mark {
            state: State::Fenced,
            reason,
        } = step(&candidate, &GROUP, at(61))
        else {
            panic!("must be fenced")
        };
        assert_eq!(reason, "empty for 1m1s");
        let fenced = empty(Some((State::Fenced, 61)));
        assert_eq!(
            step(&fenced, &GROUP, at(62)),
            Step::Stay {
                again_in: Some(Duration::from_secs(1))
            }
        );
        assert_eq!(state_of(&step(&fenced, &GROUP, at(63))), Some(State::Releasing));
        let releasing = empty(Some((State::Releasing, 63)));
        assert!(matches!(step(&releasing, &GROUP, at(63)), Step::Remove { .. }));
        assert_eq!(step(&empty(Some((State::Released, 64))), &GROUP, at(9999)), STAY);
    }

    #[test]
    fn crash_between_intent_and_note_asks_only_if_the_provider_has_not_begun() {
        let mut releasing = empty(Some((State::Releasing, 0)));
        releasing.at_provider = AtProvider::Leaving;
        assert!(matches!(step(&releasing, &GROUP, at(1)), Step::Removed { .. }));
        releasing.at_provider = AtProvider::Unknown;
        assert_eq!(step(&releasing, &GROUP, at(1)), STAY);
    }

    #[test]
    fn race_a_pod_that_comes_before_the_fence_is_seen_brings_the_node_back() {
        for state in [State::Candidate, State::Fenced, State::Releasing] {
            let mut facts = empty(Some((state, 0)));
            facts.occupied = Some("pod models/a".to_owned());
            assert!(
                matches!(step(&facts, &GROUP, at(900)), Step::Restore { .. }),
                "{state:?}"
            );
        }
    }

    #[test]
    fn a_taint_that_a_person_took_off_is_not_trusted() {
        let mut facts = empty(Some((State::Fenced, 0)));
        facts.tainted = false;
        assert!(matches!(step(&facts, &GROUP, at(900)), Step::Restore { .. }));
    }

    #[test]
    fn a_dry_run_only_tells() {
        let dry = Group {
            dry_run: true,
            ..GROUP
        };
        assert!(matches!(step(&empty(None), &dry, at(0)), Step::Tell { .. }));
        assert!(matches!(
            step(&empty(Some((State::Fenced, 0))), &dry, at(900)),
            Step::Restore { .. }
        ));
    }

    fn any_mark() -> impl Strategy<Value = Option<(State, i64)>> {
        proptest::option::of((
            prop_oneof![
                Just(State::Candidate),
                Just(State::Fenced),
                Just(State::Releasing),
                Just(State::Released)
            ],
            0i64..200,
        ))
    }

    proptest! {
        #[test]
        fn never_goes_on_while_occupied_wanted_or_below_the_minimum(
            mark in any_mark(), occupied: bool, wanted: bool, ready: bool, tainted: bool, selected: bool,
            provider in prop_oneof![Just(AtProvider::Unknown), Just(AtProvider::Present), Just(AtProvider::Leaving),
                Just(AtProvider::Absent)],
            (min_nodes, staying) in (0u32..3, 0u32..3), dry_run: bool, now in 0i64..400,
        ) {
            let mut facts = empty(mark);
            facts.occupied = occupied.then(|| "pod models/a".to_owned());
            facts.wanted = wanted.then(|| "models/b".to_owned());
            facts.ready = ready;
            facts.tainted = tainted;
            facts.selected = selected;
            facts.at_provider = provider;
            let group = Group { min_nodes, staying, dry_run, ..GROUP };
            let step = step(&facts, &group, at(now));
            let onward = match &step {
                Step::Mark { .. } | Step::Remove { .. } | Step::Tell { .. } => true,
                Step::Stay { .. } | Step::Restore { .. } | Step::Removed { .. } => false,
            };
            if onward {
                prop_assert!(!occupied && !wanted && selected);
                let tells = matches!(step, Step::Tell { .. });
                prop_assert!(!dry_run || tells);
            }
            if let Some(state) = state_of(&step) {
                let before = mark.map(|(state, _)| state);
                match state {
                    State::Candidate => prop_assert!(before.is_none() && ready && staying > min_nodes),
                    State::Fenced => prop_assert!(before == Some(State::Candidate) && staying > min_nodes),
                    State::Releasing => prop_assert!(before == Some(State::Fenced) && tainted && staying >= min_nodes),
                    State::Released => prop_assert!(false, "only after the provider was asked"),
                }
            }
            if matches!(step, Step::Remove { .. }) {
                prop_assert!(mark.is_some_and(|(state, _)| state == State::Releasing));
                prop_assert!(provider == AtProvider::Present);
            }
        }
    }
}
