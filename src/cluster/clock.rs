//! The ledger's clock: milliseconds since the epoch as they were when the process began, and counted on from there, so
//! that it can be held against times in objects and yet never goes back.

use std::time::{SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

/// A clock. Cheap to copy; all copies are one.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    epoch_ms: u64,
    began: Instant,
}

impl Clock {
    /// Reads the machine's clock once.
    #[must_use]
    pub fn start() -> Self {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            epoch_ms: millis(since_epoch),
            began: Instant::now(),
        }
    }

    /// Milliseconds since the epoch.
    #[must_use]
    pub fn now_ms(self) -> u64 {
        self.epoch_ms.saturating_add(millis(self.began.elapsed()))
    }
}

fn millis(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
