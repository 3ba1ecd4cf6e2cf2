//! Asks a pod whether it is ready, as the kubelet would, but every few milliseconds: a held request should not wait
//! for the kubelet's period. What only the kubelet can ask (exec, HTTPS, readiness gates) is left to it.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use http::header::{HOST, HeaderName, HeaderValue, USER_AGENT};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Container, Pod, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tokio::net::TcpStream;

/// A dropped SYN is sent again by the kernel only after a second; a new connection is quicker.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(250);
/// Between two attempts while the port is closed, which costs the pod nothing.
const CLOSED_INTERVAL: Duration = Duration::from_millis(10);
/// A server that answers "not yet" is asked less and less often, up to this.
const MAX_INTERVAL: Duration = Duration::from_millis(50);

/// How to find out whether a pod is ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Checks {
    /// All of these must pass.
    Own(Vec<Check>),
    /// Only the kubelet can tell.
    Kubelet,
}

/// One readiness probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    port: u16,
    kind: Kind,
    timeout: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Http {
        host: Option<IpAddr>,
        path: String,
        headers: Vec<(HeaderName, HeaderValue)>,
    },
    /// Also for gRPC: that its port accepts.
    Tcp,
}

/// What a probe found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// It is ready.
    Ready,
    /// Nothing listens.
    Closed,
    /// It answers, but is not ready.
    NotYet,
}

impl Checks {
    /// The checks of a pod's containers.
    #[must_use]
    pub fn of(pod: &Pod) -> Checks {
        let Some(spec) = &pod.spec else {
            return Checks::Kubelet;
        };
        if spec
            .readiness_gates
            .as_ref()
            .is_some_and(|gates| !gates.is_empty())
        {
            return Checks::Kubelet;
        }
        let sidecars = spec
            .init_containers
            .iter()
            .flatten()
            .filter(|container| container.restart_policy.as_deref() == Some("Always"));
        let mut checks = Vec::new();
        for container in spec.containers.iter().chain(sidecars) {
            let Some(probe) = &container.readiness_probe else {
                continue;
            };
            match check(container, probe) {
                Some(check) => checks.push(check),
                None => return Checks::Kubelet,
            }
        }
        if checks.is_empty() {
            Checks::Kubelet
        } else {
            Checks::Own(checks)
        }
    }
}

fn check(container: &Container, probe: &Probe) -> Option<Check> {
    let timeout = Duration::from_secs(probe.timeout_seconds.unwrap_or(1).max(1).unsigned_abs().into());
    let (port, kind) = if let Some(get) = &probe.http_get {
        if get.scheme.as_deref().is_some_and(|scheme| scheme != "HTTP") {
            return None;
        }
        let host = match get.host.as_deref() {
            None | Some("") => None,
            Some(host) => Some(host.parse().ok()?),
        };
        let path = match get.path.as_deref() {
            None | Some("") => "/".to_owned(),
            Some(path) if path.starts_with('/') => path.to_owned(),
            Some(path) => format!("/{path}"),
        };
        let headers = get
            .http_headers
            .iter()
            .flatten()
            .map(|header| Some((header.name.parse().ok()?, header.value.parse().ok()?)))
            .collect::<Option<Vec<_>>>()?;
        (get.port.clone(), Kind::Http { host, path, headers })
    } else if let Some(tcp) = &probe.tcp_socket {
        if tcp.host.as_deref().is_some_and(|host| !host.is_empty()) {
            return None;
        }
        (tcp.port.clone(), Kind::Tcp)
    } else if let Some(grpc) = &probe.grpc {
        (IntOrString::Int(grpc.port), Kind::Tcp)
    } else {
        return None;
    };
    let port = match port {
        IntOrString::Int(port) => port,
        IntOrString::String(name) => {
            container
                .ports
                .iter()
                .flatten()
                .find(|port| port.name.as_ref() == Some(&name))?
                .container_port
        }
    };
    Some(Check {
        port: u16::try_from(port).ok()?,
        kind,
        timeout,
    })
}

/// How long to wait before the next attempt, `elapsed` after the first.
#[must_use]
pub fn interval(found: Found, elapsed: Duration) -> Duration {
    match found {
        Found::Ready | Found::Closed => CLOSED_INTERVAL,
        Found::NotYet => (elapsed / 200).clamp(CLOSED_INTERVAL, MAX_INTERVAL),
    }
}

/// Asks once.
pub async fn ask(ip: IpAddr, checks: &[Check]) -> Found {
    for check in checks {
        let found = ask_one(ip, check).await;
        if found != Found::Ready {
            return found;
        }
    }
    Found::Ready
}

async fn ask_one(ip: IpAddr, check: &Check) -> Found {
    let ip = match &check.kind {
        Kind::Http { host: Some(host), .. } => *host,
        _ => ip,
    };
    let address = SocketAddr::new(ip, check.port);
    let Some(stream) = connect(address).await else {
        return Found::Closed;
    };
    match &check.kind {
        Kind::Tcp => Found::Ready,
        Kind::Http { path, headers, .. } => {
            let answer = tokio::time::timeout(check.timeout, get(stream, address, path, headers)).await;
            match answer {
                Ok(Some(status)) if (200..400).contains(&status) => Found::Ready,
                _ => Found::NotYet,
            }
        }
    }
}

/// Whether something accepts connections there.
pub async fn accepts(address: SocketAddr) -> bool {
    connect(address).await.is_some()
}

async fn connect(address: SocketAddr) -> Option<TcpStream> {
    let stream = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address))
        .await
        .ok()?
        .ok()?;
    // A port of our own range can meet itself (simultaneous open) while nobody listens.
    if stream.local_addr().ok()? == stream.peer_addr().ok()? {
        return None;
    }
    let _ = stream.set_nodelay(true);
    Some(stream)
}

async fn get(
    stream: TcpStream,
    address: SocketAddr,
    path: &str,
    headers: &[(HeaderName, HeaderValue)],
) -> Option<u16> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.ok()?;
    let mut request = http::Request::get(path)
        .header(HOST, address.to_string())
        .header(USER_AGENT, "kube-probe/ebb-gate")
        .body(Empty::<Bytes>::new())
        .ok()?;
    for (name, value) in headers {
        request.headers_mut().insert(name, value.clone());
    }
    // The connection lives only as long as the answer takes.
    let (answer, _) = tokio::join!(
        async move {
            sender
                .send_request(request)
                .await
                .map(|response| response.status())
        },
        async move {
            let _ = connection.await;
        }
    );
    answer.ok().map(|status| status.as_u16())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    fn pod(probe: serde_json::Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "m"},
            "spec": {"containers": [{
                "name": "m",
                "ports": [{"name": "http", "containerPort": 8000}],
                "readinessProbe": probe,
            }]},
        }))
        .unwrap()
    }

    #[test]
    fn a_named_port_and_a_path_without_slash() {
        let checks = Checks::of(&pod(json!({"httpGet": {"path": "health", "port": "http"}})));
        let Checks::Own(checks) = checks else {
            panic!("own")
        };
        assert_eq!(checks[0].port, 8000);
        assert!(matches!(&checks[0].kind, Kind::Http { path, .. } if path == "/health"));
    }

    #[test]
    fn what_only_the_kubelet_can_ask_is_left_to_it() {
        for probe in [
            json!({"exec": {"command": ["true"]}}),
            json!({"httpGet": {"port": "http", "scheme": "HTTPS"}}),
            json!({"httpGet": {"port": "no-such-port"}}),
            json!({"httpGet": {"port": 70000}}),
            json!(null),
        ] {
            assert_eq!(Checks::of(&pod(probe.clone())), Checks::Kubelet, "{probe}");
        }
    }

    #[tokio::test]
    async fn a_status_tells_ready_from_not_yet() {
        for (status, found) in [("200 OK", Found::Ready), ("503 Loading", Found::NotYet)] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let server = tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut head = vec![0; 4096];
                let read = stream.read(&mut head).await.unwrap();
                let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
                stream.write_all(answer.as_bytes()).await.unwrap();
                String::from_utf8_lossy(&head[..read]).into_owned()
            });
            let check = Check {
                port,
                kind: Kind::Http {
                    host: None,
                    path: "/health".to_owned(),
                    headers: vec![("x-a".parse().unwrap(), "b".parse().unwrap())],
                },
                timeout: Duration::from_secs(1),
            };
            assert_eq!(ask("127.0.0.1".parse().unwrap(), &[check]).await, found);
            let head = server.await.unwrap();
            assert!(
                head.starts_with("GET /health HTTP/1.1\r\n") && head.contains("x-a: b"),
                "{head}"
            );
        }
    }

    #[tokio::test]
    async fn a_closed_port_is_closed() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let check = Check {
            port,
            kind: Kind::Tcp,
            timeout: Duration::from_secs(1),
        };
        assert_eq!(ask("127.0.0.1".parse().unwrap(), &[check]).await, Found::Closed);
    }
}
