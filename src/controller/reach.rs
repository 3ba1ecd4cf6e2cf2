//! Through which Services requests reach a workload, and whether the gates see all of them.

use std::collections::HashMap;

use k8s_openapi::api::core::v1::Service;
use kube::ResourceExt;

use super::{facts, headless};
use crate::api::names;
use crate::api::workload::WorkloadRef;
use crate::cluster::slices;
use crate::cluster::view::View;
use crate::cluster::workloads::{Workload, service_facts};
use crate::plan::gating::{Gating, gating, past_the_gates};

/// How requests reach a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// All through the gates.
    Gates,
    /// Some to its pods, past the gates.
    Direct(String),
    /// No Service that goes through the gates leads to it.
    None,
}

impl Reach {
    /// Why requests may be unseen, if they may.
    #[must_use]
    pub fn unseen(&self) -> Option<&str> {
        match self {
            Self::Gates => None,
            Self::Direct(reason) => Some(reason),
            Self::None => Some("no Service leads to it through the gates, so nobody could wake it"),
        }
    }
}

/// How requests reach each workload.
pub struct Reaches(HashMap<WorkloadRef, Reach>);

impl Reaches {
    /// Reads the Services and Ebb's slices.
    #[must_use]
    pub fn new(view: &View, workloads: &[Workload]) -> Self {
        let namespaces = facts::by_namespace(workloads);
        let mut reaches = HashMap::new();
        for service in view.services.all() {
            let namespace = service.namespace().unwrap_or_default();
            let Some(candidates) = namespaces.get(&namespace) else {
                continue;
            };
            if headless::is_twin(&service) || service.metadata.deletion_timestamp.is_some() {
                continue;
            }
            let candidates = || candidates.iter().map(|(reference, labels)| (reference, labels));
            let facts = service_facts(&service);
            let why = match gating(facts, candidates()) {
                Gating::Gate(workload) => {
                    note(&mut reaches, workload, through(view, &service));
                    continue;
                }
                Gating::Off => "ebb.dev/mode: off",
                Gating::Cannot(_) => "it cannot be gated",
                Gating::Leave => continue,
            };
            for workload in past_the_gates(facts, candidates()) {
                let reason = format!(
                    "Service {} leads to it past the gates ({why})",
                    service.name_any()
                );
                note(&mut reaches, workload, Reach::Direct(reason));
            }
        }
        Self(reaches)
    }

    /// How requests reach one workload.
    #[must_use]
    pub fn of(&self, workload: &WorkloadRef) -> Reach {
        self.0.get(workload).cloned().unwrap_or(Reach::None)
    }
}

/// One Service past the gates is enough for requests that nobody sees.
fn note(reaches: &mut HashMap<WorkloadRef, Reach>, workload: WorkloadRef, reach: Reach) {
    match reaches.get(&workload) {
        Some(Reach::Direct(_)) => {}
        _ => {
            reaches.insert(workload, reach);
        }
    }
}

/// How requests to a gated Service go now.
fn through(view: &View, service: &Service) -> Reach {
    let (namespace, name) = (service.namespace().unwrap_or_default(), service.name_any());
    let has_key = service
        .spec
        .as_ref()
        .and_then(|spec| spec.selector.as_ref())
        .is_some_and(|selector| selector.contains_key(names::GATED_KEY));
    let slice = view.slices.get(&namespace, &slices::slice_name(&name));
    let to_pods = slice
        .iter()
        .flat_map(|slice| &slice.endpoints)
        .any(|endpoint| endpoint.target_ref.is_some());
    if !has_key || to_pods {
        return Reach::Direct(format!(
            "requests to Service {name} go to its pods directly at present"
        ));
    }
    if slice.is_none() {
        return Reach::None;
    }
    Reach::Gates
}
