//! What probes and lifecycle hooks do: an HTTP request, a TCP connection, a gRPC health check.

use http_body_util::{BodyExt as _, Empty, Full};
use hyper::body::Bytes;
use hyper_util::rt::{TokioExecutor, TokioIo};
use k8s_openapi::api::core::v1::{Container, HTTPGetAction};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use std::fmt::Debug;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// The kubelet's name to what it probes; gates and servers recognise it by the part before the slash.
const USER_AGENT: &str = "kube-probe/1.36";

/// The number of a port that may be given by name.
///
/// # Errors
/// When the container has no port of that name.
pub fn port(container: &Container, port: &IntOrString) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => match name.parse() {
            Ok(number) => number,
            Err(_) => {
                let ports = container.ports.as_deref().unwrap_or_default();
                let found = ports.iter().find(|port| port.name.as_ref() == Some(name));
                found
                    .map(|port| port.container_port)
                    .ok_or_else(|| format!("couldn't find port: {name}"))?
            }
        },
    };
    u16::try_from(number)
        .ok()
        .filter(|n| *n > 0)
        .ok_or_else(|| format!("invalid port number: {number}"))
}

async fn connect(host: &str, port: u16) -> Result<TcpStream, String> {
    let stream = TcpStream::connect((host, port)).await;
    let stream = stream.map_err(|error| format!("dial tcp {host}:{port}: connect: {}", plain(&error)))?;
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

/// An I/O error in Go's words where people know them by heart.
fn plain(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
        _ => error.to_string(),
    }
}

/// Opens a TCP connection and closes it.
///
/// # Errors
/// Says why it could not be opened.
pub async fn tcp(host: &str, port: u16) -> Result<(), String> {
    connect(host, port).await.map(drop)
}

/// Sends the GET of a probe or hook; any status from 200 to 399 is a success.
///
/// # Errors
/// In the kubelet's words.
pub async fn http(container: &Container, pod_ip: &str, action: &HTTPGetAction) -> Result<(), String> {
    let port = port(container, &action.port)?;
    let host = action
        .host
        .as_deref()
        .filter(|host| !host.is_empty())
        .unwrap_or(pod_ip);
    let tls = action
        .scheme
        .as_deref()
        .is_some_and(|scheme| scheme.eq_ignore_ascii_case("https"));
    let path = match action.path.as_deref().unwrap_or("") {
        "" => "/".to_owned(),
        path if path.starts_with('/') => path.to_owned(),
        path => format!("/{path}"),
    };
    let url = format!("{}://{host}:{port}{path}", if tls { "https" } else { "http" });
    let failed = |error: String| format!("Get {url:?}: {error}");
    let mut request = hyper::Request::get(&path).header(hyper::header::CONNECTION, "close");
    let mut has = (false, false, false);
    for header in action.http_headers.iter().flatten() {
        let name = header.name.to_ascii_lowercase();
        has = (
            has.0 || name == "host",
            has.1 || name == "user-agent",
            has.2 || name == "accept",
        );
        request = request.header(&header.name, &header.value);
    }
    if !has.0 {
        request = request.header(hyper::header::HOST, format!("{host}:{port}"));
    }
    if !has.1 {
        request = request.header(hyper::header::USER_AGENT, USER_AGENT);
    }
    if !has.2 {
        request = request.header(hyper::header::ACCEPT, "*/*");
    }
    let request = request
        .body(Empty::<Bytes>::new())
        .map_err(|e| failed(e.to_string()))?;
    let stream = connect(host, port).await.map_err(failed)?;
    let status = if tls {
        let name = ServerName::try_from(host.to_owned()).map_err(|e| failed(e.to_string()))?;
        let stream = tokio_rustls::TlsConnector::from(any_certificate()?)
            .connect(name, stream)
            .await;
        get(stream.map_err(|e| failed(e.to_string()))?, request).await
    } else {
        get(stream, request).await
    };
    let status = status.map_err(|error| failed(error.to_string()))?;
    if (200..400).contains(&status) {
        Ok(())
    } else {
        Err(format!("HTTP probe failed with statuscode: {status}"))
    }
}

async fn get<S>(stream: S, request: hyper::Request<Empty<Bytes>>) -> hyper::Result<u16>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let answer = async move {
        let response = sender.send_request(request).await?;
        Ok(response.status().as_u16())
    };
    // Driven here rather than in a task of its own, so that a time-out ends both.
    let mut answer = std::pin::pin!(answer);
    tokio::select! {
        result = &mut answer => result,
        result = connection => { result?; answer.await }
    }
}

/// Asks a gRPC server's health service about `service`.
///
/// # Errors
/// When it does not answer SERVING.
pub async fn grpc(host: &str, port: u16, service: &str) -> Result<(), String> {
    let stream = connect(host, port).await?;
    let text = |error: hyper::Error| format!("error: health rpc failed: {error}");
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .map_err(text)?;
    let connection = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(connection));
    // HealthCheckRequest { string service = 1 } behind gRPC's five bytes of framing.
    let mut message = Vec::new();
    if let Ok(length @ 1..=127) = u8::try_from(service.len()) {
        message.extend([0x0a, length]);
        message.extend(service.as_bytes());
    } else if !service.is_empty() {
        return Err("error: the service's name is too long".to_owned());
    }
    let mut body = vec![0, 0, 0, 0, u8::try_from(message.len()).unwrap_or(0)];
    body.extend(message);
    let request = hyper::Request::post(format!("http://{host}:{port}/grpc.health.v1.Health/Check"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", USER_AGENT)
        .body(Full::new(Bytes::from(body)))
        .map_err(|e| e.to_string())?;
    let response = sender.send_request(request).await.map_err(text)?;
    let body = response.into_body().collect().await.map_err(text)?.to_bytes();
    drop(connection);
    // HealthCheckResponse { ServingStatus status = 1 }, and SERVING is 1.
    match body.get(5..) {
        Some([0x08, 1, ..]) => Ok(()),
        _ => Err("service unhealthy (responded with \"NOT_SERVING\")".to_owned()),
    }
}

/// A probe believes any certificate, as the kubelet's does: it asks for life, not for identity.
fn any_certificate() -> Result<Arc<rustls::ClientConfig>, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let schemes = provider.signature_verification_algorithms.supported_schemes();
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(schemes)))
        .with_no_client_auth();
    Ok(Arc::new(config))
}

#[derive(Debug)]
struct AnyCertificate(Vec<rustls::SignatureScheme>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.clone()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    /// Answers one connection with `status` and returns what was asked.
    async fn answer(status: &'static str) -> (u16, tokio::task::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let task = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut buffer = vec![0; 4096];
            let n = stream.read(&mut buffer).await.unwrap();
            let text = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
            stream.write_all(text.as_bytes()).await.unwrap();
            String::from_utf8_lossy(&buffer[..n]).into_owned()
        });
        (port, task)
    }

    fn action(port: u16) -> HTTPGetAction {
        serde_json::from_value(serde_json::json!({
            "path": "health", "port": port, "httpHeaders": [{"name": "X-A", "value": "b"}]
        }))
        .unwrap()
    }

    #[tokio::test]
    async fn statuses_below_400_are_healthy_and_the_prober_is_named() {
        let container = Container::default();
        let (port, asked) = answer("302 Found").await;
        http(&container, "127.0.0.1", &action(port)).await.unwrap();
        let asked = asked.await.unwrap().to_lowercase();
        assert!(
            asked.starts_with("get /health http/1.1")
                && asked.contains("x-a: b")
                && asked.contains("kube-probe/")
        );
        let (port, _asked) = answer("503 Service Unavailable").await;
        let error = http(&container, "127.0.0.1", &action(port)).await.unwrap_err();
        assert_eq!(error, "HTTP probe failed with statuscode: 503");
    }

    #[tokio::test]
    async fn a_closed_port_is_told_as_the_kubelet_tells_it() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let error = http(&Container::default(), "127.0.0.1", &action(port))
            .await
            .unwrap_err();
        assert_eq!(
            error,
            format!(
                "Get \"http://127.0.0.1:{port}/health\": dial tcp 127.0.0.1:{port}: connect: connection refused"
            )
        );
    }

    #[test]
    fn ports_go_by_number_or_name() {
        let container: Container = serde_json::from_value(
            serde_json::json!({"name": "c", "ports": [{"name": "http", "containerPort": 80}]}),
        )
        .unwrap();
        let named = |name: &str| port(&container, &IntOrString::String(name.into()));
        assert_eq!(named("http"), Ok(80));
        assert_eq!(named("81"), Ok(81));
        assert!(named("grpc").is_err());
        assert!(port(&container, &IntOrString::Int(0)).is_err());
    }
}
