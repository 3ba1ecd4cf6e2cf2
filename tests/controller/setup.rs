//! A control plane with Ebb's CRDs and roles, and the controller as a process under its own ServiceAccount.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use ebb_lab::cluster::{Cluster, Options, Program};
use k8s_openapi::api::core::v1::{Node, Pod, Secret};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};

/// Longest wait for anything that should happen.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub struct Setup {
    pub cluster: Cluster,
    pub client: Client,
    kubeconfig: std::path::PathBuf,
}

impl Setup {
    pub async fn up() -> Setup {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let cluster = Cluster::up(Options::default()).await.unwrap();
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        cluster.apply(&ebb::api::crds_yaml()).await.unwrap();
        for file in ["00-namespace.yaml", "10-rbac.yaml"] {
            cluster
                .apply_path(&root.join("manifests").join(file))
                .await
                .unwrap();
        }
        let token = cluster
            .kubectl(&["-n", "ebb-system", "create", "token", "ebb-controller"])
            .await
            .unwrap()
            .success()
            .unwrap()
            .stdout;
        let text = std::fs::read_to_string(cluster.kubeconfig()).unwrap();
        let mut config: Value = serde_yaml_ng::from_str(&text).unwrap();
        config["users"][0]["user"] = json!({"token": token.trim()});
        let kubeconfig = cluster.dir().join("ebb-controller.kubeconfig");
        std::fs::write(&kubeconfig, serde_yaml_ng::to_string(&config).unwrap()).unwrap();
        let client = cluster.client();
        cluster
            .kubectl(&[
                "wait",
                "--for=condition=Established",
                "crd",
                "--all",
                "--timeout=30s",
            ])
            .await
            .unwrap()
            .success()
            .unwrap();
        cluster
            .apply("{apiVersion: v1, kind: Namespace, metadata: {name: models}}")
            .await
            .unwrap();
        Setup {
            cluster,
            client,
            kubeconfig,
        }
    }

    /// Somebody who may do what the controller may.
    pub async fn as_controller(&self) -> Client {
        let config = kube::config::Kubeconfig::read_from(&self.kubeconfig).unwrap();
        let options = kube::config::KubeConfigOptions::default();
        let config = kube::Config::from_custom_kubeconfig(config, &options)
            .await
            .unwrap();
        ebb::cluster::client::from_config(config).unwrap()
    }

    /// Starts a controller on its own address.
    pub fn controller(&self, name: &str, ip: &str) -> Program {
        self.controller_with(name, ip, &self.kubeconfig)
    }

    /// Starts a controller that finds the API server at another address, without TLS.
    pub fn controller_through(&self, name: &str, ip: &str, proxy: SocketAddr) -> Program {
        let text = std::fs::read_to_string(&self.kubeconfig).unwrap();
        let mut config: Value = serde_yaml_ng::from_str(&text).unwrap();
        config["clusters"][0]["cluster"] = json!({"server": format!("http://{proxy}")});
        let kubeconfig = self.cluster.dir().join(format!("{name}.kubeconfig"));
        std::fs::write(&kubeconfig, serde_yaml_ng::to_string(&config).unwrap()).unwrap();
        self.controller_with(name, ip, &kubeconfig)
    }

    fn controller_with(&self, name: &str, ip: &str, kubeconfig: &std::path::Path) -> Program {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ebb"));
        command
            .args([
                "controller",
                "--namespace",
                "ebb-system",
                "--listen-ip",
                ip,
                "--pod-name",
                name,
            ])
            .env("KUBECONFIG", kubeconfig)
            .env("EBB_LOG", "info,ebb=debug");
        self.cluster.spawn(name, command).unwrap()
    }

    /// Has the API server ask that controller about admission.
    pub async fn webhooks(&self, ip: &str) {
        let service = json!({"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "Service",
             "metadata": {"name": "ebb-controller", "namespace": "ebb-system"},
             "spec": {"ports": [{"name": "webhook", "port": 443, "targetPort": 9443}]}},
            {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
             "metadata": {"name": "ebb-controller", "namespace": "ebb-system",
                          "labels": {"kubernetes.io/service-name": "ebb-controller"}},
             "endpoints": [{"addresses": [ip], "conditions": {"ready": true}}],
             "ports": [{"name": "webhook", "port": 9443, "protocol": "TCP"}]},
        ]});
        self.cluster.apply(&service.to_string()).await.unwrap();
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        self.cluster
            .apply_path(&root.join("manifests/webhooks.yaml"))
            .await
            .unwrap();
    }

    pub fn api<K>(&self, namespace: &str) -> Api<K>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// The CA that the controller made, as PEM.
    pub async fn ca(&self) -> String {
        let secrets: Api<Secret> = self.api("ebb-system");
        let secret = eventually("the serving Secret", || async {
            secrets.get("ebb-serving").await.ok()
        })
        .await;
        String::from_utf8(secret.data.unwrap()["ca.crt"].0.clone()).unwrap()
    }

    /// A pod that the kubelet would call Running and Ready.
    pub async fn ready_pod(&self, namespace: &str, name: &str, labels: Value, ip: &str) -> Pod {
        let api: Api<Pod> = self.api(namespace);
        let pod = serde_json::from_value(json!({
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "nodeName": "somewhere",
                "serviceAccountName": if namespace == "ebb-system" { "ebb-gate" } else { "default" },
                "containers": [{"name": "server", "image": "none", "ports": [{"name": "http", "containerPort": 8000}]}],
            },
        }))
        .unwrap();
        eventually("the ServiceAccount", || async {
            api.create(&PostParams::default(), &pod).await.ok()
        })
        .await;
        let status = json!({"status": {
            "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": "True"}],
        }});
        api.patch_status(name, &PatchParams::default(), &Patch::Strategic(status))
            .await
            .unwrap()
    }

    /// A node that reports Ready.
    pub async fn ready_node(&self, name: &str, labels: Value) -> Node {
        let api: Api<Node> = Api::all(self.client.clone());
        let node = serde_json::from_value(json!({
            "metadata": {"name": name, "labels": labels},
            "spec": {"taints": [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}]},
        }))
        .unwrap();
        api.create(&PostParams::default(), &node).await.unwrap();
        let status = json!({"status": {"conditions": [
            {"type": "Ready", "status": "True", "lastHeartbeatTime": "2100-01-01T00:00:00Z"},
        ]}});
        api.patch_status(name, &PatchParams::default(), &Patch::Strategic(status))
            .await
            .unwrap()
    }
}

/// Waits until `look` finds something, and fails with the name of what did not come.
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    let started = tokio::time::Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(started.elapsed() < PATIENCE, "did not come: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
