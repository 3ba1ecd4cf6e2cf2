//! A whole cluster with Ebb on it: control plane, nodes, a node group, and Ebb installed from `manifests/`
//! as anybody would, by `kubectl apply`. The demo, the benchmarks and the end-to-end tests start here.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::ops::Not as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::{Api, Client, ResourceExt as _};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_util::task::AbortOnDropHandle;

use crate::cluster::{self, Cluster, Output};
use crate::demo::observe::{Moment, Observer, What};
use crate::demo::traffic;
use crate::group::{Failure, Group, GroupSpec};
use crate::node::{Images, NodeSpec, Nodes, Options, lab_program};

/// The namespace that Ebb is installed into.
pub const EBB: &str = "ebb-system";
/// The namespace of the sample models.
pub const MODELS: &str = "models";
/// Three models: plain Deployments and Services.
pub const SAMPLE_MODELS: &str = include_str!("../samples/models.yaml");
/// A ScalePolicy for them.
pub const SAMPLE_SCALE_POLICY: &str = include_str!("../samples/scale-policy.yaml");
/// A NodePolicy for the node group. An empty node goes soon after this is applied.
pub const SAMPLE_NODE_POLICY: &str = include_str!("../samples/node-policy.yaml");
/// The image of the scheduler in the manifests.
const SCHEDULER_IMAGE: &str = "registry.k8s.io/kube-scheduler:v1.36.3";
/// Where the node group's API listens, as the sample NodePolicy says.
const GROUP_API: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::new(10, 77, 0, 2)), 8090);

/// What a site is made of.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The `ebb` program.
    pub ebb: PathBuf,
    /// The repository's root, where `manifests/` is.
    pub root: PathBuf,
    /// GPU nodes that are there from the start.
    pub gpu_nodes: usize,
    /// GPUs of each of them.
    pub gpus: u32,
    /// The most nodes the group has.
    pub most_nodes: usize,
    /// From being asked for a node until it registers.
    pub boot_time: Duration,
}

impl Plan {
    /// The usual site, for the `ebb` program at `ebb`.
    pub fn new(ebb: impl Into<PathBuf>) -> Self {
        Self {
            ebb: ebb.into(),
            root: root(),
            gpu_nodes: 1,
            gpus: 2,
            most_nodes: 3,
            boot_time: Duration::from_millis(2500),
        }
    }
}

/// The root of the repository that this program was built from.
pub fn root() -> PathBuf {
    let lab = Path::new(env!("CARGO_MANIFEST_DIR"));
    lab.ancestors().nth(2).unwrap_or(lab).to_owned()
}

/// The `ebb` program that was built beside this one.
///
/// # Errors
/// Says how to build it.
pub fn ebb_program() -> anyhow::Result<PathBuf> {
    let ebb = lab_program()?.with_file_name("ebb");
    anyhow::ensure!(
        ebb.is_file(),
        "no `ebb` program at {}: run `cargo build --workspace`",
        ebb.display()
    );
    Ok(ebb)
}

/// A cluster with nodes. Dropping it ends all of it.
pub struct Site {
    /// What it was made of.
    pub plan: Plan,
    /// The nodes, the group's included.
    pub nodes: Arc<Nodes>,
    /// The node group.
    pub group: Group,
    /// What the API server says.
    pub observer: Observer,
    /// Somebody who may do everything.
    pub client: Client,
    /// The group's journal.
    pub journal: PathBuf,
    _group_api: AbortOnDropHandle<()>,
    // Last, so that nodes and watches end before the API server does.
    cluster: Cluster,
}

impl Site {
    /// Brings up a control plane, a system node and the group's first GPU nodes.
    ///
    /// # Errors
    /// Says what did not come up, and where its log is.
    pub async fn start(plan: Plan) -> anyhow::Result<Self> {
        let cluster = Cluster::up(cluster::Options::default()).await?;
        let client = cluster.client();
        let observer = Observer::start(&client);
        let images = Images::default();
        images.insert("ebb:dev", &plan.ebb);
        images.insert("lab/model:1", lab_program()?);
        images.insert(SCHEDULER_IMAGE, cluster.programs().join("kube-scheduler"));
        let options = Options::new(cluster.dir(), images)?;
        let nodes = Arc::new(Nodes::start(client.clone(), options).await?);
        nodes.add(NodeSpec::system("system-1")).await?;
        let journal = cluster.dir().join("group.journal");
        let group = Group::start(
            Arc::clone(&nodes),
            GroupSpec {
                name: "gpu".to_owned(),
                max: plan.most_nodes,
                boot_time: plan.boot_time,
                template: NodeSpec::gpu("", plan.gpus, 24 << 30, "NVIDIA L4"),
                journal: Some(journal.clone()),
                failure: Failure::None,
            },
        )?;
        let listener = tokio::net::TcpListener::bind(GROUP_API).await;
        let listener = listener.with_context(|| format!("listening on {GROUP_API} for the node group"))?;
        let router = group.router();
        let api = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                tracing::error!(%error, "the node group's API stopped");
            }
        });
        for _ in 0..plan.gpu_nodes {
            group.add_now().await?;
        }
        observer
            .until("the nodes are Ready", Duration::from_secs(30), |state| {
                let ready = |moment: &&Moment| matches!(moment.what, What::NodeReady { .. });
                (state.moments.iter().filter(ready).count() > plan.gpu_nodes).then_some(())
            })
            .await?;
        Ok(Self {
            plan,
            nodes,
            group,
            observer,
            client,
            journal,
            _group_api: AbortOnDropHandle::new(api),
            cluster,
        })
    }

    /// Folder of everything the site writes: logs, state, journal.
    pub fn dir(&self) -> &Path {
        self.cluster.dir()
    }

    /// Keeps that folder when the site ends.
    pub fn keep_dir(&mut self) {
        self.cluster.keep_dir();
    }

    /// Installs Ebb from the manifests and waits until it is at work.
    ///
    /// # Errors
    /// Says which part did not become ready.
    pub async fn install_ebb(&self) -> anyhow::Result<()> {
        let manifests = self.plan.root.join("manifests");
        let manifests = manifests.to_string_lossy();
        // A kind and its objects cannot be made by one call: the second one finds what the first one made.
        self.kubectl(&["apply", "-f", &format!("{manifests}/crds.yaml")])
            .await?;
        self.kubectl(&[
            "wait",
            "--for=condition=Established",
            "--timeout=30s",
            "-f",
            &format!("{manifests}/crds.yaml"),
        ])
        .await?;
        self.kubectl(&["apply", "-f", &manifests]).await?;
        self.observer.follow_gpu_nodes(&self.client);
        self.ebb_ready(Duration::from_secs(60)).await
    }

    /// Waits until Ebb's Deployments are available and its webhooks are trusted by the API server.
    ///
    /// # Errors
    /// When they are not within `limit`; says what is missing.
    pub async fn ebb_ready(&self, limit: Duration) -> anyhow::Result<()> {
        let names = ["ebb-controller", "ebb-gate", "ebb-scheduler"];
        for name in names {
            self.observer
                .until(&format!("Deployment {EBB}/{name} is available"), limit, |state| {
                    let deployment = state.deployments.get(&format!("{EBB}/{name}"))?;
                    let status = deployment.status.as_ref()?;
                    let wanted = deployment.spec.as_ref()?.replicas.unwrap_or(1);
                    (status.available_replicas.unwrap_or(0) >= wanted).then_some(())
                })
                .await?;
        }
        let hooks = Api::<MutatingWebhookConfiguration>::all(self.client.clone());
        let trusted = async {
            loop {
                let hook = hooks.get("ebb").await?;
                let mut hooks = hook.webhooks.iter().flatten();
                if hooks.all(|hook| hook.client_config.ca_bundle.is_some()) {
                    return Ok::<_, kube::Error>(());
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(limit, trusted)
            .await
            .context("the webhook configuration `ebb` got no caBundle")??;
        let gpus = self.plan.gpus as usize * self.plan.gpu_nodes;
        self.observer
            .until("the agents published their nodes' GPUs", limit, |state| {
                let capacity = |name: &String| {
                    let status = state.nodes.get(name)?.status.as_ref()?;
                    status.allocatable.as_ref()?.get("ebb.dev/gpu-memory").cloned()
                };
                let all = state.gpu_nodes_now();
                (state.usable.len() >= gpus && all.iter().all(|name| capacity(name).is_some())).then_some(())
            })
            .await
    }

    /// Runs `kubectl`; what it printed.
    ///
    /// # Errors
    /// When it fails, with what it said.
    pub async fn kubectl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.cluster.kubectl(arguments).await?.success();
        let output = output.with_context(|| format!("kubectl {}", arguments.join(" ")))?;
        Ok(output.stdout)
    }

    /// Runs `kubectl` with a text on its standard input, and gives back all it said.
    ///
    /// # Errors
    /// When it cannot be run or does not end.
    pub async fn kubectl_with(&self, arguments: &[&str], input: &str) -> anyhow::Result<Output> {
        self.cluster.kubectl_with(arguments, input).await
    }

    /// Applies YAML; what was said about it.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn apply(&self, yaml: &str) -> anyhow::Result<Output> {
        self.cluster.apply(yaml).await
    }

    /// The address of a Service: its ClusterIP and first port.
    ///
    /// # Errors
    /// When it has none.
    pub async fn address(&self, namespace: &str, name: &str) -> anyhow::Result<SocketAddr> {
        let services = Api::<Service>::namespaced(self.client.clone(), namespace);
        let spec = services.get(name).await?.spec.unwrap_or_default();
        let ip = spec.cluster_ip.context("a Service without a ClusterIP")?;
        let port = spec
            .ports
            .unwrap_or_default()
            .first()
            .map_or(80, |port| port.port);
        Ok(SocketAddr::new(ip.parse()?, u16::try_from(port)?))
    }

    /// Calls in the group's journal, oldest first.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn journal(&self) -> anyhow::Result<Vec<Value>> {
        let text = std::fs::read_to_string(&self.journal)?;
        text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    /// When the provider was asked to remove a node, in Unix milliseconds; refused calls do not count.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub fn removals(&self, node: &str) -> anyhow::Result<Vec<u64>> {
        let removal =
            |call: &Value| call["method"] == "DELETE" && call["node"] == node && call["status"] == 202;
        let calls = self.journal()?;
        Ok(calls
            .iter()
            .filter(|call| removal(call))
            .filter_map(|call| call["unix_ms"].as_u64())
            .collect())
    }

    /// The different requests for a node that the provider accepted.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub fn additions(&self) -> anyhow::Result<BTreeSet<String>> {
        let addition = |call: &Value| call["method"] == "POST" && call["status"] == 202;
        let calls = self.journal()?;
        let requests = calls
            .iter()
            .filter(|call| addition(call))
            .filter_map(|call| call["requestId"].as_str());
        Ok(requests.map(str::to_owned).collect())
    }

    /// Applies a policy, and waits until Ebb has taken it up.
    ///
    /// # Errors
    /// When it is refused or not taken up.
    pub async fn apply_policy(&self, yaml: &str) -> anyhow::Result<()> {
        self.apply(yaml).await?;
        let ready = ["wait", "--for=condition=Ready", "--timeout=30s", "-f", "-"];
        let output = self.kubectl_with(&ready, yaml).await?.success();
        output.context("Ebb did not take the policy up").map(drop)
    }

    /// Waits until connections to an address are taken.
    ///
    /// # Errors
    /// When none is within `limit`.
    pub async fn reachable(&self, address: SocketAddr, limit: Duration) -> anyhow::Result<()> {
        let connected = async {
            while tokio::time::timeout(Duration::from_secs(1), TcpStream::connect(address))
                .await
                .is_ok_and(|connected| connected.is_ok())
                .not()
            {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let connected = tokio::time::timeout(limit, connected).await;
        connected.with_context(|| format!("nothing listens at {address} after {} s", limit.as_secs()))
    }

    /// What the process of a model's pod has in its environment.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub async fn environment(&self, pod: &Pod) -> anyhow::Result<Value> {
        let ip = pod.status.as_ref().and_then(|status| status.pod_ip.as_deref());
        let ip: IpAddr = ip.context("the pod has no address")?.parse()?;
        let answer = traffic::send(
            SocketAddr::new(ip, 8000),
            http::Method::GET,
            "/env",
            None,
            Duration::from_secs(10),
        );
        Ok(serde_json::from_slice(&answer.await?.body)?)
    }

    /// Checks that a process sees exactly the GPUs, the bytes and the share that its pod was given.
    ///
    /// # Errors
    /// Says what differs.
    pub fn check_environment(&self, pod: &Pod, environment: &Value) -> anyhow::Result<()> {
        for (name, annotation) in [
            ("NVIDIA_VISIBLE_DEVICES", "ebb.dev/gpu-devices"),
            ("EBB_GPU_MEMORY_BYTES", "ebb.dev/gpu-memory-bytes"),
            ("EBB_GPU_MEMORY_SHARE", "ebb.dev/gpu-memory-share"),
        ] {
            let given = pod.annotations().get(annotation).map(String::as_str);
            let seen = environment.get(name).and_then(Value::as_str);
            anyhow::ensure!(
                given.is_some() && given == seen,
                "pod {}: {name} is {seen:?} in its process, and its annotation {annotation} is {given:?}",
                pod.name_any()
            );
        }
        Ok(())
    }

    /// The cluster under it: its programs can be stopped and started.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Log files of a namespace's pods whose names start with `prefix`: pod and path.
    pub fn logs(&self, namespace: &str, prefix: &str) -> Vec<(String, PathBuf)> {
        let start = format!("{namespace}_{prefix}");
        let folders = std::fs::read_dir(self.dir().join("pods"))
            .into_iter()
            .flatten()
            .flatten();
        let mut logs = Vec::new();
        for folder in folders {
            let name = folder.file_name().to_string_lossy().into_owned();
            if !name.starts_with(&start) {
                continue;
            }
            for file in std::fs::read_dir(folder.path()).into_iter().flatten().flatten() {
                let path = file.path();
                if path.extension().is_some_and(|extension| extension == "log") {
                    let pod = name.split('_').nth(1).unwrap_or_default().to_owned();
                    logs.push((pod, path));
                }
            }
        }
        logs.sort();
        logs
    }
}
