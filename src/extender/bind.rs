//! Bind: one `Binding` that sets the node, the GPUs, the bytes and the share in a single write.
//!
//! The API server checks neither the node nor the annotations of a Binding, so all of that is checked here, and the
//! memory is held in the ledger before the write. The Binding carries the pod's UID and version: what another replica
//! changed since they were read is a 409, and so is a Binding that comes a second time.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt, Shared};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, ResourceExt};
use parking_lot::Mutex;
use serde_json::json;
use tokio::time::Instant;

use super::metrics::BindOutcome;
use super::wire::BindArgs;
use super::{Extender, millis};
use crate::api::annotations;
use crate::api::gpu_request::{GpuRequest, gpu_request};
use crate::api::units::{Bytes, NodeName, PodUid};
use crate::cluster::ledger_feed;
use crate::cluster::rooms;
use crate::cluster::workloads::workload_of;
use crate::plan::ledger::{Claim, Ledger, Stage};
use crate::plan::nodes_wanted::tolerates;
use crate::plan::placement::{self, Judge, Want};

/// Longest wait for one call of the API server; the scheduler itself waits 5 s for the whole.
const CALL_TIMEOUT: Duration = Duration::from_secs(4);
/// Writes to the pod's status move its version between our read and our write; so often is it read again.
const ATTEMPTS: usize = 4;
/// A Binding without an answer can still arrive this long: the API server gives up on a request after a minute.
const ARRIVES_WITHIN: Duration = Duration::from_secs(60);

/// Why a pod was not bound. The scheduler shows the text in its Event and tries again.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum BindError {
    /// Another replica leads.
    #[error("this replica does not lead; the leader binds the pod when it is tried again")]
    NotLeading,
    /// The node does not take it.
    #[error("{node} does not take the pod: {reason}")]
    Node { node: NodeName, reason: Arc<str> },
    /// The pod is another one, or gone, or bound elsewhere.
    #[error("{0}")]
    Pod(Arc<str>),
    /// The API server refused.
    #[error("the API server did not take the Binding: {0}")]
    Refused(Arc<kube::Error>),
    /// No answer, or none that says.
    #[error("the API server did not say whether it took the Binding: {0}; the pod is tried again")]
    Unclear(Arc<str>),
    /// The task that bound it failed.
    #[error("binding failed within Ebb; the pod is tried again")]
    Broken,
}

impl BindError {
    fn pod(text: impl Into<Arc<str>>) -> Self {
        BindError::Pod(text.into())
    }
}

type Outcome = Shared<BoxFuture<'static, Result<(), BindError>>>;

/// Bindings on their way, by pod.
#[derive(Default)]
pub(super) struct Running(Mutex<HashMap<PodUid, (String, Outcome)>>);

/// Binds a pod. The same pod asked for again gets the same answer: the scheduler asks again when it has waited too
/// long. The work goes on when nobody waits for it any more, so that every Binding's end is known.
pub(super) async fn bind(extender: &Arc<Extender>, args: BindArgs) -> Result<(), BindError> {
    let uid = PodUid::from(args.uid.as_str());
    let outcome = {
        let mut running = extender.bindings.0.lock();
        match running.get(&uid) {
            Some((node, outcome)) if *node == args.node => outcome.clone(),
            Some((node, _)) => {
                return Err(BindError::pod(format!(
                    "a Binding of the pod to {node} is on its way"
                )));
            }
            None => {
                let node = args.node.clone();
                let (extender, key) = (extender.clone(), uid.clone());
                let task = tokio::spawn(async move {
                    let result = told(&extender, &args).await;
                    extender.bindings.0.lock().remove(&key);
                    result.map(|_| ())
                });
                let outcome: Outcome = async { task.await.unwrap_or(Err(BindError::Broken)) }
                    .boxed()
                    .shared();
                running.insert(uid, (node, outcome.clone()));
                outcome
            }
        }
    };
    outcome.await
}

/// What a bind that did not fail came to.
#[derive(Clone, Copy)]
enum Bound {
    /// It was bound there already.
    Before,
    /// It asks for no GPU memory.
    WithoutGpu,
    /// To the node and GPUs that were held for it.
    AsPlanned,
    /// To others.
    Elsewhere,
}

async fn told(extender: &Extender, args: &BindArgs) -> Result<Bound, BindError> {
    let started = Instant::now();
    let result = attempts(extender, args).await;
    if result.is_err() {
        // Whatever the failure was: no Binding is on its way any more that nobody knows of.
        let uid = PodUid::from(args.uid.as_str());
        extender.ledger.update(|ledger| ledger.release_posted(&uid));
    }
    let (pod, node, ms) = (
        format!("{}/{}", args.namespace, args.pod),
        &args.node,
        millis(started.elapsed()),
    );
    match &result {
        Ok(_) => tracing::info!(pod, node, ms, "bound"),
        Err(error) => tracing::warn!(pod, node, ms, reason = %error, "not bound"),
    }
    let outcome = match &result {
        Ok(Bound::Before | Bound::WithoutGpu) => None,
        Ok(Bound::AsPlanned) => Some(BindOutcome::Planned),
        Ok(Bound::Elsewhere) => Some(BindOutcome::Elsewhere),
        Err(_) => Some(BindOutcome::Refused),
    };
    if let Some(outcome) = outcome {
        extender.metrics.bind_ended(outcome);
    }
    result
}

/// How one Binding went.
enum Sent {
    Taken,
    /// The pod is not as it was read.
    Conflict(kube::Error),
}

async fn attempts(extender: &Extender, args: &BindArgs) -> Result<Bound, BindError> {
    let uid = PodUid::from(args.uid.as_str());
    let known = extender.view.pods.get(&args.namespace, &args.pod);
    let mut pod = match known {
        Some(pod) if pod.metadata.uid.as_deref() == Some(&*args.uid) => pod,
        _ => Arc::new(get(extender, args).await?),
    };
    // What the first attempt takes is held from then on, so only that one tells.
    let mut landed = None;
    for attempt in 1..=ATTEMPTS {
        if already_bound(extender, args, &uid, &pod)? {
            return Ok(landed.unwrap_or(Bound::Before));
        }
        let spec = pod.spec.clone().unwrap_or_default();
        let request = gpu_request(&spec, pod.metadata.annotations.as_ref())
            .map_err(|error| BindError::pod(error.to_string()))?;
        check_node(extender, args, &pod)?;
        let share = match &request {
            Some(request) => Some(hold(extender, args, &uid, &pod, request)?),
            None => None,
        };
        let landed = *landed.get_or_insert(match &share {
            None => Bound::WithoutGpu,
            Some(granted) if granted.as_planned => Bound::AsPlanned,
            Some(_) => Bound::Elsewhere,
        });
        match send(extender, args, &uid, &pod, share.as_ref()).await? {
            Sent::Taken => {
                extender
                    .ledger
                    .update(|ledger| ledger.set_stage(&uid, Stage::Bound));
                extender.refused.forget(&uid);
                return Ok(landed);
            }
            Sent::Conflict(error) if attempt == ATTEMPTS => {
                release(extender, &uid);
                return Err(BindError::Refused(Arc::new(error)));
            }
            Sent::Conflict(_) => {
                pod = match get(extender, args).await {
                    Ok(pod) => Arc::new(pod),
                    Err(error) => {
                        release(extender, &uid);
                        return Err(error);
                    }
                };
            }
        }
    }
    Err(BindError::Broken)
}

/// Whether the pod is bound as asked already.
fn already_bound(extender: &Extender, args: &BindArgs, uid: &PodUid, pod: &Pod) -> Result<bool, BindError> {
    if pod.metadata.uid.as_deref() != Some(&*args.uid) {
        release(extender, uid);
        return Err(BindError::pod("the pod was replaced by another of the same name"));
    }
    let Some(bound) = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) else {
        return Ok(false);
    };
    // Its own claim is what counts now, not what was held for it.
    if let Some(event) = ledger_feed::pod_event(pod) {
        extender.ledger.update(|ledger| ledger.apply(event));
    }
    extender.refused.forget(uid);
    if bound == args.node {
        Ok(true)
    } else {
        Err(BindError::pod(format!("the pod is already bound to {bound}")))
    }
}

/// What only the Node object tells: that it is there, and lets this pod on it. The ledger knows of fences and room.
fn check_node(extender: &Extender, args: &BindArgs, pod: &Pod) -> Result<(), BindError> {
    let refused = |reason: String| BindError::Node {
        node: NodeName::from(args.node.as_str()),
        reason: reason.into(),
    };
    let node = extender.view.nodes.get("", &args.node);
    let node = node.ok_or_else(|| refused("there is no such node".to_owned()))?;
    let tolerations = pod.spec.as_ref().map(rooms::tolerations).unwrap_or_default();
    let keeps_away = rooms::taints(&node)
        .into_iter()
        .find(|taint| !tolerations.iter().any(|toleration| tolerates(toleration, taint)));
    match keeps_away {
        Some(taint) => Err(refused(format!(
            "it has the taint {}={}:{}, which the pod does not tolerate",
            taint.key, taint.value, taint.effect
        ))),
        None => Ok(()),
    }
}

/// What a Binding says of GPUs.
struct Granted {
    claim: Claim,
    usable: Bytes,
    /// It is what was held for the pod.
    as_planned: bool,
}

/// Takes the room on the node, before anyone else can: what was held for the pod if it still fits, otherwise the best
/// place now.
fn hold(
    extender: &Extender,
    args: &BindArgs,
    uid: &PodUid,
    pod: &Pod,
    request: &GpuRequest,
) -> Result<Granted, BindError> {
    let now_ms = extender.now_ms();
    let name = NodeName::from(args.node.as_str());
    let want = ledger_feed::want_of(pod, Some(request.clone()));
    let own = pod.annotations().get(annotations::PLACEMENT).map(String::as_str);
    let packing = extender.packing(own, workload_of(pod));
    extender.ledger.update(|ledger| {
        ledger.expire(now_ms);
        let hands = extender.mix.lock().dealt();
        let judge = Judge {
            packing,
            hands: &hands,
            // Only one node is looked at.
            images: &[],
        };
        let granted = grant(ledger, &name, uid, request, &want, judge)?;
        let entry = ledger_feed::entry(pod, granted.claim.clone());
        if ledger.hold(&name, entry, Stage::Posted) {
            Ok(granted)
        } else {
            // The watch was faster: it is bound, or gone.
            Err(BindError::pod("the pod has changed meanwhile; it is tried again"))
        }
    })
}

fn grant(
    ledger: &Ledger,
    name: &NodeName,
    uid: &PodUid,
    request: &GpuRequest,
    want: &Want,
    judge: Judge<'_>,
) -> Result<Granted, BindError> {
    let refused = |reason: String| BindError::Node {
        node: name.clone(),
        reason: reason.into(),
    };
    let held = ledger.hold_of(uid);
    if let Some(hold) = held
        && matches!(hold.stage, Stage::Doubtful { .. })
        && hold.node != *name
    {
        let text = format!("an earlier Binding of the pod to {} may still arrive", hold.node);
        return Err(BindError::pod(text));
    }
    let Some(node) = ledger.node(name.as_str()) else {
        return Err(refused("no GPU told of by an ebb-agent".to_owned()));
    };
    let same = held
        .filter(|hold| hold.node == *name)
        .and_then(|hold| hold.claim.gpus.clone())
        .filter(|gpus| placement::still_fits(node, request, gpus, uid));
    let as_planned = same.is_some();
    let gpus = match same {
        Some(gpus) => gpus,
        None => {
            placement::place(node, want, Some(uid), judge)
                .map_err(|refusal| refused(refusal.to_string()))?
                .gpus
        }
    };
    let usable = node.gpus().iter().filter(|gpu| gpus.contains(&gpu.id));
    Ok(Granted {
        usable: usable.map(|gpu| gpu.usable).min().unwrap_or_default(),
        claim: Claim::of(request, gpus),
        as_planned,
    })
}

fn release(extender: &Extender, uid: &PodUid) {
    extender.ledger.update(|ledger| ledger.release(uid));
}

async fn get(extender: &Extender, args: &BindArgs) -> Result<Pod, BindError> {
    let pods: Api<Pod> = Api::namespaced(extender.client.clone(), &args.namespace);
    match tokio::time::timeout(CALL_TIMEOUT, pods.get(&args.pod)).await {
        Ok(Ok(pod)) => Ok(pod),
        Ok(Err(kube::Error::Api(status))) if status.code == 404 => Err(BindError::pod("the pod is gone")),
        Ok(Err(error)) => Err(BindError::Unclear(error.to_string().into())),
        Err(_) => Err(BindError::Unclear("no answer".into())),
    }
}

/// Posts the Binding. What is held is let go where the API server said no, and only there.
async fn send(
    extender: &Extender,
    args: &BindArgs,
    uid: &PodUid,
    pod: &Pod,
    granted: Option<&Granted>,
) -> Result<Sent, BindError> {
    // Asked last: after the version was read, right before the write that only a leader may make.
    if !extender.decides() {
        release(extender, uid);
        return Err(BindError::NotLeading);
    }
    let binding = binding(extender, args, pod, granted);
    let unclear = match tokio::time::timeout(CALL_TIMEOUT, post(extender, args, &binding)).await {
        Ok(Ok(())) => return Ok(Sent::Taken),
        Ok(Err(error)) => match &error {
            kube::Error::Api(status) if status.code == 409 => return Ok(Sent::Conflict(error)),
            kube::Error::Api(status) if (400..500).contains(&status.code) => {
                release(extender, uid);
                return Err(BindError::Refused(Arc::new(error)));
            }
            _ => error.to_string(),
        },
        Err(_) => format!("no answer within {} s", CALL_TIMEOUT.as_secs()),
    };
    // Held on, until the pod shows where it is or the Binding cannot arrive any more.
    let until_ms = extender.now_ms().saturating_add(millis(ARRIVES_WITHIN));
    extender
        .ledger
        .update(|ledger| ledger.set_stage(uid, Stage::Doubtful { until_ms }));
    match get(extender, args).await {
        Ok(pod) if already_bound(extender, args, uid, &pod)? => Ok(Sent::Taken),
        _ => Err(BindError::Unclear(unclear.into())),
    }
}

fn binding(extender: &Extender, args: &BindArgs, pod: &Pod, granted: Option<&Granted>) -> serde_json::Value {
    let annotations = granted.map(|Granted { claim, usable, .. }| {
        let prefix = extender.device_names.prefix();
        let devices: Vec<String> = claim
            .gpus
            .iter()
            .flatten()
            .map(|gpu| format!("{prefix}{gpu}"))
            .collect();
        json!({
            annotations::GPU_DEVICES: devices.join(","),
            annotations::GPU_MEMORY_BYTES: claim.bytes_per_gpu.0.to_string(),
            annotations::GPU_MEMORY_SHARE: share(claim.bytes_per_gpu, *usable),
        })
    });
    json!({
        "apiVersion": "v1",
        "kind": "Binding",
        "metadata": {
            "name": args.pod,
            "namespace": args.namespace,
            // Both are preconditions: a pod replaced or changed since it was read is a 409.
            "uid": args.uid,
            "resourceVersion": pod.resource_version(),
            "annotations": annotations,
        },
        "target": {"apiVersion": "v1", "kind": "Node", "name": args.node},
    })
}

/// `bytes` as a fraction of what programs see as the card's total memory (NVML's total − what the driver reserves),
/// which is what vLLM's `--gpu-memory-utilization` multiplies. Four decimals, rounded down: never more than declared.
fn share(bytes: Bytes, usable: Bytes) -> String {
    let ten_thousandths = (u128::from(bytes.0) * 10_000)
        .checked_div(u128::from(usable.0))
        .unwrap_or(0)
        .min(10_000);
    format!("{}.{:04}", ten_thousandths / 10_000, ten_thousandths % 10_000)
}

async fn post(extender: &Extender, args: &BindArgs, binding: &serde_json::Value) -> kube::Result<()> {
    let request = http::Request::post(format!(
        "/api/v1/namespaces/{}/pods/{}/binding",
        args.namespace, args.pod
    ))
    .header(http::header::CONTENT_TYPE, "application/json")
    .body(serde_json::to_vec(binding).map_err(kube::Error::SerdeError)?)
    .map_err(kube::Error::HttpError)?;
    extender
        .client
        .request::<serde_json::Value>(request)
        .await
        .map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn share_is_rounded_down_and_never_above_the_card() {
        assert_eq!(share(Bytes(18 << 30), Bytes(24 << 30)), "0.7500");
        assert_eq!(share(Bytes(1), Bytes(3)), "0.3333");
        assert_eq!(share(Bytes(2), Bytes(3)), "0.6666");
        assert_eq!(share(Bytes(3), Bytes(3)), "1.0000");
        assert_eq!(share(Bytes(9), Bytes(3)), "1.0000");
        assert_eq!(share(Bytes(9), Bytes(0)), "0.0000");
    }
}
