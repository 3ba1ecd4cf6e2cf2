//! Whether pods fit on GPUs, for plans about nodes: a copy of the free memory that a plan may fill as it thinks.
//! The ledger has the last word at bind time; here it is enough never to call a full node free.

use crate::api::gpu_request::{GpuRequest, Sharing};
use crate::api::units::Bytes;

/// What one GPU has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GpuRoom {
    /// Memory that pods can have when nothing is on it.
    pub usable: Bytes,
    /// Memory that is left.
    pub free: Bytes,
    /// Whether nothing has any of it.
    pub empty: bool,
    /// Whether one pod has the whole card.
    pub exclusive: bool,
}

impl GpuRoom {
    /// A GPU that nobody uses.
    #[must_use]
    pub const fn empty(usable: Bytes) -> Self {
        Self {
            usable,
            free: usable,
            empty: true,
            exclusive: false,
        }
    }

    /// Whether it has room for the request's part on one GPU.
    #[must_use]
    pub fn takes(&self, request: &GpuRequest) -> bool {
        !self.exclusive
            && self.free >= request.bytes_per_gpu
            && (request.sharing == Sharing::Shared || self.empty)
    }
}

/// GPUs of one node by their position in a list; those beyond the 64th are left alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Picked(pub u64);

impl Picked {
    /// Most GPUs of a node that are looked at, as many as a pod can ask for.
    pub const MOST: usize = 64;

    /// Whether the GPU at this position is among them.
    #[must_use]
    pub const fn has(self, position: usize) -> bool {
        self.0 >> position & 1 == 1
    }

    /// These and the one at this position.
    #[must_use]
    pub const fn with(self, position: usize) -> Picked {
        Picked(self.0 | 1 << position)
    }
}

/// The GPUs that the request would get: the first by `order` of those that take it. `None` if there are too few.
pub fn pick<K: Ord>(gpus: &[GpuRoom], request: &GpuRequest, order: impl Fn(&GpuRoom) -> K) -> Option<Picked> {
    let mut picked = Picked::default();
    for _ in 0..request.gpus.get() {
        let next = gpus.iter().take(Picked::MOST).enumerate();
        let (position, _) = next
            .filter(|(position, gpu)| !picked.has(*position) && gpu.takes(request))
            .min_by_key(|(_, gpu)| order(gpu))?;
        picked = picked.with(position);
    }
    Some(picked)
}

/// Gives the request these GPUs, which take it.
pub fn give(gpus: &mut [GpuRoom], request: &GpuRequest, picked: Picked) {
    for (position, gpu) in gpus.iter_mut().take(Picked::MOST).enumerate() {
        if picked.has(position) {
            gpu.empty = false;
            match request.sharing {
                Sharing::Shared => gpu.free = gpu.free.saturating_sub(request.bytes_per_gpu),
                Sharing::Exclusive => {
                    gpu.free = Bytes(0);
                    gpu.exclusive = true;
                }
            }
        }
    }
}

/// Puts the request on the fullest GPUs that take it, of equals the smallest card and one in use, and says whether they
/// were enough. Nothing changes if not.
pub fn take(gpus: &mut [GpuRoom], request: &GpuRequest) -> bool {
    let Some(picked) = pick(gpus, request, |gpu| (gpu.free, gpu.usable, gpu.empty)) else {
        return false;
    };
    give(gpus, request, picked);
    true
}

/// Whether the request fits there once everything else is gone.
#[must_use]
pub fn fits_when_empty(gpus: &[GpuRoom], request: &GpuRequest) -> bool {
    let mut emptied: Vec<GpuRoom> = gpus.iter().map(|gpu| GpuRoom::empty(gpu.usable)).collect();
    take(&mut emptied, request)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::num::NonZeroU32;

    const GIB: u64 = 1 << 30;

    fn ask(gpus: u32, gib: u64, sharing: Sharing) -> GpuRequest {
        GpuRequest {
            gpus: NonZeroU32::new(gpus).expect("not 0"),
            bytes_per_gpu: Bytes(gib * GIB),
            sharing,
        }
    }

    #[test]
    fn memory_of_several_cards_is_not_added_up() {
        let mut gpus = [GpuRoom::empty(Bytes(24 * GIB)); 2];
        assert!(!take(&mut gpus, &ask(1, 30, Sharing::Shared)));
        assert!(take(&mut gpus, &ask(2, 20, Sharing::Shared)));
        assert!(!take(&mut gpus, &ask(1, 5, Sharing::Shared)));
        assert!(take(&mut gpus, &ask(1, 4, Sharing::Shared)));
    }

    #[test]
    fn fills_the_fullest_card_first_and_keeps_whole_cards_whole() {
        let mut gpus = [GpuRoom::empty(Bytes(24 * GIB)); 2];
        assert!(take(&mut gpus, &ask(1, 10, Sharing::Shared)));
        assert!(take(&mut gpus, &ask(1, 10, Sharing::Shared)));
        assert!(gpus[1].empty);
        assert!(take(&mut gpus, &ask(1, 1, Sharing::Exclusive)));
        assert!(!take(&mut gpus, &ask(1, 5, Sharing::Shared)));
        assert!(fits_when_empty(&gpus, &ask(2, 24, Sharing::Exclusive)));
        assert!(!fits_when_empty(&gpus, &ask(2, 25, Sharing::Shared)));
    }
}
