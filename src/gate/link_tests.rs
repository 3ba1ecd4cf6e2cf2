//! The gate's end of the link against a controller's end on loopback, with real TLS.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use prometheus_client::registry::Registry;
use proptest::prelude::*;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::api::units;
use crate::api::workload::WorkloadKind;
use crate::gate::hold::Entered;
use crate::gate::metrics::Metrics;
use crate::gate::wake::{Scale, ScaleError, Scaler};
use crate::plan::hold::{Limits, Seen, SeenPod, Target};
use crate::serve::pki;

const SOON: Duration = Duration::from_secs(20);
const NAME: &str = "ebb-controller.ebb-system.svc";

struct Nobody;

impl Scaler for Nobody {
    fn read<'a>(&'a self, _: &'a WorkloadRef) -> futures::future::BoxFuture<'a, Result<Scale, ScaleError>> {
        Box::pin(async { Err(ScaleError::Later("no cluster".to_owned())) })
    }

    fn raise<'a>(
        &'a self,
        _: &'a WorkloadRef,
        _: &'a str,
        _: u32,
    ) -> futures::future::BoxFuture<'a, Result<Scale, ScaleError>> {
        Box::pin(async { Err(ScaleError::Later("no cluster".to_owned())) })
    }
}

/// One link as the controller sees it.
struct Seat {
    heard: mpsc::UnboundedReceiver<FromGate>,
    say: mpsc::UnboundedSender<ToGate>,
}

impl Seat {
    async fn hear(&mut self) -> FromGate {
        timeout(SOON, self.heard.recv()).await.unwrap().unwrap()
    }

    /// Waits for a report that a workload is quiet now, having been called.
    async fn told_quiet(&mut self) {
        let quiet = async {
            loop {
                if let FromGate::Report { workloads, .. } = self.hear().await
                    && workloads
                        .iter()
                        .any(|w| w.in_flight == 0 && w.queued == 0 && w.idle_ms.is_some())
                {
                    return;
                }
            }
        };
        timeout(SOON, quiet).await.expect("the end is reported");
    }

    /// The next line that is no report.
    async fn answer(&mut self) -> FromGate {
        loop {
            match self.hear().await {
                FromGate::Report { .. } => {}
                other => return other,
            }
        }
    }
}

struct Controller {
    address: SocketAddr,
    seats: mpsc::UnboundedReceiver<Seat>,
    stop: CancellationToken,
}

/// A controller's link port: it leads, or says who does.
async fn controller(ca: &pki::Identity, leader: Option<SocketAddr>) -> Controller {
    let leaf = pki::Leaf::Server(vec![NAME.to_owned()]);
    let identity = pki::new_leaf(ca, &leaf, SystemTime::now()).unwrap();
    let config = tls::server_config(&identity, &ca.certificate, tls::ClientAuth::None).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (seat, seats) = mpsc::unbounded_channel();
    let stop = CancellationToken::new();
    let handler = move |request: Request| {
        let seat = seat.clone();
        async move { answer(request, leader, &seat) }
    };
    let router = Router::new().route(LINK_PATH, post(handler));
    let stopped = stop.clone();
    tokio::spawn(async move {
        loop {
            let (tcp, _) = tokio::select! {
                () = stopped.cancelled() => return,
                accepted = listener.accept() => accepted.unwrap(),
            };
            let (acceptor, router) = (tokio_rustls::TlsAcceptor::from(config.clone()), router.clone());
            let stopped = stopped.clone();
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(tcp).await else {
                    return;
                };
                let service = hyper_util::service::TowerToHyperService::new(router);
                let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                tokio::select! {
                    () = stopped.cancelled() => {}
                    _ = builder.serve_connection(TokioIo::new(stream), service) => {}
                }
            });
        }
    });
    Controller { address, seats, stop }
}

fn answer(request: Request, leader: Option<SocketAddr>, seat: &mpsc::UnboundedSender<Seat>) -> Response {
    if let Some(leader) = leader {
        let body = Misdirected {
            leader: Some(leader.to_string()),
        };
        return (StatusCode::MISDIRECTED_REQUEST, axum::Json(body)).into_response();
    }
    assert_eq!(request.headers()[AUTHORIZATION], "Bearer secret");
    let (heard_sender, heard) = mpsc::unbounded_channel();
    let (say, mut to_say) = mpsc::unbounded_channel::<ToGate>();
    let mut body = request.into_body();
    tokio::spawn(async move {
        let mut reader = LineReader::default();
        while let Some(Ok(frame)) = body.frame().await {
            reader.push(frame.data_ref().unwrap()).unwrap();
            while let Some(line) = reader.next() {
                let _ = heard_sender.send(serde_json::from_slice(&line).unwrap());
            }
        }
    });
    let lines = async_stream(move |cx| {
        to_say.poll_recv(cx).map(|message| {
            message.map(|message| {
                let mut line = serde_json::to_vec(&message).unwrap();
                line.push(b'\n');
                Ok::<_, std::io::Error>(Bytes::from(line))
            })
        })
    });
    seat.send(Seat { heard, say }).unwrap();
    Body::from_stream(lines).into_response()
}

fn async_stream<T>(
    poll: impl FnMut(&mut std::task::Context<'_>) -> std::task::Poll<Option<T>>,
) -> impl futures::Stream<Item = T> {
    futures::stream::poll_fn(poll)
}

struct Linked {
    gate: Arc<Gate>,
    ends: Ends,
    _files: tempfile::TempDir,
}

fn link(ca: &pki::Identity, to: SocketAddr) -> Linked {
    let files = tempfile::tempdir().unwrap();
    std::fs::write(files.path().join("ca.crt"), &ca.certificate).unwrap();
    std::fs::write(files.path().join("token"), "secret\n").unwrap();
    let gate = Gate::new(Arc::new(Nobody), Metrics::new(&mut Registry::default()));
    let ends = Ends {
        stopping: CancellationToken::new(),
        done: CancellationToken::new(),
    };
    let ip = "127.0.0.1".parse().unwrap();
    let listeners = Listeners::new(gate.clone(), ip, 10, CancellationToken::new());
    let config = Config {
        controller: to.to_string(),
        server_name: NAME.to_owned(),
        ca_file: files.path().join("ca.crt"),
        token_file: files.path().join("token"),
        pod: "gate-1".to_owned(),
        ip,
    };
    tokio::spawn(run(gate.clone(), Arc::new(listeners), config, ends.clone()));
    Linked {
        gate,
        ends,
        _files: files,
    }
}

fn workload() -> WorkloadRef {
    WorkloadRef {
        kind: WorkloadKind::Deployment,
        namespace: "models".to_owned(),
        name: "m".to_owned(),
    }
}

fn awake(gate: &Arc<Gate>) {
    gate.door(&workload()).observe(&Seen {
        desired: 1,
        zero_version: None,
        settled: true,
        wakeable: true,
        limits: Limits {
            queue_requests: 10,
            queue_bytes: units::Bytes(1000),
            target_in_flight: 10,
        },
        pods: vec![SeenPod {
            uid: units::PodUid::from("pod-1"),
            ip: Some("127.0.0.1".parse().unwrap()),
            version: Some(1),
            terminating: false,
            ready: true,
            ports: std::collections::BTreeMap::new(),
        }],
    });
}

fn arrive(gate: &Arc<Gate>) -> Entered {
    gate.door(&workload())
        .arrive(&Target::Number(80), units::Bytes(1))
}

fn provider() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}

fn hold(id: u64, for_ms: u64) -> ToGate {
    ToGate::Hold {
        id,
        workload: workload(),
        for_ms,
    }
}

#[tokio::test]
async fn the_last_look_and_what_follows() {
    provider();
    let ca = pki::new_ca(SystemTime::now()).unwrap();
    let mut controller = controller(&ca, None).await;
    let linked = link(&ca, controller.address);
    awake(&linked.gate);
    let mut seat = timeout(SOON, controller.seats.recv()).await.unwrap().unwrap();
    assert_eq!(
        seat.hear().await,
        FromGate::Hello {
            pod: "gate-1".to_owned(),
            ip: "127.0.0.1".parse().unwrap()
        }
    );
    let FromGate::Report { workloads, .. } = seat.hear().await else {
        panic!("a report comes first")
    };
    assert_eq!(workloads.len(), 1);
    assert_eq!((workloads[0].in_flight, workloads[0].idle_ms), (0, None));

    // Busy: a request is in flight.
    let Entered::Go(in_flight) = arrive(&linked.gate) else {
        panic!("a replica is free")
    };
    seat.say.send(hold(1, 60_000)).unwrap();
    assert!(matches!(
        seat.answer().await,
        FromGate::Held { id: 1, busy: Some(_) }
    ));
    drop(in_flight);
    // Reported as ended, so that the next look finds nothing new.
    seat.told_quiet().await;

    // Quiet: from the answer on, requests wait.
    seat.say.send(hold(2, 60_000)).unwrap();
    assert_eq!(seat.answer().await, FromGate::Held { id: 2, busy: None });
    let Entered::Wait(mut held) = arrive(&linked.gate) else {
        panic!("it is held")
    };
    seat.say.send(ToGate::Resume { id: 2 }).unwrap();
    let verdict = timeout(SOON, held.verdict()).await.unwrap();
    assert!(matches!(verdict, crate::gate::hold::Verdict::Go(_)));
    drop((verdict, held));

    // A wake that cannot succeed.
    seat.told_quiet().await;
    seat.say.send(hold(3, 60_000)).unwrap();
    assert_eq!(seat.answer().await, FromGate::Held { id: 3, busy: None });
    let Entered::Wait(mut held) = arrive(&linked.gate) else {
        panic!("it is held")
    };
    let reason = "image not found".to_owned();
    seat.say
        .send(ToGate::WakeFailed {
            workload: workload(),
            reason: reason.clone(),
        })
        .unwrap();
    match timeout(SOON, held.verdict()).await.unwrap() {
        crate::gate::hold::Verdict::Failed(problem) => assert_eq!(problem.detail, reason),
        crate::gate::hold::Verdict::Go(_) => panic!("it cannot go anywhere"),
    }

    linked.ends.stopping.cancel();
    assert_eq!(seat.answer().await, FromGate::Stopping);
    // It goes on reporting until it is done.
    assert!(matches!(seat.hear().await, FromGate::Report { .. }));
    linked.ends.done.cancel();
    timeout(SOON, async { while seat.heard.recv().await.is_some() {} })
        .await
        .unwrap();
}

#[tokio::test]
async fn a_request_that_was_not_reported_yet_is_busy() {
    provider();
    let ca = pki::new_ca(SystemTime::now()).unwrap();
    let mut controller = controller(&ca, None).await;
    let linked = link(&ca, controller.address);
    awake(&linked.gate);
    let mut seat = timeout(SOON, controller.seats.recv()).await.unwrap().unwrap();
    seat.hear().await;
    seat.hear().await;
    // It came and went since the last report: the leader decided without knowing of it.
    drop(arrive(&linked.gate));
    let busy = linked.gate.door(&workload()).hold(9, 60_000, 0);
    assert!(busy.unwrap().contains("not reported yet"));
}

#[tokio::test]
async fn the_leader_is_found_and_found_again() {
    provider();
    let ca = pki::new_ca(SystemTime::now()).unwrap();
    let mut leader = controller(&ca, None).await;
    let other = controller(&ca, Some(leader.address)).await;
    let _linked = link(&ca, other.address);
    let mut seat = timeout(SOON, leader.seats.recv()).await.unwrap().unwrap();
    assert!(matches!(seat.hear().await, FromGate::Hello { .. }));
    // The leader ends the exchange; the gate comes back, by way of the Service.
    drop(seat);
    let mut seat = timeout(SOON, leader.seats.recv()).await.unwrap().unwrap();
    assert!(matches!(seat.hear().await, FromGate::Hello { .. }));
    leader.stop.cancel();
}

#[tokio::test]
async fn adversarial_controller_without_our_certificate_is_not_talked_to() {
    provider();
    let ca = pki::new_ca(SystemTime::now()).unwrap();
    let stranger = pki::new_ca(SystemTime::now()).unwrap();
    let mut controller = controller(&stranger, None).await;
    let _linked = link(&ca, controller.address);
    assert!(
        timeout(Duration::from_millis(400), controller.seats.recv())
            .await
            .is_err()
    );
}

proptest! {
    #[test]
    fn lines_come_whole_however_they_are_cut(
        lines in proptest::collection::vec("[a-z]{0,12}", 0..8),
        size in 1usize..9,
    ) {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let mut reader = LineReader::default();
        let mut seen = Vec::new();
        for piece in text.as_bytes().chunks(size) {
            reader.push(piece).unwrap();
            while let Some(line) = reader.next() {
                seen.push(String::from_utf8(line).unwrap());
            }
        }
        prop_assert_eq!(seen, lines);
    }
}

#[test]
fn adversarial_endless_line_is_refused() {
    let mut reader = LineReader::default();
    assert!(reader.push(&vec![b'x'; MAX_LINE + 1]).is_err());
}

#[test]
fn jitter_stays_in_bounds() {
    for _ in 0..100 {
        let time = jitter(MAX_BACKOFF);
        assert!(time >= MAX_BACKOFF / 2 && time <= MAX_BACKOFF, "{time:?}");
    }
}
