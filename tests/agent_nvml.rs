//! The agent's reader on a library that is really loaded: drivers that come late, go and come back, cards that get
//! lost or report a critical error. What the agent does with the readings is tested elsewhere.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use ebb::agent::inventory::{GpuReading, Observation, Owner, Process as Found};
use ebb::agent::nvml::{GpuReader, NvmlReader};
use ebb::api::units::Bytes;
use ebb_lab::nvml_state::{Health, Instance, Process, STATE_ENV, State, library_dir};

const GIB: u64 = 1 << 30;
const PATIENCE: Duration = Duration::from_secs(20);

type Case = (&'static str, fn(PathBuf));
const CASES: &[Case] = &[
    (
        "driver_comes_late_goes_and_comes_back",
        driver_comes_late_goes_and_comes_back,
    ),
    (
        "a_lost_card_is_silent_and_comes_back",
        a_lost_card_is_silent_and_comes_back,
    ),
    (
        "a_critical_error_is_heard_of_at_once",
        a_critical_error_is_heard_of_at_once,
    ),
    ("an_unknown_process_is_unknown", an_unknown_process_is_unknown),
    (
        "processes_are_found_by_their_cgroup",
        processes_are_found_by_their_cgroup,
    ),
    (
        "mig_instances_are_gpus_of_their_own",
        mig_instances_are_gpus_of_their_own,
    ),
    (
        "adversarial_a_damaged_answer_takes_no_node_out",
        adversarial_a_damaged_answer_takes_no_node_out,
    ),
];

/// The loader reads its path when a process starts, so each case is a process.
#[test]
fn reader_on_the_real_library() {
    let dir = tempfile::tempdir().unwrap();
    for (name, _) in CASES {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "inside", "--ignored", "--nocapture"])
            .env("LD_LIBRARY_PATH", library_dir())
            .env(STATE_ENV, dir.path().join(name))
            .env("CASE", name)
            .status()
            .unwrap();
        assert!(status.success(), "{name}");
    }
}

#[test]
#[ignore = "run by reader_on_the_real_library, which sets up its environment"]
fn inside() {
    let (Ok(name), Ok(path)) = (std::env::var("CASE"), std::env::var(STATE_ENV)) else {
        return;
    };
    let (_, case) = CASES.iter().find(|(case, _)| *case == name).unwrap();
    case(path.into());
}

#[test]
fn without_the_library_it_says_what_to_do() {
    let mut first = None;
    NvmlReader::new("/proc").run(Duration::from_millis(1), &mut |observation| {
        first = Some(observation);
        ControlFlow::Break(())
    });
    // A machine with a real driver has the library.
    if let Some(Err(absent)) = first {
        assert_eq!(absent.reason, "LibraryNotFound");
        assert!(absent.message.contains("NVIDIA_VISIBLE_DEVICES=all"));
    }
}

/// Where a case says which cgroup a process is in.
fn proc_dir() -> PathBuf {
    let mut dir = std::env::var_os(STATE_ENV).unwrap();
    dir.push(".proc");
    dir.into()
}

fn cgroup(pid: u32, text: &str) {
    let dir = proc_dir().join(pid.to_string());
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("cgroup"), text).unwrap();
}

fn two_gpus() -> State {
    State::new("node-1", 2, 24 * GIB, GIB / 2, "NVIDIA L4")
}

/// Reads until every step was seen in turn; each step says whether it saw what it waits for, and then changes the file.
fn steps(interval: Duration, mut steps: Vec<Step<'_>>) {
    let begun = Instant::now();
    steps.reverse();
    NvmlReader::new(proc_dir()).run(interval, &mut |observation| {
        let (what, step) = steps.last_mut().unwrap();
        assert!(
            begun.elapsed() < PATIENCE,
            "not seen: {what}; last: {observation:?}"
        );
        if step(&observation) {
            steps.pop();
        }
        if steps.is_empty() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
}

type Step<'a> = (&'static str, Box<dyn FnMut(&Observation) -> bool + 'a>);

fn step<'a>(what: &'static str, seen: impl Fn(&Observation) -> bool + 'a, then: impl Fn() + 'a) -> Step<'a> {
    let step = move |observation: &Observation| {
        let seen = seen(observation);
        if seen {
            then();
        }
        seen
    };
    (what, Box::new(step))
}

fn card(observation: &Observation, index: usize) -> Option<GpuReading> {
    let reading = observation.as_ref().ok()?;
    reading.cards.get(index)?.as_ref().ok()?.gpus.first().cloned()
}

fn change(path: &Path, change: impl FnOnce(&mut State)) {
    State::update(path, change).unwrap();
}

fn absent(observation: &Observation, reason: &str) -> bool {
    observation.as_ref().is_err_and(|absent| absent.reason == reason)
}

const OFTEN: Duration = Duration::from_millis(20);

fn driver_comes_late_goes_and_comes_back(path: PathBuf) {
    steps(
        OFTEN,
        vec![
            step(
                "no driver",
                |seen| absent(seen, "DriverNotLoaded"),
                || two_gpus().create(&path).unwrap(),
            ),
            step(
                "two cards",
                |seen| {
                    card(seen, 1)
                        .is_some_and(|gpu| gpu.name == "NVIDIA L4" && gpu.memory_reserved == Bytes(GIB / 2))
                },
                || change(&path, |state| state.driver = None),
            ),
            step(
                "the driver gone",
                |seen| absent(seen, "DriverNotLoaded"),
                || change(&path, |state| state.driver = Some("580.95.05".to_owned())),
            ),
            step(
                "another driver",
                |seen| {
                    seen.as_ref()
                        .is_ok_and(|reading| reading.driver_version == "580.95.05")
                },
                || {
                    State::new("node-1", 3, 24 * GIB, 0, "NVIDIA L4")
                        .create(&path)
                        .unwrap()
                },
            ),
            step("a third card", |seen| card(seen, 2).is_some(), || {}),
        ],
    );
}

fn a_lost_card_is_silent_and_comes_back(path: PathBuf) {
    two_gpus().create(&path).unwrap();
    let lost = |seen: &Observation| {
        let reading = seen.as_ref().unwrap();
        reading.cards.len() == 2
            && reading.cards[1]
                .as_ref()
                .is_err_and(|why| why.0.contains("fell off the bus"))
    };
    let healthy = |seen: &Observation| card(seen, 1).is_some_and(|gpu| gpu.fault.is_none());
    steps(
        OFTEN,
        vec![
            step("both", healthy, || {
                change(&path, |state| state.devices[1].health = Health::Lost)
            }),
            step("one lost", lost, || {
                change(&path, |state| state.devices[1].health = Health::Healthy)
            }),
            step("both again", healthy, || {}),
        ],
    );
}

fn a_critical_error_is_heard_of_at_once(path: PathBuf) {
    two_gpus().create(&path).unwrap();
    let writer = path.clone();
    let begun = Instant::now();
    // The interval is longer than the test's patience: only the event can end the wait.
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        change(&writer, |state| {
            state.devices[0].health = Health::Xid(48);
            // A program's own error, on the other card: told by the same event set, and none of its health.
            state.devices[1].health = Health::Xid(31);
        });
    });
    let fault = |seen: &Observation| {
        card(seen, 0)
            .and_then(|gpu| gpu.fault)
            .is_some_and(|why| why.contains("XID 48"))
    };
    steps(
        PATIENCE * 2,
        vec![
            step(
                "a healthy card",
                |seen| card(seen, 0).is_some_and(|gpu| gpu.fault.is_none()),
                || {},
            ),
            step("its fault", fault, || {}),
            step(
                "the other's error does not count",
                move |seen| fault(seen) && card(seen, 1).is_some_and(|gpu| gpu.fault.is_none()),
                || {},
            ),
        ],
    );
    assert!(begun.elapsed() < PATIENCE);
}

fn an_unknown_process_is_unknown(path: PathBuf) {
    let mut state = two_gpus();
    let uuid = state.devices[0].uuid.clone();
    state.processes.push(Process {
        uuid: uuid.clone(),
        pid: 1,
        bytes: 2 * GIB,
        told: false,
    });
    state.processes.push(Process {
        uuid,
        pid: 2,
        bytes: GIB,
        told: true,
    });
    state.create(&path).unwrap();
    let seen = |seen: &Observation| {
        card(seen, 0).is_some_and(|gpu| {
            let figures = gpu.processes.iter().flatten().map(|process| process.memory);
            gpu.memory_used == Some(Bytes(3 * GIB)) && figures.collect::<Vec<_>>() == [None, Some(Bytes(GIB))]
        })
    };
    steps(OFTEN, vec![step("both processes", seen, || {})]);
}

const UID: &str = "0f3b7a5e-2f4c-4b57-9a66-1f5f1a3f6f10";

fn on(uuid: &str, pid: u32, bytes: u64) -> Process {
    Process {
        uuid: uuid.to_owned(),
        pid,
        bytes,
        told: true,
    }
}

fn processes_are_found_by_their_cgroup(path: PathBuf) {
    let mut state = two_gpus();
    let uuid = state.devices[0].uuid.clone();
    state.processes = (1..=3).map(|pid| on(&uuid, pid, u64::from(pid) * GIB)).collect();
    state.create(&path).unwrap();
    let slice = format!("kubepods-burstable-pod{}.slice", UID.replace('-', "_"));
    cgroup(1, &format!("0::/../../{slice}/cri-containerd-9a1c.scope\n"));
    cgroup(2, "0::/user.slice/user-1000.slice/session-3.scope\n");
    // The third has ended meanwhile.
    let found = |owner: Owner, gib: u64| Found {
        owner,
        memory: Some(Bytes(gib * GIB)),
    };
    let owners = |third: Owner| {
        vec![
            found(Owner::Pod(UID.into()), 1),
            found(Owner::NoPod, 2),
            found(third, 3),
        ]
    };
    let seen = |third: Owner| {
        move |seen: &Observation| {
            card(seen, 0).is_some_and(|gpu| gpu.processes == Some(owners(third.clone())))
        }
    };
    steps(
        OFTEN,
        vec![
            step(
                "one of a pod, one of none, one unseen",
                seen(Owner::Unknown),
                || {
                    cgroup(3, &format!("0::/kubepods/pod{UID}/9a1c\n"));
                },
            ),
            step("it is the pod's too", seen(Owner::Pod(UID.into())), || {}),
        ],
    );
}

/// UUID, MIG instance, total, used, and whether it is without a fault.
type Part = (String, Option<u32>, Bytes, Option<Bytes>, bool);

fn mig_instances_are_gpus_of_their_own(path: PathBuf) {
    let instance = |place: u32, uuid: &str| Instance {
        place,
        uuid: uuid.to_owned(),
        total: 10 * GIB,
        profile: "3g.10gb".to_owned(),
    };
    let mut state = two_gpus();
    let (cut, whole) = (state.devices[0].uuid.clone(), state.devices[1].uuid.clone());
    state.devices[0].mig = Some(Vec::new());
    state.create(&path).unwrap();
    let gpus = |seen: &Observation| -> Vec<Part> {
        let Ok(reading) = seen else { return Vec::new() };
        let gpus = reading.gpus().map(|(_, gpu)| {
            let GpuReading {
                uuid,
                instance,
                memory_total,
                memory_used,
                ..
            } = gpu.clone();
            (
                uuid.to_string(),
                instance,
                memory_total,
                memory_used,
                gpu.fault.is_none(),
            )
        });
        gpus.collect()
    };
    let other = (whole, None, Bytes(24 * GIB), Some(Bytes(0)), true);
    let parts = |used: u64, good: bool| {
        vec![
            (
                "MIG-x".to_owned(),
                Some(0),
                Bytes(10 * GIB),
                Some(Bytes(used)),
                good,
            ),
            ("MIG-y".to_owned(), Some(4), Bytes(10 * GIB), Some(Bytes(0)), good),
            other.clone(),
        ]
    };
    let empty = vec![
        (cut.clone(), None, Bytes(24 * GIB), Some(Bytes(0)), false),
        other.clone(),
    ];
    steps(
        OFTEN,
        vec![
            step(
                "a card without instances takes nothing",
                |seen| gpus(seen) == empty,
                || {
                    change(&path, |state| {
                        state.devices[0].mig = Some(vec![instance(0, "MIG-x"), instance(4, "MIG-y")]);
                        state.processes.push(on("MIG-x", 7, 3 * GIB));
                    });
                },
            ),
            step(
                "its instances",
                |seen| {
                    let named = card(seen, 0).is_some_and(|gpu| gpu.name == "NVIDIA L4 MIG 3g.10gb");
                    named && gpus(seen) == parts(3 * GIB, true)
                },
                || change(&path, |state| state.devices[0].health = Health::Xid(48)),
            ),
            step(
                "the card's fault is all of its instances'",
                |seen| gpus(seen) == parts(3 * GIB, false),
                || change(&path, |state| state.devices[0].health = Health::Lost),
            ),
            step(
                "a lost card is silent with its instances",
                |seen| {
                    gpus(seen) == [other.clone()]
                        && seen.as_ref().is_ok_and(|reading| reading.cards.len() == 2)
                },
                || {},
            ),
        ],
    );
}

fn adversarial_a_damaged_answer_takes_no_node_out(path: PathBuf) {
    two_gpus().create(&path).unwrap();
    let both = |seen: &Observation| card(seen, 0).is_some() && card(seen, 1).is_some();
    steps(
        OFTEN,
        vec![
            step("both", both, || std::fs::write(&path, "rubbish").unwrap()),
            // The library started anew fails too: now it is said.
            step(
                "nothing",
                |seen| absent(seen, "NvmlFailed"),
                || two_gpus().create(&path).unwrap(),
            ),
            step("both again", both, || {}),
        ],
    );
}
