//! The file that stands for the GPUs of one node: devices, memory, processes.
//!
//! Written by stand-in nodes and model servers, read by the stand-in `libnvidia-ml.so.1` (`hack/lab/nvml/nvml.c`).
//! One record a line:
//!
//! ```text
//! driver 570.124.06                        (or `nodriver`: NVML does not start)
//! device INDEX UUID TOTAL RESERVED healthy|lost|xid[=CODE] NAME WITH SPACES
//! mig CARD                                 (the card is cut up; left out: it is not)
//! instance CARD PLACE UUID TOTAL PROFILE   (a part of it)
//! process UUID PID BYTES                   (or `-1 [BYTES]`: counted, but NVML cannot say whose)
//! utilization UUID GPU% MEMORY%            (left out: 0 and 0)
//! ```
//!
//! Writers hold a lock on `FILE.lock` and replace the file by rename, so a reader needs no lock and sees one state.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The environment variable by which the C library finds the file.
pub const STATE_ENV: &str = "EBB_LAB_NVML_STATE";

/// The driver version that [`State::new`] starts with.
pub const DRIVER_VERSION: &str = "570.124.06";

/// The folder that holds the stand-in `libnvidia-ml.so.1` and nothing else: put it in front of `LD_LIBRARY_PATH`.
#[must_use]
pub fn library_dir() -> &'static Path {
    Path::new(env!("EBB_LAB_NVML_DIR"))
}

/// Everything NVML says about one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// The driver's version; `None` when no driver is loaded.
    pub driver: Option<String>,
    /// The GPUs; their indices run from 0 without gaps.
    pub devices: Vec<Device>,
    /// The processes on them.
    pub processes: Vec<Process>,
}

/// One GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// NVML's index.
    pub index: u32,
    /// `GPU-…`, unique and lasting.
    pub uuid: String,
    /// All of its memory, in bytes.
    pub total: u64,
    /// What the driver keeps for itself, in bytes.
    pub reserved: u64,
    /// Whether it works.
    pub health: Health,
    /// The product's name.
    pub name: String,
    /// Percent of time the GPU and its memory were busy.
    pub utilization: (u32, u32),
    /// Its MIG instances, where MIG is on.
    pub mig: Option<Vec<Instance>>,
}

/// A MIG instance of a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// Which of its card's, with gaps.
    pub place: u32,
    /// `MIG-…`.
    pub uuid: String,
    /// Its memory, in bytes.
    pub total: u64,
    /// As `3g.40gb`.
    pub profile: String,
}

/// Whether a GPU works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// It does.
    Healthy,
    /// It fell off the bus: every question about it is answered with an error.
    Lost,
    /// It answers, and the driver has reported a critical error with this code.
    Xid(u32),
}

/// One process on one GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// The GPU.
    pub uuid: String,
    /// The process.
    pub pid: u32,
    /// The memory it has, in bytes.
    pub bytes: u64,
    /// Whether NVML can tell that figure for this process; the GPU's own total has it in any case.
    pub told: bool,
}

/// Why memory was not given, in a driver's terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("out of memory: {asked} bytes asked, {free} of {total} free")]
pub struct OutOfMemory {
    /// Free at that moment.
    pub free: u64,
    /// All that processes can have.
    pub total: u64,
    /// What was asked for.
    pub asked: u64,
}

/// Why a process did not get memory on a GPU.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TakeError {
    /// Too little is free.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
    /// This node has no such GPU, or lost it.
    #[error("no GPU {0} answers on this node")]
    NoDevice(String),
}

/// Why the file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// A line makes no sense.
    #[error("{}: line {line}: {why}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// What is wrong with it.
        why: &'static str,
    },
}

impl Default for State {
    fn default() -> Self {
        Self {
            driver: Some(DRIVER_VERSION.to_owned()),
            devices: Vec::new(),
            processes: Vec::new(),
        }
    }
}

impl State {
    /// A node with `count` equal, healthy and empty GPUs. UUIDs are made from the node's name, so that a node that is
    /// started again has the cards it had.
    #[must_use]
    pub fn new(node: &str, count: u32, total: u64, reserved: u64, name: &str) -> Self {
        let device = |index| Device {
            index,
            uuid: uuid(node, index),
            total,
            reserved,
            health: Health::Healthy,
            name: name.to_owned(),
            utilization: (0, 0),
            mig: None,
        };
        Self {
            devices: (0..count).map(device).collect(),
            ..Self::default()
        }
    }

    /// Reads the file.
    ///
    /// # Errors
    /// When it cannot be read or makes no sense.
    pub fn load(path: &Path) -> Result<Self, StateError> {
        let text = fs::read_to_string(path).map_err(|source| io_error(path, source))?;
        text.parse().map_err(|Damage { line, why }| StateError::Damaged {
            path: path.to_owned(),
            line,
            why,
        })
    }

    /// Replaces the file, whatever it held. For a node that comes up; everyone else uses [`State::update`].
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn create(&self, path: &Path) -> Result<(), StateError> {
        let _lock = lock(path)?;
        self.replace(path)
    }

    /// Reads, changes and replaces the file, alone among all writers. Nothing is written when nothing changed.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn update<R>(path: &Path, change: impl FnOnce(&mut Self) -> R) -> Result<R, StateError> {
        let _lock = lock(path)?;
        let before = Self::load(path)?;
        let mut state = before.clone();
        let result = change(&mut state);
        if state != before {
            state.replace(path)?;
        }
        Ok(result)
    }

    /// The GPU of that UUID.
    #[must_use]
    pub fn device(&self, uuid: &str) -> Option<&Device> {
        self.devices.iter().find(|device| device.uuid == uuid)
    }

    /// Memory that processes hold on a GPU, in bytes.
    #[must_use]
    pub fn used(&self, uuid: &str) -> u64 {
        self.processes
            .iter()
            .filter(|process| process.uuid == uuid)
            .map(|process| process.bytes)
            .sum()
    }

    /// Memory that a new process could get on a GPU, in bytes.
    #[must_use]
    pub fn free(&self, uuid: &str) -> u64 {
        self.device(uuid)
            .map_or(0, |device| device.usable().saturating_sub(self.used(uuid)))
    }

    /// Gives a process memory on a GPU, on top of what it has there. Processes that are gone hold nothing.
    ///
    /// # Errors
    /// When too little is free, or no such GPU answers.
    pub fn take(&mut self, uuid: &str, pid: u32, bytes: u64) -> Result<(), TakeError> {
        self.forget_dead();
        let device = self
            .device(uuid)
            .filter(|device| self.driver.is_some() && device.health != Health::Lost)
            .ok_or_else(|| TakeError::NoDevice(uuid.to_owned()))?;
        let free = self.free(uuid);
        if bytes > free {
            return Err(OutOfMemory {
                free,
                total: device.usable(),
                asked: bytes,
            }
            .into());
        }
        match self
            .processes
            .iter_mut()
            .find(|process| process.uuid == uuid && process.pid == pid)
        {
            Some(process) => process.bytes += bytes,
            None => self.processes.push(Process {
                uuid: uuid.to_owned(),
                pid,
                bytes,
                told: true,
            }),
        }
        Ok(())
    }

    /// Takes memory from a process that has it on a GPU.
    pub fn give_back(&mut self, uuid: &str, pid: u32, bytes: u64) {
        let mut processes = self.processes.iter_mut();
        if let Some(process) = processes.find(|process| process.uuid == uuid && process.pid == pid) {
            process.bytes = process.bytes.saturating_sub(bytes);
        }
    }

    /// Takes a process off all GPUs, as the driver does when it ends.
    pub fn release_pid(&mut self, pid: u32) {
        self.processes.retain(|process| process.pid != pid);
    }

    /// Takes off every process that no longer runs. A zombie has given its memory back: it does not count as running.
    pub fn forget_dead(&mut self) {
        self.processes.retain(|process| runs(process.pid));
    }

    fn replace(&self, path: &Path) -> Result<(), StateError> {
        // One name is enough: the lock is held.
        let temporary = beside(path, ".new");
        let written =
            File::create(&temporary).and_then(|mut file| file.write_all(self.to_string().as_bytes()));
        written
            .and_then(|()| fs::rename(&temporary, path))
            .map_err(|source| io_error(path, source))
    }
}

impl Device {
    /// What processes can have at most: the total without what the driver keeps. CUDA calls this the total.
    #[must_use]
    pub fn usable(&self) -> u64 {
        self.total.saturating_sub(self.reserved)
    }
}

/// A UUID in NVML's form that is the same each time for the same node and index.
#[must_use]
pub fn uuid(node: &str, index: u32) -> String {
    // FNV-1a, twice with different seeds: stable over versions of this program, which std's hasher is not.
    let hash = |seed: u64| {
        let bytes = node.bytes().chain(index.to_le_bytes());
        bytes.fold(seed, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
    };
    let (a, b) = (hash(0xcbf2_9ce4_8422_2325), hash(0x6c62_272e_07bb_0142));
    let hex = format!("{a:016x}{b:016x}");
    format!(
        "GPU-{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}

fn runs(pid: u32) -> bool {
    // The state is the first field after the name, which is in parentheses and may hold any character.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn lock(path: &Path) -> Result<File, StateError> {
    let name = beside(path, ".lock");
    // flock: given back when the file is closed, so also when the holder is killed.
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&name);
    file.and_then(|file| file.lock().map(|()| file))
        .map_err(|source| io_error(&name, source))
}

fn io_error(path: &Path, source: io::Error) -> StateError {
    StateError::Io {
        path: path.to_owned(),
        source,
    }
}

/// Which line of a state makes no sense, and why.
#[derive(Debug, PartialEq, Eq)]
pub struct Damage {
    line: usize,
    why: &'static str,
}

impl FromStr for State {
    type Err = Damage;

    fn from_str(text: &str) -> Result<Self, Damage> {
        let mut state = Self {
            driver: None,
            devices: Vec::new(),
            processes: Vec::new(),
        };
        for (number, line) in text.lines().enumerate() {
            let read = if number == 0 {
                state.read_driver(line)
            } else {
                state.read_record(line)
            };
            read.map_err(|why| Damage {
                line: number + 1,
                why,
            })?;
        }
        if text.is_empty() {
            return Err(Damage {
                line: 1,
                why: "the file is empty",
            });
        }
        Ok(state)
    }
}

impl State {
    fn read_driver(&mut self, line: &str) -> Result<(), &'static str> {
        self.driver = match line.split_once(' ') {
            Some(("driver", version)) if !version.is_empty() => Some(version.to_owned()),
            None if line == "nodriver" => None,
            _ => return Err("`driver VERSION` or `nodriver` is expected first"),
        };
        Ok(())
    }

    fn read_record(&mut self, line: &str) -> Result<(), &'static str> {
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            [] | [""] => {}
            ["device", index, uuid, total, reserved, health, name @ ..] if !name.is_empty() => {
                self.devices.push(Device {
                    index: number(index)?,
                    uuid: (*uuid).to_owned(),
                    total: number(total)?,
                    reserved: number(reserved)?,
                    health: health.parse()?,
                    name: name.join(" "),
                    utilization: (0, 0),
                    mig: None,
                });
            }
            ["mig", card] => self.card(card)?.mig = Some(Vec::new()),
            ["instance", card, place, uuid, total, profile] => {
                let instance = Instance {
                    place: number(place)?,
                    uuid: (*uuid).to_owned(),
                    total: number(total)?,
                    profile: (*profile).to_owned(),
                };
                let instances = self.card(card)?.mig.as_mut();
                instances.ok_or("MIG is not on")?.push(instance);
            }
            ["process", uuid, pid, "-1", counted @ ..] => {
                let bytes = counted.first().map_or(Ok(0), |word| number(word))?;
                self.processes.push(Process {
                    uuid: (*uuid).to_owned(),
                    pid: number(pid)?,
                    bytes,
                    told: false,
                });
            }
            ["process", uuid, pid, bytes] => {
                let bytes = number(bytes)?;
                self.processes.push(Process {
                    uuid: (*uuid).to_owned(),
                    pid: number(pid)?,
                    bytes,
                    told: true,
                });
            }
            ["utilization", uuid, gpu, memory] => {
                self.card(uuid)?.utilization = (number(gpu)?, number(memory)?);
            }
            _ => return Err("not a record"),
        }
        Ok(())
    }

    fn card(&mut self, uuid: &str) -> Result<&mut Device, &'static str> {
        let mut devices = self.devices.iter_mut();
        devices.find(|device| device.uuid == uuid).ok_or("no such device")
    }
}

fn number<T: FromStr>(word: &str) -> Result<T, &'static str> {
    word.parse().map_err(|_| "a number is expected")
}

impl FromStr for Health {
    type Err = &'static str;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        Ok(match word {
            "healthy" => Self::Healthy,
            "lost" => Self::Lost,
            // 48: a double bit ECC error, the usual reason to take a card out of service.
            "xid" => Self::Xid(48),
            _ => Self::Xid(number(
                word.strip_prefix("xid=")
                    .ok_or("healthy, lost or xid=CODE is expected")?,
            )?),
        })
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Healthy => f.write_str("healthy"),
            Self::Lost => f.write_str("lost"),
            Self::Xid(code) => write!(f, "xid={code}"),
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.driver {
            Some(version) => writeln!(f, "driver {version}")?,
            None => writeln!(f, "nodriver")?,
        }
        for Device {
            index,
            uuid,
            total,
            reserved,
            health,
            name,
            ..
        } in &self.devices
        {
            writeln!(f, "device {index} {uuid} {total} {reserved} {health} {name}")?;
        }
        for Device {
            uuid,
            utilization: (gpu, memory),
            ..
        } in &self.devices
        {
            if (*gpu, *memory) != (0, 0) {
                writeln!(f, "utilization {uuid} {gpu} {memory}")?;
            }
        }
        for Device { uuid: card, mig, .. } in &self.devices {
            let Some(instances) = mig else { continue };
            writeln!(f, "mig {card}")?;
            for Instance {
                place,
                uuid,
                total,
                profile,
            } in instances
            {
                writeln!(f, "instance {card} {place} {uuid} {total} {profile}")?;
            }
        }
        for Process {
            uuid,
            pid,
            bytes,
            told,
        } in &self.processes
        {
            let hidden = if *told { "" } else { "-1 " };
            writeln!(f, "process {uuid} {pid} {hidden}{bytes}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
    use super::*;

    const GIB: u64 = 1 << 30;

    fn one_gpu() -> State {
        State::new("node-1", 1, 24 * GIB, GIB / 2, "NVIDIA L4")
    }

    #[test]
    fn survives_writing_and_reading() {
        let mut state = State::new("node-1", 2, 24 * GIB, GIB / 2, "NVIDIA L4");
        state.devices[1].health = Health::Xid(63);
        state.devices[1].utilization = (40, 3);
        state.devices[1].mig = Some(vec![Instance {
            place: 2,
            uuid: "MIG-a".to_owned(),
            total: 4 * GIB,
            profile: "1g.5gb".to_owned(),
        }]);
        let uuid = state.devices[0].uuid.clone();
        state.processes.push(Process {
            uuid: uuid.clone(),
            pid: 7,
            bytes: GIB,
            told: true,
        });
        state.processes.push(Process {
            uuid,
            pid: 8,
            bytes: GIB,
            told: false,
        });
        assert_eq!(state.to_string().parse(), Ok(state));
    }

    #[test]
    fn uuids_differ_and_last() {
        assert_eq!(uuid("a", 0), uuid("a", 0));
        assert_ne!(uuid("a", 0), uuid("a", 1));
        assert_ne!(uuid("a", 0), uuid("b", 0));
        assert_eq!(
            uuid("a", 0).len(),
            "GPU-00000000-0000-0000-0000-000000000000".len()
        );
    }

    #[test]
    fn memory_is_never_promised_twice() {
        let (mut state, me) = (one_gpu(), std::process::id());
        let uuid = state.devices[0].uuid.clone();
        state.take(&uuid, me, 20 * GIB).unwrap();
        let refused = state.take(&uuid, me, 4 * GIB);
        let free = 24 * GIB - GIB / 2 - 20 * GIB;
        assert_eq!(
            refused,
            Err(OutOfMemory {
                free,
                total: 24 * GIB - GIB / 2,
                asked: 4 * GIB
            }
            .into())
        );
        state.release_pid(me);
        state.take(&uuid, me, 23 * GIB).unwrap();
    }

    #[test]
    fn a_dead_process_holds_nothing() {
        let mut state = one_gpu();
        let uuid = state.devices[0].uuid.clone();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let dead = child.id();
        child.wait().unwrap();
        state.processes.push(Process {
            uuid: uuid.clone(),
            pid: dead,
            bytes: 23 * GIB,
            told: true,
        });
        state.take(&uuid, std::process::id(), 10 * GIB).unwrap();
        assert!(state.processes.iter().all(|process| process.pid != dead));
    }

    #[test]
    fn race_many_writers_lose_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nvml");
        one_gpu().create(&path).unwrap();
        let (uuid, me) = (uuid("node-1", 0), std::process::id());
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..10 {
                        State::update(&path, |state| state.take(&uuid, me, 1000))
                            .unwrap()
                            .unwrap();
                    }
                });
            }
        });
        assert_eq!(State::load(&path).unwrap().used(&uuid), 80_000);
    }

    #[test]
    fn damage_names_its_line() {
        for (text, line) in [
            ("", 1),
            ("nonsense\n", 1),
            ("driver 1\ndevice 0 u 5\n", 2),
            ("driver 1\n\nprocess u x 1\n", 3),
        ] {
            let damage = text.parse::<State>().unwrap_err();
            assert_eq!(damage.line, line, "{text:?}");
        }
    }
}
