//! Which nodes the unbound pods need: those that stand, fenced ones that come back, those that boot, and those that
//! must be asked for. Pods are put where they would fit, one after the other, each where it costs least.

use std::collections::{BTreeMap, BTreeSet};

use super::gating::Labels;
use super::room::{self, GpuRoom};
use crate::api::gpu_request::GpuRequest;

/// A pod that asks for GPU memory and has no node yet.
#[derive(Clone, Debug)]
pub struct PendingPod {
    /// Its UID.
    pub uid: String,
    /// `namespace/name`.
    pub name: String,
    /// When it was created, milliseconds since the epoch; the oldest is served first.
    pub created_ms: i64,
    /// What it asks.
    pub request: GpuRequest,
    /// Its `nodeSelector`.
    pub node_selector: Labels,
    /// Its tolerations.
    pub tolerations: Vec<Toleration>,
}

/// A toleration, reduced to what a NoSchedule or NoExecute taint is held against.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Toleration {
    /// `None`: every key.
    pub key: Option<String>,
    /// `None`: every value (`operator: Exists`).
    pub value: Option<String>,
    /// `None`: every effect.
    pub effect: Option<String>,
}

/// A taint that keeps pods away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taint {
    /// Its key.
    pub key: String,
    /// Its value.
    pub value: String,
    /// Its effect: `NoSchedule` or `NoExecute`.
    pub effect: String,
}

/// How far a node is on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// It takes pods.
    Active,
    /// It is empty, and waits to be fenced.
    Candidate,
    /// It is fenced, and can come back.
    Fenced,
    /// It goes; nothing brings it back.
    Leaving,
}

/// A node of the cluster.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: Labels,
    /// Its taints, Ebb's own left out.
    pub taints: Vec<Taint>,
    /// Ready, and not cordoned.
    pub usable: bool,
    /// How far it is on its way out.
    pub standing: Standing,
    /// Its healthy GPUs; empty until its agent has told.
    pub gpus: Vec<GpuRoom>,
}

/// A group that can have more nodes.
#[derive(Clone, Debug)]
pub struct Group {
    /// Name of its NodePolicy.
    pub name: String,
    /// GPUs of a new node.
    pub gpus: Vec<GpuRoom>,
    /// Labels of a new node.
    pub labels: Labels,
    /// Taints of a new node, as far as nodes of the group have shown any.
    pub taints: Vec<Taint>,
    /// Nodes that were asked for and cannot take pods yet.
    pub booting: u32,
    /// Nodes that exist, those that go included, and those that boot.
    pub nodes: u32,
    /// Never more.
    pub max_nodes: u32,
}

/// One node to ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// The group.
    pub group: String,
    /// UIDs of the pods it is for.
    pub pods: Vec<String>,
    /// Why.
    pub reason: String,
}

/// What the unbound pods need.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Nodes that some pod would go to, and which pod.
    pub keep: BTreeMap<String, String>,
    /// Nodes to ask for.
    pub ask: Vec<Ask>,
    /// Pods that no node will ever take, by UID, and why.
    pub never: BTreeMap<String, String>,
    /// Pods that wait for room which nothing here can make, by UID, and why.
    pub wait: BTreeMap<String, String>,
}

/// Simulates where the pods would go.
#[must_use]
pub fn decide(pods: &[PendingPod], nodes: &[Node], groups: &[Group]) -> Wanted {
    let mut wanted = Wanted::default();
    let mut standing: Vec<Node> = nodes
        .iter()
        .filter(|node| node.usable && node.standing != Standing::Leaving)
        .cloned()
        .collect();
    standing.sort_by(|a, b| (a.standing, &a.name).cmp(&(b.standing, &b.name)));
    let mut booting: Vec<(&Group, Vec<GpuRoom>)> = groups
        .iter()
        .flat_map(|group| (0..group.booting).map(move |_| (group, group.gpus.clone())))
        .collect();
    let mut new: Vec<(&Group, Vec<GpuRoom>, Vec<&PendingPod>)> = Vec::new();
    // The smallest shape first: what is asked for is paid for.
    let mut by_size: Vec<&Group> = groups.iter().collect();
    by_size.sort_by_key(|group| {
        (
            group.gpus.iter().map(|gpu| gpu.usable.0).sum::<u64>(),
            &group.name,
        )
    });

    let mut order: Vec<&PendingPod> = pods.iter().collect();
    order.sort_by(|a, b| (a.created_ms, &a.name).cmp(&(b.created_ms, &b.name)));
    for pod in order {
        let place = standing.iter_mut().find_map(|node| {
            (admits(pod, &node.labels, &node.taints) && room::take(&mut node.gpus, &pod.request))
                .then(|| node.name.clone())
        });
        if let Some(node) = place {
            wanted.keep.entry(node).or_insert_with(|| pod.name.clone());
            continue;
        }
        if booting
            .iter_mut()
            .any(|(group, gpus)| admits(pod, &group.labels, &group.taints) && room::take(gpus, &pod.request))
        {
            continue;
        }
        let shared = new.iter_mut().find_map(|(group, gpus, for_pods)| {
            (admits(pod, &group.labels, &group.taints) && room::take(gpus, &pod.request)).then_some(for_pods)
        });
        if let Some(for_pods) = shared {
            for_pods.push(pod);
            continue;
        }
        let fitting: Vec<&Group> = by_size
            .iter()
            .copied()
            .filter(|group| {
                admits(pod, &group.labels, &group.taints) && room::fits_when_empty(&group.gpus, &pod.request)
            })
            .collect();
        let open = fitting.iter().copied().find(|group| {
            let asked = new.iter().filter(|(g, _, _)| g.name == group.name).count();
            u64::from(group.nodes) + (asked as u64) < u64::from(group.max_nodes)
        });
        if let Some(group) = open {
            let mut gpus = group.gpus.clone();
            room::take(&mut gpus, &pod.request);
            new.push((group, gpus, vec![pod]));
            continue;
        }
        let later = nodes.iter().any(|node| {
            admits(pod, &node.labels, &node.taints) && room::fits_when_empty(&node.gpus, &pod.request)
        });
        let told = describe(&pod.request);
        if let Some(group) = fitting.first() {
            wanted.wait.insert(
                pod.uid.clone(),
                format!(
                    "needs {told}; NodePolicy {} has its maximum of {} nodes, so it waits for another model to sleep",
                    group.name, group.max_nodes
                ),
            );
        } else if later {
            wanted.wait.insert(
                pod.uid.clone(),
                format!("needs {told}; it waits for another model to sleep"),
            );
        } else if nodes.iter().any(|node| node.usable && node.gpus.is_empty()) && groups.is_empty() {
            wanted.wait.insert(
                pod.uid.clone(),
                format!("needs {told}; no node has told yet which GPUs it has"),
            );
        } else {
            wanted.never.insert(
                pod.uid.clone(),
                format!(
                    "needs {told}, which no node that it may run on has and no NodePolicy offers: ask for less, look \
                     at its nodeSelector and tolerations, or add a NodePolicy whose spec.node fits"
                ),
            );
        }
    }
    wanted.ask = new
        .into_iter()
        .map(|(group, _, for_pods)| Ask {
            group: group.name.clone(),
            reason: reason(&for_pods),
            pods: for_pods.into_iter().map(|pod| pod.uid.clone()).collect(),
        })
        .collect();
    wanted
}

fn describe(request: &GpuRequest) -> String {
    match request.gpus.get() {
        1 => format!("{} on one GPU", request.bytes_per_gpu),
        gpus => format!("{} on each of {gpus} GPUs of one node", request.bytes_per_gpu),
    }
}

fn reason(pods: &[&PendingPod]) -> String {
    match pods {
        [] => String::new(),
        [pod] => format!(
            "pod {} needs {}, which no node has free",
            pod.name,
            describe(&pod.request)
        ),
        [pod, others @ ..] => format!(
            "pod {} needs {}, which no node has free, and {} more would fit beside it",
            pod.name,
            describe(&pod.request),
            others.len()
        ),
    }
}

fn admits(pod: &PendingPod, labels: &Labels, taints: &[Taint]) -> bool {
    pod.node_selector
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
        && taints.iter().all(|taint| {
            pod.tolerations
                .iter()
                .any(|toleration| tolerates(toleration, taint))
        })
}

/// Whether the taint keeps no pod with this toleration away.
#[must_use]
pub fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let matches = |wanted: &Option<String>, is: &str| wanted.as_deref().is_none_or(|wanted| wanted == is);
    matches(&toleration.key, &taint.key)
        && matches(&toleration.value, &taint.value)
        && matches(&toleration.effect, &taint.effect)
}

/// Names of the nodes that [`Wanted::keep`] wants and that must come back first.
#[must_use]
pub fn to_bring_back(wanted: &Wanted, nodes: &[Node]) -> BTreeSet<String> {
    nodes
        .iter()
        .filter(|node| matches!(node.standing, Standing::Candidate | Standing::Fenced))
        .filter(|node| wanted.keep.contains_key(&node.name))
        .map(|node| node.name.clone())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::gpu_request::Sharing;
    use crate::api::units::Bytes;
    use proptest::prelude::*;
    use std::num::NonZeroU32;

    const GIB: u64 = 1 << 30;

    fn pod(n: u32, gib: u64) -> PendingPod {
        PendingPod {
            uid: format!("uid-{n}"),
            name: format!("models/p{n}"),
            created_ms: i64::from(n),
            request: GpuRequest {
                gpus: NonZeroU32::MIN,
                bytes_per_gpu: Bytes(gib * GIB),
                sharing: Sharing::Shared,
            },
            node_selector: Labels::new(),
            tolerations: Vec::new(),
        }
    }

    fn node(name: &str, standing: Standing, free_gib: u64) -> Node {
        Node {
            name: name.to_owned(),
            labels: Labels::new(),
            taints: Vec::new(),
            usable: true,
            standing,
            gpus: vec![GpuRoom {
                free: Bytes(free_gib * GIB),
                empty: free_gib == 24,
                ..GpuRoom::empty(Bytes(24 * GIB))
            }],
        }
    }

    fn group(nodes: u32, booting: u32, max_nodes: u32) -> Group {
        Group {
            name: "l4".to_owned(),
            gpus: vec![GpuRoom::empty(Bytes(24 * GIB))],
            labels: Labels::from([("pool".to_owned(), "l4".to_owned())]),
            taints: Vec::new(),
            booting,
            nodes,
            max_nodes,
        }
    }

    #[test]
    fn a_pod_that_fits_nowhere_gets_one_node_and_the_next_one_shares_it() {
        let wanted = decide(
            &[pod(1, 18), pod(2, 6), pod(3, 20)],
            &[node("a", Standing::Active, 5)],
            &[group(1, 0, 10)],
        );
        assert_eq!(wanted.ask.len(), 2);
        assert_eq!(wanted.ask[0].pods, ["uid-1", "uid-2"]);
        assert_eq!(wanted.ask[1].pods, ["uid-3"]);
    }

    #[test]
    fn a_node_that_boots_is_not_asked_for_again() {
        let wanted = decide(&[pod(1, 18), pod(2, 6)], &[], &[group(1, 1, 10)]);
        assert_eq!(wanted, Wanted::default());
    }

    #[test]
    fn a_fenced_node_comes_back_before_a_new_one_is_asked_for() {
        let nodes = [node("a", Standing::Fenced, 24), node("b", Standing::Leaving, 24)];
        let wanted = decide(&[pod(1, 18)], &nodes, &[group(2, 0, 10)]);
        assert!(wanted.ask.is_empty());
        assert_eq!(to_bring_back(&wanted, &nodes), BTreeSet::from(["a".to_owned()]));
    }

    #[test]
    fn what_can_never_run_is_told_apart_from_what_waits() {
        let nodes = [node("a", Standing::Active, 0)];
        let wanted = decide(&[pod(1, 80), pod(2, 18)], &nodes, &[group(1, 0, 1)]);
        assert!(wanted.never["uid-1"].contains("80 GiB"));
        assert!(wanted.wait["uid-2"].contains("maximum of 1"));
        let mut picky = pod(3, 1);
        picky.node_selector = Labels::from([("pool".to_owned(), "h100".to_owned())]);
        assert!(
            decide(&[picky], &nodes, &[group(1, 0, 9)])
                .never
                .contains_key("uid-3")
        );
    }

    #[test]
    fn a_node_that_the_pod_does_not_tolerate_is_not_asked_for() {
        let mut tainted = group(0, 0, 10);
        tainted.taints.push(Taint {
            key: "nvidia.com/gpu".to_owned(),
            value: String::new(),
            effect: "NoSchedule".to_owned(),
        });
        let wanted = decide(&[pod(1, 4)], &[], &[tainted]);
        assert!(wanted.ask.is_empty() && wanted.never["uid-1"].contains("tolerations"));
    }

    #[test]
    fn taints_need_their_toleration() {
        let mut tainted = node("a", Standing::Active, 24);
        tainted.taints.push(Taint {
            key: "nvidia.com/gpu".to_owned(),
            value: "present".to_owned(),
            effect: "NoSchedule".to_owned(),
        });
        let mut tolerant = pod(1, 4);
        tolerant.tolerations.push(Toleration {
            key: Some("nvidia.com/gpu".to_owned()),
            ..Toleration::default()
        });
        assert!(
            decide(&[tolerant], &[tainted.clone()], &[])
                .keep
                .contains_key("a")
        );
        assert!(decide(&[pod(1, 4)], &[tainted], &[]).keep.is_empty());
    }

    proptest! {
        #[test]
        fn never_over_the_maximum_and_never_while_it_would_fit(
            sizes in proptest::collection::vec(1u64..30, 0..12),
            frees in proptest::collection::vec(0u64..25, 0..4),
            booting in 0u32..3, max_nodes in 1u32..8,
        ) {
            let nodes: Vec<Node> = frees.iter().enumerate()
                .map(|(n, free)| node(&format!("n{n}"), Standing::Active, *free)).collect();
            let pods: Vec<PendingPod> = (0..).zip(&sizes).map(|(n, gib)| pod(n, *gib)).collect();
            let have = u32::try_from(nodes.len()).expect("small") + booting;
            let wanted = decide(&pods, &nodes, &[group(have, booting, max_nodes)]);
            prop_assert!(wanted.ask.is_empty() || have as usize + wanted.ask.len() <= max_nodes as usize);
            // Each asked node is for somebody, and nobody is asked for twice.
            let mut seen = BTreeSet::new();
            for ask in &wanted.ask {
                prop_assert!(!ask.pods.is_empty());
                for uid in &ask.pods {
                    prop_assert!(seen.insert(uid.clone()));
                }
            }
            // With what was asked for booting, nothing more is asked.
            let asked = u32::try_from(wanted.ask.len()).expect("small");
            let again = decide(&pods, &nodes, &[group(have + asked, booting + asked, max_nodes)]);
            prop_assert!(again.ask.is_empty());
            for uid in wanted.never.keys() {
                let n: usize = uid.trim_start_matches("uid-").parse().expect("ours");
                prop_assert!(sizes[n] > 24);
            }
        }
    }
}
