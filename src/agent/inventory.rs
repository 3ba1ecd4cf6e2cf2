//! Readings → what is published, and whether that differs enough from what is published already. Pure.
//!
//! Three rules: what NVML cannot say stays unknown and never becomes zero; a card that stops answering stays in the
//! list, unhealthy, for as long as it is counted; and every change has a reason in words.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use super::owners::{self, Holdings};
use crate::api::gpu_node::{Gpu, GpuNodeStatus, PodOnGpu};
use crate::api::units::{Bytes, GpuId, PodUid};

/// Used memory that moves by less than this is not published: a context more or less changes no decision.
pub const USED_TOLERANCE: Bytes = Bytes(64 << 20);
/// Pods that are told of one GPU; a card has room for fewer models than that.
const PODS_TOLD: usize = 64;

/// What one look at NVML gave: the cards, or why there is nothing to see.
pub type Observation = Result<Reading, Absent>;

/// Why NVML does not answer for the node as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Absent {
    /// One word for the condition.
    pub reason: &'static str,
    /// What it means and what to do.
    pub message: String,
}

/// What NVML said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    /// The driver's version.
    pub driver_version: String,
    /// One entry for each card that NVML counts, by index.
    pub cards: Vec<Result<Card, Silence>>,
}

impl Reading {
    /// All GPUs that answer, each with its card's index.
    pub fn gpus(&self) -> impl Iterator<Item = (u32, &GpuReading)> {
        let cards = (0..).zip(&self.cards);
        cards.flat_map(|(index, card)| {
            let gpus = card.iter().flat_map(|card| &card.gpus);
            gpus.map(move |gpu| (index, gpu))
        })
    }
}

/// One card that answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// The card's own UUID.
    pub uuid: GpuId,
    /// What pods can be put on: the card itself, or its instances where MIG is on.
    pub gpus: Vec<GpuReading>,
}

/// A card or a MIG instance that answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuReading {
    /// UUID.
    pub uuid: GpuId,
    /// Which MIG instance of its card it is; `None` for a whole card.
    pub instance: Option<u32>,
    /// Name of the product.
    pub name: String,
    /// All of its memory.
    pub memory_total: Bytes,
    /// What the driver keeps for itself.
    pub memory_reserved: Bytes,
    /// What processes use together, where the card can say.
    pub memory_used: Option<Bytes>,
    /// Its processes. `None`: NVML does not list them.
    pub processes: Option<Vec<Process>>,
    /// Percent of time that kernels ran, where the card can say.
    pub utilization: Option<u32>,
    /// Why no new pod may have it, although it answers.
    pub fault: Option<String>,
}

/// A process on a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Whose it is.
    pub owner: Owner,
    /// What it uses, where NVML can say.
    pub memory: Option<Bytes>,
}

/// Whose a process is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A pod's.
    Pod(PodUid),
    /// The machine's own.
    NoPod,
    /// It has ended meanwhile, or this agent does not see it.
    Unknown,
}

/// A card that is counted and does not answer: in NVML's words, why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Silence(pub String);

/// The status to publish. `known` is what was published or decided last: it says which card a silent one is.
#[must_use]
pub fn status(
    observed: &Observation,
    holdings: &Holdings,
    known: &GpuNodeStatus,
    now: Timestamp,
) -> GpuNodeStatus {
    let mut status = match observed {
        Ok(reading) => {
            let gpus = gpus(reading, holdings, known);
            GpuNodeStatus {
                driver_version: reading.driver_version.clone(),
                count: u32::try_from(gpus.len() + never_answered(reading, &gpus)).unwrap_or(u32::MAX),
                gpus,
                ..GpuNodeStatus::default()
            }
        }
        // The cards are there and nothing can run on them.
        Err(absent) => GpuNodeStatus {
            gpus: known
                .gpus
                .iter()
                .cloned()
                .map(|gpu| unhealthy(gpu, &absent.message))
                .collect(),
            ..known.clone()
        },
    };
    let ready = match observed {
        Ok(_) => ("True", "Read", summary(&status)),
        Err(absent) => ("False", absent.reason, absent.message.clone()),
    };
    let verified = owners::verified(observed.as_ref().ok(), holdings);
    status.conditions = vec![
        condition("Ready", ready, known, now),
        condition("Verified", verified, known, now),
    ];
    status
}

fn gpus(reading: &Reading, holdings: &Holdings, known: &GpuNodeStatus) -> Vec<Gpu> {
    let answering: BTreeSet<&GpuId> = reading.gpus().map(|(_, gpu)| &gpu.uuid).collect();
    let mut listed = BTreeSet::new();
    let mut gpus = Vec::new();
    for (index, card) in (0_u32..).zip(&reading.cards) {
        match card {
            Ok(card) => gpus.extend(card.gpus.iter().map(|gpu| {
                let handed = || owners::handed(holdings, index, card, gpu);
                let fault = gpu.fault.clone().or_else(handed);
                answered(index, gpu, fault)
            })),
            Err(Silence(why)) => {
                // Indices move when a card goes: what answers under another index is not the silent one.
                let was = |gpu: &&Gpu| gpu.index == index && !answering.contains(&gpu.uuid);
                gpus.extend(
                    known
                        .gpus
                        .iter()
                        .filter(was)
                        .map(|gpu| unhealthy(gpu.clone(), why)),
                );
            }
        }
    }
    // A list map with the same key twice is refused as a whole.
    gpus.retain(|gpu| listed.insert(gpu.uuid.clone()));
    gpus
}

/// Silent cards of which not even the UUID is known.
fn never_answered(reading: &Reading, gpus: &[Gpu]) -> usize {
    let cards = (0_u32..).zip(&reading.cards);
    let silent = cards.filter(|(_, card)| card.is_err());
    silent
        .filter(|(index, _)| gpus.iter().all(|gpu| gpu.index != *index))
        .count()
}

fn answered(index: u32, reading: &GpuReading, fault: Option<String>) -> Gpu {
    let processes = reading.processes.as_deref();
    let memory_used = reading.memory_used.or_else(|| sum_if_all_known(processes?));
    let mut pods = processes.map(pods).unwrap_or_default();
    let memory_foreign = foreign(memory_used, processes, &pods);
    pods.truncate(PODS_TOLD);
    Gpu {
        uuid: reading.uuid.clone(),
        index,
        name: reading.name.clone(),
        memory_total: reading.memory_total,
        memory_reserved: reading.memory_reserved,
        memory_used,
        memory_foreign,
        pods,
        healthy: fault.is_none(),
        unhealthy_reason: fault,
    }
}

/// What each pod's processes use, by UID.
fn pods(processes: &[Process]) -> Vec<PodOnGpu> {
    let mut pods: BTreeMap<&PodUid, Option<Bytes>> = BTreeMap::new();
    for process in processes {
        if let Owner::Pod(uid) = &process.owner {
            let sum = pods.entry(uid).or_insert(Some(Bytes(0)));
            *sum = sum
                .zip(process.memory)
                .map(|(sum, more)| sum.saturating_add(more));
        }
    }
    let pods = pods.into_iter();
    pods.map(|(uid, memory_used)| PodOnGpu {
        uid: uid.clone(),
        memory_used,
    })
    .collect()
}

/// What is in use and no pod's: that of other processes, and what no process's figure shows. Known only when every
/// process has a figure and an owner, and when every pod is told.
fn foreign(used: Option<Bytes>, processes: Option<&[Process]>, pods: &[PodOnGpu]) -> Option<Bytes> {
    let unknown = |process: &Process| process.memory.is_none() || process.owner == Owner::Unknown;
    if processes?.iter().any(unknown) || pods.len() > PODS_TOLD {
        return None;
    }
    let of_pods: Bytes = pods.iter().filter_map(|pod| pod.memory_used).sum();
    Some(used?.saturating_sub(of_pods))
}

/// One unknown figure makes the sum unknown.
fn sum_if_all_known(processes: &[Process]) -> Option<Bytes> {
    processes.iter().map(|process| process.memory).sum()
}

fn unhealthy(gpu: Gpu, why: &str) -> Gpu {
    Gpu {
        healthy: false,
        unhealthy_reason: Some(why.to_owned()),
        // What it used when it last answered is not what it uses.
        memory_used: None,
        memory_foreign: None,
        pods: Vec::new(),
        ..gpu
    }
}

/// A condition; its time moves only when its status does.
fn condition(
    kind: &str,
    (value, reason, message): (&str, &str, String),
    known: &GpuNodeStatus,
    now: Timestamp,
) -> Condition {
    let before = known.conditions.iter().find(|condition| condition.type_ == kind);
    let since = before.filter(|condition| condition.status == value);
    // The API keeps whole seconds: anything finer would come back different from what was sent.
    let now = Timestamp::from_second(now.as_second()).unwrap_or(now);
    Condition {
        type_: kind.to_owned(),
        status: value.to_owned(),
        reason: reason.to_owned(),
        message,
        last_transition_time: since.map_or(Time(now), |condition| condition.last_transition_time.clone()),
        observed_generation: None,
    }
}

fn summary(status: &GpuNodeStatus) -> String {
    let healthy = status.gpus.iter().filter(|gpu| gpu.healthy).count();
    let unlisted = (status.count as usize).saturating_sub(status.gpus.len());
    let mut text = format!("{healthy} of {} GPUs can take pods", status.count);
    if unlisted > 0 {
        text.push_str(&format!(
            "; {unlisted} never answered this agent, so their UUIDs are not known"
        ));
    }
    text
}

/// The node's `ebb.dev/gpu-memory`: what pods can have on all cards that can take pods.
#[must_use]
pub fn capacity(status: &GpuNodeStatus) -> Bytes {
    status
        .gpus
        .iter()
        .filter(|gpu| gpu.healthy)
        .map(Gpu::usable)
        .sum()
}

/// A difference worth writing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Only used memory moved: this can wait for the write budget.
    pub only_used: bool,
    /// What changed, in words.
    pub reason: String,
}

impl Change {
    fn at_once(reason: String) -> Option<Self> {
        Some(Self {
            only_used: false,
            reason,
        })
    }
}

/// Whether `wanted` has to be written over `published`, and why. The first reason found is told.
#[must_use]
pub fn change(wanted: &GpuNodeStatus, published: Option<&GpuNodeStatus>) -> Option<Change> {
    let Some(published) = published else {
        return Change::at_once("first reading".to_owned());
    };
    if wanted.driver_version != published.driver_version {
        let before = Some(published.driver_version.as_str()).filter(|version| !version.is_empty());
        let before = before.unwrap_or("none");
        return Change::at_once(format!("driver {before} → {}", wanted.driver_version));
    }
    for gpu in &wanted.gpus {
        let Some(before) = published.gpus.iter().find(|before| before.uuid == gpu.uuid) else {
            return Change::at_once(format!("GPU {} ({}) is new", gpu.index, gpu.uuid));
        };
        if gpu.healthy != before.healthy || gpu.unhealthy_reason != before.unhealthy_reason {
            return Change::at_once(match &gpu.unhealthy_reason {
                Some(why) => format!("GPU {} ({}) is unhealthy: {why}", gpu.index, gpu.uuid),
                None => format!("GPU {} ({}) is healthy again", gpu.index, gpu.uuid),
            });
        }
        let apart_from_used = |gpu: &Gpu| Gpu {
            memory_used: None,
            memory_foreign: None,
            pods: Vec::new(),
            ..gpu.clone()
        };
        if apart_from_used(gpu) != apart_from_used(before)
            || gpu.memory_used.is_some() != before.memory_used.is_some()
        {
            return Change::at_once(format!(
                "GPU {} ({}) describes itself differently",
                gpu.index, gpu.uuid
            ));
        }
    }
    if wanted.gpus.len() != published.gpus.len() || wanted.count != published.count {
        return Change::at_once(format!("{} GPUs → {}", published.count, wanted.count));
    }
    if wanted.lease != published.lease {
        return Change::at_once("its Lease".to_owned());
    }
    let other = |condition: &&Condition| !published.conditions.contains(condition);
    if let Some(condition) = wanted.conditions.iter().find(other) {
        return Change::at_once(format!("{}: {}", condition.type_, condition.message));
    }
    // Same cards, same order: only used memory is left.
    wanted.gpus.iter().find_map(|gpu| {
        let before = published.gpus.iter().find(|before| before.uuid == gpu.uuid)?;
        used_change(gpu, before).map(|reason| Change {
            only_used: true,
            reason,
        })
    })
}

/// What moved enough of the memory in use, and whose it is.
fn used_change(gpu: &Gpu, before: &Gpu) -> Option<String> {
    let moved = |now: Option<Bytes>, before: Option<Bytes>| match (now, before) {
        (Some(now), Some(before)) => now.0.abs_diff(before.0) > USED_TOLERANCE.0,
        (now, before) => now != before,
    };
    let told = |bytes: Option<Bytes>| bytes.map_or_else(|| "unknown".to_owned(), |bytes| bytes.to_string());
    let index = gpu.index;
    if moved(gpu.memory_used, before.memory_used) {
        let (now, before) = (told(gpu.memory_used), told(before.memory_used));
        return Some(format!("GPU {index} uses {now} after {before}"));
    }
    let uids = |gpu: &Gpu| gpu.pods.iter().map(|pod| pod.uid.clone()).collect::<Vec<_>>();
    if uids(gpu) != uids(before) {
        return Some(format!("GPU {index} has other pods on it"));
    }
    let pod = gpu.pods.iter().zip(&before.pods);
    if let Some((pod, before)) = pod
        .into_iter()
        .find(|(pod, before)| moved(pod.memory_used, before.memory_used))
    {
        let (now, before) = (told(pod.memory_used), told(before.memory_used));
        return Some(format!(
            "pod {} uses {now} of GPU {index} after {before}",
            pod.uid
        ));
    }
    let (now, before) = (gpu.memory_foreign, before.memory_foreign);
    moved(now, before).then(|| format!("on GPU {index} {} are no pod's after {}", told(now), told(before)))
}

/// Whether the node's own figure has to be written, and why. `None` for a figure that is absent or unreadable.
#[must_use]
pub fn node_change(wanted: Bytes, capacity: Option<&str>, allocatable: Option<&str>) -> Option<String> {
    // Compared as numbers: the API server writes 24000000000 back as 24G.
    let is = |text: Option<&str>| text.and_then(|text| text.parse::<Bytes>().ok()) == Some(wanted);
    let told = |text: Option<&str>| text.unwrap_or("nothing").to_owned();
    match (is(capacity), is(allocatable)) {
        (true, true) => None,
        (false, _) => Some(format!(
            "capacity says {}, the GPUs have {}",
            told(capacity),
            wanted.0
        )),
        (true, false) => Some(format!(
            "allocatable says {}, the GPUs have {}",
            told(allocatable),
            wanted.0
        )),
    }
}

#[cfg(test)]
#[path = "inventory_tests.rs"]
mod tests;
