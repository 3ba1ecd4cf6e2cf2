//! The process that publishes the GPUs of its node.
//!
//! ```text
//! NVML, /proc ──▶ nvml (one thread) ──▶ inventory (pure) ──▶ publish ──▶ GpuNode, Node status, Lease
//! kubelet ──────▶ kubelet ──▶ owners (pure) ──▲  ▲                           │
//!                                                └─── watches of the first two
//! ```
//! The watches matter: the kubelet sets extended resources that it does not know to zero when it registers again,
//! and somebody may delete the `GpuNode`. Both are put right from here. What was published stays when the agent
//! stops: a card does not go away because its reader is being updated. The Lease says for how long that is believed:
//! it is renewed only while NVML is read and what was read is published.

pub mod budget;
mod cgroup;
pub mod inventory;
pub mod kubelet;
mod metrics;
pub mod nvml;
pub mod owners;
pub mod publish;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::runtime::{WatchStreamExt, watcher::watch_object};
use kube::{Client, ResourceExt};
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use self::budget::Budget;
use self::inventory::Observation;
use self::metrics::{Answer, Metrics, Object, Write};
use self::nvml::{GpuReader, NvmlReader};
use self::owners::Holdings;
use self::publish::{Publisher, is_owned_by};
use crate::api::gpu_node::{GpuNode, GpuNodeStatus};
use crate::api::names::{self, GPU_MEMORY};
use crate::api::units::{Bytes, NodeName};
use crate::serve::health::{self, Readiness};

/// A Lease is renewed this often within its duration, so that two that fail in a row close no node.
const RENEWALS: u32 = 4;
/// Readings that may fail to come before the Lease is not renewed any more.
const MISSED_READINGS: u32 = 3;
/// A reading itself may take this long: NVML is slow where no persistence daemon keeps the driver awake.
const SLOWEST_READING: Duration = Duration::from_secs(5);

/// Longest wait for one write.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// First and longest pause after a write that failed.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// Arguments of the process.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of the node this runs on.
    #[arg(long, env = "NODE_NAME")]
    node_name: String,
    /// How often NVML is read. Critical errors are heard of at once.
    #[arg(long, env = "EBB_AGENT_INTERVAL", default_value = "1s", value_parser = interval)]
    interval: Duration,
    /// For how long what is published is believed without another word: of the agent's Lease. At least four intervals.
    #[arg(long, env = "EBB_AGENT_LEASE_DURATION", default_value = "40s", value_parser = lease_duration)]
    lease_duration: Duration,
    /// Namespace that Ebb runs in; the agent's Lease is there.
    #[arg(long, env = "POD_NAMESPACE", default_value = names::NAMESPACE)]
    namespace: String,
    /// The machine's /proc, where a process's cgroup names its pod. A container sees it with `hostPID`.
    #[arg(long, env = "HOST_PROC", default_value = "/proc")]
    proc_path: PathBuf,
    /// The kubelet's PodResources socket, which says what device plugins handed out. Without it that is not verified.
    #[arg(long, env = "EBB_POD_RESOURCES_SOCKET", default_value = kubelet::SOCKET)]
    pod_resources_socket: PathBuf,
    /// How often it is asked.
    #[arg(long, env = "EBB_POD_RESOURCES_INTERVAL", default_value = "10s", value_parser = interval)]
    pod_resources_interval: Duration,
    /// Address for /metrics, /healthz and /readyz.
    #[arg(long, env = "POD_IP", default_value = "0.0.0.0")]
    pod_ip: IpAddr,
    /// Port for /metrics, /healthz and /readyz.
    #[arg(long, default_value_t = 8080)]
    health_port: u16,
}

fn interval(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        parsed if (Duration::from_millis(100)..=Duration::from_secs(60)).contains(&parsed) => Ok(parsed),
        _ => Err("between 100ms and 60s".to_owned()),
    }
}

fn lease_duration(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        parsed if (Duration::from_secs(1)..=Duration::from_secs(300)).contains(&parsed) => Ok(parsed),
        _ => Err("between 1s and 300s".to_owned()),
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    let parsed: jiff::SignedDuration = text.parse().map_err(|error: jiff::Error| error.to_string())?;
    Duration::try_from(parsed).map_err(|error| error.to_string())
}

/// Runs until `shutdown` is cancelled, then finishes what it holds.
///
/// # Errors
/// When it cannot start, with what to do about it.
pub async fn run(args: Args, shutdown: CancellationToken) -> anyhow::Result<()> {
    let client = Client::try_default().await.context(
        "cannot find the API server: run this in a pod with a ServiceAccount, or point KUBECONFIG at a cluster",
    )?;
    let reader = NvmlReader::new(&args.proc_path);
    Box::pin(run_with(args, client, reader, shutdown)).await
}

/// The same with the API server and the GPUs given.
async fn run_with(
    args: Args,
    client: Client,
    reader: impl GpuReader + 'static,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry);
    let readiness = Readiness::waiting("NVML has not been read yet");
    let address = SocketAddr::new(args.pod_ip, args.health_port);
    let health = health::serve(address, readiness.clone(), Arc::new(registry), shutdown.clone());

    let observed = read_on_a_thread(reader, args.interval, shutdown.clone())?;
    let holdings = kubelet::follow(
        args.pod_resources_socket.clone(),
        args.pod_resources_interval,
        shutdown.clone(),
    );
    let node = NodeName::from(args.node_name.as_str());
    let publisher = Publisher::new(client, node, &args.namespace);
    let agent = Agent::new(publisher, metrics, readiness, args.interval, args.lease_duration);
    let published = agent.run(observed, holdings, shutdown.clone());
    tokio::try_join!(health, published).map(|_| ())
}

/// The newest reading, kept current by a thread of its own. The thread ends at the first reading after `shutdown`;
/// nobody waits for it, since a call into a driver that hangs must not keep the process.
fn read_on_a_thread(
    mut reader: impl GpuReader + 'static,
    interval: Duration,
    shutdown: CancellationToken,
) -> anyhow::Result<watch::Receiver<Option<Observation>>> {
    let (sender, receiver) = watch::channel(None);
    let thread = std::thread::Builder::new().name("nvml".to_owned());
    let read = move || {
        reader.run(interval, &mut |observation| {
            sender.send_replace(Some(observation));
            if shutdown.is_cancelled() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
    };
    thread
        .spawn(read)
        .context("cannot start the thread that reads NVML")?;
    Ok(receiver)
}

/// What is known of one object.
enum Seen<K> {
    NotYet,
    Gone,
    There(Box<K>),
}

impl<K: ResourceExt> Seen<K> {
    /// Takes what a watch or the answer to a write says. A watch runs behind one's own writes: what it tells of an
    /// older version of the same object is left aside, or every write would be undone here and done again.
    fn learn(&mut self, object: Option<K>) {
        let Some(object) = object else {
            *self = Self::Gone;
            return;
        };
        if let Self::There(held) = &self
            && held.uid() == object.uid()
            && let (Some(held), Some(told)) = (version(held.as_ref()), version(&object))
            && told < held
        {
            return;
        }
        *self = Self::There(Box::new(object));
    }
}

/// Resource versions of one kind are comparable as numbers.
fn version(object: &impl ResourceExt) -> Option<u128> {
    object.resource_version()?.parse().ok()
}

/// The loop's state.
struct Agent {
    publisher: Publisher,
    metrics: Metrics,
    readiness: Readiness,
    node: Seen<Node>,
    gpu_node: Seen<GpuNode>,
    /// What was decided last; before that, what an earlier agent published.
    known: Option<GpuNodeStatus>,
    /// For inventories in which only used memory moved.
    used_budget: Budget,
    /// For all other inventories: a card that comes and goes must not become a stream of writes.
    inventory_budget: Budget,
    /// How old a reading may be, for the Lease to be renewed on it.
    reading_lasts: Duration,
    read_at: Option<Instant>,
    lease_duration: Duration,
    /// When the Lease is due.
    renew_at: Option<Instant>,
    /// For the node's figure: should somebody else set it too, this bounds the quarrel.
    node_budget: Budget,
    retry: Duration,
    not_before: Option<Instant>,
}

impl Agent {
    fn new(
        publisher: Publisher,
        metrics: Metrics,
        readiness: Readiness,
        interval: Duration,
        lease_duration: Duration,
    ) -> Self {
        Self {
            publisher,
            metrics,
            readiness,
            node: Seen::NotYet,
            gpu_node: Seen::NotYet,
            known: None,
            used_budget: Budget::new(10, Duration::from_secs(2)),
            inventory_budget: Budget::new(10, Duration::from_secs(2)),
            reading_lasts: interval * MISSED_READINGS + SLOWEST_READING,
            read_at: None,
            lease_duration: lease_duration.max(interval * RENEWALS),
            renew_at: None,
            node_budget: Budget::new(10, Duration::from_secs(2)),
            retry: RETRY.0,
            not_before: None,
        }
    }

    async fn run(
        mut self,
        mut observed: watch::Receiver<Option<Observation>>,
        mut holdings: watch::Receiver<Option<Holdings>>,
        shutdown: CancellationToken,
    ) -> anyhow::Result<()> {
        let name = self.publisher.name().to_owned();
        let nodes = watch_object(self.publisher.nodes.clone(), &name).default_backoff();
        let gpu_nodes = watch_object(self.publisher.gpu_nodes.clone(), &name).default_backoff();
        let (mut nodes, mut gpu_nodes) = (std::pin::pin!(nodes), std::pin::pin!(gpu_nodes));
        let mut wake: Option<Instant> = None;
        loop {
            let overdue = self.read_at.map(|at| at + self.reading_lasts);
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                Some(event) = nodes.next() => match event {
                    Ok(node) => self.node.learn(node),
                    Err(error) => self.watch_failed("its Node", &error),
                },
                Some(event) = gpu_nodes.next() => match event {
                    Ok(gpu_node) => self.gpu_node.learn(gpu_node),
                    Err(error) => self.watch_failed("its GpuNode", &error),
                },
                changed = observed.changed() => {
                    changed.context("the thread that reads NVML ended")?;
                    self.read_at = Some(Instant::now());
                    if let Some(observation) = &*observed.borrow() {
                        self.metrics.observe(observation);
                    }
                }
                changed = holdings.changed() => changed.context("nobody asks the kubelet any more")?,
                () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {}
                () = sleep_until(overdue.unwrap_or_else(Instant::now)), if overdue.is_some() => {
                    self.silent_driver();
                    continue;
                }
            }
            let (observation, holdings) = (observed.borrow().clone(), holdings.borrow().clone());
            // Before the kubelet was asked, a card that it closed would be open for a moment.
            let (Some(observation), Some(holdings)) = (observation, holdings) else {
                continue;
            };
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                next = self.step(&observation, &holdings, Instant::now()) => wake = next,
            }
        }
    }

    /// A reading is overdue: said once, and again when it happens again.
    fn silent_driver(&mut self) {
        self.read_at = None;
        let message = format!(
            "no reading for {} ms: a call into NVIDIA's driver hangs, and new pods go elsewhere until it returns; look \
             at the kernel's log, and restart the node if it does not",
            self.reading_lasts.as_millis()
        );
        tracing::warn!("{message}");
        self.readiness.not_ready(&message);
    }

    fn watch_failed(&self, what: &str, error: &kube::runtime::watcher::Error) {
        tracing::warn!(%error, "cannot watch {what}; trying again");
        self.readiness.not_ready(&format!("cannot watch {what}: {error}"));
    }

    /// Brings what is published to what was read. Says when to come back although nothing happened.
    async fn step(&mut self, observed: &Observation, holdings: &Holdings, now: Instant) -> Option<Instant> {
        match self.node {
            // A watch that fails says so itself.
            Seen::NotYet => return None,
            Seen::Gone => {
                let name = self.publisher.name();
                self.readiness
                    .not_ready(&format!("there is no Node {name} (yet)"));
                return None;
            }
            Seen::There(_) => {}
        }
        let published = match &self.gpu_node {
            Seen::NotYet => return None,
            Seen::Gone => None,
            Seen::There(gpu_node) => Some(gpu_node),
        };
        let published_status = published.and_then(|gpu_node| gpu_node.status.as_ref());
        let known = match &self.known {
            Some(known) => known.clone(),
            None => published_status.cloned().unwrap_or_default(),
        };
        let mut wanted = inventory::status(observed, holdings, &known, Timestamp::now());
        wanted.lease = Some(self.publisher.lease_name().to_owned());
        self.known = Some(wanted.clone());
        self.metrics.observe_pods(&wanted);
        if let Some(not_before) = self.not_before.filter(|at| *at > now) {
            return Some(not_before);
        }

        match self.publish(&wanted, now).await {
            Ok(wake) => {
                self.retry = RETRY.0;
                match observed {
                    Ok(_) => self.readiness.ready(),
                    Err(absent) => self.readiness.not_ready(&absent.message),
                }
                wake
            }
            Err(failure) => {
                let pause = self.retry;
                self.retry = (self.retry * 2).min(RETRY.1);
                tracing::warn!(failure, ?pause, "trying again later");
                self.readiness.not_ready(&failure);
                self.not_before = Some(now + pause);
                self.not_before
            }
        }
    }

    /// The inventory first: the scheduler must not see room on a node whose cards nobody has described.
    async fn publish(&mut self, wanted: &GpuNodeStatus, now: Instant) -> Result<Option<Instant>, String> {
        let inventory = self.publish_inventory(wanted, now).await?;
        let figure = self.publish_figure(inventory::capacity(wanted), now).await?;
        self.renew(now).await?;
        Ok(inventory.into_iter().chain(figure).min())
    }

    async fn publish_inventory(
        &mut self,
        wanted: &GpuNodeStatus,
        now: Instant,
    ) -> Result<Option<Instant>, String> {
        let Seen::There(node) = &self.node else {
            return Ok(None);
        };
        let published = match &self.gpu_node {
            Seen::There(gpu_node) => Some(gpu_node),
            Seen::NotYet | Seen::Gone => None,
        };
        let owned = published.is_some_and(|gpu_node| is_owned_by(gpu_node, node));
        let status = published.and_then(|gpu_node| gpu_node.status.as_ref());
        let Some(change) = inventory::change(wanted, status.filter(|_| owned)) else {
            return Ok(None);
        };
        let budget = if change.only_used {
            &mut self.used_budget
        } else {
            &mut self.inventory_budget
        };
        if let Err(later) = budget.take(now) {
            return Ok(Some(later));
        }
        let written = bounded(async {
            if !owned {
                self.publisher.create(node).await?;
            }
            self.publisher.inventory(wanted).await
        })
        .await;
        self.count(Object::GpuNode, written.is_ok());
        match written {
            Ok(gpu_node) => {
                tracing::info!(reason = change.reason, "inventory published");
                self.gpu_node.learn(Some(gpu_node));
                Ok(None)
            }
            Err(error) => {
                // Deleted under us: the watch may be late in saying so.
                if matches!(&error, WriteError::Refused(kube::Error::Api(status)) if status.code == 404) {
                    self.gpu_node = Seen::Gone;
                }
                Err(format!("cannot write the GpuNode: {error}"))
            }
        }
    }

    async fn publish_figure(&mut self, wanted: Bytes, now: Instant) -> Result<Option<Instant>, String> {
        let Seen::There(node) = &self.node else {
            return Ok(None);
        };
        let status = node.status.as_ref();
        let capacity = figure(status.and_then(|status| status.capacity.as_ref()));
        let allocatable = figure(status.and_then(|status| status.allocatable.as_ref()));
        let Some(reason) = inventory::node_change(wanted, capacity, allocatable) else {
            return Ok(None);
        };
        if let Err(later) = self.node_budget.take(now) {
            return Ok(Some(later));
        }
        let written = bounded(self.publisher.capacity(wanted)).await;
        self.count(Object::Node, written.is_ok());
        match written {
            Ok(node) => {
                tracing::info!(reason, bytes = wanted.0, "the Node's {GPU_MEMORY} written");
                self.node.learn(Some(node));
                Ok(None)
            }
            Err(error) => Err(format!("cannot write the Node's {GPU_MEMORY}: {error}")),
        }
    }

    /// Says that what is published is true now. Not while readings fail to come: a call into a driver that hangs is no
    /// reading.
    async fn renew(&mut self, now: Instant) -> Result<(), String> {
        let Seen::There(node) = &self.node else {
            return Ok(());
        };
        let fresh = self
            .read_at
            .is_some_and(|at| now.duration_since(at) <= self.reading_lasts);
        if !fresh || self.renew_at.is_some_and(|at| at > now) {
            return Ok(());
        }
        let written = bounded(self.publisher.renew(node, self.lease_duration)).await;
        self.count(Object::Lease, written.is_ok());
        written
            .map_err(|error| format!("cannot renew the Lease {}: {error}", self.publisher.lease_name()))?;
        self.renew_at = Some(now + self.lease_duration / RENEWALS);
        Ok(())
    }

    fn count(&self, object: Object, ok: bool) {
        let ok = if ok { Answer::Yes } else { Answer::No };
        self.metrics.writes.get_or_create(&Write { object, ok }).inc();
    }
}

fn figure(quantities: Option<&BTreeMap<String, Quantity>>) -> Option<&str> {
    Some(quantities?.get(GPU_MEMORY)?.0.as_str())
}

/// A write that does not take for ever.
async fn bounded<T>(write: impl Future<Output = kube::Result<T>>) -> Result<T, WriteError> {
    Ok(timeout(WRITE_TIMEOUT, write).await??)
}

/// Why a write did not happen.
#[derive(Debug, thiserror::Error)]
enum WriteError {
    #[error(transparent)]
    Refused(#[from] kube::Error),
    #[error("no answer from the API server within {} s", WRITE_TIMEOUT.as_secs())]
    NoAnswer(#[from] tokio::time::error::Elapsed),
}
