//! Leadership by a `coordination.k8s.io/v1` Lease: one replica at a time decides, the others know where it is.

pub mod election;

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::election::{Election, Record, Step};
pub use self::election::{Holder, Times, Vacancy};
use crate::api::names;

/// Whether this process leads, and if not, who does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LeaderState {
    /// This process leads; everything it writes belongs to this term. A later term is always higher.
    Leading {
        /// The term.
        term: u64,
    },
    /// It does not.
    Following {
        /// Who holds the Lease, if anybody is known to.
        leader: Option<Holder>,
    },
}

/// What is told of leadership at `/metrics`.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    leader: Gauge,
    changes: Counter,
}

impl Metrics {
    /// Registers the figures.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let this = Self::default();
        registry.register(
            "ebb_leader",
            "1 while this replica leads, else 0",
            this.leader.clone(),
        );
        registry.register(
            "ebb_leader_changes",
            "Times that this replica began or ended to lead",
            this.changes.clone(),
        );
        this
    }
}

/// What a process knows about who leads. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Leadership {
    state: watch::Receiver<LeaderState>,
    vacancy: watch::Receiver<Option<Vacancy>>,
    leading: Arc<Mutex<Option<(u64, Instant)>>>,
}

impl Leadership {
    /// Stands for election until `stop`, then gives the Lease back. Cancel `stop` only when everything that the leader
    /// does has ended: another replica takes over at once. Await the handle, so that the Lease is given back before
    /// the process ends.
    #[must_use]
    pub fn start(
        client: Client,
        namespace: &str,
        me: Holder,
        times: Times,
        metrics: Metrics,
        stop: CancellationToken,
    ) -> (Self, JoinHandle<()>) {
        let (sender, state) = watch::channel(LeaderState::Following { leader: None });
        let (vacancies, vacancy) = watch::channel(None);
        let this = Self {
            state,
            vacancy,
            leading: Arc::default(),
        };
        let runner = Runner {
            leases: Api::namespaced(client, namespace),
            election: Election::new(&me, times),
            me: me.to_string(),
            times,
            metrics,
            sender,
            vacancies,
            leading: this.leading.clone(),
        };
        (this, tokio::spawn(runner.run(stop)))
    }

    /// A leadership that never changes, for tests and for tools that run alone.
    #[must_use]
    pub fn fixed(state: LeaderState) -> Self {
        let leading = match state {
            // A year is longer than any process that this is meant for.
            LeaderState::Leading { term } => Some((term, Instant::now() + Duration::from_secs(31_536_000))),
            LeaderState::Following { .. } => None,
        };
        Self {
            state: watch::channel(state).1,
            vacancy: watch::channel(None).1,
            leading: Arc::new(Mutex::new(leading)),
        }
    }

    /// Follows who leads.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<LeaderState> {
        self.state.clone()
    }

    /// The vacancy that begins next if the leader is not heard of; once this process leads, the one that it took over.
    #[must_use]
    pub fn vacancy(&self) -> watch::Receiver<Option<Vacancy>> {
        self.vacancy.clone()
    }

    /// The term, if this process leads at this very moment. Ask right before a write that only a leader may make: unlike
    /// [`Leadership::state`] this is right even in a process that was stopped for a while and has only just woken up.
    #[must_use]
    pub fn term_now(&self) -> Option<u64> {
        let now = Instant::now();
        (*self.leading.lock())
            .filter(|(_, until)| now < *until)
            .map(|(term, _)| term)
    }

    /// Who leads, if it is another replica.
    #[must_use]
    pub fn leader(&self) -> Option<Holder> {
        match &*self.state.borrow() {
            LeaderState::Leading { .. } => None,
            LeaderState::Following { leader } => leader.clone(),
        }
    }
}

struct Runner {
    leases: Api<Lease>,
    election: Election,
    me: String,
    times: Times,
    metrics: Metrics,
    sender: watch::Sender<LeaderState>,
    vacancies: watch::Sender<Option<Vacancy>>,
    leading: Arc<Mutex<Option<(u64, Instant)>>>,
}

/// One round's failure; the next round tries again.
#[derive(Debug, thiserror::Error)]
enum RoundError {
    #[error("the API server did not answer in time")]
    Timeout,
    #[error(transparent)]
    Api(#[from] kube::Error),
}

impl Runner {
    async fn run(mut self, stop: CancellationToken) {
        loop {
            let leading = self.election.leading(Instant::now());
            // The deadline ends a round that hangs: leading has to end by itself, in time.
            let deadline = leading.map(|(_, until)| until);
            let round = tokio::select! {
                round = self.round() => round,
                () = until(deadline) => Err(RoundError::Timeout),
                () = stop.cancelled() => break,
            };
            if let Err(error) = &round {
                tracing::warn!(%error, leading = leading.is_some(), "cannot renew or read the Lease");
            }
            self.publish();
            let leading = self.election.leading(Instant::now());
            let pause = if leading.is_some() && round.is_ok() {
                self.times.renew
            } else {
                self.times.poll
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = until(leading.map(|(_, until)| until)) => self.publish(),
                () = stop.cancelled() => break,
            }
        }
        self.release().await;
    }

    /// One look at the Lease, and a write where that is due.
    async fn round(&mut self) -> Result<(), RoundError> {
        let found = self.limited(self.leases.get_opt(names::CONTROLLER)).await?;
        let seen = found.as_ref().map(record);
        let Step::Write { term } = self.election.observe(seen, Instant::now()) else {
            return Ok(());
        };
        let began = self.election.leading(Instant::now()).is_none();
        let lease = self.lease(found, term, began);
        let sent = Instant::now();
        match self.limited(self.write(&lease)).await {
            Ok(written) => {
                self.election.written(record(&written), sent, Instant::now());
                Ok(())
            }
            // Somebody else wrote first; the next look shows who. The old term runs to its end by itself.
            Err(RoundError::Api(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn limited<T>(
        &self,
        request: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, RoundError> {
        match tokio::time::timeout(self.times.request, request).await {
            Ok(result) => Ok(result?),
            Err(_) => Err(RoundError::Timeout),
        }
    }

    fn lease(&self, found: Option<Lease>, term: u64, began: bool) -> Lease {
        let now = MicroTime(jiff::Timestamp::now());
        let mut lease = found.unwrap_or_else(|| Lease {
            metadata: ObjectMeta {
                name: Some(names::CONTROLLER.to_owned()),
                ..ObjectMeta::default()
            },
            spec: None,
        });
        let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
        if began || spec.acquire_time.is_none() {
            spec.acquire_time = Some(now.clone());
        }
        spec.holder_identity = Some(self.me.clone());
        spec.lease_duration_seconds = Some(seconds(self.times.duration));
        spec.lease_transitions = Some(i32::try_from(term).unwrap_or(i32::MAX));
        spec.renew_time = Some(now);
        lease
    }

    async fn write(&self, lease: &Lease) -> Result<Lease, kube::Error> {
        let params = PostParams {
            field_manager: Some(names::CONTROLLER.to_owned()),
            ..PostParams::default()
        };
        if lease.metadata.resource_version.is_some() {
            self.leases.replace(names::CONTROLLER, &params, lease).await
        } else {
            self.leases.create(&params, lease).await
        }
    }

    /// Tells the process what holds now.
    fn publish(&self) {
        let leading = self.election.leading(Instant::now());
        *self.leading.lock() = leading;
        // Before the state: who begins to lead looks at what was taken over.
        let vacancy = self.election.vacancy();
        self.vacancies.send_if_modified(|known| {
            let moved = *known != vacancy;
            *known = vacancy;
            moved
        });
        let next = match leading {
            Some((term, _)) => LeaderState::Leading { term },
            None => LeaderState::Following {
                leader: self.election.holder(),
            },
        };
        self.sender.send_if_modified(|state| {
            if *state == next {
                return false;
            }
            let (was, is) = (
                matches!(state, LeaderState::Leading { .. }),
                matches!(next, LeaderState::Leading { .. }),
            );
            if was != is {
                self.metrics.changes.inc();
            }
            self.metrics.leader.set(i64::from(is));
            match &next {
                LeaderState::Leading { term } => tracing::info!(term, "this replica leads"),
                LeaderState::Following { leader: Some(leader) } => {
                    tracing::info!(leader = leader.pod, ip = %leader.ip, was_leading = was, "another replica leads");
                }
                LeaderState::Following { leader: None } => {
                    tracing::info!(was_leading = was, "no replica leads");
                }
            }
            *state = next;
            true
        });
    }

    /// Gives the Lease back, so that another replica need not wait for it to run out.
    async fn release(mut self) {
        let held = self.election.leading(Instant::now());
        self.election.resign();
        self.publish();
        let Some((term, _)) = held else {
            return;
        };
        let result = self.limited(self.give_back(term)).await;
        match result {
            Ok(()) => tracing::info!(term, "gave the Lease back"),
            Err(error) => tracing::warn!(%error, "cannot give the Lease back; it runs out by itself"),
        }
    }

    async fn give_back(&self, term: u64) -> Result<(), kube::Error> {
        let Some(mut lease) = self.leases.get_opt(names::CONTROLLER).await? else {
            return Ok(());
        };
        let seen = record(&lease);
        if seen.holder != self.me || seen.transitions != term {
            return Ok(());
        }
        if let Some(spec) = &mut lease.spec {
            spec.holder_identity = Some(String::new());
            spec.renew_time = Some(MicroTime(jiff::Timestamp::now()));
            spec.lease_duration_seconds = Some(1);
        }
        self.write(&lease).await.map(|_| ())
    }
}

/// Waits for a deadline; for ever where there is none.
async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

fn record(lease: &Lease) -> Record {
    let spec = lease.spec.clone().unwrap_or_default();
    Record {
        holder: spec.holder_identity.unwrap_or_default(),
        renewed: spec.renew_time.map(|time| time.0.to_string()).unwrap_or_default(),
        transitions: spec
            .lease_transitions
            .and_then(|n| u64::try_from(n).ok())
            .unwrap_or(0),
    }
}

fn seconds(duration: Duration) -> i32 {
    // The API wants whole seconds, and at least one; rounded up, since a candidate may rely on it.
    i32::try_from(duration.as_millis().div_ceil(1000).max(1)).unwrap_or(i32::MAX)
}
