//! The line itself: every decision about who may go where, one at a time.

use std::collections::{BTreeMap, BTreeSet};

use super::replicas::Replicas;
use super::{Arrival, Grant, Limits, Seen, Target, Ticket, Wants};
use crate::api::units::{Bytes, PodUid};

/// A pod that was there before a sleep and shows no deletion this long after the next wake has survived it: the
/// workload's controller never saw the zero in between.
pub(super) const PARDON_MS: u64 = 2_000;

#[derive(Debug)]
struct Waiting {
    target: Target,
    bytes: Bytes,
}

/// The line of one workload.
#[derive(Debug)]
pub struct Line {
    desired: u32,
    desired_since: u64,
    settled: bool,
    wakeable: bool,
    limits: Limits,
    replicas: Replicas,
    waiting: BTreeMap<Ticket, Waiting>,
    /// How many of them wait for each target. Looked at on every change, where going through all of them would make a
    /// long line's work grow with its square.
    targets: BTreeMap<Target, u32>,
    waiting_bytes: Bytes,
    next_ticket: u64,
    in_flight: u32,
    last_activity: Option<u64>,
    activities: u64,
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
            settled: false,
            wakeable: false,
            limits: Limits {
                queue_requests: 0,
                queue_bytes: Bytes(0),
                target_in_flight: 0,
            },
            replicas: Replicas::default(),
            waiting: BTreeMap::new(),
            targets: BTreeMap::new(),
            waiting_bytes: Bytes(0),
            next_ticket: 0,
            in_flight: 0,
            last_activity: None,
            activities: 0,
            holds: BTreeMap::new(),
            wake_asked: false,
            wake_started: None,
            load_ms: None,
            cold_starts: 0,
        }
    }

    /// Takes in what the watches show.
    pub fn observe(&mut self, seen: &Seen, now: u64) {
        let slept = self.replicas.observe(seen);
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
        self.tick(now);
    }

    /// Lets time pass: holds run out, survivors of a sleep are pardoned.
    pub fn tick(&mut self, now: u64) {
        self.holds.retain(|_, until| *until > now);
        if self.desired > 0 && self.settled && now >= self.desired_since.saturating_add(PARDON_MS) {
            self.replicas.pardon();
        }
        self.note_usable(now);
    }

    fn note_usable(&mut self, now: u64) {
        let Some(started) = self.wake_started else {
            return;
        };
        if self.desired > 0 && self.replicas.any_usable() {
            let took = now.saturating_sub(started);
            self.load_ms = Some(self.load_ms.map_or(took, |known| u64::midpoint(known, took)));
            self.wake_started = None;
            self.cold_starts += u64::from(!self.waiting.is_empty());
        }
    }

    /// A request arrives.
    pub fn arrive(&mut self, target: &Target, bytes: Bytes, now: u64) -> Arrival {
        self.touch(now);
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

    fn touch(&mut self, now: u64) {
        self.last_activity = Some(now);
        self.activities += 1;
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
        *self.targets.entry(target.clone()).or_default() += 1;
        self.waiting.insert(ticket, Waiting { target, bytes });
    }

    fn remove(&mut self, ticket: Ticket) -> Option<Waiting> {
        let waiting = self.waiting.remove(&ticket)?;
        self.waiting_bytes = self.waiting_bytes.saturating_sub(waiting.bytes);
        if let Some(count) = self.targets.get_mut(&waiting.target) {
            *count -= 1;
            if *count == 0 {
                self.targets.remove(&waiting.target);
            }
        }
        Some(waiting)
    }

    /// A waiting request is given up by its client or its time is over.
    pub fn leave(&mut self, ticket: Ticket, now: u64) {
        if self.remove(ticket).is_some() {
            self.touch(now);
        }
    }

    /// Everybody who waits is sent away.
    pub fn dismiss(&mut self, now: u64) -> Vec<Ticket> {
        if !self.waiting.is_empty() {
            self.touch(now);
        }
        self.waiting_bytes = Bytes(0);
        self.targets.clear();
        std::mem::take(&mut self.waiting).into_keys().collect()
    }

    /// The next one who waits and can be granted a replica now. Those of a port that nobody serves are passed over.
    pub fn next(&mut self, now: u64) -> Option<(Ticket, Grant)> {
        let mut stuck: BTreeSet<Target> = BTreeSet::new();
        let mut found = None;
        if self.open(now) && self.replicas.any_room(self.limits.target_in_flight) {
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

    /// Sends away who waits for a port by a name that no loaded replica has: it would be for nothing.
    pub fn misled(&mut self, now: u64) -> Vec<(Ticket, Target)> {
        let wrong: BTreeSet<Target> = self
            .targets
            .keys()
            .filter(|target| matches!(target, Target::Name(_)))
            .filter(|target| self.desired > 0 && self.replicas.none_has(target))
            .cloned()
            .collect();
        if wrong.is_empty() {
            return Vec::new();
        }
        let misled: Vec<(Ticket, Target)> = self
            .waiting
            .iter()
            .filter(|(_, waiting)| wrong.contains(&waiting.target))
            .map(|(ticket, waiting)| (*ticket, waiting.target.clone()))
            .collect();
        for (ticket, _) in &misled {
            self.leave(*ticket, now);
        }
        misled
    }

    /// Whether any request may be forwarded: not at 0, and not while a sleep is about to come.
    fn open(&self, now: u64) -> bool {
        self.desired > 0 && !self.held(now)
    }

    fn held(&self, now: u64) -> bool {
        self.holds.values().any(|until| *until > now)
    }

    fn choose(&self, target: &Target) -> Option<Grant> {
        self.replicas.choose(target, self.limits.target_in_flight)
    }

    fn grant(&mut self, target: &Target, now: u64) -> Option<Grant> {
        if !self.open(now) {
            return None;
        }
        let grant = self.choose(target)?;
        self.replicas.take(&grant);
        self.in_flight += 1;
        Some(grant)
    }

    /// A replica for something that is no activity, a health check: neither counted nor held.
    #[must_use]
    pub fn peek(&self, target: &Target, now: u64) -> Option<Grant> {
        if self.open(now) { self.choose(target) } else { None }
    }

    /// A granted request has its whole answer, or is given up.
    pub fn finish(&mut self, pod: &PodUid, now: u64) {
        self.touch(now);
        self.release(pod);
    }

    fn release(&mut self, pod: &PodUid) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.replicas.release(pod);
    }

    /// A granted request did not reach its replica: it waits again, at its old place.
    pub fn again(&mut self, ticket: Ticket, grant: &Grant, target: Target, bytes: Bytes) {
        self.release(&grant.pod);
        self.insert(ticket, target, bytes);
    }

    /// A replica refused a connection; it gets none until [`Line::reached`].
    pub fn unreachable(&mut self, grant: &Grant) {
        self.replicas.unreachable(grant);
    }

    /// A replica that had refused a connection accepts them again.
    pub fn reached(&mut self, grant: &Grant) {
        self.replicas.reached(grant);
    }

    /// A pod answered its readiness probe.
    pub fn answered(&mut self, pod: &PodUid, now: u64) {
        self.replicas.answered(pod);
        self.note_usable(now);
    }

    /// Whether a pod is still to be probed.
    #[must_use]
    pub fn wants_probe(&self, pod: &PodUid) -> bool {
        self.desired > 0 && !self.waiting.is_empty() && self.replicas.is_to_probe(pod)
    }

    /// Whether a replica is still known to refuse connections on that port.
    #[must_use]
    pub fn wants_reach(&self, grant: &Grant) -> bool {
        self.replicas.is_to_reach(grant)
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
        let survivors = self.desired > 0 && self.settled && self.replicas.survivors();
        let pardon = survivors.then(|| self.desired_since.saturating_add(PARDON_MS));
        let probing = self.desired > 0 && !self.waiting.is_empty();
        Wants {
            wake: self.wants_wake(),
            probe: self.replicas.to_probe().filter(|_| probing).cloned().collect(),
            reach: self.replicas.to_reach().collect(),
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

    /// How often a request arrived or ended: tells two moments apart that a clock may not.
    #[must_use]
    pub fn activities(&self) -> u64 {
        self.activities
    }

    /// Whether a request that arrives now would find a loaded replica, busy or not.
    #[must_use]
    pub fn warm(&self) -> bool {
        self.desired > 0 && self.replicas.any_usable()
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
