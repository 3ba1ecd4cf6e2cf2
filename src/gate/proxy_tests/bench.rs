//! A gate on loopback for tests: a scaler that counts, a table made by hand, backends that answer as told.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::super::listener::Listeners;
use super::super::metrics::Metrics;
use super::super::probe::Checks;
use super::super::state::Gate;
use super::super::table::{Facts, Route, Table};
use super::super::wake::{Scale, ScaleError, Scaler};
use crate::api::units::{Bytes, PodUid};
use crate::api::workload::{WorkloadKind, WorkloadRef};
use crate::plan::hold::{Limits, Seen, SeenPod, Target};

pub(super) const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// For what must come; correctness only.
pub(super) const SOON: Duration = Duration::from_secs(20);

/// Counts wakes.
#[derive(Default)]
pub(super) struct Counting {
    pub(super) raised: AtomicU32,
}

impl Scaler for Counting {
    fn read<'a>(&'a self, _: &'a WorkloadRef) -> BoxFuture<'a, Result<Scale, ScaleError>> {
        Box::pin(async {
            Ok(Scale {
                replicas: self.raised.load(Ordering::SeqCst),
                version: "2".to_owned(),
            })
        })
    }

    fn raise<'a>(
        &'a self,
        _: &'a WorkloadRef,
        _: &'a str,
        _: u32,
    ) -> BoxFuture<'a, Result<Scale, ScaleError>> {
        self.raised.fetch_add(1, Ordering::SeqCst);
        self.read_boxed()
    }
}

impl Counting {
    fn read_boxed(&self) -> BoxFuture<'_, Result<Scale, ScaleError>> {
        Box::pin(async {
            Ok(Scale {
                replicas: 1,
                version: "3".to_owned(),
            })
        })
    }
}

pub(super) struct Bench {
    pub(super) gate: Arc<Gate>,
    pub(super) scaler: Arc<Counting>,
    _listeners: Listeners,
    pub(super) stop: CancellationToken,
    pub(super) port: u16,
    pub(super) limits: Limits,
    pub(super) max_wait: Duration,
    pub(super) zero: Option<u64>,
}

pub(super) fn workload() -> WorkloadRef {
    WorkloadRef {
        kind: WorkloadKind::Deployment,
        namespace: "models".to_owned(),
        name: "m".to_owned(),
    }
}

impl Bench {
    pub(super) async fn start() -> Bench {
        let scaler = Arc::new(Counting::default());
        let metrics = Metrics::new(&mut Registry::default());
        let gate = Gate::new(scaler.clone(), metrics);
        let stop = CancellationToken::new();
        let listeners = Listeners::new(gate.clone(), LOOPBACK, 1000, stop.clone());
        let free = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        assert!(listeners.apply(&BTreeSet::from([port])).await.is_empty());
        Bench {
            gate,
            scaler,
            _listeners: listeners,
            stop,
            port,
            limits: Limits {
                queue_requests: 1000,
                queue_bytes: Bytes(1 << 20),
                target_in_flight: 32,
            },
            max_wait: Duration::from_secs(60),
            zero: None,
        }
    }

    /// Shows the gate this scale and these ready replicas, all at `target`.
    pub(super) fn show(&mut self, desired: u32, target: u16, replicas: &[(&str, Ipv4Addr)]) {
        if desired == 0 {
            self.zero = Some(self.zero.unwrap_or(0) + 10);
        }
        let pods: Vec<SeenPod> = replicas
            .iter()
            .map(|(uid, ip)| SeenPod {
                uid: PodUid::from(*uid),
                ip: Some(IpAddr::V4(*ip)),
                version: Some(self.zero.unwrap_or(0) + 5),
                terminating: false,
                ready: true,
                ports: BTreeMap::new(),
            })
            .collect();
        let facts = Facts {
            checks: pods
                .iter()
                .map(|pod| (pod.uid.clone(), Arc::new(Checks::Kubelet)))
                .collect(),
            seen: Seen {
                desired,
                zero_version: self.zero,
                settled: true,
                wakeable: true,
                limits: self.limits,
                pods,
            },
            resource_version: "1".to_owned(),
            wake_to: 1,
            max_wait: self.max_wait,
        };
        self.gate.set_table(Table {
            routes: BTreeMap::from([(
                self.port,
                Route {
                    service: "models/m".to_owned(),
                    target: Target::Number(target),
                    to: Ok(workload()),
                },
            )]),
            workloads: BTreeMap::from([(workload(), Arc::new(facts))]),
        });
    }

    pub(super) fn show_one(&mut self, desired: u32, backend: SocketAddr) {
        self.show(desired, backend.port(), &[("pod-1", Ipv4Addr::LOCALHOST)]);
    }

    pub(super) async fn connect(&self) -> TcpStream {
        TcpStream::connect((LOOPBACK, self.port)).await.unwrap()
    }

    pub(super) async fn send(&self, text: &str) -> TcpStream {
        let mut stream = self.connect().await;
        stream.write_all(text.as_bytes()).await.unwrap();
        stream
    }

    /// Sends, closes nothing, and reads until the gate closes.
    pub(super) async fn exchange(&self, text: &str) -> String {
        let mut stream = self.send(text).await;
        let mut answer = Vec::new();
        timeout(SOON, stream.read_to_end(&mut answer))
            .await
            .unwrap()
            .unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }

    pub(super) fn counts(&self) -> (u32, u32) {
        let (activity, _) = self.gate.door(&workload()).activity();
        (activity.in_flight, activity.queued)
    }

    pub(super) async fn until_counts(&self, wanted: (u32, u32)) {
        timeout(SOON, async {
            while self.counts() != wanted {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await
        .unwrap_or_else(|_| panic!("counts are {:?}, not {wanted:?}", self.counts()));
    }
}

pub(super) const GET: &str = "GET /x HTTP/1.1\r\nhost: model\r\nconnection: close\r\n\r\n";

pub(super) async fn read_until(stream: &mut TcpStream, end: &str) -> String {
    let mut seen = Vec::new();
    timeout(SOON, async {
        let mut byte = [0];
        while !seen.ends_with(end.as_bytes()) {
            assert_eq!(
                stream.read(&mut byte).await.unwrap(),
                1,
                "closed after {:?}",
                String::from_utf8_lossy(&seen)
            );
            seen.push(byte[0]);
        }
    })
    .await
    .unwrap_or_else(|_| panic!("no {end:?}, only {:?}", String::from_utf8_lossy(&seen)));
    String::from_utf8(seen).unwrap()
}

pub(super) async fn backend() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Answers every request on every connection with `answer`, and hands out the heads.
pub(super) fn answering(
    listener: TcpListener,
    answer: &'static str,
) -> tokio::sync::mpsc::UnboundedReceiver<String> {
    let (heads, seen) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let heads = heads.clone();
            tokio::spawn(async move {
                loop {
                    let mut head = Vec::new();
                    let mut byte = [0];
                    while !head.ends_with(b"\r\n\r\n") {
                        if stream.read(&mut byte).await.unwrap_or(0) == 0 {
                            return;
                        }
                        head.push(byte[0]);
                    }
                    let _ = heads.send(String::from_utf8_lossy(&head).into_owned());
                    stream.write_all(answer.as_bytes()).await.unwrap();
                }
            });
        }
    });
    seen
}

pub(super) const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

pub(super) async fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).await.unwrap_or(0) == 0 {
            return String::new();
        }
        head.push(byte[0]);
    }
    String::from_utf8_lossy(&head).into_owned()
}
