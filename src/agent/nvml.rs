//! The only file that touches NVML.
//!
//! NVML's calls block, and its event set borrows the library's handle, so all of it lives on one thread that owns
//! both on its stack and hands readings out. Waiting for the next reading is waiting for a critical error: one ends
//! the wait early.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::event::EventSet;
use nvml_wrapper::struct_wrappers::device::ProcessInfo;
use nvml_wrapper::{Device, Nvml};

use super::cgroup;
use super::inventory::{Absent, Card, GpuReading, Observation, Owner, Process, Reading, Silence};
use crate::api::units::{Bytes, GpuId};

/// Where readings come from: NVML, or a script in tests.
pub trait GpuReader: Send {
    /// Reads every `interval`, sooner when something happened, until `tell` breaks. Blocks its thread.
    fn run(&mut self, interval: Duration, tell: &mut dyn FnMut(Observation) -> ControlFlow<()>);
}

/// Critical errors that a program caused and the card outlives; NVIDIA's device plugin leaves out the same ones.
const PROGRAM_ERRORS: [u64; 6] = [13, 31, 43, 45, 68, 109];

/// MIG cuts a card into seven at most; a driver that says more is not believed.
const MOST_INSTANCES: u32 = 64;

/// NVML, loaded again whenever it stops answering.
#[derive(Debug)]
pub struct NvmlReader {
    /// Where the machine's processes are told of: `/proc`, of the machine and not of a container.
    proc: PathBuf,
    /// Cards with a critical error since the driver was loaded. NVML tells each once; a restart of the agent forgets.
    faults: BTreeMap<GpuId, String>,
}

/// How one stretch with a loaded library ended.
enum Ended {
    Told,
    Failed {
        error: NvmlError,
        reads: u64,
    },
    /// Cards came or went; the event set has to be made anew.
    OtherCards,
}

impl GpuReader for NvmlReader {
    fn run(&mut self, interval: Duration, tell: &mut dyn FnMut(Observation) -> ControlFlow<()>) {
        loop {
            let error = match Nvml::init() {
                Ok(nvml) => match self.session(&nvml, interval, tell) {
                    Ended::Told => return,
                    Ended::OtherCards => continue,
                    // Once more and at once, with the library started anew: one bad answer takes no node out.
                    Ended::Failed { reads: 1.., .. } => continue,
                    Ended::Failed { error, .. } => error,
                },
                Err(error) => error,
            };
            if matches!(error, NvmlError::DriverNotLoaded) {
                self.faults.clear();
            }
            if tell(Err(absent(&error))).is_break() {
                return;
            }
            std::thread::sleep(interval);
        }
    }
}

impl NvmlReader {
    /// A reader that finds a process's pod below `proc`.
    #[must_use]
    pub fn new(proc: impl Into<PathBuf>) -> Self {
        Self {
            proc: proc.into(),
            faults: BTreeMap::new(),
        }
    }

    fn session(
        &mut self,
        nvml: &Nvml,
        interval: Duration,
        tell: &mut dyn FnMut(Observation) -> ControlFlow<()>,
    ) -> Ended {
        let mut events = None;
        let mut cards = None;
        let mut reads = 0;
        loop {
            let reading = match self.read(nvml) {
                Ok(reading) => reading,
                Err(error) => return Ended::Failed { error, reads },
            };
            let count = reading.cards.len();
            match cards {
                None => events = watch_errors(nvml, count),
                Some(before) if before != count => return Ended::OtherCards,
                Some(_) => {}
            }
            cards = Some(count);
            reads += 1;
            if tell(Ok(reading)).is_break() {
                return Ended::Told;
            }
            self.wait(events.as_ref(), interval);
        }
    }

    /// Sleeps for the interval, or until a card reports a critical error.
    fn wait(&mut self, events: Option<&EventSet<'_>>, interval: Duration) {
        let begun = Instant::now();
        let Some(events) = events else {
            std::thread::sleep(interval);
            return;
        };
        match events.wait(u32::try_from(interval.as_millis()).unwrap_or(u32::MAX)) {
            Ok(event) => {
                let code = match event.event_data {
                    Some(XidError::Value(code)) => Some(code),
                    Some(XidError::Unknown) | None => None,
                };
                if code.is_some_and(|code| PROGRAM_ERRORS.contains(&code)) {
                    return;
                }
                // A card that cannot even say its UUID is found silent by the next reading.
                if let Ok(uuid) = event.device.uuid() {
                    let code = code.map_or_else(|| "of unknown code".to_owned(), |code| code.to_string());
                    let why = format!("critical error: XID {code}; reset the card, then restart the agent");
                    self.faults.insert(GpuId::from(uuid.as_str()), why);
                }
            }
            Err(NvmlError::Timeout) => {}
            // The next reading finds out what is wrong; until then, do not spin.
            Err(_) => std::thread::sleep(interval.saturating_sub(begun.elapsed())),
        }
    }

    /// One look at everything. An error is one of the node's; a card's own is in the reading.
    fn read(&mut self, nvml: &Nvml) -> Result<Reading, NvmlError> {
        let driver_version = nvml.sys_driver_version()?;
        let mut cards = Vec::new();
        for index in 0..nvml.device_count()? {
            // NVML's plain "unknown error" is often gone when asked again.
            let card = match self.card(nvml, index) {
                Err(NvmlError::Unknown) => self.card(nvml, index),
                other => other,
            };
            cards.push(match card {
                Ok(card) => Ok(card),
                Err(error) if is_the_nodes(&error) => return Err(error),
                Err(error) => Err(Silence(silence(&error))),
            });
        }
        // A card that was away has been reset: its old error is no more.
        let here = |uuid: &GpuId| cards.iter().flatten().any(|card: &Card| card.uuid == *uuid);
        self.faults.retain(|uuid, _| here(uuid));
        Ok(Reading {
            driver_version,
            cards,
        })
    }

    fn card(&self, nvml: &Nvml, index: u32) -> Result<Card, NvmlError> {
        let device = nvml.device_by_index(index)?;
        let uuid = GpuId::from(device.uuid()?.as_str());
        let mut gpus = if device.mig_mode().is_ok_and(|mode| mode.current == 1) {
            self.instances(&device)?
        } else {
            vec![self.gpu(&device, None)?]
        };
        // A critical error is told of the card; which of its instances it hit is not always known.
        if let Some(fault) = self.faults.get(&uuid) {
            for gpu in &mut gpus {
                gpu.fault.get_or_insert_with(|| fault.clone());
            }
        }
        Ok(Card { uuid, gpus })
    }

    /// The MIG instances of a card, or the card itself, closed, if it has none. Their places are numbered with gaps.
    fn instances(&self, card: &Device<'_>) -> Result<Vec<GpuReading>, NvmlError> {
        let mut gpus = Vec::new();
        for instance in 0..card.mig_device_count()?.min(MOST_INSTANCES) {
            match card.mig_device_by_index(instance) {
                Ok(device) => gpus.push(self.gpu(&device, Some(instance))?),
                Err(NvmlError::NotFound | NvmlError::InvalidArg) => {}
                Err(error) => return Err(error),
            }
        }
        if gpus.is_empty() {
            gpus.push(GpuReading {
                fault: Some(NO_INSTANCES.to_owned()),
                ..self.gpu(card, None)?
            });
        }
        Ok(gpus)
    }

    fn gpu(&self, device: &Device<'_>, instance: Option<u32>) -> Result<GpuReading, NvmlError> {
        // Before the memory: what is taken between the two calls then counts as nobody's for one reading, and not as free.
        let processes = self.processes(device)?;
        let memory = device.memory_info()?;
        let utilization = match device.utilization_rates() {
            Ok(rates) => Some(rates.gpu),
            Err(error) => optional(error)?,
        };
        Ok(GpuReading {
            uuid: GpuId::from(device.uuid()?.as_str()),
            instance,
            name: device.name()?,
            memory_total: Bytes(memory.total),
            memory_reserved: Bytes(memory.reserved),
            memory_used: Some(Bytes(memory.used)),
            processes,
            utilization,
            fault: None,
        })
    }

    /// Processes that compute and that draw; one that does both is listed in both.
    fn processes(&self, device: &Device<'_>) -> Result<Option<Vec<Process>>, NvmlError> {
        let mut processes: BTreeMap<u32, Option<Bytes>> = BTreeMap::new();
        match device.running_compute_processes() {
            Ok(list) => processes.extend(list.iter().map(known)),
            Err(error) => return optional(error),
        }
        match device.running_graphics_processes() {
            Ok(list) => processes.extend(list.iter().map(known)),
            Err(error) => {
                optional::<()>(error)?;
            }
        }
        let whose = |(pid, memory)| Process {
            owner: self.owner(pid),
            memory,
        };
        Ok(Some(processes.into_iter().map(whose).collect()))
    }

    fn owner(&self, pid: u32) -> Owner {
        match std::fs::read_to_string(self.proc.join(pid.to_string()).join("cgroup")) {
            Ok(text) => cgroup::pod_uid(&text).map_or(Owner::NoPod, Owner::Pod),
            Err(_) => Owner::Unknown,
        }
    }
}

const NO_INSTANCES: &str =
    "MIG is on and the card has no instance: create some (nvidia-smi mig -cgi … -C), or turn MIG off";

fn known(process: &ProcessInfo) -> (u32, Option<Bytes>) {
    let memory = match process.used_gpu_memory {
        UsedGpuMemory::Used(bytes) => Some(Bytes(bytes)),
        UsedGpuMemory::Unavailable => None,
    };
    (process.pid, memory)
}

/// A figure that this card does not give is unknown; any other error is the card's.
fn optional<T>(error: NvmlError) -> Result<Option<T>, NvmlError> {
    match error {
        NvmlError::NotSupported | NvmlError::NoPermission | NvmlError::FailedToLoadSymbol(_) => Ok(None),
        error => Err(error),
    }
}

/// Errors that say nothing about one card.
fn is_the_nodes(error: &NvmlError) -> bool {
    matches!(
        error,
        NvmlError::DriverNotLoaded | NvmlError::Uninitialized | NvmlError::LibRmVersionMismatch
    )
}

fn silence(error: &NvmlError) -> String {
    match error {
        NvmlError::GpuLost => "lost: it fell off the bus; drain and restart the node".to_owned(),
        NvmlError::ResetRequired => "needs a reset".to_owned(),
        NvmlError::NotSupported => "does not tell its memory".to_owned(),
        NvmlError::FailedToLoadSymbol(_) => "its driver is too old: 510 or newer is needed".to_owned(),
        NvmlError::NoPermission => "this agent may not talk to it".to_owned(),
        other => format!("does not answer: {other}"),
    }
}

fn absent(error: &NvmlError) -> Absent {
    let (reason, message) = match error {
        NvmlError::LibloadingError(_) => (
            "LibraryNotFound",
            "libnvidia-ml.so.1 cannot be loaded: the agent must run under NVIDIA's container runtime with \
             NVIDIA_VISIBLE_DEVICES=all, or the driver is not installed yet"
                .to_owned(),
        ),
        NvmlError::DriverNotLoaded => (
            "DriverNotLoaded",
            "the NVIDIA driver is not loaded (yet)".to_owned(),
        ),
        NvmlError::LibRmVersionMismatch => (
            "DriverMismatch",
            "the loaded driver and its library have different versions: restart the node, or this pod"
                .to_owned(),
        ),
        NvmlError::NoPermission => (
            "NoPermission",
            "this agent may not talk to the NVIDIA driver".to_owned(),
        ),
        other => ("NvmlFailed", format!("NVML does not answer: {other}")),
    };
    Absent { reason, message }
}

/// An event set that hears of critical errors on every card that can tell them; `None` where that cannot be had.
fn watch_errors(nvml: &Nvml, count: usize) -> Option<EventSet<'_>> {
    let wanted = EventTypes::CRITICAL_XID_ERROR;
    let register = || -> Result<EventSet<'_>, NvmlError> {
        let mut set = nvml.create_event_set()?;
        for index in 0..u32::try_from(count).unwrap_or(u32::MAX) {
            let Ok(device) = nvml.device_by_index(index) else {
                continue;
            };
            if device
                .supported_event_types()
                .is_ok_and(|types| types.contains(wanted))
            {
                set = device
                    .register_events(wanted, set)
                    .map_err(|failed| failed.error)?;
            }
        }
        Ok(set)
    };
    match register() {
        Ok(set) => Some(set),
        Err(error) => {
            tracing::warn!(%error, "NVML gives no events here: critical errors that leave a card answering are not seen");
            None
        }
    }
}
