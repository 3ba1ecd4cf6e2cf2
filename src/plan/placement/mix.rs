//! What the cluster is asked for: a record of the last requests.
//!
//! Nobody knows the distribution of requests, and it changes. So the record *is* the mix: each pod's request counts
//! once, and goes when enough newer ones have come.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use super::hands::{Field, Hands};
use crate::api::gpu_request::GpuRequest;
use crate::api::host::Host;
use crate::api::units::PodUid;
use crate::plan::gating::Labels;
use crate::plan::ledger::Ledger;

/// Requests remembered. Twice what is dealt, so that a hand is a sample and not the order in which they came.
pub const REMEMBERED: usize = 1024;

/// So many requests change the mix with every single one.
const OFTEN: usize = 16;

/// What a pod asks of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Want {
    /// GPU memory, if any.
    pub gpus: Option<GpuRequest>,
    /// CPU and memory of the machine.
    pub host: Host,
    /// What it wants of the node's labels.
    pub needs: Needs,
}

/// Labels that a node must have: each key with one of the values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs(BTreeMap<Arc<str>, Vec<Arc<str>>>);

impl Needs {
    /// Whether any node will do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Asks for one of these values, beside what was asked for before.
    pub fn require<'a>(&mut self, key: &str, values: impl Iterator<Item = &'a str>) {
        let values: Vec<Arc<str>> = values.map(Arc::from).collect();
        match self.0.get_mut(key) {
            Some(earlier) => earlier.retain(|value| values.contains(value)),
            None => {
                self.0.insert(key.into(), values);
            }
        }
    }

    /// Whether a node with these labels will do.
    #[must_use]
    pub fn met_by(&self, labels: &Labels) -> bool {
        self.0.iter().all(|(key, values)| {
            let is = labels.get(&**key);
            is.is_some_and(|is| values.iter().any(|value| **value == **is))
        })
    }
}

/// The last requests for GPU memory.
#[derive(Clone, Debug, Default)]
pub struct Mix {
    recent: VecDeque<(PodUid, Want)>,
    /// Those remembered, and whether the scheduler has asked about them.
    known: HashMap<PodUid, bool>,
    seen: usize,
    due: bool,
    dealt: Arc<Hands>,
}

impl Mix {
    /// Remembers what a pod asks, once however often it is tried. Says whether it is asked about for the first time.
    pub fn observe(&mut self, pod: &PodUid, want: &Want) -> bool {
        self.recall(pod, want);
        let asked = self.known.get_mut(pod);
        asked.is_some_and(|asked| !std::mem::replace(asked, true))
    }

    /// Remembers what a pod asks that some leader before may have been asked about.
    pub fn recall(&mut self, pod: &PodUid, want: &Want) {
        if want.gpus.is_none() || self.known.contains_key(pod) {
            return;
        }
        self.known.insert(pod.clone(), false);
        if self.recent.len() == REMEMBERED
            && let Some((oldest, _)) = self.recent.pop_front()
        {
            self.known.remove(&oldest);
        }
        self.recent.push_back((pod.clone(), want.clone()));
        self.seen += 1;
        // Often while each request changes much, later whenever a quarter of the record is new.
        if self.seen.is_power_of_two() || self.seen < OFTEN || self.seen.is_multiple_of(REMEMBERED / 4) {
            self.due = true;
        }
    }

    /// The futures, dealt anew where enough has changed.
    #[must_use]
    pub fn hands(&mut self, ledger: &Ledger) -> Arc<Hands> {
        if let Some(requests) = self.take_due() {
            self.put(Hands::deal(requests.iter(), &Field::of(ledger)));
        }
        self.dealt()
    }

    /// The futures as they were dealt last.
    #[must_use]
    pub fn dealt(&self) -> Arc<Hands> {
        self.dealt.clone()
    }

    /// Whether enough has changed since.
    #[must_use]
    pub fn is_due(&self) -> bool {
        self.due
    }

    /// The requests to deal anew, where enough has changed; [`Self::put`] takes what they were dealt to.
    #[must_use]
    pub fn take_due(&mut self) -> Option<Vec<Want>> {
        let due = std::mem::take(&mut self.due);
        due.then(|| self.recent.iter().map(|(_, want)| want.clone()).collect())
    }

    /// From now on these are the futures.
    pub fn put(&mut self, hands: Hands) {
        self.dealt = Arc::new(hands);
    }
}
