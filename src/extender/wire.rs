//! The bodies that kube-scheduler posts and reads, cut down to what is used. Field names as in
//! `k8s.io/kube-scheduler/extender/v1`. Texts are borrowed from the body: a whole `Pod` read into its own type costs
//! several times as much as the decision.

mod pod;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;

pub use pod::Pod;

/// A text of the body; owned only where it holds an escape.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(transparent)]
pub struct Text<'a>(#[serde(borrow)] pub Cow<'a, str>);

/// Body of filter and prioritize.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Args<'a> {
    /// The pod to place.
    #[serde(borrow)]
    pub pod: Pod<'a>,
    /// Candidates by name, when the extender is registered as `nodeCacheCapable`.
    #[serde(borrow, default)]
    node_names: Option<Vec<Text<'a>>>,
    /// Candidates as whole objects, when it is not.
    #[serde(borrow, default)]
    nodes: Option<NodeList<'a>>,
}

#[derive(Debug, Deserialize)]
struct NodeList<'a> {
    #[serde(borrow, default)]
    items: Option<Vec<&'a RawValue>>,
}

/// The candidates of a request, and how they came.
#[derive(Debug)]
pub struct Candidates<'a> {
    /// Their names.
    pub names: Vec<Cow<'a, str>>,
    /// Each one's whole object, if they came so.
    pub objects: Option<Vec<&'a RawValue>>,
}

impl Candidates<'_> {
    /// Leaves nothing but those at these positions, in this order.
    pub fn keep(&mut self, positions: &[usize]) {
        self.names = positions
            .iter()
            .map(|position| std::mem::take(&mut self.names[*position]))
            .collect();
        if let Some(objects) = &mut self.objects {
            *objects = positions.iter().map(|position| objects[*position]).collect();
        }
    }
}

impl<'a> Args<'a> {
    /// The pod and the candidates.
    ///
    /// # Errors
    /// When a node among them has no name.
    pub fn split(self) -> serde_json::Result<(Pod<'a>, Candidates<'a>)> {
        #[derive(Deserialize)]
        struct Node<'a> {
            #[serde(borrow)]
            metadata: NodeMetadata<'a>,
        }
        #[derive(Deserialize)]
        struct NodeMetadata<'a> {
            #[serde(borrow)]
            name: Text<'a>,
        }
        let candidates = match (self.node_names, self.nodes) {
            (None, Some(nodes)) => {
                let objects = nodes.items.unwrap_or_default();
                let name = |object: &&'a RawValue| {
                    serde_json::from_str::<Node<'a>>(object.get()).map(|node| node.metadata.name.0)
                };
                Candidates {
                    names: objects.iter().map(name).collect::<Result<_, _>>()?,
                    objects: Some(objects),
                }
            }
            (names, _) => Candidates {
                names: names.into_iter().flatten().map(|name| name.0).collect(),
                objects: None,
            },
        };
        Ok((self.pod, candidates))
    }
}

/// Nodes with a text for each. A map in the answer, and none before: thousands of names would be sorted for nothing.
#[derive(Debug, Default)]
pub struct Failed<'a>(pub Vec<(Cow<'a, str>, Arc<str>)>);

impl Failed<'_> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Serialize for Failed<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, text)| (name, &**text)))
    }
}

/// Answer to filter. The nodes go back in the form they came in.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct FilterResult<'a> {
    /// Nodes that have room, by name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_names: Option<Vec<Cow<'a, str>>>,
    /// The same as whole objects.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nodes: Option<Nodes<'a>>,
    /// Nodes without room, each with the reason; evicting pods could help.
    pub failed_nodes: Failed<'a>,
    /// The same where evicting pods cannot help.
    #[serde(skip_serializing_if = "Failed::is_empty")]
    pub failed_and_unresolvable_nodes: Failed<'a>,
    /// Not empty: the pod cannot be scheduled at all at the moment.
    pub error: String,
}

/// A list of whole Nodes.
#[derive(Debug, Default, Serialize)]
pub struct Nodes<'a> {
    /// As in any Kubernetes list.
    pub metadata: BTreeMap<(), ()>,
    /// The nodes as they came.
    pub items: Vec<&'a RawValue>,
}

/// One line of the answer to prioritize.
#[derive(Debug, Serialize, PartialEq, Eq)]
#[serde(rename_all = "PascalCase")]
pub struct HostPriority<'a> {
    /// The node.
    pub host: Cow<'a, str>,
    /// 0–10, higher is better.
    pub score: u8,
}

/// Body of bind.
#[derive(Debug, Clone, Deserialize)]
pub struct BindArgs {
    /// The pod's name.
    #[serde(rename = "PodName")]
    pub pod: String,
    /// Its namespace.
    #[serde(rename = "PodNamespace")]
    pub namespace: String,
    /// Its UID.
    #[serde(rename = "PodUID")]
    pub uid: String,
    /// The node that the scheduler chose.
    #[serde(rename = "Node")]
    pub node: String,
}

/// Answer to bind.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct BindResult {
    /// Empty when the pod is bound.
    pub error: String,
}

/// Body of preempt.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PreemptArgs<'a> {
    /// The pod that wants room.
    #[serde(borrow)]
    pub pod: Pod<'a>,
    /// Whom the scheduler would evict, by node; present when the extender is `nodeCacheCapable`.
    #[serde(borrow, default)]
    node_name_to_meta_victims: Option<BTreeMap<Text<'a>, Victims<'a>>>,
    /// The same with whole pods, when it is not.
    #[serde(borrow, default)]
    node_name_to_victims: Option<BTreeMap<Text<'a>, WholeVictims<'a>>>,
}

/// Pods to be evicted from one node.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Victims<'a> {
    /// The pods.
    #[serde(borrow, default)]
    pub pods: Option<Vec<Victim<'a>>>,
    /// Evictions that a PodDisruptionBudget is against; passed back as it came.
    #[serde(default, rename = "NumPDBViolations")]
    pub pdb_violations: i64,
}

/// One pod to be evicted.
#[derive(Debug, Serialize, Deserialize)]
pub struct Victim<'a> {
    /// Its UID.
    #[serde(borrow, rename = "UID")]
    pub uid: Text<'a>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct WholeVictims<'a> {
    #[serde(borrow, default)]
    pods: Option<Vec<Pod<'a>>>,
    #[serde(default, rename = "NumPDBViolations")]
    pdb_violations: i64,
}

impl<'a> PreemptArgs<'a> {
    /// The pod that wants room, and whom the scheduler would evict, by node.
    #[must_use]
    pub fn split(self) -> (Pod<'a>, BTreeMap<Text<'a>, Victims<'a>>) {
        let whole = |victims: WholeVictims<'a>| Victims {
            pods: victims.pods.map(|pods| {
                pods.into_iter()
                    .filter_map(|pod| pod.into_uid().map(|uid| Victim { uid }))
                    .collect()
            }),
            pdb_violations: victims.pdb_violations,
        };
        let victims = self.node_name_to_meta_victims.unwrap_or_else(|| {
            self.node_name_to_victims
                .into_iter()
                .flatten()
                .map(|(node, victims)| (node, whole(victims)))
                .collect()
        });
        (self.pod, victims)
    }
}

/// Answer to preempt.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct PreemptResult<'a> {
    /// The nodes where evicting those pods makes room on the GPUs.
    pub node_name_to_meta_victims: BTreeMap<Text<'a>, Victims<'a>>,
}
