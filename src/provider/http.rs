//! The `http` provider: a small API that anybody can put before what they have.
//!
//! | call | body | answer |
//! |---|---|---|
//! | `POST {url}/v1/nodes` | `{"group", "requestId", "labels": {…}, "reason"}` | 202 `{"requestId"}`; the same `requestId` twice adds one node |
//! | `GET {url}/v1/nodes?group=NAME` | | 200 `{"nodes": [{"name", "state": "booting\|ready\|leaving", "requestId"}]}` |
//! | `DELETE {url}/v1/nodes/{name}?group=NAME` | `{"reason"}` | 202; 404 if unknown; again while leaving: 202 |
//!
//! The provider deletes the Node object once the machine is gone, as cloud providers do. Any other status is an error,
//! and its body's text is shown to people. All calls may come again.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use serde_json::json;

use super::{AddRequest, Provider, ProviderError, ProviderNode};

/// Longest wait for one answer.
const LIMIT: Duration = Duration::from_secs(10);
/// Longest answer.
const MAX_ANSWER: usize = 4 << 20;
/// What is shown of an error's text.
const SHOWN: usize = 300;

/// The client of one provider.
pub struct HttpProvider {
    base: String,
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

#[derive(Deserialize)]
struct Listed {
    nodes: Vec<ProviderNode>,
}

impl HttpProvider {
    /// A client for the API at `url`.
    ///
    /// # Errors
    /// When the URL is none.
    pub fn new(url: &str) -> Result<Self, ProviderError> {
        let base = url.trim_end_matches('/').to_owned();
        let uri: Uri = base
            .parse()
            .map_err(|error| ProviderError::Settings(format!("url `{url}`: {error}")))?;
        if uri.authority().is_none() || !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err(ProviderError::Settings(format!(
                "url `{url}`: write it as http://nodes.example:8080"
            )));
        }
        let mut connector = HttpConnector::new();
        connector.enforce_http(false);
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(LIMIT / 2));
        // A machine without root certificates can still use a provider over plain HTTP.
        let connector = match HttpsConnectorBuilder::new().with_native_roots() {
            Ok(builder) => builder,
            Err(error) if uri.scheme_str() == Some("https") => {
                return Err(ProviderError::Settings(format!("no root certificates: {error}")));
            }
            Err(_) => HttpsConnectorBuilder::new().with_tls_config(without_roots()),
        }
        .https_or_http()
        .enable_http1()
        .enable_http2()
        .wrap_connector(connector);
        Ok(Self {
            base,
            client: Client::builder(TokioExecutor::new())
                .pool_idle_timeout(Duration::from_secs(30))
                .build(connector),
        })
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<(StatusCode, Bytes), ProviderError> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base));
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request = request
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .map_err(|error| ProviderError::Settings(error.to_string()))?;
        let exchange = async {
            let answer = self
                .client
                .request(request)
                .await
                .map_err(|error| ProviderError::Unreachable(with_causes(&error)))?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), MAX_ANSWER)
                .collect()
                .await
                .map_err(|error| ProviderError::Unreadable(error.to_string()))?;
            Ok((status, body.to_bytes()))
        };
        tokio::time::timeout(LIMIT, exchange)
            .await
            .unwrap_or(Err(ProviderError::Timeout(LIMIT)))
    }
}

fn without_roots() -> rustls::ClientConfig {
    rustls::ClientConfig::builder()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth()
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

fn refused(status: StatusCode, body: &[u8]) -> ProviderError {
    ProviderError::Refused {
        status: status.as_u16(),
        message: String::from_utf8_lossy(body).chars().take(SHOWN).collect(),
    }
}

/// Percent-encodes everything that has a meaning in a path or a query.
fn encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

impl Provider for HttpProvider {
    async fn add(&self, request: &AddRequest) -> Result<(), ProviderError> {
        let body = serde_json::to_vec(request).map_err(|error| ProviderError::Settings(error.to_string()))?;
        match self.call(Method::POST, "/v1/nodes", Some(body)).await? {
            (status, _) if status.is_success() => Ok(()),
            (status, body) => Err(refused(status, &body)),
        }
    }

    async fn list(&self, group: &str) -> Result<Vec<ProviderNode>, ProviderError> {
        let path = format!("/v1/nodes?group={}", encode(group));
        match self.call(Method::GET, &path, None).await? {
            (StatusCode::OK, body) => serde_json::from_slice::<Listed>(&body)
                .map(|listed| listed.nodes)
                .map_err(|error| ProviderError::Unreadable(error.to_string())),
            (status, body) => Err(refused(status, &body)),
        }
    }

    async fn remove(&self, group: &str, node: &str, reason: &str) -> Result<(), ProviderError> {
        let path = format!("/v1/nodes/{}?group={}", encode(node), encode(group));
        let body = serde_json::to_vec(&json!({"reason": reason}))
            .map_err(|error| ProviderError::Settings(error.to_string()))?;
        match self.call(Method::DELETE, &path, Some(body)).await? {
            (StatusCode::NOT_FOUND, _) => Ok(()),
            (status, _) if status.is_success() => Ok(()),
            (status, body) => Err(refused(status, &body)),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::provider::NodeState;
    use axum::Router;
    use axum::extract::{Path, Query};
    use axum::routing::{delete, post};
    use std::collections::{BTreeMap, HashMap};

    async fn serve(router: Router) -> HttpProvider {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        HttpProvider::new(&url).unwrap()
    }

    fn request() -> AddRequest {
        AddRequest {
            group: "l4".to_owned(),
            request_id: "r1".to_owned(),
            labels: BTreeMap::from([("pool".to_owned(), "l4".to_owned())]),
            reason: "a pod waits".to_owned(),
        }
    }

    #[tokio::test]
    async fn speaks_the_documented_api() {
        let router = Router::new()
            .route(
                "/v1/nodes",
                post(|axum::Json(body): axum::Json<serde_json::Value>| async move {
                    assert_eq!(
                        body,
                        json!({"group": "l4", "requestId": "r1", "labels": {"pool": "l4"}, "reason": "a pod waits"})
                    );
                    (StatusCode::ACCEPTED, axum::Json(json!({"requestId": "r1"})))
                })
                .get(|Query(query): Query<HashMap<String, String>>| async move {
                    assert_eq!(query["group"], "l4 & more");
                    axum::Json(json!({"nodes": [
                        {"name": "n1", "state": "booting", "requestId": "r1"},
                        {"name": "n0", "state": "ready"},
                    ]}))
                }),
            )
            .route(
                "/v1/nodes/{name}",
                delete(|Path(name): Path<String>, axum::Json(body): axum::Json<serde_json::Value>| async move {
                    assert_eq!(body, json!({"reason": "empty"}));
                    match name.as_str() {
                        "n1" => StatusCode::ACCEPTED,
                        _ => StatusCode::NOT_FOUND,
                    }
                }),
            );
        let provider = serve(router).await;
        provider.add(&request()).await.unwrap();
        let nodes = provider.list("l4 & more").await.unwrap();
        assert_eq!(
            (nodes[0].state, nodes[0].request_id.as_str()),
            (NodeState::Booting, "r1")
        );
        assert_eq!(
            (nodes[1].state, nodes[1].request_id.as_str()),
            (NodeState::Ready, "")
        );
        provider.remove("l4", "n1", "empty").await.unwrap();
        provider.remove("l4", "unknown", "empty").await.unwrap();
    }

    #[tokio::test]
    async fn adversarial_answers_are_errors_with_words() {
        let router = Router::new().route(
            "/v1/nodes",
            post(|| async { (StatusCode::CONFLICT, "quota ".repeat(10_000)) }).get(|| async { "not json" }),
        );
        let provider = serve(router).await;
        let error = provider.add(&request()).await.unwrap_err().to_string();
        assert!(
            error.starts_with("the provider answered 409: quota quota") && error.len() < 400,
            "{error}"
        );
        assert!(matches!(
            provider.list("l4").await,
            Err(ProviderError::Unreadable(_))
        ));
    }

    #[tokio::test]
    async fn adversarial_an_endless_answer_is_cut_off() {
        let endless = || async {
            let chunks =
                futures::stream::repeat_with(|| Ok::<_, std::io::Error>(Bytes::from(vec![b'x'; 65_536])));
            axum::body::Body::from_stream(chunks)
        };
        let provider = serve(Router::new().route("/v1/nodes", axum::routing::get(endless))).await;
        assert!(matches!(
            provider.list("l4").await,
            Err(ProviderError::Unreadable(_))
        ));
    }

    #[test]
    fn urls_are_checked() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        for url in ["", "nodes", "ftp://nodes", "http://"] {
            assert!(HttpProvider::new(url).is_err(), "{url}");
        }
    }
}
