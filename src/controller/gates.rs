//! What the gates have told: one link each, the numbers of every workload, and the holds under way.
//!
//! A link that is lost takes its numbers with it. What stays is when each workload was last seen to be active, so that
//! a gate's death never makes a workload look idle.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::api::workload::WorkloadRef;
use crate::link::{Activity, ToGate};
use crate::plan::sleep::{GateFacts, Load};

/// Messages that may wait for one gate; one that does not read them loses its link.
const QUEUE: usize = 1024;
/// Gates that may have a link.
const MAX_LINKS: usize = 256;
/// Workloads that one gate may tell of.
const MAX_WORKLOADS: usize = 20_000;

/// Names one link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId(u64);

/// All links. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Gates(Arc<Shared>);

struct Shared {
    inner: Mutex<Inner>,
    links: watch::Sender<u64>,
    activity: watch::Sender<u64>,
}

#[derive(Default)]
struct Inner {
    next: u64,
    links: BTreeMap<LinkId, Link>,
    holds: HashMap<u64, Hold>,
    active: HashMap<WorkloadRef, Instant>,
}

struct Link {
    pod: String,
    ip: IpAddr,
    ports: Arc<BTreeSet<u16>>,
    stopping: bool,
    reported: bool,
    loads: HashMap<WorkloadRef, Told>,
    sender: mpsc::Sender<ToGate>,
}

#[derive(Clone, Copy)]
struct Told {
    in_flight: u32,
    queued: u32,
    last: Option<Instant>,
}

struct Hold {
    workload: WorkloadRef,
    until: Instant,
    waiting: BTreeSet<LinkId>,
    answer: Option<oneshot::Sender<Result<(), String>>>,
}

/// One gate with a live link.
#[derive(Clone, Debug)]
pub struct LinkedGate {
    /// Its pod.
    pub pod: String,
    /// Its address, as it says.
    pub ip: IpAddr,
    /// Ports it accepts connections on.
    pub ports: Arc<BTreeSet<u16>>,
    /// Whether it was told to stop.
    pub stopping: bool,
}

impl Default for Gates {
    fn default() -> Self {
        Self(Arc::new(Shared {
            inner: Mutex::default(),
            links: watch::Sender::new(0),
            activity: watch::Sender::new(0),
        }))
    }
}

impl Gates {
    /// Grows when a gate comes, goes, stops, or listens on other ports.
    #[must_use]
    pub fn links_changed(&self) -> watch::Receiver<u64> {
        self.0.links.subscribe()
    }

    /// Grows when a gate tells other numbers.
    #[must_use]
    pub fn activity_changed(&self) -> watch::Receiver<u64> {
        self.0.activity.subscribe()
    }

    /// A gate dialled. `None`: there are too many. An older link of the same pod ends.
    #[must_use]
    pub fn connect(&self, pod: &str, ip: IpAddr) -> Option<(LinkId, mpsc::Receiver<ToGate>)> {
        let now = Instant::now();
        let mut inner = self.0.inner.lock();
        let old: Vec<LinkId> = inner
            .links
            .iter()
            .filter(|(_, link)| link.pod == pod)
            .map(|(id, _)| *id)
            .collect();
        for id in old {
            inner.drop_link(id, now);
        }
        if inner.links.len() >= MAX_LINKS {
            return None;
        }
        let id = LinkId(inner.next);
        inner.next += 1;
        let (sender, receiver) = mpsc::channel(QUEUE);
        // A gate that comes between the last look and the sleep has to look, too.
        for (hold_id, hold) in &mut inner.holds {
            if hold.answer.is_some() && hold.until > now {
                hold.waiting.insert(id);
                let _ = sender.try_send(to_hold(*hold_id, hold, now));
            }
        }
        inner.links.insert(
            id,
            Link {
                pod: pod.to_owned(),
                ip,
                ports: Arc::default(),
                stopping: false,
                reported: false,
                loads: HashMap::new(),
                sender,
            },
        );
        drop(inner);
        self.0.links.send_modify(|n| *n += 1);
        Some((id, receiver))
    }

    /// A gate's link ended.
    pub fn disconnect(&self, id: LinkId) {
        let known = self.0.inner.lock().drop_link(id, Instant::now());
        if known {
            self.0.links.send_modify(|n| *n += 1);
        }
    }

    /// A gate reported. `false`: it tells of too many workloads, or its link has ended.
    #[must_use]
    pub fn report(&self, id: LinkId, ports: Vec<u16>, workloads: Vec<Activity>) -> bool {
        let now = Instant::now();
        let mut inner = self.0.inner.lock();
        let inner = &mut *inner;
        let Some(link) = inner.links.get_mut(&id) else {
            return false;
        };
        let ports: BTreeSet<u16> = ports.into_iter().collect();
        let links_changed = !link.reported || *link.ports != ports;
        if links_changed {
            link.ports = Arc::new(ports);
        }
        link.reported = true;
        let activity_changed = !workloads.is_empty();
        for activity in workloads {
            let last = activity
                .idle_ms
                .map(|idle| now.checked_sub(Duration::from_millis(idle)).unwrap_or(now));
            let busy = activity.in_flight > 0 || activity.queued > 0;
            if let Some(at) = if busy { Some(now) } else { last } {
                let newest = inner.active.entry(activity.workload.clone()).or_insert(at);
                *newest = (*newest).max(at);
            }
            link.loads.insert(
                activity.workload,
                Told {
                    in_flight: activity.in_flight,
                    queued: activity.queued,
                    last,
                },
            );
        }
        if link.loads.len() > MAX_WORKLOADS {
            return false;
        }
        if links_changed {
            self.0.links.send_modify(|n| *n += 1);
        }
        if activity_changed {
            self.0.activity.send_modify(|n| *n += 1);
        }
        true
    }

    /// A gate stops.
    pub fn stopping(&self, id: LinkId) {
        if let Some(link) = self.0.inner.lock().links.get_mut(&id) {
            link.stopping = true;
        }
        self.0.links.send_modify(|n| *n += 1);
    }

    /// A gate answered a hold.
    pub fn held(&self, id: LinkId, hold: u64, busy: Option<String>) {
        let mut inner = self.0.inner.lock();
        let pod = inner
            .links
            .get(&id)
            .map(|link| link.pod.clone())
            .unwrap_or_default();
        let Some(hold) = inner.holds.get_mut(&hold) else {
            return;
        };
        if let Some(busy) = busy {
            hold.finish(Err(format!("gate {pod}: {busy}")));
            return;
        }
        hold.waiting.remove(&id);
        if hold.waiting.is_empty() {
            hold.finish(Ok(()));
        }
    }

    /// The gates with a live link that have reported.
    #[must_use]
    pub fn linked(&self) -> Vec<LinkedGate> {
        let inner = self.0.inner.lock();
        inner
            .links
            .values()
            .filter(|link| link.reported)
            .map(|link| LinkedGate {
                pod: link.pod.clone(),
                ip: link.ip,
                ports: link.ports.clone(),
                stopping: link.stopping,
            })
            .collect()
    }

    /// What every gate tells of a workload: those with a link, and `others` without one.
    #[must_use]
    pub fn facts(&self, workload: &WorkloadRef, others: &[String]) -> Vec<GateFacts> {
        let now = Instant::now();
        let inner = self.0.inner.lock();
        let linked = inner.links.values().map(|link| GateFacts {
            pod: link.pod.clone(),
            load: link
                .loads
                .get(workload)
                .filter(|_| link.reported)
                .map(|told| Load {
                    in_flight: told.in_flight,
                    queued: told.queued,
                    idle: told.last.map(|last| now.duration_since(last)),
                }),
        });
        let without = others
            .iter()
            .filter(|pod| inner.links.values().all(|link| link.pod != **pod))
            .map(|pod| GateFacts {
                pod: pod.clone(),
                load: None,
            });
        linked.chain(without).collect()
    }

    /// When any gate, gone or not, last saw the workload active.
    #[must_use]
    pub fn last_active(&self, workload: &WorkloadRef) -> Option<Instant> {
        self.0.inner.lock().active.get(workload).copied()
    }

    /// Requests held for the workload, over all gates.
    #[must_use]
    pub fn queued(&self, workload: &WorkloadRef) -> u32 {
        let inner = self.0.inner.lock();
        inner
            .links
            .values()
            .filter_map(|link| link.loads.get(workload))
            .fold(0, |sum, told| sum.saturating_add(told.queued))
    }

    /// Forgets workloads that are gone.
    pub fn retain(&self, keep: impl Fn(&WorkloadRef) -> bool) {
        self.0.inner.lock().active.retain(|workload, _| keep(workload));
    }

    /// Tells every gate.
    pub fn tell_all(&self, message: &ToGate) {
        let mut inner = self.0.inner.lock();
        inner.tell_all(message);
    }

    /// The last look: asks every gate to hold the workload, and waits for all of them to say that nothing is under
    /// way. The hold ends when it is dropped, and by itself after `hold_for`.
    ///
    /// # Errors
    /// Why the workload must not sleep now.
    pub async fn hold(
        &self,
        workload: &WorkloadRef,
        hold_for: Duration,
        answer_within: Duration,
    ) -> Result<Held, String> {
        let (sender, receiver) = oneshot::channel();
        let held = {
            let now = Instant::now();
            let mut inner = self.0.inner.lock();
            if inner.links.is_empty() {
                return Err("no gate is connected".to_owned());
            }
            let id = inner.next;
            inner.next += 1;
            let hold = Hold {
                workload: workload.clone(),
                until: now + hold_for,
                waiting: inner.links.keys().copied().collect(),
                answer: Some(sender),
            };
            let message = to_hold(id, &hold, now);
            inner.holds.insert(id, hold);
            inner.tell_all(&message);
            Held {
                gates: self.clone(),
                id,
            }
        };
        match tokio::time::timeout(answer_within, receiver).await {
            Ok(Ok(Ok(()))) => Ok(held),
            Ok(Ok(Err(busy))) => Err(busy),
            Ok(Err(_)) => Err("the hold was given up".to_owned()),
            Err(_) => Err(format!(
                "not every gate answered the last look within {} ms",
                answer_within.as_millis()
            )),
        }
    }
}

impl Inner {
    fn drop_link(&mut self, id: LinkId, now: Instant) -> bool {
        let Some(link) = self.links.remove(&id) else {
            return false;
        };
        // Requests that it carried may have been cut just now: that is activity.
        for (workload, told) in link.loads {
            if told.in_flight > 0 || told.queued > 0 {
                self.active.insert(workload, now);
            }
        }
        for hold in self.holds.values_mut() {
            if hold.waiting.contains(&id) {
                hold.finish(Err(format!("gate {} was lost during the last look", link.pod)));
            }
        }
        true
    }

    fn tell_all(&mut self, message: &ToGate) {
        let deaf: Vec<LinkId> = self
            .links
            .iter()
            .filter(|(_, link)| link.sender.try_send(message.clone()).is_err())
            .map(|(id, _)| *id)
            .collect();
        for id in deaf {
            self.drop_link(id, Instant::now());
        }
    }
}

impl Hold {
    fn finish(&mut self, result: Result<(), String>) {
        if let Some(answer) = self.answer.take() {
            let _ = answer.send(result);
        }
    }
}

fn to_hold(id: u64, hold: &Hold, now: Instant) -> ToGate {
    let left = hold.until.saturating_duration_since(now);
    ToGate::Hold {
        id,
        workload: hold.workload.clone(),
        for_ms: u64::try_from(left.as_millis()).unwrap_or(u64::MAX),
    }
}

/// A hold that every gate has taken. Dropped, it lets requests through again; [`Held::asleep`] leaves it to the gates
/// to see the workload at 0.
#[must_use]
pub struct Held {
    gates: Gates,
    id: u64,
}

impl Held {
    /// Whether the gates still hold.
    #[must_use]
    pub fn in_force(&self) -> bool {
        let inner = self.gates.0.inner.lock();
        inner
            .holds
            .get(&self.id)
            .is_some_and(|hold| hold.until > Instant::now())
    }

    /// The workload was set to 0: gates wake it for the next request, and end the hold when they see the 0.
    pub fn asleep(self) {
        self.gates.0.inner.lock().holds.remove(&self.id);
        std::mem::forget(self);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut inner = self.gates.0.inner.lock();
        inner.holds.remove(&self.id);
        inner.tell_all(&ToGate::Resume { id: self.id });
    }
}

#[cfg(test)]
#[path = "gates_tests.rs"]
mod tests;
