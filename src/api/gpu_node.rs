//! `GpuNode`: the GPUs of one node as its agent reads them from NVML.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::units::{Bytes, GpuId, PodUid};

// One status with a figure that cannot be read would break the watch over all of them. No machine comes near these.
const MOST_GPUS: u32 = 1 << 16;
const MOST_BYTES: i64 = 1 << 50;

/// The GPUs of one node. Written by `ebb agent`, named like its Node, and gone with it.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "ebb.dev",
    version = "v1alpha1",
    kind = "GpuNode",
    doc = "The GPUs of one node. Written by `ebb agent`, named like its Node, and gone with it.",
    status = "GpuNodeStatus",
    shortname = "gn",
    category = "ebb",
    printcolumn = r#"{"name":"GPUs","type":"integer","jsonPath":".status.count"}"#,
    printcolumn = r#"{"name":"Card","type":"string","jsonPath":".status.gpus[0].name"}"#,
    printcolumn = r#"{"name":"Driver","type":"string","jsonPath":".status.driverVersion"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type=='Ready')].status"}"#,
    printcolumn = r#"{"name":"Verified","type":"string","jsonPath":".status.conditions[?(@.type=='Verified')].status","priority":1}"#
)]
pub struct GpuNodeSpec {}

/// What NVML said last.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct GpuNodeStatus {
    /// Version of the NVIDIA driver.
    pub driver_version: String,
    /// Number of GPUs; a MIG instance counts as one, and the card that it is a part of does not.
    #[schemars(range(max = MOST_GPUS))]
    pub count: u32,
    /// The Lease in Ebb's namespace that the agent renews while this status is true. When it stops, new pods go to
    /// other nodes. Absent: nobody renews one, and this is believed for ever.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease: Option<String>,
    /// The GPUs, by index.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["uuid"]))]
    pub gpus: Vec<Gpu>,
    /// `Ready`: whether NVML answers, and if not, why. `Verified`: whether the kubelet says that nobody else hands out
    /// these GPUs.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// One GPU: a card, or a MIG instance of one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Gpu {
    /// UUID as NVML gives it: `GPU-…`, or `MIG-…` for an instance.
    #[schemars(with = "String")]
    pub uuid: GpuId,
    /// Index on the node; a MIG instance has its card's.
    #[schemars(range(max = MOST_GPUS))]
    pub index: u32,
    /// The card's name, as `NVIDIA L4`; a MIG instance's ends with its profile.
    pub name: String,
    /// Its memory, in bytes.
    #[schemars(with = "i64", range(min = 0, max = MOST_BYTES))]
    pub memory_total: Bytes,
    /// Memory that the driver keeps for itself, in bytes; no pod can have it.
    #[schemars(with = "i64", range(min = 0, max = MOST_BYTES))]
    pub memory_reserved: Bytes,
    /// Memory in use by processes, in bytes. Absent: NVML could not say; that is not zero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i64>", range(min = 0, max = MOST_BYTES))]
    pub memory_used: Option<Bytes>,
    /// What of that is no pod's, in bytes. Absent: NVML cannot say how much each process has, or whose one is; that
    /// is not zero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i64>", range(min = 0, max = MOST_BYTES))]
    pub memory_foreign: Option<Bytes>,
    /// Pods that have processes on it, found by the processes' cgroups.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["uid"]))]
    pub pods: Vec<PodOnGpu>,
    /// Whether pods can be put on it.
    pub healthy: bool,
    /// Why not, where it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unhealthy_reason: Option<String>,
}

/// A pod that has processes on a GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodOnGpu {
    /// The pod's UID. A static pod has a hash here, not the UID that the API server shows.
    #[schemars(with = "String")]
    pub uid: PodUid,
    /// What its processes use together, in bytes. Absent: NVML cannot say for all of them; that is not zero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i64>", range(min = 0, max = MOST_BYTES))]
    pub memory_used: Option<Bytes>,
}

impl Gpu {
    /// Memory that pods can have: total − reserved by the driver.
    #[must_use]
    pub fn usable(&self) -> Bytes {
        self.memory_total.saturating_sub(self.memory_reserved)
    }
}
