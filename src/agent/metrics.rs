//! The agent's own figures. The label is the card's index: a node has a handful.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use super::inventory::Observation;

/// A card.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Card {
    gpu: u32,
}

/// A kind of write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Object {
    /// The `GpuNode`.
    GpuNode,
    /// The Node's capacity.
    Node,
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
        ] {
            family.clear();
        }
        let Ok(reading) = observed else {
            self.failed_reads.inc();
            return;
        };
        self.reads.inc();
        for (gpu, reading) in (0_u32..).zip(&reading.gpus) {
            let Ok(reading) = reading else {
                continue;
            };
            let set = |family: &Family<Card, Gauge<u64, AtomicU64>>, value: Option<u64>| {
                if let Some(value) = value {
                    family.get_or_create(&Card { gpu }).set(value);
                }
            };
            set(&self.used, reading.memory_used.map(|used| used.0));
            set(&self.total, Some(reading.memory_total.0));
            set(&self.busy, reading.utilization.map(u64::from));
            let processes = reading.processes.as_ref();
            set(&self.processes, processes.map(|list| list.len() as u64));
            let unknown = |list: &Vec<Option<_>>| list.iter().filter(|used| used.is_none()).count() as u64;
            set(&self.unknown, processes.map(unknown));
        }
    }
}
