//! Annotation keys, by the object that carries them.

// On a workload (Deployment, StatefulSet): metadata only, never its pod template.

/// `"true"`: Ebb scales this workload. A person's `"false"` keeps Ebb away from it.
pub const MANAGED: &str = "ebb.dev/managed";
/// Name of the ScalePolicy whose values were written.
pub const POLICY: &str = "ebb.dev/policy";
/// Comma-separated keys (without prefix) that the webhook wrote; all others are a person's own.
pub const INJECTED: &str = "ebb.dev/injected";
/// Time without a request after which the workload sleeps, as `10m`.
pub const IDLE_AFTER: &str = "ebb.dev/idle-after";
/// Replicas it never goes below; 0 lets it sleep.
pub const MIN_REPLICAS: &str = "ebb.dev/min-replicas";
/// Replicas it never goes above.
pub const MAX_REPLICAS: &str = "ebb.dev/max-replicas";
/// Replicas at creation.
pub const INITIAL_REPLICAS: &str = "ebb.dev/initial-replicas";
/// Requests in flight that one replica should hold.
pub const TARGET_IN_FLIGHT: &str = "ebb.dev/target-in-flight";
/// Longest time that a gate holds a request for this workload.
pub const MAX_WAIT: &str = "ebb.dev/max-wait";
/// Requests that all gates together may hold for this workload.
pub const QUEUE_REQUESTS: &str = "ebb.dev/queue-requests";
/// Bytes of held requests' heads and first body parts, as a quantity.
pub const QUEUE_BYTES: &str = "ebb.dev/queue-bytes";
/// How its pods are placed: `fragmentation`, `best-fit` or `spread`. A pod's own annotation of that key comes first.
pub const PLACEMENT: &str = "ebb.dev/placement";

// On a pod (written by a person in the pod template).

/// Number of GPUs over which the declared memory is split evenly; default 1.
pub const GPUS: &str = "ebb.dev/gpus";
/// `shared` (default) or `exclusive` (whole cards).
pub const SHARING: &str = "ebb.dev/sharing";

// On a pod (written with its Binding, frozen after).

/// The GPUs the pod got, comma-separated, as `runtime.nvidia.com/gpu=<UUID>` names.
pub const GPU_DEVICES: &str = "ebb.dev/gpu-devices";
/// Bytes the pod may use on each of its GPUs.
pub const GPU_MEMORY_BYTES: &str = "ebb.dev/gpu-memory-bytes";
/// The same as a fraction of what CUDA calls the card's total memory: NVML's total − what the driver reserves (an H100
/// of 81,559 MiB shows programs 81,008). That is what vLLM's `--gpu-memory-utilization` multiplies. 4 decimals, rounded
/// down.
pub const GPU_MEMORY_SHARE: &str = "ebb.dev/gpu-memory-share";
/// The term of the latest leader that found the pod unbound. Writing it is what keeps Bindings of earlier leaders out; read
/// only to leave out pods that a candidate has marked already.
pub const TERM: &str = "ebb.dev/term";

// On a Service.

/// `gate` (default) or `off`.
pub const MODE: &str = "ebb.dev/mode";
/// JSON object: Service port name (or number if unnamed) → gate port.
pub const GATE_PORTS: &str = "ebb.dev/gate-ports";

// On a Node.

/// Where the node is on its way to be released, as JSON; see `plan::release`.
pub const RELEASE: &str = "ebb.dev/release";
