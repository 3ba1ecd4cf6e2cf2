//! What is left of pods that are gone.
//!
//! A pod whose containers have ended has given its memory back, whatever an older reading says. One that was deleted by
//! force leaves the API while its processes may live: what it had stays taken until a later reading shows that it is
//! gone. Where NVML tells memory per process, the reading itself counts what such a process has; where it does not, the
//! card's total has to fall to what the pods that are there account for. Neither is waited for longer than
//! [`AT_MOST_MS`]; what is still in use then counts as foreign.

use super::NodeState;
use super::facts::{Entry, GpuFacts, Inventory, Start};
use crate::api::units::{Bytes, PodUid};

/// Longest that a deleted pod's memory is held without a reading that shows it.
pub(super) const AT_MOST_MS: u64 = 120_000;

/// What a deleted pod may still have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Remains {
    /// What it had.
    pub(super) entry: Entry,
    /// When it is not waited for any more.
    pub(super) until_ms: u64,
}

impl NodeState {
    /// Takes a bound pod off, and tells whether it may have left something; `ended`: its containers have ended.
    pub(super) fn depart(&mut self, uid: &PodUid, ended: bool, until_ms: u64) -> bool {
        let start = self.starts.remove(uid).map(|begun| begun.start);
        let (Some(entry), Some(inventory)) = (self.pods.remove(uid), &self.inventory) else {
            return false;
        };
        if !ended && !matches!(start, Some(Start::Bound { .. })) {
            self.remains.insert(uid.clone(), Remains { entry, until_ms });
            return true;
        }
        if inventory
            .gpus
            .iter()
            .any(|gpu| gpu.used.is_some() || !gpu.used_by.is_empty())
        {
            self.departed.push(entry);
        }
        false
    }

    /// Enters a new reading, which settles what older ones left open.
    pub(super) fn read(&mut self, inventory: Inventory) {
        self.departed.clear();
        let mut remains = std::mem::take(&mut self.remains);
        remains.retain(|_, remains| {
            let mut had = inventory.gpus.iter().filter(|gpu| is_on(&remains.entry, gpu));
            had.any(|gpu| self.may_show(gpu))
        });
        self.remains = remains;
        self.inventory = Some(inventory);
    }

    /// There are no readings any more.
    pub(super) fn unread(&mut self) {
        self.inventory = None;
        self.departed.clear();
        self.remains.clear();
    }

    /// What nobody waits for any more is given up.
    pub(super) fn expire_remains(&mut self, now_ms: u64) {
        self.remains.retain(|_, remains| remains.until_ms > now_ms);
    }

    /// Whether memory of a deleted pod may be in this reading, without being told apart in it. Pods that start do not
    /// have yet what they declared, so they account for nothing.
    fn may_show(&self, gpu: &GpuFacts) -> bool {
        let loaded = self
            .pods
            .values()
            .filter(|entry| !self.starts.contains_key(&entry.uid));
        let accounted: Bytes = loaded
            .filter(|entry| is_on(entry, gpu))
            .map(|entry| entry.claim.bytes_per_gpu)
            .sum();
        gpu.foreign.is_none() && gpu.used.is_none_or(|used| used > accounted)
    }

    /// Memory of pods that have nothing on this GPU, or not any more, as the reading tells it per pod. What those had that
    /// went since then is not counted.
    pub(super) fn strays(&self, gpu: &GpuFacts) -> Bytes {
        let here = |entry: &Entry| is_on(entry, gpu);
        let known = |uid: &PodUid| {
            self.pods.get(uid).is_some_and(here)
                || self.holds.get(uid).is_some_and(here)
                || self.remains.get(uid).is_some_and(|remains| here(&remains.entry))
                || self.departed.iter().any(|entry| entry.uid == *uid && here(entry))
        };
        let strays = gpu.used_by.iter().filter(|(uid, _)| !known(uid));
        strays.map(|(_, used)| *used).sum()
    }
}

fn is_on(entry: &Entry, gpu: &GpuFacts) -> bool {
    let gpus = entry.claim.gpus.as_ref();
    gpus.is_none_or(|gpus| gpus.contains(&gpu.id))
}
