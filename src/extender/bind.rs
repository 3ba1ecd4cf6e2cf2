//! Bind: one `Binding` that sets the node, the GPUs, the bytes and the share in a single write.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client, ResourceExt};
use serde_json::json;

use super::Extender;
use super::wire::BindArgs;
use crate::api::annotations;
use crate::api::gpu_node::GpuNode;
use crate::api::gpu_request::{GpuRequest, Sharing, gpu_request};
use crate::api::units::{Bytes, GpuId, NodeName, PodUid};
use crate::cluster::ledger_feed::CDI_PREFIX;
use crate::plan::ledger::Reservation;
use crate::plan::placement::{self, Refusal};

/// Longest wait for one call of the API server.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Writes to the pod's status move its version between our read and our write; so often is it read again.
const ATTEMPTS: usize = 4;
/// The Binding's reservation stands this long without the watch having shown the bound pod.
const UNSEEN_BIND: Duration = Duration::from_secs(60);

/// Why a pod was not bound. The scheduler shows the text in its Event and tries again.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another replica leads.
    #[error("this replica does not lead any more; the leader binds the pod when it is tried again")]
    NotLeading,
    /// No room on the node, or none any more.
    #[error("no room on {node} any more: {refusal}")]
    NoRoom {
        /// The node that the scheduler chose.
        node: NodeName,
        /// Why not.
        refusal: Refusal,
    },
    /// The pod is another one, or gone, or bound elsewhere.
    #[error("{0}")]
    Pod(String),
    /// The API server refused or did not answer.
    #[error("the API server did not take the binding: {0}")]
    Api(#[from] kube::Error),
    /// The API server did not answer in time; whether it took the Binding shows when the scheduler tries again.
    #[error("the API server did not answer within {} s", CALL_TIMEOUT.as_secs())]
    Timeout,
}

/// Binds a pod. The same pod asked for again gets the same answer.
///
/// # Errors
/// Why it was not bound.
pub async fn bind(extender: &Extender, args: &BindArgs) -> Result<(), BindError> {
    let uid = PodUid::from(args.uid.as_str());
    let node = NodeName::from(args.node.as_str());
    let pods: Api<Pod> = Api::namespaced(extender.client.clone(), &args.namespace);
    let mut pod = match extender.view.pods.get(&args.namespace, &args.pod) {
        Some(pod) if pod.uid().as_deref() == Some(&args.uid) => pod.as_ref().clone(),
        _ => limited(pods.get(&args.pod)).await?,
    };
    for attempt in 1.. {
        if pod.uid().as_deref() != Some(&args.uid) {
            return Err(BindError::Pod(
                "the pod was replaced by another of the same name".to_owned(),
            ));
        }
        match pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) {
            Some(bound) if bound == args.node => return Ok(()),
            Some(bound) => return Err(BindError::Pod(format!("the pod is already bound to {bound}"))),
            None => {}
        }
        let request = pod
            .spec
            .as_ref()
            .and_then(|spec| gpu_request(spec, pod.metadata.annotations.as_ref()).transpose())
            .transpose()
            .map_err(|error| BindError::Pod(error.to_string()))?;
        let binding = match &request {
            Some(request) => {
                let reservation = reserve(extender, &uid, &node, &pod, request)?;
                binding(extender, &pod, args, Some(&reservation))
            }
            None => binding(extender, &pod, args, None),
        };
        // Asked last, right before the write that only a leader may make.
        if extender.leadership.term_now().is_none() {
            extender.ledger.write().unexpect(&uid);
            return Err(BindError::NotLeading);
        }
        match limited(post(&extender.client, args, &binding)).await {
            Ok(()) => return Ok(()),
            Err(BindError::Api(kube::Error::Api(status))) if status.code == 409 && attempt < ATTEMPTS => {
                pod = limited(pods.get(&args.pod)).await?;
            }
            // Unknown whether it was taken: the reservation stands until the watch shows it or it lapses.
            Err(BindError::Timeout) => return Err(BindError::Timeout),
            Err(error) => {
                extender.ledger.write().unexpect(&uid);
                return Err(error);
            }
        }
    }
    Err(BindError::Pod(
        "the pod kept changing; it is tried again".to_owned(),
    ))
}

/// Takes the room on the node, in the ledger, before anyone else can: what prioritize expected if it still fits,
/// otherwise the best place now.
fn reserve(
    extender: &Extender,
    uid: &PodUid,
    node: &NodeName,
    pod: &Pod,
    request: &GpuRequest,
) -> Result<Reservation, BindError> {
    let mut ledger = extender.ledger.write();
    ledger.lapse(extender.now_ms());
    let expected = ledger
        .reservation(uid)
        .filter(|expected| expected.node == *node)
        .cloned();
    let reservation = match expected {
        // The node may have been fenced since.
        Some(expected) if ledger.open(node).is_ok() => expected,
        _ => {
            let place =
                placement::place(&ledger, node, request, std::slice::from_ref(uid)).map_err(|refusal| {
                    BindError::NoRoom {
                        node: node.clone(),
                        refusal,
                    }
                })?;
            Reservation {
                pod: format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any()),
                node: node.clone(),
                gpus: place.gpus,
                bytes_per_gpu: request.bytes_per_gpu,
                exclusive: request.sharing == Sharing::Exclusive,
            }
        }
    };
    let lapses = extender.now_ms() + u64::try_from(UNSEEN_BIND.as_millis()).unwrap_or(u64::MAX);
    ledger.expect(uid, reservation.clone(), lapses);
    Ok(reservation)
}

fn binding(
    extender: &Extender,
    pod: &Pod,
    args: &BindArgs,
    reservation: Option<&Reservation>,
) -> serde_json::Value {
    let annotations = reservation.map(|reservation| {
        let devices: Vec<String> = reservation
            .gpus
            .iter()
            .map(|gpu| format!("{CDI_PREFIX}{gpu}"))
            .collect();
        json!({
            annotations::GPU_DEVICES: devices.join(","),
            annotations::GPU_MEMORY_BYTES: reservation.bytes_per_gpu.0.to_string(),
            annotations::GPU_MEMORY_SHARE: share(
                reservation.bytes_per_gpu,
                reservation.gpus.iter().filter_map(|gpu| usable(extender, &args.node, gpu)).min(),
            ),
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

fn usable(extender: &Extender, node: &str, gpu: &GpuId) -> Option<Bytes> {
    let node: std::sync::Arc<GpuNode> = extender.view.gpu_nodes.get("", node)?;
    let status = node.status.as_ref()?;
    status
        .gpus
        .iter()
        .find(|facts| facts.uuid == *gpu)
        .map(|facts| facts.usable())
}

/// `bytes` as a fraction of what programs see as the card's total memory (NVML's total − what the driver reserves),
/// which is what vLLM's `--gpu-memory-utilization` multiplies. Four decimals, rounded down: never more than declared.
fn share(bytes: Bytes, usable: Option<Bytes>) -> String {
    let ten_thousandths = match usable {
        Some(usable) if usable.0 > 0 => u128::from(bytes.0) * 10_000 / u128::from(usable.0),
        _ => 0,
    }
    .min(10_000);
    format!("{}.{:04}", ten_thousandths / 10_000, ten_thousandths % 10_000)
}

async fn post(client: &Client, args: &BindArgs, binding: &serde_json::Value) -> kube::Result<()> {
    let request = http::Request::post(format!(
        "/api/v1/namespaces/{}/pods/{}/binding",
        args.namespace, args.pod
    ))
    .header(http::header::CONTENT_TYPE, "application/json")
    .body(serde_json::to_vec(binding).map_err(kube::Error::SerdeError)?)
    .map_err(kube::Error::HttpError)?;
    client.request::<serde_json::Value>(request).await.map(|_| ())
}

async fn limited<T>(call: impl Future<Output = kube::Result<T>>) -> Result<T, BindError> {
    match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(result) => result.map_err(BindError::Api),
        Err(_) => Err(BindError::Timeout),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn share_is_rounded_down_and_never_above_the_card() {
        assert_eq!(share(Bytes(18 << 30), Some(Bytes(24 << 30))), "0.7500");
        assert_eq!(share(Bytes(1), Some(Bytes(3))), "0.3333");
        assert_eq!(share(Bytes(2), Some(Bytes(3))), "0.6666");
        assert_eq!(share(Bytes(3), Some(Bytes(3))), "1.0000");
        assert_eq!(share(Bytes(9), Some(Bytes(3))), "1.0000");
        assert_eq!(share(Bytes(9), None), "0.0000");
    }
}
