//! Which pod was bound when, as a watch of the API server tells. Pods that are not bound are not even sent.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt as _};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::ebb_install::MODELS;

/// Follows the bound pods of the models' namespace from now on.
pub struct BindWatch {
    seen: Arc<Mutex<BTreeMap<String, Instant>>>,
    count: watch::Receiver<usize>,
    _task: AbortOnDropHandle<()>,
}

impl BindWatch {
    /// Starts to follow.
    #[must_use]
    pub fn start(client: &Client) -> Self {
        let seen: Arc<Mutex<BTreeMap<String, Instant>>> = Arc::default();
        let (told, count) = watch::channel(0);
        let pods = Api::<Pod>::namespaced(client.clone(), MODELS);
        let bound = watcher::Config::default().fields("spec.nodeName!=");
        let shared = Arc::clone(&seen);
        let task = tokio::spawn(async move {
            let mut pods = watcher(pods, bound).default_backoff().applied_objects().boxed();
            while let Some(pod) = pods.next().await {
                let Ok(pod) = pod else { continue };
                let now = Instant::now();
                let mut seen = shared.lock().unwrap_or_else(PoisonError::into_inner);
                seen.entry(pod.uid().unwrap_or_default()).or_insert(now);
                told.send_replace(seen.len());
            }
        });
        Self {
            seen,
            count,
            _task: AbortOnDropHandle::new(task),
        }
    }

    /// How many have been seen.
    #[must_use]
    pub fn count(&self) -> usize {
        *self.count.borrow()
    }

    /// When each was bound, in order.
    #[must_use]
    pub fn times(&self) -> Vec<Instant> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut times: Vec<Instant> = seen.values().copied().collect();
        times.sort();
        times
    }

    /// Waits until so many have been seen.
    ///
    /// # Errors
    /// When they are not within `limit`; says how many were.
    pub async fn reach(&self, pods: usize, limit: Duration) -> anyhow::Result<()> {
        let mut count = self.count.clone();
        let reached = tokio::time::timeout(limit, count.wait_for(|count| *count >= pods)).await;
        let reached = reached.with_context(|| {
            format!(
                "{} of {pods} pods were bound within {} s",
                self.count(),
                limit.as_secs()
            )
        })?;
        reached.context("the watch of bound pods ended").map(drop)
    }
}
