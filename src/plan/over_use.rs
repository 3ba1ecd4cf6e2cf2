//! What to do about a pod that uses more of a GPU than it declared. Its neighbours were promised what it takes.

use std::time::Duration;

use super::ledger::{Claim, Entry, NodeState};
use crate::api::gpu_request::Sharing;
use crate::api::scale_policy::OverUse;
use crate::api::units::Bytes;

/// So much more is within what drivers and allocators round to.
pub const TOLERANCE: Bytes = Bytes(64 << 20);
/// What does not last so long is a spike.
pub const SETTLE: Duration = Duration::from_secs(10);

/// What a pod has on the GPU where it is furthest over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Excess {
    /// The GPU's index on the node.
    pub gpu: u32,
    /// In use.
    pub used: Bytes,
    /// Declared.
    pub declared: Bytes,
}

/// What a pod that Ebb bound uses, as its node's last reading tells; `None` where that tells nothing of it, or is not
/// believed any more. A card that the pod has to itself is promised to nobody else, so it may use all of it.
#[must_use]
pub fn look(node: &NodeState, entry: &Entry) -> Option<Use> {
    let Claim {
        gpus,
        bytes_per_gpu: declared,
        sharing,
    } = &entry.claim;
    let own = gpus.as_ref().filter(|_| node.is_told())?;
    let (gpu, used) = node
        .used_by(&entry.uid)
        .map(|(gpu, used)| match sharing {
            Sharing::Exclusive if own.contains(&gpu.id) => (gpu.index, used.min(*declared)),
            Sharing::Exclusive | Sharing::Shared => (gpu.index, used),
        })
        .max_by_key(|(_, used)| *used)?;
    let declared = *declared;
    Some(match used > declared.saturating_add(TOLERANCE) {
        true => Use::Over(Excess { gpu, used, declared }),
        false => Use::Within,
    })
}

/// How what a pod uses compares to what it declared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Not more.
    Within,
    /// More.
    Over(Excess),
}

/// What a decision is made from.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// What the pod has.
    pub excess: Excess,
    /// Every reading for so long has shown it over.
    pub lasts: Duration,
    /// It is being deleted.
    pub terminating: bool,
    /// What its policy says, and the policy's name; `None`: no policy is about it.
    pub policy: Option<(OverUse, &'a str)>,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nothing yet.
    Wait {
        /// Look again then.
        again_in: Option<Duration>,
    },
    /// Tell people.
    Tell {
        /// What, and what to do about it.
        reason: String,
    },
    /// Tell people, and evict it.
    Evict {
        /// The same.
        reason: String,
    },
}

/// Decides for one pod that is over.
#[must_use]
pub fn decide(facts: &Facts<'_>) -> Decision {
    if facts.terminating {
        return Decision::Wait { again_in: None };
    }
    if facts.lasts < SETTLE {
        return Decision::Wait {
            again_in: Some(SETTLE.saturating_sub(facts.lasts)),
        };
    }
    let Excess { gpu, used, declared } = facts.excess;
    let told = format!(
        "uses {used} of GPU {gpu}, declared {declared}: raise ebb.dev/gpu-memory or lower --gpu-memory-utilization; {} \
         more than it declared are kept from other pods",
        used.saturating_sub(declared)
    );
    match facts.policy {
        Some((OverUse::Evict, policy)) => Decision::Evict {
            reason: format!("{told}; evicted, as ScalePolicy {policy} says (overUse: Evict)"),
        },
        Some((OverUse::Tell, _)) | None => Decision::Tell { reason: told },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::ledger::{Event, GpuFacts, Inventory, Ledger, NodeFacts, PodFacts, Start};
    use std::sync::Arc;

    const GIB: u64 = 1 << 30;

    /// What is seen of a pod that declared 18 GiB of the first of two cards, and uses so much of each.
    fn seen(sharing: Sharing, used: [u64; 2], silent: Option<Arc<str>>) -> Option<Use> {
        let gpu = |index: u32| GpuFacts {
            id: format!("GPU-{index}").as_str().into(),
            index,
            usable: Bytes(24 * GIB),
            used: None,
            foreign: None,
            used_by: [("p".into(), Bytes(used[index as usize] * GIB))].into(),
            closed: None,
        };
        let entry = Entry {
            uid: "p".into(),
            namespace: "models".into(),
            name: "p".into(),
            host: Default::default(),
            claim: Claim {
                gpus: Some(vec!["GPU-0".into()]),
                bytes_per_gpu: Bytes(18 * GIB),
                sharing,
            },
        };
        let ledger = Ledger::rebuild([
            Event::Node(NodeFacts {
                name: "n".into(),
                fence: None,
                allocatable: None,
                labels: Arc::default(),
                images: Default::default(),
            }),
            Event::Inventory(Inventory {
                node: "n".into(),
                closed: None,
                gpus: vec![gpu(0), gpu(1)],
            }),
            Event::Agent {
                node: "n".into(),
                silent,
            },
            Event::Pod(PodFacts {
                entry: entry.clone(),
                node: Some("n".into()),
                finished: false,
                start: Start::Over,
            }),
        ]);
        look(ledger.node("n")?, &entry)
    }

    fn over(gpu: u32, used: u64) -> Option<Use> {
        Some(Use::Over(Excess {
            gpu,
            used: Bytes(used * GIB),
            declared: Bytes(18 * GIB),
        }))
    }

    #[test]
    fn a_pod_that_has_the_card_to_itself_may_use_all_of_it() {
        assert_eq!(seen(Sharing::Shared, [23, 0], None), over(0, 23));
        assert_eq!(seen(Sharing::Exclusive, [23, 0], None), Some(Use::Within));
        assert_eq!(
            seen(Sharing::Exclusive, [23, 19], None),
            over(1, 19),
            "that one is not its own"
        );
    }

    #[test]
    fn adversarial_the_last_word_of_a_silent_agent_has_nobody_evicted() {
        assert_eq!(seen(Sharing::Shared, [23, 0], Some("silent".into())), None);
    }

    fn facts<'a>(lasts: u64, policy: Option<(OverUse, &'a str)>) -> Facts<'a> {
        Facts {
            excess: Excess {
                gpu: 1,
                used: Bytes(213 * GIB / 10),
                declared: Bytes(18 * GIB),
            },
            lasts: Duration::from_secs(lasts),
            terminating: false,
            policy,
        }
    }

    #[test]
    fn a_spike_is_waited_out() {
        assert_eq!(
            decide(&facts(4, None)),
            Decision::Wait {
                again_in: Some(Duration::from_secs(6))
            }
        );
    }

    #[test]
    fn it_is_told_in_figures_and_evicted_only_where_a_policy_says_so() {
        let told = "uses 21.3 GiB of GPU 1, declared 18 GiB: raise ebb.dev/gpu-memory or lower \
                    --gpu-memory-utilization; 3.3 GiB more than it declared are kept from other pods";
        for policy in [None, Some((OverUse::Tell, "models"))] {
            assert_eq!(
                decide(&facts(10, policy)),
                Decision::Tell {
                    reason: told.to_owned()
                }
            );
        }
        assert_eq!(
            decide(&facts(10, Some((OverUse::Evict, "models")))),
            Decision::Evict {
                reason: format!("{told}; evicted, as ScalePolicy models says (overUse: Evict)")
            }
        );
        let terminating = Facts {
            terminating: true,
            ..facts(99, Some((OverUse::Evict, "models")))
        };
        assert_eq!(decide(&terminating), Decision::Wait { again_in: None });
    }
}
