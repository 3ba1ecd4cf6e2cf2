//! A cluster with stand-in nodes for tests, and ways to wait for what a pod should become.
#![allow(dead_code, missing_docs, reason = "each test binary uses its own part")]

use ebb_lab::cluster::{Cluster, Options as ClusterOptions};
use ebb_lab::node::{Images, Nodes, Options};
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Long enough for a loaded machine; a test that waits this long has failed.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A cluster with nodes in this process.
pub struct Lab {
    pub cluster: Cluster,
    pub nodes: Nodes,
    pub pods: Api<Pod>,
}

impl Lab {
    pub async fn up() -> Self {
        let cluster = Cluster::up(ClusterOptions::default()).await.unwrap();
        let images = Images::default();
        images.insert("lab/model:1", env!("CARGO_BIN_EXE_lab"));
        images.insert("sh:1", "/bin/sh");
        images.insert("kubectl:1", cluster.programs().join("kubectl"));
        let mut options = Options::new(cluster.dir().join("lab"), images).unwrap();
        options.lab = env!("CARGO_BIN_EXE_lab").into();
        options.restart_backoff = Duration::from_secs(1);
        options.volume_refresh = Duration::from_millis(300);
        let nodes = Nodes::start(cluster.client(), options).await.unwrap();
        let pods = Api::namespaced(cluster.client(), "default");
        Self { cluster, nodes, pods }
    }

    pub async fn down(self) {
        self.nodes.power_off().await;
        self.cluster.down().await;
    }

    pub async fn pod(&self, name: &str) -> Pod {
        self.pods.get(name).await.unwrap()
    }

    /// Waits until `seen` is true of the pod.
    pub async fn wait(&self, name: &str, what: &str, seen: impl Fn(&Pod) -> bool) -> Pod {
        let mut last = None;
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            if let Some(pod) = self.pods.get_opt(name).await.unwrap() {
                if seen(&pod) {
                    return pod;
                }
                last = pod.status;
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        panic!(
            "pod {name} never was {what}; it is {}",
            serde_json::to_string_pretty(&last).unwrap()
        );
    }

    pub async fn wait_gone(&self, name: &str) {
        eventually(&format!("pod {name} gone"), async || {
            self.pods.get_opt(name).await.unwrap().is_none()
        })
        .await;
    }

    pub fn dir(&self, pod: &Pod) -> PathBuf {
        let meta = &pod.metadata;
        let (name, uid) = (meta.name.as_deref().unwrap(), meta.uid.as_deref().unwrap());
        self.cluster
            .dir()
            .join("lab/pods")
            .join(format!("default_{name}_{uid}"))
    }

    pub fn log(&self, pod: &Pod, container: &str) -> String {
        std::fs::read_to_string(self.dir(pod).join(format!("{container}.log"))).unwrap_or_default()
    }

    pub fn pid(&self, pod: &Pod, container: &str) -> String {
        std::fs::read_to_string(self.dir(pod).join(format!("{container}.pid")))
            .unwrap()
            .trim()
            .to_owned()
    }
}

pub async fn eventually(what: &str, seen: impl AsyncFn() -> bool) {
    let began = Instant::now();
    while !seen().await {
        assert!(began.elapsed() < PATIENCE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod
        .status
        .as_ref()
        .and_then(|s| s.conditions.as_deref())
        .unwrap_or_default();
    conditions
        .iter()
        .any(|c| c.type_ == "Ready" && c.status == "True")
}

pub fn waits(pod: &Pod, reason: &str) -> bool {
    let containers = pod
        .status
        .as_ref()
        .and_then(|s| s.container_statuses.as_deref())
        .unwrap_or_default();
    containers.iter().any(|c| {
        let waiting = c.state.as_ref().and_then(|state| state.waiting.as_ref());
        waiting.and_then(|w| w.reason.as_deref()) == Some(reason)
    })
}

pub fn alive(pid: &str) -> bool {
    // A zombie still has its folder, but runs no more.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')')
        .next()
        .is_some_and(|rest| !rest.trim_start().starts_with('Z') && !rest.is_empty())
}
