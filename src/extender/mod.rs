//! The kube-scheduler extender. The scheduler asks where a pod has room (filter), which of those is best
//! (prioritize), and has the pod bound to one (bind); the ledger answers.
//!
//! kube-scheduler binds in the background: the next pod's filter can come before this pod's bind. So prioritize
//! expects its winner in the ledger, and bind corrects that where the scheduler chose otherwise.

pub mod bind;
pub mod wire;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use bytes::Bytes;
use http_body_util::BodyExt;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::time::Instant;

use crate::api::gpu_request::{Sharing, gpu_request};
use crate::api::units::{NodeName, PodUid};
use crate::cluster::ledger_feed::SharedLedger;
use crate::cluster::view::View;
use crate::plan::ledger::Reservation;
use crate::plan::placement::{self, Place};
use crate::serve::forward::Forwarder;
use crate::serve::lease::Leadership;

/// Largest body taken: 5,000 node names of 253 bytes and a pod of a megabyte fit.
const MAX_BODY: usize = 4 << 20;
/// What prioritize expects stands this long without a bind; the scheduler's own bind comes within milliseconds.
const EXPECTATION: Duration = Duration::from_secs(10);
/// Longest wait for the Node write that makes the scheduler try refused pods again.
const POKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Annotation by which a new leader causes Node events.
const LEADER_TERM: &str = "ebb.dev/leader-term";
/// What every node is refused with while nobody leads.
const NO_LEADER: &str =
    "Ebb's controller is choosing a new leader; the pod is tried again as soon as there is one";

/// What the handlers work with.
pub struct Extender {
    /// For Bindings.
    pub client: Client,
    /// For pods' versions and GPUs' sizes.
    pub view: View,
    /// Who has how much of which GPU.
    pub ledger: SharedLedger,
    /// Whether this replica decides.
    pub leadership: Leadership,
    /// Passes requests on to the replica that does.
    pub forwarder: Forwarder,
    /// Port that the leader's extender listens on.
    pub port: u16,
    /// Zero of [`Extender::now_ms`].
    pub started: Instant,
}

impl Extender {
    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// The extender's four verbs, below `/scheduler`.
pub fn router(extender: Arc<Extender>) -> Router {
    Router::new()
        .route("/scheduler/filter", post(filter))
        .route("/scheduler/prioritize", post(prioritize))
        .route("/scheduler/bind", post(bound))
        .route("/scheduler/preempt", post(preempt))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(extender)
}

/// Causes a Node event, the `time`-th of this term, after which the scheduler tries the pods again that were refused while nobody led.
///
/// # Errors
/// When the API server does not take the write in time.
pub async fn on_leading(client: &Client, view: &View, term: u64, time: usize) -> anyhow::Result<()> {
    let mut names: Vec<String> = view.gpu_nodes.all().iter().map(|node| node.name_any()).collect();
    names.sort();
    let Some(name) = names.into_iter().find(|name| view.nodes.get("", name).is_some()) else {
        return Ok(());
    };
    let patch = json!({"metadata": {"annotations": {LEADER_TERM: format!("{term}.{time}")}}});
    let nodes: Api<Node> = Api::all(client.clone());
    tokio::time::timeout(
        POKE_TIMEOUT,
        nodes.patch_metadata(&name, &PatchParams::default(), &Patch::Merge(&patch)),
    )
    .await??;
    Ok(())
}

async fn filter(State(extender): State<Arc<Extender>>, request: Request) -> Response {
    decide(&extender, request, here::filter, away::filter).await
}

async fn prioritize(State(extender): State<Arc<Extender>>, request: Request) -> Response {
    decide(&extender, request, here::prioritize, away::prioritize).await
}

async fn preempt(State(extender): State<Arc<Extender>>, request: Request) -> Response {
    decide(&extender, request, here::preempt, away::preempt).await
}

async fn bound(State(extender): State<Arc<Extender>>, request: Request) -> Response {
    let (head, body) = match read(request).await {
        Ok(read) => read,
        Err(refusal) => return *refusal,
    };
    let args: wire::BindArgs = match parse(&body) {
        Ok(args) => args,
        Err(refusal) => return *refusal,
    };
    if extender.leadership.term_now().is_none()
        && let Some(answer) = passed_on(&extender, head, body).await
    {
        return answer;
    }
    let started = Instant::now();
    let result = bind::bind(&extender, &args).await;
    let (pod, node) = (format!("{}/{}", args.namespace, args.pod), &args.node);
    let ms = started.elapsed().as_millis();
    let error = match result {
        Ok(()) => {
            tracing::info!(pod, %node, ms, "bound");
            String::new()
        }
        Err(error) => {
            tracing::warn!(pod, %node, ms, reason = %error, "not bound");
            error.to_string()
        }
    };
    answer(&wire::BindResult { error })
}

/// One verb that only asks the ledger: here when this replica leads, else at the leader, else as `away` says.
async fn decide<A, R>(
    extender: &Extender,
    request: Request,
    here: impl FnOnce(&Extender, A) -> R,
    away: impl FnOnce(A) -> R,
) -> Response
where
    A: DeserializeOwned,
    R: Serialize,
{
    let (head, body) = match read(request).await {
        Ok(read) => read,
        Err(refusal) => return *refusal,
    };
    let args: A = match parse(&body) {
        Ok(args) => args,
        Err(refusal) => return *refusal,
    };
    if extender.leadership.term_now().is_some() {
        return answer(&here(extender, args));
    }
    match passed_on(extender, head, body).await {
        Some(answer) => answer,
        None => answer(&away(args)),
    }
}

async fn read(request: Request) -> Result<(http::request::Parts, Bytes), Box<Response>> {
    let (head, body) = request.into_parts();
    match http_body_util::Limited::new(body, MAX_BODY).collect().await {
        Ok(body) => Ok((head, body.to_bytes())),
        Err(error) => Err((
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the body cannot be taken: {error}"),
        )
            .into_response()
            .into()),
    }
}

fn parse<A: DeserializeOwned>(body: &[u8]) -> Result<A, Box<Response>> {
    serde_json::from_slice(body).map_err(|error| {
        (
            StatusCode::BAD_REQUEST,
            format!("this is no kube-scheduler extender request: {error}"),
        )
            .into_response()
            .into()
    })
}

fn answer(body: &impl Serialize) -> Response {
    axum::Json(body).into_response()
}

async fn passed_on(extender: &Extender, head: http::request::Parts, body: Bytes) -> Option<Response> {
    let leader = extender.leadership.leader()?;
    match extender
        .forwarder
        .forward(SocketAddr::new(leader.ip, extender.port), head, body)
        .await
    {
        Ok(response) => Some(response.map(Body::from)),
        Err(error) => {
            tracing::warn!(%error, "the leader could not be asked");
            None
        }
    }
}

/// The answers of a replica that leads.
mod here {
    use super::*;

    pub(super) fn filter(extender: &Extender, args: wire::Args) -> wire::FilterResult {
        let names = args.node_names.unwrap_or_default();
        let request = match request(&args.pod) {
            Ok(Some(request)) => request,
            Ok(None) => {
                return wire::FilterResult {
                    node_names: names,
                    ..Default::default()
                };
            }
            Err(error) => {
                return wire::FilterResult {
                    error,
                    ..Default::default()
                };
            }
        };
        let own = [PodUid::from(args.pod.uid().unwrap_or_default().as_str())];
        let mut result = wire::FilterResult::default();
        extender.ledger.write().lapse(extender.now_ms());
        let ledger = extender.ledger.read();
        for name in names {
            match placement::place(&ledger, &NodeName::from(name.as_str()), &request, &own) {
                Ok(_) => result.node_names.push(name),
                Err(refusal) => {
                    result.failed_nodes.insert(name, refusal.to_string());
                }
            }
        }
        result
    }

    pub(super) fn prioritize(extender: &Extender, args: wire::Args) -> Vec<wire::HostPriority> {
        let names = args.node_names.unwrap_or_default();
        let Ok(Some(request)) = request(&args.pod) else {
            return names
                .into_iter()
                .map(|host| wire::HostPriority { host, score: 0 })
                .collect();
        };
        let uid = PodUid::from(args.pod.uid().unwrap_or_default().as_str());
        let mut ledger = extender.ledger.write();
        let places: Vec<Place> = names
            .iter()
            .filter_map(|name| {
                let node = NodeName::from(name.as_str());
                placement::place(&ledger, &node, &request, std::slice::from_ref(&uid)).ok()
            })
            .collect();
        let ranked = placement::rank(places);
        if let Some(best) = ranked.first() {
            let expected = Reservation {
                pod: format!(
                    "{}/{}",
                    args.pod.namespace().unwrap_or_default(),
                    args.pod.name_any()
                ),
                node: best.node.clone(),
                gpus: best.gpus.clone(),
                bytes_per_gpu: request.bytes_per_gpu,
                exclusive: request.sharing == Sharing::Exclusive,
            };
            let lapses = extender.now_ms() + u64::try_from(EXPECTATION.as_millis()).unwrap_or(u64::MAX);
            ledger.expect(&uid, expected, lapses);
        }
        let scores: BTreeMap<&str, i64> = ranked
            .iter()
            .enumerate()
            .map(|(rank, place)| (place.node.as_str(), placement::score(rank)))
            .collect();
        names
            .iter()
            .map(|name| wire::HostPriority {
                host: name.clone(),
                score: scores.get(name.as_str()).copied().unwrap_or(0),
            })
            .collect()
    }

    /// Keeps the nodes where the GPUs have room once the victims are gone; nobody is evicted for nothing.
    pub(super) fn preempt(extender: &Extender, args: wire::PreemptArgs) -> wire::PreemptResult {
        let mut victims = args.node_name_to_meta_victims;
        if let Ok(Some(request)) = request(&args.pod) {
            let ledger = extender.ledger.read();
            victims.retain(|name, victims| {
                let without: Vec<PodUid> = victims
                    .pods
                    .iter()
                    .flatten()
                    .map(|victim| PodUid::from(victim.uid.as_str()))
                    .collect();
                placement::place(&ledger, &NodeName::from(name.as_str()), &request, &without).is_ok()
            });
        }
        wire::PreemptResult {
            node_name_to_meta_victims: victims,
        }
    }

    fn request(pod: &Pod) -> Result<Option<crate::api::gpu_request::GpuRequest>, String> {
        let Some(spec) = &pod.spec else { return Ok(None) };
        gpu_request(spec, pod.metadata.annotations.as_ref()).map_err(|error| error.to_string())
    }
}

/// The answers while nobody leads. A refused connection would put the pod into the scheduler's growing back-off, which
/// no event shortens; these refusals are tried again with the next Node event, which the new leader causes.
mod away {
    use super::*;

    pub(super) fn filter(args: wire::Args) -> wire::FilterResult {
        let failed = args
            .node_names
            .unwrap_or_default()
            .into_iter()
            .map(|name| (name, NO_LEADER.to_owned()));
        wire::FilterResult {
            failed_nodes: failed.collect(),
            ..Default::default()
        }
    }

    pub(super) fn prioritize(args: wire::Args) -> Vec<wire::HostPriority> {
        let names = args.node_names.unwrap_or_default();
        names
            .into_iter()
            .map(|host| wire::HostPriority { host, score: 0 })
            .collect()
    }

    pub(super) fn preempt(_: wire::PreemptArgs) -> wire::PreemptResult {
        wire::PreemptResult {
            node_name_to_meta_victims: BTreeMap::new(),
        }
    }
}

#[cfg(test)]
mod tests;
