//! The bodies that kube-scheduler posts and reads, cut down to what is used. Field names as in
//! `k8s.io/kube-scheduler/extender/v1`. Texts are borrowed from the body: a whole `Pod` read into its own type costs
//! several times as much as the decision.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;

use crate::api::gpu_request::{Asking, GpuRequest, GpuRequestError, request_of};
use crate::api::host::{self, Host, Init};
use crate::api::workload::WorkloadRef;
use crate::cluster::workloads::owned_by;
use crate::plan::ledger::Image;
use crate::plan::placement::{Needs, Want};

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

/// What is read of a pod.
#[derive(Debug, Deserialize)]
pub struct Pod<'a> {
    #[serde(borrow)]
    metadata: Metadata<'a>,
    #[serde(borrow)]
    spec: Spec<'a>,
}

#[derive(Debug, Deserialize)]
struct Metadata<'a> {
    #[serde(borrow)]
    name: Text<'a>,
    #[serde(borrow, default)]
    namespace: Option<Text<'a>>,
    #[serde(borrow, default)]
    uid: Option<Text<'a>>,
    #[serde(borrow, default)]
    annotations: Option<Annotations<'a>>,
    #[serde(borrow, default, rename = "ownerReferences")]
    owners: Option<Vec<Owner<'a>>>,
    #[serde(borrow, default)]
    labels: Option<Labels<'a>>,
}

#[derive(Debug, Deserialize)]
struct Labels<'a> {
    #[serde(borrow, default, rename = "pod-template-hash")]
    template_hash: Option<Text<'a>>,
}

#[derive(Debug, Deserialize)]
struct Annotations<'a> {
    #[serde(borrow, default, rename = "ebb.dev/gpus")]
    gpus: Option<Text<'a>>,
    #[serde(borrow, default, rename = "ebb.dev/sharing")]
    sharing: Option<Text<'a>>,
    #[serde(borrow, default, rename = "ebb.dev/placement")]
    placement: Option<Text<'a>>,
}

#[derive(Debug, Deserialize)]
struct Owner<'a> {
    #[serde(borrow)]
    kind: Text<'a>,
    #[serde(borrow)]
    name: Text<'a>,
    #[serde(default)]
    controller: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec<'a> {
    #[serde(borrow)]
    containers: Vec<Container<'a>>,
    #[serde(borrow, default)]
    init_containers: Option<Vec<Container<'a>>>,
    #[serde(borrow, default)]
    overhead: Option<Quantities<'a>>,
    #[serde(borrow, default)]
    node_selector: Option<BTreeMap<Text<'a>, Text<'a>>>,
    #[serde(borrow, default)]
    affinity: Option<Affinity<'a>>,
    #[serde(borrow, default)]
    topology_spread_constraints: Option<Vec<SpreadConstraint<'a>>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SpreadConstraint<'a> {
    #[serde(borrow, default)]
    when_unsatisfiable: Option<Text<'a>>,
}

/// Things that are preferred; only whether there are any is asked.
#[derive(Debug, Default, Deserialize)]
struct Preferred {
    #[serde(default, rename = "preferredDuringSchedulingIgnoredDuringExecution")]
    preferred: Option<Vec<IgnoredAny>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Affinity<'a> {
    #[serde(borrow, default)]
    node_affinity: Option<NodeAffinity<'a>>,
    #[serde(default)]
    pod_affinity: Option<Preferred>,
    #[serde(default)]
    pod_anti_affinity: Option<Preferred>,
}

#[derive(Debug, Deserialize)]
struct NodeAffinity<'a> {
    #[serde(borrow, default, rename = "requiredDuringSchedulingIgnoredDuringExecution")]
    required: Option<NodeSelector<'a>>,
    #[serde(default, rename = "preferredDuringSchedulingIgnoredDuringExecution")]
    preferred: Option<Vec<IgnoredAny>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct NodeSelector<'a> {
    #[serde(borrow, default)]
    node_selector_terms: Option<Vec<Term<'a>>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Term<'a> {
    #[serde(borrow, default)]
    match_expressions: Option<Vec<Expression<'a>>>,
}

#[derive(Debug, Deserialize)]
struct Expression<'a> {
    #[serde(borrow)]
    key: Text<'a>,
    #[serde(borrow)]
    operator: Text<'a>,
    #[serde(borrow, default)]
    values: Option<Vec<Text<'a>>>,
}

#[derive(Debug, Deserialize)]
struct Container<'a> {
    #[serde(borrow)]
    name: Text<'a>,
    #[serde(borrow, default)]
    image: Option<Text<'a>>,
    #[serde(borrow, default)]
    resources: Option<Resources<'a>>,
    #[serde(borrow, default, rename = "restartPolicy")]
    restart_policy: Option<Text<'a>>,
}

#[derive(Debug, Deserialize)]
struct Resources<'a> {
    #[serde(borrow, default)]
    limits: Option<Quantities<'a>>,
    #[serde(borrow, default)]
    requests: Option<Quantities<'a>>,
}

#[derive(Debug, Deserialize)]
struct Quantities<'a> {
    #[serde(borrow, default, rename = "ebb.dev/gpu-memory")]
    gpu_memory: Option<Text<'a>>,
    #[serde(borrow, default)]
    cpu: Option<Text<'a>>,
    #[serde(borrow, default)]
    memory: Option<Text<'a>>,
}

impl Quantities<'_> {
    fn host(&self) -> Host {
        let cpu = self.cpu.as_ref().map(|text| &*text.0);
        Host::read(cpu, self.memory.as_ref().map(|text| &*text.0))
    }
}

impl Container<'_> {
    fn host(&self) -> Host {
        let requests = self
            .resources
            .as_ref()
            .and_then(|resources| resources.requests.as_ref());
        requests.map(Quantities::host).unwrap_or_default()
    }
}

impl Pod<'_> {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.metadata.name.0
    }

    /// Its namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        self.metadata.namespace.as_ref().map_or("", |text| &text.0)
    }

    /// Its UID.
    #[must_use]
    pub fn uid(&self) -> &str {
        self.metadata.uid.as_ref().map_or("", |text| &text.0)
    }

    /// What it asks of GPUs.
    ///
    /// # Errors
    /// When that cannot be served as written.
    pub fn request(&self) -> Result<Option<GpuRequest>, GpuRequestError> {
        request_of(self)
    }

    /// What it asks of a node, `gpus` included.
    #[must_use]
    pub fn want(&self, gpus: Option<GpuRequest>) -> Want {
        let inits = self.spec.init_containers.iter().flatten().map(|container| Init {
            host: container.host(),
            stays: container
                .restart_policy
                .as_ref()
                .is_some_and(|text| text.0 == "Always"),
        });
        let overhead = self
            .spec
            .overhead
            .as_ref()
            .map(Quantities::host)
            .unwrap_or_default();
        Want {
            gpus,
            host: host::of_pod(self.spec.containers.iter().map(Container::host), inits, overhead),
            needs: self.needs(),
        }
    }

    fn needs(&self) -> Needs {
        let mut needs = Needs::default();
        for (key, value) in self.spec.node_selector.iter().flatten() {
            needs.require(&key.0, std::iter::once(&*value.0));
        }
        let affinity = self
            .spec
            .affinity
            .as_ref()
            .and_then(|affinity| affinity.node_affinity.as_ref());
        let required = affinity.and_then(|node| node.required.as_ref());
        let terms = required.and_then(|required| required.node_selector_terms.as_deref());
        // Of several terms any one would do, which says too little of each.
        if let Some([term]) = terms {
            for expression in term
                .match_expressions
                .iter()
                .flatten()
                .filter(|e| e.operator.0 == "In")
            {
                needs.require(
                    &expression.key.0,
                    expression.values.iter().flatten().map(|value| &*value.0),
                );
            }
        }
        needs
    }

    /// The images that a node has to hold before it runs there.
    #[must_use]
    pub fn images(&self) -> Vec<Image> {
        let inits = self.spec.init_containers.iter().flatten();
        let mut images: Vec<Image> = inits
            .chain(&self.spec.containers)
            .filter_map(|container| Some(Image::named(&container.image.as_ref()?.0)))
            .collect();
        images.sort();
        images.dedup();
        images
    }

    /// Whether it says itself which nodes it prefers, in a way that kube-scheduler's own scorers serve.
    #[must_use]
    pub fn prefers(&self) -> bool {
        let any =
            |preferred: &Option<Vec<IgnoredAny>>| preferred.as_ref().is_some_and(|list| !list.is_empty());
        let by_affinity = self.spec.affinity.as_ref().is_some_and(|affinity| {
            let pods = [&affinity.pod_affinity, &affinity.pod_anti_affinity];
            let node = affinity.node_affinity.as_ref();
            node.is_some_and(|node| any(&node.preferred))
                || pods.into_iter().flatten().any(|pods| any(&pods.preferred))
        });
        let mut spread = self.spec.topology_spread_constraints.iter().flatten();
        by_affinity
            || spread.any(|spread| {
                spread
                    .when_unsatisfiable
                    .as_ref()
                    .is_some_and(|text| text.0 == "ScheduleAnyway")
            })
    }

    /// Its own word on how it is placed.
    #[must_use]
    pub fn placement(&self) -> Option<&str> {
        let annotations = self.metadata.annotations.as_ref()?;
        annotations.placement.as_ref().map(|text| &*text.0)
    }

    /// The workload that it belongs to, by the owner that controls it.
    #[must_use]
    pub fn workload(&self) -> Option<WorkloadRef> {
        let mut owners = self.metadata.owners.iter().flatten();
        let owner = owners.find(|owner| owner.controller == Some(true))?;
        let labels = self.metadata.labels.as_ref();
        let hash = labels.and_then(|labels| labels.template_hash.as_ref());
        owned_by(
            self.namespace(),
            &owner.kind.0,
            &owner.name.0,
            hash.map(|text| &*text.0),
        )
    }
}

fn carrying<'b>(container: &'b Container<'_>) -> Option<(&'b str, &'b str)> {
    let resources = container.resources.as_ref()?;
    let quantity = [&resources.limits, &resources.requests]
        .into_iter()
        .flatten()
        .find_map(|quantities| quantities.gpu_memory.as_ref())?;
    Some((&container.name.0, &quantity.0))
}

impl Asking for Pod<'_> {
    fn init_containers(&self) -> impl Iterator<Item = (&str, &str)> {
        self.spec.init_containers.iter().flatten().filter_map(carrying)
    }

    fn containers(&self) -> impl Iterator<Item = (&str, &str)> {
        self.spec.containers.iter().filter_map(carrying)
    }

    fn gpus(&self) -> Option<&str> {
        let annotations = self.metadata.annotations.as_ref()?;
        annotations.gpus.as_ref().map(|text| &*text.0)
    }

    fn sharing(&self) -> Option<&str> {
        let annotations = self.metadata.annotations.as_ref()?;
        annotations.sharing.as_ref().map(|text| &*text.0)
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
                    .filter_map(|pod| pod.metadata.uid.map(|uid| Victim { uid }))
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
