//! One start at a time on a GPU: a model server measures free memory while it loads, and what another one takes or gives
//! back meanwhile makes it fail or take too much.
//!
//! A pod starts from its Binding, or from what is held for it, until it has been Ready. A pod with several GPUs starts on
//! all of them; one that somebody else bound could be on any. A start that takes too long keeps nobody off any more: a
//! server that hangs must not close a card for ever.

use std::fmt;
use std::sync::Arc;

use super::NodeState;
use super::facts::{Claim, Entry, Start};
use crate::api::units::{GpuId, PodUid};

/// Times come from nodes too. What begins further ahead than clocks differ is not believed: it begins so soon at the
/// latest.
pub(super) const AHEAD_MS: u64 = 10_000;

/// A start that goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Begun {
    /// How far it is.
    pub(super) start: Start,
    /// When it began, as far as that is believed.
    from_ms: u64,
    /// Whether it keeps others off.
    pub(super) counts: bool,
}

/// The pod that keeps others off a GPU while it starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Starting {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Since when, in milliseconds of the ledger's clock; `None`: its Binding is about to come.
    pub since_ms: Option<u64>,
    /// Longest that it keeps others off.
    pub limit_ms: u64,
}

impl Starting {
    /// As people are told of it.
    #[must_use]
    pub fn told(&self, now_ms: u64) -> impl fmt::Display {
        let pod = format!("{}/{}", self.namespace, self.name);
        match self.since_ms {
            None => format!("{pod} is about to start"),
            Some(since_ms) => format!(
                "{pod} is starting (for {}, at most {})",
                about(now_ms.saturating_sub(since_ms)),
                about(self.limit_ms)
            ),
        }
    }
}

/// In seconds, or minutes where it is many.
fn about(ms: u64) -> String {
    match ms / 1000 {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds => format!("{} min", seconds / 60),
    }
}

impl NodeState {
    /// Enters how far the start of a bound pod is, and tells when it keeps nobody off any more.
    pub(super) fn note_start(&mut self, uid: &PodUid, start: Start, now_ms: u64) -> Option<u64> {
        let Some(since_ms) = start.since_ms() else {
            self.starts.remove(uid);
            return None;
        };
        // Seen again, it has not begun anew.
        let known = self
            .starts
            .get(uid)
            .filter(|begun| begun.start.since_ms() == Some(since_ms));
        // Before the clock is set, everything is ahead.
        let latest_ms = match now_ms {
            0 => u64::MAX,
            now_ms => now_ms.saturating_add(AHEAD_MS),
        };
        let from_ms = known.map_or(since_ms.min(latest_ms), |begun| begun.from_ms);
        let ends_ms = self
            .start_limit_ms
            .map(|limit_ms| from_ms.saturating_add(limit_ms));
        let begun = Begun {
            start,
            from_ms,
            counts: ends_ms.is_some_and(|ends_ms| ends_ms > now_ms),
        };
        self.starts.insert(uid.clone(), begun);
        ends_ms
    }

    /// Starts that take too long keep nobody off any more.
    pub(super) fn expire_starts(&mut self, now_ms: u64) {
        let limit_ms = self.start_limit_ms;
        for begun in self.starts.values_mut() {
            let ends_ms = limit_ms.map(|limit_ms| begun.from_ms.saturating_add(limit_ms));
            begun.counts = ends_ms.is_some_and(|ends_ms| ends_ms > now_ms);
        }
    }

    /// Whether this pod's start goes on, or is about to.
    pub(super) fn begins(&self, uid: &PodUid) -> bool {
        self.holds.contains_key(uid) || self.starts.get(uid).is_some_and(|begun| begun.counts)
    }

    /// Who keeps others off this GPU, these pods not counted; of several the one that began last.
    pub(super) fn starting_on(&self, gpu: &GpuId, absent: &dyn Fn(&PodUid) -> bool) -> Option<Starting> {
        let limit_ms = self.start_limit_ms?;
        let on = |claim: &Claim| claim.gpus.as_ref().is_none_or(|gpus| gpus.contains(gpu));
        let begun = self.starts.iter().filter(|(_, begun)| begun.counts);
        let bound = begun.filter_map(|(uid, begun)| Some((self.pods.get(uid)?, Some(begun.from_ms))));
        let held = self.holds.values().map(|entry| (entry, None));
        held.chain(bound)
            .filter(|(entry, _): &(&Entry, _)| on(&entry.claim) && !absent(&entry.uid))
            .min_by_key(|(_, since_ms)| since_ms.map(|since_ms| u64::MAX - since_ms))
            .map(|(entry, since_ms)| Starting {
                namespace: entry.namespace.clone(),
                name: entry.name.clone(),
                since_ms,
                limit_ms,
            })
    }
}
