//! On which GPUs of which node a pod goes: the fullest that fit, so that whole cards and whole nodes stay empty.
//! The same input always gives the same answer.

use std::fmt;

use crate::api::gpu_request::{GpuRequest, Sharing};
use crate::api::units::{Bytes, GpuId, NodeName, PodUid};

use super::ledger::{GpuRoom, Ledger};

/// The highest score that a kube-scheduler extender may give.
pub const MAX_SCORE: i64 = 10;

/// A place for a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The node.
    pub node: NodeName,
    /// The GPUs, by index.
    pub gpus: Vec<GpuId>,
    /// What stays free on those GPUs.
    pub left_on_gpus: Bytes,
    /// What stays free on the whole node.
    pub left_on_node: Bytes,
}

/// Why a pod does not go on a node. The text is shown by `kubectl describe pod`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The node takes no new pods at all.
    Closed(String),
    /// Not enough GPUs with that much free memory.
    NoRoom {
        /// What was asked.
        request: GpuRequest,
        /// GPUs that would have had room.
        fitting: usize,
        /// Index and free memory of the GPU with most room among those without enough.
        nearest: Option<(u32, Bytes)>,
        /// GPUs that are unhealthy.
        unhealthy: usize,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Closed(reason) => f.write_str(reason),
            Refusal::NoRoom {
                request,
                fitting,
                nearest,
                unhealthy,
            } => {
                match (request.gpus.get(), request.sharing) {
                    (1, Sharing::Shared) => write!(f, "no GPU has {} free", request.bytes_per_gpu)?,
                    (1, Sharing::Exclusive) => {
                        write!(f, "no GPU of {} is free of other pods", request.bytes_per_gpu)?;
                    }
                    (gpus, Sharing::Shared) => {
                        write!(
                            f,
                            "{fitting} of the {gpus} GPUs asked for have {} free",
                            request.bytes_per_gpu
                        )?;
                    }
                    (gpus, Sharing::Exclusive) => {
                        write!(f, "{fitting} of the {gpus} GPUs asked for are free of other pods")?;
                    }
                }
                if let Some((index, free)) = nearest {
                    write!(f, "; GPU {index} comes nearest with {free}")?;
                }
                if *unhealthy > 0 {
                    write!(f, "; {unhealthy} unhealthy")?;
                }
                Ok(())
            }
        }
    }
}

/// The place of a pod on one node, with the pods in `without` taken out of the ledger.
///
/// # Errors
/// Why it does not go there.
pub fn place(
    ledger: &Ledger,
    node: &NodeName,
    request: &GpuRequest,
    without: &[PodUid],
) -> Result<Place, Refusal> {
    ledger.open(node).map_err(Refusal::Closed)?;
    let rooms = ledger.room(node, without);
    let fits = |room: &&GpuRoom<'_>| {
        room.gpu.unhealthy.is_none()
            && room.free >= request.bytes_per_gpu
            && (request.sharing == Sharing::Shared || !room.taken)
    };
    let wanted = request.gpus.get() as usize;
    let mut fitting: Vec<&GpuRoom<'_>> = rooms.iter().filter(fits).collect();
    if fitting.len() < wanted {
        let nearest = rooms
            .iter()
            .filter(|room| room.gpu.unhealthy.is_none() && !fits(room))
            .max_by_key(|room| (room.free, std::cmp::Reverse(room.gpu.index)))
            .map(|room| (room.gpu.index, room.free));
        return Err(Refusal::NoRoom {
            request: request.clone(),
            fitting: fitting.len(),
            nearest,
            unhealthy: rooms.iter().filter(|room| room.gpu.unhealthy.is_some()).count(),
        });
    }
    // Best fit: the GPUs with least left. The order by index before makes equals come out the same each time.
    fitting.sort_by_key(|room| (room.free, room.gpu.index));
    fitting.truncate(wanted);
    fitting.sort_by_key(|room| room.gpu.index);
    let takes = |room: &GpuRoom<'_>| match request.sharing {
        Sharing::Shared => request.bytes_per_gpu,
        Sharing::Exclusive => room.free,
    };
    let taken: Bytes = fitting.iter().map(|room| takes(room)).sum();
    Ok(Place {
        node: node.clone(),
        gpus: fitting.iter().map(|room| room.gpu.id.clone()).collect(),
        left_on_gpus: fitting
            .iter()
            .map(|room| room.free)
            .sum::<Bytes>()
            .saturating_sub(taken),
        left_on_node: rooms
            .iter()
            .map(|room| room.free)
            .sum::<Bytes>()
            .saturating_sub(taken),
    })
}

/// The places of a pod, best first: least left on its GPUs, then the fullest node, then by name.
#[must_use]
pub fn rank(mut places: Vec<Place>) -> Vec<Place> {
    places.sort_by(|a, b| {
        (a.left_on_gpus, a.left_on_node, &a.node).cmp(&(b.left_on_gpus, b.left_on_node, &b.node))
    });
    places
}

/// The score of the place with this rank (0 is the best). Only the best gets [`MAX_SCORE`], so that nothing but the
/// ranking decides among nodes that the scheduler itself finds equal.
#[must_use]
pub fn score(rank: usize) -> i64 {
    (MAX_SCORE - i64::try_from(rank).unwrap_or(MAX_SCORE)).max(0)
}

/// Whether any node has room for the pod now.
#[must_use]
pub fn fits_anywhere(ledger: &Ledger, request: &GpuRequest) -> bool {
    ledger
        .nodes()
        .any(|node| place(ledger, node, request, &[]).is_ok())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::HashMap;
    use std::num::NonZeroU32;

    use proptest::prelude::*;

    use super::*;
    use crate::plan::ledger::{GpuFacts, Reservation};

    const GPU: u64 = 24;

    fn node(index: usize) -> NodeName {
        NodeName::from(format!("node-{index}").as_str())
    }

    fn uid(index: usize) -> PodUid {
        PodUid::from(format!("uid-{index}").as_str())
    }

    fn cluster(nodes: usize, gpus: u32) -> Ledger {
        let mut ledger = Ledger::default();
        for n in 0..nodes {
            ledger.node_seen(&node(n), None);
            ledger.gpus_seen(&node(n), inventory(n, gpus));
        }
        ledger
    }

    fn inventory(n: usize, gpus: u32) -> Vec<GpuFacts> {
        (0..gpus)
            .map(|index| GpuFacts {
                id: GpuId::from(format!("GPU-{n}-{index}").as_str()),
                index,
                usable: Bytes(GPU),
                unhealthy: None,
            })
            .collect()
    }

    fn request(gpus: u32, bytes: u64, sharing: Sharing) -> GpuRequest {
        GpuRequest {
            gpus: NonZeroU32::new(gpus).unwrap(),
            bytes_per_gpu: Bytes(bytes),
            sharing,
        }
    }

    fn reservation(place: &Place, request: &GpuRequest) -> Reservation {
        Reservation {
            pod: "models/x".to_owned(),
            node: place.node.clone(),
            gpus: place.gpus.clone(),
            bytes_per_gpu: request.bytes_per_gpu,
            exclusive: request.sharing == Sharing::Exclusive,
        }
    }

    fn best(ledger: &Ledger, request: &GpuRequest) -> Option<Place> {
        let places = ledger
            .nodes()
            .filter_map(|node| place(ledger, node, request, &[]).ok())
            .collect();
        rank(places).into_iter().next()
    }

    #[test]
    fn two_that_fit_together_share_one_gpu() {
        let mut ledger = cluster(3, 2);
        let (a, b) = (request(1, 10, Sharing::Shared), request(1, 12, Sharing::Shared));
        let first = best(&ledger, &a).unwrap();
        ledger.pod_bound(&uid(0), reservation(&first, &a));
        let second = best(&ledger, &b).unwrap();
        assert_eq!(first.gpus, second.gpus);
    }

    #[test]
    fn refusal_names_the_nearest_miss() {
        let mut ledger = cluster(1, 2);
        let a = request(1, 20, Sharing::Shared);
        let place_a = best(&ledger, &a).unwrap();
        ledger.pod_bound(&uid(0), reservation(&place_a, &a));
        let refusal = place(&ledger, &node(0), &request(2, 10, Sharing::Shared), &[]).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "1 of the 2 GPUs asked for have 10 B free; GPU 0 comes nearest with 4 B"
        );
    }

    #[test]
    fn adversarial_closed_unknown_and_unhealthy_take_nothing() {
        let mut ledger = cluster(1, 1);
        let one = request(1, 1, Sharing::Shared);
        assert!(place(&ledger, &node(7), &one, &[]).is_err());
        ledger.node_seen(&node(0), Some("the node is being emptied".to_owned()));
        assert_eq!(
            place(&ledger, &node(0), &one, &[]),
            Err(Refusal::Closed("the node is being emptied".to_owned()))
        );
        ledger.node_seen(&node(0), None);
        let mut lost = inventory(0, 1);
        lost[0].unhealthy = Some("lost".to_owned());
        ledger.gpus_seen(&node(0), lost);
        assert!(place(&ledger, &node(0), &one, &[]).is_err());
        ledger.gpus_seen(&node(0), inventory(0, 1));
        ledger.node_gone(&node(0));
        assert!(place(&ledger, &node(0), &one, &[]).is_err());
    }

    #[test]
    fn a_pod_that_somebody_else_bound_counts_on_every_gpu_of_its_node() {
        let mut ledger = cluster(1, 2);
        let unassigned = Reservation {
            pod: "models/x".to_owned(),
            node: node(0),
            gpus: Vec::new(),
            bytes_per_gpu: Bytes(20),
            exclusive: false,
        };
        ledger.pod_bound(&uid(0), unassigned);
        assert!(place(&ledger, &node(0), &request(1, 5, Sharing::Shared), &[]).is_err());
        assert!(place(&ledger, &node(0), &request(1, 4, Sharing::Shared), &[]).is_ok());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Ask {
            gpus: u32,
            bytes: u64,
            exclusive: bool,
            bind: bool,
        },
        Gone(usize),
        Lapse,
        Close(usize, bool),
        Lose(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (1u32..=2, 1u64..=GPU, prop::bool::weighted(0.2), prop::bool::weighted(0.8))
                .prop_map(|(gpus, bytes, exclusive, bind)| Step::Ask { gpus, bytes, exclusive, bind }),
            3 => (0usize..40).prop_map(Step::Gone),
            1 => Just(Step::Lapse),
            1 => (0usize..3, any::<bool>()).prop_map(|(n, closed)| Step::Close(n, closed)),
            1 => (0usize..3).prop_map(Step::Lose),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        /// Whatever happens in whatever order: no GPU is given out twice over, and the ledger made event by event is
        /// the one made anew from what is bound.
        #[test]
        fn never_over_a_gpus_memory_and_equal_to_one_made_anew(steps in prop::collection::vec(step(), 1..40)) {
            let mut ledger = cluster(3, 2);
            let mut bound: HashMap<usize, Reservation> = HashMap::new();
            let mut closed = [false; 3];
            let mut lost = [false; 3];
            for (index, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Ask { gpus, bytes, exclusive, bind } => {
                        let sharing = if exclusive { Sharing::Exclusive } else { Sharing::Shared };
                        let request = request(gpus, bytes, sharing);
                        prop_assert_eq!(best(&ledger, &request), best(&ledger, &request));
                        if let Some(place) = best(&ledger, &request) {
                            ledger.expect(&uid(index), reservation(&place, &request), 1);
                            if bind {
                                ledger.pod_bound(&uid(index), reservation(&place, &request));
                                ledger.pod_bound(&uid(index), reservation(&place, &request));
                                bound.insert(index, reservation(&place, &request));
                            }
                        }
                    }
                    Step::Gone(index) => {
                        ledger.pod_gone(&uid(index));
                        bound.remove(&index);
                    }
                    Step::Lapse => ledger.lapse(1),
                    Step::Close(n, close) => {
                        closed[n] = close;
                        ledger.node_seen(&node(n), close.then(|| "closed".to_owned()));
                    }
                    Step::Lose(n) => {
                        lost[n] = !lost[n];
                        let mut gpus = inventory(n, 2);
                        if lost[n] {
                            gpus[0].unhealthy = Some("lost".to_owned());
                        }
                        ledger.gpus_seen(&node(n), gpus);
                    }
                }
                for n in 0..3 {
                    for gpu in 0..2 {
                        let id = GpuId::from(format!("GPU-{n}-{gpu}").as_str());
                        let on: Vec<&Reservation> = bound.values().filter(|r| r.gpus.contains(&id)).collect();
                        prop_assert!(on.iter().map(|r| r.bytes_per_gpu.0).sum::<u64>() <= GPU);
                        prop_assert!(on.len() <= 1 || on.iter().all(|r| !r.exclusive));
                    }
                }
            }
            ledger.lapse(1);
            let mut anew = Ledger::default();
            for (index, reservation) in &bound {
                anew.pod_bound(&uid(*index), reservation.clone());
            }
            for n in (0..3).rev() {
                let mut gpus = inventory(n, 2);
                if lost[n] {
                    gpus[0].unhealthy = Some("lost".to_owned());
                }
                anew.gpus_seen(&node(n), gpus);
                anew.node_seen(&node(n), closed[n].then(|| "closed".to_owned()));
            }
            prop_assert_eq!(&anew, &ledger);
            for n in 0..3 {
                prop_assert_eq!(anew.room(&node(n), &[]), ledger.room(&node(n), &[]));
            }
        }
    }
}
