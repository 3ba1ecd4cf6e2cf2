//! The only file that talks to the kubelet: its PodResources socket, asked which devices containers have.
//!
//! `v1` of the API, by hand: the messages as far as they are read here, and one call.
//! <https://github.com/kubernetes/kubelet/blob/master/pkg/apis/podresources/v1/api.proto>

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::Uri;
use http::uri::PathAndQuery;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::client::Grpc;
use tonic_prost::ProstCodec;

use super::owners::{Allocation, Holdings, Trouble};

/// Where the kubelet listens, unless it was told to keep its files elsewhere.
pub const SOCKET: &str = "/var/lib/kubelet/pod-resources/kubelet.sock";
/// Longest wait for its answer.
const LIMIT: Duration = Duration::from_secs(5);
/// Largest answer that is read; the kubelet's own client has the same limit.
const LARGEST: usize = 16 << 20;
/// Most allocations that are looked at: no node has more devices.
const MOST: usize = 4096;

/// What the kubelet says, asked `every` so often until `shutdown`. `None` until it was asked once.
#[must_use]
pub fn follow(
    socket: PathBuf,
    every: Duration,
    shutdown: CancellationToken,
) -> watch::Receiver<Option<Holdings>> {
    let (sender, receiver) = watch::channel(None);
    tokio::spawn(async move {
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let asked = tokio::select! {
                () = shutdown.cancelled() => return,
                asked = allocations(&socket) => asked,
            };
            sender.send_if_modified(|known: &mut Option<Holdings>| {
                let held = known.clone().unwrap_or_default();
                let now = Some(learned(held, asked, &socket));
                let news = now != *known;
                *known = now;
                news
            });
        }
    });
    receiver
}

fn learned(held: Holdings, asked: Result<Vec<Allocation>, AskError>, socket: &Path) -> Holdings {
    match asked {
        Ok(allocations) => Holdings {
            allocations,
            trouble: None,
        },
        Err(error) => {
            let trouble = error.trouble(socket);
            if held.trouble.as_ref() != Some(&trouble) {
                tracing::warn!(reason = trouble.reason, "not verified: {}", trouble.message);
            }
            Holdings {
                trouble: Some(trouble),
                ..held
            }
        }
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error("{0}")]
    Connect(#[from] io::Error),
    #[error("{0}")]
    Http(#[from] hyper::Error),
    #[error("{} ({})", .0.message(), .0.code())]
    Refused(#[from] tonic::Status),
    #[error("nothing within {} s", LIMIT.as_secs())]
    Timeout(#[from] tokio::time::error::Elapsed),
}

impl AskError {
    fn trouble(&self, socket: &Path) -> Trouble {
        let path = socket.display();
        let (reason, message) = match self {
            AskError::Connect(error) if error.kind() == io::ErrorKind::NotFound => (
                "NoSocket",
                format!(
                    "there is no {path}: mount the kubelet's folder, so that the agent can see who else hands out these GPUs"
                ),
            ),
            AskError::Connect(error) if error.kind() == io::ErrorKind::PermissionDenied => (
                "NotAllowed",
                format!(
                    "the agent may not open {path}, which belongs to root: run it as user 0, without capabilities"
                ),
            ),
            error => (
                "KubeletSilent",
                format!("no answer from the kubelet at {path}: {error}"),
            ),
        };
        Trouble { reason, message }
    }
}

/// One call of `List`.
async fn allocations(socket: &Path) -> Result<Vec<Allocation>, AskError> {
    let answer = timeout(LIMIT, list(socket)).await??;
    let mut allocations: Vec<Allocation> = answer
        .pod_resources
        .into_iter()
        .flat_map(of_pod)
        .take(MOST)
        .collect();
    // The kubelet has no order, and another order is not news.
    allocations.sort();
    Ok(allocations)
}

async fn list(socket: &Path) -> Result<ListPodResourcesResponse, AskError> {
    let stream = TokioIo::new(UnixStream::connect(socket).await?);
    let (sender, connection) = http2::handshake(TokioExecutor::new(), stream).await?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let service = tower::service_fn(move |request| sender.clone().send_request(request));
    let origin = Uri::from_static("http://localhost");
    let mut client = Grpc::with_origin(service, origin).max_decoding_message_size(LARGEST);
    client.ready().await?;
    let path = PathAndQuery::from_static("/v1.PodResourcesLister/List");
    let request = tonic::Request::new(ListPodResourcesRequest {});
    let answer = client.unary(request, path, ProstCodec::default()).await?;
    Ok(answer.into_inner())
}

fn of_pod(pod: PodResources) -> impl Iterator<Item = Allocation> {
    let PodResources {
        name,
        namespace,
        containers,
    } = pod;
    let devices = containers.into_iter().flat_map(|container| container.devices);
    devices.flat_map(move |devices| {
        let (pod, namespace) = (name.clone(), namespace.clone());
        let ContainerDevices {
            resource_name,
            device_ids,
        } = devices;
        device_ids.into_iter().map(move |device| Allocation {
            namespace: namespace.clone(),
            pod: pod.clone(),
            resource: resource_name.clone(),
            device,
        })
    })
}

#[derive(Clone, PartialEq, prost::Message)]
struct ListPodResourcesRequest {}

#[derive(Clone, PartialEq, prost::Message)]
struct ListPodResourcesResponse {
    #[prost(message, repeated, tag = "1")]
    pod_resources: Vec<PodResources>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PodResources {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    namespace: String,
    #[prost(message, repeated, tag = "3")]
    containers: Vec<ContainerResources>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerResources {
    #[prost(message, repeated, tag = "2")]
    devices: Vec<ContainerDevices>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerDevices {
    #[prost(string, tag = "1")]
    resource_name: String,
    #[prost(string, repeated, tag = "2")]
    device_ids: Vec<String>,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
    use super::*;

    #[tokio::test]
    async fn what_cannot_be_asked_is_told_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("kubelet.sock");
        let none = allocations(&socket).await.unwrap_err().trouble(&socket);
        assert_eq!(none.reason, "NoSocket");
        assert!(none.message.contains("mount"), "{}", none.message);
        // Somebody listens who is no kubelet.
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let closes = async {
            for _ in 0..2 {
                drop(listener.accept().await);
            }
        };
        let (silent, ()) = tokio::join!(allocations(&socket), async {
            tokio::select! {
                () = closes => {}
                () = tokio::time::sleep(Duration::from_millis(200)) => {}
            }
        });
        assert_eq!(silent.unwrap_err().trouble(&socket).reason, "KubeletSilent");
    }

    #[test]
    fn a_kubelet_that_falls_silent_takes_nothing_back() {
        let held = Holdings {
            allocations: vec![Allocation {
                namespace: "default".to_owned(),
                pod: "train-0".to_owned(),
                resource: "nvidia.com/gpu".to_owned(),
                device: "GPU-a".to_owned(),
            }],
            trouble: None,
        };
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        let silent = learned(held.clone(), Err(refused.into()), Path::new(SOCKET));
        assert_eq!(silent.allocations, held.allocations);
        assert!(silent.trouble.is_some());
        assert_eq!(
            learned(silent, Ok(Vec::new()), Path::new(SOCKET)),
            Holdings::default()
        );
    }
}
