//! A node group's provider that counts every call.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::{delete, get};
use serde_json::{Value, json};

#[derive(Clone, Default)]
pub struct FakeProvider(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    /// Name → state and request.
    nodes: BTreeMap<String, (String, String)>,
    pub posts: Vec<Value>,
    pub deletes: Vec<String>,
}

impl FakeProvider {
    pub async fn start(at: SocketAddr, nodes: &[&str]) -> FakeProvider {
        let this = FakeProvider::default();
        for node in nodes {
            let ready = ("ready".to_owned(), String::new());
            this.0.lock().unwrap().nodes.insert((*node).to_owned(), ready);
        }
        let router = Router::new()
            .route("/v1/nodes", get(list).post(add))
            .route("/v1/nodes/{name}", delete(remove))
            .with_state(this.clone());
        let listener = tokio::net::TcpListener::bind(at).await.unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        this
    }

    pub fn posts(&self) -> Vec<Value> {
        self.0.lock().unwrap().posts.clone()
    }

    pub fn deletes(&self) -> Vec<String> {
        self.0.lock().unwrap().deletes.clone()
    }
}

async fn list(State(provider): State<FakeProvider>) -> axum::Json<Value> {
    let inner = provider.0.lock().unwrap();
    let nodes: Vec<Value> = inner
        .nodes
        .iter()
        .map(|(name, (state, request))| json!({"name": name, "state": state, "requestId": request}))
        .collect();
    axum::Json(json!({"nodes": nodes}))
}

async fn add(State(provider): State<FakeProvider>, axum::Json(body): axum::Json<Value>) -> StatusCode {
    let mut inner = provider.0.lock().unwrap();
    let request = body["requestId"].as_str().unwrap().to_owned();
    inner.posts.push(body);
    let name = format!("new-{request}");
    inner.nodes.insert(name, ("booting".to_owned(), request));
    StatusCode::ACCEPTED
}

async fn remove(State(provider): State<FakeProvider>, Path(name): Path<String>) -> StatusCode {
    let mut inner = provider.0.lock().unwrap();
    inner.deletes.push(name.clone());
    match inner.nodes.get_mut(&name) {
        Some((state, _)) => {
            "leaving".clone_into(state);
            StatusCode::ACCEPTED
        }
        None => StatusCode::NOT_FOUND,
    }
}
