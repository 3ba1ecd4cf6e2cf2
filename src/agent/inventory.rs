//! Readings → what is published, and whether that differs enough from what is published already. Pure.
//!
//! Three rules: what NVML cannot say stays unknown and never becomes zero; a card that stops answering stays in the
//! list, unhealthy, for as long as it is counted; and every change has a reason in words.

use std::collections::BTreeSet;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use crate::api::gpu_node::{Gpu, GpuNodeStatus};
use crate::api::units::{Bytes, GpuId};

/// Used memory that moves by less than this is not published: a context more or less changes no decision.
pub const USED_TOLERANCE: Bytes = Bytes(64 << 20);

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
    pub gpus: Vec<Result<GpuReading, Silence>>,
}

/// One card that answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuReading {
    /// UUID.
    pub uuid: GpuId,
    /// Name of the product.
    pub name: String,
    /// All of its memory.
    pub memory_total: Bytes,
    /// What the driver keeps for itself.
    pub memory_reserved: Bytes,
    /// What processes use together, where the card can say.
    pub memory_used: Option<Bytes>,
    /// What each process uses. `None` for all: NVML does not list them; for one: not its figure.
    pub processes: Option<Vec<Option<Bytes>>>,
    /// Percent of time that kernels ran, where the card can say.
    pub utilization: Option<u32>,
    /// Why no new pod may have it, although it answers.
    pub fault: Option<String>,
}

/// A card that is counted and does not answer: in NVML's words, why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Silence(pub String);

/// The status to publish. `known` is what was published or decided last: it says which card a silent one is.
#[must_use]
pub fn status(observed: &Observation, known: &GpuNodeStatus, now: Timestamp) -> GpuNodeStatus {
    let mut status = match observed {
        Ok(reading) => GpuNodeStatus {
            driver_version: reading.driver_version.clone(),
            count: u32::try_from(reading.gpus.len()).unwrap_or(u32::MAX),
            gpus: gpus(reading, known),
            conditions: Vec::new(),
        },
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
    status.conditions = vec![ready(observed, &status, known, now)];
    status
}

fn gpus(reading: &Reading, known: &GpuNodeStatus) -> Vec<Gpu> {
    let answering: BTreeSet<&GpuId> = reading.gpus.iter().flatten().map(|gpu| &gpu.uuid).collect();
    let mut listed = BTreeSet::new();
    let gpu = |(index, gpu): (usize, &Result<GpuReading, Silence>)| {
        let index = u32::try_from(index).ok()?;
        let gpu = match gpu {
            Ok(reading) => answered(index, reading),
            Err(Silence(why)) => {
                // Indices move when a card goes: what answers under another index is not the silent one.
                let was = known
                    .gpus
                    .iter()
                    .find(|gpu| gpu.index == index && !answering.contains(&gpu.uuid))?;
                unhealthy(was.clone(), why)
            }
        };
        // A list map with the same key twice is refused as a whole.
        listed.insert(gpu.uuid.clone()).then_some(gpu)
    };
    reading.gpus.iter().enumerate().filter_map(gpu).collect()
}

fn answered(index: u32, reading: &GpuReading) -> Gpu {
    Gpu {
        uuid: reading.uuid.clone(),
        index,
        name: reading.name.clone(),
        memory_total: reading.memory_total,
        memory_reserved: reading.memory_reserved,
        memory_used: reading
            .memory_used
            .or_else(|| sum_if_all_known(reading.processes.as_deref()?)),
        healthy: reading.fault.is_none(),
        unhealthy_reason: reading.fault.clone(),
    }
}

/// One unknown figure makes the sum unknown.
fn sum_if_all_known(processes: &[Option<Bytes>]) -> Option<Bytes> {
    processes.iter().copied().sum::<Option<Bytes>>()
}

fn unhealthy(gpu: Gpu, why: &str) -> Gpu {
    Gpu {
        healthy: false,
        unhealthy_reason: Some(why.to_owned()),
        // What it used when it last answered is not what it uses.
        memory_used: None,
        ..gpu
    }
}

/// The `Ready` condition; its time moves only when its status does.
fn ready(observed: &Observation, status: &GpuNodeStatus, known: &GpuNodeStatus, now: Timestamp) -> Condition {
    let (value, reason, message) = match observed {
        Ok(_) => ("True", "Read", summary(status)),
        Err(absent) => ("False", absent.reason, absent.message.clone()),
    };
    let before = known
        .conditions
        .iter()
        .find(|condition| condition.type_ == "Ready");
    let since = before.filter(|condition| condition.status == value);
    // The API keeps whole seconds: anything finer would come back different from what was sent.
    let now = Timestamp::from_second(now.as_second()).unwrap_or(now);
    Condition {
        type_: "Ready".to_owned(),
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
    if wanted.conditions != published.conditions {
        let message = wanted
            .conditions
            .first()
            .map_or("", |condition| condition.message.as_str());
        return Change::at_once(format!("condition: {message}"));
    }
    // Same cards, same order: only used memory is left.
    wanted.gpus.iter().find_map(|gpu| {
        let before = published
            .gpus
            .iter()
            .find(|before| before.uuid == gpu.uuid)?
            .memory_used?;
        let now = gpu.memory_used?;
        (before.0.abs_diff(now.0) > USED_TOLERANCE.0).then(|| Change {
            only_used: true,
            reason: format!("GPU {} uses {now} after {before}", gpu.index),
        })
    })
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
