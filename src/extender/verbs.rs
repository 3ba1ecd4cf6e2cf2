//! What is answered to filter, prioritize and preempt: bytes in, bytes out, and nothing but the ledger asked.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelValue;

use super::refused::Refused;
use super::wire::{self, Candidates, Failed};
use crate::api::gpu_request::GpuRequest;
use crate::api::packing::Packing;
use crate::api::units::{NodeName, PodUid};
use crate::cluster::ledger_feed::SharedLedger;
use crate::cluster::waiting::NO_LEADER;
use crate::plan::ledger::{Claim, Entry, NodeState, Shut, Stage};
use crate::plan::placement::{self, Choice, Judge, Mix, NodeRefusal, Reasons, Survey, Want};

/// A winner's reservation stands this long without a bind; the scheduler's own bind comes within milliseconds, after
/// minutes at most where a volume has to be made first, and then bind looks for room again.
const RESERVED: Duration = Duration::from_secs(10);

/// An answer's bytes, or why the body is no request.
pub type Answer = serde_json::Result<Vec<u8>>;

/// What the answers are made from.
#[derive(Clone, Copy)]
pub struct Desk<'a> {
    /// Who has how much of which GPU.
    pub ledger: &'a SharedLedger,
    /// Pods that found no room.
    pub refused: &'a Refused,
    /// What the cluster is asked for.
    pub mix: &'a Mutex<Mix>,
    /// How a pod is to be placed.
    pub packing: &'a dyn Fn(&wire::Pod<'_>) -> Packing,
    /// Now, by the ledger's clock.
    pub now_ms: u64,
}

impl Desk<'_> {
    fn reserved(self) -> Stage {
        Stage::Reserved {
            until_ms: self.now_ms.saturating_add(super::millis(RESERVED)),
        }
    }
}

/// The verbs that only ask the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Verb {
    /// Which nodes have room.
    Filter,
    /// Which of them is best.
    Prioritize,
    /// On which of them evicting would make room.
    Preempt,
}

impl Verb {
    /// The answer of a replica that leads.
    ///
    /// # Errors
    /// When the body is no such request.
    pub fn here(self, desk: Desk<'_>, body: &[u8]) -> Answer {
        match self {
            Verb::Filter => filter(desk, body),
            Verb::Prioritize => prioritize(desk, body),
            Verb::Preempt => preempt(desk, body),
        }
    }

    /// The answer while nobody leads. A refused connection would put the pod into the scheduler's growing back-off,
    /// which no event shortens; these refusals are tried again with the next Node event, which the new leader causes.
    pub(super) fn away(self, body: &[u8]) -> Answer {
        match self {
            Verb::Filter => {
                let (_, candidates) = serde_json::from_slice::<wire::Args>(body)?.split()?;
                let nobody = |_: usize| false;
                let mut result = passing(&candidates, nobody);
                let text: Arc<str> = NO_LEADER.into();
                let names = candidates.names.into_iter();
                result.failed_nodes = Failed(names.map(|name| (name, text.clone())).collect());
                serde_json::to_vec(&result)
            }
            Verb::Prioritize => {
                let (_, candidates) = serde_json::from_slice::<wire::Args>(body)?.split()?;
                serde_json::to_vec(&unranked(candidates.names))
            }
            Verb::Preempt => {
                serde_json::from_slice::<wire::PreemptArgs>(body)?;
                serde_json::to_vec(&wire::PreemptResult {
                    node_name_to_meta_victims: BTreeMap::new(),
                })
            }
        }
    }
}

fn filter(desk: Desk<'_>, body: &[u8]) -> Answer {
    let (pod, candidates) = serde_json::from_slice::<wire::Args>(body)?.split()?;
    let request = match pod.request() {
        Ok(Some(request)) => request,
        Ok(None) => return serde_json::to_vec(&passing(&candidates, |_| true)),
        Err(error) => {
            return serde_json::to_vec(&wire::FilterResult {
                error: error.to_string(),
                ..passing(&candidates, |_| false)
            });
        }
    };
    let uid = PodUid::from(pod.uid());
    let want = pod.want(Some(request.clone()));
    let (hands, first) = {
        let mut mix = desk.mix.lock();
        let first = mix.observe(&uid, &want);
        (mix.dealt(), first)
    };
    let judge = Judge {
        packing: (desk.packing)(&pod),
        hands: &hands,
        images: &pod.images(),
    };
    // One lock for the answer and what it reserves, so that nobody comes between.
    let (outcome, freed) = desk.ledger.update(|ledger| {
        ledger.expire(desk.now_ms);
        let names = candidates.names.iter().map(|name| &**name);
        let survey = placement::survey(ledger, names, &want, &uid, judge);
        // It has a place, and nobody asks why it is not another.
        let placed = first && survey.fitting() > 0;
        let outcome = match (placed, pod.prefers()) {
            (false, _) => Some(Outcome::all(&survey, &request, &uid)),
            (true, true) => Some(Outcome::Named(survey.positions().collect())),
            (true, false) => None,
        };
        // The scheduler asks nobody to prioritize a single node.
        let won = match (&outcome, survey.only()) {
            (Some(_), None) => None,
            _ => survey.ranking(&want, judge).order.into_iter().next(),
        };
        let outcome = outcome.unwrap_or_else(|| Outcome::Named(won.iter().map(|(best, _)| *best).collect()));
        if let Some((best, choice)) = won {
            let node = NodeName::from(&*candidates.names[best]);
            ledger.hold(&node, entry(&pod, &uid, &want, &request, choice), desk.reserved());
        }
        (outcome, ledger.freed())
    });
    if outcome.fits_anywhere() {
        desk.refused.forget(&uid);
    } else {
        desk.refused.remember(&uid, &pod, &request, freed);
    }
    outcome.answer(candidates, desk.now_ms)
}

/// Which nodes pass.
enum Outcome {
    /// These, by position, and nothing is said of the others. Mostly the best alone: kube-scheduler scores no nodes then,
    /// and asks nobody to. A pod that prefers some nodes to others has the choice among all that have room.
    Named(Vec<usize>),
    /// All that have room, and why the others have none: for a pod that has no place, or comes again, since somebody else
    /// did not want it where it was to go.
    All(Vec<Result<(), NodeRefusal>>),
}

impl Outcome {
    fn all(survey: &Survey<'_>, request: &GpuRequest, asker: &PodUid) -> Outcome {
        let why = |node: Option<&NodeState>| match node {
            Some(node) => placement::fit(node, request, Some(asker)).map(drop),
            // The scheduler may know a Node that our own watch has not brought yet.
            None => Err(NodeRefusal::Shut(Shut::NoInventory)),
        };
        let nodes = survey.nodes.iter().zip(&survey.fits);
        Outcome::All(
            nodes
                .map(|(node, fits)| if *fits { Ok(()) } else { why(*node) })
                .collect(),
        )
    }

    fn fits_anywhere(&self) -> bool {
        match self {
            Outcome::Named(named) => !named.is_empty(),
            Outcome::All(fits) => fits.iter().any(Result::is_ok),
        }
    }

    fn answer(self, mut candidates: Candidates<'_>, now_ms: u64) -> Answer {
        let fits = match self {
            Outcome::Named(named) => {
                candidates.keep(&named);
                return serde_json::to_vec(&passing(&candidates, |_| true));
            }
            Outcome::All(fits) => fits,
        };
        let mut result = passing(&candidates, |index| fits[index].is_ok());
        let mut reasons = Reasons::at(now_ms);
        for refusal in fits.iter().filter_map(|fit| fit.as_ref().err()) {
            reasons.see(refusal);
        }
        for (name, fit) in candidates.names.into_iter().zip(&fits) {
            let Err(refusal) = fit else { continue };
            let list = if refusal.evicting_could_help() {
                &mut result.failed_nodes
            } else {
                &mut result.failed_and_unresolvable_nodes
            };
            list.0.push((name, reasons.text(refusal)));
        }
        serde_json::to_vec(&result)
    }
}

fn prioritize(desk: Desk<'_>, body: &[u8]) -> Answer {
    let (pod, candidates) = serde_json::from_slice::<wire::Args>(body)?.split()?;
    let Ok(request) = pod.request() else {
        return serde_json::to_vec(&unranked(candidates.names));
    };
    let uid = PodUid::from(pod.uid());
    let want = pod.want(request.clone());
    let hands = desk.mix.lock().dealt();
    let judge = Judge {
        packing: (desk.packing)(&pod),
        hands: &hands,
        images: &pod.images(),
    };
    let scores = desk.ledger.update(|ledger| {
        let names = candidates.names.iter().map(|name| &**name);
        let ranking = placement::survey(ledger, names, &want, &uid, judge).ranking(&want, judge);
        let mut scores = if pod.prefers() {
            ranking.scores_of_equals()
        } else {
            ranking.scores()
        };
        let Some(request) = &request else {
            // A pod without GPU memory, where the scheduler asks about those too: it wastes least where no GPU is.
            let bare = |name: &str| ledger.node(name).is_none_or(|node| node.gpus().is_empty());
            for (score, name) in scores.iter_mut().zip(&candidates.names) {
                if bare(name) {
                    *score = placement::MAX_SCORE;
                }
            }
            return scores;
        };
        if let Some((best, choice)) = ranking.order.into_iter().next() {
            let node = NodeName::from(&*candidates.names[best]);
            let entry = entry(&pod, &uid, &want, request, choice);
            ledger.hold(&node, entry, desk.reserved());
        }
        scores
    });
    let ranked: Vec<wire::HostPriority> = candidates
        .names
        .into_iter()
        .zip(scores)
        .map(|(host, score)| wire::HostPriority { host, score })
        .collect();
    serde_json::to_vec(&ranked)
}

/// Keeps the nodes where the GPUs have room once the victims are gone; nobody is evicted for nothing.
fn preempt(desk: Desk<'_>, body: &[u8]) -> Answer {
    let (pod, mut victims) = serde_json::from_slice::<wire::PreemptArgs>(body)?.split();
    let uid = pod.uid();
    if let Ok(Some(request)) = pod.request() {
        desk.ledger.read(|ledger| {
            victims.retain(|name, victims| {
                let evicted: Vec<&str> = victims
                    .pods
                    .iter()
                    .flatten()
                    .map(|victim| &*victim.uid.0)
                    .collect();
                let absent = |other: &PodUid| other.as_str() == uid || evicted.contains(&other.as_str());
                ledger
                    .node(&name.0)
                    .is_some_and(|node| placement::fit_without(node, &request, &absent).is_ok())
            });
        });
    }
    serde_json::to_vec(&wire::PreemptResult {
        node_name_to_meta_victims: victims,
    })
}

fn entry(pod: &wire::Pod<'_>, uid: &PodUid, want: &Want, request: &GpuRequest, choice: Choice) -> Entry {
    Entry {
        uid: uid.clone(),
        namespace: pod.namespace().into(),
        name: pod.name().into(),
        host: want.host,
        claim: Claim::of(request, choice.gpus),
    }
}

fn unranked(names: Vec<Cow<'_, str>>) -> Vec<wire::HostPriority<'_>> {
    names
        .into_iter()
        .map(|host| wire::HostPriority { host, score: 0 })
        .collect()
}

/// The candidates that pass, in the form they came in.
fn passing<'a>(candidates: &Candidates<'a>, passes: impl Fn(usize) -> bool) -> wire::FilterResult<'a> {
    match &candidates.objects {
        Some(objects) => wire::FilterResult {
            nodes: Some(wire::Nodes {
                items: objects
                    .iter()
                    .enumerate()
                    .filter(|(index, _)| passes(*index))
                    .map(|(_, object)| *object)
                    .collect(),
                ..wire::Nodes::default()
            }),
            ..wire::FilterResult::default()
        },
        None => wire::FilterResult {
            node_names: Some(
                candidates
                    .names
                    .iter()
                    .enumerate()
                    .filter(|(index, _)| passes(*index))
                    .map(|(_, name)| name.clone())
                    .collect(),
            ),
            ..wire::FilterResult::default()
        },
    }
}
