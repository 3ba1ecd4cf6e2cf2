//! What is read of a pod: what it asks, whose it is, and what it says of nodes.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::Text;
use crate::api::gpu_request::{Asking, GpuRequest, GpuRequestError, request_of};
use crate::api::host::{self, Host, Init};
use crate::api::workload::WorkloadRef;
use crate::cluster::workloads::owned_by;
use crate::plan::ledger::Image;
use crate::plan::placement::{Needs, Want};

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

impl<'a> Pod<'a> {
    /// Its UID and nothing else.
    pub(super) fn into_uid(self) -> Option<Text<'a>> {
        self.metadata.uid
    }

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
