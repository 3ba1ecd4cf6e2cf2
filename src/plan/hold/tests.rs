//! The line's promises, by example and for anything that can happen to it.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::line::PARDON_MS;
use super::*;

const LIMITS: Limits = Limits {
    queue_requests: 4,
    queue_bytes: Bytes(100),
    target_in_flight: 2,
};

fn port() -> Target {
    Target::Number(8000)
}

fn pod(number: u8, version: u64, ready: bool) -> SeenPod {
    SeenPod {
        uid: PodUid::from(format!("pod-{number}").as_str()),
        ip: Some(IpAddr::from([10, 0, 0, number])),
        version: Some(version),
        terminating: false,
        ready,
        ports: BTreeMap::from([("http".to_owned(), 8000)]),
    }
}

fn seen(desired: u32, zero: Option<u64>, pods: &[SeenPod]) -> Seen {
    Seen {
        desired,
        zero_version: zero,
        settled: true,
        wakeable: true,
        limits: LIMITS,
        pods: pods.to_vec(),
    }
}

fn line(desired: u32, zero: Option<u64>, pods: &[SeenPod]) -> Line {
    let mut line = Line::new();
    line.observe(&seen(desired, zero, pods), 0);
    line
}

fn wait(line: &mut Line, bytes: u64) -> Ticket {
    match line.arrive(&port(), Bytes(bytes), 0) {
        Arrival::Wait(ticket) => ticket,
        other => panic!("must wait: {other:?}"),
    }
}

fn go(line: &mut Line) -> (Ticket, Grant) {
    match line.arrive(&port(), Bytes(1), 0) {
        Arrival::Go(ticket, grant) => (ticket, grant),
        other => panic!("must go: {other:?}"),
    }
}

#[test]
fn asleep_everybody_waits_and_one_wake_is_wanted() {
    let mut line = line(0, Some(5), &[]);
    assert!(!line.wants().wake);
    wait(&mut line, 1);
    wait(&mut line, 1);
    assert!(line.wants().wake);
    line.wake_asked(0);
    assert!(!line.wants().wake);
}

#[test]
fn adversarial_a_port_that_no_pod_has_holds_nobody() {
    let mut line = line(0, Some(5), &[]);
    let named = |name: &str| Target::Name(name.to_owned());
    for target in [named("typo"), named("http"), port()] {
        assert!(matches!(line.arrive(&target, Bytes(1), 0), Arrival::Wait(_)));
    }
    line.observe(&seen(1, Some(5), &[pod(1, 9, false)]), 10);
    assert!(line.misled(10).is_empty(), "not loaded yet");
    line.observe(&seen(1, Some(5), &[pod(1, 9, true)]), 20);
    assert_eq!(line.misled(20), [(Ticket(0), named("typo"))]);
    assert_eq!((line.queued(), line.last_activity()), (2, Some(20)));
}

#[test]
fn a_new_pod_is_probed_and_then_takes_the_first_who_came() {
    let mut line = line(0, Some(5), &[]);
    let tickets: Vec<Ticket> = (0..3).map(|_| wait(&mut line, 1)).collect();
    line.observe(&seen(1, Some(5), &[pod(1, 9, false)]), 10);
    assert_eq!(line.wants().probe, [PodUid::from("pod-1")]);
    assert_eq!(line.next(10), None);
    line.answered(&PodUid::from("pod-1"), 20);
    assert!(line.wants().probe.is_empty());
    let (first, _) = line.next(20).unwrap();
    let (second, grant) = line.next(20).unwrap();
    assert_eq!([first, second], tickets[..2]);
    assert_eq!(line.next(20), None, "the target is 2 in flight");
    assert_eq!(line.cold_starts(), 1);
    line.finish(&grant.pod, 30);
    assert_eq!(line.next(30).unwrap().0, tickets[2]);
    assert_eq!(line.expected_ms(30), Some(10));
}

#[test]
fn a_full_line_refuses_by_count_and_by_bytes() {
    let mut line = line(0, None, &[]);
    wait(&mut line, 60);
    assert!(matches!(
        line.arrive(&port(), Bytes(41), 0),
        Arrival::Full(reason) if reason.contains("queue-bytes")
    ));
    for _ in 0..3 {
        wait(&mut line, 1);
    }
    assert!(matches!(
        line.arrive(&port(), Bytes(1), 0),
        Arrival::Full(reason) if reason.contains("queue-requests")
    ));
}

#[test]
fn who_leaves_frees_the_place() {
    let mut line = line(0, None, &[]);
    let tickets: Vec<Ticket> = (0..4).map(|_| wait(&mut line, 25)).collect();
    line.leave(tickets[1], 5);
    line.leave(tickets[1], 5);
    wait(&mut line, 25);
    assert_eq!(line.queued(), 4);
    assert!(!line.grow(tickets[0], Bytes(1)));
    for ticket in tickets {
        line.leave(ticket, 6);
    }
    assert_eq!(line.queued(), 1);
}

#[test]
fn unmanaged_at_zero_is_refused_and_not_held() {
    let mut line = Line::new();
    let mut unmanaged = seen(0, None, &[]);
    unmanaged.wakeable = false;
    line.observe(&unmanaged, 0);
    assert_eq!(line.arrive(&port(), Bytes(1), 0), Arrival::NotWakeable);
}

#[test]
fn race_hold_against_a_request_one_of_both_wins() {
    let pods = [pod(1, 2, true)];
    let mut request_first = line(1, None, &pods);
    let (_, grant) = go(&mut request_first);
    assert_eq!(request_first.hold(1, 1000).as_deref(), Some("1 in flight"));
    request_first.finish(&grant.pod, 5);
    assert_eq!(request_first.hold(2, 1000), None);

    let mut hold_first = line(1, None, &pods);
    assert_eq!(hold_first.hold(1, 1000), None);
    let ticket = wait(&mut hold_first, 1);
    assert_eq!(hold_first.next(999), None);
    assert!(!hold_first.wants().wake, "it is not at 0 yet");
    assert_eq!(hold_first.wants().tick_at, Some(1000));
    assert!(hold_first.resume(1));
    assert_eq!(hold_first.next(999).unwrap().0, ticket);
}

#[test]
fn a_hold_whose_controller_is_lost_ends_by_itself() {
    let mut line = line(1, None, &[pod(1, 2, true)]);
    assert_eq!(line.hold(1, 1000), None);
    let ticket = wait(&mut line, 1);
    line.tick(1000);
    assert_eq!(line.next(1000).unwrap().0, ticket);
    assert!(!line.resume(1));
}

#[test]
fn race_pods_from_before_the_sleep_get_nothing_though_they_look_ready() {
    let old = pod(1, 2, true);
    let mut line = line(1, None, std::slice::from_ref(&old));
    assert_eq!(line.hold(1, 1000), None);
    let ticket = wait(&mut line, 1);
    // The sleep comes about; the old pod's deletion is not seen yet.
    line.observe(&seen(0, Some(10), std::slice::from_ref(&old)), 5);
    assert_eq!(line.next(5), None);
    assert!(line.wants().wake);
    line.wake_asked(5);
    line.observe(&seen(1, Some(10), std::slice::from_ref(&old)), 6);
    assert_eq!(line.next(6), None);
    assert!(line.wants().probe.is_empty());
    // The new pod is usable at once, whatever becomes of the old one.
    line.observe(&seen(1, Some(10), &[old, pod(2, 14, true)]), 7);
    let (released, grant) = line.next(7).unwrap();
    assert_eq!((released, grant.pod.as_str()), (ticket, "pod-2"));
}

#[test]
fn race_a_zero_that_nobody_saw_retires_the_pods_too() {
    let old = pod(1, 2, true);
    let mut line = line(1, None, std::slice::from_ref(&old));
    // 1 → 0 → 1 between two looks: only the version of the zero tells.
    line.observe(&seen(1, Some(10), std::slice::from_ref(&old)), 5);
    wait(&mut line, 1);
    assert_eq!(line.next(5), None);
}

#[test]
fn race_a_new_pod_that_is_seen_before_the_wake_is_new() {
    let mut line = line(0, Some(10), &[]);
    wait(&mut line, 1);
    // Another gate woke it; the pods' watch is ahead of the workloads'.
    line.observe(&seen(0, Some(10), &[pod(2, 14, false)]), 5);
    line.observe(&seen(1, Some(10), &[pod(2, 14, false)]), 6);
    assert_eq!(line.wants().probe, [PodUid::from("pod-2")]);
}

#[test]
fn race_a_pod_that_survived_a_short_zero_is_pardoned() {
    let old = pod(1, 2, true);
    let mut line = line(1, None, std::slice::from_ref(&old));
    line.observe(&seen(0, Some(10), std::slice::from_ref(&old)), 5);
    wait(&mut line, 1);
    line.observe(&seen(1, Some(10), std::slice::from_ref(&old)), 10);
    assert_eq!(line.next(10), None);
    let at = line.wants().tick_at.unwrap();
    assert_eq!(at, 10 + PARDON_MS);
    line.tick(at);
    assert!(line.next(at).is_some());
    assert_eq!(line.wants().tick_at, None);
}

#[test]
fn a_refused_connection_puts_the_request_back_at_its_old_place() {
    let mut line = line(1, None, &[pod(1, 2, true)]);
    let (first, grant) = go(&mut line);
    line.unreachable(&grant);
    let second = wait(&mut line, 1);
    line.again(first, &grant, port(), Bytes(1));
    assert_eq!(line.in_flight(), 0);
    assert_eq!(line.next(1), None);
    assert_eq!(line.wants().reach, std::slice::from_ref(&grant));
    line.reached(&grant);
    assert_eq!(line.next(1).unwrap().0, first);
    assert_eq!(line.next(1).unwrap().0, second);
}

#[test]
fn a_port_that_nobody_serves_blocks_no_other_port() {
    let mut line = line(1, None, &[pod(1, 2, true)]);
    let nobody = Target::Name("nobody".to_owned());
    assert!(matches!(line.arrive(&nobody, Bytes(1), 0), Arrival::Wait(_)));
    let ticket = wait(&mut line, 1);
    assert_eq!(line.next(0).unwrap().0, ticket);
}

#[test]
fn a_terminating_pod_gets_nothing_new_and_keeps_what_it_has() {
    let mut one = pod(1, 2, true);
    let mut line = line(1, None, std::slice::from_ref(&one));
    let (_, grant) = go(&mut line);
    one.terminating = true;
    line.observe(&seen(1, None, &[one]), 1);
    wait(&mut line, 1);
    assert_eq!(line.next(1), None);
    assert_eq!(line.in_flight(), 1);
    line.observe(&seen(1, None, &[]), 2);
    assert_eq!(line.in_flight(), 1, "gone from the watch, still answering");
    line.finish(&grant.pod, 3);
    assert_eq!(line.in_flight(), 0);
}

#[test]
fn what_the_kubelet_takes_back_counts() {
    let mut line = line(1, None, &[pod(1, 2, false)]);
    let ticket = wait(&mut line, 1);
    line.answered(&PodUid::from("pod-1"), 1);
    assert_eq!(line.next(1).unwrap().0, ticket);
    line.observe(&seen(1, None, &[pod(1, 2, true)]), 2);
    line.observe(&seen(1, None, &[pod(1, 2, false)]), 3);
    wait(&mut line, 1);
    assert_eq!(line.next(3), None);
    assert_eq!(line.wants().probe, [PodUid::from("pod-1")]);
}

#[derive(Clone, Debug)]
enum Step {
    Arrive(u64),
    Leave(usize),
    Finish(usize),
    Again(usize),
    Reach,
    Answer(u8),
    Hold(u64),
    Resume(u64),
    Scale(u32),
    Pod(u8, bool, bool),
    NoPod(u8),
    Pass(u64),
    Dismiss,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0u64..40).prop_map(Step::Arrive),
        2 => (0usize..8).prop_map(Step::Leave),
        4 => (0usize..8).prop_map(Step::Finish),
        2 => (0usize..8).prop_map(Step::Again),
        1 => Just(Step::Reach),
        2 => (0u8..4).prop_map(Step::Answer),
        2 => (0u64..3).prop_map(Step::Hold),
        1 => (0u64..3).prop_map(Step::Resume),
        2 => (0u32..3).prop_map(Step::Scale),
        3 => (0u8..4, any::<bool>(), any::<bool>()).prop_map(|(n, r, t)| Step::Pod(n, r, t)),
        1 => (0u8..4).prop_map(Step::NoPod),
        1 => (0u64..700).prop_map(Step::Pass),
        1 => Just(Step::Dismiss),
    ]
}

/// What a person would keep in their head: who waits, who is where, and what may be used.
#[derive(Default)]
struct Model {
    waiting: BTreeMap<Ticket, u64>,
    flying: Vec<(Ticket, Grant)>,
    holds: BTreeMap<u64, u64>,
    pods: BTreeMap<u8, SeenPod>,
    born: BTreeMap<u8, u64>,
    desired: u32,
    zero: Option<u64>,
    zero_at: u64,
    version: u64,
    now: u64,
}

impl Model {
    fn check_grant(&mut self, ticket: Ticket, grant: &Grant, from_line: bool) -> Result<(), TestCaseError> {
        prop_assert!(self.desired > 0, "granted at 0");
        prop_assert!(
            self.holds.values().all(|until| *until <= self.now),
            "granted while held"
        );
        let pod = self.pods.values().find(|pod| pod.uid == grant.pod);
        prop_assert!(pod.is_some_and(|pod| !pod.terminating), "granted a pod that goes");
        let old = self
            .pods
            .iter()
            .any(|(number, pod)| pod.uid == grant.pod && self.born.get(number).copied() <= self.zero);
        prop_assert!(
            !old || self.now >= self.zero_at + PARDON_MS,
            "granted a pod from before the sleep"
        );
        let load = self
            .flying
            .iter()
            .filter(|(_, other)| other.pod == grant.pod)
            .count();
        prop_assert!(load < LIMITS.target_in_flight as usize, "over the target");
        if from_line {
            prop_assert_eq!(self.waiting.keys().next(), Some(&ticket), "out of order");
            self.waiting.remove(&ticket);
        } else {
            prop_assert!(self.waiting.is_empty(), "overtook");
        }
        self.flying.push((ticket, grant.clone()));
        Ok(())
    }

    fn seen(&self) -> Seen {
        let pods: Vec<SeenPod> = self.pods.values().cloned().collect();
        seen(self.desired, self.zero, &pods)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Nobody is lost, doubled, overtaken, let in at the wrong time or beyond a bound, whatever happens.
    #[test]
    fn the_line_keeps_its_promises(steps in proptest::collection::vec(step(), 1..80)) {
        let mut line = Line::new();
        let mut model = Model { desired: 1, version: 1, ..Model::default() };
        line.observe(&model.seen(), 0);
        for step in steps {
            model.now += 1;
            model.version += 1;
            match step {
                Step::Arrive(bytes) => match line.arrive(&port(), Bytes(bytes), model.now) {
                    Arrival::Go(ticket, grant) => model.check_grant(ticket, &grant, false)?,
                    Arrival::Wait(ticket) => { model.waiting.insert(ticket, bytes); }
                    Arrival::Full(_) => {
                        let total: u64 = model.waiting.values().sum();
                        prop_assert!(model.waiting.len() >= 4 || total + bytes > 100);
                    }
                    Arrival::NotWakeable => prop_assert!(false, "it is managed"),
                },
                Step::Leave(which) => {
                    if let Some(ticket) = model.waiting.keys().nth(which).copied() {
                        line.leave(ticket, model.now);
                        model.waiting.remove(&ticket);
                    }
                }
                Step::Finish(which) => if which < model.flying.len() {
                    let (_, grant) = model.flying.remove(which);
                    line.finish(&grant.pod, model.now);
                },
                Step::Again(which) => if which < model.flying.len() {
                    let (ticket, grant) = model.flying.remove(which);
                    line.unreachable(&grant);
                    line.again(ticket, &grant, port(), Bytes(1));
                    model.waiting.insert(ticket, 1);
                },
                Step::Reach => for grant in line.wants().reach { line.reached(&grant); },
                Step::Answer(number) => line.answered(&PodUid::from(format!("pod-{number}").as_str()), model.now),
                Step::Hold(id) => {
                    let until = model.now + 500;
                    let quiet = model.flying.is_empty() && model.waiting.is_empty() && model.desired > 0;
                    prop_assert_eq!(line.hold(id, until).is_none(), quiet);
                    if quiet { model.holds.insert(id, until); }
                }
                Step::Resume(id) => { line.resume(id); model.holds.remove(&id); }
                Step::Scale(desired) => {
                    model.desired = desired;
                    if desired == 0 {
                        model.zero = Some(model.version);
                        model.zero_at = model.now;
                        model.holds.clear();
                    }
                }
                Step::Pod(number, ready, terminating) => {
                    let born = *model.born.entry(number).or_insert(model.version);
                    let before = model.pods.get(&number).is_some_and(|pod| pod.terminating);
                    let mut pod = pod(number, born, ready);
                    pod.version = Some(model.version);
                    pod.terminating = terminating || before;
                    model.pods.insert(number, pod);
                }
                Step::NoPod(number) => { model.pods.remove(&number); model.born.remove(&number); }
                Step::Pass(ms) => model.now += ms,
                Step::Dismiss => {
                    let sent: BTreeSet<Ticket> = line.dismiss(model.now).into_iter().collect();
                    prop_assert_eq!(sent, model.waiting.keys().copied().collect());
                    model.waiting.clear();
                }
            }
            line.observe(&model.seen(), model.now);
            while let Some((ticket, grant)) = line.next(model.now) {
                model.check_grant(ticket, &grant, true)?;
            }
            prop_assert_eq!(line.in_flight() as usize, model.flying.len());
            prop_assert_eq!(line.queued() as usize, model.waiting.len());
            prop_assert_eq!(line.wants().wake, model.desired == 0 && !model.waiting.is_empty());
        }
        // At the end everybody can be served: awake, one healthy new pod, no holds.
        model.desired = 1;
        model.now += 10_000;
        model.pods = BTreeMap::from([(9, pod(9, model.version + 1, true))]);
        model.born.insert(9, model.version + 1);
        line.observe(&model.seen(), model.now);
        model.holds.clear();
        loop {
            while let Some((ticket, grant)) = line.next(model.now) {
                model.check_grant(ticket, &grant, true)?;
            }
            let Some((_, grant)) = model.flying.pop() else { break };
            line.finish(&grant.pod, model.now);
        }
        prop_assert!(model.waiting.is_empty(), "somebody was forgotten");
        prop_assert_eq!(line.in_flight(), 0);
    }
}
