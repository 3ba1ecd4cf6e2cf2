//! The admission policy that pins each agent to its own node, in front of the roles that are installed.

use ebb_lab::cluster::{Cluster, Options};
use k8s_openapi::api::core::v1::Node;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams};
use kube::{Api, Client, Config};
use serde_json::{Value, json};

use super::{eventually, gpu_node_crd};

/// What an agent tries.
struct Attempt<'a> {
    kind: &'a str,
    name: &'a str,
    status: bool,
    body: Value,
}

impl Attempt<'_> {
    /// Whether it may; the API server's words where it may not. Nothing is written.
    async fn allowed(&self, client: &Client) -> Result<(), String> {
        let (group, version, namespace) = match self.kind {
            "GpuNode" => ("ebb.dev", "v1alpha1", None),
            "Lease" => ("coordination.k8s.io", "v1", Some("ebb-system")),
            _ => ("", "v1", None),
        };
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, self.kind));
        let api: Api<DynamicObject> = match namespace {
            Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
            None => Api::all_with(client.clone(), &resource),
        };
        let mut body = self.body.clone();
        body["apiVersion"] = json!(resource.api_version);
        body["kind"] = json!(self.kind);
        body["metadata"]["name"] = json!(self.name);
        let params = PatchParams {
            dry_run: true,
            ..PatchParams::apply("ebb-agent").force()
        };
        let merge = PatchParams {
            force: false,
            ..params.clone()
        };
        let done = match (self.status, self.kind) {
            (true, "Node") => api.patch_status(self.name, &merge, &Patch::Merge(body)).await,
            (true, _) => api.patch_status(self.name, &params, &Patch::Apply(body)).await,
            (false, _) => api.patch(self.name, &params, &Patch::Apply(body)).await,
        };
        done.map(drop).map_err(|error| error.to_string())
    }
}

/// Somebody with the token of an agent's pod on that node; of no pod, where there is none.
async fn agent_on(cluster: &Cluster, node: Option<&str>) -> Client {
    let kubeconfig = kube::config::Kubeconfig::read_from(cluster.kubeconfig()).unwrap();
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &kube::config::KubeConfigOptions::default())
        .await
        .unwrap();
    let mut header = |name: &'static str, value: &str| {
        config
            .headers
            .push((http::HeaderName::from_static(name), value.parse().unwrap()));
    };
    header("impersonate-user", "system:serviceaccount:ebb-system:ebb-agent");
    if let Some(node) = node {
        header("impersonate-extra-authentication.kubernetes.io%2fnode-name", node);
    }
    Client::try_from(config).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adversarial_an_agent_writes_of_its_own_node_only() {
    let cluster = Cluster::up(Options::default()).await.unwrap();
    cluster.apply(&gpu_node_crd()).await.unwrap();
    cluster
        .kubectl(&["wait", "crd/gpunodes.ebb.dev", "--for=condition=Established"])
        .await
        .unwrap()
        .success()
        .unwrap();
    for manifest in [
        include_str!("../../manifests/00-namespace.yaml"),
        include_str!("../../manifests/10-rbac.yaml"),
        include_str!("../../manifests/11-agent-admission.yaml"),
    ] {
        cluster.apply(manifest).await.unwrap().success().unwrap();
    }
    let nodes: Api<Node> = Api::all(cluster.client());
    for name in ["gpu-a", "gpu-b"] {
        let node = serde_json::from_value(json!({"metadata": {"name": name}})).unwrap();
        nodes.create(&PostParams::default(), &node).await.unwrap();
        let status = json!({"status": {"capacity": {"cpu": "8"}, "allocatable": {"cpu": "8"},
            "conditions": [{"type": "Ready", "status": "True"}], "images": [{"names": ["a"]}]}});
        nodes
            .patch_status(name, &PatchParams::default(), &Patch::Merge(status))
            .await
            .unwrap();
    }
    let inventories = "{apiVersion: ebb.dev/v1alpha1, kind: GpuNode, metadata: {name: NAME}, spec: {}}";
    for name in ["gpu-a", "gpu-b"] {
        cluster
            .apply(&inventories.replace("NAME", name))
            .await
            .unwrap()
            .success()
            .unwrap();
    }
    let (own, of_no_pod) = (
        agent_on(&cluster, Some("gpu-a")).await,
        agent_on(&cluster, None).await,
    );
    let attempt = |kind, name, status, body| Attempt {
        kind,
        name,
        status,
        body,
    };
    let memory = json!({"status": {"capacity": {"ebb.dev/gpu-memory": "1"}, "allocatable": {"ebb.dev/gpu-memory": "1"}}});
    let inventory = json!({"status": {"driverVersion": "1", "count": 0, "gpus": [], "conditions": []}});
    let lease = json!({"spec": {"holderIdentity": "x", "leaseDurationSeconds": 40}});
    let good = || {
        [
            attempt("GpuNode", "gpu-a", false, json!({"spec": {}})),
            attempt("GpuNode", "gpu-a", true, inventory.clone()),
            attempt("Node", "gpu-a", true, memory.clone()),
            attempt("Lease", "ebb-agent-gpu-a", false, lease.clone()),
        ]
    };
    let bad = [
        attempt("GpuNode", "gpu-b", false, json!({"spec": {}})),
        attempt("GpuNode", "gpu-b", true, inventory.clone()),
        attempt("Node", "gpu-b", true, memory.clone()),
        attempt("Lease", "ebb-agent-gpu-b", false, lease.clone()),
        attempt("Lease", "ebb-controller", false, lease.clone()),
        attempt("Lease", "gpu-a", false, lease.clone()),
        // Its own Node, and more than the memory of its GPUs.
        attempt(
            "Node",
            "gpu-a",
            true,
            json!({"status": {"capacity": {"cpu": "80"}}}),
        ),
        attempt(
            "Node",
            "gpu-a",
            true,
            json!({"status": {"allocatable": {"cpu": null}}}),
        ),
        attempt(
            "Node",
            "gpu-a",
            true,
            json!({"status": {"allocatable": {"nvidia.com/gpu": "1"}}}),
        ),
        attempt("Node", "gpu-a", true, json!({"status": {"conditions": []}})),
        attempt(
            "Node",
            "gpu-a",
            true,
            json!({"status": {"addresses": [{"type": "InternalIP", "address": "10.0.0.1"}]}}),
        ),
        attempt(
            "Node",
            "gpu-a",
            true,
            json!({"metadata": {"annotations": {"x": "y"}}}),
        ),
        attempt("Node", "gpu-a", true, json!({"metadata": {"labels": {"x": "y"}}})),
    ];
    // A policy takes a moment to be there.
    let last = bad.last().unwrap();
    eventually("the policy", async || {
        last.allowed(&own).await.is_err().then_some(())
    })
    .await;
    for attempt in bad {
        let refused = attempt.allowed(&own).await.expect_err(attempt.name);
        assert!(
            refused.contains("an ebb-agent writes"),
            "{} {}: {refused}",
            attempt.kind,
            attempt.name
        );
    }
    for attempt in good() {
        attempt.allowed(&own).await.unwrap();
        assert!(
            attempt.allowed(&of_no_pod).await.is_err(),
            "{} {}",
            attempt.kind,
            attempt.name
        );
    }
    // Everybody else is none of its business.
    let admin = cluster.client();
    attempt(
        "Node",
        "gpu-b",
        true,
        json!({"status": {"capacity": {"cpu": "80"}}}),
    )
    .allowed(&admin)
    .await
    .unwrap();
}
