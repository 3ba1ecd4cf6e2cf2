//! The process that holds webhook, extender and reconcilers, and leads by Lease.
//!
//! ```text
//!                 ┌ every replica ─────────────────────────────┐   ┌ the leader ────────────┐
//!  API server ───▶│ 9443 webhook        view (reflectors) ─────┼──▶│ workloads   sleep, n→m │──▶ scale
//!  scheduler ────▶│ 9444 extender  ◀─ ledger ◀┘                │   │ services    slices     │──▶ slices, Services
//!  gates ────────▶│ 9445 link (leads, or says who does) ───────┼──▶│ nodes       release    │──▶ Nodes, provider
//!                 │ 8080 health, metrics                       │   │ waiting     gates      │──▶ pods
//!                 │                                            │   │ policies    adopt      │──▶ annotations
//!                 │                                            │   │ tenants     over-use   │──▶ pods/status
//!                 └────────────────────────────────────────────┘   └────────────────────────┘
//! ```
//!
//! Everything starts in one order: client, certificates, view, servers, Lease. It stops in the other: the reconcilers
//! finish their pass, the Lease is given back, and the servers finish what they have accepted.

mod agents;
mod conditions;
mod facts;
mod gates;
mod headless;
mod link;
mod metrics;
mod nodes;
mod policies;
mod reach;
mod reconcile;
mod services;
mod tenants;
mod tokens;
mod waiting;
mod workloads;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::gates::Gates;
use self::link::LinkServer;
use self::metrics::Metrics;
use self::nodes::Unplaceable;
use self::reconcile::{Context, drive};
use self::tokens::Tokens;
use crate::api::duration::Span;
use crate::api::names;
use crate::cluster::client;
use crate::cluster::clock::Clock;
use crate::cluster::events::Events;
use crate::cluster::ledger_feed::{self, SharedLedger};
use crate::cluster::view::View;
use crate::extender::{self, DeviceNames, Extender};
use crate::serve::certificates::Certificates;
use crate::serve::forward::Forwarder;
use crate::serve::health::{self, Readiness};
use crate::serve::lease::{self, Holder, LeaderState, Leadership};
use crate::serve::{ca_bundle, https};
use crate::webhook;

/// Arguments of the process.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Address of this pod; every server listens on it, and the other replicas find this one by it.
    #[arg(long, env = "POD_IP")]
    pub listen_ip: IpAddr,
    /// Name of this pod.
    #[arg(long, env = "POD_NAME")]
    pub pod_name: String,
    /// Namespace that Ebb runs in.
    #[arg(long, env = "POD_NAMESPACE", default_value = names::NAMESPACE)]
    pub namespace: String,
    /// Port of the admission webhook (TLS).
    #[arg(long, default_value_t = 9443)]
    pub webhook_port: u16,
    /// Port of the scheduler extender (mutual TLS).
    #[arg(long, default_value_t = 9444)]
    pub extender_port: u16,
    /// Port that the gates dial (TLS); the same on every replica.
    #[arg(long, default_value_t = 9445)]
    pub link_port: u16,
    /// How a pod's GPUs are named to its container runtime.
    #[arg(long, env = "EBB_GPU_DEVICE_NAMES", value_enum, default_value_t)]
    pub gpu_device_names: DeviceNames,
    /// Let a GPU take a second pod only when the first is Ready: model servers measure free memory while they load.
    #[arg(long, env = "EBB_ONE_START_PER_GPU", action = clap::ArgAction::Set, default_value_t = true)]
    pub one_start_per_gpu: bool,
    /// A pod that is not Ready for so long keeps others off its GPUs no more.
    #[arg(long, env = "EBB_START_LIMIT", default_value = "10m")]
    pub start_limit: Span,
    /// Port of /healthz, /readyz and /metrics (plain HTTP).
    #[arg(long, default_value_t = 8080)]
    pub health_port: u16,
}

impl Args {
    fn start_limit(&self) -> Option<Duration> {
        self.one_start_per_gpu.then_some(self.start_limit.0)
    }
}

/// After the Lease is given back, endpoints and the webhook's callers get this long to look elsewhere before the servers
/// stop taking connections.
const LINGER: Duration = Duration::from_secs(2);

/// kube-scheduler waits 5 s for an answer; a leader that does not answer sooner is not asked longer.
const FORWARD_LIMIT: Duration = Duration::from_secs(3);
/// Largest answer of the leader's extender that is passed on: 5,000 refused nodes with their reasons fit.
const FORWARD_MAX_ANSWER: usize = 4 << 20;

/// Runs until `shutdown` is cancelled, then finishes what it holds.
///
/// # Errors
/// When it cannot start, with what to do about it.
pub async fn run(args: Args, shutdown: CancellationToken) -> anyhow::Result<()> {
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let lease_metrics = lease::Metrics::new(&mut registry);
    // Watches, writers and servers end only after the Lease is given back, not with the signal.
    let end = CancellationToken::new();
    let _end = end.clone().drop_guard();

    let client = client::connect().await?;
    let clock = Clock::start();
    let ledger = SharedLedger::new(args.start_limit());
    let hooks = ledger_feed::feed(&ledger, clock);
    let starting = async {
        let certificates = Certificates::start(client.clone(), &args.namespace, end.clone())
            .await
            .context("cannot start: certificates")?;
        let view = View::start(client.clone(), hooks, end.clone())
            .await
            .context("cannot start: the view of the cluster")?;
        let runtime_class = webhook::runtime_class::follow(client.clone(), end.clone())
            .await
            .context("cannot start: runtime classes")?;
        let listeners = Listeners::bind(&args).await?;
        anyhow::Ok((certificates, view, runtime_class, listeners))
    };
    let (certificates, view, runtime_class, listeners) = tokio::select! {
        started = starting => started?,
        () = shutdown.cancelled() => return Ok(()),
    };
    tokio::spawn(ca_bundle::keep(client.clone(), certificates.ca(), end.clone()));
    let events = Events::start(client.clone(), args.pod_name.clone(), end.clone());
    let me = Holder {
        pod: args.pod_name.clone(),
        ip: args.listen_ip,
    };
    let stop_leading = CancellationToken::new();
    let (leadership, lease) = Leadership::start(
        client.clone(),
        &args.namespace,
        me,
        lease::Times::default(),
        lease_metrics,
        stop_leading.clone(),
    );
    tokio::spawn(webhook::ownership::keep(
        client.clone(),
        leadership.clone(),
        end.clone(),
    ));
    let context = Context {
        client,
        view,
        gates: Gates::default(),
        events,
        leadership,
        metrics,
        namespace: args.namespace.clone().into(),
        ledger,
        clock,
        since: Instant::now(),
    };
    tokio::spawn(agents::follow(context.clone(), end.clone()));
    let extender_metrics = extender::Metrics::new(&mut registry);
    let extender = extender(&args, &context, &certificates, extender_metrics);
    tokio::spawn(extender::mark_vacancies(extender.clone(), end.clone()));
    let routers = Routers {
        webhook: webhook::router(webhook::Context {
            view: context.view.clone(),
            ledger: context.ledger.clone(),
            namespace: args.namespace.clone(),
            runtime_class,
            metrics: webhook::Metrics::new(&mut registry),
        }),
        extender: extender::router(extender.clone()),
        link: link_router(&args, &context, &end),
    };
    let readiness = Readiness::waiting("starting");
    let mut servers = serve(listeners, routers, &certificates, &end);
    let health = health::serve(
        SocketAddr::new(args.listen_ip, args.health_port),
        readiness.clone(),
        Arc::new(registry),
        end.clone(),
    );
    servers.spawn(async move {
        if let Err(error) = health.await {
            tracing::error!(error = format!("{error:#}"), "health and metrics are not served");
        }
    });
    readiness.ready();
    tracing::info!(ip = %args.listen_ip, "serving");

    lead(context, extender, &shutdown).await;

    readiness.not_ready("stopping");
    stop_leading.cancel();
    lease.await.context("the Lease's keeper failed")?;
    tokio::time::sleep(LINGER).await;
    end.cancel();
    while servers.join_next().await.is_some() {}
    Ok(())
}

/// The ports, listened on before this replica stands for election.
struct Listeners {
    webhook: TcpListener,
    extender: TcpListener,
    link: TcpListener,
}

impl Listeners {
    async fn bind(args: &Args) -> anyhow::Result<Self> {
        let listen = async |port: u16, whom: &str| {
            let address = SocketAddr::new(args.listen_ip, port);
            TcpListener::bind(address)
                .await
                .with_context(|| format!("cannot listen on {address} for {whom}"))
        };
        Ok(Self {
            webhook: listen(args.webhook_port, "admission").await?,
            extender: listen(args.extender_port, "kube-scheduler").await?,
            link: listen(args.link_port, "the gates").await?,
        })
    }
}

/// What is served on them.
struct Routers {
    webhook: Router,
    extender: Router,
    link: Router,
}

fn extender(
    args: &Args,
    context: &Context,
    certificates: &Certificates,
    metrics: extender::Metrics,
) -> Arc<Extender> {
    let service = format!("{}.{}.svc", names::CONTROLLER, args.namespace);
    Extender::new(extender::Parts {
        client: context.client.clone(),
        view: context.view.clone(),
        ledger: context.ledger.clone(),
        leadership: context.leadership.clone(),
        forwarder: Forwarder::new(certificates.client(), service, FORWARD_LIMIT, FORWARD_MAX_ANSWER),
        port: args.extender_port,
        device_names: args.gpu_device_names,
        metrics,
        clock: context.clock,
    })
}

fn link_router(args: &Args, context: &Context, end: &CancellationToken) -> Router {
    link::router(Arc::new(LinkServer {
        gates: context.gates.clone(),
        tokens: Tokens::new(context.client.clone(), &args.namespace),
        leadership: context.leadership.clone(),
        port: args.link_port,
        metrics: context.metrics.clone(),
        shutdown: end.clone(),
    }))
}

fn serve(
    listeners: Listeners,
    routers: Routers,
    certificates: &Certificates,
    end: &CancellationToken,
) -> JoinSet<()> {
    let mut servers = JoinSet::new();
    for (listener, tls, router) in [
        (listeners.webhook, certificates.server(), routers.webhook),
        (listeners.extender, certificates.mutual_server(), routers.extender),
        (listeners.link, certificates.server(), routers.link),
    ] {
        servers.spawn(https::serve_https(
            listener,
            tls,
            router,
            https::Limits::default(),
            end.clone(),
        ));
    }
    servers
}

/// Reconciles whenever this process leads, until `shutdown`.
async fn lead(context: Context, extender: Arc<Extender>, shutdown: &CancellationToken) {
    let mut state = context.leadership.state();
    while !shutdown.is_cancelled() {
        let leading = |state: &LeaderState| matches!(state, LeaderState::Leading { .. });
        tokio::select! {
            result = state.wait_for(leading) => if result.is_err() {
                return;
            },
            () = shutdown.cancelled() => return,
        }
        let stop = CancellationToken::new();
        let context = Context {
            since: Instant::now(),
            ..context.clone()
        };
        let mut reconcilers = reconcilers(&context, &extender, &stop);
        reconcilers.spawn(answer_scheduler(extender.clone(), stop.clone()));
        tokio::select! {
            _ = state.wait_for(|state| !leading(state)) => {}
            () = shutdown.cancelled() => {}
            // None ends by itself, so one that did has failed: leading without it would be worse than not leading.
            ended = reconcilers.join_next() => {
                tracing::error!(?ended, "a reconciler failed; this process ends");
                shutdown.cancel();
            }
        }
        stop.cancel();
        while reconcilers.join_next().await.is_some() {}
    }
}

/// What the extender does as a leader; ends only with `stop`, like the reconcilers.
async fn answer_scheduler(extender: Arc<Extender>, stop: CancellationToken) {
    extender::lead(extender, stop.clone()).await;
    stop.cancelled().await;
}

fn reconcilers(context: &Context, extender: &Arc<Extender>, stop: &CancellationToken) -> JoinSet<()> {
    let mut running = JoinSet::new();
    let unplaceable = Unplaceable::default();
    let (view, gates, metrics) = (&context.view, &context.gates, &context.metrics);
    running.spawn(drive(
        services::Services::new(context.clone()),
        metrics.clone(),
        vec![view.changed.clone(), gates.links_changed()],
        stop.clone(),
    ));
    running.spawn(drive(
        workloads::Workloads::new(context.clone(), unplaceable.clone()),
        metrics.clone(),
        vec![
            view.changed.clone(),
            gates.links_changed(),
            gates.activity_changed(),
            unplaceable.changed(),
        ],
        stop.clone(),
    ));
    running.spawn(drive(
        nodes::Nodes::new(context.clone(), unplaceable),
        metrics.clone(),
        vec![view.changed.clone()],
        stop.clone(),
    ));
    running.spawn(drive(
        waiting::Waiting::new(context.clone(), extender.clone()),
        metrics.clone(),
        vec![view.changed.clone(), context.ledger.freed()],
        stop.clone(),
    ));
    running.spawn(drive(
        policies::Policies::new(context.clone()),
        metrics.clone(),
        vec![view.changed.clone()],
        stop.clone(),
    ));
    running.spawn(drive(
        tenants::Tenants::new(context.clone()),
        metrics.clone(),
        vec![view.changed.clone()],
        stop.clone(),
    ));
    running
}
