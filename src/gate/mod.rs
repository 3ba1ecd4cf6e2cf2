//! The process that takes the traffic, counts it, and holds it while a model wakes.
//!
//! The way of a request:
//!
//! | file | what happens there |
//! |---|---|
//! | [`listener`] | it comes in on a gate port |
//! | [`table`] | the port names its workload |
//! | [`proxy`] | its life from there on |
//! | [`hold`] | it is let in or waits ([`crate::plan::hold`] decides) |
//! | [`wake`] | the workload is scaled up from 0 |
//! | [`probe`], [`replicas`] | its new pod is asked until it answers |
//! | [`upstream`], [`body`], [`headers`] | it goes to a replica, and the answer streams back |
//! | [`problem`] | or it is told why not |
//! | [`link`] | the controller hears of it |
//! | [`fail_open`] | what a gate leaves behind when it stops |

pub mod body;
pub mod fail_open;
pub mod headers;
pub mod hold;
pub mod link;
pub mod listener;
pub mod metrics;
pub mod probe;
pub mod problem;
pub mod proxy;
#[cfg(test)]
mod proxy_tests;
mod replicas;
pub mod state;
pub mod table;
mod tcp;
pub mod upstream;
pub mod wake;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use kube::runtime::watcher;
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::api::duration::Span;
use crate::api::names;
use crate::cluster::client;
use crate::cluster::view::{Builder, Kind};
use crate::serve::health::{self, Readiness};

use fail_open::Sight;
use listener::Listeners;
use metrics::Metrics;
use state::Gate;
use table::{Objects, Tables, Zeros};
use wake::KubeScaler;

/// A burst of watch events becomes one table.
const TABLE_INTERVAL: Duration = Duration::from_millis(2);
/// Until a gate port that could not be listened on is tried again.
const LISTEN_AGAIN: Duration = Duration::from_secs(1);
const SWEEP: Duration = Duration::from_secs(2);
/// Longest time that leaving the slices may take.
const LEAVE_LIMIT: Duration = Duration::from_secs(10);

/// Longest wait for the link to end in order.
const GOODBYE: Duration = Duration::from_secs(1);

/// Arguments of the process.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Address to listen on, which EndpointSlices point at: the pod's.
    #[arg(long, env = "POD_IP")]
    listen_ip: IpAddr,
    /// Name of this pod.
    #[arg(long, env = "POD_NAME")]
    pod_name: String,
    /// Namespace of this pod.
    #[arg(long, env = "POD_NAMESPACE", default_value = names::NAMESPACE)]
    namespace: String,
    /// `HOST:PORT` of the controller's link.
    #[arg(long, default_value = "ebb-controller.ebb-system.svc:9445")]
    controller: String,
    /// Name that the controller's certificate carries.
    #[arg(long, default_value = "ebb-controller.ebb-system.svc")]
    controller_name: String,
    /// CA of the controller's certificate.
    #[arg(long, default_value = "/etc/ebb-ca/ca.crt")]
    ca_file: PathBuf,
    /// ServiceAccount token with audience `ebb`.
    #[arg(long, default_value = "/var/run/secrets/ebb/token")]
    token_file: PathBuf,
    /// Port of /healthz, /readyz and /metrics.
    #[arg(long, default_value_t = 8080)]
    health_port: u16,
    /// Client connections at the same time; more wait in the kernel.
    #[arg(long, default_value_t = 20_000)]
    max_connections: usize,
    /// When told to stop: time until nobody sends new connections here any more.
    #[arg(long, default_value = "1500ms")]
    settle: Span,
    /// When told to stop: longest time to finish what is held and in flight. The pod's
    /// terminationGracePeriodSeconds must be longer.
    #[arg(long, default_value = "5m")]
    drain: Span,
}

/// Runs until `shutdown` is cancelled, then finishes what it holds.
///
/// # Errors
/// When it cannot start, with what to do about it.
pub async fn run(args: Args, shutdown: CancellationToken) -> anyhow::Result<()> {
    let client = client::connect().await?;
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let readiness = Readiness::waiting("reading the cluster");
    // Everything but the listeners goes on while the rest is finished.
    let done = CancellationToken::new();
    let _done_at_last = done.clone().drop_guard();
    let address = SocketAddr::new(args.listen_ip, args.health_port);
    let mut health = tokio::spawn(health::serve(
        address,
        readiness.clone(),
        Arc::new(registry),
        done.clone(),
    ));

    let zeros = Zeros::default();
    let mut builder = Builder::new(client.clone(), done.clone());
    let watched = watch_cluster(&mut builder, &zeros);
    let changed = tokio::select! {
        () = shutdown.cancelled() => return Ok(()),
        stopped = &mut health => return stopped.context("the health server")?,
        synced = builder.synced() => synced?,
    };
    let gate = Gate::new(Arc::new(KubeScaler(client.clone())), metrics);
    let stop_accepting = CancellationToken::new();
    let listeners = Arc::new(Listeners::new(
        gate.clone(),
        args.listen_ip,
        args.max_connections,
        stop_accepting.clone(),
    ));
    let sight = watched.sight.clone();
    let table = keep_table(
        gate.clone(),
        listeners.clone(),
        watched,
        Tables::new(zeros),
        changed,
        readiness.clone(),
    );
    tokio::spawn(until(done.clone(), table));
    tokio::spawn(until(done.clone(), sweep(gate.clone())));
    let link = tokio::spawn(link::run(
        gate.clone(),
        listeners,
        link::Config {
            controller: args.controller,
            server_name: args.controller_name,
            ca_file: args.ca_file,
            token_file: args.token_file,
            pod: args.pod_name.clone(),
            ip: args.listen_ip,
        },
        link::Ends {
            stopping: shutdown.clone(),
            done: done.clone(),
        },
    ));
    tracing::info!(pod = args.pod_name, namespace = args.namespace, ip = %args.listen_ip, "gate started");
    tokio::select! {
        () = shutdown.cancelled() => {}
        stopped = &mut health => return stopped.context("the health server")?,
    }

    readiness.not_ready("stopping");
    let leave = fail_open::leave(&client, &sight, args.listen_ip);
    if tokio::time::timeout(LEAVE_LIMIT, leave).await.is_err() {
        tracing::warn!("could not leave all slices in time; the controller does it when the pod is gone");
    }
    tokio::time::sleep(args.settle.0).await;
    stop_accepting.cancel();
    gate.tracker.close();
    let left = gate.tracker.len();
    tracing::info!(connections = left, "no longer accepting; finishing what is open");
    if tokio::time::timeout(args.drain.0, gate.tracker.wait())
        .await
        .is_err()
    {
        tracing::warn!(
            connections = gate.tracker.len(),
            reason = format!("--drain is {}", args.drain),
            "cutting what is still open"
        );
    }
    done.cancel();
    let _ = tokio::time::timeout(GOODBYE, link).await;
    Ok(())
}

struct Watched {
    sight: Sight,
    deployments: Kind<Deployment>,
    stateful_sets: Kind<StatefulSet>,
}

fn watch_cluster(builder: &mut Builder, zeros: &Zeros) -> Watched {
    let ours = watcher::Config::default().labels(&format!(
        "endpointslice.kubernetes.io/managed-by={}",
        names::MANAGED_BY
    ));
    let all = watcher::Config::default;
    Watched {
        sight: Sight {
            slices: builder.reflect(ours, None),
            services: builder.reflect(all(), None),
            pods: builder.reflect(all(), None),
        },
        deployments: builder.reflect(all(), Some(zeros.hook())),
        stateful_sets: builder.reflect(all(), Some(zeros.hook())),
    }
}

/// Makes the routing table anew whenever the view changes, and starts and stops listeners with it.
async fn keep_table(
    gate: Arc<Gate>,
    listeners: Arc<Listeners>,
    watched: Watched,
    mut tables: Tables,
    mut changed: watch::Receiver<u64>,
    readiness: Readiness,
) {
    let mut first = true;
    loop {
        changed.mark_unchanged();
        let objects = Objects {
            services: watched.sight.services.all(),
            deployments: watched.deployments.all(),
            stateful_sets: watched.stateful_sets.all(),
            pods: watched.sight.pods.all(),
        };
        let table = tables.build(&objects);
        let ports: BTreeSet<u16> = table.routes.keys().copied().collect();
        gate.set_table(table);
        let failed = listeners.apply(&ports).await;
        if std::mem::take(&mut first) {
            tracing::info!(ports = ports.len(), "ready");
            readiness.ready();
        }
        tokio::time::sleep(TABLE_INTERVAL).await;
        let again = async {
            if failed.is_empty() {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(LISTEN_AGAIN).await;
        };
        tokio::select! {
            more = changed.changed() => if more.is_err() { return },
            () = again => {}
        }
    }
}

async fn sweep(gate: Arc<Gate>) {
    loop {
        tokio::time::sleep(SWEEP).await;
        gate.pool.sweep();
    }
}

async fn until(done: CancellationToken, work: impl Future<Output = ()>) {
    tokio::select! {
        () = done.cancelled() => {}
        () = work => {}
    }
}
