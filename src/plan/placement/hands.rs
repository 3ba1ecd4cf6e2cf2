//! The futures that are dealt from the mix, and what is scarce in them.
//!
//! The record of requests is dealt like cards, without looking at them: each hand is one way that the next requests could
//! come. What is free on the cluster is counted at the same time, for each kind of request and each demand on a node's
//! labels: what more is asked for than is there must not be given to those who could go elsewhere.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::{Arc, MutexGuard};

use super::fits_empty;
use super::mix::{Needs, Want};
use super::outlook::{Counted, Memory, NodeRoom, of_use};
use crate::api::gpu_request::GpuRequest;
use crate::api::host::Host;
use crate::api::units::Bytes;
use crate::plan::gating::Labels;
use crate::plan::ledger::{Ledger, NodeShape};
use crate::plan::room::GpuRoom;

/// Hands dealt. On the public traces 8 leave 0.1 % more of the GPUs unallocated, 32 are no better.
const HANDS: usize = 16;
/// Cards in a hand. A hand goes once round a node; what comes later goes elsewhere.
const CARDS: usize = 32;
/// How far ahead one looks: so many times what is free. Of what comes, most goes to other nodes.
const HORIZON: u64 = 4;
/// What is needed more than so many times over is as scarce as can be.
const PRESSING: u64 = 4;
/// The whole, where parts of one are counted.
pub(super) const PARTS: u64 = 1 << 16;

/// Some ways in which the next requests could come, and what is scarce for them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hands {
    hands: Vec<Vec<Card>>,
    /// Every different request with its weight; all together weigh [`PARTS`].
    kinds: Vec<(Card, u64)>,
    /// Every different demand on labels, and how much of what meets it will be asked for, in [`PARTS`].
    needs: Vec<(Needs, u64)>,
    mean: Bytes,
    smallest: Bytes,
    memory: Memory,
}

/// One request that may come.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Card {
    /// GPU memory.
    pub gpus: GpuRequest,
    /// CPU and memory of the machine.
    pub host: Host,
    /// Which of [`Hands::needs`].
    pub needs: usize,
}

impl Hands {
    /// Deals the requests. The same requests in the same order and the same field give the same hands.
    #[must_use]
    pub fn deal<'a>(requests: impl Iterator<Item = &'a Want>, field: &Field) -> Hands {
        // What no node could ever take would make everything else look small.
        let possible = |gpus: &GpuRequest| field.shapes.iter().any(|shape| fits_empty(shape, gpus));
        let mut needs: Vec<Needs> = Vec::new();
        let mut cards: Vec<Card> = requests
            .filter_map(|want| {
                let number = needs.iter().position(|known| *known == want.needs);
                let gpus = want.gpus.clone().filter(possible)?;
                Some(Card {
                    gpus,
                    host: want.host,
                    needs: number.unwrap_or_else(|| {
                        needs.push(want.needs.clone());
                        needs.len() - 1
                    }),
                })
            })
            .collect();
        if cards.is_empty() {
            return Hands::default();
        }
        // In the order in which they were first asked: no chance in sums.
        let (mut kinds, mut places): (Vec<(Card, u128)>, HashMap<Card, usize>) = Default::default();
        for card in &cards {
            let place = *places.entry(card.clone()).or_insert_with(|| {
                kinds.push((card.clone(), 0));
                kinds.len() - 1
            });
            kinds[place].1 += total(&card.gpus);
        }
        let asked: u128 = kinds.iter().map(|(_, asked)| asked).sum();
        let mean = asked / cards.len() as u128;
        let smallest = cards.iter().map(|card| card.gpus.bytes_per_gpu).min();
        let supply = Supply::count(&kinds, &needs, field);
        let needs = supply.press(needs, &kinds);
        let kinds = supply.weigh(kinds);
        shuffle(&mut cards);
        let hand = |first: usize| {
            let places = (0..CARDS).map(|card| (card * HANDS + first) % cards.len());
            places.map(|place| cards[place].clone()).collect()
        };
        Hands {
            hands: (0..HANDS).map(hand).collect(),
            kinds,
            needs,
            mean: Bytes(u64::try_from(mean).unwrap_or(u64::MAX)),
            smallest: smallest.unwrap_or_default(),
            memory: Memory::default(),
        }
    }

    /// What has been counted with these hands.
    pub(super) fn counted(&self) -> MutexGuard<'_, Counted> {
        self.memory.open()
    }

    /// Whether nothing was ever asked.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.hands.is_empty()
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.hands.len()
    }

    /// What one request asks in the mean, on all its GPUs together.
    pub(super) fn mean(&self) -> Bytes {
        self.mean
    }

    /// What any request asks of a GPU at least.
    pub(super) fn smallest(&self) -> Bytes {
        self.smallest
    }

    /// The hands, each as far as one looks with so much free.
    pub(super) fn ahead(&self, free: Bytes) -> impl Iterator<Item = &[Card]> {
        let cards = free.0.saturating_mul(HORIZON).div_ceil(self.mean.0.max(1));
        let cards = usize::try_from(cards).map_or(CARDS, |cards| cards.min(CARDS));
        self.hands.iter().map(move |hand| &hand[..cards])
    }

    /// Every different request with its weight, of [`PARTS`] in all.
    pub(super) fn kinds(&self) -> &[(Card, u64)] {
        &self.kinds
    }

    /// For each of the different [`Needs`], whether a node with these labels meets it.
    pub(super) fn met_by(&self, labels: &Labels) -> Vec<bool> {
        self.needs.iter().map(|(needs, _)| needs.met_by(labels)).collect()
    }

    /// The order of labels by which of the needs they meet.
    pub(super) fn compare(&self, a: &Labels, b: &Labels) -> Ordering {
        let needs = self.needs.iter().filter(|(needs, _)| !needs.is_empty());
        needs
            .map(|(needs, _)| needs.met_by(a).cmp(&needs.met_by(b)))
            .find(|order| order.is_ne())
            .unwrap_or(Ordering::Equal)
    }

    /// What a byte on a node that meets these of the needs takes from requests that can go nowhere else, in [`PARTS`].
    /// Nothing as long as there is plenty for them, a byte when they will need all of it: the square of the part that
    /// they will ask for.
    pub(super) fn price(&self, meets: &[bool]) -> u64 {
        let met = self.needs.iter().zip(meets).filter(|(_, met)| **met);
        let pressure: u64 = met.map(|((_, pressure), _)| pressure).sum();
        let pressure = pressure.min(PRESSING * PARTS);
        pressure * pressure / PARTS
    }
}

/// What is free, as far as it matters for the deal. It is read at once and dealt on at leisure: with thousands of nodes
/// that takes longer than a pod should wait.
#[derive(Clone, Debug, Default)]
pub struct Field {
    /// Every different shape of node.
    shapes: Vec<NodeShape>,
    /// The nodes that take new pods.
    plots: Vec<Plot>,
}

#[derive(Clone, Debug)]
struct Plot {
    host: Host,
    gpus: Vec<GpuRoom>,
    labels: Arc<Labels>,
}

impl Field {
    /// What is free by this ledger.
    #[must_use]
    pub fn of(ledger: &Ledger) -> Field {
        let mut field = Field::default();
        for node in ledger.nodes() {
            if !field.shapes.iter().any(|known| node.has_shape(known)) {
                field.shapes.push(node.shape());
            }
            if node.row().open {
                let working = node.gpus().iter().filter(|gpu| gpu.closed.is_none());
                field.plots.push(Plot {
                    host: node.host(),
                    gpus: working.map(GpuRoom::from).collect(),
                    labels: node.labels().clone(),
                });
            }
        }
        field
    }
}

/// Bytes that a request asks on all its GPUs together.
pub(super) fn total(request: &GpuRequest) -> u128 {
    u128::from(request.bytes_per_gpu.0) * u128::from(request.gpus.get())
}

/// Free bytes of the nodes that take new pods: of all, of use to each kind of request, and for each demand on labels.
struct Supply {
    free: u128,
    for_kind: Vec<u128>,
    for_needs: Vec<u128>,
}

impl Supply {
    fn count(kinds: &[(Card, u128)], needs: &[Needs], field: &Field) -> Supply {
        let mut supply = Supply {
            free: 0,
            for_kind: vec![0; kinds.len()],
            for_needs: vec![0; needs.len()],
        };
        for plot in &field.plots {
            let room = NodeRoom {
                host: plot.host,
                gpus: plot.gpus.clone(),
                meets: needs.iter().map(|needs| needs.met_by(&plot.labels)).collect(),
            };
            let free = u128::from(room.free().0);
            supply.free += free;
            for (sum, (card, _)) in supply.for_kind.iter_mut().zip(kinds) {
                *sum += of_use(&room, card);
            }
            for (sum, met) in supply.for_needs.iter_mut().zip(&room.meets) {
                *sum += if *met { free } else { 0 };
            }
        }
        supply
    }

    /// What is asked, times all that is free, over what is free for it: how scarce that will be once the requests have
    /// asked for all. What is nearly gone is scarce, and not infinitely so.
    fn pressure(&self, asked: u128, there: u128) -> u128 {
        asked.saturating_mul(self.free + 1) / there.max(self.free / 100 + 1)
    }

    /// The kinds of request, each with its weight.
    fn weigh(&self, kinds: Vec<(Card, u128)>) -> Vec<(Card, u64)> {
        let weigh = |((_, asked), there): (&(Card, u128), &u128)| self.pressure(*asked, *there);
        let weights: Vec<u128> = kinds.iter().zip(&self.for_kind).map(weigh).collect();
        let all = weights.iter().sum::<u128>().max(1);
        let part = |weight: u128| u64::try_from(weight.saturating_mul(PARTS.into()) / all).unwrap_or(PARTS);
        let kinds = kinds.into_iter().zip(weights);
        kinds.map(|((card, _), weight)| (card, part(weight))).collect()
    }

    /// The demands on labels, each with the part of what meets it that will be asked for.
    fn press(&self, needs: Vec<Needs>, kinds: &[(Card, u128)]) -> Vec<(Needs, u64)> {
        let asked = |number: Option<usize>| -> u128 {
            let alike = kinds
                .iter()
                .filter(|(card, _)| number.is_none_or(|number| card.needs == number));
            alike.map(|(_, asked)| asked).sum()
        };
        let all = asked(None).max(1);
        let pressure = |number: usize| {
            let part = asked(Some(number)) * u128::from(PARTS) / all;
            u64::try_from(self.pressure(part, self.for_needs[number])).unwrap_or(u64::MAX)
        };
        let pressures: Vec<u64> = (0..needs.len())
            .map(|number| {
                if needs[number].is_empty() {
                    0
                } else {
                    pressure(number)
                }
            })
            .collect();
        needs.into_iter().zip(pressures).collect()
    }
}

/// Fisher and Yates' shuffle with Steele's SplitMix64 (OOPSLA 2014) from a fixed start: no chance in a decision.
fn shuffle(cards: &mut [Card]) {
    let mut state: u64 = 0;
    for place in (1..cards.len()).rev() {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = state;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^= mixed >> 31;
        // The remainder is below the number of cards, a usize.
        let other = usize::try_from(mixed % (place as u64 + 1)).unwrap_or(place);
        cards.swap(place, other);
    }
}
