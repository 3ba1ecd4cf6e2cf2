//! The kubelet's PodResources socket: which devices of device plugins the containers of this node have.
//!
//! No device plugin runs here. What one would have handed out stands in a file beside the socket, `allocations`, one
//! a line and read at each call, so that tests and people can write it:
//!
//! ```text
//! NAMESPACE POD RESOURCE DEVICE           (default train-0 nvidia.com/gpu GPU-…)
//! ```

use anyhow::Context as _;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::task::JoinSet;
use tonic::Status;
use tonic::body::Body;
use tonic_prost::ProstCodec;

/// Where a kubelet has it, below its own folder.
pub const SOCKET: &str = "pod-resources/kubelet.sock";
/// The file with what device plugins handed out, in the same folder as the socket.
pub const ALLOCATIONS: &str = "allocations";

/// Listens on a socket; a file that an earlier run left there is replaced.
///
/// # Errors
/// When the folder cannot be made or the path is too long for a socket.
pub fn listen(socket: &Path) -> anyhow::Result<UnixListener> {
    let at = || format!("listening on {}", socket.display());
    if let Some(dir) = socket.parent() {
        std::fs::create_dir_all(dir).with_context(at)?;
    }
    let _ = std::fs::remove_file(socket);
    UnixListener::bind(socket).with_context(at)
}

/// Serves until dropped. `allocations` need not exist.
pub async fn serve(listener: UnixListener, allocations: PathBuf) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else {
                    // Out of descriptors, usually: they come back.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                };
                let allocations = allocations.clone();
                let answer = service_fn(move |request| answer(request, allocations.clone()));
                let server = http2::Builder::new(TokioExecutor::new());
                connections.spawn(server.serve_connection(TokioIo::new(stream), answer));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn answer(request: Request<Incoming>, allocations: PathBuf) -> Result<Response<Body>, Infallible> {
    if request.uri().path() != "/v1.PodResourcesLister/List" {
        return Ok(Status::unimplemented("this kubelet only lists").into_http());
    }
    let list = tower::service_fn(move |_: tonic::Request<ListPodResourcesRequest>| {
        let pods = read(&allocations);
        std::future::ready(
            pods.map(|pod_resources| tonic::Response::new(ListPodResourcesResponse { pod_resources })),
        )
    });
    Ok(tonic::server::Grpc::new(ProstCodec::default())
        .unary(list, request)
        .await)
}

fn read(allocations: &Path) -> Result<Vec<PodResources>, Status> {
    // Nothing was ever handed out.
    let text = std::fs::read_to_string(allocations).unwrap_or_default();
    let mut pods: BTreeMap<(&str, &str), Vec<ContainerDevices>> = BTreeMap::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [namespace, pod, resource, device] = words.as_slice() else {
            return Err(Status::internal(format!("{line:?} is no allocation")));
        };
        pods.entry((namespace, pod)).or_default().push(ContainerDevices {
            resource_name: (*resource).to_owned(),
            device_ids: vec![(*device).to_owned()],
        });
    }
    let pods = pods.into_iter().map(|((namespace, name), devices)| PodResources {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        containers: vec![ContainerResources {
            name: "main".to_owned(),
            devices,
        }],
    });
    Ok(pods.collect())
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
    #[prost(string, tag = "1")]
    name: String,
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
