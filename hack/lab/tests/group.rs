//! The stand-in node group over its HTTP API, with nodes on a real control plane.
#![allow(clippy::unwrap_used)]

use ebb_lab::cluster::{Cluster, Options as ClusterOptions};
use ebb_lab::group::{Failure, Group, GroupSpec, NodeState};
use ebb_lab::node::{Images, NodeSpec, Nodes, Options};
use k8s_openapi::api::core::v1::Node;
use kube::api::Api;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const ADDRESS: &str = "10.77.0.9:9090";

async fn call(method: &str, path: &str, body: Value) -> (u16, Value) {
    let mut stream = tokio::net::TcpStream::connect(ADDRESS).await.unwrap();
    let body = body.to_string();
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: group\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split_whitespace().nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(body).unwrap_or(Value::Null))
}

async fn ask(id: &str) -> (u16, Value) {
    let body = json!({"group": "l4", "requestId": id, "labels": {"asked": "for"}, "reason": "no room"});
    call("POST", "/v1/nodes", body).await
}

async fn eventually(what: &str, seen: impl AsyncFn() -> bool) {
    let began = Instant::now();
    while !seen().await {
        assert!(began.elapsed() < Duration::from_secs(60), "never: {what}");
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn e2e_a_group_adds_and_removes_nodes() {
    let cluster = Cluster::up(ClusterOptions::default()).await.unwrap();
    let mut options = Options::new(cluster.dir().join("lab"), Images::default()).unwrap();
    options.first_index = 100;
    let nodes = Arc::new(Nodes::start(cluster.client(), options).await.unwrap());
    let journal = cluster.dir().join("journal");
    let spec = GroupSpec {
        name: "l4".to_owned(),
        max: 3,
        boot_time: Duration::from_millis(500),
        template: NodeSpec::gpu("", 1, 24 << 30, "NVIDIA L4"),
        journal: Some(journal.clone()),
        failure: Failure::None,
    };
    let group = Group::start(Arc::clone(&nodes), spec).unwrap();
    let listener = tokio::net::TcpListener::bind(ADDRESS).await.unwrap();
    let router = group.router();
    let server = tokio::spawn(async move { axum::serve(listener, router).await });
    assert_eq!(group.add_now().await.unwrap(), "l4-1");

    let api: Api<Node> = Api::all(cluster.client());
    assert_eq!(ask("a").await, (202, json!({"requestId": "a"})));
    assert_eq!(ask("a").await.0, 202);
    let (status, list) = call("GET", "/v1/nodes?group=l4", Value::Null).await;
    assert_eq!(status, 200);
    let expected = json!([
        {"name": "l4-1", "state": "ready", "requestId": "initial-1"},
        {"name": "l4-2", "state": "booting", "requestId": "a"},
    ]);
    assert_eq!(list["nodes"], expected);
    assert!(
        api.get_opt("l4-2").await.unwrap().is_none(),
        "a node that boots is no node yet"
    );
    eventually("l4-2 is ready", async || {
        group.members()["l4-2"] == NodeState::Ready
    })
    .await;
    let node = api.get("l4-2").await.unwrap();
    let labels = node.metadata.labels.unwrap();
    assert_eq!(labels["ebb.dev/node-group"], "l4");
    assert_eq!(labels["asked"], "for");
    assert_eq!(labels["nvidia.com/gpu.present"], "true");

    // Taken away while it boots: it never comes.
    assert_eq!(ask("b").await.0, 202);
    assert_eq!(ask("c").await.0, 409, "three is the maximum");
    assert_eq!(
        call(
            "DELETE",
            "/v1/nodes/l4-3?group=l4",
            json!({"reason": "not needed"})
        )
        .await
        .0,
        202
    );
    // Taken away when ready: processes first, then the object.
    assert_eq!(
        call("DELETE", "/v1/nodes/l4-2?group=l4", json!({"reason": "empty"}))
            .await
            .0,
        202
    );
    eventually("l4-2 is gone", async || {
        api.get_opt("l4-2").await.unwrap().is_none()
    })
    .await;
    eventually("the books say so", async || group.members().len() == 1).await;
    assert_eq!(
        call("DELETE", "/v1/nodes/l4-2?group=l4", Value::Null).await.0,
        404
    );
    tokio::time::sleep(Duration::from_millis(800)).await;
    assert!(api.get_opt("l4-3").await.unwrap().is_none());

    assert_eq!(call("PUT", "/lab/fail", json!({"mode": "stockout"})).await.0, 200);
    assert_eq!(ask("d").await.0, 503);
    group.fail(Failure::Undelivered);
    assert_eq!(ask("d").await.0, 202, "a request that failed may be made again");
    tokio::time::sleep(Duration::from_millis(800)).await;
    assert_eq!(group.members()["l4-4"], NodeState::Booting);
    assert_eq!(call("GET", "/v1/nodes?group=other", Value::Null).await.0, 404);

    let text = std::fs::read_to_string(&journal).unwrap();
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let removals: Vec<&Value> = lines
        .iter()
        .filter(|line| line["method"] == "DELETE" && line["node"] == "l4-2")
        .collect();
    assert_eq!(removals.len(), 2);
    assert_eq!(
        (&removals[0]["reason"], &removals[0]["status"]),
        (&json!("empty"), &json!(202))
    );
    assert!(
        lines
            .iter()
            .any(|line| line["event"] == "gone" && line["node"] == "l4-2")
    );

    server.abort();
    nodes.power_off().await;
    cluster.down().await;
}
