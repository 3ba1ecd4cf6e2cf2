//! How much GPU memory the server holds, on which GPUs, and what it says when that much is not free.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, bail};
use serde_json::{Value, json};

use crate::nvml_state::{Device, STATE_ENV, State, TakeError};

/// What vLLM takes of whatever it finds, when it is told nothing.
const VLLM_DEFAULT: f64 = 0.92;

/// The value of `--memory`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Memory {
    Bytes(u64),
    Share,
}

impl FromStr for Memory {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "share" {
            Ok(Self::Share)
        } else {
            bytes(text).map(Self::Bytes)
        }
    }
}

/// How much to hold, before the GPUs are known.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Wanted {
    /// In all, split evenly.
    Bytes(u64),
    /// On each GPU, as `EBB_GPU_MEMORY_BYTES` says it.
    BytesPerGpu(u64),
    /// Of each GPU.
    Fraction(f64),
    /// vLLM's own share of each GPU; nothing where there is none.
    WhateverIsThere,
}

impl Wanted {
    pub(super) fn choose(
        utilization: Option<f64>,
        memory: Option<Memory>,
        env: impl Fn(&str) -> Option<String>,
    ) -> anyhow::Result<Self> {
        if let Some(fraction) = utilization {
            return Ok(Self::Fraction(fraction));
        }
        match memory {
            Some(Memory::Bytes(bytes)) => Ok(Self::Bytes(bytes)),
            Some(Memory::Share) => {
                let share =
                    env("EBB_GPU_MEMORY_SHARE").context("--memory share needs EBB_GPU_MEMORY_SHARE")?;
                super::fraction(&share)
                    .map(Self::Fraction)
                    .map_err(anyhow::Error::msg)
            }
            None => match env("EBB_GPU_MEMORY_BYTES") {
                Some(text) => bytes(&text)
                    .map(Self::BytesPerGpu)
                    .map_err(anyhow::Error::msg)
                    .context("EBB_GPU_MEMORY_BYTES"),
                None => Ok(Self::WhateverIsThere),
            },
        }
    }

    fn of(self, device: &Device, devices: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes / devices,
            Self::BytesPerGpu(bytes) => bytes,
            Self::Fraction(fraction) => part(device.usable(), fraction),
            Self::WhateverIsThere => part(device.usable(), VLLM_DEFAULT),
        }
    }
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a fraction of at most 1 of a card's bytes is far inside both types; vLLM computes it in floats too"
)]
fn part(bytes: u64, fraction: f64) -> u64 {
    (bytes as f64 * fraction) as u64
}

/// Memory held on the GPUs of this container. It is given back when this value goes, as a driver does for a process.
#[derive(Debug)]
pub(super) struct Held {
    state: PathBuf,
    on: Vec<Taken>,
}

/// Memory on one GPU.
#[derive(Debug)]
struct Taken {
    uuid: String,
    bytes: u64,
    /// What was free before, as measured at the start.
    free: u64,
    /// On top of that while the model loads.
    peak: u64,
}

impl Held {
    /// Takes the memory on all GPUs or on none, and on each up to `peak` of what is left, until it is settled.
    pub(super) fn take(
        wanted: Wanted,
        peak: u64,
        env: impl Fn(&str) -> Option<String>,
    ) -> anyhow::Result<Self> {
        let visible = Visible::parse(&env("NVIDIA_VISIBLE_DEVICES").unwrap_or_default());
        let state = env(STATE_ENV).map(PathBuf::from);
        let (Some(state), false) = (state, visible == Visible::Nothing) else {
            return match wanted {
                Wanted::WhateverIsThere | Wanted::Bytes(0) | Wanted::BytesPerGpu(0) => Ok(Self {
                    state: PathBuf::new(),
                    on: Vec::new(),
                }),
                _ => bail!("RuntimeError: No CUDA GPUs are available"),
            };
        };
        let on = State::update(&state, |current| {
            let mut next = current.clone();
            let on = take_all(&mut next, &visible, wanted, peak)?;
            *current = next;
            anyhow::Ok(on)
        })
        .context("the GPUs' state file")??;
        Ok(Self { state, on })
    }

    pub(super) fn as_json(&self) -> Value {
        let told = |on: &Taken| json!({"uuid": on.uuid, "bytes": on.bytes, "free": on.free});
        json!({"gpus": self.on.iter().map(told).collect::<Vec<_>>()})
    }

    /// The model is loaded: what only loading took is given back.
    pub(super) fn settle(&mut self) -> anyhow::Result<()> {
        if self.on.iter().any(|on| on.peak > 0) {
            let pid = std::process::id();
            State::update(&self.state, |state| {
                for on in &self.on {
                    state.give_back(&on.uuid, pid, on.peak);
                }
            })
            .context("the GPUs' state file")?;
            self.on.iter_mut().for_each(|on| on.peak = 0);
        }
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if !self.on.is_empty() {
            // The node sees to it when this fails: it takes off whoever no longer runs.
            let _ = State::update(&self.state, |state| state.release_pid(std::process::id()));
        }
    }
}

fn take_all(state: &mut State, visible: &Visible, wanted: Wanted, peak: u64) -> anyhow::Result<Vec<Taken>> {
    let devices = visible.of(state);
    if devices.is_empty() {
        bail!("RuntimeError: No CUDA GPUs are available");
    }
    let mut on = Vec::new();
    for (place, device) in devices.iter().enumerate() {
        let bytes = wanted.of(device, devices.len() as u64);
        let free = state.free(&device.uuid);
        let peak = peak.min(free.saturating_sub(bytes));
        match state.take(&device.uuid, std::process::id(), bytes.saturating_add(peak)) {
            Ok(()) => on.push(Taken {
                uuid: device.uuid.clone(),
                bytes,
                free,
                peak,
            }),
            Err(TakeError::OutOfMemory(short)) => bail!(
                // vLLM's words.
                "ValueError: Free memory on device cuda:{place} ({}/{} GiB) on startup is less than desired GPU \
                 memory utilization ({}, {} GiB). Decrease GPU memory utilization or reduce GPU memory used by other \
                 processes.",
                gib(short.free),
                gib(short.total),
                match wanted {
                    Wanted::Bytes(_) | Wanted::BytesPerGpu(_) => hundredths(ratio(short.asked, short.total)),
                    Wanted::Fraction(fraction) => format!("{fraction}"),
                    Wanted::WhateverIsThere => format!("{VLLM_DEFAULT}"),
                },
                gib(short.asked),
            ),
            Err(TakeError::NoDevice(_)) => bail!(
                "RuntimeError: CUDA error: no CUDA-capable device is detected (cuda:{place} is {})",
                device.uuid
            ),
        }
    }
    Ok(on)
}

/// What the nvidia runtime lets a container see.
#[derive(Debug, PartialEq, Eq)]
enum Visible {
    Nothing,
    All,
    These(Vec<String>),
}

impl Visible {
    /// `all`, `void`, `none`, indices, UUIDs, or CDI names (`runtime.nvidia.com/gpu=UUID`), separated by commas.
    fn parse(text: &str) -> Self {
        match text.trim() {
            "" | "void" | "none" => Self::Nothing,
            "all" => Self::All,
            list => Self::These(
                list.split(',')
                    .map(|name| name.rsplit_once('=').map_or(name, |(_, id)| id).trim().to_owned())
                    .collect(),
            ),
        }
    }

    fn of(&self, state: &State) -> Vec<Device> {
        match self {
            Self::Nothing => Vec::new(),
            Self::All => state.devices.clone(),
            Self::These(names) => {
                let named = |name: &String| {
                    state
                        .devices
                        .iter()
                        .find(|d| d.uuid == *name || d.index.to_string() == *name)
                        .cloned()
                };
                names.iter().filter_map(named).collect()
            }
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "for people to read")]
fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

/// As Python prints a figure rounded to two digits.
fn hundredths(value: f64) -> String {
    let text = format!("{value:.2}");
    text.strip_suffix('0').map(str::to_owned).unwrap_or(text)
}

fn gib(bytes: u64) -> String {
    hundredths(ratio(bytes, 1 << 30))
}

/// Bytes with one of Kubernetes' suffixes or none.
pub(super) fn bytes(text: &str) -> Result<u64, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let factor = match suffix {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1_u64 << 40,
        _ => {
            return Err(format!("{text}: bytes, or a figure with k M G T Ki Mi Gi Ti"));
        }
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole
            .checked_mul(factor)
            .ok_or_else(|| format!("{text} is too much"));
    }
    match number.parse::<f64>() {
        Ok(value) if value < 1e6 => Ok(part(factor, value)),
        _ => Err(format!("{text}: bytes, or a figure with k M G T Ki Mi Gi Ti")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
    use super::*;

    const GIB: u64 = 1 << 30;

    fn of(pairs: &'static [(&str, &str)]) -> impl Fn(&str) -> Option<String> {
        move |name| {
            pairs
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        }
    }

    #[test]
    fn reads_quantities() {
        assert_eq!(bytes("18Gi"), Ok(18 * GIB));
        assert_eq!(bytes("17.5Gi"), Ok(35 * GIB / 2));
        assert_eq!(bytes("19327352832"), Ok(18 * GIB));
        assert_eq!(bytes("18G"), Ok(18_000_000_000));
        for wrong in [
            "",
            "Gi",
            "-1",
            "1e3",
            "18 Gi",
            "99999999999999999999",
            "18446744073709551615Ti",
            "1.2.3",
        ] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn utilization_wins_then_memory_then_ebb_then_vllm() {
        let env = of(&[("EBB_GPU_MEMORY_BYTES", "1024"), ("EBB_GPU_MEMORY_SHARE", "0.25")]);
        let choose = |utilization, memory| Wanted::choose(utilization, memory, &env).unwrap();
        assert_eq!(choose(Some(0.5), Some(Memory::Bytes(7))), Wanted::Fraction(0.5));
        assert_eq!(choose(None, Some(Memory::Bytes(7))), Wanted::Bytes(7));
        assert_eq!(choose(None, Some(Memory::Share)), Wanted::Fraction(0.25));
        assert_eq!(choose(None, None), Wanted::BytesPerGpu(1024));
        assert_eq!(
            Wanted::choose(None, None, of(&[])).unwrap(),
            Wanted::WhateverIsThere
        );
        assert!(Wanted::choose(None, Some(Memory::Share), of(&[])).is_err());
    }

    #[test]
    fn sees_what_the_runtime_gives() {
        let state = State::new("n", 3, 24 * GIB, 0, "L4");
        let uuids = |text: &str| {
            Visible::parse(text)
                .of(&state)
                .into_iter()
                .map(|d| d.index)
                .collect::<Vec<_>>()
        };
        assert_eq!(uuids("all"), [0, 1, 2]);
        assert_eq!(uuids("void"), [0; 0]);
        assert_eq!(uuids(""), [0; 0]);
        assert_eq!(uuids("2,0"), [2, 0]);
        let (a, b) = (&state.devices[1].uuid, &state.devices[2].uuid);
        assert_eq!(
            uuids(&format!("runtime.nvidia.com/gpu={a},runtime.nvidia.com/gpu={b}")),
            [1, 2]
        );
        assert_eq!(uuids(b), [2]);
        assert_eq!(uuids("GPU-elsewhere"), [0; 0]);
    }

    #[test]
    fn says_it_as_vllm_does() {
        let mut state = State::new("n", 1, 24 * GIB, 0, "L4");
        let uuid = state.devices[0].uuid.clone();
        state.take(&uuid, 1, 10 * GIB + GIB / 4).unwrap();
        let error = take_all(&mut state, &Visible::All, Wanted::Fraction(0.9), 0)
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "ValueError: Free memory on device cuda:0 (13.75/24.0 GiB) on startup is less than desired GPU memory \
             utilization (0.9, 21.6 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
        );
    }

    #[test]
    fn two_gpus_are_taken_both_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nvml");
        let mut state = State::new("n", 2, 24 * GIB, 0, "L4");
        let (first, second) = (state.devices[0].uuid.clone(), state.devices[1].uuid.clone());
        state.take(&second, 1, 20 * GIB).unwrap();
        state.create(&path).unwrap();
        let env = |name: &str| match name {
            "NVIDIA_VISIBLE_DEVICES" => Some("all".to_owned()),
            _ => Some(path.to_str().unwrap().to_owned()),
        };
        assert!(Held::take(Wanted::Bytes(20 * GIB), 0, env).is_err());
        assert_eq!(State::load(&path).unwrap().used(&first), 0);
        let held = Held::take(Wanted::Bytes(8 * GIB), 0, env).unwrap();
        assert_eq!(State::load(&path).unwrap().used(&first), 4 * GIB);
        drop(held);
        assert_eq!(State::load(&path).unwrap().used(&first), 0);
        assert_eq!(State::load(&path).unwrap().used(&second), 20 * GIB);
        // What Ebb grants is for each GPU, not to be split once more.
        let held = Held::take(Wanted::BytesPerGpu(4 * GIB), 0, env).unwrap();
        assert_eq!(State::load(&path).unwrap().used(&first), 4 * GIB);
        assert_eq!(State::load(&path).unwrap().used(&second), 24 * GIB);
        drop(held);
    }

    #[test]
    fn loading_takes_more_and_gives_it_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nvml");
        let state = State::new("n", 1, 24 * GIB, 0, "L4");
        let uuid = state.devices[0].uuid.clone();
        state.create(&path).unwrap();
        let env = |name: &str| match name {
            "NVIDIA_VISIBLE_DEVICES" => Some("all".to_owned()),
            _ => Some(path.to_str().unwrap().to_owned()),
        };
        let mut held = Held::take(Wanted::Bytes(10 * GIB), 6 * GIB, env).unwrap();
        assert_eq!(held.as_json()["gpus"][0]["free"], 24 * GIB);
        assert_eq!(State::load(&path).unwrap().used(&uuid), 16 * GIB);
        held.settle().unwrap();
        assert_eq!(State::load(&path).unwrap().used(&uuid), 10 * GIB);
        // No more than there is.
        let other = Held::take(Wanted::Bytes(10 * GIB), 6 * GIB, env).unwrap();
        assert_eq!(State::load(&path).unwrap().used(&uuid), 24 * GIB);
        drop((held, other));
    }
}
