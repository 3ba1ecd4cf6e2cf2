//! The gate's own metrics, all named `ebb_gate_…`. Labels are bounded: never a workload's name.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Outcome {
    /// The workload's answer was passed on.
    Answered,
    /// A health check or scraper, answered by the gate or passed on.
    HealthCheck,
    /// Too many wait already.
    QueueFull,
    /// It was held for the longest time allowed.
    TimedOut,
    /// The workload cannot be woken.
    WakeFailed,
    /// What the client sent is no HTTP request, or broke off.
    BadRequest,
    /// The client left before its answer began.
    ClientLeft,
    /// The replica broke off without an answer.
    UpstreamFailed,
    /// The port leads to no workload.
    NoRoute,
    /// Something that a gate does not forward.
    Refused,
}

/// Label of the requests counter.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabels {
    /// How it ended.
    pub outcome: Outcome,
}

/// How a wake that this gate asked for ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum WakeResult {
    /// This gate's write raised the scale.
    Raised,
    /// Somebody else had raised it.
    AlreadyAwake,
    /// The write came too late for the version it named; it is tried again.
    Conflict,
    /// The API server did not answer, or was busy; it is tried again.
    Retried,
    /// The API server refuses it.
    Refused,
}

/// Label of the wakes counter.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct WakeLabels {
    /// How it ended.
    pub result: WakeResult,
}

/// What requests waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Wait {
    /// A load.
    Cold,
    /// A free place at a loaded replica.
    Busy,
}

/// Label of the hold histogram.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct HoldLabels {
    /// What they waited for.
    pub wait: Wait,
}

/// All of them. Cheap to clone; all clones are one.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Requests that ended.
    pub requests: Family<RequestLabels, Counter>,
    /// Loads that ended for which requests had waited.
    pub cold_starts: Counter,
    /// Time that forwarded requests were held.
    pub hold_seconds: Family<HoldLabels, Histogram, fn() -> Histogram>,
    /// Requests at replicas now.
    pub in_flight: Gauge,
    /// Requests held now.
    pub queued: Gauge,
    /// Client connections open now.
    pub connections: Gauge,
    /// Wakes.
    pub wakes: Family<WakeLabels, Counter>,
    /// Whether the link to the controller stands.
    pub link_up: Gauge,
}

fn hold_histogram() -> Histogram {
    Histogram::new([
        0.005, 0.02, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 900.0,
    ])
}

impl Metrics {
    /// Registers all of them.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            requests: Family::default(),
            cold_starts: Counter::default(),
            hold_seconds: Family::new_with_constructor(hold_histogram as fn() -> Histogram),
            in_flight: Gauge::default(),
            queued: Gauge::default(),
            connections: Gauge::default(),
            wakes: Family::default(),
            link_up: Gauge::default(),
        };
        registry.register(
            "ebb_gate_requests",
            "Requests that ended",
            metrics.requests.clone(),
        );
        registry.register(
            "ebb_gate_cold_starts",
            "Loads that ended for which requests had waited",
            metrics.cold_starts.clone(),
        );
        registry.register(
            "ebb_gate_hold_seconds",
            "Time that forwarded requests were held",
            metrics.hold_seconds.clone(),
        );
        registry.register(
            "ebb_gate_in_flight",
            "Requests at replicas now",
            metrics.in_flight.clone(),
        );
        registry.register("ebb_gate_queued", "Requests held now", metrics.queued.clone());
        registry.register(
            "ebb_gate_connections",
            "Client connections open now",
            metrics.connections.clone(),
        );
        registry.register(
            "ebb_gate_wakes",
            "Attempts to wake a workload",
            metrics.wakes.clone(),
        );
        registry.register(
            "ebb_gate_link_up",
            "1 while the link to the controller stands",
            metrics.link_up.clone(),
        );
        metrics
    }

    /// Counts a request.
    pub fn request(&self, outcome: Outcome) {
        self.requests.get_or_create(&RequestLabels { outcome }).inc();
    }

    /// Counts an attempt to wake.
    pub fn wake(&self, result: WakeResult) {
        self.wakes.get_or_create(&WakeLabels { result }).inc();
    }

    /// Notes how long a forwarded request was held.
    pub fn held(&self, wait: Wait, seconds: f64) {
        self.hold_seconds
            .get_or_create(&HoldLabels { wait })
            .observe(seconds);
    }
}
