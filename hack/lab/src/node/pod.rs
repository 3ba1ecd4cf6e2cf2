//! What everything that works on one pod shares.

use super::container::Instance;
use super::events::Happening;
use super::fields::NodeFacts;
use super::machine::Machine;
use super::runtime::Runtime;
use super::services::ServiceEntry;
use super::status::PodView;
use super::volumes::Volumes;
use k8s_openapi::api::core::v1::{ContainerStatus, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

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

    /// Whether it sees the node's processes.
    pub fn host_pid(&self) -> bool {
        self.latest().spec.as_ref().and_then(|spec| spec.host_pid) == Some(true)
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

/// The context of a pod that has just been bound.
pub fn context(
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
        volumes: Volumes::new(
            runtime.client.clone(),
            dir.join("volumes"),
            facts.clone(),
            Arc::clone(&node),
        ),
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
