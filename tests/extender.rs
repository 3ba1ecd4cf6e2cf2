//! The scheduler extender between a real kube-scheduler and a real API server, installed from `manifests/`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "extender/client.rs"]
mod client;
#[path = "extender/hall.rs"]
mod hall;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::ensure;
use ebb_lab::ebb_install::{EBB, MODELS};
use ebb_lab::node::NodeSpec;
use futures::future::try_join_all;
use hall::{GIB, Hall, STEP};
use kube::ResourceExt as _;
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
    step("a refused pod is told why, and bound when memory frees");
    refused_then_bound(hall).await?;
    step("a GPU that frees without any event for the scheduler");
    freed_in_silence(hall).await?;
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
    hall.create("unheard", 8 * GIB, json!({})).await?;
    let told = hall.refused("unheard").await?;
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
    hall.create("second", 18 * GIB, json!({})).await?;
    let text = hall.refused("second").await?;
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
    hall.create("third", 20 * GIB, json!({})).await?;
    let text = hall.refused("third").await?;
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

async fn refused_then_bound(hall: &Hall) -> anyhow::Result<()> {
    hall.create("late", 8 * GIB, json!({})).await?;
    let told = hall.refused("late").await?;
    // Nodes are full in total, so the scheduler's own resource check may speak before the extender is asked.
    ensure!(told.contains("0/4 nodes are available"), "{told}");
    hall.delete("burst-7").await?;
    hall.bound("late").await?;
    per_gpu(hall, 40 * GIB, 12).await
}

async fn freed_in_silence(hall: &Hall) -> anyhow::Result<()> {
    hall.clear().await?;
    // Every card has memory in use by something that is no pod.
    let told = |used: u64| {
        try_join_all(["gpu-a", "gpu-b", "gpu-c"].map(|node| {
            let gpus = (0..4).map(|index| {
                let mut gpu = hall.gpu(node, index, 40 * GIB);
                gpu["memoryUsed"] = json!(used);
                gpu
            });
            hall.tell_gpus(node, gpus.collect())
        }))
    };
    told(30 * GIB).await?;
    moment().await;
    hall.create("silent", 18 * GIB, json!({})).await?;
    let text = hall.refused("silent").await?;
    ensure!(text.contains("has 10 GiB free, 18 GiB asked"), "{text}");
    ensure!(text.contains("2 no GPU with 18 GiB free"), "{text}");
    let began = tokio::time::Instant::now();
    told(0).await?;
    hall.bound("silent").await?;
    println!("   bound {} ms after the GPUs freed", began.elapsed().as_millis());
    ensure!(began.elapsed() < STEP / 4, "only a stray event helped");
    hall.clear().await
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
