//! What the cluster is asked for: a record of the last requests, and the futures that are dealt from it.
//!
//! Nobody knows the distribution of requests, and it changes. So the record *is* the mix: each pod's request counts
//! once, and goes when enough newer ones have come. Futures are dealt from it like cards, without looking at them: each
//! hand is one way that the next requests could come.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;

use crate::api::gpu_request::GpuRequest;
use crate::api::host::Host;
use crate::api::units::{Bytes, PodUid};
use crate::plan::gating::Labels;

/// Requests remembered. Twice what is dealt, so that a hand is a sample and not the order in which they came.
pub const REMEMBERED: usize = 1024;
/// Hands dealt. On the public traces 8 leave 0.1 % more of the GPUs unallocated, 32 are no better.
const HANDS: usize = 16;
/// Cards in a hand. A hand goes once round a node; what comes later goes elsewhere.
const CARDS: usize = 32;
/// How far ahead one looks: so many times what is free. Of what comes, most goes to other nodes.
const HORIZON: u64 = 4;

/// What a pod asks of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Want {
    /// GPU memory, if any.
    pub gpus: Option<GpuRequest>,
    /// CPU and memory of the machine.
    pub host: Host,
    /// What it wants of the node's labels.
    pub needs: Needs,
}

/// Labels that a node must have: each key with one of the values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs(BTreeMap<Arc<str>, Vec<Arc<str>>>);

impl Needs {
    /// Asks for one of these values, beside what was asked for before.
    pub fn require<'a>(&mut self, key: &str, values: impl Iterator<Item = &'a str>) {
        let values: Vec<Arc<str>> = values.map(Arc::from).collect();
        match self.0.get_mut(key) {
            Some(earlier) => earlier.retain(|value| values.contains(value)),
            None => {
                self.0.insert(key.into(), values);
            }
        }
    }

    /// Whether a node with these labels will do.
    #[must_use]
    pub fn met_by(&self, labels: &Labels) -> bool {
        self.0.iter().all(|(key, values)| {
            let is = labels.get(&**key);
            is.is_some_and(|is| values.iter().any(|value| **value == **is))
        })
    }
}

/// The last requests for GPU memory.
#[derive(Clone, Debug, Default)]
pub struct Mix {
    recent: VecDeque<(PodUid, Want)>,
    known: HashSet<PodUid>,
    seen: usize,
    dealt: Arc<Hands>,
}

impl Mix {
    /// Remembers what a pod asks, once however often it is tried.
    pub fn observe(&mut self, pod: &PodUid, want: &Want) {
        if want.gpus.is_none() || !self.known.insert(pod.clone()) {
            return;
        }
        if self.recent.len() == REMEMBERED
            && let Some((oldest, _)) = self.recent.pop_front()
        {
            self.known.remove(&oldest);
        }
        self.recent.push_back((pod.clone(), want.clone()));
        self.seen += 1;
        // Often while each request changes much, later whenever a quarter of the record is new.
        if self.seen.is_power_of_two() || self.seen < HANDS || self.seen.is_multiple_of(REMEMBERED / 4) {
            self.dealt = Arc::new(Hands::deal(self.recent.iter().map(|(_, want)| want)));
        }
    }

    /// The futures as they were last dealt.
    #[must_use]
    pub fn hands(&self) -> Arc<Hands> {
        self.dealt.clone()
    }
}

/// Some ways in which the next requests could come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hands {
    hands: Vec<Vec<Card>>,
    needs: Vec<Needs>,
    mean: Bytes,
}

/// One request that may come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Card {
    /// GPU memory.
    pub gpus: GpuRequest,
    /// CPU and memory of the machine.
    pub host: Host,
    /// Which of [`Hands::needs`].
    pub needs: usize,
}

impl Hands {
    /// Deals the requests; the same requests in the same order give the same hands.
    #[must_use]
    pub fn deal<'a>(requests: impl Iterator<Item = &'a Want>) -> Hands {
        let mut needs: Vec<Needs> = Vec::new();
        let mut cards: Vec<Card> = requests
            .filter_map(|want| {
                let number = needs.iter().position(|known| *known == want.needs);
                let gpus = want.gpus.clone()?;
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
        let asked: u128 = cards.iter().map(|card| u128::from(asks(&card.gpus).0)).sum();
        let mean = asked.div_ceil(cards.len() as u128);
        shuffle(&mut cards);
        let hand = |first: usize| {
            let places = (0..CARDS).map(|card| (card * HANDS + first) % cards.len());
            places.map(|place| cards[place].clone()).collect()
        };
        Hands {
            hands: (0..HANDS).map(hand).collect(),
            needs,
            mean: Bytes(u64::try_from(mean).unwrap_or(u64::MAX)),
        }
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

    /// The hands, each as far as one looks with so much free.
    pub(super) fn ahead(&self, free: Bytes) -> impl Iterator<Item = &[Card]> {
        let cards = free.0.saturating_mul(HORIZON).div_ceil(self.mean.0.max(1));
        let cards = usize::try_from(cards).map_or(CARDS, |cards| cards.min(CARDS));
        self.hands.iter().map(move |hand| &hand[..cards])
    }

    /// For each of the different [`Needs`], whether a node with these labels meets it.
    pub(super) fn met_by(&self, labels: &Labels) -> Vec<bool> {
        self.needs.iter().map(|needs| needs.met_by(labels)).collect()
    }
}

fn asks(request: &GpuRequest) -> Bytes {
    Bytes(request.bytes_per_gpu.0.saturating_mul(request.gpus.get().into()))
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
