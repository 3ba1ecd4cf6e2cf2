//! The story, step by step. A step that is not seen in the API server ends it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::figures::{self, Times};
use super::observe::{What, grant};
use super::timeline::{Timeline, gib, seconds, short_uuid};
use super::traffic::{self, Tally};
use crate::ebb_install::{EBB, MODELS, SAMPLE_MODELS, SAMPLE_NODE_POLICY, SAMPLE_SCALE_POLICY, Site};

/// The sample models.
const NAMES: [&str; 3] = ["tiny-chat", "code", "big"];
/// Longest wait for one step.
const STEP: Duration = Duration::from_secs(60);
/// Requests sent at once.
const BURST: usize = 100;
/// Tokens of the stream that outlives its neighbours' sleep: about 20 s.
const LONG_STREAM: u32 = 800;

/// Tells the whole story.
///
/// # Errors
/// Says which step was not seen, or which request failed.
pub async fn tell(site: &Site, timeline: &Timeline) -> anyhow::Result<()> {
    let start = Instant::now();
    let tally = Arc::new(Tally::default());
    let first_node = site
        .observer
        .look(|state| state.gpu_nodes_now().into_iter().next());
    let first_node = first_node.context("the node group has no node")?;
    install(site, timeline).await?;
    let addresses = apply_models(site, timeline).await?;
    let (bound, first_byte) = wake_one(site, timeline, &tally, addresses[0]).await?;
    let (stream, heard) = open_stream(&tally, addresses[0]);
    let burst = burst(site, timeline, &tally, &addresses).await?;
    share_one_gpu(site, timeline).await?;
    sleep_again(site, timeline, stream, &heard).await?;
    release(site, timeline, &first_node).await?;
    let first_byte_without_node = back_again(site, timeline, &tally, addresses[2]).await?;
    timeline.chapter("What it came to");
    let times = Times {
        start,
        bound,
        first_byte,
        burst,
        first_byte_without_node,
    };
    site.observer
        .look(|state| figures::print(timeline, state, &tally, &times))?;
    timeline.line("");
    timeline.check(format!(
        "every step was seen in the API server, in {}",
        seconds(timeline.elapsed())
    ));
    Ok(())
}

async fn install(site: &Site, timeline: &Timeline) -> anyhow::Result<()> {
    let version = site.client.apiserver_version().await?;
    timeline.check(format!("Kubernetes {} is up, RBAC on", version.git_version));
    timeline.during("Ebb's pods start", site.install_ebb()).await?;
    let accounts = site.observer.look(|state| {
        let own = state.pods.iter().filter(|(name, _)| name.starts_with(EBB));
        let specs: Vec<_> = own.filter_map(|(_, pod)| pod.spec.as_ref()).collect();
        let accounts: BTreeSet<_> = specs
            .iter()
            .filter_map(|spec| spec.service_account_name.clone())
            .collect();
        (specs.len(), accounts)
    });
    timeline.check(format!(
        "kubectl apply -f manifests/: {} pods run as {}",
        accounts.0,
        accounts.1.into_iter().collect::<Vec<_>>().join(", ")
    ));
    Ok(())
}

async fn apply_models(site: &Site, timeline: &Timeline) -> anyhow::Result<[SocketAddr; 3]> {
    timeline.chapter("Three models, applied as they are, sleep");
    site.apply_policy(SAMPLE_SCALE_POLICY).await?;
    site.apply(SAMPLE_MODELS).await?;
    let [a, b, c] = NAMES;
    let addresses = timeline.during("the gates take the models' Services", async {
        let addresses = [
            site.address(MODELS, a).await?,
            site.address(MODELS, b).await?,
            site.address(MODELS, c).await?,
        ];
        for (name, address) in NAMES.iter().zip(addresses) {
            site.reachable(address, STEP)
                .await
                .with_context(|| format!("the Service of the sleeping model {name}"))?;
        }
        anyhow::Ok(addresses)
    });
    let addresses = addresses.await?;
    site.observer.look(|state| {
        for name in NAMES {
            let workload = format!("{MODELS}/{name}");
            let replicas = state.replicas(&workload);
            ensure!(
                replicas == Some(0),
                "{name} was applied and has {replicas:?} replicas, not 0"
            );
            ensure!(
                state.pods_of(&workload).next().is_none(),
                "{name} sleeps and has a pod"
            );
        }
        Ok(())
    })?;
    timeline.check(
        "tiny-chat (10 GiB), code (12 GiB), big (22 GiB): 0 replicas, no pod, and a Service that answers",
    );
    Ok(addresses)
}

async fn wake_one(
    site: &Site,
    timeline: &Timeline,
    tally: &Tally,
    address: SocketAddr,
) -> anyhow::Result<(Duration, Duration)> {
    timeline.chapter("A request wakes a model");
    let workload = format!("{MODELS}/{}", NAMES[0]);
    timeline.say(format!(
        "POST http://{address}/v1/chat/completions (Service {workload})"
    ));
    let sent = Instant::now();
    let answer = timeline
        .during(
            "the model loads",
            traffic::stream(tally, address, NAMES[0], 16, STEP, |_| ()),
        )
        .await?;
    let bound = site
        .observer
        .until("the woken pod is bound", STEP, |state| {
            state
                .binds
                .iter()
                .find(|bind| bind.pod.starts_with(&workload))
                .map(|bind| bind.at)
        })
        .await?;
    let wakes = site.observer.look(|state| state.wakes(&workload));
    ensure!(wakes == 1, "one request caused {wakes} wakes of {workload}");
    let bound = bound.saturating_duration_since(sent);
    timeline.check(format!(
        "answered: pod bound after {}, first byte after {}, all of it after {}",
        seconds(bound),
        seconds(answer.first_byte),
        seconds(answer.total)
    ));
    Ok((bound, answer.first_byte))
}

type Stream = tokio_util::task::AbortOnDropHandle<anyhow::Result<traffic::Answer>>;

/// Opens a long stream; the counter holds the bytes that have come.
fn open_stream(tally: &Arc<Tally>, address: SocketAddr) -> (Stream, Arc<AtomicUsize>) {
    let heard = Arc::new(AtomicUsize::new(0));
    let (tally, counter) = (Arc::clone(tally), Arc::clone(&heard));
    let stream = tokio::spawn(async move {
        let part = |bytes| counter.store(bytes, Relaxed);
        traffic::stream(&tally, address, NAMES[0], LONG_STREAM, 2 * STEP, part).await
    });
    (Stream::new(stream), heard)
}

async fn burst(
    site: &Site,
    timeline: &Timeline,
    tally: &Arc<Tally>,
    addresses: &[SocketAddr; 3],
) -> anyhow::Result<Duration> {
    timeline.chapter("100 requests at once to a sleeping model");
    // Not before the first model is on the node: an empty one would go at once.
    site.apply_policy(SAMPLE_NODE_POLICY).await?;
    timeline.say("the node group has its policy: a node that is empty for 3 s is given back");
    timeline.say("a long stream from tiny-chat is open meanwhile");
    let mark = site.observer.mark();
    let start = Instant::now();
    let requests = (0..BURST).map(|_| {
        let (tally, address) = (Arc::clone(tally), addresses[1]);
        async move { traffic::chat(&tally, address, NAMES[1], 16, STEP).await }
    });
    let all = futures::future::join_all(requests);
    let other = traffic::chat(tally, addresses[2], NAMES[2], 16, STEP);
    let (answers, other) = timeline
        .during("two more models load", async { tokio::join!(all, other) })
        .await;
    let took = start.elapsed();
    let lost: Vec<String> = answers
        .iter()
        .filter_map(|a| a.as_ref().err())
        .map(|e| format!("{e:#}"))
        .collect();
    ensure!(
        lost.is_empty(),
        "{} of {BURST} requests were lost; the first: {}",
        lost.len(),
        lost.first().map_or("", |first| first)
    );
    let last = answers
        .iter()
        .flatten()
        .map(|answer| answer.total)
        .max()
        .unwrap_or_default();
    let wakes = site
        .observer
        .look(|state| state.wakes_since(&format!("{MODELS}/{}", NAMES[1]), mark));
    ensure!(wakes == 1, "{BURST} requests at once caused {wakes} wakes");
    timeline.check(format!(
        "{BURST} answers, one wake, none lost; the last came after {}",
        seconds(last)
    ));
    other.context("the third model, woken beside the burst")?;
    timeline.check(format!(
        "big was woken beside it and answered, all within {}",
        seconds(took)
    ));
    Ok(last)
}

async fn share_one_gpu(site: &Site, timeline: &Timeline) -> anyhow::Result<()> {
    timeline.chapter("Two models on one GPU");
    let mut on = Vec::new();
    for name in NAMES {
        let pod = site
            .observer
            .look(|state| state.bound_pod(&format!("{MODELS}/{name}")).cloned())
            .with_context(|| format!("{name} answered a moment ago and has no pod now"))?;
        let granted = grant(&pod).with_context(|| format!("{name}'s pod has no GPU annotations"))?;
        let seen = site.environment(&pod).await?;
        site.check_environment(&pod, &seen)?;
        let text = |key: &str| seen.get(key).and_then(Value::as_str).unwrap_or("-").to_owned();
        timeline.say(format!(
            "{name}: {} · {} bytes ({}) · share {}",
            text("NVIDIA_VISIBLE_DEVICES"),
            text("EBB_GPU_MEMORY_BYTES"),
            gib(granted.bytes),
            text("EBB_GPU_MEMORY_SHARE")
        ));
        on.push((granted, pod));
    }
    let node = |i: usize| on.get(i).and_then(|(_, pod)| super::observe::node_of(pod));
    let uuids = |i: usize| on.get(i).map(|(grant, _)| &grant.uuids);
    ensure!(
        uuids(0) == uuids(1) && node(0) == node(1),
        "tiny-chat (10 GiB) and code (12 GiB) fit on one GPU and are on two"
    );
    ensure!(uuids(0) != uuids(2), "big shares a GPU that it does not fit on");
    timeline.check(format!(
        "tiny-chat and code share {} of {}; each process sees its own GPU, bytes and share and no other",
        uuids(0)
            .and_then(|uuids| uuids.first())
            .map_or("", |uuid| short_uuid(uuid)),
        node(0).unwrap_or_default()
    ));
    // The processes' memory, found by their cgroups: each pod has on its GPU what it was given, nearly.
    let told = site
        .observer
        .until("the agents tell of each pod's memory", STEP, |state| {
            let told = on.iter().map(|(granted, pod)| {
                let used = state.used_by.get(granted.uuids.first()?)?;
                used.get(pod.metadata.uid.as_deref()?).copied()
            });
            told.collect::<Option<Vec<u64>>>()
        });
    let told = told.await?;
    for ((granted, _), used) in on.iter().zip(&told) {
        ensure!(
            *used > 0 && *used <= granted.bytes,
            "{used} bytes are told of a pod that was given {}",
            granted.bytes
        );
    }
    let figures: Vec<String> = NAMES
        .iter()
        .zip(&told)
        .map(|(name, used)| format!("{name} {}", gib(*used)))
        .collect();
    timeline.check(format!("the agents tell what each uses: {}", figures.join(", ")));
    Ok(())
}

async fn sleep_again(
    site: &Site,
    timeline: &Timeline,
    stream: Stream,
    heard: &AtomicUsize,
) -> anyhow::Result<()> {
    timeline.chapter("Idle models go back to sleep; an open stream is not cut");
    let asleep = |name: &'static str| {
        site.observer.until(
            "an idle model goes to zero and its pod is gone",
            STEP,
            move |state| {
                let workload = format!("{MODELS}/{name}");
                let gone = state.replicas(&workload) == Some(0) && state.pods_of(&workload).next().is_none();
                gone.then_some(())
            },
        )
    };
    timeline
        .during("code and big are idle", async {
            tokio::try_join!(asleep(NAMES[1]), asleep(NAMES[2]))
        })
        .await?;
    ensure!(
        !stream.is_finished(),
        "the stream ended before its neighbours slept: nothing was shown"
    );
    let so_far = heard.load(Relaxed);
    timeline.check(format!(
        "code and big sleep; the stream from tiny-chat goes on ({so_far} bytes so far)"
    ));
    let answer = timeline.during("the stream comes to its end", stream).await??;
    timeline.check(format!(
        "the stream came whole: {} tokens in {}, longest pause {}",
        answer.tokens(),
        seconds(answer.total),
        seconds(answer.longest_gap)
    ));
    ensure!(
        answer.tokens() >= LONG_STREAM as usize,
        "the stream had {} tokens of {LONG_STREAM}",
        answer.tokens()
    );
    timeline.during("tiny-chat is idle now", asleep(NAMES[0])).await?;
    timeline.check("all three models sleep, their GPU memory is free");
    Ok(())
}

async fn release(site: &Site, timeline: &Timeline, node: &str) -> anyhow::Result<()> {
    timeline.chapter("The emptied node is handed back");
    let gone = site
        .observer
        .until("the emptied node is released and gone", STEP, |state| {
            (!state.nodes.contains_key(node)).then_some(())
        });
    timeline.during("the node settles", gone).await?;
    let asked = site.removals(node)?;
    ensure!(
        asked.len() == 1,
        "the provider was asked {} times to remove {node}",
        asked.len()
    );
    let asked = asked[0];
    // The provider's journal and the watches here are on one machine's clock.
    let last_pod = site.observer.look(|state| {
        let gone = state
            .moments
            .iter()
            .filter(|moment| matches!(&moment.what, What::PodGone { pod } if pod.starts_with(MODELS)));
        gone.map(|moment| moment.unix_ms).filter(|at| *at <= asked).max()
    });
    let held = site.observer.look(|state| {
        let gone_later = |moment: &&super::observe::Moment| {
            moment.unix_ms > asked && matches!(&moment.what, What::PodGone { pod } if pod.starts_with(MODELS))
        };
        state.moments.iter().filter(gone_later).count()
    });
    ensure!(
        held == 0,
        "{node} was given away while {held} model pods were on it"
    );
    let waited = last_pod.map_or(0, |last| asked - last);
    timeline.check(format!(
        "the provider was asked once to remove {node}, {} after its last model was gone",
        seconds(Duration::from_millis(waited))
    ));
    Ok(())
}

async fn back_again(
    site: &Site,
    timeline: &Timeline,
    tally: &Tally,
    address: SocketAddr,
) -> anyhow::Result<Duration> {
    timeline.chapter("The next request gets a node back");
    let nodes = site.observer.look(|state| state.gpu_nodes_now());
    ensure!(nodes.is_empty(), "there still are GPU nodes: {nodes:?}");
    let mark = site.observer.mark();
    timeline.say(format!(
        "POST http://{address}/v1/chat/completions (Service models/big), and there is no GPU node"
    ));
    let answer = timeline
        .during(
            "a node boots and the model loads",
            traffic::stream(tally, address, NAMES[2], 16, 2 * STEP, |_| ()),
        )
        .await?;
    let wakes = site
        .observer
        .look(|state| state.wakes_since(&format!("{MODELS}/{}", NAMES[2]), mark));
    ensure!(wakes == 1, "one request caused {wakes} wakes of big");
    let asked = site.additions()?;
    ensure!(
        asked.len() == 1,
        "the provider was asked for {} nodes, and one was needed",
        asked.len()
    );
    timeline.check(format!(
        "one node was asked for, it came, and the request was answered: first byte after {}",
        seconds(answer.first_byte)
    ));
    Ok(answer.first_byte)
}

/// Prints what to try on the cluster that is left running.
///
/// # Errors
/// When the models' Services are gone.
pub async fn what_to_try(site: &Site, timeline: &Timeline) -> anyhow::Result<()> {
    timeline.chapter("It is yours until Ctrl-C");
    let address = site.address(MODELS, NAMES[0]).await?;
    for line in [
        "From another terminal, in this folder:".to_owned(),
        String::new(),
        "  hack/enter kubectl get deployments,pods -n models -o wide".to_owned(),
        "  hack/enter kubectl get nodes,gpunodes,scalepolicies,nodepolicies".to_owned(),
        "  hack/enter kubectl get events -A --field-selector reportingComponent=ebb-controller --sort-by=.metadata.creationTimestamp".to_owned(),
        format!(
            "  hack/enter curl -s http://{address}/v1/chat/completions -d '{{\"messages\":[{{\"role\":\"user\",\"content\":\"hello\"}}]}}'"
        ),
        format!(
            "  hack/enter curl -sN http://{address}/v1/chat/completions -d '{{\"stream\":true,\"messages\":[{{\"role\":\"user\",\"content\":\"hello\"}}]}}'"
        ),
        String::new(),
        format!("Logs and state: {}", site.dir().display()),
        "Where another lab runs beside this one: hack/enter names both, and takes --lab PID.".to_owned(),
        "What happens goes on being told below.".to_owned(),
        String::new(),
    ] {
        timeline.line(&line);
    }
    Ok(())
}
