//! A cluster in full use: its nodes, the pods on them, and what is asked of it next.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use ebb::api::gpu_request::{GpuRequest, Sharing};
use ebb::api::host::Host;
use ebb::api::units::{Bytes, GpuId, MilliCpu, NodeName, PodUid};
use ebb::plan::ledger::{
    Claim, Entry, Event, GpuFacts, Images, Inventory, Ledger, NeighbourFacts, NodeFacts, PodFacts, Start,
};
use ebb::plan::placement::{self, Needs, Want};
use ebb_lab::bench::chance::Chance;
use serde_json::{Value, json};

const GIB: u64 = 1 << 30;
/// Label that says a node's type of card.
const CARD: &str = "nvidia.com/gpu.product";
/// Types of card with their GiB, and how many nodes of a hundred have them.
const CARDS: [(&str, u64, usize); 3] = [("H100", 80, 50), ("L40S", 48, 30), ("L4", 24, 20)];
/// Nodes are between so many and so many percent full.
const FULL_PERCENT: (usize, usize) = (45, 100);
/// Pods without GPU memory on each node.
const NEIGHBOURS: usize = 8;
/// Other images on each node, beside one version of the server's.
const OTHER_IMAGES: usize = 20;

/// What a pod asks.
#[derive(Clone, Debug)]
pub struct Kind {
    /// GPUs.
    pub gpus: u32,
    /// GiB on each of them.
    pub gib: u64,
    /// Whole cards.
    pub whole: bool,
    /// Cores.
    pub cpu: u64,
    /// GiB of the machine's memory.
    pub memory: u64,
    /// The type of card that it must have.
    pub card: Option<&'static str>,
    /// How often it comes, in parts of the sum.
    weight: usize,
}

impl Kind {
    const fn new(weight: usize, gpus: u32, gib: u64, cpu: u64, memory: u64) -> Kind {
        Kind {
            gpus,
            gib,
            whole: false,
            cpu,
            memory,
            card: None,
            weight,
        }
    }

    const fn whole(self) -> Kind {
        Kind { whole: true, ..self }
    }

    const fn on(self, card: &'static str) -> Kind {
        Kind {
            card: Some(card),
            ..self
        }
    }

    /// What it asks of GPUs.
    pub fn request(&self) -> GpuRequest {
        GpuRequest {
            gpus: NonZeroU32::new(self.gpus).unwrap_or(NonZeroU32::MIN),
            bytes_per_gpu: Bytes(self.gib * GIB),
            sharing: if self.whole {
                Sharing::Exclusive
            } else {
                Sharing::Shared
            },
        }
    }

    /// What it asks of a node.
    pub fn want(&self) -> Want {
        let mut needs = Needs::default();
        if let Some(card) = self.card {
            needs.require(CARD, std::iter::once(card));
        }
        Want {
            gpus: Some(self.request()),
            host: self.host(),
            needs,
        }
    }

    /// What it asks of the machine.
    pub fn host(&self) -> Host {
        Host {
            cpu: MilliCpu(self.cpu * 1000),
            memory: Bytes(self.memory * GIB),
        }
    }
}

/// Small, middling and large models, some of them on several GPUs and some on one type of card.
pub const KINDS: [Kind; 20] = [
    Kind::new(6, 1, 4, 2, 8),
    Kind::new(8, 1, 6, 2, 8),
    Kind::new(8, 1, 8, 2, 16),
    Kind::new(8, 1, 10, 4, 16),
    Kind::new(4, 1, 12, 4, 24),
    Kind::new(10, 1, 16, 4, 32),
    Kind::new(10, 1, 18, 4, 32),
    Kind::new(4, 1, 20, 4, 32),
    Kind::new(4, 1, 22, 4, 48).on("L4"),
    Kind::new(6, 1, 24, 8, 48),
    Kind::new(4, 1, 30, 8, 64),
    Kind::new(3, 1, 36, 8, 64).on("L40S"),
    Kind::new(5, 1, 40, 8, 64),
    Kind::new(3, 1, 60, 8, 96),
    Kind::new(3, 1, 72, 8, 128).on("H100"),
    Kind::new(3, 2, 40, 12, 128),
    Kind::new(2, 2, 20, 8, 64),
    Kind::new(2, 4, 40, 16, 192),
    Kind::new(3, 1, 40, 8, 64).whole(),
    Kind::new(1, 2, 79, 16, 256).whole().on("H100"),
];
/// Fits on the cards, but by the end nowhere: nobody has eight that empty.
pub const TOO_MUCH: Kind = Kind::new(0, 8, 79, 64, 900);

/// The cluster, and the pods that can end.
pub struct Cluster {
    /// All nodes by name, with their type of card.
    pub nodes: Vec<(NodeName, &'static str)>,
    gpus: u32,
    /// Who is bound, and what that one has.
    bound: Vec<(PodUid, Bytes)>,
    asked: Bytes,
    asked_at_first: Bytes,
    pods: usize,
}

impl Cluster {
    /// A cluster of this size, as full as [`FULL_PERCENT`] says, and the ledger that knows it.
    pub fn new(nodes: usize, gpus: u32, chance: &mut Chance) -> (Cluster, Ledger) {
        let mut ledger = Ledger::default();
        let mut cluster = Cluster {
            nodes: Vec::new(),
            gpus,
            bound: Vec::new(),
            asked: Bytes(0),
            asked_at_first: Bytes(0),
            pods: 0,
        };
        for number in 0..nodes {
            let name: NodeName = format!("gpu-pool-{:02}-node-{number:05}", number % 16)
                .as_str()
                .into();
            let place = chance.below(100);
            let (card, gib, _) = *CARDS
                .iter()
                .scan(0, |sum, card| {
                    *sum += card.2;
                    Some((*sum, card))
                })
                .find_map(|(sum, card)| (place < sum).then_some(card))
                .unwrap_or(&CARDS[0]);
            cluster.nodes.push((name.clone(), card));
            ledger.apply(Event::Node(node(&name, card, number)));
            ledger.apply(Event::Inventory(cluster.inventory(&name, gib, Bytes(0))));
            for neighbour in 0..NEIGHBOURS {
                ledger.apply(Event::Neighbour(NeighbourFacts {
                    uid: format!("daemon-{number}-{neighbour}").as_str().into(),
                    node: Some(name.clone()),
                    host: Host {
                        cpu: MilliCpu(100),
                        memory: Bytes(GIB / 4),
                    },
                    finished: false,
                }));
            }
            cluster.fill(&mut ledger, &name, card, chance);
        }
        cluster.asked_at_first = cluster.asked;
        (cluster, ledger)
    }

    fn fill(&mut self, ledger: &mut Ledger, name: &NodeName, card: &str, chance: &mut Chance) {
        let percent = FULL_PERCENT.0 + chance.below(FULL_PERCENT.1 - FULL_PERCENT.0 + 1);
        // A few draws that do not fit say that the node is as full as it gets.
        let mut misses = 0;
        while misses < 8 {
            let Some(node) = ledger.node(name.as_str()) else {
                return;
            };
            let full = 100 - node.free().0 * 100 / node.usable().0.max(1);
            if full >= percent as u64 {
                return;
            }
            let kind = draw(chance);
            let fits = kind.card.is_none_or(|asked| asked == card);
            match placement::fit(node, &kind.request(), None) {
                Ok(choice) if fits => {
                    let uid = self.uid();
                    let claim = Claim::of(&kind.request(), choice.gpus);
                    ledger.apply(self.bind(uid, name.clone(), kind.host(), claim));
                }
                _ => misses += 1,
            }
        }
    }

    /// The next pod's UID.
    pub fn uid(&mut self) -> PodUid {
        self.pods += 1;
        format!("69078e7b-0eb7-4c00-8d7d-{:012x}", self.pods)
            .as_str()
            .into()
    }

    /// The pod is bound now.
    pub fn bind(&mut self, uid: PodUid, node: NodeName, host: Host, claim: Claim) -> Event {
        let gpus = claim.gpus.as_ref().map_or(0, Vec::len) as u64;
        let bytes = Bytes(claim.bytes_per_gpu.0 * gpus);
        self.asked = self.asked.saturating_add(bytes);
        self.bound.push((uid.clone(), bytes));
        Event::Pod(PodFacts {
            entry: Entry {
                namespace: "models".into(),
                name: uid.0.clone(),
                uid,
                host,
                claim,
            },
            node: Some(node),
            finished: false,
            start: Start::Over,
        })
    }

    /// Whether more is bound than when the cluster was made.
    pub fn is_fuller_than_at_first(&self) -> bool {
        self.asked > self.asked_at_first
    }

    /// One of the pods is gone.
    pub fn end(&mut self, chance: &mut Chance) -> Option<Event> {
        if self.bound.is_empty() {
            return None;
        }
        let (uid, bytes) = self.bound.swap_remove(chance.below(self.bound.len()));
        self.asked = self.asked.saturating_sub(bytes);
        Some(Event::PodGone(uid))
    }

    /// The agent of some node tells anew of its GPUs: a little more or less is in use.
    pub fn told_anew(&self, chance: &mut Chance) -> Event {
        let (name, card) = &self.nodes[chance.below(self.nodes.len())];
        let gib = CARDS
            .iter()
            .find(|(known, ..)| known == card)
            .map_or(0, |card| card.1);
        let foreign = Bytes(chance.below(3) as u64 * GIB / 4);
        Event::Inventory(self.inventory(name, gib, foreign))
    }

    fn inventory(&self, node: &NodeName, gib: u64, foreign: Bytes) -> Inventory {
        let gpu = |index: u32| GpuFacts {
            id: GpuId::from(format!("GPU-{node}-{index:04}-5b8c-b7f5-7ab2b1c5e1f0").as_str()),
            index,
            usable: Bytes(gib * GIB - GIB / 2),
            used: None,
            foreign: Some(foreign),
            used_by: BTreeMap::new(),
            closed: None,
        };
        Inventory {
            node: node.clone(),
            closed: None,
            gpus: (0..self.gpus).map(gpu).collect(),
        }
    }

    /// The nodes that kube-scheduler's own filters leave: those with the right card.
    pub fn candidates(&self, kind: &Kind) -> Vec<&str> {
        let right = |card: &str| kind.card.is_none_or(|asked| asked == card);
        let nodes = self.nodes.iter().filter(|(_, card)| right(card));
        nodes.map(|(name, _)| name.as_str()).collect()
    }
}

/// One of the kinds, by their weights.
pub fn draw(chance: &mut Chance) -> &'static Kind {
    let all: usize = KINDS.iter().map(|kind| kind.weight).sum();
    let mut place = chance.below(all);
    for kind in &KINDS {
        if place < kind.weight {
            return kind;
        }
        place -= kind.weight;
    }
    &KINDS[0]
}

fn node(name: &NodeName, card: &str, number: usize) -> NodeFacts {
    let labels = [
        ("kubernetes.io/hostname", name.as_str()),
        ("kubernetes.io/arch", "amd64"),
        ("kubernetes.io/os", "linux"),
        ("node.kubernetes.io/instance-type", card),
        ("topology.kubernetes.io/region", "eu-1"),
        (
            "topology.kubernetes.io/zone",
            ["eu-1a", "eu-1b", "eu-1c"][number % 3],
        ),
        (CARD, card),
    ];
    // The newest server image is on every fourth node; the others have older ones.
    let server = (
        format!("registry.example/vllm-openai:v0.{}.0", 11 - number % 4),
        9,
    );
    let others =
        (0..OTHER_IMAGES).map(|image| (format!("registry.example/other-{}:1", number % 7 + image), 1));
    let images: Vec<(String, u64)> = others.chain([server]).collect();
    NodeFacts {
        name: name.clone(),
        fence: None,
        allocatable: Some(Host {
            cpu: MilliCpu(192_000),
            memory: Bytes(2048 * GIB),
        }),
        labels: Arc::new(
            labels
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
        ),
        images: Images::new(images.iter().map(|(name, gib)| (name.as_str(), Bytes(gib * GIB)))),
    }
}

/// The body that kube-scheduler posts to filter and prioritize for this pod and these nodes.
pub fn body(uid: &PodUid, kind: &Kind, prefers: bool, nodes: &[&str]) -> Vec<u8> {
    let memory = u64::from(kind.gpus) * kind.gib;
    let resources = json!({
        "cpu": kind.cpu.to_string(),
        "memory": format!("{}Gi", kind.memory),
        "ebb.dev/gpu-memory": format!("{memory}Gi"),
    });
    let mut annotations = json!({"ebb.dev/gpus": kind.gpus.to_string()});
    if kind.whole {
        annotations["ebb.dev/sharing"] = json!("exclusive");
    }
    let mut pod: Value = serde_json::from_str(POD).expect("the text below is JSON");
    pod["metadata"]["uid"] = json!(uid);
    pod["metadata"]["annotations"] = annotations;
    pod["spec"]["containers"][0]["resources"] = json!({"limits": resources, "requests": resources});
    if let Some(card) = kind.card {
        pod["spec"]["nodeSelector"] = json!({CARD: card});
    }
    if prefers {
        let wish = json!({"weight": 1, "preference": {"matchExpressions": [
            {"key": "zone", "operator": "In", "values": ["a"]}]}});
        pod["spec"]["affinity"] =
            json!({"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [wish]}});
    }
    json!({"Pod": pod, "Nodes": null, "NodeNames": nodes})
        .to_string()
        .into_bytes()
}

/// A pod as kube-scheduler 1.36 posts it, without what is put in above.
const POD: &str = r#"{
"metadata": {"name": "d1-659d7955cd-k6z7w", "generateName": "d1-659d7955cd-", "namespace": "models",
  "resourceVersion": "289", "generation": 1, "creationTimestamp": "2026-11-24T02:43:27Z",
  "labels": {"app": "d1", "pod-template-hash": "659d7955cd"},
  "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "d1-659d7955cd",
    "uid": "3fc39b4f-945d-44b5-8505-1887ba590bca", "controller": true, "blockOwnerDeletion": true}]},
"spec": {
  "volumes": [{"name": "kube-api-access-bkq8t", "projected": {"defaultMode": 420, "sources": [
    {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
    {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
    {"downwardAPI": {"items": [{"path": "namespace",
      "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}}]}}],
  "containers": [{"name": "server", "image": "registry.example/vllm-openai:v0.11.0",
    "args": ["--model=/models/llama", "--gpu-memory-utilization=$(EBB_GPU_MEMORY_SHARE)", "--max-model-len=8192"],
    "ports": [{"containerPort": 8000, "name": "http", "protocol": "TCP"}],
    "volumeMounts": [{"name": "kube-api-access-bkq8t", "readOnly": true,
      "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}],
    "readinessProbe": {"httpGet": {"path": "/health", "port": "http", "scheme": "HTTP"}, "timeoutSeconds": 1,
      "periodSeconds": 5, "successThreshold": 1, "failureThreshold": 3},
    "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
    "imagePullPolicy": "IfNotPresent"}],
  "restartPolicy": "Always", "terminationGracePeriodSeconds": 30, "dnsPolicy": "ClusterFirst",
  "serviceAccountName": "default", "serviceAccount": "default", "securityContext": {},
  "schedulerName": "ebb-scheduler",
  "tolerations": [
    {"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300},
    {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}],
  "priority": 0, "enableServiceLinks": true, "preemptionPolicy": "PreemptLowerPriority"},
"status": {"phase": "Pending", "qosClass": "Burstable"}}"#;
