//! The controller's own figures. Labels are bounded enums; no object's name is one.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// The reconcilers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Part {
    /// Workloads: sleep, replicas, failed wakes.
    Workloads,
    /// Services and their slices.
    Services,
    /// Policies and the workloads that they select.
    Policies,
    /// Nodes: release, ask.
    Nodes,
    /// Pods behind Ebb's scheduling gate.
    Waiting,
    /// Pods that use more than they declared, or were bound by somebody else.
    Tenants,
}

/// Which reconciler.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PartLabel {
    /// Its name.
    pub part: Part,
}

/// Figures at `/metrics`. Cheap to clone; all clones are one.
#[derive(Clone, Default)]
pub struct Metrics {
    /// Gates with a live link.
    pub links: Gauge,
    /// Workloads put to sleep.
    pub sleeps: Counter,
    /// Sleeps that the last look or the conditional write kept back.
    pub sleeps_kept_back: Counter,
    /// Workloads seen to wake.
    pub wakes: Counter,
    /// Wakes told to fail.
    pub wake_failures: Counter,
    /// Nodes asked for.
    pub nodes_asked: Counter,
    /// Nodes whose removal was asked for.
    pub nodes_released: Counter,
    /// Pods behind Ebb's scheduling gate.
    pub waiting_pods: Gauge,
    /// Scheduling gates taken off.
    pub gates_opened: Counter,
    /// Pods that use more GPU memory than they declared.
    pub pods_over_use: Gauge,
    /// Pods evicted for it.
    pub over_use_evictions: Counter,
    /// Pods with GPU memory that somebody else than Ebb bound.
    pub pods_bound_by_others: Gauge,
    /// Passes of each reconciler.
    pub passes: Family<PartLabel, Counter>,
    /// Writes or calls that failed.
    pub failures: Family<PartLabel, Counter>,
}

impl Metrics {
    /// Registers the figures.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let this = Self::default();
        let mut counter =
            |name: &str, help: &str, counter: &Counter| registry.register(name, help, counter.clone());
        counter("ebb_sleeps", "Workloads put to sleep", &this.sleeps);
        counter(
            "ebb_sleeps_kept_back",
            "Sleeps that the last look or the conditional write kept back",
            &this.sleeps_kept_back,
        );
        counter("ebb_wakes", "Workloads seen to wake", &this.wakes);
        counter(
            "ebb_wake_failures",
            "Wakes that were told to fail",
            &this.wake_failures,
        );
        counter(
            "ebb_nodes_asked",
            "Nodes that providers were asked for",
            &this.nodes_asked,
        );
        counter(
            "ebb_nodes_released",
            "Nodes whose removal providers were asked for",
            &this.nodes_released,
        );
        counter(
            "ebb_scheduling_gates_opened",
            "Scheduling gates that were taken off pods",
            &this.gates_opened,
        );
        counter(
            "ebb_over_use_evictions",
            "Pods evicted because they use more GPU memory than they declared",
            &this.over_use_evictions,
        );
        registry.register(
            "ebb_waiting_pods",
            "Pods behind Ebb's scheduling gate",
            this.waiting_pods.clone(),
        );
        registry.register(
            "ebb_pods_over_use",
            "Pods that use more GPU memory than they declared",
            this.pods_over_use.clone(),
        );
        registry.register(
            "ebb_pods_bound_by_others",
            "Pods with GPU memory that were bound by somebody else than Ebb",
            this.pods_bound_by_others.clone(),
        );
        registry.register("ebb_gate_links", "Gates with a live link", this.links.clone());
        registry.register(
            "ebb_reconcile_passes",
            "Passes of each reconciler",
            this.passes.clone(),
        );
        registry.register(
            "ebb_reconcile_failures",
            "Writes or calls of each reconciler that failed",
            this.failures.clone(),
        );
        this
    }
}
