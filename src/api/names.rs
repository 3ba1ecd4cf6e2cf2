//! Names that the manifests and the code must agree on.

/// API group of Ebb's resources, and the prefix of its annotations.
pub const GROUP: &str = "ebb.dev";
/// Extended resource that a container asks for, in bytes, in its `limits`.
pub const GPU_MEMORY: &str = "ebb.dev/gpu-memory";
/// `schedulerName` that pods asking for GPU memory get.
pub const SCHEDULER: &str = "ebb-scheduler";
/// Namespace that Ebb is installed into by default.
pub const NAMESPACE: &str = "ebb-system";
/// The controller's Deployment, Service, ServiceAccount and Lease.
pub const CONTROLLER: &str = "ebb-controller";
/// The gate's Deployment and ServiceAccount.
pub const GATE: &str = "ebb-gate";
/// The agent's DaemonSet and ServiceAccount.
pub const AGENT: &str = "ebb-agent";
/// Label that says which of Ebb's processes an object belongs to.
pub const NAME_LABEL: &str = "app.kubernetes.io/name";
/// Label of everything that belongs to Ebb.
pub const PART_OF_LABEL: &str = "app.kubernetes.io/part-of";
/// Its value.
pub const PART_OF: &str = "ebb";
/// Secret with the CA and the serving certificate that the controller makes.
pub const SERVING_SECRET: &str = "ebb-serving";
/// Secret with the scheduler's client certificate for the extender.
pub const SCHEDULER_CLIENT_SECRET: &str = "ebb-scheduler-client";
/// ConfigMap with the CA certificate, for those that dial the controller.
pub const CA_CONFIG_MAP: &str = "ebb-ca";
/// Name of both webhook configurations.
pub const WEBHOOKS: &str = "ebb";
/// Audience of the ServiceAccount tokens that gates present on the link.
pub const LINK_AUDIENCE: &str = "ebb";
/// Taint key of a node that is being emptied (effect `NoSchedule`).
pub const RELEASE_TAINT: &str = "ebb.dev/release";
/// Value of the `managed-by` label on the EndpointSlices that Ebb writes.
pub const MANAGED_BY: &str = "ebb.dev";
/// Selector key that the webhook adds to a gated Service; no pod carries it.
pub const GATED_KEY: &str = "ebb.dev/gated";
/// Gate ports are handed out from this range, the first included, the last too.
pub const GATE_PORTS: std::ops::RangeInclusive<u16> = 20_000..=29_999;
/// Environment variable by which a container's GPUs reach NVIDIA's container runtime.
pub const VISIBLE_DEVICES_ENV: &str = "NVIDIA_VISIBLE_DEVICES";
/// Environment variable with the bytes that a container may use on each of its GPUs.
pub const MEMORY_BYTES_ENV: &str = "EBB_GPU_MEMORY_BYTES";
/// Environment variable with the same as a share of the card.
pub const MEMORY_SHARE_ENV: &str = "EBB_GPU_MEMORY_SHARE";
/// RuntimeClass of NVIDIA's container runtime, set on GPU pods where the cluster has it.
pub const RUNTIME_CLASS: &str = "nvidia";
/// The scheduler's name that pods have when nobody chose one.
pub const DEFAULT_SCHEDULER: &str = "default-scheduler";

const AGENT_LEASE_PREFIX: &str = "ebb-agent-";

/// The Lease, in Ebb's namespace, that the agent of this node renews.
#[must_use]
pub fn agent_lease(node: &str) -> String {
    format!("{AGENT_LEASE_PREFIX}{node}")
}

/// The node whose agent renews this Lease.
#[must_use]
pub fn node_of_agent_lease(lease: &str) -> Option<&str> {
    lease.strip_prefix(AGENT_LEASE_PREFIX)
}
