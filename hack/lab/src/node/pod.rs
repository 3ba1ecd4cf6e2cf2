//! One pod on its node, from the moment it is bound until it is gone.

use super::container::{Instance, Order, Outcome, Role, Runner};
use super::events::Happening;
use super::fields::NodeFacts;
use super::machine::Machine;
use super::report;
use super::runtime::Runtime;
use super::services::{ServiceEntry, hosts};
use super::status::{PodView, is_sidecar};
use super::volumes::{VolumeError, Volumes};
use k8s_openapi::api::core::v1::{Container, ContainerStatus, ObjectReference, Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
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

/// What is known of a pod's object.
#[derive(Clone, Debug)]
pub struct Known {
    /// The latest version seen.
    pub pod: Arc<Pod>,
    /// Whether the object is gone.
    pub gone: bool,
}

/// What everything that works on one pod shares.
pub struct PodContext {
    /// Shared parts.
    pub runtime: Arc<Runtime>,
    /// The node it runs on.
    pub node: Arc<Machine>,
    /// Its object, as watched.
    pub known: watch::Receiver<Known>,
    /// What the node knows of it; the status is written from this.
    pub view: watch::Sender<PodView>,
    /// Its volumes.
    pub volumes: Volumes,
    /// Its folder.
    pub dir: PathBuf,
    /// Its address.
    pub ip: String,
    /// What the downward API needs besides the object.
    pub facts: NodeFacts,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// Itself, for Events.
    pub reference: ObjectReference,
}

impl PodContext {
    /// The latest version of the object.
    pub fn latest(&self) -> Arc<Pod> {
        Arc::clone(&self.known.borrow().pod)
    }

    /// How the kubelet names a pod in messages.
    pub fn title(&self) -> String {
        format!("{}_{}({})", self.name, self.namespace, self.uid)
    }

    /// The pod's restart policy.
    pub fn restart_policy(&self) -> &'static str {
        let pod = self.latest();
        match pod.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref()) {
            Some("Never") => "Never",
            Some("OnFailure") => "OnFailure",
            _ => "Always",
        }
    }

    /// The pod's grace period: the one asked for at its deletion, else its own.
    pub fn grace(&self) -> Duration {
        let pod = self.latest();
        let own = pod
            .spec
            .as_ref()
            .and_then(|spec| spec.termination_grace_period_seconds);
        let seconds = pod.metadata.deletion_grace_period_seconds.or(own).unwrap_or(30);
        Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
    }

    /// Whether it has the node's address.
    pub fn host_network(&self) -> bool {
        self.latest().spec.as_ref().and_then(|spec| spec.host_network) == Some(true)
    }

    /// The hostname its containers see.
    pub fn hostname(&self) -> String {
        if self.host_network() {
            return self.node.spec.name.clone();
        }
        let pod = self.latest();
        let wanted = pod.spec.as_ref().and_then(|spec| spec.hostname.clone());
        let mut name = wanted
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| self.name.clone());
        name.truncate(63);
        name.trim_end_matches(['-', '.']).to_owned()
    }

    /// The file behind `/etc/hosts`.
    pub fn hosts_file(&self) -> PathBuf {
        self.dir.join("hosts")
    }

    /// The cluster's Services, once they have been listed.
    pub async fn services(&self) -> Arc<Vec<ServiceEntry>> {
        let mut services = self.runtime.services.clone();
        match services.wait_for(Option::is_some).await {
            Ok(table) => table.clone().unwrap_or_default(),
            Err(_) => Arc::default(),
        }
    }

    /// Changes the status of a container.
    pub fn update_container(&self, name: &str, change: impl FnOnce(&mut ContainerStatus)) {
        self.view.send_modify(|view| {
            if let Some(status) = view.container(name) {
                change(status);
            }
        });
    }

    /// Changes the status of a container if the run called `instance` is still on.
    pub fn update_running(&self, instance: &Instance, change: impl FnOnce(&mut ContainerStatus)) {
        self.view.send_if_modified(|view| {
            let Some(status) = view.container(&instance.container.name) else {
                return false;
            };
            let on = status.state.as_ref().is_some_and(|state| state.running.is_some());
            if !on || status.container_id.as_ref() != Some(&instance.id) {
                return false;
            }
            let before = (status.ready, status.started);
            change(status);
            before != (status.ready, status.started)
        });
    }

    /// Records an Event about the pod.
    pub fn event(&self, kind: &'static str, reason: &'static str, message: String) {
        let node = self.node.spec.name.clone();
        self.runtime.event(Happening {
            object: self.reference.clone(),
            node,
            kind,
            reason,
            message,
        });
    }
}

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
                live(Arc::clone(&runtime), Arc::clone(&node), known, ip.clone()).await;
                node.give_address(&ip);
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

fn context(
    runtime: Arc<Runtime>,
    node: Arc<Machine>,
    known: watch::Receiver<Known>,
    ip: String,
) -> Arc<PodContext> {
    let pod = Arc::clone(&known.borrow().pod);
    let (namespace, name, uid) = (
        pod.namespace().unwrap_or_default(),
        pod.name_any(),
        pod.uid().unwrap_or_default(),
    );
    let mut view = PodView::waiting(&pod);
    view.host_ip.clone_from(&node.ip);
    view.ip = Some(ip.clone()).filter(|ip| !ip.is_empty());
    let before = pod.status.as_ref();
    view.start_time = before
        .and_then(|status| status.start_time.clone())
        .or_else(|| Some(Time(Timestamp::now())));
    // A node that comes back starts its pods again; their earlier runs count.
    for old in before
        .and_then(|status| status.container_statuses.as_ref())
        .into_iter()
        .flatten()
    {
        if let Some(status) = view.container(&old.name).filter(|_| old.container_id.is_some()) {
            status.restart_count = old.restart_count + 1;
        }
    }
    let facts = NodeFacts {
        pod_ip: ip.clone(),
        host_ip: node.ip.clone(),
        cpu: node.spec.cpu.clone(),
        memory: node.spec.memory.clone(),
    };
    let dir = runtime
        .options
        .dir
        .join("pods")
        .join(format!("{namespace}_{name}_{uid}"));
    Arc::new(PodContext {
        volumes: Volumes::new(runtime.client.clone(), dir.join("volumes"), facts.clone()),
        dir,
        view: watch::Sender::new(view),
        reference: ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: Some(name.clone()),
            namespace: Some(namespace.clone()),
            uid: Some(uid.clone()),
            ..ObjectReference::default()
        },
        facts,
        runtime,
        node,
        known,
        ip,
        namespace,
        name,
        uid,
    })
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
    let gone = known.borrow().gone;
    finish.cancel();
    let _ = reporter.await;
    if !gone {
        wait_for_deletion_and_delete(&runtime, known).await;
    }
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
            if now.gone {
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
        () = super::container::told_to_stop(&mut stop) => return,
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
    if initialise(&cx, &spec, runner, &mut beside, &mut stop).await {
        let mut running = JoinSet::new();
        for container in &spec.containers {
            running.spawn(runner(container, Role::Main).run());
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
            beside.spawn(runner(container, Role::Sidecar).run());
            let mut view = cx.view.subscribe();
            let started = view.wait_for(|view| {
                view.find(&container.name)
                    .is_some_and(|status| status.started == Some(true))
            });
            tokio::select! {
                _ = started => {}
                () = super::container::told_to_stop(stop) => return false,
            }
        } else if runner(container, Role::Init).run().await != Outcome::Succeeded {
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
