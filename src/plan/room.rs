//! Whether pods fit on GPUs, for plans about nodes: a copy of the free memory that a plan may fill as it thinks.
//! The ledger has the last word at bind time; here it is enough never to call a full node free.

use crate::api::gpu_request::{GpuRequest, Sharing};
use crate::api::units::Bytes;

/// What one GPU has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

    fn takes(&self, request: &GpuRequest) -> bool {
        !self.exclusive
            && self.free >= request.bytes_per_gpu
            && (request.sharing == Sharing::Shared || self.empty)
    }
}

/// Puts the request on the fullest GPUs that take it, and says whether they were enough. Nothing changes if not.
pub fn take(gpus: &mut [GpuRoom], request: &GpuRequest) -> bool {
    let wanted = usize::try_from(request.gpus.get()).unwrap_or(usize::MAX);
    let mut fitting: Vec<usize> = (0..gpus.len()).filter(|&i| gpus[i].takes(request)).collect();
    if fitting.len() < wanted {
        return false;
    }
    fitting.sort_by_key(|&i| (gpus[i].free, i));
    for &i in fitting.iter().take(wanted) {
        let gpu = &mut gpus[i];
        gpu.empty = false;
        match request.sharing {
            Sharing::Shared => gpu.free = gpu.free.saturating_sub(request.bytes_per_gpu),
            Sharing::Exclusive => {
                gpu.free = Bytes(0);
                gpu.exclusive = true;
            }
        }
    }
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
