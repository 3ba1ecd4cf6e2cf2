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
    Ok(Reading {
        driver_version: "570.124.06".to_owned(),
        gpus,
    })
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
    let unknown = |processes| GpuReading {
        memory_used: None,
        processes,
        ..gpu("a")
    };
    let used = |reading| answered(0, &reading).memory_used;
    assert_eq!(used(unknown(None)), None);
    assert_eq!(used(unknown(Some(vec![Some(Bytes(5)), None]))), None);
    assert_eq!(
        used(unknown(Some(vec![Some(Bytes(5)), Some(Bytes(6))]))),
        Some(Bytes(11))
    );
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
            processes: None,
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
            let status = status(observed, &known, at(second));
            // Keys of the list map are unique, or the API server refuses it all.
            let uuids: BTreeSet<_> = status.gpus.iter().map(|gpu| &gpu.uuid).collect();
            prop_assert_eq!(uuids.len(), status.gpus.len());
            prop_assert!(status.gpus.len() <= status.count as usize);
            // Capacity is what answering cards without a fault have, and nothing else.
            let mut seen = BTreeSet::new();
            let expected: u64 = observed.iter().flat_map(|reading| reading.gpus.iter().flatten())
                .filter(|gpu| seen.insert(gpu.uuid.clone()) && gpu.fault.is_none())
                .map(|gpu| gpu.memory_total.0.saturating_sub(gpu.memory_reserved.0))
                .sum();
            prop_assert_eq!(capacity(&status), Bytes(expected));
            // Who is unhealthy says why; who is silent says nothing of what it uses.
            for gpu in &status.gpus {
                prop_assert_eq!(gpu.healthy, gpu.unhealthy_reason.is_none());
            }
            prop_assert_eq!(status.conditions.len(), 1);
            // Once written, it is settled: the same reading again writes nothing.
            prop_assert_eq!(change(&status, Some(&status)), None);
            let again = super::status(observed, &status, at(second + 100));
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
