//! ScalePolicies: what each selects, and the workloads whose annotations do not say yet what their policy says, because
//! they are older than Ebb or the policy changed.
//!
//! Nothing is written on a workload from here: it is touched, and the webhook writes what it always writes.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::core::v1::PodTemplateSpec;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::json;

use super::conditions;
use super::metrics::Part;
use super::reconcile::{Backoff, Context, Reconciler, sooner};
use crate::api::gpu_request::gpu_request;
use crate::api::scale_policy::{PolicyStatus, ScalePolicy};
use crate::api::workload::{WorkloadKind, WorkloadRef};
use crate::api::{annotations, names};
use crate::cluster::call::{CallError, limited};
use crate::plan::admission::{select, values};
use crate::plan::gating::Labels;

/// Workloads touched at a time.
const CONCURRENCY: usize = 4;

/// Keeps policies and the workloads that they select together.
pub struct Policies {
    context: Context,
    backoff: Backoff<String>,
}

/// A workload, as far as a policy looks at it.
struct Candidate {
    reference: WorkloadRef,
    resource_version: Option<String>,
    labels: Labels,
    annotations: BTreeMap<String, String>,
    asks: bool,
}

impl Candidate {
    fn new(kind: WorkloadKind, object: &impl ResourceExt, template: Option<&PodTemplateSpec>) -> Self {
        let asks = template.is_some_and(|template| {
            let annotations = template
                .metadata
                .as_ref()
                .and_then(|meta| meta.annotations.as_ref());
            let spec = template.spec.as_ref();
            spec.is_some_and(|spec| matches!(gpu_request(spec, annotations), Ok(Some(_))))
        });
        Self {
            reference: WorkloadRef {
                kind,
                namespace: object.namespace().unwrap_or_default(),
                name: object.name_any(),
            },
            resource_version: object.resource_version(),
            labels: object.labels().clone(),
            annotations: object.annotations().clone(),
            asks,
        }
    }
}

impl Policies {
    /// A reconciler that has done nothing yet.
    #[must_use]
    pub fn new(context: Context) -> Self {
        Self {
            context,
            backoff: Backoff::default(),
        }
    }

    fn candidates(&self) -> Vec<Candidate> {
        let view = &self.context.view;
        let deployments = view.deployments.all();
        let stateful_sets = view.stateful_sets.all();
        let alive = |deleted: bool| !deleted;
        deployments
            .iter()
            .filter(|object| alive(object.metadata.deletion_timestamp.is_some()))
            .map(|object| {
                let template = object.spec.as_ref().map(|spec| &spec.template);
                Candidate::new(WorkloadKind::Deployment, object.as_ref(), template)
            })
            .chain(
                stateful_sets
                    .iter()
                    .filter(|object| alive(object.metadata.deletion_timestamp.is_some()))
                    .map(|object| {
                        let template = object.spec.as_ref().map(|spec| &spec.template);
                        Candidate::new(WorkloadKind::StatefulSet, object.as_ref(), template)
                    }),
            )
            .collect()
    }
}

/// The policy that counts for a workload, and whether the webhook would write anything on it now.
fn look<'a>(
    candidate: &Candidate,
    namespace_labels: &Labels,
    policies: &'a [(String, Arc<ScalePolicy>)],
) -> (Option<&'a str>, bool) {
    let all = policies.iter().map(|(name, policy)| select::Policy {
        name,
        spec: &policy.spec,
    });
    let now = &candidate.annotations;
    let opted_out = now
        .get(annotations::MANAGED)
        .is_some_and(|value| value == "false");
    let policy = if candidate.asks && !opted_out {
        select::policy(all, namespace_labels, &candidate.labels)
    } else {
        None
    };
    let wanted = match policy {
        Some(policy) => values::managed(now, Some(now), policy).wanted,
        None => values::unmanaged(now, Some(now)),
    };
    let differs = wanted.iter().any(|(key, value)| now.get(*key) != value.as_ref());
    (policy.map(|policy| policy.name), differs)
}

impl Reconciler for Policies {
    const PART: Part = Part::Policies;
    const GATHER: Duration = Duration::from_millis(250);

    async fn pass(&mut self) -> Option<Duration> {
        let view = self.context.view.clone();
        let policies: Vec<(String, Arc<ScalePolicy>)> = view
            .scale_policies
            .all()
            .into_iter()
            .map(|policy| (policy.name_any(), policy))
            .collect();
        let mut selected: HashMap<&str, u32> = HashMap::new();
        let mut due = Vec::new();
        for candidate in self.candidates() {
            let namespace = view.namespaces.get("", &candidate.reference.namespace);
            let labels = namespace
                .map(|namespace| namespace.labels().clone())
                .unwrap_or_default();
            let (policy, differs) = look(&candidate, &labels, &policies);
            if let Some(policy) = policy {
                *selected.entry(policy).or_default() += 1;
            }
            if differs && self.backoff.open(&candidate.reference.to_string()) {
                due.push(candidate);
            }
        }
        let context = self.context.clone();
        let touched: Vec<(WorkloadRef, Result<(), CallError>)> = futures::stream::iter(due)
            .map(|candidate| {
                let context = context.clone();
                async move {
                    let result = touch(&context, &candidate).await;
                    (candidate.reference, result)
                }
            })
            .buffer_unordered(CONCURRENCY)
            .collect()
            .await;
        for (workload, result) in touched {
            // Also after success: until the view shows it, and should the webhook think otherwise, no hurry.
            self.backoff.failed(&workload.to_string());
            match result {
                Ok(()) => {
                    tracing::info!(%workload, "touched, so that its annotations say what its policy says")
                }
                Err(CallError::Conflict | CallError::Gone) => {}
                Err(error) => {
                    tracing::warn!(%workload, %error, "cannot touch a workload; trying again");
                    self.context.failed(Self::PART);
                }
            }
        }
        for (name, policy) in &policies {
            let count = selected.get(name.as_str()).copied().unwrap_or(0);
            if let Err(error) = tell(&self.context, policy, count).await
                && !matches!(error, CallError::Conflict | CallError::Gone)
            {
                tracing::warn!(policy = name, %error, "cannot write the status of a ScalePolicy");
                self.context.failed(Self::PART);
            }
        }
        self.backoff.forget_old();
        sooner(self.backoff.next(), None)
    }
}

/// An update that changes nothing by itself, at the version that was read.
async fn touch(context: &Context, candidate: &Candidate) -> Result<(), CallError> {
    if !context.leads() {
        return Err(CallError::Conflict);
    }
    let patch = Patch::Merge(json!({"metadata": {"resourceVersion": candidate.resource_version}}));
    let params = PatchParams {
        field_manager: Some(names::CONTROLLER.to_owned()),
        ..PatchParams::default()
    };
    let (namespace, name) = (&candidate.reference.namespace, &candidate.reference.name);
    let client = context.client.clone();
    match candidate.reference.kind {
        WorkloadKind::Deployment => {
            let api: Api<Deployment> = Api::namespaced(client, namespace);
            limited(api.patch(name, &params, &patch)).await?;
        }
        WorkloadKind::StatefulSet => {
            let api: Api<StatefulSet> = Api::namespaced(client, namespace);
            limited(api.patch(name, &params, &patch)).await?;
        }
    }
    Ok(())
}

async fn tell(context: &Context, policy: &ScalePolicy, selected: u32) -> Result<(), CallError> {
    let before = policy.status.clone().unwrap_or_default();
    let generation = policy.metadata.generation.unwrap_or(0);
    let problem = select::problem(&policy.spec.namespace_selector)
        .or_else(|| select::problem(&policy.spec.workload_selector));
    let result = match &problem {
        Some(problem) => Err(problem.as_str()),
        None => Ok("workloads that it selects are scaled"),
    };
    let status = PolicyStatus {
        selected,
        conditions: conditions::with_ready(&before.conditions, result, generation, Timestamp::now()),
        observed_generation: generation,
    };
    if policy.status.as_ref() == Some(&status) || !context.leads() {
        return Ok(());
    }
    let patch = json!({
        "metadata": {"resourceVersion": policy.resource_version()},
        "status": status,
    });
    let params = PatchParams {
        field_manager: Some(names::CONTROLLER.to_owned()),
        ..PatchParams::default()
    };
    let api: Api<ScalePolicy> = Api::all(context.client.clone());
    limited(api.patch_status(&policy.name_any(), &params, &Patch::Merge(patch))).await?;
    Ok(())
}
