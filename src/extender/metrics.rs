//! What the extender tells at `/metrics`: how often it is asked, and how often a pod gets what was planned for it.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::verbs::Verb;

/// How a bind of a pod that asks for GPU memory ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum BindOutcome {
    /// Bound to the node and the GPUs that were held for it when it was ranked.
    Planned,
    /// Bound, but the scheduler chose another node, or other GPUs had to be taken.
    Elsewhere,
    /// Not bound; the scheduler tries the pod again.
    Refused,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BindLabel {
    result: BindOutcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VerbLabel {
    verb: Verb,
}

/// Figures of the extender. Cheap to clone; all clones are one.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    binds: Family<BindLabel, Counter>,
    decided: Family<VerbLabel, Counter>,
}

impl Metrics {
    /// Registers the figures.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let this = Self::default();
        for result in [BindOutcome::Planned, BindOutcome::Elsewhere, BindOutcome::Refused] {
            // Told from the start: a counter that is missing is not 0.
            let _ = this.binds.get_or_create(&BindLabel { result });
        }
        registry.register(
            "ebb_extender_binds",
            "Binds that kube-scheduler asked for, by how they ended: where planned, elsewhere, or refused",
            this.binds.clone(),
        );
        registry.register(
            "ebb_extender_decisions",
            "Questions of kube-scheduler that this replica decided, by verb",
            this.decided.clone(),
        );
        this
    }

    pub(super) fn bind_ended(&self, result: BindOutcome) {
        self.binds.get_or_create(&BindLabel { result }).inc();
    }

    pub(super) fn decided(&self, verb: Verb) {
        self.decided.get_or_create(&VerbLabel { verb }).inc();
    }
}
