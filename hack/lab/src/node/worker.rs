//! One pod on its node, from the moment it is bound until it is gone.

use super::container::{Order, Outcome, Role, Runner};
use super::machine::Machine;
use super::pod::{Known, PodContext, context};
use super::report;
use super::runtime::Runtime;
use super::services::hosts;
use super::status::is_sidecar;
use super::supervise::told_to_stop;
use super::volumes::VolumeError;
use k8s_openapi::api::core::v1::{Container, PodSpec};
use std::collections::BTreeMap;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Runs one pod to its end. Returns early, with all processes killed, when the node loses power.
pub async fn run(runtime: Arc<Runtime>, node: Arc<Machine>, known: watch::Receiver<Known>) {
    let pod = Arc::clone(&known.borrow().pod);
    let terminal = matches!(
        pod.status.as_ref().and_then(|status| status.phase.as_deref()),
        Some("Succeeded" | "Failed")
    );
    let power = node.power.clone();
    let work = async {
        if terminal {
            return wait_for_deletion_and_delete(&runtime, known).await;
        }
        match node.take_address(&pod) {
            Ok(ip) => {
                let pod = live(Arc::clone(&runtime), Arc::clone(&node), known.clone(), ip.clone());
                Box::pin(pod).await;
                node.give_address(&ip);
                // A pod that has completed stays as an object, without a place on the node.
                wait_for_deletion_and_delete(&runtime, known).await;
            }
            Err((reason, message)) => refuse(runtime, node, known, reason, message).await,
        }
    };
    tokio::select! {
        () = work => {}
        // Dropping the work drops the processes, which kills them.
        () = power.cancelled() => {}
    }
}

/// A pod that the node does not admit: it fails, and stays until somebody deletes it.
async fn refuse(
    runtime: Arc<Runtime>,
    node: Arc<Machine>,
    known: watch::Receiver<Known>,
    reason: &'static str,
    message: String,
) {
    let cx = context(Arc::clone(&runtime), node, known.clone(), String::new());
    cx.event("Warning", reason, message.clone());
    cx.view.send_modify(|view| {
        view.failed = Some((reason.to_owned(), format!("Pod was rejected: {message}")));
        view.ended = true;
    });
    report::once(&cx).await;
    wait_for_deletion_and_delete(&runtime, known).await;
}

async fn wait_for_deletion_and_delete(runtime: &Runtime, mut known: watch::Receiver<Known>) {
    let ended = known
        .wait_for(|known| known.gone || known.pod.metadata.deletion_timestamp.is_some())
        .await;
    let pod = ended
        .ok()
        .filter(|known| !known.gone)
        .map(|known| Arc::clone(&known.pod));
    if let Some(pod) = pod {
        report::delete(&runtime.client, &pod).await;
    }
}

async fn live(runtime: Arc<Runtime>, node: Arc<Machine>, known: watch::Receiver<Known>, ip: String) {
    let cx = context(Arc::clone(&runtime), node, known.clone(), ip);
    let finish = CancellationToken::new();
    let reporter = AbortOnDropHandle::new(tokio::spawn(report::run(Arc::clone(&cx), finish.clone())));
    let (main, sidecars) = (watch::Sender::new(Order::Run), watch::Sender::new(Order::Run));
    let mut known = known;
    {
        let containers = containers(Arc::clone(&cx), &main, &sidecars);
        let mut containers = std::pin::pin!(containers);
        let orders = orders(&cx, &mut known, &main);
        let mut orders = std::pin::pin!(orders);
        tokio::select! {
            () = &mut containers => {}
            // Never returns: it goes on shortening the grace while the containers end.
            () = &mut orders => {}
        }
    }
    cx.view.send_modify(|view| view.ended = true);
    finish.cancel();
    let _ = reporter.await;
    // The logs stay for the person who looks for them; the volumes held secrets.
    let _ = tokio::fs::remove_dir_all(cx.dir.join("volumes")).await;
}

/// Turns what happens to the object into orders for the containers.
async fn orders(cx: &PodContext, known: &mut watch::Receiver<Known>, main: &watch::Sender<Order>) {
    let deadline = cx
        .latest()
        .spec
        .as_ref()
        .and_then(|spec| spec.active_deadline_seconds);
    let deadline = deadline
        .and_then(|s| u64::try_from(s).ok())
        .map(|s| Instant::now() + Duration::from_secs(s));
    let mut expired = false;
    loop {
        let order = {
            let now = known.borrow_and_update();
            // A deletion with no grace shows for a moment as an object that is being deleted.
            if now.gone || now.pod.metadata.deletion_grace_period_seconds == Some(0) {
                Some(Order::Kill)
            } else if now.pod.metadata.deletion_timestamp.is_some() {
                let grace = now.pod.metadata.deletion_grace_period_seconds.unwrap_or(30);
                let grace = Duration::from_secs(u64::try_from(grace).unwrap_or(0));
                Some(Order::Stop(Instant::now() + grace))
            } else {
                None
            }
        };
        if let Some(order) = order {
            main.send_if_modified(|current| {
                let sooner = match (*current, order) {
                    (Order::Kill, _) => false,
                    (_, Order::Kill) | (Order::Run, _) => true,
                    (Order::Stop(before), Order::Stop(after)) => after < before,
                    (Order::Stop(_), Order::Run) => false,
                };
                if sooner {
                    *current = order;
                }
                sooner
            });
        }
        let late = async {
            match deadline.filter(|_| !expired) {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = known.changed() => {
                if changed.is_err() {
                    main.send_replace(Order::Kill);
                    return std::future::pending().await;
                }
            }
            () = late => {
                expired = true;
                let message = "Pod was active on the node longer than the specified deadline".to_owned();
                cx.event("Normal", "DeadlineExceeded", message.clone());
                cx.view.send_modify(|view| view.failed = Some(("DeadlineExceeded".to_owned(), message)));
                main.send_replace(Order::Stop(Instant::now() + cx.grace()));
            }
        }
    }
}

/// Sets the pod up and runs its containers until none is left.
async fn containers(cx: Arc<PodContext>, main: &watch::Sender<Order>, sidecars: &watch::Sender<Order>) {
    let pod = cx.latest();
    let Some(spec) = pod.spec.clone() else { return };
    let mut stop = main.subscribe();
    let volumes = tokio::select! {
        volumes = set_up(&cx) => Arc::new(volumes),
        () = told_to_stop(&mut stop) => return,
    };
    let _refresh = AbortOnDropHandle::new(tokio::spawn(keep_fresh(Arc::clone(&cx))));
    let runner = |container: &Container, role: Role| {
        let orders = if role == Role::Sidecar {
            sidecars.subscribe()
        } else {
            main.subscribe()
        };
        Runner::new(
            Arc::clone(&cx),
            container.clone(),
            role,
            orders,
            Arc::clone(&volumes),
        )
    };
    let mut beside = JoinSet::new();
    if Box::pin(initialise(&cx, &spec, runner, &mut beside, &mut stop)).await {
        let mut running = JoinSet::new();
        for container in &spec.containers {
            // Counted among the node's work: a node is only down when they are.
            running.spawn(cx.node.pods.track_future(runner(container, Role::Main).run()));
        }
        while running.join_next().await.is_some() {}
    }
    // Sidecars serve the others to the end, and then get what is left of the grace.
    let rest = match *main.borrow() {
        Order::Run => Order::Stop(Instant::now() + cx.grace()),
        order => order,
    };
    sidecars.send_replace(rest);
    let mut main = main.subscribe();
    loop {
        tokio::select! {
            next = beside.join_next() => {
                if next.is_none() {
                    return;
                }
            }
            Ok(()) = main.changed() => {
                let order = *main.borrow_and_update();
                sidecars.send_replace(order);
            }
        }
    }
}

/// Runs the init containers in order; false when the pod does not get beyond them.
async fn initialise(
    cx: &Arc<PodContext>,
    spec: &PodSpec,
    runner: impl Fn(&Container, Role) -> Runner,
    beside: &mut JoinSet<Outcome>,
    stop: &mut watch::Receiver<Order>,
) -> bool {
    for container in spec.init_containers.iter().flatten() {
        if is_sidecar(container) {
            beside.spawn(cx.node.pods.track_future(runner(container, Role::Sidecar).run()));
            let mut view = cx.view.subscribe();
            let started = view.wait_for(|view| {
                view.find(&container.name)
                    .is_some_and(|status| status.started == Some(true))
            });
            tokio::select! {
                _ = started => {}
                () = told_to_stop(stop) => return false,
            }
        } else if Box::pin(runner(container, Role::Init).run()).await != Outcome::Succeeded {
            return false;
        }
    }
    true
}

/// The pod's volumes and hosts file, tried until they are there.
async fn set_up(cx: &Arc<PodContext>) -> BTreeMap<String, PathBuf> {
    let mut pause = Duration::from_millis(500);
    loop {
        let problem = match write_hosts(cx).await {
            Err(error) => error.to_string(),
            Ok(()) => match cx.volumes.set_up(&cx.latest()).await {
                Ok(paths) => return paths,
                Err(error) => error.to_string(),
            },
        };
        cx.event("Warning", "FailedMount", problem);
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(8));
    }
}

async fn write_hosts(cx: &PodContext) -> std::io::Result<()> {
    std::fs::create_dir_all(&cx.dir)?;
    let text = hosts(&cx.services().await, &cx.namespace, &cx.hostname(), &cx.ip);
    // In place: containers hold this very file, a new one under the same name they would not see.
    let file = std::fs::File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(cx.hosts_file())?;
    file.write_all_at(text.as_bytes(), 0)?;
    file.set_len(u64::try_from(text.len()).unwrap_or(0))
}

/// Keeps the hosts file and the volumes up to date.
async fn keep_fresh(cx: Arc<PodContext>) {
    let mut services = cx.runtime.services.clone();
    services.mark_changed();
    let mut ticks = tokio::time::interval(cx.runtime.options.volume_refresh);
    ticks.tick().await;
    loop {
        tokio::select! {
            changed = services.changed() => {
                if changed.is_err() {
                    return;
                }
                if let Err(error) = write_hosts(&cx).await {
                    tracing::warn!(pod = cx.name, %error, "writing /etc/hosts");
                }
            }
            _ = ticks.tick() => {
                let refreshed: Result<_, VolumeError> = cx.volumes.set_up(&cx.latest()).await;
                if let Err(error) = refreshed {
                    cx.event("Warning", "FailedMount", error.to_string());
                }
            }
        }
    }
}
