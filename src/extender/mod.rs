//! The kube-scheduler extender. The scheduler asks where a pod has room (filter), which of those is best
//! (prioritize), and has the pod bound to one (bind); the ledger answers.
//!
//! The life of a pod that asks for GPU memory, by file:
//!
//! 1. [`verbs`]: filter names the best node, and kube-scheduler asks no more. For a pod that prefers some nodes to others it
//!    names all that have room; prioritize then says which pack best. kube-scheduler binds in the background, so that the
//!    next pod's filter can come before this pod's bind: the winner's memory is held in the ledger from here on.
//! 2. [`bind`]: the hold becomes a Binding, one write that sets node and GPUs; the watch then turns it into an entry.
//! 3. [`refused`]: a pod that found no room is tried again when memory frees, by a Node event. Most never come that far:
//!    they wait behind a scheduling gate (`plan::waiting`) until there is room.
//!
//! Only the leader decides. The other replicas pass requests on to it, and refuse in words when there is none. What an
//! earlier leader still has on its way is shut out by [`term_mark`].

mod bind;
mod metrics;
mod refused;
pub mod registration;
mod term_mark;
#[cfg(test)]
mod tests;
mod verbs;
mod wire;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use bytes::Bytes;
use http_body_util::BodyExt;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{ListParams, ObjectMeta, Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use parking_lot::Mutex;
use serde_json::json;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::api::packing::Packing;
use crate::api::workload::{WorkloadKind, WorkloadRef};
use crate::api::{annotations, names};
use crate::cluster::call::{CallError, limited};
use crate::cluster::clock::Clock;
use crate::cluster::ledger_feed::{self, CDI_PREFIX, SharedLedger, pod_event};
use crate::cluster::view::View;
use crate::plan::placement::{Field, Hands, Mix};
use crate::serve::forward::Forwarder;
use crate::serve::lease::Leadership;
pub use metrics::Metrics;
pub use refused::Refused;
pub use term_mark::mark_vacancies;
pub use verbs::{Desk, Verb};

/// Largest body taken: 5,000 whole nodes of 3 KiB and a pod of a megabyte fit.
const MAX_BODY: usize = 16 << 20;
/// Pods of one page of the list that a new leader reads.
const PAGE: u32 = 500;
/// A new leader's first list is tried again after this long, doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// When a new leader causes further Node events, each after the one before.
const WAKE_AGAIN: [Duration; 3] = [
    Duration::from_millis(500),
    Duration::from_secs(2),
    Duration::from_secs(5),
];
/// A request waits at most this long for a leader that is catching up: less than the replica that passed it on waits, and
/// than the scheduler.
const CATCHING_UP: Duration = Duration::from_secs(2);
/// Annotation by which a Node event is caused.
const RETRY: &str = "ebb.dev/scheduling-retry";

/// How a pod's GPUs are named in its `ebb.dev/gpu-devices` annotation, and so in `NVIDIA_VISIBLE_DEVICES`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceNames {
    /// `runtime.nvidia.com/gpu=<UUID>`, which CDI runtimes resolve.
    #[default]
    Cdi,
    /// The bare UUID.
    Uuid,
}

impl DeviceNames {
    fn prefix(self) -> &'static str {
        match self {
            DeviceNames::Cdi => CDI_PREFIX,
            DeviceNames::Uuid => "",
        }
    }
}

/// What an extender is made of.
pub struct Parts {
    /// For Bindings.
    pub client: Client,
    /// For pods' versions and nodes' taints.
    pub view: View,
    /// Who has how much of which GPU.
    pub ledger: SharedLedger,
    /// Whether this replica decides.
    pub leadership: Leadership,
    /// Passes requests on to the replica that does.
    pub forwarder: Forwarder,
    /// Port that the leader's extender listens on.
    pub port: u16,
    /// How GPUs are named to containers.
    pub device_names: DeviceNames,
    /// Figures for `/metrics`.
    pub metrics: Metrics,
    /// The ledger's clock.
    pub clock: Clock,
}

/// What the handlers work with.
pub struct Extender {
    parts: Parts,
    refused: refused::Refused,
    bindings: bind::Running,
    /// What the cluster is asked for.
    mix: Mutex<Mix>,
    /// Raised when the mix is to be dealt anew.
    deal: Notify,
    /// The term for which the ledger is known to hold all that earlier leaders bound; 0 for none.
    caught_up: watch::Sender<u64>,
}

impl std::ops::Deref for Extender {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.parts
    }
}

impl Extender {
    /// Waits until this leader has caught up with the ones before, for a while.
    pub async fn caught_up(&self) {
        if let Some(term) = self.leadership.term_now() {
            let mut caught_up = self.caught_up.subscribe();
            let known = async { caught_up.wait_for(|known| *known >= term).await.is_ok() };
            let _ = tokio::time::timeout(CATCHING_UP, known).await;
        }
    }

    /// An extender that has answered nothing yet.
    #[must_use]
    pub fn new(parts: Parts) -> Arc<Self> {
        Arc::new(Self {
            parts,
            refused: refused::Refused::default(),
            bindings: bind::Running::default(),
            mix: Mutex::default(),
            deal: Notify::new(),
            caught_up: watch::Sender::new(0),
        })
    }

    fn now_ms(&self) -> u64 {
        self.clock.now_ms()
    }

    /// How a pod is to be placed: as it says itself, else as its workload does, where the webhook has written what its
    /// policy says. A text that cannot be read is as good as none.
    fn packing(&self, own: Option<&str>, workload: Option<WorkloadRef>) -> Packing {
        let of = |metadata: &ObjectMeta| {
            metadata
                .annotations
                .as_ref()?
                .get(annotations::PLACEMENT)?
                .parse()
                .ok()
        };
        let of_workload = || {
            let WorkloadRef {
                kind,
                namespace,
                name,
            } = workload?;
            match kind {
                WorkloadKind::Deployment => of(&self.view.deployments.get(&namespace, &name)?.metadata),
                WorkloadKind::StatefulSet => of(&self.view.stateful_sets.get(&namespace, &name)?.metadata),
            }
        };
        own.and_then(|text| text.parse().ok())
            .or_else(of_workload)
            .unwrap_or_default()
    }

    /// Whether this replica decides at this very moment: it leads, and knows what was bound before it did.
    #[must_use]
    pub fn decides(&self) -> bool {
        self.leadership
            .term_now()
            .is_some_and(|term| term == *self.caught_up.borrow())
    }

    /// The same, once a leader that is still catching up has done so; that is waited for, for a while. Refusals would
    /// be written to every pod by the scheduler, at the very time at which the pods are marked.
    async fn decides_soon(&self) -> bool {
        self.caught_up().await;
        self.decides()
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The extender's four verbs, below `/scheduler`.
pub fn router(extender: Arc<Extender>) -> Router {
    let asks = |verb: Verb| {
        post(
            move |State(extender): State<Arc<Extender>>, request: Request| async move {
                decide(&extender, request, verb).await
            },
        )
    };
    Router::new()
        .route("/scheduler/filter", asks(Verb::Filter))
        .route("/scheduler/prioritize", asks(Verb::Prioritize))
        .route("/scheduler/preempt", asks(Verb::Preempt))
        .route("/scheduler/bind", post(bound))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(extender)
}

/// What a leader does beside answering, until `stop`: catches up with earlier leaders, has the scheduler try again what
/// was refused meanwhile, and after that whatever was refused when memory frees.
pub async fn lead(extender: Arc<Extender>, stop: CancellationToken) {
    let leading = async {
        let mut pause = FIRST_PAUSE;
        let mut caught_up = 0;
        while let Some(term) = extender.leadership.term_now() {
            match catch_up(&extender, term).await {
                Ok(()) => {
                    caught_up = term;
                    break;
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot list and mark the pods of earlier leaders; trying again")
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        tokio::join!(
            refused::retry(&extender),
            deal_when_due(&extender),
            wake_scheduler_again(&extender, caught_up)
        );
    };
    tokio::select! {
        () = leading => {}
        () = stop.cancelled() => {}
    }
}

/// Enters what earlier leaders bound, and shuts out what they have on its way. The watch brings the former too, but maybe
/// only after the first request; this list is as fresh as the API server's own store.
async fn catch_up(extender: &Extender, term: u64) -> Result<(), CallError> {
    // Reservations of an earlier term: nobody waits for them.
    extender
        .ledger
        .update(crate::plan::ledger::Ledger::release_reservations);
    let pods: Api<Pod> = Api::all(extender.client.clone());
    let ours = format!("spec.schedulerName={}", names::SCHEDULER);
    let mut page = ListParams::default().fields(&ours).limit(PAGE);
    let taken = extender.leadership.vacancy().borrow().clone();
    let mut marked = 0;
    loop {
        let list = limited(pods.list(&page)).await?;
        for event in list.items.iter().filter_map(pod_event) {
            extender.ledger.update(|ledger| ledger.apply(event));
        }
        // What was asked before this leader is what it can expect to be asked.
        for pod in &list.items {
            if let Some(want) = ledger_feed::want(pod) {
                extender.mix.lock().recall(&ledger_feed::pod_uid(pod), &want);
            }
        }
        marked += term_mark::mark(extender, list.items, term, taken.as_ref()).await?;
        match list.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => break,
        }
    }
    deal(extender).await;
    extender.caught_up.send_replace(term);
    wake_scheduler(extender, &format!("leader of term {term}")).await?;
    tracing::info!(term, marked, "answering kube-scheduler");
    Ok(())
}

/// Deals the mix anew whenever enough has changed. With thousands of nodes that takes longer than a pod should wait, so
/// the pods that come meanwhile are judged by the earlier hands.
async fn deal_when_due(extender: &Extender) {
    loop {
        extender.deal.notified().await;
        deal(extender).await;
    }
}

async fn deal(extender: &Extender) {
    let Some(requests) = extender.mix.lock().take_due() else {
        return;
    };
    let field = extender.ledger.read(Field::of);
    match tokio::task::spawn_blocking(move || Hands::deal(requests.iter(), &field)).await {
        Ok(hands) => extender.mix.lock().put(hands),
        Err(error) => {
            tracing::error!(%error, "the mix of requests cannot be dealt; pods are packed by the earlier one")
        }
    }
}

/// Has the scheduler try again what was refused while nobody led. Those pods are known to no one, and any Node event
/// does.
async fn wake_scheduler(extender: &Extender, value: &str) -> Result<(), CallError> {
    let all = extender.view.gpu_nodes.all();
    let mut nodes: Vec<String> = all.iter().map(|node| node.name_any()).collect();
    nodes.sort();
    match nodes
        .iter()
        .find(|name| extender.view.nodes.get("", name).is_some())
    {
        Some(name) => cause_node_event(extender, name, value).await,
        None => Ok(()),
    }
}

/// The same some more times: until the other replicas have seen whose the Lease is now, they pass the scheduler's
/// requests to the leader before and refuse, after the first Node event.
async fn wake_scheduler_again(extender: &Extender, term: u64) {
    for (time, after) in (2..).zip(WAKE_AGAIN) {
        tokio::time::sleep(after).await;
        if extender.leadership.term_now() != Some(term) {
            return;
        }
        let value = format!("leader of term {term}, time {time}");
        if let Err(error) = wake_scheduler(extender, &value).await {
            tracing::warn!(%error, "cannot cause a Node event; pods that were refused while nobody led may wait");
        }
    }
}

/// Writes an annotation on the node, after which the scheduler tries refused pods again.
async fn cause_node_event(extender: &Extender, node: &str, value: &str) -> Result<(), CallError> {
    let patch = json!({"metadata": {"annotations": {RETRY: value}}});
    let nodes: Api<Node> = Api::all(extender.client.clone());
    let (how, patch) = (PatchParams::default(), Patch::Merge(&patch));
    match limited(nodes.patch_metadata(node, &how, &patch)).await {
        // Its deletion is an event too.
        Ok(_) | Err(CallError::Gone) => Ok(()),
        Err(error) => Err(error),
    }
}

/// One verb that only asks the ledger: here when this replica decides, else at the leader, else refused in words.
async fn decide(extender: &Extender, request: Request, verb: Verb) -> Response {
    let (head, body) = match read(request).await {
        Ok(read) => read,
        Err(refusal) => return refusal,
    };
    let answer = if extender.decides_soon().await {
        extender.metrics.decided(verb);
        let desk = Desk {
            ledger: &extender.ledger,
            refused: &extender.refused,
            mix: &extender.mix,
            packing: &|pod| extender.packing(pod.placement(), pod.workload()),
            now_ms: extender.now_ms(),
        };
        let answer = verb.here(desk, &body);
        if extender.mix.lock().is_due() {
            extender.deal.notify_one();
        }
        answer
    } else {
        if let Some(answer) = passed_on(extender, head, body.clone()).await {
            return answer;
        }
        verb.away(&body)
    };
    match answer {
        Ok(answer) => json_bytes(answer),
        Err(error) => no_request(&error),
    }
}

async fn bound(State(extender): State<Arc<Extender>>, request: Request) -> Response {
    let (head, body) = match read(request).await {
        Ok(read) => read,
        Err(refusal) => return refusal,
    };
    let args: wire::BindArgs = match serde_json::from_slice(&body) {
        Ok(args) => args,
        Err(error) => return no_request(&error),
    };
    if !extender.decides_soon().await
        && let Some(answer) = passed_on(&extender, head, body).await
    {
        return answer;
    }
    let result = bind::bind(&extender, args).await;
    axum::Json(wire::BindResult {
        error: result.err().map_or_else(String::new, |error| error.to_string()),
    })
    .into_response()
}

async fn read(request: Request) -> Result<(http::request::Parts, Bytes), Response> {
    let (head, body) = request.into_parts();
    match http_body_util::Limited::new(body, MAX_BODY).collect().await {
        Ok(body) => Ok((head, body.to_bytes())),
        Err(error) => Err((
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the body cannot be taken: {error}"),
        )
            .into_response()),
    }
}

fn json_bytes(body: Vec<u8>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

fn no_request(error: &serde_json::Error) -> Response {
    (
        StatusCode::BAD_REQUEST,
        format!("this is no kube-scheduler extender request: {error}"),
    )
        .into_response()
}

async fn passed_on(extender: &Extender, head: http::request::Parts, body: Bytes) -> Option<Response> {
    let leader = extender.leadership.leader()?;
    let address = SocketAddr::new(leader.ip, extender.port);
    match extender.forwarder.forward(address, head, body).await {
        Ok(response) => Some(response.map(Body::from)),
        Err(error) => {
            tracing::warn!(%error, "the leader could not be asked");
            None
        }
    }
}
