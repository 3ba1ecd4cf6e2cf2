//! A gate as the controller sees one: a pod, a token bound to it, and a link.

use std::net::SocketAddr;

use bytes::Bytes;
use ebb::link::{FromGate, PATH, ToGate};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::{TokioExecutor, TokioIo};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::ResourceExt;
use serde_json::json;
use tokio::sync::mpsc;

use crate::setup::Setup;

pub struct FakeGate {
    to: mpsc::Sender<FromGate>,
    pub from: mpsc::Receiver<ToGate>,
    task: tokio::task::JoinHandle<()>,
}

/// A token of the gates' ServiceAccount with the link's audience, bound to a pod.
pub async fn token(setup: &Setup, pod: &Pod, audience: &str) -> String {
    let uid = format!("--bound-object-uid={}", pod.uid().unwrap());
    let name = pod.name_any();
    let audience = format!("--audience={audience}");
    let arguments = [
        "-n",
        "ebb-system",
        "create",
        "token",
        "ebb-gate",
        &audience,
        "--bound-object-kind=Pod",
        "--bound-object-name",
        &name,
        &uid,
    ];
    let output = setup
        .cluster
        .kubectl(&arguments)
        .await
        .unwrap()
        .success()
        .unwrap();
    output.stdout.trim().to_owned()
}

impl FakeGate {
    /// Dials; the status if it is not 200.
    pub async fn dial(setup: &Setup, at: SocketAddr, token: &str) -> Result<FakeGate, u16> {
        let config = ebb::serve::tls::client_config(&setup.ca().await, None).unwrap();
        let name = "ebb-controller.ebb-system.svc";
        let stream = ebb::serve::tls::dial(at, name, config, crate::setup::PATIENCE)
            .await
            .unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
                .await
                .unwrap();
        tokio::spawn(connection);
        let (to, lines) = mpsc::channel::<FromGate>(16);
        let body = StreamBody::new(Box::pin(futures::stream::unfold(lines, |mut lines| async move {
            let mut line = serde_json::to_vec(&lines.recv().await?).unwrap();
            line.push(b'\n');
            Some((
                Ok::<_, std::convert::Infallible>(Frame::data(Bytes::from(line))),
                lines,
            ))
        })));
        let request = http::Request::post(format!("https://{name}{PATH}"))
            .header("authorization", format!("Bearer {token}"))
            .body(body)
            .unwrap();
        let answer = sender.send_request(request).await.unwrap();
        if answer.status() != 200 {
            return Err(answer.status().as_u16());
        }
        let (out, from) = mpsc::channel(16);
        let mut body = answer.into_body();
        let task = tokio::spawn(async move {
            let _sender = sender;
            let mut buffer = Vec::new();
            while let Some(Ok(frame)) = body.frame().await {
                buffer.extend_from_slice(frame.data_ref().unwrap());
                while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = buffer.drain(..=end).collect();
                    let _ = out.send(serde_json::from_slice(&line).unwrap()).await;
                }
            }
        });
        Ok(FakeGate { to, from, task })
    }

    pub async fn say(&self, message: FromGate) {
        self.to.send(message).await.unwrap();
    }

    pub fn sender(&self) -> mpsc::Sender<FromGate> {
        self.to.clone()
    }

    /// As a SIGKILL does.
    pub fn die(self) {
        self.task.abort();
    }
}

/// The gate's pod, as its Deployment would have made it.
pub async fn pod(setup: &Setup, name: &str, ip: &str) -> Pod {
    setup
        .ready_pod(
            "ebb-system",
            name,
            json!({"app.kubernetes.io/name": "ebb-gate"}),
            ip,
        )
        .await
}

#[allow(dead_code)]
pub fn pods(setup: &Setup) -> Api<Pod> {
    setup.api("ebb-system")
}
