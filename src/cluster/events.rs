//! Events: what Ebb did and why, in the words of the decision, where `kubectl describe` shows it.
//!
//! Bounded in all directions: a queue that drops when it is full, one writer, and the same words about the same object
//! counted up instead of written again.

use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, Client, Resource, ResourceExt};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::call::{CallError, limited};
use crate::api::names;
use crate::api::workload::WorkloadRef;

/// Events that wait to be written.
const QUEUE: usize = 512;
/// The same words within this time are one event with a count.
const SERIES: Duration = Duration::from_secs(300);
/// The count is written at most this often.
const COUNT_AGAIN: Duration = Duration::from_secs(10);
/// Events whose repetition is remembered.
const REMEMBERED: usize = 1024;
/// Kubernetes refuses longer notes.
const NOTE_LIMIT: usize = 1000;
/// Time for what is still queued at the end.
const DRAIN: Duration = Duration::from_secs(1);

/// One thing to tell.
#[derive(Clone, Debug)]
pub struct Told {
    /// About which object.
    pub regarding: ObjectReference,
    /// `Warning` instead of `Normal`.
    pub warning: bool,
    /// One word, as `Slept`.
    pub reason: &'static str,
    /// The decision's reason.
    pub note: String,
}

/// Tells Events in the background. Cheap to clone; all clones are one.
#[derive(Clone, Debug)]
pub struct Events(mpsc::Sender<Told>);

impl Events {
    /// Starts the writer; it ends with `shutdown`, after a last second for what is queued.
    #[must_use]
    pub fn start(client: Client, instance: String, shutdown: CancellationToken) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let writer = Writer {
            client,
            instance,
            written: HashMap::new(),
        };
        tokio::spawn(writer.run(receiver, shutdown));
        Self(sender)
    }

    /// Tells, without waiting. When too much is queued, it is only logged.
    pub fn tell(&self, told: Told) {
        if self.0.try_send(told).is_err() {
            tracing::debug!("too many Events at once; one was left out");
        }
    }
}

/// A reference to any object, for an Event about it.
pub fn reference<K>(object: &K) -> ObjectReference
where
    K: Resource<DynamicType = ()>,
{
    object.object_ref(&())
}

/// A reference to a workload.
#[must_use]
pub fn workload_reference(workload: &WorkloadRef, uid: &str) -> ObjectReference {
    ObjectReference {
        api_version: Some("apps/v1".to_owned()),
        kind: Some(workload.kind.to_string()),
        namespace: Some(workload.namespace.clone()),
        name: Some(workload.name.clone()),
        uid: Some(uid.to_owned()),
        ..ObjectReference::default()
    }
}

type Key = (String, &'static str, String);

struct Written {
    namespace: String,
    name: String,
    first: Instant,
    counted: Instant,
    count: i32,
}

struct Writer {
    client: Client,
    instance: String,
    written: HashMap<Key, Written>,
}

impl Writer {
    async fn run(mut self, mut receiver: mpsc::Receiver<Told>, shutdown: CancellationToken) {
        loop {
            tokio::select! {
                told = receiver.recv() => match told {
                    Some(told) => self.write(told).await,
                    None => return,
                },
                () = shutdown.cancelled() => break,
            }
        }
        let rest = async {
            receiver.close();
            while let Some(told) = receiver.recv().await {
                self.write(told).await;
            }
        };
        let _ = tokio::time::timeout(DRAIN, rest).await;
    }

    async fn write(&mut self, mut told: Told) {
        if told.note.len() > NOTE_LIMIT {
            told.note = told.note.chars().take(NOTE_LIMIT / 4).chain(['…']).collect();
        }
        let now = Instant::now();
        let uid = told.regarding.uid.clone().unwrap_or_default();
        let name = told.regarding.name.clone().unwrap_or_default();
        let key = (format!("{uid}/{name}"), told.reason, told.note.clone());
        self.written
            .retain(|_, written| now.duration_since(written.first) < SERIES);
        let result = match self.written.get_mut(&key) {
            Some(written) => {
                written.count = written.count.saturating_add(1);
                if now.duration_since(written.counted) < COUNT_AGAIN {
                    return;
                }
                written.counted = now;
                count_up(&self.client, written).await
            }
            None => match self.create(&told).await {
                Ok((namespace, name)) => {
                    if self.written.len() < REMEMBERED {
                        let written = Written {
                            namespace,
                            name,
                            first: now,
                            counted: now,
                            count: 1,
                        };
                        self.written.insert(key, written);
                    }
                    Ok(())
                }
                Err(error) => Err(error),
            },
        };
        if let Err(error) = result {
            tracing::debug!(%error, reason = told.reason, "cannot write an Event");
        }
    }

    async fn create(&self, told: &Told) -> Result<(String, String), CallError> {
        let now = Timestamp::now();
        let namespace = told
            .regarding
            .namespace
            .clone()
            .filter(|namespace| !namespace.is_empty())
            .unwrap_or_else(|| "default".to_owned());
        let event = Event {
            metadata: ObjectMeta {
                namespace: Some(namespace.clone()),
                name: Some(format!(
                    "{}.{:x}",
                    told.regarding.name.as_deref().unwrap_or("ebb"),
                    now.as_nanosecond()
                )),
                ..ObjectMeta::default()
            },
            event_time: Some(MicroTime(now)),
            reporting_controller: Some(names::CONTROLLER.to_owned()),
            reporting_instance: Some(self.instance.clone()),
            action: Some(told.reason.to_owned()),
            reason: Some(told.reason.to_owned()),
            regarding: Some(told.regarding.clone()),
            note: Some(told.note.clone()),
            type_: Some(if told.warning { "Warning" } else { "Normal" }.to_owned()),
            ..Event::default()
        };
        let api: Api<Event> = Api::namespaced(self.client.clone(), &namespace);
        let created = limited(api.create(&PostParams::default(), &event)).await?;
        Ok((namespace, created.name_any()))
    }
}

async fn count_up(client: &Client, written: &Written) -> Result<(), CallError> {
    let api: Api<Event> = Api::namespaced(client.clone(), &written.namespace);
    let patch = json!({"series": {
        "count": written.count,
        "lastObservedTime": MicroTime(Timestamp::now()),
    }});
    limited(api.patch(&written.name, &PatchParams::default(), &Patch::Merge(patch))).await?;
    Ok(())
}
