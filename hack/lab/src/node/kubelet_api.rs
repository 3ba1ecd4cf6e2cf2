//! The part of the kubelet's own API that people miss most: `kubectl logs`.

use anyhow::Context as _;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path as UrlPath, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use serde::Deserialize;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// The port every kubelet listens on.
pub const PORT: u16 = 10250;

/// How often a followed log is looked at.
const LOOK: Duration = Duration::from_millis(200);
const CHUNK: usize = 64 * 1024;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct LogQuery {
    follow: bool,
    previous: bool,
    tail_lines: Option<usize>,
    limit_bytes: Option<u64>,
}

/// What all nodes of a process serve with: a certificate of their own making, which the API server does not check.
///
/// # Errors
/// When the certificate cannot be made.
pub fn acceptor() -> anyhow::Result<TlsAcceptor> {
    let made = rcgen::generate_simple_self_signed(["kubelet".to_owned()])
        .context("making the kubelet's certificate")?;
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der())
        .map_err(|error| anyhow::anyhow!("making the kubelet's key: {error}"))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Serves the logs under `pods` until dropped.
pub async fn serve(listener: TcpListener, acceptor: TlsAcceptor, pods: PathBuf) {
    let router = Router::new()
        .route("/containerLogs/{namespace}/{pod}/{container}", get(logs))
        .with_state(Arc::new(pods));
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection");
                    tokio::time::sleep(LOOK).await;
                    continue;
                }
            },
            Some(_) = connections.join_next() => continue,
        };
        let (acceptor, service) = (acceptor.clone(), TowerToHyperService::new(router.clone()));
        connections.spawn(async move {
            let handshake = tokio::time::timeout(Duration::from_secs(10), acceptor.accept(stream));
            if let Ok(Ok(stream)) = handshake.await {
                let server = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                let _ = server.serve_connection(TokioIo::new(stream), service).await;
            }
        });
    }
}

async fn logs(
    State(pods): State<Arc<PathBuf>>,
    UrlPath((namespace, pod, container)): UrlPath<(String, String, String)>,
    Query(query): Query<LogQuery>,
) -> Response {
    let missing = || {
        let text = format!("no log of container {container:?} in pod {namespace}/{pod}\n");
        (StatusCode::NOT_FOUND, text).into_response()
    };
    let Some(dir) = newest_dir(&pods, &format!("{namespace}_{pod}_")) else {
        return missing();
    };
    // The name comes from a URL; a container's name has no slash in it.
    if container.contains('/') {
        return missing();
    }
    let suffix = if query.previous { ".log.1" } else { ".log" };
    let Ok(mut file) = File::open(dir.join(format!("{container}{suffix}"))) else {
        return missing();
    };
    if let Some(lines) = query.tail_lines
        && seek_to_tail(&mut file, lines).is_err()
    {
        return missing();
    }
    let running = query.follow.then(|| dir.join(format!("{container}.pid")));
    let left = query.limit_bytes.unwrap_or(u64::MAX);
    let stream = futures::stream::unfold((file, running, left), |(mut file, running, left)| async move {
        loop {
            // Looked at before reading: what was written before the end is still sent.
            let more_to_come = running.as_ref().is_some_and(|pid| pid.exists());
            let mut chunk = vec![0; CHUNK.min(usize::try_from(left).unwrap_or(CHUNK))];
            match file.read(&mut chunk) {
                Ok(0) if more_to_come && left > 0 => tokio::time::sleep(LOOK).await,
                Ok(0) | Err(_) => return None,
                Ok(n) => {
                    chunk.truncate(n);
                    let left = left - u64::try_from(n).unwrap_or(left);
                    return Some((Ok::<_, std::io::Error>(Bytes::from(chunk)), (file, running, left)));
                }
            }
        }
    });
    Body::from_stream(stream).into_response()
}

/// The folder of the pod that began last: a StatefulSet's pods have the same name again and again.
fn newest_dir(pods: &Path, prefix: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir(pods).ok()?.flatten();
    let ours = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix));
    let newest = ours.max_by_key(|entry| {
        entry
            .metadata()
            .and_then(|m| m.created().or_else(|_| m.modified()))
            .ok()
    });
    newest.map(|entry| entry.path())
}

/// Moves to the start of the last `lines` lines.
fn seek_to_tail(file: &mut File, lines: usize) -> std::io::Result<()> {
    let mut end = file.seek(SeekFrom::End(0))?;
    let mut seen = 0;
    let mut last = true;
    let mut buffer = vec![0; CHUNK];
    while end > 0 {
        let size = CHUNK.min(usize::try_from(end).unwrap_or(CHUNK));
        let from = end - u64::try_from(size).unwrap_or(end);
        file.seek(SeekFrom::Start(from))?;
        file.read_exact(&mut buffer[..size])?;
        for (at, byte) in buffer[..size].iter().enumerate().rev() {
            // The newline that ends the last line does not begin another.
            if *byte == b'\n' && !std::mem::take(&mut last) {
                seen += 1;
            }
            last = false;
            if seen == lines {
                let after = u64::try_from(at + 1).unwrap_or(0);
                file.seek(SeekFrom::Start(from + after))?;
                return Ok(());
            }
        }
        end = from;
    }
    file.seek(SeekFrom::Start(0)).map(drop)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::Write as _;

    fn tail(text: &str, lines: usize) -> String {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        seek_to_tail(&mut file, lines).unwrap();
        let mut rest = String::new();
        file.read_to_string(&mut rest).unwrap();
        rest
    }

    #[test]
    fn the_last_lines_are_found() {
        assert_eq!(tail("a\nb\nc\n", 1), "c\n");
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc\n");
        assert_eq!(tail("a\nb\nc", 2), "b\nc");
        assert_eq!(tail("a\nb\n", 9), "a\nb\n");
        assert_eq!(tail("", 3), "");
        let long = format!("{}\n{}\n", "x".repeat(CHUNK), "y".repeat(CHUNK));
        assert_eq!(tail(&long, 1), format!("{}\n", "y".repeat(CHUNK)));
    }
}
