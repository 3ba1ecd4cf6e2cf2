//! The bodies are those that a real kube-scheduler 1.36 posted; `tests/extender.rs` has it post its own.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use serde_json::Value;

use super::refused::Refused;
use super::*;
use crate::api::gpu_request::Sharing;
use crate::api::host::Host;
use crate::api::units::{Bytes, PodUid};
use crate::cluster::waiting::NO_LEADER;
use crate::plan::ledger::{Claim, Entry, Event, GpuFacts, Images, Inventory, NodeFacts, PodFacts, Start};

const FILTER: &str = include_str!("../../tests/fixtures/kube-scheduler/filter-nodecachecapable.json");
const FILTER_WHOLE: &str =
    include_str!("../../tests/fixtures/kube-scheduler/filter-not-nodecachecapable.json");
const PRIORITIZE: &str = include_str!("../../tests/fixtures/kube-scheduler/prioritize-nodecachecapable.json");
const PRIORITIZE_WHOLE: &str =
    include_str!("../../tests/fixtures/kube-scheduler/prioritize-not-nodecachecapable.json");
const PREEMPT: &str = include_str!("../../tests/fixtures/kube-scheduler/preempt-nodecachecapable.json");
const BIND: &str = include_str!("../../tests/fixtures/kube-scheduler/bind.json");

const GIB: u64 = 1 << 30;

/// What the scheduler posted.
fn body(fixture: &str) -> Value {
    serde_json::from_str::<Value>(fixture).unwrap()["request"].clone()
}

fn away(verb: Verb, body: &Value) -> Value {
    serde_json::from_slice(&verb.away(body.to_string().as_bytes()).unwrap()).unwrap()
}

/// A leader whose nodes have one GPU each, of so many GiB.
#[derive(Default)]
struct Leader {
    ledger: SharedLedger,
    refused: Refused,
    mix: Mutex<Mix>,
    now_ms: u64,
}

impl Leader {
    fn new(nodes: &[(&str, u64)]) -> Self {
        let leader = Leader::default();
        for (name, gib) in nodes {
            leader.add_node(name, *gib);
        }
        leader
    }

    fn add_node(&self, name: &str, gib: u64) {
        self.tell(Event::Node(NodeFacts {
            name: name.into(),
            fence: None,
            allocatable: None,
            labels: Arc::default(),
            images: Default::default(),
        }));
        self.tell(Event::Inventory(Inventory {
            node: name.into(),
            closed: None,
            gpus: vec![GpuFacts {
                id: format!("GPU-{name}").as_str().into(),
                index: 0,
                usable: Bytes(gib * GIB),
                used: None,
                foreign: None,
                used_by: BTreeMap::new(),
                closed: None,
            }],
        }));
    }

    fn tell(&self, event: Event) {
        self.ledger.update(|ledger| ledger.apply(event));
    }

    fn answer(&self, verb: Verb, body: &Value) -> Value {
        let desk = Desk {
            ledger: &self.ledger,
            refused: &self.refused,
            mix: &self.mix,
            packing: &|pod| {
                pod.placement()
                    .and_then(|text| text.parse().ok())
                    .unwrap_or_default()
            },
            now_ms: self.now_ms,
        };
        let bytes = verb.here(desk, body.to_string().as_bytes()).unwrap();
        serde_json::from_slice(&bytes).unwrap()
    }

    /// Where memory is held for the fixtures' pod.
    fn held(&self, body: &Value) -> Option<String> {
        let uid = PodUid::from(body["Pod"]["metadata"]["uid"].as_str().unwrap());
        self.ledger
            .read(|ledger| ledger.hold_of(&uid).map(|hold| hold.node.to_string()))
    }
}

fn bind_on(node: &str, pod: &str, gib: u64) -> Event {
    Event::Pod(bound_on(node, pod, gib))
}

fn bound_on(node: &str, pod: &str, gib: u64) -> PodFacts {
    PodFacts {
        entry: Entry {
            uid: pod.into(),
            namespace: "default".into(),
            name: pod.into(),
            host: Host::default(),
            claim: Claim {
                gpus: Some(vec![format!("GPU-{node}").as_str().into()]),
                bytes_per_gpu: Bytes(gib * GIB),
                sharing: Sharing::Shared,
            },
        },
        node: Some(node.into()),
        finished: false,
        start: Start::Over,
    }
}

#[test]
fn filter_names_the_nodes_with_room_and_says_why_not_the_others() {
    let leader = Leader::new(&[("n0000", 24), ("n0001", 24), ("n0002", 16)]);
    leader.tell(bind_on("n0001", "other", 12));
    let result = leader.answer(Verb::Filter, &body(FILTER));
    assert_eq!(result["NodeNames"], json!(["n0000"]));
    // It has a place, so nobody asks why it is not another; when it comes again, it is told.
    assert_eq!(result["FailedNodes"], json!({}));
    let result = leader.answer(Verb::Filter, &body(FILTER));
    assert_eq!(result["NodeNames"], json!(["n0000"]));
    assert_eq!(
        result["FailedNodes"],
        json!({"n0001": "GPU 0 of n0001 has 12 GiB free, 18 GiB asked"})
    );
    assert_eq!(
        result["FailedAndUnresolvableNodes"],
        json!({"n0002": "no GPU with 18 GiB of memory, even empty"})
    );
    assert_eq!(result["Error"], "");
    assert!(result.get("Nodes").is_none());
}

#[test]
fn filter_has_few_different_texts() {
    let leader = Leader::new(&[("n0000", 24), ("n0001", 24), ("n0002", 24)]);
    for (node, gib) in [("n0000", 8), ("n0001", 7), ("n0002", 9)] {
        leader.tell(bind_on(node, node, gib));
    }
    let result = leader.answer(Verb::Filter, &body(FILTER));
    assert_eq!(
        result["FailedNodes"],
        json!({
            "n0000": "no GPU with 18 GiB free",
            "n0001": "GPU 0 of n0001 has 17 GiB free, 18 GiB asked",
            "n0002": "no GPU with 18 GiB free",
        })
    );
}

#[test]
fn whole_nodes_go_back_as_they_came() {
    let sent = body(FILTER_WHOLE);
    let first = sent["Nodes"]["items"][0]["metadata"]["name"].as_str().unwrap();
    let leader = Leader::new(&[(first, 24)]);
    let result = leader.answer(Verb::Filter, &sent);
    assert_eq!(result["Nodes"]["items"], json!([sent["Nodes"]["items"][0]]));
    assert!(result.get("NodeNames").is_none());
    let result = leader.answer(Verb::Filter, &sent);
    assert_eq!(result["Nodes"]["items"], json!([sent["Nodes"]["items"][0]]));
    let unknown = result["FailedAndUnresolvableNodes"].as_object().unwrap();
    assert_eq!(
        unknown.len(),
        sent["Nodes"]["items"].as_array().unwrap().len() - 1
    );
    let sent = body(PRIORITIZE_WHOLE);
    let result = leader.answer(Verb::Prioritize, &sent);
    assert_eq!(
        result.as_array().unwrap().len(),
        sent["Nodes"]["items"].as_array().unwrap().len()
    );
}

#[test]
fn a_pod_that_asks_for_no_gpu_memory_passes() {
    let leader = Leader::new(&[]);
    let mut pod = body(FILTER);
    pod["Pod"]["spec"]["containers"][0]["resources"] = json!({});
    let result = leader.answer(Verb::Filter, &pod);
    assert_eq!(result["NodeNames"], json!(["n0000", "n0001", "n0002"]));
    assert_eq!(leader.held(&pod), None);
}

#[test]
fn a_request_that_makes_no_sense_is_an_error_in_words() {
    let leader = Leader::new(&[("n0000", 24)]);
    let mut pod = body(FILTER);
    pod["Pod"]["metadata"]["annotations"] = json!({"ebb.dev/gpus": "two"});
    let result = leader.answer(Verb::Filter, &pod);
    assert!(
        result["Error"].as_str().unwrap().contains("ebb.dev/gpus"),
        "{result}"
    );
    assert_eq!(result["NodeNames"], json!([]));
}

#[test]
fn prioritize_ranks_the_tightest_first_and_holds_it() {
    let leader = Leader::new(&[("n0000", 40), ("n0001", 40), ("n0002", 24)]);
    leader.tell(bind_on("n0001", "other", 20));
    let result = leader.answer(Verb::Prioritize, &body(PRIORITIZE));
    assert_eq!(
        result,
        json!([
            {"Host": "n0000", "Score": 8},
            {"Host": "n0001", "Score": 10},
            {"Host": "n0002", "Score": 9},
        ])
    );
    assert_eq!(leader.held(&body(PRIORITIZE)).as_deref(), Some("n0001"));
}

/// A leader of so many nodes in different states, and what the scheduler posts about all of them.
fn many(nodes: usize, mut body: Value) -> (Leader, Value) {
    let names: Vec<String> = (0..nodes).map(|number| format!("n{number:04}")).collect();
    let all: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), 80)).collect();
    let leader = Leader::new(&all);
    for (number, name) in names.iter().enumerate() {
        leader.tell(bind_on(name, &format!("on-{name}"), 1 + number as u64 * 7 % 61));
    }
    // Heard of some pods, so that it packs by what is asked.
    for pod in 0..32 {
        body["Pod"]["metadata"]["uid"] = json!(format!("earlier-{pod}"));
        let mut few = body.clone();
        few["NodeNames"] = json!([]);
        leader.answer(Verb::Filter, &few);
    }
    leader.ledger.read(|ledger| drop(leader.mix.lock().hands(ledger)));
    body["Pod"]["metadata"]["uid"] = json!("asker");
    body["NodeNames"] = json!(names);
    (leader, body)
}

fn winner(scores: &Value) -> &Value {
    let best = scores
        .as_array()
        .unwrap()
        .iter()
        .max_by_key(|line| line["Score"].as_u64());
    &best.unwrap()["Host"]
}

#[test]
fn filter_names_the_one_node_that_prioritize_would_have_put_first_and_holds_it() {
    let (leader, body) = many(300, body(FILTER));
    let passed = leader.answer(Verb::Filter, &body);
    let names = passed["NodeNames"].as_array().unwrap();
    assert_eq!(names.len(), 1);
    assert_eq!(passed["FailedNodes"], json!({}));
    assert_eq!(leader.held(&body).as_deref(), names[0].as_str());
    let all = leader.answer(Verb::Prioritize, &body);
    assert_eq!(&names[0], winner(&all));
}

#[test]
fn a_pod_that_comes_again_is_told_of_all_nodes() {
    // Somebody after us took none of the best: another extender, or the bind failed.
    let (leader, body) = many(300, body(FILTER));
    leader.answer(Verb::Filter, &body);
    let again = leader.answer(Verb::Filter, &body);
    assert_eq!(again["NodeNames"].as_array().unwrap().len(), 300);
}

#[test]
fn a_pod_with_preferences_of_its_own_is_left_the_choice() {
    for wish in [
        json!({"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1}]}}}),
        json!({"affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1}]}}}),
        json!({"topologySpreadConstraints": [{"whenUnsatisfiable": "ScheduleAnyway"}]}),
    ] {
        let (leader, mut body) = many(300, body(FILTER));
        let spec = body["Pod"]["spec"].as_object_mut().unwrap();
        spec.extend(wish.as_object().unwrap().clone());
        let passed = leader.answer(Verb::Filter, &body);
        assert_eq!(passed["NodeNames"].as_array().unwrap().len(), 300, "{wish}");
        let scores = leader.answer(Verb::Prioritize, &body);
        let best = scores
            .as_array()
            .unwrap()
            .iter()
            .filter(|line| line["Score"] == 10);
        // 300 nodes in 61 states: the others in the best one's state are as good.
        assert!(best.count() >= 4, "{wish}");
    }
    let (leader, body) = many(300, body(FILTER));
    let scores = leader.answer(Verb::Prioritize, &body);
    let best = scores
        .as_array()
        .unwrap()
        .iter()
        .filter(|line| line["Score"] == 10);
    assert_eq!(best.count(), 1);
}

#[test]
fn of_equal_nodes_the_one_that_holds_the_image_is_held() {
    let leader = Leader::new(&[("n0000", 24), ("n0001", 24), ("n0002", 24)]);
    leader.tell(Event::Node(NodeFacts {
        name: "n0001".into(),
        fence: None,
        allocatable: None,
        labels: Arc::default(),
        images: Images::new([("example.invalid/pause:1", Bytes(1))].into_iter()),
    }));
    leader.answer(Verb::Prioritize, &body(PRIORITIZE));
    assert_eq!(leader.held(&body(PRIORITIZE)).as_deref(), Some("n0001"));
}

#[test]
fn prioritize_spreads_where_the_pod_says_so() {
    let leader = Leader::new(&[("n0000", 40), ("n0001", 40), ("n0002", 24)]);
    leader.tell(bind_on("n0001", "other", 20));
    let mut pod = body(PRIORITIZE);
    pod["Pod"]["metadata"]["annotations"] = json!({"ebb.dev/placement": "spread"});
    let result = leader.answer(Verb::Prioritize, &pod);
    assert_eq!(result[0]["Score"], 10, "{result}");
    assert_eq!(leader.held(&pod).as_deref(), Some("n0000"));
}

#[test]
fn filter_learns_what_is_asked_and_counts_a_pod_once() {
    let leader = Leader::new(&[("n0000", 24)]);
    for _ in 0..3 {
        leader.answer(Verb::Filter, &body(FILTER));
    }
    let hands = leader.ledger.read(|ledger| leader.mix.lock().hands(ledger));
    assert!(!hands.is_empty());
}

#[test]
fn a_pod_without_gpu_memory_is_kept_off_gpus() {
    let leader = Leader::new(&[("n0000", 24)]);
    let mut pod = body(PRIORITIZE);
    pod["Pod"]["spec"]["containers"][0]["resources"] = json!({"requests": {"cpu": "2"}});
    leader.tell(Event::Node(NodeFacts {
        name: "n0001".into(),
        fence: None,
        allocatable: None,
        labels: Arc::default(),
        images: Images::default(),
    }));
    let result = leader.answer(Verb::Prioritize, &pod);
    assert_eq!(result[1]["Score"], 10, "{result}");
    assert_eq!(leader.held(&pod), None);
}

#[test]
fn race_the_next_pods_filter_before_this_pods_bind() {
    // One node passes: nobody will ask to prioritize, so filter itself holds it.
    let mut leader = Leader::new(&[("n0000", 24)]);
    let first = body(FILTER);
    let mut second = first.clone();
    second["Pod"]["metadata"]["uid"] = json!("second");
    assert_eq!(leader.answer(Verb::Filter, &first)["NodeNames"], json!(["n0000"]));
    assert_eq!(leader.answer(Verb::Filter, &second)["NodeNames"], json!([]));
    assert_eq!(
        leader.answer(Verb::Filter, &first)["NodeNames"],
        json!(["n0000"]),
        "its own hold is no obstacle"
    );
    leader.now_ms = 10_001;
    assert_eq!(
        leader.answer(Verb::Filter, &second)["NodeNames"],
        json!(["n0000"])
    );
}

#[test]
fn refused_pods_get_one_event_each_time_that_memory_frees() {
    let leader = Leader::new(&[("n0000", 24)]);
    leader.tell(bind_on("n0000", "other", 12));
    leader.answer(Verb::Filter, &body(FILTER));
    let event = || leader.ledger.read(|ledger| leader.refused.fits_by_now(ledger));
    assert_eq!(event(), None);
    leader.tell(Event::Pod(PodFacts {
        finished: true,
        ..bound_on("n0000", "other", 12)
    }));
    leader.tell(Event::PodGone("other".into()));
    assert_eq!(event().map(|node| node.to_string()).as_deref(), Some("n0000"));
    assert_eq!(event(), None);
}

#[test]
fn a_second_start_waits_for_the_first_is_told_so_and_is_tried_again_after_it() {
    let mut leader = Leader {
        ledger: SharedLedger::new(Some(Duration::from_secs(600))),
        now_ms: 13_500,
        ..Leader::new(&[])
    };
    leader.add_node("n0000", 60);
    let other = |start| {
        Event::Pod(PodFacts {
            start,
            ..bound_on("n0000", "other", 12)
        })
    };
    leader.tell(other(Start::Loading { since_ms: 1_000 }));
    let told = |answer: &Value| {
        answer["FailedAndUnresolvableNodes"]["n0000"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let refused = leader.answer(Verb::Filter, &body(FILTER));
    assert_eq!(
        told(&refused),
        "GPU 0 of n0000: default/other is starting (for 12 s, at most 10 min): one start at a time per GPU"
    );
    assert_eq!(refused["FailedNodes"], json!({}), "nobody is evicted for that");
    let again = |leader: &Leader| {
        leader
            .ledger
            .read(|ledger| leader.refused.fits_by_now(ledger))
            .is_some()
    };
    assert!(!again(&leader));
    leader.tell(other(Start::Over));
    assert!(again(&leader), "it is Ready");
    // And where it never is: by time alone.
    leader.tell(other(Start::Loading { since_ms: 14_000 }));
    leader.answer(Verb::Filter, &body(FILTER));
    leader.ledger.update(|ledger| ledger.expire(613_999));
    assert!(!again(&leader));
    leader.ledger.update(|ledger| ledger.expire(614_000));
    assert!(again(&leader));
    leader.now_ms = 614_000;
    assert_eq!(
        leader.answer(Verb::Filter, &body(FILTER))["NodeNames"],
        json!(["n0000"])
    );
    // Now this pod's own start is about to come, and is no obstacle to itself.
    let mut next = body(FILTER);
    next["Pod"]["metadata"]["uid"] = json!("next");
    let waits = leader.answer(Verb::Filter, &next);
    assert!(told(&waits).contains("is about to start"), "{waits}");
    assert_eq!(
        leader.answer(Verb::Filter, &body(FILTER))["NodeNames"],
        json!(["n0000"])
    );
}

#[test]
fn preempt_evicts_nobody_for_nothing() {
    let leader = Leader::new(&[("n0000", 80), ("n0001", 80)]);
    // 50 GiB asked: the victim of n0000 leaves enough, the one of n0001 does not.
    leader.tell(bind_on("n0000", "21ca439a-cbe1-45a3-ac88-480100bee548", 60));
    leader.tell(bind_on("n0001", "d2e79eb8-e7d0-4142-bf53-523adde78eb6", 30));
    leader.tell(bind_on("n0001", "stays", 40));
    let sent = body(PREEMPT);
    let result = leader.answer(Verb::Preempt, &sent);
    let asked = &sent["NodeNameToMetaVictims"];
    assert_eq!(
        result,
        json!({"NodeNameToMetaVictims": {"n0000": asked["n0000"]}})
    );
}

#[test]
fn while_nobody_leads_every_node_is_refused_in_words_and_nothing_is_an_error() {
    let result = away(Verb::Filter, &body(FILTER));
    assert_eq!(result["NodeNames"], json!([]));
    assert_eq!(result["FailedNodes"]["n0001"], NO_LEADER);
    assert_eq!(result["Error"], "");
    assert_eq!(
        away(Verb::Preempt, &body(PREEMPT)),
        json!({"NodeNameToMetaVictims": {}})
    );
    assert_eq!(away(Verb::Prioritize, &body(PRIORITIZE))[2]["Score"], 0);
}

#[test]
fn bind_is_read_as_the_scheduler_spells_it() {
    let bind: wire::BindArgs = serde_json::from_value(body(BIND)).unwrap();
    assert_eq!(bind.pod, "d1-659d7955cd-k6z7w");
    assert_eq!(
        (bind.namespace.as_str(), bind.node.as_str()),
        ("default", "n0002")
    );
    assert_eq!(bind.uid, "69078e7b-0eb7-4c00-8d7d-e1533137e373");
}

#[test]
fn adversarial_bodies_are_refused() {
    let leader = Leader::new(&[]);
    for verb in [Verb::Filter, Verb::Prioritize, Verb::Preempt] {
        for body in [
            "",
            "{}",
            "null",
            "[]",
            r#"{"Pod": 3}"#,
            r#"{"Pod": {"spec": {"containers": "x"}}}"#,
        ] {
            let desk = Desk {
                ledger: &leader.ledger,
                refused: &leader.refused,
                mix: &leader.mix,
                packing: &|_| Packing::default(),
                now_ms: 0,
            };
            assert!(verb.here(desk, body.as_bytes()).is_err(), "{verb:?} {body}");
            assert!(verb.away(body.as_bytes()).is_err(), "{verb:?} {body}");
        }
    }
}

#[test]
fn escapes_and_nulls_are_read() {
    let body = r#"{"Pod":{"metadata":{"name":"ab","namespace":null,"uid":"u","annotations":null},
        "spec":{"containers":[{"name":"c","resources":null}],"initContainers":null}},"Nodes":null,"NodeNames":["n\/1"]}"#;
    let (pod, candidates) = serde_json::from_str::<wire::Args>(body).unwrap().split().unwrap();
    assert_eq!((pod.name(), pod.namespace()), ("ab", ""));
    assert_eq!(candidates.names, ["n/1"]);
    assert!(pod.request().unwrap().is_none());
}
