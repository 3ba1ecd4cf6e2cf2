//! The HTTP side of the node group.

use super::journal::Journal;
use super::ledger::{Asked, Failure, Ledger, NodeState, Removed};
use super::{GROUP_LABEL, GroupSpec};
use crate::node::{NodeSpec, Nodes, lock};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, put};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use tokio_util::task::AbortOnDropHandle;

/// A node group; clones share it.
#[derive(Clone)]
pub struct Group {
    inner: Arc<Inner>,
}

struct Inner {
    nodes: Arc<Nodes>,
    spec: GroupSpec,
    journal: Journal,
    books: Mutex<Books>,
}

struct Books {
    ledger: Ledger,
    failure: Failure,
    boots: HashMap<String, AbortOnDropHandle<()>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Ask {
    group: String,
    request_id: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    reason: String,
}

#[derive(Debug, Deserialize)]
struct InGroup {
    group: String,
}

#[derive(Debug, Default, Deserialize)]
struct Why {
    #[serde(default)]
    reason: String,
}

#[derive(Debug, Deserialize)]
struct Fail {
    mode: Failure,
}

impl Group {
    /// A group without nodes, whose nodes will run in `nodes`.
    ///
    /// # Errors
    /// When the journal cannot be opened.
    pub fn start(nodes: Arc<Nodes>, spec: GroupSpec) -> anyhow::Result<Self> {
        let journal = Journal::open(spec.journal.as_deref())?;
        let ledger = Ledger::new(&spec.name, spec.max);
        let books = Books {
            ledger,
            failure: spec.failure,
            boots: HashMap::new(),
        };
        Ok(Self {
            inner: Arc::new(Inner {
                nodes,
                spec,
                journal,
                books: Mutex::new(books),
            }),
        })
    }

    /// Adds a node without a boot time; its name.
    ///
    /// # Errors
    /// When the group is full or the node cannot register.
    pub async fn add_now(&self) -> anyhow::Result<String> {
        let request = format!("initial-{}", lock(&self.inner.books).ledger.members().len() + 1);
        let Asked::Boot(name) = lock(&self.inner.books).ledger.ask(&request) else {
            anyhow::bail!("the group has {} nodes already", self.inner.spec.max);
        };
        self.inner
            .nodes
            .add(self.inner.node(&name, BTreeMap::new()))
            .await?;
        lock(&self.inner.books).ledger.ready(&name);
        Ok(name)
    }

    /// Changes how the group fails from now on.
    pub fn fail(&self, failure: Failure) {
        lock(&self.inner.books).failure = failure;
    }

    /// The nodes and where they are in their lives.
    pub fn members(&self) -> BTreeMap<String, NodeState> {
        let books = lock(&self.inner.books);
        books
            .ledger
            .members()
            .iter()
            .map(|(name, member)| (name.clone(), member.state))
            .collect()
    }

    /// The API as a value, to serve or to call.
    pub fn router(&self) -> Router {
        Router::new()
            .route("/v1/nodes", get(list).post(ask))
            .route("/v1/nodes/{name}", delete(remove))
            .route("/lab/fail", put(fail))
            .with_state(self.clone())
    }
}

impl Inner {
    fn node(&self, name: &str, labels: BTreeMap<String, String>) -> NodeSpec {
        let mut spec = NodeSpec {
            name: name.to_owned(),
            ..self.spec.template.clone()
        };
        spec.labels.extend(labels);
        spec.labels.insert(GROUP_LABEL.to_owned(), self.spec.name.clone());
        spec
    }

    async fn boot(self: Arc<Self>, name: String, labels: BTreeMap<String, String>) {
        tokio::time::sleep(self.spec.boot_time).await;
        let spec = self.node(&name, labels);
        // From here on the machine exists: an abort can no longer take it back, only a removal.
        let inner = Arc::clone(&self);
        tokio::spawn(async move {
            let result = inner.nodes.add(spec).await;
            let kept = {
                let mut books = lock(&inner.books);
                books.boots.remove(&name);
                match &result {
                    Ok(()) => books.ledger.ready(&name),
                    Err(_) => {
                        books.ledger.gone(&name);
                        true
                    }
                }
            };
            match result {
                Ok(()) if kept => inner.journal.write(json!({"event": "ready", "node": name})),
                Ok(()) => inner.take_away(name).await,
                Err(error) => {
                    tracing::warn!(node = name, error = format!("{error:#}"), "booting a node");
                    inner.journal.write(json!({"event": "boot-failed", "node": name}));
                }
            }
        });
    }

    async fn take_away(&self, name: String) {
        if let Err(error) = self.nodes.remove(&name).await {
            tracing::warn!(node = name, error = format!("{error:#}"), "taking a node away");
        }
        lock(&self.books).ledger.gone(&name);
        self.journal.write(json!({"event": "gone", "node": name}));
    }

    fn wrong_group(&self, group: &str) -> Option<Response> {
        let reason = format!("no node group {group:?} here, only {:?}", self.spec.name);
        (group != self.spec.name).then(|| answer(StatusCode::NOT_FOUND, json!({"reason": reason})))
    }
}

fn answer(status: StatusCode, body: Value) -> Response {
    (status, Json(body)).into_response()
}

async fn ask(State(group): State<Group>, Json(ask): Json<Ask>) -> Response {
    let inner = &group.inner;
    let response = if let Some(wrong) = inner.wrong_group(&ask.group) {
        wrong
    } else if ask.request_id.is_empty() {
        answer(StatusCode::BAD_REQUEST, json!({"reason": "requestId is empty"}))
    } else {
        let mut books = lock(&inner.books);
        if books.failure == Failure::Stockout {
            answer(
                StatusCode::SERVICE_UNAVAILABLE,
                json!({"reason": "no capacity is left for this kind of node"}),
            )
        } else {
            let accepted = answer(StatusCode::ACCEPTED, json!({"requestId": ask.request_id}));
            match books.ledger.ask(&ask.request_id) {
                Asked::Again => accepted,
                Asked::Full(max) => answer(
                    StatusCode::CONFLICT,
                    json!({"reason": format!("the group has its maximum of {max} nodes")}),
                ),
                Asked::Boot(name) => {
                    if books.failure == Failure::None {
                        let boot = tokio::spawn(Arc::clone(inner).boot(name.clone(), ask.labels.clone()));
                        books.boots.insert(name, AbortOnDropHandle::new(boot));
                    }
                    accepted
                }
            }
        }
    };
    inner.journal.write(json!({
        "method": "POST", "path": "/v1/nodes", "group": ask.group, "requestId": ask.request_id,
        "labels": ask.labels, "reason": ask.reason, "status": response.status().as_u16(),
    }));
    response
}

async fn list(State(group): State<Group>, Query(query): Query<InGroup>) -> Response {
    let inner = &group.inner;
    let response = inner.wrong_group(&query.group).unwrap_or_else(|| {
        let books = lock(&inner.books);
        let nodes: Vec<Value> = books
            .ledger
            .members()
            .iter()
            .map(
                |(name, member)| json!({"name": name, "state": member.state, "requestId": member.request_id}),
            )
            .collect();
        answer(StatusCode::OK, json!({"nodes": nodes}))
    });
    let status = response.status().as_u16();
    inner
        .journal
        .write(json!({"method": "GET", "path": "/v1/nodes", "group": query.group, "status": status}));
    response
}

async fn remove(
    State(group): State<Group>,
    Path(name): Path<String>,
    Query(query): Query<InGroup>,
    body: axum::body::Bytes,
) -> Response {
    let inner = &group.inner;
    let why: Why = serde_json::from_slice(&body).unwrap_or_default();
    let response = inner.wrong_group(&query.group).unwrap_or_else(|| {
        let mut books = lock(&inner.books);
        let removed = books.ledger.remove(&name);
        match removed {
            Removed::Unknown => {
                return answer(
                    StatusCode::NOT_FOUND,
                    json!({"reason": format!("no node {name:?} in the group")}),
                );
            }
            Removed::Cancelled => drop(books.boots.remove(&name)),
            Removed::Remove => {
                let (inner, name) = (Arc::clone(inner), name.clone());
                tokio::spawn(async move { inner.take_away(name).await });
            }
            Removed::Again => {}
        }
        answer(StatusCode::ACCEPTED, json!({}))
    });
    inner.journal.write(json!({
        "method": "DELETE", "path": format!("/v1/nodes/{name}"), "group": query.group, "node": name,
        "reason": why.reason, "status": response.status().as_u16(),
    }));
    response
}

async fn fail(State(group): State<Group>, Json(fail): Json<Fail>) -> Response {
    group.fail(fail.mode);
    answer(StatusCode::OK, json!({}))
}
