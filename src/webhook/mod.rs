//! Admission: what is written on workloads, pods and Services, and what is refused.
//!
//! Life of a request: `router` takes an AdmissionReview (`review`), `facts` adds what the view of the cluster knows, a
//! pure function of `plan::admission` gives a verdict, and the answer goes back. Nothing here writes to the cluster, so
//! dry runs get the true answer; only `ownership`, beside, cleans up after writes that pass no webhook.
//!
//! `manifests/webhooks.yaml` says which requests come here.

mod facts;
pub mod ownership;
mod review;
pub mod runtime_class;

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use crate::cluster::ledger_feed::SharedLedger;
use crate::cluster::view::View;
use crate::plan::admission::{Request, Requester, Verdict, pod, policies, service, workload};
use review::{Answer, Review, ReviewRequest};

/// Longest request. An object has at most 1.5 MiB in etcd, and an update sends two.
const MAX_BODY: usize = 3 << 20;

/// What the webhook decides with.
#[derive(Clone)]
pub struct Context {
    /// The cluster as it is.
    pub view: View,
    /// Who has how much of which GPU.
    pub ledger: SharedLedger,
    /// Namespace that Ebb runs in.
    pub namespace: String,
    /// Whether the cluster has NVIDIA's RuntimeClass; see [`runtime_class::follow`].
    pub runtime_class: watch::Receiver<bool>,
    /// Figures for `/metrics`.
    pub metrics: Metrics,
}

/// Figures of the webhook.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    requests: Family<Labels, Counter>,
}

impl Metrics {
    /// Registers the figures.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let this = Self::default();
        registry.register(
            "ebb_admission_requests",
            "Admission requests answered, by kind of review and by what was done",
            this.requests.clone(),
        );
        this
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    review: Kind,
    verdict: Outcome,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Outcome {
    Unchanged,
    Changed,
    Refused,
}

/// What is reviewed: one path each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Kind {
    MutateWorkloads,
    MutatePods,
    MutateServices,
    ValidatePods,
    ValidateScalePolicies,
    ValidateNodePolicies,
}

const PATHS: [(&str, Kind); 6] = [
    ("/mutate/workloads", Kind::MutateWorkloads),
    ("/mutate/pods", Kind::MutatePods),
    ("/mutate/services", Kind::MutateServices),
    ("/validate/pods", Kind::ValidatePods),
    ("/validate/scalepolicies", Kind::ValidateScalePolicies),
    ("/validate/nodepolicies", Kind::ValidateNodePolicies),
];

/// The webhook's paths.
pub fn router(context: Context) -> Router {
    let context = Arc::new(context);
    let mut router = Router::new();
    for (path, kind) in PATHS {
        router = router.route(
            path,
            post(
                move |State(context): State<Arc<Context>>, body: Bytes| async move {
                    answer(&context, kind, &body)
                },
            ),
        );
    }
    router.layer(DefaultBodyLimit::max(MAX_BODY)).with_state(context)
}

fn answer(context: &Context, kind: Kind, body: &[u8]) -> Response {
    let request = match Review::read(body) {
        Ok(request) => request,
        Err(error) => {
            tracing::warn!(%error, ?kind, "not an AdmissionReview");
            return (StatusCode::BAD_REQUEST, error).into_response();
        }
    };
    let verdict = decide(context, kind, &request);
    let outcome = match &verdict {
        Verdict {
            refusal: Some(reason),
            ..
        } => {
            tracing::info!(
                kind = request.kind.kind,
                namespace = request.namespace,
                name = request.name(),
                user = request.user_info.username,
                reason,
                "refused"
            );
            Outcome::Refused
        }
        verdict if verdict.patch.is_empty() => Outcome::Unchanged,
        _ => Outcome::Changed,
    };
    tracing::debug!(
        ?kind,
        ?outcome,
        namespace = request.namespace,
        name = request.name(),
        user = request.user_info.username,
        operations = verdict.patch.len(),
        "reviewed"
    );
    let labels = Labels {
        review: kind,
        verdict: outcome,
    };
    context.metrics.requests.get_or_create(&labels).inc();
    axum::Json(Answer::new(&request, verdict)).into_response()
}

fn decide(context: &Context, kind: Kind, review: &ReviewRequest) -> Verdict {
    let Some(object) = &review.object else {
        // Deletions carry no object, and none of the rules asks for them.
        return Verdict::allow();
    };
    let request = Request {
        object,
        old: review.old_object.as_ref(),
        requester: requester(&review.user_info.username, &context.namespace),
    };
    match kind {
        Kind::MutateWorkloads => {
            let labels = facts::namespace_labels(&context.view, &review.namespace);
            let policies = facts::Policies::of(&context.view);
            workload::workload(request, &labels, policies.iter())
        }
        Kind::MutatePods => {
            let cluster = pod::Cluster {
                runtime_class: *context.runtime_class.borrow(),
                no_room: &|| facts::no_room(&context.view, &context.ledger, object),
            };
            pod::create(request, &cluster)
        }
        Kind::MutateServices => {
            service::service(request, &facts::gating(&context.view, &review.namespace, object))
        }
        Kind::ValidatePods if review.old_object.is_none() => {
            pod::brings_gpus(object).map_or_else(Verdict::allow, Verdict::refuse)
        }
        Kind::ValidatePods => pod::update(request),
        Kind::ValidateScalePolicies => policies::scale_policy(request),
        Kind::ValidateNodePolicies => policies::node_policy(request),
    }
}

fn requester(username: &str, namespace: &str) -> Requester {
    let account = username.strip_prefix("system:serviceaccount:");
    match account.and_then(|account| account.split_once(':')) {
        Some((of, _)) if of == namespace => Requester::Ebb,
        Some(("kube-system", "deployment-controller" | "statefulset-controller")) => Requester::Kubernetes,
        _ if username == "system:kube-controller-manager" => Requester::Kubernetes,
        _ => Requester::Person,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks() {
        for (username, requester) in [
            ("system:serviceaccount:ebb-system:ebb-gate", Requester::Ebb),
            (
                "system:serviceaccount:kube-system:deployment-controller",
                Requester::Kubernetes,
            ),
            ("system:serviceaccount:kube-system:helm", Requester::Person),
            ("system:serviceaccount:ebb-system2:ebb-gate", Requester::Person),
            ("alice", Requester::Person),
        ] {
            assert_eq!(super::requester(username, "ebb-system"), requester, "{username}");
        }
    }
}
