//! What the cluster is asked for: a record of the last requests, and the futures that are dealt from it.
//!
//! Nobody knows the distribution of requests, and it changes. So the record *is* the mix: each pod's request counts
//! once, and goes when enough newer ones have come. Futures are dealt from it like cards, without looking at them: each
//! hand is one way that the next requests could come.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use crate::api::gpu_request::GpuRequest;
use crate::api::host::Host;
use crate::api::units::{Bytes, PodUid};
use crate::plan::gating::Labels;
use crate::plan::ledger::Ledger;
use crate::plan::room::GpuRoom;

use super::outlook::{NodeRoom, of_use};

/// Requests remembered. Twice what is dealt, so that a hand is a sample and not the order in which they came.
pub const REMEMBERED: usize = 1024;
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
    due: bool,
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
            self.due = true;
        }
    }

    /// The futures, dealt anew where enough has changed.
    #[must_use]
    pub fn hands(&mut self, ledger: &Ledger) -> Arc<Hands> {
        if std::mem::take(&mut self.due) {
            let requests = self.recent.iter().map(|(_, want)| want);
            self.dealt = Arc::new(Hands::deal(requests, ledger));
        }
        self.dealt.clone()
    }
}

/// Some ways in which the next requests could come, and what is scarce for them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hands {
    hands: Vec<Vec<Card>>,
    /// Every different request with its weight; all together weigh [`PARTS`].
    kinds: Vec<(Card, u64)>,
    /// Every different demand on labels, and how much of what meets it will be asked for, in [`PARTS`].
    needs: Vec<(Needs, u64)>,
    mean: Bytes,
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
    /// Deals the requests. The same requests in the same order and the same ledger give the same hands.
    #[must_use]
    pub fn deal<'a>(requests: impl Iterator<Item = &'a Want>, ledger: &Ledger) -> Hands {
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
        let (kinds, needs) = weigh(kinds, needs, ledger);
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

    /// Every different request with its weight, of [`PARTS`] in all.
    pub(super) fn kinds(&self) -> &[(Card, u64)] {
        &self.kinds
    }

    /// For each of the different [`Needs`], whether a node with these labels meets it.
    pub(super) fn met_by(&self, labels: &Labels) -> Vec<bool> {
        self.needs.iter().map(|(needs, _)| needs.met_by(labels)).collect()
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

/// Bytes that a request asks on all its GPUs together.
pub(super) fn total(request: &GpuRequest) -> u128 {
    u128::from(request.bytes_per_gpu.0) * u128::from(request.gpus.get())
}

/// Weighs each kind of request by what is asked for of it against what is free for it, and each demand on labels
/// likewise, when all that is free will be asked for.
fn weigh(
    kinds: Vec<(Card, u128)>,
    needs: Vec<Needs>,
    ledger: &Ledger,
) -> (Vec<(Card, u64)>, Vec<(Needs, u64)>) {
    let asked: u128 = kinds.iter().map(|(_, asked)| asked).sum();
    let mut free = 0;
    let mut for_kind = vec![0; kinds.len()];
    let mut for_needs = vec![0; needs.len()];
    for node in ledger.nodes().filter(|node| node.shut().is_none()) {
        let room = NodeRoom {
            host: node.host(),
            gpus: node
                .gpus()
                .iter()
                .filter(|gpu| gpu.closed.is_none())
                .map(GpuRoom::from)
                .collect(),
            meets: needs.iter().map(|needs| needs.met_by(node.labels())).collect(),
        };
        let there = u128::from(room.free().0);
        free += there;
        for (sum, (card, _)) in for_kind.iter_mut().zip(&kinds) {
            *sum += of_use(&room, card);
        }
        for (sum, met) in for_needs.iter_mut().zip(&room.meets) {
            *sum += if *met { there } else { 0 };
        }
    }
    // What is nearly gone is scarce, and not infinitely so.
    let least = free / 100 + 1;
    let weights: Vec<u128> = kinds
        .iter()
        .zip(&for_kind)
        .map(|((_, asked), there)| asked * (free + 1) / (*there).max(least))
        .collect();
    let all = weights.iter().sum::<u128>().max(1);
    let parts = |amount: u128, of: u128| u64::try_from(amount * u128::from(PARTS) / of).unwrap_or(u64::MAX);
    let pressure = |number: usize| {
        let alike = kinds.iter().filter(|(card, _)| card.needs == number);
        let asked_here: u128 = alike.map(|(_, asked)| asked).sum();
        parts(asked_here, asked.max(1)).min(PARTS) as u128 * free / for_needs[number].max(least)
    };
    let pressures: Vec<u64> = (0..needs.len())
        .map(|number| match needs[number].0.is_empty() {
            true => 0,
            false => u64::try_from(pressure(number)).unwrap_or(u64::MAX),
        })
        .collect();
    (
        kinds
            .into_iter()
            .zip(weights)
            .map(|((card, _), weight)| (card, parts(weight, all)))
            .collect(),
        needs.into_iter().zip(pressures).collect(),
    )
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
