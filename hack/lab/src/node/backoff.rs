//! The growing pause before a container is started again.

use std::time::Duration;
use tokio::time::Instant;

/// The longest pause.
const MAX: Duration = Duration::from_secs(300);

/// The kubelet's crash-loop back-off of one container: the first restart comes at once, then the
/// pauses double from the initial one up to five minutes, counted from the end of the last run. A
/// container that has run for twice the longest pause starts over.
#[derive(Clone, Debug)]
pub struct Backoff {
    initial: Duration,
    current: Option<Duration>,
    touched: Option<Instant>,
}

impl Backoff {
    /// A back-off that starts at `initial`.
    pub fn new(initial: Duration) -> Self {
        Self {
            initial,
            current: None,
            touched: None,
        }
    }

    /// A run ended at `finished`: the pause that has to pass since then before the next start.
    pub fn next(&mut self, finished: Instant) -> Duration {
        if self
            .touched
            .is_some_and(|at| finished.saturating_duration_since(at) > MAX * 2)
        {
            self.current = None;
        }
        let pause = self.current.unwrap_or(Duration::ZERO);
        self.current = Some(self.current.map_or(self.initial, |now| (now * 2).min(MAX)));
        self.touched = Some(finished + pause);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_five_minutes() {
        let mut backoff = Backoff::new(Duration::from_secs(10));
        let mut now = Instant::now();
        let mut pauses = Vec::new();
        for _ in 0..8 {
            let pause = backoff.next(now);
            pauses.push(pause.as_secs());
            now += pause + Duration::from_secs(1);
        }
        assert_eq!(pauses, [0, 10, 20, 40, 80, 160, 300, 300]);
    }

    #[test]
    fn a_long_run_starts_over() {
        let mut backoff = Backoff::new(Duration::from_secs(10));
        let now = Instant::now();
        backoff.next(now);
        backoff.next(now);
        assert_eq!(backoff.next(now + Duration::from_secs(700)), Duration::ZERO);
    }
}
