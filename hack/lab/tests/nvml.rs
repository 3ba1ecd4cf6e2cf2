//! The stand-in `libnvidia-ml.so.1`, loaded by the crate that Ebb loads the real one with, and by a C program for
//! what that crate does not show.
//!
//! One test function: the library finds its file through the environment, which belongs to the whole process. So the
//! file is chosen once, before any thread, and the cases write it in turn.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::Path;
use std::process::Command;

use ebb_lab::nvml_state::{Health, Process, STATE_ENV, State, library_dir};
use nvml_wrapper::Nvml;
use nvml_wrapper::bitmasks::InitFlags;
use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;

const GIB: u64 = 1 << 30;

/// Runs this test binary again with the library and the file in its environment: setting variables in a running
/// process is unsafe, and the loader reads `LD_LIBRARY_PATH` only at the start.
#[test]
fn nvml_wrapper_loads_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nvml");
    for case in CASES {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "inside", "--ignored", "--nocapture"])
            .env("LD_LIBRARY_PATH", library_dir())
            .env(STATE_ENV, &path)
            .env("CASE", case.0)
            .status()
            .unwrap();
        assert!(status.success(), "{}", case.0);
    }
}

#[test]
#[ignore = "run by nvml_wrapper_loads_it, which sets up its environment"]
fn inside() {
    let (Ok(case), Ok(path)) = (std::env::var("CASE"), std::env::var(STATE_ENV)) else {
        return;
    };
    let _ = std::fs::remove_file(&path);
    let (_, run) = CASES.iter().find(|(name, _)| *name == case).unwrap();
    run(Path::new(&path));
}

type Case = (&'static str, fn(&Path));
const CASES: &[Case] = &[
    ("reads_devices", reads_devices),
    ("memory_and_processes", memory_and_processes),
    (
        "a_lost_gpu_is_counted_and_silent",
        a_lost_gpu_is_counted_and_silent,
    ),
    ("no_driver_then_driver", no_driver_then_driver),
    ("adversarial_files", adversarial_files),
    ("xid_is_an_event", xid_is_an_event),
    ("race_readers_and_writers", race_readers_and_writers),
];

fn two_gpus() -> State {
    State::new("node-1", 2, 24 * GIB, GIB / 2, "NVIDIA L4 with a name")
}

fn reads_devices(path: &Path) {
    let state = two_gpus();
    state.create(path).unwrap();
    let nvml = Nvml::init().unwrap();
    assert_eq!(nvml.sys_driver_version().unwrap(), "570.124.06");
    assert_eq!(nvml.sys_nvml_version().unwrap(), "12.570.124.06");
    assert_eq!(nvml.sys_cuda_driver_version().unwrap(), 12080);
    assert_eq!(nvml.device_count().unwrap(), 2);
    for (index, expected) in state.devices.iter().enumerate() {
        let device = nvml.device_by_index(u32::try_from(index).unwrap()).unwrap();
        assert_eq!(device.uuid().unwrap(), expected.uuid);
        assert_eq!(device.name().unwrap(), expected.name);
        assert_eq!(device.index().unwrap(), expected.index);
        assert_eq!(device.minor_number().unwrap(), expected.index);
        let pci = device.pci_info().unwrap();
        assert_eq!(pci.bus_id, format!("00000000:{:02X}:00.0", 0x10 + index));
        assert_eq!(
            nvml.device_by_pci_bus_id(pci.bus_id).unwrap().index().unwrap(),
            expected.index
        );
        let found = nvml.device_by_uuid(expected.uuid.as_str()).unwrap();
        assert_eq!(found.index().unwrap(), expected.index);
        assert!(matches!(device.mig_mode(), Err(NvmlError::NotSupported)));
        assert!(matches!(device.power_usage(), Err(NvmlError::NotSupported)));
        assert!(matches!(
            device.vgpu_host_mode(),
            Err(NvmlError::FailedToLoadSymbol(_))
        ));
        assert!(device.is_in_persistent_mode().unwrap());
    }
    assert!(matches!(nvml.device_by_index(2), Err(NvmlError::InvalidArg)));
    assert!(matches!(
        nvml.device_by_uuid("GPU-none"),
        Err(NvmlError::NotFound)
    ));
    assert!(matches!(
        nvml.device_by_pci_bus_id("00000000:7F:00.0"),
        Err(NvmlError::NotFound)
    ));
    nvml.shutdown().unwrap();
    // And again, as a process does that lost its driver.
    Nvml::init_with_flags(InitFlags::NO_GPUS)
        .unwrap()
        .shutdown()
        .unwrap();
}

fn memory_and_processes(path: &Path) {
    let state = two_gpus();
    state.create(path).unwrap();
    let nvml = Nvml::init().unwrap();
    let device = nvml.device_by_index(0).unwrap();
    assert!(device.running_compute_processes().unwrap().is_empty());

    let (uuid, other, me) = (
        state.devices[0].uuid.clone(),
        state.devices[1].uuid.clone(),
        std::process::id(),
    );
    State::update(path, |state| {
        state.take(&uuid, me, 3 * GIB).unwrap();
        state.take(&other, me, GIB).unwrap();
        state.processes.push(Process {
            uuid: uuid.clone(),
            pid: 1,
            bytes: GIB,
            told: false,
        });
        state.devices[0].utilization = (75, 20);
    })
    .unwrap();
    let memory = device.memory_info().unwrap();
    assert_eq!(memory.total, 24 * GIB);
    assert_eq!(memory.reserved, GIB / 2);
    assert_eq!(memory.used, 4 * GIB);
    assert_eq!(memory.free, 24 * GIB - GIB / 2 - 4 * GIB);
    let processes = device.running_compute_processes().unwrap();
    let told: Vec<_> = processes
        .iter()
        .map(|p| (p.pid, p.used_gpu_memory.clone()))
        .collect();
    assert_eq!(
        told,
        [
            (me, UsedGpuMemory::Used(3 * GIB)),
            (1, UsedGpuMemory::Unavailable)
        ]
    );
    assert!(device.running_graphics_processes().unwrap().is_empty());
    assert_eq!(device.utilization_rates().unwrap().gpu, 75);
    assert!(nvml.sys_process_name(me, 200).unwrap().contains("nvml"));
    assert!(matches!(
        nvml.sys_process_name(u32::MAX - 1, 200),
        Err(NvmlError::NotFound)
    ));

    State::update(path, |state| state.release_pid(me)).unwrap();
    assert_eq!(device.running_compute_processes().unwrap().len(), 1);
}

fn a_lost_gpu_is_counted_and_silent(path: &Path) {
    two_gpus().create(path).unwrap();
    let nvml = Nvml::init().unwrap();
    let device = nvml.device_by_index(1).unwrap();
    let uuid = device.uuid().unwrap();
    State::update(path, |state| state.devices[1].health = Health::Lost).unwrap();
    assert_eq!(nvml.device_count().unwrap(), 2);
    assert!(matches!(device.memory_info(), Err(NvmlError::GpuLost)));
    assert!(matches!(
        device.running_compute_processes(),
        Err(NvmlError::GpuLost)
    ));
    assert!(matches!(device.mig_mode(), Err(NvmlError::GpuLost)));
    assert!(matches!(nvml.device_by_index(1), Err(NvmlError::GpuLost)));
    assert!(matches!(nvml.device_by_uuid(uuid), Err(NvmlError::GpuLost)));
    assert!(nvml.device_by_index(0).unwrap().memory_info().is_ok());
    State::update(path, |state| state.devices[1].health = Health::Healthy).unwrap();
    assert!(device.memory_info().is_ok());
}

fn no_driver_then_driver(path: &Path) {
    assert!(matches!(Nvml::init(), Err(NvmlError::DriverNotLoaded)));
    std::fs::write(path, "nodriver\n").unwrap();
    assert!(matches!(Nvml::init(), Err(NvmlError::DriverNotLoaded)));
    two_gpus().create(path).unwrap();
    let nvml = Nvml::init().unwrap();
    let device = nvml.device_by_index(0).unwrap();
    State::update(path, |state| state.driver = None).unwrap();
    assert!(matches!(nvml.device_count(), Err(NvmlError::DriverNotLoaded)));
    assert!(matches!(device.uuid(), Err(NvmlError::DriverNotLoaded)));
}

fn adversarial_files(path: &Path) {
    two_gpus().create(path).unwrap();
    let nvml = Nvml::init().unwrap();
    let device = nvml.device_by_index(0).unwrap();
    let good = two_gpus().to_string();
    let uuid = two_gpus().devices[0].uuid.clone();
    let long = "x".repeat(5000);
    let damaged = [
        String::new(),
        "\n\n\n".into(),
        "driver".into(),
        "driver 570\nprocess GPU-unknown 1 5\n".into(),
        "driver 570\ndevice".into(),
        "driver 570\ndevice 0 GPU-a 100 200 healthy name\n".into(),
        "driver 570\ndevice 0 GPU-a 100 20 well name\n".into(),
        "driver 570\ndevice 1 GPU-a 100 20 healthy name\n".into(),
        format!("driver 570\ndevice 0 {long} 100 20 healthy name\n"),
        format!("driver {long}\n"),
        format!("{good}device 0 {uuid} 100 20 healthy name\n"),
        format!("{good}process {uuid} -5 5\n"),
        format!("{good}process {uuid} 99999999999999999999 5\n"),
        format!("{good}utilization {uuid} 101 5\n"),
        format!("{good}who knows\n"),
        format!("{good}\0\n"),
        format!("{good}process {uuid} 1 5\n").repeat(20_000),
    ];
    for text in damaged {
        std::fs::write(path, &text).unwrap();
        let start = text.get(..80).unwrap_or(&text);
        assert!(
            matches!(device.memory_info(), Err(NvmlError::Unknown)),
            "{start:?}"
        );
        assert!(
            matches!(nvml.device_count(), Err(NvmlError::Unknown)),
            "{start:?}"
        );
    }
    // Every prefix of a good file: some are good, none may bring the process down.
    let full = format!("{good}process {uuid} 1 5\nprocess {uuid} 2 -1\n");
    for end in 0..full.len() {
        std::fs::write(path, &full[..end]).unwrap();
        let _ = device.running_compute_processes();
    }
    // A name longer than the library's buffer is cut; memory beyond the card's is never told.
    std::fs::write(
        path,
        format!("driver 570\ndevice 0 {uuid} 100 20 healthy {long}\nprocess {uuid} 1 500\n"),
    )
    .unwrap();
    assert_eq!(device.name().unwrap().len(), 95);
    let memory = device.memory_info().unwrap();
    assert_eq!((memory.used, memory.free), (80, 0));
    two_gpus().create(path).unwrap();
    assert!(device.memory_info().is_ok());
}

fn xid_is_an_event(path: &Path) {
    two_gpus().create(path).unwrap();
    let nvml = Nvml::init().unwrap();
    let device = nvml.device_by_index(0).unwrap();
    assert_eq!(
        device.supported_event_types().unwrap(),
        EventTypes::CRITICAL_XID_ERROR
    );
    let set = nvml.create_event_set().unwrap();
    let set = device
        .register_events(EventTypes::CRITICAL_XID_ERROR, set)
        .unwrap();
    let other = nvml.device_by_index(1).unwrap();
    let set = other
        .register_events(EventTypes::CRITICAL_XID_ERROR, set)
        .unwrap();
    assert!(matches!(set.wait(0), Err(NvmlError::Timeout)));
    assert!(matches!(set.wait(60), Err(NvmlError::Timeout)));

    State::update(path, |state| {
        state.devices[0].health = Health::Xid(63);
        state.devices[1].health = Health::Lost;
    })
    .unwrap();
    for (uuid, code) in [(0, 63), (1, 79)] {
        let event = set.wait(1000).unwrap();
        assert_eq!(event.event_type, EventTypes::CRITICAL_XID_ERROR);
        assert_eq!(event.event_data, Some(XidError::Value(code)), "device {uuid}");
    }
    assert!(matches!(set.wait(0), Err(NvmlError::Timeout)));
    assert!(device.memory_info().is_ok());
}

fn race_readers_and_writers(path: &Path) {
    two_gpus().create(path).unwrap();
    let nvml = Nvml::init().unwrap();
    let (uuid, me) = (two_gpus().devices[0].uuid.clone(), std::process::id());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..200 {
                State::update(path, |state| state.take(&uuid, me, 4096))
                    .unwrap()
                    .unwrap();
                State::update(path, |state| state.release_pid(me)).unwrap();
            }
        });
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..500 {
                    let device = nvml.device_by_uuid(uuid.as_str()).unwrap();
                    let memory = device.memory_info().unwrap();
                    assert!(memory.used == 0 || memory.used == 4096, "{memory:?}");
                    assert!(device.running_compute_processes().unwrap().len() <= 1);
                }
            });
        }
    });
}

/// What nvml-wrapper hides: the first version of the memory structure, exact sizes, foreign handles, use before the
/// start and after the end.
#[test]
fn abi_seen_from_c() {
    let dir = tempfile::tempdir().unwrap();
    let (path, program) = (dir.path().join("nvml"), dir.path().join("abi"));
    let mut state = State::new("node-1", 1, 24 * GIB, GIB / 2, "NVIDIA L4");
    let uuid = state.devices[0].uuid.clone();
    for pid in 1..=3 {
        state.processes.push(Process {
            uuid: uuid.clone(),
            pid,
            bytes: GIB,
            told: true,
        });
    }
    state.create(&path).unwrap();
    let library = library_dir().join("libnvidia-ml.so.1");
    let compiled = Command::new("cc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&program)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/nvml/abi.c"))
        .arg(&library)
        .status()
        .unwrap();
    assert!(compiled.success());
    let ran = Command::new(&program)
        .env("LD_LIBRARY_PATH", library_dir())
        .env(STATE_ENV, &path)
        .status()
        .unwrap();
    assert!(ran.success());
}
