//! What must hold for every sequence of readings.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use proptest::prelude::*;

use super::*;

const GIB: u64 = 1 << 30;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn gpu(uuid: &str) -> GpuReading {
    GpuReading {
        uuid: uuid.into(),
        instance: None,
        name: "NVIDIA L4".to_owned(),
        memory_total: Bytes(24 * GIB),
        memory_reserved: Bytes(GIB / 2),
        memory_used: Some(Bytes(0)),
        processes: Some(Vec::new()),
        utilization: Some(0),
        fault: None,
    }
}

fn reading(gpus: Vec<Result<GpuReading, Silence>>) -> Observation {
    let whole = |gpu: GpuReading| Card {
        uuid: gpu.uuid.clone(),
        gpus: vec![gpu],
    };
    cards(gpus.into_iter().map(|gpu| gpu.map(whole)).collect())
}

fn cards(cards: Vec<Result<Card, Silence>>) -> Observation {
    Ok(Reading {
        driver_version: "570.124.06".to_owned(),
        cards,
    })
}

fn status(observed: &Observation, known: &GpuNodeStatus, now: Timestamp) -> GpuNodeStatus {
    super::status(observed, &Holdings::default(), known, now)
}

fn process(owner: Owner, memory: Option<u64>) -> Process {
    Process {
        owner,
        memory: memory.map(Bytes),
    }
}

fn no_driver() -> Observation {
    Err(Absent {
        reason: "DriverNotLoaded",
        message: "no driver".to_owned(),
    })
}

fn lost() -> Result<GpuReading, Silence> {
    Err(Silence("lost".to_owned()))
}

fn two() -> GpuNodeStatus {
    status(
        &reading(vec![Ok(gpu("a")), Ok(gpu("b"))]),
        &GpuNodeStatus::default(),
        at(1),
    )
}

#[test]
fn a_first_reading_is_published_as_it_is() {
    let status = two();
    assert_eq!(status.count, 2);
    assert_eq!(capacity(&status), Bytes(2 * (24 * GIB - GIB / 2)));
    let condition = &status.conditions[0];
    assert_eq!(
        (condition.type_.as_str(), condition.status.as_str()),
        ("Ready", "True")
    );
    assert_eq!(condition.message, "2 of 2 GPUs can take pods");
    assert_eq!(change(&status, None).unwrap().reason, "first reading");
    assert_eq!(change(&status, Some(&status)), None);
}

#[test]
fn a_lost_card_stays_listed_and_counts_for_nothing() {
    let known = two();
    let status = status(&reading(vec![Ok(gpu("a")), lost()]), &known, at(2));
    assert_eq!(status.gpus[1].uuid.as_str(), "b");
    assert!(!status.gpus[1].healthy);
    assert_eq!(status.gpus[1].memory_used, None);
    assert_eq!(capacity(&status), Bytes(24 * GIB - GIB / 2));
    let change = change(&status, Some(&known)).unwrap();
    assert_eq!(
        (change.only_used, change.reason.as_str()),
        (false, "GPU 1 (b) is unhealthy: lost")
    );
}

#[test]
fn adversarial_a_silent_card_is_never_mistaken_for_another() {
    // The first card went, the second answers under its index: what is silent now was never seen there.
    let status = status(&reading(vec![lost(), Ok(gpu("a"))]), &two(), at(2));
    let listed: Vec<_> = status
        .gpus
        .iter()
        .map(|gpu| (gpu.uuid.as_str(), gpu.healthy))
        .collect();
    assert_eq!(listed, [("a", true)]);
    assert!(
        status.conditions[0].message.contains("1 never answered"),
        "{:?}",
        status.conditions
    );
}

#[test]
fn without_a_driver_all_cards_are_unhealthy_and_remembered() {
    let known = two();
    let gone = status(&no_driver(), &known, at(2));
    assert_eq!((gone.count, gone.gpus.len()), (2, 2));
    assert_eq!(capacity(&gone), Bytes(0));
    assert_eq!(gone.conditions[0].reason, "DriverNotLoaded");
    assert_eq!(gone.conditions[0].last_transition_time.0, at(2));
    // It stays so without another write, and the time of the condition stays too.
    let later = status(&no_driver(), &gone, at(3));
    assert_eq!(change(&later, Some(&gone)), None);
    let back = status(&reading(vec![Ok(gpu("a")), Ok(gpu("b"))]), &gone, at(4));
    assert_eq!(
        change(&back, Some(&gone)).unwrap().reason,
        "GPU 0 (a) is healthy again"
    );
    assert_eq!(capacity(&back), capacity(&known));
}

#[test]
fn what_the_api_server_gives_back_is_settled() {
    let now = at(2) + jiff::SignedDuration::from_nanos(123_456_789);
    let sent = status(&reading(vec![Ok(gpu("a"))]), &GpuNodeStatus::default(), now);
    let kept: GpuNodeStatus = serde_json::from_value(serde_json::to_value(&sent).unwrap()).unwrap();
    assert_eq!(change(&sent, Some(&kept)), None);
}

#[test]
fn unknown_is_not_zero() {
    let unknown = |figures: Option<&[Option<u64>]>| GpuReading {
        memory_used: None,
        processes: figures.map(|figures| {
            figures
                .iter()
                .map(|bytes| process(Owner::NoPod, *bytes))
                .collect()
        }),
        ..gpu("a")
    };
    let used = |reading| answered(0, &reading, None).memory_used;
    assert_eq!(used(unknown(None)), None);
    assert_eq!(used(unknown(Some(&[Some(5), None]))), None);
    assert_eq!(used(unknown(Some(&[Some(5), Some(6)]))), Some(Bytes(11)));
    assert_eq!(used(gpu("a")), Some(Bytes(0)));
}

#[test]
fn used_memory_is_written_when_it_moved_enough() {
    let with = |used: u64| {
        let gpu = GpuReading {
            memory_used: Some(Bytes(used)),
            ..gpu("a")
        };
        status(&reading(vec![Ok(gpu)]), &GpuNodeStatus::default(), at(1))
    };
    assert_eq!(change(&with(USED_TOLERANCE.0), Some(&with(0))), None);
    let change = change(&with(10 * GIB), Some(&with(0))).unwrap();
    assert_eq!(
        (change.only_used, change.reason.as_str()),
        (true, "GPU 0 uses 10 GiB after 0 B")
    );
}

#[test]
fn the_nodes_figure_is_compared_as_a_number() {
    let wanted = Bytes(24_000_000_000);
    assert_eq!(node_change(wanted, Some("24G"), Some("24000000000")), None);
    assert_eq!(
        node_change(wanted, Some("0"), Some("0")).unwrap(),
        "capacity says 0, the GPUs have 24000000000"
    );
    assert!(
        node_change(wanted, Some("24G"), Some("0"))
            .unwrap()
            .starts_with("allocatable says 0")
    );
    assert!(
        node_change(Bytes(0), None, None)
            .unwrap()
            .starts_with("capacity says nothing")
    );
    assert!(node_change(wanted, Some("rubbish"), None).is_some());
    assert_eq!(node_change(Bytes(0), Some("0"), Some("0")), None);
}

/// What the card uses, its pods and what is no pod's.
fn told(used: u64, processes: Vec<Process>) -> (Vec<(String, Option<u64>)>, Option<u64>) {
    let reading = GpuReading {
        memory_used: Some(Bytes(used)),
        processes: Some(processes),
        ..gpu("a")
    };
    let gpu = answered(0, &reading, None);
    let pods = gpu.pods.iter();
    let pods = pods.map(|pod| (pod.uid.to_string(), pod.memory_used.map(|bytes| bytes.0)));
    (pods.collect(), gpu.memory_foreign.map(|bytes| bytes.0))
}

#[test]
fn memory_is_told_by_pod() {
    let pod = |uid: &str| Owner::Pod(uid.into());
    let two = vec![
        process(pod("b"), Some(3)),
        process(pod("a"), Some(2)),
        process(pod("b"), Some(4)),
        process(Owner::NoPod, Some(5)),
    ];
    // 20 in use: 9 of pods, 5 of a process of the machine, and 6 that no process shows.
    let sums = vec![("a".to_owned(), Some(2)), ("b".to_owned(), Some(7))];
    assert_eq!(told(20, two.clone()), (sums.clone(), Some(11)));
    // One figure that NVML cannot give leaves its pod's sum unknown, and what is nobody's.
    let mut unknown = two.clone();
    unknown.push(process(pod("a"), None));
    let some = vec![("a".to_owned(), None), ("b".to_owned(), Some(7))];
    assert_eq!(told(20, unknown), (some, None));
    // So does a process whose owner cannot be seen.
    let mut ownerless = two;
    ownerless.push(process(Owner::Unknown, Some(1)));
    assert_eq!(told(20, ownerless), (sums, None));
    assert_eq!(told(7, Vec::new()), (Vec::new(), Some(7)));
    // Too many to tell: what is left out must not count as nobody's.
    let crowd = (0..100).map(|n| process(pod(&n.to_string()), Some(1))).collect();
    let (pods, foreign) = told(200, crowd);
    assert_eq!((pods.len(), foreign), (PODS_TOLD, None));
}

#[test]
fn what_a_pod_uses_is_written_when_it_moved_enough() {
    let with = |pods: &[(&str, u64)]| {
        let processes = pods.iter();
        let processes = processes.map(|(uid, bytes)| process(Owner::Pod((*uid).into()), Some(*bytes)));
        let gpu = GpuReading {
            memory_used: Some(Bytes(8 * GIB)),
            processes: Some(processes.collect()),
            ..gpu("a")
        };
        status(&reading(vec![Ok(gpu)]), &GpuNodeStatus::default(), at(1))
    };
    let before = with(&[("p", 2 * GIB), ("q", GIB)]);
    let reason = |now: &GpuNodeStatus| {
        let change = change(now, Some(&before))?;
        assert!(change.only_used, "{}", change.reason);
        Some(change.reason)
    };
    assert_eq!(
        reason(&with(&[("p", 2 * GIB + USED_TOLERANCE.0), ("q", GIB)])),
        None
    );
    assert_eq!(
        reason(&with(&[("p", 2 * GIB), ("q", 3 * GIB)])).unwrap(),
        "pod q uses 3 GiB of GPU 0 after 1 GiB"
    );
    assert_eq!(
        reason(&with(&[("q", GIB)])).unwrap(),
        "GPU 0 has other pods on it"
    );
}

#[test]
fn mig_instances_are_gpus_and_their_card_is_not() {
    let instance = |uuid: &str, at: u32| GpuReading {
        instance: Some(at),
        name: "NVIDIA A100-SXM4-80GB MIG 3g.40gb".to_owned(),
        memory_total: Bytes(40 * GIB),
        memory_reserved: Bytes(0),
        ..gpu(uuid)
    };
    let split = Card {
        uuid: "card".into(),
        gpus: vec![instance("MIG-x", 0), instance("MIG-y", 2)],
    };
    let known = status(
        &cards(vec![Ok(split.clone()), Err(Silence("lost".to_owned()))]),
        &GpuNodeStatus::default(),
        at(1),
    );
    let listed = |status: &GpuNodeStatus| {
        let gpus = status.gpus.iter();
        gpus.map(|gpu| (gpu.uuid.to_string(), gpu.index, gpu.healthy))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        listed(&known),
        [("MIG-x".to_owned(), 0, true), ("MIG-y".to_owned(), 0, true)]
    );
    assert_eq!((known.count, capacity(&known)), (3, Bytes(80 * GIB)));
    // The card falls silent: both of its instances do.
    let gone = status(&cards(vec![lost().map(|_: GpuReading| split)]), &known, at(2));
    assert_eq!(
        listed(&gone),
        [("MIG-x".to_owned(), 0, false), ("MIG-y".to_owned(), 0, false)]
    );
}

#[test]
fn a_card_that_another_plugin_handed_out_is_closed_and_opens_again() {
    let observed = reading(vec![Ok(gpu("a")), Ok(gpu("b"))]);
    let holdings = Holdings {
        allocations: vec![owners::Allocation {
            namespace: "default".to_owned(),
            pod: "train-0".to_owned(),
            resource: "nvidia.com/gpu".to_owned(),
            device: "b".to_owned(),
        }],
        trouble: None,
    };
    let known = two();
    let closed = super::status(&observed, &holdings, &known, at(2));
    assert_eq!(capacity(&closed), Bytes(24 * GIB - GIB / 2));
    let why = closed.gpus[1].unhealthy_reason.clone().unwrap();
    assert!(why.contains("default/train-0"), "{why}");
    // The same words in the condition.
    assert!(
        closed.conditions[1].message.contains(&why),
        "{:?}",
        closed.conditions
    );
    assert_eq!(closed.conditions[1].status, "False");
    let open = status(&observed, &closed, at(3));
    assert_eq!(capacity(&open), capacity(&known));
    assert_eq!(
        change(&open, Some(&closed)).unwrap().reason,
        "GPU 1 (b) is healthy again"
    );
}

fn any_observation() -> impl Strategy<Value = Observation> {
    let figures = (
        0..=32_u64,
        0..=64_u64,
        prop::option::of(0..=64_u64),
        any::<bool>(),
    );
    let answering = (0..5_u8, figures).prop_map(|(name, (reserved, total, used, faulty))| {
        Ok(GpuReading {
            uuid: format!("GPU-{name}").as_str().into(),
            memory_reserved: Bytes(reserved * GIB),
            memory_total: Bytes(total * GIB),
            memory_used: used.map(|used| Bytes(used * GIB)),
            processes: used.map(|used| vec![process(Owner::Pod("p".into()), Some(used * GIB / 2))]),
            fault: faulty.then(|| "XID 79".to_owned()),
            ..gpu("")
        })
    });
    let card = prop_oneof![4 => answering, 1 => Just(lost())];
    prop_oneof![5 => prop::collection::vec(card, 0..6).prop_map(reading), 1 => Just(no_driver())]
}

proptest! {
    #[test]
    fn any_sequence_of_readings_keeps_the_promises(observations in prop::collection::vec(any_observation(), 1..12)) {
        let mut known = GpuNodeStatus::default();
        for (second, observed) in (0..).zip(&observations) {
            let status = self::status(observed, &known, at(second));
            // Keys of the list map are unique, or the API server refuses it all.
            let uuids: BTreeSet<_> = status.gpus.iter().map(|gpu| &gpu.uuid).collect();
            prop_assert_eq!(uuids.len(), status.gpus.len());
            prop_assert!(status.gpus.len() <= status.count as usize);
            // Capacity is what answering cards without a fault have, and nothing else.
            let mut seen = BTreeSet::new();
            let expected: u64 = observed.iter().flat_map(|reading| reading.gpus().map(|(_, gpu)| gpu))
                .filter(|gpu| seen.insert(gpu.uuid.clone()) && gpu.fault.is_none())
                .map(|gpu| gpu.memory_total.0.saturating_sub(gpu.memory_reserved.0))
                .sum();
            prop_assert_eq!(capacity(&status), Bytes(expected));
            // Who is unhealthy says why; who is silent says nothing of what it uses.
            for gpu in &status.gpus {
                prop_assert_eq!(gpu.healthy, gpu.unhealthy_reason.is_none());
            }
            prop_assert_eq!(status.conditions.len(), 2);
            // Once written, it is settled: the same reading again writes nothing.
            prop_assert_eq!(change(&status, Some(&status)), None);
            let again = self::status(observed, &status, at(second + 100));
            prop_assert_eq!(change(&again, Some(&status)), None);
            // Nothing but the tolerance may hide a difference.
            if change(&status, Some(&known)).is_none() {
                for (now, before) in status.gpus.iter().zip(&known.gpus) {
                    let (now, before) = (now.memory_used, before.memory_used);
                    prop_assert_eq!(now.is_some(), before.is_some());
                    let moved = now.map_or(0, |b| b.0).abs_diff(before.map_or(0, |b| b.0));
                    prop_assert!(moved <= USED_TOLERANCE.0);
                }
            }
            known = status;
        }
    }

    #[test]
    fn any_figure_once_written_is_settled(bytes in 0..=Bytes::MAX.0) {
        let text = bytes.to_string();
        prop_assert_eq!(node_change(Bytes(bytes), Some(&text), Some(&text)), None);
        prop_assert!(node_change(Bytes(bytes), Some(&text), None).is_some());
    }
}
