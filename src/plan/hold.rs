//! The line of one workload at one gate: who waits, who is in flight, which replicas may take a request now, and
//! whether the workload has to be woken.
//!
//! Every question whose answer must be the same for all requests is decided here, one at a time and without IO: a
//! request is either granted a replica (and counts as in flight from that moment) or waits. That is what makes the
//! last look before a sleep safe: [`Line::hold`] finds a request in flight, or every later one waits.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use super::balance;
use crate::api::units::{Bytes, PodUid};

/// A pod that was there before a sleep and shows no deletion this long after the next wake has survived it: the
/// workload's controller never saw the zero in between.
const PARDON_MS: u64 = 2_000;

/// Names a request in its line; they are handed out in order of arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// The port of a pod that a request is for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// By number.
    Number(u16),
    /// By the name that the pod's container gives it.
    Name(String),
}

/// How many requests may wait, and how many a replica may have in flight from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests that may wait.
    pub queue_requests: u32,
    /// Bytes of waiting requests.
    pub queue_bytes: Bytes,
    /// Requests in flight per replica.
    pub target_in_flight: u32,
}

/// A pod as the watch shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenPod {
    /// Its UID.
    pub uid: PodUid,
    /// Its address, once it has one.
    pub ip: Option<IpAddr>,
    /// The version of the object, where it can be compared with other objects' versions.
    pub version: Option<u64>,
    /// It was told to stop.
    pub terminating: bool,
    /// The kubelet calls it Ready.
    pub ready: bool,
    /// Its named ports.
    pub ports: BTreeMap<String, u16>,
}

/// A workload as the watches show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// `spec.replicas`.
    pub desired: u32,
    /// The newest version of the workload that had `spec.replicas` at 0.
    pub zero_version: Option<u64>,
    /// Its controller has acted on the newest spec.
    pub settled: bool,
    /// Ebb may scale it up from 0.
    pub wakeable: bool,
    /// Its bounds.
    pub limits: Limits,
    /// Its pods.
    pub pods: Vec<SeenPod>,
}

/// Where a request goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The replica.
    pub pod: PodUid,
    /// Where it listens.
    pub address: SocketAddr,
}

/// What becomes of a request that arrives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It goes to a replica at once.
    Go(Ticket, Grant),
    /// It waits; [`Line::next`] grants it later.
    Wait(Ticket),
    /// The line is full.
    Full(String),
    /// The workload is at 0 and may not be woken.
    NotWakeable,
}

/// What has to be done so that those who wait get on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wants {
    /// Scale the workload up from 0.
    pub wake: bool,
    /// Ask these pods whether they are ready, more often than the kubelet does.
    pub probe: Vec<PodUid>,
    /// These replicas refused a connection: find out when they accept again.
    pub reach: Vec<Grant>,
    /// Call [`Line::tick`] at this time, in milliseconds.
    pub tick_at: Option<u64>,
}

#[derive(Debug)]
struct Waiting {
    target: Target,
    bytes: Bytes,
}

#[derive(Debug)]
struct Replica {
    pod: SeenPod,
    /// The first version seen; pods of an earlier wake have one before the zero.
    first_version: Option<u64>,
    /// It answered a probe of ours.
    answered: bool,
    /// It belongs to the time before the last sleep.
    retired: bool,
    /// The watch still shows it.
    present: bool,
    in_flight: u32,
    /// Ports that refused a connection and were not reached since.
    down: BTreeSet<u16>,
}

impl Replica {
    fn alive(&self) -> bool {
        self.present && !self.retired && !self.pod.terminating && self.pod.ip.is_some()
    }

    fn usable(&self) -> bool {
        self.alive() && (self.pod.ready || self.answered)
    }

    fn address(&self, target: &Target) -> Option<SocketAddr> {
        let port = match target {
            Target::Number(port) => *port,
            Target::Name(name) => *self.pod.ports.get(name)?,
        };
        Some(SocketAddr::new(self.pod.ip?, port))
    }
}

/// The line of one workload.
#[derive(Debug)]
pub struct Line {
    desired: u32,
    desired_since: u64,
    zero_version: Option<u64>,
    settled: bool,
    wakeable: bool,
    limits: Limits,
    replicas: BTreeMap<PodUid, Replica>,
    last_picked: Option<PodUid>,
    waiting: BTreeMap<Ticket, Waiting>,
    waiting_bytes: Bytes,
    next_ticket: u64,
    in_flight: u32,
    last_activity: Option<u64>,
    holds: BTreeMap<u64, u64>,
    wake_asked: bool,
    wake_started: Option<u64>,
    load_ms: Option<u64>,
    cold_starts: u64,
}

impl Line {
    /// A line of which nothing is known yet: requests wait, and nothing is woken.
    #[must_use]
    pub fn new() -> Self {
        Line {
            desired: 1,
            desired_since: 0,
            zero_version: None,
            settled: false,
            wakeable: false,
            limits: Limits {
                queue_requests: 0,
                queue_bytes: Bytes(0),
                target_in_flight: 0,
            },
            replicas: BTreeMap::new(),
            last_picked: None,
            waiting: BTreeMap::new(),
            waiting_bytes: Bytes(0),
            next_ticket: 0,
            in_flight: 0,
            last_activity: None,
            holds: BTreeMap::new(),
            wake_asked: false,
            wake_started: None,
            load_ms: None,
            cold_starts: 0,
        }
    }

    /// Takes in what the watches show.
    pub fn observe(&mut self, seen: &Seen, now: u64) {
        let slept = seen.zero_version > self.zero_version;
        self.zero_version = self.zero_version.max(seen.zero_version);
        if slept {
            // The sleep came about, so no hold is left to end; who waits now wants a wake.
            self.holds.clear();
            self.desired_since = now;
        }
        if (self.desired == 0) != (seen.desired == 0) {
            self.desired_since = now;
        }
        if seen.desired > 0 {
            if self.desired == 0 || self.wake_asked {
                self.wake_started.get_or_insert(now);
            }
            self.wake_asked = false;
        } else if !self.wake_asked {
            self.wake_started = None;
        }
        self.desired = seen.desired;
        self.settled = seen.settled;
        self.wakeable = seen.wakeable;
        self.limits = seen.limits;
        self.observe_pods(seen, slept);
        self.tick(now);
    }

    fn observe_pods(&mut self, seen: &Seen, slept: bool) {
        let zero = self.zero_version;
        let older = |version: Option<u64>| match (version, zero) {
            (Some(version), Some(zero)) => version <= zero,
            // Without comparable versions: whatever is there when the zero is seen.
            (None, Some(_)) => slept || seen.desired == 0,
            (_, None) => false,
        };
        for replica in self.replicas.values_mut() {
            replica.present = false;
            replica.retired |= slept && older(replica.first_version);
        }
        for pod in &seen.pods {
            let replica = self.replicas.entry(pod.uid.clone()).or_insert_with(|| Replica {
                pod: pod.clone(),
                first_version: pod.version,
                answered: false,
                retired: older(pod.version),
                present: true,
                in_flight: 0,
                down: BTreeSet::new(),
            });
            if replica.pod.ready && !pod.ready {
                // The kubelet, which asks the same question, has seen it fail since.
                replica.answered = false;
            }
            replica.pod.clone_from(pod);
            replica.present = true;
        }
        self.replicas
            .retain(|_, replica| replica.present || replica.in_flight > 0);
    }

    /// Lets time pass: holds run out, survivors of a sleep are pardoned.
    pub fn tick(&mut self, now: u64) {
        self.holds.retain(|_, until| *until > now);
        if self.desired > 0 && self.settled && now >= self.desired_since.saturating_add(PARDON_MS) {
            for replica in self.replicas.values_mut() {
                replica.retired = false;
            }
        }
        self.note_usable(now);
    }

    fn note_usable(&mut self, now: u64) {
        let Some(started) = self.wake_started else {
            return;
        };
        if self.desired > 0 && self.replicas.values().any(Replica::usable) {
            let took = now.saturating_sub(started);
            self.load_ms = Some(self.load_ms.map_or(took, |known| u64::midpoint(known, took)));
            self.wake_started = None;
            self.cold_starts += u64::from(!self.waiting.is_empty());
        }
    }

    /// A request arrives.
    pub fn arrive(&mut self, target: &Target, bytes: Bytes, now: u64) -> Arrival {
        self.last_activity = Some(now);
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        // Nobody overtakes those who wait already.
        if self.waiting.is_empty()
            && let Some(grant) = self.grant(target, now)
        {
            return Arrival::Go(ticket, grant);
        }
        if self.desired == 0 && !self.wakeable {
            return Arrival::NotWakeable;
        }
        if self.waiting.len() >= self.limits.queue_requests as usize {
            return Arrival::Full(format!(
                "{} requests wait already, and ebb.dev/queue-requests allows no more",
                self.waiting.len()
            ));
        }
        let total = self.waiting_bytes.saturating_add(bytes);
        if total > self.limits.queue_bytes {
            return Arrival::Full(format!(
                "the waiting requests hold {}, and ebb.dev/queue-bytes allows {}",
                self.waiting_bytes, self.limits.queue_bytes
            ));
        }
        self.insert(ticket, target.clone(), bytes);
        Arrival::Wait(ticket)
    }

    /// More of a waiting request was read. `false`: there is no room for it; leave the rest unread.
    pub fn grow(&mut self, ticket: Ticket, bytes: Bytes) -> bool {
        let total = self.waiting_bytes.saturating_add(bytes);
        let Some(waiting) = self.waiting.get_mut(&ticket) else {
            return false;
        };
        if total > self.limits.queue_bytes {
            return false;
        }
        waiting.bytes = waiting.bytes.saturating_add(bytes);
        self.waiting_bytes = total;
        true
    }

    fn insert(&mut self, ticket: Ticket, target: Target, bytes: Bytes) {
        self.waiting_bytes = self.waiting_bytes.saturating_add(bytes);
        self.waiting.insert(ticket, Waiting { target, bytes });
    }

    fn remove(&mut self, ticket: Ticket) -> Option<Waiting> {
        let waiting = self.waiting.remove(&ticket)?;
        self.waiting_bytes = self.waiting_bytes.saturating_sub(waiting.bytes);
        Some(waiting)
    }

    /// A waiting request is given up by its client or its time is over.
    pub fn leave(&mut self, ticket: Ticket, now: u64) {
        if self.remove(ticket).is_some() {
            self.last_activity = Some(now);
        }
    }

    /// Everybody who waits is sent away.
    pub fn dismiss(&mut self, now: u64) -> Vec<Ticket> {
        if !self.waiting.is_empty() {
            self.last_activity = Some(now);
        }
        self.waiting_bytes = Bytes(0);
        std::mem::take(&mut self.waiting).into_keys().collect()
    }

    /// The next one who waits and can be granted a replica now. Those of a port that nobody serves are passed over.
    pub fn next(&mut self, now: u64) -> Option<(Ticket, Grant)> {
        let mut stuck: BTreeSet<Target> = BTreeSet::new();
        let mut found = None;
        if self.open(now) && self.has_room() {
            for (ticket, waiting) in &self.waiting {
                if stuck.contains(&waiting.target) {
                    continue;
                }
                if self.choose(&waiting.target).is_some() {
                    found = Some((*ticket, waiting.target.clone()));
                    break;
                }
                stuck.insert(waiting.target.clone());
            }
        }
        let (ticket, target) = found?;
        let grant = self.grant(&target, now)?;
        self.remove(ticket);
        Some((ticket, grant))
    }

    /// Whether any request may be forwarded: not at 0, and not while a sleep is about to come.
    fn open(&self, now: u64) -> bool {
        self.desired > 0 && !self.held(now)
    }

    fn held(&self, now: u64) -> bool {
        self.holds.values().any(|until| *until > now)
    }

    fn has_room(&self) -> bool {
        self.replicas
            .values()
            .any(|replica| replica.usable() && replica.in_flight < self.limits.target_in_flight)
    }

    fn choose(&self, target: &Target) -> Option<Grant> {
        let able = self.replicas.iter().filter(|(_, replica)| {
            replica.usable()
                && replica
                    .address(target)
                    .is_some_and(|address| !replica.down.contains(&address.port()))
        });
        let pod = balance::pick(
            able.map(|(uid, replica)| (uid, replica.in_flight)),
            self.limits.target_in_flight,
            self.last_picked.as_ref(),
        )?;
        Some(Grant {
            pod: pod.clone(),
            address: self.replicas.get(pod)?.address(target)?,
        })
    }

    fn grant(&mut self, target: &Target, now: u64) -> Option<Grant> {
        if !self.open(now) {
            return None;
        }
        let grant = self.choose(target)?;
        self.replicas.get_mut(&grant.pod)?.in_flight += 1;
        self.in_flight += 1;
        self.last_picked = Some(grant.pod.clone());
        Some(grant)
    }

    /// A replica for something that is no activity, a health check: neither counted nor held.
    #[must_use]
    pub fn peek(&self, target: &Target, now: u64) -> Option<Grant> {
        if self.open(now) { self.choose(target) } else { None }
    }

    /// A granted request has its whole answer, or is given up.
    pub fn finish(&mut self, pod: &PodUid, now: u64) {
        self.last_activity = Some(now);
        self.release(pod);
    }

    fn release(&mut self, pod: &PodUid) {
        self.in_flight = self.in_flight.saturating_sub(1);
        if let Some(replica) = self.replicas.get_mut(pod) {
            replica.in_flight = replica.in_flight.saturating_sub(1);
            if !replica.present && replica.in_flight == 0 {
                self.replicas.remove(pod);
            }
        }
    }

    /// A granted request did not reach its replica: it waits again, at its old place.
    pub fn again(&mut self, ticket: Ticket, grant: &Grant, target: Target, bytes: Bytes) {
        self.release(&grant.pod);
        self.insert(ticket, target, bytes);
    }

    /// A replica refused a connection; it gets none until [`Line::reached`].
    pub fn unreachable(&mut self, grant: &Grant) {
        if let Some(replica) = self.replicas.get_mut(&grant.pod) {
            replica.down.insert(grant.address.port());
        }
    }

    /// A replica that had refused a connection accepts them again.
    pub fn reached(&mut self, grant: &Grant) {
        if let Some(replica) = self.replicas.get_mut(&grant.pod) {
            replica.down.remove(&grant.address.port());
        }
    }

    /// A pod answered its readiness probe.
    pub fn answered(&mut self, pod: &PodUid, now: u64) {
        if let Some(replica) = self.replicas.get_mut(pod) {
            replica.answered = true;
        }
        self.note_usable(now);
    }

    /// Whether a pod is still to be probed.
    #[must_use]
    pub fn wants_probe(&self, pod: &PodUid) -> bool {
        self.desired > 0
            && !self.waiting.is_empty()
            && self
                .replicas
                .get(pod)
                .is_some_and(|replica| replica.alive() && !replica.usable())
    }

    /// Whether a replica is still known to refuse connections on that port.
    #[must_use]
    pub fn wants_reach(&self, grant: &Grant) -> bool {
        self.replicas
            .get(&grant.pod)
            .is_some_and(|replica| replica.alive() && replica.down.contains(&grant.address.port()))
    }

    /// The last look before a sleep. `None`: nothing is in flight or waits, and from now on everything waits until
    /// the zero is seen, [`Line::resume`] or the time is over. Otherwise why not.
    pub fn hold(&mut self, id: u64, until: u64) -> Option<String> {
        if self.desired == 0 {
            return Some("this gate sees it at 0 replicas already".to_owned());
        }
        if self.in_flight > 0 {
            return Some(format!("{} in flight", self.in_flight));
        }
        if !self.waiting.is_empty() {
            return Some(format!("{} waiting", self.waiting.len()));
        }
        self.holds.insert(id, until);
        None
    }

    /// The sleep did not come about. `false`: this line has no such hold.
    pub fn resume(&mut self, id: u64) -> bool {
        self.holds.remove(&id).is_some()
    }

    /// The wake was asked of the API server, or somebody else asked it.
    pub fn wake_asked(&mut self, now: u64) {
        if self.desired == 0 {
            self.wake_asked = true;
            self.wake_started.get_or_insert(now);
        }
    }

    /// The wake that was asked cannot be seen anywhere: ask again.
    pub fn wake_lost(&mut self) {
        self.wake_asked = false;
    }

    /// Whether those who wait still need somebody to ask for the wake.
    #[must_use]
    pub fn wants_wake(&self) -> bool {
        self.desired == 0 && self.wakeable && !self.wake_asked && !self.waiting.is_empty()
    }

    /// What has to be done so that those who wait get on.
    #[must_use]
    pub fn wants(&self) -> Wants {
        let retired = self.desired > 0
            && self
                .replicas
                .values()
                .any(|replica| replica.retired && replica.present && !replica.pod.terminating);
        let pardon = (retired && self.settled).then(|| self.desired_since.saturating_add(PARDON_MS));
        Wants {
            wake: self.wants_wake(),
            probe: self
                .replicas
                .keys()
                .filter(|uid| self.wants_probe(uid))
                .cloned()
                .collect(),
            reach: self
                .replicas
                .iter()
                .filter(|(_, replica)| replica.alive())
                .flat_map(|(uid, replica)| {
                    replica.down.iter().filter_map(|port| {
                        Some(Grant {
                            pod: uid.clone(),
                            address: SocketAddr::new(replica.pod.ip?, *port),
                        })
                    })
                })
                .collect(),
            tick_at: self.holds.values().copied().chain(pardon).min(),
        }
    }

    /// Requests granted and not finished.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Requests that wait.
    #[must_use]
    pub fn queued(&self) -> u32 {
        u32::try_from(self.waiting.len()).unwrap_or(u32::MAX)
    }

    /// When a request last arrived or ended, in milliseconds.
    #[must_use]
    pub fn last_activity(&self) -> Option<u64> {
        self.last_activity
    }

    /// Whether a request that arrives now would find a loaded replica, busy or not.
    #[must_use]
    pub fn warm(&self) -> bool {
        self.desired > 0 && self.replicas.values().any(Replica::usable)
    }

    /// Whether it is at 0 replicas.
    #[must_use]
    pub fn asleep(&self) -> bool {
        self.desired == 0
    }

    /// How often a load ended for which requests had waited.
    #[must_use]
    pub fn cold_starts(&self) -> u64 {
        self.cold_starts
    }

    /// How much longer this wake should take by what earlier ones took, in milliseconds; `None`: none was seen yet.
    #[must_use]
    pub fn expected_ms(&self, now: u64) -> Option<u64> {
        let load = self.load_ms?;
        let passed = self.wake_started.map_or(0, |started| now.saturating_sub(started));
        Some(load.saturating_sub(passed))
    }

    /// Whether nothing would be lost with this line.
    #[must_use]
    pub fn idle(&self) -> bool {
        self.in_flight == 0 && self.waiting.is_empty() && self.holds.is_empty()
    }
}

impl Default for Line {
    fn default() -> Self {
        Line::new()
    }
}

#[cfg(test)]
#[path = "hold_tests.rs"]
mod tests;
