//! Nodes and pods as objects, made and deleted many at a time.

use std::collections::BTreeMap;

use anyhow::Context as _;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{
    ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams, PostParams,
};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};

use crate::ebb_install::MODELS;

/// One GiB.
pub const GIB: u64 = 1 << 30;
/// What the driver keeps of each card.
const RESERVED: u64 = GIB / 2;
/// Writes under way at a time.
const AT_ONCE: usize = 32;

/// Nodes that are all alike.
#[derive(Clone, Copy, Debug)]
pub struct Nodes {
    /// How many.
    pub count: usize,
    /// GPUs of each.
    pub gpus: u32,
    /// Bytes of each GPU that pods can have.
    pub usable: u64,
}

/// What one pod asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Bytes of GPU memory, on one GPU.
    pub bytes: u64,
    /// Nobody else on that GPU.
    pub exclusive: bool,
}

/// Where a pod is, for those that are made bound.
#[derive(Clone, Debug)]
pub struct Place {
    /// The node.
    pub node: String,
    /// The GPU.
    pub gpu: String,
}

impl Nodes {
    /// The name of one of them.
    #[must_use]
    pub fn name(index: usize) -> String {
        format!("gpu-{index:04}")
    }

    /// The UUID of one GPU of one of them, as long as a real one.
    #[must_use]
    pub fn uuid(node: usize, gpu: u32) -> String {
        format!("GPU-{node:08x}-0000-4000-8000-{gpu:012x}")
    }

    /// All GPUs, each with its node and the bytes that pods can have of it.
    #[must_use]
    pub fn all_gpus(&self) -> BTreeMap<String, (String, u64)> {
        (0..self.count)
            .flat_map(|node| (0..self.gpus).map(move |gpu| (node, gpu)))
            .map(|(node, gpu)| (Self::uuid(node, gpu), (Self::name(node), self.usable)))
            .collect()
    }

    /// Makes them, with their inventories, as kubelet and agent would.
    ///
    /// # Errors
    /// When the API server takes one not.
    pub async fn create(self, client: &Client) -> anyhow::Result<()> {
        let nodes = Api::<Node>::all(client.clone());
        let kind = GroupVersionKind::gvk("ebb.dev", "v1alpha1", "GpuNode");
        let gpu_nodes = Api::<DynamicObject>::all_with(client.clone(), &ApiResource::from_gvk(&kind));
        let now = jiff::Timestamp::now().to_string();
        all_of(0..self.count, |index| {
            let (nodes, gpu_nodes, now) = (&nodes, &gpu_nodes, &now);
            async move {
                let name = Self::name(index);
                let how = PostParams::default();
                nodes
                    .create(&how, &serde_json::from_value(self.node(&name, now))?)
                    .await?;
                let object = json!({"apiVersion": "ebb.dev/v1alpha1", "kind": "GpuNode",
                    "metadata": {"name": name}, "spec": {}});
                gpu_nodes.create(&how, &serde_json::from_value(object)?).await?;
                let status = Patch::Merge(self.inventory(index, now));
                gpu_nodes
                    .patch_status(&name, &PatchParams::default(), &status)
                    .await?;
                anyhow::Ok(())
            }
        })
        .await
        .context("making the nodes")
    }

    fn node(self, name: &str, now: &str) -> Value {
        let quantities = json!({
            "cpu": "128", "memory": "1024Gi", "ephemeral-storage": "1024Gi", "pods": "250",
            "ebb.dev/gpu-memory": (u64::from(self.gpus) * self.usable).to_string(),
        });
        let condition = |kind: &str, status: &str| {
            json!({"type": kind, "status": status, "reason": "Kubelet", "message": "as the kubelet says",
                "lastHeartbeatTime": now, "lastTransitionTime": now})
        };
        json!({
            "metadata": {"name": name, "labels": {
                "kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64",
                "node.kubernetes.io/instance-type": "gpu.8x", "topology.kubernetes.io/zone": "a",
                "nvidia.com/gpu.present": "true", "nvidia.com/gpu.product": "NVIDIA-L4",
            }},
            "status": {
                "capacity": quantities, "allocatable": quantities,
                "conditions": [
                    condition("Ready", "True"), condition("MemoryPressure", "False"),
                    condition("DiskPressure", "False"), condition("PIDPressure", "False"),
                ],
                "nodeInfo": {
                    "architecture": "amd64", "bootID": "", "containerRuntimeVersion": "containerd://2.1.4",
                    "kernelVersion": "6.12.0", "kubeProxyVersion": "", "kubeletVersion": "v1.36.3",
                    "machineID": "", "operatingSystem": "linux", "osImage": "Debian", "systemUUID": "",
                },
            },
        })
    }

    fn inventory(self, node: usize, now: &str) -> Value {
        let gpu = |index: u32| {
            json!({"uuid": Self::uuid(node, index), "index": index, "name": "NVIDIA L4",
                "memoryTotal": self.usable + RESERVED, "memoryReserved": RESERVED, "memoryUsed": 0,
                "healthy": true})
        };
        json!({"status": {
            "driverVersion": "570.124.06", "count": self.gpus,
            "gpus": (0..self.gpus).map(gpu).collect::<Vec<_>>(),
            "conditions": [{"type": "Ready", "status": "True", "reason": "Reading", "message": "",
                "lastTransitionTime": now}],
        }})
    }
}

impl Ask {
    fn pod(self, name: &str, place: Option<&Place>) -> Value {
        let mut annotations = json!({});
        if self.exclusive {
            annotations["ebb.dev/sharing"] = json!("exclusive");
        }
        if let Some(place) = place {
            annotations["ebb.dev/gpu-devices"] = json!(format!("runtime.nvidia.com/gpu={}", place.gpu));
            annotations["ebb.dev/gpu-memory-bytes"] = json!(self.bytes.to_string());
            annotations["ebb.dev/gpu-memory-share"] = json!("0.2500");
        }
        json!({
            "metadata": {"name": name, "labels": {"app": "model"}, "annotations": annotations},
            "spec": {
                "schedulerName": "ebb-scheduler",
                "nodeName": place.map(|place| &place.node),
                "automountServiceAccountToken": false,
                "terminationGracePeriodSeconds": 0,
                "containers": [{"name": "model", "image": "none.invalid/model:1", "resources": {
                    "requests": {"cpu": "100m", "memory": "256Mi"},
                    "limits": {"ebb.dev/gpu-memory": self.bytes.to_string()},
                }}],
            },
        })
    }
}

/// Makes pods named `PREFIX-0` and so on, in that order as near as many hands can.
///
/// # Errors
/// When the API server takes one not.
pub async fn create_pods(client: &Client, prefix: &str, asks: &[Ask]) -> anyhow::Result<()> {
    let placed: Vec<(Ask, Option<Place>)> = asks.iter().map(|ask| (*ask, None)).collect();
    create_placed_pods(client, prefix, &placed).await
}

/// The same, where some are bound from the start.
///
/// # Errors
/// When the API server takes one not.
pub async fn create_placed_pods(
    client: &Client,
    prefix: &str,
    asks: &[(Ask, Option<Place>)],
) -> anyhow::Result<()> {
    let pods = Api::<Pod>::namespaced(client.clone(), MODELS);
    all_of(asks.iter().enumerate(), |(index, (ask, place))| {
        let pods = &pods;
        async move {
            let pod = ask.pod(&format!("{prefix}-{index}"), place.as_ref());
            pods.create(&PostParams::default(), &serde_json::from_value(pod)?)
                .await?;
            anyhow::Ok(())
        }
    })
    .await
    .context("making the pods")
}

/// All models' pods, as the API server has them.
///
/// # Errors
/// When they cannot be listed.
pub async fn pods(client: &Client) -> anyhow::Result<Vec<Pod>> {
    let pods = Api::<Pod>::namespaced(client.clone(), MODELS);
    Ok(pods.list(&ListParams::default()).await?.items)
}

/// Deletes all models' pods; when this returns they are gone.
///
/// # Errors
/// When the API server refuses.
pub async fn clear(client: &Client) -> anyhow::Result<()> {
    let api = Api::<Pod>::namespaced(client.clone(), MODELS);
    let now = DeleteParams {
        // Nobody runs them, so nobody would end them first.
        grace_period_seconds: Some(0),
        ..DeleteParams::default()
    };
    all_of(pods(client).await?, |pod| {
        let (api, now) = (&api, &now);
        async move {
            api.delete(&pod.name_any(), now).await?;
            anyhow::Ok(())
        }
    })
    .await
    .context("deleting the pods")?;
    let left = pods(client).await?.len();
    anyhow::ensure!(left == 0, "{left} pods are still there after they were deleted");
    Ok(())
}

async fn all_of<T, F>(items: impl IntoIterator<Item = T>, one: impl FnMut(T) -> F) -> anyhow::Result<()>
where
    F: Future<Output = anyhow::Result<()>>,
{
    // The first that starts is the first in the queue: that keeps the order.
    stream::iter(items)
        .map(one)
        .buffer_unordered(AT_ONCE)
        .try_for_each(|()| std::future::ready(Ok(())))
        .await
}
