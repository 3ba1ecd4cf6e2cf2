//! What the view of the cluster adds to a request.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, Service};
use kube::ResourceExt;
use serde_json::Value;

use crate::api::scale_policy::ScalePolicy;
use crate::cluster::ledger_feed::SharedLedger;
use crate::cluster::view::View;
use crate::cluster::waiting;
use crate::cluster::workloads::{IntoWorkload, Workload, service_facts};
use crate::plan::admission::select::Policy;
use crate::plan::gating::{self, Gating, Labels};

/// The labels of a namespace; none while the view does not have it yet.
pub(super) fn namespace_labels(view: &View, namespace: &str) -> Labels {
    view.namespaces
        .get("", namespace)
        .map(|namespace| namespace.labels().clone())
        .unwrap_or_default()
}

/// The ScalePolicies at this moment.
pub(super) struct Policies(Vec<(String, Arc<ScalePolicy>)>);

impl Policies {
    pub(super) fn of(view: &View) -> Self {
        let all = view.scale_policies.all();
        Self(
            all.into_iter()
                .map(|policy| (policy.name_any(), policy))
                .collect(),
        )
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Policy<'_>> {
        self.0.iter().map(|(name, policy)| Policy {
            name,
            spec: &policy.spec,
        })
    }
}

/// Whether a Service of that namespace goes through the gates.
pub(super) fn gating(view: &View, namespace: &str, service: &Value) -> Gating {
    // What the API server has checked can be read; if not, nothing is done to it.
    let Ok(service) = serde_json::from_value::<Service>(service.clone()) else {
        return Gating::Leave;
    };
    let workloads: Vec<(Workload, Labels)> = managed(view, namespace)
        .map(|workload| {
            let labels = workload.template_labels();
            (workload, labels)
        })
        .collect();
    gating::gating(
        service_facts(&service),
        workloads
            .iter()
            .map(|(workload, labels)| (&workload.reference, labels)),
    )
}

/// Why no GPU has room for a pod now, where that is so.
pub(super) fn no_room(view: &View, ledger: &SharedLedger, pod: &Value) -> Option<String> {
    let pod = serde_json::from_value::<Pod>(pod.clone()).ok()?;
    let refusal = waiting::room_for(view, ledger, waiting::ask(&pod)?).err()?;
    Some(refusal.to_string())
}

fn managed<'a>(view: &'a View, namespace: &'a str) -> impl Iterator<Item = Workload> + 'a {
    let deployments = view.deployments.all();
    let stateful_sets = view.stateful_sets.all();
    let here = move |of: Option<String>| of.as_deref() == Some(namespace);
    deployments
        .into_iter()
        .filter(move |d| here(d.namespace()))
        .map(|d| d.workload())
        .chain(
            stateful_sets
                .into_iter()
                .filter(move |s| here(s.namespace()))
                .map(|s| s.workload()),
        )
        .filter(|workload| workload.managed().is_some())
}
