//! The door of a workload: its line (see [`crate::plan::hold`]) behind one lock, with the requests that wait at it.
//! Whatever changes the line ends in [`Door::pump`], which lets in whom it can and starts what the others need.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

use super::problem::Problem;
use super::state::Gate;
use super::{replicas, wake};
use crate::api::units::{Bytes, PodUid};
use crate::api::workload::WorkloadRef;
use crate::link::Activity;
use crate::plan::hold::{Arrival, Grant, Line, Seen, Target, Ticket};

/// One workload's door.
pub struct Door {
    /// Which workload.
    pub workload: WorkloadRef,
    gate: Weak<Gate>,
    state: Mutex<State>,
    /// Raised when the watches show something new.
    changed: Notify,
}

#[derive(Default)]
struct State {
    line: Line,
    waiting: HashMap<Ticket, oneshot::Sender<Verdict>>,
    waking: bool,
    probing: HashSet<PodUid>,
    reaching: HashSet<(PodUid, u16)>,
    tick_at: Option<u64>,
    cold_starts_told: u64,
}

/// What becomes of a request that waits.
pub enum Verdict {
    /// It may go to its replica.
    Go(InFlight),
    /// It gets this answer.
    Failed(Problem),
}

/// What becomes of a request that comes to the door.
pub enum Entered {
    /// It may go to its replica at once.
    Go(InFlight),
    /// It waits.
    Wait(Held),
    /// The line is full.
    Full(String),
    /// The workload is at 0 and Ebb may not wake it.
    NotWakeable,
}

impl Door {
    pub(super) fn new(workload: WorkloadRef, gate: &Arc<Gate>) -> Arc<Door> {
        Arc::new(Door {
            workload,
            gate: Arc::downgrade(gate),
            state: Mutex::default(),
            changed: Notify::new(),
        })
    }

    fn now(&self) -> u64 {
        self.gate.upgrade().map_or(0, |gate| gate.now())
    }

    /// Takes in what the watches show.
    pub fn observe(self: &Arc<Self>, seen: &Seen) {
        let now = self.now();
        self.state.lock().line.observe(seen, now);
        self.changed.notify_waiters();
        self.pump();
    }

    /// A request comes: it is in flight from now on, or it waits.
    pub fn arrive(self: &Arc<Self>, target: &Target, bytes: Bytes) -> Entered {
        let now = self.now();
        let entered = {
            let mut state = self.state.lock();
            let cold = !state.line.warm();
            match state.line.arrive(target, bytes, now) {
                Arrival::Go(ticket, grant) => Entered::Go(self.in_flight(ticket, grant)),
                Arrival::Wait(ticket) => Entered::Wait(self.wait(&mut state, ticket, cold)),
                Arrival::Full(reason) => Entered::Full(reason),
                Arrival::NotWakeable => Entered::NotWakeable,
            }
        };
        self.pump();
        entered
    }

    fn in_flight(self: &Arc<Self>, ticket: Ticket, grant: Grant) -> InFlight {
        if let Some(gate) = self.gate.upgrade() {
            gate.metrics.in_flight.inc();
        }
        InFlight {
            door: self.clone(),
            ticket,
            grant: Some(grant),
        }
    }

    fn wait(self: &Arc<Self>, state: &mut State, ticket: Ticket, cold: bool) -> Held {
        let (sender, verdict) = oneshot::channel();
        state.waiting.insert(ticket, sender);
        if let Some(gate) = self.gate.upgrade() {
            gate.metrics.queued.inc();
        }
        Held {
            door: self.clone(),
            ticket,
            cold,
            verdict,
        }
    }

    /// A replica for a health check, which is neither counted nor held.
    pub fn peek(&self, target: &Target) -> Option<Grant> {
        let now = self.now();
        self.state.lock().line.peek(target, now)
    }

    /// Lets in whom it can, and starts what the others need: a wake, probes, a timer.
    pub fn pump(self: &Arc<Self>) {
        let Some(gate) = self.gate.upgrade() else {
            return;
        };
        let now = gate.now();
        let (mut let_in, mut misled) = (Vec::new(), Vec::new());
        let (wake, probe, reach, timer) = {
            let mut state = self.state.lock();
            while let Some((ticket, grant)) = state.line.next(now) {
                let in_flight = self.in_flight(ticket, grant);
                let_in.push((state.waiting.remove(&ticket), in_flight));
            }
            for (ticket, target) in state.line.misled(now) {
                misled.push((state.waiting.remove(&ticket), target));
            }
            let wants = state.line.wants();
            let wake = wants.wake && !std::mem::replace(&mut state.waking, true);
            let probe: Vec<PodUid> = wants
                .probe
                .into_iter()
                .filter(|uid| state.probing.insert(uid.clone()))
                .collect();
            let reach: Vec<Grant> = wants
                .reach
                .into_iter()
                .filter(|grant| state.reaching.insert((grant.pod.clone(), grant.address.port())))
                .collect();
            let timer = wants
                .tick_at
                .filter(|at| state.tick_at.is_none_or(|set| *at < set));
            if timer.is_some() {
                state.tick_at = timer;
            }
            let cold_starts = state.line.cold_starts();
            gate.metrics
                .cold_starts
                .inc_by(cold_starts - state.cold_starts_told);
            state.cold_starts_told = cold_starts;
            (wake, probe, reach, timer)
        };
        // Outside the lock: a client that has left gives its place back through the same door.
        for (sender, in_flight) in let_in {
            if let Some(sender) = sender {
                let _ = sender.send(Verdict::Go(in_flight));
            }
        }
        for (sender, target) in misled {
            if let (Some(sender), Target::Name(name)) = (sender, target) {
                let _ = sender.send(Verdict::Failed(Problem::new(
                    super::metrics::Outcome::NoRoute,
                    format!(
                        "its pods have no port named `{name}`: name a container's port so, or correct the Service's \
                         targetPort"
                    ),
                )));
            }
        }
        if wake {
            let door = self.clone();
            let gate = gate.clone();
            tokio::spawn(async move {
                wake::run(gate, door.clone()).await;
                door.state.lock().waking = false;
                door.pump();
            });
        }
        for pod in probe {
            tokio::spawn(replicas::probe(gate.clone(), self.clone(), pod));
        }
        for grant in reach {
            tokio::spawn(replicas::reach(self.clone(), grant));
        }
        if let Some(at) = timer {
            let door = self.clone();
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(at.saturating_sub(now))).await;
                door.tick(at);
            });
        }
    }

    fn tick(self: &Arc<Self>, at: u64) {
        let now = self.now().max(at);
        {
            let mut state = self.state.lock();
            if state.tick_at == Some(at) {
                state.tick_at = None;
            }
            state.line.tick(now);
        }
        self.pump();
    }

    /// Everybody who waits gets this answer.
    pub fn dismiss(&self, problem: &Problem) {
        let now = self.now();
        let senders: Vec<_> = {
            let mut state = self.state.lock();
            let tickets = state.line.dismiss(now);
            tickets
                .iter()
                .filter_map(|ticket| state.waiting.remove(ticket))
                .collect()
        };
        for sender in senders {
            let _ = sender.send(Verdict::Failed(problem.clone()));
        }
    }

    /// The last look before a sleep; see [`Line::hold`]. `known`: how much activity the one who asks has been told of,
    /// as [`Door::activity`] counts it.
    pub fn hold(self: &Arc<Self>, id: u64, for_ms: u64, known: u64) -> Option<String> {
        let now = self.now();
        let busy = {
            let mut state = self.state.lock();
            if state.line.activities() > known {
                Some("a request came that was not reported yet".to_owned())
            } else {
                state.line.hold(id, now.saturating_add(for_ms))
            }
        };
        self.pump();
        busy
    }

    /// The sleep did not come about. Nothing happens where it was not held.
    pub fn resume(self: &Arc<Self>, id: u64) {
        let held = self.state.lock().line.resume(id);
        if held {
            self.pump();
        }
    }

    /// What the controller is told, and a count that grows with every activity.
    pub fn activity(&self) -> (Activity, u64) {
        let now = self.now();
        let state = self.state.lock();
        let last = state.line.last_activity();
        let activity = Activity {
            workload: self.workload.clone(),
            in_flight: state.line.in_flight(),
            queued: state.line.queued(),
            idle_ms: last.map(|last| now.saturating_sub(last)),
        };
        (activity, state.line.activities())
    }

    /// Requests that wait.
    pub fn queued(&self) -> u32 {
        self.state.lock().line.queued()
    }

    /// How much longer a wake should take, by what earlier ones took.
    pub fn expected(&self) -> Option<Duration> {
        let now = self.now();
        self.state.lock().line.expected_ms(now).map(Duration::from_millis)
    }

    /// Whether nothing would be lost with this door.
    pub fn idle(&self) -> bool {
        self.state.lock().line.idle()
    }

    pub(super) fn wants_wake(&self) -> bool {
        self.state.lock().line.wants_wake()
    }

    pub(super) fn wake_asked(&self) {
        let now = self.now();
        self.state.lock().line.wake_asked(now);
    }

    pub(super) fn wake_lost(&self) {
        self.state.lock().line.wake_lost();
    }

    /// Waits until the watch shows the workload above 0, or nobody waits for that any more.
    pub(super) async fn seen_awake_within(&self, time: Duration) -> bool {
        tokio::time::timeout(time, async {
            loop {
                let changed = self.changed.notified();
                if !self.state.lock().line.asleep() {
                    return;
                }
                changed.await;
            }
        })
        .await
        .is_ok()
    }

    pub(super) fn wants_probe(&self, pod: &PodUid) -> bool {
        self.state.lock().line.wants_probe(pod)
    }

    pub(super) fn probed(self: &Arc<Self>, pod: &PodUid, answered: bool) {
        let now = self.now();
        {
            let mut state = self.state.lock();
            state.probing.remove(pod);
            if answered {
                state.line.answered(pod, now);
            }
        }
        self.pump();
    }

    pub(super) fn wants_reach(&self, grant: &Grant) -> bool {
        self.state.lock().line.wants_reach(grant)
    }

    pub(super) fn reached(self: &Arc<Self>, grant: &Grant) {
        {
            let mut state = self.state.lock();
            state.reaching.remove(&(grant.pod.clone(), grant.address.port()));
            state.line.reached(grant);
        }
        self.pump();
    }
}

/// A request that waits. Dropped, it frees its place.
pub struct Held {
    door: Arc<Door>,
    ticket: Ticket,
    /// Whether it waits for a load (and not just for a free place).
    pub cold: bool,
    verdict: oneshot::Receiver<Verdict>,
}

impl Held {
    /// Resolves when its turn comes, or when it cannot come. Can be polled in a `select!` again and again.
    pub async fn verdict(&mut self) -> Verdict {
        match (&mut self.verdict).await {
            Ok(verdict) => verdict,
            Err(_) => Verdict::Failed(Problem::new(
                super::metrics::Outcome::NoRoute,
                "the workload, or the Service that led to it, was deleted meanwhile",
            )),
        }
    }

    /// More of the request was read. `false`: leave the rest unread.
    pub fn grow(&self, bytes: Bytes) -> bool {
        self.door.state.lock().line.grow(self.ticket, bytes)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let now = self.door.now();
        {
            let mut state = self.door.state.lock();
            state.waiting.remove(&self.ticket);
            state.line.leave(self.ticket, now);
        }
        if let Some(gate) = self.door.gate.upgrade() {
            gate.metrics.queued.dec();
        }
    }
}

/// A request at its replica. Dropped, it has ended.
pub struct InFlight {
    door: Arc<Door>,
    ticket: Ticket,
    grant: Option<Grant>,
}

impl InFlight {
    /// Where it goes.
    #[must_use]
    pub fn grant(&self) -> Option<&Grant> {
        self.grant.as_ref()
    }

    /// Its replica did not take the connection: it waits again, at its old place, and the replica is left out until
    /// it accepts.
    #[must_use]
    pub fn again(mut self, target: &Target, bytes: Bytes) -> Held {
        let door = self.door.clone();
        let held = {
            let mut state = door.state.lock();
            if let Some(grant) = self.grant.take() {
                state.line.unreachable(&grant);
                state.line.again(self.ticket, &grant, target.clone(), bytes);
            }
            let cold = !state.line.warm();
            door.wait(&mut state, self.ticket, cold)
        };
        if let Some(gate) = door.gate.upgrade() {
            gate.metrics.in_flight.dec();
        }
        door.pump();
        held
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let Some(grant) = self.grant.take() else {
            return;
        };
        let now = self.door.now();
        self.door.state.lock().line.finish(&grant.pod, now);
        if let Some(gate) = self.door.gate.upgrade() {
            gate.metrics.in_flight.dec();
        }
        self.door.pump();
    }
}
