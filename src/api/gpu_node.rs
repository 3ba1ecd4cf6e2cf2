//! `GpuNode`: the GPUs of one node as its agent reads them from NVML.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::units::{Bytes, GpuId};

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
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type=='Ready')].status"}"#
)]
pub struct GpuNodeSpec {}

/// What NVML said last.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct GpuNodeStatus {
    /// Version of the NVIDIA driver.
    pub driver_version: String,
    /// Number of GPUs.
    pub count: u32,
    /// The GPUs, by index.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["uuid"]))]
    pub gpus: Vec<Gpu>,
    /// `Ready`: whether NVML answers, and if not, why.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// One GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Gpu {
    /// UUID as NVML gives it.
    #[schemars(with = "String")]
    pub uuid: GpuId,
    /// Index on the node.
    pub index: u32,
    /// The card's name, as `NVIDIA L4`.
    pub name: String,
    /// The card's memory, in bytes.
    #[schemars(with = "i64")]
    pub memory_total: Bytes,
    /// Memory that the driver keeps for itself, in bytes; no pod can have it.
    #[schemars(with = "i64")]
    pub memory_reserved: Bytes,
    /// Memory in use by processes, in bytes. Absent: NVML could not say; that is not zero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i64>")]
    pub memory_used: Option<Bytes>,
    /// Whether pods can be put on it.
    pub healthy: bool,
    /// Why not, where it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unhealthy_reason: Option<String>,
}

impl Gpu {
    /// Memory that pods can have: total − reserved by the driver.
    #[must_use]
    pub fn usable(&self) -> Bytes {
        self.memory_total.saturating_sub(self.memory_reserved)
    }
}
