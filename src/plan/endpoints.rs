//! What the slice of a gated Service points at: the gates that can take its requests, or else the workload's own
//! pods (*fail open*).

use std::net::IpAddr;

/// What is known of one gate, for one Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gate {
    /// Its address.
    pub ip: IpAddr,
    /// Its node.
    pub node: Option<String>,
    /// How it stands with the leader.
    pub state: GateState,
}

/// How a gate stands with the leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateState {
    /// It has a live link.
    Linked {
        /// It accepts connections on every gate port of the Service.
        listens: bool,
        /// It was told to stop.
        stopping: bool,
    },
    /// It has none; its pod is Ready by the cluster's word, and the slice points at it now.
    ListedAndReady,
}

/// A pod of the workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its address.
    pub ip: IpAddr,
    /// Its node.
    pub node: Option<String>,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// The port for each of the Service's ports, in the Service's order; `None`: it has no port of that name.
    pub ports: Option<Vec<u16>>,
}

/// What the slice points at, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The targets.
    pub targets: Targets,
    /// Why these.
    pub reason: &'static str,
}

/// The targets of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Targets {
    /// Gates, on the Service's gate ports.
    Gates(Vec<Gate>),
    /// Pods, all with the same ports, given in the Service's order.
    Pods {
        /// The pods.
        pods: Vec<Pod>,
        /// Their ports.
        ports: Vec<u16>,
    },
    /// Nothing that could answer.
    Nobody,
}

/// Decides for one Service. `ready` are the workload's pods that serve; `settling`: this leader has just begun, and
/// gates may not have dialled it yet.
#[must_use]
pub fn decide(gates: &[Gate], ready: &[Pod], settling: bool) -> Decision {
    let chosen = |wanted: fn(GateState) -> bool| -> Vec<Gate> {
        let mut chosen: Vec<Gate> = gates.iter().filter(|gate| wanted(gate.state)).cloned().collect();
        chosen.sort_by_key(|gate| gate.ip);
        chosen.dedup_by_key(|gate| gate.ip);
        chosen
    };
    let live = chosen(|state| {
        state
            == GateState::Linked {
                listens: true,
                stopping: false,
            }
    });
    let listed = chosen(|state| state == GateState::ListedAndReady);
    // A new leader first hears from one gate, then from the next: those that are listed stay beside it for that long.
    if settling && !listed.is_empty() {
        let mut both = live;
        both.extend(listed);
        both.sort_by_key(|gate| gate.ip);
        both.dedup_by_key(|gate| gate.ip);
        return Decision {
            targets: Targets::Gates(both),
            reason: "the leader is new; gates that were there stay until they had time to dial it",
        };
    }
    if !live.is_empty() {
        return Decision {
            targets: Targets::Gates(live),
            reason: "gates are connected",
        };
    }
    if let Some(targets) = pods(ready) {
        return Decision {
            targets,
            reason: "no gate can take its requests: they go to the workload's own pods",
        };
    }
    if !listed.is_empty() {
        return Decision {
            targets: Targets::Gates(listed),
            reason: "no gate is connected and no pod serves: gates that Kubernetes calls Ready stay",
        };
    }
    Decision {
        targets: Targets::Nobody,
        reason: "no gate is connected and no pod serves",
    }
}

/// All ready pods that agree on the ports; where a rollout changes a port's number, the version with more pods.
#[must_use]
pub fn pods(ready: &[Pod]) -> Option<Targets> {
    let mut by_ports: std::collections::BTreeMap<&[u16], Vec<Pod>> = std::collections::BTreeMap::new();
    for pod in ready {
        if let Some(ports) = &pod.ports {
            by_ports.entry(ports).or_default().push(pod.clone());
        }
    }
    let (ports, mut pods) = by_ports.into_iter().max_by_key(|(_, pods)| pods.len())?;
    pods.sort_by(|a, b| a.name.cmp(&b.name));
    Some(Targets::Pods {
        pods,
        ports: ports.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn gate(last: u8, state: GateState) -> Gate {
        Gate {
            ip: [10, 77, 0, last].into(),
            node: None,
            state,
        }
    }

    fn pod(last: u8, ports: Option<Vec<u16>>) -> Pod {
        Pod {
            ip: [10, 77, 1, last].into(),
            node: None,
            name: format!("pod-{last}"),
            uid: last.to_string(),
            ports,
        }
    }

    const LIVE: GateState = GateState::Linked {
        listens: true,
        stopping: false,
    };

    fn any_state() -> impl Strategy<Value = GateState> {
        prop_oneof![
            (any::<bool>(), any::<bool>())
                .prop_map(|(listens, stopping)| GateState::Linked { listens, stopping }),
            Just(GateState::ListedAndReady),
        ]
    }

    #[test]
    fn two_versions_with_different_ports_are_not_mixed() {
        let ready = [
            pod(1, Some(vec![8000])),
            pod(2, Some(vec![9000])),
            pod(3, Some(vec![9000])),
            pod(4, None),
        ];
        let Targets::Pods { pods, ports } = decide(&[], &ready, false).targets else {
            panic!("fails open")
        };
        assert_eq!((pods.len(), ports), (2, vec![9000]));
    }

    proptest! {
        #[test]
        fn fails_open_exactly_when_no_gate_can_take_requests(
            states in proptest::collection::vec(any_state(), 0..5), pods in 0u8..3, settling: bool,
        ) {
            let gates: Vec<Gate> = (1..).zip(&states).map(|(n, state)| gate(n, *state)).collect();
            let ready: Vec<Pod> = (0..pods).map(|n| pod(n, Some(vec![8000]))).collect();
            let live = states.contains(&LIVE);
            let listed = states.contains(&GateState::ListedAndReady);
            match decide(&gates, &ready, settling).targets {
                Targets::Gates(chosen) => {
                    prop_assert!(!chosen.is_empty());
                    prop_assert!(live || (listed && (settling || ready.is_empty())));
                    for gate in chosen {
                        let usable = gate.state == LIVE || gate.state == GateState::ListedAndReady;
                        prop_assert!(usable);
                    }
                }
                Targets::Pods { pods, .. } => {
                    prop_assert!(!live);
                    prop_assert!(!settling || !listed);
                    prop_assert_eq!(pods.len(), ready.len());
                }
                Targets::Nobody => prop_assert!(!live && !listed && ready.is_empty()),
            }
        }
    }
}
