//! How often something may be written: so many at once, then one each so often.

use std::time::Duration;

use tokio::time::Instant;

/// A bucket of permits that fills up again with time. The clock is the caller's.
#[derive(Clone, Debug)]
pub struct Budget {
    /// When the bucket would be full; each permit taken moves it one refill further.
    full_at: Option<Instant>,
    refill: Duration,
    depth: Duration,
}

impl Budget {
    /// A full bucket of `burst` permits, one of which comes back each `refill`.
    #[must_use]
    pub fn new(burst: u32, refill: Duration) -> Self {
        Self {
            full_at: None,
            refill,
            depth: refill * burst,
        }
    }

    /// Takes a permit, or says when the next one is there.
    ///
    /// # Errors
    /// The time from which a permit can be had.
    pub fn take(&mut self, now: Instant) -> Result<(), Instant> {
        let full_at = self.full_at.map_or(now, |at| at.max(now)) + self.refill;
        if full_at <= now + self.depth {
            self.full_at = Some(full_at);
            Ok(())
        } else {
            Err(full_at - self.depth)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_one_each_refill() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut budget = Budget::new(3, 5 * second);
        for _ in 0..3 {
            assert_eq!(budget.take(start), Ok(()));
        }
        let next = start + 5 * second;
        assert_eq!(budget.take(start), Err(next));
        assert_eq!(budget.take(start + 4 * second), Err(next));
        assert_eq!(budget.take(next), Ok(()));
        assert_eq!(budget.take(next), Err(next + 5 * second));
        // Left alone for long it holds the burst, not more.
        let later = start + 1000 * second;
        assert_eq!((0..10).filter(|_| budget.take(later).is_ok()).count(), 3);
    }
}
