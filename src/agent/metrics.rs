//! The agent's own figures. A card's label is its index: a node has a handful. A pod's is its UID, since the agent may
//! not read pods: a right to read all of them on every GPU node is too much for a name, which `kube_pod_info` has for
//! the same UID. Both are bounded by what one node runs, and go with it.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use super::inventory::{Observation, Owner, Process};
use crate::api::gpu_node::GpuNodeStatus;

/// A card, or a MIG instance of one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Card {
    gpu: u32,
    instance: Option<u32>,
}

/// A pod on a card.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PodOnCard {
    uid: String,
    uuid: String,
}

/// A kind of write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Object {
    /// The `GpuNode`.
    GpuNode,
    /// The Node's capacity.
    Node,
    /// The Lease that says that both are true.
    Lease,
}

/// What was written, and whether it worked.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Write {
    /// To what.
    pub object: Object,
    /// Whether the API server took it.
    pub ok: Answer,
}

/// The API server's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Answer {
    /// Taken.
    Yes,
    /// Refused or unreachable.
    No,
}

/// All of the agent's metrics.
#[derive(Clone, Default)]
pub struct Metrics {
    /// Writes to the API server.
    pub writes: Family<Write, Counter>,
    reads: Counter,
    failed_reads: Counter,
    used: Family<Card, Gauge<u64, AtomicU64>>,
    total: Family<Card, Gauge<u64, AtomicU64>>,
    busy: Family<Card, Gauge<u64, AtomicU64>>,
    processes: Family<Card, Gauge<u64, AtomicU64>>,
    unknown: Family<Card, Gauge<u64, AtomicU64>>,
    ownerless: Family<Card, Gauge<u64, AtomicU64>>,
    pods: Family<PodOnCard, Gauge<u64, AtomicU64>>,
}

impl Metrics {
    /// Metrics, registered.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let ebb = registry.sub_registry_with_prefix("ebb_agent");
        ebb.register("writes", "Writes to the API server", metrics.writes.clone());
        ebb.register("reads", "Readings that NVML answered", metrics.reads.clone());
        ebb.register(
            "failed_reads",
            "Readings that NVML did not answer",
            metrics.failed_reads.clone(),
        );
        let unit = || Unit::Bytes;
        ebb.register_with_unit(
            "gpu_memory_used",
            "GPU memory in use",
            unit(),
            metrics.used.clone(),
        );
        ebb.register_with_unit(
            "gpu_memory_total",
            "GPU memory of the card",
            unit(),
            metrics.total.clone(),
        );
        ebb.register("gpu_busy_percent", "Time that kernels ran", metrics.busy.clone());
        ebb.register(
            "gpu_processes",
            "Processes on the card",
            metrics.processes.clone(),
        );
        let help = "Processes whose memory NVML cannot tell";
        ebb.register("gpu_processes_of_unknown_memory", help, metrics.unknown.clone());
        let help = "Processes of which the agent does not see whose they are";
        ebb.register("gpu_processes_of_unknown_owner", help, metrics.ownerless.clone());
        ebb.register_with_unit(
            "pod_gpu_memory",
            "GPU memory that a pod's processes use, by the pod's UID and the GPU's UUID",
            unit(),
            metrics.pods.clone(),
        );
        metrics
    }

    /// Shows a reading. What it does not say is not shown, rather than shown as zero.
    pub fn observe(&self, observed: &Observation) {
        for family in [
            &self.used,
            &self.total,
            &self.busy,
            &self.processes,
            &self.unknown,
            &self.ownerless,
        ] {
            family.clear();
        }
        let Ok(reading) = observed else {
            self.failed_reads.inc();
            return;
        };
        self.reads.inc();
        for (gpu, reading) in reading.gpus() {
            let card = Card {
                gpu,
                instance: reading.instance,
            };
            let set = |family: &Family<Card, Gauge<u64, AtomicU64>>, value: Option<u64>| {
                if let Some(value) = value {
                    family.get_or_create(&card).set(value);
                }
            };
            set(&self.used, reading.memory_used.map(|used| used.0));
            set(&self.total, Some(reading.memory_total.0));
            set(&self.busy, reading.utilization.map(u64::from));
            let count = |which: &dyn Fn(&Process) -> bool| {
                let processes = reading.processes.as_ref()?;
                Some(processes.iter().filter(|process| which(process)).count() as u64)
            };
            set(&self.processes, count(&|_| true));
            set(&self.unknown, count(&|process| process.memory.is_none()));
            set(&self.ownerless, count(&|process| process.owner == Owner::Unknown));
        }
    }

    /// Shows what each pod has, as it is published.
    pub fn observe_pods(&self, status: &GpuNodeStatus) {
        self.pods.clear();
        for gpu in &status.gpus {
            for pod in &gpu.pods {
                if let Some(used) = pod.memory_used {
                    let label = PodOnCard {
                        uid: pod.uid.to_string(),
                        uuid: gpu.uuid.to_string(),
                    };
                    self.pods.get_or_create(&label).set(used.0);
                }
            }
        }
    }
}
