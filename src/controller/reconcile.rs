//! What drives a reconciler: changes of the view and of the gates, gathered for a moment, and its own next deadline.
//! One that fails is not hurried by changes, and none ever spins.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::gates::Gates;
use super::metrics::{Metrics, Part, PartLabel};
use crate::cluster::clock::Clock;
use crate::cluster::events::Events;
use crate::cluster::ledger_feed::SharedLedger;
use crate::cluster::view::View;
use crate::serve::lease::Leadership;

/// What all reconcilers share.
#[derive(Clone)]
pub struct Context {
    /// The API server.
    pub client: Client,
    /// The cluster as last seen.
    pub view: View,
    /// The gates.
    pub gates: Gates,
    /// Where decisions are told.
    pub events: Events,
    /// Whether this process leads.
    pub leadership: Leadership,
    /// Figures.
    pub metrics: Metrics,
    /// Ebb's own namespace.
    pub namespace: Arc<str>,
    /// Who has how much of which GPU.
    pub ledger: SharedLedger,
    /// The ledger's clock.
    pub clock: Clock,
    /// When this process began to lead.
    pub since: Instant,
}

impl Context {
    /// Whether this process leads at this very moment. Asked right before every write.
    #[must_use]
    pub fn leads(&self) -> bool {
        self.leadership.term_now().is_some()
    }

    /// A write or call failed.
    pub fn failed(&self, part: Part) {
        self.metrics.failures.get_or_create(&PartLabel { part }).inc();
    }
}

/// One reconciler: looks at everything it is about, and does what is due.
pub trait Reconciler: Send + 'static {
    /// Which one.
    const PART: Part;
    /// Changes are gathered for this long.
    const GATHER: Duration;

    /// One pass. Failures are kept per object, with a back-off each; what is returned is how long to wait for the
    /// next pass if nothing changes.
    fn pass(&mut self) -> impl Future<Output = Option<Duration>> + Send;
}

/// No reconciler waits longer than this for its next pass, so that nothing that was missed stays missed.
const AT_LEAST_EVERY: Duration = Duration::from_secs(30);
/// And none passes again sooner than this.
const AT_MOST_EVERY: Duration = Duration::from_millis(2);

/// A pass that kept the processor longer than this is followed by a pause of [`PAUSE`] times the rest.
const CHEAP: Duration = Duration::from_micros(500);
/// On a large cluster in a burst of changes, passes back to back would take the processor from those who answer the
/// scheduler. So one reconciler gets about a twentieth of one.
const PAUSE: u32 = 20;
/// The longest such pause.
const LONGEST_REST: Duration = Duration::from_secs(1);

/// Runs a reconciler until `stop`. The pass under way then is finished.
pub async fn drive<R: Reconciler>(
    mut reconciler: R,
    metrics: Metrics,
    mut changes: Vec<watch::Receiver<u64>>,
    stop: CancellationToken,
) {
    while !stop.is_cancelled() {
        for change in &mut changes {
            change.mark_unchanged();
        }
        let (next, busy) = timed(reconciler.pass()).await;
        let rested = Instant::now() + rest(busy);
        metrics.passes.get_or_create(&PartLabel { part: R::PART }).inc();
        let wait = next
            .unwrap_or(AT_LEAST_EVERY)
            .clamp(AT_MOST_EVERY, AT_LEAST_EVERY);
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => continue,
            () = any(&mut changes) => {}
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep_until(rested.max(Instant::now() + R::GATHER)) => {}
        }
    }
}

fn rest(busy: Duration) -> Duration {
    (busy.saturating_sub(CHEAP) * PAUSE).min(LONGEST_REST)
}

/// Waits for a future; what it gave, and for how long it kept the processor. What it waited for others does not count.
async fn timed<F: Future>(future: F) -> (F::Output, Duration) {
    let mut future = std::pin::pin!(future);
    let mut busy = Duration::ZERO;
    let output = std::future::poll_fn(|context| {
        let began = Instant::now();
        let poll = future.as_mut().poll(context);
        busy += began.elapsed();
        poll
    })
    .await;
    (output, busy)
}

/// Waits until one of them changes; for ever where none can any more.
async fn any(changes: &mut [watch::Receiver<u64>]) {
    let waits = changes.iter_mut().map(|change| {
        Box::pin(async move {
            if change.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        })
    });
    if waits.len() == 0 {
        std::future::pending::<()>().await;
    }
    futures::future::select_all(waits).await;
}

/// Back-off per object.
#[derive(Debug)]
pub struct Backoff<K>(HashMap<K, (Instant, Duration)>);

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

impl<K> Default for Backoff<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Hash + Eq + Clone> Backoff<K> {
    /// Whether the object may be tried now.
    #[must_use]
    pub fn open(&self, key: &K) -> bool {
        self.0.get(key).is_none_or(|(until, _)| *until <= Instant::now())
    }

    /// It failed: twice as long a pause as the last time.
    pub fn failed(&mut self, key: &K) {
        let pause = self
            .0
            .get(key)
            .map_or(FIRST_PAUSE, |(_, pause)| (*pause * 2).min(LONGEST_PAUSE));
        self.0.insert(key.clone(), (Instant::now() + pause, pause));
    }

    /// It went well.
    pub fn went_well(&mut self, key: &K) {
        self.0.remove(key);
    }

    /// Time until the first object may be tried again.
    #[must_use]
    pub fn next(&self) -> Option<Duration> {
        let now = Instant::now();
        self.0
            .values()
            .map(|(until, _)| until.saturating_duration_since(now))
            .filter(|left| !left.is_zero())
            .min()
    }

    /// Forgets objects that were not tried for long, so that the map stays as small as the trouble.
    pub fn forget_old(&mut self) {
        let now = Instant::now();
        self.0
            .retain(|_, (until, pause)| now.saturating_duration_since(*until) < *pause + LONGEST_PAUSE);
    }
}

/// The sooner of two deadlines.
#[must_use]
pub fn sooner(a: Option<Duration>, b: Option<Duration>) -> Option<Duration> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    struct Counting(Arc<AtomicU32>);

    impl Reconciler for Counting {
        const PART: Part = Part::Nodes;
        const GATHER: Duration = Duration::from_millis(10);

        async fn pass(&mut self) -> Option<Duration> {
            self.0.fetch_add(1, Ordering::SeqCst);
            None
        }
    }

    #[tokio::test(start_paused = true)]
    async fn many_changes_are_one_pass() {
        let (sender, receiver) = watch::channel(0);
        let (count, stop) = (Arc::new(AtomicU32::new(0)), CancellationToken::new());
        let driven = drive(
            Counting(count.clone()),
            Metrics::default(),
            vec![receiver],
            stop.clone(),
        );
        let task = tokio::spawn(driven);
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(count.load(Ordering::SeqCst), 1);
        for _ in 0..50 {
            sender.send_modify(|n| *n += 1);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(count.load(Ordering::SeqCst), 2);
        stop.cancel();
        assert!(task.await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_is_not_being_busy() {
        let ((), busy) = timed(tokio::time::sleep(Duration::from_secs(5))).await;
        assert_eq!(busy, Duration::ZERO);
    }

    #[test]
    fn only_an_expensive_pass_is_followed_by_a_rest_and_never_by_a_long_one() {
        assert_eq!(rest(Duration::from_micros(400)), Duration::ZERO);
        assert_eq!(rest(Duration::from_micros(10_500)), Duration::from_millis(200));
        assert_eq!(rest(Duration::from_secs(9)), LONGEST_REST);
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_and_end() {
        let mut backoff = Backoff::default();
        for _ in 0..20 {
            backoff.failed(&"a");
        }
        assert!(!backoff.open(&"a"));
        assert!(backoff.open(&"b"));
        assert!(backoff.next().is_some_and(|left| left <= LONGEST_PAUSE));
        tokio::time::advance(LONGEST_PAUSE).await;
        assert!(backoff.open(&"a"));
        backoff.went_well(&"a");
        assert_eq!(backoff.next(), None);
    }
}
