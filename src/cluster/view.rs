//! One view of the cluster: the reflectors that a process needs, synced before anyone reads them, and one signal
//! that something changed.
//!
//! Objects lose their `managedFields` on the way in; nobody who reads the view needs them, and they are half of it.

use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::reflector::{self, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::api::gpu_node::GpuNode;
use crate::api::names;
use crate::api::node_policy::NodePolicy;
use crate::api::scale_policy::ScalePolicy;

/// Longest wait for the first full list of all kinds.
const SYNC_TIMEOUT: Duration = Duration::from_secs(60);

/// A store of one kind, kept current by a watch.
#[derive(Clone)]
pub struct Kind<K: Resource + Clone + 'static>(pub Store<K>)
where
    K::DynamicType: Hash + Eq + Clone;

impl<K> Kind<K>
where
    K: Resource + Clone + 'static,
    K::DynamicType: Hash + Eq + Clone + Default,
{
    /// The object of that name, if the cluster has it. `namespace` is empty for cluster-scoped kinds.
    #[must_use]
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        let mut key = reflector::ObjectRef::<K>::new(name);
        if !namespace.is_empty() {
            key = key.within(namespace);
        }
        self.0.get(&key)
    }

    /// All objects.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<K>> {
        self.0.state()
    }
}

/// Told of every change of one kind, before [`View::changed`] is raised.
pub type Hook<K> = Box<dyn Fn(&watcher::Event<K>) + Send + Sync>;

/// Starts reflectors, and then waits until all of them have their first full list.
pub struct Builder {
    client: Client,
    shutdown: CancellationToken,
    changed: watch::Sender<u64>,
    synced: Vec<futures::future::BoxFuture<'static, anyhow::Result<()>>>,
}

impl Builder {
    /// A builder without any kind yet.
    #[must_use]
    pub fn new(client: Client, shutdown: CancellationToken) -> Self {
        Self {
            client,
            shutdown,
            changed: watch::Sender::new(0),
            synced: Vec::new(),
        }
    }

    /// Reflects a kind over all namespaces (or the cluster), narrowed by `config`'s selectors.
    pub fn reflect<K>(&mut self, config: watcher::Config, hook: Option<Hook<K>>) -> Kind<K>
    where
        K: Resource + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
        K::DynamicType: Hash + Eq + Clone + Default,
    {
        self.run(Api::all(self.client.clone()), config, hook)
    }

    fn run<K>(&mut self, api: Api<K>, config: watcher::Config, hook: Option<Hook<K>>) -> Kind<K>
    where
        K: Resource + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
        K::DynamicType: Hash + Eq + Clone + Default,
    {
        let (store, writer) = reflector::store();
        let kind = K::kind(&K::DynamicType::default()).into_owned();
        let changed = self.changed.clone();
        let events = watcher(api, config)
            .default_backoff()
            .modify(|object| object.managed_fields_mut().clear())
            .inspect_ok(move |event| {
                if let Some(hook) = &hook {
                    hook(event);
                }
            });
        let shutdown = self.shutdown.clone();
        let label = kind.clone();
        tokio::spawn(async move {
            let reflected = reflector::reflector(writer, events).for_each(|event| {
                match event {
                    Ok(_) => changed.send_modify(|revision| *revision += 1),
                    Err(error) => tracing::warn!(kind = label, %error, "watch broke; it is started again"),
                }
                std::future::ready(())
            });
            tokio::select! {
                () = reflected => {}
                () = shutdown.cancelled() => {}
            }
        });
        let waiter = store.clone();
        self.synced.push(Box::pin(async move {
            tokio::time::timeout(SYNC_TIMEOUT, waiter.wait_until_ready())
                .await
                .ok()
                .and_then(Result::ok)
                .with_context(|| {
                    format!(
                        "no list of {kind} within {} s: check that the CRDs are installed and that the \
                         ServiceAccount may list and watch them",
                        SYNC_TIMEOUT.as_secs()
                    )
                })
        }));
        Kind(store)
    }

    /// Waits for the first full list of every kind, and returns the change signal: its value grows with every change.
    ///
    /// # Errors
    /// Names the kind that did not come within a minute.
    pub async fn synced(self) -> anyhow::Result<watch::Receiver<u64>> {
        futures::future::try_join_all(self.synced).await?;
        Ok(self.changed.subscribe())
    }
}

/// What the controller sees: everything the four decisions are made from.
#[derive(Clone)]
pub struct View {
    /// Deployments of all namespaces.
    pub deployments: Kind<Deployment>,
    /// StatefulSets of all namespaces.
    pub stateful_sets: Kind<StatefulSet>,
    /// Services of all namespaces.
    pub services: Kind<Service>,
    /// EndpointSlices that Ebb wrote.
    pub slices: Kind<EndpointSlice>,
    /// Pods of all namespaces.
    pub pods: Kind<Pod>,
    /// All nodes.
    pub nodes: Kind<Node>,
    /// The agents' inventories.
    pub gpu_nodes: Kind<GpuNode>,
    /// All namespaces.
    pub namespaces: Kind<Namespace>,
    /// All scale policies.
    pub scale_policies: Kind<ScalePolicy>,
    /// All node policies.
    pub node_policies: Kind<NodePolicy>,
    /// Grows with every change of any of them.
    pub changed: watch::Receiver<u64>,
}

/// Hooks for those who keep state of their own from the same watches.
#[derive(Default)]
pub struct Hooks {
    /// Told of pods.
    pub pods: Option<Hook<Pod>>,
    /// Told of nodes.
    pub nodes: Option<Hook<Node>>,
    /// Told of inventories.
    pub gpu_nodes: Option<Hook<GpuNode>>,
}

impl View {
    /// Starts all reflectors and waits until they are synced. They end with `shutdown`.
    ///
    /// # Errors
    /// When a kind cannot be listed.
    pub async fn start(client: Client, hooks: Hooks, shutdown: CancellationToken) -> anyhow::Result<View> {
        let mut builder = Builder::new(client, shutdown);
        let all = watcher::Config::default;
        let ours = watcher::Config::default().labels(&format!(
            "endpointslice.kubernetes.io/managed-by={}",
            names::MANAGED_BY
        ));
        let deployments = builder.reflect(all(), None);
        let stateful_sets = builder.reflect(all(), None);
        let services = builder.reflect(all(), None);
        let slices = builder.reflect(ours, None);
        let pods = builder.reflect(all(), hooks.pods);
        let nodes = builder.reflect(all(), hooks.nodes);
        let gpu_nodes = builder.reflect(all(), hooks.gpu_nodes);
        let namespaces = builder.reflect(all(), None);
        let scale_policies = builder.reflect(all(), None);
        let node_policies = builder.reflect(all(), None);
        let changed = builder.synced().await?;
        Ok(View {
            deployments,
            stateful_sets,
            services,
            slices,
            pods,
            nodes,
            gpu_nodes,
            namespaces,
            scale_policies,
            node_policies,
            changed,
        })
    }
}
