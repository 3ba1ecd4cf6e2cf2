//! The scheduler extender between a real kube-scheduler and a real API server, installed from `manifests/`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "extender/client.rs"]
mod client;
#[path = "extender/hall.rs"]
mod hall;
#[path = "extender/preempt.rs"]
mod preempt;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::ensure;
use ebb_lab::ebb_install::{EBB, MODELS};
use ebb_lab::node::NodeSpec;
use futures::future::try_join_all;
use hall::{GIB, Hall, STEP};
use kube::ResourceExt as _;
use kube::api::{Patch, PatchParams};
use serde_json::json;

/// Longest that all scenarios take.
const LIMIT: Duration = Duration::from_secs(280);

#[test]
fn e2e_extender() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut hall = Hall::open(env!("CARGO_BIN_EXE_ebb")).await.unwrap();
        let done = tokio::time::timeout(LIMIT, scenarios(&mut hall)).await;
        let done = done.unwrap_or_else(|_| Err(anyhow::anyhow!("not done within {} s", LIMIT.as_secs())));
        if done.is_err() {
            println!("logs are kept in {}", hall.site.dir().display());
            hall.site.keep_dir();
        }
        hall.site.nodes.power_off().await;
        drop(hall);
        done.unwrap();
    });
}

async fn scenarios(hall: &mut Hall) -> anyhow::Result<()> {
    step("crash: an agent that is not heard of closes its node, and opens it when it is back");
    agent_silent(hall).await?;
    for node in ["gpu-a", "gpu-b", "gpu-c"] {
        hall.add_node(node, 4, 40 * GIB).await?;
    }
    step("two that fit together share one GPU of one node");
    share_one_gpu(hall).await?;
    step("a bind that is asked for again gets the same answer");
    bind_again(hall).await?;
    step("several GPUs and whole cards");
    several_and_whole(hall).await?;
    step("one start at a time on a GPU, and memory of a pod that was deleted by force");
    starts_and_remains(hall).await?;
    step("a burst that exactly fills all GPUs");
    burst(hall).await?;
    step("pods without room wait behind a gate, are told why, and go on in order, no more than fit");
    gated_then_bound(hall).await?;
    step("crash: the leader is killed while pods wait");
    gated_while_nobody_leads(hall).await?;
    step("a pod that can evict is not gated");
    evicts_instead_of_waiting(hall).await?;
    step("a GPU that frees without any event for the scheduler, for a pod that was refused");
    freed_in_silence(hall).await?;
    step("a pod of higher priority gets the room of one, and of no more");
    preempt::room_is_made(hall).await?;
    step("nobody is evicted whose going does not help");
    preempt::nobody_goes_for_nothing(hall).await?;
    step("crash: the leader is killed within a burst");
    leader_killed(hall).await
}

fn step(what: &str) {
    println!("== {what}");
}

/// The ledger's watch is not ours: it is given a moment.
async fn moment() {
    tokio::time::sleep(Duration::from_secs(1)).await;
}

/// A node with an agent of its own, which is taken away and given back; the other nodes have none.
async fn agent_silent(hall: &Hall) -> anyhow::Result<()> {
    const NODE: &str = "gpu-real";
    let agents = async |selector: &str| {
        let patch = format!(r#"{{"spec":{{"template":{{"spec":{{"nodeSelector":{selector}}}}}}}}}"#);
        let daemon = [
            "patch",
            "daemonset",
            "ebb-agent",
            "-n",
            EBB,
            "--type=merge",
            "-p",
            &patch,
        ];
        hall.site.kubectl(&daemon).await
    };
    let lasts = [
        "set",
        "env",
        "daemonset/ebb-agent",
        "-n",
        EBB,
        "EBB_AGENT_LEASE_DURATION=4s",
    ];
    hall.site.kubectl(&lasts).await?;
    hall.site
        .nodes
        .add(NodeSpec::gpu(NODE, 1, 24 * GIB, "NVIDIA L4"))
        .await?;
    hall.create("heard", 8 * GIB, json!({})).await?;
    hall.bound("heard").await?;
    agents(r#"{"nowhere":"true"}"#).await?;
    let closed = "its agent has not been heard of for over 4 s: new pods go elsewhere until it is";
    hall.told(NODE, closed).await?;
    ensure!(
        hall.pods()
            .get("heard")
            .await?
            .metadata
            .deletion_timestamp
            .is_none()
    );
    let unheard = hall.create("unheard", 8 * GIB, json!({})).await?;
    let told = hall.told_why(&unheard).await?;
    ensure!(told.contains(closed), "{told}");
    agents(r#"{"nowhere":null}"#).await?;
    hall.bound("unheard").await?;
    hall.told(NODE, "its agent is heard of again").await?;
    hall.clear().await?;
    hall.site.nodes.remove(NODE).await
}

async fn share_one_gpu(hall: &Hall) -> anyhow::Result<()> {
    hall.create("one", 18 * GIB, json!({})).await?;
    let one = hall.bound("one").await?;
    hall.is_ready("one").await?;
    // While the first starts, the second would go elsewhere.
    moment().await;
    hall.create("two", 18 * GIB, json!({})).await?;
    let two = hall.bound("two").await?;
    ensure!(one == two, "{one:?} and {two:?}");
    ensure!(one.gpus.len() == 1 && one.bytes == 18 * GIB, "{one:?}");
    ensure!(one.share == "0.4500", "{one:?}");
    Ok(())
}

async fn bind_again(hall: &Hall) -> anyhow::Result<()> {
    let pod = hall.pods().get("one").await?;
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap();
    let ask =
        |node: &str| json!({"PodName": "one", "PodNamespace": MODELS, "PodUID": pod.uid(), "Node": node});
    let again = hall.ask("bind", &ask(&node)).await?;
    ensure!(again == json!({"Error": ""}), "{again}");
    let elsewhere = ["gpu-a", "gpu-b"]
        .into_iter()
        .find(|other| *other != node)
        .unwrap();
    let other = hall.ask("bind", &ask(elsewhere)).await?;
    ensure!(
        other["Error"].as_str().unwrap().contains("already bound"),
        "{other}"
    );
    let mut replaced = ask(&node);
    replaced["PodUID"] = json!("another");
    let replaced = hall.ask("bind", &replaced).await?;
    ensure!(
        replaced["Error"].as_str().unwrap().contains("replaced"),
        "{replaced}"
    );
    ensure!(hall.pods().get("one").await?.resource_version() == pod.resource_version());
    Ok(())
}

async fn several_and_whole(hall: &Hall) -> anyhow::Result<()> {
    // 20 GiB on each of two.
    hall.create("pair", 40 * GIB, json!({"ebb.dev/gpus": "2"}))
        .await?;
    let pair = hall.bound("pair").await?;
    ensure!(
        pair.gpus.len() == 2 && pair.bytes == 20 * GIB && pair.share == "0.5000",
        "{pair:?}"
    );
    hall.create("whole", 10 * GIB, json!({"ebb.dev/sharing": "exclusive"}))
        .await?;
    let whole = hall.bound("whole").await?;
    let placed = hall.placed().await?;
    let others = placed
        .values()
        .filter(|place| place.gpus.iter().any(|gpu| whole.gpus.contains(gpu)));
    ensure!(others.count() == 1, "{placed:?}");
    hall.check_reservations()?;
    hall.clear().await
}

async fn starts_and_remains(hall: &Hall) -> anyhow::Result<()> {
    // One card has room, and so much of it in use.
    let one_card = |used: u64| {
        try_join_all(["gpu-a", "gpu-b", "gpu-c"].map(|node| {
            let gpus = (0..4).map(|index| {
                let mut gpu = hall.gpu(node, index, 40 * GIB);
                let the_one = node == "gpu-a" && index == 0;
                gpu["memoryUsed"] = json!(if the_one { used } else { 40 * GIB });
                gpu
            });
            hall.tell_gpus(node, gpus.collect())
        }))
    };
    one_card(0).await?;
    moment().await;
    hall.create("first", 18 * GIB, json!({hall::NEVER_READY: "true"}))
        .await?;
    let place = hall.bound("first").await?;
    let second = hall.create("second", 18 * GIB, json!({})).await?;
    let text = hall.told_why(&second).await?;
    ensure!(
        text.contains("GPU 0 of gpu-a: models/first is starting (for ")
            && text.contains("at most 10 min): one start at a time per GPU"),
        "{text}"
    );
    hall.say_ready("first").await?;
    ensure!(hall.bound("second").await? == place, "elsewhere than {place:?}");

    one_card(36 * GIB).await?;
    hall.force("first").await?;
    moment().await;
    let third = hall.create("third", 20 * GIB, json!({})).await?;
    let text = hall.told_why(&third).await?;
    ensure!(
        text.contains("GPU 0 of gpu-a has 4 GiB free, 20 GiB asked"),
        "{text}"
    );
    one_card(18 * GIB).await?;
    ensure!(hall.bound("third").await?.gpus == place.gpus);
    hall.check_reservations()?;
    hall.clear().await?;
    try_join_all(["gpu-a", "gpu-b", "gpu-c"].map(|node| {
        let gpus = (0..4).map(|index| hall.gpu(node, index, 40 * GIB));
        hall.tell_gpus(node, gpus.collect())
    }))
    .await?;
    moment().await;
    Ok(())
}

async fn burst(hall: &Hall) -> anyhow::Result<()> {
    // 3 nodes × 4 GPUs × 40 GiB = 60 × 8 GiB.
    let names: Vec<String> = (0..60).map(|index| format!("burst-{index}")).collect();
    try_join_all(names.iter().map(|name| hall.create(name, 8 * GIB, json!({})))).await?;
    for name in &names {
        hall.bound(name).await?;
    }
    per_gpu(hall, 40 * GIB, 12).await
}

async fn gated_then_bound(hall: &Hall) -> anyhow::Result<()> {
    // Nothing is free. Ages count in seconds, and of equal ones the names. A large one, four of which there will be room for two, and one that comes last and first.
    let never = json!({"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass",
        "metadata": {"name": "first"}, "value": 10, "preemptionPolicy": "Never"});
    hall.site.apply(&never.to_string()).await?;
    let large = hall.create("large", 40 * GIB, json!({})).await?;
    for index in 0..4 {
        hall.create(&format!("wait-{index}"), 8 * GIB, json!({})).await?;
    }
    let first = json!({"spec": {"priorityClassName": "first"}});
    hall.create_with("urgent", 8 * GIB, first).await?;
    for name in ["large", "wait-0", "wait-1", "wait-2", "wait-3", "urgent"] {
        ensure!(hall.is_gated(name).await?, "{name} was not gated");
    }
    let told = hall.event(&large, "WaitsForGpuMemory").await?;
    let words = "0 of 3 GPU nodes have room for 40 GiB on one GPU: 3 no GPU with 40 GiB free; nearest: GPU ";
    ensure!(
        told.starts_with(words) && told.contains(" has 0 B free, 40 GiB asked"),
        "{told}"
    );

    // One that is deleted while it waits is nobody's predecessor.
    hall.delete("wait-0").await?;
    hall.delete("burst-7").await?;
    hall.bound("urgent").await?;
    hall.delete("burst-8").await?;
    hall.bound("wait-1").await?;
    // Whoever is told after that was looked at after that, and so were the others.
    let late = hall.create("wait-late", 8 * GIB, json!({})).await?;
    hall.event(&late, "WaitsForGpuMemory").await?;
    for name in ["large", "wait-2", "wait-3", "wait-late"] {
        ensure!(hall.is_gated(name).await?, "{name} was let on without room");
    }
    per_gpu(hall, 40 * GIB, 12).await
}

async fn gated_while_nobody_leads(hall: &Hall) -> anyhow::Result<()> {
    let (leader, _) = hall.leader().await?;
    hall.kill(&leader)?;
    hall.delete("burst-9").await?;
    // wait-2 is before wait-3 and wait-late, and large is too large.
    hall.bound("wait-2").await?;
    ensure!(hall.is_gated("wait-3").await? && hall.is_gated("large").await?);
    per_gpu(hall, 40 * GIB, 12).await
}

async fn evicts_instead_of_waiting(hall: &Hall) -> anyhow::Result<()> {
    let high = json!({"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass",
        "metadata": {"name": "evicts"}, "value": 100});
    hall.site.apply(&high.to_string()).await?;
    let evicts = json!({"spec": {"priorityClassName": "evicts"}});
    hall.create_with("evicting", 8 * GIB, evicts).await?;
    ensure!(
        !hall.is_gated("evicting").await?,
        "the scheduler must see it to evict for it"
    );
    hall.bound("evicting").await?;
    hall.check_reservations()
}

async fn freed_in_silence(hall: &Hall) -> anyhow::Result<()> {
    hall.clear().await?;
    // Every card has memory in use by something that is no pod.
    let told = async |nodes: &[&str], used: u64| {
        try_join_all(nodes.iter().map(|node| {
            let gpus = (0..4).map(|index| {
                let mut gpu = hall.gpu(node, index, 40 * GIB);
                gpu["memoryUsed"] = json!(used);
                gpu
            });
            hall.tell_gpus(node, gpus.collect())
        }))
        .await
    };
    let all = ["gpu-a", "gpu-b", "gpu-c"];
    // Made while there is room, and kept back by somebody else until there is none: the scheduler sees it.
    ungated(hall, "silent", 18 * GIB).await?;
    told(&all, 30 * GIB).await?;
    // The ledger's watch is not ours: what a waiting pod is told shows what has come.
    let words = "3 no GPU with 18 GiB free; nearest: GPU 0 of gpu-a has 10 GiB free, 18 GiB asked; 30 GiB held by \
                 processes outside Kubernetes";
    until_told(hall, 18 * GIB, words).await?;
    let retries = hall.note_retries();
    let free = json!([{"op": "remove", "path": "/spec/schedulingGates"}]);
    let free = Patch::Json::<()>(serde_json::from_value(free)?);
    hall.pods()
        .patch("silent", &PatchParams::default(), &free)
        .await?;
    let text = hall.refused("silent").await?;
    ensure!(text.contains("has 10 GiB free, 18 GiB asked"), "{text}");
    ensure!(text.contains("2 no GPU with 18 GiB free"), "{text}");
    // Memory that frees and is not enough is no reason to try again.
    told(&["gpu-a"], 29 * GIB).await?;
    until_told(hall, 30 * GIB, "nearest: GPU 0 of gpu-a has 11 GiB free").await?;
    ensure!(retries.seen().is_empty(), "{:?}", retries.seen());
    let began = tokio::time::Instant::now();
    told(&["gpu-b"], 0).await?;
    hall.bound("silent").await?;
    println!("   bound {} ms after the GPUs freed", began.elapsed().as_millis());
    ensure!(began.elapsed() < STEP / 4, "only a stray event helped");
    told(&all, 0).await?;
    // Whoever is bound by now was bound after the retry, and so its watch event has come soon.
    while retries.seen().is_empty() {
        ensure!(began.elapsed() < STEP, "no retry");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    ensure!(retries.seen().len() == 1, "one retry, not {:?}", retries.seen());
    hall.clear().await
}

/// Creates a pod behind a gate of somebody else's alone, once there is room for it.
async fn ungated(hall: &Hall, name: &str, bytes: u64) -> anyhow::Result<()> {
    let deadline = tokio::time::Instant::now() + STEP;
    loop {
        let kept = json!({"spec": {"schedulingGates": [{"name": "test/kept"}]}});
        hall.create_with(name, bytes, kept).await?;
        if !hall.is_gated(name).await? {
            return Ok(());
        }
        hall.delete(name).await?;
        ensure!(tokio::time::Instant::now() < deadline, "{name} has no room");
    }
}

/// Creates pods of that size until one waits for these words.
async fn until_told(hall: &Hall, bytes: u64, words: &str) -> anyhow::Result<()> {
    let deadline = tokio::time::Instant::now() + STEP;
    for index in 0.. {
        let name = format!("probe-{}-{index}", bytes / GIB);
        let pod = hall.create(&name, bytes, json!({})).await?;
        let told = if hall.is_gated(&name).await? {
            hall.event(&pod, "WaitsForGpuMemory").await?
        } else {
            "it has room".to_owned()
        };
        hall.delete(&name).await?;
        if told.contains(words) {
            return Ok(());
        }
        ensure!(tokio::time::Instant::now() < deadline, "{name}: {told}");
    }
    unreachable!("the loop has no end")
}

async fn leader_killed(hall: &Hall) -> anyhow::Result<()> {
    let names: Vec<String> = (0..60).map(|index| format!("again-{index}")).collect();
    let (leader, _) = hall.leader().await?;
    let create = async {
        for name in &names {
            hall.create(name, 8 * GIB, json!({})).await?;
        }
        anyhow::Ok(())
    };
    let kill = async {
        hall.bound_at_least(10).await?;
        hall.kill(&leader)
    };
    tokio::try_join!(create, kill)?;
    let began = tokio::time::Instant::now();
    for name in &names {
        hall.bound(name).await?;
    }
    println!("   all bound {} ms after the kill", began.elapsed().as_millis());
    per_gpu(hall, 40 * GIB, 12).await
}

/// Every GPU is exactly full, and never was more than that.
async fn per_gpu(hall: &Hall, usable: u64, gpus: usize) -> anyhow::Result<()> {
    let mut sums: BTreeMap<String, u64> = BTreeMap::new();
    for place in hall.placed().await?.into_values() {
        for gpu in place.gpus {
            *sums.entry(gpu).or_default() += place.bytes;
        }
    }
    ensure!(
        sums.len() == gpus && sums.values().all(|sum| *sum == usable),
        "{sums:?}"
    );
    hall.check_reservations()
}
