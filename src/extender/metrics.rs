//! Figures of the extender.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::verbs::Verb;

/// Figures at `/metrics`. Cheap to clone; all clones are one.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    decided: Family<Labels, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    verb: Verb,
}

impl Metrics {
    /// Registers the figures.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let this = Self::default();
        registry.register(
            "ebb_extender_decisions",
            "Questions of kube-scheduler that this replica decided, by verb",
            this.decided.clone(),
        );
        this
    }

    pub(super) fn decided(&self, verb: Verb) {
        self.decided.get_or_create(&Labels { verb }).inc();
    }
}
