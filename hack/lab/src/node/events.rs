//! Events as the kubelet writes them: counted instead of repeated, and bounded.

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use std::collections::{HashMap, VecDeque};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// How many may wait to be written; more are dropped, as nothing waits for an Event.
const QUEUE: usize = 512;
/// How many different Events are remembered for counting.
const REMEMBERED: usize = 2048;
/// How many one object may cause at once; after that one in five minutes, as with the kubelet.
const BURST: f64 = 25.0;
const REFILL: Duration = Duration::from_secs(300);

/// One thing that happened to a pod.
#[derive(Clone, Debug)]
pub struct Happening {
    /// What it happened to.
    pub object: ObjectReference,
    /// The node, which is the source.
    pub node: String,
    /// `Normal` or `Warning`.
    pub kind: &'static str,
    /// The CamelCase reason.
    pub reason: &'static str,
    /// What a person reads.
    pub message: String,
}

/// Takes Events and never waits.
#[derive(Clone, Debug)]
pub struct Recorder {
    queue: mpsc::Sender<Happening>,
}

impl Recorder {
    /// A recorder and the task that writes.
    pub fn new(client: Client) -> (Self, impl Future<Output = ()> + Send) {
        let (queue, receiver) = mpsc::channel(QUEUE);
        (Self { queue }, write(client, receiver))
    }

    /// Records one Event.
    pub fn record(&self, happening: Happening) {
        let _ = self.queue.try_send(happening);
    }
}

#[derive(Debug, PartialEq, Eq, Hash, Clone)]
struct Key {
    uid: String,
    field: Option<String>,
    reason: &'static str,
    message: String,
}

/// What was written already, and what an object may still write.
#[derive(Default)]
struct Memory {
    written: HashMap<Key, (String, i32)>,
    order: VecDeque<Key>,
    budgets: HashMap<String, (f64, Instant)>,
}

impl Memory {
    /// Whether the object `uid` may cause one more Event now.
    fn allow(&mut self, uid: &str, now: Instant) -> bool {
        if self.budgets.len() > REMEMBERED {
            self.budgets.clear();
        }
        let (tokens, since) = self.budgets.entry(uid.to_owned()).or_insert((BURST, now));
        let refill = now.saturating_duration_since(*since).as_secs_f64() / REFILL.as_secs_f64();
        *tokens = (*tokens + refill).min(BURST);
        *since = now;
        if *tokens < 1.0 {
            return false;
        }
        *tokens -= 1.0;
        true
    }

    fn remember(&mut self, key: Key, name: String, count: i32) {
        if self.written.insert(key.clone(), (name, count)).is_none() {
            self.order.push_back(key);
            if self.order.len() > REMEMBERED
                && let Some(oldest) = self.order.pop_front()
            {
                self.written.remove(&oldest);
            }
        }
    }
}

async fn write(client: Client, mut receiver: mpsc::Receiver<Happening>) {
    let mut memory = Memory::default();
    while let Some(happening) = receiver.recv().await {
        let key = Key {
            uid: happening.object.uid.clone().unwrap_or_default(),
            field: happening.object.field_path.clone(),
            reason: happening.reason,
            message: happening.message.clone(),
        };
        if !memory.allow(&key.uid, Instant::now()) {
            continue;
        }
        let namespace = happening
            .object
            .namespace
            .clone()
            .unwrap_or_else(|| "default".to_owned());
        let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
        let now = Time(Timestamp::now());
        if let Some((name, count)) = memory.written.get(&key).cloned() {
            let patch = serde_json::json!({"count": count + 1, "lastTimestamp": now});
            if api
                .patch(&name, &PatchParams::default(), &Patch::Merge(patch))
                .await
                .is_ok()
            {
                memory.remember(key, name, count + 1);
                continue;
            }
            // It has expired: write it anew.
        }
        let event = event(happening, namespace, now);
        match api.create(&PostParams::default(), &event).await {
            Ok(created) => memory.remember(key, created.name_any(), 1),
            // A namespace that is being deleted takes no Events; nothing depends on them.
            Err(error) => tracing::debug!(%error, "writing an event"),
        }
    }
}

fn event(happening: Happening, namespace: String, now: Time) -> Event {
    let Happening {
        object,
        node,
        kind,
        reason,
        message,
    } = happening;
    let unique = now.0.as_nanosecond();
    let name = object.name.clone().unwrap_or_default();
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{name}.{unique:x}")),
            namespace: Some(namespace),
            ..ObjectMeta::default()
        },
        involved_object: object,
        reason: Some(reason.to_owned()),
        message: Some(message),
        type_: Some(kind.to_owned()),
        count: Some(1),
        first_timestamp: Some(now.clone()),
        last_timestamp: Some(now),
        source: Some(EventSource {
            component: Some("kubelet".to_owned()),
            host: Some(node.clone()),
        }),
        reporting_component: Some("kubelet".to_owned()),
        reporting_instance: Some(node),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_object_cannot_flood() {
        let mut memory = Memory::default();
        let allowed = (0..100).filter(|_| memory.allow("a", Instant::now())).count();
        assert_eq!(allowed, 25);
        assert!(memory.allow("b", Instant::now()));
        assert!(memory.allow("a", Instant::now() + REFILL));
    }

    #[tokio::test]
    async fn memory_is_bounded() {
        let mut memory = Memory::default();
        for n in 0..REMEMBERED * 2 {
            let key = Key {
                uid: n.to_string(),
                field: None,
                reason: "Started",
                message: String::new(),
            };
            memory.remember(key, n.to_string(), 1);
        }
        assert_eq!(memory.written.len(), REMEMBERED);
        assert_eq!(memory.order.len(), REMEMBERED);
    }
}
